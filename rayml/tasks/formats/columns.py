"""Tables as CSV and TSV: with a heading, or CrossFit's two columns without one. And fastText's labelled lines."""

import ast
import csv
import io
import re
from collections.abc import Mapping
from typing import Any

from rayml.tasks.formats.guess import KNOWN
from rayml.tasks.formats.text import Records, split_lines

CROSSFIT = re.compile(r"(?P<task>.+)_\d+_\d+_(train|dev|test)\.tsv")
DELIMITERS = ",;|"
LABEL = "__label__"
TEXT = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
TEXT_LIST = re.compile(rf"\[\s*(?:(?:{TEXT})(?:\s*,\s*(?:{TEXT}))*)?\s*\]")
"""A list of texts, as Python and JSON write it."""
csv.field_size_limit(1 << 30)
Table = list[tuple[int, list[str]]]
"""Rows, each with the number of the line, from 1, that it begins in."""


def is_fasttext(lines: list[str]) -> bool:
    return any(lines) and all(line.startswith(LABEL) for line in lines if line.strip())


def read_fasttext(lines: list[str], name: str) -> Records:
    """Yield the lines of fastText's training data (Joulin et al. 2017): labels, each after its mark, and the text.

    If any line has several labels, every target is a list.
    """
    rows = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        labels = [word.removeprefix(LABEL) for word in words if word.startswith(LABEL)]
        if words:
            rows.append((number, " ".join(word for word in words if not word.startswith(LABEL)), labels))
    is_multilabel = any(len(labels) > 1 for _, _, labels in rows)
    for number, text, labels in rows:
        if labels:
            yield f"{name}:{number}", {"input": text, "target": labels if is_multilabel else labels[0]}
        else:
            yield f"{name}:{number}", f"has no label; a label is a word that begins with {LABEL}"


def find_delimiter(text: str) -> str:
    """Return the delimiter of the first line: a tab if it has one."""
    heading = text.lstrip().split("\n", 1)[0]
    return "\t" if "\t" in heading else max(DELIMITERS, key=heading.count)


def read_cells(text: str) -> Table:
    """Return a table's cells. Those in quotes may hold line breaks.

    In a TSV a quote is usually plain text. It is read so if every line has all its cells, and quoting would join
    lines. Elsewhere quotes after a delimiter and spaces count, too.

    Raises:
        csv.Error: a quote does not end, or seems to be none; with the line that it is in.
    """
    delimiter = find_delimiter(text)
    plain = [(number, line.split(delimiter)) for number, line in enumerate(split_lines(text), 1) if line.strip()]
    try:
        quoted = read_quoted(text, delimiter)
    except csv.Error:
        if delimiter != "\t":
            raise
        return plain
    all_quoted = all(cell[:1] == cell[-1:] == '"' for cell in plain[0][1])  # the heading, by a writer that quotes all
    is_rectangular = len({len(row) for _, row in plain}) == 1
    if delimiter == "\t" and is_rectangular and not all_quoted and len(quoted) < len(plain):
        return plain
    if delimiter != "\t" and any(re.match(' +"', cell) for _, row in quoted for cell in row):
        quoted = read_quoted(text, delimiter, skipinitialspace=True)
    line = find_swallowed_rows(quoted, dict(plain))
    if line:
        raise csv.Error(f"{line}: its quote goes over lines that look like rows")
    return quoted


def find_swallowed_rows(quoted: Table, plain: Mapping[int, list[str]]) -> int:
    """Return the first line of a quoted row whose lines look like rows themselves; 0 if there is none.

    They do if each has as many cells, and in the last column (or the first) values that other rows have.
    """
    for column, inner in ((-1, slice(-1)), (0, slice(1, None))):
        known = {row[column] for number, row in quoted if plain.get(number) == row}
        for number, row in quoted:
            line_count = 1 + sum(cell.count("\n") for cell in row)
            if line_count == 1:
                continue
            lines = [plain.get(line, []) for line in range(number, number + line_count)]
            have_cells = all(len(cells) == len(row) > 1 for cells in lines)
            if have_cells and known.issuperset(cells[column] for cells in lines[inner]):
                return number
    return 0


