"""`rayml submit`: a run on a cluster; `rayml compress`: a finished run on a smaller base."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rayml.cli.app import Checkpoint, RunPath, app, err, out, path
from rayml.progress import show_activity

if TYPE_CHECKING:
    from rayml.training.submit import Command


@app.command(context_settings={"allow_interspersed_args": False})
def submit(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="Of the dashboard, such as http://127.0.0.1:8265.")],
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="Such as `train CONFIG.yaml workers=8`.")],
    storage: Annotated[
        str | None,
        typer.Option(help="A folder that all nodes share, or its URI; results go to DIR/NAME.", metavar="DIR"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The run's name. Default: that of `run.dir`.")] = None,
    working_dir: Annotated[
        Path,
        typer.Option(parser=path, help="The folder to upload, without .git, runs, data and the like.", metavar="DIR"),
    ] = Path("."),
    env: Annotated[
        list[str] | None,
        typer.Option(help="Variables for the job; KEY alone takes the value it has here.", metavar="KEY[=VALUE]"),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the job to end.")] = False,
    stop_on_interrupt: Annotated[
        bool, typer.Option("--stop-on-interrupt", help="Let Ctrl-C stop the job, which otherwise goes on.")
    ] = False,
) -> None:
    """Run a rayml command on a Ray cluster: `rayml submit --storage /shared/runs ADDRESS train CONFIG.yaml workers=8`.

    The config is checked here first. If it is submitted again under the same name, training continues where it stopped.
    Options of `submit` go before ADDRESS. For a cluster with token auth set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN.
    """
    variables: dict[str, str | None] = {}
    for variable in env or []:
        key, equals, value = variable.partition("=")
        variables[key] = value if equals else os.environ.get(key)
    missing = [key for key, value in variables.items() if not key or value is None]
    if missing:
        raise typer.BadParameter(f"--env: expected KEY=VALUE, or a KEY that is set here; got {', '.join(missing)}")
    with show_activity(err, "loading libraries"):
        from rayml.training.submit import submit as submit_job

    job_env = {key: value for key, value in variables.items() if value is not None}
    submit_job(address, parse_command(command), working_dir, name, storage, job_env, not detach, stop_on_interrupt, out)


def parse_command(words: list[str]) -> "Command":
    """Parse a rayml command with its own parser."""
    from rayml.training.submit import Command

    group = typer.main.get_command(app)
    command = group.get_command(typer.Context(group), words[0]) if hasattr(group, "get_command") else None
    if command is None or words[0] == "submit":
        raise typer.BadParameter(f"COMMAND: rayml has no {words[0]!r} to submit")
    parameters = command.make_context(words[0], words[1:]).params
    return Command(
        words,
        config=parameters.get("config"),
        overrides=parameters.get("overrides") or [],
        out=parameters.get("out_dir"),
        data=parameters.get("data") or [],
        resumes=parameters.get("resume") is False,
    )


@app.command()
def compress(
    run: RunPath,
    out_dir: Annotated[str, typer.Option("--out", help="The new run's folder, which must not exist.", metavar="DIR")],
    quantize: Annotated[str | None, typer.Option(help="Store weights in 8 or 4 bits.", metavar="int8|int4")] = None,
    distill: Annotated[
        str | None, typer.Option(help="Teach a smaller model, or the same model with `layers=N`.", metavar="STUDENT")
    ] = None,
    prune: Annotated[
        float | None, typer.Option(help="Remove this share of every MLP's neurons.", metavar="FRACTION")
    ] = None,
    steps: Annotated[int, typer.Option(help="--distill: outer steps.", min=1)] = 200,
    lr: Annotated[float, typer.Option(help="--distill: learning rate of the student's layers.")] = 1e-4,
    temperature: Annotated[float, typer.Option(help="--distill: temperature of the teacher's answers.")] = 2.0,
    hard: Annotated[float, typer.Option(help="--distill: weight of the labels' own loss.", min=0, max=1)] = 0.3,
    episodes: Annotated[int, typer.Option(help="Held-out episodes per task for measuring.", min=2)] = 50,
    checkpoint: Checkpoint = None,
) -> None:
    """Compress a finished run's base for deployment, and measure what that costs and saves.

    DIR becomes a run folder like any other, with its base in DIR/base: evaluate it, adapt, serve, export, compress it.
    """
    from rayml.compression.command import Distillation, compress_run

    distillation = Distillation(steps, lr, temperature, hard)
    compress_run(run, out_dir, quantize, distill, prune, distillation, episodes, checkpoint, out, err)
