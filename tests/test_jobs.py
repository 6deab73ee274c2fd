"""Jobs on a real Ray head with token auth: `ray job submit`, `rayml submit`, and who is refused."""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import aiohttp
import psutil
import pytest
import requests
import typer
from conftest import make_config
from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobStatus
from rich.console import Console

from rayml.cli.deploy import parse_command
from rayml.config import dump_config
from rayml.errors import ConfigError, RunError
from rayml.runs.folder import RunFolder
from rayml.training.submit import (
    EXCLUDED,
    MOST_BYTES,
    follow_job,
    prepare,
    refuse_large,
    refuse_second_job,
    uploaded_files,
)

ROOT = Path(__file__).parents[1]
TOKEN = "a-token-of-the-tests-0123456789abcdef"
PATIENCE_SECONDS = 120


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """The dashboard's address of a Ray head that asks for a token, and what a client of it has in its environment."""
    port, dashboard, client, agent = free_ports(4)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
    # The `python` of a job is the head's: ours, also where no virtual environment is active.
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    command = ["ray", "start", "--head", "--block", "--num-cpus=4", f"--port={port}"]
    command += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", "--disable-usage-stats"]
    command[0] = str(Path(sys.executable).with_name("ray"))
    log = (tmp_path_factory.mktemp("head") / "log").open("w+")
    # Another Ray's agent, such as that of the tests before, holds the usual port: then jobs find none.
    command += [f"--dashboard-agent-listen-port={agent}"]
    # Of its own, and short, for the sockets in it: what `ray start` leaves in the usual one, others would join.
    folder = tempfile.mkdtemp(prefix="ray")
    command += [f"--temp-dir={folder}"]
    process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(address, process, log)
        yield address, env
    finally:
        # What it started sees that it is gone, but takes half a minute.
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(address, process, log):
    deadline, found = time.monotonic() + PATIENCE_SECONDS, None
    while time.monotonic() < deadline:
        with suppress(requests.ConnectionError):
            found = requests.get(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
            if found.ok:
                return
        assert process.poll() is None, Path(log.name).read_text()
        time.sleep(0.5)
    raise AssertionError(f"no Ray head within {PATIENCE_SECONDS} s: {found and found.text}")


def run(command, env, cwd=None):
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=400)


RECORDING = """
import os
from pathlib import Path
from rayml.algorithms.fomaml import FomamlPlus

class Recording(FomamlPlus):
    def query_losses(self, *sides):
        found = {name: value for name, value in os.environ.items() if name.startswith("NCCL_")}
        Path(os.environ["RECORDED"]).write_text(str(found))
        return super().query_losses(*sides)
"""
"""An algorithm of a user's own: it writes what the training workers have in their environment."""


def project(tmp_path) -> Path:
    """A user's folder: a config, and tasks that lie elsewhere."""
    folder = tmp_path / "mine"
    folder.mkdir(parents=True)
    config = make_config(tmp_path, outer={"steps": 4}, run={"dir": "runs/first", "checkpoint_every": 2})
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


