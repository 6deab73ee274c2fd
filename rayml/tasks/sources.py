"""Read the records of files and Hugging Face data sets, each in its own format."""

import csv
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet

from rayml.errors import DataError
from rayml.tasks.files import File, Say, find_files, task_names
from rayml.tasks.formats import columns as tables
from rayml.tasks.formats import conll, documents, foreign
from rayml.tasks.formats import records as record_formats
from rayml.tasks.formats.text import Located, Records, decode, split_lines
from rayml.tasks.row import COLUMNS

log = logging.getLogger(__name__)
FORMATS = (
    *documents.READERS,
    *("crossfit", "fasttext", "conll", "csv", "jsonl", "parquet", "hf"),
    *record_formats.FORMATS,
)
NAMED = "csv", "jsonl", "json", "json-columns", "parquet", "hf"
"""Formats in which users name the columns, so that a mapping may name them."""
PLAIN = "jsonl", "parquet", "hf"
"""Formats that users need not be told of."""
Columns = Mapping[str, str]


@dataclass(frozen=True)
class Source:
    """The records of a file or data set, and how its format was recognised."""

    name: str
    """As messages call it."""
    task: str
    """Of rows that name none."""
    format: str
    why: str
    """How the format was recognised."""
    records: Sequence[Located]
    encoding: str = "utf-8"
    ignored: tuple[str, ...] = ()
    """Columns that its format does not use."""

    @property
    def keys(self) -> list[str]:
        """The keys of all its records."""
        return record_keys(self.records)

    @property
    def usable(self) -> list[Located]:
        """The records without those that its format leaves out."""
        return [(where, record) for where, record in self.records if not isinstance(record, record_formats.LeftOut)]

    @property
    def dicts(self) -> list[dict[str, Any]]:
        """The records that nothing is wrong with."""
        return [record for _, record in self.records if isinstance(record, dict)]


def record_keys(records: Sequence[Located]) -> list[str]:
    return list(dict.fromkeys(key for _, record in records if isinstance(record, dict) for key in record))


def read_sources(
    paths: list[str],
    columns: Columns,
    format: str | None = None,
    encoding: str | None = None,
    say: Say = log.warning,
) -> Iterator[Source]:
    """Yield the sources that paths, globs, URIs and `hf:` names stand for.

    Args:
        columns: the user's names of columns.
        format: of all sources; None to recognise it.
        encoding: of text; None to detect it.
        say: called with messages about files that are left out.

    Raises:
        DataError: there is nothing, or nothing in a known format; the message says what to do.
    """
    if format and format not in FORMATS:
        raise DataError(f"--format: {format!r} unknown; there are {', '.join(FORMATS)}")
    data_sets = [path for path in paths if path.startswith("hf:") or is_saved_data_set(path)]
    by_location: dict[str, File] = {}
    for path in paths:
        if path not in data_sets:
            for file in find_files(path, say):
                by_location.setdefault(file.location, file)
    files = list(by_location.values())
    for path in data_sets:
        yield convert_records(hugging_face_source(path), columns, format)
    for file, task in zip(files, task_names(files), strict=True):
        yield convert_records(file_source(file, task, columns, format, encoding), columns, format)


def convert_records(source: Source, columns: Columns, format: str | None = None) -> Source:
    """Return a source with its records as rows, if they are in one of the record formats.

    A user who names the input's or the target's column has rows already.
    """
    record_format = format if format in record_formats.FORMATS else ""
    names_row = any(field.split(".")[0] in ("input", "target", "messages") for field in columns)
    if not format and source.format in NAMED and not names_row:
        record_format = record_formats.find_format(source.keys, source.dicts)
    if not record_format:
        return source
    read, required, optional = record_formats.FORMATS[record_format]
    records = [(where, read_record(read, record)) for where, record in source.records]
    why = f"its keys, such as {', '.join(source.keys[:4])}"
    ignored = tuple(key for key in source.keys if key not in required | optional | {*COLUMNS})
    return replace(source, format=record_format, why=why, records=records, ignored=ignored)


