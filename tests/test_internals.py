"""What we take from Ray and DeepSpeed without their promise: if a new version fails here, it says what it broke."""

import inspect
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import rayml

ROOT = Path(__file__).parent.parent
PRIVATE = re.compile(
    r"\b(ray|deepspeed)\.[\w.]*\b_\w+|import ray\.\w*\._|_internal\b|_experiment_analysis|ds_id|clip_grad ="
)


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [
        Requirement(text)
        for texts in (project["dependencies"], *project["optional-dependencies"].values())
        for text in texts
        if not text.startswith("rayml[")
    ]


@pytest.mark.parametrize("name", ["ray", "deepspeed", "bitsandbytes", "torchao", "peft", "transformers", "torch"])
def test_what_is_used_by_its_insides_is_bound_to_what_was_tested(name):
    (found,) = [one for one in requirements() if one.name == name]
    assert any(bound.operator == "<" for bound in found.specifier), f"{name} has no upper bound"
    try:
        installed = version(name)
    except ModuleNotFoundError:
        pytest.skip(f"{name} is not installed")
    assert found.specifier.contains(installed, prereleases=True), f"{name} {installed} was never tested"


def test_private_names_stand_in_one_module_for_each_library():
    using = {
        str(path.relative_to(ROOT))
        for path in Path(rayml.__path__[0]).rglob("*.py")
        for line in path.read_text().splitlines()
        if PRIVATE.search(line)
    }
    assert using == {"rayml/training/ray_internals.py", "rayml/lm/zero.py"}


# Ray


@pytest.mark.parametrize(
    ("callback", "hook"),
    [("ControllerCallback", "after_controller_start"), ("WorkerGroupCallback", "before_worker_group_shutdown")],
)
def test_ray_train_calls_back(callback, hook):
    """What `rayml.training.ray_internals` overrides."""
    from rayml.training import ray_internals

    own, base = next(
        (own, getattr(ray_internals, callback))
        for own in vars(ray_internals).values()
        if inspect.isclass(own) and own.__module__ == ray_internals.__name__ and hook in vars(own)
    )
    assert hook in vars(base), f"Ray's {callback} has no {hook} any more"
    parameters = [list(inspect.signature(vars(one)[hook]).parameters) for one in (own, base)]
    assert parameters[0] == parameters[1], f"Ray's {callback}.{hook} takes others"


def test_ray_train_starts_no_actor_that_has_nothing_to_do():
    from ray.train.torch import TorchTrainer

    from rayml.training.ray_internals import without_idle_actors

    def kinds(trainer):
        return {type(one).__name__ for one in trainer._create_default_callbacks()}

    usual = kinds(TorchTrainer(print))
    idle = {"DatasetsCallback", "PlacementGroupCleanerCallback"}
    assert usual - kinds(without_idle_actors(TorchTrainer(print), ray_is_ours=True)) == idle
    assert usual - kinds(without_idle_actors(TorchTrainer(print), ray_is_ours=False)) == {"DatasetsCallback"}


def test_ray_train_s_errors_of_workers_that_died_are_raised():
    from rayml.training.ray_internals import DIED

    assert all(issubclass(error, Exception) for error in DIED)


def test_ray_train_s_memory_of_checkpoints_is_written_as_it_is_read():
    from ray.train.v2._internal import constants
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
        _CheckpointManagerState,
        _TrainingResultState,
    )

    from rayml.training.ray_internals import SNAPSHOT

    assert constants.CHECKPOINT_MANAGER_SNAPSHOT_FILENAME == SNAPSHOT
    assert "checkpoint_results" in _CheckpointManagerState.model_fields
    assert "checkpoint_dir_name" in _TrainingResultState.model_fields


def test_ray_s_variables_are_still_read():
    """An environment variable with a name that Ray forgot does nothing, and nobody says so."""
    import ray.air.constants
    import ray.tune.constants
    from ray.train.v2._internal import constants

    known = {value for value in vars(constants).values() if isinstance(value, str)}
    known |= {
        name
        for module in (ray.air.constants, ray.tune.constants)
        for name in re.findall(r'"([A-Z_]+)"', inspect.getsource(module))
    }
    source = "".join(
        (ROOT / "rayml" / name).read_text() for name in ("ray_start.py", "training/driver.py", "experiments/sweep.py")
    )
    ours = set(re.findall(r'"((?:RAY_TRAIN|RAY_AIR|TUNE)_[A-Z_]+)"', source))
    assert len(ours) >= 6
    assert ours <= known, f"Ray does not know {', '.join(sorted(ours - known))}"
    (prestart,) = re.findall(r'"RAY_(prestart\w+)"', source)
    raylet = Path(ray.air.constants.__file__).parents[1] / "core" / "src" / "ray" / "raylet" / "raylet"
    assert prestart.encode() in raylet.read_bytes(), f"Ray does not know {prestart}"


def test_ray_tune_s_results_know_their_trials():
    from ray.tune import ExperimentAnalysis, ResultGrid

    assert "_experiment_analysis" in inspect.getsource(ResultGrid.__init__)
    assert hasattr(ExperimentAnalysis, "trials") or "self.trials" in inspect.getsource(ExperimentAnalysis)


# DeepSpeed


@pytest.fixture
def internals(monkeypatch):
    pytest.importorskip("deepspeed")
    from rayml.lm import zero

    return zero


def test_stage_3_remembers_what_it_lets_go_of_behind_a_cache(internals):
    coordinator = internals.coordinator()
    for name in (internals.RELEASES, internals.INVALIDATE):
        assert hasattr(coordinator, name), f"DeepSpeed's coordinator has no {name} any more"
    assert internals.release_caches(), "DeepSpeed caches nothing any more: clear_release_caches_with_trace can go"


def test_the_shared_memory_op_has_its_name(internals):
    from deepspeed.ops import __compatible_ops__

    assert internals.SHARED_MEMORY in __compatible_ops__


@pytest.mark.parametrize("stage", ["stage3", "stage_1_and_2"])
def test_the_sharded_optimizers_clip_and_say_what_they_left_out(internals, stage):
    from importlib import import_module

    source = inspect.getsource(import_module(f"deepspeed.runtime.zero.{stage}"))
    for attribute in ("self.clip_grad > 0", "self.overflow"):
        assert attribute in source, f"DeepSpeed's {stage} has no {attribute} any more"


def test_the_engine_knows_the_optimizer_that_it_was_given_and_marks_what_it_shards(internals):
    from deepspeed.runtime import engine
    from deepspeed.runtime.zero import partition_parameters

    assert "self.basic_optimizer =" in inspect.getsource(engine), "DeepSpeed's engine has no basic_optimizer any more"
    assert "ds_id" in inspect.getsource(partition_parameters), "DeepSpeed marks its parameters in another way"
