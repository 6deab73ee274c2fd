"""Before Ray starts: are the ports free, who has them if not, and what did a server that was killed leave behind?"""

import contextlib
import json
import re
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

from rayml.errors import ConfigError

MARK = "rayml_serve.json"
"""Lies in the session folder of a Ray that `rayml serve` started, and names the process of the server."""
SESSION = re.compile(r"(/\S*/session_[\w-]+)")
SECONDS_TO_END = 5.0


def mark_session(session: Path) -> None:
    """Note whose Ray this is: should the server be killed, the next one knows what it left."""
    (session / MARK).write_text(json.dumps(identity(psutil.Process())))


def identity(process: psutil.Process) -> list[float]:
    """Return what tells a process from a later one with its number."""
    return [process.pid, process.create_time()]


def end_orphans() -> None:
    """End what is left of servers of ours that were killed: processes of their Rays."""
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
        return any(map(_server_is_gone, _sessions(process)))
    except psutil.Error:  # it ended meanwhile, or is not ours to look at
        return False


def _sessions(process: psutil.Process) -> set[Path]:
    """Return the session folders that a process names in its command, or, where Ray changed that, logs into."""
    command = " ".join(process.cmdline())
    renamed = command.startswith(("ray::", "VLLM::"))
    named = [command, *(file.path for file in process.open_files())] if renamed else [command]
    return {Path(found[1]) for found in map(SESSION.search, named) if found}


def _server_is_gone(session: Path) -> bool:
    try:
        pid, began = json.loads((session / MARK).read_text())
    except (OSError, ValueError):  # no server of ours
        return False
    try:
        return psutil.Process(int(pid)).create_time() != began
    except psutil.NoSuchProcess:
        return True


def refuse_taken(host: str, ports: Mapping[str, int | None]) -> None:
    """Raise ConfigError if a port is taken, with what has it.

    Args:
        ports: by the option that sets each.
    """
    for option, port in ports.items():
        if port and _is_taken(host, port):
            raise ConfigError(f"{option} {port} is taken{_by_whom(port)}; end it, or give another port")


def _is_taken(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what closed lately is no hindrance
        try:
            tried.bind((host, port))
        except OSError:
            return True
    return False


def _by_whom(port: int) -> str:
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            is_here = connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN
            if is_here and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""
