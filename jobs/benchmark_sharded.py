"""Time meta-gradients on a base that ZeRO-3 shards over workers: many tasks in a forward, or one after the other.

    python jobs/benchmark_sharded.py configs/quickstart.yaml model.dtype=float32 lora.last_layers=null --workers 2 \
        --tasks 1,2,4,8

A task at a time, on the same engine and with the same adapters, is the loop in its best form: it gathers the base for
every inner step of every task. Bytes are those of the real collectives.
"""

import argparse
import os
import socket
import statistics
import tempfile
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing
from benchmark import Episodes, disturbed, drawn_episodes, ours, quartiles, random_model
from benchmark_machine import machine_name, timed
from torch.utils._python_dispatch import TorchDispatchMode

from rayml.algorithms.inner_loop import Params
from rayml.config import Config, load_config
from rayml.lm import zero
from rayml.lm.catalog import resolve_model
from rayml.lm.load import load_base
from rayml.lm.lora import TaskLoRA
from rayml.lm.model import TaskLM
from rayml.lm.precision import resolve_precision_here

APART = 1e-3
MIB = 2**20


class Gathered(TorchDispatchMode):
    """Sums the bytes of what all-gathers put together."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "allgather" in function._schema.name:
            self.bytes += args[0].nbytes if isinstance(args[0], torch.Tensor) else 0
        return function(*args, **(kwargs or {}))


def main() -> None:
    options = parse()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        model = folder
        if options.shape:
            random_model(options.shape, configured(options, 1), torch.device("cpu")).save_pretrained(folder)
        else:
            model = resolve_model(configured(options, 1).model.name)
        torch.multiprocessing.spawn(worker, (options, model, port), nprocs=options.workers)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="model, adapters, episodes")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--shape", help="random weights, as in benchmark.py; the episodes are the config's")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tasks", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_intermixed_args()


def configured(options: argparse.Namespace, tasks: int) -> Config:
    return load_config(options.config, [*options.overrides, f"tasks_per_step={tasks}", "workers=1"])


def worker(rank: int, options: argparse.Namespace, model: str, port: int) -> None:
    cuda = torch.cuda.is_available()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(options.workers)}
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // options.workers))
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=options.workers)
    config = resolve_precision_here(configured(options, max(options.tasks)), model, device)[0]
    episodes = drawn_episodes(config)
    engines = {}
    kind = config.model.dtype, config.model.attention
    for name, module in (
        ("whole", load_base(model, *kind).to(device)),
        ("sharded", zero.load(model, *kind, device)),
    ):
        lora = TaskLoRA(module, **config.lora.shape())
        engines[name] = TaskLM(module, lora)
    start = {name: weight.to(device) for name, weight in disturbed(lora, config.seed).items()}
    if rank == 0:
        print(f"{options.workers} workers on {machine_name(device)}, {config.model.dtype}, seconds a meta-gradient")
        print("| tasks | whole | sharded | sharded, one by one | together is faster | MiB gathered | one by one |")
        print("|---|---|---|---|---|---|---|")
    for tasks in options.tasks:
        line = row(engines, start, episodes, config, tasks, options.repeats, device)
        if rank == 0:
            print(line, flush=True)
    dist.barrier()
    dist.destroy_process_group()


def row(engines, start: Params, episodes: Episodes, config: Config, tasks: int, repeats: int, device) -> str:
    """Return a line of the table: of so many tasks on every worker."""
    parts = [part(episodes, index, index + 1) for index in range(tasks)]

    def one_by_one() -> Params:
        found = [ours(engines["sharded"], start, one, config) for one in parts]
        return {name: sum(gradient[name] for gradient in found) for name in start}  # type: ignore[misc]

    ways: dict[str, Callable[[], Params]] = {
        name: partial(ours, lm, start, part(episodes, 0, tasks), config) for name, lm in engines.items()
    }
    ways["one by one"] = one_by_one
    gathered, gradients = {}, {}
    for name, work in ways.items():
        work()  # DeepSpeed learns the order of the layers
        with Gathered() as counted:
            gradients[name] = torch.cat([gradient.flatten() for gradient in work().values()])
        gathered[name] = counted.bytes / MIB
        apart = float((gradients[name] - gradients["whole"]).norm() / gradients["whole"].norm())
        assert apart < APART or config.model.dtype == "bfloat16", f"{name}: {apart} apart"
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            dist.barrier()
            seconds[name].append(timed(work, device))
    ratio = quartiles([a / b for a, b in zip(seconds["one by one"], seconds["sharded"], strict=True)])
    typical = " | ".join(f"{statistics.median(found):.2f}" for found in seconds.values())
    faster = "{:.2f} [{:.2f}, {:.2f}]".format(*ratio)
    return f"| {tasks} | {typical} | {faster} | {gathered['sharded']:.0f} | {gathered['one by one']:.0f} |"


def part(episodes: Episodes, first: int, last: int) -> Episodes:
    some = slice(first, last)
    return Episodes(episodes.support[some], episodes.query[some], episodes.labels[some])


if __name__ == "__main__":
    main()
