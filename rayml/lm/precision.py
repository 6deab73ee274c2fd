"""`model.dtype: auto` and `model.attention: auto`: what the device is quick at, decided here and nowhere else.

On a CPU without bfloat16 instructions torch's bfloat16 products take up to sixty times as long as float32's; on a GPU,
or a CPU with AMX, it is float32 that is slow. So every command asks the devices that the model will run on.
"""

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AutoConfig

from rayml.lm.load import auto_model

if TYPE_CHECKING:
    from rayml.config import Config

BF16_INSTRUCTIONS = {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX512-BF16", "bf16": "Arm's BF16"}
WITHOUT_INSTRUCTIONS = 0.02
"""bfloat16's rate over float32's on such a CPU, where nobody measured it: seen, 0.002 to 0.02."""
CLEARLY_FASTER = 1.2
"""Below this bfloat16 saves no time that would be worth its rounding."""
SLOW = 0.5
"""Of the other dtype's rate."""
ROWS, WIDEST = 64, 2048
"""Of the product that is timed: a small batch's rows, and no wider than takes a blink where it is slow."""
SHORT_ROWS = 128
"""Tokens up to which eager attention is faster than the fused kernel on a CPU in bfloat16."""


@dataclass(frozen=True)
class Device:
    """What matters of a worker's device. Rates are of one product of the model's shape."""

    kind: str
    """`cpu` or `cuda`."""
    name: str
    bf16: str | None
    """What does bfloat16's products in hardware; None where nothing does."""
    gflops: dict[str, float] | None = None
    """Measured, by dtype; None where the facts alone decide."""

    @property
    def bf16_speed(self) -> float:
        """bfloat16's rate over float32's."""
        if self.gflops:
            return self.gflops["bfloat16"] / self.gflops["float32"]
        return 8.0 if self.kind == "cuda" and self.bf16 else WITHOUT_INSTRUCTIONS

    def speed(self, dtype: str) -> float:
        """Return a dtype's rate over that of the faster one, 0 to 1."""
        ratio = self.bf16_speed
        return min(1.0, ratio) if dtype == "bfloat16" else min(1.0, 1 / ratio)

    def __str__(self) -> str:
        text = f"{self.name} with {self.bf16}" if self.bf16 else f"{self.name} without bfloat16 instructions"
        if self.gflops:
            text += " (" + ", ".join(f"{dtype} {rate:.3g}" for dtype, rate in self.gflops.items()) + " GFLOP/s)"
        return text


RECENT_GPU = Device("cuda", "a GPU", "tensor cores for bfloat16")
"""What is planned for where no GPU is at hand."""


class Precision(NamedTuple):
    """What a model runs in."""

    dtype: str
    attention: str
    why: str
    """One line for people."""
    warning: str | None = None
    """What was asked for by hand, and is slow here."""

    def __str__(self) -> str:
        return f"{self.dtype}, {self.attention} attention: {self.why}"


def look_at(device: torch.device, shape: tuple[int, int] = (576, 1536), timed: bool = False) -> Device:
    """Return the facts of a device, in less than a second.

    Args:
        shape: `(in, out)` of the model's widest linear.
        timed: measure both dtypes whatever the facts say. Instructions alone are no proof: a library may lack kernels
            for them, or be told to do without (`ONEDNN_MAX_CPU_ISA`); so where there are some, both are measured, too.
    """
    if device.type == "cuda":
        capable = torch.cuda.get_device_capability(device) >= (8, 0)
        return Device("cuda", torch.cuda.get_device_name(device), "tensor cores for bfloat16" if capable else None)
    found = cpu_bf16()
    gflops = None
    if found or timed:
        gflops = measured_gflops(shape)
    return Device("cpu", "CPU", found, gflops)


TIMED = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
ROUNDS, MOST_SECONDS = 40, 0.4
"""The timing ends after so many rounds that better nothing, or so long: where bfloat16 is very slow, two tell."""


def cpu_bf16() -> str | None:
    """Return the bfloat16 instructions of this CPU by name, the fastest first; None if it has none."""
    there = torch.cpu.get_capabilities()
    for flag, name in BF16_INSTRUCTIONS.items():
        if there.get(flag) or (flag == "bf16" and arm_bf16()):
            return name
    return None


def arm_bf16() -> bool:
    """Return whether an Arm CPU has bfloat16 products; torch does not say."""
    if platform.machine() not in ("arm64", "aarch64"):
        return False
    try:
        return "bf16" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").split()
    except OSError:  # no Linux: Apple's torch has no quick kernel for it
        return False


def measured_gflops(shape: tuple[int, int]) -> dict[str, float]:
    """Return the best rate of `[ROWS, in] @ [in, out]` in each dtype, in GFLOP/s, that many rounds do not better.

    The dtypes take turns, and only the time that this thread computes counts: on a busy machine it is the same.
    """
    into, out = (min(size, WIDEST) for size in shape)
    best = dict.fromkeys(TIMED, float("inf"))
    products = {dtype: (torch.ones(ROWS, into, dtype=dtype), torch.ones(out, into, dtype=dtype)) for dtype in TIMED}
    began, since_better, rounds = time.perf_counter(), 0, 0
    while since_better < ROUNDS and (rounds < 2 or time.perf_counter() - began < MOST_SECONDS):
        rounds, since_better = rounds + 1, since_better + 1
        for dtype, (x, weight) in products.items():
            start = time.thread_time()
            torch.nn.functional.linear(x, weight)
            took = time.thread_time() - start
            since_better = 0 if took < 0.98 * best[dtype] else since_better
            best[dtype] = min(best[dtype], took)
    return {name: 2 * ROWS * into * out / best[dtype] / 1e9 for dtype, name in TIMED.items()}


def decide(
    asked: tuple[str, str],
    devices: Sequence[Device],
    made_in: str | None = None,
    max_tokens: int = SHORT_ROWS,
    sdpa: bool = True,
) -> Precision:
    """Return one dtype and attention for all devices: the dtype that none of them is slow in.

    Args:
        asked: `model.dtype` and `model.attention`; `auto` leaves it to the devices.
        made_in: the dtype of what is opened, which is kept unless a device is slow in it.
        max_tokens: of the longest row.
        sdpa: whether the model, and what is computed of it, can have fused attention.
    """
    speeds = {dtype: min(device.speed(dtype) for device in devices) for dtype in ("float32", "bfloat16")}
    best = "bfloat16" if speeds["bfloat16"] >= CLEARLY_FASTER * speeds["float32"] else "float32"
    ordered = sorted(devices, key=lambda device: device.bf16_speed)
    decisive = ordered[-1] if best == "bfloat16" else ordered[0]
    dtype, warning = asked[0], None
    if dtype != "auto":
        why = "as asked"
        hindered = ordered[0] if dtype == "bfloat16" else ordered[-1]
        if hindered.gflops and hindered.speed(dtype) < SLOW:
            warning = f"model.dtype={dtype} is slow here, {hindered}; model.dtype=auto takes {best}"
    elif made_in and made_in != best and speeds[made_in] >= SLOW:
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


def settled(
    config: "Config", base: str, devices: Sequence[Device], made_in: str | None = None
) -> "tuple[Config, Precision]":
    """Return a config with `auto` decided for a resolved base on these devices, and what was decided."""
    model = config.model
    chosen = decide(
        (model.dtype, model.attention),
        devices,
        made_in,
        config.data.max_tokens,
        sdpa=not config.algorithm.second_order and has_sdpa(base),
    )
    settled_model = model.model_copy(update={"dtype": chosen.dtype, "attention": chosen.attention})
    return config.model_copy(update={"model": settled_model}), chosen


def settled_here(
    config: "Config", base: str, device: torch.device, made_in: str | None = None
) -> "tuple[Config, Precision]":
    """Return what `settled` does, for one device of this machine."""
    return settled(config, base, [device_for(config, base, device)], made_in)


def own_device(config: "Config") -> torch.device:
    """Return where a run's model lies in this process: on the GPU, if there is one and the config does not mind."""
    return torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")


def with_dtype(config: "Config", dtype: str) -> "Config":
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def device_for(config: "Config", base: str, device: torch.device) -> Device:
    """Return the facts of a device for a config's model; both dtypes are timed where one is asked for by hand."""
    return look_at(device, widest_linear(base), timed=config.model.dtype == "bfloat16" and device.type == "cpu")


def widest_linear(base: str) -> tuple[int, int]:
    """Return `(in, out)` of a resolved model's MLP, by its config alone."""
    shape = text_config(base)
    hidden = getattr(shape, "hidden_size", 576)
    return hidden, getattr(shape, "intermediate_size", None) or 4 * hidden


def has_sdpa(base: str) -> bool:
    """Return whether transformers has fused attention for a resolved model."""
    kind = auto_model(base)._model_mapping.get(type(AutoConfig.from_pretrained(base)), None)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return all(getattr(one, "_supports_sdpa", True) for one in kinds)


@contextmanager
def fused_attention(module: Any, tokens: int) -> Iterator[None]:
    """Let long rows have fused attention inside the block, where a model was loaded with eager for short ones.

    Eager attention writes every score, `[heads, L, L]` in float32: 2,000 tokens took four times as long.
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


def text_config(base: str) -> Any:
    return AutoConfig.from_pretrained(base).get_text_config()
