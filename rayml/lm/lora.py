"""Task-batched LoRA: T adapters side by side on one frozen causal language model (Hu et al. 2021, arXiv 2106.09685).

Rows of a batch are grouped by task. A forward hook on every adapted linear adds `B_t A_t x` to the rows of task t,
for all tasks in two batched products. The adapters live outside the model, so a sharded, frozen base (ZeRO-3) and
the model's own parameter names stay as they are.

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
from rayml.errors import ConfigError

A, B = ".lora_A", ".lora_B"
LAYER = re.compile(r"\.(\d+)\.")


class MixedUpdate(torch.autograd.Function):
    """`output + scale * B A x` on a base of less precision: in the adapters' own, and rounded once, as PEFT does it.

    Rounded to bfloat16 themselves, nine in ten of B's weights would not notice an inner step of a ten-thousandth.
    Autograd would keep every x a second time, in the adapters' precision: here it is cast anew in the backward.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Take `output [T, N, out]` and `x [T, N, in]` in the base's dtype, `a [T, r, in]` and `b [T, out, r]`."""
        ctx.save_for_backward(x, a, b)
        ctx.scale = scale
        between = torch.bmm(x.to(a.dtype), a.mT)
        return torch.baddbmm(output.to(a.dtype), between, b.mT, alpha=scale).to(output.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, a, b), (gradient,) = ctx.saved_tensors, gradients
        _, for_x, for_a, for_b, _ = ctx.needs_input_grad
        above, below = gradient.to(a.dtype), x.to(a.dtype)
        of_between = torch.bmm(above, b) * ctx.scale
        # From the inputs alone, so that exact MAML can differentiate it again.
        of_b = torch.bmm(above.mT, torch.bmm(below, a.mT) * ctx.scale) if for_b else None
        of_a = torch.bmm(of_between.mT, below) if for_a else None
        del above, below  # they are the largest
        of_x = torch.bmm(of_between, a).to(x.dtype) if for_x else None
        return gradient, of_x, of_a, of_b, None


class TaskLoRA:
    """Hooks on the adapted linears of `model`, and the adapters that they apply at the moment.

    Args:
        model: a causal LM whose parameters are, or will be, frozen.
        targets: last parts of the names of the linears to adapt, such as `("q_proj", "v_proj")`.
        rank: r.
        alpha: LoRA's numerator; the update is scaled by `alpha / rank`.
        last_layers: adapt only the last this many layers; None all.
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
        """Apply these adapters, `[T, ...]` each, in the forward that comes."""
        self.adapters = adapters
        self._forwards += adapters is not None  # of the bare model there is nothing to drop

    def _hook(self, name: str, number: int):
        scale = self.alpha / self.rank

        def add_update(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self.adapters is None or name + A not in self.adapters:
                return output
            (x,) = inputs
            if self._seeds is not None:
                of_linear = mixed(self._seeds + self._forwards * len(self.linears) + number)
                x = x * keep_mask(of_linear, x.shape, self._dropped).to(x.dtype) / (1 - self._dropped)
            a, b = self.adapters[name + A], self.adapters[name + B]
            by_task = x.reshape(a.shape[0], -1, x.shape[-1])  # [T, K * L, in]
            grouped = output.reshape(a.shape[0], -1, output.shape[-1])  # [T, K * L, out]
            if x.dtype == a.dtype:
                # One call scales and adds, too: the update alone is never written.
                updated = torch.baddbmm(grouped, torch.bmm(by_task, a.mT), b.mT, alpha=scale)
            else:
                updated = MixedUpdate.apply(grouped, by_task, a, b, scale)
            return updated.view_as(output)

        return add_update

    @contextmanager
    def dropping(self, share: float, seeds: Sequence[int]) -> Iterator[None]:
        """Drop this share of the adapters' inputs inside the block: a fresh mask in every forward, as PEFT does.

        Args:
            seeds: of the T tasks' masks. Rows must hold one example each; what lies side by side then does not matter.
        """
        self._dropped, self._forwards = share, 0
        self._seeds = mixed(torch.tensor(seeds, device=next(iter(self.linears.values())).weight.device))
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
    """Return which inputs are kept, `[T * K, L, in]`: by the task's seed, and by where each stands in its task.

    It is the same however many rows and tokens of padding there are, as torch's own generators would not have it.

    Args:
        seeds: `[T]`, each well mixed.
        share: that is dropped.
    """
    rows, length, width = shape
    of_row = mixed(seeds[:, None] + torch.arange(rows // len(seeds), device=seeds.device)).flatten()
    of_token = mixed(of_row[:, None] + torch.arange(length, device=seeds.device)).int()
    bits = of_token.unsqueeze(-1) ^ mixed(torch.arange(width, device=seeds.device)).int()
    bits.mul_(0x2C1B3C6D).bitwise_xor_(bits >> 12).mul_(0x297A2D39)  # a tensor of this size is worth being quick with
    return bits >= round(share * 2**32) - 2**31


def mixed(numbers: Tensor) -> Tensor:
    """Return int64 numbers, from 0 to 2 ** 32 - 1, as good as drawn for each of these (C. Wellons' lowbias32)."""
    x = numbers & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def side_by_side(adapters: Sequence[Params | None]) -> Params | None:
    """Stack adapters `[r, in]` and `[out, r]` as `[T, ...]`; None is the bare base.

    Ranks and adapted linears may differ: what an adapter lacks is zero, and adds nothing. None, if all are the base.
    """
    shapes: dict[str, list[torch.Size]] = {}
    for adapter in adapters:
        for name, weight in (adapter or {}).items():
            shapes.setdefault(name, []).append(weight.shape)
    some = next((adapter for adapter in adapters if adapter), None)
    if some is None:
        return None
    if len(adapters) == 1:
        return {name: weight.unsqueeze(0) for name, weight in some.items()}
    like = next(iter(some.values()))
    stacked = {n: like.new_zeros(len(adapters), *map(max, zip(*found, strict=True))) for n, found in shapes.items()}
    for index, adapter in enumerate(adapters):
        for name, weight in (adapter or {}).items():
            stacked[name][index][tuple(map(slice, weight.shape))] = weight
    return stacked


def find_linears(model: Any, targets: Sequence[str], last_layers: int | None) -> dict[str, nn.Linear]:
    """Return the linears whose last name part is in `targets`, in the last layers, by full name.

    Raises:
        ConfigError: a target matches no linear of the model.
    """
    linears, kinds, name = all_linears(model), linear_kinds(model), type(model).__name__
    if not kinds:
        raise ConfigError(
            f"lora.targets: {', '.join(sorted(targets))}: {name} has no linear layers for LoRA (GPT-2's Conv1D is "
            "none); use adapter=soft_prompt, or mode=full"
        )
    unknown = sorted(set(targets) - set(kinds))
    if unknown:
        raise ConfigError(f"lora.targets: {', '.join(unknown)} is no linear layer of {name}; it has {', '.join(kinds)}")
    first = model.config.num_hidden_layers - (last_layers or model.config.num_hidden_layers)
    found = {n: one for n, one in linears.items() if n.rsplit(".", 1)[-1] in targets and layer_number(n) >= first}
    absent = sorted(set(targets) - {n.rsplit(".", 1)[-1] for n in found})
    if absent:
        raise ConfigError(
            f"lora.targets: the last {last_layers} layers of {name} have no {', '.join(absent)}; leave it out, or "
            "raise lora.last_layers"
        )
    return found


def all_linears(model: Any) -> dict[str, nn.Linear]:
    """Return every linear by its full name, but for the output head: it sees the targets alone."""
    head = model.get_output_embeddings()
    return {n: module for n, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}


def linear_kinds(model: Any) -> list[str]:
    """Return the last parts of the linears' names, such as `q_proj`, sorted."""
    return sorted({name.rsplit(".", 1)[-1] for name in all_linears(model)})


def layer_number(name: str) -> int:
    """Return the layer that a module such as `model.layers.3.mlp.down_proj` lies in; 0 outside the layers."""
    match = LAYER.search(name)
    return int(match.group(1)) if match else 0


def in_a_layer(name: str) -> bool:
    return bool(LAYER.search(name))
