"""`rayml submit`: hand a rayml command to a Ray cluster as a job, with no more than it needs."""

import asyncio
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient
from rich.console import Console

from rayml.config import Config, load_config
from rayml.errors import ConfigError, RunError

LEFT_OUT = {".git", "runs", "data", "node_modules", "__pycache__", "wandb", "mlruns", "build", "dist"}
"""Folders that are not uploaded, wherever they are; neither are hidden ones, such as .venv."""
MOST_BYTES = 90 * 2**20
"""Of an upload: a dashboard takes 100 MiB, and the packing is not counted here."""
PLACE = {"train": "run.dir={}", "sweep": "--out={}", "compare": "--out={}"}
"""How a command that takes a config is told where its results go."""


@dataclass(frozen=True)
class Submission:
    """A command for the cluster."""

    name: str
    """Of the run: the same again goes on with it."""
    entrypoint: list[str]


def submit(
    address: str,
    command: Sequence[str],
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
        command: what stands behind `rayml`, such as `train CONFIG.yaml workers=8`.
        folder: what the job finds as its working directory.
        name: of the run, else as its config calls it.
        storage: a folder that all nodes share, where runs go that have no place of their own.
        env: variables for the job.
        stop_on_interrupt: whether Ctrl-C stops the job; else it goes on by itself.

    Raises:
        ConfigError: the command's own input is bad; nothing was sent.
        RunError: the cluster does not answer, or refuses; the run's last job still runs; the job failed.
    """
    asked = prepare(command, folder, name, storage)
    client = connect(address)
    refuse_second_job(client, asked.name)
    with tempfile.TemporaryDirectory() as staged:
        stage(folder, Path(staged))
        job = client.submit_job(
            entrypoint=shlex.join(asked.entrypoint),
            submission_id=f"{asked.name}-{time.strftime('%Y%m%d-%H%M%S')}",
            runtime_env={"working_dir": staged, "env_vars": env},
            metadata={"rayml_run": asked.name},
        )
    out.print(f"job {job}: {shlex.join(asked.entrypoint)}", highlight=False, soft_wrap=True)
    if follow:
        watch(client, address, job, stop_on_interrupt, out)


def prepare(command: Sequence[str], folder: Path, name: str | None, storage: str | None) -> Submission:
    """Check a command as it would check itself on the cluster, and give its results a place that lasts."""
    verb, *rest = command
    config = config_of(rest, folder) if verb in PLACE and rest else None
    name = name or (Path(config.run.dir).name if config else verb)
    entry = ["python", "-m", "rayml.cli", verb, *rest]
    if not re.fullmatch(r"[\w.-]+", name):
        raise ConfigError(f"--name: expected letters, digits, '.', '-' and '_', got {name!r}")
    if verb in PLACE and config:
        place = next((word.partition("=")[2] for word in rest if word.startswith("--out=")), None)
        place = config.run.dir if verb == "train" else place
        if not place or not is_everywhere(place):
            if not storage:
                raise ConfigError(
                    f"{place or '--out'}: lies on one machine alone; give --storage a folder that all nodes share"
                )
            entry.append(PLACE[verb].format(f"{storage.rstrip('/')}/{name}"))
        # A job that is submitted again goes on.
        entry += ["--resume"] if verb in ("train", "sweep") and "--resume" not in rest else []
    return Submission(name, entry)


def config_of(words: Sequence[str], folder: Path) -> Config:
    """Return the config that a command names.

    Raises:
        ConfigError: it is bad, or names data that would not be there.
    """
    config = load_config(folder / words[0], [word for word in words[1:] if "=" in word and not word.startswith("-")])
    uploaded = {file.as_posix() for file in files_of(folder)}
    for path in config.data.path:
        is_sent = any(file == path or file.startswith(f"{path.rstrip('/')}/") for file in uploaded)
        if not is_everywhere(path) and not path.startswith("hf:") and not is_sent:
            raise ConfigError(f"data.path: {path} is not uploaded; put it where all nodes read it, and name that")
    return config


def is_everywhere(path: str) -> bool:
    """Return whether a path can mean the same on every machine."""
    return "://" in path or path.startswith("/")


def files_of(folder: Path) -> list[Path]:
    """Return the files that are uploaded, relative to the folder."""
    return sorted(
        file.relative_to(folder)
        for file in folder.rglob("*")
        if file.is_file() and not any(is_left_out(part) for part in file.relative_to(folder).parts)
    )


def is_left_out(part: str) -> bool:
    return part.startswith(".") or part in LEFT_OUT or part.endswith(".egg-info")


def stage(folder: Path, staged: Path) -> None:
    """Copy what is uploaded.

    Raises:
        ConfigError: it is more than the cluster takes.
    """
    files = {file: (folder / file).stat().st_size for file in files_of(folder)}
    if sum(files.values()) > MOST_BYTES:
        largest = sorted(files, key=lambda file: -files[file])[:3]
        named = ", ".join(f"{file} ({files[file] / 2**20:.0f} MiB)" for file in largest)
        raise ConfigError(
            f"{folder}: {sum(files.values()) / 2**20:.0f} MiB to upload, {MOST_BYTES // 2**20} at most; the largest: "
            f"{named}. Move them into data/ or runs/, or give --working-dir a smaller folder"
        )
    for file in files:
        (staged / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, staged / file)


def connect(address: str) -> JobSubmissionClient:
    """Return a client of a cluster's dashboard; with Ray's token auth on, by RAY_AUTH_TOKEN.

    Raises:
        RunError: nobody answers there, or the token is refused.
    """
    try:
        return JobSubmissionClient(address)
    except Exception as error:  # Ray raises ConnectionError, RuntimeError and its own, by what went wrong
        first = str(error).strip().splitlines()[0]
        raise RunError(f"{address}: {first}") from error


def refuse_second_job(client: JobSubmissionClient, name: str) -> None:
    """Raise RunError if a job still works on the run of this name: two would write into one folder."""
    for job in client.list_jobs():
        if (job.metadata or {}).get("rayml_run") == name and not job.status.is_terminal():
            raise RunError(f"{name}: job {job.submission_id} still works on it; stop it, or give --name another")


def watch(client: JobSubmissionClient, address: str, job: str, stop_on_interrupt: bool, out: Console) -> None:
    """Print a job's logs until it ends.

    Raises:
        RunError: it failed.
    """

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            out.print(lines, end="", markup=False, highlight=False, soft_wrap=True)

    try:
        asyncio.run(tail())
    except KeyboardInterrupt:
        if stop_on_interrupt:
            client.stop_job(job)
            out.print(f"\njob {job} is told to stop; submitted again, it goes on", highlight=False)
        else:
            out.print(f"\njob {job} goes on: ray job logs --follow --address {address} {job}", highlight=False)
        return
    status = client.get_job_status(job)
    if status != JobStatus.SUCCEEDED:
        message = client.get_job_info(job).message or ""
        raise RunError(f"job {job}: {status.value.lower()}. {message.strip().splitlines()[-1] if message else ''}")
