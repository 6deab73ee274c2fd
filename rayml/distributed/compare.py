"""Methods side by side: trained with equal forward-backward tokens, adapted with equal care, asked the same questions.

Every method and seed leaves its run (where it trains) and `results/NAME-SEED.json` with every answer; the report is
derived from those files alone. Cut off, a comparison goes on with what is missing.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from rayml.config import Config, parse_config
from rayml.distributed.train import check_model, start_ray, train
from rayml.distributed.worker import VALIDATION_SEED
from rayml.errors import ConfigError, DataError, RunError, TrainingError
from rayml.evaluation.answers import Choice, Contender, answer, choose_setting
from rayml.evaluation.command import EVALUATION_SEED, trained_on
from rayml.evaluation.comparison import summarize
from rayml.evaluation.comparison_report import print_summary, write_report
from rayml.evaluation.curves import side_of
from rayml.evaluation.session import Session, open_session, untrained_session
from rayml.lm.load import load_tokenizer, resolve_model
from rayml.meta.adapt import expand, task_gradients
from rayml.planning.batch import passes
from rayml.runs.checkpoint import newest_checkpoint, verify
from rayml.runs.folder import RunFolder, fingerprint, write_whole
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.splits import Splits, leaks
from rayml.tasks.task import Task


@dataclass(frozen=True)
class Method:
    """How a method differs from the config, and what it starts from."""

    overrides: tuple[str, ...]
    start: str = "trained"
    """`trained`; `untrained`: where training would begin; `base`: no adapter at all."""
    takes_support: bool = True


IN_CONTEXT = ("algorithm.name=metaicl", "data.labels=words")
METHODS = {
    "zero_shot": Method(IN_CONTEXT, "base", takes_support=False),
    "in_context": Method(IN_CONTEXT, "base"),
    "lora": Method(("algorithm.name=fomaml",), "untrained"),
    "multitask": Method(("algorithm.name=multitask",)),
    "protonet": Method(("algorithm.name=protonet",)),
    "metaicl": Method(("algorithm.name=metaicl",)),
    "reptile": Method(("algorithm.name=reptile",)),
    "fomaml": Method(("algorithm.name=fomaml",)),
    "meta_sgd": Method(("algorithm.name=meta_sgd",)),
    "anil": Method(("algorithm.name=fomaml", "inner.modules=['*.lora_B']")),
    "maml": Method(("algorithm.name=maml", "model.attention=eager")),
}
USUAL = tuple(name for name in METHODS if name not in ("anil", "maml"))
OURS = "outer.steps", "seed", "run.dir", "validation.every"
"""Keys that the comparison sets itself."""
COUNTED_EPISODES = 64
START_SECONDS = 30
"""Of a training run's workers, about."""


@dataclass(frozen=True)
class Request:
    """What is compared, and how carefully."""

    methods: Sequence[str]
    """Of none, the usual ones, without protonet where there is free text."""
    variants: Mapping[str, tuple[str, ...]]
    """More methods by name, each by its overrides."""
    runs: Sequence[Path]
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


@dataclass(frozen=True)
class Entry:
    """One method with one seed."""

    name: str
    seed: int
    method: Method
    config: Config
    tokens_per_step: int
    """Forward and backward, on average, without padding; 0 where nothing is trained."""
    run: RunFolder | None
    trains: bool = False

    @property
    def tokens(self) -> int:
        return self.config.outer.steps * self.tokens_per_step