def read_record(read: Callable[[dict[str, Any]], Any], record: dict[str, Any] | str) -> Any:
    """Return what a format reads in a record, or a message about what is wrong with it."""
    if isinstance(record, str):
        return record
    try:
        return read(record)
    except (AttributeError, TypeError) as error:
        return f"a field is of another type than in its format: {error}"


def is_saved_data_set(path: str) -> bool:
    """Return whether `Dataset.save_to_disk` wrote a folder."""
    folder = os.path.expanduser(path)
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json"))


def file_source(file: File, task: str, columns: Columns, format: str | None, encoding: str | None) -> Source:
    """Return a file's records. Unless a format is asked for, its content decides before its name does."""
    name, data = file.path, file.read()
    if file.suffix == ".parquet" or data.startswith(b"PAR1"):
        records = with_partition_columns(file, read_parquet(data, name), columns)
        return Source(name, task, "parquet", "the suffix", records)
    foreign.refuse_bytes(data, name)
    text, encoding = decode(data, name, encoding)
    if not text.strip():
        raise DataError(f"{name}: is empty; a row is {{'input': ..., 'target': ...}}, one a line")
    if not format:
        foreign.refuse_text(text, name, file.suffix)
    try:
        found_format, why, rows = read_text(text, file, columns, format)
        records = with_partition_columns(file, rows, columns)
    except RecursionError:
        raise DataError(f"{name}: JSON of too many lists or objects within each other; a row is flat") from None
    return Source(name, task, found_format, "--format" if format else why, records, encoding)


def with_partition_columns(file: File, records: Records, columns: Columns) -> list[Located]:
    """Return a file's records, with the columns that its folders' names give."""
    located = list(records)
    values = file.missing_columns(record_keys(located), columns.values()) if file.partition_columns else {}
    if not values:
        return located
    return [(where, {**values, **record} if isinstance(record, dict) else record) for where, record in located]


def read_text(text: str, file: File, columns: Columns, format: str | None) -> tuple[str, str, Records]:
    """Return a text's format, how it was recognised, and its records."""
    name, lines = file.path, split_lines(text)
    is_json_lines = file.suffix in (".jsonl", ".ndjson")
    if (is_json_lines or text.lstrip()[:1] in ("{", "[")) and format not in ("csv", "conll", "crossfit", "fasttext"):
        layout, key = documents.find_layout(text, name, is_json_lines)
        if layout == "jsonl":
            return layout, "an object a line", documents.read_lines(text, name)
        why = "lists side by side" if layout == "json-columns" else f"rows in {key!r}" if key else "a list of rows"
        return layout, why, documents.READERS[layout](text, name, key)
    if format == "fasttext" or (not format and tables.is_fasttext(lines)):
        return "fasttext", f"a {tables.LABEL} in every line", tables.read_fasttext(lines, name)
    if format == "conll" or (not format and (file.suffix in conll.SUFFIXES or conll.find_columns(lines))):
        sentences = conll.read_sentences(lines, name, *conll_columns(columns))
        return "conll", "a token and a tag on nearly every line", sentences
    try:
        rows = tables.read_cells(text)
    except csv.Error as error:
        raise DataError(f"{name}:{error}; close the quote, or write it twice, within quotes") from None
    if not rows:
        raise DataError(f"{name}: all its cells are empty; a row has an input and a target")
    headed = tables.has_heading(rows, file.unpacked_name, columns)
    if format == "crossfit" or not (format or headed or columns):
        why = "two columns without a heading, in a .tsv"
        return "crossfit", why, tables.read_crossfit(rows, file.unpacked_name, name)
    why = f"cells between {tables.find_delimiter(text)!r}, with{'' if headed else 'out'} a heading"
    return "csv", why, tables.read_table(rows, name, columns, headed)


def conll_columns(columns: Columns) -> tuple[int | None, int | None]:
    """Return the numbers of the token's and the tag's column, where the user named them."""
    if not all(columns.get(field, "0").isdecimal() for field in ("input", "target")):
        raise DataError("--columns: the columns of CoNLL are numbers from 0, such as input=0,target=3")
    token, tag = (int(columns[field]) if field in columns else None for field in ("input", "target"))
    return token, tag


