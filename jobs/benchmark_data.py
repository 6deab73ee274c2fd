"""Many rows and many tasks: seconds to the first step, memory of each kind of process, and what a step waits for data.

    python jobs/benchmark_data.py --rows 10000,100000,1000000 --tasks 10000 --out data.json

Rows are written at random, a hundred to a task unless `--tasks` says otherwise, and `rayml train` runs on them with a
tiny model, so that next to nothing but the data takes time. Memory is what a process has for itself alone.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from benchmark_machine import machine_name
from torch import device

CLASSES, WORDS = 5, 12
KINDS = {
    "ray::RayTrainWorker": "training worker",
    "ray::TrainController": "controller",
    "ray::Map": "data worker",
    "ray::ReadRange": "data worker",
    "python": "driver",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="10000,100000,1000000")
    parser.add_argument("--tasks", type=int, help="at most; else one for a hundred rows")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    results = []
    for rows in map(int, asked.rows.split(",")):
        tasks = min(asked.tasks or rows, rows // 100)
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "rows.jsonl", rows, tasks)
            results.append({"rows": rows, "tasks": tasks} | trained(Path(folder), asked.steps, asked.workers))
        print(json.dumps(results[-1]), flush=True)
    if asked.out:
        found = {"machine": machine_name(device("cpu")), "command": sys.argv, "results": results}
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


def write(path: Path, rows: int, tasks: int) -> None:
    rng = random.Random(0)
    words = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "lmnrst"]
    with path.open("w") as file:
        for number in range(rows):
            text = f"{' '.join(rng.choices(words, k=WORDS))} {number}"
            row = {"task": f"task-{number % tasks}", "input": text, "target": f"label {number // tasks % CLASSES}"}
            file.write(json.dumps(row) + "\n")


def trained(folder: Path, steps: int, workers: int) -> dict[str, Any]:
    """Run `rayml train`, and look at its processes twice a second."""
    config = {
        "model": {"name": "tiny"},
        "data": {"path": str(folder / "rows.jsonl"), "ways": 4, "shots": 2, "queries": 2},
        "lora": {"targets": ["q_proj"]},
        "outer": {"steps": steps},
        "validation": {"every": 0},
        "workers": workers,
        "run": {"dir": str(folder / "run")},
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    began, most = time.monotonic(), Counter[str]()
    metrics, first = folder / "run" / "metrics.jsonl", None
    process = subprocess.Popen(
        [sys.executable, "-m", "rayml", "train", str(folder / "config.yaml")], stdout=subprocess.DEVNULL
    )
    while process.poll() is None:
        for one in family(process.pid):
            if kind := kind_of(one):
                most[kind] = max(most[kind], own_bytes(one))
        if first is None and metrics.exists() and metrics.read_text():
            first = time.monotonic() - began
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"rayml train ended with {process.returncode}")
    told = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {
        "seconds_to_first_step": round(first or time.monotonic() - began, 1),
        "seconds_in_all": round(time.monotonic() - began, 1),
        "gib": {kind: round(size / 2**30, 2) for kind, size in sorted(most.items())},
        "data_seconds_a_step": round(median(step["data_seconds"] for step in told[1:]), 4),
        "step_seconds": round(median(step["step_seconds"] for step in told[1:]), 4),
    }


def family(process: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(process)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kind_of(process: psutil.Process) -> str | None:
    try:
        name, *more = process.cmdline()
    except (psutil.Error, ValueError):  # it has ended
        return None
    is_driver = "rayml" in more[:3]
    return next((kind for start, kind in KINDS.items() if start in name and (kind != "driver" or is_driver)), None)


def own_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().uss
    except psutil.Error:
        return 0


if __name__ == "__main__":
    main()
