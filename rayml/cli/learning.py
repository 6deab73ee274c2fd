"""Using what a run learned: `rayml adapt`, `predict`, `serve`, `publish`, `export`."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import rayml
from rayml.cli.app import Checkpoint, Json, RunPath, app, err, out, path, print_keys
from rayml.errors import RunError
from rayml.progress import show_activity
from rayml.starts import refuse_no_run
from rayml.tasks.formats.text import comma_separated

if TYPE_CHECKING:
    from rayml.adapter import Adapter

STARTS = (
    "A run folder that `rayml train` made, or its URI; or a start: `minilm` (for labels), `smollm2-135m` (for "
    "labels, spans, answers and other texts), or a model's folder."
)


@app.command()
def adapt(
    examples: Annotated[
        str, typer.Option(help="Rows of input and target, in any place and format that `data.path` reads.")
    ],
    out_dir: Annotated[str, typer.Option("--out", help="The adapter's folder, which must not exist.", metavar="DIR")],
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help=STARTS)] = None,
    name: Annotated[str | None, typer.Option(help="The adapter's name. Default: the folder's.")] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Inner steps. Default: those of the run or start.")] = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Learn one new task from a few examples. Writes a stock PEFT folder, which vLLM and LoRAX load, too.

    You get your own labels back: the folder records how the model sees them. Without a RUN, texts are learned by
    the start `smollm2-135m`. For labels, each start learns one half of your examples and answers the other, and the
    better one is used.
    """
    from rayml.adapter import new_folder
    from rayml.runs.folder import RunFolder
    from rayml.tasks.read import read_rows

    folder = new_folder(out_dir)
    rows = read_rows([examples])
    if run is None:
        with show_activity(
            err, "choosing a start; for labels, each answers half of the examples after learning the other"
        ):
            model, reason, _ = rayml.choose_start(rows)
        err.print(reason, style="dim", markup=False, highlight=False, soft_wrap=True)
    else:
        refuse_no_run(run)
        RunFolder(run).trained(checkpoint)  # raises at once if it is no finished run
        with show_activity(err, "loading libraries and model"):
            model = rayml.load(run, checkpoint=checkpoint)
    assert model.run is not None
    for line in (f"{model.run.start or model.run.path}: {model.checkpoint}", str(model.precision)):
        err.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
    adapter = model.adapt(rows, name=name or folder.name, steps=steps)
    adapter.save(folder)
    out.print(describe_adapter(adapter))
    if adapter.losses[-1] > adapter.losses[0]:
        warning = "the loss rose: the inner steps are too long for this task; lower inner.lr, or learn it"
        out.print(warning, style="yellow")
    out.print(f'next: rayml predict {shlex.quote(str(folder))} --input "..."', highlight=False, soft_wrap=True)


def describe_adapter(adapter: "Adapter") -> str:
    """Return a line about what an adapter learned, and how."""
    kind = f"{len(adapter.labels)} labels" if adapter.labels else "free text"
    if not adapter.algorithm.takes_steps and (adapter.shown or adapter.labels):
        how = f"kept for {'the prompt' if adapter.algorithm.keeps == 'prompt' else 'their hidden states'}"
    else:
        how = f"loss {adapter.losses[0]:.3f} -> {adapter.losses[-1]:.3f}"
    return f"learned {adapter.card.name!r}: {adapter.examples} examples, {kind}, {adapter.seconds:.2f} s, {how}"


@app.command()
def export(
    run: RunPath,
    out_dir: Annotated[str, typer.Option("--out", help="The folder to write, which must not exist.", metavar="DIR")],
    checkpoint: Checkpoint = None,
) -> None:
    """Write what a run learned for other libraries: its start as a PEFT adapter, or in mode full the whole model.

    `AutoModelForCausalLM.from_pretrained` loads the whole model, `PeftModel.from_pretrained` the adapter. It is a
    starting point for the run's inner loop, to be adapted to a task; without that it answers worse.
    """
    from rayml.adapter import new_folder

    refuse_no_run(run)
    new_folder(out_dir)
    model = rayml.load(run, checkpoint=checkpoint)
    folder = model.save(out_dir)
    kind = f"a PEFT adapter on {model.base}" if model.lm.adapter else "a Hugging Face model"
    out.print(f"{folder}: {kind}, after {model.step} outer steps", highlight=False, soft_wrap=True)


