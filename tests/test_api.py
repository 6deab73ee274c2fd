"""What `import rayml` offers: quickly, with types, on one page, and as the README says."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SPLITS, make_config
from serving_run import make_run

import rayml
from rayml.config import flatten, merged_values
from rayml.errors import ConfigError

REPOSITORY = Path(__file__).parent.parent
PAGE = REPOSITORY / "rayml" / "README.md"


def python(code: str, folder: Path | None = None) -> str:
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_importing_rayml_loads_next_to_nothing():
    loaded = set(json.loads(python("import json, sys, rayml; print(json.dumps(list(sys.modules)))")))
    assert "rayml" in loaded
    assert not {name for name in loaded if name.partition(".")[0] in ("torch", "ray", "pydantic", "yaml", "numpy")}
    assert not {name for name in loaded if name.startswith("rayml.")}


def test_every_public_name_is_there_and_others_are_not():
    assert set(rayml.__all__) <= set(dir(rayml))
    assert all(getattr(rayml, name) is not None for name in rayml.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lode'; it offers Adapter"):
        _ = rayml.lode


def signature(function) -> str:
    """Return `(a, *, b=1)`: without annotations, and without `self`."""
    found = inspect.signature(function)
    kept = [p.replace(annotation=p.empty) for name, p in found.parameters.items() if name != "self"]
    return str(found.replace(parameters=kept, return_annotation=found.empty))


def public(kind: type) -> dict[str, object]:
    own = {name: value for name, value in vars(kind).items() if not name.startswith("_")}
    return own | dict.fromkeys(getattr(kind, "__dataclass_fields__", ()))


def test_the_reference_names_every_public_thing_with_its_signature():
    page = PAGE.read_text()
    missing = []
    for name in rayml.__all__:
        value = getattr(rayml, name)
        is_function = inspect.isfunction(value)
        shown = f"`rayml.{name}{signature(value)}`" if is_function else f"`rayml.{name}`"
        missing += [shown] if shown not in page else []
        if name not in ("MetaModel", "Adapter", "Prediction", "SweepResult"):
            continue
        for member, what in public(value).items():
            shown = f"`{name}.{member}{signature(what)}`" if inspect.isfunction(what) else f"`{member}`"
            missing += [shown] if shown not in page else []
    assert not missing
    named = set(re.findall(r"`rayml\.(\w+)[`(]", page))
    assert named <= {*rayml.__all__, "json"}, "nothing stands there that is gone"  # rayml.json is a file


def test_every_public_name_has_types_and_a_docstring():
    assert (REPOSITORY / "rayml" / "py.typed").exists()
    for name in rayml.__all__:
        value = getattr(rayml, name)
        functions = [value] if inspect.isfunction(value) else []
        if name in ("MetaModel", "Adapter", "Prediction", "SweepResult"):
            functions += [what for what in public(value).values() if inspect.isfunction(what)]
        assert name == "__version__" or inspect.getdoc(value), name
        for function in functions:
            assert inspect.getdoc(function), function
            found = inspect.signature(function)
            untyped = [p for p in found.parameters.values() if p.annotation is p.empty and p.name != "self"]
            assert not untyped, (function, untyped)
            assert found.return_annotation is not found.empty, function


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with `runs/quickstart`, of a tiny model, and the repository's examples."""
    folder = tmp_path_factory.mktemp("workplace")
    run = make_run(folder / "made")
    shutil.copytree(run.path, folder / "runs" / "quickstart")
    (folder / "configs").mkdir()
    shutil.copytree(REPOSITORY / "configs" / "examples", folder / "configs" / "examples")
    return folder


@pytest.mark.parametrize("page", ["README.md", "rayml/README.md"])
def test_the_first_python_block_of_a_page_runs(page, workplace):
    code = next(block for block in blocks(REPOSITORY / page) if "rayml.load(" in block)
    shutil.rmtree(workplace / "adapters", ignore_errors=True)
    python(code, workplace)
    assert rayml.load_adapter(workplace / "adapters" / "from-python").labels


def test_settings_are_changed_in_any_form(tmp_path):
    config = make_config(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    for given in (file, str(file), config, config.model_dump(mode="json"), {**config.model_dump(), "seed": 0}):
        for overrides, more in (
            ({"inner.lr": 0.7, "workers": 2}, {}),
            ({"inner": {"lr": 0.7}}, {"workers": 2}),
            (["inner.lr=0.7", "workers=2"], {}),
            (None, {"inner": {"lr": 0.7}, "workers": 2}),
            (None, {"inner.lr": 0.7, "workers": 2}),
        ):
            values, _ = merged_values(given, overrides, **more)
            found = rayml.load_config(values)
            assert (found.inner.lr, found.inner.steps, found.workers) == (0.7, config.inner.steps, 2)
    assert rayml.load_config(file, {"sweep.search": {"inner.lr": "uniform(0, 1)"}}).sweep.search
    assert flatten({"sweep": {"search": {"inner.lr": "x"}}}) == {"sweep.search": {"inner.lr": "x"}}
    assert flatten({"run": {"dir": Path("here")}}) == {"run.dir": "here"}
    with pytest.raises(ConfigError, match=r"did you mean inner\.lr"):
        rayml.load_config(config, {"inner.lrr": 0.1})


@pytest.mark.ray
def test_training_returns_the_model_that_its_folder_holds(tmp_path, local_mode):
    config = make_config(tmp_path, data={"splits": SPLITS}, validation={"every": 2, "episodes": 2})
    model = rayml.train(config, {"outer.steps": 4}, run={"checkpoint_every": 2})
    assert model.run.path == Path(config.run.dir)
    assert (model.config.outer.steps, model.config.run.checkpoint_every) == (4, 2)
    scores = [record["val_accuracy_after"] for record in model.run.records() if "val_accuracy_after" in record]
    assert model.step == 2 * (1 + scores.index(max(scores)))
    with pytest.raises(rayml.RunError, match="holds a run already"):
        rayml.train(config, {"outer.steps": 4})
    newer = rayml.train(config, ["outer.steps=2", f"run.dir={tmp_path}/newer"], continues=model.run.path)
    assert newer.config.run.continues == str(model.run.path)
    assert newer.adapt([("a b", "x"), ("c d", "y")]).predict("a").label in ("x", "y")
