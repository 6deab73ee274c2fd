"""CoNLL: a token and its tag on each line, a blank line after each sentence. Tags are BIO, BIOES, BMES or BILOU."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rayml.tasks.formats.text import Records, join_tokens

TAG = re.compile(r"O|([BIESMLU])-(.+)")
STARTS, ENDS = "BSU", "ESLU"
NUMBER = re.compile(r"\d+([-.]\d+)?")
"""A token's number in CoNLL-U. `3-4` repeats tokens of other lines, and `3.1` is no token of the text."""
SUFFIXES = ".conll", ".conllu", ".bio", ".bmes", ".iob", ".iob2"
SAMPLE_LINES = 500


def split_columns(lines: Sequence[str]) -> list[list[str]]:
    """Return the columns of every line, none of a blank line. If there are tabs, they alone separate the columns."""
    has_tabs = any("\t" in line for line in lines)
    return [
        ([cell.strip(" ") for cell in line.split("\t")] if has_tabs else re.findall("[^ ]+", line))
        if line.strip()
        else []
        for line in lines
    ]


def find_columns(lines: Sequence[str], allow_all_o: bool = False) -> tuple[int, int, int] | None:
    """Return the number of columns, the token's and the tag's; None if no column holds tags.

    Args:
        allow_all_o: accept a column in which all tags are O.
    """
    rows = [
        cells for cells in split_columns(lines[:SAMPLE_LINES]) if cells and not cells[0].startswith(("-DOCSTART-", "#"))
    ]
    width = Counter(map(len, rows)).most_common(1)[0][0] if rows else 0
    for column in range(width - 1, 0, -1):
        tags = [cells[column] for cells in rows if len(cells) == width and TAG.fullmatch(cells[column])]
        if len(tags) > 0.9 * len(rows) and (allow_all_o or {*tags} != {"O"}):
            is_numbered = column > 1 and all(NUMBER.fullmatch(cells[0]) for cells in rows)
            return width, int(is_numbered), column
    return None


def read_sentences(
    lines: Sequence[str], name: str, token_column: int | None = None, tag_column: int | None = None
) -> Records:
    """Yield a record for each sentence, with its spans as the target.

    A tag that continues a span which was not begun begins one, as in conlleval. A line that begins with `#` is a
    comment, unless it is a token and a tag.

    Args:
        name: of the file.
        token_column: from 0; None to detect it.
        tag_column: from 0; None to detect it.
    """
    columns = find_columns(lines, allow_all_o=True)
    if not columns and tag_column is None:
        yield name, "has no column of tags such as O, B-PER and I-PER (BIO, BIOES, BMES, BILOU); write them so"
        return
    width, found_token, found_tag = columns or (0, 0, -1)
    token_column = found_token if token_column is None else token_column
    tag_column = found_tag if tag_column is None else tag_column
    sentence: list[tuple[str, str]] = []
    first_line = 1
    for number, (line, cells) in enumerate(zip([*lines, ""], split_columns([*lines, ""]), strict=True), 1):
        if not cells or cells[0] == "-DOCSTART-":
            if sentence:
                yield f"{name}:{first_line}", sentence_record(sentence)
            sentence, first_line = [], number + 1
            continue
        has_columns = len(cells) > max(token_column, tag_column, 1) and len(cells) in (width, width or len(cells))
        has_token = has_columns and bool(cells[token_column])
        if line.startswith("#") and not (has_token and TAG.fullmatch(cells[tag_column])):
            continue
        if not has_token:
            yield f"{name}:{number}", f"expected {width or 'two'} columns with a token and a tag, got {line[:60]!r}"
        elif not TAG.fullmatch(cells[tag_column]):
            yield f"{name}:{number}", f"expected a tag such as O, B-PER or I-PER, got {cells[tag_column][:40]!r}"
        elif not (token_column and re.fullmatch(r"\d+[-.]\d+", cells[0])):
            sentence.append((cells[token_column], cells[tag_column]))


def sentence_record(sentence: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the record of (token, tag) pairs."""
    spans = [{"text": join_tokens(tokens), "type": span_type} for span_type, tokens in spans_of(sentence)]
    return {"input": join_tokens([token for token, _ in sentence]), "target": spans, "kind": "ner"}


def spans_of(sentence: Sequence[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Yield the type and the tokens of every span of (token, tag) pairs."""
    span_type: str = ""
    tokens: list[str] = []
    for token, tag in [*sentence, ("", "O")]:
        mark, _, tag_type = tag.partition("-")
        if tokens and (mark in ("O", *STARTS) or tag_type != span_type):
            yield span_type, tokens
            span_type, tokens = "", []
        if mark != "O":
            span_type, tokens = tag_type, [*tokens, token]
        if tokens and mark in ENDS:
            yield span_type, tokens
            span_type, tokens = "", []
