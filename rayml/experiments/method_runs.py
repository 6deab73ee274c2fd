"""What takes part in a comparison: methods and seeds, each trained with equal forward-backward tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayml.algorithms.methods import BUDGET, METHODS, NOT_RUN, USUAL, Method
from rayml.config import Config, parse_config
from rayml.errors import ConfigError, RunError
from rayml.experiments.classifiers import check_classifier, missing
from rayml.experiments.evaluate_command import trained_on
from rayml.lm.abilities import checked_model
from rayml.lm.load import MINILM, load_tokenizer, resolve_model
from rayml.lm.objective import SIDES, side_batch, trained_tokens
from rayml.lm.sentence import read_sentences
from rayml.runs.checkpoint import newest_checkpoint, step_of
from rayml.runs.files import AnyPath, as_path
from rayml.runs.folder import RunFolder
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.splits import Splits, refuse_leaks
from rayml.tasks.task import Task

OURS = "outer.steps", "seed", "run.dir", "validation.every"
"""Keys that the comparison sets itself."""
COUNTED_EPISODES = 64


@dataclass(frozen=True)
class Request:
    """What is compared, and how carefully."""

    methods: Sequence[str]
    """Of none, the usual ones that know all kinds of tasks there are."""
    variants: Mapping[str, tuple[str, ...]]
    """More methods by name, each by its overrides."""
    runs: Sequence[str]
    """Run folders that take part as they are."""
    seeds: int
    episodes: int
    """Of each meta-test task."""
    val_episodes: int
    """That the adaptation's settings are chosen on, over all meta-val tasks."""
    factors: Sequence[float]
    """On the inner rates, each tried."""
    steps: Sequence[int]
    """Numbers of inner steps, each tried."""
    encoder: str = MINILM
    """The sentence encoder that classifiers begin with."""


@dataclass(frozen=True)
class MethodRun:
    """One method with one seed."""

    name: str
    seed: int
    method: Method
    config: Config
    tokens_per_step: int = 0
    """Forward and backward, on average, without padding; 0 where nothing is trained."""
    run: RunFolder | None = None
    """Where it is trained; None: it is not."""
    is_given: bool = False
    """Whether that run takes part as it is."""

    @property
    def tokens(self) -> int:
        return self.config.outer.steps * self.tokens_per_step

    @property
    def trains(self) -> bool:
        return self.run is not None and not self.is_given

    def check_length(self) -> None:
        """Raise RunError if the run there was trained for longer than it is to be."""
        newest, steps = newest_checkpoint(self.run.checkpoints) if self.run else None, self.config.outer.steps
        if self.trains and newest and step_of(newest) > steps:
            raise RunError(f"{newest.parent.parent}: was trained for more than {steps} outer steps; use another --out")


