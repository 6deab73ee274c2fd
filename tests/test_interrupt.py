"""Ctrl-C and SIGTERM end a command within ten seconds, with one line that says what is kept and how to go on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import make_config
from serving_run import make_run

from rayml.config import Config, dump_config
from rayml.runs.checkpoint import newest_checkpoint, step_of
from rayml.runs.folder import RunFolder

SECONDS_TO_END = 30
"""Ten on a quiet machine; what is waited for in vain takes minutes."""
LONGEST_START = 300


class Command:
    """A rayml command in a process group of its own, as a terminal starts it."""

    def __init__(self, folder: Path, *arguments: str):
        # Where the tests run in the background Ctrl-C is ignored, which a child takes over.
        heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        code = f"{heeding}; import rayml.cli; rayml.cli.main()"
        self.errors = folder / "errors.txt"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, *arguments], stdout=errors, stderr=errors, start_new_session=True
            )

    def wait_for(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LONGEST_START
        while not happened():
            assert self.process.poll() is None, self.errors.read_text()
            assert time.monotonic() < deadline, self.errors.read_text()
            time.sleep(0.05)

    def said(self, text: str) -> bool:
        return text in self.errors.read_text()

    def end(self, number: int) -> str:
        """Send a signal to all of the group, as a terminal does; return what was printed."""
        began = time.monotonic()
        os.killpg(self.process.pid, number)
        self.process.wait(timeout=180)
        took, printed = time.monotonic() - began, self.errors.read_text()
        assert self.process.returncode == 128 + number, printed
        assert took < SECONDS_TO_END, printed
        assert "Traceback" not in printed, printed
        assert " @ " not in printed, printed  # a C++ stack frame
        return printed.strip().split("\n")[-1]


@contextmanager
def command(folder: Path, *arguments: str) -> Iterator[Command]:
    started = Command(folder, *arguments)
    try:
        yield started
    finally:
        started.process.kill()


def write(folder: Path, config: Config) -> str:
    (folder / "config.yaml").write_text(dump_config(config))
    return str(folder / "config.yaml")


@pytest.mark.ray
def test_ctrl_c_leaves_a_checkpoint_of_the_step_it_came_in(tmp_path):
    config = make_config(tmp_path, outer={"steps": 100_000}, run={"checkpoint_every": 100_000})
    run = RunFolder(config.run.dir)
    with command(tmp_path, "train", write(tmp_path, config)) as training:
        training.wait_for(lambda: len(run.records()) >= 3)
        last = training.end(signal.SIGINT)
    kept = step_of(newest_checkpoint(run.checkpoints))
    assert kept == len(run.records())
    assert last == f"stopped: {kept} outer steps are kept in {run.path}; the same command with --resume goes on"


@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_long_first_step_is_not_waited_for(tmp_path, number):
    config = make_config(tmp_path, tasks_per_step=2_000, outer={"steps": 1})
    run = RunFolder(config.run.dir)
    with command(tmp_path, "train", write(tmp_path, config)) as training:
        training.wait_for(lambda: training.said("first outer step"))
        time.sleep(1)
        last = training.end(number)
    assert not run.records()
    assert last == "stopped: no outer step is kept; the same command with --resume goes on"


def test_an_evaluation_keeps_what_it_has_done(tmp_path):
    run = make_run(tmp_path / "made")
    asked = "evaluate", str(run.path), "--json", str(tmp_path / "cut.json")
    part = run.path / "evaluation.part.jsonl"
    with command(tmp_path, *asked, "--episodes", "4000") as evaluation:
        evaluation.wait_for(lambda: part.exists() and part.read_text().count("\n") > 5)
        last = evaluation.end(signal.SIGINT)
    done = 4 * (part.read_text().count("\n") - 1)
    assert last == f"stopped: {done} of 4000 episodes are kept; the same command goes on with the others"
