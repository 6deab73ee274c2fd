"""Methods side by side: trained with equal forward-backward tokens, tuned with equal effort, asked the same questions.

Every method and seed leaves its run (if it trains) and `results/NAME-SEED.json` with every answer; the report is
derived from those files alone. A comparison that was cut off continues with what is missing. A result that came from
other code, tasks or settings is computed again.
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
from rayml.experiments.answers import Choice, LearnedMethod, answer_episodes, choose_setting
from rayml.experiments.classifiers import answer_by_classifier, choose_head, classifier_for, package_versions
from rayml.experiments.method_runs import MethodRun, Request, plan, show_plan
from rayml.experiments.report import print_summary, write_report
from rayml.experiments.summaries import summarize
from rayml.lm.precision import own_device
from rayml.model import load, untrained_model
from rayml.progress import progress
from rayml.ray_start import start_ray
from rayml.runs.checkpoint import manifest_checksums
from rayml.runs.files import AnyPath, checksum, parse_path, write_atomically
from rayml.runs.folder import RunFolder, fingerprint
from rayml.tasks.episodes import EVALUATION_SEED
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.splits import Splits
from rayml.tasks.task import Task
from rayml.training.driver import train


def compare(
    values: dict[str, Any], source: str, request: Request, to: str | AnyPath, command: str, dry_run: bool, out: Console
) -> dict[str, Any]:
    """Train the methods, choose how each adapts on meta-val, let all answer meta-test, and write the report.

    Args:
        values: the config, nested; its outer steps with the algorithm BUDGET fix the tokens of every method.
        source: names the config in errors.
        to: the folder, or its URI, for runs, answers and the report.
        command: quoted in the report.

    Raises:
        ConfigError, DataError, RunError: the input is bad; nothing was started.
        TrainingError: no method could be trained.
    """
    base, folder = parse_config(values, source), parse_path(to)
    splits = prepare_splits(base.data)
    if not splits.test or not splits.val:
        raise DataError("compare needs tasks for meta-val and meta-test; raise data.splits.val and data.splits.test")
    method_runs = plan(values, source, base, splits, request, folder)
    if dry_run:
        show_plan(method_runs, base, splits, request, out)
        return {}
    for method_run in method_runs:
        check_provenance(method_run, folder)
    own_ray = not ray.is_initialized()
    results, failed = [], {}
    for method_run in method_runs:
        if method_run.name in failed:
            continue
        try:
            results.append(method_result(method_run, base, splits, request, folder, out))
        except TrainingError as error:  # other methods continue; one that fails is left out with all its seeds
            failed[method_run.name] = f"seed {method_run.seed}: {error}"
            message = f"{method_run.name} is left out, {failed[method_run.name]}"
            out.print(message, style="red", markup=False, soft_wrap=True)
    if own_ray and ray.is_initialized():
        ray.shutdown()
    results = [result for result in results if result["method"] not in failed]
    if not results:
        raise TrainingError(f"{folder}: no method could be trained; {next(iter(failed.values()))}")
    summary = summarize(results) | {"failed": failed}
    write_report(summary, results, base, command, folder)
    print_summary(summary, folder, out)
    return summary


def method_result(
    method_run: MethodRun, base: Config, splits: Splits, request: Request, folder: AnyPath, out: Console
) -> dict[str, Any]:
    """Return the answers of one method with one seed: from its file, if that has the same fingerprint."""
    path = folder / "results" / f"{method_run.name}-{method_run.seed}.json"
    fingerprint = result_fingerprint(method_run, base, splits, request)
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["asked"] == fingerprint:
            return result
    if method_run.trains:
        method_run.check_length()
        note = provenance_path(method_run, folder)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note, json.dumps(provenance(method_run.config)) + "\n")
        if not ray.is_initialized():
            start_ray(method_run.config)
        steps = method_run.config.outer.steps
        out.print(f"{method_run.name}, seed {method_run.seed}: {steps} outer steps", highlight=False)
        train(method_run.config, resume=True)
    result = {
        "method": method_run.name,
        "seed": method_run.seed,
        "algorithm": method_run.config.algorithm.name,
        "labels": method_run.config.data.labels,
        "asked": fingerprint,
        **encoder_versions(method_run, request),
        **training_costs(method_run),
        **adapt_and_answer(method_run, base, splits, request),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result, ensure_ascii=False) + "\n")
    return result


def adapt_and_answer(method_run: MethodRun, base: Config, splits: Splits, request: Request) -> dict[str, Any]:
    """Choose on meta-val how a method adapts, and let it answer the meta-test episodes.

    All methods get the same episodes, with labels shown as the method's own config says.
    """
    data = base.data.model_copy(update={"labels": method_run.config.data.labels})
    val = splits.val, data.validation_sampler(), request.val_episodes
    test = splits.test, data.sampler(EVALUATION_SEED), request.episodes
    choice: Choice[Any]
    with progress(Console(stderr=True, markup=False), transient=True) as add_bar:
        began = time.perf_counter()
        if method_run.method.start == "encoder":
            classifier = classifier_for(method_run.name, request.encoder, own_device(base), method_run.seed)
            tries = len(classifier.heads) * request.val_episodes * (len(classifier.heads) > 1)
            choice = choose_head(classifier, *val, add_bar(f"adapting {method_run.name}", tries))
            answers = answer_by_classifier(classifier, *test, choice.setting)
        else:
            method = learned_method(method_run, splits.train)
            tries = len(request.factors) * request.val_episodes * method.takes_steps
            advance = add_bar(f"adapting {method_run.name}", tries)
            choice = choose_setting(method, *val, request.factors, request.steps, advance)
            most_steps = max(request.steps) if method.takes_steps else 0
            answers = answer_episodes(method, *test, choice.setting, most_steps)
        seconds = time.perf_counter() - began
        advance = add_bar(f"asking {method_run.name}", len(splits.test) * request.episodes)
        episodes = []
        for episode in answers:
            episodes.append(episode)
            advance()
    return {
        "choosing_seconds": round(seconds, 1),
        "setting": asdict(choice.setting),
        "tried": [{**asdict(setting), "score": score} for setting, score in choice.tried],
        "episodes": episodes,
    }


def learned_method(method_run: MethodRun, tasks: Sequence[Task]) -> LearnedMethod:
    """Load a method: a trained run, an untrained start, or the bare base."""
    model = load(method_run.run) if method_run.run else untrained_model(method_run.config, tasks)
    start = None if method_run.method.start == "base" else model.start
    return LearnedMethod(model.scorer(), start, model.inner_lrs, method_run.method.takes_support)


def training_costs(method_run: MethodRun) -> dict[str, Any]:
    """Return the outer steps, forward-backward tokens (as counted, else as planned) and seconds of training."""
    records = method_run.run.records() if method_run.run else []
    return {
        "outer_steps": records[-1]["step"] if records else 0,
        "tokens": sum(record.get("tokens", method_run.tokens_per_step) for record in records),
        "seconds": round(sum(record["step_seconds"] for record in records), 1),
    }


def encoder_versions(method_run: MethodRun, request: Request) -> dict[str, str]:
    """Return a classifier's sentence encoder with the versions of its packages; nothing for other methods."""
    is_classifier = method_run.method.start == "encoder"
    return {"encoder": f"{request.encoder} ({package_versions(method_run.name)})"} if is_classifier else {}


