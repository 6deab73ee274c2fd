"""What `rayml data convert` prints on its way."""

import json
from pathlib import Path

from rich.console import Console
from rich.progress import track

from rayml.errors import DataError
from rayml.tasks.convert import kinds_of, record_of, rows, sources, with_fixed_options, write
from rayml.tasks.kinds import NAMES
from rayml.tasks.row import COLUMNS

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
    err: Console,
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
    mapping = mapped(columns)
    found = []
    files = sources(given, format)
    for source in track(files, "reading", console=err, disable=len(files) < 2 or not err.is_terminal):
        if len(files) <= 8:
            out.print(f"{source.path}: {source.format} ({source.why})", highlight=False, soft_wrap=True)
        found += rows(source, mapping, task, kind)
    kept = with_fixed_options(found)
    write(kept, to)
    tasks = len({row.task for row in kept})
    kinds = ", ".join(f"{count} {name}" for name, count in kinds_of(kept).items())
    out.print(f"{to}: {len(kept)} rows of {tasks} task(s): {kinds}", highlight=False, soft_wrap=True)
    moved = sum(bool(before.options) and not after.options for before, after in zip(found, kept, strict=True))
    if moved:
        out.print(f"{moved} row(s) have options of their own: these stand in the input now, and the answer is text")
    example = json.dumps(record_of(kept[0]), ensure_ascii=False)
    out.print(example[:SHOWN] + "..." * (len(example) > SHOWN), markup=False, highlight=False, soft_wrap=True)
    out.print(f"next: [bold]rayml data check {to}[/]", soft_wrap=True)


def mapped(columns: str | None) -> dict[str, str]:
    """Return the mapping in `input=text,target=label`.

    Raises:
        DataError: it is none, or names what rows do not have.
    """
    pairs = [pair.partition("=") for pair in (columns or "").split(",") if pair.strip()]
    for name, equals, own in pairs:
        if not equals or not own.strip() or not (name.strip() in COLUMNS or name.strip().startswith("input.")):
            raise DataError(f"--columns: {name + equals + own!r}: expected NAME=COLUMN; names are {', '.join(COLUMNS)}")
    return {name.strip(): own.strip() for name, _, own in pairs}
