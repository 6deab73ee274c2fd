"""Twenty outer steps against losses that were written down once: no speed-up changes a number.

Outer steps of SGD at small rates, for AdamW makes a step of a gradient's last bit.

When an algorithm or a default changes on purpose, `python tests/test_golden.py` writes them anew.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_config, toy_tasks, write_tasks

from rayml.tasks.task import Task
from rayml.training.driver import train

FILE = Path(__file__).parent / "data" / "golden.json"
WAYS = {
    "adapters": {"lora": {"start": "principal"}, "inner": {"steps": 3, "lr": 0.002}, "outer": {"lr": 0.002}},
    "full": {"mode": "full", "inner": {"lr": 0.01}, "outer": {"lr": 0.01}},
}


def losses(folder: Path, way: str, **more) -> list[list[float]]:
    """Return both losses of each outer step, and its gradient's norm."""
    changes = WAYS[way] | more
    config = make_config(folder, **changes | {"outer": {"steps": 20, "optimizer": "sgd"} | changes["outer"]})
    write_tasks(folder / "toy.jsonl", tuple(map(ragged, toy_tasks())))
    names = "support_loss", "query_loss", "gradient_norm"
    return [[record[name] for name in names] for record in train(config).records()]


def ragged(task: Task) -> Task:
    """Return a task whose texts have very different lengths."""
    longer = [replace(e, input=f"{e.input}{' and so on' * (index % 5)}") for index, e in enumerate(task.examples)]
    return replace(task, examples=tuple(longer))


@pytest.mark.ray
@pytest.mark.parametrize(("way", "more"), [*((way, {}) for way in WAYS), ("adapters", {"tasks_at_once": 1})])
def test_the_losses_of_twenty_outer_steps_are_those_written_down(way, more, tmp_path, local_mode):
    """Processors round differently, and that grows: seen, 3e-5 in the first ten steps, and 0.0013 in the last ten."""
    found, golden = losses(tmp_path, way, **more), json.loads(FILE.read_text())[way]
    assert len(found) == len(golden) == 20
    assert found[:10] == [pytest.approx(record, rel=2e-4) for record in golden[:10]]
    assert found[10:] == [pytest.approx(record, rel=5e-3) for record in golden[10:]]


if __name__ == "__main__":
    found = {}
    for name in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = losses(Path(folder), name)
    FILE.write_text(json.dumps(found) + "\n")
    sys.stdout.write(FILE.read_text())
