"""A benchmark's numbers as JSON, a table and plots."""

import json
import statistics
from pathlib import Path
from typing import Any

from rayml.runs.reports import file_pyplot

GIB = 2**30
OURS, LOOP = "rayml", "PEFT loop"


def write_report(result: dict[str, Any], folder: Path) -> None:
    """Write `benchmark.json`, `report.md` and its plots; print the report."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n")
    text = report(result)
    for key in axes(result["cases"]):
        draw_axis(result["cases"], key, folder / f"{key}.png")
        text += f"\n![Tasks a second and memory over {key}]({key}.png)\n"
    (folder / "report.md").write_text(text)
    print(text)


def report(result: dict[str, Any]) -> str:
    machine, first = result["machine"], result["cases"][0]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        f"`{result['command']}`, {result['date']}: {machine['name']}, {machine['threads']} threads; {versions}.",
        f"Measured here: {machine['matmul_flops'] / 1e12:.3g} TFLOP/s in a large {first['dtype']} product, "
        f"{machine['copy_bytes'] / 1e9:.3g} GB/s in a copy.",
        "",
        "| case | way | tasks a second | tokens a second | rayml is faster | memory beyond the model, GiB | apart |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        lines += rows(case)
    lines += [""]
    lines += [f"- {name} is left out: {why}." for name, why in (result["missing"] | first["failed"]).items()]
    return "\n".join([*lines, "", *floors(result), ""])


def rows(case: dict[str, Any]) -> list[str]:
    support, query = case["rows"]
    name = " ".join(case["changed"]) or (
        f"{case['model']}, {case['tasks']} tasks of {support} + {query} rows, {case['inner_steps']} inner steps"
    )
    found = []
    for way, seconds in case["seconds"].items():
        typical = statistics.median(seconds)
        ratio = "{:.2f} [{:.2f}, {:.2f}]".format(*case["ratio"][way]) if way in case["ratio"] else ""
        apart = f"{case['apart'][way]:.0e}" if way in case["apart"] else ""
        memory = f"{case['peak_bytes'][way] / GIB:.3g}"
        speeds = f"{case['tasks'] / typical:.3g} | {case['tokens'] / typical:.4g}"
        found.append(f"| {name} | {way} | {speeds} | {ratio} | {memory} | {apart} |")
        name = ""
    return found


def floors(result: dict[str, Any]) -> list[str]:
    """Return how far from the machine's own rates each case is."""
    machine = result["machine"]
    lines = [
        "| case | TFLOPs | at the rate, s | weights read, GiB | at the rate, s | measured, s | of the matmul rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        flops, typical = case["flops"][OURS], statistics.median(case["seconds"][OURS])
        read = case["weight_bytes_read"]
        by_flops, by_bytes = flops / machine["matmul_flops"], read / (machine["copy_bytes"] / 2)
        name = " ".join(case["changed"]) or "as configured"
        measured = [f"{value:.3g}" for value in (flops / 1e12, by_flops, read / GIB, by_bytes, typical)]
        lines.append(f"| {name} | {' | '.join(measured)} | {by_flops / typical:.0%} |")
    return lines


def axes(cases: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the cases of each axis, by its key, with two values or more."""
    found: dict[str, list[dict[str, Any]]] = {}
    for case in cases[1:]:
        found.setdefault(case["changed"][0].partition("=")[0], []).append(case)
    return {key: some for key, some in found.items() if len(some) > 1}


def draw_axis(cases: list[dict[str, Any]], key: str, file: Path) -> None:
    """Draw speed, memory, and where the time goes, over the values of one key."""
    plt, some = file_pyplot(), axes(cases)[key]
    values = [case["changed"][0].partition("=")[2] for case in some]
    figure, (speed, memory, split) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for way in some[0]["seconds"]:
        there = [(v, case) for v, case in zip(values, some, strict=True) if way in case["seconds"]]
        places, measured = zip(*there, strict=True)
        speed.plot(places, [c["tasks"] / statistics.median(c["seconds"][way]) for c in measured], "o-", label=way)
        memory.plot(places, [c["peak_bytes"][way] / GIB for c in measured], "o-", label=way)
    below = [0.0] * len(some)
    for kind in some[0]["op_seconds"]:
        heights = [case["op_seconds"][kind] / sum(case["op_seconds"].values()) for case in some]
        split.bar(values, heights, bottom=below, label=kind)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    for axes_, title in (speed, "tasks a second"), (memory, "GiB beyond the model"), (split, "rayml's seconds, shares"):
        axes_.set(title=title, xlabel=key)
        axes_.set_ylim(bottom=0)
        axes_.legend(fontsize=8, loc="lower left" if axes_ is split else "best")
    figure.savefig(file, dpi=120)
    plt.close(figure)
