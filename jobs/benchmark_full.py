"""Time mode full's inner and query steps against a plain AdamW step of the same engine, on the same tokens.

    python jobs/benchmark_full.py --model random-30m --workers 2 --stage 3 --json out.json

An AdamW step does more work in the optimizer than our inner step of SGD: the ratio includes that.
"""

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from rayml.algorithms.phased_optimizer import Phase
from rayml.config import Config
from rayml.lm import zero
from rayml.lm.batch import IGNORE, TaskBatch
from rayml.lm.catalog import resolve_model
from rayml.lm.model import TaskLM
from rayml.training.full import FullLearner, share_loss, share_of


def main() -> None:
    options = parse()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        path = random_llama(folder) if options.model == "random-30m" else resolve_model(options.model)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        torch.multiprocessing.spawn(worker, (options, path, port), nprocs=options.workers)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="tiny", help="as model.name, or random-30m: a random Llama of 36 M parameters"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stage", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--offload", default="none", choices=("none", "optimizer", "all"))
    parser.add_argument("--rows", type=int, default=8, help="rows of a task, over all workers")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a row")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the result here, too")
    return parser.parse_args()


def random_llama(folder: str) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


def worker(rank: int, options: argparse.Namespace, path: str, port: int) -> None:
    cuda = torch.cuda.is_available()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(options.workers)}
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.workers))
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=options.workers)
    result = measure(options, path, device)
    if rank == 0:
        print(json.dumps(result, indent=2))
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n")
    dist.destroy_process_group()


def measure(options: argparse.Namespace, path: str, device: torch.device) -> dict:
    """Return median seconds and ratios, with the quartiles of the ratios over interleaved repeats."""
    config = full_config(options)
    plain = zero.load_full(path, config, device, phased=False)
    lm = TaskLM(plain, None)
    learner = FullLearner(zero.load_full(path, config, device), config)
    batch = random_batch(options, int(plain.module.config.vocab_size), device)

    def plain_step() -> None:
        plain.backward(share_loss(lm, share_of([(batch, 1.0)])))
        plain.step()

    steps = {
        "plain": plain_step,
        "adapt": lambda: learner.run_phase([(batch, 1.0)], Phase(descends=True)),
        "query": lambda: learner.run_phase([(batch, 1.0)], Phase(collects=True, restores=True)),
    }
    for step in [*steps.values()] * 2:  # traces, buffers, AdamW's state
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.repeats):
        for name, step in steps.items():
            seconds[name].append(timed(step, device))
    kept = [*learner.optimizer.starts.values(), *learner.optimizer.meta_gradients.values()]
    return {
        **{key: value for key, value in vars(options).items() if key != "json"},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "shard_parameters": sum(shard.numel() for shard in learner.optimizer.starts),
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "adapt_over_plain": ratio(seconds["adapt"], seconds["plain"]),
        "query_over_plain": ratio(seconds["query"], seconds["plain"]),
        "extra_bytes_per_parameter": sum(t.nbytes for t in kept)
        / sum(shard.numel() for shard in learner.optimizer.starts),
    }


def full_config(options: argparse.Namespace) -> Config:
    return Config.model_validate(
        {
            "model": {"name": options.model, "dtype": options.dtype, "attention": "sdpa"},
            "data": {"path": "none.jsonl"},
            "run": {"dir": "none"},
            "mode": "full",
            "engine": "zero",
            "inner": {"lr": 1e-4},
            "outer": {"lr": 1e-5},
            "zero": {"stage": options.stage, "offload": options.offload},
        }
    )


def random_batch(options: argparse.Namespace, vocabulary: int, device: torch.device) -> TaskBatch:
    """Rows of random tokens, the last of which is the target."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (options.rows, options.tokens + 1), generator=generator)
    targets = torch.full((options.rows, options.tokens), IGNORE)
    targets[:, -1] = tokens[:, -1]
    return TaskBatch(tokens[:, :-1].contiguous(), targets, 1).to(device)


def timed(step, device: torch.device) -> float:
    """Return the seconds of a step that all workers begin together."""
    dist.barrier()
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - began


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    return {"median": median, "quartile_1": low, "quartile_3": high}


if __name__ == "__main__":
    main()
