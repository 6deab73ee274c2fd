"""What acts in meta-training alone: dropout, label smoothing, token dropout; and what mode full trains."""

import random
from dataclasses import replace

import pytest
import torch
from conftest import make_config, perturbed_start, tiny_lm
from test_lora import one, random_batch, random_rows
from torch import nn

from rayml.algorithms.inner_loop import InnerLoop, expand
from rayml.lm.batch import collate
from rayml.lm.encode import Encoder
from rayml.lm.label_losses import token_losses
from rayml.lm.label_trie import IGNORE
from rayml.lm.load import load_base
from rayml.lm.lora import hash32, keep_mask
from rayml.lm.model import TaskLM
from rayml.lm.parameters import trained_parameters
from rayml.lm.sides import training_sides
from rayml.sections import Full
from rayml.tasks.episodes import Episode
from rayml.tasks.task import Example
from rayml.training.replicated import lora_dropout


@pytest.fixture
def lm(tiny):
    return tiny_lm(tiny)


def test_adapter_inputs_are_dropped_with_a_fresh_mask_in_every_forward_inside_the_block_alone(lm):
    fast, batch = expand(perturbed_start(lm), 2), random_batch(2, 3, seed=1)
    plain = lm.losses(fast, batch)
    with lm.adapter.dropping(0.5, [7, 8]):
        first, second = lm.losses(fast, batch), lm.losses(fast, batch)
        bare = lm.losses(None, batch)
    with lm.adapter.dropping(0.5, [7, 8]):
        assert torch.equal(lm.losses(fast, batch), first)
        assert torch.equal(lm.losses(fast, batch), second)
    assert not torch.equal(first, second)
    assert not torch.equal(first, plain)
    assert torch.equal(bare, lm.losses(None, batch))  # the base itself is never dropped
    assert torch.equal(plain, lm.losses(fast, batch))


def test_masks_are_those_of_the_episode_whatever_is_side_by_side_with_it(lm, tmp_path, tokenizer):
    """So the meta-gradient is one and the same for any number of workers."""
    config = make_config(tmp_path, regularize={"lora_dropout": 0.3})
    encoder, start = config.encoder(tokenizer), perturbed_start(lm)
    records = [encoder.episode(EPISODE), encoder.episode(OTHER), encoder.episode(EPISODE)]
    for index, record in enumerate(records):
        record["index"] = index

    def found(episodes):
        sides = training_sides(lm, episodes, 1, config)
        inner = InnerLoop({name: torch.tensor(0.1) for name in start}, 2)
        with lora_dropout(config, lm, episodes):
            return config.algorithm.meta_gradient(*sides, start, inner, torch.ones(len(episodes)))

    whole, parts = found(records), [found([record]) for record in records]
    torch.testing.assert_close(whole.query_losses, torch.cat([part.query_losses for part in parts]))
    assert whole.query_losses[0] != whole.query_losses[2]  # the same examples in another episode
    for name, gradient in whole.start.items():
        expected = sum(part.start[name] for part in parts)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_a_mask_drops_its_share_anywhere():
    kept = keep_mask(hash32(torch.tensor([3, 5])), (6, 50, 64), 0.3)
    assert kept.float().mean() == pytest.approx(0.7, abs=0.01)
    for axis in ((0, 1), (1, 2), (0, 2)):
        assert kept.float().mean(axis).std() < 0.1
    other = keep_mask(hash32(torch.tensor([4, 6])), (6, 50, 64), 0.3)
    assert (kept == other).float().mean() == pytest.approx(0.7**2 + 0.3**2, abs=0.02)


def test_label_smoothing_is_torchs_own_where_all_tokens_are_choices():
    logits, targets = torch.randn(6, 9), torch.randint(0, 9, (6,))
    expected = nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(token_losses(logits, targets, None, 0.2), expected)
    targets, among = torch.tensor([0, 1, 2, 4, 5, 6]), torch.tensor([0, 1, 2, 4, 5, 6, 7, IGNORE])
    few = logits[:, [0, 1, 2, 4, 5, 6, 7]]
    expected = nn.functional.cross_entropy(few, torch.arange(6), reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(token_losses(logits, targets, among.expand(6, -1), 0.2), expected)


def test_label_smoothing_has_a_finite_gradient_where_choices_are_few(lm):
    batch = collate([random_rows(3, seed=2)], pad=1, labels=[[[token] for token in range(2, 90, 3)]])
    targets = batch.targets.clone()
    targets[targets >= 0] = 5
    start = {name: weight.clone().requires_grad_() for name, weight in expand(perturbed_start(lm), 1).items()}
    loss = lm.losses(start, type(batch)(batch.tokens, targets, 1, batch.allowed), smoothing=0.1)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss.sum(), list(start.values())))


