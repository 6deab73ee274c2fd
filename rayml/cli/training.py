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
        bool, typer.Option("--resume", help="Go on from the last whole checkpoint, if there is one.")
    ] = False,
    continued: Annotated[
        str | None,
        typer.Option("--continue", help="Begin with what this run learned, and replay its tasks.", metavar="RUN"),
    ] = None,
) -> None:
    """Meta-train on Ray: checkpoints, metrics and the resolved config go to `run.dir`.

    Everything that can be wrong with the input is checked before Ray starts. Watch it with
    `tensorboard --logdir RUN/tensorboard`.

    With `--continue RUN` a run stays current: it goes on from RUN with new tasks, `data.replay` of the episodes are of
    the old ones, and in the end the old meta-test tasks tell what was forgotten.
    """
    from rayml.api import trained_run

    settings = rayml.load_config(config, overrides)
    run = trained_run(settings, resume=resume, continues=continued)
    taken = run.records()[-1]["step"]
    early = "" if taken == settings.outer.steps else " (meta-val got no better: stopped early)"
    out.print(f"meta-trained {taken} steps{early}: {run.path}", soft_wrap=True)
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
        typer.Option(help="Memory of a worker's GPU; else that of the GPU here.", min=0.001, metavar="GIB"),
    ] = None,
    target_tokens: Annotated[int, typer.Option(help="Tokens of a target: a label's 1, free text's more.", min=1)] = 1,
    as_json: Json = False,
) -> None:
    """Count the memory that a worker needs, part by part, before anything starts. Exits with 1 where it does not fit.

    Reads no more of the model than its config.json. `rayml plan configs/llama-1b.yaml engine=zero --gpu-gib 24`
    says what fits on 24 GiB, and the smallest change that would.
    """
    from rayml.planning.plan import plan as make_plan

    if not make_plan(rayml.load_config(config, overrides), gpu_gib, target_tokens, as_json, out):
        raise typer.Exit(1)


@app.command()
def scaling(
    config: ConfigPath,
    overrides: Overrides = None,
    out_file: Annotated[Path, typer.Option("--out", parser=path, help="Where the plot goes.", metavar="PNG")] = Path(
        "scaling.png"
    ),
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs, comma-separated.")] = "8,16,32,64,128,256,512",
    network: Annotated[str, typer.Option(help="GB/s that each GPU sends to other nodes.")] = "50,12.5,1.25",
    link: Annotated[float, typer.Option(help="GB/s that each GPU sends within its node.", min=0.001)] = 450,
    node_gpus: Annotated[int, typer.Option(help="GPUs of a node.", min=1)] = 8,
    tflops: Annotated[float, typer.Option(help="TFLOP/s of a GPU, dense, in the model's dtype.", min=0.001)] = 989,
    utilisation: Annotated[float, typer.Option(help="The share of those that training gets.", min=0.001, max=1)] = 0.4,
    as_json: Json = False,
) -> None:
    """Predict an outer step on many GPUs, from the bytes that workers send and the FLOPs that they do.

    The bytes are those that real collectives were counted to send; the rates are yours to give, an H100's else.
    Workers get as many tasks each as the config gives one; in mode full under ZeRO they share each task's rows.
    """
    from rayml.planning.scaling import Machines
    from rayml.planning.scaling import scaling as show_scaling

    machines = Machines(tflops * 1e12, utilisation, node_gpus, link * 1e9)
    networks = [1e9 * one for one in reversed(numbers(network, float, "--network"))]
    workers = numbers(gpus, int, "--gpus")
    show_scaling(rayml.load_config(config, overrides), workers, networks, machines, out_file, as_json, out)