def compare(
    values: dict[str, Any], source: str, request: Request, folder: Path, command: str, dry_run: bool, out: Console
) -> dict[str, Any]:
    """Train what is to be trained, choose each one's adaptation on meta-val, ask all, and write the report.

    Args:
        values: the config, nested; its outer steps are FOMAML's, and fix everyone's budget of tokens.
        source: names the config in errors.
        command: stands in the report.

    Raises:
        ConfigError, DataError, RunError: the input is bad; nothing was started.
        TrainingError: not one method could be trained.
    """
    base, folder = parse_config(values, source), folder.absolute()
    splits = prepare_splits(base.data)
    if not splits.test or not splits.val:
        raise DataError("compare needs tasks for meta-val and meta-test; raise data.splits.val and data.splits.test")
    entries = plan(values, source, base, splits, request, folder)
    if dry_run:
        show_plan(entries, base, splits, request, out)
        return {}
    own_ray = not ray.is_initialized()
    results, failed = [], {}
    for entry in entries:
        if entry.name in failed:
            continue
        try:
            results.append(one(entry, base, splits, request, folder, out))
        except TrainingError as error:  # the others go on; a method counts with all its seeds or not at all
            failed[entry.name] = f"seed {entry.seed}: {error}"
            out.print(f"{entry.name} is left out, {failed[entry.name]}", style="red", markup=False, soft_wrap=True)
    if own_ray and ray.is_initialized():
        ray.shutdown()
    results = [result for result in results if result["method"] not in failed]
    if not results:
        raise TrainingError(f"{folder}: no method could be trained; {next(iter(failed.values()))}")
    summary = summarize(results) | {"failed": failed}
    write_report(summary, results, base, command, folder)
    print_summary(summary, folder, out)
    return summary


def plan(
    values: dict[str, Any], source: str, base: Config, splits: Splits, request: Request, folder: Path
) -> list[Entry]:
    """Return every method and seed, each with as many outer steps as come to FOMAML's tokens."""
    known = METHODS | {name: Method(overrides) for name, overrides in request.variants.items()}
    methods = request.methods or usual(splits)
    unknown = [name for name in methods if name not in known]
    if unknown:
        raise ConfigError(f"--methods: {', '.join(unknown)} unknown; there are {', '.join(known)}")
    check_names(request)
    names = list(dict.fromkeys([*methods, *request.variants]))
    counter = TokenCounter(splits.train)
    budget = base.outer.steps * counter.per_step(parse_config(values, source, ["algorithm.name=fomaml"]))
    entries = []
    for seed in range(request.seeds):
        for name in names:
            method, path = known[name], folder / f"{name}-{seed}"
            if method.start == "base" and seed:
                continue  # nothing in it depends on the seed
            overrides = [*method.overrides, f"seed={seed}", f"run.dir={path}"]
            overrides += ["validation.every=0", "validation.patience=0"]
            config = parse_config(values, f"{source} for {name}", overrides)
            if not seed:
                check_entry(config, base, splits)
            if method.start != "trained":
                entries.append(Entry(name, seed, method, config, 0, None))
                continue
            each = counter.per_step(config)
            config = parse_config(values, source, [*overrides, f"outer.steps={max(1, round(budget / each))}"])
            entries.append(Entry(name, seed, method, config, each, RunFolder(path), trains=True))
    return entries + [of_run(RunFolder(path), splits) for path in request.runs]


def usual(splits: Splits) -> list[str]:
    is_label = all(task.options for tasks in splits for task in tasks)
    return [name for name in USUAL if name != "protonet" or is_label]


