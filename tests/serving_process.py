"""`rayml serve` in a process of its own, with what tests ask of it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import requests
from forks import fork_server

from rayml.serving.ports import ray_sessions
from serve.client import Client

KEYS = "first-key-of-the-tests", "other-key-of-the-tests"


class Server:
    """`rayml serve` in a process of its own; killed with all that it started."""

    deployment = "Model"
    start_seconds = 600
    forks = True
    """Its workers are forked, and do not import everything anew."""

    def __init__(self, run: Path | str, *settings: str, port: int | None = None, logs: Path | None = None):
        self.port, self.metrics_port = port or free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = (logs or run.parent) / f"serve-{self.port}.log"
        command = [Path(sys.executable).with_name("rayml"), "serve", run, *settings]
        command += ["--port", str(self.port), "--metrics-port", str(self.metrics_port)]
        self.command = list(map(str, command))
        self.start()

    def start(self) -> None:
        """Start it, or start it again by the same command, and wait until it answers."""
        env = os.environ | {"RAYML_API_KEYS": ",".join(KEYS), "RAY_AUTH_MODE": "disabled"}
        if not self.forks:
            env.pop(fork_server.TESTS, None)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=env)
        wait_for(lambda: "Ctrl-C" in self.log.read_text() or self.process.poll() is not None, self.start_seconds)
        assert self.process.poll() is None, self.log.read_text()

    def client(self, key: str = KEYS[0], **more) -> Client:
        return Client(self.url, key, **more)

    def replicas(self) -> list[psutil.Process]:
        return [one for one in self.processes() if f"ServeReplica:rayml:{self.deployment}" in command_of(one)]

    def processes(self) -> list[psutil.Process]:
        """Return the server, its children, and what is of its Ray's session: workers that were forked are not its
        children (`forks`)."""
        server, session = psutil.Process(self.process.pid), self.session()
        of_session = [process for process in psutil.process_iter() if session in sessions_of(process)]
        found = dict.fromkeys([server, *server.children(recursive=True), *of_session])
        return [process for process in found if fork_server.__file__ not in command_of(process)]

    def session(self) -> Path:
        """Return the folder in which this server's Ray logs."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(session for child in children for session in sessions_of(child))

    def metric(self, name: str) -> float:
        text = requests.get(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=60).text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"ray_{name}[{{ ]", line))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(180)


def command_of(process: psutil.Process) -> str:
    """Return a process's command; nothing of one that ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def sessions_of(process: psutil.Process) -> set[Path]:
    """Return the sessions of Ray that a process belongs to; none of one that ended meanwhile."""
    try:
        return ray_sessions(process)
    except psutil.Error:
        return set()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(holds, seconds: float = 180):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return
        time.sleep(0.2)
    raise AssertionError(f"it did not come true in {seconds} s")
