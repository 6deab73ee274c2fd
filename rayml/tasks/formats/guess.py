"""Which columns are the input and the target, where nobody said: the usual names, and how to say it."""

import json
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from rayml.errors import DataError


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


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
TEXTS = words(
    "input text sentence question prompt instruction utterance query review comment tweet document article content "
    "message headline title source src"
)
TARGETS = words(
    "target label_text label labels answer answers completion response output intent category class sentiment "
    "gold_label gold summary highlights translation tgt emotion polarity topic tag tags"
)
INPUTS = (*PARTS, *((text,) for text in TEXTS))
CALLED = {"passage": "context"}
"""Parts that prompts know by another name."""
CHOICES = {"choices", "endings", "choice1", "options"}
"""Beside them an answer is a number of one of them."""
PREFERRED = {"chosen", "rejected"}
JUDGED = {"prompt", "completion", "label"}
"""Of preferences, of which nobody can tell what is to be learned."""
KNOWN = {*TEXTS, *TARGETS, *(name for parts in PARTS for name in parts), "task", "messages"}


def guessed(keys: Collection[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Return which of a record's columns stand for what its rows lack, as `data.columns` has it; nothing for no guess.

    >>> guessed(["id", "Text", "label"], {})
    {'input': 'Text', 'target': 'label'}
    """
    own = {key.strip().casefold(): key for key in reversed([*keys])} | {key: key for key in keys}  # exact names win
    found: dict[str, str] = {}
    if "input" not in keys and not any(name.split(".")[0] == "input" for name in columns):
        names = next((names for names in INPUTS if own.keys() >= set(names)), ())
        in_parts = len(names) > 1 or names == ("question",)
        found |= {f"input.{CALLED.get(name, name)}" if in_parts else "input": own[name] for name in names}
    if "target" not in keys and "target" not in columns and not why_unclear(own):
        target = next((name for name in TARGETS if name in own), None)
        found |= {"target": own[target]} if target else {}
    return found


def setting(columns: Mapping[str, str]) -> str:
    return f"data.columns={shlex.quote(json.dumps(dict(columns), ensure_ascii=False))}"


def why_unclear(keys: Collection[str]) -> str:
    """Return why no column can be taken for the target by its name; "" where one can."""
    if CHOICES & {*keys}:
        return "an answer beside choices may be the number of one: write each row with its text as the target"
    if {*keys} >= PREFERRED:
        return "of preferences what was chosen can be learned, and what was rejected cannot"
    if {*keys} >= JUDGED:
        return "of judged completions the good ones can be learned: leave out the others, and say target=completion"
    return ""


def unknown(name: str, records: Iterable[Mapping[str, Any]], taken: Mapping[str, str]) -> DataError:
    """Return the error of a file whose columns nobody can tell, with what is there and what to type.

    Args:
        taken: what is known of its columns.
    """
    some = list(records)[:100]
    keys = list(dict.fromkeys(key for record in some for key in record))
    there = f"{name}: which columns are input and target? There are {', '.join(keys)}"
    if len(keys) < 2:
        folder = re.search(r"([^/]+)=[^/]*/[^/]*$", name)
        above = f"; name the folder above {folder[0].split('/')[0]}, and {folder[1]} is one, too" if folder else ""
        return DataError(f"{there}; rows need two, such as text and label{above}")
    unclear = why_unclear([key.strip().casefold() for key in keys])
    columns = {} if unclear else likely(keys, some, taken)
    such = f", such as {setting(columns)}" if columns else f": {setting({'input': 'COLUMN', 'target': 'COLUMN'})}"
    pairs = ",".join(f"{name}={own}" for name, own in columns.items()) or "input=COLUMN,target=COLUMN"
    return DataError(
        f"{there}. {f'({unclear}) ' * bool(unclear)}Say it{such}, or in `rayml data convert` --columns "
        f"{shlex.quote(pairs)}"
    )


def likely(keys: Sequence[str], records: Sequence[Mapping[str, Any]], taken: Mapping[str, str]) -> dict[str, str]:
    """Return which columns are the input and the target, where their values leave no doubt, else nothing.

    A label comes back, and is short; a text does not, and has several words. The heading of a table may be its first
    row: then columns are named by their number.
    """
    values = {key: [str(one[key]) for one in records if one.get(key) not in (None, "")] for key in keys}
    plain = {
        key: found
        for key, found in values.items()
        if 2 * len(found) > len(records) and not any(isinstance(one.get(key), list | dict | float) for one in records)
    }
    labels = [key for key, found in plain.items() if 1 < len({*found}) <= len(found) / 2]
    texts = [key for key, found in plain.items() if key not in labels and 2 * sum(map(is_text, found)) > len(found)]
    inputs = {name: own for name, own in taken.items() if name.split(".")[0] == "input"}
    inputs = inputs or ({"input": texts[0]} if len(texts) == 1 else {})
    labels = [key for key in labels if key not in inputs.values()]
    if len(labels) != 1 or not inputs:
        return {}
    if labels[0] in values[labels[0]]:
        return {name: str(keys.index(own)) for name, own in (inputs | {"target": labels[0]}).items()}
    return inputs | {"target": labels[0]}


def is_text(value: str) -> bool:
    return " " in value.strip() or not value.isascii()
