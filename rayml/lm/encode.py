"""From an episode's text to rows of tokens, as plain lists that Ray Data can carry."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rayml.errors import DataError
from rayml.lm.batch import Row, encode
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

    def row(self, example: Example, is_label: bool) -> Row:
        prompt = self.prompt.replace("{input}", example.input)
        return encode(self.tokenizer, prompt, " " + example.target.strip(), not is_label, self.max_tokens)

    def rows(self, examples: Iterable[Example], is_label: bool) -> list[Row]:
        return [self.row(example, is_label) for example in examples]

    def choices(self, labels: Iterable[str]) -> list[int]:
        """Return the tokens of the labels that the loss is normalized over; none where that is the vocabulary.

        Scored so, labels of one token each are learned as they are chosen among at the end, and no inner step is
        spent on learning that a label comes at all.
        """
        rows = [self.row(Example("", label), is_label=True) for label in labels]
        tokens = [row.tokens[row.start] for row in rows if row.start == len(row.tokens) - 1]
        distinct = len(set(tokens)) == len(rows)
        return tokens if self.label_loss == "options" and distinct else []

    def episode(self, episode: Episode) -> dict[str, Any]:
        """Return the episode as one row of a data set; `decode_rows` takes the two sides back."""
        record: dict[str, Any] = {"index": episode.index, "task": episode.task}
        record["choices"] = self.choices(episode.labels)
        for side in ("support", "query"):
            rows = self.rows(getattr(episode, side), bool(episode.labels))
            record[side] = {"tokens": [row.tokens for row in rows], "starts": [row.start for row in rows]}
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


def decode_rows(side: dict[str, Any]) -> list[Row]:
    """Return the rows of one side of a record that `Encoder.episode` made."""
    return [Row(list(tokens), start) for tokens, start in zip(side["tokens"], side["starts"], strict=True)]
