"""Read rows `{"task", "input", "target", ...}` from JSONL, Parquet, or a Hugging Face data set."""

import fnmatch
import glob
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.fs
import pyarrow.parquet

from rayml.errors import DataError
from rayml.tasks.row import Row, RowError, row_of

SUFFIXES = (".jsonl", ".parquet")
SHOWN_ERRORS = 20
Examples = str | Path | Iterable[Any]
"""A path or URI; a pandas DataFrame, or a `datasets.Dataset`; or pairs `(input, target)`, dicts, and `Row`s."""


def read_rows(paths: Iterable[str], columns: dict[str, str] | None = None, kind: str | None = None) -> list[Row]:
    """Read every row of every path.

    Args:
        paths: files, folders (searched for .jsonl and .parquet), globs, any URI that pyarrow reads (`s3://`, `gs://`,
            `hdfs://`, `file://`), or `hf:NAME[/CONFIG][:SPLIT]`, where NAME is a data set on the Hugging Face Hub or
            a folder made by `Dataset.save_to_disk`.
        columns: the data's own names, where they differ (`rayml.tasks.row`). With no `task` column, the file's or the
            data set's name is the task.
        kind: of rows that do not tell it.

    Raises:
        DataError: nothing there, nothing in it, or rows that cannot be used, each with its file and line.
    """
    return checked(chain.from_iterable(map(_some_records, paths)), columns or {}, kind)


def rows_given(examples: Examples) -> list[Row]:
    """Return the rows of examples in any form that people have them in.

    Args:
        examples: a path, or what else `read_rows` takes; a pandas DataFrame, or a `datasets.Dataset`, whose columns are
            named as a row's; or pairs `(input, target)`, records as dicts, and `Row`s.

    Raises:
        DataError: there are none, or some cannot be used, each with its place.
    """
    if isinstance(examples, str | Path):
        return read_rows([str(examples)])
    if hasattr(examples, "iloc"):
        found: Iterable[Any] = _frame_records(examples)
    elif hasattr(examples, "features"):
        found = _class_names(examples)
    else:
        found = examples
    if isinstance(found, Mapping) or not isinstance(found, Iterable):
        kind = type(examples).__name__
        raise DataError(f"examples: expected pairs (input, target), or dicts, one an example; got a {kind}")
    whole, records = [], []
    for number, one in enumerate(found):
        if isinstance(one, Row):
            whole.append(one)
        else:
            records.append((f"example {number}", _record(one), "examples"))
    rows = whole + checked(records, {}, None)
    if not rows:
        raise DataError("examples: there is none")
    return rows


def _record(one: Any) -> dict[str, Any] | str:
    """Return the record of a pair or a dict, or what is wrong with it."""
    if isinstance(one, Mapping):
        return dict(one)
    if isinstance(one, tuple | list) and len(one) == 2:
        return {"input": one[0], "target": one[1]}
    return f"expected a pair (input, target), or a dict, got {str(one)[:60]!r}"


