"""The application that all commands belong to, and what they share."""

import atexit
import gc
import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from rayml.errors import RaymlError
from rayml.interrupt import heed, status

if TYPE_CHECKING:
    from pydantic import BaseModel


class Commands(TyperGroup):
    """Ends any command that Ctrl-C or SIGTERM interrupts with one line: what it says is kept, if anything."""

    def invoke(self, ctx: Any) -> Any:
        heed()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as end:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # what ends now is not to be interrupted again
            err.print(f"stopped{f': {end}' if str(end) else ''}", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(status(end)) from None


app = typer.Typer(
    cls=Commands,
    help="Meta-train causal language models, so that they learn a new task from a handful of examples.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at tasks before training on them.", no_args_is_help=True)
app.add_typer(data_app, name="data")

out = Console(width=None if sys.stdout.isatty() else 110, markup=False)  # room for tables in files and logs
err = Console(stderr=True, markup=False)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="One YAML a run; see configs/.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="Such as `inner.lr=0.3 workers=2`.")
]
RunPath = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A run folder that `rayml train` made, or its URI; or a start, as `minilm`."),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(help="`best` by meta-val, or `newest`; else the best where there were validations."),
]


def path(text: str) -> Path:
    """Return a path of the command line, `~` as home: no shell expands it behind `--out=`, nor within quotes."""
    return Path(text).expanduser()


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command line; what the user can put right is one message, not a traceback."""
    # torch and the rest leave a million objects, and none is garbage: looking for some every 700 new ones, and once
    # more at the end, takes a fourth of a short command's time.
    gc.set_threshold(50_000, 20, 20)
    atexit.register(gc.freeze)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    # On import they say which kernels, for other machines, were not loaded.
    for noisy in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        app()
    except RaymlError as error:
        err.print(type(error).__name__, style="bold red", end=": ")
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def print_keys(section: type["BaseModel"]) -> None:
    from rayml.config import keys

    for name, (default, meaning) in keys(section).items():
        shown = "required" if default is ... else f"default {default!r}"
        out.print(Text.assemble((name, "bold"), "  ", (shown, "dim")), highlight=False)
        out.print(f"    {meaning}", highlight=False, markup=False)
