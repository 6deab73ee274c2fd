"""Continual learning: a run that continues another one, with new tasks and some of the old ones among them.

Replay of old tasks (Rolnick et al. 2019, arXiv 1811.11682) keeps the run from forgetting them. How much it forgot is
measured on the old run's own meta-test tasks, before and after.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from rayml.config import Config
from rayml.errors import ConfigError, RunError
from rayml.lm.precision import resolve_precision_here
from rayml.lm.scorer import trained_curves
from rayml.model import MetaModel, load, read_start
from rayml.progress import progress
from rayml.runs.files import write_atomically
from rayml.runs.folder import RunFolder, flatten
from rayml.runs.reports import table
from rayml.sections import Data
from rayml.tasks.episodes import EVALUATION_SEED
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.splits import Splits, refuse_leaks
from rayml.tasks.statistics import format_interval, interval, scores_by_task
from rayml.tasks.table import without_small_classes
from rayml.tasks.task import Task

SAME = (
    "model.name",
    "mode",
    "adapter",
    "lora.rank",
    "lora.alpha",
    "lora.targets",
    "lora.last_layers",
    "soft_prompt.tokens",
    "inner.modules",
)
"""Keys that define what a start consists of."""
EPISODES = 64
"""How many episodes forgetting is measured on: of the old tasks together, and of the new ones."""
FORGETTING = "forgetting.json"


@dataclass(frozen=True)
class OldRun:
    """The run that is continued."""

    run: RunFolder
    config: Config
    splits: Splits


def old_run(config: Config) -> OldRun | None:
    """Return the run that a config continues; None if it continues none.

    Raises:
        RunError: it does not exist, or is not whole.
        ConfigError: its start does not fit this config; the message names the keys that differ.
    """
    if config.run.continues is None:
        return None
    run = RunFolder(config.run.continues)
    if run.path == RunFolder(config.run.dir).path:
        raise RunError(f"{run.path}: is this run itself; give run.dir another folder")
    old_config, _ = run.trained()
    if old_config.mode == "full":
        raise ConfigError("run.continues: a run in mode full is continued by its folder RUN/model as model.name")
    old_values, values = flatten(old_config.model_dump()), flatten(config.model_dump())
    differing = [key for key in SAME if old_values[key] != values[key]]
    if (old_config.algorithm.learned_rates == "weight") != (config.algorithm.learned_rates == "weight"):
        differing.append("algorithm.name")
    if differing:
        name = run.start or run.path
        raise ConfigError(f"run.continues: {name} has another start; {', '.join(differing)} must be the same as there")
    # A start that comes with rayml comes without its tasks: there is nothing to replay, nor to forget.
    return OldRun(run, old_config, Splits((), (), ()) if run.start else prepare_splits(old_config.data))


def with_replay(splits: Splits, old: OldRun, data: Data) -> tuple[Splits, frozenset[str]]:
    """Return the splits with the old meta-train tasks added, and the names of these.

    Of two tasks with the same name, the new one is taken.

    Raises:
        DataError: a new task has a text of the old meta-test tasks; or a replayed one has a text of the new ones, or
            too few examples for an episode of this run.
    """
    refuse_leaks("this run's meta-train", splits.train, old.splits.test)
    new_names = {task.name for part in splits for task in part}
    replayed = tuple(task for task in old.splits.train if task.name not in new_names) if data.replay else ()
    if data.drop_small_classes:
        replayed = without_small_classes(replayed, data.shots + data.queries)
    data.sampler(seed=0).check(replayed)
    refuse_leaks("the tasks to replay", replayed, splits.test)
    return splits._replace(train=(*splits.train, *replayed)), frozenset(task.name for task in replayed)


def changed_display_keys(old: Data, new: Data) -> list[str]:
    """Return the keys because of which replayed tasks are shown differently than in their own run."""
    keys = [f"data.{key}" for key in ("prompt", "labels") if getattr(old, key) != getattr(new, key)]
    return keys + [f"data.templates.{name}" for name in old.templates if old.templates[name] != new.templates.get(name)]


def report_forgetting(run: RunFolder, old: OldRun, splits: Splits, out: Console) -> dict[str, Any]:
    """Adapt to the old and the new meta-test tasks from both starts; print the scores, and write `forgetting.json`.

    The scores are the accuracy over label tasks, and the loss over free text, after adapting. Their intervals are over
    tasks and episodes, and paired.
    """
    new_model = load(run)
    old_model = load_old(old, new_model)
    groups: dict[str, tuple[list[Task], MetaModel]] = {}
    for name, tasks, model in (("old", old.splits.test, old_model), ("new", splits.test, new_model)):
        for metric, is_label in (("accuracy", True), ("loss", False)):
            group = [task for task in tasks if bool(task.options) == is_label]
            if group:
                groups[f"{name} tasks, {metric}"] = group, model
    with progress(out) as bar:
        total = sum(2 * len(tasks) * episodes_each(tasks) for tasks, _ in groups.values())
        advance = bar("before and after", total)
        scores = {
            name: compare_starts(model, old_model, new_model, tasks, advance) for name, (tasks, model) in groups.items()
        }
    write_atomically(
        run.path / FORGETTING, json.dumps({"continues": str(old.run.path), "scores": scores}, indent=2) + "\n"
    )
    heads, title = ("meta-test", "before", "after", "change"), "before and after going on"
    rows = table(heads, left=["meta-test"], show_edge=False, padding=(0, 0, 0, 1), title=title)
    for name, intervals in scores.items():
        rows.add_row(
            name,
            format_interval(intervals["before"]),
            format_interval(intervals["after"]),
            format_interval(intervals["change"], "+"),
        )
    out.print(rows)
    return scores


def load_old(old: OldRun, new_model: MetaModel) -> MetaModel:
    """Return the old run's model. It shares the base that is loaded already, unless that differs, say in its dtype."""
    config, _ = resolve_precision_here(old.config, new_model.base, new_model.device, old.run.trained_dtype())
    if config.model != new_model.config.model:
        return load(old.run)
    start, log_inner_lrs = read_start(old.run)
    return replace(
        new_model,
        config=config,
        encoder=old.config.encoder(new_model.encoder.tokenizer),
        start={name: weight.to(new_model.device) for name, weight in start.items()},
        inner_lrs={name: rate.exp().to(new_model.device) for name, rate in log_inner_lrs.items()},
    )


def episodes_each(tasks: Sequence[Task]) -> int:
    return max(2, -(-EPISODES // len(tasks)))


def compare_starts(
    shown_by: MetaModel, old: MetaModel, new: MetaModel, tasks: Sequence[Task], progress: Callable[[int], None]
) -> dict[str, dict[str, float]]:
    """Return the scores after adapting from both starts to the same episodes, drawn and shown as by `shown_by`."""
    sampler = shown_by.config.data.sampler(EVALUATION_SEED)
    scores = []
    for start in (old, new):
        model = replace(start, config=shown_by.config, encoder=shown_by.encoder)
        curves = trained_curves(model, tasks, sampler, episodes_each(tasks), progress)
        scores.append(scores_by_task(curves)[-1])
    before, after = scores
    return {"before": interval(before), "after": interval(after), "change": interval(after - before)}
