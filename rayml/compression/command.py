"""`rayml compress`: write a new run whose base is smaller."""

import json
import re
import shlex
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from rayml.algorithms.inner_loop import Params
from rayml.config import Config, dump_config
from rayml.errors import ConfigError, RunError
from rayml.experiments.evaluate_command import held_out_tasks
from rayml.lm.catalog import resolve_model
from rayml.lm.sentence import read_sentences
from rayml.progress import progress, show_activity
from rayml.runs.checkpoint import folder_name, seal, write_state
from rayml.runs.files import local_output, parse_path, write_atomically
from rayml.runs.folder import RunFolder

LIBRARY = {"int8": "torchao>=0.18", "int4": "bitsandbytes>=0.50"}
LAYERS = re.compile(r"layers=(\d+)")


@dataclass(frozen=True, slots=True)
class Distillation:
    """The settings of a distillation."""

    steps: int
    lr: float
    """Of the student's layers. Its start and inner rates are learned as in the run's own training."""
    temperature: float
    """Divides the logits of teacher and student before they are compared."""
    hard: float
    """Weight of the loss by the labels; that of the divergence from the teacher is the rest."""


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
        ConfigError, RunError, DataError: none or several ways are given, a value is invalid, the run is not one of
            adapters, the folder exists, a library is missing, or there is no held-out task. All of this is checked
            before a model is loaded.
    """
    check_ways(quantize, distill, prune, distillation)
    folder = parse_path(to)
    if folder.exists():
        raise RunError(f"{to}: exists already; give --out a new folder")
    if not isinstance(folder, Path):
        raise RunError(f"--out {to}: the base is loaded from there, so give a folder of this machine")
    source = RunFolder(run_path)
    config, _ = source.trained(checkpoint)
    base = check_run(config, source, distill)
    tasks = held_out_tasks(config, config.data, None, "test")
    with show_activity(err, "loading libraries and model"):
        from rayml.compression import distill as distilling
        from rayml.compression import measure, shrink
        from rayml.model import load

        model = load(source, checkpoint=checkpoint)
    with progress(err) as bar:
        with local_output(folder) as part:
            if quantize:
                compressed = shrink.quantize(model, base, quantize, part)
            elif prune:
                compressed = shrink.prune(model, base, prune, part, bar("reading", shrink.SUPPORT_EPISODES))
            else:
                progress_bar = bar("distilling", distillation.steps)
                compressed = distilling.distill(model, base, str(distill), distillation, part, progress_bar)
            model.encoder.tokenizer.save_pretrained(part / "base")
        compressed_model = load(write_run(source, folder, compressed, model.step))
        summary = measure.compare(model, compressed_model, tasks, episodes, bar)
    how = f"{quantize}" if quantize else f"pruned by {prune}" if prune else f"distilled into {distill}"
    record = {"run": str(source.path), "how": how, "steps": distillation.steps if distill else None, **summary}
    write_atomically(folder / "compression.json", json.dumps(record, indent=2) + "\n")
    out.print(measure.table(summary, f"{config.model.name}, {how}"))
    out.print(f"{folder}\nnext: rayml serve {shlex.quote(str(to))}", highlight=False, soft_wrap=True)
    return record


def check_ways(quantize: str | None, distill: str | None, prune: float | None, distillation: Distillation) -> None:
    """Raise ConfigError unless exactly one way is given, with a valid value."""
    if sum(way is not None for way in (quantize, distill, prune)) != 1:
        raise ConfigError("give one of --quantize, --distill and --prune; compress the result again for a second")
    if quantize is not None:
        if quantize not in LIBRARY:
            raise ConfigError(f"--quantize: expected int8 or int4, got {quantize!r}")
        library = LIBRARY[quantize]
        name = library.partition(">")[0]
        if find_spec(name) is None:
            raise ConfigError(f"--quantize {quantize}: {name} is not installed; pip install '{library}'")
    if prune is not None and not 0 < prune < 1:
        raise ConfigError(f"--prune: expected a share above 0 and below 1, got {prune}")
    for name in ("lr", "temperature"):
        if not getattr(distillation, name) > 0:
            raise ConfigError(f"--{name}: expected a number above 0, got {getattr(distillation, name)}")
    if distill is not None and student_layers(distill) is None:
        resolve_model(distill)


def student_layers(student: str) -> int | None:
    """Return N of `layers=N`; None if the student is named as a model.

    Raises:
        ConfigError: N is not a number above 0.
    """
    if not student.startswith("layers="):
        return None
    match = LAYERS.fullmatch(student)
    if not match or not int(match[1]):
        raise ConfigError(f"--distill {student}: expected layers=N with a number above 0, or a model's name or folder")
    return int(match[1])


def evenly_spaced(total: int, count: int) -> list[int]:
    """Return `count` of `total` layers: the last and, of several, the first among them (as in DistilBERT, Sanh et al.
    2019, arXiv 1910.01108).

    Raises:
        ConfigError: there are too few layers.
    """
    if not 0 < count < total:
        raise ConfigError(f"--distill layers={count}: the teacher has {total} layers; expected fewer, and at least 1")
    last = total - 1
    return [round(last * index / (count - 1)) for index in range(count)] if count > 1 else [last]


def check_run(config: Config, source: RunFolder, distill: str | None) -> str:
    """Return the folder of the base of a run that can be compressed.

    Raises:
        ConfigError, RunError: the run is of mode full, or quantised already, or has no inner steps to distil.
    """
    if config.mode != "adapters":
        raise RunError(f"{source.path}: a run in mode full has no base beside what it learned; compress mode=adapters")
    if distill and not config.algorithm.inner_steps(1):
        raise ConfigError(f"--distill: a student is taught to adapt, and {config.algorithm.name} does not in training")
    base = resolve_model(config.model.name)
    if read_sentences(base):
        raise RunError(f"{source.path}: its base is a sentence encoder, which is not compressed here")
    file = Path(base, "config.json")
    model_config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    count = student_layers(distill) if distill else None
    if count and "num_hidden_layers" in model_config:
        evenly_spaced(model_config["num_hidden_layers"], count)
    if "quantization_config" in model_config:
        raise RunError(f"{source.path}: its base is quantised; distil or prune first, and quantise last")
    return base


@dataclass(frozen=True, slots=True)
class Compressed:
    """What the run of a compressed base has learned."""

    config: Config
    start: Params
    inner_lrs: Params
    untrained: Params


def base_folder(folder: Path) -> Path:
    """Return the folder of a compressed run's base."""
    return folder / "base"


def write_run(source: RunFolder, folder: Path, compressed: Compressed, step: int) -> RunFolder:
    """Write config, tasks, untrained start and one checkpoint beside the base in `folder / "base"`.

    Patience is set to 0: there is one checkpoint only, so readers must not look for the best.
    """
    config = compressed.config
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"name": str(base_folder(folder))}),
            "run": config.run.model_copy(update={"dir": str(folder)}),
            "validation": config.validation.model_copy(update={"patience": 0}),
        }
    )
    run = RunFolder(folder)
    checkpoint = run.checkpoints / folder_name(step)
    assert isinstance(checkpoint, Path)
    checkpoint.mkdir(parents=True)
    start = {f"start/{name}": weight for name, weight in compressed.start.items()}
    write_state(checkpoint, start | {f"log_rate/{name}": rate.log() for name, rate in compressed.inner_lrs.items()})
    seal(checkpoint, step, part=0, parts=1)
    run.write_untrained(compressed.untrained)
    write_atomically(run.tasks, source.tasks.read_text(encoding="utf-8"))
    write_atomically(run.config, dump_config(config))
    return run
