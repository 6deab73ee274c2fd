"""The verbs of the library: train, evaluate, compare, sweep. Each command of that name calls the function here."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayml.config import Config, Overrides, load_config, parse_config, values_of

if TYPE_CHECKING:
    from rich.console import Console

    from rayml.model import MetaModel
    from rayml.runs.files import AnyPath
    from rayml.runs.folder import RunFolder

ConfigLike = Config | Mapping[str, Any] | str | Path
"""A `Config`, nested values, or the path or URI of a YAML file."""


def train(
    config: ConfigLike,
    overrides: Overrides | None = None,
    *,
    resume: bool = False,
    continues: "str | AnyPath | None" = None,
    **more: Any,
) -> "MetaModel":
    """Meta-train on Ray, as `rayml train` does, and load what was learned.

    Checkpoints, metrics and the resolved config go to `run.dir`. Everything that can be wrong with the input is found
    before Ray starts, and a Ray that runs already is used.

    Args:
        config: the path or URI of a YAML file, a `Config`, or nested values.
        overrides: `{"inner.lr": 0.1}`, `{"inner": {"lr": 0.1}}`, or `["inner.lr=0.1"]`.
        resume: go on from the last whole checkpoint, if there is one.
        continues: a run whose learned start this one begins with, and whose tasks it replays.
        more: overrides as keywords: `workers=2`, `inner={"lr": 0.1}`.

    Returns:
        The model at its best checkpoint on meta-val, where there were validations; else at the newest.

    Raises:
        ConfigError, DataError, RunError: the input is bad; nothing was started.
        TrainingError: training stopped, and why.
    """
    from rayml.model import load

    return load(trained_run(config, overrides, resume=resume, continues=continues, **more))


def trained_run(
    config: ConfigLike,
    overrides: Overrides | None = None,
    *,
    resume: bool = False,
    continues: "str | AnyPath | None" = None,
    **more: Any,
) -> "RunFolder":
    """Do what `train` does, but load nothing: return the run's folder. Arguments and errors are those of `train`."""
    values, source = values_of(config, overrides, **more)
    added = [f"run.continues={continues}"] if continues else []
    settings = parse_config(values, source, added)
    with loading():
        from rayml.training.driver import train as run_training

    return run_training(settings, resume)


def evaluate(
    run: "str | AnyPath | RunFolder | MetaModel",
    *,
    data: str | Sequence[str] | None = None,
    ways: int | None = None,
    shots: int | None = None,
    episodes: int = 50,
    seed: int = 0,
    split: str = "test",
    checkpoint: str | None = None,
    json_file: Path | None = None,
    console: "Console | None" = None,
) -> dict[str, Any]:
    """Adapt to held-out tasks, from the meta-trained start and from an untrained one, and compare.

    Writes `evaluation.json` and `adaptation.png` into the run folder, as `rayml evaluate` does.

    Args:
        run: the folder of a run, its URI, or a model that is loaded already.
        data: paths of tasks that were never seen in training; else the run's own held-out tasks.
        ways: classes in an episode; else as the run was trained.
        shots: support examples, per class (per task for free text); else as the run was trained.
        episodes: of each task.
        seed: draws the episodes.
        split: `test`, or `val` to choose settings by.
        checkpoint: "best" by meta-val, or "newest"; else the best where there were validations. Of a folder alone.
        json_file: where the numbers go; else into the run folder.
        console: where the table is printed; nowhere by default.

    Returns:
        What `evaluation.json` holds: `overall` and `tasks`, each with `before`, `after`, `untrained_after`, `gain` and
        `over_untrained` as a `mean` and the ends `low`, `high` of its 95 % interval; accuracy, or free text's loss.

    Raises:
        RunError, DataError, ConfigError: no run, no tasks to evaluate on, or an unknown split.
    """
    from rayml.experiments.evaluate_command import evaluate_run
    from rayml.model import MetaModel
    from rayml.runs.folder import RunFolder

    given = run if isinstance(run, MetaModel | RunFolder) else RunFolder(run)
    paths = [data] if isinstance(data, str) else list(data) if data else None
    out, err = consoles(console)
    return evaluate_run(given, paths, ways, shots, episodes, seed, split, checkpoint, json_file, out, err)


