"""Turn an episode's text into rows of tokens, as plain lists that Ray Data can carry."""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise, takewhile
from typing import Any

from rayml.lm.chat import ANSWERS, chat_prompt, chat_row
from rayml.lm.label_trie import is_prefix_free
from rayml.lm.rows import (
    TokenRow,
    cut_left,
    encode,
    encode_rows,
    encode_sequence,
    masked_row,
    predicts_masks,
    soft_tokens,
)
from rayml.lm.sentence import Sentences, sentence_row, sentences_of
from rayml.lm.tokens import BLANK, mark_specials, marked_example, remove_marks
from rayml.tasks.episodes import Episode, LabelScheme, relabel
from rayml.tasks.kinds import KINDS
from rayml.tasks.task import Example, Parts
from rayml.tasks.templates import render

CHANNEL = "Label: {}\nText:"
"""The text before the input when the input is scored given a label (`data.scoring: channel`)."""
NO_TEXT = Example("", "")
PAIR = 2
"""How many parts an input has whose parts a sentence encoder compares."""
SHOT_END = "\n\n"
"""Stands after each example in a prompt."""
SHOWN_TOKENS = 2048
"""The most tokens of examples in a prompt of `texts_in_context`; half of the context, where that is less."""
WORD = re.compile(r"[^\W\d_]{2}")
"""Two letters of any script in a row: without them a label is a code."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """How examples are shown to the model.

    A label follows one space. It needs no end-of-sequence token, since options are scored against each other; only
    where one label is the prefix of another ("card", "card lost") all labels get one, as free text always does. A
    dialogue is written by the model's own chat template.
    """

    tokenizer: Any
    prompt: str
    """Jinja template of the text before the target."""
    max_tokens: int
    label_loss: str = "options"
    in_context: bool = False
    """Queries carry their episode's support in the prompt (MetaICL, Min et al. 2022, arXiv 2110.15943)."""
    token_dropout: float = 0.0
    kind: str = ""
    ensemble: tuple[str, ...] = ()
    """Further prompts for scoring options; the log-probabilities are averaged over all prompts (PET, Schick and
    Schütze 2021, arXiv 2001.07676)."""
    scoring: str = "learned"
    templates: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(kind or task pattern, prompts) pairs that `of` chooses from."""
    labels: LabelScheme = "words"
    soft_tokens: int = 0
    """How many soft tokens every row begins with (`rayml.lm.soft_prompt`); `max_tokens` does not count them."""
    ends_labels: bool = False
    """Labels end with the end-of-sequence token, too (`among`)."""
    label_names: bool = False
    """Whether a support shows each label's own text, if it is words (`Algorithm.label_names`)."""
    texts_in_context: bool = False
    """Free text is learned and answered with its task's examples in the prompt (`Algorithm.texts_in_context`)."""

    def shown(self, support: Sequence[Example], is_label: bool) -> Sequence[Example]:
        """Return the examples of a support that stand in the queries' prompt: of free text, as many as have room."""
        if self.in_context:
            return support
        return self._parts(support)[0] if self.texts_in_context and not is_label else ()

    def _parts(self, examples: Sequence[Example]) -> list[list[Example]]:
        """Return examples of free text in groups that have room in a prompt each."""
        room = min(SHOWN_TOKENS, self.tokenizer.model_max_length // 2)
        parts: list[list[Example]] = []
        left = 0
        for example in examples:
            tokens = len(self.row(example, is_label=False).tokens)
            if tokens > left:
                parts.append([])
                left = room
            parts[-1].append(example)
            left -= tokens
        return parts

    def for_task(self, task: str, kind: str, labels: Iterable[str] = ()) -> "Encoder":
        """Return the encoder of a task.

        Its prompts are the templates for the task, or else those for its kind, or else the default ones.

        Args:
            labels: as the model sees them; for an episode, those of its classes.
        """
        by_task = [prompts for key, prompts in self.templates if key not in KINDS and fnmatchcase(task, key)]
        by_kind = [prompts for key, prompts in self.templates if key == kind]
        kind_prompt = KINDS[kind].prompt if kind in KINDS and not self.sentences else ""
        default = (kind_prompt,) if kind_prompt else (self.prompt, *self.ensemble)
        prompts = (by_task or by_kind or [default])[0]
        return replace(self, prompt=prompts[0], ensemble=prompts[1:], kind=kind).among(labels)

    def among(self, labels: Iterable[str]) -> "Encoder":
        """Return the encoder of these labels, which end with a token of their own if one is the prefix of another."""
        ends = self.label_loss == "options" and one_is_prefix(labels)
        return self if ends == self.ends_labels else replace(self, ends_labels=ends)

    @property
    def is_masked(self) -> bool:
        """Whether labels are predicted at a mask (`rayml.lm.rows`)."""
        return predicts_masks(self.tokenizer)

    @property
    def writes_text(self) -> bool:
        """Whether the model can write texts, and not only choose among labels."""
        return not (self.is_masked or self.sentences)

    @property
    def sentences(self) -> Sentences | None:
        """How a sentence encoder reads what it embeds; None for a language model."""
        return sentences_of(self.tokenizer)

    @property
    def pad(self) -> int:
        """The token that rows are padded with."""
        if self.sentences:
            return self.tokenizer.pad_token_id or 0
        return self.tokenizer.pad_token_id if self.is_masked else self.tokenizer.eos_token_id

    def row(self, example: Example, is_label: bool, shown: Sequence[Example] = (), reserve: int = 0) -> TokenRow:
        """Return the row of an example, with the examples `shown` before it in the prompt.

        Args:
            shown: each of them adds `max_tokens` to the allowed length.
            reserve: tokens of the allowed length to leave unused.
        """
        max_tokens = self.max_tokens * (len(shown) + 1) - reserve
        if self.kind == "dialogue" and example.parts:
            turns = [turn for e in (*shown, example) for turn in e.parts]
            return self._add_soft_tokens(chat_row(self.tokenizer, turns, max_tokens))
        return self._encode(self._prompt(example, shown, is_label), example, is_label, max_tokens)

    def sequence(self, examples: Sequence[Example]) -> TokenRow:
        """Return examples of free text in one row, as they stand in a prompt: each is predicted from those before it.

        It costs what the examples cost in rows of their own, and each target that is learned is seen in context.
        """
        most = self.max_tokens * len(examples)
        if self.kind == "dialogue":
            row = chat_row(self.tokenizer, [turn for example in examples for turn in example.parts], most)
            return self._add_soft_tokens(row)
        text, ends = "", []
        for example in examples:
            begin = text + render(self.prompt, marked_example(self.tokenizer, example))
            text = self._add_shot(text, example, is_label=False)
            ends.append((len(remove_marks(begin)), len(remove_marks(text)) - len(SHOT_END)))
        return self._add_soft_tokens(encode_sequence(self.tokenizer, text.removesuffix(SHOT_END), ends, most))

    def rows(self, examples: Iterable[Example], is_label: bool, shown: Sequence[Example] = ()) -> list[TokenRow]:
        return [self.row(example, is_label, shown) for example in examples]

    def support(
        self, examples: Sequence[Example], labels: Sequence[str], rng: random.Random | None = None
    ) -> tuple[list[TokenRow], list[int]]:
        """Return the rows of a support with the class of each: its examples, and the labels' own texts, if it has them.

        Args:
            labels: the classes; empty for free text, whose rows have none.
            rng: draws the tokens that token dropout leaves out; None: nothing is.
        """
        is_label, numbers = bool(labels), {label: number for number, label in enumerate(labels)}
        if self.texts_in_context and not is_label:
            return [self.sequence(part) for part in self._parts(examples)], []
        rows = [self.with_token_dropout(e, is_label, rng) if rng else self.row(e, is_label) for e in examples]
        classes = [numbers[example.target] for example in examples if is_label]
        if self.label_names and all(map(WORD.search, labels)) and not any(example.parts for example in examples):
            names = self.rows(label_examples(labels, NO_TEXT), is_label)
            rows += [replace(row.without_target(), is_name=True) for row in names]
            classes += range(len(labels))
        return rows, classes

    def prompt_tokens(self, example: Example, shown: Sequence[Example] = ()) -> list[int]:
        """Return the prompt tokens for generating an answer; the example's own target is ignored."""
        if self.kind == "dialogue":
            turns = [*(turn for e in shown for turn in e.parts), *(example.parts[:-1] or [("user", example.input)])]
            tokens = chat_prompt(self.tokenizer, turns, **ANSWERS)
            most = self.max_tokens * (len(shown) + 1)
            return [*soft_tokens(self.soft_tokens), *cut_left(self.tokenizer, tokens, most)]
        row = self.row(replace(example, target="."), is_label=False, shown=shown)
        return row.tokens[: row.start]

    def option_rows(
        self, examples: Iterable[Example], options: Sequence[str], shown: Sequence[Example] = ()
    ) -> list[list[TokenRow]]:
        """Return, for every example, a row with each option as its target, all after the same prompt."""
        encoder = self.among(options)
        return [encoder._rows_of_one_prompt([relabel(e, option) for option in options], shown) for e in examples]

    def ensemble_rows(
        self, examples: Sequence[Example], options: Sequence[str], shown: Sequence[Example] = ()
    ) -> list[tuple[float, list[list[TokenRow]]]]:
        """Return each prompt of the ensemble as (weight, rows), with rows as `option_rows` returns them.

        An option's score is the weighted sum of its log-probabilities. Each template is one prompt. `pmi` adds one
        without the input, with a negative weight (PMI_DC, Holtzman et al. 2021, arXiv 2104.08315).
        """
        if self.sentences:  # a text's vector does not depend on the options
            return [(1.0, [[self.row(example, is_label=True)] for example in examples])]
        prompts, weight = [], 1 / (1 + len(self.ensemble))
        for prompt in (self.prompt, *self.ensemble):
            encoder = replace(self, prompt=prompt)
            if self.scoring == "channel":
                prompts.append((weight, [[encoder._channel_row(e, option) for option in options] for e in examples]))
                continue
            prompts.append((weight, encoder.option_rows(examples, options, shown)))
            if self.scoring == "pmi":
                prompts.append((-weight, encoder.option_rows([without_input(e) for e in examples], options)))
        return prompts

    def _channel_row(self, example: Example, option: str) -> TokenRow:
        """Return a row with the label as prompt and the input as target.

        It scores how probable the label makes the input (noisy channel, Min et al. 2022, arXiv 2108.04106).
        """
        label, text = (mark_specials(self.tokenizer, part) for part in (option, example.input.strip()))
        row = encode(self.tokenizer, CHANNEL.format(label), f" {text}", False, 10**9)
        return self._add_soft_tokens(TokenRow(row.tokens[: self.max_tokens], row.start))

    def _rows_of_one_prompt(self, examples: Sequence[Example], shown: Sequence[Example]) -> list[TokenRow]:
        """Return the rows of examples that differ in the target alone, all with the same prompt."""
        rows = [self.row(example, is_label=True, shown=shown) for example in examples]
        if len({row.start for row in rows}) == 1:
            return rows
        # A long text was cut, and more so for longer options: cut it for all options as for the longest.
        lengths = [len(row.tokens) - row.start for row in rows]
        reserves = [max(lengths) - length for length in lengths]
        return [self.row(e, is_label=True, shown=shown, reserve=n) for e, n in zip(examples, reserves, strict=True)]

    def with_token_dropout(self, example: Example, is_label: bool, rng: random.Random) -> TokenRow:
        """Return the row of an example, with each token of its input left out with probability `token_dropout`."""
        if self.kind == "dialogue":
            return self.row(example, is_label)
        prompt = self._prompt(example)
        plain_prompt, without = remove_marks(prompt), remove_marks(self._prompt(without_input(example)))
        # What the prompt says by itself may be in the input, too: look behind it.
        begin = end = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(plain_prompt, without, strict=False))
        )
        input_characters: set[int] = set()
        for text in [text for _, text in example.parts] or [example.input]:
            first = plain_prompt.find(text, end)
            first = plain_prompt.find(text, begin) if first < 0 else first  # not in the order of the fields
            if first >= 0:
                end = first + len(text)
                input_characters |= set(range(first, end))

        def keep(character: int) -> bool:
            return character not in input_characters or rng.random() >= self.token_dropout

        return self._encode(prompt, example, is_label, self.max_tokens, keep)

    def _prompt(self, example: Example, shown: Sequence[Example] = (), is_label: bool = True) -> str:
        shots = ""
        for shot in shown:
            shots = self._add_shot(shots, shot, is_label)
        if self.is_masked:
            return shots + self._fill_answer(example, self.tokenizer.mask_token)
        return shots + render(self.prompt, marked_example(self.tokenizer, example))

    def _add_shot(self, text: str, example: Example, is_label: bool) -> str:
        """Return a text with an example after it. Free text ends as it is to end when it is generated."""
        filled = self._fill_answer(example, mark_specials(self.tokenizer, example.target.strip()))
        return f"{text}{filled}{'' if is_label else self.tokenizer.eos_token}{SHOT_END}"

    def _fill_answer(self, example: Example, answer: str) -> str:
        """Return the prompt with an answer in place of its mask, or at its end if it has none."""
        text = render(self.prompt, marked_example(self.tokenizer, example), mask=BLANK)
        return text.replace(BLANK, answer) if BLANK in text else f"{text} {answer}"

    def _encode(self, prompt: str, example: Example, is_label: bool, max_tokens: int, keep: Any = None) -> TokenRow:
        if self.sentences:
            return self._sentence_row(self.sentences, remove_marks(prompt), example.parts, max_tokens, keep)
        target = mark_specials(self.tokenizer, example.target.strip())
        if self.is_masked:
            return masked_row(self.tokenizer, prompt, target, is_label, max_tokens, keep)
        ends = self.ends_labels or not is_label
        return self._add_soft_tokens(encode(self.tokenizer, prompt, f" {target}", ends, max_tokens, keep))

    def _sentence_row(self, sentences: Sentences, text: str, parts: Parts, max_tokens: int, keep: Any) -> TokenRow:
        row = sentence_row(self.tokenizer, sentences, text, max_tokens, keep)
        if len(parts) != PAIR:
            return row
        pair = (sentence_row(self.tokenizer, sentences, part, max_tokens) for _, part in parts)
        return replace(row, pair=tuple(tuple(one.tokens) for one in pair))

    def _add_soft_tokens(self, row: TokenRow) -> TokenRow:
        count = self.soft_tokens
        loss_masked = tuple(position + count for position in row.loss_masked)
        return TokenRow([*soft_tokens(count), *row.tokens], row.start + count, loss_masked) if count else row

    def competing_tokens(self, labels: Iterable[str], example: Example = NO_TEXT) -> list[list[int]]:
        """Return the tokens of labels that compete with each other (`rayml.lm.label_trie`).

        The list is empty if labels compete with the whole vocabulary instead.

        Args:
            example: one of the task, if inputs have parts; its texts do not matter.
        """
        return self.as_choices(self.label_tokens(labels, example))

    def label_tokens(self, labels: Iterable[str], example: Example = NO_TEXT) -> list[list[int]]:
        """Return each label's tokens as they follow the prompt; `example` as in `competing_tokens`."""
        labels = list(labels)
        encoder = self.among(labels)
        rows = [encoder.row(relabel(without_input(example), label), is_label=True) for label in labels]
        return [row.tokens[row.start :] for row in rows]

    def as_choices(self, labels: list[list[int]]) -> list[list[int]]:
        """Return the labels' tokens if a target is chosen among them, token by token; else an empty list."""
        return labels if self.label_loss == "options" and all(labels) and is_prefix_free(labels) else []

    def episode(self, episode: Episode) -> dict[str, Any]:
        """Return the episode for training as one row of a data set; `decode_rows` reads the two sides back."""
        is_label, encoder = bool(episode.labels), self.for_task(episode.task, episode.kind, episode.labels)
        rng = random.Random(f"{episode.task}/{episode.index}") if self.token_dropout else None
        shown = self.shown(episode.support, is_label)
        sides = {
            "support": encoder.support(episode.support, list(episode.labels), rng),
            "query": (encoder.rows(episode.query, is_label, shown), class_numbers(episode, "query")),
        }
        labels = encoder.competing_tokens(episode.labels, episode.support[0])
        record: dict[str, Any] = {"index": episode.index, "task": episode.task, "labels": labels}
        for side, (rows, classes) in sides.items():
            record[side] = encode_rows(rows) | {"classes": classes}
        return record


def one_is_prefix(labels: Iterable[str]) -> bool:
    """Return whether a label is the prefix of another, in any case: some tokenizers drop case."""
    ordered = sorted(label.strip().casefold() for label in labels)  # a prefix sorts right before what it begins
    return any(longer.startswith(label) for label, longer in pairwise(ordered))


def label_examples(labels: Iterable[str], example: Example) -> list[Example]:
    """Return each label's own text as an example of that label, with the parts that the example's input has."""
    return [
        replace(example, input=label, target=label, parts=tuple((name, label) for name, _ in example.parts))
        for label in labels
    ]


def without_input(example: Example) -> Example:
    """Return an example with empty texts as its input and the input's parts."""
    return replace(example, input="", parts=tuple((name, "") for name, _ in example.parts))


def fields(parts: Parts) -> tuple[str, ...]:
    return tuple(name for name, _ in parts)


def class_numbers(episode: Episode, side: str) -> list[int]:
    """Return the index of each example's label among the episode's labels; an empty list for free text."""
    numbers = {label: number for number, label in enumerate(episode.labels)}
    return [numbers[example.target] for example in getattr(episode, side) if numbers]