def result_fingerprint(method_run: MethodRun, base: Config, splits: Splits, request: Request) -> str:
    """Return a checksum of everything that a result depends on."""
    config = method_run.config.model_dump(mode="json", exclude={"run", "workers", "device", "validation", "sweep"})
    config["data"].pop("path")
    episodes = base.data.ways, base.data.shots, base.data.queries
    effort = request.episodes, request.val_episodes, list(request.factors), list(request.steps), episodes
    checkpoint = manifest_checksums(method_run.run.trained()[1]) if method_run.run and not method_run.trains else None
    tasks = [*(fingerprint(part) for part in splits), method_run.tasks_checksum]
    versions = provenance(method_run.config), encoder_versions(method_run, request)
    text = repr((config, method_run.method, effort, tasks, checkpoint, versions))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def provenance(config: Config) -> dict[str, Any]:
    """Return what training depends on beside settings and tasks: the code, the engine, and a run that it continues."""
    old_run = config.run.continues
    start = manifest_checksums(RunFolder(old_run).trained()[1]) if old_run else []
    return {"code": code_version(), "engine": config.engine, "run.continues": start}


def provenance_path(method_run: MethodRun, folder: AnyPath) -> AnyPath:
    return folder / "trained_by" / f"{method_run.name}-{method_run.seed}.json"


def check_provenance(method_run: MethodRun, folder: AnyPath) -> None:
    """Raise RunError if the run there was begun by other code, by another engine, or from another run."""
    if not (method_run.trains and method_run.run and any(method_run.run.checkpoints.glob("step_*"))):
        return
    path, now = provenance_path(method_run, folder), provenance(method_run.config)
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    changed = [key for key in now if now[key] != before.get(key)]
    if changed:
        raise RunError(
            f"{method_run.run.path}: was trained with other {', '.join(changed)}; remove it to train it again, or give "
            "--out another folder"
        )


@cache
def code_version() -> str:
    """Return the version of rayml with a checksum of its source files."""
    root = Path(rayml.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)} {checksum(file)}\n".encode())
    return f"{rayml.__version__} {digest.hexdigest()[:16]}"
