"""Fine-tuning by layer, and adversarial inner loops: against plain loops of torch's own optimizer and autograd."""

import copy
from functools import partial

import pytest
import torch
from conftest import make_config, perturbed_start, tiny_lm, toy_tasks
from test_lora import random_batch

from rayml.algorithms.inner_loop import InnerLoop, adapt, expand
from rayml.experiments.method_runs import METHODS
from rayml.lm.fine_tuning import adversarial, depth_of, gradual_unfreezing, inner_loss_transform, rate_factors
from rayml.lm.frozen import compute_known_states
from rayml.lm.load import load_base, load_tokenizer
from rayml.lm.model import TaskLM
from rayml.lm.rows import TokenRow
from rayml.lm.sides import training_sides
from rayml.model import untrained_model
from rayml.tasks.prepare import prepare_splits

LAYERS = 4


def own_weights(lm: TaskLM) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in lm.module.named_parameters()}


def last(iterator):
    *_, found = iterator
    return found


def by_sgd(path: str, batch, steps: int, rate_of, trains) -> dict[str, torch.Tensor]:
    """Fine-tune a model of its own by torch.optim.SGD, a group for each parameter."""
    module = load_base(path, "float32").requires_grad_(True)
    lm = TaskLM(module, None)
    groups = [{"params": [p], "lr": rate_of(name)} for name, p in module.named_parameters()]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        lm.losses(None, batch).sum().backward()
        for name, parameter in module.named_parameters():
            if not trains(name, step):
                parameter.grad = None
        optimizer.step()
    return {name: p.detach() for name, p in module.named_parameters()}


def test_depths(tiny):
    module = load_base(tiny, "float32")
    names = {
        "model.embed_tokens.weight": -1,
        "prompt": -1,
        "model.layers.2.mlp.down_proj.weight": 2,
        "model.layers.3.self_attn.q_proj.lora_A": 3,
        "model.norm.weight": 3,
    }
    assert {name: depth_of(module, name) for name in names} == names


def test_rates_fall_from_layer_to_layer(tiny):
    lm, batch = TaskLM(load_base(tiny, "float32"), None), random_batch(1, 4, seed=1)
    start = own_weights(lm)
    factors = rate_factors(lm.module, start, 0.5)
    inner_lrs = {name: torch.tensor(0.1 * factors[name]) for name in start}
    found = last(adapt(partial(lm.losses, batch=batch), start, inner_lrs, 3, 1)).fast
    wanted = by_sgd(tiny, batch, 3, lambda n: 0.1 * 0.5 ** (LAYERS - 1 - depth_of(lm.module, n)), lambda *_: True)
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name][0], weight, rtol=1e-4, atol=1e-6)
    moved = [
        (wanted[f"model.layers.{n}.mlp.up_proj.weight"] - start[f"model.layers.{n}.mlp.up_proj.weight"]).norm()
        for n in (0, 3)
    ]
    assert moved[0] < moved[1]


