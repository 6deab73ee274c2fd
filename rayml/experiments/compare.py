"""Methods side by side: trained with equal forward-backward tokens, adapted with equal care, asked the same questions.

Every method and seed leaves its run (where it trains) and `results/NAME-SEED.json` with every answer; the report is
derived from those files alone. Cut off, a comparison goes on with what is missing, and asks anew what was asked of
other code, or otherwise.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

import rayml
from rayml.config import Config, parse_config
from rayml.errors import DataError, RunError, TrainingError
from rayml.experiments.answers import Choice, LearnedMethod, answer, choose_setting
from rayml.experiments.classifiers import ask, choose_head, classifier_for, versions
from rayml.experiments.method_runs import MethodRun, Request, plan, show_plan
from rayml.experiments.report import print_summary, write_report
from rayml.experiments.summaries import summarize
from rayml.lm.precision import own_device
from rayml.model import load, untrained_model
from rayml.progress import progress
from rayml.runs.checkpoint import identity
from rayml.runs.files import AnyPath, as_path, checksum, write_whole
from rayml.runs.folder import RunFolder, fingerprint
from rayml.tasks.episodes import EVALUATION_SEED, VALIDATION_SEED
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.splits import Splits
from rayml.tasks.task import Task
from rayml.training.driver import start_ray, train


def compare(
    values: dict[str, Any], source: str, request: Request, to: str | AnyPath, command: str, dry_run: bool, out: Console
) -> dict[str, Any]:
    """Train what is to be trained, choose each one's adaptation on meta-val, ask all, and write the report.

    Args:
        values: the config, nested; its outer steps, by the algorithm BUDGET, fix everyone's tokens.
        source: names the config in errors.
        to: the folder, or its URI, where runs, answers and the report go.
        command: stands in the report.

    Raises:
        ConfigError, DataError, RunError: the input is bad; nothing was started.
        TrainingError: not one method could be trained.
    """
    base, folder = parse_config(values, source), as_path(to)
    splits = prepare_splits(base.data)
    if not splits.test or not splits.val:
        raise DataError("compare needs tasks for meta-val and meta-test; raise data.splits.val and data.splits.test")
    method_runs = plan(values, source, base, splits, request, folder)
    if dry_run:
        show_plan(method_runs, base, splits, request, out)
        return {}
    for method_run in method_runs:
        check_trained_by(method_run, folder)
    own_ray = not ray.is_initialized()
    results, failed = [], {}
    for method_run in method_runs:
        if method_run.name in failed:
            continue
        try:
            results.append(one(method_run, base, splits, request, folder, out))
        except TrainingError as error:  # the others go on; a method counts with all its seeds or not at all
            failed[method_run.name] = f"seed {method_run.seed}: {error}"
            out.print(
                f"{method_run.name} is left out, {failed[method_run.name]}", style="red", markup=False, soft_wrap=True
            )
    if own_ray and ray.is_initialized():
        ray.shutdown()
    results = [result for result in results if result["method"] not in failed]
    if not results:
        raise TrainingError(f"{folder}: no method could be trained; {next(iter(failed.values()))}")
    summary = summarize(results) | {"failed": failed}
    write_report(summary, results, base, command, folder)
    print_summary(summary, folder, out)
    return summary


def one(
    method_run: MethodRun, base: Config, splits: Splits, request: Request, folder: AnyPath, out: Console
) -> dict[str, Any]:
    """Return what one method answered with one seed: from its file, if it was asked the same before."""
    written = folder / "results" / f"{method_run.name}-{method_run.seed}.json"
    asked = fingerprint_of(method_run, base, splits, request)
    if written.exists():
        found = json.loads(written.read_text(encoding="utf-8"))
        if found["asked"] == asked:
            return found
    if method_run.trains:
        method_run.check_length()
        note = trained_by_file(method_run, folder)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_whole(note, json.dumps(trained_by(method_run.config)) + "\n")
        if not ray.is_initialized():
            start_ray(method_run.config)
        out.print(
            f"{method_run.name}, seed {method_run.seed}: {method_run.config.outer.steps} outer steps", highlight=False
        )
        train(method_run.config, resume=True)
    result = {
        "method": method_run.name,
        "seed": method_run.seed,
        "algorithm": method_run.config.algorithm.name,
        "labels": method_run.config.data.labels,
        "asked": asked,
        **encoder_of(method_run, request),
        **costs(method_run),
        **adapted_and_asked(method_run, base, splits, request),
    }
    written.parent.mkdir(parents=True, exist_ok=True)
    write_whole(written, json.dumps(result, ensure_ascii=False) + "\n")
    return result


def adapted_and_asked(method_run: MethodRun, base: Config, splits: Splits, request: Request) -> dict[str, Any]:
    """Choose how an entry adapts on meta-val, and ask it the comparison's own episodes under its own labels."""
    data = base.data.model_copy(update={"labels": method_run.config.data.labels})
    val = splits.val, data.sampler(VALIDATION_SEED), request.val_episodes
    test = splits.test, data.sampler(EVALUATION_SEED), request.episodes
    choice: Choice[Any]
    with progress(Console(stderr=True, markup=False), transient=True) as bar:
        began = time.perf_counter()
        if method_run.method.start == "encoder":
            classifier = classifier_for(method_run.name, request.encoder, own_device(base), method_run.seed)
            tries = len(classifier.heads) * request.val_episodes * (len(classifier.heads) > 1)
            choice = choose_head(classifier, *val, bar(f"adapting {method_run.name}", tries))
            asking = ask(classifier, *test, choice.setting)
        else:
            method = learned_method(method_run, splits.train)
            tries = len(request.factors) * request.val_episodes * method.takes_steps
            told = bar(f"adapting {method_run.name}", tries)
            choice = choose_setting(method, *val, request.factors, request.steps, told)
            most = max(request.steps) if method.takes_steps else 0
            asking = answer(method, *test, choice.setting, most)
        seconds = time.perf_counter() - began
        asked = bar(f"asking {method_run.name}", len(splits.test) * request.episodes)
        episodes = []
        for episode in asking:
            episodes.append(episode)
            asked()
    return {"choosing_seconds": round(seconds, 1), **described(choice), "episodes": episodes}


