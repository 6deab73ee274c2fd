"""A run for tests of serving: the tiny model with a start and rates drawn at random, written as training does."""

import math
from pathlib import Path

import torch
from conftest import make_config, perturbed_start

from rayml.lm.load import load_base, resolve_model
from rayml.lm.lora import TaskLoRA
from rayml.lm.model import TaskLM
from rayml.runs.checkpoint import folder_name, seal, write_state
from rayml.runs.folder import RunFolder
from rayml.tasks.prepare import prepare_splits

TICKETS = [
    ("charged twice", "billing"),
    ("no refund", "billing"),
    ("app crashes", "bug"),
    ("blank page", "bug"),
    ("where is it", "delivery"),
    ("lost parcel", "delivery"),
]


def make_run(folder: Path, inner_lr: float = 0.5, **changes) -> RunFolder:
    """Write a run of one step. Its start's B is not zero, so that all of what adapters do is seen."""
    folder.mkdir(exist_ok=True)
    config = make_config(folder, **changes)
    run = RunFolder(config.run.dir)
    run.begin(config, prepare_splits(config.data), resume=False)
    module = load_base(resolve_model("tiny"), "float32")
    lm = TaskLM(module, TaskLoRA(module, **config.lora.shape()))
    start = perturbed_start(lm, seed=3)
    run.write_untrained(start)
    rates = {name: torch.tensor(math.log(inner_lr)) for name in start}
    checkpoint = run.checkpoints / folder_name(1)
    checkpoint.mkdir()
    state = {f"start/{n}": w for n, w in start.items()} | {f"log_rate/{n}": r for n, r in rates.items()}
    write_state(checkpoint, state)
    seal(checkpoint, step=1, part=0, parts=1)
    return run


def examples(pairs=TICKETS) -> list[dict[str, str]]:
    return [{"input": text, "target": label} for text, label in pairs]
