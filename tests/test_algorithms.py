"""Every algorithm, against closed forms, finite differences and plain loops, in float64."""

import math

import pytest
import torch
from conftest import meta_gradient
from torch import nn

from rayml.algorithms.base import Algorithm, Minibatch
from rayml.algorithms.outer_loop import RecentGains, initial_log_inner_lrs
from rayml.algorithms.phased_optimizer import PhasedOptimizer, optimizer_steps
from rayml.algorithms.registry import REGISTERED, parse_algorithm

fomaml, maml = (
    parse_algorithm({"name": "fomaml_plus", "start_weight": 0.0}),
    parse_algorithm({"name": "maml", "learn_rates": True}),
)
reptile, multitask, query_only = (parse_algorithm({"name": name}) for name in ("reptile", "multitask", "metaicl"))
meta_sgd = parse_algorithm({"name": "meta_sgd", "start_weight": 0.0})

TASKS, WIDTH, STEPS = 3, 5, 3
GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


DATA = {side: (drawn(TASKS, 8, WIDTH), drawn(TASKS, 8)) for side in ("support", "query")}
START = {"a": drawn(WIDTH, 4) / 2, "b": drawn(4) / 2}
WEIGHTS = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)


def losses(side):
    """The losses of T little networks with a curved loss: `tanh(x a) b` against random targets."""
    x, y = DATA[side]
    return lambda fast: ((torch.tanh(x @ fast["a"]) @ fast["b"].unsqueeze(-1)).squeeze(-1) - y).square().mean(1)


def inner_lrs(value=0.2, names=("a", "b")):
    return {name: torch.tensor(value, dtype=torch.float64) for name in names}


def run(algorithm, inner_rates=None, start=START, weights=WEIGHTS, steps=STEPS):
    sides = losses("support"), losses("query")
    return meta_gradient(algorithm, *sides, start, inner_rates or inner_lrs(), steps, weights)


def slope(value, tensor, step=1e-5):
    """The gradient of `value()` for the entries of `tensor`, by central differences."""
    found = torch.zeros_like(tensor)
    for index in range(tensor.numel()):
        ends = []
        for sign in (1, -1):
            tensor.view(-1)[index] += sign * step
            ends.append(float(value()))
            tensor.view(-1)[index] -= sign * step
        found.view(-1)[index] = (ends[0] - ends[1]) / (2 * step)
    return found


def query_loss_after_adapting(start, inner_rates):
    """The weighted query losses after plain SGD, task by task: no code of ours."""
    total = 0.0
    for task in range(TASKS):
        w = {name: weight.clone() for name, weight in start.items()}
        for _ in range(STEPS):
            leaves = {name: weight.clone().requires_grad_() for name, weight in w.items()}
            loss = losses("support")({name: v.expand(TASKS, *v.shape) for name, v in leaves.items()})[task]
            gradients = torch.autograd.grad(loss, list(leaves.values()))
            w = {name: w[name] - inner_rates[name] * g for name, g in zip(w, gradients, strict=True)}
        total += WEIGHTS[task] * losses("query")({name: v.expand(TASKS, *v.shape) for name, v in w.items()})[task]
    return total


@pytest.mark.parametrize("per_weight", [False, True])
def test_maml_is_the_slope_of_the_query_loss_for_the_start_and_for_the_rates(per_weight):
    start = {name: weight.clone() for name, weight in START.items()}
    inner = {n: torch.full(w.shape if per_weight else (), 0.2, dtype=torch.float64) for n, w in start.items()}
    found = run(maml, inner, start)
    for name in start:
        for ours, tensor in ((found.start[name], start[name]), (found.inner_lrs[name], inner[name])):
            expected = slope(lambda: query_loss_after_adapting(start, inner), tensor)
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


def test_maml_goes_to_fomaml_as_the_inner_rate_goes_to_zero_and_differs_on_a_curved_loss():
    def distance(rate):
        exact, first = run(maml, inner_lrs(rate)), run(fomaml, inner_lrs(rate))
        return max(float((exact.start[name] - first.start[name]).abs().max()) for name in START)

    assert distance(0.2) > 0.1
    assert distance(1e-7) < 1e-5
    assert distance(1e-3) < distance(1e-2) / 5


def test_maml_and_fomaml_report_the_same_losses():
    exact, first = run(maml), run(fomaml)
    torch.testing.assert_close(exact.query_losses, first.query_losses)
    torch.testing.assert_close(exact.support_losses, first.support_losses)


def test_fomaml_with_a_rate_for_each_weight_sums_to_that_of_one_for_each_tensor():
    each = {name: torch.full_like(weight, 0.2) for name, weight in START.items()}
    ours, shared = run(meta_sgd, each), run(fomaml)
    for name in START:
        torch.testing.assert_close(ours.start[name], shared.start[name])
        assert ours.inner_lrs[name].shape == START[name].shape
        torch.testing.assert_close(ours.inner_lrs[name].sum(), shared.inner_lrs[name])


def test_reptile_is_the_way_back_over_the_rate_with_the_sides_taking_turns():
    expected = {name: torch.zeros_like(weight) for name, weight in START.items()}
    for task in range(TASKS):
        w = {name: weight.clone().requires_grad_() for name, weight in START.items()}
        optimizer = torch.optim.SGD(w.values(), lr=0.2)
        for side in ("support", "query", "support"):
            optimizer.zero_grad()
            losses(side)({name: v.expand(TASKS, *v.shape) for name, v in w.items()})[task].backward()
            optimizer.step()
        for name in START:
            expected[name] += WEIGHTS[task] * (START[name] - w[name].detach()) / 0.2
    found = run(reptile)
    for name in START:
        torch.testing.assert_close(found.start[name], expected[name])
    assert found.inner_lrs == {}


