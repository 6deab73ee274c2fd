"""Checkpoints of the outer loop: files, and manifests with their checksums, so that a damaged one is recognised.

If every worker holds all that is learned, a checkpoint is one part, `state.safetensors`, and does not depend on the
number of workers. If it is sharded, every worker writes a part.
"""

import errno
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save
from torch import Tensor

from rayml.errors import RunError, StorageError
from rayml.runs.files import AnyPath, checksum, list_matching, local_copy, remove
from rayml.tasks.statistics import unit_score

STATE = "state.safetensors"
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Saved:
    """The content of a checkpoint."""

    step: int
    tensors: dict[str, Tensor]


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(folder: AnyPath) -> int:
    """Return the outer step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


def newest_step(checkpoints: AnyPath) -> int:
    """Return the outer step of a run's newest checkpoint, which may be damaged; 0 if there is none."""
    return max(map(step_of, list_matching(checkpoints, "step_*")), default=0)


def write_state(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors that this worker holds whole."""
    (folder / STATE).write_bytes(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))


@contextmanager
def naming_full_disk(folder: AnyPath, step: int) -> Iterator[None]:
    """Raise RunError if the disk is full while a checkpoint is written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunError(f"{folder}: the disk is full; the checkpoints before step {step} are kept") from error
        raise


def seal(folder: Path, step: int, part: int, parts: int) -> None:
    """Write the manifest of one part, after all its files: those are all that `folder` holds."""
    files = {str(path.relative_to(folder)): checksum(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = {"step": step, "parts": parts, "sha256": files}
    (folder / _manifest(part)).write_text(json.dumps(manifest, indent=1))


def verify(folder: AnyPath) -> int:
    """Return the outer step of a whole checkpoint.

    Raises:
        RunError: a part of it is missing or damaged.
    """
    try:
        first = json.loads((folder / _manifest(0)).read_text())
        for part in range(first["parts"]):
            for name, digest in json.loads((folder / _manifest(part)).read_text())["sha256"].items():
                if checksum(folder / name) != digest:
                    raise RunError(f"{folder}: {name} is not what its manifest says")
        return first["step"]
    except StorageError:
        raise  # the storage failed; the checkpoint may be whole
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{folder}: not a whole checkpoint: {error}") from error


def is_whole(folder: AnyPath) -> bool:
    """Return whether a checkpoint is whole; warn of a damaged one."""
    return bool(newest_of([folder], verify))


def manifest_checksums(folder: AnyPath) -> list[str]:
    """Return the checksums of a checkpoint's manifests. They change if the same run folder is trained anew."""
    return [checksum(manifest) for manifest in list_matching(folder, "manifest_*.json")]


def read_checkpoint(folder: AnyPath) -> Saved:
    """Return what `write_state` wrote.

    Raises:
        RunError: a part of it is missing or damaged.
    """
    with local_copy(folder) as here:
        return Saved(verify(here), load_file(here / STATE))


def newest_checkpoint(checkpoints: AnyPath) -> AnyPath | None:
    """Return a run's newest whole checkpoint; None if there is none. Warn of damaged ones."""
    newest = newest_of(list_matching(checkpoints, "step_*"), verify)
    return newest and newest[0]


def read_newest(checkpoints: AnyPath) -> Saved | None:
    """Return the content of the newest whole checkpoint, read only once; None if there is none."""
    newest = newest_of(list_matching(checkpoints, "step_*"), read_checkpoint)
    return newest and newest[1]


def newest_of(folders: Sequence[AnyPath], read: Callable[[AnyPath], T]) -> tuple[AnyPath, T] | None:
    """Return the last folder that can be read, and what was read; None if none can."""
    for folder in reversed(folders):
        try:
            return folder, read(folder)
        except RunError as error:
            log.warning("skipped a damaged checkpoint: %s", error)
    return None


def keep_only(folder: AnyPath) -> None:
    """Remove the other checkpoints beside this one."""
    for other in list_matching(folder.parent, "step_*"):
        if other.name != folder.name:
            remove(other)


def _manifest(part: int) -> str:
    return f"manifest_{part}.json"


# Early stopping. It depends on the run's records alone, so that a resumed run stops at the same step


def val_score(record: dict[str, Any], when: str = "after") -> float | None:
    """Return a record's score on meta-val `before` or `after` adapting (`statistics.overall_score`); higher is better.

    None if there was no validation; -inf if the score is not finite.
    """
    score = record.get(f"val_score_{when}")
    for metric in ("accuracy", "loss"):  # older runs have no overall score
        if score is None and (key := f"val_{metric}_{when}") in record:
            score = unit_score(metric, record[key])
    return score if score is None or math.isfinite(score) else -math.inf


def val_scores(records: Iterable[dict[str, Any]]) -> list[float]:
    """Return the scores of a run's validations, in order."""
    return [score for score in map(val_score, records) if score is not None]


def is_best(scores: Sequence[float]) -> bool:
    """Return whether the newest score is better than all earlier ones."""
    return bool(scores) and all(scores[-1] > score for score in scores[:-1])


def is_enough(scores: Sequence[float], patience: int) -> bool:
    """Return whether the last `patience` validations brought no better score; with patience 0, never."""
    return bool(patience and scores) and len(scores) - 1 - scores.index(max(scores)) >= patience
