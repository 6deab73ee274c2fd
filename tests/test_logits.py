"""Logits of long targets in parts: the losses and gradients of all at once, and the models that it is wrong for."""

import random
from functools import partial

import pytest
import torch
from conftest import perturbed_start, tiny_lm
from families import make_model
from test_packing import ragged_rows

from rayml.algorithms.inner_loop import task_gradients
from rayml.lm import model as model_module
from rayml.lm.batch import collate
from rayml.lm.load import load_base
from rayml.lm.lora import TaskLoRA
from rayml.lm.model import TaskLM


@pytest.fixture
def parts(monkeypatch):
    """How many rows of logits were computed at a time, with room for five."""
    seen: list[int] = []
    whole = model_module.token_losses

    def noted(logits, *more, **named):
        seen.append(len(logits))
        return whole(logits, *more, **named)

    monkeypatch.setattr(model_module, "token_losses", noted)
    return seen


def test_logits_in_parts_are_those_of_all_at_once(tiny, parts, monkeypatch):
    lm = tiny_lm(tiny)
    rows = ragged_rows(3, random.Random(0))
    fast = {name: weight.expand(3, *weight.shape) for name, weight in perturbed_start(lm).items()}
    batch = collate(rows, 1, packs=True)
    losses, gradients = task_gradients(partial(lm.losses, batch=batch, smoothing=0.1), fast)
    assert parts == [len(batch.scored.positions)]
    monkeypatch.setattr(model_module, "MOST_LOGITS", 5 * lm.module.config.vocab_size)
    found, others = task_gradients(partial(lm.losses, batch=batch, smoothing=0.1), fast)
    assert max(parts[1:]) == 5
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reads", [False, True])
def test_what_is_chosen_among_few_tokens_has_the_losses_and_gradients_of_the_whole_vocabulary(tiny, monkeypatch, reads):
    lm, widths, whole = tiny_lm(tiny), [], model_module.token_losses

    def noted(logits, *more, **named):
        widths.append(logits.shape[1])
        return whole(logits, *more, **named)

    monkeypatch.setattr(model_module, "token_losses", noted)
    rows = ragged_rows(3, random.Random(0))
    labels = [[row.tokens[row.start :] for row in task] for task in rows]
    batch = collate(rows, 1, labels, packs=True)
    assert len(batch.scored.choices.tokens) < lm.module.config.vocab_size / 2
    fast = {name: weight.expand(3, *weight.shape) for name, weight in perturbed_start(lm).items()}
    first = torch.tensor([[of[0] for of in task[:5]] for task in labels])

    def read(weights):
        """Losses, and what prototypes and label tokens make of the same forward."""
        found = lm.read(weights, batch, "last", first, 0.1)
        return found.losses + found.states.square().sum((1, 2)) + found.label_log_probs[..., 1].sum(1)

    losses_of = read if reads else partial(lm.losses, batch=batch, smoothing=0.1)
    found, gradients = task_gradients(losses_of, fast)
    lm.narrow_head = None
    losses, others = task_gradients(losses_of, fast)
    assert widths == [len(batch.scored.choices.tokens), lm.module.config.vocab_size]
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)


def test_labels_need_few_logits_and_are_read_at_once(tiny, parts, monkeypatch):
    lm = tiny_lm(tiny)
    monkeypatch.setattr(model_module, "MOST_LOGITS", 5 * lm.module.config.vocab_size)
    rows = ragged_rows(2, random.Random(0))
    labels = [[row.tokens[row.start :] for row in task] for task in rows]
    lm.losses(None, batch := collate(rows, 1, labels))
    assert parts == [len(batch.scored.positions)]


@pytest.mark.parametrize(("family", "expected"), [("llama", True), ("gemma2", False), ("cohere2", False)])
def test_what_is_done_to_logits_behind_the_output_layer_is_seen(family, expected, tmp_path):
    module = load_base(str(make_model(tmp_path, family)), "float32", "eager")
    lm = TaskLM(module, TaskLoRA(module, ["q_proj"], 2, 4.0))
    assert lm.plain_head is expected
    assert (lm.narrow_head is not None) is expected
