"""Where meta-training starts from: LoRA's usual random start, or one that looks at the data first."""

from collections.abc import Sequence

import torch

from rayml.algorithms.inner_loop import Params
from rayml.config import Config
from rayml.lm.batch import TaskBatch, collate, decode_rows
from rayml.lm.encode import Encoder
from rayml.lm.lora import A, TaskLoRA
from rayml.lm.model import TaskLM
from rayml.lm.parameters import trained_parameters
from rayml.lm.soft_prompt import TaskPrompt
from rayml.tasks.task import Task

USUAL_DEVIATION = 3**-0.5
"""Of `A x` in each row, for inputs x of unit mean square, under the usual uniform start."""
LEAST_SHARE = 1e-3
"""A direction counts as varied from this share of the inputs' length on."""
MOST_ROWS = 1024
# Episodes that the start is taken from have seeds of their own, far from any training seed.
START_SEED = 3_000_017
START_EPISODES = 16


def untrained_start(config: Config, lm: TaskLM, encoder: Encoder, tasks: Sequence[Task]) -> Params:
    """Return where meta-training on these tasks begins, in fp32: for one seed the same for any number of workers."""
    readout = config.algorithm.prototypes
    return adapter_start(config, lm, encoder, tasks) | (readout.start() if readout else {})


def adapter_start(config: Config, lm: TaskLM, encoder: Encoder, tasks: Sequence[Task]) -> Params:
    """Return what `untrained_start` does of the adapter, or, in mode full, of the model."""
    if lm.adapter is None:
        return {name: p.detach().float().clone() for name, p in trained_parameters(lm.module, config.full).items()}
    words = isinstance(lm.adapter, TaskPrompt) and config.soft_prompt.start == "words"
    if not words and (isinstance(lm.adapter, TaskPrompt) or config.lora.start == "random"):
        return lm.adapter.untrained_start(config.seed)
    sampler, pad = config.data.sampler(START_SEED), encoder.pad
    episodes = [encoder.episode(sampler.episode(tasks, index)) for index in range(START_EPISODES)]
    if isinstance(lm.adapter, TaskPrompt):
        tokens = [token for e in episodes for row in e["support"]["tokens"] for token in row]
        return lm.adapter.start_from(tokens, config.seed)
    batches = [collate([decode_rows(e[side])], pad).to(lm.device) for e in episodes for side in ("support", "query")]
    return principal_start(lm, batches, config.seed)


def principal_start(lm: TaskLM, batches: Sequence[TaskBatch], seed: int) -> Params:
    """Return a start whose `A` reads what varies between examples, with `B` zero as usual.

    The rows of A are the leading principal directions of what a linear sees at the target positions, each scaled to
    the usual deviation (after EVA, Paischer et al. 2024, arXiv 2410.07170). A random A mostly sees what all examples
    share: that limits the stable inner rate, and tells nothing apart.

    Args:
        batches: a few dozen rows or more in all; where fewer than r directions vary, the other rows stay random.
    """
    assert isinstance(lm.adapter, TaskLoRA)
    start = lm.adapter.untrained_start(seed)
    seen: list[Params] = []
    rows = 0
    for batch in batches:
        if rows < MOST_ROWS:
            seen.append(lm.target_inputs(batch))
            rows += len(next(iter(seen[-1].values())))
    for name in lm.adapter.linears:
        inputs = torch.cat([part[name] for part in seen])[:MOST_ROWS].cpu()
        _, deviations, directions = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False)
        deviations = deviations / len(inputs) ** 0.5
        # Where all examples end alike, the first layer sees no variation at all: nothing there to scale up.
        varied = int((deviations > LEAST_SHARE * inputs.square().sum(1).mean().sqrt()).sum())
        rank = min(lm.adapter.rank, varied)
        start[name + A][:rank] = directions[:rank] * (USUAL_DEVIATION / deviations[:rank, None])
    return start
