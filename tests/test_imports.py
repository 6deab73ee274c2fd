"""The walls between the rooms: what a room's modules load when they are all imported."""

import ast
import json
import pkgutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import rayml

HEAVY = {"torch", "transformers", "peft", "deepspeed", "ray"}
WITH_RAY = {
    "training": "driver progress ray_internals replicated sharded stragglers stream submit trackers worker",
    "experiments": "compare sweep sweep_report",
}
"""The modules of these rooms that may load Ray; the others may not."""
MAY_LOAD = {
    "cli": set(),
    "api": set(),
    "progress": set(),
    "config": set(),
    "sections": set(),
    "overrides": set(),
    "yaml12": set(),
    "errors": set(),
    "interrupt": set(),
    "tasks": set(),
    "starts": set(),
    "algorithms": {"torch"},
    "runs": {"torch"},
    "planning": {"torch", "transformers"},
    "lm": HEAVY - {"ray"},  # transformers itself imports deepspeed where it is installed
    "adaptation": HEAVY - {"ray"},
    "adapter": HEAVY - {"ray"},
    "model": HEAVY - {"ray"},
    "compression": HEAVY - {"ray"},
    "experiments": HEAVY - {"ray"},
    "training": HEAVY - {"ray"},
    "ray_start": HEAVY,
    "serving": HEAVY,
}
"""From the least to the most: so one process tells for all of them, one room after another."""
FLOORS = [
    {"errors"},
    {"tasks", "sections", "overrides", "yaml12", "config", "algorithms", "starts"},
    {"lm", "runs", "interrupt", "progress", "ray_start"},
    {"adaptation", "adapter", "model"},
    {"training", "planning"},
    {"experiments", "compression", "serving"},
    {"api"},
    {"cli"},
]
"""A module imports from its own floor and those below. (What a function imports in it, it needs then alone.)"""
CODE = """
import importlib, json, pkgutil, sys
with_ray = json.loads(sys.argv[1])
for name in sys.argv[2:]:
    room = importlib.import_module("rayml." + name)
    for module in pkgutil.iter_modules(getattr(room, "__path__", [])):
        if module.name not in with_ray.get(name, "").split():
            importlib.import_module(f"{room.__name__}.{module.name}")
    print(json.dumps([name, *sys.modules]))
"""


def test_every_room_has_its_rule():
    found = {module.name for module in pkgutil.iter_modules(rayml.__path__)}
    assert found - {"__main__"} == set(MAY_LOAD)


def test_a_room_loads_no_more_than_it_may():
    assert all(one <= next_one for one, next_one in pairwise(MAY_LOAD.values()))
    walled = [room for room, allowed in MAY_LOAD.items() if allowed != HEAVY]
    printed = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(WITH_RAY), *walled], capture_output=True, text=True, check=True
    ).stdout
    loaded = {room: HEAVY & set(modules) for room, *modules in map(json.loads, printed.splitlines())}
    assert loaded.keys() == set(walled)
    for room, found in loaded.items():
        assert found <= MAY_LOAD[room], room


def test_only_the_sharded_engine_names_deepspeed():
    source = Path(rayml.__path__[0])
    naming = {path.name for path in source.rglob("*.py") if "import deepspeed" in path.read_text()}
    assert naming == {"zero.py"}


def test_nothing_climbs():
    source = Path(rayml.__path__[0])
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    assert MAY_LOAD.keys() <= floor.keys()
    climbs = []
    for file in source.rglob("*.py"):
        own = file.relative_to(source).with_suffix("").parts
        for node in ast.parse(file.read_text()).body if own[0] in floor else ():
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rayml."):
                other = node.module.split(".")[1]
                climbs += [f"{'.'.join(own)} -> {node.module}"] if floor[other] > floor[own[0]] else []
    assert not climbs


def test_the_workers_that_make_episodes_load_no_torch():
    """They are processes of their own, and torch would cost each of them a second."""
    code = "import sys, rayml.training.stream, rayml.lm.encode; from transformers import PreTrainedTokenizerFast as _; "
    code += "print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()[-1] == "False"
