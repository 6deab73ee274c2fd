"""Ctrl-C and SIGTERM end a command alike: with a KeyboardInterrupt, whose message says what is kept."""

import signal
import threading
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers and `timeout` send it."""

    status = 128 + signal.SIGTERM


def heed_sigterm() -> None:
    """Let SIGTERM interrupt the main thread, as Ctrl-C does. Ray takes the signal for itself whenever it starts."""

    def interrupt(*_: Any) -> None:
        raise Terminated

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)


def kept(end: KeyboardInterrupt, message: str) -> KeyboardInterrupt:
    """Return an interrupt like `end` that says what is kept, and how to go on."""
    return type(end)(message)
