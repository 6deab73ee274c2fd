"""vLLM's processes end with the replica that started them, also where that was killed: they hold a GPU's memory."""

import os
import threading
import time

ANSWERER = "RAYML_ANSWERER"
"""Environment: the replica's process."""
LOOK_SECONDS = 1.0


def end_with_answerer() -> None:
    """End this process soon after the one that `RAYML_ANSWERER` names has ended."""
    threading.Thread(target=_watch, args=(int(os.environ[ANSWERER]),), name="rayml-parent", daemon=True).start()


def _watch(process: int) -> None:
    while _runs(process):
        time.sleep(LOOK_SECONDS)
    os._exit(1)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
