"""JSON: an object or a pair a line, a list of them, lists side by side, or one document, such as Natural-Instructions,
BIG-bench and SQuAD."""

import json
from collections.abc import Iterator
from typing import Any

from rayml.errors import DataError
from rayml.tasks.formats.guess import guessed
from rayml.tasks.formats.records import NO_ANSWER, LeftOut
from rayml.tasks.formats.text import Found, lines

OF_ROWS = {"messages", "conversations", "input", "target", "text", "question", "sentence"}
"""Keys of a row, which no document has beside its items."""
BETWEEN = " \t\r\n,"


class NotJSON(str):
    """What is wrong with a text."""


def pairs_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's pairs as a dict.

    Raises:
        ValueError: a key stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=pairs_once)


def layout(text: str, name: str, is_lines: bool) -> tuple[str, str]:
    """Return how a JSON file is laid out, as a format, and the key of a document's items.

    Args:
        is_lines: it is named as one of an object a line.

    Raises:
        DataError: it is no JSON, or of no known layout.
    """
    some = [line for line in lines(text) if line.strip()][:2]
    first = parsed(some[0])
    if isinstance(first, dict) and (len(some) > 1 or not (key_of(first) or side_by_side(first))):
        return "jsonl", ""
    try:
        document = DECODER.decode(text)
    except ValueError as error:
        if getattr(error, "msg", "") == "Extra data":  # objects that go over several lines
            return "json", ""
        if is_lines:
            return "jsonl", ""
        line = f":{getattr(error, 'lineno', 1)}"
        raise DataError(f"{name}{line}: not JSON: {error}; a row is an object, one a line") from None
    if isinstance(document, list):
        return "json", ""
    found = key_of(document) if isinstance(document, dict) else None
    if found:
        return found
    if isinstance(document, dict) and side_by_side(document):
        return "json-columns", ""
    if isinstance(document, dict) and (
        is_one(document) or not any(isinstance(value, dict | list) for value in document.values())
    ):
        return "json", ""
    keys = f" with the keys {', '.join(map(str, document))[:200]}" if isinstance(document, dict) else ""
    raise DataError(
        f"{name}: JSON of no known format{keys}; write a list of rows: [{{'input': ..., 'target': ...}}], "
        "as pandas' df.to_json(orient='records') does"
    )


def key_of(document: dict[str, Any]) -> tuple[str, str] | None:
    """Return a document's format and the key of its items, or None for what is no document."""
    found = {key: value for key, value in document.items() if isinstance(value, list)}
    if is_one(document):
        return None
    if found.get("train") and all(is_row(one) for one in found["train"]):  # as of a `datasets.DatasetDict`
        return "json", "train"
    for key in ("Instances", "Positive Examples"):
        if found.get(key):
            return "natural-instructions", key
    rows = {key: value for key, value in found.items() if value and all(isinstance(one, dict) for one in value)}
    rows = rows or {key: value for key, value in found.items() if len(document) == 1 and value and is_row(value[0])}
    if "examples" in found:
        return "bigbench", "examples"
    if "data" in rows and any("paragraphs" in one for one in rows["data"]):
        return "squad", "data"
    return ("json", next(iter(rows))) if len(rows) == 1 else None


def is_one(document: dict[str, Any]) -> bool:
    """Return whether an object is a row itself, whatever lists it has: by its keys, or by an input and a target."""
    plain = [
        key for key, value in document.items() if not isinstance(value, dict) and value != [] and not of_dicts(value)
    ]
    guesses = {name.split(".")[0] for name in guessed(plain, {})}
    return bool(OF_ROWS & document.keys() or {"input", "target"} <= guesses) and not side_by_side(document)


def of_dicts(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(one, dict) for one in value)


def is_row(item: Any) -> bool:
    """Return whether something is a row as an object, as a pair `[input, target]` of texts and numbers, or as spaCy's
    pair of a text and what is marked in it."""
    is_pair = (
        isinstance(item, list | tuple) and len(item) == 2 and not any(isinstance(one, dict | list) for one in item)
    )
    return is_pair or isinstance(item, dict) or is_spacy(item)


def is_spacy(item: Any) -> bool:
    return isinstance(item, list | tuple) and [type(one) for one in item] == [str, dict] and "entities" in item[1]


