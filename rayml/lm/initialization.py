"""Where meta-training starts from: LoRA's usual random start, or one that looks at the data first."""

from collections.abc import Sequence
from itertools import accumulate

import torch

from rayml.algorithms.inner_loop import Params
from rayml.config import Config
from rayml.lm.batch import TaskBatch, collate
from rayml.lm.encode import Encoder
from rayml.lm.frozen import ALONE, Share
from rayml.lm.lora import A, TaskLoRA
from rayml.lm.model import TaskLM
from rayml.lm.parameters import trained_parameters
from rayml.lm.sides import decode_rows
from rayml.lm.soft_prompt import TaskPrompt
from rayml.tasks.task import Task

USUAL_DEVIATION = 3**-0.5
"""Of `A x` in each row, for inputs x of unit mean square, under the usual uniform start."""
LEAST_SHARE = 1e-3
"""A direction counts as varied from this share of the inputs' length on."""
MOST_ROWS = 512
# Episodes that the start is taken from have seeds of their own, far from any training seed.
START_SEED = 3_000_017
START_EPISODES = 16


def untrained_start(
    config: Config, lm: TaskLM, encoder: Encoder, tasks: Sequence[Task], share: Share = ALONE
) -> Params:
    """Return where meta-training on these tasks begins, in fp32: for one seed the same for any number of workers.

    Args:
        share: this worker's, where the workers divide the work.
    """
    readout = config.algorithm.prototypes
    return adapter_start(config, lm, encoder, tasks, share) | (readout.start() if readout else {})


def adapter_start(config: Config, lm: TaskLM, encoder: Encoder, tasks: Sequence[Task], share: Share) -> Params:
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
    return principal_start(lm, batches, config.seed, share)


def principal_start(lm: TaskLM, batches: Sequence[TaskBatch], seed: int, share: Share = ALONE) -> Params:
    """Return a start whose `A` reads what varies between examples, with `B` zero as usual.

    The rows of A are the leading principal directions of what a linear sees at the target positions, each scaled to
    the usual deviation (after EVA, Paischer et al. 2024, arXiv 2410.07170). A random A mostly sees what all examples
    share: that limits the stable inner rate, and tells nothing apart.

    Args:
        batches: a few dozen rows or more in all; where fewer than r directions vary, the other rows stay random.
        share: this worker's, of the batches.
    """
    assert isinstance(lm.adapter, TaskLoRA)
    start = lm.adapter.untrained_start(seed)
    sizes = [len(lm.target_positions(batch)) for batch in batches]
    enough = sum(before < MOST_ROWS for before in accumulate(sizes[:-1], initial=0))
    batches, sizes = batches[:enough], sizes[:enough]
    if len(batches) < share.workers:
        share = ALONE
    seen = [lm.target_inputs(batch) for batch in share.of(batches)]
    for names in alike(seen):
        inputs = share.join(torch.cat([part[names[0]] for part in seen]), sizes)[:MOST_ROWS].cpu()
        _, deviations, directions = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False)
        deviations = deviations / len(inputs) ** 0.5
        # Where all examples end alike, the first layer sees no variation at all: nothing there to scale up.
        varied = int((deviations > LEAST_SHARE * inputs.square().sum(1).mean().sqrt()).sum())
        rank = min(lm.adapter.rank, varied)
        for name in names:
            start[name + A][:rank] = directions[:rank] * (USUAL_DEVIATION / deviations[:rank, None])
    return start


def alike(seen: Sequence[Params]) -> list[list[str]]:
    """Return the names of linears in groups that see the same tensors."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in seen[0]:
        groups.setdefault(tuple(id(part[name]) for part in seen), []).append(name)
    return list(groups.values())
