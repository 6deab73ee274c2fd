"""What workers send each other outside the base model. With one worker, nothing is sent."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rayml.lm.frozen import WorkerShare

Result = TypeVar("Result")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_workers(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return every tensor summed over the workers, by one all-reduce of one flat fp32 buffer."""
    if world_size() == 1:
        return list(tensors)
    flat = torch.cat([tensor.float().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def join_from_workers(part: Tensor) -> list[Tensor]:
    """Return every worker's `[n, D]`, by rank, on every worker. n may differ between them, and may be 0."""
    if world_size() == 1:
        return [part]
    sizes = gather_from_workers(len(part))
    padded = part.new_zeros(max(sizes), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [padded_part[:size] for padded_part, size in zip(parts, sizes, strict=True)]


def share() -> WorkerShare:
    """Return this worker's share of work that is divided over all workers."""
    return WorkerShare(rank(), world_size(), join_from_workers)


def from_first_worker(value: Any) -> Any:
    """Return worker 0's picklable value on every worker."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def on_first_worker(compute: Callable[[], Result]) -> Result:
    """Return on every worker the picklable result of `compute`, which only worker 0 calls."""
    return from_first_worker(compute() if rank() == 0 else None)


def tensors_from_first_worker(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return worker 0's tensors on every worker, on the CPU; what the others pass is ignored.

    Each tensor is broadcast by itself, without pickling: a pickled optimizer state would take every worker several
    times its size.
    """
    if world_size() == 1:
        return dict(tensors)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    received = {}
    for name, shape, dtype in from_first_worker([(name, t.shape, t.dtype) for name, t in tensors.items()]):
        is_first = rank() == 0
        tensor = tensors[name].to(device).contiguous() if is_first else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(tensor, src=0)
        received[name] = tensor.cpu()
    return received


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether all numbers are finite. This waits for the device only once."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def gather_from_workers(value: Any) -> list[Any]:
    """Return every worker's picklable value, by rank, on every worker."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until all workers have come here."""
    gather_from_workers(None)