@app.command()
def evaluate(
    run: RunPath,
    data: Annotated[list[str] | None, typer.Option(help="Tasks never seen in training, instead of meta-test.")] = None,
    ways: Annotated[int | None, typer.Option(help="Classes in an episode.", min=2)] = None,
    shots: Annotated[int | None, typer.Option(help="Support examples per class.", min=1)] = None,
    episodes: Annotated[int, typer.Option(help="Episodes of each task.", min=2)] = 50,
    seed: Annotated[int, typer.Option(help="Draws the episodes.")] = 0,
    split: Annotated[str, typer.Option(help="`test`, or `val` to choose settings by.")] = "test",
    checkpoint: Checkpoint = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", parser=path, help="Where the numbers go.", metavar="FILE")
    ] = None,
) -> None:
    """Adapt to held-out tasks, from the meta-trained start and from an untrained one, and compare.

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
        typer.Option(help="A key and what it may be; also uniform, randint, choice.", metavar="KEY=loguniform(LO,HI)"),
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Settings to try; else sweep.trials.", min=1)] = None,
    concurrent: Annotated[
        int | None, typer.Option(help="Trials at a time; else as many as there is room for.", min=1)
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help="`asha` stops trials that are behind, or `none`.")] = None,
    searcher: Annotated[str | None, typer.Option(help="`optuna`, `random` or `grid`.")] = None,
    metric: Annotated[str | None, typer.Option(help="On meta-val: the score `after` adapting, or the `gain`.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a sweep that was cut off.")] = False,
) -> None:
    """Search settings by Ray Tune: every trial is a training run, scored on meta-val as it goes.

    `rayml sweep CONFIG.yaml --search "inner.lr=loguniform(1e-2,1)" --search "outer.lr=loguniform(1e-4,1e-2)"`

    The same stands in the YAML's `sweep` section. All goes to `run.dir`: the trials' runs, `best.yaml` for `rayml
    train`, `trials.csv`, `trials.json` and `sweep.png`. A trial that fails is reported, and the sweep goes on.
    """
    given = {"trials": trials, "concurrent": concurrent, "scheduler": scheduler, "searcher": searcher, "metric": metric}
    settings = {f"sweep.{key}": value for key, value in given.items() if value is not None}
    searched = {key: text for key, _, text in (one.partition("=") for one in search or [])}
    rayml.sweep(config, overrides, search=searched, resume=resume, console=out, **settings)


@app.command()
def compare(
    config: ConfigPath,
    overrides: Overrides = None,
    methods: Annotated[
        str | None, typer.Option(help=f"Comma-separated; else {', '.join(USUAL)}. There are also {', '.join(UNUSUAL)}.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="One more method: a name and what it changes.", metavar='NAME="key=value ..."'),
    ] = None,
    run: Annotated[list[str] | None, typer.Option(help="A run folder that takes part as it is.", metavar="RUN")] = None,
    data: Annotated[list[str] | None, typer.Option(help="In place of `data.path`.", metavar="PATH")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each method.", min=1)] = 5,
    episodes: Annotated[int, typer.Option(help="Episodes of each meta-test task.", min=2)] = 20,
    val_episodes: Annotated[int, typer.Option(help="Meta-val episodes to choose each adaptation by.", min=1)] = 24,
    rates: Annotated[str, typer.Option(help="Factors on the inner rates, each tried.")] = "0.1,0.3,1,3",
    steps: Annotated[str, typer.Option(help="Numbers of inner steps, each tried.")] = "1,3,6",
    encoder: Annotated[
        str,
        typer.Option(help="Sentence encoder of embedding and setfit: minilm, a folder, or a Hub id.", metavar="MODEL"),
    ] = "minilm",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs, tokens and time, and stop.")] = False,
    out_dir: Annotated[str, typer.Option("--out", help="Where all goes.", metavar="DIR")] = "runs/compare",
) -> None:
    """Is meta-training worth it on your tasks? Train every method with equal tokens, and ask all the same.

    `lora` adapts from an untrained start, `full` and the like fine-tune the model itself. `embedding` is a sentence
    encoder with the nearest centroid or logistic regression, whichever meta-val prefers; `setfit` fine-tunes that
    encoder. Both need `pip install 'rayml[baselines]'`. The config's outer steps are those of the default algorithm;
    the others take as many as come to the same number of forward-backward tokens. Rate and steps of each adaptation are
    chosen on meta-val, with the same number of tries. Cut off, it goes on where it stopped.
    Writes `report.md` and `report.html`, and every answer to `results/`.
    """
    rayml.compare(
        config,
        overrides,
        methods=[name.strip() for name in methods.split(",")] if methods else [],
        variants={name: shlex.split(text) for name, _, text in (one.partition("=") for one in variant or [])},
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


def numbers(text: str, kind: type, option: str) -> list[Any]:
    """Return comma-separated numbers above zero, sorted."""
    try:
        found = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] <= 0:
        raise typer.BadParameter(f"{option}: expected numbers above 0 with commas between, got {text!r}")
    return found
