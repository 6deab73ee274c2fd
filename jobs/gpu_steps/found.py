"""What a report asks of the lines that were measured."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Lines = Sequence[dict[str, Any]]
GIB = 2**30
OURS = "rayml"


def of(lines: Lines, name: str) -> list[dict[str, Any]]:
    """Return the lines of a name that were measured."""
    return [line for line in lines if line["name"] == name and "failed" not in line]


def failures(lines: Lines) -> list[str]:
    """Say what failed, and which steps did not end by themselves."""
    failed = [f"{line['step']}, {described(line)}: {line['failed']}" for line in lines if "failed" in line]
    cases = [
        f"{line['step']}, {line['layers']} layers, {line['tasks']} tasks: {way}: {why}"
        for line in of(lines, "meta-gradient")
        for way, why in line["failed_ways"].items()
    ]
    ends = [
        f"{line['step']}: {line['ended']} after {line['seconds']:.0f} of {line['limit']:.0f} s"
        for line in of(lines, "end")
        if line["ended"] != "done"
    ]
    return [*failed, *cases, *ends]


def described(line: dict[str, Any]) -> str:
    case = {key: value for key, value in line.items() if key not in ("step", "name", "failed")}
    return " ".join([line["name"], *(f"{key}={value}" for key, value in case.items())])


def matmul_rate(lines: Lines, dtype: str | None = None) -> float | None:
    """Return the FLOP/s of a large product, in the dtype that all is measured in, or another."""
    rates = [line for line in of(lines, "rates") if dtype in (None, line["dtype"])]
    return rates[0]["matmul_flops"] if rates else None


def tasks_per_second(case: dict[str, Any], way: str) -> float:
    return case["tasks"] / statistics.median(case["seconds"][way])


def forward_tokens(case: dict[str, Any]) -> float:
    """Return the tokens of one forward of a meta-gradient, on average over its inner steps and the query."""
    return case["tokens"] / (case["inner_steps"] + 1)


def mfu(case: dict[str, Any], lines: Lines) -> float | None:
    """Return the share of the measured matmul rate that a case's meta-gradient has."""
    rate = matmul_rate(lines, case["dtype"])
    return case["flops"][OURS] / statistics.median(case["seconds"][OURS]) / rate if rate else None


def spread(seconds: Sequence[float]) -> str:
    """Return the median, and the least and the most."""
    return f"{statistics.median(seconds):.3g} [{min(seconds):.3g}, {max(seconds):.3g}]"


def ratio(values: Sequence[float]) -> str:
    """Return a median of ratios, and the lower and upper value beside it."""
    return "{:.2f} [{:.2f}, {:.2f}]".format(*values)


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    body = [f"| {' | '.join(map(str, row))} |" for row in rows]
    if not body:
        return "not measured"
    return "\n".join([f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *body])


def gib(count: float | None) -> str:
    return "" if count is None else f"{count / GIB:.3g}"
