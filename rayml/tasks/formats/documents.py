"""Whole JSON files: Natural-Instructions, BIG-bench and SQuAD."""

import json
import re
from collections.abc import Iterator
from typing import Any

from rayml.tasks.formats.text import Found


def format_of(document: Any) -> str | None:
    """Return the format of a parsed JSON file by its keys; None, if it is none of these."""
    if not isinstance(document, dict):
        return None
    if "Instances" in document or "Positive Examples" in document:
        return "natural-instructions"
    if isinstance(document.get("examples"), list):
        return "bigbench"
    return "squad" if isinstance(document.get("data"), list) else None


def items(text: str, name: str, key: str) -> Iterator[tuple[str, Any]]:
    """Yield (where, item) of the list under a key; where is the line on which the item begins."""
    match = re.search(rf'(?<!\\)"{key}"\s*:\s*\[', text)
    assert match, "format_of found it"
    decoder, position = json.JSONDecoder(), match.end()
    line = 1 + text.count("\n", 0, position)
    while True:
        begin = position
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        line += text.count("\n", begin, position)
        if position >= len(text) or text[position] == "]":
            return
        item, end = decoder.raw_decode(text, position)
        yield f"{name}:{line}", item
        line += text.count("\n", position, end)
        position = end


def natural_instructions(text: str, name: str, task: str) -> Found:
    """Yield a task's instances (Wang et al. 2022, arXiv 2204.07705); of several outputs the first is the target."""
    found = json.loads(text)
    key = "Instances" if found.get("Instances") else "Positive Examples"
    for where, item in items(text, name, key):
        given = item.get("output") if isinstance(item, dict) else None
        outputs = [given] if isinstance(given, str) else given
        if not isinstance(outputs, list) or not outputs or not all(isinstance(one, str) for one in outputs):
            yield where, "expected an instance with `input` and `output`, a text or a list of texts"
        else:
            row = {"task": task, "input": item.get("input"), "target": outputs[0]}
            yield where, row | ({"answers": outputs[1:]} if len(set(outputs)) > 1 else {})


def bigbench(text: str, name: str, task: str) -> Found:
    """Yield a task's examples (Srivastava et al. 2022, arXiv 2206.04615); of scored targets the best is the target."""
    for where, item in items(text, name, "examples"):
        scored = item.get("target_scores") if isinstance(item, dict) else None
        target = item.get("target") if isinstance(item, dict) else None
        if isinstance(scored, dict) and scored and all(isinstance(score, int | float) for score in scored.values()):
            best = max(scored, key=lambda option: scored[option])
            yield where, {"task": task, "input": item.get("input"), "target": best, "options": list(scored)}
        elif isinstance(target, list) and target:
            yield where, {"task": task, "input": item.get("input"), "target": target[0], "answers": target[1:]}
        elif isinstance(target, str):
            yield where, {"task": task, "input": item.get("input"), "target": target}
        else:
            yield where, "expected an example with `input` and `target` or `target_scores`"


def squad(text: str, name: str, task: str) -> Found:
    """Yield the questions of a file as SQuAD has them (Rajpurkar et al. 2016); those without an answer are left out."""
    for where, article in items(text, name, "data"):
        try:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    answers = list(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                    if answers:
                        given = {"context": paragraph["context"], "question": asked["question"]}
                        row = {"task": task, "input": given, "target": answers[0], "kind": "qa"}
                        yield where, row | ({"answers": answers[1:]} if answers[1:] else {})
        except (KeyError, TypeError) as error:
            yield where, f"expected paragraphs with context and qas: {type(error).__name__}: {error}"
