"""The library as people import it: load, adapt, predict, save, bring back."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_config, toy_tasks, write_tasks
from serving_run import TEXTS, TICKETS, examples, make_run
from typer.testing import CliRunner

import rayml
from rayml import adapter as adapter_module
from rayml import model as model_module
from rayml.cli import app
from rayml.errors import ConfigError, DataError, RunError, TrainingError
from rayml.experiments.evaluate import Evaluation, Parts, evaluate
from rayml.lm.fine_tuning import rate_factors
from rayml.model import untrained_model
from rayml.runs.checkpoint import folder_name, read_checkpoint, seal, write_state
from rayml.runs.folder import RunFolder
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.read import read_rows
from rayml.tasks.statistics import Curve

OTHERS = [("a b", "x"), ("c d", "y"), ("e f", "x"), ("g", "y"), ("h i", "y")]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(run):
    return rayml.load(run)


@pytest.fixture
def full(tmp_path):
    """A model of mode full, as training would begin."""
    config = make_config(tmp_path, mode="full", inner={"lr": 0.01, "steps": 2})
    return untrained_model(config, prepare_splits(config.data).train)


def assert_equal_weights(one, other, atol=0.0):
    assert one.weights.keys() == other.weights.keys()
    for name, weight in one.weights.items():
        torch.testing.assert_close(other.weights[name], weight, atol=atol, rtol=1e-5 if atol else 0)


def test_a_task_is_learned_asked_saved_and_brought_back(model, tmp_path):
    tickets = model.adapt(TICKETS, name="tickets")
    answer = tickets.predict("charged again")
    assert answer.label == answer.text == max(answer.probabilities, key=answer.probabilities.get) == str(answer)
    assert set(answer.probabilities) == {"billing", "bug", "delivery"}
    assert sum(answer.probabilities.values()) == pytest.approx(1)
    assert len(tickets.losses) == model.config.inner.steps + 1
    assert model.adapt(TICKETS, steps=5).losses[:3] == pytest.approx(tickets.losses)

    assert tickets.save(tmp_path / "tickets") == tmp_path / "tickets"
    again = rayml.load_adapter(tmp_path / "tickets")
    assert_equal_weights(again, tickets)
    assert again.predict("charged again").probabilities == pytest.approx(answer.probabilities, abs=1e-5)
    with pytest.raises(RunError, match="exists already"):
        tickets.save(tmp_path / "tickets")


def test_a_list_is_answered_side_by_side_and_in_its_order(model):
    tickets = model.adapt(TICKETS)
    together = tickets.predict([*TEXTS, "word " * 90] * 9)  # several forwards, and one that is cut
    alone = [tickets.predict(text) for text in (*TEXTS, "word " * 90)] * 9
    for one, other in zip(together, alone, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-4)
    assert tickets.predict([]) == []
    some = tickets.predict(["x"], options=["bug", "delivery"])
    assert set(some[0].probabilities) == {"bug", "delivery"}
    with pytest.raises(ConfigError, match="nonsense not among the task's labels: billing"):
        tickets.predict("x", options=["nonsense"])


def test_tasks_of_one_inner_loop_come_out_as_alone(model):
    found = model.adapt_many({"tickets": TICKETS, "letters": OTHERS, "more": OTHERS[:3]}, at_once=2)
    assert list(found) == ["tickets", "letters", "more"]
    for name, examples_ in (("tickets", TICKETS), ("letters", OTHERS), ("more", OTHERS[:3])):
        alone = model.adapt(examples_, name=name)
        assert_equal_weights(alone, found[name], atol=1e-6)
        assert found[name].losses == pytest.approx(alone.losses, abs=1e-5)
        assert found[name].card == alone.card


def test_examples_come_in_any_form(model, tmp_path):
    import datasets
    import pandas

    file = tmp_path / "few.jsonl"
    file.write_text("\n".join(map(json.dumps, examples())))
    labels = sorted({label for _, label in TICKETS})
    columns = {"input": [text for text, _ in TICKETS], "target": [labels.index(label) for _, label in TICKETS]}
    classes = datasets.Features({"input": datasets.Value("string"), "target": datasets.ClassLabel(names=labels)})
    expected = model.adapt(TICKETS)
    for form in (
        file,
        str(file),
        examples(),
        iter(TICKETS),
        read_rows([str(file)]),
        [list(pair) for pair in TICKETS],
        pandas.DataFrame(examples()),
        pandas.DataFrame([e | {"options": labels, "features": 1} for e in examples()]),
        pandas.DataFrame([examples()[0] | {"kind": "label"}, *examples()[1:]]).drop(columns="kind"),
        datasets.Dataset.from_list(examples()),
        datasets.Dataset.from_dict(columns, features=classes),
    ):
        assert_equal_weights(expected, model.adapt(form))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "there is none"),
        ([("a", "x"), "b"], "example 1: expected a pair"),
        ([{"input": "a"}], "which columns are input and target"),
        ({"input": ["a"]}, "expected pairs"),
        ([("a", "x"), ("A ", "y")], "stands under x and y"),
        ([{"task": "t", "input": "a", "target": "x"}, {"task": "u", "input": "b", "target": "y"}], "holds 2 tasks"),
    ],
)
def test_examples_that_cannot_be_used_are_named(model, given, says):
    with pytest.raises(DataError, match=says):
        model.adapt(given)


def test_an_adaptation_that_diverged_is_an_error_and_not_an_adapter(tmp_path):
    wild = rayml.load(make_run(tmp_path / "wild", inner_lr=1e30))
    with pytest.raises(TrainingError, match=r"desk: the adaptation diverged.*fewer steps"):
        wild.adapt(TICKETS, name="desk", steps=5)
    with pytest.raises(ConfigError, match="0 or more"):
        wild.adapt(TICKETS, steps=-1)


def test_a_task_is_learned_where_gradients_are_off_and_by_numpys_numbers(model):
    import numpy

    expected = model.adapt(TICKETS, steps=2)
    with torch.no_grad():
        assert_equal_weights(model.adapt(TICKETS, steps=numpy.int64(2)), expected)
    for at_once in (0, -1, "2"):
        with pytest.raises(ConfigError, match=f"at_once: expected a whole number, 1 or more, got {at_once}"):
            model.adapt_many({"tickets": TICKETS}, at_once=at_once)


def test_options_are_labels_whatever_kind_the_run_is_of(model):
    writer = dataclasses.replace(model)
    vars(writer).update(kind="ner", takes_labels=False)  # as of a run on spans alone
    rows = [row | {"options": ["billing", "bug", "delivery"]} for row in examples()]
    assert writer.adapt(rows).labels == ("billing", "bug", "delivery")
    assert writer.adapt(examples()[:2]).card.kind == "ner"


def test_the_base_is_loaded_once(run, tmp_path, monkeypatch):
    loads, load = [], adapter_module.load_base
    for module, name in ((model_module, "load_module"), (adapter_module, "load_base")):
        monkeypatch.setattr(module, name, lambda *given: loads.append(given) or load(*given))
    model = rayml.load(run)
    found = model.adapt_many({"tickets": TICKETS, "letters": OTHERS})
    for name, adapter in found.items():
        adapter.predict(TEXTS)
        adapter.save(tmp_path / name)
    first = rayml.load_adapter(tmp_path / "tickets", model=model)
    second = rayml.load_adapter(tmp_path / "letters", model=first)
    assert len(loads) == 1
    for text in TEXTS:  # in turn: neither answers with the other's weights
        for loaded, learned in ((first, found["tickets"]), (second, found["letters"])):
            assert loaded.predict(text).probabilities == pytest.approx(learned.predict(text).probabilities, abs=1e-6)


def test_an_adapter_of_another_base_is_refused(model, tmp_path):
    wider = rayml.load(make_run(tmp_path / "wider", lora={"rank": 4, "targets": ["gate_proj"]}))
    wider.adapt(TICKETS).save(tmp_path / "gates")
    with pytest.raises(RunError, match=r"hooks do not.*every_linear=True"):
        rayml.load_adapter(tmp_path / "gates", model=model)
    every = rayml.load(model.run, every_linear=True)
    answer = rayml.load_adapter(tmp_path / "gates", model=every).predict("charged again")
    assert answer.probabilities == pytest.approx(
        rayml.load_adapter(tmp_path / "gates").predict("charged again").probabilities, abs=1e-5
    )
    card = json.loads((tmp_path / "gates" / "rayml.json").read_text())
    (tmp_path / "gates" / "rayml.json").write_text(json.dumps(card | {"model": "other"}))
    with pytest.raises(RunError, match="was learned on other, not on tiny"):
        rayml.load_adapter(tmp_path / "gates", model=every)
    with pytest.raises(RunError, match="no adapter"):
        rayml.load_adapter(tmp_path)


def test_an_adapter_whose_files_are_cut_short_or_missing_is_refused(model, tmp_path):
    model.adapt(TICKETS).save(tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    for size in (weights.stat().st_size // 2, 0):
        os.truncate(weights, size)
        with pytest.raises(RunError, match="no adapter that `rayml adapt` wrote"):
            rayml.load_adapter(tmp_path / "cut", model=model)
    reads = rayml.load(make_run(tmp_path / "reads", algorithm={"name": "proto_maml"}))
    reads.adapt(TICKETS).save(tmp_path / "means")
    (tmp_path / "means" / "readout.safetensors").unlink()
    with pytest.raises(RunError, match=r"has no readout.safetensors, which proto_maml needs for its answers"):
        rayml.load_adapter(tmp_path / "means", model=reads)


def test_a_task_of_mode_full_answers_from_memory_and_from_its_folder(full, tmp_path):
    before = {name: weight.clone() for name, weight in full.lm.module.named_parameters()}
    found = full.adapt_many({"tickets": TICKETS, "letters": OTHERS})
    tickets = found["tickets"]
    assert tickets.losses[-1] < tickets.losses[0]
    tickets.save(tmp_path / "tickets")
    again = rayml.load_adapter(tmp_path / "tickets", model=full)
    for one, other in zip(tickets.predict(TEXTS), again.predict(TEXTS), strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    full.save(tmp_path / "start")
    for name, weight in full.lm.module.named_parameters():
        assert torch.equal(weight, before[name]), "what is saved leaves the base as it was"


def test_free_text_is_written_alone_and_side_by_side(tmp_path):
    rows = [{"task": f"t{n % 3}", "input": f"in {n}", "target": f"out {n}"} for n in range(60)]
    (tmp_path / "free.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"path": str(tmp_path / "free.jsonl"), "splits": {}, "max_tokens": 40}
    numbers = rayml.load(make_run(tmp_path / "f", data=data)).adapt([("one", "eins"), ("two", "zwei"), ("ten", "zehn")])
    inputs = ["five", "a longer one", "x"]
    answers = numbers.predict(inputs)
    assert [answer.label for answer in answers] == [None] * 3
    assert answers == [numbers.predict(one) for one in inputs]
    assert set(numbers.predict("five", options=["vier", "fuenf"]).probabilities) == {"vier", "fuenf"}
    asked = [{"role": "user", "content": "five"}]
    assert numbers.predict(asked) == numbers.predict("five")
    assert numbers.predict([asked, "x"])[0] == numbers.predict("five")


def test_mode_full_writes_text_too(full):
    found = full.adapt([(f"in {n}", f"out {n}") for n in range(4)] + [("same", "out 1")], name="text", steps=1)
    assert found.labels  # this run is on labels, and so are targets that come back
    rows = [{"input": f"in {n}", "target": f"out {n}", "kind": "text"} for n in range(4)]
    written = full.adapt(rows, name="text", steps=1)
    assert written.predict(["in 9", "in 10"])[0].probabilities == {}


def test_what_is_shown_teaches(model):
    tickets = model.adapt(TICKETS, name="tickets")
    assert "<MetaModel tiny, fomaml_plus, step 1, the newest" in repr(model)
    assert ".adapt([(input, target)" in repr(model)
    assert "<Adapter 'tickets' on tiny: labels billing, bug, delivery, loss" in repr(tickets)
    assert ".predict(input), .save(folder)>" in repr(tickets)


@pytest.fixture
def two_checkpoints(run, tmp_path) -> RunFolder:
    """A run whose best checkpoint on meta-val is that of step 1, and whose newest is that of step 2."""
    shutil.copytree(run.path, tmp_path / "run")
    found = RunFolder(tmp_path / "run")
    shutil.copytree(found.checkpoints / folder_name(1), found.best / folder_name(1))
    newest = found.checkpoints / folder_name(2)
    newest.mkdir()
    saved = read_checkpoint(found.checkpoints / folder_name(1))
    write_state(newest, {name: 2 * tensor for name, tensor in saved.tensors.items()})
    seal(newest, step=2, part=0, parts=1)
    return found


def test_readers_take_the_best_on_meta_val_and_say_so(two_checkpoints, tmp_path):
    run = two_checkpoints
    assert rayml.load(run).step == rayml.load(run, checkpoint="best").step == 1
    assert rayml.load(str(run.path), checkpoint="newest").step == 2
    assert rayml.load(run).checkpoint == "step 1, the best on meta-val"
    (tmp_path / "few.jsonl").write_text("\n".join(map(json.dumps, examples())))
    best, newest = ([], 1, "step 1, the best on meta-val"), (["--checkpoint=newest"], 2, "step 2, the newest")
    for given, step, said in (best, newest):
        told = CliRunner().invoke(app, ["evaluate", str(run.path), "--episodes=2", *given])
        assert told.exit_code == 0, told.output
        assert said in told.output
        assert json.loads((run.path / "evaluation.json").read_text())["outer_steps"] == step
        command = ["adapt", str(run.path), f"--examples={tmp_path / 'few.jsonl'}", f"--out={tmp_path / str(step)}"]
        told = CliRunner().invoke(app, [*command, *given, "--steps=1"])
        assert told.exit_code == 0, told.output
        assert said in told.output
        model = rayml.load(run, checkpoint=given[0].partition("=")[2] if given else None)
        assert model.config.inner.steps > 1
        expected = model.adapt(TICKETS, steps=1)
        assert_equal_weights(rayml.load_adapter(tmp_path / str(step)), expected)
    with pytest.raises(ConfigError, match="expected best or newest"):
        rayml.load(run, checkpoint="latest")
    shutil.rmtree(run.best)
    assert rayml.load(run).step == 2
    with pytest.raises(RunError, match="no validation has chosen"):
        rayml.load(run, checkpoint="best")


def test_the_untrained_start_adapts_at_the_rates_that_training_began_with(tmp_path):
    """A run that has learned nothing yet: both its starts are the same, and so are their curves."""
    rows = [{"task": f"t{n % 3}", "input": f"in {n}", "target": f"out {n}"} for n in range(60)]
    (tmp_path / "free.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"path": str(tmp_path / "free.jsonl"), "splits": {}, "max_tokens": 40}
    model = rayml.load(make_run(tmp_path / "f", data=data, inner={"steps": 2, "lr": 0.5, "layer_decay": 0.3}))
    factors = rate_factors(model.lm.module, model.start, 0.3)
    assert len(set(factors.values())) == 4
    begun = dataclasses.replace(model, inner_lrs={n: rate * factors[n] for n, rate in model.inner_lrs.items()})
    tasks, parts = prepare_splits(model.config.data).train, Parts(tmp_path, [])
    found = evaluate(begun, tasks, model.config.data.sampler(0), 2, parts, lambda _: None)
    for trained, untrained in zip(found.trained, found.untrained, strict=True):
        assert trained.scores == pytest.approx(untrained.scores, abs=1e-6)


def test_a_model_that_is_loaded_is_evaluated_as_its_folder_is(run, model, tmp_path):
    by_folder = rayml.evaluate(run.path, episodes=2)
    assert rayml.evaluate(model, episodes=2) == by_folder
    assert json.loads((run.path / "evaluation.json").read_text()) == by_folder
    file = write_tasks(tmp_path / "other.jsonl", toy_tasks(tasks=1, seed=5))
    for data, number in ((file, 0), ([file], 1), ([str(file)], 2)):
        told = str(tmp_path / f"{number}.json")
        by_path = rayml.evaluate(model, data=data, episodes=1, json_file=told)
        assert by_path == json.loads(Path(told).read_text())
        assert by_path["tasks_from"] == [str(file)]
    with pytest.raises(ConfigError, match="split: expected test or val"):
        rayml.evaluate(model, split="train")


def test_an_evaluation_that_was_cut_off_goes_on_with_the_others_and_comes_to_the_same(model, monkeypatch):
    whole, keep, done = rayml.evaluate(model, episodes=8), Parts.keep, []

    def cut(parts, part):
        keep(parts, part)
        done.extend(part.trained)
        if len(done) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "keep", cut)
    with pytest.raises(KeyboardInterrupt, match="4 of 8 episodes are kept"):
        rayml.evaluate(model, episodes=8)
    assert rayml.evaluate(model, episodes=8) == whole
    assert len(done) == 8


def test_the_numbers_go_to_a_new_folder_or_it_is_said_before_the_work_that_they_cannot(model, tmp_path, monkeypatch):
    found = rayml.evaluate(model, episodes=2, json_file=str(tmp_path / "new" / "folder" / "e.json"))
    assert json.loads((tmp_path / "new" / "folder" / "e.json").read_text()) == found
    monkeypatch.setattr("rayml.experiments.evaluate.evaluate", None)
    (tmp_path / "file").touch()
    for place, message in ((tmp_path / "file" / "e.json", "cannot be written"), (tmp_path, "is a folder")):
        with pytest.raises(RunError, match=message):
            rayml.evaluate(model, episodes=2, json_file=place)


def test_what_an_evaluation_has_done_is_kept_until_its_numbers_are_written(model, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("rayml.experiments.evaluate_command.write_atomically", fail)
        with pytest.raises(OSError, match="no space left"):
            rayml.evaluate(model, episodes=4)
    monkeypatch.setattr(Parts, "keep", fail)  # none has to be done again
    assert rayml.evaluate(model, episodes=4)["episodes"] == 4
    assert not (model.run.path / "evaluation.part.jsonl").exists()


def test_a_line_that_a_crash_left_unfinished_does_not_spoil_the_next(tmp_path):
    """The parts of an evaluation, of which each start of the command reads those before."""
    parts = [Evaluation([Curve("t", n, True, [0.5])], [Curve("t", n, True, [0.25])], []) for n in range(3)]
    for number, part in enumerate(parts):
        kept = Parts(tmp_path, "same")
        assert [kept.next() for _ in range(number + 1)] == [*parts[:number], None]
        kept.keep(part)
        with kept.path.open("a") as file:
            file.write('[[{"task": "t", "ind')
    assert [Parts(tmp_path, "same").next()] == parts[:1]


PREMISES = [{"premise": f"it rains {n}", "hypothesis": f"it is {'wet' if n % 2 else 'dry'}"} for n in range(4)]


def test_options_may_be_numbers_as_labels_may_and_are_a_list(model):
    import numpy

    digits = model.adapt([("a b", 1), ("c d", 2), ("e f", True)])
    assert digits.labels == ("1", "2", "true")
    for options in ([1, 2], numpy.array([1, 2]), iter([1.0, "2"])):
        assert set(digits.predict("a", options=options).probabilities) == {"1", "2"}
    assert set(digits.predict("a", options=[2, True]).probabilities) == {"2", "true"}
    for options in ("1", [None, 1], [[1]]):
        with pytest.raises(ConfigError, match=r"options: expected a list of texts, got"):
            digits.predict("a", options=options)


def test_fields_are_taken_by_their_names_in_the_order_of_the_first(model):
    labels = ["no", "yes", "no", "yes"]
    rows = [{"input": given, "target": label} for given, label in zip(PREMISES, labels, strict=True)]
    mixed = [*rows[:1], *[row | {"input": dict(reversed(row["input"].items()))} for row in rows[1:]]]
    learned = model.adapt(rows)
    assert_equal_weights(learned, model.adapt(mixed))
    asked = PREMISES[0]
    assert learned.predict(dict(reversed(asked.items()))) == learned.predict(asked)
    for given in ("it rains", {"premise": "it rains"}, asked | {"note": "x"}):
        with pytest.raises(DataError, match="expected the fields premise, hypothesis, got"):
            learned.predict(given)
    with pytest.raises(DataError, match="expected a text, got the fields premise, hypothesis"):
        model.adapt(TICKETS).predict(asked)
    with pytest.raises(DataError, match=r"inputs of several fields: premise, hypothesis at .*, and premise, claim at"):
        model.adapt([*rows, {"input": {"premise": "a", "claim": "b"}, "target": "no"}])


def test_a_question_may_be_asked_as_a_text_and_a_conversation_has_a_label(model):
    rows = [{"input": {"question": f"who {n}?"}, "target": f"she {n}", "kind": "label"} for n in range(2)]
    asked = model.adapt(rows)
    assert asked.predict("who 0?") == asked.predict({"question": "who 0?"})
    talks = [[{"role": "user", "content": "where?"}, {"role": "assistant", "content": text}] for text in ("x", "y")]
    about = model.adapt([{"messages": talk, "label": f"l{n}"} for n, talk in enumerate(talks)])
    assert about.labels == ("l0", "l1")
    assert about.predict(talks[0]) == about.predict("user: where?\nassistant: x")


def test_a_table_is_asked_row_by_row_and_a_pair_is_no_dialogue(model):
    import pandas

    labels = ["no", "yes", "no", "yes"]
    learned = model.adapt([{"input": given, "target": label} for given, label in zip(PREMISES, labels, strict=True)])
    assert learned.predict(pandas.DataFrame(PREMISES)) == learned.predict(PREMISES)
    tickets = model.adapt(TICKETS)
    with pytest.raises(DataError, match="expected a text, got the fields input, target"):
        tickets.predict(pandas.DataFrame(examples()))
    with pytest.raises(DataError, match=r"expected a text, .* got .*charged twice"):
        tickets.predict([("charged twice", "billing")])


@pytest.mark.parametrize("given", [5, None, [5], "x\udcff", {"a": 1}, b"x", [("user", None)]])
def test_what_is_no_input_is_refused_by_name(model, given):
    with pytest.raises(DataError, match="an input cannot be used"):
        model.adapt(TICKETS).predict(given)
    with pytest.raises(ConfigError, match=r"steps: expected a whole number, 0 or more, got 1.5"):
        model.adapt(TICKETS, steps=1.5)
