"""Checkpoints of the outer loop: safetensors and a manifest with checksums, so that a torn one is found out.

A checkpoint is a few megabytes and does not depend on the number of workers.
"""

import errno
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from rayml.errors import RunError

MANIFEST, STATE = "manifest.json", "state.safetensors"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Saved:
    """What was read from a checkpoint."""

    step: int
    tensors: dict[str, Tensor]


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def write_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor]) -> None:
    """Write the state after `step` outer steps into `folder`; the manifest comes last.

    Raises:
        RunError: the disk is full.
    """
    try:
        (folder / STATE).write_bytes(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))
        manifest = {"step": step, "sha256": _checksum(folder / STATE)}
        (folder / MANIFEST).write_text(json.dumps(manifest))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunError(f"{folder}: the disk is full; the checkpoints before step {step} are kept") from error
        raise


def read_checkpoint(folder: Path) -> Saved:
    """Return the checkpoint in `folder`.

    Raises:
        RunError: a part of it is missing or damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if _checksum(folder / STATE) != manifest["sha256"]:
            raise RunError(f"{folder}: {STATE} is not what its manifest says")
        return Saved(manifest["step"], load_file(folder / STATE))
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{folder}: not a whole checkpoint: {error}") from error


def newest_checkpoint(checkpoints: Path) -> Saved | None:
    """Return the newest whole checkpoint of a run, None if there is none; warn of damaged ones."""
    for folder in sorted(checkpoints.glob("step_*"), reverse=True):
        try:
            return read_checkpoint(folder)
        except RunError as error:
            log.warning("skipped a damaged checkpoint: %s", error)
    return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