EPISODE = Episode(
    index=3,
    task="t",
    support=(Example("the quick brown fox", "A"), Example("jumps over a dog", "B")),
    query=(Example("lazy", "B"), Example("cat", "A")),
    labels={"A": "animal", "B": "move"},
)


OTHER = replace(EPISODE, support=(Example("a much, much longer text than any of the others", "A"), *EPISODE.support))


def text_of(tokenizer, side, index):
    return tokenizer.decode(side["tokens"][index])


def test_a_support_is_thinned_in_its_input_alone_and_the_same_every_time(tokenizer):
    encoder = Encoder(tokenizer, "Say: {input}\nLabel:", 64, token_dropout=0.5)
    record = encoder.episode(EPISODE)
    assert record == encoder.episode(EPISODE)
    for index, example in enumerate(EPISODE.support):
        text = text_of(tokenizer, record["support"], index)
        assert text.startswith("Say: ")
        assert text.endswith(f"\nLabel: {example.target}")
        kept = text.removeprefix("Say: ").removesuffix(f"\nLabel: {example.target}")
        assert 0 < len(kept) < len(example.input)
        letters = iter(example.input)
        assert all(letter in letters for letter in kept)  # in order
        start = record["support"]["starts"][index]
        assert tokenizer.decode(record["support"]["tokens"][index][start:]) == f" {example.target}"
    assert text_of(tokenizer, record["query"], 0) == "Say: lazy\nLabel: B"
    everything = Encoder(tokenizer, "{input}:", 64, token_dropout=0.0).with_token_dropout(
        EPISODE.support[0], True, random.Random(0)
    )
    assert everything == Encoder(tokenizer, "{input}:", 64).row(EPISODE.support[0], True)


@pytest.mark.parametrize(
    ("prompt", "parts", "kept"),
    [
        ("text: {input}\nLabel:", (), "text: \nLabel: A"),
        ("text: {{ head }}, {{ tail }}", (("head", "text"), ("tail", "te")), "text: ,  A"),
        ("text: {{ tail }}, {{ head }}", (("head", "text"), ("tail", "te")), "text: ,  A"),
    ],
)
def test_what_a_prompt_says_by_itself_is_not_thinned_out(tokenizer, prompt, parts, kept):
    """Even where the input says the same."""
    row = Encoder(tokenizer, prompt, 64, token_dropout=1.0).with_token_dropout(
        Example("text", "A", parts), True, random.Random(0)
    )
    assert tokenizer.decode(row.tokens) == kept


def test_in_context_queries_carry_the_support_and_only_their_target_counts(tokenizer, lm):
    encoder = Encoder(tokenizer, "{input}\nLabel:", 40, in_context=True)
    record = encoder.episode(EPISODE)
    shown = "the quick brown fox\nLabel: A\n\njumps over a dog\nLabel: B\n\n"
    assert text_of(tokenizer, record["query"], 0) == f"{shown}lazy\nLabel: B"
    assert record["query"]["starts"][0] == len(record["query"]["tokens"][0]) - 1
    assert text_of(tokenizer, record["support"], 0) == "the quick brown fox\nLabel: A"


# Mode full


def test_own_parameters_as_weights_are_the_model_itself_and_have_its_gradients(tiny):
    module = load_base(tiny, "float32")
    lm, batch = TaskLM(module, None), one(random_batch(1, 4, seed=3), 0)
    weights = {name: p.detach()[None].clone().requires_grad_() for name, p in module.named_parameters()}
    ours = torch.autograd.grad(lm.losses(weights, batch).sum(), list(weights.values()))
    module.requires_grad_(True)
    logits = module(input_ids=batch.tokens).logits.flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, batch.targets.flatten(), ignore_index=-100)
    theirs = torch.autograd.grad(loss, list(module.parameters()))
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-6)


def names(module, **full):
    return set(trained_parameters(module, Full(**full)))


def test_which_parameters_are_trained(tiny):
    module = load_base(tiny, "float32")
    everything = names(module)
    assert len(everything) == len(list(module.parameters()))
    assert everything - names(module, embeddings=False) == {"model.embed_tokens.weight"}
    assert not any(".mlp." in name for name in names(module, freeze=["*.mlp.*"]))
    last = names(module, last_layers=1, embeddings=False)
    assert {name.split(".")[2] for name in last if ".layers." in name} == {"3"}
    assert "model.norm.weight" in last
    assert "model.embed_tokens.weight" not in last
    assert "model.embed_tokens.weight" in names(module, last_layers=1)  # it is the output head, too
