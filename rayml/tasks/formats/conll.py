"""CoNLL: a token and its tag a line, a blank line behind every sentence. Tags are BIO, BIOES, BMES or BILOU."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rayml.tasks.formats.text import Found, joined

TAG = re.compile(r"O|([BIESMLU])-(\S+)")
STARTS, ENDS = "BSU", "ESLU"


def sniff(lines: Sequence[str]) -> bool:
    """Return whether nearly all of the first lines end with a tag."""
    some = [line.split() for line in lines[:200] if line.strip() and not line.startswith("-DOCSTART-")]
    tagged = sum(len(cells) > 1 and bool(TAG.fullmatch(cells[-1])) for cells in some)
    return len(some) > 0 and tagged > 0.9 * len(some)


def read(lines: Sequence[str], name: str, token: int = 0, tag: int = -1) -> Found:
    """Yield a row for each sentence, its spans as the target.

    A tag that goes on with a span that was not begun begins it, as in conlleval.

    Args:
        name: of the file.
        token: the token's column, from 0.
        tag: the tag's.
    """
    sentence: list[tuple[str, str]] = []
    begins = 1
    for number, line in enumerate([*lines, ""], 1):
        cells = line.split()
        if not cells or cells[0] == "-DOCSTART-":
            if sentence:
                yield f"{name}:{begins}", row(sentence)
            sentence, begins = [], number + 1
            continue
        if max(token, tag) >= len(cells) or len(cells) < 2:
            yield f"{name}:{number}", f"expected a token and a tag, got {line[:60]!r}"
        elif not TAG.fullmatch(cells[tag]):
            yield f"{name}:{number}", f"expected a tag such as O, B-PER or I-PER, got {cells[tag][:40]!r}"
        else:
            sentence.append((cells[token], cells[tag]))


def row(sentence: Sequence[tuple[str, str]]) -> dict[str, Any]:
    spans = [{"text": joined(tokens), "type": kind} for kind, tokens in spans_of(sentence)]
    return {"input": joined([token for token, _ in sentence]), "target": spans, "kind": "ner"}


def spans_of(sentence: Sequence[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Yield the type and the tokens of every span of (token, tag) pairs."""
    kind: str = ""
    tokens: list[str] = []
    for token, tag in [*sentence, ("", "O")]:
        mark, _, of = tag.partition("-")
        if tokens and (mark in ("O", *STARTS) or of != kind):
            yield kind, tokens
            kind, tokens = "", []
        if mark != "O":
            kind, tokens = of, [*tokens, token]
        if tokens and mark in ENDS:
            yield kind, tokens
            kind, tokens = "", []
