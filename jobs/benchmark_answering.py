"""Time the two engines of `rayml serve` on one run: our own, and vLLM, each as its replica has it, without HTTP.

    python jobs/benchmark_answering.py RUN --json out.json

Both answer in turns, from the same adapters: texts of the bare base and of 1, 8 and 32 adapters side by side, their
first token, queries to classify; and the seconds from examples to the first answer.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rayml.lm.sampling import Sampling
from rayml.serving.replica import Replica
from rayml.serving.schema import AdapterRequest, ClassifyRequest
from rayml.serving.settings import Serving
from rayml.serving.store import adapter_id
from rayml.serving.vllm.answerer import Answerer
from rayml.serving.vllm.engine import vllm_version

OWNER = "benchmark"
NAME = "base"
TICKETS = {
    "billing": "I was charged twice this month, please refund my order",
    "bug": "the app crashes when I open it, and the page stays blank",
    "delivery": "where is my parcel, it was due last week and never came",
}


def main() -> None:
    options = parse()
    print(json.dumps(asyncio.run(measure(options)), indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--rows", type=numbers, default=[1, 8, 32], help="texts side by side")
    parser.add_argument("--adapters", type=numbers, default=[0, 1, 8, 32], help="among them; 0 is the bare base")
    parser.add_argument("--tokens", type=int, default=24, help="that each text has")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the result here, too")
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as store:
        most = max(options.adapters)
        serving = Serving.model_validate(
            {
                "run": options.run,
                "store": store,
                "engine": "vllm",
                "batching": {"rows": max(options.rows)},
                "limits": {"waiting_queries": 4096},
                "answerers": {"loras": max(most, 1), "cpus": options.threads, "rows": max(options.rows)},
            }
        )
        replica = Replica(serving)
        answerer = Answerer(serving, NAME)
        first = await first_answers(replica, answerer, options.repeats)
        adapters = [await learn(replica, f"a{number}", labels=False) for number in range(most)]
        labelled = [await learn(replica, f"l{number}") for number in range(most)]
        result: dict[str, Any] = {
            "options": {key: str(value) for key, value in vars(options).items()},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "versions": {"torch": version("torch"), "vllm": vllm_version()},
            "seconds_to_first_answer": first,
            "texts": [],
            "queries": [],
        }
        for rows in options.rows:
            for many in options.adapters:
                if many <= rows:
                    asked = [adapters[row % many] if many else None for row in range(rows)]
                    result["texts"].append(await texts(replica, answerer, asked, many, options))
                if 0 < many <= rows:
                    of = [labelled[row % many] for row in range(rows)]
                    result["queries"].append(await queries(replica, answerer, of, many, options.repeats))
        answerer.close()
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


async def learn(replica: Replica, name: str, labels: bool = True) -> str:
    """Learn an adapter of the tickets, for their labels or for free text; return its id.

    Those that write are the start's: what has learned such short targets ends its text at once.
    """
    pairs = [(f"{text} {name} {n}", label) for label, text in TICKETS.items() for n in range(2)]
    asked = {"name": name, "examples": [{"input": text, "target": label} for text, label in pairs]}
    request = AdapterRequest.model_validate(asked | ({} if labels else {"kind": "text", "steps": 0}))
    manifest, _ = await replica.learn(OWNER, adapter_id(name, [name, labels]), request)
    return manifest.id


async def first_answers(replica: Replica, answerer: Answerer, repeats: int) -> dict[str, float]:
    """Return the seconds from examples to the first answer, by each engine."""
    found: dict[str, list[float]] = {"ours": [], "vllm": []}
    for repeat in range(repeats + 1):
        for engine, asked in (("ours", replica), ("vllm", answerer)):
            began = time.perf_counter()
            adapter = await learn(replica, f"first-{engine}-{repeat}")
            await asked.classify(OWNER, adapter, ClassifyRequest(model=NAME, input="charged again"))
            found[engine] += [time.perf_counter() - began] if repeat else []
    return {engine: statistics.median(seconds) for engine, seconds in found.items()}


async def texts(
    replica: Replica, answerer: Answerer, adapters: list[str | None], many: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Time a text of each of these adapters, all at once."""

    def by_ours(row: int, adapter: str | None) -> AsyncIterator[Any]:
        return replica.write(OWNER, adapter, [prompt(row)], Sampling(options.tokens))

    def by_vllm(row: int, adapter: str | None) -> AsyncIterator[Any]:
        body = {"model": NAME, "prompt": prompt(row), "max_tokens": options.tokens, "stream": True, "ignore_eos": True}
        return answerer.respond(OWNER, adapter, "completions", json.dumps(body).encode())

    found: dict[str, Any] = {"rows": len(adapters), "adapters": many}
    timed: dict[str, list[tuple[float, float]]] = {"ours": [], "vllm": []}
    for repeat in range(options.repeats + 1):  # the first is for warming up
        for engine, ask in (("ours", by_ours), ("vllm", by_vllm)):
            began = time.perf_counter()
            firsts, made = zip(
                *await asyncio.gather(*(follow(ask(row, one), began) for row, one in enumerate(adapters))), strict=True
            )
            speed = sum(made) / (time.perf_counter() - began)
            timed[engine] += [(speed, statistics.median(firsts))] if repeat else []
    for engine, pairs in timed.items():
        speeds, seconds = zip(*pairs, strict=True)
        found[engine] = {
            "tokens_per_second": statistics.median(speeds),
            "seconds_to_first_token": statistics.median(seconds),
        }
    return found


