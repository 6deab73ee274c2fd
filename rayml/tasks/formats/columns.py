"""CSV and TSV: with a heading and a mapping of its columns, or CrossFit's two columns without one."""

import csv
import io
import re
from collections.abc import Mapping

from rayml.tasks.formats.text import Found

CROSSFIT = re.compile(r"(?P<task>.+)_\d+_\d+_(train|dev|test)\.tsv")
DELIMITERS = ",;\t|"
csv.field_size_limit(1 << 24)


def is_crossfit(file: str, text: str) -> bool:
    """Return whether a file is named as CrossFit names them, or is a .tsv of two columns without a heading."""
    first = text.split("\n", 1)[0].rstrip("\r").split("\t")
    headed = {cell.strip().lower() for cell in first} & {
        "input",
        "target",
        "text",
        "label",
        "sentence",
        "output",
        "task",
    }
    return bool(CROSSFIT.fullmatch(file)) or (file.endswith(".tsv") and len(first) == 2 and not headed)


def crossfit(text: str, file: str, name: str) -> Found:
    """Yield the rows `input<TAB>output` of one of CrossFit's files (Ye et al. 2021, arXiv 2104.08835).

    Args:
        file: its name, which holds the task's.
        name: what errors call it.
    """
    match = CROSSFIT.fullmatch(file)
    task = match.group("task") if match else file.rsplit(".", 1)[0]
    for number, line in enumerate(text.splitlines(), 1):
        cells = line.split("\t")
        if not line.strip():
            continue
        if len(cells) != 2:
            yield f"{name}:{number}", f"expected input<TAB>output, got {len(cells)} columns"
        else:
            yield f"{name}:{number}", {"task": task, "input": cells[0], "target": cells[1]}


def delimiter(text: str, file: str) -> str:
    """Return what is between the cells: a tab in .tsv, else as its first lines look."""
    if file.endswith(".tsv"):
        return "\t"
    heading = text.split("\n", 1)[0]
    return max(DELIMITERS, key=heading.count)


def table(text: str, file: str, name: str, columns: Mapping[str, str]) -> Found:
    """Yield the rows of a CSV or TSV as they are named in its heading, or, where columns are mapped by number, by that.

    A cell in quotes may hold line breaks; the line that is named is the row's first.
    """
    numbered = bool(columns) and all(own.isdecimal() for own in columns.values())
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter(text, file), strict=True)
    names: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield f"{name}:{line}", f"no {'TSV' if file.endswith('.tsv') else 'CSV'}: {error}"
            return
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if not names:
            names = [str(index) for index in range(len(cells))] if numbered else [cell.strip() for cell in cells]
            missing = [own for own in columns.values() if own not in names]
            if missing:
                yield f"{name}:{line}", f"has no column {', '.join(missing)}; there are {', '.join(names)}"
                return
            if not numbered:
                continue
        if len(cells) != len(names):
            yield f"{name}:{line}", f"has {len(cells)} cells, where its first line has {len(names)}"
        else:
            yield f"{name}:{line}", dict(zip(names, cells, strict=True))