def learned_method(method_run: MethodRun, tasks: Sequence[Task]) -> LearnedMethod:
    """Load what takes part: a trained run, an untrained start, or the bare base."""
    model = load(method_run.run) if method_run.run else untrained_model(method_run.config, tasks)
    start = None if method_run.method.start == "base" else model.start
    return LearnedMethod(model.scorer(), start, model.inner_lrs, method_run.method.takes_support)


def costs(method_run: MethodRun) -> dict[str, Any]:
    """Return outer steps, forward-backward tokens and seconds of training: as counted, else as planned."""
    records = method_run.run.records() if method_run.run else []
    return {
        "outer_steps": records[-1]["step"] if records else 0,
        "tokens": sum(record.get("tokens", method_run.tokens_per_step) for record in records),
        "seconds": round(sum(record["step_seconds"] for record in records), 1),
    }


def encoder_of(method_run: MethodRun, request: Request) -> dict[str, str]:
    """Return what a classifier begins with, and by which packages."""
    is_classifier = method_run.method.start == "encoder"
    return {"encoder": f"{request.encoder} ({versions(method_run.name)})"} if is_classifier else {}


def described(choice: Choice[Any]) -> dict[str, Any]:
    return {"setting": asdict(choice.setting), "tried": [{**asdict(s), "score": score} for s, score in choice.tried]}


def fingerprint_of(method_run: MethodRun, base: Config, splits: Splits, request: Request) -> str:
    """Return a checksum of everything that a result depends on."""
    config = method_run.config.model_dump(mode="json", exclude={"run", "workers", "device", "validation", "sweep"})
    config["data"].pop("path")
    episodes = base.data.ways, base.data.shots, base.data.queries
    how = request.episodes, request.val_episodes, list(request.factors), list(request.steps), episodes
    checkpoint = identity(method_run.run.trained()[1]) if method_run.run and not method_run.trains else None
    tasks = [fingerprint(part) for part in splits]
    made_of = trained_by(method_run.config), encoder_of(method_run, request)
    asked = repr((config, method_run.method, how, tasks, checkpoint, made_of))
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


def trained_by(config: Config) -> dict[str, Any]:
    """Return what training depends on beside a config's settings and tasks: the code, and what is continued."""
    continued = config.run.continues
    begun = identity(RunFolder(continued).trained()[1]) if continued else []
    return {"code": code(), "engine": config.engine, "run.continues": begun}


def trained_by_file(method_run: MethodRun, folder: AnyPath) -> AnyPath:
    return folder / "trained_by" / f"{method_run.name}-{method_run.seed}.json"


def check_trained_by(method_run: MethodRun, folder: AnyPath) -> None:
    """Raise RunError if what was trained so far was trained by other code, by another engine, or from another run."""
    if not (method_run.trains and method_run.run and any(method_run.run.checkpoints.glob("step_*"))):
        return
    written, now = trained_by_file(method_run, folder), trained_by(method_run.config)
    then = json.loads(written.read_text(encoding="utf-8")) if written.exists() else {}
    changed = [key for key in now if now[key] != then.get(key)]
    if changed:
        raise RunError(
            f"{method_run.run.path}: was trained with other {', '.join(changed)}; remove it to train it again, or give "
            "--out another folder"
        )


@cache
def code() -> str:
    """Return the version of rayml, and a checksum of its source files."""
    root = Path(rayml.__file__).parent
    found = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        found.update(f"{file.relative_to(root)} {checksum(file)}\n".encode())
    return f"{rayml.__version__} {found.hexdigest()[:16]}"
