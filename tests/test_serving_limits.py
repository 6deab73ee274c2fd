"""What a replica refuses, how it fails, and the runs it can serve."""

import asyncio
import json
import time
from dataclasses import replace

import pytest
import torch
from conftest import make_config
from pydantic import ValidationError
from serving_run import TEXTS, TICKETS, ask, examples, learn, learned, make_run, replica, request, run, write  # noqa: F401

from rayml.adapter import load_adapter
from rayml.errors import RunError
from rayml.lm.sampling import Sampling
from rayml.model import load
from rayml.runs.checkpoint import seal
from rayml.runs.folder import RunFolder
from rayml.serving.errors import ApiError
from rayml.serving.queries import build_queries, without_limit
from rayml.serving.replica import Replica
from rayml.serving.schema import (
    ClassifyRequest,
)
from rayml.serving.served import read_servable_run
from rayml.serving.settings import Serving
from rayml.serving.work import PendingAdaptation, PendingQuery
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.row import query_example


@pytest.mark.parametrize(
    ("pairs", "more", "says"),
    [
        ([("a", "x"), ("b", "x")], {}, "same label"),
        ([("a", "x"), ("b", "y")], {"options": ["x", "z"]}, "none of the options"),
        ([("a", "x"), (" A ", "y")], {}, "stands under x and y"),
        ([("a", "x"), ("b " * 400, "y")], {}, "examples.1: has 8"),
        ([("a", "x"), ("a", "x"), ("c", "y"), ("b " * 400, "y")], {}, "examples.3: has 8"),
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


@pytest.mark.parametrize("ensemble", [(), ("A longer one: {input}\nLabel:",)])
@pytest.mark.parametrize("labels", [["card", "card lost"], ["x", "y"]])
def test_no_input_is_cut_unseen(replica, labels, ensemble):
    encoder = replace(replica.bare.encoder, max_tokens=40, ensemble=ensemble)
    adapter = replace(replica.bare, encoder=encoder)
    cuts = []
    for count in range(5, 45):
        ((query, is_cut),) = build_queries(adapter, ["x" * count], labels, 1000, truncate=True)
        whole = without_limit(encoder).ensemble_rows([query_example("x" * count)], labels)
        assert is_cut == ([q.rows for q in query.option_queries] != [rows for _, (rows,) in whole])
        cuts.append(is_cut)
    assert set(cuts) == {False, True}


@pytest.mark.parametrize("options", [["x", "y"], ["one long option", "one long opinion"]])
def test_the_base_s_input_is_cut_to_what_is_read_in_one_piece(replica, options):
    ((query, is_cut),) = build_queries(replica.bare, ["word " * 200], options, 300, truncate=True)
    assert is_cut
    assert 290 < query.tokens <= 300


def test_a_full_queue_says_so_and_recovers(run):
    replica = Replica(Serving.model_validate({"run": str(run.path), "limits": {"waiting_queries": 3, "inputs": 3}}))
    assert len(ask(replica, None, ["a", "b", "c"], options=["x", "y"])) == 3
    with pytest.raises(ApiError, match="at most 3") as refused:
        ask(replica, None, ["a", "b", "c", "d"], options=["x", "y"])
    assert refused.value.status == 429
    assert len(ask(replica, None, ["a", "b", "c"], options=["x", "y"])) == 3
    replica.engine.close()


def test_a_request_that_could_never_wait_is_refused_at_the_start():
    with pytest.raises(ValidationError, match="waiting_queries"):
        Serving.model_validate({"run": "r", "limits": {"inputs": 300}})


def test_a_key_has_no_more_adapters_than_it_may(run, tmp_path):
    settings = {"run": str(run.path), "store": str(tmp_path / "few"), "limits": {"adapters_per_key": 2}}
    replica = Replica(Serving.model_validate(settings))
    learn(replica, request(name="one", ttl_seconds=1))
    learn(replica, request(name="two"))
    time.sleep(1)
    learn(replica, request(name="three"))  # the first has expired
    with pytest.raises(ApiError, match="2 adapters") as refused:
        learn(replica, request(name="four"))
    assert (refused.value.status, refused.value.code) == (429, "too_many")
    replica.engine.close()


def test_a_failing_batch_fails_alone(run, monkeypatch):
    replica = Replica(Serving(run=str(run.path)))
    with monkeypatch.context() as broken:
        broken.setattr("rayml.lm.queries.stack_adapters", lambda adapters: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ask(replica, None, ["a"], options=["x", "y"])
    assert ask(replica, None, ["a"], options=["x", "y"])
    asyncio.run(replica.check(5))
    replica.engine.close()


def test_a_query_that_comes_while_others_are_taken_disturbs_none(replica):
    engine, late = replica.engine, []
    ((query, _),) = build_queries(replica.bare, ["a"], ["x", "y"], 100, truncate=False)

    class Interrupted(PendingQuery):
        @property
        def query(self):
            if not late:
                late.append(PendingQuery(query))
                engine.classify(late)
            return query

        @query.setter
        def query(self, _):
            pass

    waiting = [Interrupted(query), PendingQuery(query)]
    engine.classify(waiting)
    for one in (*waiting, *late):
        assert len(one.answer.result(20)) == 2


def test_a_query_that_comes_while_a_turn_fails_is_not_forgotten(run):
    def fail():
        raise RuntimeError("broken")

    engine = Replica(Serving(run=str(run.path))).engine
    engine._turn = fail
    first, second = PendingQuery(None), PendingQuery(None)
    first.answer.add_done_callback(lambda _: engine.classify([second]))
    engine.classify([first])
    with pytest.raises(RuntimeError, match="broken"):
        second.answer.result(20)
    engine.close()


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
        replica.model.lm.module.get_input_embeddings().weight.fill_(float("nan"))
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


def test_adaptations_share_a_loop_as_long_as_they_are_small(run):
    replica = Replica(Serving.model_validate({"run": str(run.path), "batching": {"turn_tokens": 200}}))
    small, large = (
        replica.learner.encode_request(request([(f"t{n}", f"l{n % 2}") for n in range(k)])) for k in (4, 40)
    )
    replica.engine.close()
    adaptations = replica.engine.adaptations
    rows = len(small.rows) * max(len(row.tokens) for row in small.rows)
    assert 1 < 200 // rows < 6
    for requests, together in (([small] * 6, 200 // rows), ([small, large], 1), ([large, small], 1)):
        adaptations.waiting.extend(PendingAdaptation(one, 1) for one in requests)
        assert len(adaptations._take_next("")) == together
        adaptations.waiting.clear()


@pytest.mark.parametrize("algorithm", ["metaicl", "protonet", "proto_maml"])
def test_what_keeps_its_examples_answers_as_rayml_predict(tmp_path, algorithm):
    run = make_run(tmp_path / "m", algorithm={"name": algorithm})
    replica = Replica(Serving.model_validate({"run": str(run.path), "adapters": {"cached_bytes": 1}}))
    others = [("a b", "x"), ("c d", "y")]
    first, second = learn(replica, request(), request(others, name="other"))
    assert first.steps == (2 if algorithm == "proto_maml" else 0)
    predictors = []
    for name, pairs in (("tickets", TICKETS), ("other", others)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, examples(pairs))))
        load(run).adapt(file).save(tmp_path / name)
        predictors.append(load_adapter(tmp_path / name))

    async def all_at_once():
        asked = [ClassifyRequest(model="m", input=text) for text in TEXTS]
        ids = [(manifest.id, index) for index, manifest in enumerate((first, second))]
        found = [(replica.classify("public", i, one), one.input, index) for one in asked for i, index in ids]
        answers = await asyncio.gather(*(answer for answer, _, _ in found))
        return [(answer["answers"][0], text, index) for answer, (_, text, index) in zip(answers, found, strict=True)]

    for answer, text, index in asyncio.run(all_at_once()):
        assert answer["probabilities"] == pytest.approx(predictors[index].predict(text).probabilities, abs=1e-4)
    (some,) = ask(replica, first.id, ["charged"], options=["delivery", "bug"])
    offline = predictors[0].predict("charged", ["delivery", "bug"]).probabilities
    assert some["probabilities"] == pytest.approx(offline, abs=1e-4)
    replica.engine.close()


@pytest.mark.parametrize("shown", [str, lambda text: {"word": text}], ids=["text", "field"])
def test_a_run_on_free_text_writes_what_rayml_predict_writes(tmp_path, shown):
    rows = [{"task": f"t{n % 3}", "input": shown(f"in {n}"), "target": f"out {n}"} for n in range(60)]
    (tmp_path / "free.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"path": str(tmp_path / "free.jsonl"), "splits": {}, "max_tokens": 40}
    prompt = "{% for name, text in parts %}{{ name }} is {% endfor %}{{ input }}"
    run = make_run(tmp_path / "f", data=data | {"prompt": prompt})
    replica = Replica(Serving(run=str(run.path)))
    pairs = [(shown("one"), "eins"), (shown("two"), "zwei"), (shown("three"), "drei"), (shown("four"), "drei")]
    (manifest,) = learn(replica, request(pairs))
    file = tmp_path / "few.jsonl"
    file.write_text("\n".join(map(json.dumps, examples(pairs))))
    load(run).adapt(file).save(tmp_path / "numbers")
    pieces = write(replica, manifest.id, ["five"], Sampling(40))
    written = "".join(piece.text for _, piece, _ in pieces).strip()
    offline = load_adapter(tmp_path / "numbers")
    assert written == offline.predict("five").text
    assert pieces[0][2] == len(offline.encoder.prompt_tokens(query_example(shown("five"))))  # the field's name, too
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
        read_servable_run(run)


def test_rayml_adapt_says_when_the_loss_rose(run, tmp_path):
    from typer.testing import CliRunner

    from rayml.cli import app

    wild = make_run(tmp_path / "wild", inner_lr=1e4)
    file = tmp_path / "few.jsonl"
    file.write_text("\n".join(map(json.dumps, examples())))
    for one, rose in ((run, False), (wild, True)):
        told = CliRunner().invoke(app, ["adapt", str(one.path), f"--examples={file}", f"--out={tmp_path}/out-{rose}"])
        assert told.exit_code == 0, told.output
        assert ("the loss rose" in told.output) == rose
