"""The main functions of the library: train, evaluate, compare, sweep. The commands of the same names call them."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayml.config import Config, Overrides, load_config, merged_values, parse_config

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

    Checkpoints, metrics and the resolved config go to `run.dir`. All input is checked before Ray starts. A Ray that is
    already running is used.

    Args:
        config: the path or URI of a YAML file, a `Config`, or nested values.
        overrides: `{"inner.lr": 0.1}`, `{"inner": {"lr": 0.1}}`, or `["inner.lr=0.1"]`.
        resume: continue from the last complete checkpoint, if there is one.
        continues: a run whose learned start this one begins from, and whose tasks it replays.
        more: overrides as keywords: `workers=2`, `inner={"lr": 0.1}`.

    Returns:
        The model at its best checkpoint on meta-val if there were validations, else at the newest.

    Raises:
        ConfigError, DataError, RunError: the input is bad; nothing was started.
        TrainingError: training stopped; the message says why.
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
    """Train as `train` does, but load nothing: return the run's folder. Takes and raises the same as `train`."""
    values, source = merged_values(config, overrides, **more)
    continued = [f"run.continues={continues}"] if continues else []
    settings = parse_config(values, source, continued)
    with show_loading():
        from rayml.training.driver import train as run_training

    return run_training(settings, resume)


def evaluate(
    run: "str | AnyPath | RunFolder | MetaModel",
    *,
    data: str | Path | Sequence[str | Path] | None = None,
    ways: int | None = None,
    shots: int | None = None,
    episodes: int = 50,
    seed: int = 0,
    split: str = "test",
    checkpoint: str | None = None,
    json_file: "str | AnyPath | None" = None,
    console: "Console | None" = None,
) -> dict[str, Any]:
    """Adapt to held-out tasks, from the meta-trained start and from an untrained one, and compare.

    Writes `evaluation.json` and `adaptation.png` into the run folder, as `rayml evaluate` does.

    Args:
        run: the folder of a run, its URI, or a model that is already loaded.
        data: paths of tasks that training never saw; by default the run's own held-out tasks.
        ways: classes in an episode; by default as in training.
        shots: support examples, per class (per task for free text); by default as in training.
        episodes: number of episodes of each task.
        seed: of the episodes.
        split: `test`, or `val` to choose settings with.
        checkpoint: "best" by meta-val, or "newest"; by default the best if there were validations, else the newest. It
            has no effect on a model that is already loaded.
        json_file: where to write the numbers; by default into the run folder.
        console: where to print the table; by default nowhere.

    Returns:
        What `evaluation.json` holds: `overall` and `tasks`, each with `before`, `after`, `untrained_after`, `gain` and
        `over_untrained`. Each is an accuracy, or the loss of free text, as a `mean` with the ends `low` and `high` of
        its 95 % interval.

    Raises:
        RunError, DataError, ConfigError: no run, no tasks to evaluate on, or an unknown split.
    """
    from rayml.experiments.evaluate_command import evaluate_run
    from rayml.model import MetaModel
    from rayml.runs.folder import RunFolder

    source = run if isinstance(run, MetaModel | RunFolder) else RunFolder(run)
    paths = [str(path) for path in ([data] if isinstance(data, str | Path) else data or ())]
    out, err = consoles(console)
    return evaluate_run(source, paths or None, ways, shots, episodes, seed, split, checkpoint, json_file, out, err)


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
    """Train methods with equal tokens, tune each with equal effort, and ask all the same, as `rayml compare` does.

    Args:
        config, overrides, more: as in `train`. The outer steps count for FOMAML, and so fix the tokens of all methods.
        methods: their names; by default the usual methods that can run here.
        variants: more methods, each with its overrides: `{"slow": ["inner.lr=0.01"]}`.
        runs: folders of finished runs to compare as they are.
        seeds: number of runs of each method.
        episodes: number of episodes of each meta-test task.
        val_episodes: number of episodes, of all meta-val tasks together, on which each adaptation is chosen.
        rates: factors on the inner rates to try.
        steps: numbers of inner steps to try.
        encoder: the sentence encoder of `embedding` and `setfit`: `minilm`, a folder, or a Hugging Face id.
        out: the folder, or its URI, for runs, answers and the report. What it already holds is not done again.
        dry_run: print the runs, tokens and time, and stop.
        command: quoted in the report.
        console: where to print tables and notes; by default nowhere.

    Returns:
        For each kind of tasks a row for each method: the numbers of `report.md`. Empty for a dry run.

    Raises:
        ConfigError, DataError, RunError: the input is bad; nothing was started.
        TrainingError: no method could be trained.
    """
    values, source = merged_values(config, overrides, **more)
    with show_loading():
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
    command = command or f"rayml.compare({source!r})"
    return run_comparison(values, source, request, out, command, dry_run, consoles(console)[0])


@dataclass(frozen=True)
class SweepResult:
    """The result of a search over settings."""

    folder: "AnyPath"
    """Holds `best.yaml`, `trials.csv`, `trials.json`, `sweep.png`, and the runs of the trials."""
    best: Config
    """The config of the best trial, with all its outer steps; pass it to `train`."""
    trials: list[dict[str, Any]]
    """The best first: `point` (the values tried), `score`, `before`, `after`, `step`, `state`, `run`."""


def sweep(
    config: ConfigLike,
    overrides: Overrides | None = None,
    *,
    search: Mapping[str, str] | None = None,
    resume: bool = False,
    console: "Console | None" = None,
    **more: Any,
) -> SweepResult:
    """Search settings with Ray Tune, as `rayml sweep` does: every trial is a training run, scored on meta-val.

    Args:
        config, overrides, more: as in `train`; settings such as `sweep.trials` control the search.
        search: what to search, `{"inner.lr": "loguniform(1e-2, 1)"}`; by default the config's `sweep.search`.
        resume: continue a sweep that was cut off.
        console: where to print the table; by default nowhere.

    Raises:
        ConfigError, DataError, RunError: the input is bad; nothing was started.
        TrainingError: no trial reached a validation.
    """
    values, source = merged_values(config, overrides, **(more | ({"sweep.search": dict(search)} if search else {})))
    with show_loading():
        from rayml.experiments.sweep import sweep as run_sweep

    folder = run_sweep(values, source, resume, consoles(console)[0])
    trials = json.loads((folder / "trials.json").read_text(encoding="utf-8"))
    return SweepResult(folder, load_config(folder / "best.yaml"), trials)


def show_loading() -> AbstractContextManager[Any]:
    """Show that libraries are being loaded, which takes some seconds the first time."""
    from rich.console import Console

    from rayml.progress import show_activity

    return show_activity(Console(stderr=True, markup=False), "loading libraries")


def consoles(console: "Console | None") -> "tuple[Console, Console]":
    """Return the consoles for results and for progress."""
    from rich.console import Console

    return console or Console(quiet=True), Console(stderr=True, markup=False)
