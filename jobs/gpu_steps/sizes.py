"""How large everything is that is measured, and the models for it: random weights, as there is no network."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark import SHAPES
from transformers import AutoModelForCausalLM, LlamaConfig

from rayml.config import Config, parse_config
from rayml.lm.catalog import resolve_model
from rayml.lm.load import DTYPES


@dataclass(frozen=True)
class Size:
    small: str
    """For numerics; a key of `benchmark.SHAPES`, as the next two."""
    model: str
    large: str
    dtype: str
    tokens: int
    """Of a row."""
    ways: int
    shots: int
    tasks: tuple[int, ...]
    """Side by side; with the first of them all peers are measured."""
    large_tasks: int
    examples: tuple[tuple[int, int], ...]
    """A task's examples, and how many such tasks come at once."""
    rows: tuple[int, ...]
    """Texts that are written side by side."""
    repeats: int


SIZES = {
    "llama": Size(
        small="llama-30m", model="llama-1b", large="llama-8b", dtype="bfloat16", tokens=64, ways=4, shots=4,
        tasks=(4, 16, 1, 32), large_tasks=8, examples=((16, 1), (16, 8), (4, 1), (64, 1), (64, 8)), rows=(8, 32, 1),
        repeats=5,
    ),
    "tiny": Size(
        small="llama-tiny", model="llama-tiny", large="llama-tiny", dtype="float32", tokens=12, ways=2, shots=2,
        tasks=(2, 1), large_tasks=2, examples=((4, 1), (4, 2)), rows=(2,), repeats=2,
    ),
}  # fmt: skip


def config_of(size: Size, name: str, tasks: int, last_layers: int | None = None, **model: Any) -> Config:
    """Return a config with adapters on some or all layers; its rows of data are made up."""
    return parse_config(
        {
            "model": {"name": name, "dtype": size.dtype, "attention": "sdpa"} | model,
            "data": {
                "path": "-", "ways": size.ways, "shots": size.shots, "queries": size.shots, "max_tokens": size.tokens,
            },
            "lora": {"rank": 16, "alpha": 32, "last_layers": last_layers},
            "inner": {"lr": 0.02, "steps": 3},
            "tasks_per_step": tasks,
            "run": {"dir": "-"},
        },
        "gpu_evidence",
    )  # fmt: skip


def folder(scratch: Path, shape: str, dtype: str, device: torch.device, weights: bool = True) -> str:
    """Return a folder with a random Llama of a shape, and a tokenizer of characters; made once.

    Args:
        weights: else its config alone.
    """
    made = scratch / (shape if weights else f"{shape}-config")
    if made.exists():
        return str(made)
    work = made.with_suffix(".part")
    shutil.copytree(resolve_model("tiny"), work, dirs_exist_ok=True)
    (work / "model.safetensors").unlink()
    config = llama(shape)
    config.save_pretrained(work)
    if weights:
        torch.manual_seed(0)
        with device:
            AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).save_pretrained(work)
    work.rename(made)
    return str(made)


def llama(shape: str) -> LlamaConfig:
    return LlamaConfig(
        **SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=4096, eos_token_id=1, pad_token_id=1,
        bos_token_id=None, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
