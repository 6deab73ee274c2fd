"""How others come to the same first-order meta-gradient: each a loop in the form that its library documents.

They share one PEFT model, and the loss below, which needs the logits of target positions alone.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from rayml.lm.batch import IGNORE, TaskBatch

Gradient = Sequence[Tensor]


@dataclass(frozen=True)
class Side:
    """A task's support or query: `tokens` `[K, L]`, and M targets; with T tasks before each, for `torch.func`."""

    tokens: Tensor
    kept: Tensor
    """`[P]`: the positions that predict a target in some row."""
    row: Tensor
    column: Tensor
    """`[M]` each: where each target's logits lie in `[K, P]`."""
    target: Tensor
    allowed: Tensor | None
    """`[M, S]`, the tokens that each target is chosen among, filled up with IGNORE; None: the whole vocabulary."""
    weight: Tensor
    """`[M]`: each target's share of the task's loss."""

    @classmethod
    def of(cls, batch: TaskBatch) -> "Side":
        """Return a batch of one task."""
        row, index = (batch.targets != IGNORE).nonzero(as_tuple=True)
        kept, column = index.unique(return_inverse=True)
        weight = torch.full((len(row),), 1 / int(batch.loss_mask().sum()), device=row.device)
        return cls(batch.tokens, kept, row, column, batch.targets[row, index], batch.allowed, weight)

    def loss(self, forward: Callable[..., Any]) -> Tensor:
        logits = forward(input_ids=self.tokens, logits_to_keep=self.kept, use_cache=False).logits
        found = logits[self.row, self.column].float()
        own = found.gather(1, self.target.unsqueeze(1)).squeeze(1)
        if self.allowed is not None:
            rivals = found.gather(1, self.allowed.clamp(min=0))
            found = rivals.masked_fill(self.allowed == IGNORE, -torch.inf)
        return ((found.logsumexp(1) - own) * self.weight).sum()


@dataclass(frozen=True)
class Work:
    """What every peer is given."""

    model: Any
    """PEFT's, its adapters in float32."""
    params: Sequence[Tensor]
    """The adapters in it."""
    start: Sequence[Tensor]
    """Their start, in fp32."""
    tasks: Sequence[tuple[Side, Side]]
    lr: float
    steps: int

    def reset(self) -> None:
        fill(self.params, self.start)

    def with_adapters(self, adapters: Sequence[Tensor]) -> Callable[..., Any]:
        """Return the model's forward with other adapters in it, without changing it."""
        names = [name for name, weight in self.model.named_parameters() if weight.requires_grad]
        return lambda **inputs: torch.func.functional_call(
            self.model, dict(zip(names, adapters, strict=True)), kwargs=inputs
        )


