"""What we take from DeepSpeed without its promise to keep it: all of it, here alone.

pyproject.toml bounds DeepSpeed to what this was tested with; `tests/test_internals.py` says what a newer one broke.
"""

from functools import wraps
from typing import Any

RELEASES, INVALIDATE = "_PartitionedParameterCoordinator__params_to_release", "_invalidate_trace"
SHARED_MEMORY = "deepspeed_shm_comm"


def coordinator() -> Any:
    """Return the class that gathers and lets go of stage 3's weights."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    return PartitionedParameterCoordinator


def release_caches() -> list[Any]:
    """Return what remembers which weights may be let go of after a layer: the caches behind a decorated method."""
    remembered = getattr(coordinator(), RELEASES)
    return [cell.cell_contents for cell in remembered.__closure__ or () if hasattr(cell.cell_contents, "cache_clear")]


def forget_with_the_trace() -> None:
    """Let stage 3 forget which weights it may let go of, and when, together with the order of layers it was found for.

    DeepSpeed 0.19 remembers the answers of a forward by itself, such as scoring is, and goes on to let go of every
    weight whose backward is to come: training then gathers the model twice as often as it has to.
    """
    caches, invalidate = release_caches(), getattr(coordinator(), INVALIDATE)
    if hasattr(invalidate, "__wrapped__"):
        return

    @wraps(invalidate)
    def forgetting(self: Any) -> None:
        for cache in caches:
            cache.cache_clear()
        invalidate(self)

    setattr(coordinator(), INVALIDATE, forgetting)


def build_no_shared_memory() -> None:
    """Do without a shared-memory all-reduce for one CPU machine: to build it takes a compiler and half a minute."""
    from deepspeed.ops import __compatible_ops__ as built_at_first_use

    built_at_first_use[SHARED_MEMORY] = False


def client_optimizer(engine: Any) -> Any:
    """Return the optimizer that an engine was given, inside of what shards its state."""
    return engine.basic_optimizer


def set_clip_norm(engine: Any, norm: float) -> None:
    """Have the engine's next steps clip the gradient; 0 does not."""
    engine.optimizer.clip_grad = norm


def left_step_out(engine: Any) -> bool:
    """Return whether the engine's last step found a gradient that is not finite, and was not taken."""
    return bool(engine.optimizer.overflow)


def is_sharded(parameter: Any) -> bool:
    """Return whether stage 3 holds a parameter: here is then its shard alone."""
    return hasattr(parameter, "ds_id")
