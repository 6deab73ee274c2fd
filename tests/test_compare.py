"""Comparing methods: intervals, metrics, budgets, and a real comparison whose tables are derived anew."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_config, tiny_lm, toy_tasks, write_tasks
from rich.console import Console
from test_train_algorithms import config_for
from typer.testing import CliRunner

import rayml
from rayml.algorithms.inner_loop import InnerLoop
from rayml.cli import app
from rayml.config import with_values
from rayml.errors import ConfigError, DataError, RunError
from rayml.experiments.answers import LearnedMethod, Setting, adapted_weights, choose_setting, label_answers
from rayml.experiments.compare import code_version, compare, result_fingerprint
from rayml.experiments.method_runs import METHODS, MethodRun, Request, plan, tokens_per_step
from rayml.lm.scorer import make_side
from rayml.lm.sides import trained_tokens, training_sides
from rayml.model import untrained_model
from rayml.runs.checkpoint import seal, write_state
from rayml.runs.folder import RunFolder
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.task import Example, Task

QUIET = Console(quiet=True)
REQUEST = Request(
    methods=["lora", "multitask", "fomaml"],
    variants={},
    runs=[],
    seeds=1,
    episodes=3,
    val_episodes=2,
    factors=[0.3, 1.0],
    steps=[1, 2],
)


class Known:
    """A scorer whose accuracy after k steps at a rate is known."""

    takes_steps = True

    def __init__(self, accuracy):
        self.accuracy = accuracy

    def prepare(self, episodes):
        return episodes

    def outputs(self, episodes, start, inner_lrs, at):
        for steps in sorted(at):
            share = self.accuracy[round(float(inner_lrs["w"]), 1), steps]
            yield [log_probs(episode, share) for episode in episodes]


def log_probs(episode, share):
    """The right option for this share of the queries; NaN where that is not finite."""
    options = list(episode.labels)
    found = torch.zeros(len(episode.query), len(options))
    for index, query in enumerate(episode.query):
        right = options.index(query.target)
        found[index, right if index < share * len(episode.query) else (right + 1) % len(options)] = 5.0
    return found.log_softmax(-1)


@pytest.mark.parametrize(
    ("accuracy", "best"),
    [
        ({(0.1, 1): 0.25, (0.1, 3): 0.5, (1.0, 1): 0.75, (1.0, 3): 0.5}, Setting(1.0, 1)),
        ({(0.1, 1): 0.5, (0.1, 3): 0.75, (1.0, 1): 0.75, (1.0, 3): 0.75}, Setting(1.0, 1)),  # the fewest steps
        ({(0.1, 1): 0.5, (0.1, 3): 0.5, (1.0, 1): 0.5, (1.0, 3): 0.5}, Setting(0.1, 1)),  # then the least rate
    ],
)
def test_the_best_setting_on_meta_val_is_taken(accuracy, best):
    method = LearnedMethod(Known(accuracy), {"w": torch.zeros(1)}, {"w": torch.tensor(1.0)})
    sampler = make_sampler()
    told = []
    choice = choose_setting(method, toy_tasks(2), sampler, 4, [1.0, 0.1], [3, 1], lambda: told.append(1))
    assert len(told) == 2 * 4
    assert choice.setting == best
    assert {(s.factor, s.steps): score for s, score in choice.tried} == pytest.approx(accuracy)


TEXTS = tuple(
    Task(f"text-{t}", tuple(Example(f"say {word} {t}", f"{word} {word}") for word in "abcdefgh")) for t in range(9)
)


class KnownBoth(Known):
    """What is best for label tasks is worst for text."""

    def outputs(self, episodes, start, inner_lrs, at):
        ended = ([torch.tensor(loss)] for loss in (3.0, 0.5))
        yield from super().outputs(episodes, start, inner_lrs, at) if episodes[0].labels else ended


@pytest.mark.parametrize(("label_tasks", "best"), [(1, 3), (40, 1)])
def test_one_label_task_among_many_of_text_does_not_decide_alone_which_setting_is_best(label_tasks, best):
    method = LearnedMethod(KnownBoth({(1.0, 1): 0.75, (1.0, 3): 0.5}), {"w": torch.zeros(1)}, {"w": torch.tensor(1.0)})
    tasks, told = [*toy_tasks(label_tasks, classes=2), *TEXTS], []
    choice = choose_setting(method, tasks, make_sampler(), 20, [1.0], [1, 3], lambda: told.append(1))
    assert len(told) == 20
    assert choice.setting.steps == best
    shares = label_tasks / len(tasks), 9 / len(tasks)
    expected = [shares[0] * right + shares[1] * math.exp(-loss) for right, loss in ((0.75, 3.0), (0.5, 0.5))]
    assert [score for _, score in choice.tried] == pytest.approx(expected)


def make_sampler(labels="words"):
    from rayml.tasks.episodes import Sampler

    return Sampler(ways=2, shots=2, queries=4, labels=labels, seed=0)


def test_answers_are_in_the_tasks_own_words():
    episode = make_sampler("letters").episode(toy_tasks(1), 0)
    found = label_answers(episode, log_probs(episode, 0.5))
    words = set(episode.labels.values())
    assert {answer["answer"] for answer in found} <= words
    assert [answer["target"] for answer in found] == [episode.labels[query.target] for query in episode.query]
    assert [answer["answer"] == answer["target"] for answer in found] == [True] * 4 + [False] * 4
    assert found[0]["confidence"] == pytest.approx(math.exp(5) / (math.exp(5) + 1), abs=1e-4)


def test_a_text_is_written_with_what_its_episode_taught(tmp_path):
    """The weights are those of plain SGD on the support."""
    tasks = [
        Task("copy", tuple(Example(f"say {word}", f"{word} {word}") for word in ("ab", "cd", "ef", "gh", "ij", "kl")))
    ]
    config = make_config(tmp_path, data={"max_tokens": 24})
    model = untrained_model(config, toy_tasks())
    method = LearnedMethod(model.scorer(), model.start, model.inner_lrs)
    episode = replace(make_sampler().episode(tasks, 0), query=())
    losses = make_side(model.lm, model.encoder, [episode], "support").losses
    fast = {name: weight[None].clone().requires_grad_() for name, weight in model.start.items()}
    for _ in range(2):
        gradients = torch.autograd.grad(losses(fast).sum(), list(fast.values()))
        steps = zip(fast.items(), gradients, strict=True)
        fast = {n: (w - 0.5 * model.inner_lrs[n] * g).detach().requires_grad_() for (n, w), g in steps}
    found = adapted_weights(method, episode, Setting(0.5, 2))
    for name, weight in fast.items():
        torch.testing.assert_close(found[name], weight[0].detach(), msg=name)


def test_tokens_of_a_step_are_counted_from_the_rows(tmp_path):
    """Toy rows: three classes, two shots, two queries: eight characters and the prompt's seven, which tell it."""
    row = 8 + len("\nLabel:")
    expected = {"fomaml": 2 * 6 + 6, "reptile": 6 + 6, "multitask": 6 + 6, "protonet": 6 + 6, "proto_maml": 3 * 6 + 6}
    for name, rows in expected.items():
        assert tokens_per_step(config_for(tmp_path, name), toy_tasks()) == 4 * rows * row
    shown = 6 * (row + 1 + 2) + row  # the letter and two newlines behind each example that is shown
    assert tokens_per_step(config_for(tmp_path, "metaicl"), toy_tasks()) == 4 * 6 * shown


