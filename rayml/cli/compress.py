"""`rayml compress`: a finished run on a smaller base."""

from typing import Annotated

import typer

from rayml.cli.app import Checkpoint, RunPath, app, err, out


@app.command()
def compress(
    run: RunPath,
    out_dir: Annotated[str, typer.Option("--out", help="The new run's folder; must not exist.", metavar="DIR")],
    quantize: Annotated[str | None, typer.Option(help="Weights of 8 or 4 bits.", metavar="int8|int4")] = None,
    distill: Annotated[
        str | None, typer.Option(help="Teach a smaller model, or the same with `layers=N`.", metavar="STUDENT")
    ] = None,
    prune: Annotated[
        float | None, typer.Option(help="Cut this share of every MLP's neurons.", metavar="FRACTION")
    ] = None,
    steps: Annotated[int, typer.Option(help="--distill: outer steps.", min=1)] = 200,
    lr: Annotated[float, typer.Option(help="--distill: rate of the student's layers.")] = 1e-4,
    temperature: Annotated[float, typer.Option(help="--distill: of the teacher's answers.")] = 2.0,
    hard: Annotated[float, typer.Option(help="--distill: weight of the labels' own loss.", min=0, max=1)] = 0.3,
    episodes: Annotated[int, typer.Option(help="Held-out episodes of each task to measure on.", min=2)] = 50,
    checkpoint: Checkpoint = None,
) -> None:
    """Compress a finished run's base for deployment, and measure what that costs and saves.

    DIR is a run folder like any other, with its base in DIR/base: evaluate it, adapt, serve, export, compress it again.
    """
    from rayml.compression.command import Distillation, compress_run

    how = Distillation(steps, lr, temperature, hard)
    compress_run(run, out_dir, quantize, distill, prune, how, episodes, checkpoint, out, err)
