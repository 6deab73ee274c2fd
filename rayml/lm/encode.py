"""From an episode's text to rows of tokens, as plain lists that Ray Data can carry."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from rayml.errors import DataError
from rayml.lm.chat import ANSWERS, chat_prompt, chat_row
from rayml.lm.label_trie import can_tell_apart
from rayml.lm.rows import TokenRow, encode, masked_row, predicts_masks, soft_tokens
from rayml.lm.sentence import Sentences, sentence_row, sentences_of
from rayml.lm.tokens import BLANK, marked, marked_example, plain
from rayml.tasks.episodes import Episode, LabelScheme, relabel
from rayml.tasks.kinds import KINDS
from rayml.tasks.task import Example, Parts, Task
from rayml.tasks.templates import render

CHANNEL = "Label: {}\nText:"
"""What stands before the input where the input is scored, given a label."""
NO_TEXT = Example("", "")


@dataclass(frozen=True, slots=True)
class Encoder:
    """How examples are shown to the model.

    A label stands behind one space, and ends where it ends: options are scored against each other. Only where one label
    begins another ("card", "card lost") each of them ends with the end-of-sequence token, as free text always does. A
    dialogue is written by the model's own chat template.
    """

    tokenizer: Any
    prompt: str
    """Jinja: what stands before the target."""
    max_tokens: int
    label_loss: str = "options"
    in_context: bool = False
    """Queries carry their episode's support in the prompt (MetaICL, Min et al. 2022, arXiv 2110.15943)."""
    token_dropout: float = 0.0
    kind: str = ""
    ensemble: tuple[str, ...] = ()
    """More prompts that options are asked with: the mean of the log-probabilities counts (PET, Schick and Schütze 2021,
    arXiv 2001.07676)."""
    scoring: str = "learned"
    templates: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(kind, or pattern of tasks, prompts) that `of` chooses among."""
    labels: LabelScheme = "words"
    soft_tokens: int = 0
    """That every row begins with (`rayml.lm.soft_prompt`), beside the tokens that it may have."""
    ends_labels: bool = False
    """Labels, too, end with the end-of-sequence token (`among`)."""

    def of(self, task: str, kind: str, labels: Iterable[str] = ()) -> "Encoder":
        """Return the encoder of a task: its templates are its own, or else its kind's, or else the prompt.

        Args:
            labels: as the model sees them; of an episode, those of its classes.
        """
        by_task = [prompts for key, prompts in self.templates if key not in KINDS and fnmatchcase(task, key)]
        by_kind = [prompts for key, prompts in self.templates if key == kind]
        own = KINDS[kind].prompt if kind in KINDS and not self.sentences else ""
        prompts = (by_task or by_kind or [(own or self.prompt, *(() if own else self.ensemble))])[0]
        return replace(self, prompt=prompts[0], ensemble=prompts[1:], kind=kind).among(labels)

    def among(self, labels: Iterable[str]) -> "Encoder":
        """Return the encoder of these labels: where one begins another, what tells them apart is that it ends."""
        ends = self.label_loss == "options" and one_begins_another(labels)
        return self if ends == self.ends_labels else replace(self, ends_labels=ends)

    @property
    def is_masked(self) -> bool:
        """Whether labels are predicted at a mask (`rayml.lm.rows`)."""
        return predicts_masks(self.tokenizer)

    @property
    def writes_text(self) -> bool:
        """Whether texts can be written, and not only labels chosen."""
        return not (self.is_masked or self.sentences)

    @property
    def sentences(self) -> Sentences | None:
        """How a sentence encoder reads what it embeds; None for a language model."""
        return sentences_of(self.tokenizer)

    @property
    def pad(self) -> int:
        """The token that rows are filled up with."""
        if self.sentences:
            return self.tokenizer.pad_token_id or 0
        return self.tokenizer.pad_token_id if self.is_masked else self.tokenizer.eos_token_id

    def row(self, example: Example, is_label: bool, shown: Sequence[Example] = (), spared: int = 0) -> TokenRow:
        """Return the row of an example behind those `shown` in its prompt; each adds to the length that is allowed.

        Args:
            spared: tokens that the row shall stay below that length.
        """
        most = self.max_tokens * (len(shown) + 1) - spared
        if self.kind == "dialogue" and example.parts:
            return self._softened(chat_row(self.tokenizer, [turn for e in (*shown, example) for turn in e.parts], most))
        return self._encode(self._prompt(example, shown), example, is_label, most)

    def rows(self, examples: Iterable[Example], is_label: bool, shown: Sequence[Example] = ()) -> list[TokenRow]:
        return [self.row(example, is_label, shown) for example in examples]

    def asked(self, example: Example, shown: Sequence[Example] = ()) -> list[int]:
        """Return the tokens that an answer is written behind; the example's own target is not looked at."""
        if self.kind == "dialogue":
            turns = [*(turn for one in shown for turn in one.parts), *(example.parts[:-1] or [("user", example.input)])]
            tokens = chat_prompt(self.tokenizer, turns, **ANSWERS)[-self.max_tokens * (len(shown) + 1) :]
            return [*soft_tokens(self.soft_tokens), *tokens]
        row = self.row(replace(example, target="."), is_label=False, shown=shown)
        return row.tokens[: row.start]

    def option_rows(
        self, examples: Iterable[Example], options: Sequence[str], shown: Sequence[Example] = ()
    ) -> list[list[TokenRow]]:
        """Return, for every example, a row with each option as its target, all behind the same prompt."""
        own = self.among(options)
        return [own._alike([relabel(example, option) for option in options], shown) for example in examples]

    def ensemble_rows(
        self, examples: Sequence[Example], options: Sequence[str], shown: Sequence[Example] = ()
    ) -> list[tuple[float, list[list[TokenRow]]]]:
        """Return the prompts of the ensemble, each with its weight: rows as `option_rows` returns them.

        An option's score is the weighted sum of its log-probabilities. One prompt for each template; and for `pmi` one
        more without the input, that counts against it (PMI_DC, Holtzman et al. 2021, arXiv 2104.08315).
        """
        found = []
        if self.sentences:  # whatever the options are
            return [(1.0, [[self.row(example, is_label=True)] for example in examples])]
        for prompt in (self.prompt, *self.ensemble):
            asked, share = replace(self, prompt=prompt), 1 / (1 + len(self.ensemble))
            if self.scoring == "channel":
                found.append((share, [[asked._channel_row(e, option) for option in options] for e in examples]))
                continue
            found.append((share, asked.option_rows(examples, options, shown)))
            if self.scoring == "pmi":
                found.append((-share, asked.option_rows([blank(e) for e in examples], options)))
        return found

    def _channel_row(self, example: Example, option: str) -> TokenRow:
        """Return the row of an input behind a label: how probable the label makes it (noisy channel, Min et al. 2022,
        arXiv 2108.04106)."""
        label, text = (marked(self.tokenizer, part) for part in (option, example.input.strip()))
        row = encode(self.tokenizer, CHANNEL.format(label), f" {text}", False, 10**9)
        return self._softened(TokenRow(row.tokens[: self.max_tokens], row.start))

    def _alike(self, examples: Sequence[Example], shown: Sequence[Example]) -> list[TokenRow]:
        rows = [self.row(example, is_label=True, shown=shown) for example in examples]
        if len({row.start for row in rows}) == 1:
            return rows
        # A long text was cut, and for longer options by more: all shall see what the longest leaves of it.
        lengths = [len(row.tokens) - row.start for row in rows]
        spared = [max(lengths) - length for length in lengths]
        return [self.row(e, is_label=True, shown=shown, spared=n) for e, n in zip(examples, spared, strict=True)]

    def with_token_dropout(self, example: Example, is_label: bool, rng: random.Random) -> TokenRow:
        """Return the row of an example without some of its input's tokens, each left out by `token_dropout`."""
        prompt = self._prompt(example)
        inside: set[int] = set()
        for text in [text for _, text in example.parts] or [example.input]:
            first = plain(prompt).find(text)
            inside |= set(range(first, first + len(text))) if first >= 0 else set()

        def keep(character: int) -> bool:
            return character not in inside or rng.random() >= self.token_dropout

        if self.kind == "dialogue":
            return self.row(example, is_label)
        return self._encode(prompt, example, is_label, self.max_tokens, keep)

    def _prompt(self, example: Example, shown: Sequence[Example] = ()) -> str:
        before = "".join(f"{self._answered(e, marked(self.tokenizer, e.target.strip()))}\n\n" for e in shown)
        if self.is_masked:
            return before + self._answered(example, self.tokenizer.mask_token)
        return before + render(self.prompt, marked_example(self.tokenizer, example))

    def _answered(self, example: Example, answer: str) -> str:
        """Return the prompt with an answer where its mask is, or else behind it."""
        text = render(self.prompt, marked_example(self.tokenizer, example), mask=BLANK)
        return text.replace(BLANK, answer) if BLANK in text else f"{text} {answer}"

    def _encode(self, prompt: str, example: Example, is_label: bool, most: int, keep: Any = None) -> TokenRow:
        if self.sentences:
            return sentence_row(self.tokenizer, self.sentences, plain(prompt), most, keep)
        target = marked(self.tokenizer, example.target.strip())
        if self.is_masked:
            return masked_row(self.tokenizer, prompt, target, is_label, most, keep)
        ends = self.ends_labels or not is_label
        return self._softened(encode(self.tokenizer, prompt, f" {target}", ends, most, keep))

    def _softened(self, row: TokenRow) -> TokenRow:
        count = self.soft_tokens
        loss_masked = tuple(position + count for position in row.loss_masked)
        return TokenRow([*soft_tokens(count), *row.tokens], row.start + count, loss_masked) if count else row

    def competing(self, labels: Iterable[str], like: Example = NO_TEXT) -> list[list[int]]:
        """Return the tokens of labels that are chosen among (`rayml.lm.label_trie`); none where that is the vocabulary.

        Args:
            like: an example of the task, where inputs have parts; its texts do not matter.
        """
        return self.told_apart(self.label_tokens(labels, like))

    def label_tokens(self, labels: Iterable[str], like: Example = NO_TEXT) -> list[list[int]]:
        """Return each label's tokens, as they stand behind the prompt; `like` as in `competing`."""
        labels = list(labels)
        own = self.among(labels)
        rows = [own.row(relabel(blank(like), label), is_label=True) for label in labels]
        return [row.tokens[row.start :] for row in rows]

    def told_apart(self, labels: list[list[int]]) -> list[list[int]]:
        """Return the labels' tokens if labels are to be chosen among, and can be, else none."""
        return labels if self.label_loss == "options" and all(labels) and can_tell_apart(labels) else []

    def episode(self, episode: Episode) -> dict[str, Any]:
        """Return the episode for training, as one row of a data set; `decode_rows` takes the two sides back."""
        is_label, own = bool(episode.labels), self.of(episode.task, episode.kind, episode.labels)
        rng = random.Random(f"{episode.task}/{episode.index}")
        sides = {
            "support": [own.with_token_dropout(e, is_label, rng) for e in episode.support]
            if self.token_dropout
            else own.rows(episode.support, is_label),
            "query": own.rows(episode.query, is_label, episode.support if self.in_context else ()),
        }
        record: dict[str, Any] = {"index": episode.index, "task": episode.task}
        record["labels"] = own.competing(episode.labels, episode.support[0])
        for side, rows in sides.items():
            record[side] = {
                "tokens": [row.tokens for row in rows],
                "starts": [row.start for row in rows],
                "loss_masked": [list(row.loss_masked) for row in rows],
                "suffixes": [list(row.suffix) for row in rows],
                "classes": class_numbers(episode, side),
            }
        return record

    def check(self, tasks: Iterable[Task]) -> None:
        """Raise DataError for every task whose template does not fit it, and every target that cannot be learned."""
        errors = []
        for task in tasks:
            own = self.of(task.name, task.kind)
            # One of every target, and one of every set of parts: the others are no different.
            some = {e.target: e for e in task.examples} | {fields(e.parts): e for e in task.examples}
            dialogues = task.kind == "dialogue"
            alike = own.alike(task.options, task.examples[0])
            errors += [f"task {task.name!r}: {alike}"] if alike else []
            for example in task.examples if dialogues else some.values():
                try:
                    seen = relabel(example, "A" if task.options and self.labels == "letters" else None)
                    own.row(seen if dialogues else blank(seen), bool(task.options))
                    for prompt in own.ensemble:
                        render(prompt, example)
                except DataError as error:
                    errors.append(f"task {task.name!r}: {error}")
        if errors:
            raise DataError("targets, or prompts, that cannot be learned:\n  " + "\n  ".join(errors[:20]))

    def alike(self, labels: Sequence[str], like: Example = NO_TEXT) -> str:
        """Return which labels are the same tokens to the model, and what to do; "" where it tells all apart.

        Such are labels of a script that its vocabulary does not have, and those that differ by what it leaves out, such
        as case.
        """
        first: dict[tuple[int, ...], str] = {}
        for label in labels if self.labels == "words" and not self.sentences else ():
            try:
                row = self.row(relabel(blank(like), label), is_label=True)
            except DataError as error:
                return str(error)
            other = first.setdefault(tuple(row.tokens[row.start :]), label)
            if other != label:
                advice = "rename one, or use data.labels=letters"
                return f"labels {other!r} and {label!r} are the same tokens to this model; {advice}"
        return ""


def one_begins_another(labels: Iterable[str]) -> bool:
    """Return whether some label is the beginning of another; case is nothing to some tokenizers."""
    ordered = sorted(label.strip().casefold() for label in labels)  # a beginning stands right before what begins so
    return any(longer.startswith(label) for label, longer in pairwise(ordered))


def blank(example: Example) -> Example:
    """Return an example with nothing in its input, nor in the input's parts."""
    return replace(example, input="", parts=tuple((name, "") for name, _ in example.parts))


def fields(parts: Parts) -> tuple[str, ...]:
    return tuple(name for name, _ in parts)


def class_numbers(episode: Episode, side: str) -> list[int]:
    """Return the index of each example's label among the episode's labels; nothing for free text."""
    labels = {label: position for position, label in enumerate(episode.labels)}
    return [labels[example.target] for example in getattr(episode, side) if labels]
