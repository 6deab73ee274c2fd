"""The student of a distillation: some of the teacher's own layers, or another model."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rayml.algorithms.inner_loop import Params
from rayml.config import Config
from rayml.errors import ConfigError
from rayml.lm.frozen import decoder_layers
from rayml.lm.load import load_base
from rayml.lm.lora import LAYER, layer_number

LAYERS = re.compile(r"layers=(\d+)")


@dataclass(frozen=True, slots=True)
class KeptLayers:
    """The teacher's layers that its student has, in order."""

    layers: list[int]

    def lora_layers(self, config: Config, total: int) -> int | None:
        """Return how many of the student's last layers are adapted: those whose original is."""
        last = config.lora.last_layers
        return None if last is None else sum(layer >= total - last for layer in self.layers)

    def tensors(self, teacher: Params) -> Params:
        """Return the kept layers' adapters (or rates), by their names in the student."""
        index = {layer: number for number, layer in enumerate(self.layers)}
        return {
            LAYER.sub(f".{index[layer_number(name)]}.", name, count=1): tensor.clone()
            for name, tensor in teacher.items()
            if layer_number(name) in index
        }


def wanted_layers(student: str) -> int | None:
    """Return N of `layers=N`; None for a model's name.

    Raises:
        ConfigError: N is no number above 0.
    """
    if not student.startswith("layers="):
        return None
    found = LAYERS.fullmatch(student)
    if not found or not int(found.group(1)):
        raise ConfigError(f"--distill {student}: expected layers=N with a number above 0, or a model's name or folder")
    return int(found.group(1))


def evenly_spaced(total: int, count: int) -> KeptLayers:
    """Return `count` of `total` layers, the last and, of several, the first among them (as in DistilBERT, Sanh et al.
    2019, arXiv 1910.01108).

    Raises:
        ConfigError: there are not more than that.
    """
    if not 0 < count < total:
        raise ConfigError(f"--distill layers={count}: the teacher has {total} layers; expected fewer, and at least 1")
    last = total - 1
    return KeptLayers([round(last * index / (count - 1)) for index in range(count)] if count > 1 else [last])


def write_student(base: str, kept: KeptLayers, folder: Path) -> None:
    """Write the teacher's base with the kept layers alone, in fp32: small steps would round to nothing in bfloat16."""
    model = load_base(base, "float32")
    layers = decoder_layers(model)
    parent, _, name = next(name for name, module in model.named_modules() if module is layers).rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList([layers[layer] for layer in kept.layers]))
    config = model.config
    config.num_hidden_layers = len(kept.layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept.layers]
    model.save_pretrained(folder)


def save_base(module: Any, dtype: torch.dtype, folder: Path) -> None:
    """Write a trained student in the dtype that its run loads it in."""
    module.to(dtype).save_pretrained(folder)
