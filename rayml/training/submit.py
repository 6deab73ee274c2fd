"""`rayml submit`: hand a rayml command to a Ray cluster as a job, with no more than it needs."""

import asyncio
import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient
from rich.console import Console

from rayml.config import Config, load_config
from rayml.errors import ConfigError, RaymlError, RunError

LEFT_OUT = {".git", "runs", "data", "node_modules", "__pycache__", "wandb", "mlruns", "build", "dist"}
"""Folders that are not uploaded, wherever they are; neither are hidden ones, such as .venv."""
EXCLUDED = [".?*", "*.egg-info", *sorted(LEFT_OUT)]
"""The same, as Ray's packing has it: of "." itself nothing would be left."""
MOST_BYTES = 90 * 2**20
"""Of an upload: a dashboard takes 100 MiB, and the packing is not counted here."""
REFUSALS = RayError, RuntimeError, OSError, ValueError
"""What Ray's client raises, by what went wrong."""
START_SECONDS = 30
NAME = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Command:
    """A rayml command, as its own parser understood it."""

    words: Sequence[str]
    """What stands behind `rayml`."""
    config: str | None = None
    overrides: Sequence[str] = ()
    out: str | None = None
    data: Sequence[str] = ()
    resumes: bool = False
    """Whether it knows --resume, and was not given it."""


@dataclass(frozen=True)
class Submission:
    name: str
    """Of the run: the same again goes on with it."""
    entrypoint: list[str]
    output: str | None
    """Where its results go."""


def submit(
    address: str,
    command: Command,
    folder: Path,
    name: str | None,
    storage: str | None,
    env: dict[str, str],
    follow: bool,
    stop_on_interrupt: bool,
    out: Console,
) -> None:
    """Upload a folder, start the command there as a job, and show its logs until it ends.

    Args:
        address: the dashboard's, such as http://127.0.0.1:8265.
        folder: what the job finds as its working directory.
        name: of the run, else as its config calls it.
        storage: a folder that all nodes share, or its URI, where runs go that have no place of their own.
        env: variables for the job.
        stop_on_interrupt: whether Ctrl-C stops the job; else it goes on by itself.

    Raises:
        ConfigError: the command's own input is bad; nothing was sent.
        RunError: the cluster does not answer, or refuses; another job works in the same place; the job failed.
    """
    asked = prepare(command, folder, name, storage)
    with answering(address):
        client = JobSubmissionClient(address)  # with Ray's token auth on, by RAY_AUTH_TOKEN
        refuse_second_job(client, asked.output)
        refuse_large(folder)
        job = send(client, asked, folder, env)
    out.print(f"job {job}: {shlex.join(asked.entrypoint)}", highlight=False, soft_wrap=True)
    if follow:
        watch(client, address, job, stop_on_interrupt, out)


def send(client: JobSubmissionClient, asked: Submission, folder: Path, env: dict[str, str]) -> str:
    """Submit, and return the job's id; a head that has just started may not take jobs at once."""
    deadline = time.monotonic() + START_SECONDS
    os.environ["RAY_RUNTIME_ENV_IGNORE_GITIGNORE"] = "1"  # what is checked here is what is uploaded
    uploaded = {"working_dir": str(folder), "excludes": EXCLUDED, "env_vars": env}
    while True:
        try:
            return client.submit_job(
                entrypoint=shlex.join(asked.entrypoint),
                submission_id=f"{asked.name}-{time.strftime('%Y%m%d-%H%M%S')}",
                runtime_env=uploaded,
                metadata={"rayml_output": asked.output} if asked.output else {},
            )
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(1)


def prepare(command: Command, folder: Path, name: str | None, storage: str | None) -> Submission:
    """Check a command as it would check itself on the cluster, and give its results a place that lasts.

    Raises:
        ConfigError: its config is bad, or it needs what would not be there.
    """
    entry = ["python", "-m", "rayml", *command.words]
    config = checked_config(command, folder) if command.config else None
    # `train` and `sweep` write to run.dir, `compare` to its --out.
    output = command.out or (config.run.dir if config else None)
    name = name or (last_part(output) if output else command.words[0])
    if not NAME.fullmatch(name):
        raise ConfigError(f"--name: expected letters, digits, '.', '-' and '_', got {name!r}")
    if output and not is_shared(output):
        if not storage or not is_shared(storage):
            raise ConfigError(
                f"{output}: lies on one machine alone; give --storage a folder that all nodes share: /mnt/runs, "
                "or a bucket, such as s3://mine/runs"
            )
        address, mark, settings = storage.partition("?") if "://" in storage else (storage, "", "")
        output = f"{address.rstrip('/')}/{name}{mark}{settings}"
        if not command.out:
            entry = [word for word in entry if not word.startswith("run.dir=")]  # no key is given twice
        entry.append(f"--out={output}" if command.out else f"run.dir={output}")
    # A job that is submitted again goes on.
    return Submission(name, [*entry, "--resume"] if command.resumes else entry, output)


