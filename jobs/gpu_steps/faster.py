"""What may make it faster, each tried once on the same meta-gradient: attention's kernels, a CUDA graph, a compiler,
and a base of 8 bits."""

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from benchmark import Episodes, disturbed, ours, random_episodes, random_model
from benchmark_machine import timed
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_steps.bench import Bench
from gpu_steps.numerics import distance
from gpu_steps.sizes import config_of, folder
from rayml.algorithms.inner_loop import Params, expand, task_gradients
from rayml.config import Config
from rayml.lm.batch import collate
from rayml.lm.lora import TaskLoRA
from rayml.lm.model import TaskLM

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION, "plain": SDPBackend.MATH,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A meta-gradient that is computed in several ways."""

    bench: Bench
    lm: TaskLM
    start: Params
    episodes: Episodes
    config: Config

    def gradient(self) -> Params:
        return ours(self.lm, self.start, self.episodes, self.config)

    def measure(self, name: str, wanted: Params, context: Callable[[], Any] = nullcontext) -> None:
        with self.bench.attempt(name), context():
            apart = distance(self.gradient(), wanted)
            seconds = [timed(self.gradient, self.bench.device) for _ in range(self.bench.size.repeats)]
            self.bench.record(name, seconds=seconds, apart=apart)


def run(bench: Bench) -> None:
    case = case_of(bench)
    case.gradient()  # warms up
    wanted = case.gradient()
    case.measure("as it is", wanted)
    for name, kernel in KERNELS.items():
        case.measure(f"attention: {name}", wanted, partial(sdpa_kernel, kernel))
    with bench.attempt("CUDA graph"):
        bench.record("CUDA graph", **graph(case))
    with bench.attempt("int8 base"):
        quantized(case.lm.module)
        case.measure("int8 base", wanted)
    with bench.attempt("compiled layers"):
        fresh = case_of(bench)
        compile_layers(fresh.lm.module, "inductor" if bench.device.type == "cuda" else "aot_eager")
        seconds = timed(fresh.gradient, bench.device)
        bench.record("compiling", seconds=seconds)
        fresh.measure("compiled layers", wanted)


def case_of(bench: Bench) -> Case:
    size = bench.size
    path = folder(bench.scratch, size.model, size.dtype, bench.device, weights=False)
    config = config_of(size, path, max(size.tasks[:2]))
    model = random_model(size.model, config, bench.device)
    lora = TaskLoRA(model, **config.lora.shape())
    start = {name: weight.to(bench.device) for name, weight in disturbed(lora, 0).items()}
    return Case(bench, TaskLM(model, lora), start, random_episodes(config, model), config)


def graph(case: Case) -> dict[str, Any]:
    """Time an inner step's gradients as they are launched one by one, and as a graph that was captured once."""
    if case.bench.device.type != "cuda":
        return {"left out": "there is no CUDA"}
    lm, device = case.lm, case.bench.device
    batch = collate(case.episodes.support, 0, case.episodes.labels, lm.packs).to(device)
    fast = {name: weight.contiguous() for name, weight in expand(case.start, len(case.episodes.support)).items()}
    step = partial(task_gradients, partial(lm.losses, batch=batch), fast)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            _, wanted = step()
    torch.cuda.current_stream().wait_stream(aside)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        _, found = step()
    captured.replay()
    eager, replayed = ([timed(work, device) for _ in range(10)] for work in (step, captured.replay))
    return {
        "eager_seconds": eager,
        "seconds": replayed,
        "apart": distance(found, wanted),
        "faster": statistics.median(eager) / statistics.median(replayed),
    }


def quantized(model: Any) -> None:
    """Turn the linears of a base, but for its output head, into 8 bits a weight."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    head = model.get_output_embeddings()
    quantize_(model, Int8WeightOnlyConfig(), lambda one, _: isinstance(one, torch.nn.Linear) and one is not head)


def compile_layers(model: Any, backend: str) -> None:
    """Compile each decoder layer; each has adapters of its own, and so a graph of its own."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 256
    for layer in model.model.layers:
        layer.compile(dynamic=False, backend=backend)