@pytest.mark.ray
def test_a_job_needs_the_token_and_goes_on_when_submitted_again(head, tmp_path):
    address, env = head
    folder, shared = project(tmp_path), tmp_path / "shared"
    (folder / "recording.py").write_text(RECORDING)
    of_job = ["--env", "NCCL_SOCKET_IFNAME=eth7", "--env", f"RECORDED={tmp_path / 'recorded'}"]
    command = [sys.executable, "-m", "rayml", "submit", "--storage", str(shared), *of_job]
    submit = [*command, address, "train", "config.yaml", "algorithm.name=recording:Recording"]
    without = {name: value for name, value in env.items() if not name.startswith("RAY_")}
    wrong = without | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another-token-0123456789abcdefabcd"}
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda env: run(submit, env, folder), (without, wrong)))
    for refused in both:
        assert refused.returncode == 1
        assert "RunError" in refused.stderr
        assert "oken" in refused.stderr, refused.stderr
        assert not shared.exists()

    first = run(submit, env, folder)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "step 4/4: query loss" in first.stdout, "the job's logs are shown"
    assert [record["step"] for record in RunFolder(shared / "first").records()] == [1, 2, 3, 4]
    entrypoint = re.search(r"^job \S+: python -m rayml (train .*)$", first.stdout, re.M)[1].split()
    own = "algorithm.name=recording:Recording"
    assert entrypoint == ["train", "config.yaml", own, f"run.dir={shared / 'first'}", "--resume"]
    assert (tmp_path / "recorded").read_text() == "{'NCCL_SOCKET_IFNAME': 'eth7'}", "workers have what a job is told"

    # Submitted again, by Ray's own command from a clone of the project, it goes on.
    clone = tmp_path / "clone"
    for part in ("jobs", "rayml"):
        shutil.copytree(ROOT / part, clone / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("config.yaml", "recording.py"):
        shutil.copyfile(folder / file, clone / file)
    job = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", address, "--working-dir", "."]
    with ThreadPoolExecutor() as pool:  # beside it, a job that fails
        evaluate = [sys.executable, "-m", "rayml", "submit", address, "evaluate", str(shared / "third")]
        ends = pool.submit(run, evaluate, env, folder)
        of_ray = ["--runtime-env-json", json.dumps({"env_vars": {"RECORDED": str(tmp_path / "again")}})]
        again = run([*job, *of_ray, "--", "python", "jobs/train.py", *entrypoint[1:], "outer.steps=6"], env, clone)
        failing = ends.result()
    assert again.returncode == 0, again.stdout + again.stderr
    assert "step 5/6" in again.stdout
    assert "step 1/6" not in again.stdout
    assert [record["step"] for record in RunFolder(shared / "first").records()] == [1, 2, 3, 4, 5, 6]

    assert failing.returncode == 1
    assert "no run here" in failing.stdout, "the job's own error"
    assert "failed" in failing.stderr


# What is checked before anything is sent


def prepared(words, folder, name=None, storage=None):
    return prepare(parse_command(words), folder, name, storage)


def test_a_run_needs_a_place_that_all_nodes_share(tmp_path):
    folder = project(tmp_path)
    with pytest.raises(ConfigError, match="--storage"):
        prepared(["train", "config.yaml"], folder)
    with pytest.raises(ConfigError, match="--storage"):
        prepared(["train", "config.yaml"], folder, storage="runs")
    for settings in ("", "?endpoint_override=minio:9000&scheme=http"):
        found = prepared(["train", "config.yaml"], folder, storage=f"s3://bucket/runs/{settings}")
        assert (found.name, found.output) == ("first", f"s3://bucket/runs/first{settings}")
        own = prepared(["train", "config.yaml", f"run.dir=s3://bucket/mine{settings}"], folder)
        assert (own.name, own.output) == ("mine", f"s3://bucket/mine{settings}")
    found = prepared(["train", "config.yaml"], folder, storage="/mnt/runs/")
    assert found.entrypoint[-2:] == ["run.dir=/mnt/runs/first", "--resume"]
    moved = prepared(["train", "config.yaml", "run.dir=runs/mine"], folder, storage="/mnt/runs")
    assert [word for word in moved.entrypoint if "run.dir" in word] == ["run.dir=/mnt/runs/mine"]
    named = prepared(["train", "--resume", "config.yaml", "run.dir=/mnt/mine"], folder)
    assert (named.name, named.output, named.entrypoint[-1]) == ("mine", "/mnt/mine", "run.dir=/mnt/mine")
    swept = prepared(["sweep", "config.yaml", "--search", "inner.lr=loguniform(1e-2,1)"], folder, storage="/mnt")
    assert swept.entrypoint[-3:] == ["inner.lr=loguniform(1e-2,1)", "run.dir=/mnt/first", "--resume"]
    compared = ["compare", "config.yaml", "--variant", "mine=inner.lr=0.3", "--seeds", "3"]
    assert prepared(compared, folder, "trial", "/mnt").entrypoint[-3:] == ["--seeds", "3", "--out=/mnt/trial"]
    assert prepared([*compared, "--out", "/mnt/x"], folder).output == "/mnt/x"
    assert prepared(["evaluate", "/mnt/mine"], folder).entrypoint[-2:] == ["evaluate", "/mnt/mine"]
    for name in ("a b", "..", "-x"):
        with pytest.raises(ConfigError, match="--name"):
            prepared(["evaluate", "/mnt/mine"], folder, name)
    with pytest.raises(typer.BadParameter, match="no 'nonsense' to submit"):
        parse_command(["nonsense"])


def test_a_bad_config_or_data_that_stays_behind_is_refused_before_it_is_sent(tmp_path):
    folder = project(tmp_path)
    with pytest.raises(ConfigError, match=r"inner\.lr"):
        prepared(["train", "config.yaml", "inner.lr=-1"], folder, storage="/mnt")
    with pytest.raises(ConfigError, match="the folder that is uploaded"):
        prepared(["train", str(folder / "config.yaml")], folder, storage="/mnt")
    for data in (["data.path=data/rows.jsonl"], ["--data", "data/rows.jsonl"]):
        with pytest.raises(ConfigError, match=r"data/rows\.jsonl is not uploaded"):
            prepared(["compare" if data[0] == "--data" else "train", "config.yaml", *data], folder, storage="/mnt")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "rows.jsonl").write_text("{}")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "data").mkdir(parents=True)
    (elsewhere / "rows.jsonl").write_text("{}")
    (elsewhere / "data" / "rows.jsonl").write_text("{}")
    (folder / "linked").symlink_to(elsewhere)
    uploaded = ("tasks", "./tasks", "tasks/*.jsonl", "tasks/**/*.jsonl", ".", "linked", "linked/rows.jsonl")
    for path in uploaded:
        prepared(["train", "config.yaml", f"data.path={path}"], folder, storage="/mnt")
    for path in ("../elsewhere", "linked/data", "linked/data/*.jsonl", "tasks/*.csv", "*.jsonl"):
        with pytest.raises(ConfigError, match="is not uploaded"):
            prepared(["train", "config.yaml", f"data.path={path}"], folder, storage="/mnt")