@app.command()
def predict(
    adapter: Annotated[str, typer.Argument(metavar="DIR", help="A folder that `rayml adapt` made, or its URI.")],
    text: Annotated[
        str,
        typer.Option("--input", help='A text; or JSON: fields, or messages `[{"role", "content"}]`.', metavar="TEXT"),
    ],
    options: Annotated[
        str | None,
        typer.Option(help="Choose among these: comma-separated, quoted if they hold a comma. Default: all labels."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer with a learned task: its most probable label, or a generated text."""
    choices = comma_separated(options) if options else None
    if "://" not in adapter and not (Path(adapter).expanduser() / "rayml.json").exists():
        raise RunError(f"{adapter}: no adapter that `rayml adapt` wrote: there is no rayml.json in it")
    with show_activity(err, "loading libraries and model"):
        loaded = rayml.load_adapter(adapter)
    prediction = loaded.predict(parse_input(text), choices)
    if as_json:
        result: dict[str, Any] = {"prediction": prediction.text, "probabilities": prediction.probabilities}
        if prediction.items is not None:
            result["items"] = prediction.items
        print(json.dumps(result, ensure_ascii=False))
        return
    out.print(prediction.text, style="bold", markup=False, highlight=False)
    for option, probability in sorted(prediction.probabilities.items(), key=lambda item: -item[1]):
        out.print(f"  {probability:.3f}  {option}", markup=False, highlight=False)


def parse_input(text: str) -> Any:
    """Return the fields or the dialogue that a text holds as JSON; else the text itself."""
    try:
        value = json.loads(text) if text.lstrip()[:1] in ("{", "[") else None
    except ValueError:
        return text
    if isinstance(value, dict) and value and all(isinstance(part, str) for part in value.values()):
        return value
    from rayml.tasks.row import is_dialogue

    return value if is_dialogue(value) else text


@app.command("serve")
def serve_run(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="A run folder that `rayml train` made.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value]...", help="Settings, such as `replicas.max=4 limits.steps=5`."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; beyond this machine an API key is needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.", min=1, max=65535)] = 8000,
    store: Annotated[str | None, typer.Option(help="Where adapters are kept. Default: RUN/adapters.")] = None,
    keys_file: Annotated[
        Path | None,
        typer.Option(parser=path, help="API keys, one per line, as `name: key`; those in RAYML_API_KEYS are added."),
    ] = None,
    metrics_port: Annotated[int | None, typer.Option(help="The port of the metrics for Prometheus.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond this machine without a key.")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="Print every setting with its default and meaning.")] = False,
    checkpoint: Checkpoint = None,
) -> None:
    """Serve a run: post a few examples, get an adapter in about a second, and ask it by name.

    It has OpenAI's API at /v1/completions and /v1/chat/completions, and also /v1/classify and /v1/adapters; /docs shows
    all of it. Ctrl-C stops it after the current requests.
    """
    if keys:
        from rayml.serving.settings import Serving

        print_keys(Serving)
        return
    if run is None:
        raise typer.BadParameter("give a RUN folder, or --keys")
    refuse_no_run(run)
    with show_activity(err, "loading libraries"):
        from rayml.serving.command import serve_forever

    serve_forever(run, overrides or [], host, port, store, keys_file, metrics_port, insecure, checkpoint, out)


@app.command()
def publish(
    adapter: Annotated[
        Path, typer.Argument(parser=path, metavar="DIR", help="A folder or zip file, made by `rayml adapt` or PEFT.")
    ],
    run: Annotated[str, typer.Option(help="The served run's folder.", metavar="RUN")],
    name: Annotated[str | None, typer.Option(help="The adapter's name. Default: the folder's.")] = None,
    store: Annotated[str | None, typer.Option(help="The server's store. Default: RUN/adapters.")] = None,
    owner: Annotated[str | None, typer.Option(help="The name of the API key that owns it.")] = None,
) -> None:
    """Put an adapter that was learned elsewhere into a server's store, after checking that it fits the run's base.

    It belongs to --owner, or else to the unnamed key in RAYML_API_KEY, or else to servers without keys.
    """
    from rayml.serving.command import publish_adapter

    publish_adapter(adapter, run, name, store, out, owner)
