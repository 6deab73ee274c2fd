"""What a replica does, without HTTP: adapters from files that may lie, the store, the engine, and its answers."""

import asyncio
import io
import json
import shutil
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import make_config
from rich.console import Console
from safetensors.torch import load_file, save_file
from serving_run import TICKETS, examples, make_run

from rayml.errors import ConfigError, RunError
from rayml.evaluation.command import adapt_run
from rayml.evaluation.learn import take_in
from rayml.evaluation.predict import Predictor
from rayml.lm.peft_files import load_learned
from rayml.lm.sampling import Sampling
from rayml.runs.checkpoint import seal
from rayml.runs.folder import RunFolder
from rayml.serving.adapter_files import Adapter, read_adapter
from rayml.serving.command import publish_adapter
from rayml.serving.errors import ApiError
from rayml.serving.http import as_api_error
from rayml.serving.replica import Replica
from rayml.serving.resident import Resident
from rayml.serving.schema import (
    AdapterRequest,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    Message,
    parse,
    plain,
)
from rayml.serving.served import servable
from rayml.serving.settings import Serving, api_keys, check_host
from rayml.serving.store import AdapterStore, Manifest, adapter_id, owner_of
from rayml.serving.work import Adaptation
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.task import Example

TEXTS = ["charged again", "the page is blank", "parcel lost", "no app", "x"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def replica(run):
    return Replica(Serving(run=str(run.path)))


@pytest.fixture
def learned(run, tmp_path):
    """A folder that `rayml adapt` wrote."""
    file = tmp_path / "few.jsonl"
    file.write_text("\n".join(map(json.dumps, examples())))
    adapt_run(run.path, file, tmp_path / "tickets", None, Console(quiet=True))
    return tmp_path / "tickets"


def request(pairs=TICKETS, **more) -> AdapterRequest:
    return AdapterRequest.model_validate({"examples": examples(pairs), **more})


def ask(replica, adapter, texts, **more):
    asked = ClassifyRequest.model_validate({"model": "tiny", "input": texts, **more})
    return asyncio.run(replica.classify("public", adapter, asked))["answers"]


def learn(replica, *requests):
    async def all_at_once():
        ids = [adapter_id(one.name, [one.model_dump_json()]) for one in requests]
        found = await asyncio.gather(*(replica.learn("public", i, one) for i, one in zip(ids, requests, strict=True)))
        return [manifest for manifest, _ in found]

    return asyncio.run(all_at_once())


def write(replica, adapter, prompts, sampling):
    async def collect():
        return [piece async for piece in replica.write("public", adapter, prompts, sampling)]

    return asyncio.run(collect())


# Learning and answering


def test_an_adapter_learned_online_is_that_of_rayml_adapt(replica, learned):
    (manifest,) = learn(replica, request())
    online, card = asyncio.run(replica.resident.get("public", manifest.id)).weights, None
    offline, card, _ = load_learned(learned)
    for name, weight in offline.items():
        torch.testing.assert_close(online[name], weight, atol=1e-6, rtol=1e-5)
    predictor = Predictor(learned)
    for text, answer in zip(TEXTS, ask(replica, manifest.id, TEXTS), strict=True):
        assert answer["probabilities"] == pytest.approx(predictor.predict(text).probabilities, abs=1e-4)
    assert card.labels == {"A": "billing", "B": "bug", "C": "delivery"}


def test_adapters_learned_side_by_side_are_those_learned_alone(replica):
    others = [("a b", "x"), ("c d", "y"), ("e f", "x"), ("g", "y")]
    alone = [learn(replica, request(name="alone"))[0], learn(replica, request(others, name="alone2", steps=1))[0]]
    together = learn(replica, request(name="mixed"), request(others, name="mixed2", steps=1), request(steps=0))
    for one, mixed in zip(alone, together, strict=False):
        weights = [asyncio.run(replica.resident.get("public", m.id)).weights for m in (one, mixed)]
        for name in weights[0]:
            torch.testing.assert_close(weights[1][name], weights[0][name], atol=1e-6, rtol=1e-5)
        assert mixed.loss_after == pytest.approx(one.loss_after, abs=1e-5)
    assert [m.steps for m in together] == [2, 1, 0]
    assert together[2].loss_before == together[2].loss_after


def test_lessons_in_one_loop_take_their_own_steps(replica):
    one, other = (replica._lesson(request(pairs)) for pairs in (TICKETS, [("a b", "x"), ("c d", "y")]))

    def take(lessons, steps):
        loop = take_in(replica.session, lessons, steps)
        while True:
            try:
                next(loop)
            except StopIteration as end:
                return end.value

    together = take([one, other, one], [3, 1, 0])
    for lesson, steps, (weights, losses) in zip([one, other, one], [3, 1, 0], together, strict=True):
        ((expected, alone),) = take([lesson], [steps])
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


def test_an_adapter_with_labels_writes_one_of_them(replica):
    (manifest,) = learn(replica, request())
    (expected,) = ask(replica, manifest.id, ["charged again"])
    ((_, piece, _),) = write(replica, manifest.id, ["charged again"], Sampling(5, logprobs=2))
    assert (piece.text, piece.finish_reason) == (expected["label"], "stop")
    assert torch.tensor(piece.scores[0].logprob).exp() == pytest.approx(expected["probabilities"][piece.text])
    drawn = [write(replica, manifest.id, ["charged again"], Sampling(5, temperature=1.0, seed=s)) for s in range(40)]
    assert {pieces[0][1].text for pieces in drawn} == {"billing", "bug", "delivery"}


def test_what_a_client_leaves_is_not_written_on(replica):
    async def leave():
        async for _ in replica.write("public", None, ["abc"], Sampling(1000)):
            break

    asyncio.run(leave())
    deadline = time.monotonic() + 20
    while replica.engine.decoder.active and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not replica.engine.decoder.active


def test_adaptations_take_no_more_than_their_share_while_queries_wait(run):
    replica = Replica(Serving.model_validate({"run": str(run.path), "batching": {"adaptation_share": 0.25}}))
    engine, seconds = replica.engine, {"learn": 0.0, "answer": 0.0}
    many = request([(f"text {n} " * 10, f"label{n % 3}") for n in range(60)])
    adaptation = Adaptation(replica._lesson(many), steps=10)

    def timed(name, work):
        def run():
            began = time.perf_counter()
            work()
            seconds[name] += time.perf_counter() - began

        return run

    engine._take_inner_step = timed("learn", engine._take_inner_step)
    engine._answer = timed("answer", lambda: time.sleep(0.002))
    engine._has_queries = lambda: not adaptation.learned.done()  # they always wait
    engine.adapt(adaptation)
    adaptation.learned.result(60)
    engine.close()
    assert seconds["learn"] < 0.5 * seconds["answer"]  # a third, but for what the last step owes
    assert seconds["learn"] > 0.2 * seconds["answer"]


@pytest.mark.parametrize(
    ("pairs", "more", "says"),
    [
        ([("a", "x"), ("b", "x")], {}, "same label"),
        ([("a", "x"), ("b", "y")], {"options": ["x", "z"]}, "none of the options"),
        ([("a", "x"), (" A ", "y")], {}, "stands under x and y"),
        ([("a", "x"), ("b " * 400, "y")], {}, "examples.1: has 8"),
        ([(f"t{n}", f"l{n}") for n in range(27)], {}, "27 classes"),
    ],
)
def test_examples_that_cannot_be_learned_from_are_refused(replica, pairs, more, says):
    with pytest.raises(ApiError, match=says) as refused:
        learn(replica, request(pairs, **more))
    assert refused.value.status == 422


def test_too_long_an_input_is_refused_or_cut_where_asked(replica):
    (manifest,) = learn(replica, request())
    with pytest.raises(ApiError, match="truncate") as refused:
        ask(replica, manifest.id, ["fine", "word " * 200])
    assert (refused.value.status, refused.value.param) == (400, "input.1")
    (answer,) = ask(replica, manifest.id, ["word " * 200], truncate=True)
    assert answer["truncated"]
    with pytest.raises(ApiError, match="context"):
        write(replica, None, ["a" * 4000], Sampling(200))


def test_a_full_queue_says_so_and_recovers(run):
    replica = Replica(Serving.model_validate({"run": str(run.path), "limits": {"waiting_queries": 3}}))
    assert len(ask(replica, None, ["a", "b", "c"], options=["x", "y"])) == 3
    with pytest.raises(ApiError, match="at most 3") as refused:
        ask(replica, None, ["a", "b", "c", "d"], options=["x", "y"])
    assert refused.value.status == 429
    assert len(ask(replica, None, ["a", "b", "c"], options=["x", "y"])) == 3
    replica.engine.close()


def test_a_key_has_no_more_adapters_than_it_may(run, tmp_path):
    settings = {"run": str(run.path), "store": str(tmp_path / "few"), "limits": {"adapters_per_key": 2}}
    replica = Replica(Serving.model_validate(settings))
    learn(replica, request(name="one", ttl_seconds=0.01))
    learn(replica, request(name="two"))
    time.sleep(0.05)
    learn(replica, request(name="three"))  # the first has expired
    with pytest.raises(ApiError, match="2 adapters") as refused:
        learn(replica, request(name="four"))
    assert (refused.value.status, refused.value.code) == (429, "too_many")
    replica.engine.close()


def test_a_failing_batch_fails_alone(run, monkeypatch):
    replica = Replica(Serving(run=str(run.path)))
    with monkeypatch.context() as broken:
        broken.setattr("rayml.serving.engine.side_by_side", lambda adapters: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ask(replica, None, ["a"], options=["x", "y"])
    assert ask(replica, None, ["a"], options=["x", "y"])
    asyncio.run(replica.check(5))
    replica.engine.close()


def test_whoever_leaves_takes_nobody_along(replica):
    async def some_leave():
        asked = ClassifyRequest(model="m", input=TEXTS, options=["yes", "no"])
        asking = [asyncio.create_task(replica.classify("public", None, asked)) for _ in range(12)]
        await asyncio.sleep(0.01)
        for one in asking[::2]:
            one.cancel()
        return await asyncio.gather(*asking, return_exceptions=True)

    found = asyncio.run(some_leave())
    assert all(len(one["answers"]) == len(TEXTS) for one in found[1::2])
    assert replica.engine.is_alive()
    asyncio.run(replica.check(5))


def test_the_health_check_runs_the_model(run):
    replica = Replica(Serving(run=str(run.path)))
    asyncio.run(replica.check(5))
    with torch.no_grad():
        replica.session.lm.module.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        asyncio.run(replica.check(5))
    replica.engine.close()
    with pytest.raises(ApiError, match="going away"):
        asyncio.run(replica.check(0.2))


def test_a_long_step_is_no_illness_until_it_is_too_long(run):
    replica = Replica(Serving.model_validate({"run": str(run.path), "replicas": {"stuck_seconds": 1.0}}))
    replica.engine._has_queries = lambda: True
    replica.engine._answer = lambda: time.sleep(3)
    with replica.engine._changed:
        replica.engine._changed.notify()
    time.sleep(0.1)
    asyncio.run(replica.check(0.2))
    time.sleep(1)
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(replica.check(0.2))
    replica.engine._has_queries = lambda: False
    replica.engine.close()


def test_lessons_share_a_loop_as_long_as_they_are_small(run):
    replica = Replica(Serving.model_validate({"run": str(run.path), "batching": {"adaptation_tokens": 200}}))
    small, large = (replica._lesson(request([(f"t{n}", f"l{n % 2}") for n in range(k)])) for k in (4, 40))
    replica.engine.close()
    rows = len(small.rows) * max(len(row.tokens) for row in small.rows)
    assert 1 < 200 // rows < 6
    for lessons, together in (([small] * 6, 200 // rows), ([small, large], 1), ([large, small], 1)):
        replica.engine._adaptations.extend(Adaptation(one, 1) for one in lessons)
        assert len(replica.engine._next_lessons()) == together
        replica.engine._adaptations.clear()


@pytest.mark.parametrize("algorithm", ["metaicl", "protonet"])
def test_what_keeps_its_examples_answers_as_rayml_predict(tmp_path, algorithm):
    run = make_run(tmp_path / "m", algorithm={"name": algorithm})
    replica = Replica(Serving.model_validate({"run": str(run.path), "adapters": {"resident_bytes": 1}}))
    others = [("a b", "x"), ("c d", "y")]
    first, second = learn(replica, request(), request(others, name="other"))
    assert (first.steps, first.loss_before) == (0, None)
    predictors = []
    for name, pairs in (("tickets", TICKETS), ("other", others)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, examples(pairs))))
        adapt_run(run.path, file, tmp_path / name, None, Console(quiet=True))
        predictors.append(Predictor(tmp_path / name))

    async def all_at_once():
        asked = [ClassifyRequest(model="m", input=text) for text in TEXTS]
        ids = [(manifest.id, place) for place, manifest in enumerate((first, second))]
        found = [(replica.classify("public", i, one), one.input, place) for one in asked for i, place in ids]
        answers = await asyncio.gather(*(answer for answer, _, _ in found))
        return [(answer["answers"][0], text, place) for answer, (_, text, place) in zip(answers, found, strict=True)]

    for answer, text, place in asyncio.run(all_at_once()):
        assert answer["probabilities"] == pytest.approx(predictors[place].predict(text).probabilities, abs=1e-4)
    (some,) = ask(replica, first.id, ["charged"], options=["delivery", "bug"])
    offline = predictors[0].predict("charged", ["delivery", "bug"]).probabilities
    assert some["probabilities"] == pytest.approx(offline, abs=1e-4)
    replica.engine.close()


def test_a_run_on_free_text_writes_what_rayml_predict_writes(tmp_path):
    rows = [{"task": f"t{n % 3}", "input": f"in {n}", "target": f"out {n}"} for n in range(60)]
    (tmp_path / "free.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = make_run(tmp_path / "f", data={"path": str(tmp_path / "free.jsonl"), "splits": {}, "max_tokens": 40})
    replica = Replica(Serving(run=str(run.path)))
    pairs = [("one", "eins"), ("two", "zwei"), ("three", "drei"), ("four", "drei")]
    (manifest,) = learn(replica, request(pairs))
    file = tmp_path / "few.jsonl"
    file.write_text("\n".join(map(json.dumps, examples(pairs))))
    adapt_run(run.path, file, tmp_path / "numbers", None, Console(quiet=True))
    pieces = write(replica, manifest.id, ["five"], Sampling(40))
    assert "".join(piece.text for _, piece, _ in pieces).strip() == Predictor(tmp_path / "numbers").predict("five").text
    (answer,) = ask(replica, manifest.id, ["five"], options=["vier", "fuenf"])
    assert set(answer["probabilities"]) == {"vier", "fuenf"}
    replica.engine.close()


def test_runs_that_one_copy_cannot_serve_are_refused(tmp_path):
    config = make_config(tmp_path, mode="full")
    run = RunFolder(config.run.dir)
    run.begin(config, prepare_splits(config.data), resume=False)
    checkpoint = run.checkpoints / "step_00000001"
    checkpoint.mkdir()
    seal(checkpoint, step=1, part=0, parts=1)
    with pytest.raises(RunError, match="mode=adapters"):
        servable(run)


def test_rayml_adapt_says_when_the_loss_rose(run, tmp_path):
    wild = make_run(tmp_path / "wild", inner_lr=1e4)
    file = tmp_path / "few.jsonl"
    file.write_text("\n".join(map(json.dumps, examples())))
    for one, rose in ((run, False), (wild, True)):
        out = Console(file=io.StringIO(), width=200)
        adapt_run(one.path, file, tmp_path / f"out-{rose}", None, out)
        assert ("the loss rose" in out.file.getvalue()) == rose


# Files that may lie


def fits(replica):
    return replica.resident.fits


def change_config(folder: Path, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_card(folder: Path, **changes):
    path = folder / "rayml.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def first(tensors, kind):
    return next(name for name in tensors if kind in name)


def swap(tensors, kind, weight):
    tensors[first(tensors, kind)] = weight


def poison_weights(change):
    return lambda folder: change_weights(folder, change)


def poison_config(**changes):
    return lambda folder: change_config(folder, **changes)


def narrower(tensors):
    swap(tensors, "lora_A", torch.zeros(2, tensors[first(tensors, "lora_A")].shape[1]))


HEAD = "base_model.model.lm_head.lora_A.weight"
POISON = {
    "not finite": poison_weights(lambda t: t[first(t, "lora_B")].fill_(float("nan"))),
    "has the shape": poison_weights(lambda t: swap(t, "lora_A", torch.zeros(4, 7))),
    "not the rank r=4": poison_weights(narrower),
    "B.* finite": poison_config(lora_alpha=1e300),
    "do not come in pairs": poison_weights(lambda t: t.pop(first(t, "lora_A"))),
    "no linear layer": poison_weights(lambda t: t.update({HEAD: torch.zeros(4, 64)})),
    "holds no weights": poison_weights(lambda t: t.clear()),
    "no safetensors": lambda d: (d / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle"),
    "never pickles": lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
    "cannot be read": lambda d: (d / "adapter_config.json").write_text("[" * 100_000),
    "no JSON object": lambda d: (d / "adapter_config.json").write_text("[]"),
    "LORA alone": poison_config(peft_type="IA3"),
    "use_dora": poison_config(use_dora=True),
    "bias": poison_config(bias="all"),
    "rank r=": poison_config(r=10**9),
    "lora_alpha": poison_config(lora_alpha="x"),
    "made for the base": poison_config(base_model_name_or_path="other/model"),
    "not what rayml writes": lambda d: change_card(d, labels=[]),
    "is not what rayml": lambda d: change_card(d, shown=[1]),
    "what rayml writes$": lambda d: change_card(d, prompt=5),
    "rayml.json is not": lambda d: change_card(d, max_tokens="x"),
    "nothing of the input": lambda d: change_card(d, prompt="x"),
    "reads nothing": lambda d: change_card(d, max_tokens=0),
}


@pytest.mark.parametrize("says", POISON)
def test_a_poisoned_adapter_is_refused_and_nothing_else_suffers(replica, learned, says):
    assert isinstance(read_adapter(learned, fits(replica)), Adapter)
    POISON[says](learned)
    with pytest.raises(RunError, match=says):
        read_adapter(learned, fits(replica))


def test_a_poisoned_adapter_in_the_store_is_422_and_others_answer(replica, learned):
    (fine,) = learn(replica, request(name="fine"))
    POISON["not finite"](learned)
    bad = Manifest(
        id=adapter_id("bad", []), name="bad", created_at=1, expires_at=None,
        examples=0, steps=0, loss_before=None, loss_after=None, seconds=0,
    )  # fmt: skip
    replica.store.publish("public", bad, learned)
    with pytest.raises(ApiError, match="not finite") as refused:
        ask(replica, bad.id, ["a"])
    assert (refused.value.status, refused.value.code) == (422, "adapter_refused")
    assert ask(replica, fine.id, ["a"])


def test_too_large_an_adapter_is_not_even_opened(replica, learned):
    import dataclasses

    small = dataclasses.replace(fits(replica), most_bytes=1000)
    with pytest.raises(RunError, match="at most 1000"):
        read_adapter(learned, small)


def test_plain_peft_adapters_answer_as_peft_does(replica, run, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = replica.session.base
    config = LoraConfig(
        task_type="CAUSAL_LM", r=6, lora_alpha=9, target_modules=["q_proj", "gate_proj"], use_rslora=True
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(tmp_path / "plain")
    publish_adapter(tmp_path / "plain", run.path, None, None, Console(quiet=True))
    prompt = "hello there"
    row = torch.tensor([replica.session.encoder.tokenizer(prompt)["input_ids"]])
    model.eval()
    with torch.no_grad():
        expected = model(row).logits[0, -1].log_softmax(-1)
        text = model.generate(input_ids=row, max_new_tokens=12, do_sample=False, pad_token_id=1)[0, row.shape[1] :]
    found = replica.store.find("public", "plain")
    pieces = write(replica, found.id, [prompt], Sampling(12, logprobs=1))
    assert pieces[0][1].scores[0].logprob == pytest.approx(float(expected.max()), abs=1e-4)
    whole = "".join(piece.text for _, piece, _ in pieces)
    assert whole == replica.session.encoder.tokenizer.decode(text, skip_special_tokens=True).lstrip()


def test_a_downloaded_adapter_scores_in_stock_peft_as_it_is_served(replica, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (manifest,) = learn(replica, request())
    replica.store.fetch("public", manifest, tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(replica.session.base), str(tmp_path)).eval()
    encoder = replica.session.encoder
    answers = ask(replica, manifest.id, TEXTS)
    for text, answer in zip(TEXTS, answers, strict=True):
        (rows,) = encoder.option_rows([Example(text, "")], ["A", "B", "C"])
        with torch.no_grad():
            logits = model(torch.tensor([rows[0].tokens[:-1]])).logits[0, -1]
        scores = logits[[row.tokens[-1] for row in rows]].softmax(-1).tolist()
        assert list(answer["probabilities"].values()) == pytest.approx(scores, abs=1e-4)


def test_a_zip_is_published_without_following_its_paths(run, learned, tmp_path):
    packed = tmp_path / "evil.zip"
    with zipfile.ZipFile(packed, "w") as file:
        for path in learned.iterdir():
            file.write(path, path.name)
        file.writestr("../rayml-escaped", "x")
        file.writestr(str(tmp_path / "rayml-escaped"), "x")
    publish_adapter(packed, run.path, "zipped", str(tmp_path / "store"), Console(quiet=True))
    assert AdapterStore(str(tmp_path / "store")).find("public", "zipped")
    assert not (tmp_path / "rayml-escaped").exists()
    assert not (Path(tempfile.gettempdir()) / "rayml-escaped").exists()
    with pytest.raises(ConfigError, match="--name"):
        publish_adapter(packed, run.path, "../x", str(tmp_path / "store"), Console(quiet=True))
    with pytest.raises(RunError, match="no zip"):
        publish_adapter(learned / "rayml.json", run.path, "z", str(tmp_path / "store"), Console(quiet=True))


# The store, and what is held of it


def manifest_of(name: str, number: int = 0, **more) -> Manifest:
    return Manifest(
        id=adapter_id(name, number), name=name, created_at=number, expires_at=more.get("expires_at"),
        examples=2, steps=3, loss_before=1.0, loss_after=0.5, seconds=0.1,
    )  # fmt: skip


@pytest.fixture(params=["path", "uri"])
def store(request, tmp_path):
    return AdapterStore(str(tmp_path / "store") if request.param == "path" else f"file://{tmp_path}/store")


def test_what_is_published_is_found_by_id_and_name_by_its_owner_alone(store, learned):
    older, newer = (store.publish("public", manifest_of("t", number), learned) for number in (1, 2))
    assert store.find("public", older.id) == older
    assert store.find("public", "t") == newer
    ids = sorted([newer.id, older.id])
    assert [m.id for m in store.page("public")[0]] == ids
    assert store.page("public", most=1)[1]
    assert [m.id for m in store.page("public", after=ids[0])[0]] == ids[1:]
    assert store.find(owner_of("another key, long enough"), older.id) is None
    for reference in ("nobody", "../public/" + older.id, older.id + "/..", "", "t/", "T", "%2e%2e"):
        assert store.find("public", reference) is None
    store.delete("public", newer.id)
    assert store.find("public", "t") == older


def test_an_adapter_without_its_manifest_is_not_there(store, learned):
    whole = store.publish("public", manifest_of("t"), learned)
    store.fs.delete_file(f"{store.path}/public/{whole.id}/manifest.json")
    assert store.find("public", whole.id) is None
    assert store.page("public") == ([], None)
    store.publish("public", manifest_of("t"), learned)
    with store.fs.open_output_stream(f"{store.path}/public/{whole.id}/manifest.json") as file:
        file.write(b'{"id": "torn')
    assert store.find("public", whole.id) is None


def test_what_expired_is_gone(store, learned):
    store.publish("public", manifest_of("old", expires_at=time.time() - 1), learned)
    kept = store.publish("public", manifest_of("new", expires_at=time.time() + 60), learned)
    assert store.find("public", "old") is None
    assert store.count("public") == 2
    store.sweep()
    assert store.count("public") == 1
    assert store.renew("public", kept, None).expires_at is None
    assert store.find("public", kept.id).expires_at is None


def test_damaged_files_are_not_believed(store, learned, tmp_path):
    whole = store.publish("public", manifest_of("t"), learned)
    with store.fs.open_output_stream(f"{store.path}/public/{whole.id}/rayml.json") as file:
        file.write(b"{}")
    with pytest.raises(RunError, match="checksum"):
        store.fetch("public", whole, tmp_path)
    with pytest.raises(RunError, match="no file"):
        store.read("public", whole.id, "../../secret")


def test_two_who_publish_the_same_leave_one_that_is_whole(store, learned, tmp_path):
    """The second writes its weights between the first one's weights and manifest."""
    other = tmp_path / "other"
    shutil.copytree(learned, other)
    change_weights(other, lambda tensors: tensors[first(tensors, "lora_B")].add_(1e-6))
    write, done = store._write_whole, []

    def interrupted(path, data):
        if path.endswith("manifest.json") and not done:
            done.append(True)
            store.publish("public", manifest_of("t"), other)
        write(path, data)

    store._write_whole = interrupted
    store.publish("public", manifest_of("t"), learned)
    store._write_whole = write
    (tmp_path / "fetched").mkdir()
    store.fetch("public", store.find("public", "t"), tmp_path / "fetched")


def test_the_least_recently_used_leave_and_come_back(replica, learned, tmp_path):
    store = AdapterStore(str(tmp_path / "store"))
    ids = [store.publish("public", manifest_of("t", number), learned).id for number in range(4)]
    seen: list[tuple[str, float]] = []
    size = read_adapter(learned, fits(replica)).size
    resident = Resident(store, fits(replica), 2 * size, torch.device("cpu"), lambda *pair: seen.append(pair))

    async def use():
        first = await resident.get("public", ids[0])
        await resident.get("public", ids[1])
        assert await resident.get("public", ids[0]) is first
        await resident.get("public", ids[2])  # 1 leaves
        assert await resident.get("public", ids[0]) is first
        await asyncio.gather(*(resident.get("public", ids[1]) for _ in range(3)))
        with pytest.raises(ApiError) as missing:
            await resident.get("public", adapter_id("none", 0))
        return missing.value.status

    assert asyncio.run(use()) == 404
    names = [name for name, _ in seen]
    assert (names.count("loads"), names.count("evictions")) == (4, 2)
    assert seen[-1] == ("resident_bytes", 2 * size)


# Requests and settings


@pytest.mark.parametrize(
    ("kind", "body", "field"),
    [
        (ClassifyRequest, b'{"model": "m", "input": "x", "inputs": 1}', "inputs"),
        (ClassifyRequest, b'{"model": "m", "input": 5}', "input"),
        (ClassifyRequest, b'{"model": "m", "input": "a\\u0000b"}', "input"),
        (CompletionRequest, b'{"model": "m", "prompt": "x", "temperature": NaN}', "temperature"),
        (CompletionRequest, b'{"model": "m", "prompt": "x", "n": 2}', "n"),
        (CompletionRequest, b'{"model": "m", "prompt": "x", "max_tokens": 0}', "max_tokens"),
        (ChatRequest, b'{"model": "m", "messages": []}', "messages"),
        (AdapterRequest, b'{"examples": [{"input": "x"}]}', "examples.0"),
        (AdapterRequest, b'{"examples": [{"messages": [{"role": "user", "content": "x"}]}]}', "examples.0"),
        (AdapterRequest, b'{"examples": [], "name": "a/b"}', "name"),
        (AdapterRequest, b'{"examples": [], "name": "a.b"}', "name"),
        (AdapterRequest, b'{"examples": [], "ttl_seconds": -1}', "ttl_seconds"),
        (ClassifyRequest, b"\xff\xfe", None),
        (ClassifyRequest, b"[" * 100_000, None),
        (ClassifyRequest, b'{"model": "m", "input": "\\ud800"}', None),
    ],
)
def test_bad_requests_are_400_and_name_the_field(kind, body, field):
    with pytest.raises(ApiError) as refused:
        parse(kind, body)
    assert (refused.value.status, refused.value.param) == (400, field)
    assert set(refused.value.body()["error"]) == {"message", "type", "param", "code"}


def test_conversations_become_inputs():
    asked = [
        Message(role="system", content="Be brief."),
        Message(role="user", content=[{"type": "text", "text": "hi"}]),
    ]
    assert plain(asked) == "Be brief.\n\nhi"
    longer = [*asked, Message(role="assistant", content="yes?"), Message(role="user", content="bye")]
    assert plain(longer) == "system: Be brief.\nuser: hi\nassistant: yes?\nuser: bye"
    example = parse(AdapterRequest, b'{"examples": [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " yo"}]}]}').examples[0]  # fmt: skip  # noqa: E501
    assert example.example() == Example("hi", "yo")
    assert example.example(is_dialogue=True).parts == (("user", "hi"), ("assistant", "yo"))
    fields = parse(AdapterRequest, b'{"examples": [{"input": {"premise": "a", "hypothesis": "b"}, "target": "no"}]}')
    assert fields.examples[0].example().parts == (("premise", "a"), ("hypothesis", "b"))


def test_every_serving_setting_is_explained():
    from rayml.config import keys

    explained = {name: text for name, (_, text) in keys(Serving).items()}
    assert len(explained) > 30
    assert [name for name, text in explained.items() if not text] == []


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# team a\n" + "a" * 20 + "\n\n" + "b" * 20 + "\n")
    monkeypatch.setenv("RAYML_API_KEYS", "c" * 20)
    assert api_keys(str(file)) == {"a" * 20, "b" * 20, "c" * 20}
    monkeypatch.setenv("RAYML_API_KEYS", "short")
    with pytest.raises(ConfigError, match="16 characters"):
        api_keys(None)
    file.write_text("#\n")
    monkeypatch.delenv("RAYML_API_KEYS")
    with pytest.raises(ConfigError, match="no key"):
        api_keys(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        api_keys(str(tmp_path / "none"))


def test_others_are_let_in_by_a_key_alone():
    for host in ("127.0.0.1", "localhost", "::1"):
        check_host(host, frozenset(), insecure=False)
    check_host("0.0.0.0", frozenset({"k" * 16}), insecure=False)
    check_host("0.0.0.0", frozenset(), insecure=True)
    with pytest.raises(ConfigError, match="no API key"):
        check_host("0.0.0.0", frozenset(), insecure=False)
