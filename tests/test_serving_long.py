"""Long prompts and long adaptations: nobody waits for a stranger's, and nothing is lost on the way."""

import asyncio
import json

import pytest
import torch
from serving_run import TEXTS, TICKETS, ask, learn, make_run, request, write

from rayml.adaptation import adapt_requests
from rayml.lm.decode import Decoder
from rayml.lm.generate import Generation
from rayml.lm.precision import fused_attention
from rayml.lm.sampling import Sampling
from rayml.serving.errors import ApiError
from rayml.serving.queries import build_queries
from rayml.serving.replica import Replica
from rayml.serving.schema import ClassifyRequest
from rayml.serving.settings import Serving
from rayml.serving.work import PendingAdaptation, PendingQuery, PendingText

LONG = "word " * 300
"""1,500 tokens of the tiny model."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("long"))


def replica_of(run, **batching):
    return Replica(Serving.model_validate({"run": str(run.path), "batching": {"turn_tokens": 64} | batching}))


@pytest.fixture(scope="module")
def replica(run):
    return replica_of(run)


def written(replica, prompts, tokens=6):
    texts = [""] * len(prompts)
    for index, piece, _ in write(replica, None, prompts, Sampling(tokens)):
        texts[index] += piece.text
    return texts


def test_a_long_prompt_read_in_parts_says_what_it_says_in_one(replica, run):
    whole = replica_of(run, turn_tokens=4096)
    assert written(replica, [LONG, "abc"]) == written(whole, [LONG, "abc"])
    whole.engine.close()


def text_of(replica, prompt, receive=lambda piece: None):
    tokenizer = replica.model.encoder.tokenizer
    return PendingText(tokenizer, tokenizer(prompt)["input_ids"], None, Sampling(3), replica.ends).send_to(receive)


def test_short_queries_and_texts_overtake_a_long_prompt(run):
    replica, turns, ended = replica_of(run), 0, {}
    engine = replica.engine
    engine.close()  # its turns are taken here

    def writing(name, prompt):
        def receive(piece):
            if piece.finish_reason:
                ended[name] = turns

        return text_of(replica, prompt, receive)

    engine.writer.waiting.extend([writing("long", LONG), writing("longer", LONG * 2)])
    (query,) = build_queries(replica.bare, ["x"], ["yes", "no"], 4096, truncate=False)
    asked = PendingQuery(query[0])
    asked.answer.add_done_callback(lambda _: ended.setdefault("classify", turns))
    while engine._has_queries():
        turns += 1
        if turns == 2:
            engine._queries.append(asked)
            engine.writer.waiting.append(writing("short", "abc"))
        engine._turn()
    assert ended["classify"] == 2
    assert ended["short"] <= 5
    assert ended["long"] == pytest.approx(turns_to_read(1500), abs=4)
    assert ended["longer"] == pytest.approx(turns_to_read(1500) + turns_to_read(3000), abs=6)


def turns_to_read(tokens):
    """Where each token costs as much again for every 1,500 that it attends to: those behind take more turns."""
    return (tokens + tokens**2 / 2 / 1500) / 64


def test_no_turn_reads_more_than_its_budget(replica, monkeypatch):
    read = []
    logits_at = type(replica.model.lm).logits_at

    def counting(lm, positions, weights, tokens, *rest, **more):
        read.append(tokens.numel())
        return logits_at(lm, positions, weights, tokens, *rest, **more)

    monkeypatch.setattr(type(replica.model.lm), "logits_at", counting)
    written(replica, [LONG, "abc", "x" * 60, "y" * 60])
    learn(replica, request([(f"text {n} " * 8, f"l{n % 2}") for n in range(20)], name="long"))
    ask(replica, None, ["z" * 20] * 16, options=["yes", "no"])
    assert max(read) <= 90  # one example of 80 tokens, whatever the budget is


def test_a_client_that_leaves_ends_the_reading_of_its_prompt(run):
    replica = replica_of(run)
    engine, (left, stays, gone) = replica.engine, (text_of(replica, text) for text in (LONG, LONG, LONG))
    engine.close()
    engine.writer.waiting.extend([left, stays, gone])
    for _ in range(3):
        engine._turn()
    assert (engine.writer.reader.row, engine.writer.reader.tokens_read) == (left, 64 + 61 + 59)
    engine.cancel(left)
    engine.cancel(gone)
    for _ in range(2):
        engine._turn()
    assert (engine.writer.reader.row, engine.writer.reader.tokens_read) == (stays, 64)
    engine.cancel(stays)
    engine._turn()
    assert not engine.writer


def test_an_adaptation_in_parts_learns_what_it_learns_in_one(replica):
    """Of different lengths, so that the parts' losses do not count alike."""
    asked = replica.learner.encode_request(request([(f"text {n} " * (1 + n % 5), f"label{n % 3}") for n in range(12)]))

    def learned(most_tokens):
        loop, yields = adapt_requests(replica.model, [asked], [3], most_tokens), 0
        while True:
            try:
                next(loop)
                assert torch.is_grad_enabled(), "others learn in between"
                yields += 1
            except StopIteration as end:
                return end.value[0], yields

    (whole, losses), steps = learned(None)
    (parts, in_parts), turns = learned(100)
    assert turns > 2 * steps
    assert in_parts == pytest.approx(losses, abs=1e-5)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, atol=1e-5, rtol=1e-4)


