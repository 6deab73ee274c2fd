"""A meta-trained model in memory, and the tasks that it learns: load, adapt, predict, save.

The command line, the server and `compare` use what stands here; nobody adapts or answers in another way.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch

from rayml.config import Config
from rayml.engine import local, zero
from rayml.errors import ConfigError, DataError, RunError, TrainingError
from rayml.evaluation.curves import Scorer
from rayml.evaluation.learn import inner_steps, lesson, new_task, take_in
from rayml.lm.depth import rate_factors
from rayml.lm.encode import Encoder
from rayml.lm.generate import Generation, end_tokens, write
from rayml.lm.load import load_tokenizer, resolve_model
from rayml.lm.lora import TaskLoRA, linear_kinds
from rayml.lm.model import TaskLM, hooks
from rayml.lm.parameters import trained_parameters
from rayml.lm.peft_files import AdapterCard, encoder_of, load_learned, save_adapter, save_model, write_card
from rayml.lm.queries import Query, Support, first_batch, log_probs, weighed
from rayml.lm.sampling import Sampling
from rayml.lm.soft_prompt import TaskPrompt
from rayml.lm.start import untrained_start
from rayml.meta.adapt import Params
from rayml.meta.learner import initial_log_rates
from rayml.runs.checkpoint import read_checkpoint, step_of
from rayml.runs.files import Place, local_copy, made_here, place
from rayml.runs.folder import RunFolder
from rayml.tasks.episodes import relabel
from rayml.tasks.read import rows_given
from rayml.tasks.row import Input, Row, is_dialogue, unanswered
from rayml.tasks.task import Example, Task

R = TypeVar("R")
AT_ONCE = 16
"""Tasks in one batched inner loop, and texts that are written side by side."""
QUERIES, QUERY_TOKENS = 32, 8192
"""Most queries in one forward, and most tokens of it."""


@dataclass(frozen=True)
class Prediction:
    """An answer in the user's own words."""

    text: str
    """The most probable label, or the text that was written."""
    probabilities: dict[str, float] = field(default_factory=dict)
    """Of every option, by the user's own label, summing to 1; empty for a text that was written."""

    @property
    def label(self) -> str | None:
        """The most probable label; None for a text that was written."""
        return self.text if self.probabilities else None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """One learned task on its base, ready to answer. `MetaModel.adapt` and `load_adapter` make them.

    It shares the base with the model that it was learned from; what it adds are its own few weights.
    """

    lm: TaskLM
    """The base in memory, with its hooks."""
    encoder: Encoder
    """How examples are shown to the model, by the task's own card."""
    weights: Params | None
    """LoRA's `A [r, in]` and `B [out, r]` of every adapted linear, a soft prompt `[P, d]`, or, in mode full, the task's
    own copy of what was trained `[...]`; float32. None for the bare base."""
    card: AdapterCard
    """What it is called, its labels, and how it is asked: `rayml.json` in its folder."""
    base: str
    """Where the base was loaded from."""
    examples: int = 0
    """That it was learned from just now; 0 where it was loaded."""
    losses: Sequence[float] = ()
    """Support loss before each inner step, and after the last; none where it was loaded."""
    seconds: float = 0.0
    """That learning took, with the others of its batch."""

    def __repr__(self) -> str:
        labels = ", ".join(self.labels)
        kind = f"labels {labels if len(labels) < 80 else f'{labels[:77]}...'}" if labels else "writes text"
        learned = f", loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f}" if len(self.losses) > 1 else ""
        learned += f" in {self.seconds:.2f} s" if learned else ""
        return f"<Adapter {self.card.name!r} on {self.card.model}: {kind}{learned}; .predict(input), .save(folder)>"

    @property
    def labels(self) -> tuple[str, ...]:
        """The task's labels, the user's own; none for free text."""
        return tuple(self.card.labels.values())

    @property
    def size(self) -> int:
        """Bytes of its weights in memory."""
        return sum(weight.nbytes for weight in (self.weights or {}).values())

    def predict(self, inputs: Input | Iterable[Input], options: Sequence[str] | None = None) -> Any:
        """Choose among the task's labels, or among `options`; write a text where there are neither.

        Args:
            inputs: a text, the fields of an input as a dict, or a dialogue's messages `[{"role", "content"}, ...]`; or
                a list of N such, which are answered side by side.
            options: choose among these alone. A task with labels knows no others; one of free text takes any.

        Returns:
            A `Prediction`; for a list, N of them in its order.

        Raises:
            ConfigError: an option that the task does not have, or a text is asked of a masked model.
            DataError: an input that the task's prompt does not fit.
        """
        many = not isinstance(inputs, str | Mapping) and not is_dialogue(inputs)
        asked = [unanswered(one) for one in (inputs if many else [inputs])]  # type: ignore[arg-type]
        labels = self.choices(options)
        found = self._choose(asked, labels) if labels else self._write(asked)
        return found if many else found[0]

    def save(self, folder: str | Place) -> Place:
        """Write a stock PEFT folder that PEFT, vLLM and LoRAX load, with `rayml.json` beside it; return its path.

        In mode full it is a whole Hugging Face model. `load_adapter` brings either back.

        Args:
            folder: a path, or a URI such as `s3://bucket/adapters/tickets`.

        Raises:
            RunError: the folder exists already.
        """
        to = new_folder(folder)
        with made_here(to) as here:
            self.write_to(here)
        return to

    def write_to(self, folder: Path) -> None:
        """Write what `save` writes into a folder of this machine."""
        write_weights(folder, self.lm, self.encoder, self.weights or {}, self.card.lora, self.base)
        write_card(folder, self.card)

    def choices(self, options: Sequence[str] | None = None) -> dict[str, str]:
        """Return what the model sees of each option, by the user's own label; nothing where text is to be written.

        Raises:
            ConfigError: an option that the task does not have.
        """
        own = {option: label for label, option in self.card.labels.items()}
        unknown = [option for option in options or () if own and option not in own]
        if unknown:
            raise ConfigError(f"options: {', '.join(unknown)} not among the task's labels: {', '.join(own)}")
        return {option: own.get(option, option) for option in options or own}

    def queries(self, example: Example, labels: Sequence[str]) -> list[Query]:
        """Return what is asked about one input, in every way that the task asks in.

        Args:
            labels: as the model sees them; the options.
        """
        if self.support:
            known = list(self.card.labels)
            (row,) = self.encoder.rows([relabel(example, known[0])], is_label=True)
            among = [known.index(label) for label in labels]
            return [Query(self.lm, self.encoder, [row], self.weights, support=self.support, among=among)]
        ways = self.encoder.questions([example], labels, self.shown)
        return [Query(self.lm, self.encoder, rows, self.weights, share) for share, (rows,) in ways]

    @cached_property
    def shown(self) -> list[Example]:
        """The task's own examples that stand in every prompt, or that prototypes are made of; most tasks keep none."""
        return self.card.examples()

    @cached_property
    def support(self) -> Support | None:
        if self.card.algorithm != "protonet":
            return None
        known = list(self.card.labels)
        rows = self.encoder.rows(self.shown, is_label=True)
        return Support(rows, [known.index(example.target) for example in self.shown])

    def _choose(self, asked: Sequence[Example], labels: dict[str, str]) -> list[Prediction]:
        ways = [self.queries(example, list(labels.values())) for example in asked]
        waiting = [query for queries in ways for query in queries]
        scores = []
        while waiting:
            count = first_batch(waiting[:QUERIES], QUERY_TOKENS)
            scores += log_probs(self.lm, self.encoder.pad, waiting[:count])
            waiting = waiting[count:]
        found = iter(scores)
        return [chosen(labels, queries, [next(found) for _ in queries]) for queries in ways]

    def _write(self, asked: Sequence[Example]) -> list[Prediction]:
        if self.encoder.is_masked:
            raise ConfigError("options: a masked model writes no text; give options to choose among")
        tokenizer, sampling = self.encoder.tokenizer, Sampling(self.card.max_tokens)
        ends = end_tokens(self.lm.module, tokenizer)
        texts = [
            Generation(tokenizer, self.encoder.asked(example, self.shown), self.weights or None, sampling, ends)
            for example in asked
        ]
        for first in range(0, len(texts), AT_ONCE):
            write(self.lm, texts[first : first + AT_ONCE])
        return [Prediction(text.piece().text.strip()) for text in texts]


