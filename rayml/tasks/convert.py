"""`rayml data convert`: write data of any format as rows that rayml reads."""

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
from rayml.tasks.kinds import NAMES, format_target, parse_target
from rayml.tasks.read import read_rows
from rayml.tasks.row import COLUMNS, Row

EXAMPLE_CHARACTERS = 300


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
    """Convert, and print what was read and written. The arguments are those of the command line.

    Raises:
        DataError: IN cannot be used, or OUT exists.
    """
    if to.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{to}: expected a name that ends in .jsonl or .parquet")
    if to.exists() and not force:
        raise DataError(f"{to}: exists already; --force replaces it")
    if kind and kind not in NAMES:
        raise DataError(f"--kind: {kind!r} unknown; there are {', '.join(NAMES)}")

    def say(text: str) -> None:
        out.print(text, markup=False, highlight=False, soft_wrap=True)

    mapping = parse_columns(columns)
    rows = read_rows([given], mapping, kind, format=format, encoding=encoding, skip=skip, mend=True, say=say)
    records = [to_record(row) | ({"task": task} if task else {}) for row in rows]
    write_records(records, to)
    kinds = {row.kind or ("label" if row.options else "label or text, as its targets come back") for row in rows}
    tasks = {record["task"] for record in records}
    say(f"{to}: {len(records)} rows of {len(tasks)} task(s): {', '.join(sorted(kinds))}")
    example = json.dumps(records[0], ensure_ascii=False)
    say(example[:EXAMPLE_CHARACTERS] + "..." * (len(example) > EXAMPLE_CHARACTERS))
    say(f"next: rayml data check {shlex.quote(str(to))}")


def parse_columns(columns: str | None) -> dict[str, str]:
    """Return the mapping in `input=text,target=label`, or in JSON, which allows any character in a name.

    Raises:
        DataError: it is no mapping, or names a field that rows do not have.
    """
    text = (columns or "").strip()
    try:
        pairs = json.loads(text) if text.startswith("{") else dict(pair.split("=", 1) for pair in comma_separated(text))
    except ValueError:
        pairs = {text: ""}
    mapping = {field.strip(): str(column).strip() for field, column in pairs.items()}
    if not all(column and (field in COLUMNS or field.startswith("input.")) for field, column in mapping.items()):
        names = f"names are {', '.join(COLUMNS)}, input.PART"
        raise DataError(f'--columns: {text!r}: expected NAME=COLUMN,NAME=COLUMN, or {{"NAME": "COLUMN"}}; {names}')
    return mapping


def to_record(row: Row) -> dict[str, Any]:
    """Return a row as the record that is written."""
    record: dict[str, Any] = {"task": row.task}
    if row.kind == "dialogue":
        return record | {"messages": [{"role": role, "content": text} for role, text in row.parts]}
    record |= {"input": dict(row.parts) or row.input, "target": row.target}
    items = parse_target(row.kind, row.target)
    if items is not None and format_target(items) == row.target:
        record["target"] = items
    optional = {"options": list(row.options), "answers": list(row.answers), "kind": row.kind}
    return record | {field: value for field, value in optional.items() if value}


def write_records(records: Sequence[dict[str, Any]], to: Path) -> None:
    """Write records as JSONL, or as Parquet if the suffix says so. The file appears only when it is whole.

    Raises:
        DataError: Parquet, and records of several shapes.
    """
    parts = {tuple(record["input"]) for record in records if isinstance(record.get("input"), dict)}
    if to.suffix == ".parquet" and len(parts) > 1:  # Parquet would give each row all of them
        two = " and ".join(", ".join(names) for names in sorted(parts)[:2])
        raise DataError(f"{to}: inputs of several parts ({two}), and a column of Parquet has one shape; write .jsonl")
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = to.with_name(f".{to.name}.part")
    try:
        if to.suffix == ".parquet":
            fields = dict.fromkeys(field for record in records for field in record)
            columns = {field: [record.get(field) for record in records] for field in fields}
            pyarrow.parquet.write_table(pyarrow.table(columns), temporary)
        else:
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            temporary.write_text("".join(lines), encoding="utf-8")
        os.replace(temporary, to)
    except pyarrow.ArrowException as error:
        raise DataError(f"{to}: inputs or targets of several shapes; write .jsonl: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)
