"""Where meta-training starts from: LoRA's usual random start, or one that looks at the data first."""

from collections.abc import Sequence

import torch

from rayml.lm.batch import TaskBatch
from rayml.lm.lora import A
from rayml.lm.model import TaskLM
from rayml.meta.adapt import Params

USUAL_DEVIATION = 3**-0.5
"""Of `A x` in each row, for inputs x of unit mean square, under the usual uniform start."""


def principal_start(lm: TaskLM, batches: Sequence[TaskBatch], seed: int) -> Params:
    """Return a start whose `A` reads what varies between examples, with `B` zero as usual.

    The rows of A are the leading principal directions of what a linear sees at the target positions, each scaled to
    the usual deviation (after EVA, Paischer et al. 2024, arXiv 2410.07170). A random A mostly sees what all examples
    share: that limits the stable inner rate, and tells nothing apart.

    Args:
        batches: a few dozen rows or more in all; with fewer than r, the last rows of A stay random.
    """
    start = lm.lora.untrained_start(seed)
    seen = [lm.target_inputs(batch) for batch in batches]
    for name in lm.lora.linears:
        inputs = torch.cat([part[name] for part in seen]).cpu()
        _, deviations, directions = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False)
        rank = min(lm.lora.rank, len(inputs) - 1)
        scale = USUAL_DEVIATION / (deviations[:rank, None] / len(inputs) ** 0.5).clamp(min=1e-6)
        start[name + A][:rank] = directions[:rank] * scale
    return start
