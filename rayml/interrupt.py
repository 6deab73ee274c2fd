"""Ctrl-C and SIGTERM end a command within seconds, by a KeyboardInterrupt whose message says what is kept."""

import os
import signal
import sys
import threading
from typing import Any

SECONDS_TO_END = 8.5
"""The process then exits, even if something hangs, such as a Ray whose processes had the same signal."""
_handles_signals = False
_message = ""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers and `timeout` send."""


def install_handlers() -> None:
    """Let both signals interrupt the main thread of a command, and end the process if that takes too long."""
    global _handles_signals
    _handles_signals = threading.current_thread() is threading.main_thread()
    reinstall_handlers()


def reinstall_handlers() -> None:
    """In a rayml command, install the handlers again: Ray replaces the one for SIGTERM whenever it starts."""
    if _handles_signals and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _interrupt)


def with_message(end: KeyboardInterrupt, message: str) -> KeyboardInterrupt:
    """Return an interrupt of the same type that says what is kept, and how to continue."""
    global _message
    _message = message
    return type(end)(message)


def exit_status(end: KeyboardInterrupt) -> int:
    """Return the exit status of an interrupted process."""
    return 128 + (signal.SIGTERM if isinstance(end, Terminated) else signal.SIGINT)


def _interrupt(number: int, _frame: Any) -> None:
    end = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
    deadline = threading.Timer(SECONDS_TO_END, _exit_now, [exit_status(end)])
    deadline.daemon = True
    deadline.start()
    raise end


def _exit_now(code: int) -> None:
    print(f"stopped{f': {_message}' if _message else ''}", file=sys.stderr, flush=True)
    os._exit(code)
