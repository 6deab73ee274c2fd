"""What holds rows, a file or a Hugging Face data set: which format it has, and its records."""

import csv
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet

from rayml.errors import DataError
from rayml.tasks.files import File, Say, files, task_names
from rayml.tasks.formats import columns as tables
from rayml.tasks.formats import conll, documents, foreign, records
from rayml.tasks.formats.text import Found, decoded, lines
from rayml.tasks.row import COLUMNS

log = logging.getLogger(__name__)
FORMATS = (*documents.READERS, "crossfit", "fasttext", "conll", "csv", "jsonl", "parquet", "hf", *records.READERS)
NAMED = "csv", "jsonl", "json", "json-columns", "parquet", "hf"
"""Formats whose columns have names of one's own, which a mapping may name."""
PLAIN = "jsonl", "parquet", "hf"
"""Formats that nothing has to be said of."""
Columns = Mapping[str, str]


@dataclass(frozen=True)
class Source:
    """Something with rows: its records, and how they were told."""

    name: str
    """As messages call it."""
    task: str
    """Of rows that name none."""
    format: str
    why: str
    """How the format was told."""
    found: list[tuple[str, dict[str, Any] | str]]
    """Where each record stood, and the record, or what is wrong with it."""
    encoding: str = "utf-8"
    ignored: tuple[str, ...] = ()
    """Columns that its format takes nothing from."""

    @property
    def keys(self) -> list[str]:
        """Of all its records."""
        return keys_of(self.found)

    @property
    def kept(self) -> list[tuple[str, dict[str, Any] | str]]:
        """What its format does not leave out."""
        return [(where, record) for where, record in self.found if not isinstance(record, records.LeftOut)]


def keys_of(found: list[tuple[str, dict[str, Any] | str]]) -> list[str]:
    """Return the keys of records, each once."""
    return list(dict.fromkeys(key for _, record in found if isinstance(record, dict) for key in record))


def sources(
    paths: list[str],
    columns: Columns,
    format: str | None = None,
    encoding: str | None = None,
    say: Say = log.warning,
) -> Iterator[Source]:
    """Yield what holds the rows of paths, globs, URIs and `hf:` names, each with its format.

    Args:
        format: what they are; else what they look like.
        encoding: of text; else as it looks.
        say: told what is left out.

    Raises:
        DataError: nothing there, or nothing that is known; with what to do.
    """
    if format and format not in FORMATS:
        raise DataError(f"--format: {format!r} unknown; there are {', '.join(FORMATS)}")
    hub = [path for path in paths if path.startswith("hf:") or is_saved(path)]
    named: dict[str, File] = {}
    for file in (file for path in paths if path not in hub for file in files(path, say)):
        named.setdefault(file.place, file)
    there = list(named.values())
    for path in hub:
        yield as_rows(hugging_face(path), columns, format)
    for file, task in zip(there, task_names(there), strict=True):
        yield as_rows(source(file, task, columns, format, encoding), columns, format)


def as_rows(given: Source, columns: Columns, format: str | None = None) -> Source:
    """Return a source with rows in place of records that are some by another name, unless columns are named."""
    is_own = given.format in NAMED and not any(
        name.split(".")[0] in ("input", "target", "messages") for name in columns
    )
    found = format if format in records.READERS else ""
    if is_own and not format:
        found = records.format_of(given.keys, [record for _, record in given.found if isinstance(record, dict)])
    if not found:
        return given
    read = [(where, records.READERS[found](one) if isinstance(one, dict) else one) for where, one in given.found]
    why = f"its keys, such as {', '.join(given.keys[:4])}"
    taken = records.NEEDED.get(found, set()) | records.MORE.get(found, set()) | {*COLUMNS}
    ignored = tuple(key for key in given.keys if key not in taken)
    return replace(given, format=found, why=why, found=read, ignored=ignored)


def is_saved(path: str) -> bool:
    """Return whether `Dataset.save_to_disk` wrote a folder."""
    folder = os.path.expanduser(path)
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json"))


def source(file: File, task: str, columns: Columns, format: str | None = None, encoding: str | None = None) -> Source:
    """Return a file with its format: what was asked for, or what it looks like, by its contents before its name."""
    name, data = file.path, file.read()
    if file.suffix == ".parquet" or data.startswith(b"PAR1"):
        return Source(name, task, "parquet", "the suffix", with_columns(file, parquet(data, name), columns))
    foreign.refuse_bytes(data, name)
    text, taken = decoded(data, name, encoding)
    if not text.strip():
        raise DataError(f"{name}: is empty; a row is {{'input': ..., 'target': ...}}, one a line")
    if not format:
        foreign.refuse_text(text, name, file.suffix)
    try:
        found, why, rows = text_records(text, file, columns, format)
        given = with_columns(file, rows, columns)
    except RecursionError:
        raise DataError(f"{name}: JSON of too many lists or objects within each other; a row is flat") from None
    return Source(name, task, found, "--format" if format else why, given, taken)


def with_columns(file: File, found: Found, columns: Columns) -> list[tuple[str, dict[str, Any] | str]]:
    """Return a file's records, with what its folders say of them."""
    given = list(found)
    more = file.told(keys_of(given), columns.values()) if file.columns else {}
    return [(where, {**more, **record} if more and isinstance(record, dict) else record) for where, record in given]


