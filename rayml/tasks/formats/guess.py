"""Which columns are the input and the target, where nobody said: the usual names, and how to say it."""

import json
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
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
CHOICES = {"choices", "endings", "choice1", "options"}
"""Beside them an answer is a number of one of them."""
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
        found |= {f"input.{name}" if in_parts else "input": own[name] for name in names}
    if "target" not in keys and "target" not in columns and not CHOICES & own.keys():
        target = next((name for name in TARGETS if name in own), None)
        found |= {"target": own[target]} if target else {}
    return found


def setting(columns: Mapping[str, str]) -> str:
    return f"data.columns={shlex.quote(json.dumps(dict(columns), ensure_ascii=False))}"


def unknown(name: str, records: Iterable[Mapping[str, Any]]) -> DataError:
    """Return the error of a file whose columns nobody can tell, with what is there and what to type."""
    some = list(records)[:100]
    keys = list(dict.fromkeys(key for record in some for key in record))
    there = f"{name}: which columns are input and target? There are {', '.join(keys)}"
    if len(keys) < 2:
        folder = re.search(r"([^/]+)=[^/]*/[^/]*$", name)
        above = f"; name the folder above {folder[0].split('/')[0]}, and {folder[1]} is one, too" if folder else ""
        return DataError(f"{there}; rows need two, such as text and label{above}")
    text = max(keys, key=lambda key: sum(len(str(record.get(key, ""))) for record in some))
    others = [key for key in keys if key != text]
    label = min(others, key=lambda key: len({str(record.get(key)) for record in some}))
    columns = {"input": text, "target": label}
    pairs = shlex.quote(",".join(f"{name}={own}" for name, own in columns.items()))
    return DataError(f"{there}. Say it, such as {setting(columns)}, or in `rayml data convert` --columns {pairs}")
