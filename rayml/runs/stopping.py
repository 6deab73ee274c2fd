"""When validation says that it is enough: derived from the run's records alone, so that a resumed run agrees."""

from collections.abc import Iterable, Sequence
from typing import Any


def val_score(record: dict[str, Any]) -> float | None:
    """Return a record's score on meta-val after adapting, the higher the better; None if there was no validation."""
    if "val_accuracy_after" in record:
        return record["val_accuracy_after"]
    return -record["val_loss_after"] if "val_loss_after" in record else None


def val_scores(records: Iterable[dict[str, Any]]) -> list[float]:
    """Return the scores of a run's validations, in order."""
    return [score for score in map(val_score, records) if score is not None]


def is_best(scores: Sequence[float]) -> bool:
    """Return whether the newest score is better than all before."""
    return bool(scores) and all(scores[-1] > score for score in scores[:-1])


def is_enough(scores: Sequence[float], patience: int) -> bool:
    """Return whether the newest `patience` validations were no better than the best before them; 0 is never enough."""
    return bool(patience and scores) and len(scores) - 1 - scores.index(max(scores)) >= patience
