"""The goals, each beside what was measured; and the lines for the README."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

from gpu_steps.found import GIB, OURS, Lines, forward_tokens, mfu, of, table, tasks_per_second

BUSY = 8192
"""Tokens of a forward, from which on the device is to be busy."""


class Goal(NamedTuple):
    text: str
    measure: Callable[[Lines], float | None]
    """None, if it was not measured."""
    is_reached: Callable[[float], bool]
    shown: str = "{:.3g}"


def faster_than_peers(lines: Lines) -> float | None:
    """Return our best rate over that of the best peer, where it is least: adapters in all layers, or in a third."""
    found = []
    cases = of(lines, "meta-gradient")
    for layers in {case["layers"] for case in cases}:
        some = [case for case in cases if case["layers"] == layers]
        ours = max(tasks_per_second(case, OURS) for case in some)
        theirs = [tasks_per_second(case, way) for case in some for way in case["seconds"] if way != OURS]
        found += [ours / max(theirs)] if theirs else []
    return min(found, default=None)


def memory_of_copies(lines: Lines) -> float | None:
    """Return our memory over that of `higher`, at equal tasks, where it is most."""
    cases = [case["peak_bytes"] for case in of(lines, "meta-gradient") if "higher" in case["peak_bytes"]]
    return max((peak[OURS] / peak["higher"] for peak in cases), default=None)


def busy(lines: Lines) -> float | None:
    cases = [case for case in of(lines, "meta-gradient") if forward_tokens(case) >= BUSY]
    return max((found for case in cases if (found := mfu(case, lines))), default=None)


def large(lines: Lines) -> float | None:
    """Return the GiB of a large model's outer step, with activation checkpointing or without."""
    return min((case["peak_bytes"] / GIB for case in of(lines, "outer step")), default=None)


def adapting(lines: Lines) -> float | None:
    found = [case["seconds"] for case in of(lines, "adaptation") if case["clients"] == 1 and case["examples"] <= 16]
    return max(found, default=None)


def inner_step(lines: Lines) -> float | None:
    cases = [case for case in of(lines, "full") if case["offload"] == "none"]
    return max((case["adapt_over_plain"]["median"] for case in cases), default=None)


def mixed(lines: Lines) -> float | None:
    return min((case["mixed_over_base"][0] for case in of(lines, "writing")), default=None)


def equal(lines: Lines) -> float | None:
    checks = [line["is_equal"] for line in lines if "is_equal" in line]
    return sum(checks) / len(checks) if checks else None


GOALS = [
    Goal("meta-gradients as one task at a time in fp32, share of the ways", equal, lambda found: found == 1),
    Goal("tasks a second, times the best peer's: at least 5", faster_than_peers, lambda found: found >= 5),
    Goal("memory, times that of `higher` at equal tasks: at most 0.5", memory_of_copies, lambda found: found <= 0.5),
    Goal(f"of the matmul rate, from {BUSY:,} tokens a forward on: at least 45 %", busy, lambda f: f >= 0.45, "{:.0%}"),
    Goal("an outer step of the large model on one card, GiB", large, lambda found: True),
    Goal("seconds from 16 examples to an adapter: at most 1", adapting, lambda found: found <= 1),
    Goal("inner step of mode full, times a plain one: at most 1.10", inner_step, lambda found: found <= 1.10),
    Goal("mixed adapters' tokens a second, times the bare base's: at least 0.9", mixed, lambda found: found >= 0.9),
]


def goals(lines: Lines) -> str:
    rows = []
    for goal in GOALS:
        found = goal.measure(lines)
        shown = "not measured" if found is None else goal.shown.format(found)
        rows.append((goal.text, shown, "" if found is None else "yes" if goal.is_reached(found) else "**no**"))
    return "\n\n".join(["## Goals", table(("goal", "measured", "reached"), rows), "## For the README", readme(lines)])


def readme(lines: Lines) -> str:
    """Return a sentence for each thing that was measured."""
    device = next((line["device"] for line in of(lines, "rates")), "device")
    parts = [*rates(lines), *whole_steps(lines)]
    if (seconds := adapting(lines)) is not None:
        parts.append(f"an adapter from 16 examples in {seconds:.2g} s")
    if (share := mixed(lines)) is not None:
        parts.append(f"texts under adapters of their own at {share:.2g} times the bare base's speed")
    return f"On one {device}: {'; '.join(parts) or 'nothing was measured'}."


def rates(lines: Lines) -> list[str]:
    cases = [case for case in of(lines, "meta-gradient") if case["layers"] == "all"]
    if not cases:
        return []
    best = max(cases, key=lambda case: tasks_per_second(case, OURS))
    loops = [tasks_per_second(case, "PEFT loop") for case in cases if "PEFT loop" in case["seconds"]]
    beside = f", where a PEFT loop does {max(loops):.3g}" if loops else ""
    return [f"{tasks_per_second(best, OURS):.3g} tasks a second ({best['model']}, {best['tasks']} at once{beside})"]


def whole_steps(lines: Lines) -> list[str]:
    return [
        f"an outer step of {case['tasks']} tasks of {case['model']} in {statistics.median(case['seconds']):.2g} s and "
        f"{case['peak_bytes'] / GIB:.3g} GiB{', with activation checkpointing' if case['checkpointing'] else ''}"
        for case in of(lines, "outer step")
    ]
