"""Read rows `{"task", "input", "target", ...}` from files of any known format, or from objects in memory."""

import logging
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayml.errors import DataError
from rayml.tasks.files import Say
from rayml.tasks.formats import guess
from rayml.tasks.formats.documents import as_record, is_spacy_pair
from rayml.tasks.formats.records import LeftOut
from rayml.tasks.formats.text import Located
from rayml.tasks.row import COLUMNS, Row, RowError, parse_row
from rayml.tasks.sources import NAMED, PLAIN, Source, convert_records, data_set_records, read_sources, shortest_float32

log = logging.getLogger(__name__)
MAX_ERRORS = 20
Examples = str | Path | Iterable[Any]
"""A path or URI; a pandas DataFrame, or a `datasets.Dataset`; or pairs `(input, target)`, dicts, and `Row`s."""
NUMBERS = "targets that are numbers, or true and false, are taken as their text"
SPLIT_NAMES = {"train", "training", "test", "dev", "val", "valid", "validation", "eval"}
"""Usual names of the files of one data set."""
OWN_OPTIONS = "bigbench", "metaicl", "choices"
"""Formats in which each row may have options of its own."""


def read_rows(
    paths: Iterable[str],
    columns: Mapping[str, str] | None = None,
    kind: str | None = None,
    *,
    format: str | None = None,
    encoding: str | None = None,
    skip: bool = False,
    mend: bool = False,
    say: Say = log.warning,
) -> list[Row]:
    """Read every row of every path.

    Args:
        paths: files of any format that `rayml data convert` knows, packed or not, folders of them, globs, any URI that
            pyarrow reads (`s3://`, `gs://`, `hdfs://`, `file://`), or `hf:NAME[/CONFIG][:SPLIT]`, where NAME is a data
            set on the Hugging Face Hub or a folder made by `Dataset.save_to_disk`.
        columns: from a row's fields to the data's names, where they differ (`rayml.tasks.row`). Usual names are
            guessed. Without a `task` column, the task is the file's or the data set's name.
        kind: of rows that do not tell it.
        format: of the files; None to recognise it.
        encoding: of the files' text; None to detect it.
        skip: leave out rows that cannot be used.
        mend: put U+FFFD in place of halves of characters.
        say: called with messages about what was guessed.

    Raises:
        DataError: there is nothing, or some rows cannot be used. The message has each row's file and line, and says
            what to do.
    """
    paths = list(paths)
    rows: list[Row] = []
    errors: list[str] = []
    first_bad = ""
    notes: dict[str, list[str]] = {}
    own_option_tasks = set()
    for source in read_sources(paths, columns or {}, format, encoding, say):
        mapping, messages = map_columns(source, columns or {})
        records = [(where, replace_surrogates(record)) for where, record in source.usable] if mend else source.usable
        new_rows, new_errors, have_numbers = check_records(records, mapping, source.task, kind)
        if not new_rows and not new_errors:
            raise DataError(f"{source.name}: there is no row in it; a row is {{'input': ..., 'target': ...}}")
        for message in [*messages, *[NUMBERS] * have_numbers]:
            notes.setdefault(message, []).append(source.name)
        rows += new_rows
        errors += new_errors
        if new_errors:
            first_bad = first_bad or source.name
        if source.format in OWN_OPTIONS:
            own_option_tasks |= {row.task for row in new_rows}
    for message, names in notes.items():
        say(f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {message}")
    if errors and not rows:
        raise unusable_rows(errors, "none can be used; a row is {'input': ..., 'target': ...}: put them right")
    if errors and not skip:
        command = f"rayml data convert {shlex.quote(first_bad)} rows.jsonl --skip"
        raise unusable_rows(errors, f"put them right, or leave them out: {command}")
    if errors:
        say(f"{len(errors)} row(s) that cannot be used are left out, such as {errors[0]}")
    splits = sorted({row.task for row in rows if row.task.rpartition("/")[2].casefold() in SPLIT_NAMES})
    if len(splits) > 1:
        command = f"rayml data convert {shlex.quote(paths[0])} rows.jsonl --task NAME"
        say(f"{' and '.join(splits)} are taken as tasks; if they are parts of one, make them one: {command}")
    return move_own_options(rows, own_option_tasks, say)


def map_columns(source: Source, columns: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the mapping from a row's fields to a source's columns, and messages about how the source is read.

    Raises:
        DataError: a column is missing, or none is known for the input or the target.
    """
    messages = []
    if source.format not in PLAIN:
        messages.append(f"{source.format} ({source.why}){left_out(source.ignored)}")
    reasons = Counter(str(record) for _, record in source.records if isinstance(record, LeftOut))
    messages += [f"{count} row(s) are left out: {reason}" for reason, count in reasons.items()]
    if not source.encoding.startswith("utf-8"):
        messages.append(f"read as {source.encoding}; `rayml data convert --encoding` reads it otherwise")
    if source.format not in NAMED:
        if columns and source.format != "conll":
            raise DataError(
                f"{source.name}: {source.format} has columns of its own; leave --columns, or name a --format"
            )
        return {}, messages
    keys = source.keys
    missing = [column for column in columns.values() if keys and column not in keys]
    if missing:
        raise DataError(f"{source.name}: has no column {', '.join(missing)}; there are {', '.join(keys)}")
    guessed = guess.guess_columns(keys, columns)
    mapping = {**columns, **guessed}
    known_fields = {field.split(".")[0] for field in (*mapping, *keys)}
    if keys and not {"input", "target"} <= known_fields:
        raise guess.unknown_columns(source.name, source.dicts, mapping)
    if guessed:
        ignored = left_out([key for key in keys if key not in (*mapping.values(), *COLUMNS)])
        pairs = ", ".join(f"{column} as {field}" for field, column in guessed.items())
        messages.append(f"columns {pairs}{ignored}; or say {guess.columns_setting(mapping)}")
    return mapping, messages


def left_out(columns: Sequence[str]) -> str:
    return f", and {', '.join(columns)} left out" if columns else ""


def check_records(
    records: Iterable[Located], columns: Mapping[str, str], task: str, kind: str | None
) -> tuple[list[Row], list[str], bool]:
    """Return the rows of records, the errors of those that are none, and whether any target is a number."""
    rows, errors, have_numbers = [], [], False
    for where, record in records:
        try:
            if isinstance(record, str):
                raise RowError(record)
            row = parse_row(record, columns, task, where)
            rows.append(row if row.kind or not kind else replace(row, kind=kind))
            have_numbers |= isinstance(record.get(columns.get("target", "target")), bool | int | float)
        except RowError as error:
            errors.append(f"{where}: {error}")
    return rows, errors, have_numbers


def replace_surrogates(value: Any) -> Any:
    """Return a record with U+FFFD in place of halves of characters (lone surrogates, which UTF-8 cannot write)."""
    if isinstance(value, dict):
        return {key: replace_surrogates(item) for key, item in value.items()}
    if isinstance(value, list):
        return [replace_surrogates(item) for item in value]
    return re.sub("[\ud800-\udfff]", "\ufffd", value) if isinstance(value, str) else value


def unusable_rows(errors: Sequence[str], advice: str = "") -> DataError:
    more = [f"... and {len(errors) - MAX_ERRORS} more"] if len(errors) > MAX_ERRORS else []
    message = "\n  ".join(["rows that cannot be used:", *errors[:MAX_ERRORS], *more])
    return DataError(f"{message}\n{advice}" if advice else message)


def move_own_options(rows: list[Row], tasks: Collection[str], say: Say = log.warning) -> list[Row]:
    """Return rows whose options are their task's labels: options that differ from row to row go into the input.

    An answer that is chosen among options of one row only is the answer to a question, not a label.

    Args:
        tasks: those that may have such options; others are left as they are.
    """
    option_sets: dict[str, set[frozenset[str]]] = {}
    for row in rows:
        option_sets.setdefault(row.task, set()).add(frozenset(row.options))
    changed = {task for task in tasks if len(option_sets[task]) > 1}
    moved = sum(bool(row.options) for row in rows if row.task in changed)
    if moved:
        say(f"{moved} row(s) have options of their own: these are part of the input now, and the answer is text")
    return [_with_options_in_input(row) if row.task in changed else row for row in rows]


def _with_options_in_input(row: Row) -> Row:
    text = "\n".join([row.input, *[f"Options: {'; '.join(row.options)}"] * bool(row.options)])
    return replace(row, input=text, options=(), kind=row.kind or "text", parts=())


def rows_from_examples(examples: Examples) -> list[Row]:
    """Return the rows of examples in any form that people have them in.

    Args:
        examples: a path, or anything else that `read_rows` takes; a pandas DataFrame, or a `datasets.Dataset`, with
            the column names of rows, or usual ones; or pairs `(input, target)`, records as dicts, and `Row`s.

    Raises:
        DataError: there are none, or some cannot be used; each error has its place.
    """
    if isinstance(examples, str | Path):
        return read_rows([str(examples)])
    items: Any = examples
    if hasattr(examples, "iloc") and hasattr(examples, "columns"):
        items = _frame_records(examples)
    elif hasattr(examples, "features"):
        items = data_set_records(examples)
    if isinstance(items, Mapping) or hasattr(items, "iloc") or not isinstance(items, Iterable):
        kind = type(examples).__name__
        raise DataError(f"examples: expected pairs (input, target), or dicts, one an example; got a {kind}")
    rows: list[Row] = []
    records: list[Located] = []
    for number, item in enumerate(items):
        if isinstance(item, Row):
            rows.append(item)
        else:
            records.append((f"example {number}", _record(item)))
    if records:
        rows += _source_rows(convert_records(Source("examples", "examples", "jsonl", "", records), {}))
    if not rows:
        raise DataError("examples: there is none")
    return rows


def _source_rows(source: Source) -> list[Row]:
    """Return the rows of records in memory, and warn of what was guessed.

    Raises:
        DataError: some cannot be used.
    """
    mapping, messages = map_columns(source, {}) if source.keys else ({}, [])
    rows, errors, have_numbers = check_records(source.usable, mapping, source.task, None)
    if errors:
        raise unusable_rows(errors)
    for message in [*messages, *[NUMBERS] * have_numbers]:
        log.warning(f"{source.name}: {message}")
    return move_own_options(rows, {source.task} if source.format in OWN_OPTIONS else ())


def _record(item: Any) -> dict[str, Any] | str:
    """Return the record of a pair or a dict, or a message about what is wrong with it."""
    item = to_plain(item)
    if isinstance(item, list) and len(item) == 2 and not is_spacy_pair(item):
        return {"input": item[0], "target": item[1]}
    if isinstance(item, dict) or is_spacy_pair(item):
        return as_record(item)
    return f"expected a pair (input, target), or a dict, got {str(item)[:60]!r}"


def to_plain(value: Any) -> Any:
    """Return a value as plain Python: numbers and arrays of NumPy, torch and others as numbers and lists."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if not hasattr(value, "tolist"):
        return value
    plain = value.tolist()
    return shortest_float32(plain) if str(value.dtype).endswith("float32") and isinstance(plain, float) else plain


def _frame_records(frame: Any) -> Iterator[dict[str, Any] | tuple[Any, ...]]:
    """Yield the rows of a DataFrame without missing values (NaN). Two columns without names are pairs.

    Raises:
        DataError: two columns of one name, or names of several parts.
    """
    names = list(frame.columns)
    repeated = [str(name) for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated or any(isinstance(name, tuple) for name in names):
        what = f"two columns {', '.join(repeated)}" if repeated else f"columns of several parts, such as {names[0]}"
        raise DataError(f"examples: the DataFrame has {what}; name each by one text of its own: df.columns = [...]")
    float32 = {name for name, dtype in frame.dtypes.items() if dtype == "float32"}
    for cells in frame.astype(object).where(frame.notna(), None).itertuples(index=False, name=None):
        row = {
            name: shortest_float32(cell) if name in float32 and cell is not None else to_plain(cell)
            for name, cell in zip(names, cells, strict=True)
        }
        if names == [0, 1]:
            yield tuple(row.values())
        else:
            yield {str(name): value for name, value in row.items() if value is not None}
