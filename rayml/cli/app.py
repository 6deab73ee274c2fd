"""The application that all commands belong to, and what the commands share."""

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
from rayml.interrupt import exit_status, install_handlers

if TYPE_CHECKING:
    from pydantic import BaseModel


class Commands(TyperGroup):
    """Ends an interrupted command (Ctrl-C, SIGTERM) with one line, which says what is kept, if anything."""

    def invoke(self, ctx: Any) -> Any:
        install_handlers()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the clean-up
            message = f"stopped: {interrupt}" if str(interrupt) else "stopped"
            err.print(message, markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(exit_status(interrupt)) from None


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

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="The run's YAML; see configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value]...", help="Settings to change, such as `inner.lr=0.3 workers=2`."),
]
RunPath = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run folder that `rayml train` made, or its URI; or a start, such as `minilm`."
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(help="`best` by meta-val, or `newest`. Default: the best if there were validations, else the newest."),
]


def path(text: str) -> Path:
    """Return a path of the command line with `~` expanded, which no shell does behind `--out=` or within quotes."""
    return Path(text).expanduser()


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command line. An error that the user can fix is printed as one message without a traceback."""
    # torch and other libraries create a million objects that are never garbage. Collecting after every 700 new ones and
    # at exit takes a quarter of a short command's time.
    gc.set_threshold(50_000, 20, 20)
    atexit.register(gc.freeze)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    # On import these warn about kernels for other machines that they could not load.
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
        note = "required" if default is ... else f"default {default!r}"
        out.print(Text.assemble((name, "bold"), "  ", (note, "dim")), highlight=False)
        out.print(f"    {meaning}", highlight=False, markup=False)