def chosen(labels: Mapping[str, str], queries: Sequence[Query], found: Sequence[torch.Tensor]) -> Prediction:
    """Return the most probable of the labels, from the log-probabilities `[options]` of each way of asking."""
    scores = weighed([query.share for query in queries], found)
    probabilities = dict(zip(labels, scores.exp().tolist(), strict=True))
    return Prediction(max(probabilities, key=lambda label: probabilities[label]), probabilities)


@dataclass(frozen=True, eq=False, repr=False)
class MetaModel:
    """A base model in memory with what a run learned: a start, from which a task takes a few inner steps.

    `load` and `train` make them. Adapters that are learned from it share its base.
    """

    config: Config
    """As the run was trained."""
    lm: TaskLM
    """The base, with the hooks that adapters act by."""
    encoder: Encoder
    """How examples are shown to the model."""
    base: str
    """Where the base was loaded from."""
    start: Params
    """The shared start, `[...]` each, in float32."""
    rates: Params
    """The inner rate of each tensor that the inner loop changes, `[]`, or `[...]` as the tensor (Meta-SGD)."""
    step: int
    """Outer steps that were taken; 0 for an untrained start."""
    untrained: Params
    """Where training began."""
    run: RunFolder | None = None
    """Where it was trained; None for an untrained start."""
    checkpoint: str = "untrained"
    """Which of its checkpoints this is, in words."""

    def __repr__(self) -> str:
        where = f" from {self.run.path}" if self.run else ""
        name = f"{self.config.model.name}, {self.config.algorithm.name}"
        return f"<MetaModel {name}, {self.checkpoint}{where}; .adapt([(input, target), ...]) learns a task>"

    @property
    def device(self) -> torch.device:
        return next(iter(self.start.values())).device

    def scorer(self) -> Scorer:
        """Return what scores episodes as the run's own algorithm does."""
        inner = self.config.inner
        return Scorer(self.lm, self.encoder, self.config.algorithm.name, inner.steps, inner.unfreeze_every)

    def adapt(self, examples: Any, *, name: str = "task", steps: int | None = None) -> Adapter:
        """Learn one new task from a few examples, in about a second.

        Args:
            examples: pairs `(input, target)`; dicts, such as `{"input", "target", "options"}`; a pandas DataFrame or a
                `datasets.Dataset` with such columns; or the path, or URI, of a JSONL or Parquet file. An input is a
                text, or a dict of fields; a target is a text, a list of labels, or of spans `{"text", "type"}`.
                Labels are the user's own. A run on label tasks takes two different targets or more for labels.
            name: of the task.
            steps: inner steps; else the run's own `inner.steps`.

        Raises:
            DataError: examples that cannot be read or learned, or of several tasks.
            TrainingError: the inner steps diverged.
        """
        return self.adapt_many({name: examples}, steps=steps)[name]

    def adapt_many(
        self, tasks: Mapping[str, Any], *, steps: int | None = None, at_once: int = AT_ONCE
    ) -> dict[str, Adapter]:
        """Learn T tasks side by side, in one batched inner loop: each comes out as it would alone.

        Args:
            tasks: examples by the name of their task, in any form that `adapt` takes.
            steps: inner steps of each; else the run's own.
            at_once: most tasks in one loop, for memory. In mode full it is one at a time.

        Raises:
            DataError, TrainingError: as `adapt`.
        """
        taken = inner_steps(self, steps)
        if taken < 0:
            raise ConfigError(f"steps: expected 0 or more, got {steps}")
        new = [self.task(rows_given(examples), name) for name, examples in tasks.items()]
        prepared = [lesson(self, task) for task in new]
        found: dict[str, Adapter] = {}
        at_once = at_once if self.lm.adapter else 1
        for first in range(0, len(new), at_once):
            some, began = prepared[first : first + at_once], perf_counter()
            learned = returned(take_in(self, some, [taken] * len(some)))
            seconds = perf_counter() - began
            for task, one, (weights, losses) in zip(new[first:], some, learned, strict=False):
                refuse_diverged(task.name, weights)
                told = {"examples": len(task.examples), "losses": losses, "seconds": seconds}
                found[task.name] = self.adapter(weights, one.card, **told)
        return found

    def task(self, rows: Sequence[Row], name: str) -> Task:
        """Return the task of some rows, as the run takes tasks: for labels where it was trained on label tasks.

        Raises:
            DataError: rows of several tasks, or one text under two labels.
        """
        if len({row.task for row in rows}) > 1:
            raise DataError(f"{name}: holds {len({row.task for row in rows})} tasks; adapt to one at a time")
        return new_task(rows, name, self.takes_labels, self.kind)

    @cached_property
    def takes_labels(self) -> bool:
        """Whether targets are taken for labels, where rows do not tell: the run was trained on label tasks."""
        return self.run.learned_labels() if self.run else True

    @cached_property
    def kind(self) -> str:
        """The kind of all tasks that the run was trained on; "" where there are several."""
        return self.run.learned_kind() if self.run else ""

    def adapter(self, weights: Params | None, card: AdapterCard, **told: Any) -> Adapter:
        """Return an adapter on this base, from its weights and its card.

        Args:
            told: what else there is to be known of it: `examples`, `losses`, `seconds`, `encoder`.
        """
        on_device = {name: weight.to(self.lm.device) for name, weight in (weights or {}).items()} or None
        encoder = told.pop("encoder", None) or encoder_of(card, self.encoder.tokenizer)
        return Adapter(self.lm, encoder, on_device, card, self.base, **told)

    def save(self, folder: str | Place) -> Place:
        """Write the learned start for other libraries: a PEFT adapter, or, in mode full, the whole model.

        Starting from it takes the inner loop that the run was trained for.

        Raises:
            RunError: the folder exists already.
        """
        to, lora = new_folder(folder), lora_of(self.config)
        with made_here(to) as here:
            write_weights(here, self.lm, self.encoder, self.start, lora, self.base)
        return to


