"""Free text with its task's examples in the prompt: `algorithm.texts_in_context`."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import SPLITS, make_config, perturbed_start, tiny_lm, toy_tasks, write_tasks

import rayml
from rayml.algorithms.inner_loop import expand
from rayml.algorithms.registry import parse_algorithm
from rayml.errors import DataError
from rayml.lm.check_tasks import check_tasks
from rayml.lm.encode import Encoder
from rayml.lm.scorer import EpisodeQueries
from rayml.lm.sides import TaskSide
from rayml.tasks.episodes import Episode
from rayml.tasks.kinds import parse_spans, parse_target
from rayml.tasks.task import Example, Task
from rayml.training.driver import train

EXAMPLES = [
    Example("fly to Rome", "city: Rome"),
    Example("by bus, please", "none"),
    Example("Oslo or Bern", "city: Oslo; city: Bern"),
]
ROWS = [{"input": e.input, "target": e.target, "kind": "text"} for e in EXAMPLES]


@pytest.fixture
def encoder(tokenizer) -> Encoder:
    return Encoder(tokenizer, "{input}\nEntities:", 64, texts_in_context=True)


def test_a_support_is_one_row_that_ends_as_a_query_does(encoder):
    (row,), classes = encoder.support(EXAMPLES, [])
    assert classes == []
    asked = encoder.row(EXAMPLES[-1], is_label=False, shown=EXAMPLES[:-1])
    assert row.tokens == asked.tokens
    decode, end = encoder.tokenizer.decode, encoder.tokenizer.eos_token
    assert decode(row.tokens) == (
        f"fly to Rome\nEntities: city: Rome{end}\n\nby bus, please\nEntities: none{end}\n\n"
        f"Oslo or Bern\nEntities: city: Oslo; city: Bern{end}"
    )
    learned = [i for i in range(row.start, len(row.tokens)) if i not in row.loss_masked]
    assert decode([row.tokens[i] for i in learned]) == f" city: Rome{end} none{end} city: Oslo; city: Bern{end}"
    assert [i for i in learned if i >= asked.start] == list(range(asked.start, len(asked.tokens)))


def test_its_loss_is_that_of_each_example_after_those_before_it(encoder, tiny):
    lm = tiny_lm(tiny)
    start = {name: weight.unsqueeze(0) for name, weight in perturbed_start(lm).items()}
    (row,), _ = encoder.support(EXAMPLES, [])
    found = TaskSide(lm, [[row]], [[]], [[]], encoder.pad).losses(start)
    total, tokens = torch.zeros(()), 0
    for n, example in enumerate(EXAMPLES):
        alone = encoder.row(example, is_label=False, shown=EXAMPLES[:n])
        count = len(alone.tokens) - alone.start
        total += count * TaskSide(lm, [[alone]], [[]], [[]], encoder.pad).losses(start)[0]
        tokens += count
    torch.testing.assert_close(found, (total / tokens).unsqueeze(0), rtol=1e-5, atol=1e-5)


def test_a_support_that_is_too_long_loses_its_beginning(encoder):
    whole = encoder.sequence(EXAMPLES)
    most = (len(whole.tokens) - whole.start - 2) // 3  # the cut is within the first target
    row = replace(encoder, max_tokens=most).sequence(EXAMPLES)
    assert row.tokens == whole.tokens[-3 * most :]
    cut = len(whole.tokens) - 3 * most
    positions = [{i for i in range(r.start, len(r.tokens)) if i not in r.loss_masked} for r in (whole, row)]
    assert {i + cut for i in positions[1]} == {i for i in positions[0] if i > cut}
    long = Example("x", "word " * 200)
    with pytest.raises(DataError, match="leaves no room for its input"):
        check_tasks(encoder, [Task("t", (long, *EXAMPLES), (), "text")])


def test_special_tokens_that_were_typed_stay_text(encoder):
    typed = Example(f"say {encoder.tokenizer.eos_token}", f"no {encoder.tokenizer.eos_token}")
    tokens = encoder.sequence([typed, *EXAMPLES]).tokens
    assert tokens.count(encoder.tokenizer.eos_token_id) == 4


def test_queries_see_the_support_and_labels_are_as_ever(encoder):
    record = encoder.episode(Episode(0, "t", tuple(EXAMPLES[:2]), tuple(EXAMPLES[2:]), {}))
    assert len(record["support"]["tokens"]) == 1
    assert record["query"]["tokens"] == [encoder.sequence(EXAMPLES).tokens]
    labels = {"a": "a", "b": "b"}
    few = Episode(0, "t", (Example("x", "a"), Example("y", "b")), (Example("z", "a"),), labels)
    assert encoder.episode(few) == replace(encoder, texts_in_context=False).episode(few)


@pytest.mark.ray
def test_a_run_learns_texts_in_context(tmp_path, local_mode):
    """Training, validation and evaluation; and what is learned of a task, saved and loaded, shows its examples."""
    texts = [{"task": f"t{n % 3}", "input": f"in {n}", "target": f"out {n}", "kind": "text"} for n in range(60)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    toy = str(write_tasks(tmp_path / "toy.jsonl", toy_tasks()))
    data = {"path": [toy, str(tmp_path / "texts.jsonl")], "splits": SPLITS | {"val_tasks": ["toy-4", "t2"]}}
    algorithm = {"name": "proto_maml", "texts_in_context": True}
    validation = {"every": 1, "episodes": 4}
    config = make_config(tmp_path, algorithm=algorithm, data=data, outer={"steps": 2}, validation=validation)
    run = train(config)
    model = rayml.load(run)
    adapter = model.adapt(ROWS, steps=1)
    assert adapter.shown == [replace(e, parts=()) for e in EXAMPLES]
    together = model.encoder.for_task("task", "text").sequence(EXAMPLES)
    side = TaskSide(model.lm, [[together]], [[]], [[]], model.encoder.pad)
    assert adapter.losses[0] == pytest.approx(float(side.losses(expand(model.start, 1))), rel=1e-4)
    adapter.save(tmp_path / "adapter")
    again = rayml.load_adapter(tmp_path / "adapter")
    assert [str(a) for a in again.predict(["to Bonn", "no"])] == [str(a) for a in adapter.predict(["to Bonn", "no"])]
    assert adapter.predict("to Bonn").items is None
    spans = model.adapt([{"input": e.input, "target": parse_target("ner", e.target)} for e in EXAMPLES], steps=0)
    answer = spans.predict("to Bonn")
    assert answer.items == [{"text": text, "type": kind} for kind, text in parse_spans(str(answer))]
    assert not model.adapt([("a", "x"), ("b", "y"), ("c", "x")]).shown
    query = adapter.query(Example("to Bonn", ""), ["none", "city: Bonn"])
    assert EXAMPLES[0].input in model.encoder.tokenizer.decode(query.option_queries[0].rows[0].tokens)

    episode, scorer = Episode(0, "t", tuple(EXAMPLES[:2]), (EXAMPLES[2],), {}, "text"), model.scorer()
    losses = EpisodeQueries(model.lm, model.encoder, [episode], model.config.algorithm).scores(None)
    row = model.encoder.for_task("t", "text").row(EXAMPLES[2], False, EXAMPLES[:2])
    alone = TaskSide(model.lm, [[row]], [[]], [[]], model.encoder.pad).losses(None)
    assert losses == pytest.approx(alone.tolist(), rel=1e-5)
    assert scorer.curves([episode], model.start, model.inner_lrs)[0].scores[0] > 0


def test_it_cannot_be_sharded():
    assert parse_algorithm({"name": "fomaml_plus"}).runs_sharded
    assert not parse_algorithm({"name": "fomaml_plus", "texts_in_context": True}).runs_sharded


def test_examples_that_have_no_room_in_the_prompt_are_learned_all_the_same(encoder, monkeypatch):
    size = len(encoder.row(EXAMPLES[0], is_label=False).tokens)
    monkeypatch.setattr("rayml.lm.encode.SHOWN_TOKENS", 2 * size + 1)
    many = [EXAMPLES[0]] * 5
    rows, _ = encoder.support(many, [])
    assert [row.tokens for row in rows] == [encoder.sequence(many[:n]).tokens for n in (2, 2, 1)]
    assert len(encoder.shown(many, is_label=False)) == 2
    assert encoder.shown(many, is_label=True) == ()
    monkeypatch.setattr("rayml.lm.encode.SHOWN_TOKENS", 1)  # one is shown at least
    assert len(encoder.shown(many, is_label=False)) == 1
