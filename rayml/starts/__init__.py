"""Starts that have names, so that a task can be learned without any training: `rayml adapt minilm`.

Some come with rayml, each in a folder here: `config.yaml`, `start.safetensors` (adapters in 16 bits, the readout, inner
rates; missing if nothing was learned), and a model card. Any other base has an untrained start of its own, which
answers by prototypes. A start becomes a run folder in rayml's cache when it is first used, so that everything that
takes a run takes a start as well.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayml.algorithms.registry import UNTRAINED
from rayml.errors import ConfigError, RunError

if TYPE_CHECKING:
    from rayml.config import Config

HERE = Path(__file__).parent
LEARNED = "start.safetensors"
BARE = "smollm2-135m-instruct", "tiny", "tiny-masked"
"""Names of models for which no start comes with rayml."""
NO_DATA = "none: this start comes without tasks"
"""`data.path` of a start that was not trained here."""
ONE_WORD = "{input}\nThe above text in one word:"
"""A prompt after which a causal model's last hidden state sums up the text (Jiang et al. 2023, arXiv 2307.16645)."""
FORMAT = "4"
"""Version of the run folders in the cache."""


def shipped() -> tuple[str, ...]:
    """Return the names of the starts that come with rayml."""
    return tuple(sorted(file.parent.name for file in HERE.glob("*/config.yaml")))


def start_named(name: object) -> str | None:
    """Return a start's name, or the absolute path of a bare base's folder; None for anything else, such as a run."""
    folder = Path(name).expanduser() if isinstance(name, str | Path) and "://" not in str(name) else None
    if folder is None or (folder / "config.yaml").exists():
        return None
    if name in (*shipped(), *BARE):
        return str(name)
    return str(folder.resolve()) if (folder / "config.json").exists() else None


def no_run_error(name: object) -> RunError:
    """Return the error for a name that is neither a run's nor a start's."""
    return RunError(
        f"{name}: no run here (there is no config.yaml in it), and no start of this name: {', '.join(shipped())}, or "
        "the folder of a model"
    )


def refuse_no_run(name: str) -> None:
    """Raise RunError if there is neither a run nor a start of this name, before loading libraries. A URI may be one."""
    if "://" not in name and not start_named(name) and not (Path(name).expanduser() / "config.yaml").exists():
        raise no_run_error(name)