def load(run: str | Place | RunFolder, *, checkpoint: str | None = None, every_linear: bool = False) -> MetaModel:
    """Load a run's base and what it learned, on this machine's GPU, or else its CPU.

    Args:
        run: the folder that `train` made, its URI, or a `RunFolder`.
        checkpoint: "best" by meta-val, or "newest"; else the best where there were validations.
        every_linear: let adapters change linears that this run's do not (in mode adapters).

    Raises:
        RunError: no run there, or no such checkpoint in it.
        ConfigError: its base cannot be loaded here.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    config, at = folder.trained(checkpoint)
    lm, encoder, base = load_base(config, every_linear)
    if lm.adapter:
        untrained = {name: weight.to(lm.device) for name, weight in folder.read_untrained().items()}
    else:
        untrained = {n: p.detach().float() for n, p in trained_parameters(lm.module, config.full).items()}
    start, log_rates, step = learned(config, at, untrained, lm.device)
    rates = {name: rate.exp() for name, rate in log_rates.items()}
    return MetaModel(config, lm, encoder, base, start, rates, step, untrained, folder, folder.told(at))


def untrained_model(config: Config, tasks: Sequence[Task]) -> MetaModel:
    """Load a config's base, with the start that training on these tasks would begin from, and its rates."""
    lm, encoder, base = load_base(config)
    start = {name: weight.to(lm.device) for name, weight in untrained_start(config, lm, encoder, tasks).items()}
    factors = rate_factors(lm.module, start, config.inner.layer_decay)
    log_rates = initial_log_rates(start, config.inner.lr, config.inner.modules, per_weight=False, factors=factors)
    rates = {name: rate.exp() for name, rate in log_rates.items()}
    return MetaModel(config, lm, encoder, base, start, rates, 0, start)


