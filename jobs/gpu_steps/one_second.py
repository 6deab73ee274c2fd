"""Seconds from examples to an adapter: for one task alone, and for several that come at once."""

from argparse import Namespace

from benchmark_serving import learning, open_session

from gpu_steps.bench import Bench
from gpu_steps.sizes import folder


def run(bench: Bench) -> None:
    size = bench.size
    options = Namespace(
        model=folder(bench.scratch, size.model, size.dtype, bench.device), dtype=size.dtype, attention="sdpa",
        rank=16, last_layers=None, steps=3, repeats=size.repeats,
    )  # fmt: skip
    model = open_session(options)
    for examples, clients in size.examples:
        with bench.attempt("adaptation", examples=examples, clients=clients):
            bench.record("adaptation", **learning(model, examples, clients, options))
