"""What is measured on a GPU runs here, tiny and on the CPU, every step in a process of its own; and its report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

JOBS = Path(__file__).parents[1] / "jobs"
ONLY_CUDA = {"attention: efficient", "attention: cudnn"}
"""Kernels of attention that no CPU has."""


@pytest.fixture
def reports(monkeypatch):
    monkeypatch.syspath_prepend(str(JOBS))
    import gpu_report

    return gpu_report


def run(out, *more):
    command = [sys.executable, str(JOBS / "gpu_evidence.py"), "--shape=tiny", "--device=cpu", f"--out={out}", *more]
    # As on a machine where rayml is not installed, and no name is known but the steps' own.
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=out.parent, check=True).stdout


def lines_of(out):
    return [json.loads(line) for line in (out / "evidence.jsonl").read_text().splitlines()]


@pytest.mark.ray
def test_every_step_measures_something_and_the_report_holds_it_against_the_goals(tmp_path):
    out = tmp_path / "evidence"
    text = run(out, "--minutes=60")
    lines = lines_of(out)
    log = (out / "log.txt").read_text()
    assert {line["ended"] for line in lines if line["name"] == "end"} == {"done"}, log
    assert {line["name"] for line in lines if "failed" in line} <= ONLY_CUDA, log
    assert all(line["is_equal"] for line in lines if "is_equal" in line)
    found = {line["name"] for line in lines}
    assert found >= {"rates", "meta-gradient", "adaptation", "outer step", "run", "evaluation", "writing", "as it is"}
    assert {(line["stage"], line["offload"]) for line in lines if line["name"] == "full"} == {
        (1, "none"), (2, "none"), (3, "none"), (3, "all")
    }  # fmt: skip
    goals = text[text.index("## Goals") :]
    assert "times the best peer's: at least 5" in goals
    assert goals.count("not measured") <= 2, "memory of higher, which may not be here; and few tokens a forward"
    assert (out / "tasks.png").stat().st_size > 10_000


def test_a_step_that_runs_over_its_time_is_ended_and_what_fails_is_said(tmp_path):
    out = tmp_path / "evidence"
    text = run(out, "--minutes=0.002", "--steps=machine,numerics")
    assert [line["ended"] for line in lines_of(out) if line["name"] == "end"] == ["over time", "over time"]
    assert "machine: over time after" in text
    assert "not measured" in text


def test_a_report_of_what_a_killed_process_left(reports, tmp_path):
    case = {
        "step": "tasks", "name": "meta-gradient", "layers": "all", "model": "m", "dtype": "bfloat16", "tasks": 16,
        "rows": [16, 16], "inner_steps": 3, "tokens": 4 * 16384, "failed_ways": {"torch.func": "no memory"},
        "seconds": {"rayml": [0.5, 0.5], "PEFT loop": [4.0, 4.0], "higher": [5.0, 5.0]},
        "ratio": {"PEFT loop": [8, 8, 8], "higher": [10, 10, 10]}, "flops": {"rayml": 2e14},
        "peak_bytes": {"rayml": 2**30, "PEFT loop": 2**30, "higher": 4 * 2**30},
    }  # fmt: skip
    rates = {"step": "machine", "name": "rates", "dtype": "bfloat16", "device": "a card"}
    rates |= {"matmul_flops": 8e14, "copy_bytes": 4e12}
    over = {"step": "tasks", "name": "end", "ended": "over time", "seconds": 9.0, "limit": 9.0}
    text = "\n".join(map(json.dumps, (rates, case, over)))
    (tmp_path / "evidence.jsonl").write_text(text + '\n{"step": "writing", "na')
    report = reports.write_report(tmp_path)
    assert "| tasks a second, times the best peer's: at least 5 | 8 | yes |" in report
    assert "| memory, times that of `higher` at equal tasks: at most 0.5 | 0.25 | yes |" in report
    assert "at least 45 % | 50% | yes |" in report
    assert "On one a card: 32 tasks a second (m, 16 at once, where a PEFT loop does 4)." in report
    assert "- tasks: over time after 9 of 9 s" in report
    assert "torch.func: no memory" in report


def test_the_steps_are_imported_where_there_is_no_matplotlib():
    modules = ", ".join(f"gpu_steps.{file.stem}" for file in (JOBS / "gpu_steps").glob("[!_]*.py"))
    code = f"import sys; sys.modules['matplotlib'] = None; sys.path.append({str(JOBS)!r}); import {modules}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=JOBS.parent)