def load_base(config: Config, every_linear: bool = False) -> tuple[TaskLM, Encoder, str]:
    """Return the base with its hooks, whole, what encodes for it, and where it was loaded from."""
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    base = resolve_model(config.model.name)
    module = local.load(base, config.model.dtype, config.model.attention, device)
    shape = config.lora.shape()
    if every_linear:
        shape |= {"targets": linear_kinds(module), "last_layers": None}
    lm = TaskLM(module, hooks(module, shape if config.mode == "adapters" else {}, config.soft_tokens))
    return lm, config.encoder(load_tokenizer(base)), base


def learned(config: Config, folder: Place, names: Iterable[str], device: torch.device) -> tuple[Params, Params, int]:
    """Return the start, the logarithms of its inner rates, and the outer step, of a checkpoint."""
    if config.is_sharded:
        with local_copy(folder) as here:
            step, whole = step_of(folder), zero.consolidate(here)
        start = {name: whole[name].to(device) for name in names}
        return start, initial_log_rates(start, config.inner.lr, config.inner.modules, per_weight=False), step
    saved = read_checkpoint(folder)
    parts = [
        {k.removeprefix(kind): v.to(device) for k, v in saved.tensors.items() if k.startswith(kind)}
        for kind in ("start/", "log_rate/")
    ]
    return parts[0], parts[1], saved.step


