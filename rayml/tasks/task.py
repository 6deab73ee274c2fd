"""Tasks and examples: what a model learns from."""

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
    """(field, text) of an input in parts. For a dialogue, (role, text) of every turn, the target's included."""
    answers: tuple[str, ...] = ()
    """Other right answers; they count as right when answers are scored."""


@dataclass(frozen=True)
class Task:
    """A named set of examples that are answered alike.

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
        names = set(options)
        return replace(self, examples=tuple(e for e in self.examples if e.target in names), options=options)


def normalize_text(text: str) -> str:
    """Return a text in the form that checks for duplicates and leaks compare: without case and extra white space."""
    return " ".join(text.split()).casefold()


def format_conversation(turns: Sequence[tuple[str, str]]) -> str:
    """Return (role, text) turns as one text. The roles are left out if the user has the only turn."""
    if [role for role, _ in turns if role not in ("system", "developer")] == ["user"]:
        return "\n\n".join(text for _, text in turns)
    return "\n".join(f"{role}: {text}" for role, text in turns)
