"""`rayml data convert`: from what people have to rows that rayml reads."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from rayml.errors import DataError
from rayml.tasks import read
from rayml.tasks.formats import columns as tables
from rayml.tasks.formats import conll, documents, lines
from rayml.tasks.formats.text import Found, read_text
from rayml.tasks.kinds import listed, spans
from rayml.tasks.row import Row

FORMATS = (
    "natural-instructions",
    "crossfit",
    "metaicl",
    "bigbench",
    "squad",
    "conll",
    "csv",
    "chat",
    "sharegpt",
    "jsonl",
    "parquet",
    "hf",
)
SUFFIXES = (".json", ".jsonl", ".tsv", ".csv", ".conll", ".bio", ".bmes", ".iob", ".iob2", ".txt", ".parquet")
WHOLE: dict[str, Callable[[str, str, str], Found]] = {
    "natural-instructions": documents.natural_instructions,
    "bigbench": documents.bigbench,
    "squad": documents.squad,
}


@dataclass(frozen=True)
class Source:
    """One file, and the format that it was found to have."""

    path: Path
    format: str
    why: str


def sources(given: str, format: str | None) -> list[Source]:
    """Return the files that a path names, each with its format: what was asked for, or what it looks like.

    Raises:
        DataError: nothing there, or nothing that is known; with what is.
    """
    if format and format not in FORMATS:
        raise DataError(f"--format: {format!r} unknown; there are {', '.join(FORMATS)}")
    if given.startswith("hf:"):
        return [Source(Path(given), "hf", "hf: names a Hugging Face data set")]
    path = Path(given)
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise DataError(f"{given}: no such file, or no file in it that ends in {', '.join(SUFFIXES)}")
    return [Source(file, format, "--format") if format else sniff(file) for file in files]


def sniff(file: Path) -> Source:
    """Return what a file looks like, by its contents before its name."""
    if file.suffix == ".parquet":
        return Source(file, "parquet", "the suffix")
    text = read_text(file)
    start = text.lstrip()[:1]
    if not start:
        raise DataError(f"{file}: is empty")
    if start == "{":
        return Source(file, *_json_format(file, text))
    if start == "[":
        raise DataError(f"{file}: a JSON list; write one object a line (JSONL), or name a known --format")
    if conll.sniff(text.splitlines()):
        return Source(file, "conll", "a token and a tag on nearly every line")
    if tables.is_crossfit(file.name, text):
        return Source(file, "crossfit", "two columns without a heading, in a .tsv")
    return Source(file, "csv", f"cells between {tables.delimiter(text, file.name)!r}, with a heading")


def _json_format(file: Path, text: str) -> tuple[str, str]:
    try:
        first = json.loads(text.lstrip().split("\n", 1)[0])
    except ValueError:  # the object goes on: one for the whole file
        first = None
    if isinstance(first, dict) and not documents.format_of(first):
        return lines.format_of(first), f"JSON a line with {', '.join(list(first)[:4])}"
    try:
        found = documents.format_of(json.loads(text))
    except ValueError as error:
        raise DataError(f"{file}:{getattr(error, 'lineno', 1)}: not JSON: {error}") from None
    if found is None:
        raise DataError(f"{file}: a JSON object of no known format; there are {', '.join(FORMATS)}")
    return found, "its keys"


def records(source: Source, columns: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any] | str, str]]:
    """Yield (where, record or what is wrong with it, default task) of a file."""
    path, name, task = source.path, str(source.path), source.path.stem
    if source.format in ("hf", "parquet"):
        yield from read.records(name)
        return
    text = read_text(path)
    if source.format in WHOLE:
        task = path.parent.name if path.name == "task.json" else task  # as BIG-bench lays them out
        found = WHOLE[source.format](text, name, task)
    elif source.format == "conll":
        found = conll.read(text.splitlines(), name, *_conll_columns(columns))
    elif source.format == "crossfit":
        found = tables.crossfit(text, path.name, name)
    elif source.format == "csv":
        found = tables.table(text, path.name, name, columns)
    else:
        found = lines.read(text.split("\n"), name, source.format)
    for where, record in found:
        yield where, record, task


def _conll_columns(columns: Mapping[str, str]) -> tuple[int, int]:
    try:
        return int(columns.get("input", 0)), int(columns.get("target", -1))
    except ValueError:
        raise DataError("--columns: the columns of CoNLL are numbers from 0, such as input=0,target=3") from None


def rows(source: Source, columns: Mapping[str, str], task: str | None, kind: str | None) -> list[Row]:
    """Return a file's rows, checked.

    Args:
        columns: as in `data.columns`, for formats whose columns are the data's own.
        task: the name of all tasks in it.

    Raises:
        DataError: rows that cannot be used, each with its file and line.
    """
    own = columns if source.format in ("csv", "jsonl", "parquet", "hf") else {}
    found = read.checked(records(source, columns), own, kind)
    if not found:
        raise DataError(f"{source.path}: there is no row in it")
    return [replace(row, task=task) for row in found] if task else found


def with_fixed_options(found: Sequence[Row]) -> list[Row]:
    """Return rows whose options are their task's labels: where each row has its own, they become a part of its input.

    What is chosen among options that no other row has is an answer to a question, and no label.
    """
    sets: dict[str, set[frozenset[str]]] = {}
    for row in found:
        sets.setdefault(row.task, set()).add(frozenset(row.options))
    return [row if len(sets[row.task]) == 1 else _asked_with_options(row) for row in found]


def _asked_with_options(row: Row) -> Row:
    text = "\n".join([row.input, *[f"Options: {'; '.join(row.options)}"] * bool(row.options)])
    return replace(row, input=text, options=(), kind=row.kind or "text", parts=())


def record_of(row: Row) -> dict[str, Any]:
    """Return a row as it is written."""
    found: dict[str, Any] = {"task": row.task}
    if row.kind == "dialogue":
        return found | {"messages": [{"role": role, "content": text} for role, text in row.parts]}
    found["input"] = dict(row.parts) or row.input
    found["target"] = row.target
    if row.kind == "ner":
        found["target"] = [{"text": text, "type": kind} for kind, text in spans(row.target)]
    if row.kind == "multilabel":
        found["target"] = listed(row.target)
    more = {"options": list(row.options), "answers": list(row.answers), "kind": row.kind}
    return found | {key: value for key, value in more.items() if value}


def write(found: Sequence[Row], to: Path) -> None:
    """Write rows as JSONL, or Parquet by the suffix, in one piece.

    Raises:
        DataError: another suffix, or rows of several shapes in Parquet.
    """
    kept = [record_of(row) for row in found]
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_name(f".{to.name}.part")
    try:
        if to.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(kept), part)
        else:
            part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
        os.replace(part, to)
    except pyarrow.ArrowException as error:
        raise DataError(f"{to}: inputs or targets of several shapes; write .jsonl: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def kinds_of(found: Sequence[Row]) -> Counter[str]:
    return Counter(row.kind or ("label" if row.options else "label or text, as its targets come back") for row in found)
