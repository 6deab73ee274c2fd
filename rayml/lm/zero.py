"""The sharded engines: DeepSpeed ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054).

At stage 3 each of W workers keeps 1/W of every parameter, and gathers a layer's whole weights only while that layer
runs. `load` shards a frozen base. Adapters live outside the engine, whole on every worker: they are small, and every
worker needs all of them. `load_full` trains the model itself.
"""

import os
from contextlib import redirect_stderr, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayml.algorithms.outer_loop import OPTIMIZERS
from rayml.algorithms.phased_optimizer import PhasedOptimizer
from rayml.config import Config
from rayml.lm.load import checkpoint_activations, load_base
from rayml.lm.parameters import parameter_groups, trained_parameters

RELEASES, INVALIDATE = "_PartitionedParameterCoordinator__params_to_release", "_invalidate_trace"
SHARED_MEMORY = "deepspeed_shm_comm"
TAG = "zero"  # DeepSpeed's name for the folder of shards inside a checkpoint


def load(path: str, dtype: str, attention: str, device: torch.device, whole_below: int = 100_000):
    """Return the module of a DeepSpeed engine around the frozen causal LM.

    Call the module, not the engine, whose own forward breaks the backward when there is no optimizer. All workers must
    make the same calls in the same order, since each gathers weights from all others.

    Args:
        whole_below: parameters with fewer elements stay whole on every worker.
    """
    deepspeed = _deepspeed(device)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": whole_below},
        "bf16": {"enabled": dtype == "bfloat16"},
        "gradient_clipping": 0.0,  # DeepSpeed's default would clip at 1
    }
    engine, *_ = deepspeed.initialize(model=load_base(path, dtype, attention, config), config=config)
    return engine.module


def load_full(path: str, config: Config, device: torch.device, whole_below: int = 100_000, phased: bool = True):
    """Return a DeepSpeed engine that trains the causal LM with a PhasedOptimizer, its `basic_optimizer`.

    All workers must call the engine, `backward` and `step` alike. At stage 3 the weights are sharded as they are read.
    The model stays in eval mode, without dropout, so that the inner loop sees what evaluation sees.

    Args:
        whole_below: parameters with fewer elements stay whole on every worker.
        phased: False uses the plain outer optimizer: ordinary training, for comparison in the benchmark.

    Raises:
        ConfigError: a pattern matches no parameter.
    """
    deepspeed = _deepspeed(device)
    settings = full_settings(config, device, whole_below)
    sharded = settings if config.zero.stage == 3 else None
    model = load_base(path, config.model.dtype, config.model.attention, sharded)
    trained = trained_parameters(model, config.full)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    groups = parameter_groups(trained, config.inner.lr, config.inner.modules, config.outer.weight_decay)
    # A fused optimizer needs no buffer of a shard's size.
    outer = OPTIMIZERS[config.outer.optimizer](groups, lr=config.outer.lr, fused=True)
    optimizer = PhasedOptimizer(outer) if phased else outer
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    engine.module.eval()
    if config.model.activation_checkpointing:
        checkpoint_activations(engine.module)
    return engine


def full_settings(config: Config, device: torch.device, whole_below: int) -> dict[str, Any]:
    """Return DeepSpeed's settings for training the model."""
    zero, to_cpu = config.zero, {"device": "cpu", "pin_memory": device.type == "cuda"}
    sharding: dict[str, Any] = {
        "stage": zero.stage,
        "stage3_param_persistence_threshold": whole_below,
        "reduce_bucket_size": 50_000_000,  # elements; the default takes a GB or two on every worker
    }
    if zero.offload != "none":
        sharding["offload_optimizer"] = to_cpu
    if zero.offload == "all":
        sharding["offload_param"] = to_cpu
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": sharding,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # A step with a gradient that is not finite must be skipped, in bf16 too.
        "bf16": {"enabled": config.model.dtype == "bfloat16", "check_grad_overflow": True},
        "communication_data_type": "fp32",  # bf16 sums over many workers round away how the tasks differ
        "gradient_clipping": 0.0,  # DeepSpeed's default would clip every inner step at 1
        "steps_per_print": None,
    }


def consolidate(checkpoint: str | Path) -> dict[str, Tensor]:
    """Return all weights of a checkpoint of mode full, whole and in fp32, on this process alone.

    They include frozen and tied weights, so that `model.save_pretrained(folder, state_dict=...)` writes a whole model.
    This takes CPU memory for about two fp32 copies, and reads pickles: use it only on a run folder that you trust.
    """
    _deepspeed(torch.device("cpu"), communicates=False)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # it prints a lot
        state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=TAG)
    return {name: weight.detach().float() for name, weight in state.items()}


def _deepspeed(device: torch.device, communicates: bool = True):
    """Return the module deepspeed, which is imported nowhere else, ready to communicate with the other workers."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed probes for accelerators
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as compatible_ops

    compatible_ops[SHARED_MEMORY] = False  # an all-reduce in one CPU machine, which takes half a minute to compile
    clear_release_caches_with_trace()
    if communicates:
        deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


# The rest uses DeepSpeed's internals. pyproject.toml pins the tested versions; `tests/test_internals.py` shows what a
# newer one broke.


def coordinator() -> Any:
    """Return the class that gathers and releases stage 3's weights."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    return PartitionedParameterCoordinator


def release_caches() -> list[Any]:
    """Return the caches of which weights may be released after a layer: they are in a decorated method's closure."""
    cells = getattr(coordinator(), RELEASES).__closure__ or ()
    return [cell.cell_contents for cell in cells if hasattr(cell.cell_contents, "cache_clear")]


def clear_release_caches_with_trace() -> None:
    """Make stage 3 clear its release caches whenever it invalidates the trace of layers that they were computed for.

    DeepSpeed 0.19 keeps them after a forward without a backward, such as in scoring. Training then releases weights
    that its backward needs, and gathers the model twice as often as necessary.
    """
    caches, invalidate = release_caches(), getattr(coordinator(), INVALIDATE)
    if hasattr(invalidate, "__wrapped__"):
        return

    @wraps(invalidate)
    def invalidate_all(self: Any) -> None:
        for cache in caches:
            cache.cache_clear()
        invalidate(self)

    setattr(coordinator(), INVALIDATE, invalidate_all)


def client_optimizer(engine: Any) -> Any:
    """Return the optimizer that an engine was given, inside the one that shards its state."""
    return engine.basic_optimizer


def set_clip_norm(engine: Any, norm: float) -> None:
    """Make the engine's next steps clip the gradient to a norm; 0 does not clip."""
    engine.optimizer.clip_grad = norm


def step_was_skipped(engine: Any) -> bool:
    """Return whether the engine skipped its last step because the gradient was not finite."""
    return bool(engine.optimizer.overflow)


def is_sharded(parameter: Any) -> bool:
    """Return whether stage 3 shards a parameter, so that this worker has only a part of it."""
    return hasattr(parameter, "ds_id")
