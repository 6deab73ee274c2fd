"""Train by several algorithms with the same number of forward-backward tokens, and score them on the same episodes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from rayml.config import Config, parse_config
from rayml.distributed.train import start_ray, train
from rayml.errors import ConfigError
from rayml.evaluation.command import EVALUATION_SEED
from rayml.evaluation.comparison import plot, summarize, table
from rayml.evaluation.evaluate import trained_curves
from rayml.evaluation.session import open_session
from rayml.lm.encode import Encoder
from rayml.lm.load import load_tokenizer, resolve_model
from rayml.planning.batch import passes
from rayml.runs.folder import RunFolder, write_whole
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.task import Task

METHODS: dict[str, list[str]] = {
    "fomaml": ["algorithm.name=fomaml"],
    "meta_sgd": ["algorithm.name=meta_sgd"],
    "anil": ["algorithm.name=fomaml", "inner.modules=['*.lora_B']"],
    "maml": ["algorithm.name=maml", "model.attention=eager"],
    "reptile": ["algorithm.name=reptile"],
    "multitask": ["algorithm.name=multitask"],
    "multitask-words": ["algorithm.name=multitask", "data.labels=words"],
    "metaicl": ["algorithm.name=metaicl"],
    "protonet": ["algorithm.name=protonet"],
}
"""What each method changes in the config."""
COUNTED_EPISODES = 64


def compare(
    values: dict[str, Any], source: str, methods: Sequence[str], seeds: int, episodes: int, folder: Path, out: Console
) -> dict[str, Any]:
    """Train every method with every seed, score it on meta-test, and write `compare.json` and `compare.png`.

    What is there already from a comparison that was cut off is not done again.

    Args:
        values: the config, nested; its outer steps are FOMAML's, and fix everyone's budget of tokens.
        source: names the config in errors.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ConfigError(f"--methods: {', '.join(unknown)} unknown; there are {', '.join(METHODS)}")
    base = parse_config(values, source)
    splits = prepare_splits(base.data)
    tokens = tokens_per_step(base, splits.train)
    budget = base.outer.steps * tokens
    results = []
    own_ray = not ray.is_initialized()
    for seed in range(seeds):
        for name in methods:
            run_folder = folder / f"{name}-{seed}"
            overrides = [*METHODS[name], f"seed={seed}", f"run.dir={run_folder}", "validation.every=0"]
            config = parse_config(values, source, overrides)
            each = tokens_per_step(config, splits.train)
            steps = max(1, round(budget / each))
            config = parse_config(values, source, [*overrides, f"outer.steps={steps}"])
            out.print(f"{name}, seed {seed}: {steps} outer steps of {each} tokens", highlight=False)
            results.append(one(config, name, seed, splits.test, episodes) | {"steps": steps, "tokens": steps * each})
    if own_ray and ray.is_initialized():
        ray.shutdown()
    summary = {"settings": {"episodes": episodes, "seeds": seeds, "tokens": budget}, "methods": summarize(results)}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "compare.json", json.dumps(summary | {"runs": results}, indent=1) + "\n")
    plot(summary, folder / "compare.png")
    out.print(table(summary))
    out.print(f"{folder / 'compare.json'}\n{folder / 'compare.png'}", highlight=False, soft_wrap=True)
    return summary


def one(config: Config, name: str, seed: int, tasks: Sequence[Task], episodes: int) -> dict[str, Any]:
    """Return the scores of one method and seed, from its run folder if they are there already."""
    run = RunFolder(config.run.dir)
    written = run.path / "curves.json"
    if written.exists():
        return json.loads(written.read_text())
    if not ray.is_initialized():
        start_ray(config)
    train(config, resume=True)
    sampler = config.data.sampler(EVALUATION_SEED)
    curves = trained_curves(open_session(run), tasks, sampler, episodes)
    found = {
        "method": name,
        "seed": seed,
        "seconds": sum(record["step_seconds"] for record in run.records()),
        "curves": [{"task": c.task, "index": c.index, "scores": c.scores} for c in curves],
    }
    write_whole(written, json.dumps(found) + "\n")
    return found


def tokens_per_step(config: Config, tasks: Sequence[Task]) -> int:
    """Return the tokens that run forward and backward in an outer step, on average, without padding."""
    encoder = config.encoder(load_tokenizer(resolve_model(config.model.name)))
    support, query = (count(encoder, config, tasks, side) for side in ("support", "query"))
    of_support, of_query = passes(config)
    return round(config.tasks_per_step * (of_support * support + of_query * query))


def count(encoder: Encoder, config: Config, tasks: Sequence[Task], side: str) -> float:
    """Return the mean number of tokens on one side of an episode."""
    sampler = config.data.sampler(config.seed)
    records = [encoder.episode(sampler.episode(tasks, index)) for index in range(COUNTED_EPISODES)]
    return sum(len(tokens) for record in records for tokens in record[side]["tokens"]) / COUNTED_EPISODES
