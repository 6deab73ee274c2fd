"""Show a compression: a table of size, speed and score, before and after."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from rayml.tasks.statistics import resampled


def table(summary: dict[str, Any], title: str) -> Table:
    """Return a row for each number, in columns before and after compression."""
    metric, scores = summary["score"]["metric"], summary["score"]
    found = Table(box=SIMPLE_HEAD, title=title, title_justify="left", caption_justify="left")
    found.caption = f"seconds: median and quartiles, on this machine; scores: {resampled(scores['tasks'])}, both alike"
    for name in ("", "before", "after"):
        found.add_column(name, justify="right" if name else "left", no_wrap=True)
    sides = [summary[side] for side in ("before", "after")]
    found.add_row("base's weights on disk", *(megabytes(side["weights_bytes"]) for side in sides))
    found.add_row("  the first in the run's dtype", megabytes(summary["before"]["bytes_in_dtype"]), "")
    found.add_row("forward of an episode's queries", *(times(side["forward_seconds"]) for side in sides))
    found.add_row("adapting to an episode", *(times(side["adapt_seconds"]) for side in sides))
    for when, name in (("before", "as it stands"), ("after", "after adapting")):
        found.add_row(f"held-out {metric}, {name}", *(score(scores[side][when]) for side in ("before", "after")))
    apart = scores["difference"]
    difference = f"{apart['mean']:+.3f} [{apart['low']:+.3f}, {apart['high']:+.3f}]"
    found.add_row("  difference after adapting", "", difference)
    return found


def megabytes(count: int | None) -> str:
    return "not here" if count is None else f"{count / 1e6:.1f} MB"


def times(spread: dict[str, float]) -> str:
    return f"{spread['median']:.3f} s [{spread['low']:.3f}, {spread['high']:.3f}]"


def score(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.3f} ± {(interval['high'] - interval['low']) / 2:.3f}"
