"""Jobs on a real Ray head with token auth: `ray job submit`, `rayml submit`, and who is refused."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import make_config
from rich.console import Console

from rayml.config import dump_config
from rayml.distributed.submit import MOST_BYTES, files_of, prepare, stage
from rayml.errors import ConfigError
from rayml.runs.folder import RunFolder

ROOT = Path(__file__).parents[1]
QUIET = Console(quiet=True)
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
    port, dashboard, client = free_ports(3)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
    command = ["ray", "start", "--head", "--block", "--num-cpus=4", f"--port={port}"]
    command += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", "--disable-usage-stats"]
    command[0] = str(Path(sys.executable).with_name("ray"))
    log = (tmp_path_factory.mktemp("head") / "log").open("w+")
    process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(address, env, process, log)
        yield address, env
    finally:
        process.terminate()
        process.wait(60)


def wait_for(address, env, process, log):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        listed = run([str(Path(sys.executable).with_name("ray")), "job", "list", "--address", address], env)
        if listed.returncode == 0:
            return
        assert process.poll() is None, Path(log.name).read_text()
        time.sleep(1)
    raise AssertionError(f"no Ray head within {PATIENCE_SECONDS} s: {listed.stderr}")


def run(command, env, cwd=None):
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=400)


def project(tmp_path) -> Path:
    """A user's folder: a config, and tasks that lie elsewhere."""
    folder = tmp_path / "mine"
    folder.mkdir(parents=True)
    config = make_config(tmp_path, outer={"steps": 4}, workers=2, run={"dir": "runs/first", "checkpoint_every": 2})
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


def test_a_job_needs_the_token_and_goes_on_when_submitted_again(head, tmp_path):
    address, env = head
    folder, shared = project(tmp_path), tmp_path / "shared"
    submit = [sys.executable, "-m", "rayml.cli", "submit", "--storage", str(shared), address, "train", "config.yaml"]
    for wrong in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another-token-0123456789abcdefabcd"}):
        without = {name: value for name, value in env.items() if not name.startswith("RAY_")} | wrong
        refused = run(submit, without, folder)
        assert refused.returncode == 1
        assert "RunError" in refused.stderr
        assert "oken" in refused.stderr, refused.stderr
        assert not shared.exists()

    first = run(submit, env, folder)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "step 4/4: query loss" in first.stdout, "the job's logs are shown"
    assert [record["step"] for record in RunFolder(shared / "first").records()] == [1, 2, 3, 4]
    again = run([*submit, "outer.steps=6"], env, folder)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "step 5/6" in again.stdout
    assert "step 1/6" not in again.stdout
    assert [record["step"] for record in RunFolder(shared / "first").records()] == [1, 2, 3, 4, 5, 6]

    # The same by Ray's own command, from a clone of the project.
    clone = tmp_path / "clone"
    for part in ("jobs", "rayml"):
        shutil.copytree(ROOT / part, clone / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(folder / "config.yaml", clone / "config.yaml")
    job = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", address, "--working-dir", "."]
    job += ["--", "python", "jobs/train.py", "config.yaml", f"run.dir={shared / 'second'}", "outer.steps=2"]
    second = run(job, env, clone)
    assert second.returncode == 0, second.stdout + second.stderr
    assert [record["step"] for record in RunFolder(shared / "second").records()] == [1, 2]

    failing = run([*submit, "outer.lr=1e30", "outer.optimizer=sgd", f"run.dir={shared / 'third'}"], env, folder)
    assert failing.returncode == 1
    assert "not finite" in failing.stdout + failing.stderr


# What is checked before anything is sent


def test_a_run_needs_a_place_that_all_nodes_share(tmp_path):
    folder = project(tmp_path)
    with pytest.raises(ConfigError, match="--storage"):
        prepare(["train", "config.yaml"], folder, None, None)
    found = prepare(["train", "config.yaml"], folder, None, "s3://bucket/runs/")
    assert found.entrypoint[-2:] == ["run.dir=s3://bucket/runs/first", "--resume"]
    named = prepare(["train", "config.yaml", "run.dir=/mnt/mine"], folder, None, None)
    assert (named.name, named.entrypoint[-1]) == ("mine", "--resume")
    assert "run.dir=/mnt/mine" in named.entrypoint
    swept = prepare(["compare", "config.yaml", "--seeds", "3"], folder, "trial", "/mnt")
    assert swept.entrypoint[-3:] == ["--seeds", "3", "--out=/mnt/trial"]
    assert prepare(["evaluate", "/mnt/mine"], folder, None, None).entrypoint[-2:] == ["evaluate", "/mnt/mine"]
    with pytest.raises(ConfigError, match="--name"):
        prepare(["evaluate", "/mnt/mine"], folder, "a b", None)


def test_a_bad_config_or_data_that_stays_behind_is_refused_before_it_is_sent(tmp_path):
    folder = project(tmp_path)
    with pytest.raises(ConfigError, match=r"inner\.lr"):
        prepare(["train", "config.yaml", "inner.lr=-1"], folder, None, "/mnt")
    with pytest.raises(ConfigError, match=r"data/rows\.jsonl is not uploaded"):
        prepare(["train", "config.yaml", "data.path=data/rows.jsonl"], folder, None, "/mnt")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "rows.jsonl").write_text("{}")
    prepare(["train", "config.yaml", "data.path=tasks"], folder, None, "/mnt")


def test_only_what_is_needed_is_uploaded(tmp_path):
    folder = project(tmp_path)
    for name in (".git/config", "runs/first/x", "data/rows.jsonl", ".venv/lib/x.py", "code/__pycache__/x.pyc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    (folder / "code" / "x.py").write_text("x")
    assert [file.as_posix() for file in files_of(folder)] == ["code/x.py", "config.yaml"]
    stage(folder, tmp_path / "staged")
    assert yaml.safe_load((tmp_path / "staged" / "config.yaml").read_text())["outer"]["steps"] == 4
    with (folder / "code" / "weights.bin").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ConfigError, match=r"the largest: code/weights.bin \(90 MiB\)"):
        stage(folder, tmp_path / "staged")