def _frame_records(frame: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a DataFrame without what is missing in them, which it writes as NaN."""
    for row in frame.to_dict("records"):
        plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}
        yield {name: value for name, value in plain.items() if value is not None and value == value}


def checked(
    found: Iterable[tuple[str, dict[str, Any] | str, str]], columns: Mapping[str, str], kind: str | None
) -> list[Row]:
    """Return the rows of (where, record or what is wrong with it, default task); arguments and errors as above."""
    rows, errors = [], []
    for where, record, default_task in found:
        try:
            if isinstance(record, str):
                raise RowError(record)
            row = row_of(record, columns, default_task, where)
            rows.append(row if row.kind or not kind else replace(row, kind=kind))
        except RowError as error:
            errors.append(f"{where}: {error}")
    if errors:
        more = [f"... and {len(errors) - SHOWN_ERRORS} more"] if len(errors) > SHOWN_ERRORS else []
        raise DataError("rows that cannot be used:\n  " + "\n  ".join(errors[:SHOWN_ERRORS] + more))
    return rows


def _some_records(path: str) -> Iterator[tuple[str, dict[str, Any] | str, str]]:
    found = records(path)
    first = next(found, None)
    if first is None:
        raise DataError(f"{path}: there is no row in it")
    return chain([first], found)


def records(path: str) -> Iterator[tuple[str, dict[str, Any] | str, str]]:
    """Yield (where, record or what is wrong with it, default task name)."""
    if path.startswith("hf:"):
        yield from _hugging_face(path.removeprefix("hf:"))
        return
    for filesystem, file in _files(path):
        read = _jsonl if file.endswith(".jsonl") else _parquet
        for where, record in read(filesystem, file):
            yield where, record, Path(file).stem


def _files(path: str) -> list[tuple[pyarrow.fs.FileSystem, str]]:
    """Return the data files that a path, folder, glob or URI names, in order."""
    try:
        filesystem, inner = (
            pyarrow.fs.FileSystem.from_uri(path) if "://" in path else (pyarrow.fs.LocalFileSystem(), path)
        )
        names = _expand(filesystem, inner)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not names:
        raise DataError(f"{path}: no such file, or no {' or '.join(SUFFIXES)} file in it")
    return [(filesystem, name) for name in names]


def _expand(filesystem: pyarrow.fs.FileSystem, path: str) -> list[str]:
    if glob.has_magic(path):
        wanted = path if "/" in path else f"./{path}"
        folder = re.split(r"[*?[]", wanted)[0].rsplit("/", 1)[0] or "/"
        return [
            name
            for name in _expand(filesystem, folder)
            if fnmatch.fnmatch(name, wanted) and name.count("/") == wanted.count("/")  # `*` stays within a folder
        ]
    info = filesystem.get_file_info(path)
    if info.type == pyarrow.fs.FileType.File:
        if not path.endswith(SUFFIXES):
            raise DataError(f"{path}: expected a file that ends in {' or '.join(SUFFIXES)}")
        return [path]
    if info.type == pyarrow.fs.FileType.NotFound:
        return []
    entries = filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
    return sorted(entry.path for entry in entries if entry.is_file and entry.path.endswith(SUFFIXES))


def _jsonl(filesystem: pyarrow.fs.FileSystem, file: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    with filesystem.open_input_stream(file) as stream:
        lines = stream.read().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:  # covers bytes that are not UTF-8, too
            yield where, f"not JSON: {error}"
        else:
            yield where, record if isinstance(record, dict) else f"expected a JSON object, got {line[:40]!r}"


def _parquet(filesystem: pyarrow.fs.FileSystem, file: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    try:
        table = pyarrow.parquet.read_table(file, filesystem=filesystem)
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: not a Parquet file: {error}") from error
    for number, record in enumerate(table.to_pylist(), start=1):
        yield f"{file}: row {number}", record


def _hugging_face(name: str) -> Iterator[tuple[str, dict[str, Any] | str, str]]:
    """Read `NAME[/CONFIG][:SPLIT]` or a `save_to_disk` folder; class numbers become class names."""
    import datasets  # slow to import, and only needed here

    name, _, split = name.partition(":")
    try:
        if Path(name).is_dir():
            found = datasets.load_from_disk(name)
        else:
            parts = name.split("/")  # a Hub name has one slash at most, so what follows is the configuration
            found = datasets.load_dataset("/".join(parts[:2]), *parts[2:])
        found = found[split or "train"] if isinstance(found, datasets.DatasetDict) else found
    except Exception as error:  # the library raises a dozen kinds; each means the same to the user
        raise DataError(f"hf:{name}: cannot be loaded: {error}") from error
    for number, record in enumerate(_class_names(found), start=1):
        yield f"hf:{name}: row {number}", record, Path(name).name


def _class_names(found: Any) -> Iterator[dict[str, Any]]:
    """Yield the records of a `datasets.Dataset`, with the names of classes in place of their numbers."""
    names = {key: feature for key, feature in found.features.items() if hasattr(feature, "int2str")}
    for record in found:
        for key, feature in names.items():
            known = isinstance(record[key], int) and 0 <= record[key] < feature.num_classes
            record[key] = feature.int2str(record[key]) if known else None  # -1 stands for no label
        yield record
