"""What a run has learned, put to use: `rayml adapt`, `predict`, `serve`, `publish`, `export`."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import rayml
from rayml.cli.app import Checkpoint, Json, RunPath, app, err, out, path, print_keys
from rayml.errors import RunError
from rayml.progress import doing
from rayml.starts import refuse_no_run
from rayml.tasks.formats.text import comma_separated

if TYPE_CHECKING:
    from rayml.adapter import Adapter

STARTS = "A run folder that `rayml train` made, or its URI; or a start: `minilm`, `smollm2-135m`, or a model's folder."


@app.command()
def adapt(
    examples: Annotated[
        Path, typer.Option(parser=path, help="Rows of input and target, in any format that `data.path` takes.")
    ],
    out_dir: Annotated[str, typer.Option("--out", help="The adapter's folder; must not exist.", metavar="DIR")],
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help=STARTS)] = None,
    name: Annotated[str | None, typer.Option(help="The adapter's name; else the folder's.")] = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Learn one new task from a few examples: writes a stock PEFT folder that also vLLM and LoRAX load.

    Labels are your own: what the model sees of them is kept in the folder. Without a RUN it takes the start, of those
    that come with rayml, that does better on half of your examples after learning the other half.
    """
    from rayml.adapter import new_folder
    from rayml.runs.folder import RunFolder
    from rayml.tasks.read import read_rows

    to = new_folder(out_dir)
    rows = read_rows([str(examples)])
    if run is None:
        with doing(err, "each start learns one half of the examples, and answers the other"):
            model, why, _ = rayml.choose_start(rows)
        err.print(why, style="dim", markup=False, highlight=False, soft_wrap=True)
    else:
        refuse_no_run(run)
        RunFolder(run).trained(checkpoint)  # refuse early what is no finished run
        with doing(err, "loading libraries and model"):
            model = rayml.load(run, checkpoint=checkpoint)
    folder = model.run
    assert folder is not None
    for line in (f"{folder.start or folder.path}: {model.checkpoint}", str(model.precision)):
        err.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
    adapter = model.adapt(rows, name=name or to.name)
    adapter.save(to)
    out.print(learned(adapter))
    if adapter.losses[-1] > adapter.losses[0]:
        rose = "the loss rose: the inner steps are too long for this task; lower inner.lr, or learn it"
        out.print(rose, style="yellow")
    out.print(f'next: rayml predict {shlex.quote(str(to))} --input "..."', highlight=False, soft_wrap=True)


def learned(adapter: "Adapter") -> str:
    """Say in one line what an adapter has learned, and how."""
    kind = f"{len(adapter.labels)} labels" if adapter.labels else "free text"
    how = f"loss {adapter.losses[0]:.3f} -> {adapter.losses[-1]:.3f}"
    if not adapter.algorithm.takes_steps and (adapter.shown or adapter.labels):
        how = f"kept for {'the prompt' if adapter.algorithm.keeps == 'prompt' else 'their hidden states'}"
    return f"learned {adapter.card.name!r}: {adapter.examples} examples, {kind}, {adapter.seconds:.2f} s, {how}"


@app.command()
def export(
    run: RunPath,
    out_dir: Annotated[str, typer.Option("--out", help="The folder to write; must not exist.", metavar="DIR")],
    checkpoint: Checkpoint = None,
) -> None:
    """Write what a run learned for other libraries: its start as a PEFT adapter, or, in mode full, the whole model.

    `AutoModelForCausalLM.from_pretrained` loads the whole model, `PeftModel.from_pretrained` the adapter. Starting
    from it takes the inner loop that the run was trained for: without one, it answers no better than by chance.
    """
    from rayml.adapter import new_folder

    refuse_no_run(run)
    new_folder(out_dir)
    model = rayml.load(run, checkpoint=checkpoint)
    to = model.save(out_dir)
    what = f"a PEFT adapter on {model.base}" if model.lm.adapter else "a Hugging Face model"
    out.print(f"{to}: {what}, after {model.step} outer steps", highlight=False, soft_wrap=True)


@app.command()
def predict(
    adapter: Annotated[str, typer.Argument(metavar="DIR", help="A folder that `rayml adapt` made, or its URI.")],
    text: Annotated[
        str,
        typer.Option(
            "--input", help='What to answer; or JSON: fields, or messages `[{"role", "content"}]`.', metavar="TEXT"
        ),
    ],
    options: Annotated[
        str | None,
        typer.Option(help="Choose among these, comma-separated, those with a comma in quotes; else all labels."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer with a learned task: the most probable of its labels, or generated text."""
    chosen = comma_separated(options) if options else None
    if "://" not in adapter and not (Path(adapter).expanduser() / "rayml.json").exists():
        raise RunError(f"{adapter}: no adapter that `rayml adapt` wrote: there is no rayml.json in it")
    with doing(err, "loading libraries and model"):
        learned = rayml.load_adapter(adapter)
    answer = learned.predict(given(text), chosen)
    if as_json:
        print(json.dumps({"prediction": answer.text, "probabilities": answer.probabilities}, ensure_ascii=False))
        return
    out.print(answer.text, style="bold", markup=False, highlight=False)
    for option, probability in sorted(answer.probabilities.items(), key=lambda item: -item[1]):
        out.print(f"  {probability:.3f}  {option}", markup=False, highlight=False)


def given(text: str) -> Any:
    """Return what is to be answered: a text as it is, and fields or a dialogue's turns from JSON."""
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
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="As `rayml train` made it.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Such as `replicas.max=4 limits.steps=5`.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine an API key is needed.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen.", min=1, max=65535)] = 8000,
    store: Annotated[str | None, typer.Option(help="Where adapters are kept; else RUN/adapters.")] = None,
    keys_file: Annotated[
        Path | None,
        typer.Option(parser=path, help="API keys, one a line, as `name: key`; RAYML_API_KEYS adds to them."),
    ] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Where Prometheus finds the metrics.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond this machine without a key.")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="Print every setting with its default and meaning.")] = False,
    checkpoint: Checkpoint = None,
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
    refuse_no_run(run)
    with doing(err, "loading libraries"):
        from rayml.serving.command import serve_forever

    serve_forever(run, overrides or [], host, port, store, keys_file, metrics_port, insecure, checkpoint, out)


@app.command()
def publish(
    adapter: Annotated[
        Path, typer.Argument(parser=path, metavar="DIR", help="A folder, or a zip, of `rayml adapt` or PEFT.")
    ],
    run: Annotated[str, typer.Option(help="The run folder that is served.", metavar="RUN")],
    name: Annotated[str | None, typer.Option(help="The adapter's name; else the folder's.")] = None,
    store: Annotated[str | None, typer.Option(help="The server's store; else RUN/adapters.")] = None,
    owner: Annotated[str | None, typer.Option(help="The name of the key that it is for.")] = None,
) -> None:
    """Put an adapter that was learned elsewhere into a server's store, once it is seen to fit the run's base.

    It belongs to --owner, or to the key without a name in RAYML_API_KEY; else to servers that ask for no key.
    """
    from rayml.serving.command import publish_adapter

    publish_adapter(adapter, run, name, store, out, owner)
