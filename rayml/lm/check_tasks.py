"""Check, before a model is loaded, that it can learn some tasks: their prompts, targets and labels."""

from collections.abc import Iterable, Sequence

from rayml.errors import DataError
from rayml.lm.encode import NO_TEXT, Encoder, fields, without_input
from rayml.tasks.episodes import relabel
from rayml.tasks.task import Example, Task
from rayml.tasks.templates import render


def check_tasks(encoder: Encoder, tasks: Iterable[Task]) -> None:
    """Raise one DataError that names all templates that do not fit their task, and all unlearnable targets."""
    errors = []
    for task in tasks:
        own, is_dialogue = encoder.for_task(task.name, task.kind), task.kind == "dialogue"
        if problem := indistinct_labels(own, task.options, task.examples[0]):
            errors.append(f"task {task.name!r}: {problem}")
        if encoder.sentences and not task.options:
            advice = "give examples of two labels or more, or `options` in the rows"
            errors.append(f"task {task.name!r}: a sentence encoder writes no text; {advice}")
            continue
        # One example of every target, and of every set of parts, stands for all.
        samples = {e.target: e for e in task.examples} | {fields(e.parts): e for e in task.examples}
        for example in task.examples if is_dialogue else samples.values():
            try:
                labelled = relabel(example, "A" if task.options and encoder.labels == "letters" else None)
                own.row(labelled if is_dialogue else without_input(labelled), bool(task.options))
                for prompt in own.ensemble:
                    render(prompt, example)
            except DataError as error:
                errors.append(f"task {task.name!r}: {error}")
    if errors:
        raise DataError("targets, or prompts, that cannot be learned:\n  " + "\n  ".join(errors[:20]))


def indistinct_labels(encoder: Encoder, labels: Sequence[str], example: Example = NO_TEXT) -> str:
    """Return a message that names two labels with the same tokens; "" if all labels differ.

    Labels in a script that the vocabulary lacks have the same tokens, as have labels that differ only in what the
    tokenizer drops, such as case.
    """
    by_tokens: dict[tuple[int, ...], str] = {}
    for label in labels if encoder.labels == "words" and not encoder.sentences else ():
        try:
            row = encoder.row(relabel(without_input(example), label), is_label=True)
        except DataError as error:
            return str(error)
        other = by_tokens.setdefault(tuple(row.tokens[row.start :]), label)
        if other != label:
            advice = "rename one, or use data.labels=letters"
            return f"labels {other!r} and {label!r} are the same tokens to this model; {advice}"
    return ""
