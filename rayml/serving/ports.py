"""What `rayml serve` does before it starts Ray: check that ports are free, and end what a killed server left behind."""

import contextlib
import errno
import json
import re
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

from rayml.errors import ConfigError

MARK = "rayml_serve.json"
"""A file in the session folder of a Ray that `rayml serve` started. It names the server's process."""
SESSION = re.compile(r"(/\S*/session_[\w-]+)")
SECONDS_TO_END = 5.0


def mark_session(session: Path) -> None:
    """Mark a Ray session as this server's, so that the next server can end what this one leaves if it is killed."""
    (session / MARK).write_text(json.dumps(identity(psutil.Process())))


def identity(process: psutil.Process) -> list[float]:
    """Return what distinguishes a process from a later one with the same id."""
    return [process.pid, process.create_time()]


def end_orphans() -> None:
    """End the Ray processes of servers that were killed."""
    orphans = [process for process in psutil.process_iter() if _is_orphan(process)]
    for process in orphans:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(orphans, SECONDS_TO_END)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, SECONDS_TO_END)


def _is_orphan(process: psutil.Process) -> bool:
    try:
        if process.uids() != psutil.Process().uids():
            return False
        return any(map(_server_is_gone, ray_sessions(process)))
    except psutil.Error:  # it has ended, or belongs to another user
        return False


def ray_sessions(process: psutil.Process) -> set[Path]:
    """Return the session folders in a process's command line, or, if Ray has replaced that, in its open files."""
    command = " ".join(process.cmdline())
    is_renamed = command.startswith(("ray::", "VLLM::"))
    texts = [command, *(file.path for file in process.open_files())] if is_renamed else [command]
    return {Path(match[1]) for match in map(SESSION.search, texts) if match}


def _server_is_gone(session: Path) -> bool:
    try:
        pid, began = json.loads((session / MARK).read_text())
    except (OSError, ValueError):  # not the session of a server of ours
        return False
    try:
        return psutil.Process(int(pid)).create_time() != began
    except psutil.NoSuchProcess:
        return True


def refuse_taken(host: str, ports: Mapping[str, int | None]) -> None:
    """Raise ConfigError if a port is taken, with the process that has it, or if it cannot be listened on at all.

    Args:
        ports: each port by the option that sets it.
    """
    for option, port in ports.items():
        problem = _bind_error(host, port) if port else None
        if problem and problem.errno == errno.EADDRINUSE:
            raise ConfigError(f"{option} {port} is taken{_taken_by(port)}; end it, or give another port")
        if problem:
            raise ConfigError(f"{option} {port}: this machine cannot listen there at {host}: {problem.strerror}")


def _bind_error(host: str, port: int) -> OSError | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignores connections that were closed lately
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def _taken_by(port: int | None) -> str:
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            is_listening = connection.status == psutil.CONN_LISTEN
            if is_listening and connection.laddr and connection.laddr.port == port and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""
