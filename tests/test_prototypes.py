"""Prototypes as a readout: against plain loops, and through the model against one example, and one task, at a time."""

import math
from itertools import pairwise
from statistics import fmean

import pytest
import torch
from conftest import make_config, perturbed_start, tiny_lm
from torch import nn

from rayml.algorithms.inner_loop import InnerLoop, expand
from rayml.algorithms.outer_loop import Learner, initial_log_inner_lrs, outer_schedule
from rayml.algorithms.prototypes import (
    MIX,
    SCALE,
    class_losses,
    example_counts,
    label_log_probs,
    leave_one_out,
    logits,
    prototypes,
    refine,
    squared_distances,
    weigh_similarity,
)
from rayml.algorithms.registry import parse_algorithm
from rayml.lm.rows import TokenRow
from rayml.lm.sides import TaskSide

GENERATOR = torch.Generator().manual_seed(0)
CLASSES = torch.tensor([[0, 1, 1, 2, 0, 0], [1, 0, 0, -1, -1, -1], [-1] * 6])
"""Of three tasks: three classes, of which one has one example; two; and free text."""


def drawn(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def unit(*shape):
    return nn.functional.normalize(drawn(*shape), dim=-1)


def test_logits_are_those_of_a_plain_loop_with_rows_of_padding():
    support, query, labels = unit(3, 6, 7), unit(3, 4, 7), drawn(3, 4, 3)
    weights = {SCALE: torch.tensor([5.0, 7.0, 1.0]).double().log(), MIX: torch.tensor([0.5, 2.0, 1.0]).double().log()}
    found = prototypes(support, CLASSES)
    scores = logits(squared_distances(query, found), found.counts, weights, labels)
    for task, (ways, scale, mix) in enumerate(((3, 5.0, 0.5), (2, 7.0, 2.0))):
        for q in range(4):
            for c in range(ways):
                mean = torch.stack([h for h, k in zip(support[task], CLASSES[task], strict=True) if k == c]).mean(0)
                expected = -scale * (query[task, q] - mean).square().sum() + mix * labels[task, q, c]
                torch.testing.assert_close(scores[task, q, c], expected)
    assert torch.equal(scores[1, :, 2], torch.full((4,), -math.inf).double())
    assert scores[2].isfinite().all()  # free text has no class: nothing of it counts, and nothing is not a number


def test_leave_one_out_is_the_mean_of_the_others_and_so_is_its_gradient():
    states = unit(1, 6, 7).requires_grad_()
    classes = CLASSES[:1]
    found = prototypes(states, classes)
    ours = leave_one_out(states, found, classes)
    for k in range(6):
        for c in range(3):
            others = [states[0, i] for i in range(6) if classes[0, i] == c and i != k]
            if others:
                expected = (states[0, k] - torch.stack(others).mean(0)).square().sum()
                torch.testing.assert_close(ours[0, k, c], expected)
                pair = [torch.autograd.grad(one, states, retain_graph=True)[0] for one in (ours[0, k, c], expected)]
                torch.testing.assert_close(*pair)
    assert ours.isfinite().all()


NAMED = torch.tensor([[0, 1, 1, 2, 0, 0, 0, 1, 2], [1, 0, 0, 0, 1, -1, -1, -1, -1], [0, 1, 0, 1, -1, -1, -1, -1, -1]])
IS_NAME = torch.tensor([[False] * 6 + [True] * 3, [False] * 3 + [True] * 2 + [False] * 4, [False] * 9])
"""The first task has three labels' own texts, the second two, and the third, whose labels are codes, none."""


@pytest.mark.parametrize("fit", ["exact", "random", "swapped"])
def test_a_label_s_own_text_counts_as_much_as_it_tells_the_examples_apart(fit):
    states, most = unit(3, 9, 7), 3
    for task, names in ((0, (6, 7, 8)), (1, (3, 4))):
        if fit != "random":
            for row in range(names[0]):  # each example is its own label's text, or the next label's
                states[task, row] = states[task, names[(int(NAMED[task, row]) + (fit == "swapped")) % len(names)]]
    counts = example_counts(states, NAMED, IS_NAME, most)
    assert (counts[~IS_NAME] == 1).all()
    for task, names in ((0, (6, 7, 8)), (1, (3, 4))):
        right = 0
        for row in range(names[0]):
            distances = [(states[task, row] - states[task, name]).square().sum() for name in names]
            right += min(range(len(names)), key=distances.__getitem__) == NAMED[task, row]
        share, chance = (right + 2 * 0.8) / (names[0] + 2), 1 / len(names)
        worth = most * max(0.0, (share - chance) / (1 - chance))
        for number, name in enumerate(names):
            examples = int((NAMED[task, : names[0]] == number).sum())
            assert counts[task, name] == pytest.approx(min(worth, examples) if worth >= 0.05 else 0.0)
    assert (counts[0, 6:] > 0.9).all() == (fit == "exact")


def test_part_of_an_example_is_left_in_as_that_part():
    states, counts = unit(1, 4, 7), torch.tensor([[1.0, 1.0, 0.4, 2.5]]).double()
    classes = torch.tensor([[0, 1, 0, 1]])
    protos = prototypes(states, classes, counts=counts)
    left = leave_one_out(states, protos, classes)
    for k, c, other in ((0, 0, 2), (1, 1, 3)):  # without the example, the label's own text is left
        torch.testing.assert_close(
            protos.means[0, c], (states[0, k] + counts[0, other] * states[0, other]) / (1 + counts[0, other])
        )
        torch.testing.assert_close(left[0, k, c], (states[0, k] - states[0, other]).square().sum())
    scores = drawn(1, 4, 2)
    expected = nn.functional.cross_entropy(scores[0], classes[0], reduction="none") * counts[0]
    torch.testing.assert_close(class_losses(scores, classes, shares=counts)[0], expected.mean())


def test_refined_prototypes_are_those_of_a_plain_loop():
    states, counts = unit(3, 6, 7), torch.tensor([[1.0, 1, 1, 1, 1, 0.5], [1.0, 1, 2, 1, 1, 1], [1.0] * 6]).double()
    weights = {SCALE: torch.tensor([5.0, 7.0, 1.0]).double().log(), MIX: torch.tensor([0.5, 2.0, 1.0]).double().log()}
    labels = drawn(3, 6, 3)
    found = refine(prototypes(states, CLASSES, counts=counts), states, CLASSES, counts, weights, 3, labels).means
    for task, (ways, scale, mix) in enumerate(((3, 5.0, 0.5), (2, 7.0, 2.0))):
        rows = [(states[task, k], int(c), counts[task, k], labels[task, k]) for k, c in enumerate(CLASSES[task])]
        rows = [row for row in rows if row[1] >= 0]
        first = means = [weighted_mean([(h, n) for h, c, n, _ in rows if c == k]) for k in range(ways)]
        for _ in range(3):
            moved = []
            for k in range(ways):
                step, total = first[k] - means[k], 1.0
                for h, c, n, label in rows:
                    scores = [-scale * (h - mean).square().sum() + mix * label[w] for w, mean in enumerate(means)]
                    p = torch.stack(scores).softmax(0)[k]
                    step = step + n * (int(c == k) - p) * (h - means[k])
                    total += n * (int(c == k) + (3 + scale / 2) * p)
                moved.append(means[k] + step / total)
            means = moved
        torch.testing.assert_close(found[task, :ways], torch.stack(means))
    assert found.isfinite().all()


@pytest.mark.parametrize("scale", [3.0, 10.0, 30.0])
def test_refined_prototypes_tell_examples_apart_better_with_every_step(scale):
    """Also where there is nothing to tell them apart by, and where one class has a hundred times another's examples."""
    weights = {SCALE: torch.tensor([scale]).double().log()}
    for sizes in ([300, 3, 30], [30] * 3, [5] * 20):
        classes = torch.tensor([[c for c, size in enumerate(sizes) for _ in range(size)]])
        states, counts = unit(1, classes.shape[1], 5), torch.ones(classes.shape, dtype=torch.float64)
        means, losses = prototypes(states, classes), []
        for steps in range(0, 60, 6):
            protos = refine(means, states, classes, counts, weights, steps)
            scores = logits(squared_distances(states, protos), protos.counts, weights)
            losses.append(class_losses(scores, classes).item())
        assert all(later < earlier + 1e-3 for earlier, later in pairwise(losses))
        assert losses[-1] < losses[0]


def test_labels_that_begin_alike_share_the_probability_of_their_first_token():
    tokens = torch.tensor([[4, 9, 4], [3, 5, -1], [-1, -1, -1]])
    of_tokens = drawn(3, 2, 12)
    found = label_log_probs(of_tokens.gather(2, tokens.clamp(min=0).unsqueeze(1).expand(3, 2, 3)), tokens).double()
    among = of_tokens[0][:, [4, 9]].log_softmax(-1)
    expected = torch.stack([among[:, 0] - math.log(2), among[:, 1], among[:, 0] - math.log(2)], 1)
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[1, :, :2], of_tokens[1][:, [3, 5]].log_softmax(-1), atol=1e-6, rtol=1e-6)
    assert (found[1, :, 2] == 0).all()
    assert (found[2] == 0).all()