def read_parquet(data: bytes, name: str) -> Records:
    try:
        columns = pyarrow.parquet.read_schema(io.BytesIO(data)).names
        repeated = {column for column in columns if columns.count(column) > 1}
        if repeated:
            raise DataError(f"{name}: has two columns {', '.join(repeated)}; rename one")
        table = pyarrow.parquet.read_table(io.BytesIO(data))
        table.validate(full=True)  # finds texts that are not UTF-8
    except (pyarrow.ArrowException, OSError) as error:  # OSError: a damaged page
        raise DataError(f"{name}: not a Parquet file, or a damaged one: {error}") from error
    for number, column in enumerate(table.schema):
        if pyarrow.types.is_float32(column.type):
            table = table.set_column(number, column.name, table[number].cast("string").cast("float64"))
    try:
        metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
        features = metadata["info"]["features"] or {}
    except (ValueError, KeyError, TypeError):  # another program's, or none
        features = {}
    for number, record in enumerate(table.to_pylist(), start=1):
        yield f"{name}: row {number}", name_classes_of(record, features)


def hugging_face_source(path: str) -> Source:
    """Return `hf:NAME[/CONFIG][:SPLIT]`, of the Hub or a `save_to_disk` folder."""
    name, _, split = path.removeprefix("hf:").partition(":")
    return Source(path, Path(name).name, "hf", "a Hugging Face data set", list(read_data_set(name, split)))


def read_data_set(name: str, split: str) -> Records:
    try:
        import datasets  # slow to import, and only needed here
    except ImportError:
        raise DataError(f"hf:{name}: needs the package datasets: pip install 'datasets>=3'") from None
    try:
        if Path(name).expanduser().is_dir():
            data_set = datasets.load_from_disk(os.path.expanduser(name))
        else:
            parts = name.split("/")  # a Hub name has one slash at most, so what follows is the configuration
            data_set = datasets.load_dataset("/".join(parts[:2]), *parts[2:])
    except Exception as error:  # the library raises a dozen kinds; each means the same to the user
        raise DataError(f"hf:{name}: cannot be loaded: {error}; files are read without hf:") from error
    if isinstance(data_set, datasets.DatasetDict):
        if (split or "train") not in data_set:
            splits = f"there is {', '.join(data_set)}" if len(data_set) else "there is none"
            example = f"hf:{name}:{next(iter(data_set), 'SPLIT')}"
            raise DataError(f"hf:{name}: no split {split or 'train'!r}; {splits}: {example}")
        data_set = data_set[split or "train"]
    elif split and split != str(data_set.split):
        raise DataError(f"hf:{name}: is one data set, and has no splits, such as {split!r}; it is hf:{name}")
    for number, record in enumerate(data_set_records(data_set), start=1):
        yield f"hf:{name}: row {number}", record


def data_set_records(data_set: Any) -> Iterator[dict[str, Any]]:
    """Yield the records of a `datasets.Dataset`, with the names of classes in place of their numbers."""
    features = data_set.features.to_dict() if data_set.features else {}
    for record in data_set.with_format(None):
        yield name_classes_of(record, features)


def name_classes_of(record: dict[str, Any], features: dict[str, Any]) -> dict[str, Any]:
    return {key: name_classes(value, features.get(key)) for key, value in record.items()}


def name_classes(value: Any, feature: Any) -> Any:
    """Return a value with the names of classes in place of their numbers, even inside lists and structures.

    Args:
        feature: from `datasets.Features.to_dict`. The number -1 stands for no class: None.
    """
    if not isinstance(feature, dict) or value is None:
        return value
    if feature.get("dtype") == "float32" and isinstance(value, float):
        return shortest_float32(value)
    if feature.get("_type") == "ClassLabel" and isinstance(value, int):
        return feature["names"][value] if 0 <= value < len(feature["names"]) else None
    if isinstance(value, list):
        return [name_classes(item, feature.get("feature")) for item in value]
    if isinstance(value, dict):
        inner = feature.get("feature") if "_type" in feature else feature
        return name_classes_of(value, inner or {})
    return value


def shortest_float32(number: float) -> float:
    """Return a float32 as it is written: 0.1, and not its value in 64 bits, 0.10000000149011612."""
    return float(pyarrow.scalar(number, pyarrow.float32()).cast(pyarrow.string()).as_py())
