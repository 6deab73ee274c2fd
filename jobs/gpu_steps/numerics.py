"""Whether a GPU comes to the same numbers: each way of computing a meta-gradient beside one task at a time in fp32.

The base's weights are numbers of bfloat16 in both, so what is apart is rounding alone, or a mistake.
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from benchmark import APART, Episodes, disturbed, ours

from gpu_steps.bench import Bench
from gpu_steps.sizes import config_of, folder
from rayml.algorithms.inner_loop import Params
from rayml.config import Config
from rayml.lm import zero
from rayml.lm.batch import TokenRow
from rayml.lm.load import load_base
from rayml.lm.lora import TaskLoRA
from rayml.lm.model import TaskLM

TASKS = 4


def run(bench: Bench) -> None:
    path = folder(bench.scratch, bench.size.small, "bfloat16", bench.device)
    config = config_of(bench.size, path, TASKS)
    episodes = ragged_episodes(config, bench.size.tokens)
    plain = lm_of(path, "float32", "eager", config, bench.device)
    assert isinstance(plain.adapter, TaskLoRA)
    start = {name: weight.to(bench.device) for name, weight in disturbed(plain.adapter, 0).items()}
    plain.packs = False
    wanted = one_by_one(plain, start, episodes, config)

    def check(name: str, dtype: str, found: Params) -> None:
        apart = distance(found, wanted)
        bench.record(name, dtype=dtype, apart=apart, most=APART[dtype], is_equal=apart < APART[dtype])

    for dtype in ("float32", "bfloat16"):
        for attention in ("sdpa", "eager"):
            with bench.attempt("tasks side by side", dtype=dtype, attention=attention):
                lm = lm_of(path, dtype, attention, config, bench.device)
                lm.packs = False
                check(f"one by one, {attention}", dtype, one_by_one(lm, start, episodes, config))
                check(f"side by side, {attention}", dtype, ours(lm, start, episodes, config))
                del lm.packs  # tried anew
                bench.record("packs", dtype=dtype, attention=attention, packs=lm.packs)
                check(f"side by side, packed, {attention}", dtype, ours(lm, start, episodes, config))
    with bench.attempt("sharded"):
        join_alone(bench.device)
        for dtype in ("float32", "bfloat16"):
            module = zero.load(path, dtype, "sdpa", bench.device, whole_below=0)
            lm = TaskLM(module, TaskLoRA(module, **config.lora.shape()))
            check(f"ZeRO-3 on {dist.get_backend()}", dtype, ours(lm, start, episodes, config))
        dist.destroy_process_group()


def lm_of(path: str, dtype: str, attention: str, config: Config, device: torch.device) -> TaskLM:
    module = load_base(path, dtype, attention).to(device)
    return TaskLM(module, TaskLoRA(module, **config.lora.shape()))


def ragged_episodes(config: Config, longest: int) -> Episodes:
    """Return rows of random tokens of many lengths, half of the tasks with labels and half with free text."""
    generator = torch.Generator().manual_seed(0)

    def draw(most: int, count: int) -> list[int]:
        return torch.randint(2, most, (count,), generator=generator).tolist()

    def rows() -> list[TokenRow]:
        lengths = [max(4, length) for length in draw(longest, config.data.ways * config.data.shots)]
        return [TokenRow([*draw(100, length - 1), 2 + index % 2], length - 1) for index, length in enumerate(lengths)]

    support, query = ([rows() for _ in range(TASKS)] for _ in range(2))
    return Episodes(support, query, [[[2], [3]] if task % 2 else [] for task in range(TASKS)])


def one_by_one(lm: TaskLM, start: Params, episodes: Episodes, config: Config) -> Params:
    total = {name: torch.zeros_like(weight) for name, weight in start.items()}
    for task in range(len(episodes.support)):
        one = replace(episodes, **{side: getattr(episodes, side)[task : task + 1] for side in vars(episodes)})
        for name, gradient in ours(lm, start, one, config).items():
            total[name] += gradient
    return total


def distance(found: Params, wanted: Params) -> float:
    """Return how far two meta-gradients are apart, relative to the second."""
    a, b = (flat([params[name] for name in wanted]) for params in (found, wanted))
    return float((a - b).norm() / b.norm())


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def join_alone(device: torch.device) -> None:
    """Begin a process group of this process alone."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
