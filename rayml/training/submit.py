"""`rayml submit`: run a rayml command as a job on a Ray cluster, and upload no more than it needs."""

import asyncio
import glob
import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import aiohttp
from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient
from rich.console import Console

from rayml.config import Config, load_config
from rayml.errors import ConfigError, RaymlError, RunError

LEFT_OUT = {".git", "runs", "data", "node_modules", "__pycache__", "wandb", "mlruns", "build", "dist"}
"""Folders that are not uploaded, wherever they are. Hidden ones, such as .venv, are not either."""
EXCLUDED = [".?*", "*.egg-info", *sorted(LEFT_OUT)]
"""The same, as patterns for Ray's packing. `.?*` and not `.*`, which would match the root folder "." as well."""
MOST_BYTES = 90 * 2**20
"""The largest upload. A dashboard accepts 100 MiB; the rest is for the archive's own bytes."""
CLIENT_ERRORS = RayError, RuntimeError, OSError, ValueError, aiohttp.ClientError
"""What Ray's client raises, depending on what went wrong."""
START_SECONDS = 30
"""How long a cluster's head that has just started may refuse jobs."""
NAME = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Command:
    """A rayml command, as its own parser understood it."""

    words: Sequence[str]
    """What follows `rayml` on the command line."""
    config: str | None = None
    overrides: Sequence[str] = ()
    out: str | None = None
    data: Sequence[str] = ()
    resumes: bool = False
    """Whether it has an option --resume that was not given."""


@dataclass(frozen=True)
class Submission:
    name: str
    """The run's name. Submitted again under the same name, the run goes on."""
    entrypoint: list[str]
    output: str | None
    """The folder or URI of its results."""


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
        address: of the cluster's dashboard, such as http://127.0.0.1:8265.
        folder: becomes the job's working directory.
        name: of the run; if None, its config's name for it.
        storage: a folder that all nodes share, or a URI, for the results of runs whose own folder is not shared.
        env: environment variables for the job.
        follow: whether to show the logs, and wait for the end.
        stop_on_interrupt: whether Ctrl-C stops the job; else it goes on by itself.

    Raises:
        ConfigError: the command's own input is bad; nothing was sent.
        RunError: the cluster does not answer, or refuses; another job writes to the same place; the job failed.
    """
    submission = prepare(command, folder, name, storage)
    with client_errors(address):
        client = JobSubmissionClient(address)  # if Ray's token auth is on, it reads RAY_AUTH_TOKEN
        refuse_second_job(client, submission.output)
        refuse_large(folder)
        job = send(client, submission, folder, env)
    out.print(f"job {job}: {shlex.join(submission.entrypoint)}", highlight=False, soft_wrap=True)
    if follow:
        follow_job(client, address, job, stop_on_interrupt, out)


def send(client: JobSubmissionClient, submission: Submission, folder: Path, env: dict[str, str]) -> str:
    """Submit the job and return its id, trying again while the cluster's head is still starting."""
    deadline = time.monotonic() + START_SECONDS
    os.environ["RAY_RUNTIME_ENV_IGNORE_GITIGNORE"] = "1"  # so that exactly the files checked here are uploaded
    runtime_env = {"working_dir": str(folder), "excludes": EXCLUDED, "env_vars": env}
    while True:
        try:
            return client.submit_job(
                entrypoint=shlex.join(submission.entrypoint),
                submission_id=f"{submission.name}-{time.strftime('%Y%m%d-%H%M%S')}",
                runtime_env=runtime_env,
                metadata={"rayml_output": submission.output} if submission.output else {},
            )
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(1)


def prepare(command: Command, folder: Path, name: str | None, storage: str | None) -> Submission:
    """Check a command as the cluster would, and have its results written to shared storage.

    Raises:
        ConfigError: its config is bad, or it needs files that the job would not find.
    """
    entrypoint = ["python", "-m", "rayml", *command.words]
    config = checked_config(command, folder) if command.config else None
    # `train` and `sweep` write to run.dir, `compare` to its --out.
    output = command.out or (config.run.dir if config else None)
    name = name or (folder_name(output) if output else command.words[0])
    if not NAME.fullmatch(name):
        raise ConfigError(f"--name: expected letters, digits, '.', '-' and '_', got {name!r}")
    if output and not is_shared(output):
        if not storage or not is_shared(storage):
            raise ConfigError(
                f"{output}: is on one machine only; give --storage a folder that all nodes share, such as /mnt/runs, "
                "or a bucket, such as s3://mine/runs"
            )
        root, query = split_query(storage)
        output = f"{root.rstrip('/')}/{name}{query}"
        if not command.out:  # a key may be given only once
            entrypoint = [word for word in entrypoint if not word.startswith("run.dir=")]
        entrypoint.append(f"--out={output}" if command.out else f"run.dir={output}")
    if command.resumes:  # so that the same job, submitted again, goes on
        entrypoint.append("--resume")
    return Submission(name, entrypoint, output)


def is_shared(path: str) -> bool:
    """Return whether all nodes may find the same folder at this path or URI."""
    return path.startswith("/") or "://" in path


