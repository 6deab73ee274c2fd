"""A learned task in memory: ask it, save it, load it again.

The command line, the server and `compare` all answer through this module.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from rayml.algorithms.base import Algorithm
from rayml.algorithms.inner_loop import Params
from rayml.algorithms.prototypes import MEANS, is_readout
from rayml.algorithms.registry import algorithm_of
from rayml.errors import ConfigError, RunError
from rayml.lm.abilities import refuse_misbehaving, refuse_peft_mismatch, why_unusable
from rayml.lm.catalog import public_name, resolve_model
from rayml.lm.check_tasks import indistinct_labels
from rayml.lm.encode import Encoder, label_examples
from rayml.lm.generate import prepare_generations, write
from rayml.lm.load import load_base, load_tokenizer
from rayml.lm.lora import TaskLoRA
from rayml.lm.model import TaskLM, hooks
from rayml.lm.option_scoring import prompts_of, weighted_prompts
from rayml.lm.peft_files import (
    EMBEDS,
    READOUT,
    AdapterCard,
    encoder_of,
    load_learned,
    save_adapter,
    save_model,
    write_card,
)
from rayml.lm.pooling import add_no_similarity, vector_width
from rayml.lm.precision import choose_precision, has_sdpa, inspect_device, widest_linear
from rayml.lm.queries import KeptSupport, Query, answer_queries, first_batch_size
from rayml.lm.soft_prompt import TaskPrompt
from rayml.lm.tokens import mark_embeddings
from rayml.runs.files import AnyPath, local_copy, local_output, parse_path
from rayml.tasks.kinds import parse_target
from rayml.tasks.read import to_plain
from rayml.tasks.row import Input, as_text, is_dialogue, query_example
from rayml.tasks.task import Example

if TYPE_CHECKING:
    from rayml.model import MetaModel

log = logging.getLogger(__name__)
MOST_TEXTS = 16
"""Most texts that are generated side by side."""
MOST_QUERIES, MOST_QUERY_TOKENS = 32, 8192
"""Most queries, and most tokens, in one forward."""


@dataclass(frozen=True)
class Prediction:
    """An answer in the user's own words."""

    text: str
    """The most probable label, or the generated text."""
    probabilities: dict[str, float] = field(default_factory=dict)
    """Probability of every option, by your own label, summing to 1; empty for a generated text."""
    items: list[Any] | None = None
    """The labels, or the spans `{"text", "type"}`, that a generated text lists; None if targets are no lists."""

    @property
    def label(self) -> str | None:
        """The most probable label; None for a generated text."""
        return self.text if self.probabilities else None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """One learned task on its base, ready to answer. `MetaModel.adapt` and `load_adapter` return it.

    It shares the base with the model that it was learned from, and adds only its own few weights.
    """

    lm: TaskLM
    """The base in memory, with its hooks."""
    encoder: Encoder
    """How examples are shown to the model, as the task's card says."""
    weights: Params | None
    """LoRA's `A [r, in]` and `B [out, r]` of every adapted linear, a soft prompt `[P, d]`, or, in mode full, the task's
    own copy of the trained parameters `[...]`; float32. A task that answers by prototypes also has the means of its
    classes, `[C, D]`. None for the bare base."""
    card: AdapterCard
    """Its name, its labels, and how it is asked: `rayml.json` in its folder."""
    base: str
    """Where the base was loaded from."""
    examples: int = 0
    """Number of examples that it was learned from; 0 if it was loaded."""
    losses: Sequence[float] = ()
    """Support loss before each inner step and after the last; empty if it was loaded."""
    seconds: float = 0.0
    """Time that learning took, together with the other tasks of its batch."""

    def __repr__(self) -> str:
        labels = ", ".join(self.labels)
        kind = f"labels {labels if len(labels) < 80 else f'{labels[:77]}...'}" if labels else "writes text"
        learned = ""
        if len(self.losses) > 1:
            learned = f", loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f} in {self.seconds:.2f} s"
        return f"<Adapter {self.card.name!r} on {self.card.model}: {kind}{learned}; .predict(input), .save(folder)>"

    @property
    def labels(self) -> tuple[str, ...]:
        """The task's labels, in your own words; empty for free text."""
        return tuple(self.card.labels.values())

    @property
    def size(self) -> int:
        """Bytes of its weights in memory."""
        return sum(weight.nbytes for weight in (self.weights or {}).values())

    @overload
    def predict(self, inputs: str | Mapping[str, str], options: Sequence[str] | None = None) -> Prediction: ...
    @overload
    def predict(self, inputs: list[str], options: Sequence[str] | None = None) -> list[Prediction]: ...
    @overload
    def predict(self, inputs: Input | Iterable[Input], options: Sequence[str] | None = None) -> Any: ...
    def predict(self, inputs: Input | Iterable[Input], options: Sequence[str] | None = None) -> Any:
        """Choose among the task's labels, or among `options`; generate a text if there are neither.

        Args:
            inputs: a text, the fields of an input as a dict, in any order, or a dialogue's messages `[{"role",
                "content"}, ...]`; or a list of N inputs, which are answered side by side, as are a DataFrame's rows.
            options: choose among these alone. For a task with labels they must be some of its labels; for a task of
                free text they can be anything. Numbers, true and false are taken as text, as in examples.

        Returns:
            A `Prediction`; for a list, N of them in its order.

        Raises:
            ConfigError: an option that the task does not have, or a masked model is asked for a text.
            DataError: no input, an input with other fields than the task's, or one that does not fit its prompt.
        """
        if hasattr(inputs, "iloc") and hasattr(inputs, "columns"):  # a DataFrame, which would yield its columns' names
            inputs = inputs.to_dict("records")  # type: ignore[union-attr]
        many = not isinstance(inputs, str | Mapping) and isinstance(inputs, Iterable) and not is_dialogue(inputs)
        queries = [self._to_example(value) for value in (inputs if many else [inputs])]  # type: ignore[arg-type]
        labels = self.choices(options)
        predictions = self._choose(queries, labels) if labels else self._generate(queries)
        return predictions if many else predictions[0]

    def save(self, folder: str | AnyPath) -> AnyPath:
        """Write a stock PEFT folder that PEFT, vLLM and LoRAX load, with `rayml.json` beside it; return its path.

        In mode full it is a whole Hugging Face model. `load_adapter` loads either again.

        Args:
            folder: a path, or a URI such as `s3://bucket/adapters/tickets`.

        Raises:
            RunError: the folder exists already.
        """
        path = new_folder(folder)
        with local_output(path) as local:
            self.write_to(local)
            refuse_peft_mismatch(local, self.lm, self.weights or {}, self.card.lora, self.base)
        return path

    def write_to(self, folder: Path) -> None:
        """Write the files of `save` into a local folder."""
        write_weights(folder, self.lm, self.encoder, self.weights or {}, self.card.lora, self.base)
        write_card(folder, self.card)

    def choices(self, options: Sequence[str] | None = None) -> dict[str, str]:
        """Return what the model sees of each option, by your own label; empty if it is to generate a text.

        Raises:
            ConfigError: an option that the task does not have, or options that the model cannot tell apart.
        """
        options = option_texts(options)
        if not self.card.labels:
            if alike := indistinct_labels(self.encoder, options):
                raise ConfigError(f"options: {alike}")
            return {option: option for option in options}
        shown = {label: shown_label for shown_label, label in self.card.labels.items()}
        unknown = [option for option in options if option not in shown]
        if unknown:
            raise ConfigError(f"options: {', '.join(unknown)} not among the task's labels: {', '.join(shown)}")
        return {label: shown[label] for label in options or shown}

    def query(self, example: Example, labels: Sequence[str], max_tokens: int | None = None) -> Query:
        """Return the query for one input, with every prompt of the task's ensemble.

        Args:
            labels: the options, as the model sees them.
            max_tokens: cut the input to fewer tokens than the task's card says.
        """
        encoder = self.encoder if max_tokens is None else replace(self.encoder, max_tokens=max_tokens)
        if self.encoder.sentences and not self.kept:
            # Without a task, the options' own texts are all that a text can be compared with.
            rows, indices = self.encoder.rows(label_examples(labels, example), is_label=True), range(len(labels))
            prompts = prompts_of(self.lm, encoder, [example], labels[0])
            return Query(prompts, self.weights, self.algorithm, KeptSupport(rows, indices), indices)
        if not self.kept:
            shown = self.shown if self.algorithm.shows_examples(bool(self.labels)) else ()
            prompts = weighted_prompts(self.lm, encoder, [example], labels, shown)
            return Query(prompts, self.weights, self.algorithm)
        all_labels = list(self.card.labels)
        classes = [all_labels.index(label) for label in labels]
        tokens = [self.card.label_tokens[index] for index in classes] if self.card.label_tokens else ()
        if self.algorithm.scores_options:
            prompts = weighted_prompts(self.lm, encoder, [example], labels)
        else:
            prompts = prompts_of(self.lm, encoder, [example], all_labels[0])
        return Query(prompts, self._forward_weights, self.algorithm, self.kept, classes, tokens)

    @cached_property
    def algorithm(self) -> Algorithm:
        """The algorithm that it answers by: that of its run. A sentence encoder without one answers by prototypes."""
        reads = {"readout": "prototypes"} if self.encoder.sentences and not self.card.algorithm else {}
        return algorithm_of(self.card.algorithm, self.card.settings | reads)

    @cached_property
    def shown(self) -> list[Example]:
        """The task's examples that answers need, in the prompt or as hidden states; most tasks keep none."""
        return self.card.examples()

    @cached_property
    def kept(self) -> KeptSupport | None:
        """These examples as rows with their classes, or class means, if answers need their hidden states."""
        if not self.algorithm.keeps_states or not self.labels:
            return None
        means = (self.weights or {}).get(MEANS)
        if means is not None:
            classes = [index for index, mean in enumerate(means) if mean.any()]  # zeros: a label without an example
            if self.lm.sentences:
                means = add_no_similarity(means, vector_width(self.lm.sentences, self.lm.module.config))
            return KeptSupport((), classes, means[classes])
        all_labels = list(self.card.labels)
        rows = self.encoder.rows(self.shown, is_label=True)
        return KeptSupport(rows, [all_labels.index(example.target) for example in self.shown])

    @cached_property
    def _forward_weights(self) -> Params:
        """The weights that a forward needs."""
        return {name: weight for name, weight in (self.weights or {}).items() if name != MEANS}

    def _to_example(self, value: Input) -> Example:
        """Return an input as an example without a target. A dialogue is plain text unless the task continues it."""
        example = query_example(value, self.card.fields)
        return replace(example, parts=()) if is_dialogue(value) and self.card.kind != "dialogue" else example

    def _choose(self, examples: Sequence[Example], labels: dict[str, str]) -> list[Prediction]:
        queries = [self.query(example, list(labels.values())) for example in examples]
        predictions = []
        while queries:
            count = first_batch_size(queries[:MOST_QUERIES], MOST_QUERY_TOKENS)
            predictions += [
                most_probable(labels, scores) for scores in answer_queries(self.lm, self.encoder.pad, queries[:count])
            ]
            queries = queries[count:]
        return predictions

    def _generate(self, examples: Sequence[Example]) -> list[Prediction]:
        if not self.encoder.writes_text:
            raise ConfigError(f"options: {self.card.model} writes no text; give options to choose among")
        if reason := why_unusable(self.base, self.card.lora, self.card.soft_tokens, writes=True):
            raise ConfigError(reason)
        prompts = [self.encoder.prompt_tokens(example, self.shown) for example in examples]
        texts = prepare_generations(
            self.lm, self.encoder.tokenizer, prompts, self.weights or None, self.card.max_tokens
        )
        for first in range(0, len(texts), MOST_TEXTS):
            write(self.lm, texts[first : first + MOST_TEXTS])
        answers = [text.piece().text.strip() for text in texts]
        return [Prediction(answer, items=parse_target(self.card.kind, answer)) for answer in answers]


