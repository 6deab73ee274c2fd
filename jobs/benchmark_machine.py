"""What a machine can do, and what a piece of work takes of it: FLOPs, bytes, seconds by kind of operation.

`python jobs/benchmark_machine.py` prints what a CPU does in both dtypes, and what it would do without bfloat16
instructions, as most laptops.
"""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from rayml.lm.precision import choose_precision, inspect_device

OLDER_CPU = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
"""Read once, by the first product: so it takes a process of its own. Of torch's other switches, ATEN_CPU_CAPABILITY
and MKL_ENABLE_INSTRUCTIONS change nothing in a bfloat16 product."""
KINDS = {
    "matrix products": ("mm", "addmm", "linear"),
    "adapters": ("bmm", "baddbmm"),
    "attention": ("attention", "softmax", "flash"),
}
"""Of an operation, by what its name begins with or holds; the rest is elementwise, gathers and copies."""


@dataclass(frozen=True)
class Machine:
    name: str
    matmul_flops: float
    """A second, of a large square product in the benchmark's dtype."""
    copy_bytes: float
    """A second, read and written."""
    threads: int

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> "Machine":
        size = 8192 if device.type == "cuda" else 2048
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        block = torch.empty(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
        matmul, copied = fastest(lambda: a @ b, device), fastest(block.clone, device)
        return cls(machine_name(device), 2 * size**3 / matmul, 2 * block.nbytes / copied, torch.get_num_threads())

    def described(self) -> dict[str, Any]:
        return asdict(self)


def machine_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{len(os.sched_getaffinity(0))} cores of {model or platform.processor()}"


def fastest(work: Callable[[], Any], device: torch.device, times: int = 10) -> float:
    """Return the least seconds, of several."""
    return min(timed(work, device) for _ in range(times))


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of some work, to the end of what it launched."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measured_flops(work: Callable[[], Any]) -> int:
    """Return the FLOPs of its matrix products and attention, forward and backward."""
    # Attention as plain products: the counter does not know grouped queries in the fused kernels of a GPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Return the most that it has allocated at a time, beyond what was there: by torch's own allocator."""
    if device.type == "cuda":
        synchronize(device)
        there = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - there
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def op_seconds(work: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Return the seconds in each kind of operation, from one profiled run; on a GPU those of its kernels."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        work()
        synchronize(device)
    seconds = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in found.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel, whose time stands with the operation that launched it
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        seconds[kind_of(event.key)] += spent / 1e6
    return seconds


def kind_of(operation: str) -> str:
    name = operation.removeprefix("aten::").lstrip("_")
    for kind, parts in KINDS.items():
        if name in parts or (kind == "attention" and any(part in name for part in parts)):
            return kind
    return "the rest"


def main() -> None:
    """Print one line for this CPU as it is, and one for an older one."""
    print(machine_name(torch.device("cpu")), flush=True)
    for env in ({}, OLDER_CPU):
        name = " ".join(f"{key}={value}" for key, value in env.items()) or "as it is"
        print(f"  {name}: ", end="", flush=True)
        subprocess.run([sys.executable, __file__, "--rates"], env=os.environ | env, check=True)


def print_rates() -> None:
    device = inspect_device(torch.device("cpu"), timed=True)
    rates = ", ".join(f"{dtype} {rate:.3g} GFLOP/s" for dtype, rate in (device.gflops or {}).items())
    print(f"{rates}; model.dtype=auto takes {choose_precision(('auto', 'auto'), [device]).dtype}")


if __name__ == "__main__":
    print_rates() if sys.argv[1:] == ["--rates"] else main()
