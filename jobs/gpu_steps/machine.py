"""What the machine can do: the rates that every other number is held against."""

import os
import platform
import subprocess
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from benchmark_machine import Machine, fastest

from gpu_steps.bench import Bench
from rayml.lm.load import DTYPES
from rayml.lm.precision import inspect_device

PACKAGES = "torch", "transformers", "peft", "ray", "deepspeed", "triton", "higher", "torchao", "numpy"


def run(bench: Bench) -> None:
    with bench.attempt("software"):
        bench.record("software", **software())
    for dtype in dict.fromkeys((bench.size.dtype, "float32")):
        with bench.attempt("rates", dtype=dtype):
            found = Machine.measured(bench.device, DTYPES[dtype]).described()
            bench.record("rates", dtype=dtype, device=found.pop("name"), **found)
    with bench.attempt("automatic"):
        bench.record("automatic", device=str(inspect_device(bench.device)))
    if bench.device.type == "cuda":
        with bench.attempt("memory"):
            bench.record("memory", **memory(bench.device))
        with bench.attempt("launches"):
            bench.record("launches", seconds=launch_seconds(bench.device))
        with bench.attempt("host copies"):
            bench.record("host copies", bytes_per_second=host_copies(bench.device))


def software() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := installed(name))},
        "cuda": torch.version.cuda,
        "driver": driver(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def driver() -> str | None:
    try:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def memory(device: torch.device) -> dict[str, int]:
    free, total = torch.cuda.mem_get_info(device)
    return {"free_bytes": free, "total_bytes": total}


def launch_seconds(device: torch.device, launches: int = 2000) -> float:
    """Return what it takes the host to launch one small kernel: what a step of many small ones cannot go below."""
    one = torch.ones(1, device=device)

    def launch() -> None:
        for _ in range(launches):
            one.add_(1)

    return fastest(launch, device, times=3) / launches


def host_copies(device: torch.device) -> dict[str, float]:
    """Return the bytes a second from the host, of pages that are pinned and of such that are not."""
    found = {}
    for pinned in (True, False):
        block = torch.empty(2**28, dtype=torch.uint8, pin_memory=pinned)
        there = torch.empty_like(block, device=device)
        seconds = fastest(partial(there.copy_, block), device, times=4)
        found["pinned" if pinned else "not pinned"] = block.nbytes / seconds
    return found
