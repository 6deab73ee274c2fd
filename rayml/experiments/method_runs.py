"""The runs of a comparison: methods and seeds, each trained with equal tokens; and about how long they take."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from rayml.algorithms.inner_loop import expand, task_gradients
from rayml.algorithms.methods import BUDGET, METHODS, NOT_RUN, USUAL, Method
from rayml.config import Config, parse_config
from rayml.errors import ConfigError, RunError
from rayml.experiments.classifiers import check_classifier, install_command
from rayml.experiments.evaluate_command import training_tasks
from rayml.lm.abilities import checked_model
from rayml.lm.catalog import MINILM, resolve_model
from rayml.lm.load import load_tokenizer
from rayml.lm.scorer import make_side
from rayml.lm.sentence import read_sentences
from rayml.lm.sides import SIDES, side_batch, trained_tokens
from rayml.model import untrained_model
from rayml.runs.checkpoint import newest_checkpoint, step_of
from rayml.runs.files import AnyPath, parse_path
from rayml.runs.folder import RunFolder, fingerprint
from rayml.runs.reports import table
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.splits import Splits, refuse_leaks
from rayml.tasks.task import Task

RESERVED_KEYS = "outer.steps", "seed", "run.dir", "validation.every"
"""Keys that the comparison sets for every method."""
COUNTED_EPISODES = 64
START_SECONDS = 30
"""About how long the workers of a training run take to start."""


@dataclass(frozen=True)
class Request:
    """What to compare, and how carefully."""

    methods: Sequence[str]
    """If empty, the usual methods that can answer all the tasks."""
    variants: Mapping[str, tuple[str, ...]]
    """More methods: their names and their overrides."""
    runs: Sequence[str]
    """Folders of finished runs to compare as they are."""
    seeds: int
    episodes: int
    """Episodes of each meta-test task."""
    val_episodes: int
    """Episodes of all meta-val tasks together, on which each method's adaptation is chosen."""
    factors: Sequence[float]
    """Factors on the inner rates to try."""
    steps: Sequence[int]
    """Numbers of inner steps to try."""
    encoder: str = MINILM
    """The sentence encoder of the classifiers."""


@dataclass(frozen=True)
class MethodRun:
    """One method with one seed."""

    name: str
    seed: int
    method: Method
    config: Config
    tokens_per_step: int = 0
    """Forward-backward tokens of an outer step, on average, without padding; 0 where nothing is trained."""
    run: RunFolder | None = None
    """The run folder of a trained method, else None."""
    is_given: bool = False
    """Whether that run is finished already, and compared as it is."""
    tasks_checksum: str = ""
    """Of the meta-train tasks; "" for a given run."""

    @property
    def tokens(self) -> int:
        return self.config.outer.steps * self.tokens_per_step

    @property
    def trains(self) -> bool:
        return self.run is not None and not self.is_given

    def check_length(self) -> None:
        """Raise RunError if the run in that folder has taken more outer steps than this one is to take."""
        newest, steps = newest_checkpoint(self.run.checkpoints) if self.run else None, self.config.outer.steps
        if self.trains and newest and step_of(newest) > steps:
            raise RunError(f"{newest.parent.parent}: was trained for more than {steps} outer steps; use another --out")


def plan(
    values: dict[str, Any], source: str, base: Config, splits: Splits, request: Request, folder: AnyPath
) -> list[MethodRun]:
    """Return every method with every seed, each with as many outer steps as use up the same number of tokens.

    Args:
        values: the config, nested; its outer steps with the algorithm BUDGET fix the tokens of every method.
        source: names the config in errors.
        folder: where runs go.

    Raises:
        ConfigError, DataError, RunError: something cannot be compared.
    """
    known = METHODS | {name: Method(overrides) for name, overrides in request.variants.items()}
    methods = request.methods or default_methods(base, splits, request.encoder)
    for name in NOT_RUN.keys() & set(methods):
        raise ConfigError(f"--methods: {name} does not run here: {NOT_RUN[name]}")
    unknown = [name for name in methods if name not in known]
    if unknown:
        raise ConfigError(f"--methods: {', '.join(unknown)} unknown; there are {', '.join(known)}")
    check_names(request)
    # Naming an algorithm resets its readout to the default; that of a sentence encoder is the same for all.
    kept = [f"algorithm.{name}={getattr(base.algorithm, name)}" for name in ("label_names", "prototype_steps")]
    readout = ["algorithm.readout=prototypes", *kept] if is_encoder(base) else []
    by_prompt = [name for name in methods if known[name].by_prompt]
    if by_prompt and readout:
        raise ConfigError(f"--methods: {', '.join(by_prompt)} answer by a prompt; {base.model.name} is an encoder")
    counted = parse_config(values, source, [f"algorithm.name={BUDGET}", *readout])
    budget = base.outer.steps * tokens_per_step(counted, splits.train)
    method_runs = []
    for name in dict.fromkeys([*methods, *request.variants]):
        method = known[name]
        overrides = [*readout, *method.overrides, "validation.every=0", "validation.patience=0"]
        config = parse_config(values, f"{source} for {name}", [*overrides, f"run.dir={folder / f'{name}-0'}"])
        if method.start == "encoder":
            check_classifier(name, request.encoder, [*splits.val, *splits.test])
        tasks = splits.train if method.start == "encoder" else checked_tasks(config, base, splits)
        step_tokens = tokens_per_step(config, tasks) if method.start == "trained" else 0
        overrides += [f"outer.steps={max(1, round(budget / step_tokens))}"] if step_tokens else []
        for seed in range(request.seeds if method.has_seeds else 1):
            run = RunFolder(folder / f"{name}-{seed}")
            config = parse_config(values, source, [*overrides, f"seed={seed}", f"run.dir={run.path}"])
            method_run = MethodRun(name, seed, method, config, step_tokens, run if step_tokens else None)
            method_runs.append(replace(method_run, tasks_checksum=fingerprint(tasks)))
    method_runs.sort(key=lambda method_run: method_run.seed)  # so that one that is cut off has compared all methods
    return method_runs + [given_method_run(RunFolder(path), splits) for path in request.runs]