def test_losses_are_torchs_own_over_the_classes_that_there_are():
    scores = drawn(3, 6, 3)
    scores[1, :, 2] = -math.inf
    for smoothing in (0.0, 0.2):
        found = class_losses(scores, CLASSES, smoothing)
        for task, ways in ((0, 3), (1, 2)):
            counted = CLASSES[task] >= 0
            expected = nn.functional.cross_entropy(
                scores[task, counted, :ways], CLASSES[task, counted], label_smoothing=smoothing
            )
            torch.testing.assert_close(found[task], expected)
        assert found[2] == 0


# Through the model


def row(*tokens, target):
    return TokenRow([*tokens, *target], len(tokens))


LABELS = {0: [[40], [41, 42], [43]], 1: [[50, 51], [50, 52]], 2: []}
"""Of the first task they begin with different tokens, of the second with the same; the third is free text."""
SUPPORT = [
    [
        row(5, 6, 7, target=[40]),
        row(8, 9, target=[41, 42]),
        row(*range(10, 29), target=[40]),
        row(5, target=[43]),
        row(6, 8, target=[41, 42]),
    ],
    [row(9, 9, target=[50, 52]), row(7, 30, 31, target=[50, 51]), row(32, 33, target=[50, 51])],
    [row(3, 4, 5, target=[60, 61, 62]), row(3, target=[63])],
]
QUERY = [
    [row(5, 6, target=[40]), row(8, 9, 9, 9, target=[43]), row(8, 5, target=[41, 42])],
    [row(9, target=[50, 51]), row(*range(30, 39), target=[50, 52])],
    [row(3, 9, target=[60, 61])],
]


