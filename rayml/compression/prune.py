"""Prune the intermediate neurons of gated MLPs, as many in every layer, so that a stock model is left.

A neuron's importance is the length of its outputs over support texts times the length of its column in `down_proj`:
Wanda's product of input and weight (Sun et al. 2023, arXiv 2306.11695), over a whole column and not for each weight.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayml.algorithms.inner_loop import Params, expand
from rayml.errors import ConfigError
from rayml.lm.batch import TaskBatch
from rayml.lm.frozen import decoder_layers
from rayml.lm.label_trie import IGNORE
from rayml.lm.load import load_base
from rayml.lm.lora import A, B
from rayml.lm.model import TaskLM

KeptSupport = dict[str, Tensor]
"""The neurons that stay, `[kept]` in order, of each MLP, by its full name."""


def gated_mlps(model: Any) -> dict[str, Any]:
    """Return the MLP of every layer by its full name.

    Raises:
        ConfigError: a layer has none with gate_proj, up_proj and down_proj.
    """
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for layer in decoder_layers(model):
        mlp = getattr(layer, "mlp", None)
        if not all(isinstance(getattr(mlp, part, None), nn.Linear) for part in ("gate_proj", "up_proj", "down_proj")):
            raise ConfigError(
                f"--prune: {type(model).__name__} has layers without an MLP of gate_proj, up_proj and down_proj, "
                "as Llama, Mistral, Qwen and Gemma have"
            )
        found[names[mlp]] = mlp
    return found


def choose(
    lm: TaskLM, batches: Sequence[TaskBatch], start: Params, fraction: float, progress: Callable[[], None]
) -> KeptSupport:
    """Return the most important neurons of each MLP, all but `fraction` of them.

    Args:
        batches: texts, of one example a row.
        start: the adapters that they are read with, `[...]` each.
        progress: told after each batch.
    """
    mlps = gated_mlps(lm.module)
    importance = column_importance(lm, mlps, batches, start, progress)
    count = max(1, round(next(iter(importance.values())).numel() * (1 - fraction)))
    return {name: scores.topk(count).indices.sort().values.cpu() for name, scores in importance.items()}


@torch.no_grad()
def column_importance(
    lm: TaskLM, mlps: dict[str, Any], batches: Sequence[TaskBatch], start: Params, progress: Callable[[], None]
) -> dict[str, Tensor]:
    """Return `|x_j| * |W_j|` of each MLP's neurons j, `[neurons]` in fp32: over all tokens but padding."""
    squares = {name: torch.zeros(mlp.down_proj.in_features, device=lm.device) for name, mlp in mlps.items()}
    tokens: list[Tensor] = []

    def add_squares(name: str):
        def hook(_linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares[name] += inputs[0].flatten(0, 1)[tokens[-1]].float().square().sum(0)

        return hook

    hooks = [mlp.down_proj.register_forward_pre_hook(add_squares(name)) for name, mlp in mlps.items()]
    try:
        for batch in batches:
            up_to_last = (batch.targets != IGNORE).flip(1).cumsum(1).flip(1) > 0
            tokens.append(up_to_last.flatten().nonzero().squeeze(1))
            lm.target_logits(expand(start, batch.tasks), batch)
            progress()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: squares[name].sqrt() * mlp.down_proj.weight.float().norm(dim=0) for name, mlp in mlps.items()}


def prune_base(base: str, dtype: str, kept: KeptSupport, folder: Path) -> None:
    """Write the base of a resolved model with the kept neurons alone."""
    model = load_base(base, dtype)
    cut_mlps(model, kept)
    model.save_pretrained(folder)


def cut_mlps(model: Any, kept: KeptSupport) -> None:
    """Leave the kept neurons in a causal LM, in place."""
    for name, mlp in gated_mlps(model).items():
        neurons = kept[name].to(mlp.down_proj.weight.device)
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight = nn.Parameter(part.weight[neurons].clone(), requires_grad=False)
            part.out_features = len(neurons)
            if part.bias is not None:
                part.bias = nn.Parameter(part.bias[neurons].clone(), requires_grad=False)
        mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, neurons].clone(), requires_grad=False)
        mlp.down_proj.in_features = len(neurons)
        model.config.intermediate_size = len(neurons)


def cut_adapters(tensors: Params, kept: KeptSupport) -> Params:
    """Return adapters' tensors for the cut MLPs: of `down_proj` A's columns, of the others B's rows.

    Rates for each weight are shaped, and cut, alike; a rate for a whole tensor stays.
    """
    found = {}
    for name, tensor in tensors.items():
        linear, _, side = name.rpartition(".")
        mlp, _, part = linear.rpartition(".")
        neurons = kept[mlp].to(tensor.device) if mlp in kept and tensor.dim() else None
        if neurons is not None and part == "down_proj" and "." + side == A:
            tensor = tensor[:, neurons]
        elif neurons is not None and part in ("gate_proj", "up_proj") and "." + side == B:
            tensor = tensor[neurons]
        found[name] = tensor
    return found
