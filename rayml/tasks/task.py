"""What a model learns from: a task is a named family of examples."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

Parts = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Example:
    """One (input, target) pair."""

    input: str
    target: str
    parts: Parts = ()
    """What the input was made of, where it has parts: (field, text), or, of a dialogue, (role, text) of every turn, the
    target's as the last."""
    answers: tuple[str, ...] = ()
    """Other right answers, that count where answers are scored."""


@dataclass(frozen=True)
class Task:
    """A named family of examples.

    A task with `options` is a label task: its targets are classes, `shots` and `queries` count per class. A task
    without is free text, and they count per task. Its `kind` says how it is shown to the model and scored
    (`rayml.tasks.kinds`).
    """

    name: str
    examples: tuple[Example, ...]
    options: tuple[str, ...] = ()
    kind: str = ""

    @cached_property
    def classes(self) -> dict[str, tuple[Example, ...]]:
        """Examples by target, in the order of `options`; one group, named "", for free text."""
        if not self.options:
            return {"": self.examples}
        groups: dict[str, list[Example]] = {option: [] for option in self.options}
        for example in self.examples:
            groups[example.target].append(example)
        return {option: tuple(examples) for option, examples in groups.items()}

    def only(self, options: tuple[str, ...]) -> "Task":
        """Return the task narrowed to some of its classes."""
        kept = set(options)
        return replace(self, examples=tuple(e for e in self.examples if e.target in kept), options=options)


def normalized(text: str) -> str:
    """Return the text as the duplicate and leakage checks compare it: case and white space do not count."""
    return " ".join(text.split()).casefold()


def conversation(turns: Sequence[tuple[str, str]]) -> str:
    """Return a conversation, (role, text) each, as one text: one turn of the user as it is, else with who said what."""
    if [role for role, _ in turns if role not in ("system", "developer")] == ["user"]:
        return "\n\n".join(text for _, text in turns)
    return "\n".join(f"{role}: {text}" for role, text in turns)
