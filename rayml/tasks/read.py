"""Read rows `{"task", "input", "target", ...}` of any format that is known, or from what people have in memory."""

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
from rayml.tasks.formats.documents import is_spacy, record_of
from rayml.tasks.formats.records import LeftOut
from rayml.tasks.row import COLUMNS, Row, RowError, row_of
from rayml.tasks.sources import NAMED, PLAIN, Source, as_rows, data_set_rows, of_32_bits, sources

log = logging.getLogger(__name__)
SHOWN_ERRORS = 20
Examples = str | Path | Iterable[Any]
"""A path or URI; a pandas DataFrame, or a `datasets.Dataset`; or pairs `(input, target)`, dicts, and `Row`s."""
NUMBERS = "targets that are numbers, or true and false, are taken as their text"
PARTS_OF_ONE = {"train", "training", "test", "dev", "val", "valid", "validation", "eval"}
"""What the files of one data set's splits are called."""
OWN_OPTIONS = "bigbench", "metaicl", "choices"
"""Formats whose rows each have options of their own."""


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
        columns: the data's own names, where they differ (`rayml.tasks.row`); else the usual ones are guessed. With no
            `task` column, the file's or the data set's name is the task.
        kind: of rows that do not tell it.
        format: of the files; else as they look.
        encoding: of the files' text; else as it looks.
        skip: leave out rows that cannot be used.
        mend: put U+FFFD in place of halves of characters.
        say: told what was guessed.

    Raises:
        DataError: nothing there, nothing in it, or rows that cannot be used, each with its file and line, and what to
            do.
    """
    paths = list(paths)
    notes: dict[str, list[str]] = {}
    found: list[Row] = []
    errors: list[str] = []
    bad = ""
    of_options = set()
    for one in sources(paths, columns or {}, format, encoding, say):
        taken, told = columns_of(one, columns or {})
        given = [(where, mended(record)) for where, record in one.kept] if mend else one.kept
        rows, wrong, numbers = checked(given, taken, one.task, kind)
        if not rows and not wrong:
            raise DataError(f"{one.name}: there is no row in it; a row is {{'input': ..., 'target': ...}}")
        for note in [*told, *[NUMBERS] * numbers]:
            notes.setdefault(note, []).append(one.name)
        found, errors, bad = found + rows, errors + wrong, bad or one.name * bool(wrong)
        of_options |= {row.task for row in rows} if one.format in OWN_OPTIONS else set()
    for note, names in notes.items():
        say(f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {note}")
    if errors and not (skip and found):
        leave = f"put them right, or leave them out: rayml data convert {shlex.quote(bad)} rows.jsonl --skip"
        none = "none can be used; a row is {'input': ..., 'target': ...}: put them right"
        raise unusable(errors, leave if found else none)
    if errors:
        say(f"{len(errors)} row(s) that cannot be used are left out, such as {errors[0]}")
    splits = sorted({row.task for row in found if row.task.rpartition("/")[2].casefold() in PARTS_OF_ONE})
    if len(splits) > 1:
        joined = f"rayml data convert {shlex.quote(paths[0])} rows.jsonl --task NAME"
        say(f"{' and '.join(splits)} are taken as tasks; are they parts of one, then make them one: {joined}")
    return with_fixed_options(found, of_options, say)


def columns_of(source: Source, columns: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the names that a source's columns are read by, and what has to be said of how it is read.

    Raises:
        DataError: a column that there is not, or none for the input or the target.
    """
    told = [] if source.format in PLAIN else [f"{source.format} ({source.why}){left_out(source.ignored)}"]
    reasons = Counter(str(record) for _, record in source.found if isinstance(record, LeftOut))
    told += [f"{count} row(s) are left out: {reason}" for reason, count in reasons.items()]
    told += (
        []
        if source.encoding.startswith("utf-8")
        else [f"read as {source.encoding}; `rayml data convert --encoding` reads it otherwise"]
    )
    if source.format not in NAMED:
        if columns and source.format != "conll":
            raise DataError(
                f"{source.name}: {source.format} has columns of its own; leave --columns, or name a --format"
            )
        return {}, told
    keys = source.keys
    missing = [own for own in columns.values() if keys and own not in keys]
    if missing:
        raise DataError(f"{source.name}: has no column {', '.join(missing)}; there are {', '.join(keys)}")
    more = guess.guessed(keys, columns)
    taken = {**columns, **more}
    if keys and not all(any(name.split(".")[0] == key for name in (*taken, *keys)) for key in ("input", "target")):
        raise guess.unknown(source.name, [record for _, record in source.found if isinstance(record, dict)], taken)
    if more:
        ignored = left_out([key for key in keys if key not in (*taken.values(), *COLUMNS)])
        named = ", ".join(f"{own} as {name}" for name, own in more.items())
        told.append(f"columns {named}{ignored}; or say {guess.setting(taken)}")
    return taken, told


def left_out(columns: Sequence[str]) -> str:
    return f", and {', '.join(columns)} left out" if columns else ""


def checked(
    found: Iterable[tuple[str, dict[str, Any] | str]], columns: Mapping[str, str], task: str, kind: str | None
) -> tuple[list[Row], list[str], bool]:
    """Return the rows of (where, record or what is wrong with it), what is wrong with others, and whether targets were
    numbers."""
    rows, errors, numbers = [], [], False
    for where, record in found:
        try:
            if isinstance(record, str):
                raise RowError(record)
            row = row_of(record, columns, task, where)
            rows.append(row if row.kind or not kind else replace(row, kind=kind))
            numbers |= isinstance(record.get(columns.get("target", "target")), bool | int | float)
        except RowError as error:
            errors.append(f"{where}: {error}")
    return rows, errors, numbers


