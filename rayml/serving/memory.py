"""Memory that a process has freed, and the C library keeps."""

import ctypes
from functools import cache
from typing import Any


@cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_memory_back() -> None:
    """Give freed memory back to the system: glibc would keep what a long prompt took (`WORKER_ENV` says why)."""
    if trim := _trim():
        trim(0)