def test_two_jobs_never_write_to_one_place():
    running = SimpleNamespace(submission_id="a-1", metadata={"rayml_output": "/mnt/a"}, status=JobStatus.RUNNING)
    ended = SimpleNamespace(submission_id="b-1", metadata={"rayml_output": "/mnt/b"}, status=JobStatus.FAILED)
    client = SimpleNamespace(list_jobs=lambda: [running, ended])
    for output in ("/mnt/a", "/mnt/a/"):
        with pytest.raises(RunError, match="job a-1 still writes there"):
            refuse_second_job(client, output)
    for output in ("/mnt/b", "/mnt/c", None):
        refuse_second_job(client, output)


def test_logs_that_break_off_are_an_error_that_says_how_to_go_on():
    async def tail_job_logs(job):
        yield "step 1\n"
        raise aiohttp.ServerDisconnectedError  # no OSError

    client, printed = SimpleNamespace(tail_job_logs=tail_job_logs), io.StringIO()
    with pytest.raises(RunError, match=r"Server disconnected; job a-1 goes on: ray job logs --follow"):
        follow_job(client, "http://head:8265", "a-1", False, Console(file=printed))
    assert printed.getvalue() == "step 1\n"


def test_only_what_is_needed_is_uploaded(tmp_path):
    folder = project(tmp_path)
    for name in (".git/config", "runs/first/x", "data/rows.jsonl", ".venv/lib/x.py", "code/__pycache__/x.pyc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    (folder / "code" / "x.py").write_text("x")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "rows.jsonl").write_text("x")
    (folder / "tasks").symlink_to(tmp_path / "linked")
    assert [file.as_posix() for file in uploaded_files(folder)] == ["code/x.py", "config.yaml", "tasks/rows.jsonl"]
    refuse_large(folder)
    packed = tmp_path / "packed.zip"  # as Ray's client packs it
    create_package(str(folder), packed, include_gitignore=False, excludes=EXCLUDED)
    names = [name for name in ZipFile(packed).namelist() if not name.endswith("/")]
    assert sorted(names) == ["code/x.py", "config.yaml", "tasks/rows.jsonl"]
    with (folder / "code" / "weights.bin").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ConfigError, match=r"the largest: code/weights.bin \(90 MiB\)"):
        refuse_large(folder)