def test_adaptations_of_owners_take_turns(run):
    replica = replica_of(run)
    prepared = replica.learner.encode_request(request())
    replica.engine.close()
    adaptations, order = replica.engine.adaptations, []
    for owner, count in (("many", 8), ("one", 1)):
        for number in range(count):
            adaptation = PendingAdaptation(prepared, steps=1, owner=owner)
            adaptation.learned.add_done_callback(lambda _, told=(owner, number): order.append(told))
            adaptations.waiting.append(adaptation)
    while adaptations:
        adaptations.turn()
    assert len(order) == 9
    assert order.index(("one", 0)) <= 2


def test_an_adaptation_in_the_background_is_learned_and_begun_again_when_it_is_lost(run):
    replica, asked = replica_of(run), request(name="later")

    async def later(one):
        await one.begin("public", adapter, asked)
        while await one.progress("public", adapter) is not None:
            await asyncio.sleep(0.01)

    adapter = "later." + "0" * 16
    assert asyncio.run(replica.progress("public", adapter)) is None
    asyncio.run(later(replica))
    assert replica.store.find("public", adapter).examples == 6
    assert replica.store.read_request("public", adapter) is None  # nobody's examples stay
    other = "lost." + "0" * 16
    replica.store.write_request("public", other, asked.model_dump_json().encode())
    assert json.loads(replica.store.read_request("public", other))["name"] == "later"
    with pytest.raises(ApiError, match="same label"):
        asyncio.run(replica.begin("public", other, request([("a", "x"), ("b", "x")])))
    replica.engine.close()


def test_what_a_client_waits_for_may_be_asked_for_in_the_background_too(replica):
    asked, adapter = request(name="both"), "both." + "0" * 16

    async def both():
        waiting = asyncio.create_task(replica.learn("public", adapter, asked))
        while not replica.learner._learning:
            await asyncio.sleep(0)
        await replica.begin("public", adapter, asked)
        assert replica.store.read_request("public", adapter) or replica.store.find("public", adapter)
        await waiting
        while await replica.progress("public", adapter) is not None:
            await asyncio.sleep(0.01)

    asyncio.run(both())
    assert replica.store.find("public", adapter)
    assert replica.store.read_request("public", adapter) is None


def test_prototypes_learn_in_one_piece_within_a_limit(tmp_path):
    run = make_run(tmp_path / "m", algorithm={"name": "proto_maml"})
    limits = {"limits": {"whole_tokens": 300}}
    replica = Replica(Serving.model_validate({"run": str(run.path), **limits}))
    learn(replica, request())
    with pytest.raises(ApiError, match="at most 300") as refused:
        learn(replica, request([(f"text {n} " * 4, f"l{n % 2}") for n in range(20)]))
    assert refused.value.status == 422
    with pytest.raises(ApiError, match="300 are read"):
        ask(replica, None, ["x" * 400], options=["yes", "no"])
    replica.engine.close()


def test_more_labels_than_options_may_be_are_refused(run):
    replica = Replica(Serving.model_validate({"run": str(run.path), "limits": {"options": 3}}))
    learn(replica, request())
    with pytest.raises(ApiError, match="4 labels; at most 3") as refused:
        learn(replica, request([*TICKETS, ("hello", "greeting")], name="four"))
    assert refused.value.status == 422
    replica.engine.close()


def test_long_rows_have_fused_attention_and_short_ones_what_they_were_loaded_with(replica):
    module, seen = replica.model.lm.module, []
    module.set_attn_implementation("eager")
    hook = module.register_forward_pre_hook(lambda *_: seen.append(module.config._attn_implementation))
    for tokens in (100, 200):
        with fused_attention(module, tokens):
            module(torch.ones(1, 4, dtype=torch.int64))
    hook.remove()
    assert seen == ["eager", "sdpa"]
    assert module.config._attn_implementation == "eager"
    module.set_attn_implementation("sdpa")


def test_the_cache_of_a_text_that_ended_is_given_back(replica):
    decoder = Decoder(replica.model.lm, most_rows=2, cache_tokens=0)
    row = Generation(replica.model.encoder.tokenizer, [5] * 200, None, Sampling(2))
    decoder.join([row])
    assert decoder.cache.layers[0].keys is not None
    decoder.leave(row)
    assert getattr(decoder.cache.layers[0], "keys", None) is None


def test_answers_do_not_depend_on_who_else_reads_a_long_prompt(replica):
    (manifest,) = learn(replica, request(name="beside"))
    alone = ask(replica, manifest.id, TEXTS)

    async def beside():
        async def text():
            return [piece async for piece in replica.write("public", None, [LONG], Sampling(2))]

        reading = asyncio.create_task(text())
        found = await replica.classify("public", manifest.id, ClassifyRequest(model="m", input=TEXTS))
        await reading
        return found["answers"]

    for one, other in zip(asyncio.run(beside()), alone, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)
