"""Time one worker's meta-gradient against the ways in which others compute it: same model, same episodes, same dtype.

    python jobs/benchmark.py configs/quickstart.yaml inner.lr=0.02                                # as on a laptop
    python jobs/benchmark.py configs/quickstart.yaml inner.lr=0.02 --axis tasks_per_step=1,2,4,8  # T, plotted
    python jobs/benchmark.py configs/llama-1b.yaml --shape llama-1b data.ways=4 data.shots=4 data.queries=4 \
        data.max_tokens=64 tasks_per_step=8 --axis tasks_per_step=1,2,4,8,16,32    # random weights and rows, for a GPU

The meta-gradients are compared first: the clocks run on the same work, or not at all (a small inner rate keeps the
rounding of bfloat16 small). Peers beside PEFT and torch: `pip install --no-deps higher==0.2.1 torchopt==0.7.3 optree`,
and learn2learn's source (see --learn2learn). What is not here is left out, and the report says so.
"""

import argparse
import copy
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from benchmark_machine import Machine, measured_flops, op_seconds, peak_bytes, timed
from benchmark_peers import Side, Work, peers, plain_model
from benchmark_report import write_report
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForCausalLM, LlamaConfig

from rayml.algorithms.fomaml import adapt_then_query
from rayml.algorithms.inner_loop import InnerLoop, Params
from rayml.algorithms.meta_gradient import first_order
from rayml.config import Config, load_config
from rayml.lm.batch import collate, readings
from rayml.lm.catalog import resolve_model
from rayml.lm.load import DTYPES, load_base, load_tokenizer
from rayml.lm.lora import B, TaskLoRA, is_in_layer, layer_number
from rayml.lm.model import TaskLM
from rayml.lm.precision import resolve_precision_here
from rayml.lm.rows import TokenRow, decode_rows
from rayml.tasks.prepare import prepare_splits

OURS = "rayml"
APART = {"float32": 1e-3, "bfloat16": 0.1}
"""The largest relative difference of a peer's meta-gradient: in bfloat16 each way rounds in another place."""
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    },
    "llama-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    },
    "llama-30m": {
        "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 8192,
    },
    "llama-tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Episodes:
    """The tokenised sides of T tasks, and the labels of each."""

    support: Sequence[Sequence[TokenRow]]
    query: Sequence[Sequence[TokenRow]]
    labels: Sequence[Sequence[Sequence[int]]]

    def tokens(self, steps: int) -> int:
        """Return the tokens that go forward and backward, without padding."""
        support, query = (
            sum(len(one.tokens) for t, task in enumerate(side) for one in readings(task, self.labels[t]))
            for side in (self.support, self.query)
        )
        return steps * support + query


def last_of_each(overrides: list[str]) -> list[str]:
    """Return overrides without those whose key comes back: an axis may be of what was set."""
    return list({override.partition("=")[0]: override for override in overrides}.values())


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(stderr=True)
    ways, missing = peers(options.learn2learn)
    changes = [[], *([f"{key}={value}"] for key, values in options.axis for value in values)]
    each = [(some, last_of_each([*options.overrides, "workers=1", *some])) for some in changes]
    given = [(some, load_config(options.config, overrides)) for some, overrides in each]
    settings = [
        (some, resolve_precision_here(config, resolve_model(config.model.name), device)[0]) for some, config in given
    ]
    machine = Machine.measured(device, DTYPES[settings[0][1].model.dtype])
    cases: list[dict[str, Any]] = []
    with Progress(console=console) as bar:
        for changed, config in bar.track(settings, description="cases"):
            chosen = {name: ways[name] for name in options.axis_peers if name in ways} if changed else ways
            cases.append({"changed": changed} | measure(config, options, chosen, device))
            console.print(summary(cases[-1]), highlight=False)
    result = {
        "machine": machine.described(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")}
        | {"python": platform.python_version()},
        "command": options.command,
        "date": time.strftime("%Y-%m-%d"),
        "missing": missing,
        "cases": cases,
    }
    write_report(result, options.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="model, adapters, episodes; tasks_per_step of them go through one forward")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--shape", choices=SHAPES, help="a Llama with random weights, and rows of data.max_tokens random tokens"
    )
    parser.add_argument(
        "--axis",
        type=axis,
        action="append",
        default=[],
        metavar="KEY=V,V",
        help="other values of one key; again for more",
    )
    parser.add_argument("--axis-peers", type=lambda text: text.split(","), default=["PEFT loop"], metavar="NAME,NAME")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads; else torch's own choice")
    parser.add_argument(
        "--learn2learn", type=Path, metavar="FOLDER", help="its unpacked source, where it does not build"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="where the report goes")
    options = parser.parse_intermixed_args()
    options.command = shlex.join(["python", *sys.argv])
    return options


