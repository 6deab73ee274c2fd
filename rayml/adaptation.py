"""Learn new tasks from a handful of examples each, from a run's start: on the command line one, in a server many."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from rayml.algorithms.base import Algorithm
from rayml.algorithms.inner_loop import Params, TaskLosses, adapt_in_parts
from rayml.errors import DataError
from rayml.lm.encode import fields
from rayml.lm.fine_tuning import special_steps
from rayml.lm.peft_files import AdapterCard
from rayml.lm.rows import TokenRow
from rayml.lm.sides import TaskSide
from rayml.tasks.episodes import LETTERS, relabel, shown_labels
from rayml.tasks.row import Row
from rayml.tasks.table import LABELS, build_tasks
from rayml.tasks.task import Task

if TYPE_CHECKING:
    from rayml.model import MetaModel


@dataclass(frozen=True)
class AdaptationRequest:
    """A new task as the model is to see it."""

    rows: list[TokenRow]
    labels: list[list[int]]
    """The tokens of those that it chooses among; none for the whole vocabulary."""
    classes: list[int]
    """Of the rows; none for free text."""
    card: AdapterCard


def new_task(rows: Sequence[Row], name: str, labels: bool, kind: str = "") -> Task:
    """Return the one task of these rows, whatever `task` they name.

    Args:
        labels: take the targets for labels, also where each stands once, as long as there are two.
        kind: of rows that do not say.

    Raises:
        DataError: one text under two labels.
    """
    targets = tuple(sorted({row.target for row in rows}))
    # A label or a text is seen by its targets.
    rows = [replace(row, kind=row.kind or kind) for row in rows] if kind not in ("label", "text") else rows
    if labels and len(targets) > 1 and rows[0].kind in ("", *LABELS):
        rows = [replace(row, options=row.options or targets) for row in rows]
    (task,), duplicates = build_tasks(rows)
    if duplicates.conflicting:
        _, text, found = duplicates.conflicting[0]
        raise DataError(f"{text[:60]!r} stands under {' and '.join(found)}; keep one")
    return replace(task, name=name)


def adaptation_request(model: "MetaModel", task: Task) -> AdaptationRequest:
    """Show a task's examples in the way that the run was trained with.

    Raises:
        DataError: more classes than letters, no classes where the algorithm asks for them, or a target that cannot be
            learned.
    """
    config, algorithm = model.config, model.config.algorithm
    if config.data.labels == "letters" and len(task.options) > len(LETTERS):
        raise DataError(f"task {task.name!r} has {len(task.options)} classes; a run with data.labels=letters knows 26")
    algorithm.check([task])
    model.encoder.check([task])
    shown = shown_labels(task, task.options, config.data.labels)
    encoder = model.encoder.of(task.name, task.kind, shown.values())
    examples = [relabel(example, shown.get(example.target)) for example in task.examples]
    kept = examples if algorithm.keeps != "nothing" else []
    reads_prototypes = bool(task.options) and algorithm.prototypes is not None
    first_tokens = [of[0] for of in encoder.label_tokens(shown.values(), examples[0]) if of and reads_prototypes]
    settings = algorithm.settings() | ({} if reads_prototypes else {"readout": "labels"})  # free text has no classes
    card = AdapterCard(
        name=task.name,
        model=config.model.name,
        dtype=config.model.dtype,
        prompt=encoder.prompt,
        max_tokens=config.data.max_tokens,
        labels={label: option for option, label in shown.items()},
        lora=config.lora.shape() if config.mode == "adapters" and config.adapter == "lora" else {},
        soft_tokens=config.soft_tokens,
        algorithm=algorithm.name,
        settings=settings,
        label_tokens=first_tokens,
        label_loss=config.data.label_loss,
        kind=task.kind,
        ensemble=list(encoder.ensemble),
        scoring=encoder.scoring,
        shown=[(example.input, example.target) for example in kept],
        fields=fields_of(task),
        shown_parts=[list(example.parts) for example in kept] if any(example.parts for example in kept) else [],
    )
    labels = encoder.competing(shown.values(), examples[0])
    classes = [list(shown.values()).index(example.target) for example in examples] if task.options else []
    return AdaptationRequest(encoder.rows(examples, bool(task.options)), labels, classes, card)


def fields_of(task: Task) -> list[str] | None:
    """Return the fields of a task's inputs; None where they differ."""
    found = {fields(() if task.kind == "dialogue" else example.parts) for example in task.examples}
    return list(*found) if len(found) == 1 else None


