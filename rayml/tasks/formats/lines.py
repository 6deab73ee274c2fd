"""JSON a line: MetaICL's, conversations, and rows of one's own."""

import json
from collections.abc import Sequence
from typing import Any

from rayml.tasks.formats.text import Found

SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}


def format_of(record: dict[str, Any]) -> str:
    """Return the format of a JSONL file by the keys of its first line."""
    if "messages" in record:
        return "chat"
    if "conversations" in record:
        return "sharegpt"
    return "metaicl" if {"task", "input", "output"} <= record.keys() else "jsonl"


def read(lines: Sequence[str], name: str, format: str) -> Found:
    """Yield the rows of a JSONL file; those of `jsonl` as they are."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            yield f"{name}:{number}", f"not JSON: {error}"
            continue
        if not isinstance(record, dict):
            yield f"{name}:{number}", f"expected a JSON object, got {line[:40]!r}"
        elif format == "metaicl":
            yield f"{name}:{number}", metaicl(record)
        elif format in ("chat", "sharegpt"):
            yield f"{name}:{number}", dialogue(record, "messages" if format == "chat" else "conversations")
        else:
            yield f"{name}:{number}", record


def metaicl(record: dict[str, Any]) -> dict[str, Any]:
    """Return a row of MetaICL's data (Min et al. 2022, arXiv 2110.15943)."""
    row = {"task": record.get("task"), "input": record.get("input"), "target": record.get("output")}
    return row | ({"options": record["options"]} if record.get("options") else {})


def dialogue(record: dict[str, Any], key: str) -> dict[str, Any] | str:
    """Return the conversation up to the assistant's last turn: OpenAI's `role` and `content`, or `from` and `value`."""
    turns = record.get(key)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return f"{key!r} is not a list of turns"
    messages = []
    for turn in turns:
        role = turn.get("role", turn.get("from"))
        messages.append({"role": SPEAKERS.get(role, role), "content": turn.get("content", turn.get("value"))})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    named = {"task": record["task"]} if isinstance(record.get("task"), str) else {}
    return {**named, "messages": messages}
