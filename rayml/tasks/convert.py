"""`rayml data convert`: from what people have to rows that rayml reads."""

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from rich.console import Console

from rayml.errors import DataError
from rayml.tasks.formats.text import comma_separated
from rayml.tasks.kinds import NAMES, listed, spans, written
from rayml.tasks.read import read_rows
from rayml.tasks.row import COLUMNS, Row

SHOWN = 300
"""Characters of the example row."""


def convert_data(
    given: str,
    to: Path,
    format: str | None,
    columns: str | None,
    task: str | None,
    kind: str | None,
    force: bool,
    out: Console,
    encoding: str | None = None,
    skip: bool = False,
) -> None:
    """Convert, and say what was found and what was written; arguments as on the command line.

    Raises:
        DataError: IN cannot be used, or OUT is there.
    """
    if to.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{to}: expected a name that ends in .jsonl or .parquet")
    if to.exists() and not force:
        raise DataError(f"{to}: exists already; --force replaces it")
    if kind and kind not in NAMES:
        raise DataError(f"--kind: {kind!r} unknown; there are {', '.join(NAMES)}")

    def say(text: str) -> None:
        out.print(text, markup=False, highlight=False, soft_wrap=True)

    own = mapped(columns)
    found = read_rows([given], own, kind, format=format, encoding=encoding, skip=skip, mend=True, say=say)
    kept = [record_of(row) | ({"task": task} if task else {}) for row in found]
    write(kept, to)
    kinds = {row.kind or ("label" if row.options else "label or text, as its targets come back") for row in found}
    say(f"{to}: {len(kept)} rows of {len({row['task'] for row in kept})} task(s): {', '.join(sorted(kinds))}")
    example = json.dumps(kept[0], ensure_ascii=False)
    say(example[:SHOWN] + "..." * (len(example) > SHOWN))
    say(f"next: rayml data check {shlex.quote(str(to))}")


def mapped(columns: str | None) -> dict[str, str]:
    """Return the mapping in `input=text,target=label`, or in JSON, for names with a comma.

    Raises:
        DataError: it is none, or names what rows do not have.
    """
    text = (columns or "").strip()
    try:
        pairs = json.loads(text) if text.startswith("{") else dict(pair.split("=", 1) for pair in comma_separated(text))
    except ValueError:
        pairs = {text: ""}
    found = {name.strip(): str(own).strip() for name, own in pairs.items()}
    wrong = [name for name, own in found.items() if not own or not (name in COLUMNS or name.startswith("input."))]
    if wrong:
        names = f"names are {', '.join(COLUMNS)}, input.PART"
        raise DataError(f'--columns: {text!r}: expected NAME=COLUMN,NAME=COLUMN, or {{"NAME": "COLUMN"}}; {names}')
    return found


def record_of(row: Row) -> dict[str, Any]:
    """Return a row as it is written."""
    found: dict[str, Any] = {"task": row.task}
    if row.kind == "dialogue":
        return found | {"messages": [{"role": role, "content": text} for role, text in row.parts]}
    found |= {"input": dict(row.parts) or row.input, "target": row.target}
    pieces: list[Any] = []
    if row.kind == "ner":
        pieces = [{"text": text, "type": kind} for kind, text in spans(row.target)]
    if row.kind == "multilabel":
        pieces = listed(row.target)
    if row.kind in ("ner", "multilabel") and written(pieces) == row.target:
        found["target"] = pieces
    more = {"options": list(row.options), "answers": list(row.answers), "kind": row.kind}
    return found | {key: value for key, value in more.items() if value}


def write(rows: Sequence[dict[str, Any]], to: Path) -> None:
    """Write rows as JSONL, or Parquet by the suffix, in one piece.

    Raises:
        DataError: rows of several shapes in Parquet.
    """
    parts = {tuple(row["input"]) for row in rows if isinstance(row.get("input"), dict)}
    if to.suffix == ".parquet" and len(parts) > 1:  # each row would have all of them
        some = " and ".join(", ".join(names) for names in sorted(parts)[:2])
        raise DataError(f"{to}: inputs of several parts ({some}), and a column of Parquet has one shape; write .jsonl")
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_name(f".{to.name}.part")
    try:
        if to.suffix == ".parquet":
            names = dict.fromkeys(name for row in rows for name in row)
            columns = {name: [row.get(name) for row in rows] for name in names}
            pyarrow.parquet.write_table(pyarrow.table(columns), part)
        else:
            part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        os.replace(part, to)
    except pyarrow.ArrowException as error:
        raise DataError(f"{to}: inputs or targets of several shapes; write .jsonl: {error}") from None
    finally:
        part.unlink(missing_ok=True)
