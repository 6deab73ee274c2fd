"""Learn new tasks from a few examples each, from a run's start: one on the command line, many at once in a server."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from rayml.algorithms.base import Algorithm
from rayml.algorithms.inner_loop import Params, TaskLosses, adapt_in_parts
from rayml.errors import DataError
from rayml.lm.check_tasks import check_tasks
from rayml.lm.encode import fields
from rayml.lm.fine_tuning import inner_loss_transform
from rayml.lm.peft_files import AdapterCard
from rayml.lm.rows import TokenRow
from rayml.lm.sides import TaskSide
from rayml.tasks.episodes import LETTERS, relabel, shown_labels
from rayml.tasks.row import Row
from rayml.tasks.table import FREE_TEXT, LABELS, build_tasks
from rayml.tasks.task import Task

if TYPE_CHECKING:
    from rayml.model import MetaModel


@dataclass(frozen=True)
class AdaptationRequest:
    """A new task as the model sees it."""

    rows: list[TokenRow]
    labels: list[list[int]]
    """Token sequences of the labels that compete with each other; none if the whole vocabulary competes."""
    classes: list[int]
    """Class index of each row; empty for free text."""
    card: AdapterCard


def new_task(rows: Sequence[Row], name: str, labels: bool, kind: str = "") -> Task:
    """Return the rows as one task, whatever `task` they name.

    Args:
        labels: take two different targets or more for labels, even if each occurs only once.
        kind: the kind of rows that do not name one; given options, only one that has labels.

    Raises:
        DataError: the same text has two labels.
    """
    targets = tuple(sorted({row.target for row in rows}))
    is_choice = kind in FREE_TEXT and any(row.options for row in rows)
    if kind not in ("label", "text") and not is_choice:  # plain labels and texts are recognized by their targets
        rows = [replace(row, kind=row.kind or kind) for row in rows]
    if labels and len(targets) > 1 and rows[0].kind in ("", *LABELS):
        rows = [replace(row, options=row.options or targets) for row in rows]
    (task,), duplicates = build_tasks(rows)
    if duplicates.conflicting:
        _, text, conflicting = duplicates.conflicting[0]
        raise DataError(f"{text[:60]!r} stands under {' and '.join(conflicting)}; keep one")
    return replace(task, name=name)


def adaptation_request(model: "MetaModel", task: Task) -> AdaptationRequest:
    """Encode a task's examples in the same way as the run's training tasks.

    Raises:
        DataError: more classes than letters, no classes where the algorithm needs them, or a target that cannot be
            learned.
    """
    config, algorithm = model.config, model.config.algorithm
    if config.data.labels == "letters" and len(task.options) > len(LETTERS):
        raise DataError(f"task {task.name!r} has {len(task.options)} classes; a run with data.labels=letters knows 26")
    algorithm.check([task])
    check_tasks(model.encoder, [task])
    label_names = shown_labels(task, task.options, config.data.labels)  # from the user's labels to what the model sees
    encoder = model.encoder.for_task(task.name, task.kind, label_names.values())
    examples = [relabel(example, label_names.get(example.target)) for example in task.examples]
    kept_examples = encoder.shown(examples, bool(task.options)) if algorithm.keeps != "states" else examples
    settings = algorithm.settings()
    first_tokens: list[int] = []
    if task.options and algorithm.prototypes is not None:
        first_tokens = [tokens[0] for tokens in encoder.label_tokens(label_names.values(), examples[0]) if tokens]
    else:
        settings["readout"] = "labels"  # free text has no classes, and so no prototypes
    card = AdapterCard(
        name=task.name,
        model=config.model.name,
        dtype=config.model.dtype,
        prompt=encoder.prompt,
        max_tokens=config.data.max_tokens,
        labels={shown: own for own, shown in label_names.items()},
        lora=config.lora_shape,
        soft_tokens=config.soft_tokens,
        algorithm=algorithm.name,
        settings=settings,
        label_tokens=first_tokens,
        label_loss=config.data.label_loss,
        kind=task.kind,
        ensemble=list(encoder.ensemble),
        scoring=encoder.scoring,
        shown=[(example.input, example.target) for example in kept_examples],
        fields=common_fields(task),
        shown_parts=[list(e.parts) for e in kept_examples] if any(e.parts for e in kept_examples) else [],
    )
    labels = encoder.competing_tokens(label_names.values(), examples[0])
    rows, classes = encoder.support(examples, list(label_names.values()))
    return AdaptationRequest(rows, labels, classes, card)


def common_fields(task: Task) -> list[str] | None:
    """Return the input fields that all examples of a task have; None if they differ."""
    all_fields = {fields(() if task.kind == "dialogue" else example.parts) for example in task.examples}
    return list(*all_fields) if len(all_fields) == 1 else None


Losses = list[float]


def adapt_requests(
    model: "MetaModel", requests: Sequence[AdaptationRequest], steps: Sequence[int], most_tokens: int | None = None
) -> Generator[int, None, list[tuple[Params, Losses]]]:
    """Adapt to T tasks side by side, each with its own number of inner steps; yield the number of steps taken so far.

    Args:
        most_tokens: tokens of the examples that run at a time, for one task whose loss is a sum over its examples; it
            then yields several times per step. None: all examples run together.

    Returns:
        each task's weights, `[...]`, together with what its answers need of its support (`Algorithm.kept`), and its
        support losses before every step and after the last.
    """
    algorithm = model.config.algorithm
    support = support_side(model, requests)
    parts = support_parts(model, requests, most_tokens)
    total = float(sum(part.batch.loss_mask().sum() for part in parts))
    part_losses, descended_losses = [], []
    for part in parts:
        # A part's loss is a mean: it counts in proportion to what it is a mean over.
        share = float(part.batch.loss_mask().sum()) / total if len(parts) > 1 else 1.0
        losses = scale_losses(algorithm.support_losses(part), share)
        part_losses.append(losses)
        descended_losses.append(inner_loss_transform(part, model.config.inner.unfreeze_every)(losses))
    curve: list[torch.Tensor] = []
    learned: dict[int, Params] = {}
    fast: Params = {}
    step = -1
    for adapted in adapt_in_parts(descended_losses, model.start, model.inner_lrs, max(steps), len(requests)):
        if adapted is not None:
            step += 1
            if adapted.support_losses is not None:
                curve.append(adapted.support_losses)
            fast = adapted.fast
            for task, last in enumerate(steps):
                if step == last:
                    learned[task] = {name: weight[task].clone() for name, weight in fast.items()}
        yield step
    with torch.no_grad():
        final_losses = part_losses[0](fast)
    for losses in part_losses[1:]:
        yield step  # outside of `no_grad`, since other tasks may learn in between
        with torch.no_grad():
            final_losses = final_losses + losses(fast)
    curve.append(final_losses)
    with torch.no_grad():
        stacked = {name: torch.stack([learned[task][name] for task in range(len(steps))]) for name in fast}
        kept = algorithm.kept(support, stacked)
    curves = torch.stack(curve, dim=1).tolist()
    return [(learned[task] | kept[task], curves[task][: last + 1]) for task, last in enumerate(steps)]


def support_side(model: "MetaModel", requests: Sequence[AdaptationRequest]) -> TaskSide:
    rows, labels, classes = zip(*((request.rows, request.labels, request.classes) for request in requests), strict=True)
    return TaskSide(model.lm, rows, labels, classes, model.encoder.pad)


def can_split_support(model: "MetaModel") -> bool:
    """Return whether the loss of a task is a sum over its examples. With prototypes it is not: examples interact."""
    algorithm = model.config.algorithm
    return type(algorithm).support_losses is Algorithm.support_losses and not algorithm.prototypes


def support_parts(model: "MetaModel", requests: Sequence[AdaptationRequest], most_tokens: int | None) -> list[TaskSide]:
    """Return the support in parts of at most `most_tokens` tokens, but at least one example, where it can be split."""
    request = requests[0]
    if most_tokens is None or len(requests) > 1 or not can_split_support(model):
        return [support_side(model, requests)]
    size = max(1, most_tokens // max(len(row.tokens) for row in request.rows))
    parts = []
    for first in range(0, len(request.rows), size):
        part = slice(first, first + size)
        parts.append(replace(request, rows=request.rows[part], classes=request.classes[part]))
    return [support_side(model, [part]) for part in parts]


def scale_losses(losses: TaskLosses, share: float) -> TaskLosses:
    return losses if share == 1 else lambda weights: share * losses(weights)


def inner_steps(model: "MetaModel", steps: int | None) -> int:
    """Return the number of steps of a new task: `steps`, or else the run's; 0 if its algorithm takes none."""
    config = model.config
    if not config.algorithm.takes_steps:
        return 0
    return config.inner.steps if steps is None else steps
