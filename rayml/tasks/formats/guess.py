"""Guess which columns are the input and the target from their usual names, and tell users how to name them."""

import json
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from rayml.errors import DataError

PARTS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("context", "question"),
    ("passage", "question"),
    ("title", "description"),
)
"""Columns that are an input together."""
TEXTS = (
    *("input", "text", "sentence", "question", "prompt", "instruction", "utterance", "query", "review", "comment"),
    *("tweet", "document", "article", "content", "message", "headline", "title", "source", "src"),
)
TARGETS = (
    *("target", "label_text", "label", "labels", "answer", "answers", "completion", "response", "output", "intent"),
    *("category", "class", "sentiment", "gold_label", "gold", "summary", "highlights", "translation", "tgt"),
    *("emotion", "polarity", "topic", "tag", "tags"),
)
INPUTS = (*PARTS, *((text,) for text in TEXTS))
PROMPT_NAMES = {"passage": "context"}
"""Parts that have another name in prompts."""
CHOICES = {"choices", "endings", "choice1", "options"}
"""Beside these columns an answer may be the number of a choice."""
PREFERENCE = {"chosen", "rejected"}
JUDGED = {"prompt", "completion", "label"}
KNOWN = {*TEXTS, *TARGETS, *(name for parts in PARTS for name in parts), "task", "messages"}


def guess_columns(keys: Collection[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Return a guess for the input and target that `columns` does not name, in the form of `data.columns`.

    >>> guess_columns(["id", "Text", "label"], {})
    {'input': 'Text', 'target': 'label'}
    """
    key_of = {key.strip().casefold(): key for key in reversed([*keys])} | {key: key for key in keys}  # exact names win
    guessed: dict[str, str] = {}
    if "input" not in keys and not any(field.split(".")[0] == "input" for field in columns):
        names = next((names for names in INPUTS if key_of.keys() >= set(names)), ())
        in_parts = len(names) > 1 or names == ("question",)
        guessed |= {f"input.{PROMPT_NAMES.get(name, name)}" if in_parts else "input": key_of[name] for name in names}
    if "target" not in keys and "target" not in columns and not why_unclear(key_of):
        target = next((name for name in TARGETS if name in key_of), None)
        guessed |= {"target": key_of[target]} if target else {}
    return guessed


def columns_setting(columns: Mapping[str, str]) -> str:
    """Return the `data.columns` setting, quoted for a shell."""
    return f"data.columns={shlex.quote(json.dumps(dict(columns), ensure_ascii=False))}"


def why_unclear(keys: Collection[str]) -> str:
    """Return why the target cannot be guessed from column names; "" if it can."""
    if CHOICES & {*keys}:
        return "an answer beside choices may be the number of one: write each row with its text as the target"
    if {*keys} >= PREFERENCE:
        return "of preferences what was chosen can be learned, and what was rejected cannot"
    if {*keys} >= JUDGED:
        return "of judged completions the good ones can be learned: leave out the others, and say target=completion"
    return ""


def unknown_columns(name: str, records: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> DataError:
    """Return the error of a file whose input or target is unknown, with its columns and what to type.

    Args:
        columns: those that are known.
    """
    sample = list(records)[:100]
    keys = list(dict.fromkeys(key for record in sample for key in record))
    question = f"{name}: which columns are input and target? There are {', '.join(keys)}"
    if len(keys) < 2:
        folder = re.search(r"([^/]+)=[^/]*/[^/]*$", name)
        advice = f"; name the folder above {folder[0].split('/')[0]}, and {folder[1]} is one, too" if folder else ""
        return DataError(f"{question}; rows need two, such as text and label{advice}")
    unclear = why_unclear([key.strip().casefold() for key in keys])
    likely = {} if unclear else likely_columns(keys, sample, columns)
    setting = columns_setting(likely or {"input": "COLUMN", "target": "COLUMN"})
    pairs = ",".join(f"{field}={column}" for field, column in likely.items()) or "input=COLUMN,target=COLUMN"
    return DataError(
        f"{question}. {f'({unclear}) ' * bool(unclear)}Name them{', such as' if likely else ':'} {setting}, "
        f"or in `rayml data convert` --columns {shlex.quote(pairs)}"
    )


def likely_columns(
    keys: Sequence[str], records: Sequence[Mapping[str, Any]], columns: Mapping[str, str]
) -> dict[str, str]:
    """Return the input and the target, where the values leave no doubt; else nothing.

    Labels repeat, and are short; texts do not repeat, and have several words. A table's first row may have been taken
    for its heading: then a column's name is one of its labels, and columns are named by number.
    """
    values = {key: [str(record[key]) for record in records if record.get(key) not in (None, "")] for key in keys}
    plain = {
        key: texts
        for key, texts in values.items()
        if 2 * len(texts) > len(records)
        and not any(isinstance(record.get(key), list | dict | float) for record in records)
    }
    labels = [key for key, texts in plain.items() if 1 < len({*texts}) <= len(texts) / 2]
    long_texts = [
        key for key, texts in plain.items() if key not in labels and 2 * sum(map(looks_like_text, texts)) > len(texts)
    ]
    inputs = {field: column for field, column in columns.items() if field.split(".")[0] == "input"}
    inputs = inputs or ({"input": long_texts[0]} if len(long_texts) == 1 else {})
    labels = [key for key in labels if key not in inputs.values()]
    if len(labels) != 1 or not inputs:
        return {}
    found = inputs | {"target": labels[0]}
    if labels[0] in values[labels[0]]:
        return {field: str(keys.index(column)) for field, column in found.items()}
    return found


def looks_like_text(value: str) -> bool:
    return " " in value.strip() or not value.isascii()