def side_by_side(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of lists of one length, one a column, as pandas and `datasets` write them; none if it is no such.

    pandas has objects of index and value in place of lists, or the names under `columns` and the rows' cells in `data`.
    """
    names, data = document.get("columns"), document.get("data")
    if isinstance(names, list) and isinstance(data, list):
        is_table = all(isinstance(cells, list) and len(cells) == len(names) for cells in data)
        return [dict(zip(names, cells, strict=True)) for cells in data] if is_table else []
    values = list(document.values())
    if len(values) < 2 or not (all(isinstance(one, dict) for one in values) or is_lists(document)):
        return []
    indices = [list(one) if isinstance(one, dict) else list(range(len(one))) for one in values]
    if any(set(one) != set(indices[0]) for one in indices):
        return []
    return [{name: document[name][index] for name in document} for index in indices[0]]


def is_lists(document: dict[str, Any]) -> bool:
    """Return whether an object is lists, and none of them a part of one row: a dialogue, or a sentence and its tags."""
    if not all(isinstance(one, list) for one in document.values()) or document.keys() & {"messages", "conversations"}:
        return False
    cells = [cell for one in document.values() for cell in one[:1]]
    if any(isinstance(cell, dict) and "role" in cell for cell in cells):
        return False
    words = document.get("tokens", [None])
    return not all(isinstance(one, str) for one in words)


def objects(text: str, name: str) -> Found:
    """Yield the objects that stand one a line."""
    for number, line in enumerate(lines(text), 1):
        if line.strip():
            yield f"{name}:{number}", parsed(line)


def parsed(line: str) -> dict[str, Any] | str:
    try:
        record = DECODER.decode(line.lstrip("\ufeff").strip())  # files that were put together have marks within
    except ValueError as error:
        return f"not JSON: {error}"
    return record_of(record)


def record_of(item: Any) -> dict[str, Any] | str:
    """Return a row, or what is wrong with it."""
    if is_spacy(item):
        return {"text": item[0], **item[1]}
    if not isinstance(item, dict) and is_row(item):
        return {"input": item[0], "target": item[1]}
    return item if isinstance(item, dict) else f"expected a JSON object, got {json.dumps(item)[:40]!r}"


def items(text: str, name: str, key: str) -> Iterator[tuple[str, Any]]:
    """Yield (where, item) of the list under a document's key, or else of all lists and objects, one behind another.

    Where is the line that an item begins in.
    """
    position, is_inside = list_under(text, key) if key else 0, bool(key)
    line = 1 + text.count("\n", 0, position)
    while True:
        begin, position = position, behind(text, position, BETWEEN)
        line += text.count("\n", begin, position)
        if position >= len(text) and not is_inside:
            return
        if text[position : position + 1] == ("]" if is_inside else "["):
            if key:
                return
            position, is_inside = position + 1, not is_inside
            continue
        try:
            item, end = DECODER.raw_decode(text, position)
        except ValueError as error:
            yield f"{name}:{line}", NotJSON(f"not JSON: {error}")
            return
        yield f"{name}:{line}", item
        line += text.count("\n", position, end)
        position = end


def list_under(text: str, key: str) -> int:
    """Return where the list under a document's own key begins, behind its bracket."""
    position = behind(text, text.index("{") + 1, BETWEEN)
    while True:
        found, position = DECODER.raw_decode(text, position)
        position = behind(text, position, " \t\r\n:")
        if found == key:
            return position + 1
        _, position = DECODER.raw_decode(text, position)
        position = behind(text, position, BETWEEN)


def behind(text: str, position: int, characters: str) -> int:
    """Return the first position, from one on, that holds none of some characters."""
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def rows(text: str, name: str, key: str) -> Found:
    """Yield the objects of a list."""
    for where, item in items(text, name, key):
        yield where, item if isinstance(item, NotJSON) else record_of(item)


def columns(text: str, name: str, key: str) -> Found:
    """Yield the rows of lists side by side."""
    for number, row in enumerate(side_by_side(DECODER.decode(text)), 1):
        yield f"{name}: row {number}", row


def natural_instructions(text: str, name: str, key: str) -> Found:
    """Yield a task's instances (Wang et al. 2022, arXiv 2204.07705); of several outputs the first is the target."""
    for where, item in items(text, name, key):
        given = item.get("output") if isinstance(item, dict) else None
        outputs = [given] if isinstance(given, str) else given
        if not isinstance(outputs, list) or not outputs or not all(isinstance(one, str) for one in outputs):
            yield where, "expected an instance with `input` and `output`, a text or a list of texts"
        else:
            row = {"input": item.get("input"), "target": outputs[0]}
            yield where, row | ({"answers": outputs[1:]} if len(set(outputs)) > 1 else {})


def bigbench(text: str, name: str, key: str) -> Found:
    """Yield a task's examples (Srivastava et al. 2022, arXiv 2206.04615); of scored targets the best is the target."""
    for where, item in items(text, name, key):
        scored = item.get("target_scores") if isinstance(item, dict) else None
        target = item.get("target") if isinstance(item, dict) else None
        if isinstance(scored, dict) and scored and all(isinstance(score, int | float) for score in scored.values()):
            best = [option for option, score in scored.items() if score == max(scored.values())]
            row = {"input": item.get("input"), "target": best[0], "options": list(scored)}
            yield where, row if len(best) == 1 else LeftOut("several targets have the best score")
        elif isinstance(target, list) and target:
            yield where, {"input": item.get("input"), "target": target[0], "answers": target[1:]}
        elif isinstance(target, str):
            yield where, {"input": item.get("input"), "target": target}
        else:
            yield where, "expected an example with `input` and `target` or `target_scores`"


def squad(text: str, name: str, key: str) -> Found:
    """Yield the questions of a file as SQuAD has them (Rajpurkar et al. 2016); those without an answer are left out."""
    for where, article in items(text, name, key):
        try:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    answers = list(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                    if not answers:
                        yield where, LeftOut(NO_ANSWER)
                        continue
                    given = {"context": paragraph["context"], "question": asked["question"]}
                    row = {"input": given, "target": answers[0], "kind": "qa"}
                    yield where, row | ({"answers": answers[1:]} if answers[1:] else {})
        except (KeyError, TypeError) as error:
            yield where, f"expected paragraphs with context and qas: {type(error).__name__}: {error}"


READERS = {
    "natural-instructions": natural_instructions,
    "bigbench": bigbench,
    "squad": squad,
    "json": rows,
    "json-columns": columns,
}
