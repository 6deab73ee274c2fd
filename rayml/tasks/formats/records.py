"""Records that are rows in another form: conversations, MetaICL's, Alpaca's, SQuAD's, tokens with their tags, and texts
with marked spans."""

from collections.abc import Callable, Collection, Sequence, Set
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from rayml.tasks.formats.conll import TAG, sentence_record
from rayml.tasks.task import format_conversation as as_text

Record = dict[str, Any]
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
TAGS = "ner_tags", "tags"
MARKS = "entities", "spans", "labels", "label"
"""Where annotation tools (doccano, Prodigy, spaCy) write the spans that are marked in a text."""
PRODIGY_ANSWERS = "accept", "reject", "ignore"
LABELS = "target", "label_text", "label", "labels", "gold_label", "class", "intent", "sentiment"
"""The label of a whole conversation."""
LETTERS = "ABCDEF"
"""Columns of the choices of a question."""
NO_ANSWER = "without an answer"


class LeftOut(str):
    """The reason why a record gives no row, although nothing is wrong with it."""


def read_conversation(record: Record, key: str, role_key: str, text_key: str) -> Record | str:
    """Return a conversation as messages up to the assistant's last turn, with a `system` text beside it as the first.

    If the record has a label, the whole conversation is the input.
    """
    turns = record.get(key)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return "expected a list of turns"
    messages = [
        {**turn, "role": turn.get(role_key, turn.get("role")), "content": turn.get(text_key, turn.get("content"))}
        for turn in turns
    ]
    for message in messages if role_key == "from" else ():
        message["role"] = SPEAKERS.get(message["role"], message["role"])
    system = record.get("system")
    if system and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})
    elif system and messages[0]["content"] != system:
        return "'system' is another than the system's turn; leave one of them"
    label = next((key for key in LABELS if record.get(key) is not None), None)
    if label:
        rest = {key: value for key, value in record.items() if key not in ("messages", "conversations", label)}
        return {**rest, "input": messages, "target": record[label]}
    while messages and messages[-1]["role"] in ("user", "human"):
        messages.pop()
    return {**record, "messages": messages}


read_chat = partial(read_conversation, key="messages", role_key="role", text_key="content")
read_sharegpt = partial(read_conversation, key="conversations", role_key="from", text_key="value")


def read_metaicl(record: Record) -> Record:
    """Return a row of MetaICL's data (Min et al. 2022, arXiv 2110.15943)."""
    return {**record, "target": record.get("output")}


def read_alpaca(record: Record) -> Record | str:
    """Return an instruction of Alpaca's with its input, or of Dolly's with its context, and the response.

    The system's turn and the history become part of the input's text.
    """
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        return "expected a history of pairs [instruction, output]"
    turns = [(role, text) for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]
    system = [("system", record["system"])] if record.get("system") else []
    texts = [record.get(key) for key in ("instruction", "input", "context")]
    question = "\n".join(str(text) for text in texts if text)
    text = as_text([*system, *turns, ("user", question)]) if question else ""
    return {**record, "input": text, "target": record.get("output", record.get("response"))}


def read_choices(record: Record) -> Record | str:
    """Return a question whose answer is the letter of one of its columns, or the text in it."""
    choices = {letter: str(record[letter]) for letter in LETTERS if record.get(letter) not in (None, "")}
    answer = str(record.get("answer")).strip()
    text = choices.get(answer.upper(), answer)
    if text not in choices.values():
        return f"expected an answer among {', '.join(choices)}, got {answer[:40]!r}"
    return {**record, "input": record.get("question"), "target": text, "options": list(choices.values())}


def read_squad(record: Record) -> Record | str:
    """Return a question of SQuAD's in Hugging Face's layout. Those without an answer are left out."""
    answers = record.get("answers")
    texts = answers.get("text") if isinstance(answers, dict) else None
    if not isinstance(texts, list):
        return "expected answers {'text': [...]}"
    if not texts:
        return LeftOut(NO_ANSWER)
    texts = list(dict.fromkeys(texts))
    parts = {"context": record.get("context"), "question": record.get("question")}
    return {**record, "input": parts, "target": texts[0], "answers": texts[1:], "kind": "qa"}


def read_tokens(record: Record) -> Record | str:
    """Return a sentence of tokens, with the spans that their tags mark."""
    tokens, tags = record.get("tokens"), next((record[key] for key in TAGS if key in record), None)
    if not isinstance(tokens, list) or not isinstance(tags, list) or len(tokens) != len(tags):
        return "expected as many tags as tokens"
    if not all(isinstance(token, str) for token in tokens):
        return "its tokens are not text"
    if not all(isinstance(tag, str) and TAG.fullmatch(tag) for tag in tags):
        return f"expected tags such as O, B-PER or I-PER, got {tags[:4]}"
    return {**record, **sentence_record(list(zip(tokens, tags, strict=True)))}