def plan(
    values: dict[str, Any], source: str, base: Config, splits: Splits, request: Request, folder: AnyPath
) -> list[MethodRun]:
    """Return every method and seed, each with as many outer steps as come to the same number of tokens.

    Args:
        values: the config, nested; its outer steps, by the algorithm BUDGET, fix everyone's tokens.
        source: names the config in errors.
        folder: where runs go.

    Raises:
        ConfigError, DataError, RunError: something cannot take part.
    """
    known = METHODS | {name: Method(overrides) for name, overrides in request.variants.items()}
    methods = request.methods or usual(base, splits, request.encoder)
    for name in NOT_RUN.keys() & set(methods):
        raise ConfigError(f"--methods: {name} does not run here: {NOT_RUN[name]}")
    unknown = [name for name in methods if name not in known]
    if unknown:
        raise ConfigError(f"--methods: {', '.join(unknown)} unknown; there are {', '.join(known)}")
    check_names(request)
    # An algorithm that is named anew has its own readout, and a sentence encoder knows one alone.
    readout = ["algorithm.readout=prototypes"] if is_encoder(base) else []
    by_prompt = [name for name in methods if known[name].by_prompt and readout]
    if by_prompt:
        raise ConfigError(f"--methods: {', '.join(by_prompt)} answer by a prompt; {base.model.name} is an encoder")
    counted = parse_config(values, source, [f"algorithm.name={BUDGET}", *readout])
    budget = base.outer.steps * tokens_per_step(counted, splits.train)
    method_runs = []
    for name in dict.fromkeys([*methods, *request.variants]):
        method, run = known[name], RunFolder(folder / f"{name}-0")
        overrides = [*readout, *method.overrides, "validation.every=0", "validation.patience=0"]
        config = parse_config(values, f"{source} for {name}", [*overrides, f"run.dir={run.path}"])
        if method.start == "encoder":
            check_classifier(name, request.encoder, [*splits.val, *splits.test])
        else:
            check_method_run(config, base, splits)
        each = tokens_per_step(config, splits.train) if method.start == "trained" else 0
        overrides += [f"outer.steps={max(1, round(budget / each))}"] if each else []
        for seed in range(request.seeds if method.has_seeds else 1):
            run = RunFolder(folder / f"{name}-{seed}")
            config = parse_config(values, source, [*overrides, f"seed={seed}", f"run.dir={run.path}"])
            method_runs.append(MethodRun(name, seed, method, config, each, run if each else None))
    method_runs.sort(key=lambda method_run: method_run.seed)  # what is cut off has compared all methods with some seeds
    return method_runs + [of_run(RunFolder(path), splits) for path in request.runs]


def usual(base: Config, splits: Splits, encoder: str) -> list[str]:
    """Return what is compared unless told otherwise: what knows the base and all kinds of tasks, and can run here."""
    is_label = all(task.options for tasks in splits for task in tasks)
    known = [name for name in USUAL if is_label or not METHODS[name].labels_only]
    if is_encoder(base):
        known = [name for name in known if not METHODS[name].by_prompt]
    return [name for name in known if METHODS[name].start != "encoder" or not missing(name, encoder)]


def is_encoder(config: Config) -> bool:
    """Return whether a config's base is a sentence encoder."""
    return read_sentences(resolve_model(config.model.name)) is not None


def check_names(request: Request) -> None:
    """Raise ConfigError where two methods would have one name, or a variant sets what the comparison sets."""
    for name, overrides in request.variants.items():
        taken = [override for override in overrides if override.partition("=")[0] in OURS]
        if taken:
            raise ConfigError(f"--variant {name}: {', '.join(taken)}: the comparison sets it for every method")
    names = [*METHODS, *request.variants, *(as_path(path).name for path in request.runs)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two methods, variants or run folders are named {', '.join(twice)}; rename one")


def check_method_run(config: Config, base: Config, splits: Splits) -> None:
    """Raise what training would refuse, and DataError if it would see a text of meta-test."""
    checked_model(config, [task for part in splits for task in part])
    if config.data.model_copy(update={"labels": base.data.labels}) != base.data:
        refuse_leaks(config.run.dir, prepare_splits(config.data).train, splits.test)


def of_run(run: RunFolder, splits: Splits) -> MethodRun:
    """Return a run folder's entry.

    Raises:
        RunError: there is no run.
        DataError: it was trained on a text of meta-test.
    """
    config, _ = run.trained()
    refuse_leaks(str(run.path), trained_on(config), splits.test)
    tokens = sum(record.get("tokens", 0) for record in run.records())
    return MethodRun(
        run.path.name, config.seed, Method(()), config, round(tokens / config.outer.steps), run, is_given=True
    )


def tokens_per_step(config: Config, tasks: Sequence[Task]) -> int:
    """Return the tokens that run forward and backward in an outer step, on average, without padding."""
    encoder = config.encoder(load_tokenizer(resolve_model(config.model.name)))
    sampler = config.data.sampler(config.seed)
    episodes = [encoder.episode(sampler.episode(tasks, index)) for index in range(COUNTED_EPISODES)]
    support, query = (side_batch(episodes, side, encoder.pad) for side in SIDES)
    return round(config.tasks_per_step * trained_tokens(config, support, query) / COUNTED_EPISODES)
