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
from rayml.distributed.train import start_ray, train
from rayml.distributed.worker import VALIDATION_SEED
from rayml.errors import ConfigError, DataError
from rayml.evaluation.answers import Choice, Contender, answer, choose_setting
from rayml.evaluation.command import EVALUATION_SEED, trained_on
from rayml.evaluation.comparison import summarize
from rayml.evaluation.comparison_report import print_summary, write_report
from rayml.evaluation.curves import side_of
from rayml.evaluation.session import Session, open_session, untrained_session
from rayml.lm.load import load_tokenizer, resolve_model
from rayml.meta.adapt import expand, task_gradients
from rayml.planning.batch import passes
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
USUAL = [name for name in METHODS if name not in ("anil", "maml")]
COUNTED_EPISODES = 64
START_SECONDS = 30
"""Of a training run's workers, about."""


@dataclass(frozen=True)
class Request:
    """What is compared, and how carefully."""

    methods: Sequence[str]
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
    results = [one(entry, base, splits, request, folder, out) for entry in entries]
    if own_ray and ray.is_initialized():
        ray.shutdown()
    summary = summarize(results)
    write_report(summary, results, base, command, folder)
    print_summary(summary, folder, out)
    return summary


def plan(
    values: dict[str, Any], source: str, base: Config, splits: Splits, request: Request, folder: Path
) -> list[Entry]:
    """Return every method and seed, each with as many outer steps as come to FOMAML's tokens."""
    known = METHODS | {name: Method(overrides) for name, overrides in request.variants.items()}
    unknown = [name for name in request.methods if name not in known]
    if unknown:
        raise ConfigError(f"--methods: {', '.join(unknown)} unknown; there are {', '.join(known)}")
    names = list(dict.fromkeys([*request.methods, *request.variants]))
    counter = TokenCounter(splits.train)
    budget = base.outer.steps * counter.per_step(base)
    entries = []
    for seed in range(request.seeds):
        for name in names:
            method, path = known[name], folder / f"{name}-{seed}"
            if method.start == "base" and seed:
                continue  # nothing in it depends on the seed
            overrides = [*method.overrides, f"seed={seed}", f"run.dir={path}", "validation.every=0"]
            config = parse_config(values, f"{source} for {name}", overrides)
            if method.start != "trained":
                entries.append(Entry(name, seed, method, config, 0, None))
                continue
            each = counter.per_step(config)
            config = parse_config(values, source, [*overrides, f"outer.steps={max(1, round(budget / each))}"])
            entries.append(Entry(name, seed, method, config, each, RunFolder(path)))
    return entries + [of_run(RunFolder(path), splits) for path in request.runs]


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
    if entry.method.start == "trained" and entry.tokens_per_step and entry.run and entry.run.path.parent == folder:
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
    asked = repr(
        (config, entry.method, how, fingerprint(splits.train), fingerprint(splits.val), fingerprint(splits.test))
    )
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
        key = repr((config.data, encoder.in_context, config.seed))
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
