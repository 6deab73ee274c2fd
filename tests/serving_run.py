"""For tests of serving: a run whose start and rates are drawn at random, written as training does; a replica of it."""

import asyncio
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import make_config, perturbed_start
from safetensors.torch import load_file, save_file

from rayml.lm.catalog import resolve_model
from rayml.lm.load import load_base
from rayml.lm.lora import TaskLoRA
from rayml.lm.model import TaskLM
from rayml.model import load
from rayml.runs.checkpoint import folder_name, seal, write_state
from rayml.runs.folder import RunFolder
from rayml.serving.replica import Replica
from rayml.serving.schema import AdapterRequest, ClassifyRequest
from rayml.serving.settings import Serving
from rayml.serving.store import Manifest, adapter_id
from rayml.tasks.prepare import prepare_splits

TICKETS = [
    ("charged twice", "billing"),
    ("no refund", "billing"),
    ("app crashes", "bug"),
    ("blank page", "bug"),
    ("where is it", "delivery"),
    ("lost parcel", "delivery"),
]
TEXTS = ["charged again", "the page is blank", "parcel lost", "no app", "x"]


def make_run(folder: Path, inner_lr: float = 0.5, **changes) -> RunFolder:
    """Write a run of one step. Its start's B is not zero, so that all of what adapters do is seen."""
    folder.mkdir(exist_ok=True)
    config = make_config(folder, **changes)
    run = RunFolder(config.run.dir)
    run.begin(config, prepare_splits(config.data), resume=False)
    module = load_base(resolve_model(config.model.name), "float32", config.model.attention)
    lm = TaskLM(module, TaskLoRA(module, **config.lora.shape()))
    start = perturbed_start(lm, seed=3)
    inner_lrs = {name: torch.tensor(math.log(inner_lr)) for name in start}
    if config.algorithm.prototypes:
        start |= {name: log + 0.3 for name, log in config.algorithm.prototypes.start().items()}
    run.write_untrained(start)
    checkpoint = run.checkpoints / folder_name(1)
    checkpoint.mkdir()
    state = {f"start/{n}": w for n, w in start.items()} | {f"log_rate/{n}": r for n, r in inner_lrs.items()}
    write_state(checkpoint, state)
    seal(checkpoint, step=1, part=0, parts=1)
    return run


def examples(pairs=TICKETS) -> list[dict[str, str]]:
    return [{"input": text, "target": label} for text, label in pairs]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def replica(run):
    return Replica(Serving(run=str(run.path)))


@pytest.fixture
def learned(run, tmp_path):
    """A folder that `rayml adapt` wrote."""
    file = tmp_path / "few.jsonl"
    file.write_text("\n".join(map(json.dumps, examples())))
    load(run).adapt(file).save(tmp_path / "tickets")
    return tmp_path / "tickets"


def request(pairs=TICKETS, **more) -> AdapterRequest:
    return AdapterRequest.model_validate({"examples": examples(pairs), **more})


def ask(replica, adapter, texts, **more):
    asked = ClassifyRequest.model_validate({"model": "tiny", "input": texts, **more})
    return asyncio.run(replica.classify("public", adapter, asked))["answers"]


def learn(replica, *requests):
    async def all_at_once():
        ids = [adapter_id(one.name, [one.model_dump_json()]) for one in requests]
        found = await asyncio.gather(*(replica.learn("public", i, one) for i, one in zip(ids, requests, strict=True)))
        return [manifest for manifest, _ in found]

    return asyncio.run(all_at_once())


def write(replica, adapter, prompts, sampling):
    async def collect():
        return [piece async for piece in replica.write("public", adapter, prompts, sampling)]

    return asyncio.run(collect())


def fits(replica):
    return replica.adapter_cache.fits


def change_weights(folder: Path, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def first(tensors, kind):
    return next(name for name in tensors if kind in name)


def change_card(folder: Path, **changes):
    path = folder / "rayml.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def manifest_of(name: str, number: int = 0, **more) -> Manifest:
    return Manifest(
        id=adapter_id(name, number), name=name, created_at=number, expires_at=more.get("expires_at"),
        examples=2, steps=3, loss_before=1.0, loss_after=0.5, seconds=0.1,
    )  # fmt: skip
