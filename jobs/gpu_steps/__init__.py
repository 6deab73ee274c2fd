"""What is measured on a GPU: a module for each idea, with `run(bench, *arguments)`, here in order of worth.

`jobs/gpu_evidence.py` runs each step in a process of its own; `jobs/gpu_report.py` reads what they wrote. Neither
imports torch, nor rayml.
"""

from typing import NamedTuple


class Step(NamedTuple):
    name: str
    seconds: float
    """What it may take of eight minutes; of another time as large a part, and of what earlier steps have left over."""
    module: str
    arguments: tuple[str, ...] = ()


SHAPES = "llama", "tiny"
STEPS = [
    Step("numerics", 45, "numerics"),
    Step("machine", 15, "machine"),
    Step("tasks", 110, "tasks"),
    Step("one-second", 40, "one_second"),
    Step("outer-step", 55, "outer_step"),
    Step("full-zero-2", 30, "full", ("2", "none")),
    Step("full-zero-3", 30, "full", ("3", "none")),
    Step("full-zero-1", 25, "full", ("1", "none")),
    Step("full-offload", 30, "full", ("3", "all")),
    Step("run", 45, "real_run"),
    Step("writing", 35, "writing"),
    Step("faster", 40, "faster"),
]
