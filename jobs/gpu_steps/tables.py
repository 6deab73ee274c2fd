"""The report's tables, one for each step."""

import statistics
from collections.abc import Iterator
from typing import Any

from gpu_steps.found import OURS, Lines, failures, forward_tokens, gib, matmul_rate, mfu, of, ratio, spread, table
from gpu_steps.found import tasks_per_second as rate


def tables(lines: Lines) -> list[str]:
    """Return what was measured, in paragraphs of Markdown."""
    parts = [
        part
        for make in (machine, numerics, tasks, adaptation, large, full, run, writing, faster)
        for part in make(lines)
    ]
    failed = "\n".join(f"- {what}" for what in failures(lines)) or "nothing"
    ends = [
        (line["step"], line["ended"], f"{line['seconds']:.0f}", f"{line['limit']:.0f}") for line in of(lines, "end")
    ]
    return [*parts, "## What failed, or ran over its time", failed, table(("step", "", "seconds", "at most"), ends)]


def machine(lines: Lines) -> Iterator[str]:
    yield "# What was measured on a GPU"
    for line in of(lines, "command"):
        yield f"`{line['command']}`"
    for line in of(lines, "software"):
        packages = ", ".join(f"{name} {number}" for name, number in line["packages"].items())
        yield f"Python {line['python']}, {packages}; {line['driver'] or 'no driver'}; {line['cores']} cores."
    rows = [
        (line["device"], line["dtype"], f"{line['matmul_flops'] / 1e12:.3g}", f"{line['copy_bytes'] / 1e9:.4g}")
        for line in of(lines, "rates")
    ]
    yield table(("device", "dtype", "TFLOP/s in a large product", "GB/s in a copy, read and written"), rows)
    for line in of(lines, "launches"):
        yield f"A small kernel is launched in {line['seconds'] * 1e6:.3g} µs."
    for line in of(lines, "host copies"):
        yield "From the host, GB/s: " + ", ".join(f"{k} {v / 1e9:.3g}" for k, v in line["bytes_per_second"].items())


def numerics(lines: Lines) -> Iterator[str]:
    yield "## Numerics: how far from one task at a time in fp32"
    checks = [line for line in lines if "is_equal" in line]
    rows = [
        (
            line["name"],
            line["dtype"],
            f"{line['apart']:.1e}",
            f"{line['most']:.0e}",
            "yes" if line["is_equal"] else "**no**",
        )
        for line in checks
    ]
    yield table(("way", "dtype", "apart", "at most", "equal"), rows)


def tasks(lines: Lines) -> Iterator[str]:
    yield "## Tasks a second"
    rows = []
    for case in of(lines, "meta-gradient"):
        share = mfu(case, lines)
        for way, seconds in case["seconds"].items():
            beside = ratio(case["ratio"][way]) if way in case["ratio"] else ""
            of_rate = f"{share:.0%}" if share and way == OURS else ""
            rows.append((case["layers"], case["tasks"], way, spread(seconds), f"{rate(case, way):.3g}", beside,
                         gib(case["peak_bytes"][way]), of_rate, f"{forward_tokens(case):.0f}"))  # fmt: skip
    heads = "layers with adapters", "tasks", "way", "seconds", "tasks a second", "rayml is faster"
    yield table((*heads, "GiB beyond the model", "of the matmul rate", "tokens a forward"), rows)
    for line in of(lines, "left out"):
        missing = {name: why for name, why in line.items() if name not in ("step", "name")}
        yield "\n".join(f"- {name} is left out: {why}" for name, why in missing.items())


def adaptation(lines: Lines) -> Iterator[str]:
    yield "## From examples to an adapter"
    rows = [
        (
            case["examples"],
            case["clients"],
            f"{case['seconds']:.3g}",
            ratio(case["in_turn_over_together"]),
        )
        for case in of(lines, "adaptation")
    ]
    yield table(("examples", "tasks at once", "seconds", "one after the other, times that"), rows)


def large(lines: Lines) -> Iterator[str]:
    yield "## A whole outer step of the large model"
    flops = {case["model"]: case["flops"] for case in of(lines, "outer step's FLOPs")}
    top = matmul_rate(lines)
    rows = []
    for case in of(lines, "outer step"):
        typical = statistics.median(case["seconds"])
        share = f"{flops[case['model']] / typical / top:.0%}" if case["model"] in flops and top else ""
        checkpointing = "yes" if case["checkpointing"] else "no"
        speed = spread(case["seconds"]), f"{case['tokens_per_second']:.0f}", share
        rows.append((case["model"], case["tasks"], checkpointing, *speed, *map(gib, sizes(case))))
    heads = "model", "tasks", "checkpointing", "seconds", "tokens a second", "of the matmul rate"
    yield table((*heads, "GiB", "`rayml plan`, GiB"), rows)


def sizes(case: dict[str, Any]) -> tuple[int, int]:
    return case["peak_bytes"], case["planned_bytes"]


def full(lines: Lines) -> Iterator[str]:
    yield "## Mode full beside a plain AdamW step"
    rows = [
        (case["stage"], case["offload"], *(f"{case['seconds'][name]:.3g}" for name in ("plain", "adapt", "query")),
         *(ratio(tuple(case[k].values())) for k in ("adapt_over_plain", "query_over_plain")),
         gib(case["peak_bytes_of_both"]))
        for case in of(lines, "full")
    ]  # fmt: skip
    heads = "ZeRO stage", "offload", "plain, s", "inner step, s", "query step, s", "inner / plain", "query / plain"
    yield table((*heads, "both engines, GiB"), rows)


SCORES = "before", "after", "untrained_after"


def run(lines: Lines) -> Iterator[str]:
    yield "## A run through Ray Train"
    for line in of(lines, "run"):
        steps = statistics.median(step["step_seconds"] for step in line["last_steps"])
        yield (
            f"{line['model']} on {line['device']}, {line['precision']}: {line['steps']} outer steps in "
            f"{line['train_seconds']:.0f} s, {steps:.3g} s each."
        )
    for line in of(lines, "evaluation"):
        rows = [
            (name, *("{mean:.2f} [{low:.2f}, {high:.2f}]".format(**one[key]) for key in SCORES))
            for name, one in (*line["tasks"].items(), ("all", line["overall"]))
        ]
        yield table(("held-out task", "before", "after adapting", "untrained, after"), rows)


def writing(lines: Lines) -> Iterator[str]:
    yield "## Writing"
    rows = [
        (case["rows"], case["distinct"], *(f"{found:.0f}" for found in case["tokens_per_second"].values()),
         *(ratio(case[f"mixed_over_{way}"]) for way in ("base", "generate", "peft")))
        for case in of(lines, "writing")
    ]  # fmt: skip
    heads = "rows", "adapters", "generate", "base", "mixed", "PEFT", "mixed / base", "mixed / generate", "mixed / PEFT"
    yield table(heads, rows)


def faster(lines: Lines) -> Iterator[str]:
    yield "## What may make it faster"
    usual = next((statistics.median(case["seconds"]) for case in of(lines, "as it is")), None)
    rows = []
    for case in (case for case in lines if case["step"] == "faster" and "apart" in case):
        beside = case.get("eager_seconds")
        before = statistics.median(beside) if beside else usual
        times = f"{before / statistics.median(case['seconds']):.2f}" if before else ""
        rows.append((case["name"], spread(case["seconds"]), times, f"{case['apart']:.1e}"))
    yield table(("way", "seconds", "times as fast", "apart"), rows)
    for case in of(lines, "compiling"):
        yield f"To compile took {case['seconds']:.0f} s."
