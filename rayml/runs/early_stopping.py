"""When validation says that it is enough: derived from the run's records alone, so that a resumed run agrees."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rayml.tasks.statistics import normalised


def val_score(record: dict[str, Any], when: str = "after") -> float | None:
    """Return a record's score on meta-val `before` or `after` adapting (`statistics.overall`): the higher the better.

    None if there was no validation; less than any other if something was not finite.
    """
    scores = [record.get(f"val_score_{when}")]
    scores += [normalised(m, record[key]) for m in ("accuracy", "loss") if (key := f"val_{m}_{when}") in record]
    score = next((score for score in scores if score is not None), None)  # older runs have no overall one
    return score if score is None or math.isfinite(score) else -math.inf


def val_scores(records: Iterable[dict[str, Any]]) -> list[float]:
    """Return the scores of a run's validations, in order."""
    return [score for score in map(val_score, records) if score is not None]


def is_best(scores: Sequence[float]) -> bool:
    """Return whether the newest score is better than all before."""
    return bool(scores) and all(scores[-1] > score for score in scores[:-1])


def is_enough(scores: Sequence[float], patience: int) -> bool:
    """Return whether the newest `patience` validations were no better than the best before them; 0 is never enough."""
    return bool(patience and scores) and len(scores) - 1 - scores.index(max(scores)) >= patience
