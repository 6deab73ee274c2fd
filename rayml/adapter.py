"""A learned task in memory: ask it, save it, bring it back.

The command line, the server and `compare` answer by what stands here.
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
from rayml.lm.abilities import refuse_strange, refuse_unlike_peft, unable
from rayml.lm.catalog import public_name, resolve_model
from rayml.lm.encode import Encoder
from rayml.lm.generate import texts_behind, write
from rayml.lm.load import load_base, load_tokenizer
from rayml.lm.lora import TaskLoRA
from rayml.lm.model import TaskLM, hooks
from rayml.lm.option_scoring import prompts_of, weighted_prompts
from rayml.lm.peft_files import EMBEDS, AdapterCard, encoder_of, load_learned, save_adapter, save_model, write_card
from rayml.lm.precision import decide, has_sdpa, look_at, widest_linear
from rayml.lm.queries import KeptSupport, Query, first_batch, log_probs
from rayml.lm.soft_prompt import TaskPrompt
from rayml.lm.tokens import mark_embeddings
from rayml.runs.files import AnyPath, as_path, local_copy, made_here
from rayml.tasks.row import Input, is_dialogue, unanswered
from rayml.tasks.task import Example

if TYPE_CHECKING:
    from rayml.model import MetaModel

log = logging.getLogger(__name__)
TEXTS = 16
"""Most texts that are written side by side."""
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
    own copy of what was trained `[...]`; float32. With them the means of its classes `[C, D]`, where prototypes are
    answered by. None for the bare base."""
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

    @overload
    def predict(self, inputs: str | Mapping[str, str], options: Sequence[str] | None = None) -> Prediction: ...
    @overload
    def predict(self, inputs: list[str], options: Sequence[str] | None = None) -> list[Prediction]: ...
    @overload
    def predict(self, inputs: Input | Iterable[Input], options: Sequence[str] | None = None) -> Any: ...
    def predict(self, inputs: Input | Iterable[Input], options: Sequence[str] | None = None) -> Any:
        """Choose among the task's labels, or among `options`; write a text where there are neither.

        Args:
            inputs: a text, the fields of an input as a dict, in any order, or a dialogue's messages `[{"role",
                "content"}, ...]`; or a list of N such, which are answered side by side.
            options: choose among these alone. A task with labels knows no others; one of free text takes any.

        Returns:
            A `Prediction`; for a list, N of them in its order.

        Raises:
            ConfigError: an option that the task does not have, or a text is asked of a masked model.
            DataError: no input, one of other fields than the task's, or that its prompt does not fit.
        """
        many = not isinstance(inputs, str | Mapping) and isinstance(inputs, Iterable) and not is_dialogue(inputs)
        asked = [self._asked(one) for one in (inputs if many else [inputs])]  # type: ignore[arg-type]
        labels = self.choices(options)
        found = self._choose(asked, labels) if labels else self._write(asked)
        return found if many else found[0]

    def save(self, folder: str | AnyPath) -> AnyPath:
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
            refuse_unlike_peft(here, self.lm, self.weights or {}, self.card.lora, self.base)
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
        alike = "" if own else self.encoder.alike(options or ())
        if alike:
            raise ConfigError(f"options: {alike}")
        return {option: own.get(option, option) for option in options or own}

    def query(self, example: Example, labels: Sequence[str]) -> Query:
        """Return what is asked about one input, in every way that the task asks in.

        Args:
            labels: as the model sees them; the options.
        """
        if not self.kept:
            shown = self.shown if self.algorithm.keeps == "prompt" else ()
            return Query(
                weighted_prompts(self.lm, self.encoder, [example], labels, shown), self.weights, self.algorithm
            )
        known = list(self.card.labels)
        classes = [known.index(label) for label in labels]
        tokens = [self.card.label_tokens[number] for number in classes] if self.card.label_tokens else ()
        if self.algorithm.scores_options:
            prompts = weighted_prompts(self.lm, self.encoder, [example], labels)
        else:
            prompts = prompts_of(self.lm, self.encoder, [example], known[0])
        return Query(prompts, self._tensors, self.algorithm, self.kept, classes, tokens)

    @cached_property
    def algorithm(self) -> Algorithm:
        """What it answers by: that of the run that it was learned in."""
        return algorithm_of(self.card.algorithm, self.card.settings)

    @cached_property
    def shown(self) -> list[Example]:
        """The task's own examples that answers need, in the prompt or as hidden states; most tasks keep none."""
        return self.card.examples()

    @cached_property
    def kept(self) -> KeptSupport | None:
        """Those examples as rows with their classes, where hidden states are answered by."""
        if not self.algorithm.keeps_states or not self.labels:
            return None
        means = (self.weights or {}).get(MEANS)
        if means is not None:
            classes = [number for number, mean in enumerate(means) if mean.any()]  # a label may be without an example
            return KeptSupport((), classes, means[classes])
        known = list(self.card.labels)
        rows = self.encoder.rows(self.shown, is_label=True)
        return KeptSupport(rows, [known.index(example.target) for example in self.shown])

    @cached_property
    def _tensors(self) -> Params:
        """The weights that a forward needs."""
        return {name: weight for name, weight in (self.weights or {}).items() if name != MEANS}

    def _asked(self, given: Input) -> Example:
        """Return what is asked about an input: a dialogue is its text, unless the task is to go on with it."""
        example = unanswered(given, self.card.fields)
        return replace(example, parts=()) if is_dialogue(given) and self.card.kind != "dialogue" else example

    def _choose(self, asked: Sequence[Example], labels: dict[str, str]) -> list[Prediction]:
        waiting = [self.query(example, list(labels.values())) for example in asked]
        found = []
        while waiting:
            count = first_batch(waiting[:QUERIES], QUERY_TOKENS)
            found += [chosen(labels, scores) for scores in log_probs(self.lm, self.encoder.pad, waiting[:count])]
            waiting = waiting[count:]
        return found

    def _write(self, asked: Sequence[Example]) -> list[Prediction]:
        if not self.encoder.writes_text:
            raise ConfigError(f"options: {self.card.model} writes no text; give options to choose among")
        if reason := unable(self.base, self.card.lora, self.card.soft_tokens, writes=True):
            raise ConfigError(reason)
        prompts = [self.encoder.asked(example, self.shown) for example in asked]
        texts = texts_behind(self.lm, self.encoder.tokenizer, prompts, self.weights or None, self.card.max_tokens)
        for first in range(0, len(texts), TEXTS):
            write(self.lm, texts[first : first + TEXTS])
        return [Prediction(text.piece().text.strip()) for text in texts]