def split_query(path: str) -> tuple[str, str]:
    """Return a path or URI, and the query of a URI with its question mark; a path has none."""
    root, mark, query = path.partition("?") if "://" in path else (path, "", "")
    return root, mark + query


def folder_name(path: str) -> str:
    """Return the last part of a folder's path or URI."""
    return split_query(path)[0].rstrip("/").rpartition("/")[2]


def checked_config(command: Command, folder: Path) -> Config:
    """Return a command's config.

    Raises:
        ConfigError: it is bad, or names files that would not be uploaded.
    """
    assert command.config
    is_uri = "://" in command.config
    uploaded = [file.as_posix() for file in uploaded_files(folder)]
    if not is_uri and os.path.normpath(command.config) not in uploaded:
        raise ConfigError(f"{command.config}: is not in {folder}, the folder that is uploaded; put it there")
    config = load_config(command.config if is_uri else folder / command.config, command.overrides)
    for path in command.data or config.data.path:
        if not (is_shared(path) or path.startswith("hf:") or is_uploaded(path, folder, uploaded)):
            raise ConfigError(f"data.path: {path} is not uploaded; put it where all nodes read it, and give that path")
    return config


def is_uploaded(path: str, folder: Path, uploaded: Sequence[str]) -> bool:
    """Return whether a relative path names any uploaded file: itself, its folder, or by a glob."""
    matches = [path] if (folder / path).exists() else glob.glob(path, root_dir=folder, recursive=True)
    names = set(map(os.path.normpath, matches))
    return "." in names or any(
        name in names or not names.isdisjoint(map(str, PurePosixPath(name).parents)) for name in uploaded
    )


def uploaded_files(folder: Path) -> list[Path]:
    """Return the files that are uploaded, relative to the folder."""
    files = []
    for root, folders, names in os.walk(folder, followlinks=True):  # as Ray does
        folders[:] = [name for name in folders if not is_left_out(name)]  # not even listed: a .venv is large
        files += [Path(root, name) for name in names if not is_left_out(name)]
    return sorted(file.relative_to(folder) for file in files if file.is_file())


def is_left_out(name: str) -> bool:
    return name.startswith(".") or name in LEFT_OUT or name.endswith(".egg-info")


def refuse_large(folder: Path) -> None:
    """Raise ConfigError if the upload is larger than the cluster accepts."""
    sizes = {file: (folder / file).stat().st_size for file in uploaded_files(folder)}
    total = sum(sizes.values())
    if total > MOST_BYTES:
        largest = sorted(sizes, key=lambda file: -sizes[file])[:3]
        names = ", ".join(f"{file} ({sizes[file] / 2**20:.0f} MiB)" for file in largest)
        raise ConfigError(
            f"{folder}: {total / 2**20:.0f} MiB to upload, {MOST_BYTES // 2**20} at most; the largest: "
            f"{names}. Move them into data/ or runs/, or give --working-dir a smaller folder"
        )


@contextmanager
def client_errors(address: str) -> Iterator[None]:
    """Turn errors of Ray's client into a RunError: a dashboard that refuses, or does not answer."""
    try:
        yield
    except RaymlError:
        raise
    except CLIENT_ERRORS as error:
        raise RunError(f"{address}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def refuse_second_job(client: JobSubmissionClient, output: str | None) -> None:
    """Raise RunError if another job still writes to this place: two would spoil each other's results."""
    for job in client.list_jobs():
        theirs = (job.metadata or {}).get("rayml_output", "")
        if output and theirs.rstrip("/") == output.rstrip("/") and not job.status.is_terminal():
            raise RunError(f"{output}: job {job.submission_id} still writes there; stop it, or choose another place")


def follow_job(client: JobSubmissionClient, address: str, job: str, stop_on_interrupt: bool, out: Console) -> None:
    """Print a job's logs until it ends.

    Raises:
        RunError: it failed.
    """

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            out.print(lines, end="", markup=False, highlight=False, soft_wrap=True)

    still_running = f"job {job} goes on: ray job logs --follow --address {address} {job}"
    try:
        asyncio.run(tail())
    except CLIENT_ERRORS as error:
        raise RunError(f"{address}: {first_line(error)}; {still_running}") from error
    except KeyboardInterrupt:
        if stop_on_interrupt:
            with client_errors(address):
                client.stop_job(job)
            out.print(f"\njob {job} is told to stop; submit it again to go on", highlight=False)
        else:
            out.print(f"\n{still_running}", highlight=False)
        return
    with client_errors(address):
        info = client.get_job_info(job)
    if not info.status.is_terminal():
        raise RunError(f"{address}: the logs ended; {still_running}")
    if info.status != JobStatus.SUCCEEDED:
        reason = (info.message or "").strip().rpartition("\n")[2]
        if "ModuleNotFoundError" in reason:
            reason += " (is rayml installed for the `python` that the head finds first?)"
        raise RunError(f"job {job}: {info.status.value.lower()}. {reason}")
