"""Several examples in a row: the same losses and gradients as alone, and the models that it would be wrong for."""

import random
from functools import partial

import pytest
import torch
from conftest import perturbed_start, tiny_lm
from transformers import AutoConfig, AutoModelForCausalLM

from rayml.algorithms.inner_loop import task_gradients
from rayml.lm.batch import collate
from rayml.lm.lora import TaskLoRA
from rayml.lm.model import TaskLM
from rayml.lm.rows import TokenRow


def ragged_rows(tasks: int, rng: random.Random) -> list[list[TokenRow]]:
    """Rows of very different lengths; tasks have different numbers of them, targets one to three tokens.

    Some have one token before their target: laid behind another, their targets follow right upon its own.
    """
    return [
        [
            TokenRow([rng.randrange(5, 100) for _ in range(length)], length - rng.choice([1, 2, 3]))
            for length in rng.choices([6, 9, 30, 14], k=7 + task)
        ]
        + [TokenRow([rng.randrange(5, 100) for _ in range(3)], 1) for _ in range(3)]
        for task in range(tasks)
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_examples_that_share_a_row_have_the_losses_and_gradients_that_they_have_alone(tiny, attention):
    lm = tiny_lm(tiny, attention=attention)
    rows = ragged_rows(3, random.Random(0))
    labels = [[row.tokens[row.start :] for row in task] for task in rows]
    start = perturbed_start(lm)
    fast = {name: weight.expand(3, *weight.shape) for name, weight in start.items()}
    for among in ([], labels):
        plain, packed = (collate(rows, 1, among, packs) for packs in (False, True))
        assert plain.position_ids is None
        assert packed.tokens.numel() < 0.7 * plain.tokens.numel()
        (losses, gradients), (wanted, expected) = (
            task_gradients(partial(lm.losses, batch=batch), fast) for batch in (packed, plain)
        )
        torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_rows_of_one_length_stay_as_they_are_and_long_tasks_get_several_rows():
    even = [[TokenRow([7] * 12, 11)] * 4] * 2
    assert collate(even, 1, packs=True).position_ids is None
    uneven = [[TokenRow([7] * length, length - 1) for length in [20, 40, 60] * 10]]
    batch = collate(uneven, 1, packs=True)
    rows, length = batch.tokens.shape
    assert 1170 <= rows * length < 1.1 * 1170, "hardly any padding"
    assert length < 300, "and attention over no more than it takes"
    assert batch.position_ids.max() == 58


@pytest.mark.parametrize(("kind", "packs"), [("llama", True), ("gpt_neox", True), ("qwen3", True), ("mamba", False)])
def test_models_that_would_mix_examples_in_a_row_are_found_out(kind, packs):
    torch.manual_seed(0)
    small = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, **small)
    module = AutoModelForCausalLM.from_config(config).eval()
    target = {"gpt_neox": "query_key_value", "mamba": "in_proj"}.get(kind, "q_proj")
    assert TaskLM(module, TaskLoRA(module, [target], rank=2, alpha=4.0)).packs is packs
