"""Continuous batching against transformers' own generation, one text at a time."""

import copy

import pytest
import torch
from conftest import tiny_lm

from rayml.lm.decode import Decoder
from rayml.lm.generate import Generation, TextStream, choose
from rayml.lm.load import load_base
from rayml.lm.lora import TaskLoRA, linear_kinds, stack_adapters
from rayml.lm.model import TaskLM
from rayml.lm.sampling import Sampling

PROMPTS = ["hello there", "a", "what is this long text all about, my friend?", "xyz", "b c"]
TOKENS = 24


@pytest.fixture(scope="module")
def lm(tiny):
    module = load_base(tiny, "float32")
    return TaskLM(module, TaskLoRA(module, linear_kinds(module), rank=4, alpha=8.0))


@pytest.fixture(scope="module")
def adapters(lm):
    """The base, and adapters of several ranks, on some of the linears or all."""
    generator = torch.Generator().manual_seed(0)

    def draw(rank: int, kinds: tuple[str, ...]):
        chosen = {name: linear for name, linear in lm.adapter.linears.items() if name.endswith(kinds)}
        shapes = {f"{n}.lora_A": (rank, one.in_features) for n, one in chosen.items()}
        shapes |= {f"{n}.lora_B": (one.out_features, rank) for n, one in chosen.items()}
        return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    every = tuple(linear_kinds(lm.module))
    return [None, draw(4, every), draw(2, ("q_proj",)), draw(8, ("v_proj", "down_proj")), None]


def by_transformers(lm, tokenizer, prompt, adapter, tokens=TOKENS):
    lm.adapter.adapters = stack_adapters([adapter])
    row = torch.tensor([tokenizer(prompt)["input_ids"]])
    made = lm.module.generate(
        input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=tokens, do_sample=False, pad_token_id=1
    )
    return made[0].tolist()


def generation(tokenizer, index, adapters, **sampling):
    prompt = tokenizer(PROMPTS[index])["input_ids"]
    return Generation(tokenizer, prompt, adapters[index], Sampling(TOKENS, **sampling))


def cached_tokens(decoder):
    rows, _, columns, _ = decoder.cache.layers[0].keys.shape
    return rows * columns


def finish(decoder):
    while decoder.active:
        for row in [row for row in decoder.active if row.finish_reason]:
            decoder.leave(row)
        if decoder.active:
            decoder.step()


def test_mixed_rows_that_join_and_leave_write_what_each_writes_alone(lm, tokenizer, adapters):
    expected = [by_transformers(lm, tokenizer, *pair) for pair in zip(PROMPTS, adapters, strict=True)]
    decoder = Decoder(lm, most_rows=8, cache_tokens=10_000)
    rows = [generation(tokenizer, index, adapters) for index in range(len(PROMPTS))]
    decoder.join(rows[:2])
    decoder.step()
    decoder.join(rows[2:3])
    decoder.leave(rows[0])
    decoder.step()
    decoder.join(rows[3:])
    finish(decoder)
    for row, whole in zip(rows[1:], expected[1:], strict=True):
        made = row.tokens[row.prompt_tokens :]
        assert row.tokens == whole[: len(row.tokens)]
        assert len(made) == TOKENS or row.finish_reason == "stop"
    assert len({tuple(row.tokens[row.prompt_tokens :]) for row in rows[1:]}) > 2  # the adapters do tell


def test_logits_of_a_mixed_batch_are_those_of_each_alone(lm, tokenizer, adapters):
    class Recorded(Generation):
        def take(self, logits):
            self.seen = [*getattr(self, "seen", []), logits]
            super().take(logits)

    def kept(index):
        return Recorded(tokenizer, tokenizer(PROMPTS[index])["input_ids"], adapters[index], Sampling(6))

    together, alone = [kept(index) for index in range(5)], [kept(index) for index in range(5)]
    decoder = Decoder(lm, most_rows=8, cache_tokens=10_000)
    decoder.join(together)
    finish(decoder)
    for row in alone:
        decoder = Decoder(lm, most_rows=1, cache_tokens=0)
        decoder.join([row])
        finish(decoder)
    for mixed, single in zip(together, alone, strict=True):
        torch.testing.assert_close(torch.stack(mixed.seen), torch.stack(single.seen), atol=1e-4, rtol=1e-4)


def test_room_counts_rows_and_their_longest(lm, tokenizer, adapters):
    decoder = Decoder(lm, most_rows=3, cache_tokens=150)
    rows = [generation(tokenizer, index, adapters) for index in (0, 1, 3, 2)]
    assert decoder.has_room(rows[:3])  # 3 x 35
    assert not decoder.has_room([rows[0], rows[1], rows[3]])  # 3 x 68
    assert not decoder.has_room(rows)
    assert decoder.has_room([rows[3]])


