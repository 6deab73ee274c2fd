"""Decide `model.dtype: auto` and `model.attention: auto` by what the device is fast at.

On a CPU without bfloat16 instructions, torch's bfloat16 products take up to sixty times as long as those in float32. On
a GPU, or a CPU with AMX, float32 is the slow one. So every command looks at the devices that the model will run on.
"""

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rayml.lm.catalog import base_config
from rayml.lm.load import DTYPES, auto_model

if TYPE_CHECKING:
    from rayml.config import Config

BF16_INSTRUCTIONS = {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX512-BF16", "bf16": "Arm's BF16"}
UNMEASURED_SPEED = 0.02
"""bfloat16's rate relative to float32's, assumed for a CPU without instructions for it; 0.002 to 0.02 were measured."""
CLEARLY_FASTER = 1.2
"""A lower relative rate of bfloat16 does not make up for its rounding."""
SLOW_SPEED = 0.5
"""A dtype is slow below this rate, relative to the faster dtype."""
ROWS, MOST_WIDTH = 64, 2048
"""Size of the product that is timed: the rows of a small batch, and narrow enough to be quick in a slow dtype."""
SHORT_ROWS = 128
"""Tokens up to which eager attention is faster than the fused kernel on a CPU in bfloat16."""


@dataclass(frozen=True)
class Device:
    """The facts about a worker's device that the decision needs."""

    kind: str
    """`cpu` or `cuda`."""
    name: str
    bf16: str | None
    """The hardware support for bfloat16 products; None without any."""
    gflops: dict[str, float] | None = None
    """Measured rates of a product of the model's shape, by dtype; None if not measured."""

    @property
    def bf16_speed(self) -> float:
        """bfloat16's rate relative to float32's."""
        if self.gflops:
            return self.gflops["bfloat16"] / self.gflops["float32"]
        return 8.0 if self.kind == "cuda" and self.bf16 else UNMEASURED_SPEED

    def speed(self, dtype: str) -> float:
        """Return a dtype's rate relative to that of the faster dtype, from 0 to 1."""
        ratio = self.bf16_speed
        return min(1.0, ratio) if dtype == "bfloat16" else min(1.0, 1 / ratio)

    def __str__(self) -> str:
        text = f"{self.name} with {self.bf16}" if self.bf16 else f"{self.name} without bfloat16 instructions"
        if self.gflops:
            text += " (" + ", ".join(f"{dtype} {rate:.3g}" for dtype, rate in self.gflops.items()) + " GFLOP/s)"
        return text


RECENT_GPU = Device("cuda", "a GPU", "tensor cores for bfloat16")
"""Stands for a GPU in plans that are made without one."""


class Precision(NamedTuple):
    """What a model runs in."""

    dtype: str
    attention: str
    why: str
    """One line for the user."""
    warning: str | None = None
    """Given if the user asked for a dtype that is slow here."""

    def __str__(self) -> str:
        return f"{self.dtype}, {self.attention} attention: {self.why}"


def inspect_device(device: torch.device, shape: tuple[int, int] = (576, 1536), timed: bool = False) -> Device:
    """Return the facts about a device, in less than a second.

    On a CPU with bfloat16 instructions both dtypes are measured: a library may lack kernels that use the instructions,
    or be told not to use them (`ONEDNN_MAX_CPU_ISA`).

    Args:
        shape: `(in, out)` of the model's widest linear.
        timed: measure both dtypes on any CPU.
    """
    if device.type == "cuda":
        capable = torch.cuda.get_device_capability(device) >= (8, 0)
        return Device("cuda", torch.cuda.get_device_name(device), "tensor cores for bfloat16" if capable else None)
    instructions = cpu_bf16()
    return Device("cpu", "CPU", instructions, measured_gflops(shape) if instructions or timed else None)


ROUNDS, MOST_SECONDS = 40, 0.4
"""Timing ends after this many rounds without a better time, or after this many seconds, but at least two rounds."""


def cpu_bf16() -> str | None:
    """Return the name of this CPU's fastest bfloat16 instructions; None if it has none."""
    capabilities = torch.cpu.get_capabilities()
    for flag, name in BF16_INSTRUCTIONS.items():
        if capabilities.get(flag) or (flag == "bf16" and has_arm_bf16()):
            return name
    return None


def has_arm_bf16() -> bool:
    """Return whether this is an Arm CPU with bfloat16 products, which torch does not tell."""
    if platform.machine() not in ("arm64", "aarch64"):
        return False
    try:
        return "bf16" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").split()
    except OSError:  # not Linux: torch for macOS has no fast kernel for it
        return False


def measured_gflops(shape: tuple[int, int]) -> dict[str, float]:
    """Return the best rate of `[ROWS, in] @ [in, out]` in each dtype, in GFLOP/s.

    The dtypes take turns, and only this thread's own CPU time counts, so that other load does not matter.
    """
    width, out = (min(size, MOST_WIDTH) for size in shape)
    best = dict.fromkeys(DTYPES, float("inf"))
    factors = {name: (torch.ones(ROWS, width, dtype=t), torch.ones(out, width, dtype=t)) for name, t in DTYPES.items()}
    began, since_better, rounds = time.perf_counter(), 0, 0
    while since_better < ROUNDS and (rounds < 2 or time.perf_counter() - began < MOST_SECONDS):
        rounds, since_better = rounds + 1, since_better + 1
        for name, (x, weight) in factors.items():
            start = time.thread_time()
            torch.nn.functional.linear(x, weight)
            seconds = time.thread_time() - start
            since_better = 0 if seconds < 0.98 * best[name] else since_better
            best[name] = min(best[name], seconds)
    return {name: 2 * ROWS * width * out / seconds / 1e9 for name, seconds in best.items()}


def choose_precision(
    asked: tuple[str, str],
    devices: Sequence[Device],
    made_in: str | None = None,
    max_tokens: int = SHORT_ROWS,
    sdpa: bool = True,
) -> Precision:
    """Return one dtype and attention for all devices, so that none of them is slow.

    Args:
        asked: `model.dtype` and `model.attention`; `auto` lets the devices decide.
        made_in: the dtype that a run was trained in, which is kept unless a device is slow in it.
        max_tokens: of the longest row.
        sdpa: whether the model, and the derivatives that are needed of it, support fused attention.
    """
    speeds = {dtype: min(device.speed(dtype) for device in devices) for dtype in ("float32", "bfloat16")}
    best = "bfloat16" if speeds["bfloat16"] >= CLEARLY_FASTER * speeds["float32"] else "float32"
    ordered = sorted(devices, key=lambda device: device.bf16_speed)
    decisive = ordered[-1] if best == "bfloat16" else ordered[0]
    dtype, warning = asked[0], None
    if dtype != "auto":
        why = "as asked"
        slowest = ordered[0] if dtype == "bfloat16" else ordered[-1]
        if slowest.gflops and slowest.speed(dtype) < SLOW_SPEED:
            warning = f"model.dtype={dtype} is slow here, {slowest}; model.dtype=auto takes {best}"
    elif made_in and made_in != best and speeds[made_in] >= SLOW_SPEED:
        dtype, why = made_in, "as it was made"
    else:
        dtype, why = best, str(decisive)
        if made_in and made_in != best:
            why += f". It was made in {made_in}: scores may differ in the third digit"
    attention = asked[1]
    if attention == "auto":
        is_short = dtype == "bfloat16" and devices[0].kind == "cpu" and max_tokens <= SHORT_ROWS
        attention = "eager" if is_short or not sdpa else "sdpa"
    return Precision(dtype, attention, why, warning)


def resolve_precision(
    config: "Config", base: str, devices: Sequence[Device], made_in: str | None = None
) -> "tuple[Config, Precision]":
    """Return a config with `auto` decided for a resolved base on these devices, and the decision."""
    model, sdpa = config.model, not config.algorithm.second_order and has_sdpa(base)
    precision = choose_precision((model.dtype, model.attention), devices, made_in, config.data.max_tokens, sdpa)
    model = model.model_copy(update={"dtype": precision.dtype, "attention": precision.attention})
    return config.model_copy(update={"model": model}), precision


def resolve_precision_here(
    config: "Config", base: str, device: torch.device, made_in: str | None = None
) -> "tuple[Config, Precision]":
    """Return the same as `settled`, for one device of this machine."""
    return resolve_precision(config, base, [device_for(config, base, device)], made_in)


def own_device(config: "Config") -> torch.device:
    """Return the device for a run's model in this process: the GPU, if there is one and the config allows it."""
    return torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")


def with_dtype(config: "Config", dtype: str) -> "Config":
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def device_for(config: "Config", base: str, device: torch.device) -> Device:
    """Return the facts about a device for a config's model; a CPU is always timed if the user asked for bfloat16."""
    return inspect_device(device, widest_linear(base), timed=config.model.dtype == "bfloat16" and device.type == "cpu")


def widest_linear(base: str) -> tuple[int, int]:
    """Return `(in, out)` of a resolved model's MLP, from its config alone."""
    config = base_config(base).get_text_config()
    hidden = getattr(config, "hidden_size", 576)
    return hidden, getattr(config, "intermediate_size", None) or 4 * hidden


def has_sdpa(base: str) -> bool:
    """Return whether transformers has fused attention for a resolved model."""
    model_class = auto_model(base)._model_mapping.get(type(base_config(base)), None)
    classes = model_class if isinstance(model_class, tuple) else (model_class,)
    return all(getattr(cls, "_supports_sdpa", True) for cls in classes)


@contextmanager
def fused_attention(module: Any, tokens: int) -> Iterator[None]:
    """Use fused attention for long rows inside the block, in a model that was loaded with eager for short ones.

    Eager attention writes every score, `[heads, L, L]` in float32: it took four times as long for 2,000 tokens.
    """
    config = module.config
    if tokens <= SHORT_ROWS or config._attn_implementation != "eager" or not getattr(module, "_supports_sdpa", False):
        yield
        return
    module.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        module.set_attn_implementation("eager")
