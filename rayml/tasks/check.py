"""`rayml data check`: report what is in the data, and what is wrong with it."""

import json
import os
from pathlib import Path
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayml.config import Data, load_config, parse_config
from rayml.errors import DataError
from rayml.overrides import refuse_duplicates
from rayml.tasks.read import read_rows
from rayml.tasks.splits import NAMES, Splits, find_leaks, split_tasks, splits_advice
from rayml.tasks.table import Duplicates, build_tasks, without_small_classes
from rayml.tasks.task import Task

MAX_SHOWN = 5


def check_data(arguments: list[str], config: Path | None, out: Console) -> bool:
    """Print the report; return whether episodes can be drawn and nothing leaks.

    Args:
        arguments: paths, and `data.key=value` settings.
        config: a run's YAML; its data section has the settings to check against.

    Raises:
        ConfigError, DataError: a setting or a file that cannot be read at all.
    """

    def say(text: str) -> None:
        out.print(text, markup=False, highlight=False, soft_wrap=True)

    is_file = os.path.exists  # `Path.exists` raises for names that are too long, as a prompt may be
    settings = [text for text in arguments if "=" in text and "/" not in text.split("=")[0] and not is_file(text)]
    data = _data_section([text for text in arguments if text not in settings], settings, config)
    tasks, duplicates = build_tasks(read_rows(data.path, data.columns, data.kind, say=say))
    if data.drop_small_classes:
        tasks = without_small_classes(tasks, data.shots + data.queries)
    splits = split_tasks(tasks, data.splits.rule())
    out.print(_table(splits, duplicates))
    conflicts = duplicates.conflicting
    if conflicts:
        say(f"warning: {len(conflicts)} text(s) have two labels; none of their rows is used:")
    for task, text, targets in conflicts[:MAX_SHOWN]:
        say(f"  {task}: {text[:70]!r} is {' and '.join(targets)}")
    errors = _errors(tasks, data, splits)
    for error in errors:
        say(f"error: {error}")
    if not errors:
        say("ok: every class is large enough, and no text is in two splits")
    return not errors


def _data_section(paths: list[str], overrides: list[str], config: Path | None) -> Data:
    if config:
        path = [f"data.path={json.dumps(paths)}"] if paths else []
        return load_config(config, [*path, *overrides]).data
    values = {"model": {"name": "none"}, "run": {"dir": "none"}, "data": {"path": paths}}
    return parse_config(values, "rayml data check", refuse_duplicates(overrides)).data


def _table(splits: Splits, duplicates: Duplicates) -> Table:
    free_text = any(not task.options for tasks in splits for task in tasks)
    caption = "words: median / most; repeats: rows left out because they repeat another"
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), caption=caption, caption_justify="left")
    table.add_column("task", no_wrap=True)
    table.add_column("split")
    for name in ("classes", "rows", "smallest class", "input words", *["target words"] * free_text, "repeats"):
        table.add_column(name, justify="right")
    for split, tasks in zip(NAMES, splits, strict=True):
        for task in tasks:
            repeats = str(duplicates.repeated.get(task.name, 0))
            table.add_row(*map(Text, (task.name, split, *_row(task, free_text), repeats)))  # brackets are no markup
    return table


def _row(task: Task, free_text: bool) -> tuple[str, ...]:
    name, smallest = min(task.classes.items(), key=lambda item: len(item[1]))
    return (
        str(len(task.options)) if task.options else "free text",
        str(len(task.examples)),
        f"{name}: {len(smallest)}" if name else "",
        _words([example.input for example in task.examples]),
        *[_words([example.target for example in task.examples])] * free_text,
    )


def _words(texts: list[str]) -> str:
    counts = [len(text.split()) for text in texts] or [0]
    return f"{median(counts):.0f} / {max(counts)}"


def _errors(tasks: tuple[Task, ...], data: Data, splits: Splits) -> list[str]:
    errors = [] if splits.train else [f"no task is left for meta-train: {splits_advice(tasks, data.splits.rule())}"]
    try:
        data.sampler(seed=0).check(tasks)
    except DataError as error:
        errors.append(str(error))
    leaked = find_leaks(splits)
    if leaked:
        errors.append(f"{len(leaked)} text(s) are in two splits:")
        errors += [f"  {text[:70]!r} in {here} and {there}" for text, here, there in leaked[:MAX_SHOWN]]
    return errors
