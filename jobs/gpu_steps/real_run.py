"""A run from end to end through Ray Train: the quickstart where its model and texts are here, else a toy."""

import json
import random
import time
from pathlib import Path
from typing import Any

from gpu_steps.bench import Bench

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
TEXTS = "questions.jsonl", "location-questions.jsonl"
TOY = {
    "data": {"ways": 2, "shots": 2, "queries": 2, "max_tokens": 48, "splits": {"val": 0.0, "test_tasks": ["toy-0"]}},
    "lora": {"last_layers": 2},
    "inner": {"lr": 0.1, "steps": 2},
    "outer": {"lr": 0.002, "steps": 6, "warmup_steps": 0},
    "validation": {"every": 0},
    "tasks_per_step": 2,
    "run": {"checkpoint_every": 3},
}


def run(bench: Bench) -> None:
    import rayml

    with bench.attempt("run"):
        config, changes = chosen(bench)
        began = time.perf_counter()
        model = rayml.train(config, changes)
        trained = time.perf_counter() - began
        folder = changes["run.dir"]
        steps = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        bench.record("run", model=model.config.model.name, train_seconds=trained, precision=str(model.precision),
                     device=str(model.device), steps=len(steps), last_steps=steps[-10:])  # fmt: skip
        began = time.perf_counter()
        found = rayml.evaluate(folder, episodes=8)
        bench.record("evaluation", seconds=time.perf_counter() - began, overall=found["overall"], tasks=found["tasks"])


def chosen(bench: Bench) -> tuple[Any, dict[str, Any]]:
    """Return the run's config, and what is changed of it: one worker, on this device."""
    changes = {"run.dir": str(bench.scratch / "run"), "workers": 1, "device": bench.device.type}
    if bench.model and bench.data:
        return QUICKSTART, changes | {"model.name": bench.model, "data.path": [str(bench.data / n) for n in TEXTS]}
    toy = bench.scratch / "toy.jsonl"
    write_toy(toy)
    return TOY, changes | {"model.name": bench.model or "tiny", "data.path": [str(toy)]}


def write_toy(file: Path, tasks: int = 4, examples: int = 40) -> None:
    """Write tasks in which a word of the input says the label."""
    draw = random.Random(0)
    words = ["red", "green", "blue", "long", "short", "round"]
    lines = []
    for task in range(tasks):
        one, other = draw.sample(words, 2)
        for index in range(examples):
            row = {
                "task": f"toy-{task}",
                "input": f"{task}-{index} {one if index % 2 else other}",
                "target": "ab"[index % 2],
            }
            lines.append(json.dumps(row) + "\n")
    file.write_text("".join(lines))
