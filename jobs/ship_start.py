"""Put what a run has learned among the starts that come with rayml: python jobs/ship_start.py runs/start smollm2-135m

It writes `start.safetensors` and `config.yaml` into `rayml/starts/NAME`: adapters in 16 bits, the readout and the inner
learning rates, and the settings that a new task is learned by; no data, and no weight of the base. Its model card,
`README.md` beside them, is yours to write: what it was trained on, by which licences, and what it scores.
"""

import argparse

import yaml
from safetensors.torch import save_file

from rayml.config import Config, load_config
from rayml.runs.checkpoint import read_newest
from rayml.runs.folder import RunFolder
from rayml.starts import HERE, LEARNED, NO_DATA, shipped_tensors

KEPT = "model", "algorithm", "lora", "inner"
"""Sections of a run's config that say what a new task is learned by; of its data, the prompts and the longest text."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("name")
    parser.add_argument("--max-tokens", type=int, help="of a new task's texts; else the run's")
    asked = parser.parse_args()
    run = RunFolder(asked.run)
    saved = read_newest(run.checkpoints)
    assert saved, f"{asked.run} has no checkpoint"
    values = settings(load_config(run.config), saved.step)
    if asked.max_tokens:
        values["data"]["max_tokens"] = asked.max_tokens
    folder = HERE / asked.name
    folder.mkdir(exist_ok=True)
    save_file(dict(shipped_tensors(saved.tensors)), folder / LEARNED)
    (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    (folder / LEARNED).chmod(0o644)
    print(f"{folder / LEARNED}: {(folder / LEARNED).stat().st_size / 1e6:.1f} MB, of {saved.step} outer steps")


def settings(config: Config, steps: int) -> dict:
    """Return what is kept of a run's config."""
    given = config.model_dump(mode="json")
    data = {"path": NO_DATA} | {key: given["data"][key] for key in ("prompt", "templates", "max_tokens")}
    return {section: given[section] for section in KEPT} | {
        "data": data,
        "outer": {"steps": steps},
        "run": {"dir": "none"},
    }


if __name__ == "__main__":
    main()
