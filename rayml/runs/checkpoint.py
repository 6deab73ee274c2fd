"""Checkpoints of the outer loop: files and manifests with their checksums, so that a torn one is found out.

Where what is learned lies whole on every worker, a checkpoint is one part, `state.safetensors`, and does not depend on
the number of workers. Where it is sharded, every worker writes a part.
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
from rayml.runs.files import AnyPath, checksum, listed, local_copy, remove
from rayml.tasks.statistics import normalised

STATE = "state.safetensors"
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Saved:
    """What was read from a checkpoint."""

    step: int
    tensors: dict[str, Tensor]


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(folder: AnyPath) -> int:
    """Return the outer step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step_"))


def newest_step(checkpoints: AnyPath) -> int:
    """Return the outer step of a run's newest checkpoint, which may turn out to be damaged; 0 if there is none."""
    return max(map(step_of, listed(checkpoints, "step_*")), default=0)


def write_state(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write what is whole on this worker."""
    (folder / STATE).write_bytes(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))


@contextmanager
def naming_full_disk(folder: AnyPath, step: int) -> Iterator[None]:
    """Turn the system's error about a full disk into a RunError, while a checkpoint is written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunError(f"{folder}: the disk is full; the checkpoints before step {step} are kept") from error
        raise


def seal(folder: Path, step: int, part: int, parts: int) -> None:
    """Write the manifest of one part, once all its files, which are all that lie in `folder`, are written."""
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
            for name, written in json.loads((folder / _manifest(part)).read_text())["sha256"].items():
                if checksum(folder / name) != written:
                    raise RunError(f"{folder}: {name} is not what its manifest says")
        return first["step"]
    except StorageError:
        raise  # it may be whole
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{folder}: not a whole checkpoint: {error}") from error


def is_whole(folder: AnyPath) -> bool:
    """Return whether a checkpoint is whole; warn of a damaged one."""
    return bool(newest_of([folder], verify))


def identity(folder: AnyPath) -> list[str]:
    """Return what tells a checkpoint from another, of another training in the same place: its manifests' checksums."""
    return [checksum(manifest) for manifest in listed(folder, "manifest_*.json")]


def read_checkpoint(folder: AnyPath) -> Saved:
    """Return what `write_state` wrote.

    Raises:
        RunError: a part of it is missing or damaged.
    """
    with local_copy(folder) as here:
        return Saved(verify(here), load_file(here / STATE))


def newest_checkpoint(checkpoints: AnyPath) -> AnyPath | None:
    """Return the newest whole checkpoint among a run's, None if there is none; warn of damaged ones."""
    found = newest_of(listed(checkpoints, "step_*"), verify)
    return found and found[0]


def read_newest(checkpoints: AnyPath) -> Saved | None:
    """Return what lies in the newest whole checkpoint, as `newest_checkpoint` finds it, and read it once."""
    found = newest_of(listed(checkpoints, "step_*"), read_checkpoint)
    return found and found[1]


def newest_of(folders: Sequence[AnyPath], read: Callable[[AnyPath], T]) -> tuple[AnyPath, T] | None:
    """Return the last of these that can be read, and what was read."""
    for folder in reversed(folders):
        try:
            return folder, read(folder)
        except RunError as error:
            log.warning("skipped a damaged checkpoint: %s", error)
    return None


def keep_only(folder: AnyPath) -> None:
    """Remove the other checkpoints beside this one."""
    for other in listed(folder.parent, "step_*"):
        if other.name != folder.name:
            remove(other)


def _manifest(part: int) -> str:
    return f"manifest_{part}.json"


# When validation says that it is enough: derived from the run's records alone, so that a resumed run agrees


def val_score(record: dict[str, Any], when: str = "after") -> float | None:
    """Return a record's score on meta-val `before` or `after` adapting (`statistics.overall`): the higher the better.

    None if there was no validation; less than any other if something was not finite.
    """
    scores = [record.get(f"val_score_{when}")]
    scores += [normalised(m, record[key]) for m in ("accuracy", "loss") if (key := f"val_{m}_{when}") in record]
    score = next((score for score in scores if score is not None), None)  # older runs have no overall one
    return score if score is None or math.isfinite(score) else -math.inf


def val_scores(records: Iterable[dict[str, Any]]) -> list[float]:
    """Return the scores of a run's validations, in order."""
    return [score for score in map(val_score, records) if score is not None]


def is_best(scores: Sequence[float]) -> bool:
    """Return whether the newest score is better than all before."""
    return bool(scores) and all(scores[-1] > score for score in scores[:-1])


def is_enough(scores: Sequence[float], patience: int) -> bool:
    """Return whether the newest `patience` validations were no better than the best before them; 0 is never enough."""
    return bool(patience and scores) and len(scores) - 1 - scores.index(max(scores)) >= patience
