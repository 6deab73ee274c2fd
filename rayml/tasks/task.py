"""What a model learns from: a task is a named family of examples."""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, slots=True)
class Example:
    """One (input, target) pair."""

    input: str
    target: str


@dataclass(frozen=True)
class Task:
    """A named family of examples.

    A task with `options` is a label task: its targets are classes, `shots` and `queries` count per class. A task
    without is free text, and they count per task.
    """

    name: str
    examples: tuple[Example, ...]
    options: tuple[str, ...] = ()

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
        return Task(self.name, tuple(e for e in self.examples if e.target in kept), options)


def normalized(text: str) -> str:
    """Return the text as the duplicate and leakage checks compare it: case and white space do not count."""
    return " ".join(text.split()).casefold()