def fill(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(list(to), list(values))


def peft_loop(work: Work) -> Gradient:
    """The loop that a careful user writes: one model, adapters reset for each task, fast weights in fp32."""
    total = [torch.zeros_like(weight) for weight in work.start]
    for support, query in work.tasks:
        fast = [weight.clone() for weight in work.start]
        work.reset()
        for _ in range(work.steps):
            gradients = torch.autograd.grad(support.loss(work.model), work.params)
            torch._foreach_add_(fast, [g.float() for g in gradients], alpha=-work.lr)
            fill(work.params, fast)
        gradients = torch.autograd.grad(query.loss(work.model), work.params)
        torch._foreach_add_(total, [g.float() for g in gradients])
    return total


def torch_func(work: Work) -> Gradient:
    """All tasks at once by `torch.func`: vmap over the gradient of a functional call."""
    tasks = len(work.tasks)
    support, query = (stacked([sides[k] for sides in work.tasks]) for k in (0, 1))

    def gradients(fast: Gradient, side: Side) -> Gradient:
        by_task = {name: value for name, value in vars(side).items() if name != "kept" and value is not None}

        def loss(fast: list[Tensor], mine: dict[str, Tensor]) -> Tensor:
            return replace(side, **mine).loss(work.with_adapters(fast))

        return torch.func.vmap(torch.func.grad(loss))([weight.to(work.params[0].dtype) for weight in fast], by_task)

    fast = [weight.expand(tasks, *weight.shape) for weight in work.start]
    for _ in range(work.steps):
        fast = [weight - work.lr * g.float() for weight, g in zip(fast, gradients(fast, support), strict=True)]
    return [g.float().sum(0) for g in gradients(fast, query)]


def stacked(sides: Sequence[Side]) -> Side:
    """Stack tasks; those with fewer rows, tokens or targets are filled up with what counts for nothing."""
    kept = torch.cat([side.kept for side in sides]).unique()
    rows, length = (max(side.tokens.shape[k] for side in sides) for k in (0, 1))
    targets = max(len(side.target) for side in sides)
    most = max(0 if side.allowed is None else side.allowed.shape[1] for side in sides)

    def filled(side: Side) -> dict[str, Tensor]:
        column = torch.searchsorted(kept, side.kept)[side.column]
        flat = {"row": side.row, "column": column, "target": side.target, "weight": side.weight}
        found = {"tokens": grow(side.tokens, (rows, length), 0)}
        found |= {name: grow(value, (targets,), 0) for name, value in flat.items()}
        if side.allowed is not None:
            found["allowed"] = grow(side.allowed, (targets, most), IGNORE)
            found["allowed"][len(side.target) :, 0] = 0
        return found

    parts = [filled(side) for side in sides]
    return replace(sides[0], kept=kept, **{name: torch.stack([part[name] for part in parts]) for name in parts[0]})


def grow(tensor: Tensor, shape: Sequence[int], value: int) -> Tensor:
    """Return a tensor padded at its ends with a value."""
    found = tensor.new_full(shape, value)
    found[tuple(slice(size) for size in tensor.shape)] = tensor
    return found


class PlainLora(nn.Module):
    """A linear with an adapter, for `higher`: the order of bases of PEFT's own classes is one that it cannot patch."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.A, self.B = (
            nn.Parameter(torch.empty(*shape, dtype=base.weight.dtype, device=base.weight.device))
            for shape in ((rank, base.in_features), (base.out_features, rank))
        )

    def forward(self, x: Tensor) -> Tensor:
        linear = nn.functional.linear
        return self.base(x) + self.scale * linear(linear(x, self.A), self.B)


class Layers(nn.ModuleList):
    """Layers whose slices are lists: transformers slices its layers, and `higher` cannot make a module of the slice."""

    def __getitem__(self, index: Any) -> Any:
        return list(self._modules.values())[index]


def plain_model(model: Any, names: Sequence[str], rank: int, scale: float) -> Any:
    """Put plain adapters on the linears of these names."""
    for name in names:
        model.set_submodule(name, PlainLora(model.get_submodule(name), rank, scale))
    model.model.layers = Layers(model.model.layers)
    return model


def higher_loop(higher: ModuleType, work: Work) -> Gradient:
    """`higher.innerloop_ctx` without tracking, the query's gradient taken at the fast weights."""
    total = [torch.zeros_like(weight) for weight in work.start]
    work.reset()
    learned = [index for index, weight in enumerate(work.model.parameters()) if weight.requires_grad]
    for support, query in work.tasks:
        optimizer = torch.optim.SGD(list(work.params), work.lr)
        with higher.innerloop_ctx(work.model, optimizer, copy_initial_weights=True, track_higher_grads=False) as (
            model,
            inner,
        ):
            for _ in range(work.steps):
                inner.step(support.loss(model))
            fast = list(model.parameters())
            gradients = torch.autograd.grad(query.loss(model), [fast[index] for index in learned])
        torch._foreach_add_(total, [g.float() for g in gradients])
    return total


def torchopt_loop(torchopt: ModuleType, work: Work) -> Gradient:
    """TorchOpt's functional SGD; its `MetaSGD` knows no first-order form, as it keeps the graph of every step."""
    total = [torch.zeros_like(weight) for weight in work.start]
    optimizer = torchopt.sgd(lr=work.lr)
    for support, query in work.tasks:
        fast = tuple(start.to(weight.dtype) for start, weight in zip(work.start, work.params, strict=True))
        state = optimizer.init(fast)

        def gradients(side: Side, at: Gradient) -> Gradient:
            leaves = tuple(weight.detach().requires_grad_() for weight in at)
            return torch.autograd.grad(side.loss(work.with_adapters(leaves)), leaves)

        for _ in range(work.steps):
            updates, state = optimizer.update(gradients(support, fast), state, inplace=False)
            fast = torchopt.apply_updates(fast, updates, inplace=False)
        torch._foreach_add_(total, [g.float() for g in gradients(query, fast)])
    return total


def learn2learn_loop(maml_class: type, work: Work) -> Gradient:
    """`learn2learn.algorithms.MAML(first_order=True)`: clone, adapt, backward, task by task."""
    work.reset()
    maml = maml_class(work.model, lr=work.lr, first_order=True, allow_unused=True, allow_nograd=True)
    for weight in work.params:
        weight.grad = None
    for support, query in work.tasks:
        learner = maml.clone()
        for _ in range(work.steps):
            learner.adapt(support.loss(learner))
        query.loss(learner).backward()
    gradients = [weight.grad.float() for weight in work.params]  # type: ignore[union-attr]
    for weight in work.params:
        weight.grad = None
    return gradients


BETTY = (
    "its gradient for a start is the implicit one of a proximal inner problem (iMAML), by finite differences, Neumann "
    "series or conjugate gradients; first-order MAML's is not among them (betty-ml 0.2.1, which needs Python < 3.11)"
)


def peers(learn2learn: Path | None) -> tuple[dict[str, Callable[[Work], Gradient]], dict[str, str]]:
    """Return the peers that are here, and why the others are not.

    Args:
        learn2learn: its unpacked source, whose C files Python 3.11 does not compile: the MAML class is plain Python.
    """
    found: dict[str, Callable[[Work], Gradient]] = {"PEFT loop": peft_loop, "torch.func": torch_func}
    missing = {"Betty": BETTY}
    for name, bring in (
        ("higher", lambda: partial(higher_loop, __import__("higher"))),
        ("TorchOpt", lambda: partial(torchopt_loop, __import__("torchopt"))),
        ("learn2learn", lambda: partial(learn2learn_loop, maml_of(learn2learn))),
    ):
        try:
            found[name] = bring()
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing


def maml_of(source: Path | None) -> type:
    """Return learn2learn's MAML: as it is installed, or out of its source, past packages that it does not need."""
    if source is not None:
        for name in "learn2learn", "learn2learn.algorithms":
            package = ModuleType(name)
            package.__path__ = [str(source.joinpath(*name.split(".")))]
            sys.modules[name] = package
    from importlib import import_module

    return import_module("learn2learn.algorithms.maml").MAML
