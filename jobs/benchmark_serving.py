"""Time a mixed batch of adapters against the bare base and PEFT's `adapter_names`, and learning adapters online.

    python jobs/benchmark_serving.py --model smollm2-135m-instruct --json out.json

First everyone's next-token logits are compared, so that all clocks run on the same work. Then, in turns: tokens a
second of transformers' `generate` on the bare base, of ours on the bare base, of ours with D adapters, and of PEFT with
the same. At last: seconds from examples to an adapter, by number of examples and of clients who come at once.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from rayml.adaptation import adapt_requests, adaptation_request
from rayml.algorithms.inner_loop import Params
from rayml.config import Config, parse_config
from rayml.lm.catalog import resolve_model
from rayml.lm.decode import Decoder
from rayml.lm.generate import Generation
from rayml.lm.load import load_base, load_tokenizer
from rayml.lm.lora import TaskLoRA, layer_number
from rayml.lm.model import TaskLM
from rayml.lm.peft_files import PREFIX
from rayml.lm.precision import resolve_precision_here
from rayml.lm.sampling import Sampling
from rayml.model import MetaModel
from rayml.tasks.task import Example, Task

TICKET = "the a card was charged twice this month app crashes when I open it where is my parcel"


class Endless(Generation):
    """Does not end before its last token, so that all rows make as many."""

    def take(self, logits: torch.Tensor) -> None:
        logits[self.tokenizer.eos_token_id] = -torch.inf
        super().take(logits)


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = open_session(options)
    adapters = [draw(model, seed) for seed in range(max(options.distinct))]
    peers = Peers(model, adapters, options)
    cuda = torch.cuda.is_available()
    result: dict[str, Any] = {
        "options": {key: value for key, value in vars(options).items() if key != "json"},
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "largest_difference_of_logits": peers.difference(),
        "tokens": [peers.measure(n, distinct) for n in options.rows for distinct in options.distinct if distinct <= n],
        "adaptation": [learning(model, some, clients, options) for some, clients in options.adaptations],
    }
    print(json.dumps(result, indent=1))
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="as model.name")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "eager"))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=numbers, default=[1, 8, 32], help="rows side by side, such as 1,8,32")
    parser.add_argument("--distinct", type=numbers, default=[1, 8, 32], help="adapters among them")
    parser.add_argument("--last-layers", type=int, help="adapt only the last N layers")
    parser.add_argument(
        "--adaptations",
        type=lambda text: [tuple(map(int, part.split("x"))) for part in text.split(",")],
        default=[(4, 1), (16, 1), (64, 1), (16, 4), (16, 8)],
        help="examples x clients at once, such as 16x1,16x8",
    )
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=24, help="tokens that a row makes")
    parser.add_argument("--steps", type=int, default=3, help="inner steps")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="CPU threads; else torch's own choice")
    parser.add_argument("--json", type=Path, help="write the result here, too")
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def open_session(options: argparse.Namespace) -> MetaModel:
    """Return a session as a server has it, but for its start, which is drawn: that changes no second."""
    config: Config = parse_config(
        {
            "model": {"name": options.model, "dtype": options.dtype, "attention": options.attention},
            "data": {"path": "-"},
            "run": {"dir": "-"},
            "lora": {"rank": options.rank, "last_layers": options.last_layers},
        },
        "benchmark",
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = resolve_model(options.model)
    config, precision = resolve_precision_here(config, base, device)
    module = load_base(base, config.model.dtype, config.model.attention).to(device)
    lm = TaskLM(module, TaskLoRA(module, **config.lora.shape()))
    model = MetaModel(config, lm, config.encoder(load_tokenizer(base)), base, {}, {}, 0, {}, precision)
    start = draw(model, 0)
    return dataclasses.replace(
        model, start=start, inner_lrs={name: torch.tensor(0.01, device=device) for name in start}
    )


def draw(model: MetaModel, seed: int) -> Params:
    """Return an adapter that changes what is said, and not so much that it is noise."""
    assert model.lm.adapter is not None
    generator = torch.Generator().manual_seed(seed)
    start = model.lm.adapter.untrained_start(seed)
    noise = {n: 0.02 * torch.randn(w.shape, generator=generator) if n.endswith("B") else 0 for n, w in start.items()}
    return {name: (weight + noise[name]).to(model.lm.device) for name, weight in start.items()}


class Peers:
    """The same rows, by ours, by the bare base, and by PEFT, which is loaded beside it on a base of its own."""

    def __init__(self, model: MetaModel, adapters: list[Params], options: argparse.Namespace):
        self.model, self.adapters, self.options = model, adapters, options
        device = model.lm.device
        lora = model.config.lora
        config = LoraConfig(
            task_type="CAUSAL_LM", r=lora.rank, lora_alpha=int(lora.alpha), target_modules=list(lora.targets),
            layers_to_transform=sorted({layer_number(name) for name in adapters[0]}),
        )  # fmt: skip
        self.plain, theirs = (load_base(model.base, options.dtype, options.attention).to(device) for _ in range(2))
        self.peft = get_peft_model(theirs, config, "a0")
        for index in range(1, len(adapters)):
            self.peft.add_adapter(f"a{index}", config)
        for index, adapter in enumerate(adapters):
            for name, weight in adapter.items():
                self.peft.get_parameter(f"{PREFIX}{name}.a{index}.weight").data.copy_(weight)
        self.peft.eval()
        generator = torch.Generator().manual_seed(0)
        shape = max(options.rows), options.prompt
        self.prompts = torch.randint(5, int(self.plain.config.vocab_size) - 5, shape, generator=generator)

    def difference(self) -> float:
        """Return how far PEFT's next-token logits and ours are apart at most, over a mixed batch."""
        rows = max(self.options.rows)
        seen: list[torch.Tensor] = []

        class Recorded(Endless):
            def take(self, logits: torch.Tensor) -> None:
                seen.append(logits.clone())
                super().take(logits)

        decoder = Decoder(self.model.lm, rows, 1 << 40)
        decoder.join([self._row(Recorded, index, len(self.adapters), 2) for index in range(rows)])
        names = [f"a{index % len(self.adapters)}" for index in range(rows)]
        with torch.no_grad():
            theirs = self.peft(input_ids=self.prompts.to(self.model.device), adapter_names=names).logits[:, -1]
        apart = float((torch.stack(seen) - theirs.float()).abs().max())
        if apart > (0.02 if self.options.dtype == "float32" else 1.0):
            raise SystemExit(f"logits are {apart} apart: the clocks would run on different work")
        return apart

    def measure(self, rows: int, distinct: int) -> dict[str, Any]:
        ways: dict[str, Callable[[], None]] = {
            "generate": lambda: self._generate(self.plain, rows),
            "base": lambda: self._decode(rows, 0),
            "mixed": lambda: self._decode(rows, distinct),
            "peft": lambda: self._generate(self.peft, rows, [f"a{index % distinct}" for index in range(rows)]),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(self.options.repeats + 1):  # the first is for warming up
            for name, work in ways.items():
                found = timed(work)
                seconds[name] += [found] if repeat else []
        made = rows * self.options.tokens
        return {
            "rows": rows,
            "distinct": distinct,
            "tokens_per_second": {name: made / statistics.median(found) for name, found in seconds.items()},
            "mixed_over_base": ratio(seconds["base"], seconds["mixed"]),
            "mixed_over_generate": ratio(seconds["generate"], seconds["mixed"]),
            "mixed_over_peft": ratio(seconds["peft"], seconds["mixed"]),
        }

    def _row(self, kind: type[Generation], index: int, distinct: int, tokens: int) -> Generation:
        adapter = self.adapters[index % distinct] if distinct else None
        tokenizer = self.model.encoder.tokenizer
        return kind(tokenizer, self.prompts[index].tolist(), adapter, Sampling(tokens))

    def _decode(self, rows: int, distinct: int) -> None:
        decoder = Decoder(self.model.lm, rows, 1 << 40)
        decoder.join([self._row(Endless, index, distinct, self.options.tokens) for index in range(rows)])
        for _ in range(self.options.tokens - 1):
            decoder.step()

    def _generate(self, model: Any, rows: int, names: list[str] | None = None) -> None:
        prompts = self.prompts[:rows].to(self.model.device)
        tokens = self.options.tokens
        more = {"adapter_names": names} if names else {}
        with torch.no_grad():
            model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens,
                min_new_tokens=tokens, do_sample=False, pad_token_id=0, **more,
            )  # fmt: skip