Losses = list[float]


def adapt_requests(
    model: "MetaModel", requests: Sequence[AdaptationRequest], steps: Sequence[int], most_tokens: int | None = None
) -> Generator[int, None, list[tuple[Params, Losses]]]:
    """Adapt to T tasks side by side, each by its own number of inner steps; yields the steps taken so far.

    Args:
        most_tokens: of the examples that run at a time, where there is one task and its losses are a sum over
            examples; then there are several yields for each step. None: all of them.

    Returns:
        each task's weights, `[...]`, with what its answers need of its support (`Algorithm.kept`), and its support
        losses before every step and after the last.
    """
    algorithm, every = model.config.algorithm, model.config.inner.unfreeze_every
    support = support_side(model, requests)
    sides = in_parts(model, requests, most_tokens)
    whole = float(sum(side.batch.counted().sum() for side in sides))
    shares = [float(side.batch.counted().sum()) / whole if len(sides) > 1 else 1.0 for side in sides]
    parts = [scaled(algorithm.support_losses(side), share) for side, share in zip(sides, shares, strict=True)]
    special = [special_steps(side, every)(losses) for side, losses in zip(sides, parts, strict=True)]
    descended: list[torch.Tensor] = []
    found: dict[int, Params] = {}
    fast: Params = {}
    taken = -1
    for adapted in adapt_in_parts(special, model.start, model.inner_lrs, max(steps), len(requests)):
        if adapted is not None:
            taken += 1
            if adapted.support_losses is not None:
                descended.append(adapted.support_losses)
            fast = adapted.fast
            found |= {t: {n: w[t].clone() for n, w in fast.items()} for t, last in enumerate(steps) if last == taken}
        yield taken
    with torch.no_grad():
        after = parts[0](fast)
    for losses in parts[1:]:
        yield taken  # outside of the block: others learn in between
        with torch.no_grad():
            after = after + losses(fast)
    descended.append(after)
    with torch.no_grad():
        own = {name: torch.stack([found[t][name] for t in range(len(steps))]) for name in fast}
        kept = algorithm.kept(support, own)
    curves = torch.stack(descended, dim=1).tolist()
    return [(found[t] | kept[t], curves[t][: last + 1]) for t, last in enumerate(steps)]


def support_side(model: "MetaModel", requests: Sequence[AdaptationRequest]) -> TaskSide:
    rows, labels, classes = zip(*((one.rows, one.labels, one.classes) for one in requests), strict=True)
    return TaskSide(model.lm, rows, labels, classes, model.encoder.pad)


def splits(model: "MetaModel") -> bool:
    """Return whether the losses of a task are a sum over its examples: not where prototypes compare them."""
    algorithm = model.config.algorithm
    return type(algorithm).support_losses is Algorithm.support_losses and not algorithm.prototypes


def in_parts(model: "MetaModel", requests: Sequence[AdaptationRequest], most_tokens: int | None) -> list[TaskSide]:
    """Return the support in parts of no more than so many tokens, one example at least, where it can be split."""
    request = requests[0]
    if most_tokens is None or len(requests) > 1 or not splits(model):
        return [support_side(model, requests)]
    size = max(1, most_tokens // max(len(row.tokens) for row in request.rows))
    starts = range(0, len(request.rows), size)
    some = [(request.rows[n : n + size], request.classes[n : n + size]) for n in starts]
    return [support_side(model, [replace(request, rows=rows, classes=classes)]) for rows, classes in some]


def scaled(losses: TaskLosses, share: float) -> TaskLosses:
    return losses if share == 1 else lambda weights: share * losses(weights)


def inner_steps(model: "MetaModel", steps: int | None) -> int:
    """Return how many steps a new task takes: those asked for, or the run's own; none where there are none to take."""
    config = model.config
    return 0 if not config.algorithm.takes_steps else config.inner.steps if steps is None else steps
