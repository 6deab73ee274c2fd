"""Tasks a second, and the memory for them: many side by side beside what people would write instead."""

from argparse import Namespace

from benchmark import measure
from benchmark_peers import peers

from gpu_steps.bench import Bench
from gpu_steps.sizes import config_of, folder
from rayml.lm.load import load_shape

LOOP, FUNC = "PEFT loop", "torch.func"


def run(bench: Bench) -> None:
    size = bench.size
    path = folder(bench.scratch, size.model, size.dtype, bench.device, weights=False)
    third = max(1, load_shape(path).config.num_hidden_layers // 3)
    ways, missing = peers(None)
    bench.record("left out", **{name: why for name, why in missing.items() if name != "Betty"})
    first = size.tasks[0]
    cases = [(first, None), (first, third), *((tasks, layers) for tasks in size.tasks[1:] for layers in (None, third))]
    for tasks, layers in cases:
        # A loop takes the same time for each task, however many there are: with the first number all are measured.
        chosen = ways if tasks == first else {FUNC: ways[FUNC]} if tasks > first else {LOOP: ways[LOOP]}
        case = {"layers": layers or "all"}
        with bench.attempt("meta-gradient", tasks=tasks, **case):
            config = config_of(size, path, tasks, layers)
            options = Namespace(shape=size.model, repeats=size.repeats)
            found = measure(config, options, chosen, bench.device)
            bench.record("meta-gradient", **case, failed_ways=found.pop("failed"), **found)
