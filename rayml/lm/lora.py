"""Task-batched LoRA: T adapters side by side on one frozen causal language model (Hu et al. 2021, arXiv 2106.09685).

Rows of a batch are grouped by task. A forward hook on every adapted linear adds `B_t A_t x` to the rows of task t, for
all tasks in two batched products. The adapters live outside the model, so that its parameters keep their names, and the
frozen base can be sharded (ZeRO-3).

Shapes: T tasks, K rows a task, L tokens a row, r the LoRA rank.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rayml.algorithms.inner_loop import Params
from rayml.algorithms.prototypes import INITIAL_LOGS
from rayml.errors import ConfigError

A, B = ".lora_A", ".lora_B"
LAYER = re.compile(r"\.(\d+)\.")


class MixedUpdate(torch.autograd.Function):
    """`output + scale * B A x` on a base of lower precision: in the adapters' precision, rounded once, as PEFT does it.

    If the adapters were rounded to bfloat16, an inner step of 1e-4 would not change nine in ten of B's weights.
    Autograd would keep a second copy of every x in the adapters' precision; here the backward casts it again.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Take `output [T, N, out]` and `x [T, N, in]` in the base's dtype, `a [T, r, in]` and `b [T, out, r]`."""
        ctx.save_for_backward(x, a, b)
        ctx.scale = scale
        low_rank = torch.bmm(x.to(a.dtype), a.mT)
        return torch.baddbmm(output.to(a.dtype), low_rank, b.mT, alpha=scale).to(output.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, a, b), (gradient,) = ctx.saved_tensors, gradients
        _, needs_x, needs_a, needs_b, _ = ctx.needs_input_grad
        cast_gradient, cast_x = gradient.to(a.dtype), x.to(a.dtype)
        low_rank_gradient = torch.bmm(cast_gradient, b) * ctx.scale
        # `A x` is computed again from saved inputs, so that exact MAML can differentiate this backward.
        b_gradient = torch.bmm(cast_gradient.mT, torch.bmm(cast_x, a.mT) * ctx.scale) if needs_b else None
        a_gradient = torch.bmm(low_rank_gradient.mT, cast_x) if needs_a else None
        del cast_gradient, cast_x  # the largest tensors here
        x_gradient = torch.bmm(low_rank_gradient, a).to(x.dtype) if needs_x else None
        return gradient, x_gradient, a_gradient, b_gradient, None


class TaskLoRA:
    """Hooks on the adapted linears of `model`, and the adapters that they currently apply.

    Args:
        model: a causal LM whose parameters are, or will be, frozen.
        targets: last parts of the names of the linears to adapt, such as `("q_proj", "v_proj")`.
        rank: r.
        alpha: LoRA's numerator; the update is scaled by `alpha / rank`.
        last_layers: adapt only this many last layers; None adapts all.
    """

    def __init__(self, model: Any, targets: Sequence[str], rank: int, alpha: float, last_layers: int | None = None):
        self.rank, self.alpha = rank, alpha
        self.linears = find_linears(model, targets, last_layers)
        self.adapters: Params | None = None
        self._dropped = 0.0
        self._seeds: Tensor | None = None
        self._forwards = 0
        for number, (name, linear) in enumerate(self.linears.items()):
            linear.register_forward_hook(self._hook(name, number))

    def begin(self, adapters: Params | None) -> None:
        """Apply these adapters, `[T, ...]` each, in the next forward."""
        self.adapters = adapters
        self._forwards += adapters is not None  # the bare model has no inputs to drop

    def _hook(self, name: str, number: int):
        scale = self.alpha / self.rank

        def add_update(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self.adapters is None or name + A not in self.adapters:
                return output
            (x,) = inputs
            if self._seeds is not None:
                seeds = hash32(self._seeds + self._forwards * len(self.linears) + number)
                x = x * keep_mask(seeds, x.shape, self._dropped).to(x.dtype) / (1 - self._dropped)
            a, b = self.adapters[name + A], self.adapters[name + B]
            task_x = x.reshape(a.shape[0], -1, x.shape[-1])  # [T, K * L, in]
            task_output = output.reshape(a.shape[0], -1, output.shape[-1])  # [T, K * L, out]
            if x.dtype == a.dtype:
                # One call multiplies, scales and adds: the update itself is never written to memory.
                updated = torch.baddbmm(task_output, torch.bmm(task_x, a.mT), b.mT, alpha=scale)
            else:
                updated = MixedUpdate.apply(task_output, task_x, a, b, scale)
            return updated.view_as(output)

        return add_update

    @contextmanager
    def dropping(self, share: float, seeds: Sequence[int]) -> Iterator[None]:
        """Drop this share of the adapters' inputs inside the block, with a new mask in every forward, as PEFT does.

        Rows must hold one example each. A task's masks then do not depend on the tasks beside it.

        Args:
            seeds: one for each of the T tasks.
        """
        self._dropped, self._forwards = share, 0
        self._seeds = hash32(torch.tensor(seeds, device=next(iter(self.linears.values())).weight.device))
        try:
            yield
        finally:
            self._seeds = None

    def untrained_start(self, seed: int) -> Params:
        """Return the usual LoRA start in fp32: `A [r, in]` uniform as in PEFT, `B [out, r]` zero."""
        generator = torch.Generator().manual_seed(seed)
        start: Params = {}
        for name, linear in self.linears.items():
            bound = 1 / math.sqrt(linear.in_features)
            start[name + A] = (torch.rand(self.rank, linear.in_features, generator=generator) * 2 - 1) * bound
            start[name + B] = torch.zeros(linear.out_features, self.rank)
        return start


def keep_mask(seeds: Tensor, shape: Sequence[int], share: float) -> Tensor:
    """Return which inputs are kept, `[T * K, L, in]`, by the task's seed and each input's position in its task.

    Unlike with torch's generators, the mask does not depend on how many rows and tokens of padding there are.

    Args:
        seeds: `[T]`, hashed.
        share: the share that is dropped.
    """
    rows, length, width = shape
    row_hash = hash32(seeds[:, None] + torch.arange(rows // len(seeds), device=seeds.device)).flatten()
    token_hash = hash32(row_hash[:, None] + torch.arange(length, device=seeds.device)).int()
    bits = token_hash.unsqueeze(-1) ^ hash32(torch.arange(width, device=seeds.device)).int()
    bits.mul_(0x2C1B3C6D).bitwise_xor_(bits >> 12).mul_(0x297A2D39)  # in place and cheaper: this is the large tensor
    return bits >= round(share * 2**32) - 2**31


def hash32(numbers: Tensor) -> Tensor:
    """Hash int64 numbers to the range from 0 to 2 ** 32 - 1 (C. Wellons' lowbias32)."""
    x = numbers & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def stack_adapters(adapters: Sequence[Params | None]) -> Params | None:
    """Stack adapters `[r, in]` and `[out, r]` as `[T, ...]`; None stands for the bare base.

    Ranks and adapted linears may differ: what an adapter lacks is filled with zeros, which add nothing; the scale and
    mix of a readout with their initial values. Returns None if all are the bare base.
    """
    shapes: dict[str, list[torch.Size]] = {}
    for adapter in adapters:
        for name, weight in (adapter or {}).items():
            shapes.setdefault(name, []).append(weight.shape)
    first = next((adapter for adapter in adapters if adapter), None)
    if first is None:
        return None
    if len(adapters) == 1:
        return {name: weight.unsqueeze(0) for name, weight in first.items()}
    like = next(iter(first.values()))
    largest = {name: [max(dims) for dims in zip(*sizes, strict=True)] for name, sizes in shapes.items()}
    stacked = {n: like.new_full((len(adapters), *dims), INITIAL_LOGS.get(n, 0.0)) for n, dims in largest.items()}
    for index, adapter in enumerate(adapters):
        for name, weight in (adapter or {}).items():
            stacked[name][index][tuple(map(slice, weight.shape))] = weight
    return stacked


def find_linears(model: Any, targets: Sequence[str], last_layers: int | None) -> dict[str, nn.Linear]:
    """Return the linears in the last layers whose last name part is in `targets`, by full name.

    Raises:
        ConfigError: a target matches no linear of the model.
    """
    linears, kinds, name = all_linears(model), linear_kinds(model), type(model).__name__
    if not kinds:
        raise ConfigError(
            f"lora.targets: {', '.join(sorted(targets))}: {name} has no linear layers for LoRA (GPT-2's Conv1D "
            "does not count); use adapter=soft_prompt, or mode=full"
        )
    unknown = sorted(set(targets) - set(kinds))
    if unknown:
        raise ConfigError(f"lora.targets: {', '.join(unknown)} is no linear layer of {name}; it has {', '.join(kinds)}")
    first = model.config.num_hidden_layers - (last_layers or model.config.num_hidden_layers)
    adapted = {n: m for n, m in linears.items() if n.rsplit(".", 1)[-1] in targets and layer_number(n) >= first}
    absent = sorted(set(targets) - {n.rsplit(".", 1)[-1] for n in adapted})
    if absent:
        raise ConfigError(
            f"lora.targets: the last {last_layers} layers of {name} have no {', '.join(absent)}; leave it out, or "
            "raise lora.last_layers"
        )
    return adapted


def all_linears(model: Any) -> dict[str, nn.Linear]:
    """Return every linear by its full name, except the output head, which sees the hidden states of targets alone."""
    head = model.get_output_embeddings()
    return {n: module for n, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}


def linear_kinds(model: Any) -> list[str]:
    """Return the distinct last parts of the linears' names, such as `q_proj`, sorted."""
    return sorted({name.rsplit(".", 1)[-1] for name in all_linears(model)})


def layer_number(name: str) -> int:
    """Return the layer number of a module such as `model.layers.3.mlp.down_proj`; 0 outside the layers."""
    match = LAYER.search(name)
    return int(match.group(1)) if match else 0


def is_in_layer(name: str) -> bool:
    return bool(LAYER.search(name))
