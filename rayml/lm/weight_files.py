"""Files of weights that do not make the model that their config.json describes."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from rayml.lm.lora import LAYER

UNUSED = re.compile(r"(attn|attention)\.bias$|\.(masked_bias|causal_mask|inv_freq|position_ids)$")
"""Masks and positions that older checkpoints of some families hold, in their layers: no weights."""
POINTER = b"version https://git-lfs"


def untaken(model: Any, keys: Iterable[str]) -> list[str]:
    """Return which weights of a checkpoint the model should have taken, and did not: with them it would be another.

    Such lie in the model's own layers, or beside a weight of its own. What else a checkpoint may hold, such as a
    pooler, a classifier, a vision tower or an output head that is not asked for, is no part of this model.
    """
    config, prefix = model.config.get_text_config(), f"{model.base_model_prefix}."
    first = getattr(config, "num_hidden_layers", None) or 0
    ahead = range(first, first + (getattr(config, "num_nextn_predict_layers", None) or 0))  # they predict more tokens
    modules = dict(model.named_modules())

    def is_own(name: str) -> bool:
        lists = [at for at in LAYER.finditer(name) if isinstance(modules.get(name[: at.start()]), nn.ModuleList)]
        owner = modules.get(name.rpartition(".")[0])
        is_beside = owner is not None and any(True for _ in owner.parameters(recurse=False))
        return (is_beside or any(int(at[1]) not in ahead for at in lists[:1])) and not UNUSED.search(name)

    return [key for key in sorted(keys) if any(map(is_own, (key, prefix + key, key.removeprefix(prefix))))]


def unreadable(path: str) -> str:
    """Return which of a folder's safetensors files is not whole, and why; nothing where all are."""
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
