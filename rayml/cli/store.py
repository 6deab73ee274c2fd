"""`rayml store`: the adapters that servers keep, across their owners."""

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from rayml.cli.app import app, out
from rayml.errors import RunError

if TYPE_CHECKING:
    from rayml.serving.store import AdapterStore, Manifest

store_app = typer.Typer(help="List, move and delete the adapters of a server's store.", no_args_is_help=True)
app.add_typer(store_app, name="store")

StorePath = Annotated[str, typer.Argument(metavar="STORE", help="A folder, such as RUN/adapters, or a URI.")]
Owner = Annotated[str, typer.Argument(help="A key's name; `public`: made without keys.")]
Which = Annotated[list[str] | None, typer.Argument(metavar="[ADAPTER]...", help="Ids or names; else all of them.")]


@store_app.command("list")
def list_adapters(store: StorePath, owner: Annotated[str | None, typer.Option(help="Only this one's.")] = None) -> None:
    """List adapters by their owners."""
    from rayml.serving.store import AdapterStore, every

    opened = AdapterStore(store)
    table = Table("owner", "adapter", "examples", "made", "expires", box=None)
    for one in [owner] if owner else opened.owners():
        for manifest in every(opened, one):
            table.add_row(one, manifest.id, str(manifest.examples), day(manifest.created_at), day(manifest.expires_at))
    out.print(table)


@store_app.command()
def move(store: StorePath, owner: Owner, to: Owner, adapters: Which = None) -> None:
    """Give an owner's adapters to another: `rayml store move RUN/adapters public desk`."""
    from rayml.serving.store import NAME, AdapterStore

    if not NAME.fullmatch(to):
        raise typer.BadParameter(f"{to!r}: letters, digits, - and _, at most 64, beginning with a letter or digit")
    opened = AdapterStore(store)
    for manifest in chosen(opened, owner, adapters):
        opened.move(owner, manifest.id, to)
        out.print(f"{manifest.id}: {owner} -> {to}", highlight=False, soft_wrap=True)


@store_app.command()
def delete(
    store: StorePath, owner: Owner, adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...")]
) -> None:
    """Delete an owner's adapters, by their ids or names."""
    from rayml.serving.store import AdapterStore

    opened = AdapterStore(store)
    for manifest in chosen(opened, owner, adapters):
        opened.delete(owner, manifest.id)
        out.print(f"{manifest.id}: deleted", highlight=False, soft_wrap=True)


def chosen(store: "AdapterStore", owner: str, adapters: list[str] | None) -> list["Manifest"]:
    """Return an owner's adapters of these ids or names; all, if None.

    Raises:
        RunError: there is no such adapter.
    """
    from rayml.serving.store import every

    if not adapters:
        return list(every(store, owner))
    found = [(reference, store.find(owner, reference)) for reference in adapters]
    missing = [reference for reference, manifest in found if manifest is None]
    if missing:
        raise RunError(f"{owner} has no adapter {missing[0]!r} in {store.root}")
    return [manifest for _, manifest in found if manifest]


def day(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "never"
