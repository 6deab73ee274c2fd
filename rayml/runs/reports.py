"""The look of reports: tables on a terminal, and figures in files. Only a figure imports matplotlib."""

import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from rayml.runs.files import AnyPath

OURS, THEIRS = "#1f6f54", "#b0552f"
COLOURS = OURS, THEIRS, "#3b6ea5", "#8a5a9e", "#b8860b", "#4d4d4d", "#c2417c", "#2f8f9d", "#7a8b2a", "#a0522d"


def table(heads: Iterable[str], left: Sequence[str] = (), no_wrap: bool = False, **settings: Any) -> Table:
    """Return an empty table. The columns in `left` hold text, the others numbers."""
    result = Table(box=SIMPLE_HEAD, **{"padding": (0, 1, 0, 0), "title_justify": "left"} | settings)
    for head in heads:
        result.add_column(head, justify="left" if head in left else "right", no_wrap=no_wrap)
    return result


def file_pyplot() -> Any:
    """Return pyplot, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, picture: AnyPath) -> None:
    """Write a figure as a PNG, and close it."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    picture.write_bytes(data.getvalue())
    file_pyplot().close(figure)