def axis(text: str) -> tuple[str, list[str]]:
    key, _, values = text.partition("=")
    return key, values.split(",")


def measure(
    config: Config, options: argparse.Namespace, ways: dict[str, Callable], device: torch.device
) -> dict[str, Any]:
    """Return a case's numbers: of rayml, and of each peer that comes to the same meta-gradient."""
    model = random_model(options.shape, config, device) if options.shape else loaded(config, device)
    episodes = random_episodes(config, model) if options.shape else drawn_episodes(config)
    mine = shared(model)
    lora = TaskLoRA(mine, **config.lora.shape())
    lm = TaskLM(mine, lora)
    start = {name: weight.to(device) for name, weight in disturbed(lora, config.seed).items()}
    names = list(lora.linears)
    plain = plain_model(shared(model), names, lora.rank, lora.alpha / lora.rank)
    others = peft_model(shared(model), config, names)
    methods: dict[str, Callable[[], Any]] = {OURS: partial(ours, lm, start, episodes, config)}
    methods |= {
        name: partial(way, work_of(plain if name == "higher" else others, start, episodes, config, device))
        for name, way in ways.items()
    }
    apart, failed = compared(methods, APART[config.model.dtype])
    methods = {name: work for name, work in methods.items() if name not in failed}
    seconds = interleaved(methods, options.repeats, device)
    tokens = episodes.tokens(config.inner.steps)
    return {
        "model": options.shape or config.model.name,
        "dtype": config.model.dtype,
        "tasks": config.tasks_per_step,
        "rows": [len(side[0]) for side in (episodes.support, episodes.query)],
        "inner_steps": config.inner.steps,
        "tokens": tokens,
        "apart": apart,
        "failed": failed,
        "seconds": seconds,
        "ratio": {
            name: quartiles([a / b for a, b in zip(seconds[name], seconds[OURS], strict=True)])
            for name in methods
            if name != OURS
        },
        "peak_bytes": {name: peak_bytes(work, device) for name, work in methods.items()},
        "flops": {name: measured_flops(work) for name, work in methods.items() if name in (OURS, "PEFT loop")},
        "op_seconds": op_seconds(methods[OURS], device),
        "weight_bytes_read": weight_bytes_read(model, names, config.inner.steps),
    }


def weight_bytes_read(model: Any, adapted: Sequence[str], steps: int) -> int:
    """Return the least bytes of weights that go through the processor: each layer's once in each of its passes.

    Layers below the first adapter have one forward a side; those from it on, and the head, a forward and a backward in
    each inner step and the query. Of the embeddings, rows alone are read.
    """
    first = min(map(layer_number, adapted))
    head = model.get_output_embeddings().weight
    passes = 2 * (steps + 1)
    layers = [(layer_number(name), weight.nbytes) for name, weight in model.named_parameters() if is_in_layer(name)]
    return head.nbytes * passes + sum(size * (2 if layer < first else passes) for layer, size in layers)


def ours(lm: TaskLM, start: Params, episodes: Episodes, config: Config) -> Params:
    """Return the meta-gradient of plain first-order MAML, which the peers know, from rows of tokens on."""
    support, query = (
        collate(side, 0, episodes.labels, lm.packs).to(lm.device) for side in (episodes.support, episodes.query)
    )
    inner_lrs = {name: torch.tensor(config.inner.lr, device=lm.device) for name in start}
    losses = {"support": partial(lm.losses, batch=support), "query": partial(lm.losses, batch=query)}
    weights = torch.ones(len(episodes.support), device=lm.device)
    return first_order(
        adapt_then_query(config.inner.steps), losses, start, InnerLoop(inner_lrs, config.inner.steps), weights
    ).start


