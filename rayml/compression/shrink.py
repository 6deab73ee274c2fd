"""Make a base smaller: quantise its weights, or prune neurons of its MLPs.

Quantisation takes the weights of linears to 8 bits by torchao, or to 4 by bitsandbytes. Activations, adapters and their
gradients stay as they are. The embedding and the output head, which are often one tensor, keep their precision, since
labels are told apart there. torchao's packed 4-bit formats can be made on CUDA or XPU alone; bitsandbytes' NF4 in
blocks of 64 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314) works on CPU and GPU alike. Both store the quantised
weights as safetensors, and describe in `config.json` how to load them.

Pruning removes intermediate neurons of gated MLPs, as many in every layer, so that the result is a stock model. A
neuron's importance is the norm of its outputs over support texts times the norm of its column in `down_proj`: Wanda's
product of input and weight (Sun et al. 2023, arXiv 2306.11695), for a whole column instead of each weight.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayml.algorithms.inner_loop import Params, expand
from rayml.compression.command import Compressed, base_folder
from rayml.errors import ConfigError
from rayml.lm.batch import TaskBatch, collate
from rayml.lm.frozen import decoder_layers
from rayml.lm.label_trie import IGNORE
from rayml.lm.load import DTYPES, load_base
from rayml.lm.lora import A, B
from rayml.lm.model import TaskLM
from rayml.lm.rows import decode_rows
from rayml.model import MetaModel
from rayml.tasks.episodes import SUPPORT_SEED
from rayml.tasks.prepare import prepare_splits

SUPPORT_EPISODES = 32
KeptNeurons = dict[str, Tensor]
"""The sorted indices of the neurons that stay, `[kept]`, by each MLP's full name."""


def quantize(model: MetaModel, base: str, kind: str, folder: Path) -> Compressed:
    """Quantise the base, and leave what was learned as it is."""
    quantize_base(base, model.config.model.dtype, kind, base_folder(folder))
    return Compressed(model.config, model.start, model.inner_lrs, model.untrained)


def quantize_base(base: str, dtype: str, kind: str, folder: Path) -> None:
    """Write a base quantised, with its other weights in `dtype`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=DTYPES[dtype], use_safetensors=True, quantization_config=quantization_config(kind, dtype)
    )
    model.save_pretrained(folder)


def quantization_config(kind: str, dtype: str) -> Any:
    """Return the transformers config of int8 or int4."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "int4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[dtype])
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def prune(model: MetaModel, base: str, fraction: float, folder: Path, progress: Callable[[], None]) -> Compressed:
    """Prune the base's MLPs by their activations on meta-train texts, and the adapters with them."""
    config, encoder, pad = model.config, model.encoder, model.encoder.pad
    sampler, tasks = config.data.sampler(SUPPORT_SEED), prepare_splits(config.data).train
    episodes = [encoder.episode(sampler.episode(tasks, index)) for index in range(SUPPORT_EPISODES)]
    batches = [collate([decode_rows(e["support"])], pad).to(model.device) for e in episodes]
    kept = choose_neurons(model.lm, batches, model.start, fraction, progress)
    pruned = load_base(base, config.model.dtype)
    cut_mlps(pruned, kept)
    pruned.save_pretrained(base_folder(folder))
    learned = (cut_adapters(tensors, kept) for tensors in (model.start, model.inner_lrs, model.untrained))
    return Compressed(config, *learned)


def gated_mlps(model: Any) -> dict[str, Any]:
    """Return the MLP of every layer by its full name.

    Raises:
        ConfigError: a layer has no MLP with gate_proj, up_proj and down_proj.
    """
    names = {module: name for name, module in model.named_modules()}
    result = {}
    for layer in decoder_layers(model):
        mlp = getattr(layer, "mlp", None)
        if not all(isinstance(getattr(mlp, part, None), nn.Linear) for part in ("gate_proj", "up_proj", "down_proj")):
            raise ConfigError(
                f"--prune: {type(model).__name__} has layers without an MLP of gate_proj, up_proj and down_proj, "
                "as Llama, Mistral, Qwen and Gemma have"
            )
        result[names[mlp]] = mlp
    return result


def choose_neurons(
    lm: TaskLM, batches: Sequence[TaskBatch], start: Params, fraction: float, progress: Callable[[], None]
) -> KeptNeurons:
    """Return the most important neurons of each MLP, all but `fraction` of them.

    Args:
        batches: texts, of one example a row.
        start: the adapters to read them with, `[...]` each.
        progress: called after each batch.
    """
    mlps = gated_mlps(lm.module)
    importance = column_importance(lm, mlps, batches, start, progress)
    count = max(1, round(next(iter(importance.values())).numel() * (1 - fraction)))
    return {name: scores.topk(count).indices.sort().values.cpu() for name, scores in importance.items()}


@torch.no_grad()
def column_importance(
    lm: TaskLM, mlps: dict[str, Any], batches: Sequence[TaskBatch], start: Params, progress: Callable[[], None]
) -> dict[str, Tensor]:
    """Return `|x_j| * |W_j|` of each MLP's neurons j, `[neurons]` in fp32, over all tokens except padding."""
    squares = {name: torch.zeros(mlp.down_proj.in_features, device=lm.device) for name, mlp in mlps.items()}
    tokens: list[Tensor] = []

    def add_squares(name: str):
        def hook(_linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares[name] += inputs[0].flatten(0, 1)[tokens[-1]].float().square().sum(0)

        return hook

    hooks = [mlp.down_proj.register_forward_pre_hook(add_squares(name)) for name, mlp in mlps.items()]
    try:
        for batch in batches:
            is_token = (batch.targets != IGNORE).flip(1).cumsum(1).flip(1) > 0
            tokens.append(is_token.flatten().nonzero().squeeze(1))
            lm.target_logits(expand(start, batch.tasks), batch)
            progress()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: squares[name].sqrt() * mlp.down_proj.weight.float().norm(dim=0) for name, mlp in mlps.items()}


def cut_mlps(model: Any, kept: KeptNeurons) -> None:
    """Remove all but the kept neurons of a causal LM, in place."""
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


def cut_adapters(tensors: Params, kept: KeptNeurons) -> Params:
    """Return adapters' tensors for the cut MLPs: some columns of A of `down_proj`, some rows of B of the others.

    Rates for each weight have the same shape, and are cut alike; a rate for a whole tensor stays.
    """
    result = {}
    for name, tensor in tensors.items():
        linear, _, side = name.rpartition(".")
        mlp, _, part = linear.rpartition(".")
        neurons = kept[mlp].to(tensor.device) if mlp in kept and tensor.dim() else None
        if neurons is not None and part == "down_proj" and "." + side == A:
            tensor = tensor[:, neurons]
        elif neurons is not None and part in ("gate_proj", "up_proj") and "." + side == B:
            tensor = tensor[neurons]
        result[name] = tensor
    return result
