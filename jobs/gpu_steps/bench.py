"""What every step is given: what to measure and where, and a file that keeps each number as soon as there is one."""

import gc
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu_steps.lines import write_line
from gpu_steps.sizes import Size


@dataclass(frozen=True)
class Bench:
    step: str
    size: Size
    device: torch.device
    file: Path
    """A line of JSON for each number, of all steps."""
    scratch: Path
    """What steps share, such as random models; it goes when the last has ended."""
    model: str | None
    data: Path | None

    def record(self, name: str, **values: Any) -> None:
        """Keep what was found, whatever becomes of the rest."""
        write_line(self.file, {"step": self.step, "name": name} | values)

    @contextmanager
    def attempt(self, name: str, **case: Any) -> Iterator[None]:
        """Keep why the block failed, and go on behind it with the memory that it had."""
        began = time.perf_counter()
        try:
            yield
        except (Exception, SystemExit) as error:  # a benchmark that finds unequal work leaves so
            traceback.print_exc()
            self.record(name, **case, failed=f"{type(error).__name__}: {first_line(error)}")
        print(f"{self.step}: {name} {case or ''} {time.perf_counter() - began:.1f} s", flush=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:300]