def compared(methods: dict[str, Callable[[], Any]], most: float) -> tuple[dict[str, float], dict[str, str]]:
    """Return how far each one's meta-gradient is from ours, relative to it, and why some do not take part."""
    wanted = torch.cat([gradient.flatten() for gradient in methods[OURS]().values()])
    apart, failed = {}, {}
    for name, work in methods.items():
        if name == OURS:
            continue
        try:
            found = torch.cat([gradient.flatten() for gradient in work()])
        except Exception as error:  # a library that cannot do this model
            failed[name] = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:200]}"
            continue
        apart[name] = float((found - wanted).norm() / wanted.norm())
        if not apart[name] < most:
            failed[name] = f"its meta-gradient is {apart[name]:.2g} of ours away"
    return apart, failed


def work_of(model: Any, start: Params, episodes: Episodes, config: Config, device: torch.device) -> Work:
    sides = [
        [Side.of(collate([rows], 0, [labels]).to(device)) for rows, labels in zip(side, episodes.labels, strict=True)]
        for side in (episodes.support, episodes.query)
    ]
    params = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    shapes = [[tuple(weight.shape) for weight in weights] for weights in (params.values(), start.values())]
    assert shapes[0] == shapes[1], "gradients are compared in this order"
    tasks = list(zip(*sides, strict=True))
    return Work(model, list(params.values()), list(start.values()), tasks, config.inner.lr, config.inner.steps)


def shared(model: Any) -> Any:
    """Return a model of its own modules, which others' hooks and wrappers leave alone, on the same weights."""
    return copy.deepcopy(model, {id(weight): weight for weight in (*model.parameters(), *model.buffers())})


def loaded(config: Config, device: torch.device) -> Any:
    return load_base(resolve_model(config.model.name), config.model.dtype, config.model.attention).to(device)


def random_model(shape: str, config: Config, device: torch.device) -> Any:
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=4096),
            dtype=DTYPES[config.model.dtype],
            attn_implementation=config.model.attention,
        )
    return model.requires_grad_(False).eval()


def peft_model(model: Any, config: Config, names: Sequence[str]) -> Any:
    """Return PEFT's model with adapters at the same places as ours, in float32 as its default is."""
    lora = config.lora
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            task_type="CAUSAL_LM", r=lora.rank, lora_alpha=int(lora.alpha), target_modules=list(lora.targets),
            layers_to_transform=sorted(set(map(layer_number, names))),
        ),
    ).eval()  # fmt: skip


def disturbed(lora: TaskLoRA, seed: int) -> Params:
    """Return a start whose B is not zero: else the gradient of A would be, and would compare nothing."""
    generator = torch.Generator().manual_seed(seed)
    start = lora.untrained_start(seed)
    return {n: w + 0.01 * torch.randn(w.shape, generator=generator) * n.endswith(B) for n, w in start.items()}


def drawn_episodes(config: Config) -> Episodes:
    """Return the first step's episodes of the config's data."""
    tasks = prepare_splits(config.data).train
    encoder, sampler = (
        config.encoder(load_tokenizer(resolve_model(config.model.name))),
        config.data.sampler(config.seed),
    )
    found = [encoder.episode(sampler.episode(tasks, index)) for index in range(config.tasks_per_step)]
    support, query = ([decode_rows(one[side]) for one in found] for side in ("support", "query"))
    return Episodes(support, query, [one["labels"] for one in found])


def random_episodes(config: Config, model: Any) -> Episodes:
    """Return rows of `data.max_tokens` random tokens, of which the last is the target, among the whole vocabulary."""
    generator = torch.Generator().manual_seed(config.seed)

    def rows(count: int) -> list[list[TokenRow]]:
        shape = config.tasks_per_step, count, config.data.max_tokens
        tokens = torch.randint(model.config.vocab_size, shape, generator=generator).tolist()
        return [[TokenRow(row, len(row) - 1) for row in task] for task in tokens]

    support, query = (rows(config.data.ways * each) for each in (config.data.shots, config.data.queries))
    return Episodes(support, query, [[] for _ in support])


def interleaved(methods: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Return each one's seconds, round by round, so that what else the machine does meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats + 1):  # the first is for warming up
        for name, work in methods.items():
            found = timed(work, device)
            seconds[name] += [found] if repeat else []
    return seconds


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the median and the quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return [median, low, high]


def summary(case: dict[str, Any]) -> str:
    parts = [f"{name} {statistics.median(seconds):.3f} s" for name, seconds in case["seconds"].items()]
    return f"{' '.join(case['changed']) or 'as configured'}: {', '.join(parts)}; {case['failed'] or ''}"


if __name__ == "__main__":
    main()
