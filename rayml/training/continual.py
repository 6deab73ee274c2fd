"""Staying current: a run that goes on from what another learned, with some of its old tasks among the new ones.

Replay (Rolnick et al. 2019, arXiv 1811.11682) keeps what is learned from being forgotten; how much was is measured on
the old run's own meta-test tasks, before and after.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from rayml.config import Config
from rayml.errors import ConfigError, RunError
from rayml.lm.scorer import trained_curves
from rayml.model import MetaModel, load, start_of
from rayml.progress import progress
from rayml.runs.files import write_whole
from rayml.runs.folder import RunFolder, flat
from rayml.runs.reports import table
from rayml.sections import Data
from rayml.tasks.episodes import EVALUATION_SEED
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.splits import Splits, refuse_leaks
from rayml.tasks.statistics import bounds, by_task, interval
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
"""Keys that say what a start is made of."""
EPISODES = 64
"""That forgetting is measured on, of the old tasks together, and of the new ones."""
FORGETTING = "forgetting.json"


@dataclass(frozen=True)
class Old:
    """The run that is continued."""

    run: RunFolder
    config: Config
    splits: Splits


def old_run(config: Config) -> Old | None:
    """Return the run that a config continues, if it does.

    Raises:
        RunError: it is not there, or not whole.
        ConfigError: its start does not fit this config; with the keys that differ.
    """
    if config.run.continues is None:
        return None
    run = RunFolder(config.run.continues)
    if run.path == RunFolder(config.run.dir).path:
        raise RunError(f"{run.path}: is this run itself; give run.dir another folder")
    then, _ = run.trained()
    before, now = (flat(c.model_dump()) for c in (then, config))
    differs = [key for key in SAME if before[key] != now[key]]
    if then.mode == "full":
        raise ConfigError("run.continues: a run in mode full is continued by its folder RUN/model as model.name")
    by_weight = then.algorithm.learned_rates == "weight"
    if by_weight != (config.algorithm.learned_rates == "weight"):
        differs.append("algorithm.name")
    if differs:
        named = run.start or run.path
        raise ConfigError(f"run.continues: {named} has another start; {', '.join(differs)} must be as there")
    # A start that comes with rayml comes without its tasks: there is nothing to replay, nor to forget.
    return Old(run, then, Splits((), (), ()) if run.start else prepare_splits(then.data))


def with_replay(splits: Splits, old: Old, share: float) -> tuple[Splits, frozenset[str]]:
    """Return the splits with the old meta-train tasks among the new, and the names of the old.

    A task of the same name in both is the new one's.

    Raises:
        DataError: new tasks hold a text of the old meta-test, or old tasks one of the new.
    """
    refuse_leaks("this run's meta-train", splits.train, old.splits.test)
    new = {task.name for part in splits for task in part}
    replayed = tuple(task for task in old.splits.train if task.name not in new) if share else ()
    refuse_leaks("the tasks to replay", replayed, splits.test)
    return splits._replace(train=(*splits.train, *replayed)), frozenset(task.name for task in replayed)


def shown_anew(old: Data, new: Data) -> list[str]:
    """Return the keys by which replayed tasks are shown in another way than in their own run."""
    differ = [f"data.{key}" for key in ("prompt", "labels") if getattr(old, key) != getattr(new, key)]
    return differ + [f"data.templates.{name}" for name, of in old.templates.items() if new.templates.get(name) != of]


def report_forgetting(run: RunFolder, old: Old, splits: Splits, out: Console) -> dict[str, Any]:
    """Adapt to the old and the new meta-test tasks from both starts; print the scores, and write `forgetting.json`.

    Accuracy over label tasks, or the loss over free text, after adapting, with intervals over tasks and
    episodes, paired.
    """
    now = load(run)
    then = as_before(old, now)
    groups = {
        f"{name} tasks, {'accuracy' if is_label else 'loss'}": ([t for t in of if bool(t.options) == is_label], shows)
        for name, of, shows in (("old", old.splits.test, then), ("new", splits.test, now))
        for is_label in (True, False)
    }
    groups = {name: group for name, group in groups.items() if group[0]}
    with progress(out) as bar:
        done = bar("before and after", sum(2 * len(tasks) * episodes_each(tasks) for tasks, _ in groups.values()))
        found = {name: both(shows, then, now, tasks, done) for name, (tasks, shows) in groups.items()}
    write_whole(run.path / FORGETTING, json.dumps({"continues": str(old.run.path), "scores": found}, indent=2) + "\n")
    heads, title = ("meta-test", "before", "after", "change"), "before and after going on"
    shown = table(heads, left=["meta-test"], show_edge=False, padding=(0, 0, 0, 1), title=title)
    for name, ends in found.items():
        shown.add_row(name, bounds(ends["before"]), bounds(ends["after"]), bounds(ends["change"], "+"))
    out.print(shown)
    return found


def as_before(old: Old, now: MetaModel) -> MetaModel:
    """Return the old run, on the base that is loaded already, unless it was another dtype's."""
    if old.config.model != now.config.model:
        return load(old.run)
    start, log_inner_lrs = start_of(old.run)
    return replace(
        now,
        config=old.config,
        encoder=old.config.encoder(now.encoder.tokenizer),
        start={name: weight.to(now.device) for name, weight in start.items()},
        inner_lrs={name: rate.exp().to(now.device) for name, rate in log_inner_lrs.items()},
    )


def episodes_each(tasks: Sequence[Task]) -> int:
    return max(2, -(-EPISODES // len(tasks)))


def both(
    shows: MetaModel, then: MetaModel, now: MetaModel, tasks: Sequence[Task], progress: Callable[[int], None]
) -> dict[str, dict[str, float]]:
    """Return the scores after adapting to the same episodes, as `shows` shows them, from the old start and the new."""
    sampler = shows.config.data.sampler(EVALUATION_SEED)
    ends = []
    for model in (then, now):
        asked = replace(model, config=shows.config, encoder=shows.encoder)
        found = trained_curves(asked, tasks, sampler, episodes_each(tasks), progress)
        ends.append(by_task(found)[-1])
    return {"before": interval(ends[0]), "after": interval(ends[1]), "change": interval(ends[1] - ends[0])}
