"""The sharded engine: a frozen base under DeepSpeed ZeRO-3 (Rajbhandari et al. 2020, arXiv 1910.02054).

Each worker keeps 1/W of every parameter and gathers a layer's whole weights only while that layer runs. Adapters live
outside the engine, whole on every worker: they are small, and every worker needs all of them.
"""

import os

import torch

from rayml.lm.load import load_base


def load(path: str, dtype: str, attention: str, device: torch.device, whole_below: int = 100_000):
    """Return the module of a DeepSpeed engine around the frozen causal LM.

    Call the module, not the engine: without an optimizer the engine's own forward breaks the backward. Every worker
    must make the same calls in the same order, for each gathers from all others. Parameters of fewer than
    `whole_below` elements stay whole on every worker.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares DeepSpeed the probing
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as built_at_first_use

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": whole_below},
        "bf16": {"enabled": dtype == "bfloat16"},
        "gradient_clipping": 0.0,  # DeepSpeed's default would clip at 1
    }
    # A shared-memory all-reduce, which a frozen base never calls: building it takes a compiler and half a minute.
    built_at_first_use["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
    engine, *_ = deepspeed.initialize(model=load_base(path, dtype, attention, config), config=config)
    return engine.module
