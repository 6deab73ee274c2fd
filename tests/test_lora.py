"""Task-batched LoRA, against one task at a time, stock PEFT, and a plain fine-tuning loop."""

import copy
import dataclasses
from functools import partial

import pytest
import torch
from conftest import TARGETS, meta_gradient, perturbed_start, tiny_lm
from peft import LoraConfig, get_peft_model
from torch import nn

from rayml.algorithms.inner_loop import adapt, task_gradients
from rayml.algorithms.registry import parse_algorithm
from rayml.errors import ConfigError
from rayml.lm.batch import IGNORE, TaskBatch, collate
from rayml.lm.frozen import WorkerShare
from rayml.lm.initialization import group_by_input, principal_start
from rayml.lm.load import checkpoint_activations, load_base
from rayml.lm.lora import MixedUpdate, TaskLoRA, find_linears
from rayml.lm.model import TaskLM
from rayml.lm.rows import TokenRow

RATE = 0.3


def random_rows(count, seed, targets=1):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5 + targets, 12, (count,), generator=generator).tolist()
    return [TokenRow(torch.randint(2, 90, (n,), generator=generator).tolist(), n - targets) for n in lengths]


def random_batch(tasks, rows, seed, targets=1) -> TaskBatch:
    return collate([random_rows(rows, seed * 100 + t, targets) for t in range(tasks)], pad=1)


def one(batch: TaskBatch, task: int) -> TaskBatch:
    rows = batch.tokens.shape[0] // batch.tasks
    part = slice(task * rows, (task + 1) * rows)
    return TaskBatch(batch.tokens[part], batch.targets[part], 1)


def inner_lrs(start):
    return {name: torch.tensor(RATE) for name in start}


@pytest.fixture
def lm(tiny):
    return tiny_lm(tiny)


def test_tasks_side_by_side_equal_tasks_one_by_one(lm):
    start, batch = perturbed_start(lm), random_batch(tasks=3, rows=4, seed=1)
    *_, together = adapt(lambda fast: lm.losses(fast, batch), start, inner_lrs(start), steps=3, tasks=3)
    for task in range(3):
        alone_batch = one(batch, task)
        *_, alone = adapt(lambda fast, b=alone_batch: lm.losses(fast, b), start, inner_lrs(start), steps=3, tasks=1)
        torch.testing.assert_close(together.support_losses[task], alone.support_losses[0])
        for name in start:
            torch.testing.assert_close(together.fast[name][task], alone.fast[name][0], rtol=1e-4, atol=1e-6)


def peft_model(lm, start):
    """Stock PEFT's model with our adapter in it."""
    config = LoraConfig(r=4, lora_alpha=8.0, target_modules=list(TARGETS), lora_dropout=0.0, bias="none")
    bare = copy.deepcopy(lm.module)
    for module in bare.modules():  # a copy without our hooks
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    model = get_peft_model(bare, config)
    weights = {f"base_model.model.{name}.default.weight": value for name, value in start.items()}
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    return model


def plain_loss(model, batch: TaskBatch):
    """Full logits, and torch's own loss over all positions."""
    return nn.functional.cross_entropy(
        model(input_ids=batch.tokens).logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE
    )


def test_losses_equal_stock_peft_with_full_logits(lm):
    start, batch = perturbed_start(lm), random_batch(tasks=2, rows=3, seed=2, targets=3)
    fast = {name: weight.expand(2, *weight.shape) for name, weight in start.items()}
    model = peft_model(lm, start)
    expected = torch.stack([plain_loss(model, one(batch, task)) for task in range(2)])
    torch.testing.assert_close(lm.losses(fast, batch), expected)


def test_the_fomaml_gradient_is_sgd_on_a_copy_and_the_gradient_there(lm):
    start = perturbed_start(lm)
    support, query = random_batch(2, 4, seed=3), random_batch(2, 3, seed=4)
    found = meta_gradient(
        parse_algorithm({"name": "fomaml"}),
        lambda fast: lm.losses(fast, support),
        lambda fast: lm.losses(fast, query),
        start,
        inner_lrs(start),
        3,
        torch.ones(2),
    )
    expected = {name: torch.zeros_like(weight) for name, weight in start.items()}
    for task in range(2):
        model = peft_model(lm, start)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(trained.values(), lr=RATE)
        for batch in [one(support, task)] * 3:
            optimizer.zero_grad()
            plain_loss(model, batch).backward()
            optimizer.step()
        optimizer.zero_grad()
        plain_loss(model, one(query, task)).backward()
        for name in start:
            expected[name] += trained[f"base_model.model.{name}.default.weight"].grad
    for name in start:
        assert expected[name].abs().max() > 1e-4  # A's gradient, too: B is not zero here
        torch.testing.assert_close(found.start[name], expected[name], rtol=1e-4, atol=1e-6)


