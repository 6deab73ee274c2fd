"""From an episode's text to rows of tokens, as plain lists that Ray Data can carry."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rayml.errors import DataError
from rayml.lm.batch import Row, encode
from rayml.lm.choices import compete
from rayml.tasks.episodes import Episode
from rayml.tasks.task import Example, Task


@dataclass(frozen=True, slots=True)
class Encoder:
    """How examples are shown to the model.

    A label stands behind one space, and ends where it ends: options are scored against each other. Free text ends
    with the end-of-sequence token.
    """

    tokenizer: Any
    prompt: str
    max_tokens: int
    label_loss: str = "options"
    in_context: bool = False
    """Queries carry their episode's support in the prompt (MetaICL, Min et al. 2022, arXiv 2110.15943)."""
    token_dropout: float = 0.0

    def row(self, example: Example, is_label: bool, shown: Sequence[Example] = (), spared: int = 0) -> Row:
        """Return the row of an example behind those `shown` in its prompt; each adds to the length that is allowed.

        Args:
            spared: tokens that the row shall stay below that length.
        """
        prompt = "".join(f"{self._prompt(e.input)} {e.target.strip()}\n\n" for e in shown)
        most = self.max_tokens * (len(shown) + 1) - spared
        return self._encode(prompt + self._prompt(example.input), example, is_label, most)

    def rows(self, examples: Iterable[Example], is_label: bool, shown: Sequence[Example] = ()) -> list[Row]:
        return [self.row(example, is_label, shown) for example in examples]

    def option_rows(
        self, texts: Iterable[str], options: Sequence[str], shown: Sequence[Example] = ()
    ) -> list[list[Row]]:
        """Return, for every text, a row with each option as its target, all behind the same prompt."""
        return [self._alike([Example(text, option) for option in options], shown) for text in texts]

    def _alike(self, examples: Sequence[Example], shown: Sequence[Example]) -> list[Row]:
        rows = [self.row(example, is_label=True, shown=shown) for example in examples]
        if len({row.start for row in rows}) == 1:
            return rows
        # A long text was cut, and for longer options by more: all shall see what the longest leaves of it.
        lengths = [len(row.tokens) - row.start for row in rows]
        spared = [max(lengths) - length for length in lengths]
        return [self.row(e, is_label=True, shown=shown, spared=n) for e, n in zip(examples, spared, strict=True)]

    def thinned(self, example: Example, is_label: bool, rng: random.Random) -> Row:
        """Return the row of an example without some of its input's tokens, each left out by `token_dropout`."""
        first = self.prompt.index("{input}")
        last = first + len(example.input)

        def keep(character: int) -> bool:
            return not first <= character < last or rng.random() >= self.token_dropout

        return self._encode(self._prompt(example.input), example, is_label, self.max_tokens, keep)

    def _prompt(self, text: str) -> str:
        return self.prompt.replace("{input}", text)

    def _encode(self, prompt: str, example: Example, is_label: bool, most: int, keep: Any = None) -> Row:
        return encode(self.tokenizer, prompt, " " + example.target.strip(), not is_label, most, keep)

    def competing(self, labels: Iterable[str]) -> list[list[int]]:
        """Return the tokens of labels that are chosen among (`rayml.lm.choices`); none where that is the vocabulary."""
        rows = [self.row(Example("", label), is_label=True) for label in labels]
        return self.told_apart([row.tokens[row.start :] for row in rows])

    def told_apart(self, labels: list[list[int]]) -> list[list[int]]:
        """Return the labels' tokens if labels are to be chosen among, and can be, else none."""
        return labels if self.label_loss == "options" and compete(labels) else []

    def episode(self, episode: Episode) -> dict[str, Any]:
        """Return the episode for training, as one row of a data set; `decode_rows` takes the two sides back."""
        is_label = bool(episode.labels)
        rng = random.Random(f"{episode.task}/{episode.index}")
        sides = {
            "support": [self.thinned(e, is_label, rng) for e in episode.support]
            if self.token_dropout
            else self.rows(episode.support, is_label),
            "query": self.rows(episode.query, is_label, episode.support if self.in_context else ()),
        }
        record: dict[str, Any] = {"index": episode.index, "task": episode.task}
        record["labels"] = self.competing(episode.labels)
        for side, rows in sides.items():
            record[side] = {
                "tokens": [row.tokens for row in rows],
                "starts": [row.start for row in rows],
                "classes": class_numbers(episode, side),
            }
        return record

    def check(self, tasks: Iterable[Task]) -> None:
        """Raise DataError for every target that has no token, or leaves no room for its input."""
        errors = []
        for task in tasks:
            for target in {example.target for example in task.examples}:
                try:
                    self.row(Example("", target), bool(task.options))
                except DataError as error:
                    errors.append(f"task {task.name!r}: {error}")
        if errors:
            raise DataError("targets that cannot be learned:\n  " + "\n  ".join(errors[:20]))


def class_numbers(episode: Episode, side: str) -> list[int]:
    """Return the place of each example's label among the episode's labels; nothing for free text."""
    labels = {label: place for place, label in enumerate(episode.labels)}
    return [labels[example.target] for example in getattr(episode, side) if labels]


def decode_rows(side: dict[str, Any]) -> list[Row]:
    """Return the rows of one side of a record that `Encoder.episode` made."""
    return [Row(list(tokens), start) for tokens, start in zip(side["tokens"], side["starts"], strict=True)]
