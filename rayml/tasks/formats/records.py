"""Records that are rows by another name: conversations, MetaICL's, Alpaca's, SQuAD's, tokens with their tags, and texts
with marked spans."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from rayml.tasks.formats.conll import TAG, row
from rayml.tasks.task import conversation as as_text

Record = dict[str, Any]
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
TAGS = "ner_tags", "tags"
MARKED = "entities", "spans", "labels", "label"
"""Under which annotation tools (doccano, Prodigy, spaCy) write what is marked in a text."""
DECISIONS = "accept", "reject", "ignore"
"""Of Prodigy's annotators."""
LABELS = "target", "label_text", "label", "labels", "gold_label", "class", "intent", "sentiment"
"""Beside a conversation: what it is about, as a whole."""
LETTERS = "ABCDEF"
"""Columns of what a question's answer is chosen among."""
NO_ANSWER = "without an answer"


class LeftOut(str):
    """Why a record is no row, and nothing is wrong with it."""


def chat(record: Record) -> Record | str:
    """Return OpenAI's `messages` up to the assistant's last turn."""
    return conversation(record, record.get("messages"), "role", "content")


def sharegpt(record: Record) -> Record | str:
    """Return ShareGPT's `conversations`, of `from` and `value`, as messages."""
    return conversation(record, record.get("conversations"), "from", "value")


def conversation(record: Record, turns: Any, who: str, what: str) -> Record | str:
    """Return a conversation as messages, with a `system` text beside it as its first; with a label, as the input."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return "expected a list of turns"
    messages = [
        {**turn, "role": turn.get(who, turn.get("role")), "content": turn.get(what, turn.get("content"))}
        for turn in turns
    ]
    for message in messages if who == "from" else ():
        message["role"] = SPEAKERS.get(message["role"], message["role"])
    system = record.get("system")
    if system and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})
    elif system and messages[0]["content"] != system:
        return "'system' is another than the system's turn; leave one of them"
    label = next((name for name in LABELS if record.get(name) is not None), None)
    if label:
        rest = {name: value for name, value in record.items() if name not in ("messages", "conversations", label)}
        return {**rest, "input": messages, "target": record[label]}
    while messages and messages[-1]["role"] in ("user", "human"):
        messages.pop()
    return {**record, "messages": messages}


def metaicl(record: Record) -> Record:
    """Return a row of MetaICL's data (Min et al. 2022, arXiv 2110.15943)."""
    return {**record, "target": record.get("output")}


def alpaca(record: Record) -> Record | str:
    """Return an instruction of Alpaca's with its input, or of Dolly's with its context, and what is to be written.

    Of what was said before it, and the system's turn, one text is made.
    """
    given = [record.get(name) for name in ("instruction", "input", "context")]
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        return "expected a history of pairs [instruction, output]"
    before = [(role, text) for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]
    system = [("system", record["system"])] if record.get("system") else []
    asked = "\n".join(str(text) for text in given if text)
    text = as_text([*system, *before, ("user", asked)]) if asked else ""
    return {**record, "input": text, "target": record.get("output", record.get("response"))}


def choices(record: Record) -> Record | str:
    """Return a question whose answer is the letter of one of its columns, or what stands in it."""
    given = {name: str(record[name]) for name in LETTERS if record.get(name) not in (None, "")}
    answer = str(record.get("answer")).strip()
    text = given.get(answer.upper(), answer)
    if text not in given.values():
        return f"expected an answer among {', '.join(given)}, got {answer[:40]!r}"
    return {**record, "input": record.get("question"), "target": text, "options": list(given.values())}


def squad(record: Record) -> Record | str:
    """Return a question of SQuAD's as Hugging Face lays it out; those without an answer are left out."""
    answers = record.get("answers")
    texts = answers.get("text") if isinstance(answers, dict) else None
    if not isinstance(texts, list):
        return "expected answers {'text': [...]}"
    texts = list(dict.fromkeys(texts))
    given = {"context": record.get("context"), "question": record.get("question")}
    if not texts:
        return LeftOut(NO_ANSWER)
    return {**record, "input": given, "target": texts[0], "answers": texts[1:], "kind": "qa"}