def read_marked(record: Record) -> Record | str:
    """Return a text with its marked spans, each given by its first character and the one after its last."""
    text, key = record.get("text"), next((key for key in MARKS if has_marks(record.get(key))), None)
    marks = [mark for mark in map(parse_mark, record[key] if key else []) if mark]
    if not isinstance(text, str):
        return "'text' is not text"
    lists = [] if key else [value for value in map(record.get, MARKS) if isinstance(value, list)]
    unknown = [mark for mark in chain(*lists) if isinstance(mark, dict | list) and not parse_mark(mark)]
    if unknown:
        return f"a span has a start, an end and a label, got {str(unknown[0])[:60]}"
    if not all(0 <= start < end <= len(text) for start, end, _ in marks):
        return f"a span of {key} does not lie within its text of {len(text)} characters"
    rest = {key: value for key, value in record.items() if key not in MARKS}
    spans = [{"text": text[start:end], "type": span_type} for start, end, span_type in sorted(marks)]
    return {**rest, "input": text, "target": spans, "kind": "ner"}


def read_prodigy(record: Record) -> Record | str:
    """Return the accepted annotation of one of Prodigy's tasks. Rejected and ignored ones are left out."""
    if record.get("answer", "accept") != "accept":
        return LeftOut("not accepted in Prodigy")
    if "spans" in record:
        return read_marked(record)
    label: Any = record.get("label")
    accepted = record.get("accept")
    if isinstance(accepted, list):
        is_multiple = (record.get("config") or {}).get("choice_style") == "multiple"
        label = accepted if is_multiple or len(accepted) != 1 else accepted[0]
    rest = {key: value for key, value in record.items() if key not in ("options", "answer", "label")}
    return {**rest, "input": record.get("text"), "target": label}


def has_marks(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(parse_mark, value))


def parse_mark(mark: Any) -> tuple[int, int, str] | None:
    """Return a marked span's start, end and type; None if it is none."""
    if isinstance(mark, dict):
        start, end = mark.get("start", mark.get("start_offset")), mark.get("end", mark.get("end_offset"))
        mark = [start, end, mark.get("label")]
    is_mark = isinstance(mark, list | tuple) and [type(part) for part in mark[:3]] == [int, int, str]
    return (mark[0], mark[1], mark[2]) if is_mark else None


class RecordFormat(NamedTuple):
    """How records of one format are recognised and read."""

    read: Callable[[Record], Record | str]
    """Returns the row, or a message about what is wrong with the record."""
    required: Set[str] = frozenset()
    """The keys by which the format is recognised; none if `find_format` recognises it otherwise."""
    optional: Set[str] = frozenset()
    """Other keys that are used."""


FORMATS = {
    "chat": RecordFormat(read_chat, {"messages"}, {"system", *LABELS}),
    "sharegpt": RecordFormat(read_sharegpt, {"conversations"}, {"system", *LABELS}),
    "metaicl": RecordFormat(read_metaicl, {"task", "input", "output"}),
    "alpaca": RecordFormat(read_alpaca, {"instruction", "output"}, {"input", "context", "system", "history"}),
    "dolly": RecordFormat(read_alpaca, {"instruction", "context", "response"}, {"system", "history"}),
    "choices": RecordFormat(read_choices, {"question", "A", "B", "answer"}, {*LETTERS}),
    "squad-rows": RecordFormat(read_squad, {"context", "question", "answers"}),
    "tokens": RecordFormat(read_tokens, optional={"tokens", *TAGS}),
    "marked": RecordFormat(read_marked, optional={"text", *MARKS}),
    "prodigy": RecordFormat(read_prodigy, optional={"text", "answer", "accept", "options", "config", *MARKS}),
}


def find_format(keys: Collection[str], records: Sequence[Record]) -> str:
    """Return the format of records that have these keys; "" if they are rows already."""
    keys = set(keys)
    is_prodigy = {"text", "answer"} <= keys and records
    if is_prodigy and all(record.get("answer") in PRODIGY_ANSWERS for record in records):
        return "prodigy"
    for name in ("chat", "sharegpt"):
        if records and all(FORMATS[name].required <= record.keys() for record in records) and "input" not in keys:
            return name
    if "target" in keys:
        return ""
    if "text" in keys and any(has_marks(record.get(key)) for record in records for key in MARKS):
        return "marked"
    for name, record_format in FORMATS.items():
        if record_format.required and record_format.required <= keys:
            return name
    return "tokens" if "tokens" in keys and not keys.isdisjoint(TAGS) else ""