@pytest.mark.parametrize("name", ["fomaml", "reptile", "multitask", "metaicl", "protonet", "proto_maml"])
def test_the_budget_is_what_really_runs_forward_and_backward(tiny, tokenizer, tmp_path, name):
    """Toy rows are equally long, so that there is no padding in what the model is given."""
    config = config_for(tmp_path, name)
    encoder, lm = config.encoder(tokenizer), tiny_lm(tiny)
    sampler = config.data.sampler(0)
    episodes = [encoder.episode(sampler.episode(toy_tasks(), index)) for index in range(4)]
    ran = []

    def count(_embedding, inputs):
        if torch.is_grad_enabled():
            ran.append(inputs[0].numel())

    lm.module.get_input_embeddings().register_forward_pre_hook(count)
    sides = training_sides(lm, episodes, tokenizer.eos_token_id, config)
    start = lm.adapter.untrained_start(0)
    inner_lrs = {key: torch.tensor(0.1) for key in start}
    config.algorithm.meta_gradient(*sides, start, InnerLoop(inner_lrs, config.inner.steps), torch.ones(4))
    assert sum(ran) == trained_tokens(config, *(side.batch for side in sides))


def values_of(tmp_path, **data):
    base = config_for(tmp_path, "fomaml", outer={"steps": 4})
    return with_values(base.model_dump(mode="json"), {f"data.{key}": value for key, value in data.items()})


