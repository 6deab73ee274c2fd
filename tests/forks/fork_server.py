"""Ray's workers of the tests, and `-m gpu_steps`, are forked from one process that has imported torch and transformers.

Each would need twelve seconds of a core to import them, and the tests start some hundreds. A process that is begun
for one (`sitecustomize`) hands its command over, and stays as the worker's shadow: it ends as the worker ends, and
the other way round. Ray itself is not imported beforehand: it reads the environment as it is imported.
RAYML_TESTS_FORK=0 has all workers begin anew.
"""

import gc
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

TESTS = "RAYML_TESTS_PID"
"""The process of the tests. The server ends with it."""
IMPORTED = (
    *("pandas", "pyarrow.dataset", "pyarrow.parquet", "fastapi", "aiohttp", "torch.distributed", "deepspeed", "peft"),
    *("transformers.models.llama.modeling_llama", "rayml.serving.engine"),
)
OUTPUTS = [0, 1, 2]
SECONDS = 30.0
"""Until the server listens: it imports afterwards."""


def set_up() -> None:
    """Have the processes that this one starts fork Ray's workers."""
    if sys.platform == "linux" and os.environ.get("RAYML_TESTS_FORK") != "0" and TESTS not in os.environ:
        os.environ[TESTS] = str(os.getpid())
        found = str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, found))


def hand_over() -> None:
    """Have the server fork what this process is to do, and end as that ends; return, where there is none to ask."""
    tests = os.environ.get(TESTS)
    connection = connected(tests) if tests and Path(f"/proc/{tests}").exists() else None
    if connection is None:
        return
    told = {
        "command": sys.orig_argv,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    }
    with suppress(OSError), connection.makefile("rw") as talk:
        socket.send_fds(connection, [b"."], OUTPUTS)
        talk.write(json.dumps(told) + "\n")
        talk.flush()
        if worker := int(talk.readline() or 0):
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda number, _: os.kill(worker, number))
            os._exit(int(talk.readline() or 1))


def connected(tests: str) -> socket.socket | None:
    """Return a connection to the server, which is begun, if there is none; None, if it does not begin."""
    # The socket has no file; an interpreter of another environment has a server of its own.
    address = f"\0rayml-forks-{tests}-{sys.prefix}"
    connection = socket.socket(socket.AF_UNIX)
    if connection.connect_ex(address):
        anew = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # one thread alone may be there when a process is forked
        anew.pop("OMP_NUM_THREADS", None)
        subprocess.Popen([sys.executable, __file__, address[1:], tests], env=anew, start_new_session=True)
        until = time.monotonic() + SECONDS
        while connection.connect_ex(address):
            if time.monotonic() > until:
                return None
            time.sleep(0.05)
    return connection


def serve(name: str, tests: int) -> None:
    """Fork workers until the tests' process is gone. What asks before all is imported, waits."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind("\0" + name)
    except OSError:  # another was first
        return
    listener.listen(64)
    gc.disable()
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # no worker looks for garbage among what all share
    gc.enable()
    ended, end = os.pipe()
    os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(end, warn_on_full_buffer=False)
    shadows: dict[int, socket.socket] = {}
    while Path(f"/proc/{tests}").exists():
        ready, _, _ = select.select([listener, ended, *shadows.values()], [], [], 2)
        for worker, shadow in list(shadows.items()):
            if shadow in ready:  # it was killed
                del shadows[worker]
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
        if ended in ready:
            os.read(ended, 4096)
            for worker, status in finished():
                shadow = shadows.pop(worker, None)
                with suppress(OSError):
                    shadow and shadow.sendall(b"%d\n" % (os.waitstatus_to_exitcode(status) & 0xFF))
        if listener in ready:
            connection, _ = listener.accept()
            _, outputs, _, _ = socket.recv_fds(connection, 1, len(OUTPUTS))
            told = json.loads(connection.makefile().readline() or "null")
            worker = os.fork() if told else 0
            if not worker and told:
                listener.close()
                become(told, outputs)
            for output in outputs:
                os.close(output)
            if worker:
                shadows[worker] = connection
                connection.sendall(b"%d\n" % worker)


def finished():
    """Yield the workers that ended, and how."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            yield ended


def become(told: dict, outputs: list[int]) -> None:
    """Be what a process was begun for; this does not return."""
    code = 1
    try:
        os.setpgid(0, 0)  # Ray ends whole groups
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, told["blocked"])
        for number, output in zip(OUTPUTS, outputs, strict=True):
            os.dup2(output, number)
        before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        os.environ.clear()
        os.environ.update(told["environment"])
        os.chdir(told["folder"])
        run(told["command"], before)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run(command: list[str], before: list[str]) -> None:
    """Run what Python was called for: Ray's worker, or `-m MODULE`; `before`: the server's own PYTHONPATH."""
    worker = next((index for index, word in enumerate(command) if word.endswith("/setup_worker.py")), None)
    if worker is not None:
        run_worker(command[worker + 1 :], before)
    else:
        take_environment(before)
        sys.argv = command[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def take_environment(before: list[str]) -> None:
    """Heed what is read from the environment as Python begins, and as torch is imported."""
    import torch

    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ["", *before]]
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def run_worker(words: list[str], before: list[str]) -> None:
    """Run Ray's worker in its environment, as `RuntimeEnvContext.exec_worker` would."""
    from ray._private.runtime_env.context import RuntimeEnvContext, update_envs

    told = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
    context = RuntimeEnvContext.deserialize(told.get("serialized-runtime-env-context") or "{}")
    words = [word for word in words if not word.startswith(("--serialized-runtime-env-context=", "--language="))]
    update_envs(context.env_vars)
    if context.command_prefix or context.py_executable != sys.executable or context.override_worker_entrypoint:
        command = [*context.command_prefix, "exec", context.py_executable, *map(shlex.quote, words)]
        os.execvp("bash", ["bash", "-c", " ".join(command)])
    take_environment(before)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