def run_folder_of(name: str) -> Path:
    """Return a start's run folder in the cache. If missing, it is written elsewhere and renamed, so it is always whole.

    Args:
        name: as `start_named` returned it.

    Raises:
        ConfigError: its base is not installed, or cannot be used.
        RunError: it cannot be written.
    """
    from rayml.lm.catalog import cache_folder

    source = HERE / name if name in shipped() else None
    content = [file.read_bytes() for file in sorted(source.iterdir()) if file.suffix != ".md"] if source else []
    content += file_stamps(Path(name)) if Path(name).is_absolute() else []
    digest = hashlib.sha256(b"\0".join([FORMAT.encode(), name.encode(), *content])).hexdigest()[:12]
    folder = cache_folder() / "starts" / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', Path(name).name)}-{digest}"
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(dir=folder.parent))
        except OSError as error:
            raise RunError(f"{name}: cannot be written to {folder.parent} ({error}); set RAYML_CACHE") from error
        try:
            made = scratch / "run"
            made.mkdir()  # other users may read it, unlike `scratch`
            write_run(made, source, name)
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def file_stamps(folder: Path) -> list[bytes]:
    """Return names, sizes and times of a model's files, which change when another model takes its place."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".safetensors")]
    stats = [(file.name, file.stat()) for file in files]
    return [f"{name} {stat.st_size} {stat.st_mtime_ns}".encode() for name, stat in stats]


def write_run(folder: Path, source: Path | None, name: str) -> None:
    """Write the run folder of a start. `source` is its folder here; None for a bare base."""
    from safetensors.torch import load_file

    from rayml.config import dump_config, load_config
    from rayml.runs.checkpoint import folder_name, seal, write_state
    from rayml.runs.folder import RunFolder

    config = load_config(source / "config.yaml") if source else bare_config(name)
    untrained, state, is_encoder = untrained_state(config)
    step = 0
    if source and (source / LEARNED).exists():
        state |= {key: weight.float() for key, weight in load_file(source / LEARNED).items()}
        step = config.outer.steps
    run = RunFolder(folder)
    run.config.write_text(dump_config(config), encoding="utf-8")
    # A label task among the meta-train tasks means: targets are labels. An encoder knows no others. Without any task,
    # the examples of each new task tell whether its targets are labels or texts.
    tasks: dict[str, Any] = {"fingerprint": "", "train": {"": [""] if is_encoder else []}, "val": {}, "test": {}}
    run.tasks.write_text(json.dumps(tasks), encoding="utf-8")
    run.write_untrained(untrained)
    checkpoint = folder / run.checkpoints.name / folder_name(step)
    checkpoint.mkdir(parents=True)
    write_state(checkpoint, state)
    seal(checkpoint, step, part=0, parts=1)


def untrained_state(config: "Config") -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Return an untrained start, the state of a checkpoint of it, and whether its base is a sentence encoder.

    No weight of the base is read.
    """
    from rayml.algorithms.outer_loop import initial_log_inner_lrs
    from rayml.lm.catalog import resolve_model
    from rayml.lm.load import load_shape
    from rayml.lm.model import hooks
    from rayml.lm.sentence import SENTENCES_KEY

    base = load_shape(resolve_model(config.model.name))
    adapter = hooks(base, config.lora.shape(), 0)
    assert adapter is not None
    readout = config.algorithm.prototypes
    untrained = adapter.untrained_start(config.seed) | (readout.start() if readout else {})
    rates = initial_log_inner_lrs(untrained, config.inner.lr, config.inner.modules, per_weight=False)
    state = {f"start/{n}": w for n, w in untrained.items()} | {f"log_rate/{n}": rate for n, rate in rates.items()}
    return untrained, state, hasattr(base, SENTENCES_KEY)


def bare_config(name: str) -> "Config":
    """Return the config of a base's untrained start: it answers by prototypes, after a prompt for one word.

    Raises:
        ConfigError: the base cannot be used this way. That is tried here, once, before the start is kept.
    """
    from rayml.config import parse_config
    from rayml.lm.abilities import check_model, working_targets
    from rayml.lm.catalog import resolve_model
    from rayml.lm.load import context_tokens, load_shape, load_tokenizer
    from rayml.lm.lora import linear_kinds
    from rayml.lm.sentence import SENTENCES_KEY

    base = resolve_model(name)
    model = load_shape(base)
    kinds = linear_kinds(model)
    if not kinds:
        raise ConfigError(f"{name}: has no linear layers for adapters; train one with adapter=soft_prompt")
    is_encoder = hasattr(model, SENTENCES_KEY)
    values: dict[str, Any] = {
        "model": {"name": name},
        "algorithm": {
            "name": UNTRAINED,
            "readout": "prototypes" if is_encoder else "both",
            "label_names": 3 * is_encoder,
        },
        "data": {"path": NO_DATA} | ({} if is_encoder else {"prompt": ONE_WORD}),
        "lora": {"targets": kinds, "start": "random"},
        "run": {"dir": "none"},
    }
    config = parse_config(values, name)
    values["lora"]["targets"] = working_targets(base, config)
    values["data"]["max_tokens"] = min(config.data.max_tokens, context_tokens(model))
    config = parse_config(values, name)
    check_model(config, base, (), load_tokenizer(base))
    return config


def shipped_tensors(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a checkpoint that are shipped: adapters in 16 bits; readout and log rates as they are."""
    import torch

    for name, weight in state.items():
        if name.startswith(("start/", "log_rate/")):
            yield name, weight.to(torch.float16) if name.startswith("start/") and weight.dim() == 2 else weight