def is_shared(output: str) -> bool:
    """Return whether all nodes may know a folder by this name."""
    return output.startswith("/") or "://" in output


def last_part(output: str) -> str:
    """Return a folder's own name; a URI's settings are no part of it."""
    return output.partition("?" if "://" in output else "\0")[0].rstrip("/").rpartition("/")[2]


def checked_config(command: Command, folder: Path) -> Config:
    """Return a command's config.

    Raises:
        ConfigError: it is bad, or names files that would not be uploaded.
    """
    assert command.config
    uploaded = [file.as_posix() for file in files_of(folder)]
    if "://" not in command.config and os.path.normpath(command.config) not in uploaded:
        raise ConfigError(f"{command.config}: is not among what is uploaded from {folder}; put it there")
    here = command.config if "://" in command.config else folder / command.config
    config = load_config(here, command.overrides)
    for path in command.data or config.data.path:
        known = is_shared(path) or path.startswith("hf:")
        wanted = os.path.normpath(path)
        if not known and not any(fnmatch(file, wanted) or file.startswith(f"{wanted}/") for file in uploaded):
            raise ConfigError(f"data.path: {path} is not uploaded; put it where all nodes read it, and name that")
    return config


def files_of(folder: Path) -> list[Path]:
    """Return the files that are uploaded, relative to the folder."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_left_out(name)]  # never walked: a .venv has thousands of files
        found += [Path(root, name) for name in names if not is_left_out(name)]
    return sorted(file.relative_to(folder) for file in found if file.is_file())


def is_left_out(part: str) -> bool:
    return part.startswith(".") or part in LEFT_OUT or part.endswith(".egg-info")


def refuse_large(folder: Path) -> None:
    """Raise ConfigError where what is uploaded is more than the cluster takes."""
    files = {file: (folder / file).stat().st_size for file in files_of(folder)}
    if sum(files.values()) > MOST_BYTES:
        largest = sorted(files, key=lambda file: -files[file])[:3]
        named = ", ".join(f"{file} ({files[file] / 2**20:.0f} MiB)" for file in largest)
        raise ConfigError(
            f"{folder}: {sum(files.values()) / 2**20:.0f} MiB to upload, {MOST_BYTES // 2**20} at most; the largest: "
            f"{named}. Move them into data/ or runs/, or give --working-dir a smaller folder"
        )


@contextmanager
def answering(address: str) -> Iterator[None]:
    """Turn what a cluster's dashboard refuses, or its silence, into a RunError."""
    try:
        yield
    except RaymlError:
        raise
    except REFUSALS as error:
        raise RunError(f"{address}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def refuse_second_job(client: JobSubmissionClient, output: str | None) -> None:
    """Raise RunError if a job still writes to this place: two would spoil each other's results."""
    for job in client.list_jobs():
        if output and (job.metadata or {}).get("rayml_output") == output and not job.status.is_terminal():
            raise RunError(f"{output}: job {job.submission_id} still writes there; stop it, or choose another place")


def watch(client: JobSubmissionClient, address: str, job: str, stop_on_interrupt: bool, out: Console) -> None:
    """Print a job's logs until it ends.

    Raises:
        RunError: it failed.
    """

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            out.print(lines, end="", markup=False, highlight=False, soft_wrap=True)

    goes_on = f"job {job} goes on: ray job logs --follow --address {address} {job}"
    try:
        asyncio.run(tail())
    except REFUSALS as error:
        raise RunError(f"{address}: {first_line(error)}; {goes_on}") from error
    except KeyboardInterrupt:
        if stop_on_interrupt:
            with answering(address):
                client.stop_job(job)
            out.print(f"\njob {job} is told to stop; submitted again, it goes on", highlight=False)
        else:
            out.print(f"\n{goes_on}", highlight=False)
        return
    with answering(address):
        info = client.get_job_info(job)
    if not info.status.is_terminal():
        raise RunError(f"{address}: the logs ended; {goes_on}")
    if info.status != JobStatus.SUCCEEDED:
        message = (info.message or "").strip().splitlines()
        reason = message[-1] if message else ""
        if "ModuleNotFoundError" in reason:
            reason += " (is rayml installed for the `python` that the head finds first?)"
        raise RunError(f"job {job}: {info.status.value.lower()}. {reason}")
