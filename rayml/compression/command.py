"""What `rayml compress` does, from a run's folder to a run's folder."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rayml.compression.quantize import LIBRARY, check_library
from rayml.compression.student import evenly_spaced, wanted_layers
from rayml.config import Config
from rayml.errors import ConfigError, RunError
from rayml.experiments.evaluate_command import held_out_tasks
from rayml.lm.load import resolve_model
from rayml.lm.sentence import read_sentences
from rayml.progress import Bar, doing, progress
from rayml.runs.files import as_path, write_whole
from rayml.runs.folder import RunFolder
from rayml.tasks.episodes import EVALUATION_SEED
from rayml.tasks.task import Task

if TYPE_CHECKING:
    from rayml.model import MetaModel

SUPPORT_EPISODES = 32


@dataclass(frozen=True, slots=True)
class Distillation:
    """How a student is taught."""

    steps: int
    lr: float
    """Of the student's layers; its start and rates are learned as in the run's own training."""
    temperature: float
    hard: float
    """Weight of the loss by the labels."""


def compress_run(
    run_path: str,
    to: str,
    quantize: str | None,
    distill: str | None,
    prune: float | None,
    distillation: Distillation,
    episodes: int,
    checkpoint: str | None,
    out: Console,
    err: Console,
) -> dict[str, Any]:
    """Compress a run's base in one way, write the new run, and measure both.

    Raises:
        ConfigError, RunError, DataError: none or several ways, a value that cannot be, no run of adapters, a folder
            that exists, a library that is missing, no held-out task to measure on; all before a model is loaded.
    """
    check_ways(quantize, distill, prune, distillation)
    folder = as_path(to)
    if folder.exists():
        raise RunError(f"{to}: exists already; give --out a new folder")
    if not isinstance(folder, Path):
        raise RunError(f"--out {to}: the base is loaded from there, so give a folder of this machine")
    source = RunFolder(run_path)
    config, _ = source.trained(checkpoint)
    base = check_run(config, source, distill)
    tasks = held_out_tasks(config, config.data, None, "test")
    with doing(err, "loading libraries and model"):
        from rayml.compression import methods
        from rayml.compression.folder import write_run
        from rayml.compression.report import table
        from rayml.model import load

        model = load(source, checkpoint=checkpoint)
    part = folder.with_name(folder.name + ".part")  # a base that is not whole is never taken for one
    shutil.rmtree(part, ignore_errors=True)
    with progress(err) as bar:
        try:
            if quantize:
                compressed = methods.quantized(model, base, quantize, part)
            elif prune:
                compressed = methods.pruned(model, base, prune, part, bar("reading", SUPPORT_EPISODES))
            else:
                done = bar("distilling", distillation.steps)
                compressed = methods.distilled(model, base, str(distill), distillation, part, done)
            model.encoder.tokenizer.save_pretrained(part / "base")
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        small = load(write_run(source, folder, compressed, model.step))
        summary = measured(model, small, tasks, episodes, bar)
    how = f"{quantize}" if quantize else f"pruned by {prune}" if prune else f"distilled into {distill}"
    record = {"run": str(source.path), "how": how, "steps": distillation.steps if distill else None, **summary}
    write_whole(folder / "compression.json", json.dumps(record, indent=2) + "\n")
    out.print(table(summary, f"{config.model.name}, {how}"))
    out.print(f"{folder}\nnext: rayml serve {to}", highlight=False, soft_wrap=True)
    return record


def check_ways(quantize: str | None, distill: str | None, prune: float | None, distillation: Distillation) -> None:
    """Raise ConfigError unless one way is asked for, with a value that can be."""
    if sum(way is not None for way in (quantize, distill, prune)) != 1:
        raise ConfigError("give one of --quantize, --distill and --prune; compress the result again for a second")
    if quantize is not None and quantize not in LIBRARY:
        raise ConfigError(f"--quantize: expected int8 or int4, got {quantize!r}")
    if quantize is not None:
        check_library(quantize)
    if prune is not None and not 0 < prune < 1:
        raise ConfigError(f"--prune: expected a share above 0 and below 1, got {prune}")
    for name in ("lr", "temperature"):
        if not getattr(distillation, name) > 0:
            raise ConfigError(f"--{name}: expected a number above 0, got {getattr(distillation, name)}")
    if distill is not None and wanted_layers(distill) is None:
        resolve_model(distill)


def check_run(config: Config, source: RunFolder, distill: str | None) -> str:
    """Return where the base of a run that can be compressed lies.

    Raises:
        ConfigError, RunError: it is of mode full, quantised already, or has no inner steps to teach by.
    """
    if config.mode != "adapters":
        raise RunError(f"{source.path}: a run in mode full has no base beside what it learned; compress mode=adapters")
    if distill and not config.algorithm.inner_steps(1):
        raise ConfigError(f"--distill: a student is taught to adapt, and {config.algorithm.name} does not in training")
    base = resolve_model(config.model.name)
    if read_sentences(base):
        raise RunError(f"{source.path}: its base is a sentence encoder, which is not compressed here")
    file = Path(base, "config.json")
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    count = wanted_layers(distill) if distill else None
    if count and "num_hidden_layers" in known:
        evenly_spaced(known["num_hidden_layers"], count)
    if "quantization_config" in known:
        raise RunError(f"{source.path}: its base is quantised; distil or prune first, and quantise last")
    return base


def measured(before: "MetaModel", after: "MetaModel", tasks: Sequence[Task], episodes: int, bar: Bar) -> dict[str, Any]:
    """Return size, speed and score of two sessions."""
    from rayml.compression import measure

    sampler = before.config.data.sampler(EVALUATION_SEED)
    curves = [
        measure.scores(model, tasks, sampler, episodes, bar(name, episodes * len(tasks)))
        for model, name in ((before, "scoring before"), (after, "scoring after"))
    ]
    timed = measure.speeds([before, after], sampler.episode(tasks, 0))
    sizes = [{"weights_bytes": measure.weights_bytes(model.base)} for model in (before, after)]
    return {
        "before": sizes[0] | {"bytes_in_dtype": measure.bytes_in_dtype(before)} | timed[0],
        "after": sizes[1] | timed[1],
        "score": measure.compared(*curves),
    }
