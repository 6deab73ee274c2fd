"""The plain engine: the whole base on every worker. The oracle that the sharded one is tested against."""

import torch

from rayml.lm.load import load_base


def load(path: str, dtype: str, attention: str, device: torch.device):
    """Return the frozen causal LM, ready to be called."""
    return load_base(path, dtype, attention).to(device)