def test_methods_are_planned_with_equal_tokens(tmp_path):
    values = values_of(tmp_path)
    base = config_for(tmp_path, "fomaml", outer={"steps": 40})
    values = with_values(values, {"outer.steps": 40})
    request = replace(
        REQUEST,
        methods=[n for n, m in METHODS.items() if m.start != "encoder"],
        variants={"words": ("data.labels=words",)},
        seeds=2,
    )
    method_runs = plan(values, "here", base, prepare_splits(base.data), request, tmp_path)
    trained = [method_run for method_run in method_runs if method_run.tokens_per_step]
    budget = next(method_run.tokens for method_run in trained if method_run.name == "fomaml")
    assert {method_run.name for method_run in trained} == {
        name for name, method in METHODS.items() if method.start == "trained"
    } | {"words"}
    for method_run in trained:
        assert abs(method_run.tokens - budget) <= method_run.tokens_per_step / 2, method_run.name  # to the nearest step
    assert [method_run.seed for method_run in method_runs if method_run.name == "zero_shot"] == [0]
    assert [method_run.seed for method_run in method_runs if method_run.name == "lora"] == [0, 1]
    assert next(method_run for method_run in method_runs if method_run.name == "words").config.data.labels == "words"
    # The budget is FOMAML's, whatever algorithm the config names.
    other = with_values(values, {"algorithm.name": "multitask"})
    again = plan(other, "here", base, prepare_splits(base.data), replace(request, variants={}), tmp_path)
    steps = {method_run.name: method_run.config.outer.steps for method_run in method_runs}
    assert {method_run.name: method_run.config.outer.steps for method_run in again}.items() <= steps.items()


def test_a_variant_with_data_of_its_own_is_planned_and_asked_anew_by_that_data(tmp_path):
    base = config_for(tmp_path, "fomaml", outer={"steps": 40})
    splits, values = prepare_splits(base.data), values_of(tmp_path)
    path = tmp_path / "own.jsonl"
    request = replace(REQUEST, methods=["fomaml"], variants={"own": (f"data.path={path}", "data.splits.test_tasks=[]")})

    def planned(words: int):
        texts = [
            replace(task, examples=tuple(replace(e, input=f"{e.input}{' more' * words}") for e in task.examples))
            for task in toy_tasks(seed=7)
        ]
        write_tasks(path, texts)
        _, own = plan(with_values(values, {"outer.steps": 40}), "here", base, splits, request, tmp_path / "all")
        return own, result_fingerprint(own, base, splits, request)

    (short, asked), (long, asked_again) = planned(1), planned(5)
    row, more = 8 + len("\nLabel:"), len(" more")
    assert short.tokens_per_step == 4 * 18 * (row + more)
    assert long.tokens_per_step == 4 * 18 * (row + 5 * more)
    assert long.config.outer.steps < short.config.outer.steps < 40
    assert asked != asked_again


