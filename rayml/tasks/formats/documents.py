"""JSON files: an object or a pair on each line, a list of them, lists as columns, or one document, such as those of
Natural-Instructions, BIG-bench and SQuAD."""

import json
from collections.abc import Iterator
from typing import Any

from rayml.errors import DataError
from rayml.tasks.formats.guess import guess_columns
from rayml.tasks.formats.records import NO_ANSWER, LeftOut
from rayml.tasks.formats.text import Records, split_lines

ROW_KEYS = {"messages", "conversations", "input", "target", "text", "question", "sentence"}
"""Keys of a row; no document has them beside its list of items."""
SEPARATORS = " \t\r\n,"


class InvalidJSON(str):
    """The error message of a text that is not JSON, in place of an item."""


def refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's pairs as a dict.

    Raises:
        ValueError: two pairs have the same key.
    """
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} occurs twice in one object")
    return result


DECODER = json.JSONDecoder(object_pairs_hook=refuse_repeated_keys)


def find_layout(text: str, name: str, is_lines: bool) -> tuple[str, str]:
    """Return a JSON file's format, and the key of a document's list of items ("" if it is no document).

    Args:
        is_lines: the file's suffix says that it has an object on each line.

    Raises:
        DataError: it is not JSON, or its layout is unknown.
    """
    first_lines = [line for line in split_lines(text) if line.strip()][:2]
    first = parse_line(first_lines[0])
    if isinstance(first, dict) and (len(first_lines) > 1 or not (find_items(first) or column_rows(first))):
        return "jsonl", ""
    try:
        document = DECODER.decode(text)
    except ValueError as error:
        if getattr(error, "msg", "") == "Extra data":  # several objects, each over several lines
            return "json", ""
        if is_lines:
            return "jsonl", ""
        line = f":{getattr(error, 'lineno', 1)}"
        raise DataError(f"{name}{line}: not JSON: {error}; a row is an object, one a line") from None
    if isinstance(document, list):
        return "json", ""
    keys = ""
    if isinstance(document, dict):
        layout = find_items(document)
        if layout:
            return layout
        if column_rows(document):
            return "json-columns", ""
        if is_single_row(document) or not any(isinstance(value, dict | list) for value in document.values()):
            return "json", ""
        keys = f" with the keys {', '.join(map(str, document))[:200]}"
    raise DataError(
        f"{name}: JSON of no known format{keys}; write a list of rows: [{{'input': ..., 'target': ...}}], "
        "as pandas' df.to_json(orient='records') does"
    )


def find_items(document: dict[str, Any]) -> tuple[str, str] | None:
    """Return a document's format and the key of its list of items; None if it is no document."""
    if is_single_row(document):
        return None
    lists = {key: value for key, value in document.items() if isinstance(value, list)}
    if lists.get("train") and all(map(is_row, lists["train"])):  # a `datasets.DatasetDict`
        return "json", "train"
    for key in ("Instances", "Positive Examples"):
        if lists.get(key):
            return "natural-instructions", key
    if "examples" in lists:
        return "bigbench", "examples"
    objects = {key: items for key, items in lists.items() if items and all(isinstance(item, dict) for item in items)}
    if "data" in objects and any("paragraphs" in item for item in objects["data"]):
        return "squad", "data"
    if not objects and len(document) == 1:
        objects = {key: items for key, items in lists.items() if items and is_row(items[0])}
    return ("json", next(iter(objects))) if len(objects) == 1 else None


def is_single_row(document: dict[str, Any]) -> bool:
    """Return whether an object is a row itself, whatever lists it has: by its keys, or by an input and a target."""
    keys = [
        key
        for key, value in document.items()
        if not isinstance(value, dict) and value != [] and not is_list_of_dicts(value)
    ]
    guessed = {field.split(".")[0] for field in guess_columns(keys, {})}
    return bool(ROW_KEYS & document.keys() or {"input", "target"} <= guessed) and not column_rows(document)