def test_the_cache_keeps_within_its_tokens_whatever_came_before(lm, tokenizer, adapters):
    decoder = Decoder(lm, most_rows=64, cache_tokens=4096)
    many = [generation(tokenizer, 1, adapters) for _ in range(40)]
    decoder.join(many)
    assert cached_tokens(decoder) <= 4096
    for row in many[1:]:
        decoder.leave(row)
    long = Generation(tokenizer, tokenizer("b" * 500)["input_ids"], adapters[2], Sampling(24))
    assert decoder.has_room([long])
    decoder.join([long])
    assert cached_tokens(decoder) <= 4096
    finish(decoder)
    alone = by_transformers(lm, tokenizer, PROMPTS[1], adapters[1])
    assert many[0].tokens == alone[: len(many[0].tokens)]
    decoder.join([generation(tokenizer, 1, adapters)])
    assert cached_tokens(decoder) == 1


def test_one_seed_draws_one_text_whoever_shares_the_batch(lm, tokenizer, adapters):
    def text(places):
        rows = [generation(tokenizer, index, adapters, temperature=1.0, top_p=0.9, seed=index) for index in places]
        decoder = Decoder(lm, most_rows=8, cache_tokens=10_000)
        decoder.join(rows)
        finish(decoder)
        return rows[0].tokens

    assert text([1]) == text([1, 0, 2, 3])
    assert text([1]) != text([2])


def test_choices_follow_temperature_and_top_p():
    logits = torch.tensor([2.0, 1.0, 0.0, -9.0])
    generator = torch.Generator().manual_seed(0)

    def shares(**sampling):
        drawn = [choose(logits, Sampling(1, **sampling), generator) for _ in range(4000)]
        return torch.bincount(torch.tensor(drawn), minlength=4) / 4000

    assert choose(logits, Sampling(1), generator) == 0
    torch.testing.assert_close(shares(temperature=2.0), (logits / 2).softmax(0), atol=0.03, rtol=0)
    kept = torch.tensor([0.7311, 0.2689, 0.0, 0.0])  # two tokens have 0.9 of the probability together
    torch.testing.assert_close(shares(temperature=1.0, top_p=0.9), kept, atol=0.03, rtol=0)
    assert shares(temperature=1.0, top_p=0.5)[0] == 1
    assert shares(temperature=1e-310)[0] == 1


class Bytes:
    """A tokenizer of UTF-8 bytes: characters come in pieces."""

    def decode(self, tokens, skip_special_tokens=True, clean_up_tokenization_spaces=None):
        return bytes(tokens).decode(errors="replace")


def stream(text, stop=(), drops_spaces=False):
    streamed = TextStream(Bytes(), stop, drops_spaces)
    pieces = []
    for token in text.encode():
        pieces.append(streamed.add(token))
        if streamed.stopped:
            return pieces
    return [*pieces, streamed.rest()]


def test_text_comes_as_early_as_it_is_certain():
    assert "".join(stream("naïve 天气 🙂!")) == "naïve 天气 🙂!"
    assert not any("\ufffd" in piece for piece in stream("天气"))
    assert stream("abc") == ["a", "b", "c", ""]


def test_text_is_as_the_model_wrote_it_whatever_the_tokenizer_tidies_up(tokenizer):
    """Some tokenizers, such as Llama 3's, leave out spaces before what follows them: `'s` and `.`, for example."""
    tidying = copy.deepcopy(tokenizer)
    tidying.clean_up_tokenization_spaces = True
    text, streamed = "it 's here .", TextStream(tidying)
    tokens = tokenizer(text)["input_ids"]
    assert tidying.decode(tokens) == "it's here."
    assert "".join([*map(streamed.add, tokens), streamed.rest()]) == text


def test_text_ends_before_a_stop_text_that_came_in_pieces():
    assert "".join(stream("one\nEND two", ("\nEND",))) == "one"
    assert "".join(stream("one\nEN two", ("\nEND",))) == "one\nEN two"
    assert stream("a\nEb", ("\nEND",))[:4] == ["a", "", "", "\nEb"]
    assert "".join(stream("xx天y", ("天",))) == "xx"
    assert "".join(stream(" one two", (" ",))) == ""
    assert "".join(stream("  one two", (" ",), drops_spaces=True)) == "one"
    assert "".join(stream("  \none", ("\n",), drops_spaces=True)) == ""


def test_log_probabilities_are_those_of_the_logits(lm, tokenizer, adapters):
    row = generation(tokenizer, 1, adapters, logprobs=3)
    decoder = Decoder(lm, most_rows=1, cache_tokens=0)
    decoder.join([row])
    lm.adapter.adapters = stack_adapters([adapters[1]])
    expected = lm.module(torch.tensor([row.tokens[: row.prompt_tokens]])).logits[0, -1].log_softmax(-1)
    (score,) = row.piece().scores
    assert score.logprob == pytest.approx(float(expected.max()), abs=1e-5)
    assert [p for _, p in score.top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-5)


def test_adapters_side_by_side_act_as_each_alone(tiny, adapters):
    lm = tiny_lm(tiny)
    stacked = stack_adapters([adapters[0], adapters[2], adapters[3]])
    name = next(name for name in adapters[2] if name.endswith("q_proj.lora_A"))
    assert stacked[name].shape == (3, 2, lm.module.config.hidden_size)
    assert not stacked[name][0].any()
    assert torch.equal(stacked[name][1], adapters[2][name])
    assert stack_adapters([None, None]) is None