def test_a_diverged_answer_has_no_confidence():
    episode = make_sampler().episode(toy_tasks(1), 0)
    found = label_answers(episode, torch.full((len(episode.query), 2), math.nan))
    assert {answer["confidence"] for answer in found} == {0.0}


def test_what_cannot_be_compared_is_refused_before_the_start(tmp_path):
    values = values_of(tmp_path)
    with pytest.raises(ConfigError, match="nonsense unknown; there are zero_shot"):
        compare(values, "here", replace(REQUEST, methods=["nonsense"]), tmp_path / "all", "", False, QUIET)
    bad = replace(REQUEST, variants={"bad": ("inner.lr=-1",)})
    with pytest.raises(ConfigError, match="for bad"):
        compare(values, "here", bad, tmp_path / "all", "", False, QUIET)
    for variants, message in (
        ({"fomaml": ("inner.lr=1",)}, "named fomaml"),
        ({"long": ("outer.steps=9",)}, "variant long: outer.steps=9"),
        ({"far": ("data.max_tokens=100000",)}, "data.max_tokens"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare(values, "here", replace(REQUEST, variants=variants), tmp_path / "all", "", False, QUIET)
    seen = replace(REQUEST, variants={"seen": ("data.splits.test_tasks=toy-3",)})
    with pytest.raises(DataError, match=r"text\(s\) are trained on"):
        compare(values, "here", seen, tmp_path / "all", "", False, QUIET)
    without = with_values(values, {"data.splits.val_tasks": []})
    with pytest.raises(DataError, match="meta-val"):
        compare(without, "here", REQUEST, tmp_path / "all", "", False, QUIET)
    assert not (tmp_path / "all").exists()


def test_an_answer_depends_on_the_engine_the_run_that_is_continued_and_the_code(tmp_path, monkeypatch):
    """So a comparison that goes on asks anew where one of them changed."""
    old = RunFolder(tmp_path / "old")
    config = make_config(tmp_path)
    splits = prepare_splits(config.data)
    old.begin(config, splits, resume=False)

    def trained(step):
        folder = old.checkpoints / f"step_{step:08d}"
        folder.mkdir()
        write_state(folder, {"start/w": torch.tensor(float(step))})
        seal(folder, step, part=0, parts=1)

    def asked(**changes):
        method_run = MethodRun("fomaml", 0, METHODS["fomaml"], make_config(tmp_path, **changes))
        return result_fingerprint(method_run, config, splits, REQUEST)

    def begun():
        return asked(run={"continues": str(old.path)})

    trained(1)
    found = [asked(), asked(engine="zero"), begun()]
    trained(2)
    found.append(begun())
    assert asked() == found[0] == asked(workers=2)
    monkeypatch.setattr("rayml.__version__", "9")
    code_version.cache_clear()
    found.append(asked())
    assert len(set(found)) == 5
    code_version.cache_clear()


@pytest.mark.ray
def test_a_comparison_goes_on_where_it_stopped_and_its_tables_follow_from_its_answers(tmp_path, capsys, local_mode):
    rows = [
        json.dumps({"task": name, "input": f"say {word}", "target": f"{word} {word}"})
        for name, words in (("echo-1", "abcdefgh"), ("echo-2", "ijklmnop"))
        for word in words
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(rows) + "\n")
    values = values_of(tmp_path)
    values["data"]["path"] = [*values["data"]["path"], str(tmp_path / "text.jsonl")]
    values["data"]["splits"]["test_tasks"] = ["toy-5", "toy-3", "echo-2"]
    folder = tmp_path / "all"
    request = replace(REQUEST, methods=["zero_shot", "lora", "multitask", "fomaml"])
    out = Console(width=200)

    (tmp_path / "compare.yaml").write_text(json.dumps(values))
    command = [
        "compare",
        str(tmp_path / "compare.yaml"),
        "--methods=fomaml",
        "--seeds=1",
        "--rates=0.5,1",
        "--steps=1,2",
    ]
    planned = CliRunner().invoke(app, [*command, "--val-episodes=2", f"--out={folder}", "--dry-run"]).output
    assert re.search(r"fomaml +1 +4 +\d+ +\d+", planned)
    assert "4 settings tried on 2 meta-val episodes" in planned
    assert not folder.exists()

    summary = compare(values, "here", request, folder, "rayml compare CONFIG", False, out)
    label, text = summary["kinds"]["label"], summary["kinds"]["text"]
    assert set(label["tasks"]) == {"toy-5", "toy-3"}
    assert text["tasks"] == ["echo-2"]
    tokens = {row["method"]: row["tokens"] for row in label["methods"]}
    assert tokens["lora"] == tokens["zero_shot"] == 0
    assert tokens["multitask"] == pytest.approx(tokens["fomaml"], rel=0.15)
    results = {path.stem: json.loads(path.read_text()) for path in (folder / "results").iterdir()}
    assert set(results) == {"zero_shot-0", "lora-0", "multitask-0", "fomaml-0"}
    report = (folder / "report.md").read_text()
    assert "rayml compare CONFIG" in report
    for name, found in results.items():
        answers = [e for e in found["episodes"] if e["task"] != "echo-2"]
        right = [np.mean([q["answer"] == q["target"] for q in e["queries"]]) for e in answers]
        row = next(row for row in label["methods"] if row["method"] == found["method"])
        assert row["main"]["mean"] == pytest.approx(np.mean(right)), name
        assert f"| {found['method']} | {np.mean(right):.2f} [" in report
        if found["tried"]:
            steps = found["setting"]["steps"]
            assert [e["curve"][steps] for e in answers] == pytest.approx(right)
            assert len(found["tried"]) == 4
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert 'src="label-scores.png"' not in page

    trained = RunFolder(folder / "fomaml-0").metrics.stat().st_mtime_ns
    (folder / "results" / "lora-0.json").unlink()
    kept = (folder / "results" / "fomaml-0.json").stat().st_mtime_ns
    again = compare(values, "here", replace(request, runs=[]), folder, "rayml compare CONFIG", False, out)
    times = "seconds", "task_seconds"
    for kind in ("label", "text"):
        for old, new in zip(summary["kinds"][kind]["methods"], again["kinds"][kind]["methods"], strict=True):
            assert {k: v for k, v in old.items() if k not in times} == {k: v for k, v in new.items() if k not in times}
    assert RunFolder(folder / "fomaml-0").metrics.stat().st_mtime_ns == trained
    assert (folder / "results" / "fomaml-0.json").stat().st_mtime_ns == kept

    # By other code, answers are given anew; and what other code trained is not gone on with.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayml.experiments.compare.code_version", lambda: "other")
        compare(values, "here", replace(request, methods=["lora"]), folder, "", False, out)
        assert json.loads((folder / "results" / "lora-0.json").read_text())["asked"] != results["lora-0"]["asked"]
        with pytest.raises(RunError, match="fomaml-0: was trained with other code; remove it"):
            compare(values, "here", replace(request, methods=["fomaml"]), folder, "", False, out)

    # A run folder takes part as it is; more episodes are asked anew.
    asked = {"val_episodes": request.val_episodes, "rates": request.factors, "steps": request.steps}
    runs = [folder / "multitask-0"]
    other = rayml.compare(values, methods=["zero_shot"], runs=runs, episodes=2, out=tmp_path / "other", **asked)
    names = [row["method"] for row in other["kinds"]["label"]["methods"]]
    assert names == ["zero_shot", "multitask-0"]
    assert other["baseline"] == "zero_shot"