def mended(value: Any) -> Any:
    """Return a record with U+FFFD in place of halves of characters."""
    if isinstance(value, dict):
        return {key: mended(one) for key, one in value.items()}
    if isinstance(value, list):
        return [mended(one) for one in value]
    return re.sub("[\ud800-\udfff]", "\ufffd", value) if isinstance(value, str) else value


def unusable(errors: Sequence[str], advice: str) -> DataError:
    more = [f"... and {len(errors) - SHOWN_ERRORS} more"] if len(errors) > SHOWN_ERRORS else []
    shown = "\n  ".join(["rows that cannot be used:", *errors[:SHOWN_ERRORS], *more])
    return DataError(f"{shown}\n{advice}" if advice else shown)


def with_fixed_options(found: list[Row], tasks: Collection[str], say: Say = log.warning) -> list[Row]:
    """Return rows whose options are their task's labels: where rows have others each, they become a part of the input.

    What is chosen among options that no other row has is an answer to a question, and no label.

    Args:
        tasks: to look at.
    """
    sets: dict[str, set[frozenset[str]]] = {}
    for row in found:
        sets.setdefault(row.task, set()).add(frozenset(row.options))
    own = {task for task in tasks if len(sets[task]) > 1}
    moved = sum(bool(row.options) for row in found if row.task in own)
    if moved:
        say(f"{moved} row(s) have options of their own: these stand in the input now, and the answer is text")
    return [_asked_with_options(row) if row.task in own else row for row in found]


def _asked_with_options(row: Row) -> Row:
    text = "\n".join([row.input, *[f"Options: {'; '.join(row.options)}"] * bool(row.options)])
    return replace(row, input=text, options=(), kind=row.kind or "text", parts=())


def rows_given(examples: Examples) -> list[Row]:
    """Return the rows of examples in any form that people have them in.

    Args:
        examples: a path, or what else `read_rows` takes; a pandas DataFrame, or a `datasets.Dataset`, whose columns are
            named as a row's, or as is usual; or pairs `(input, target)`, records as dicts, and `Row`s.

    Raises:
        DataError: there are none, or some cannot be used, each with its place.
    """
    if isinstance(examples, str | Path):
        return read_rows([str(examples)])
    found: Any = examples
    if hasattr(examples, "iloc") and hasattr(examples, "columns"):
        found = _frame_records(examples)
    elif hasattr(examples, "features"):
        found = data_set_rows(examples)
    if isinstance(found, Mapping) or hasattr(found, "iloc") or not isinstance(found, Iterable):
        kind = type(examples).__name__
        raise DataError(f"examples: expected pairs (input, target), or dicts, one an example; got a {kind}")
    numbered = [(f"example {number}", one) for number, one in enumerate(found)]
    whole = [one for _, one in numbered if isinstance(one, Row)]
    others = [(where, _record(one)) for where, one in numbered if not isinstance(one, Row)]
    rows = _rows_of(as_rows(Source("examples", "examples", "jsonl", "", others), {})) if others else []
    if not whole and not rows:
        raise DataError("examples: there is none")
    return whole + rows


def _rows_of(source: Source) -> list[Row]:
    """Return the rows of records, and say what was guessed.

    Raises:
        DataError: some cannot be used.
    """
    taken, told = columns_of(source, {}) if source.keys else ({}, [])
    rows, errors, numbers = checked(source.kept, taken, source.task, None)
    if errors:
        raise unusable(errors, "")
    for note in [*told, *[NUMBERS] * numbers]:
        log.warning(f"{source.name}: {note}")
    return with_fixed_options(rows, {source.task} if source.format in OWN_OPTIONS else ())


def _record(one: Any) -> dict[str, Any] | str:
    """Return the record of a pair or a dict, or what is wrong with it."""
    one = plain(one)
    if isinstance(one, list) and len(one) == 2 and not is_spacy(one):
        return {"input": one[0], "target": one[1]}
    if isinstance(one, dict) or is_spacy(one):
        return record_of(one)
    return f"expected a pair (input, target), or a dict, got {str(one)[:60]!r}"


def plain(value: Any) -> Any:
    """Return a value of plain Python: numbers and arrays of numpy, torch and others as numbers and lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if not hasattr(value, "tolist"):
        return value
    found = value.tolist()
    return of_32_bits(found) if str(value.dtype).endswith("float32") and isinstance(found, float) else found


def _frame_records(frame: Any) -> Iterator[dict[str, Any] | tuple[Any, ...]]:
    """Yield the rows of a DataFrame without what is missing in them, which it writes as NaN; of one without names, the
    pairs.

    Raises:
        DataError: columns of one name, or of several parts.
    """
    names = list(frame.columns)
    twice = [str(name) for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice or any(isinstance(name, tuple) for name in names):
        of = f"two columns {', '.join(twice)}" if twice else f"columns of several parts, such as {names[0]}"
        raise DataError(f"examples: the DataFrame has {of}; name each by one text of its own: df.columns = [...]")
    short = {name for name, kind in frame.dtypes.items() if kind == "float32"}
    there = frame.astype(object).where(frame.notna(), None)
    for cells in there.itertuples(index=False, name=None):
        row = {
            name: of_32_bits(cell) if name in short and cell is not None else plain(cell)
            for name, cell in zip(names, cells, strict=True)
        }
        yield (
            tuple(row.values())
            if names == [0, 1]
            else {str(name): value for name, value in row.items() if value is not None}
        )