def option_texts(options: Iterable[Any] | None) -> list[str]:
    """Return options as texts, as targets are read; raise ConfigError if they are none."""
    texts = options if isinstance(options, str) else as_text(to_plain([] if options is None else list(options)))
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"options: expected a list of texts, got {options!r}")
    return texts


def most_probable(labels: Iterable[str], scores: torch.Tensor) -> Prediction:
    """Return the most probable of the labels, from their log-probabilities `[options]`."""
    probabilities = dict(zip(labels, scores.exp().tolist(), strict=True))
    return Prediction(max(probabilities, key=lambda label: probabilities[label]), probabilities)


def load_adapter(folder: str | AnyPath, *, model: "MetaModel | Adapter | None" = None) -> Adapter:
    """Load a task that `Adapter.save` or `rayml adapt` wrote.

    Args:
        folder: its path, or URI.
        model: shares its base with the task, in the dtype that it has, so that no base is loaded. The task has to be
            learned on the same base. A task of mode full is a whole model, and shares nothing.

    Raises:
        RunError: it is missing or incomplete, or does not fit the model's base.
        ConfigError: it was learned by an algorithm that is unknown here.
    """
    path = parse_path(folder)
    with local_copy(path) as local:
        weights, card, own_model = load_learned(local)
        if model is None or own_model:
            lm, base = load_task_base(card, own_model)
        else:
            check_same_base(path, weights, card, model)
            lm, base = model.lm, model.base
    tokenizer = model.encoder.tokenizer if model and not own_model else load_tokenizer(base)
    mark_embeddings(tokenizer, lm.module.get_input_embeddings().num_embeddings)
    on_device = {name: weight.to(lm.device) for name, weight in weights.items()} or None
    adapter = Adapter(lm, encoder_of(card, tokenizer), on_device, card, base)
    algorithm = adapter.algorithm  # raises if it is unknown here
    if algorithm.keeps_states and card.labels and not (card.shown or MEANS in weights):
        raise RunError(f"{folder}: has no {READOUT}, which {algorithm.name} needs for its answers")
    return adapter