def check_names(request: Request) -> None:
    """Raise ConfigError where two methods would have one name, or a variant sets what the comparison sets."""
    for name, overrides in request.variants.items():
        taken = [override for override in overrides if override.partition("=")[0] in OURS]
        if taken:
            raise ConfigError(f"--variant {name}: {', '.join(taken)}: the comparison sets it for every method")
    names = [*METHODS, *request.variants, *(path.absolute().name for path in request.runs)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two methods, variants or run folders are named {', '.join(twice)}; rename one")


def check_entry(config: Config, base: Config, splits: Splits) -> None:
    """Raise what training would refuse, and DataError if it would see a text of meta-test."""
    model, tasks = resolve_model(config.model.name), [task for part in splits for task in part]
    check_model(config, model, tasks)
    config.encoder(load_tokenizer(model)).check(tasks)
    if config.data.model_copy(update={"labels": base.data.labels}) != base.data:
        leaked = leaks(Splits(prepare_splits(config.data).train, (), splits.test))
        if leaked:
            raise DataError(f"{config.run.dir}: would train on texts of meta-test, such as {leaked[0][0][:60]!r}")


def of_run(run: RunFolder, splits: Splits) -> Entry:
    """Return a run folder's entry.

    Raises:
        RunError: there is no run.
        DataError: it was trained on a text of meta-test.
    """
    config, _ = run.trained()
    leaked = leaks(Splits(trained_on(config), (), splits.test))
    if leaked:
        raise DataError(f"{run.path}: was trained on {len(leaked)} text(s) of meta-test, such as {leaked[0][0][:60]!r}")
    tokens = sum(record.get("tokens", 0) for record in run.records())
    return Entry(run.path.name, config.seed, Method(()), config, round(tokens / config.outer.steps), run)


def one(entry: Entry, base: Config, splits: Splits, request: Request, folder: Path, out: Console) -> dict[str, Any]:
    """Return what one method answered with one seed: from its file, if it was asked the same before."""
    written, asked = (
        folder / "results" / f"{entry.name}-{entry.seed}.json",
        fingerprint_of(entry, base, splits, request),
    )
    if written.exists():
        found = json.loads(written.read_text(encoding="utf-8"))
        if found["asked"] == asked:
            return found
    if entry.trains and entry.run:
        check_length(entry)
        if not ray.is_initialized():
            start_ray(entry.config)
        out.print(f"{entry.name}, seed {entry.seed}: {entry.config.outer.steps} outer steps", highlight=False)
        train(entry.config, resume=True)
    contender = contender_of(entry, splits.train)
    # The comparison's own episodes, under the contender's own labels.
    data = base.data.model_copy(update={"labels": entry.config.data.labels})
    began = time.perf_counter()
    choice = choose_setting(
        contender, splits.val, data.sampler(VALIDATION_SEED), request.val_episodes, request.factors, request.steps
    )
    chosen = time.perf_counter()
    most = max(request.steps) if contender.takes_steps else 0
    with Progress(*Progress.get_default_columns(), console=Console(stderr=True), transient=True) as bar:
        row = bar.add_task(f"asking {entry.name}", total=len(splits.test) * request.episodes)
        answers = []
        for found in answer(
            contender, splits.test, data.sampler(EVALUATION_SEED), request.episodes, choice.setting, most
        ):
            answers.append(found)
            bar.advance(row)
    result = {
        "method": entry.name,
        "seed": entry.seed,
        "algorithm": entry.config.algorithm.name,
        "labels": entry.config.data.labels,
        "asked": asked,
        **costs(entry),
        "choosing_seconds": round(chosen - began, 1),
        **described(choice),
        "episodes": answers,
    }
    written.parent.mkdir(parents=True, exist_ok=True)
    write_whole(written, json.dumps(result, ensure_ascii=False) + "\n")
    return result


def check_length(entry: Entry) -> None:
    """Raise RunError if the run there was trained for longer than it is to be."""
    newest = newest_checkpoint(entry.run.checkpoints) if entry.run else None
    if newest and verify(newest) > entry.config.outer.steps:
        steps = entry.config.outer.steps
        raise RunError(f"{newest.parent.parent}: was trained for more than {steps} outer steps; use another --out")


def contender_of(entry: Entry, tasks: Sequence[Task]) -> Contender:
    """Load what takes part: a trained run, an untrained start, or the bare base."""
    is_trained = entry.method.start == "trained" and entry.run
    session: Session = open_session(entry.run) if is_trained and entry.run else untrained_session(entry.config, tasks)
    start = None if entry.method.start == "base" else session.start
    return Contender(session.scorer(), start, session.rates, entry.method.takes_support)


def costs(entry: Entry) -> dict[str, Any]:
    """Return outer steps, forward-backward tokens and seconds of training: as counted, else as planned."""
    records = entry.run.records() if entry.run else []
    return {
        "outer_steps": records[-1]["step"] if records else 0,
        "tokens": sum(record.get("tokens", entry.tokens_per_step) for record in records),
        "seconds": round(sum(record["step_seconds"] for record in records), 1),
    }


def described(choice: Choice) -> dict[str, Any]:
    return {"setting": asdict(choice.setting), "tried": [{**asdict(s), "score": score} for s, score in choice.tried]}


def fingerprint_of(entry: Entry, base: Config, splits: Splits, request: Request) -> str:
    """Return a checksum of everything that a result depends on."""
    config = entry.config.model_dump(mode="json", exclude={"run", "workers", "engine", "device", "validation", "sweep"})
    config["data"].pop("path")
    episodes = base.data.ways, base.data.shots, base.data.queries
    how = request.episodes, request.val_episodes, list(request.factors), list(request.steps), episodes
    checkpoint = str(entry.run.trained()[1]) if entry.run and not entry.trains else None
    tasks = [fingerprint(part) for part in splits]
    asked = repr((config, entry.method, how, tasks, checkpoint))
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


class TokenCounter:
    """Counts the tokens of episodes of some tasks, once for each way of showing them."""

    def __init__(self, tasks: Sequence[Task]):
        self.tasks = tasks
        self.counted: dict[str, tuple[float, float]] = {}

    def per_step(self, config: Config) -> int:
        """Return the tokens that run forward and backward in an outer step, on average, without padding."""
        support, query = self.sides(config)
        of_support, of_query = passes(config)
        return round(config.tasks_per_step * (of_support * support + of_query * query))

    def sides(self, config: Config) -> tuple[float, float]:
        """Return the mean number of tokens in an episode's support, and in its query."""
        encoder = config.encoder(load_tokenizer(resolve_model(config.model.name)))
        key = repr((config.model.name, config.data, encoder.in_context, encoder.token_dropout, config.seed))
        if key not in self.counted:
            sampler = config.data.sampler(config.seed)
            records = [encoder.episode(sampler.episode(self.tasks, index)) for index in range(COUNTED_EPISODES)]
            support, query = (
                sum(len(tokens) for record in records for tokens in record[side]["tokens"]) / COUNTED_EPISODES
                for side in ("support", "query")
            )
            self.counted[key] = support, query
        return self.counted[key]


def show_plan(entries: Sequence[Entry], base: Config, splits: Splits, request: Request, out: Console) -> None:
    """Print what would be trained and asked, and about how long it would take."""
    pace = seconds_per_token(base, splits.train)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("method", "seeds", "outer steps", "tokens a step", "tokens", "minutes a run"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    seconds = 0.0
    for name in dict.fromkeys(entry.name for entry in entries):
        group = [entry for entry in entries if entry.name == name]
        first, trains = group[0], bool(group[0].tokens)
        each = first.tokens * pace + START_SECONDS if trains else 0.0
        seconds += each * len(group)
        steps = str(first.config.outer.steps) if trains else "-"
        cells = [
            steps,
            str(first.tokens_per_step or "-"),
            str(first.tokens or "-"),
            f"{each / 60:.1f}" if trains else "-",
        ]
        table.add_row(name, str(len(group)), *cells)
    out.print(table)
    tries = len(request.factors) * len(request.steps)
    out.print(
        f"adaptation: {tries} settings tried on {request.val_episodes} meta-val episodes; "
        f"asked: {request.episodes} episodes of each of {len(splits.test)} meta-test tasks",
        highlight=False,
        soft_wrap=True,
    )
    out.print(
        f"training about {seconds / 3600:.1f} h on this machine, by one episode that was timed; choosing and asking "
        "come on top",
        highlight=False,
        soft_wrap=True,
    )


def seconds_per_token(config: Config, tasks: Sequence[Task]) -> float:
    """Time the forward and backward of an episode's support here, in one process."""
    session = untrained_session(config, tasks)
    episode = config.data.sampler(config.seed).episode(tasks, 0)
    batch = side_of(session.encoder, [episode], "support", session.device)
    fast = expand(session.start, 1)
    task_gradients(lambda weights: session.lm.losses(weights, batch), fast)  # warms up
    batch = side_of(session.encoder, [episode], "support", session.device)
    began = time.perf_counter()
    task_gradients(lambda weights: session.lm.losses(weights, batch), fast)
    return (time.perf_counter() - began) / batch.tokens.numel()
