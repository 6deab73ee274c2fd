"""Steps one after the other, each in a process of its own, within a time for all of them."""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_steps import Step
from gpu_steps.lines import write_line

JOBS = Path(__file__).parents[1]
OFFLINE = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "DS_BUILD_OPS": "0", "PYTHONUNBUFFERED": "1"}
SECONDS_TO_END = 5.0
"""That a step may take to end when it is told to."""


def run_all(steps: Sequence[Step], options: argparse.Namespace, file: Path, scratch: Path) -> None:
    """Run steps in turn, the next one getting ready beside each: to import all that it needs takes seconds."""
    end = time.monotonic() + 60 * options.minutes
    with (file.parent / "log.txt").open("w") as log:

        def begin(step: Step) -> subprocess.Popen[str]:
            return start(step, options, file, scratch, log.fileno())

        processes = [begin(steps[0])]
        try:
            for index, step in enumerate(steps):
                processes += [begin(later) for later in steps[index + 1 : index + 2]]
                wait_until_ready(processes[index], ready_file(scratch, step), end)
                left = end - time.monotonic()
                limit = max(1.0, left * step.seconds / sum(later.seconds for later in steps[index:]))
                began = time.monotonic()
                ended = let_run(processes[index], limit)
                seconds = time.monotonic() - began
                write_line(file, {"step": step.name, "name": "end", "ended": ended, "seconds": seconds, "limit": limit})
                print(f"{step.name}: {ended}, {seconds:.0f} s of {limit:.0f} s", flush=True)
        finally:
            for process in processes:
                stop(process)


def start(step: Step, options: argparse.Namespace, file: Path, scratch: Path, log: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "gpu_steps", step.name, f"--shape={options.shape}", f"--device={options.device}"]
    command += [f"--file={file}", f"--scratch={scratch}", f"--ready={ready_file(scratch, step)}"]
    command += [f"--model={options.model}"] if options.model else []
    command += [f"--data={options.data}"] if options.data else []
    paths = [str(JOBS), str(JOBS.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | OFFLINE | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    env |= {"RAYML_CACHE": str(scratch / "cache")}
    env |= {"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {}
    return subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, start_new_session=True
    )


def ready_file(scratch: Path, step: Step) -> Path:
    """Return what a step writes when it has imported all it needs: on a fresh machine that may take half a minute."""
    return scratch / f"{step.name}.ready"


def wait_until_ready(process: "subprocess.Popen[str]", file: Path, end: float) -> None:
    while process.poll() is None and not file.exists() and time.monotonic() < end:
        time.sleep(0.05)


def let_run(process: "subprocess.Popen[str]", seconds: float) -> str:
    """Tell a step that it is its turn; return how it ended, at the latest after so many seconds."""
    try:
        process.communicate("go\n", timeout=seconds)
    except subprocess.TimeoutExpired:
        stop(process)
        return "over time"
    return "done" if process.returncode == 0 else f"failed with {process.returncode}"


def stop(process: "subprocess.Popen[str]") -> None:
    """End a process and its children, if it has not ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        try:
            os.killpg(process.pid, number)
            process.wait(SECONDS_TO_END)
        except (subprocess.TimeoutExpired, ProcessLookupError):
            continue
