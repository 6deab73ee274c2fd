"""vLLM's processes end with the replica that started them, even if that was killed: they hold a GPU's memory."""

import os
import threading
import time

ANSWERER = "RAYML_ANSWERER"
"""The environment variable with the process id of the replica."""
POLL_SECONDS = 1.0


def end_with_answerer() -> None:
    """End this process soon after the process that `RAYML_ANSWERER` names has ended."""
    threading.Thread(target=_watch, args=(int(os.environ[ANSWERER]),), name="rayml-parent", daemon=True).start()


def _watch(process: int) -> None:
    while _is_running(process):
        time.sleep(POLL_SECONDS)
    os._exit(1)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
