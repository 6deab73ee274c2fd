"""Mode full under one ZeRO stage: its inner and query steps beside a plain AdamW step of the same engine."""

from argparse import Namespace

import torch
import torch.distributed as dist
from benchmark_full import measure

from gpu_steps.bench import Bench
from gpu_steps.numerics import join_alone
from gpu_steps.sizes import folder


def run(bench: Bench, stage: str, offload: str) -> None:
    size = bench.size
    options = Namespace(
        model=size.model, stage=int(stage), dtype=size.dtype, offload=offload, rows=size.ways * size.shots,
        tokens=size.tokens, repeats=max(3, size.repeats), json=None, workers=1,
    )  # fmt: skip
    with bench.attempt("full", stage=options.stage, offload=offload):
        path = folder(bench.scratch, size.model, size.dtype, bench.device)
        join_alone(bench.device)
        found = measure(options, path, bench.device)
        cuda = bench.device.type == "cuda"
        bench.record("full", **found, peak_bytes_of_both=torch.cuda.max_memory_allocated() if cuda else None)
        dist.destroy_process_group()