def test_adapting_changes_no_parameter_of_the_base(lm):
    before = {name: p.clone() for name, p in lm.module.named_parameters()}
    start, batch = perturbed_start(lm), random_batch(2, 2, seed=5)
    losses = partial(lm.losses, batch=batch)
    meta_gradient(parse_algorithm({"name": "fomaml"}), losses, losses, start, inner_lrs(start), 2, torch.ones(2))
    for name, parameter in lm.module.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_padding_and_prompt_tokens_change_nothing(lm):
    start, rows = perturbed_start(lm), random_rows(3, seed=6, targets=2)
    fast = {name: weight[None] for name, weight in start.items()}
    plain = lm.losses(fast, collate([rows], pad=1))
    wide = lm.losses(fast, collate([[*rows, TokenRow([5] * 40, 39)]], pad=7))  # 40 wide, other padding
    last = lm.losses(fast, collate([[TokenRow([5] * 40, 39)]], pad=7))
    torch.testing.assert_close(wide * 7, plain * 6 + last)  # a mean over target tokens, prompts do not count


def test_a_task_with_fewer_rows_keeps_its_loss(lm):
    start, few, many = perturbed_start(lm), random_rows(1, seed=7), random_rows(4, seed=8)
    fast = {name: weight.expand(2, *weight.shape) for name, weight in start.items()}
    alone = lm.losses({name: weight[None] for name, weight in start.items()}, collate([few], pad=1))
    torch.testing.assert_close(lm.losses(fast, collate([few, many], pad=1))[:1], alone)


def test_a_real_end_of_sequence_counts_though_padding_is_the_same_token(lm):
    start = perturbed_start(lm)
    fast = {name: weight[None] for name, weight in start.items()}
    batch = collate([[TokenRow([5, 6, 7, 1], 2), TokenRow([5, 6, 7, 8, 9, 1], 5)]], pad=1)
    assert (batch.targets == 1).sum() == 2
    torch.testing.assert_close(lm.losses(fast, batch)[0], plain_loss(peft_model(lm, start), batch))


def test_the_loss_over_choices_is_normalized_over_them_alone(lm):
    start, rows = perturbed_start(lm), [TokenRow([5, 6, 40], 2), TokenRow([7, 8, 9, 41], 3)]
    fast = {name: weight.expand(2, *weight.shape) for name, weight in start.items()}
    batch = collate([rows, rows], pad=1, labels=[[[40], [41], [42]], []])
    logits, positions = lm.target_logits(fast, batch)
    targets = batch.targets.flatten()[positions]
    expected_first = nn.functional.cross_entropy(logits[:2, 40:43], targets[:2] - 40)
    expected_second = nn.functional.cross_entropy(logits[2:], targets[2:])
    torch.testing.assert_close(lm.losses(fast, batch), torch.stack([expected_first, expected_second]))


def test_activation_checkpointing_changes_no_gradient(lm):
    start, batch = perturbed_start(lm), random_batch(2, 3, seed=9)
    fast = {name: weight.expand(2, *weight.shape) for name, weight in start.items()}
    plain_losses, plain = task_gradients(lambda f: lm.losses(f, batch), fast)
    checkpoint_activations(lm.module)
    runs = []
    lm.module.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda *_: runs.append(1))
    losses, gradients = task_gradients(lambda f: lm.losses(f, batch), fast)
    assert len(runs) == 2  # once forward, once again in the backward
    torch.testing.assert_close(losses, plain_losses)
    for name in start:
        torch.testing.assert_close(gradients[name], plain[name])


def test_principal_start_reads_what_varies(lm):
    batches = [random_batch(1, 8, seed=10), random_batch(1, 8, seed=11)]
    start = principal_start(lm, batches, seed=0)
    seen = [lm.target_inputs(batch) for batch in batches]
    for name in lm.adapter.linears:
        inputs = torch.cat([part[name] for part in seen])
        centred = (inputs - inputs.mean(0)) @ start[name + ".lora_A"].T
        covariance = centred.T @ centred / len(centred)
        assert torch.all(covariance.diagonal() < 1 / 3 + 1e-3)
        assert covariance.diagonal()[0] > 0.1
        assert not start[name + ".lora_B"].any()


