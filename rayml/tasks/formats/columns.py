"""CSV and TSV: with a heading and a mapping of its columns, or CrossFit's two columns without one; fastText's lines."""

import ast
import csv
import io
import re
from collections.abc import Mapping
from typing import Any

from rayml.tasks.formats.guess import KNOWN
from rayml.tasks.formats.text import Found, lines

CROSSFIT = re.compile(r"(?P<task>.+)_\d+_\d+_(train|dev|test)\.tsv")
DELIMITERS = ",;|"
LABEL = "__label__"
TEXT = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
LIST = re.compile(rf"\[\s*(?:(?:{TEXT})(?:\s*,\s*(?:{TEXT}))*)?\s*\]")
"""Of texts, as Python and JSON write it."""
csv.field_size_limit(1 << 30)
Table = list[tuple[int, list[str]]]
"""Rows with the numbers of the lines, from 1, that they begin in."""


def is_fasttext(split: list[str]) -> bool:
    return any(split) and all(line.startswith(LABEL) for line in split if line.strip())


def fasttext(split: list[str], name: str) -> Found:
    """Yield the lines of fastText's training data (Joulin et al. 2017): labels, each behind its mark, and the text.

    Where a line has several labels, each has a list of them.
    """
    found = []
    for number, line in enumerate(split, 1):
        words = line.split()
        labels = [word.removeprefix(LABEL) for word in words if word.startswith(LABEL)]
        text = " ".join(word for word in words if not word.startswith(LABEL))
        found += [(number, text, labels)] * bool(words)
    several = any(len(labels) > 1 for _, _, labels in found)
    for number, text, labels in found:
        yield f"{name}:{number}", {"input": text, "target": labels if several else labels[0]}


def delimiter(text: str) -> str:
    """Return what is between the cells, as the first line looks: a tab where there is one."""
    heading = text.lstrip().split("\n", 1)[0]
    return "\t" if "\t" in heading else max(DELIMITERS, key=heading.count)


def cells(text: str) -> Table:
    """Return a table's cells; those in quotes may hold line breaks.

    In a TSV quotes are seldom meant so. Where all its lines have their cells, and quotes would make one row of several,
    they are text. Quotes behind a delimiter and spaces count, too.

    Raises:
        csv.Error: a quote that does not end, or that may be none, with the line it stands in.
    """
    mark = delimiter(text)
    plain = [(number, line.split(mark)) for number, line in enumerate(lines(text), 1) if line.strip()]
    try:
        quoted = quoted_cells(text, mark)
    except csv.Error:
        if mark != "\t":
            raise
        return plain
    all_quoted = all(cell[:1] == cell[-1:] == '"' for cell in plain[0][1])  # the heading, by a writer that quotes all
    is_whole = mark == "\t" and len({len(row) for _, row in plain}) == 1 and not all_quoted
    if is_whole and len(quoted) < len(plain):
        return plain
    if mark != "\t" and any(re.match(' +"', cell) for _, row in quoted for cell in row):
        quoted = quoted_cells(text, mark, skipinitialspace=True)
    swallowed = swallowing(quoted, dict(plain))
    if swallowed:
        raise csv.Error(f"{swallowed}: its quote goes over lines that look like rows")
    return quoted


def swallowing(quoted: Table, plain: Mapping[int, list[str]]) -> int:
    """Return the first line of a row in quotes whose lines are each rows by themselves; 0 where there is none.

    They are where each has its cells, and the last (or the first) of them is one that other rows have.
    """
    for column, inner in ((-1, slice(-1)), (0, slice(1, None))):
        known = {row[column] for number, row in quoted if plain.get(number) == row}
        for number, row in quoted:
            count = 1 + sum(cell.count("\n") for cell in row)
            within = [plain.get(line, []) for line in range(number, number + count)] if count > 1 else []
            fit = all(len(cells) == len(row) > 1 for cells in within)
            if within and fit and known.issuperset(cells[column] for cells in within[inner]):
                return number
    return 0


def quoted_cells(text: str, mark: str, skipinitialspace: bool = False) -> Table:
    given = io.StringIO("\n".join(lines(text)), newline="")
    reader = csv.reader(given, delimiter=mark, strict=True, skipinitialspace=skipinitialspace)
    found: Table = []
    begins = 1
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                found.append((begins, row))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise csv.Error(f"{begins}: no CSV: {error}") from None
    return found


def is_headed(rows: Table, file: str, columns: Mapping[str, str]) -> bool:
    """Return whether a table's first line names its columns.

    It does but in CrossFit's files, and where columns are asked for by number; and in other .tsv of two columns where
    it looks unlike the rest: single words, which do not come back, before texts.
    """
    first = [cell.strip() for cell in rows[0][1]]
    if columns and not is_numbered(columns):
        return True
    if CROSSFIT.fullmatch(file):
        return False
    if KNOWN.intersection(cell.casefold() for cell in first) or first == [str(index) for index in range(len(first))]:
        return True
    if columns or not file.endswith(".tsv") or len(first) != 2:
        return not columns
    others = [row for _, row in rows[1:] if len(row) == 2]
    comes_back = any(row[index].strip() == cell for row in others for index, cell in enumerate(first))
    texts = sum(" " in row[0].strip() for row in others)
    return not comes_back and " " not in "".join(first) and 2 * texts > len(others)


def is_numbered(columns: Mapping[str, str]) -> bool:
    return bool(columns) and all(own.isdecimal() for own in columns.values())


def crossfit(rows: Table, file: str, name: str) -> Found:
    """Yield the rows `input<TAB>output` of one of CrossFit's files (Ye et al. 2021, arXiv 2104.08835).

    Args:
        file: its name, which holds the task's.
        name: what errors call it.
    """
    match = CROSSFIT.fullmatch(file)
    task = {"task": match.group("task")} if match else {}
    for number, row in rows:
        if len(row) != 2:
            yield f"{name}:{number}", f"expected input<TAB>output, got {len(row)} columns"
        else:
            yield f"{name}:{number}", {**task, "input": row[0], "target": row[1]}


def table(rows: Table, name: str, columns: Mapping[str, str], headed: bool) -> Found:
    """Yield the rows of a table by the names in its heading, or, where columns are mapped by number, by that."""
    first = rows[0][1]
    numbers = [str(index) for index in range(len(first))]
    names = [cell.strip() or index for cell, index in zip(first, numbers, strict=True)] if headed else numbers
    names = numbers if is_numbered(columns) else names
    twice = {column for column in names if names.count(column) > 1}
    if twice:
        yield f"{name}:{rows[0][0]}", f"has two columns {', '.join(twice)}; name them by number: input=0,target=1"
        return
    if headed and len(first) == 1 and first[0].startswith("#"):
        yield f"{name}:{rows[0][0]}", "is a comment, and not the columns' names; leave it out"
        return
    whole = [row for _, row in rows[headed:] if len(row) == len(names)]
    lists = {own for own, *column in zip(names, *whole, strict=True) if column and all(map(LIST.fullmatch, column))}
    for number, row in rows[headed:]:
        if len(row) != len(names):
            yield f"{name}:{number}", f"has {len(row)} cells, where its first line has {len(names)}"
        else:
            yield (
                f"{name}:{number}",
                {own: as_list(cell) if own in lists else cell for own, cell in zip(names, row, strict=True)},
            )


def as_list(cell: str) -> Any:
    """Return the texts of a list that a cell has; the cell as it stands, if Python does not take it for one."""
    try:
        return ast.literal_eval(cell)
    except (SyntaxError, ValueError):
        return cell
