"""CoNLL: a token and its tag a line, a blank line behind every sentence. Tags are BIO, BIOES, BMES or BILOU."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rayml.tasks.formats.text import Found, joined

TAG = re.compile(r"O|([BIESMLU])-(.+)")
STARTS, ENDS = "BSU", "ESLU"
NUMBER = re.compile(r"\d+([-.]\d+)?")
"""Of a token in CoNLL-U; `3-4` and `3.1` are of what stands elsewhere, too, or nowhere."""
SUFFIXES = ".conll", ".conllu", ".bio", ".bmes", ".iob", ".iob2"
SEEN = 500


def split(lines: Sequence[str]) -> list[list[str]]:
    """Return the columns of every line: between tabs where there are any, since tokens may hold spaces; none of a blank
    line."""
    tabs = any("\t" in line for line in lines)
    return [
        ([cell.strip(" ") for cell in line.split("\t")] if tabs else re.findall("[^ ]+", line)) if line.strip() else []
        for line in lines
    ]


def layout(lines: Sequence[str], tagged: bool = False) -> tuple[int, int, int] | None:
    """Return the number of columns, and which are the token's and the tag's; None where no column holds tags alone.

    Args:
        tagged: believe it where all tags are O, too.
    """
    rows = [cells for cells in split(lines[:SEEN]) if cells and not cells[0].startswith(("-DOCSTART-", "#"))]
    width = Counter(map(len, rows)).most_common(1)[0][0] if rows else 0
    for tag in range(width - 1, 0, -1):
        tags = [cells[tag] for cells in rows if len(cells) == width and TAG.fullmatch(cells[tag])]
        if len(tags) > 0.9 * len(rows) and (tagged or {*tags} != {"O"}):
            return width, int(tag > 1 and all(NUMBER.fullmatch(cells[0]) for cells in rows)), tag
    return None


def read(lines: Sequence[str], name: str, token: int | None = None, tag: int | None = None) -> Found:
    """Yield a row for each sentence, its spans as the target.

    A tag that goes on with a span that was not begun begins it, as in conlleval. Lines that begin with `#`, and are no
    token and tag, are comments.

    Args:
        name: of the file.
        token: the token's column, from 0; else as it looks.
        tag: the tag's.
    """
    seen = layout(lines, tagged=True)
    if not seen and tag is None:
        yield name, "has no column of tags such as O, B-PER and I-PER (BIO, BIOES, BMES, BILOU); write them so"
        return
    width, seen_token, seen_tag = seen or (0, 0, -1)
    token, tag = seen_token if token is None else token, seen_tag if tag is None else tag
    sentence: list[tuple[str, str]] = []
    begins = 1
    for number, (line, cells) in enumerate(zip([*lines, ""], split([*lines, ""]), strict=True), 1):
        if not cells or cells[0] == "-DOCSTART-":
            if sentence:
                yield f"{name}:{begins}", row(sentence)
            sentence, begins = [], number + 1
            continue
        fits = len(cells) > max(token, tag, 1) and len(cells) in (width, width or len(cells)) and bool(cells[token])
        if line.startswith("#") and not (fits and TAG.fullmatch(cells[tag])):
            continue
        if not fits:
            yield f"{name}:{number}", f"expected {width or 'two'} columns with a token and a tag, got {line[:60]!r}"
        elif not TAG.fullmatch(cells[tag]):
            yield f"{name}:{number}", f"expected a tag such as O, B-PER or I-PER, got {cells[tag][:40]!r}"
        elif not (token and re.fullmatch(r"\d+[-.]\d+", cells[0])):
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