def start_of(run: RunFolder) -> tuple[Params, Params]:
    """Return what a run of adapters has learned: its start, and the logarithms of its inner rates; on the CPU."""
    config, folder = run.trained()
    return learned(config, folder, (), torch.device("cpu"))[:2]


def load_adapter(folder: str | Place, *, model: MetaModel | Adapter | None = None) -> Adapter:
    """Load a task that `Adapter.save`, or `rayml adapt`, wrote.

    Args:
        folder: its path, or URI.
        model: whose base it is to share, so that none is loaded; it has to be the one that the task was learned on. A
            task of mode full is a whole model, and shares nothing.

    Raises:
        RunError: it is not there, or not whole, or it does not fit the model's base.
    """
    to = place(folder)
    with local_copy(to) as here:
        weights, card, own_model = load_learned(here)
        if model is None or own_model:
            lm, base = base_of(card, own_model)
        else:
            refuse_misfit(to, weights, card, model)
            lm, base = model.lm, model.base
    tokenizer = model.encoder.tokenizer if model and not own_model else load_tokenizer(base)
    on_device = {name: weight.to(lm.device) for name, weight in weights.items()} or None
    return Adapter(lm, encoder_of(card, tokenizer), on_device, card, base)


def base_of(card: AdapterCard, own_model: str | None) -> tuple[TaskLM, str]:
    """Load the base of a task, or the model that it is itself; return it with where it was loaded from."""
    base = own_model or resolve_model(card.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = local.load(base, card.dtype, "sdpa", device)
    return TaskLM(module, hooks(module, card.lora, card.soft_tokens)), base


def refuse_misfit(folder: Place, weights: Params, card: AdapterCard, model: MetaModel | Adapter) -> None:
    """Raise RunError if a task was not learned on a model's base, or its hooks cannot carry it."""
    name, dtype = model_and_dtype(model)
    hooked = model.lm.adapter
    if (card.model, card.dtype) != (name, dtype):
        raise RunError(f"{folder}: was learned on {card.model} in {card.dtype}, not on {name} in {dtype}")
    if isinstance(hooked, TaskLoRA):
        adapted = {weight.rsplit(".lora_", 1)[0] for weight in weights}
        fits = adapted <= hooked.linears.keys() and card.lora["alpha"] / card.lora["rank"] == hooked.alpha / hooked.rank
    else:
        fits = isinstance(hooked, TaskPrompt) and card.soft_tokens == hooked.tokens
    if not fits:
        raise RunError(
            f"{folder}: adapts what this model's hooks do not, or by another alpha / rank; load it without `model`, or "
            "load the run with every_linear=True"
        )


def model_and_dtype(model: MetaModel | Adapter) -> tuple[str, str]:
    if isinstance(model, Adapter):
        return model.card.model, model.card.dtype
    return model.config.model.name, model.config.model.dtype


def refuse_diverged(name: str, weights: Params) -> None:
    """Raise TrainingError if a task's weights are not finite."""
    if not all(torch.isfinite(weight).all() for weight in weights.values()):
        raise TrainingError(f"{name}: the adaptation diverged: its numbers are not finite; take fewer steps")


def returned(loop: Generator[None, None, R]) -> R:
    """Run a loop to its end, and return what it returns."""
    while True:
        try:
            next(loop)
        except StopIteration as end:
            return end.value


def new_folder(to: str | Place) -> Place:
    """Return the place of a folder to make, or raise RunError if it is there."""
    folder = place(to)
    if folder.exists():
        raise RunError(f"{to}: exists already; give a new folder")
    return folder


def lora_of(config: Config) -> dict[str, Any]:
    """Return the shape of a config's LoRA adapters; nothing where it has none."""
    return config.lora.shape() if config.mode == "adapters" and config.adapter == "lora" else {}


def write_weights(folder: Path, lm: TaskLM, encoder: Encoder, weights: Params, lora: dict[str, Any], base: str) -> None:
    """Write weights that a model takes as stock libraries read them: an adapter, or the whole model."""
    if lm.adapter:
        save_adapter(folder, weights, lora, base, encoder.is_masked)
    else:
        save_model(folder, lm.module, weights, encoder.tokenizer)
