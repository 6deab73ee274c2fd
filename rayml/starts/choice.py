"""Which start to take for a task if none is named: the one that does best on the task's own examples.

Every start learns one half of them and answers the other, and vice versa (two-fold cross-validation). The lowest loss
wins: with a dozen answers it tells more than the accuracy. configs/evidence/README.md has what this gains.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from rayml.errors import ConfigError
from rayml.tasks.read import Examples, rows_from_examples
from rayml.tasks.row import Row
from rayml.tasks.table import LABELS
from rayml.tasks.task import normalize_text

if TYPE_CHECKING:
    from rayml.model import MetaModel

ENCODER, LANGUAGE_MODEL = "minilm", "smollm2-135m"
MOST_LABELS, MOST_EACH = 8, 4
"""How many labels, and examples of each, are used: more take longer, and tell little more."""
MIN_PROBABILITY = 1e-6
"""Bounds the loss of an answer, so that no single one decides."""


class Choice(NamedTuple):
    """A start, and why it is that one."""

    model: "MetaModel"
    why: str
    losses: dict[str, float]
    """By the names of the starts that were tried: the mean negative log-probability of the right answers."""


def choose_start(examples: Examples, *, among: Sequence[str] = (ENCODER, LANGUAGE_MODEL)) -> Choice:
    """Return the start that does best on a task's own examples, loaded.

    If at least two labels have two examples or more, each start learns one half of these and answers the other, and
    vice versa; the lowest loss wins. Otherwise nothing can be tried, and the first of `among` is taken that suits the
    kind of task: a sentence encoder can only answer with labels.

    Args:
        examples: as `MetaModel.adapt` takes them.
        among: starts, or run folders. Those that are not installed are left out, unless none is.

    Raises:
        ConfigError: none of them can be loaded.
        DataError: examples that cannot be read.
    """
    from rayml.model import load

    rows = rows_from_examples(examples)
    suitable, why = starts_for_kind(rows, among)
    first_half, second_half = ([], []) if why else split_halves(rows)
    models: dict[str, MetaModel] = {}
    load_error = None
    for name in suitable:
        try:
            models[name] = load(name)
        except ConfigError as error:
            load_error = error
        if models and not first_half:
            break
    if not models:
        assert load_error is not None
        raise load_error
    name, model = next(iter(models.items()))
    if not first_half:
        reasons = [why or "no label has two examples to choose by", *([str(load_error)] if load_error else [])]
        return Choice(model, f"{name}: {'; '.join(reasons)}", {})
    if len(models) == 1:
        return Choice(model, f"{name}: {load_error or 'no other was named'}", {})
    scores = {name: cross_validate(model, first_half, second_half) for name, model in models.items()}
    losses = {name: loss for name, (loss, _) in scores.items()}
    best = min(losses, key=losses.__getitem__)
    total = len(first_half) + len(second_half)
    summary = ", ".join(f"{name} {right} of {total} (loss {loss:.2f})" for name, (loss, right) in scores.items())
    why = f"{best}: each half of the examples answered after learning the other: {summary}"
    return Choice(models[best], why, losses)


def starts_for_kind(rows: Sequence[Row], among: Sequence[str]) -> tuple[Sequence[str], str]:
    """Return the starts that suit this kind of task, and why not all of them do; "" if they do."""
    if any(row.kind not in ("", *LABELS) for row in rows) or not have_labels(rows):
        return [name for name in among if name != ENCODER] or among, "a language model, since the answers are no labels"
    return among, ""


def have_labels(rows: Sequence[Row]) -> bool:
    """Return whether any target is repeated, or options are given."""
    return any(row.options for row in rows) or max(Counter(row.target for row in rows).values(), default=0) > 1


def split_halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return two halves of the rows of some labels, every label in both; nothing if there are no two such labels.

    A text that comes twice is taken once: none is asked that was learned.
    """
    by_label: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        by_label[row.target].setdefault(normalize_text(row.input), row)
    labels = tuple(label for label, label_rows in by_label.items() if len(label_rows) > 1)[:MOST_LABELS]
    if len(labels) < 2:
        return [], []
    groups = [[replace(row, options=labels) for row in [*by_label[label].values()][:MOST_EACH]] for label in labels]
    return [row for group in groups for row in group[::2]], [row for group in groups for row in group[1::2]]


def cross_validate(model: "MetaModel", first: Sequence[Row], second: Sequence[Row]) -> tuple[float, int]:
    """Return the mean loss of each half's answers after learning the other half, and how many are right."""
    adapters = model.adapt_many({"first": list(first), "second": list(second)})
    losses, right = [], 0
    for adapter, rows in ((adapters["first"], second), (adapters["second"], first)):
        for answer, row in zip(adapter.predict([dict(row.parts) or row.input for row in rows]), rows, strict=True):
            losses.append(-math.log(max(answer.probabilities[row.target], MIN_PROBABILITY)))
            right += answer.label == row.target
    return fmean(losses), right