@pytest.mark.parametrize("workers", [2, 3, 9])
def test_workers_that_divide_the_batches_find_the_same_start(lm, workers):
    batches = [random_batch(1, 4, seed=seed) for seed in range(10, 15)]
    full = [lm.target_inputs(batch) for batch in batches]
    groups = iter(group_by_input(full))

    def gather(part):
        name = next(groups)[0]
        parts = [torch.cat([seen[name] for seen in full[rank::workers]]) for rank in range(workers)]
        assert torch.equal(part, parts[0])
        return parts

    shared = principal_start(lm, batches, 0, WorkerShare(0, workers, gather))
    for name, weight in principal_start(lm, batches, 0).items():
        assert torch.equal(shared[name], weight)
    assert next([name for name in names if name.endswith(("q_proj", "v_proj"))] for names in group_by_input(full)) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
    ]


def test_principal_start_leaves_what_does_not_vary_to_chance(lm):
    """With one-token labels, all targets are predicted from the same token: the first layer sees one input."""
    rows = [TokenRow([*random_rows(1, seed)[0].tokens[:6], 9, 40], 7) for seed in range(12)]
    start = principal_start(lm, [collate([rows], pad=1)], seed=0)
    usual = lm.adapter.untrained_start(0)
    first = "model.layers.0.self_attn.q_proj.lora_A"
    assert torch.equal(start[first], usual[first])
    assert not torch.equal(
        start["model.layers.3.self_attn.q_proj.lora_A"], usual["model.layers.3.self_attn.q_proj.lora_A"]
    )
    for name, weight in start.items():
        assert weight.abs().max() < 1e3, name


@pytest.mark.parametrize("last_layers", [1, 2, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_layers_run_once_for_a_batch_and_change_nothing(tiny, last_layers, checkpointing):
    module = load_base(tiny, "float32")
    lm = TaskLM(module, TaskLoRA(module, TARGETS, 4, alpha=8.0, last_layers=last_layers))
    if checkpointing:
        checkpoint_activations(module)
    start = perturbed_start(lm)
    batch = random_batch(2, 3, seed=12)
    runs = [0, 0, 0, 0]
    for index, layer in enumerate(module.model.layers):

        def count(*_, index=index):
            runs[index] += 1

        layer.mlp.register_forward_pre_hook(count)

    def steps(fresh):
        """Return losses and fast weights of three inner steps, on one batch or on a fresh copy each time."""

        def losses(fast):
            return lm.losses(fast, dataclasses.replace(batch, frozen=[]) if fresh else batch)

        return list(adapt(losses, start, inner_lrs(start), 3, 2))[-1]

    found = steps(fresh=False)
    below = 4 - last_layers
    assert runs[:below] == [1] * below
    assert runs[below:] == [6 if checkpointing else 3] * last_layers
    expected = steps(fresh=True)
    assert runs[:below] == [4] * below
    torch.testing.assert_close(found.support_losses, expected.support_losses)
    for name in start:
        torch.testing.assert_close(found.fast[name], expected.fast[name])
    # Another batch of the same shape does not see this one's.
    other = random_batch(2, 3, seed=13)
    fast = found.fast
    torch.testing.assert_close(lm.losses(fast, other), lm.losses(fast, dataclasses.replace(other, frozen=[])))
    assert not torch.allclose(lm.losses(fast, other), lm.losses(fast, batch))
    torch.testing.assert_close(lm.states(fast, batch), lm.states(fast, dataclasses.replace(batch, frozen=[])))


def test_only_the_last_layers_on_request(lm):
    names = find_linears(lm.module, ("q_proj", "down_proj"), last_layers=1)
    assert sorted(names) == ["model.layers.3.mlp.down_proj", "model.layers.3.self_attn.q_proj"]


def test_an_unknown_target_is_refused_by_name(lm):
    with pytest.raises(ConfigError, match=r"qq_proj is no linear layer of LlamaForCausalLM; it has .*q_proj"):
        find_linears(lm.module, ("qq_proj",), None)


def test_an_update_on_a_base_of_less_precision_has_first_and_second_derivatives():
    """Against the same in plain operations."""
    generator = torch.Generator().manual_seed(0)
    output, x = (torch.randn(2, 5, 6, generator=generator).requires_grad_() for _ in range(2))
    a, b = (torch.randn(2, *shape, generator=generator).double().requires_grad_() for shape in ((3, 6), (6, 3)))
    inputs = output, x, a, b

    def plain(output, x, a, b, scale):
        return (output.to(a.dtype) + scale * (x.to(a.dtype) @ a.mT @ b.mT)).to(output.dtype)

    def slopes(update):
        updated = update(*inputs, 0.5)
        first = torch.autograd.grad(updated.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return [updated, *first, *second]

    for found, expected in zip(slopes(MixedUpdate.apply), slopes(plain), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
