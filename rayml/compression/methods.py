"""The three ways to a smaller base: each writes it to `folder / "base"`, and returns what its run has learned."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rayml.algorithms.inner_loop import Params
from rayml.algorithms.outer_loop import Learner, initial_log_inner_lrs, outer_schedule
from rayml.compression import distill, prune, quantize
from rayml.compression.folder import Compressed, base_folder
from rayml.compression.student import evenly_spaced, save_base, wanted_layers, write_student
from rayml.config import Config
from rayml.errors import ConfigError
from rayml.lm.batch import collate
from rayml.lm.encode import decode_rows
from rayml.lm.initialization import untrained_start
from rayml.lm.load import DTYPES, load_base, load_tokenizer, resolve_model
from rayml.lm.model import TaskLM, hooks
from rayml.model import MetaModel
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.task import Task

if TYPE_CHECKING:
    from rayml.compression.command import Distillation

WORK = "student"
"""What a student is loaded from: its files may stay mapped while it is trained, so they are not written over."""


def quantized(model: MetaModel, base: str, kind: str, folder: Path) -> Compressed:
    """Quantise the base; what was learned stays as it is."""
    quantize.quantize_base(base, model.config.model.dtype, kind, base_folder(folder))
    return Compressed(model.config, model.start, model.inner_lrs, model.untrained)


def pruned(model: MetaModel, base: str, fraction: float, folder: Path, progress: Callable[[], None]) -> Compressed:
    """Prune the base's MLPs by what meta-train texts make of them; adapters are cut with them."""
    from rayml.compression.command import SUPPORT_EPISODES, SUPPORT_SEED

    config, encoder, pad = model.config, model.encoder, model.encoder.pad
    sampler, tasks = config.data.sampler(SUPPORT_SEED), prepare_splits(config.data).train
    episodes = [encoder.episode(sampler.episode(tasks, index)) for index in range(SUPPORT_EPISODES)]
    batches = [collate([decode_rows(e["support"])], pad).to(model.device) for e in episodes]
    kept = prune.choose(model.lm, batches, model.start, fraction, progress)
    prune.prune_base(base, config.model.dtype, kept, base_folder(folder))
    learned = (prune.cut_adapters(part, kept) for part in (model.start, model.inner_lrs, model.untrained))
    return Compressed(config, *learned)


def distilled(
    model: MetaModel, base: str, name: str, how: "Distillation", folder: Path, progress: Callable[[], None]
) -> Compressed:
    """Teach a student on the run's meta-train tasks; `metrics.jsonl` gets its losses.

    Raises:
        ConfigError: a student of as many layers, or that reads other tokens.
    """
    from rayml.compression.command import DISTILLATION_SEED

    tasks = prepare_splits(model.config.data).train
    config, lm, start, log_inner_lrs = student_of(model, base, name, folder, tasks)
    learner = Learner(
        {n: w.to(model.device) for n, w in start.items()},
        {n: w.to(model.device) for n, w in log_inner_lrs.items()},
        learn_rates=config.learns_inner_lrs,
        lr=config.outer.lr,
        lr_of_inner_lr=config.outer.lr_of_inner_lr,
        weight_decay=0.0,
        clip_norm=config.outer.clip_norm,
        schedule=outer_schedule("cosine", min(10, how.steps // 10), how.steps),
    )
    untrained = {n: w.clone() for n, w in start.items()}
    student = distill.Student(lm, learner, config.inner.steps, how.lr)
    teacher = distill.Teacher(model.lm, model.start, model.inner_lrs, config.inner.steps)
    sampler, encoder = config.data.sampler(DISTILLATION_SEED), model.encoder
    mixture, records = distill.Mixture(how.temperature, how.hard), []
    for step in range(how.steps):
        drawn = range(step * config.tasks_per_step, (step + 1) * config.tasks_per_step)
        episodes = [encoder.episode(sampler.episode(tasks, index)) for index in drawn]
        records.append(student.step(teacher, episodes, encoder.pad, mixture))
        progress()
    shutil.rmtree(folder / WORK, ignore_errors=True)
    save_base(lm.module, DTYPES[config.model.dtype], base_folder(folder))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Compressed(config, learner.start, learner.inner_lrs, untrained)


def student_of(
    model: MetaModel, base: str, name: str, folder: Path, tasks: Sequence[Task]
) -> tuple[Config, TaskLM, Params, Params]:
    """Return a student's config, its model with hooks, and the start and logarithms of the rates that it begins with.

    Of the teacher's own layers it begins with the teacher's adapters; another model as meta-training would.
    """
    config, count = model.config, wanted_layers(name)
    if count is not None:
        total = model.lm.module.config.num_hidden_layers
        kept = evenly_spaced(total, count)
        write_student(base, kept, folder / WORK)
        lora = config.lora.model_copy(update={"last_layers": kept.lora_layers(config, total)})
        config = config.model_copy(update={"lora": lora})
        lm = student_lm(config, str(folder / WORK), model)
        log_inner_lrs = {n: rate.log() for n, rate in kept.tensors(model.inner_lrs).items()}
        return config, lm, kept.tensors(model.start), log_inner_lrs
    path = resolve_model(name)
    if load_tokenizer(path).get_vocab() != model.encoder.tokenizer.get_vocab():
        raise ConfigError(f"--distill {name}: reads other tokens than its teacher; expected a model of one family")
    lm = student_lm(config, path, model)
    start = untrained_start(config, lm, model.encoder, tasks)
    by_weight = config.algorithm.learned_rates == "weight"
    return config, lm, start, initial_log_inner_lrs(start, config.inner.lr, config.inner.modules, per_weight=by_weight)


def student_lm(config: Config, path: str, model: MetaModel) -> TaskLM:
    """Return a student where its teacher lies, in fp32 to be trained."""
    module = load_base(path, "float32", config.model.attention).to(model.device)
    return TaskLM(module, hooks(module, config.lora.shape(), config.soft_tokens))