def read_quoted(text: str, delimiter: str, skipinitialspace: bool = False) -> Table:
    lines = io.StringIO("\n".join(split_lines(text)), newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=skipinitialspace)
    rows: Table = []
    first_line = 1
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append((first_line, row))
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise csv.Error(f"{first_line}: no CSV: {error}") from None
    return rows


def has_heading(rows: Table, file_name: str, columns: Mapping[str, str]) -> bool:
    """Return whether a table's first line names its columns.

    It does, except in CrossFit's files, and where columns are asked for by number. In other .tsv files of two columns
    it does only if it looks unlike the rest: single words that do not occur again, above texts.
    """
    first = [cell.strip() for cell in rows[0][1]]
    if columns and not are_numbers(columns):
        return True
    if CROSSFIT.fullmatch(file_name):
        return False
    if KNOWN.intersection(cell.casefold() for cell in first) or first == [str(index) for index in range(len(first))]:
        return True
    if columns or not file_name.endswith(".tsv") or len(first) != 2:
        return not columns
    others = [row for _, row in rows[1:] if len(row) == 2]
    occurs_again = any(row[index].strip() == cell for row in others for index, cell in enumerate(first))
    texts = sum(" " in row[0].strip() for row in others)
    return not occurs_again and " " not in "".join(first) and 2 * texts > len(others)


def are_numbers(columns: Mapping[str, str]) -> bool:
    return bool(columns) and all(column.isdecimal() for column in columns.values())


def read_crossfit(rows: Table, file_name: str, name: str) -> Records:
    """Yield the rows `input<TAB>output` of one of CrossFit's files (Ye et al. 2021, arXiv 2104.08835).

    Args:
        file_name: holds the task's name.
        name: what errors call the file.
    """
    match = CROSSFIT.fullmatch(file_name)
    task = {"task": match["task"]} if match else {}
    for number, row in rows:
        if len(row) != 2:
            yield f"{name}:{number}", f"expected input<TAB>output, got {len(row)} columns"
        else:
            yield f"{name}:{number}", {**task, "input": row[0], "target": row[1]}


def read_table(rows: Table, name: str, columns: Mapping[str, str], headed: bool) -> Records:
    """Yield the rows of a table, with its cells by the names in its heading, or by number if columns are named so."""
    first_line, first = rows[0]
    numbers = [str(index) for index in range(len(first))]
    names = numbers
    if headed and not are_numbers(columns):
        names = [cell.strip() or number for cell, number in zip(first, numbers, strict=True)]
    repeated = {column for column in names if names.count(column) > 1}
    if repeated:
        yield f"{name}:{first_line}", f"has two columns {', '.join(repeated)}; name them by number: input=0,target=1"
        return
    if headed and len(first) == 1 and first[0].startswith("#"):
        yield f"{name}:{first_line}", "is a comment, and not the columns' names; leave it out"
        return
    whole = [row for _, row in rows[headed:] if len(row) == len(names)]
    lists = {
        column for column, *cells in zip(names, *whole, strict=True) if cells and all(map(TEXT_LIST.fullmatch, cells))
    }
    for number, row in rows[headed:]:
        if len(row) != len(names):
            yield f"{name}:{number}", f"has {len(row)} cells, where its first line has {len(names)}"
            continue
        pairs = zip(names, row, strict=True)
        yield f"{name}:{number}", {column: parse_list(cell) if column in lists else cell for column, cell in pairs}


def parse_list(cell: str) -> Any:
    """Return the list of texts in a cell, or the cell itself if Python cannot read it."""
    try:
        return ast.literal_eval(cell)
    except (SyntaxError, ValueError):
        return cell
