"""The start of meta-training: LoRA's usual random one, or one that is computed from data."""

from collections.abc import Sequence
from itertools import accumulate

import torch

from rayml.algorithms.inner_loop import Params
from rayml.config import Config
from rayml.lm.batch import TaskBatch, collate
from rayml.lm.encode import Encoder
from rayml.lm.frozen import ALONE, WorkerShare
from rayml.lm.lora import A, TaskLoRA
from rayml.lm.model import TaskLM
from rayml.lm.parameters import trained_parameters
from rayml.lm.rows import decode_rows
from rayml.lm.soft_prompt import TaskPrompt
from rayml.tasks.task import Task

USUAL_DEVIATION = 3**-0.5
"""Standard deviation of each row of `A x` under the usual uniform start, for inputs x of unit mean square."""
LEAST_DEVIATION = 1e-3
"""Inputs count as varying along a direction from this standard deviation on, relative to their RMS norm."""
MOST_ROWS = 512
# The episodes that the start is computed from have seeds far from any training seed.
START_SEED = 3_000_017
START_EPISODES = 16


def untrained_start(
    config: Config, lm: TaskLM, encoder: Encoder, tasks: Sequence[Task], share: WorkerShare = ALONE
) -> Params:
    """Return the start of meta-training on these tasks, in fp32; it does not depend on the number of workers.

    Args:
        share: this worker's share of the work.
    """
    readout = config.algorithm.prototypes
    return adapter_start(config, lm, encoder, tasks, share) | (readout.start() if readout else {})


def adapter_start(config: Config, lm: TaskLM, encoder: Encoder, tasks: Sequence[Task], share: WorkerShare) -> Params:
    """Return the start of the adapter, or of the model's own parameters in mode full."""
    if lm.adapter is None:
        return {name: p.detach().float().clone() for name, p in trained_parameters(lm.module, config.full).items()}
    if (config.soft_prompt if isinstance(lm.adapter, TaskPrompt) else config.lora).start == "random":
        return lm.adapter.untrained_start(config.seed)
    sampler, pad = config.data.sampler(START_SEED), encoder.pad
    episodes = [encoder.episode(sampler.episode(tasks, index)) for index in range(START_EPISODES)]
    if isinstance(lm.adapter, TaskPrompt):
        tokens = [token for e in episodes for row in e["support"]["tokens"] for token in row]
        return lm.adapter.start_from(tokens, config.seed)
    batches = [collate([decode_rows(e[side])], pad).to(lm.device) for e in episodes for side in ("support", "query")]
    return principal_start(lm, batches, config.seed, share)


def principal_start(lm: TaskLM, batches: Sequence[TaskBatch], seed: int, share: WorkerShare = ALONE) -> Params:
    """Return a start whose `A` projects onto what varies between examples, with `B` zero as usual.

    The rows of A are the leading principal directions of a linear's inputs at the target positions, each scaled to the
    usual deviation (after EVA, Paischer et al. 2024, arXiv 2410.07170). A random A mostly sees what all examples have
    in common, which limits the stable inner rate, and tells no examples apart.

    Args:
        batches: a few dozen rows or more in all; if fewer than r directions vary, the other rows of A stay random.
        share: this worker's share of the batches.
    """
    assert isinstance(lm.adapter, TaskLoRA)
    start = lm.adapter.untrained_start(seed)
    sizes = [len(lm.target_positions(batch)) for batch in batches]
    needed = sum(rows_before < MOST_ROWS for rows_before in accumulate(sizes[:-1], initial=0))
    batches, sizes = batches[:needed], sizes[:needed]
    if len(batches) < share.workers:
        share = ALONE
    by_batch = [lm.target_inputs(batch) for batch in share.of(batches)]
    for names in group_by_input(by_batch):
        inputs = share.join(torch.cat([linears[names[0]] for linears in by_batch]), sizes)[:MOST_ROWS].cpu()
        _, deviations, directions = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False)
        deviations = deviations / len(inputs) ** 0.5
        # If all examples end alike, the inputs of the first layer do not vary at all, and there is nothing to scale up.
        varied = int((deviations > LEAST_DEVIATION * inputs.square().sum(1).mean().sqrt()).sum())
        rank = min(lm.adapter.rank, varied)
        for name in names:
            start[name + A][:rank] = directions[:rank] * (USUAL_DEVIATION / deviations[:rank, None])
    return start


def group_by_input(by_batch: Sequence[Params]) -> list[list[str]]:
    """Return the names of linears in groups that have the same input tensors.

    Args:
        by_batch: the input of each linear, for every batch.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in by_batch[0]:
        groups.setdefault(tuple(id(linears[name]) for linears in by_batch), []).append(name)
    return list(groups.values())
