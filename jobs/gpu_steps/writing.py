"""Tokens a second of texts that are written side by side, each under an adapter of its own, beside the bare base."""

from argparse import Namespace

from benchmark_serving import Peers, draw, open_session

from gpu_steps.bench import Bench
from gpu_steps.sizes import folder


def run(bench: Bench) -> None:
    size = bench.size
    options = Namespace(
        model=folder(bench.scratch, size.model, size.dtype, bench.device), dtype=size.dtype, attention="sdpa",
        rank=16, last_layers=None, rows=list(size.rows), prompt=32, tokens=16, repeats=3,
    )  # fmt: skip
    model = open_session(options)
    peers = Peers(model, [draw(model, seed) for seed in range(max(size.rows))], options)
    with bench.attempt("logits"):
        bench.record("logits", largest_difference=peers.difference())
    for rows in size.rows:
        with bench.attempt("writing", rows=rows):
            bench.record("writing", **peers.measure(rows, rows))
