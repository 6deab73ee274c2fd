"""Matplotlib for pictures in files: imported where one is drawn, and on machines without a screen."""

import io
from typing import Any

from rayml.runs.files import AnyPath


def file_pyplot() -> Any:
    """Return pyplot, drawing to files alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, picture: AnyPath) -> None:
    """Write a figure as a PNG, and close it."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    picture.write_bytes(drawn.getvalue())
    file_pyplot().close(figure)
