"""Plots of tasks a second and of memory, over the number of tasks."""

from importlib.util import find_spec
from pathlib import Path

from gpu_steps.found import GIB, Lines, of, tasks_per_second


def draw(lines: Lines, folder: Path) -> list[tuple[str, str]]:
    """Write them; return their files and titles."""
    if find_spec("matplotlib") is None:  # a bare machine brings numbers home, and is done
        return []
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    cases = sorted(of(lines, "meta-gradient"), key=lambda case: case["tasks"])
    if not cases:
        return []
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for layers in dict.fromkeys(case["layers"] for case in cases):
        some = [case for case in cases if case["layers"] == layers]
        for way in dict.fromkeys(way for case in some for way in case["seconds"]):
            there = [case for case in some if way in case["seconds"]]
            places, label = [case["tasks"] for case in there], f"{way}, {layers} layers"
            speed.plot(places, [tasks_per_second(case, way) for case in there], "o-", label=label)
            memory.plot(places, [case["peak_bytes"][way] / GIB for case in there], "o-", label=label)
    for axes, title in (speed, "tasks a second"), (memory, "GiB beyond the model"):
        axes.set(title=title, xlabel="tasks side by side", xscale="log", yscale="log")
        axes.set_xticks(places := sorted({case["tasks"] for case in cases}), map(str, places))
        axes.legend(fontsize=8)
    figure.savefig(folder / "tasks.png", dpi=120)
    plt.close(figure)
    return [("tasks.png", "Tasks a second, and memory, over the tasks side by side")]