def test_layers_thaw_from_the_top(tiny):
    lm, batch = TaskLM(load_base(tiny, "float32"), None), random_batch(1, 4, seed=2)
    start = own_weights(lm)
    inner_lrs = {name: torch.tensor(0.1) for name in start}
    losses = gradual_unfreezing(partial(lm.losses, batch=batch), lm.module, every=2)
    found = last(adapt(losses, start, inner_lrs, 5, 1)).fast
    depths = {name: depth_of(lm.module, name) for name in start}
    wanted = by_sgd(tiny, batch, 5, lambda _: 0.1, lambda name, step: depths[name] >= LAYERS - 1 - step // 2)
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name][0], weight, rtol=1e-4, atol=1e-6)
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"][0], start["model.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(found["model.layers.1.mlp.up_proj.weight"][0], start["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize("name", ["full", "top_layers", "gradual", "discriminative"])
def test_the_methods_of_compare_fine_tune_the_model_itself(name, tmp_path):
    overrides = [override.split("=", 1) for override in METHODS[name].overrides]
    from rayml.config import parse_config

    values = make_config(tmp_path).model_dump(mode="json")
    config = parse_config(values, name, [f"{key}={value}" for key, value in overrides])
    splits = prepare_splits(config.data)
    model = untrained_model(config, splits.train)
    learned = model.adapt([(e.input, e.target) for e in splits.test[0].examples], steps=2)
    assert learned.losses[-1] < learned.losses[0]
    moved = {n for n, weight in learned.weights.items() if not torch.equal(weight, model.start[n])}
    lowest = min(depth_of(model.lm.module, n) for n in moved)
    assert lowest == {"full": -1, "top_layers": 2, "gradual": 2, "discriminative": -1}[name]


def plain_adversarial(lm: TaskLM, fast, batch, epsilon: float) -> torch.Tensor:
    """The loss of each row's own worst step, by embeddings that are handed to the model in place of tokens."""
    words = lm.module.get_input_embeddings()(batch.tokens).detach()

    def losses(embeddings):
        lm.adapter.adapters = fast
        logits = lm.module(inputs_embeds=embeddings).logits
        at = batch.targets != -100
        each = torch.nn.functional.cross_entropy(logits[at], batch.targets[at], reduction="none")
        task = at.nonzero()[:, 0] // (len(batch.tokens) // batch.tasks)
        return torch.stack([each[task == t].mean() for t in range(batch.tasks)])

    leaf = words.clone().requires_grad_()
    clean = losses(leaf)
    (gradient,) = torch.autograd.grad(clean.sum(), leaf, retain_graph=True)
    worst = torch.stack([e + epsilon * e.norm() * g / g.norm() for e, g in zip(words, gradient, strict=True)])
    return (clean + losses(worst)) / 2


@pytest.mark.parametrize(("last_layers", "is_known"), [(None, False), (1, False), (1, True)])
def test_the_adversarial_loss_and_its_gradient_are_those_of_the_paper(tiny, last_layers, is_known):
    from rayml.lm.lora import TaskLoRA

    module = load_base(tiny, "float32", "eager")
    lm = TaskLM(module, TaskLoRA(module, ("q_proj", "down_proj"), 4, 8.0, last_layers))
    start, batch = perturbed_start(lm), random_batch(2, 3, seed=3)
    leaves = {name: w.clone().requires_grad_() for name, w in expand(start, 2).items()}
    if is_known:
        rows = [TokenRow(list(tokens), len(tokens)) for _, _, tokens in batch.examples]
        lm.known = compute_known_states(lm, rows, pad=1)
        assert lm.known.of(batch) is not None
    lm.losses(leaves, batch)  # what lies below the adapted layers is kept with the batch by now
    losses = adversarial(partial(lm.losses, batch=batch), lm, batch, 0.2)
    found = losses(leaves)
    gradients = torch.autograd.grad(found.sum(), list(leaves.values()))
    wanted = plain_adversarial(lm, leaves, copy.copy(batch), 0.2)
    expected = torch.autograd.grad(wanted.sum(), list(leaves.values()))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert (found > lm.losses(leaves, batch)).all()  # the worst step is worse
    assert len(module.get_input_embeddings()._forward_hooks) == 0


def meta_gradient(tiny: str, config, unfreeze_every: int = 0, epsilon: float = 0.0):
    """The meta-gradient of two episodes, by two inner steps."""
    lm, encoder = tiny_lm(tiny), config.encoder(load_tokenizer(tiny))
    sampler, start = config.data.sampler(0), perturbed_start(lm)
    episodes = [encoder.episode(sampler.episode(toy_tasks(), index)) for index in range(2)]
    support, query = training_sides(lm, episodes, encoder.pad, config)
    inner_lrs = {name: torch.tensor(0.1) for name in start}
    inner = InnerLoop(inner_lrs, 2, transform=inner_loss_transform(support, unfreeze_every, epsilon))
    return config.algorithm.meta_gradient(support, query, start, inner, torch.ones(2))


def test_meta_training_takes_adversarial_inner_steps(tiny, tmp_path):
    config = make_config(tmp_path, regularize={"adversarial": 0.5})
    plain, adversarial = meta_gradient(tiny, config), meta_gradient(tiny, config, epsilon=0.5)
    assert (adversarial.support_losses > plain.support_losses).all()
    assert not torch.equal(adversarial.query_losses, plain.query_losses)


def test_what_is_special_about_inner_steps_has_no_part_in_multi_task_learning(tiny, tmp_path):
    """It takes no inner step in training: the support's half of its gradient is whole, of the examples as they are."""
    config = make_config(tmp_path, algorithm={"name": "multitask"}, inner={"unfreeze_every": 1})
    plain, special = meta_gradient(tiny, config), meta_gradient(tiny, config, unfreeze_every=1, epsilon=0.5)
    assert torch.equal(plain.support_losses, special.support_losses)
    for name, gradient in plain.start.items():
        torch.testing.assert_close(special.start[name], gradient)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": {"name": "reptile"}, "regularize": {"adversarial": 0.1}}, "regularize.adversarial"),
        ({"algorithm": {"name": "reptile"}, "inner": {"unfreeze_every": 1, "steps": 2}}, "inner.unfreeze_every"),
        ({"mode": "full", "engine": "zero", "inner": {"layer_decay": 0.5}}, "inner.layer_decay"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **changes)
