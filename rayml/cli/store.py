"""`rayml store`: the adapters of a server's store, of all owners."""

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
Owner = Annotated[str, typer.Argument(help="The name of an API key; `public` if the server has no keys.")]
Which = Annotated[list[str] | None, typer.Argument(metavar="[ADAPTER]...", help="Ids or names. Default: all.")]


@store_app.command("list")
def list_adapters(
    store: StorePath, owner: Annotated[str | None, typer.Option(help="List this owner's alone.")] = None
) -> None:
    """List adapters by owner."""
    from rayml.serving.store import AdapterStore, all_manifests

    adapters = AdapterStore(store, create=False)
    table = Table("owner", "adapter", "examples", "made", "expires", box=None)
    for name in [owner] if owner else adapters.owners():
        for manifest in all_manifests(adapters, name):
            made, expires = format_time(manifest.created_at), format_time(manifest.expires_at)
            table.add_row(name, manifest.id, str(manifest.examples), made, expires)
    out.print(table)


@store_app.command()
def move(store: StorePath, owner: Owner, to: Owner, adapters: Which = None) -> None:
    """Give adapters to another owner: `rayml store move RUN/adapters public desk`."""
    from rayml.serving.store import NAME, AdapterStore

    if not NAME.fullmatch(to):
        raise typer.BadParameter(f"{to!r}: letters, digits, - and _, at most 64, beginning with a letter or digit")
    opened = AdapterStore(store, create=False)
    for manifest in find_adapters(opened, owner, adapters):
        opened.move(owner, manifest.id, to)
        out.print(f"{manifest.id}: {owner} -> {to}", highlight=False, soft_wrap=True)


@store_app.command()
def delete(
    store: StorePath, owner: Owner, adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...")]
) -> None:
    """Delete an owner's adapters, by their ids or names."""
    from rayml.serving.store import AdapterStore

    opened = AdapterStore(store, create=False)
    for manifest in find_adapters(opened, owner, adapters):
        opened.delete(owner, manifest.id)
        out.print(f"{manifest.id}: deleted", highlight=False, soft_wrap=True)


def find_adapters(store: "AdapterStore", owner: str, adapters: list[str] | None) -> list["Manifest"]:
    """Return an owner's adapters with these ids or names; all, if None.

    Raises:
        RunError: there is no such adapter.
    """
    from rayml.serving.store import all_manifests

    if not adapters:
        return list(all_manifests(store, owner))
    manifests = []
    for reference in adapters:
        manifest = store.find(owner, reference)
        if manifest is None:
            raise RunError(f"{owner} has no adapter {reference!r} in {store.root}")
        manifests.append(manifest)
    return manifests


def format_time(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "never"