def is_list_of_dicts(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def is_row(item: Any) -> bool:
    """Return whether an item is a row: an object, a pair `[input, target]` of texts or numbers, or spaCy's pair of a
    text and its marks."""
    is_pair = (
        isinstance(item, list | tuple) and len(item) == 2 and not any(isinstance(part, dict | list) for part in item)
    )
    return is_pair or isinstance(item, dict) or is_spacy_pair(item)


def is_spacy_pair(item: Any) -> bool:
    return isinstance(item, list | tuple) and [type(part) for part in item] == [str, dict] and "entities" in item[1]


def column_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of an object of columns, as pandas and `datasets` write it; none if it is something else.

    Each column is a list, or an object of index and value. Or the names are under `columns`, the rows under `data`.
    """
    names, data = document.get("columns"), document.get("data")
    if isinstance(names, list) and isinstance(data, list):
        is_table = all(isinstance(cells, list) and len(cells) == len(names) for cells in data)
        return [dict(zip(map(str, names), cells, strict=True)) for cells in data] if is_table else []
    columns = list(document.values())
    if len(columns) < 2 or not (all(isinstance(column, dict) for column in columns) or are_list_columns(document)):
        return []
    indices = [list(column) if isinstance(column, dict) else list(range(len(column))) for column in columns]
    if any(set(index) != set(indices[0]) for index in indices):
        return []
    return [{name: document[name][index] for name in document} for index in indices[0]]


def are_list_columns(document: dict[str, Any]) -> bool:
    """Return whether an object consists of lists that are not parts of one row, such as a dialogue or a sentence."""
    if not all(isinstance(cells, list) for cells in document.values()):
        return False
    first_cells = [cell for cells in document.values() for cell in cells[:1]]
    is_dialogue = "messages" in document or "conversations" in document
    is_dialogue = is_dialogue or any(isinstance(cell, dict) and "role" in cell for cell in first_cells)
    is_sentence = all(isinstance(token, str) for token in document.get("tokens", [None]))
    return not is_dialogue and not is_sentence


def read_lines(text: str, name: str) -> Records:
    """Yield the objects of a file with one on each line."""
    for number, line in enumerate(split_lines(text), 1):
        if line.strip():
            yield f"{name}:{number}", parse_line(line)


def parse_line(line: str) -> dict[str, Any] | str:
    try:
        return as_record(DECODER.decode(line.lstrip("\ufeff").strip()))  # concatenated files have marks within
    except ValueError as error:
        return f"not JSON: {error}"


def as_record(item: Any) -> dict[str, Any] | str:
    """Return the record of an item, or a message about what is wrong with it."""
    if is_spacy_pair(item):
        return {"text": item[0], **item[1]}
    if not isinstance(item, dict) and is_row(item):
        return {"input": item[0], "target": item[1]}
    return item if isinstance(item, dict) else f"expected a JSON object, got {json.dumps(item)[:40]!r}"


def read_items(text: str, name: str, key: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, item) of the list under a document's key; without a key, of all lists and objects in a row.

    The place is the line that an item begins in, which `json.loads` would not tell.
    """
    position, in_list = find_list(text, key) if key else 0, bool(key)
    line = 1 + text.count("\n", 0, position)
    while True:
        start, position = position, skip(text, position, SEPARATORS)
        line += text.count("\n", start, position)
        if position >= len(text) and not in_list:
            return
        if text[position : position + 1] == ("]" if in_list else "["):
            if key:
                return
            position, in_list = position + 1, not in_list
            continue
        try:
            item, end = DECODER.raw_decode(text, position)
        except ValueError as error:
            yield f"{name}:{line}", InvalidJSON(f"not JSON: {error}")
            return
        yield f"{name}:{line}", item
        line += text.count("\n", position, end)
        position = end


def find_list(text: str, key: str) -> int:
    """Return the position after the opening bracket of the list under a document's key."""
    position = skip(text, text.index("{") + 1, SEPARATORS)
    while True:
        found_key, position = DECODER.raw_decode(text, position)
        position = skip(text, position, " \t\r\n:")
        if found_key == key:
            return position + 1
        _, position = DECODER.raw_decode(text, position)
        position = skip(text, position, SEPARATORS)


def skip(text: str, position: int, characters: str) -> int:
    """Return the first position, from the given one on, without any of these characters."""
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def read_rows(text: str, name: str, key: str) -> Records:
    """Yield the objects of a list."""
    for where, item in read_items(text, name, key):
        yield where, item if isinstance(item, InvalidJSON) else as_record(item)


def read_columns(text: str, name: str, key: str) -> Records:
    """Yield the rows of an object of columns."""
    for number, row in enumerate(column_rows(DECODER.decode(text)), 1):
        yield f"{name}: row {number}", row


def read_natural_instructions(text: str, name: str, key: str) -> Records:
    """Yield a task's instances (Wang et al. 2022, arXiv 2204.07705). The target is the first of several outputs."""
    for where, item in read_items(text, name, key):
        output = item.get("output") if isinstance(item, dict) else None
        outputs = [output] if isinstance(output, str) else output
        if not isinstance(outputs, list) or not outputs or not all(isinstance(output, str) for output in outputs):
            yield where, "expected an instance with `input` and `output`, a text or a list of texts"
        else:
            row = {"input": item.get("input"), "target": outputs[0]}
            yield where, row | ({"answers": outputs[1:]} if len(set(outputs)) > 1 else {})


def read_bigbench(text: str, name: str, key: str) -> Records:
    """Yield a task's examples (Srivastava et al. 2022, arXiv 2206.04615). The target is the one with the best score."""
    for where, item in read_items(text, name, key):
        scores = item.get("target_scores") if isinstance(item, dict) else None
        target = item.get("target") if isinstance(item, dict) else None
        if isinstance(scores, dict) and scores and all(isinstance(score, int | float) for score in scores.values()):
            best = [option for option, score in scores.items() if score == max(scores.values())]
            row = {"input": item.get("input"), "target": best[0], "options": list(scores)}
            yield where, row if len(best) == 1 else LeftOut("several targets have the best score")
        elif isinstance(target, list) and target:
            yield where, {"input": item.get("input"), "target": target[0], "answers": target[1:]}
        elif isinstance(target, str):
            yield where, {"input": item.get("input"), "target": target}
        else:
            yield where, "expected an example with `input` and `target` or `target_scores`"


def read_squad(text: str, name: str, key: str) -> Records:
    """Yield the questions of a file in SQuAD's format (Rajpurkar et al. 2016). Those without an answer are left out."""
    for where, article in read_items(text, name, key):
        try:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    answers = list(dict.fromkeys(answer["text"] for answer in question["answers"]))
                    if not answers:
                        yield where, LeftOut(NO_ANSWER)
                        continue
                    parts = {"context": paragraph["context"], "question": question["question"]}
                    row = {"input": parts, "target": answers[0], "kind": "qa"}
                    yield where, row | ({"answers": answers[1:]} if answers[1:] else {})
        except (KeyError, TypeError) as error:
            yield where, f"expected paragraphs with context and qas: {type(error).__name__}: {error}"


READERS = {
    "natural-instructions": read_natural_instructions,
    "bigbench": read_bigbench,
    "squad": read_squad,
    "json": read_rows,
    "json-columns": read_columns,
}