def load_task_base(card: AdapterCard, own_model: str | None) -> tuple[TaskLM, str]:
    """Load the base of a task, or in mode full the task's own model; return it with where it was loaded from."""
    base = own_model or resolve_model(card.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(
        ("auto", "auto"), [inspect_device(device, widest_linear(base))], card.dtype, sdpa=has_sdpa(base)
    )
    if precision.dtype != card.dtype:
        log.warning("%s: %s", card.name, precision)
    module = load_base(base, precision.dtype, precision.attention).to(device)
    lm = TaskLM(module, hooks(module, card.lora, card.soft_tokens))
    refuse_misbehaving(lm)
    return lm, base


def check_same_base(folder: AnyPath, weights: Params, card: AdapterCard, model: "MetaModel | Adapter") -> None:
    """Raise RunError if a task was learned on another base than the model's, or its hooks cannot apply the task."""
    name = model.card.model if isinstance(model, Adapter) else model.config.model.name
    if card.model != name:
        raise RunError(f"{folder}: was learned on {card.model}, not on {name}")
    hooked = model.lm.adapter
    if isinstance(hooked, TaskLoRA):
        linears = {weight.rsplit(".lora_", 1)[0] for weight in weights if not is_readout(weight)}
        scale = card.lora["alpha"] / card.lora["rank"]
        fits = linears <= hooked.linears.keys() and scale == hooked.alpha / hooked.rank
    else:
        fits = isinstance(hooked, TaskPrompt) and card.soft_tokens == hooked.tokens
    if not fits:
        raise RunError(
            f"{folder}: adapts what this model's hooks do not, or by another alpha / rank; load it without `model`, or "
            "load the run with every_linear=True"
        )


def new_folder(folder: str | AnyPath) -> AnyPath:
    """Return the path of a folder to make, or raise RunError if it exists."""
    path = parse_path(folder)
    if path.exists():
        raise RunError(f"{folder}: exists already; give a new folder")
    return path


def write_weights(folder: Path, lm: TaskLM, encoder: Encoder, weights: Params, lora: dict[str, Any], base: str) -> None:
    """Write weights in the format of stock libraries: a PEFT adapter, or the whole model."""
    if lm.adapter:
        # PEFT has no task type for masked models; without one it wraps any model.
        kind = EMBEDS if encoder.sentences else None if encoder.is_masked else "CAUSAL_LM"
        save_adapter(folder, weights, lora, public_name(base), kind)
    else:
        save_model(folder, lm.module, weights, encoder.tokenizer)
