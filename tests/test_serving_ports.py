"""Before a server starts: who has its ports, and what a killed one left."""

import json
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from rayml.errors import ConfigError
from rayml.serving.ports import MARK, end_orphans, identity, mark_session, refuse_taken


@pytest.fixture(params=["", "ray::DashboardAgent", "VLLM::EngineCore"])
def sleeper(request):
    """Start processes that look like a Ray's: its session folder stands in their command, or they log into it."""
    started = []

    def start(session):
        (session / "logs").mkdir()
        code = "-c", "import time; time.sleep(60)"
        named = [sys.executable, *code, f"--session-dir={session}"]
        with (session / "logs" / "agent.out").open("w") as log:
            renamed = {"args": [request.param, *code], "executable": sys.executable, "stdout": log}
            started.append(subprocess.Popen(**renamed if request.param else {"args": named}))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_taken_port_is_named_with_who_has_it():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port {port} is taken by process {os.getpid()} \("):
            refuse_taken("127.0.0.1", {"--port": port})
        refuse_taken("127.0.0.1", {"--metrics-port": None})
    refuse_taken("127.0.0.1", {"--port": port})


@pytest.mark.parametrize("host", ["203.0.113.9", "no-such-host.invalid"])
def test_a_host_of_another_machine_is_no_taken_port(host):
    with pytest.raises(ConfigError, match=f"--port 8000: this machine cannot listen there at {host}: "):
        refuse_taken(host, {"--port": 8000})


def test_what_a_killed_server_left_is_ended_and_nothing_else(sleeper, tmp_path):
    of_the_dead, of_the_living, of_others = (tmp_path / f"session_{name}" for name in ("dead", "living", "others"))
    for folder in (of_the_dead, of_the_living, of_others):
        folder.mkdir()
    gone = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (of_the_dead / MARK).write_text(json.dumps(identity(psutil.Process(gone.pid))))
    mark_session(of_the_living)
    orphan, alive, other = (sleeper(folder) for folder in (of_the_dead, of_the_living, of_others))
    time.sleep(0.2)
    end_orphans()
    assert orphan.poll() is None
    gone.kill()
    gone.wait()
    end_orphans()
    assert not psutil.pid_exists(orphan.pid)
    assert alive.poll() is None
    assert other.poll() is None