def text_records(text: str, file: File, columns: Columns, format: str | None) -> tuple[str, str, Found]:
    """Return a text's format, how it was told, and its records."""
    name, split = file.path, lines(text)
    is_json = file.suffix in (".jsonl", ".ndjson") or text.lstrip()[:1] in ("{", "[")
    if is_json and format not in ("csv", "conll", "crossfit", "fasttext"):
        laid, key = documents.layout(text, name, file.suffix in (".jsonl", ".ndjson"))
        if laid == "jsonl":
            return laid, "an object a line", documents.objects(text, name)
        why = "lists side by side" if laid == "json-columns" else f"rows in {key!r}" if key else "a list of rows"
        return laid, why, documents.READERS[laid](text, name, key)
    if format == "fasttext" or (not format and tables.is_fasttext(split)):
        return "fasttext", f"a {tables.LABEL} in every line", tables.fasttext(split, name)
    if format == "conll" or (not format and (file.suffix in conll.SUFFIXES or conll.layout(split))):
        return "conll", "a token and a tag on nearly every line", conll.read(split, name, *of_conll(columns))
    try:
        rows = tables.cells(text)
    except csv.Error as error:
        raise DataError(f"{name}:{error}; close the quote, or write it twice, within quotes") from None
    headed = tables.is_headed(rows, file.unpacked_name, columns)
    if format == "crossfit" or not (format or headed or columns):
        why = "two columns without a heading, in a .tsv"
        return "crossfit", why, tables.crossfit(rows, file.unpacked_name, name)
    why = f"cells between {tables.delimiter(text)!r}, with{'' if headed else 'out'} a heading"
    return "csv", why, tables.table(rows, name, columns, headed)


def of_conll(columns: Columns) -> tuple[int | None, int | None]:
    """Return which columns of CoNLL are the token and the tag, where that is said."""
    try:
        token, tag = (int(columns[name]) if name in columns else None for name in ("input", "target"))
    except ValueError:
        raise DataError("--columns: the columns of CoNLL are numbers from 0, such as input=0,target=3") from None
    return token, tag


def parquet(data: bytes, name: str) -> Found:
    try:
        columns = pyarrow.parquet.read_schema(io.BytesIO(data)).names
        twice = {column for column in columns if columns.count(column) > 1}
        if twice:
            raise DataError(f"{name}: has two columns {', '.join(twice)}; rename one")
        table = pyarrow.parquet.read_table(io.BytesIO(data))
    except pyarrow.ArrowException as error:
        raise DataError(f"{name}: not a Parquet file: {error}") from error
    for number, column in enumerate(table.schema):
        if pyarrow.types.is_float32(column.type):
            table = table.set_column(number, column.name, table[number].cast("string").cast("float64"))
    about = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features") or {}
    for number, record in enumerate(table.to_pylist(), start=1):
        yield f"{name}: row {number}", {key: classes_named(features.get(key), value) for key, value in record.items()}


def hugging_face(path: str) -> Source:
    """Return `hf:NAME[/CONFIG][:SPLIT]`, of the Hub or a `save_to_disk` folder."""
    name, _, split = path.removeprefix("hf:").partition(":")
    task = Path(name).name
    return Source(path, task, "hf", "a Hugging Face data set", list(data_set_records(name, split)))


def data_set_records(name: str, split: str) -> Found:
    try:
        import datasets  # slow to import, and only needed here
    except ImportError:
        raise DataError(f"hf:{name}: needs the package datasets: pip install 'rayml[hub-data]'") from None
    try:
        if Path(name).expanduser().is_dir():
            found = datasets.load_from_disk(os.path.expanduser(name))
        else:
            parts = name.split("/")  # a Hub name has one slash at most, so what follows is the configuration
            found = datasets.load_dataset("/".join(parts[:2]), *parts[2:])
    except Exception as error:  # the library raises a dozen kinds; each means the same to the user
        raise DataError(f"hf:{name}: cannot be loaded: {error}; files are read without hf:") from error
    if isinstance(found, datasets.DatasetDict):
        if (split or "train") not in found:
            there = f"there is {', '.join(found)}" if len(found) else "there is none"
            raise DataError(
                f"hf:{name}: no split {split or 'train'!r}; {there}: hf:{name}:{next(iter(found), 'SPLIT')}"
            )
        found = found[split or "train"]
    elif split and split != str(found.split):
        raise DataError(f"hf:{name}: is one data set, and has no splits, such as {split!r}; it is hf:{name}")
    for number, record in enumerate(data_set_rows(found), start=1):
        yield f"hf:{name}: row {number}", record


def data_set_rows(found: Any) -> Iterator[dict[str, Any]]:
    """Yield the records of a `datasets.Dataset`, with the names of classes in place of their numbers."""
    features = found.features.to_dict() if found.features else {}
    for record in found.with_format(None):
        yield {key: classes_named(features.get(key), value) for key, value in record.items()}


def classes_named(feature: Any, value: Any) -> Any:
    """Return a value with names for the numbers of classes in it, in lists and structures, too.

    Args:
        feature: as `datasets.Features.to_dict` has it. -1 stands for no class: None.
    """
    if not isinstance(feature, dict) or value is None:
        return value
    if feature.get("dtype") == "float32" and isinstance(value, float):
        return of_32_bits(value)
    if feature.get("_type") == "ClassLabel" and isinstance(value, int):
        return feature["names"][value] if 0 <= value < len(feature["names"]) else None
    if isinstance(value, list):
        return [classes_named(feature.get("feature"), one) for one in value]
    if isinstance(value, dict):
        inside = feature.get("feature") if "_type" in feature else feature
        return {key: classes_named((inside or {}).get(key), one) for key, one in value.items()}
    return value


def of_32_bits(number: float) -> float:
    """Return a number of 32 bits as it is written: 0.1, and not the same in 64 bits, 0.10000000149011612."""
    return float(pyarrow.scalar(number, pyarrow.float32()).cast(pyarrow.string()).as_py())