def default_methods(base: Config, splits: Splits, encoder: str) -> list[str]:
    """Return the usual methods that suit the base and all tasks, and can run here."""
    is_label = all(task.options for tasks in splits for task in tasks)
    methods = [name for name in USUAL if is_label or not METHODS[name].labels_only]
    if is_encoder(base):
        methods = [name for name in methods if not METHODS[name].by_prompt]
    return [name for name in methods if METHODS[name].start != "encoder" or not install_command(name, encoder)]


def is_encoder(config: Config) -> bool:
    """Return whether a config's base is a sentence encoder."""
    return read_sentences(resolve_model(config.model.name)) is not None


def check_names(request: Request) -> None:
    """Raise ConfigError if two methods have the same name, or a variant sets a key that the comparison sets."""
    for name, overrides in request.variants.items():
        reserved = [override for override in overrides if override.partition("=")[0] in RESERVED_KEYS]
        if reserved:
            raise ConfigError(f"--variant {name}: {', '.join(reserved)}: the comparison sets it for every method")
    names = [*METHODS, *request.variants, *(parse_path(path).name for path in request.runs)]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ConfigError(f"two methods, variants or run folders are named {', '.join(duplicates)}; rename one")


def checked_tasks(config: Config, base: Config, splits: Splits) -> tuple[Task, ...]:
    """Return the tasks that a method is trained on: the base's, unless a variant sets other data.

    Raises what training would raise, and DataError if a variant would train on a text of meta-test.
    """
    tasks = splits.train
    if config.data.model_copy(update={"labels": base.data.labels}) != base.data:
        tasks = prepare_splits(config.data).train
        refuse_leaks(config.run.dir, tasks, splits.test)
    checked_model(config, [*tasks, *splits.val, *splits.test])
    return tasks


def given_method_run(run: RunFolder, splits: Splits) -> MethodRun:
    """Return the entry of a finished run.

    Raises:
        RunError: the folder holds no trained run.
        DataError: it was trained on a text of meta-test.
    """
    config, _ = run.trained()
    refuse_leaks(str(run.path), training_tasks(config), splits.test)
    tokens = sum(record.get("tokens", 0) for record in run.records())
    step_tokens = round(tokens / config.outer.steps)
    return MethodRun(run.path.name, config.seed, Method(()), config, step_tokens, run, is_given=True)


def tokens_per_step(config: Config, tasks: Sequence[Task]) -> int:
    """Return the tokens that go forward and backward in an outer step, on average, without padding."""
    encoder = config.encoder(load_tokenizer(resolve_model(config.model.name)))
    sampler = config.data.sampler(config.seed)
    episodes = [encoder.episode(sampler.episode(tasks, index)) for index in range(COUNTED_EPISODES)]
    support, query = (side_batch(episodes, side, encoder.pad) for side in SIDES)
    return round(config.tasks_per_step * trained_tokens(config, support, query) / COUNTED_EPISODES)


def show_plan(method_runs: Sequence[MethodRun], base: Config, splits: Splits, request: Request, out: Console) -> None:
    """Print the planned runs and questions, and about how long they take."""
    token_seconds = seconds_per_token(base, splits.train)
    heads = "method", "seeds", "outer steps", "tokens a step", "tokens", "minutes a run"
    rows = table(heads, left=["method"], no_wrap=True)
    hours = 0.0
    for first in (method_run for method_run in method_runs if method_run.seed == 0 or method_run.is_given):
        seeds = 1 if first.is_given else sum(method_run.name == first.name for method_run in method_runs)
        minutes = (first.tokens * token_seconds + START_SECONDS) / 60
        hours += seeds * minutes / 60 if first.trains else 0
        counts = first.config.outer.steps, first.tokens_per_step, first.tokens
        cells = [*map(str, counts)] if first.run else ["-"] * 3
        rows.add_row(first.name, str(seeds), *cells, f"{minutes:.1f}" if first.trains else "-")
    out.print(rows)
    tries = len(request.factors) * len(request.steps)
    for line in (
        f"adaptation: {tries} settings tried on {request.val_episodes} meta-val episodes; "
        f"asked: {request.episodes} episodes of each of {len(splits.test)} meta-test tasks",
        f"training takes about {hours:.1f} h on this machine (from one timed episode); choosing and asking come on top",
    ):
        out.print(line, highlight=False, soft_wrap=True)


def seconds_per_token(config: Config, tasks: Sequence[Task]) -> float:
    """Time the forward and backward of an episode's support on this machine, in one process."""
    model = untrained_model(config, tasks)
    episode = config.data.sampler(config.seed).episode(tasks, 0)
    fast = expand(model.start, 1)
    seconds = 0.0
    for _ in range(2):  # the first warms up
        support = make_side(model.lm, model.encoder, [episode], "support")
        tokens = support.batch.tokens.numel()
        began = time.perf_counter()
        task_gradients(config.algorithm.support_losses(support), fast)
        seconds = time.perf_counter() - began
    return seconds / tokens
