"""The walls between the rooms: what a room's modules load when they are all imported, in a process of their own."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import rayml

HEAVY = {"torch", "transformers", "peft", "deepspeed", "ray"}
MAY_LOAD = {
    "cli": set(),
    "config": set(),
    "sections": set(),
    "errors": set(),
    "tasks": set(),
    "meta": {"torch"},
    "lm": HEAVY - {"ray"},  # transformers itself imports deepspeed where it is installed
    "engine": HEAVY - {"ray"},
    "planning": {"torch", "transformers"},
    "runs": {"torch"},
    "evaluation": HEAVY - {"ray"},
    "compression": HEAVY - {"ray"},
    "distributed": HEAVY,
    "serving": HEAVY,
    "sweeps": {"torch"},
}
CODE = """
import importlib, pkgutil, sys
room = importlib.import_module("rayml." + sys.argv[1])
for module in pkgutil.iter_modules(getattr(room, "__path__", [])):
    importlib.import_module(f"{room.__name__}.{module.name}")
print(*sys.modules)
"""


def test_every_room_has_its_rule():
    found = {module.name for module in pkgutil.iter_modules(rayml.__path__)}
    assert found - {"__main__"} == set(MAY_LOAD)


@pytest.mark.parametrize("room", [room for room, allowed in MAY_LOAD.items() if allowed != HEAVY])
def test_a_room_loads_no_more_than_it_may(room):
    found = subprocess.run([sys.executable, "-c", CODE, room], capture_output=True, text=True, check=True).stdout
    assert HEAVY & set(found.split()) <= MAY_LOAD[room]


def test_only_the_sharded_engine_names_deepspeed():
    source = Path(rayml.__path__[0])
    naming = {path.name for path in source.rglob("*.py") if "import deepspeed" in path.read_text()}
    assert naming == {"zero.py"}