NAMES = [
    [TokenRow(tokens, len(tokens), is_name=True) for tokens in task]
    for task in ([[40, 30], [41, 42, 30], [43, 30]], [[50, 51], [50, 52]], [])
]
"""The labels' own texts."""


def classes_of(side):
    return [[LABELS[t].index(one.tokens[one.start :]) for one in of] if LABELS[t] else [] for t, of in enumerate(side)]


def sides(lm, tasks=(0, 1, 2), names=0):
    found = []
    for side in (SUPPORT, QUERY):
        rows, classes = [side[t] for t in tasks], [classes_of(side)[t] for t in tasks]
        if names and side is SUPPORT:
            rows = [[*of, *NAMES[t]] for t, of in zip(tasks, rows, strict=True)]
            classes = [[*of, *range(len(NAMES[t]))] for t, of in zip(tasks, classes, strict=True)]
        found.append(TaskSide(lm, rows, [LABELS[t] for t in tasks], classes, 1))
    return found


@pytest.fixture
def lm(tiny):
    return tiny_lm(tiny)


def hidden(lm, one, weights):
    """The hidden states of one example alone, `[L, D]`, under one task's weights: no code of ours but the hooks."""
    lm.adapter.adapters = {name: weight.unsqueeze(0) for name, weight in weights.items() if "lora" in name}
    return lm.module.model(input_ids=torch.tensor([one.tokens])).last_hidden_state[0]


def state(lm, one, weights, pooling):
    found = hidden(lm, one, weights)[: one.start]
    return nn.functional.normalize(found[-1] if pooling == "last" else found.mean(0), dim=0)


