"""What a replica does, without HTTP: it learns, answers, and shares its time."""

import asyncio
import json
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from serving_run import (  # noqa: F401
    TEXTS,
    TICKETS,
    ask,
    change_card,
    examples,
    learn,
    learned,
    make_run,
    manifest_of,
    replica,
    request,
    run,
    write,
)

from rayml.adaptation import adapt_requests
from rayml.adapter import load_adapter
from rayml.errors import RunError
from rayml.lm.peft_files import load_learned
from rayml.lm.sampling import Sampling
from rayml.serving.gateway import Gateway
from rayml.serving.http import as_api_error
from rayml.serving.names import Names
from rayml.serving.queries import label_piece
from rayml.serving.replica import Replica
from rayml.serving.schema import (
    ClassifyRequest,
)
from rayml.serving.settings import Serving
from rayml.serving.store import AdapterStore, adapter_id
from rayml.serving.work import PendingAdaptation


def test_an_adapter_learned_online_is_that_of_rayml_adapt(replica, learned):
    (manifest,) = learn(replica, request())
    online, card = asyncio.run(replica.adapter_cache.get("public", manifest.id)).weights, None
    offline, card, _ = load_learned(learned)
    for name, weight in offline.items():
        torch.testing.assert_close(online[name], weight, atol=1e-6, rtol=1e-5)
    predictor = load_adapter(learned)
    for text, answer in zip(TEXTS, ask(replica, manifest.id, TEXTS), strict=True):
        assert answer["probabilities"] == pytest.approx(predictor.predict(text).probabilities, abs=1e-4)
    assert card.labels == {"A": "billing", "B": "bug", "C": "delivery"}


def test_adapters_learned_side_by_side_are_those_learned_alone(replica):
    others = [("a b", "x"), ("c d", "y"), ("e f", "x"), ("g", "y")]
    alone = [learn(replica, request(name="alone"))[0], learn(replica, request(others, name="alone2", steps=1))[0]]
    together = learn(replica, request(name="mixed"), request(others, name="mixed2", steps=1), request(steps=0))
    for one, mixed in zip(alone, together, strict=False):
        weights = [asyncio.run(replica.adapter_cache.get("public", m.id)).weights for m in (one, mixed)]
        for name in weights[0]:
            torch.testing.assert_close(weights[1][name], weights[0][name], atol=1e-6, rtol=1e-5)
        assert mixed.loss_after == pytest.approx(one.loss_after, abs=1e-5)
    assert [m.steps for m in together] == [2, 1, 0]
    assert together[2].loss_before == together[2].loss_after


def test_adaptations_in_one_loop_take_their_own_steps(replica):
    one, other = (replica.learner.encode_request(request(pairs)) for pairs in (TICKETS, [("a b", "x"), ("c d", "y")]))

    def take(asked_for, steps):
        loop = adapt_requests(replica.model, asked_for, steps)
        while True:
            try:
                next(loop)
            except StopIteration as end:
                return end.value

    together = take([one, other, one], [3, 1, 0])
    for asked, steps, (weights, losses) in zip([one, other, one], [3, 1, 0], together, strict=True):
        ((expected, alone),) = take([asked], [steps])
        assert losses == pytest.approx(alone, abs=1e-5)
        assert len(losses) == steps + 1
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, atol=1e-6, rtol=1e-5)


def test_an_adapter_lives_as_long_as_the_most_generous_said(replica):
    def learn_for(seconds):
        asked = request(name="ttl", ttl_seconds=seconds)
        return asyncio.run(replica.learn("public", adapter_id("ttl", [0]), asked))[0].expires_at

    first = learn_for(60)
    assert learn_for(30) == first
    assert learn_for(90) > first + 20
    assert learn_for(None) is None
    assert learn_for(30) is None


def test_a_request_in_the_background_is_as_generous(replica):
    async def call_replica(method, *arguments):
        return await getattr(replica, method)(*arguments)

    gateway = SimpleNamespace(store=replica.store, names=Names("tiny", replica.store, 2), _call_replica=call_replica)
    adapter = adapter_id("kept", [0])
    asyncio.run(replica.learn("public", adapter, request(name="kept", ttl_seconds=60)))
    response = asyncio.run(Gateway._learn_in_background(gateway, "public", adapter, request(name="kept")))
    assert (response.status_code, json.loads(response.body)["expires_at"]) == (200, None)
    assert replica.store.find("public", adapter).expires_at is None


def test_one_text_s_trouble_is_its_own(replica, monkeypatch):
    from rayml.serving import work

    choose = work.Generation.take

    def sometimes(row, logits):
        choose(row, logits * float("nan") if row.sampling.seed == 13 else logits)

    monkeypatch.setattr(work.Generation, "take", sometimes)

    async def both():
        async def one(seed):
            return [piece async for piece in replica.write("public", None, ["abc"], Sampling(40, seed=seed))]

        return await asyncio.gather(*(one(seed) for seed in (1, 13, 2)), return_exceptions=True)

    first, lost, last = asyncio.run(both())
    assert isinstance(lost, RunError)
    assert "".join(p.text for _, p, _ in first) == "".join(p.text for _, p, _ in last) != ""


def test_storage_that_does_not_answer_is_no_missing_adapter(replica, monkeypatch):
    def broken(path):
        raise OSError(5, "Input/output error")

    store = AdapterStore(replica.store.root)
    monkeypatch.setattr(store, "fs", type("Broken", (), {"open_input_stream": staticmethod(broken)})())
    with pytest.raises(OSError, match="Input"):
        store.find("public", adapter_id("x", 0))
    assert as_api_error(OSError(5, "x")).status == 503


