"""Work on a cluster: `rayml submit`."""

from pathlib import Path
from typing import Annotated

import typer

from rayml.cli.app import app, err, out


@app.command(context_settings={"allow_interspersed_args": False})
def submit(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="The dashboard's, such as http://127.0.0.1:8265.")],
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="Such as `train CONFIG.yaml workers=8`.")],
    storage: Annotated[
        str | None,
        typer.Option(help="A folder that all nodes share: results go to DIR/NAME.", metavar="DIR"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The run's name; else that of `run.dir`.")] = None,
    working_dir: Annotated[
        Path, typer.Option(help="What is uploaded, without .git, runs, data and the like.", metavar="DIR")
    ] = Path("."),
    env: Annotated[list[str] | None, typer.Option(help="Variables for the job.", metavar="KEY=VALUE")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the job to end.")] = False,
    stop_on_interrupt: Annotated[
        bool, typer.Option("--stop-on-interrupt", help="Ctrl-C stops the job; else it goes on without you.")
    ] = False,
) -> None:
    """Run a rayml command on a Ray cluster: `rayml submit --storage /shared/runs ADDRESS train CONFIG.yaml workers=8`.

    The config is checked here first. Submitted again under the same name, training goes on where it stopped. Options of
    `submit` stand before ADDRESS. A cluster with token auth takes RAY_AUTH_MODE=token and RAY_AUTH_TOKEN.
    """
    variables = dict(one.partition("=")[::2] for one in env or [])
    if "" in variables.values() or "" in variables:
        raise typer.BadParameter("--env: expected KEY=VALUE")
    err.print("[dim]loading libraries ...[/]")
    from rayml.distributed.submit import submit as submit_job

    submit_job(address, command, working_dir, name, storage, variables, not detach, stop_on_interrupt, out)