def token_loss(lm, of, labels, weights):
    """The mean loss of labels that compete token by token, or of the tokens of free text."""
    losses = []
    for one in of:
        target = one.tokens[one.start :]
        scores = lm.module.lm_head(hidden(lm, one, weights))[one.start - 1 :]
        steps = []
        for index, token in enumerate(target):
            rivals = sorted({a[index] for a in labels if a[:index] == target[:index] and len(a) > index})
            among = scores[index][rivals] if labels else scores[index]
            parse_algorithm = rivals.index(token) if labels else token
            steps.append(-among.log_softmax(0)[parse_algorithm])
        losses += [sum(steps)] if labels else steps
    return torch.stack(losses).mean()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_what_is_read_of_examples_that_share_rows_is_what_each_shows_alone(lm, pooling):
    start = perturbed_start(lm)
    support, _ = sides(lm)
    assert support.batch.position_ids is not None  # they do
    read = support.read(expand(start, 3), pooling, support.label_tokens)
    assert support.label_tokens.tolist() == [[40, 41, 43], [50, 50, -1], [-1, -1, -1]]
    for t, of in enumerate(SUPPORT):
        torch.testing.assert_close(read.losses[t], token_loss(lm, of, LABELS[t], start), atol=1e-5, rtol=1e-5)
        for k, one in enumerate(of):
            torch.testing.assert_close(read.states[t, k], state(lm, one, start, pooling), atol=1e-5, rtol=1e-5)
    first = lm.module.lm_head(hidden(lm, SUPPORT[0][1], start))[1][[40, 41, 43]].log_softmax(0)
    torch.testing.assert_close(read.label_log_probs[0, 1], first, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(support.states(expand(start, 3), pooling), read.states)


# Meta-gradients


def counted_names(lm, task, weights, names):
    """For each class the state of its label's own text with the number of examples that it counts as, in a list."""
    if not names:
        return [[] for _ in NAMES[task]]
    worth, classes = name_worth(lm, task, weights, names), classes_of(SUPPORT)[task]
    counts = [min(worth, classes.count(c)) for c in range(len(NAMES[task]))]
    return [[(state(lm, one, weights, "last"), n)] if n else [] for one, n in zip(NAMES[task], counts, strict=True)]


def name_worth(lm, task, weights, most):
    """How many examples a label's own text counts as."""
    names, right = [state(lm, one, weights, "last") for one in NAMES[task]], 0
    for one, own in zip(SUPPORT[task], classes_of(SUPPORT)[task], strict=True):
        distances = [(state(lm, one, weights, "last") - name).square().sum() for name in names]
        right += min(range(len(names)), key=distances.__getitem__) == own
    share, chance = (right + 1.6) / (len(SUPPORT[task]) + 2), 1 / len(names)
    return most * max(0.0, (share - chance) / (1 - chance))


def weighted_mean(counted):
    return sum(n * vector for vector, n in counted) / sum(n for _, n in counted)


def support_loss(lm, task, weights, readout, names):
    of, classes = SUPPORT[task], classes_of(SUPPORT)[task]
    tokens = token_loss(lm, of, LABELS[task], weights)
    if not classes:
        return tokens
    states, name_states = [state(lm, one, weights, "last") for one in of], counted_names(lm, task, weights, names)
    losses = []
    for k, own in enumerate(classes):
        others = {
            c: [(s, 1) for i, (s, label) in enumerate(zip(states, classes, strict=True)) if label == c and i != k]
            + name_states[c]
            for c in range(len(LABELS[task]))
        }
        if others[own]:
            # A class that is left without an example by this one is its own; others all have some.
            near = [-weights[SCALE].exp() * (states[k] - weighted_mean(m)).square().sum() for m in others.values()]
            losses.append(-torch.stack(near).log_softmax(0)[own] * min(1, sum(n for _, n in others[own])))
    prototype = torch.stack(losses).mean() if losses else 0.0 * tokens
    return prototype + tokens if readout == "both" else prototype


def query_loss(lm, task, weights, readout, names):
    labels, classes = LABELS[task], classes_of(QUERY)[task]
    if not labels:
        return token_loss(lm, QUERY[task], labels, weights)
    states = [state(lm, one, weights, "last") for one in SUPPORT[task]]
    name_states = counted_names(lm, task, weights, names)
    of_class = classes_of(SUPPORT)[task]
    losses = []
    for one, own in zip(QUERY[task], classes, strict=True):
        h, scores = state(lm, one, weights, "last"), lm.module.lm_head(hidden(lm, one, weights))[one.start - 1]
        firsts = [label[0] for label in labels]
        among = scores[sorted(set(firsts))].log_softmax(0)
        found = []
        for c, first in enumerate(firsts):
            mean = weighted_mean([(s, 1) for s, k in zip(states, of_class, strict=True) if k == c] + name_states[c])
            label = among[sorted(set(firsts)).index(first)] - math.log(firsts.count(first))
            mixed = weights[MIX].exp() * label if readout == "both" else 0.0
            found.append(-weights[SCALE].exp() * (h - mean).square().sum() + mixed)
        losses.append(-torch.stack(found).log_softmax(0)[own])
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("readout", "names"), [("both", 0), ("prototypes", 0), ("both", 3), ("both", 1)])
def test_the_meta_gradient_is_that_of_each_task_adapted_alone(lm, readout, names):
    """Two inner steps, first order: the query's gradient at the fast weights, and the support's at the start."""
    algorithm = parse_algorithm({"name": "proto_maml", "readout": readout, "start_weight": 0.5, "label_names": names})
    start = perturbed_start(lm) | algorithm.prototypes.start()
    inner_lrs = {name: torch.tensor(0.005) for name in start if "lora" in name}
    scores = torch.tensor([1.0, 0.5, 2.0])
    inner = InnerLoop(inner_lrs, 2, learns_inner_lrs=True)
    found = algorithm.meta_gradient(*sides(lm, names=names), start, inner, scores)
    expected = {name: torch.zeros_like(weight) for name, weight in start.items()}
    of_rates = dict.fromkeys(inner_lrs, 0.0)
    for task, score in enumerate(scores):
        fast, total = dict(start), {name: torch.zeros_like(start[name]) for name in inner_lrs}
        for step in range(2):
            leaves = fast | {name: fast[name].clone().requires_grad_() for name in inner_lrs}
            loss = support_loss(lm, task, leaves, readout, names)
            gradients = torch.autograd.grad(loss, [leaves[name] for name in inner_lrs], materialize_grads=True)
            for name, gradient in zip(inner_lrs, gradients, strict=True):
                if step == 0:
                    expected[name] += 0.5 * score * gradient
                total[name] += gradient
                fast[name] = fast[name] - inner_lrs[name] * gradient
        leaves = {name: weight.clone().requires_grad_() for name, weight in fast.items()}
        loss = query_loss(lm, task, leaves, readout, names)
        torch.testing.assert_close(found.query_losses[task], loss.detach(), atol=1e-5, rtol=1e-5)
        for name, gradient in zip(
            leaves, torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True), strict=True
        ):
            expected[name] += score * gradient
            if name in inner_lrs:
                of_rates[name] -= score * (gradient * total[name]).sum()
    for name in start:
        torch.testing.assert_close(found.start[name], expected[name], atol=1e-4, rtol=1e-3)
    for name in inner_lrs:
        torch.testing.assert_close(found.inner_lrs[name], of_rates[name], atol=2e-5, rtol=1e-3, msg=name)
    assert found.start[SCALE].abs() > 1e-3