def test_the_same_examples_are_learned_once(replica):
    again = request(name="once")
    adapter = adapter_id("once", [1])

    async def thrice():
        first = await asyncio.gather(*(replica.learn("public", adapter, again) for _ in range(2)))
        return [*first, await replica.learn("public", adapter, again)]

    found = asyncio.run(thrice())
    assert sorted(new for _, new in found[:2]) == [False, True]
    assert not found[2][1]
    assert len({manifest.created_at for manifest, _ in found}) == 1


def test_answers_of_a_mixed_batch_are_those_one_by_one(run):
    seen = []
    replica = Replica(Serving(run=str(run.path)), lambda name, value: seen.append((name, value)))
    first, second = learn(replica, request(), request([("m n", "up"), ("o p", "down")], name="other"))

    async def all_at_once():
        asked = [
            replica.classify("public", adapter, ClassifyRequest(model="m", input=text, options=options))
            for text in TEXTS
            for adapter, options in ((first.id, None), (second.id, None), (None, ["yes", "no", "perhaps"]))
        ]
        return [found["answers"][0]["probabilities"] for found in await asyncio.gather(*asked)]

    seen.clear()
    mixed = iter(asyncio.run(all_at_once()))
    assert max(value for name, value in seen if name == "classify_batch") > 3
    for text in TEXTS:
        for adapter, more in ((first.id, {}), (second.id, {}), (None, {"options": ["yes", "no", "perhaps"]})):
            (alone,) = ask(replica, adapter, [text], **more)
            assert next(mixed) == pytest.approx(alone["probabilities"], abs=1e-4)


def test_adapters_of_one_batch_are_scored_each_as_its_own_card_says(replica, learned, tmp_path):
    """The served run's own way of scoring is one of them: it is that of the base, and of what is learned here."""
    words = {"bill": "billing", "bills of all": "bug", "a much longer label": "delivery"}
    ways = [{"scoring": scoring} for scoring in ("learned", "mean", "sum", "pmi", "channel")]
    ids, offline = [], []
    for number, way in enumerate([*ways, {"label_loss": "vocabulary"}]):
        folder = tmp_path / f"way-{number}"
        shutil.copytree(learned, folder)
        change_card(folder, labels=words, **way)
        ids.append(replica.store.publish("public", manifest_of(f"way{number}"), folder).id)
        offline.append([load_adapter(folder).predict(text).probabilities for text in TEXTS])

    async def all_at_once():
        asked = ClassifyRequest(model="m", input=TEXTS)
        return await asyncio.gather(*(replica.classify("public", one, asked) for one in ids))

    for online, expected in zip(asyncio.run(all_at_once()), offline, strict=True):
        for answer, probabilities in zip(online["answers"], expected, strict=True):
            assert answer["probabilities"] == pytest.approx(probabilities, abs=1e-4)
    assert len({str(max(first, key=first.get)) for first, *_ in offline}) > 1, "the ways must differ to be told apart"


def test_an_adapter_with_labels_writes_one_of_them(replica):
    (manifest,) = learn(replica, request())
    (expected,) = ask(replica, manifest.id, ["charged again"])
    ((_, piece, _),) = write(replica, manifest.id, ["charged again"], Sampling(5, logprobs=2))
    assert (piece.text, piece.finish_reason) == (expected["label"], "stop")
    assert torch.tensor(piece.scores[0].logprob).exp() == pytest.approx(expected["probabilities"][piece.text])
    drawn = [write(replica, manifest.id, ["charged again"], Sampling(5, temperature=1.0, seed=s)) for s in range(40)]
    assert {pieces[0][1].text for pieces in drawn} == {"billing", "bug", "delivery"}


def test_a_label_is_drawn_within_top_p():
    samplings = [Sampling(1, temperature=1.0, top_p=0.8, seed=seed) for seed in range(60)]
    drawn = {label_piece({"a": 0.6, "b": 0.3, "c": 0.1}, sampling).text for sampling in samplings}
    assert drawn == {"a", "b"}


def test_what_a_client_leaves_is_not_written_on(replica):
    async def leave():
        async for _ in replica.write("public", None, ["abc"], Sampling(1000)):
            break

    asyncio.run(leave())
    deadline = time.monotonic() + 20
    while replica.engine.writer and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not replica.engine.writer


def test_adaptations_take_no_more_than_their_share_while_queries_wait(run):
    replica = Replica(
        Serving.model_validate({"run": str(run.path), "batching": {"adaptation_share": 0.25, "turn_tokens": 4096}})
    )
    engine, seconds = replica.engine, {"learn": 0.0, "answer": 0.0}
    many = request([(f"text {n} " * 10, f"label{n % 3}") for n in range(20)])
    adaptation = PendingAdaptation(replica.learner.encode_request(many), steps=5)

    def timed(name, work):
        def run():
            began = time.perf_counter()
            work()
            seconds[name] += time.perf_counter() - began

        return run

    engine.adaptations.turn = timed("learn", engine.adaptations.turn)
    engine._answer = timed("answer", lambda: time.sleep(0.002))
    engine._has_queries = lambda: not adaptation.learned.done()  # they always wait
    engine.adapt(adaptation)
    adaptation.learned.result(120)
    engine.close()
    assert seconds["learn"] < 0.5 * seconds["answer"]  # a third, but for what the last step owes
    assert seconds["learn"] > 0.1 * seconds["answer"]  # a third, but for sleeps that take longer on a busy machine
