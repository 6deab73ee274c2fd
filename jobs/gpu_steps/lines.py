"""The file of numbers: a line of JSON each, so that nothing is lost that was measured before a step was ended."""

import json
from pathlib import Path
from typing import Any


def write_line(file: Path, values: dict[str, Any]) -> None:
    with file.open("a") as out:
        out.write(json.dumps(values) + "\n")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the whole lines; what was killed may have left half a one."""
    found = []
    for line in file.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
