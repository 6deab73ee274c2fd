"""Ctrl-C and SIGTERM end a command alike: with a KeyboardInterrupt, whose message says what is kept, within seconds."""

import os
import signal
import sys
import threading
from typing import Any

SECONDS_TO_END = 8.5
"""Whatever hangs then, such as a Ray whose processes had the same signal, is left behind."""
_heeds = False
_message = ""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers and `timeout` send it."""


def heed() -> None:
    """Let both signals interrupt the main thread of a command, and end the process when that takes too long."""
    global _heeds
    _heeds = threading.current_thread() is threading.main_thread()
    heed_again()


def heed_again() -> None:
    """Take SIGTERM back from Ray, which takes it whenever it starts; not in a process that is no command of ours."""
    if _heeds and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _interrupt)


def kept(end: KeyboardInterrupt, message: str) -> KeyboardInterrupt:
    """Return an interrupt like `end` that says what is kept, and how to go on."""
    global _message
    _message = message
    return type(end)(message)


def status(end: KeyboardInterrupt) -> int:
    """Return what an interrupted process exits with."""
    return 128 + (signal.SIGTERM if isinstance(end, Terminated) else signal.SIGINT)


def _interrupt(number: int, _frame: Any) -> None:
    end = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
    last = threading.Timer(SECONDS_TO_END, _leave, [status(end)])
    last.daemon = True
    last.start()
    raise end


def _leave(code: int) -> None:
    print(f"stopped{f': {_message}' if _message else ''}", file=sys.stderr, flush=True)
    os._exit(code)