def test_multitask_is_the_slope_of_both_sides_at_the_start():
    start = {name: weight.clone() for name, weight in START.items()}

    def both():
        fast = {name: weight.expand(TASKS, *weight.shape) for name, weight in start.items()}
        return (WEIGHTS * (losses("support")(fast) + losses("query")(fast)) / 2).sum()

    found = run(multitask)
    for name in START:
        torch.testing.assert_close(found.start[name], slope(both, start[name]), rtol=1e-6, atol=1e-8)


def test_without_inner_steps_fomaml_maml_and_what_stands_as_it_is_agree():
    found = [run(algorithm, steps=0) for algorithm in (fomaml, maml, query_only)]
    for name in START:
        for other in found[1:]:
            torch.testing.assert_close(found[0].start[name], other.start[name])


@pytest.mark.parametrize("name", sorted(REGISTERED.keys() - {"protonet", "proto_maml"}))  # they read hidden states
def test_a_meta_gradient_is_the_weighted_sum_of_its_tasks(name):
    algorithm = parse_algorithm({"name": name})
    whole = run(algorithm)
    single = [run(algorithm, weights=WEIGHTS * (torch.arange(TASKS) == task)) for task in range(TASKS)]
    for tensor in START:
        torch.testing.assert_close(whole.start[tensor], sum(part.start[tensor] for part in single))
    for tensor in whole.inner_lrs:
        torch.testing.assert_close(whole.inner_lrs[tensor], sum(part.inner_lrs[tensor] for part in single))
    assert whole.query_losses.shape == (TASKS,)


@pytest.mark.parametrize("algorithm", [fomaml, maml])
def test_what_has_no_inner_rate_stays_in_the_inner_loop_and_still_learns(algorithm):
    """ANIL: against the same algorithm with a rate of zero there."""
    found = run(algorithm, inner_lrs(names=("b",)))
    frozen = run(algorithm, inner_lrs() | {"a": torch.tensor(0.0, dtype=torch.float64)})
    for name in START:
        torch.testing.assert_close(found.start[name], frozen.start[name])
    assert found.start["a"].abs().max() > 1e-3
    assert set(found.inner_lrs) == {"b"}


class TwiceAsked(Algorithm):
    """Asks the query within the inner loop, too."""

    def minibatches(self, steps):
        return [
            minibatch
            for k in range(steps)
            for minibatch in (Minibatch("support", descends=True), Minibatch("query", 0.5**k))
        ]


SHARDED = [kind for kind in (parse_algorithm({"name": name}) for name in REGISTERED) if kind.runs_sharded] + [
    TwiceAsked(name="")
]


@pytest.mark.parametrize("algorithm", SHARDED, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("inner", [("a", "b"), ("b",)])
def test_a_phased_optimizer_takes_the_same_outer_step_minibatch_by_minibatch(algorithm, inner):
    """What sharded engines run, task after task, against all tasks at once; also where the inner loop leaves some."""
    expected = run(algorithm, inner_lrs(names=inner))
    weights = {name: nn.Parameter(weight.clone()) for name, weight in START.items()}
    groups = [{"params": [weight], "inner_lr": 0.2 if name in inner else 0.0} for name, weight in weights.items()]
    optimizer = PhasedOptimizer(torch.optim.SGD(groups, lr=1.0))
    for task in range(TASKS):
        for step in optimizer_steps(algorithm.minibatches(STEPS)):
            optimizer.zero_grad()
            fast = {name: weight.expand(TASKS, *weight.shape) for name, weight in weights.items()}
            sum(part * losses(side)(fast)[task] for side, part in step.sides).backward()
            last = TASKS * (step.phase.restores and task == TASKS - 1)
            optimizer.enter(step.phase, step.share * float(WEIGHTS[task]), last)
            optimizer.step()
    for name, weight in weights.items():
        torch.testing.assert_close(START[name] - weight.detach(), expected.start[name] / TASKS)


def test_patterns_choose_what_the_inner_loop_changes():
    start = {"layers.1.lora_A": torch.zeros(2, 3), "layers.1.lora_B": torch.zeros(3, 2)}
    assert set(initial_log_inner_lrs(start, 0.1, (), False)) == set(start)
    (parse_algorithm,) = initial_log_inner_lrs(start, 0.1, ("*.lora_B",), True).values()
    assert parse_algorithm.shape == (3, 2)
    assert parse_algorithm[0, 0] == pytest.approx(math.log(0.1))
    assert not initial_log_inner_lrs(start, 0.1, ("head",), False)


def test_tasks_that_gained_less_weigh_more():
    gains = RecentGains(3)
    assert torch.equal(gains.weights(), torch.ones(3))
    for _ in range(20):
        gains.update(torch.tensor([2.0, 0.0, 0.0]), torch.tensor([2.0, 1.0, 0.0]))
    first, second, third = gains.weights().tolist()
    assert first < second == third  # the third was never drawn: it stays where it was, at none
    assert gains.weights().mean() == pytest.approx(1)
    gains.update(torch.tensor([1e9, 0.0, 0.0]), torch.ones(3))
    assert max(gains.weights()) / min(gains.weights()) <= 16 + 1e-3