def learning(model: MetaModel, examples: int, clients: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time `clients` adaptations to `examples` examples each, in one inner loop, and one after the other."""
    generator = torch.Generator().manual_seed(examples)

    def text() -> str:
        words = TICKET.split()
        return " ".join(words[index] for index in torch.randint(len(words), (16,), generator=generator).tolist())

    labels = ("billing", "bug", "delivery", "account")
    tasks = [
        Task(f"t{n}", tuple(Example(text(), labels[index % 4]) for index in range(examples)), labels)
        for n in range(clients)
    ]

    def learn(chosen: list[Task]) -> None:
        loop = adapt_requests(
            model, [adaptation_request(model, task) for task in chosen], [options.steps] * len(chosen)
        )
        for _ in loop:
            pass

    together: list[float] = []
    in_turn: list[float] = []
    for repeat in range(options.repeats + 1):
        at_once = timed(partial(learn, tasks))
        one_by_one = sum(timed(partial(learn, [task])) for task in tasks)
        if repeat:
            together.append(at_once)
            in_turn.append(one_by_one)
    return {
        "examples": examples,
        "clients": clients,
        "seconds": statistics.median(together),
        "in_turn_over_together": ratio(in_turn, together),
    }


def timed(work: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def ratio(numerator: list[float], denominator: list[float]) -> list[float]:
    """Return the median of the ratios pair by pair, and the least and the largest."""
    found = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    return [round(value, 3) for value in (statistics.median(found), found[0], found[-1])]


def table(result: dict[str, Any]) -> str:
    lines = [
        "| rows | adapters | generate | base | mixed | PEFT | mixed / base | mixed / generate | mixed / PEFT |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in result["tokens"]:
        speeds = [f"{one['tokens_per_second'][way]:.0f}" for way in ("generate", "base", "mixed", "peft")]
        ratios = ["{:.2f} [{:.2f}, {:.2f}]".format(*one[f"mixed_over_{way}"]) for way in ("base", "generate", "peft")]
        lines.append("| " + " | ".join([str(one["rows"]), str(one["distinct"]), *speeds, *ratios]) + " |")
    lines += ["", "| examples | clients at once | seconds | in turn / together |", "|---|---|---|---|"]
    for one in result["adaptation"]:
        spread = "{:.2f} [{:.2f}, {:.2f}]".format(*one["in_turn_over_together"])
        lines.append(f"| {one['examples']} | {one['clients']} | {one['seconds']:.2f} | {spread} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