async def follow(pieces: AsyncIterator[Any], began: float) -> tuple[float, int]:
    """Return the seconds to the first piece of text, and how many tokens came."""
    first, made = 0.0, 0
    async for piece in pieces:
        if piece is None or (isinstance(piece, str) and piece.startswith("data: [")):
            continue
        first = first or time.perf_counter() - began
        made = made + 1 if isinstance(piece, str) else piece[1].tokens
    return first, made


async def queries(replica: Replica, answerer: Answerer, adapters: list[str], many: int, repeats: int) -> dict[str, Any]:
    """Time a query to each of these adapters, all at once."""
    found: dict[str, Any] = {"rows": len(adapters), "adapters": many}
    timed: dict[str, list[float]] = {"ours": [], "vllm": []}
    for repeat in range(repeats + 1):
        for engine, asked in (("ours", replica), ("vllm", answerer)):
            began = time.perf_counter()
            wanted = [
                asked.classify(OWNER, one, ClassifyRequest(model=NAME, input=f"{prompt(row)} {repeat}"))
                for row, one in enumerate(adapters)
            ]
            await asyncio.gather(*wanted)
            timed[engine] += [len(adapters) / (time.perf_counter() - began)] if repeat else []
    return found | {engine: {"queries_per_second": statistics.median(speeds)} for engine, speeds in timed.items()}


def prompt(row: int) -> str:
    return f"{list(TICKETS.values())[row % 3]}, and this is letter {row}"


def table(result: dict[str, Any]) -> str:
    lines = [
        "| texts at once | adapters | tokens/s: ours | vLLM | first token, s: ours | vLLM |",
        "|---|---|---|---|---|---|",
    ]
    for one in result["texts"]:
        speeds = [f"{one[engine]['tokens_per_second']:.0f}" for engine in ("ours", "vllm")]
        firsts = [f"{one[engine]['seconds_to_first_token']:.2f}" for engine in ("ours", "vllm")]
        lines.append("| " + " | ".join([str(one["rows"]), str(one["adapters"] or "base"), *speeds, *firsts]) + " |")
    lines += ["", "| queries at once | adapters | classified/s: ours | vLLM |", "|---|---|---|---|"]
    for one in result["queries"]:
        speeds = [f"{one[engine]['queries_per_second']:.1f}" for engine in ("ours", "vllm")]
        lines.append("| " + " | ".join([str(one["rows"]), str(one["adapters"]), *speeds]) + " |")
    first = result["seconds_to_first_answer"]
    lines += ["", f"from six examples to the first answer: ours {first['ours']:.2f} s, vLLM {first['vllm']:.2f} s"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