def tokens(record: Record) -> Record | str:
    """Return a sentence of tokens, and the spans that their tags mark."""
    words, tags = record.get("tokens"), next((record[key] for key in TAGS if key in record), None)
    if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags):
        return "expected as many tags as tokens"
    if not all(isinstance(word, str) for word in words):
        return "its tokens are not text"
    if not all(isinstance(tag, str) and TAG.fullmatch(tag) for tag in tags):
        return f"expected tags such as O, B-PER or I-PER, got {tags[:4]}"
    return {**record, **row(list(zip(words, tags, strict=True)))}


def marked(record: Record) -> Record | str:
    """Return a text, and the spans of it that are marked by their first character and the one behind their last."""
    text, key = record.get("text"), next((key for key in MARKED if is_marked(record.get(key))), None)
    marks = [mark for mark in map(mark_of, record[key] if key else []) if mark]
    if not isinstance(text, str):
        return "'text' is not text"
    if not all(0 <= first < end <= len(text) for first, end, _ in marks):
        return f"a span of {key} does not lie within its text of {len(text)} characters"
    rest = {name: value for name, value in record.items() if name not in MARKED}
    spans = [{"text": text[first:end], "type": kind} for first, end, kind in sorted(marks)]
    return {**rest, "input": text, "target": spans, "kind": "ner"}


def prodigy(record: Record) -> Record | str:
    """Return what an annotator accepted of one of Prodigy's tasks; what was rejected or ignored is left out."""
    if record.get("answer", "accept") != "accept":
        return LeftOut("not accepted in Prodigy")
    if "spans" in record:
        return marked(record)
    picked = record.get("accept")
    if isinstance(picked, list):
        several = (record.get("config") or {}).get("choice_style") == "multiple"
        label: Any = picked if several or len(picked) != 1 else picked[0]
    else:
        label = record.get("label")
    rest = {name: value for name, value in record.items() if name not in ("options", "answer", "label")}
    return {**rest, "input": record.get("text"), "target": label}


def is_decided(record: Any) -> bool:
    return isinstance(record, dict) and record.get("answer") in DECISIONS


def is_marked(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(mark_of(one) for one in value)


def mark_of(one: Any) -> tuple[int, int, str] | None:
    """Return where a span begins and ends, and its type; None for what is none."""
    if isinstance(one, dict):
        one = [one.get("start", one.get("start_offset")), one.get("end", one.get("end_offset")), one.get("label")]
    is_one = isinstance(one, list | tuple) and [type(part) for part in one[:3]] == [int, int, str]
    return (one[0], one[1], one[2]) if is_one else None


READERS: dict[str, Callable[[Record], Record | str]] = {
    "chat": chat,
    "sharegpt": sharegpt,
    "metaicl": metaicl,
    "alpaca": alpaca,
    "dolly": alpaca,
    "choices": choices,
    "squad-rows": squad,
    "tokens": tokens,
    "marked": marked,
    "prodigy": prodigy,
}
NEEDED = {
    "chat": {"messages"},
    "sharegpt": {"conversations"},
    "metaicl": {"task", "input", "output"},
    "alpaca": {"instruction", "output"},
    "dolly": {"instruction", "context", "response"},
    "choices": {"question", "A", "B", "answer"},
    "squad-rows": {"context", "question", "answers"},
}
"""The keys that tell a format."""
MORE = {
    "chat": {"system", *LABELS},
    "sharegpt": {"system", *LABELS},
    "alpaca": {"input", "context", "system", "history"},
    "dolly": {"system", "history"},
    "choices": {*LETTERS},
    "tokens": {"tokens", *TAGS},
    "marked": {"text", *MARKED},
    "prodigy": {"text", "answer", "accept", "options", "config", *MARKED},
}
"""Others that it takes."""


def format_of(keys: Collection[str], records: Sequence[Any]) -> str:
    """Return which of these records with such keys are; "" for rows of one's own."""
    if {"text", "answer"} <= set(keys) and records and all(map(is_decided, records)):
        return "prodigy"
    for name in ("chat", "sharegpt"):
        if records and all(NEEDED[name] <= record.keys() for record in records) and "input" not in keys:
            return name
    if "target" in keys:
        return ""
    if any(is_marked(one.get(key)) for one in records for key in MARKED if "text" in keys):
        return "marked"
    needed = NEEDED | {"tokens": {"tokens", next((key for key in TAGS if key in keys), TAGS[0])}}
    return next((name for name, names in needed.items() if names <= set(keys)), "")