def chosen(labels: Iterable[str], scores: torch.Tensor) -> Prediction:
    """Return the most probable of the labels, from their log-probabilities `[options]`."""
    probabilities = dict(zip(labels, scores.exp().tolist(), strict=True))
    return Prediction(max(probabilities, key=lambda label: probabilities[label]), probabilities)


def load_adapter(folder: str | AnyPath, *, model: "MetaModel | Adapter | None" = None) -> Adapter:
    """Load a task that `Adapter.save`, or `rayml adapt`, wrote.

    Args:
        folder: its path, or URI.
        model: whose base it is to share, in the dtype that it has, so that none is loaded; it has to be the one that
            the task was learned on. A task of mode full is a whole model, and shares nothing.

    Raises:
        RunError: it is not there, or not whole, or it does not fit the model's base.
        ConfigError: it was learned by an algorithm that is unknown here.
    """
    to = as_path(folder)
    with local_copy(to) as here:
        weights, card, own_model = load_learned(here)
        if model is None or own_model:
            lm, base = base_of(card, own_model)
        else:
            refuse_misfit(to, weights, card, model)
            lm, base = model.lm, model.base
    tokenizer = model.encoder.tokenizer if model and not own_model else load_tokenizer(base)
    mark_embeddings(tokenizer, lm.module.get_input_embeddings().num_embeddings)
    on_device = {name: weight.to(lm.device) for name, weight in weights.items()} or None
    adapter = Adapter(lm, encoder_of(card, tokenizer), on_device, card, base)
    _ = adapter.algorithm  # raises where it is unknown here
    return adapter


def base_of(card: AdapterCard, own_model: str | None) -> tuple[TaskLM, str]:
    """Load the base of a task, or the model that it is itself; return it with where it was loaded from."""
    base = own_model or resolve_model(card.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = decide(("auto", "auto"), [look_at(device, widest_linear(base))], card.dtype, sdpa=has_sdpa(base))
    if precision.dtype != card.dtype:
        log.warning("%s: %s", card.name, precision)
    module = load_base(base, precision.dtype, precision.attention).to(device)
    lm = TaskLM(module, hooks(module, card.lora, card.soft_tokens))
    refuse_strange(lm)
    return lm, base


def refuse_misfit(folder: AnyPath, weights: Params, card: AdapterCard, model: "MetaModel | Adapter") -> None:
    """Raise RunError if a task was not learned on a model's base, or its hooks cannot carry it."""
    name = model.card.model if isinstance(model, Adapter) else model.config.model.name
    if card.model != name:
        raise RunError(f"{folder}: was learned on {card.model}, not on {name}")
    hooked = model.lm.adapter
    if isinstance(hooked, TaskLoRA):
        adapted = {weight.rsplit(".lora_", 1)[0] for weight in weights if not is_readout(weight)}
        fits = adapted <= hooked.linears.keys() and card.lora["alpha"] / card.lora["rank"] == hooked.alpha / hooked.rank
    else:
        fits = isinstance(hooked, TaskPrompt) and card.soft_tokens == hooked.tokens
    if not fits:
        raise RunError(
            f"{folder}: adapts what this model's hooks do not, or by another alpha / rank; load it without `model`, or "
            "load the run with every_linear=True"
        )


def new_folder(to: str | AnyPath) -> AnyPath:
    """Return the place of a folder to make, or raise RunError if it is there."""
    folder = as_path(to)
    if folder.exists():
        raise RunError(f"{to}: exists already; give a new folder")
    return folder


def write_weights(folder: Path, lm: TaskLM, encoder: Encoder, weights: Params, lora: dict[str, Any], base: str) -> None:
    """Write weights that a model takes as stock libraries read them: an adapter, or the whole model."""
    if lm.adapter:
        # PEFT has no kind for masked models, and wraps any model then.
        kind = EMBEDS if encoder.sentences else None if encoder.is_masked else "CAUSAL_LM"
        save_adapter(folder, weights, lora, public_name(base), kind)
    else:
        save_model(folder, lm.module, weights, encoder.tokenizer)
