"""The sharded engines: DeepSpeed ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054).

At stage 3 each worker keeps 1/W of every parameter and gathers a layer's whole weights only while that layer runs.
`load` shards a frozen base; adapters live outside the engine, whole on every worker: they are small, and every worker
needs all of them. `load_full` trains the model itself.
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

    Call the module, not the engine: without an optimizer the engine's own forward breaks the backward. Every worker
    must make the same calls in the same order, for each gathers from all others. Parameters of fewer than
    `whole_below` elements stay whole on every worker.
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

    Call the engine, `backward` and `step` on every worker alike. At stage 3 the weights are sharded as they are read.
    The model stays in eval mode, without dropout: the inner loop has to see what evaluation sees.

    Args:
        whole_below: parameters of fewer elements stay whole on every worker.
        phased: False leaves the outer optimizer by itself: ordinary training, which the benchmark compares with.

    Raises:
        ConfigError: a pattern of parameters that fits none.
    """
    deepspeed = _deepspeed(device)
    settings = full_settings(config, device, whole_below)
    sharded = settings if config.zero.stage == 3 else None
    model = load_base(path, config.model.dtype, config.model.attention, sharded)
    trained = trained_parameters(model, config.full)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    outer = outer_optimizer(trained, config)
    optimizer = PhasedOptimizer(outer) if phased else outer
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    engine.module.eval()
    if config.model.activation_checkpointing:
        checkpoint_activations(engine.module)
    return engine


def outer_optimizer(trained: dict[str, torch.nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """Return the outer optimizer over what is trained; the fused kind needs no buffer of a shard's size."""
    groups = parameter_groups(trained, config.inner.lr, config.inner.modules, config.outer.weight_decay)
    return OPTIMIZERS[config.outer.optimizer](groups, lr=config.outer.lr, fused=True)


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
        # A gradient that is not finite must not be stepped on, in bf16 neither.
        "bf16": {"enabled": config.model.dtype == "bfloat16", "check_grad_overflow": True},
        "communication_data_type": "fp32",  # bf16 sums over many workers lose what the tasks differ in
        "gradient_clipping": 0.0,  # DeepSpeed's default would clip every inner step at 1
        "steps_per_print": None,
    }


def consolidate(checkpoint: str | Path) -> dict[str, Tensor]:
    """Return all weights of a checkpoint of mode full, whole and in fp32, on this process alone.

    Frozen and tied weights are among them: `model.save_pretrained(folder, state_dict=...)` writes a whole model.
    It takes the CPU memory of about two fp32 copies, and reads pickles: only of a run folder that you trust.
    """
    _deepspeed(torch.device("cpu"), talks=False)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # it talks a lot
        state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=TAG)
    return {name: weight.detach().float() for name, weight in state.items()}


def _deepspeed(device: torch.device, talks: bool = True):
    """Return the module deepspeed, imported here and nowhere else, and ready to talk to the other workers."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares DeepSpeed the probing
    import deepspeed

    build_no_shared_memory()
    forget_with_the_trace()
    if talks:
        deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


# What we take from DeepSpeed without its promise to keep it. pyproject.toml bounds it to what this was tested with;
# `tests/test_internals.py` says what a newer one broke.


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