def test_with_one_shot_the_label_tokens_alone_are_descended(lm):
    algorithm = parse_algorithm({"name": "proto_maml"})
    start = perturbed_start(lm) | algorithm.prototypes.start()
    one_shot = [[SUPPORT[0][0], SUPPORT[0][1], SUPPORT[0][3]]]
    support = TaskSide(lm, one_shot, [LABELS[0]], [[0, 1, 2]], 1)
    torch.testing.assert_close(algorithm.support_losses(support)(expand(start, 1)), support.losses(expand(start, 1)))


def test_tasks_of_free_text_alone_are_learned_as_by_fomaml(lm):
    found = {}
    for name in ("proto_maml", "fomaml_plus"):
        algorithm = parse_algorithm({"name": name})
        start = perturbed_start(lm) | (algorithm.prototypes.start() if algorithm.prototypes else {})
        inner = InnerLoop({name: torch.tensor(0.05) for name in start if "lora" in name}, 2, learns_inner_lrs=True)
        found[name] = algorithm.meta_gradient(*sides(lm, tasks=(2,)), start, inner, torch.ones(1))
    for name, gradient in found["fomaml_plus"].start.items():
        torch.testing.assert_close(found["proto_maml"].start[name], gradient)
    assert found["proto_maml"].start[SCALE] == 0


