"""A run's folder.

It holds `config.yaml`, `precision.json` (dtype and attention, and why), `tasks.json`, `metrics.jsonl`,
`checkpoints/step_*`, `latest`, `best/step_*` (where there were validations), `untrained.safetensors` (in mode
adapters), `model/` (in mode full, at the end), `tensorboard/`, and files of other trackers. It may be in object
storage, named by a URI.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import reduce
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from rayml.algorithms.registry import upgrade_config
from rayml.config import Config, dump_config, parse_config, read_values
from rayml.errors import ConfigError, RunError, StorageError
from rayml.runs.checkpoint import is_enough, is_whole, newest_checkpoint, newest_step, step_of, val_scores
from rayml.runs.files import AnyPath, list_matching, parse_path, remove, write_atomically
from rayml.sections import Run
from rayml.starts import no_run_error, run_folder_of, start_named
from rayml.tasks.splits import Splits
from rayml.tasks.task import Task

UNTRAINED = "untrained.safetensors"
# Keys that may change when a run is resumed. The data is compared by its content, so its path is among them.
FREE_KEYS: Any = {
    "workers": True,
    "device": True,
    "engine": True,
    "run": set(Run.model_fields) - {"continues"},
    "validation": True,
    "sweep": True,
    "outer": {"steps"},
    "data": {"path"},
}


class RunFolder:
    """The paths of a run, and access to its small files."""

    def __init__(self, path: str | AnyPath):
        self.start = start_named(path)
        """The name of a start that comes with rayml, or of a bare base; None for a run."""
        self.path = parse_path(run_folder_of(self.start) if self.start else path)
        self.config, self.metrics = self.path / "config.yaml", self.path / "metrics.jsonl"
        self.checkpoints, self.latest = self.path / "checkpoints", self.path / "latest"
        self.tasks, self.best, self.model = (self.path / name for name in ("tasks.json", "best", "model"))
        self.stop, self.precision = self.path / "stop", self.path / "precision.json"
        self.trackers = self.path / "trackers.json"

    @property
    def outputs(self) -> AnyPath:
        """Where results go, such as an evaluation: into the run; for a start into runs/NAME of the current folder."""
        return Path("runs", Path(self.start).name).absolute() if self.start else self.path

    @property
    def is_local(self) -> bool:
        return isinstance(self.path, Path)

    @property
    def poll_seconds(self) -> float:
        """Seconds between two looks for changes. They are slow in object storage."""
        return 0.5 if self.is_local else 5

    @contextmanager
    def held(self) -> Iterator[None]:
        """Refuse to let two processes write here: inside the block, a second one gets an error.

        Object storage, and some shared file systems, have no locks: there, nobody is refused.

        Raises:
            RunError: another process holds the folder.
        """
        with ExitStack() as stack:
            if isinstance(self.path, Path):
                with suppress(OSError):  # `begin` says what is wrong
                    self.path.mkdir(parents=True, exist_ok=True)
                    folder = os.open(self.path, os.O_RDONLY)
                    stack.callback(os.close, folder)
                    try:
                        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError as error:
                        reason = "another process is training it; wait for its end, or give run.dir another folder"
                        raise RunError(f"{self.path}: {reason}") from error
            yield

    def begin(self, config: Config, splits: Splits, resume: bool) -> None:
        """Make the folder, or check that its run may be resumed. A run without a checkpoint begins anew.

        Raises:
            RunError: it holds a run, and `resume` is False; or it holds the run of another config; or it cannot be
                written to.
        """
        if any(self.checkpoints.glob("step_*")):
            self._check_same(config, splits)
            if not resume:
                raise RunError(f"{self.path}: holds a run already; --resume it, or give run.dir another folder")
        elif self.path.is_dir() and any(self.path.iterdir()):
            if not self.config.exists():
                raise RunError(f"{self.path}: holds something other than a run; give run.dir another folder")
            self._forget()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.stop.unlink(missing_ok=True)
            write_atomically(self.config, dump_config(config))
            write_atomically(self.tasks, json.dumps(describe(splits), indent=2, ensure_ascii=False) + "\n")
        except StorageError:
            raise
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"{self.path}: cannot be written to ({reason}); give run.dir another folder") from error
        self.truncate_metrics(newest_step(self.checkpoints))  # progress is shown from there

    def _forget(self) -> None:
        """Remove what a run without a checkpoint left: its config may be another one, and readers prefer `best/`."""
        for folder in list_matching(self.best, "step_*"):
            remove(folder)
        for file in (self.precision, self.trackers):
            file.unlink(missing_ok=True)

    def _check_same(self, config: Config, splits: Splits) -> None:
        old = self.read_config()
        before, now = (flatten(values.model_dump(exclude=FREE_KEYS)) for values in (old, config))
        changed = {name for name in before.keys() | now.keys() if repr(before.get(name)) != repr(now.get(name))}
        if config.outer.schedule != "constant" and old.outer.steps != config.outer.steps:
            changed.add("outer.steps")  # the schedule ends there
        if json.loads(self.tasks.read_text(encoding="utf-8"))["fingerprint"] != fingerprint(splits.train):
            changed.add("the meta-train tasks")
        fixed = {"mode", "engine", "zero.stage"} | ({"workers"} if old.is_sharded else set())
        if old.mode == "full" and any(_value(old, key) != _value(config, key) for key in fixed):
            raise RunError(
                f"{self.path}: a run in mode full goes on with the same {', '.join(sorted(fixed))} alone, since its "
                "checkpoints are shards; or `rayml export` it, and start a new run with that folder as model.name"
            )
        if changed:
            names = ", ".join(sorted(changed))
            raise RunError(f"{self.path}: holds the run of another config ({names} differ); use another run.dir")

    def write_precision(self, dtype: str, attention: str, why: str) -> None:
        """Record the dtype and attention that the model is trained in, and why."""
        write_atomically(
            self.precision, json.dumps({"dtype": dtype, "attention": attention, "why": why}, indent=2) + "\n"
        )

    def trained_dtype(self) -> str | None:
        """Return the dtype that the run was trained in; None if it was not yet trained."""
        if self.precision.exists():
            return json.loads(self.precision.read_text(encoding="utf-8"))["dtype"]
        dtype = self.read_config().model.dtype if self.config.exists() else "auto"
        return None if dtype == "auto" else dtype

    def read_config(self) -> Config:
        """Return the run's config. Old runs, from before algorithms had settings of their own, can be read, too."""
        return parse_config(upgrade_config(read_values(self.config)), str(self.config))

    def request_stop(self) -> None:
        """Ask the workers to finish their step, write a checkpoint, and end."""
        self.stop.touch()

    def is_stop_requested(self) -> bool:
        """Return whether the workers were asked to stop; False while storage does not answer."""
        with suppress(StorageError):
            return self.stop.exists()
        return False

    def has_label_tasks(self) -> bool:
        """Return whether the run was meta-trained on any label task."""
        return any(json.loads(self.tasks.read_text(encoding="utf-8"))["train"].values())

    def task_kind(self) -> str:
        """Return the kind of the tasks that the run was meta-trained on; "" if there are several."""
        kinds = set(json.loads(self.tasks.read_text(encoding="utf-8")).get("kinds", {}).values())
        return kinds.pop() if len(kinds) == 1 else ""

    def truncate_metrics(self, step: int) -> None:
        """Remove the records after `step`, since those steps will be taken again."""
        if self.metrics.exists():
            lines = [json.dumps(record) + "\n" for record in self.read_metrics() if record["step"] <= step]
            write_atomically(self.metrics, "".join(lines))

    def records(self) -> list[dict[str, Any]]:
        """Return the records of `metrics.jsonl` so far."""
        return list(self.read_metrics()) if self.metrics.exists() else []

    def records_after(self, step: int) -> list[dict[str, Any]]:
        """Return the records of later steps, for callers that poll; none while storage does not answer.

        The earlier ones are not parsed: in a long run that would take most of a core.
        """
        later: list[dict[str, Any]] = []
        with suppress(StorageError):
            for line in reversed(self._metric_lines() if self.metrics.exists() else []):
                record = json.loads(line)
                if record["step"] <= step:
                    break
                later.append(record)
        return later[::-1]

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the records of `metrics.jsonl`."""
        return map(json.loads, self._metric_lines())

    def _metric_lines(self) -> list[str]:
        """Return the lines of `metrics.jsonl`, without a last one that a crash left unfinished."""
        return self.metrics.read_text().split("\n")[:-1]

    def write_untrained(self, start: dict[str, Tensor]) -> None:
        """Write the start at step 0, with which the trained start is compared."""
        (self.path / UNTRAINED).write_bytes(save({name: weight.cpu() for name, weight in start.items()}))

    def read_untrained(self) -> dict[str, Tensor]:
        return load((self.path / UNTRAINED).read_bytes())

    def is_over(self, config: Config) -> bool:
        """Return whether the newest checkpoint is of the last step, or of where early stopping ended the run."""
        records = self.records()
        for folder in reversed(list_matching(self.checkpoints, "step_*")):
            scores = val_scores(record for record in records if record["step"] <= step_of(folder))
            if step_of(folder) < config.outer.steps and not is_enough(scores, config.validation.patience):
                return False  # whole or not: whoever resumes reads it
            if is_whole(folder):
                return True
        return False

    def trained(self, which: str | None = None) -> tuple[Config, AnyPath]:
        """Return the config and the folder of a whole checkpoint.

        Args:
            which: "best" by meta-val, or "newest"; None for the best if there were validations, else the newest.

        Raises:
            RunError: this is not a run folder, or it has no such checkpoint.
            ConfigError: `which` is neither.
        """
        if which not in (None, "best", "newest"):
            raise ConfigError(f"checkpoint: expected best or newest, got {which!r}")
        if not self.config.exists():
            raise no_run_error(self.path)
        config = self.read_config()
        folder = newest_checkpoint(self.best) if which != "newest" else None
        if folder is None and which != "best":  # there was no meta-val task, or no validation yet
            folder = newest_checkpoint(self.checkpoints)
        if folder is None:
            reason = "no validation has chosen a best checkpoint" if which == "best" else "no whole checkpoint"
            raise RunError(f"{self.path}: {reason}; train it first")
        return config, folder

    def describe_checkpoint(self, folder: AnyPath) -> str:
        """Return a description of a checkpoint that `trained` returned."""
        if self.start:
            return f"the start {self.start}, {step_of(folder)} outer steps" if step_of(folder) else "untrained"
        which = "the best on meta-val" if folder.parent.name == self.best.name else "the newest"
        return f"step {step_of(folder)}, {which}"


def describe(splits: Splits) -> dict[str, Any]:
    """Return the content of `tasks.json`: the classes of every task in every split (none for free text)."""
    classes = {split: {task.name: task.options for task in tasks} for split, tasks in splits._asdict().items()}
    kinds = {task.name: task.kind for task in splits.train}
    return {"fingerprint": fingerprint(splits.train), **classes, "kinds": kinds}


def fingerprint(tasks: Sequence[Task]) -> str:
    """Return a checksum of all that episodes are drawn from."""
    return hashlib.sha256(repr(list(tasks)).encode()).hexdigest()


def _value(config: Config, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested config's values by their dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result
