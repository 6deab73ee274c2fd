"""Find weight files that do not match the model that their config.json describes."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from rayml.lm.lora import LAYER

BUFFERS = re.compile(r"(attn|attention)\.bias$|\.(masked_bias|causal_mask|inv_freq|position_ids)$")
"""Masks and positions in the layers of older checkpoints of some families; they are no weights."""
POINTER = b"version https://git-lfs"


def unused_weights(model: Any, keys: Iterable[str]) -> list[str]:
    """Return the weights of a checkpoint that belong to the model, but were not loaded into it.

    They are in the model's own layers, or in a module that has weights. Other parts of a checkpoint, such as a pooler,
    a classifier, a vision tower or an output head, may be left out.

    Args:
        keys: the names of tensors that were not loaded.
    """
    config, prefix = model.config.get_text_config(), f"{model.base_model_prefix}."
    depth = getattr(config, "num_hidden_layers", None) or 0
    # Layers for predicting more than one token ahead are not used.
    extra_layers = range(depth, depth + (getattr(config, "num_nextn_predict_layers", None) or 0))
    modules = dict(model.named_modules())

    def belongs(name: str) -> bool:
        matches = [m for m in LAYER.finditer(name) if isinstance(modules.get(name[: m.start()]), nn.ModuleList)]
        parent = modules.get(name.rpartition(".")[0])
        has_siblings = parent is not None and any(True for _ in parent.parameters(recurse=False))
        in_layer = bool(matches) and int(matches[0][1]) not in extra_layers
        return (has_siblings or in_layer) and not BUFFERS.search(name)

    return [key for key in sorted(keys) if any(map(belongs, (key, prefix + key, key.removeprefix(prefix))))]


def find_broken_file(path: str) -> str:
    """Return a message about the first safetensors file of a folder that is incomplete; "" if there is none."""
    for file in sorted(Path(path).glob("*.safetensors")):
        with file.open("rb") as opened:
            if opened.read(len(POINTER)) == POINTER:
                return f"{file} is a Git LFS pointer and not the weights themselves; get them by `git lfs pull`"
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            return f"{file} is not whole ({error}); copy or download it again"
    return ""
