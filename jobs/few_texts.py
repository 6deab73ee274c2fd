"""Few examples of tasks that are no labels: spans, answers, free text.

    python jobs/few_texts.py spans/*.jsonl texts/*.jsonl --shots 4,8 --draws 5 --json texts.json

A file is one data set. Each draw takes some examples of it to learn from, and others to ask. Scores are each kind's
main metric (configs/README.md: F1 of spans, F1 of an answer's tokens, chrF). Beside each start stand the bare model
with the same examples in its prompt, and, if asked for, a LoRA of its own for each task, by AdamW: `--lora 60` takes so
many steps. Intervals: 95 %, over data sets and their draws.
"""

import argparse
import json
import random
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from few_many import Scores, as_rows, table

import rayml
from rayml.adaptation import adaptation_request, support_side
from rayml.experiments.metrics import scores
from rayml.model import MetaModel
from rayml.tasks.read import read_rows
from rayml.tasks.table import build_tasks
from rayml.tasks.task import Example, Task

IN_CONTEXT, LORA = "the bare model, in context", "LoRA of its own"
LORA_RATE = 1e-3
"""Of AdamW; what PEFT's examples use most for LoRA."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--starts", default="smollm2-135m", help="starts, or run folders, comma-separated")
    parser.add_argument("--shots", default="4,8", help="examples of a task")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--most", type=int, default=12, help="queries of a draw")
    parser.add_argument("--steps", type=int, help="inner steps; else the start's own")
    parser.add_argument("--lora", type=int, default=0, help="steps of a LoRA for each task; 0: none")
    parser.add_argument("--json", type=Path, help="write the draws' scores here")
    asked = parser.parse_args()
    starts = {name: rayml.load(name) for name in asked.starts.split(",")}
    bare = untrained(next(iter(starts.values())))
    everything: dict[str, Scores] = {}
    for shots in map(int, asked.shots.split(",")):
        found = everything[f"{shots} shots"] = defaultdict(lambda: defaultdict(list))
        for path in asked.data:
            ((task, *_), _) = build_tasks([replace(row, task=Path(path).stem) for row in read_rows([path])])
            began = time.monotonic()
            for draw in range(asked.draws):
                support, query = drawn(task, shots, asked.most, draw)
                for name, model in starts.items():
                    adapter = model.adapt(as_rows(task.kind or "text", support), name=task.name, steps=asked.steps)
                    found[name][task.name].append(score(adapter, task, query))
                adapter = bare.adapt(as_rows(task.kind or "text", support), name=task.name, steps=0)
                found[IN_CONTEXT][task.name].append(score(adapter, task, query))
                if asked.lora:
                    adapter = fine_tuned(bare, task, support, asked.lora)
                    found[LORA][task.name].append(score(adapter, task, query))
            means = ", ".join(f"{name} {fmean(of[task.name]):.3f}" for name, of in found.items())
            print(f"{shots} shots, {task.name}: {means}   ({time.monotonic() - began:.0f} s)", flush=True)
            if asked.json:
                asked.json.write_text(json.dumps(everything, indent=1) + "\n")
        print(table(found, list(starts)), flush=True)


def drawn(task: Task, shots: int, most: int, seed: int) -> tuple[list[Example], list[Example]]:
    examples = random.Random(f"{task.name} {seed}").sample(task.examples, min(shots + most, len(task.examples)))
    return examples[:shots], examples[shots:]


def score(adapter: rayml.Adapter, task: Task, query: list[Example]) -> float:
    answers = adapter.predict([dict(example.parts) or example.input for example in query])
    pairs = zip(query, answers, strict=True)
    asked = [{"input": e.input, "target": e.target, "answers": list(e.answers), "answer": str(a)} for e, a in pairs]
    return next(iter(scores(task.kind, asked).values()))


def untrained(model: MetaModel) -> MetaModel:
    """Return the bare model, which shows free text in the prompt."""
    return replace(with_texts(model, in_context=True), start=model.untrained)


def with_texts(model: MetaModel, *, in_context: bool) -> MetaModel:
    algorithm = model.config.algorithm.model_copy(update={"texts_in_context": in_context})
    config = model.config.model_copy(update={"algorithm": algorithm})
    return replace(model, config=config, encoder=replace(model.encoder, texts_in_context=in_context))


@torch.enable_grad()
def fine_tuned(model: MetaModel, task: Task, support: list[Example], steps: int) -> rayml.Adapter:
    """Return an adapter that AdamW learned on one task alone, without examples in the prompt."""
    model = with_texts(model, in_context=False)
    request = adaptation_request(model, Task(task.name, tuple(support), (), task.kind))
    losses = support_side(model, [request]).losses
    weights = {name: weight.clone().unsqueeze(0).requires_grad_() for name, weight in model.start.items()}
    optimizer = torch.optim.AdamW(weights.values(), LORA_RATE, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        losses(weights).sum().backward()
        optimizer.step()
    return model.adapter({name: weight[0].detach() for name, weight in weights.items()}, request.card)


if __name__ == "__main__":
    main()