def test_scale_and_mix_have_no_inner_rate_and_learn_as_the_rates_do():
    start = {"layers.1.lora_A": torch.zeros(2, 3), SCALE: torch.tensor(2.0), MIX: torch.tensor(-1.0)}
    log_inner_lrs = initial_log_inner_lrs(start, 0.1, (), per_weight=False)
    assert set(log_inner_lrs) == {"layers.1.lora_A"}
    settings = {"lr": 0.001, "lr_of_inner_lr": 0.05, "weight_decay": 0.1, "clip_norm": 1.0}
    learner = Learner(start, log_inner_lrs, learn_rates=True, schedule=outer_schedule("constant", 0, 1), **settings)
    learner.update({name: torch.ones_like(w) for name, w in start.items()}, {"layers.1.lora_A": torch.tensor(1.0)})
    assert learner.start[SCALE] == pytest.approx(2.0 - 0.05)
    assert learner.start[MIX] == pytest.approx(-1.0 - 0.05)
    assert learner.inner_lrs["layers.1.lora_A"] == pytest.approx(0.1 * math.exp(-0.05))
    assert learner.start["layers.1.lora_A"][0, 0] == pytest.approx(-0.001)


def test_a_readout_that_does_not_go_with_an_algorithm_is_refused(tmp_path):
    for changes, message in (
        ({"algorithm": {"name": "metaicl", "readout": "both"}}, "metaicl answers in its own way"),
        ({"algorithm": {"name": "proto_maml"}, "mode": "full"}, "not proto_maml"),
        ({"algorithm": {"name": "proto_maml"}, "data": {"scoring": "pmi"}}, "use scoring=learned"),
    ):
        with pytest.raises(ValueError, match=message):
            make_config(tmp_path, **changes)


def test_similarity_counts_as_far_as_it_tells_the_classes_apart():
    """Against a loop over examples and classes."""
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(3, 7, 5, generator=generator)
    classes = torch.tensor([[0, 0, 1, 1, 2, -1, 1], [0, 1, 0, 1, 0, 1, 0], [0, 0, 0, 1, 1, 1, -1]])
    states[1, :, -1] = torch.tensor([0.1, 3.0, 0.2, 3.1, 0.0, 2.9, 0.1])  # tells them apart
    states[2, :, -1] = torch.tensor([0.0, 4.0, 0.1, 0.2, 4.0, 4.1, 9.9])
    is_pair = torch.ones(3, 7, dtype=torch.bool)
    found = weigh_similarity(states, classes, is_pair, 3)
    assert torch.equal(found[..., :-1], states[..., :-1])
    shares = []
    for task in range(3):
        rows = [(float(states[task, k, -1]), int(c)) for k, c in enumerate(classes[task]) if c >= 0]
        right = asked = 0
        for k, (own, c) in enumerate(rows):
            rest = {label: [s for j, (s, other) in enumerate(rows) if other == label and j != k] for _, label in rows}
            if rest[c]:
                asked += 1
                right += min((abs(own - fmean(some)), label) for label, some in rest.items() if some)[1] == c
        chance = 1 / len({label for _, label in rows})
        shares.append(min(1.0, max(0.0, 3 * ((right + 1.6) / (asked + 2) - chance) / (1 - chance))))
        mean = fmean(own for own, _ in rows)
        wanted = [mean + shares[-1] * (own - mean) for own, _ in rows]
        torch.testing.assert_close(found[task, classes[task] >= 0, -1], torch.tensor(wanted))
    assert shares[1] == 1.0
    assert 0 < min(shares) < 1
    assert weigh_similarity(states, classes, None, 3) is states
