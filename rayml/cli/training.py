"""Meta-training: `rayml train`, `config`, `plan`, `evaluate`, `sweep`, `compare`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import rayml
from rayml.algorithms.methods import UNUSUAL, USUAL
from rayml.cli.app import Checkpoint, ConfigPath, Json, Overrides, RunPath, app, out, path, print_keys
from rayml.starts import refuse_no_run


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last complete checkpoint, if there is one.")
    ] = False,
    continued: Annotated[
        str | None,
        typer.Option("--continue", help="Begin from what this run learned, and replay its tasks.", metavar="RUN"),
    ] = None,
) -> None:
    """Meta-train on Ray. Checkpoints, metrics and the resolved config go to `run.dir`.

    All input is checked before Ray starts. Watch training with `tensorboard --logdir RUN/tensorboard`.

    With `--continue RUN` training begins from RUN, with new tasks. A share of `data.replay` of the episodes has old
    tasks, and at the end the old meta-test tasks show what was forgotten.
    """
    from rayml.api import trained_run

    settings = rayml.load_config(config, overrides)
    run = trained_run(settings, resume=resume, continues=continued)
    steps = run.records()[-1]["step"]
    early = "" if steps == settings.outer.steps else " (meta-val got no better: stopped early)"
    out.print(f"meta-trained {steps} steps{early}: {run.path}", soft_wrap=True)
    out.print(f"next: rayml evaluate {shlex.quote(settings.run.dir)}", highlight=False, soft_wrap=True)


@app.command("config")
def show_config(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG.yaml")] = None,
    overrides: Overrides = None,
    keys: Annotated[bool, typer.Option("--keys", help="Print every key with its default and meaning.")] = False,
) -> None:
    """Print the resolved config, or every mistake in it."""
    from rayml.config import Config, dump_config

    if keys:
        print_keys(Config)
        return
    if config is None:
        raise typer.BadParameter("give a CONFIG.yaml, or --keys")
    out.print(dump_config(rayml.load_config(config, overrides)), end="", markup=False, highlight=False, soft_wrap=True)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu_gib: Annotated[
        float | None,
        typer.Option(help="Memory of a worker's GPU. Default: that of the GPU here.", min=0.001, metavar="GIB"),
    ] = None,
    target_tokens: Annotated[
        int, typer.Option(help="Tokens of a target: 1 for a label, more for free text.", min=1)
    ] = 1,
    as_json: Json = False,
) -> None:
    """Estimate the memory that a worker needs, part by part, before anything starts. Exits with 1 if it does not fit.

    Of the model it reads only config.json. `rayml plan configs/llama-1b.yaml engine=zero --gpu-gib 24` says whether the
    run fits on 24 GiB, and if not, the smallest change with which it would.
    """
    from rayml.planning.plan import plan as make_plan

    if not make_plan(rayml.load_config(config, overrides), gpu_gib, target_tokens, as_json, out):
        raise typer.Exit(1)


@app.command()
def scaling(
    config: ConfigPath,
    overrides: Overrides = None,
    out_file: Annotated[Path, typer.Option("--out", parser=path, help="The file for the plot.", metavar="PNG")] = Path(
        "scaling.png"
    ),
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs, comma-separated.")] = "8,16,32,64,128,256,512",
    network: Annotated[str, typer.Option(help="GB/s that each GPU sends to other nodes.")] = "50,12.5,1.25",
    link: Annotated[float, typer.Option(help="GB/s that each GPU sends within its node.", min=0.001)] = 450,
    node_gpus: Annotated[int, typer.Option(help="GPUs per node.", min=1)] = 8,
    tflops: Annotated[float, typer.Option(help="TFLOP/s of a GPU, dense, in the model's dtype.", min=0.001)] = 989,
    utilisation: Annotated[
        float, typer.Option(help="The share of these FLOPs that training achieves.", min=0.001, max=1)
    ] = 0.4,
    as_json: Json = False,
) -> None:
    """Predict the time of an outer step on many GPUs, from the bytes that workers send and the FLOPs that they do.

    The bytes were counted in real collectives. The rates are those that you give; the defaults are an H100's. Each
    worker gets as many tasks as in the config; in mode full under ZeRO all workers share the rows of each task.
    """
    from rayml.planning.scaling import Machines
    from rayml.planning.scaling import scaling as show_scaling

    machines = Machines(tflops * 1e12, utilisation, node_gpus, link * 1e9)
    networks = [1e9 * rate for rate in reversed(numbers(network, float, "--network"))]
    workers = numbers(gpus, int, "--gpus")
    show_scaling(rayml.load_config(config, overrides), workers, networks, machines, out_file, as_json, out)


@app.command()
def evaluate(
    run: RunPath,
    data: Annotated[list[str] | None, typer.Option(help="Tasks that training never saw, instead of meta-test.")] = None,
    ways: Annotated[int | None, typer.Option(help="Classes in an episode.", min=2)] = None,
    shots: Annotated[int | None, typer.Option(help="Support examples per class.", min=1)] = None,
    episodes: Annotated[int, typer.Option(help="Episodes per task.", min=2)] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the episodes.")] = 0,
    split: Annotated[str, typer.Option(help="`test`, or `val` to choose settings with.")] = "test",
    checkpoint: Checkpoint = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", parser=path, help="The file for the numbers.", metavar="FILE")
    ] = None,
) -> None:
    """Adapt to held-out tasks from the meta-trained start and from an untrained one, and compare.

    Prints a table, and writes `evaluation.json` and `adaptation.png` into the run folder.
    """
    refuse_no_run(run)
    rayml.evaluate(
        run,
        data=data,
        ways=ways,
        shots=shots,
        episodes=episodes,
        seed=seed,
        split=split,
        checkpoint=checkpoint,
        json_file=json_file,
        console=out,
    )


@app.command()
def sweep(
    config: ConfigPath,
    overrides: Overrides = None,
    search: Annotated[
        list[str] | None,
        typer.Option(help="A key and its range; also uniform, randint, choice.", metavar="KEY=loguniform(LO,HI)"),
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Number of trials. Default: sweep.trials.", min=1)] = None,
    concurrent: Annotated[
        int | None, typer.Option(help="Trials at a time. Default: as many as there is room for.", min=1)
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="`asha`, which stops trials that are behind, or `none`.")
    ] = None,
    searcher: Annotated[str | None, typer.Option(help="`optuna`, `random` or `grid`.")] = None,
    metric: Annotated[str | None, typer.Option(help="The score on meta-val: `after` adapting, or its `gain`.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a sweep that was cut off.")] = False,
) -> None:
    """Search settings with Ray Tune: every trial is a training run, scored on meta-val as it runs.

    `rayml sweep CONFIG.yaml --search "inner.lr=loguniform(1e-2,1)" --search "outer.lr=loguniform(1e-4,1e-2)"`

    The YAML's `sweep` section has the same settings. Everything goes to `run.dir`: the trials' runs, `best.yaml` for
    `rayml train`, `trials.csv`, `trials.json` and `sweep.png`. A failed trial is reported, and the sweep goes on.
    """
    given = {"trials": trials, "concurrent": concurrent, "scheduler": scheduler, "searcher": searcher, "metric": metric}
    settings = {f"sweep.{key}": value for key, value in given.items() if value is not None}
    rayml.sweep(config, overrides, search=named(search, "--search"), resume=resume, console=out, **settings)


@app.command()
def compare(
    config: ConfigPath,
    overrides: Overrides = None,
    methods: Annotated[
        str | None,
        typer.Option(help=f"Comma-separated. Default: {', '.join(USUAL)}. There are also {', '.join(UNUSUAL)}."),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="One more method: its name and the settings that it changes.", metavar='NAME="key=value ..."'
        ),
    ] = None,
    run: Annotated[list[str] | None, typer.Option(help="A finished run to compare as it is.", metavar="RUN")] = None,
    data: Annotated[list[str] | None, typer.Option(help="In place of `data.path`.", metavar="PATH")] = None,
    seeds: Annotated[int, typer.Option(help="Runs per method.", min=1)] = 5,
    episodes: Annotated[int, typer.Option(help="Episodes per meta-test task.", min=2)] = 20,
    val_episodes: Annotated[
        int, typer.Option(help="Meta-val episodes on which each adaptation is chosen.", min=1)
    ] = 24,
    rates: Annotated[str, typer.Option(help="Factors on the inner rates to try.")] = "0.1,0.3,1,3",
    steps: Annotated[str, typer.Option(help="Numbers of inner steps to try.")] = "1,3,6",
    encoder: Annotated[
        str,
        typer.Option(help="Sentence encoder of embedding and setfit: minilm, a folder, or a Hub id.", metavar="MODEL"),
    ] = "minilm",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs, tokens and time, and stop.")] = False,
    out_dir: Annotated[str, typer.Option("--out", help="The folder for everything.", metavar="DIR")] = "runs/compare",
) -> None:
    """Is meta-training worth it on your tasks? Train every method with equal tokens, and ask all the same questions.

    `lora` adapts from an untrained start; `full` and the like fine-tune the model itself. `embedding` is a sentence
    encoder with the nearest centroid or logistic regression, whichever does better on meta-val; `setfit` fine-tunes
    that encoder. Both need packages of their own; if one is missing, the error has the command that installs it. The
    config's outer steps are those of the default algorithm; other methods take as many steps as use the same number of
    forward-backward tokens. The rate and steps of each adaptation are chosen on meta-val, with equally many tries. If
    it is cut off, run it again to continue. Writes `report.md` and `report.html`, and every answer to `results/`.
    """
    rayml.compare(
        config,
        overrides,
        methods=[name.strip() for name in methods.split(",")] if methods else [],
        variants=variants(variant),
        runs=run or [],
        seeds=seeds,
        episodes=episodes,
        val_episodes=val_episodes,
        rates=numbers(rates, float, "--rates"),
        steps=numbers(steps, int, "--steps"),
        encoder=encoder,
        out=out_dir,
        dry_run=dry_run,
        command=shlex.join(["rayml", *sys.argv[1:]]),
        console=out,
        **({"data.path": data} if data else {}),
    )


def variants(texts: list[str] | None) -> dict[str, list[str]]:
    """Return the settings of each variant by its name."""
    split = {}
    for name, changes in named(texts, "--variant").items():
        try:
            split[name] = shlex.split(changes)
        except ValueError as error:
            raise typer.BadParameter(f"--variant {name}: {error}, in {changes!r}") from error
    return split


def named(texts: list[str] | None, option: str) -> dict[str, str]:
    """Return the values of `NAME=value` texts by their names."""
    values: dict[str, str] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise typer.BadParameter(f"{option}: expected NAME=VALUE, got {text!r}")
        if name in values:
            raise typer.BadParameter(f"{option}: {name} is given twice")
        values[name] = value
    return values


def numbers(text: str, kind: type, option: str) -> list[Any]:
    """Return the comma-separated numbers in a text, sorted; all must be above zero."""
    try:
        values = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        values = []
    if not values or not all(value > 0 for value in values):
        raise typer.BadParameter(f"{option}: expected comma-separated numbers above 0, got {text!r}")
    return values