def compare(
    config: ConfigLike,
    overrides: Overrides | None = None,
    *,
    methods: Sequence[str] = (),
    variants: Mapping[str, Sequence[str]] | None = None,
    runs: "Sequence[str | AnyPath]" = (),
    seeds: int = 5,
    episodes: int = 20,
    val_episodes: int = 24,
    rates: Sequence[float] = (0.1, 0.3, 1, 3),
    steps: Sequence[int] = (1, 3, 6),
    encoder: str = "minilm",
    out: "str | AnyPath" = "runs/compare",
    dry_run: bool = False,
    command: str | None = None,
    console: "Console | None" = None,
    **more: Any,
) -> dict[str, Any]:
    """Train methods with equal tokens, adapt each with equal care, and ask all the same, as `rayml compare` does.

    Args:
        config, overrides, more: as `train` takes them; the outer steps are FOMAML's, and fix everyone's tokens.
        methods: their names; else the usual ones that can run here.
        variants: more methods, each by what it changes: `{"slow": ["inner.lr=0.01"]}`.
        runs: run folders that take part as they are.
        seeds: runs of each method.
        episodes: of each meta-test task.
        val_episodes: that each adaptation is chosen on, of all meta-val tasks together.
        rates: factors on the inner rates, each tried.
        steps: numbers of inner steps, each tried.
        encoder: the sentence encoder of `embedding` and `setfit`: `minilm`, a folder, or a Hugging Face id.
        out: the folder, or its URI, where runs, answers and the report go. What is there is not done again.
        dry_run: print the runs, tokens and time, and stop.
        command: stands in the report.
        console: where tables and notes are printed; nowhere by default.

    Returns:
        For each kind of tasks a row for each method: the numbers of `report.md`. Nothing for a dry run.

    Raises:
        ConfigError, DataError, RunError: the input is bad; nothing was started.
        TrainingError: not one method could be trained.
    """
    values, source = values_of(config, overrides, **more)
    with loading():
        from rayml.experiments.compare import compare as run_comparison
        from rayml.experiments.method_runs import Request

    request = Request(
        methods=list(methods),
        variants={name: tuple(changes) for name, changes in (variants or {}).items()},
        runs=[str(run) for run in runs],
        seeds=seeds,
        episodes=episodes,
        val_episodes=val_episodes,
        factors=sorted({float(rate) for rate in rates}),
        steps=sorted(set(steps)),
        encoder=encoder,
    )
    stands = command or f"rayml.compare({source!r})"
    return run_comparison(values, source, request, out, stands, dry_run, consoles(console)[0])


@dataclass(frozen=True)
class SweepResult:
    """What came of a search of settings."""

    folder: "AnyPath"
    """Where `best.yaml`, `trials.csv`, `trials.json` and `sweep.png` are, and the trials' runs."""
    best: Config
    """The config with the best trial's values, at its full length: `train` takes it."""
    trials: list[dict[str, Any]]
    """The best first: `point` (the values that were tried), `score`, `before`, `after`, `step`, `state`, `run`."""


def sweep(
    config: ConfigLike,
    overrides: Overrides | None = None,
    *,
    search: Mapping[str, str] | None = None,
    resume: bool = False,
    console: "Console | None" = None,
    **more: Any,
) -> SweepResult:
    """Search settings by Ray Tune, as `rayml sweep` does: every trial is a training run, scored on meta-val.

    Args:
        config, overrides, more: as `train` takes them; `sweep.trials` and the like say how it is searched.
        search: what to search, `{"inner.lr": "loguniform(1e-2, 1)"}`; else as the config's `sweep.search` says.
        resume: go on with a sweep that was cut off.
        console: where the table is printed; nowhere by default.

    Raises:
        ConfigError, DataError, RunError: the input is bad; nothing was started.
        TrainingError: no trial came to a validation.
    """
    values, source = values_of(config, overrides, **(more | ({"sweep.search": dict(search)} if search else {})))
    with loading():
        from rayml.experiments.sweep import sweep as run_sweep

    folder = run_sweep(values, source, resume, consoles(console)[0])
    trials = json.loads((folder / "trials.json").read_text(encoding="utf-8"))
    return SweepResult(folder, load_config(folder / "best.yaml"), trials)


def loading() -> AbstractContextManager[Any]:
    """Show that libraries are being loaded: the first time takes some seconds."""
    from rich.console import Console

    from rayml.progress import doing

    return doing(Console(stderr=True, markup=False), "loading libraries")


def consoles(console: "Console | None") -> "tuple[Console, Console]":
    """Return where results are printed, and where it is told how far it is."""
    from rich.console import Console

    return console or Console(quiet=True), Console(stderr=True, markup=False)
