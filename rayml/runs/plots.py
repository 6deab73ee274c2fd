"""Matplotlib for pictures in files: imported where one is drawn, and on machines without a screen."""

from typing import Any


def file_pyplot() -> Any:
    """Return pyplot, drawing to files alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
