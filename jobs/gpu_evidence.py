"""Measure on one GPU everything that is worth knowing, within some minutes and without a network.

    python jobs/gpu_evidence.py --minutes 8 --out evidence       # on a GPU
    python jobs/gpu_evidence.py --shape tiny --device cpu        # the same steps, tiny, anywhere

Steps run one after the other, those first that are worth most, each in a process of its own and with its share of the
time that is left. Each writes every number as soon as it has it, to `evidence.jsonl`; one that fails or runs over says
so there, and the next goes on. `log.txt` has what they printed. `jobs/gpu_report.py` makes tables and plots of it.
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from gpu_report import write_report
from gpu_steps import SHAPES, STEPS
from gpu_steps.lines import write_line
from gpu_steps.schedule import run_all


def main() -> None:
    options = parse()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    file = out / "evidence.jsonl"
    file.unlink(missing_ok=True)
    command = shlex.join(["python", *sys.argv])
    write_line(file, {"step": "", "name": "command", "command": command, "shape": options.shape})
    steps = [step for step in STEPS if step.name in options.steps]
    with tempfile.TemporaryDirectory(prefix="rayml-evidence-") as scratch:
        run_all(steps, options, file, Path(scratch))
    print(write_report(out))


def parse() -> argparse.Namespace:
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-evidence"), metavar="DIR")
    parser.add_argument("--shape", choices=SHAPES, default="llama", help="1B and 8B parameters; or tiny")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=lambda text: text.split(","), default=names, help=", ".join(names))
    parser.add_argument("--model", help="of the run through Ray Train, a folder; else a tiny random one")
    parser.add_argument("--data", type=Path, metavar="DIR", help="what `rayml data quickstart DIR` wrote; else a toy")
    options = parser.parse_args()
    unknown = set(options.steps) - set(names)
    if unknown:
        parser.error(f"--steps: {', '.join(sorted(unknown))} unknown; there are {', '.join(names)}")
    return options


if __name__ == "__main__":
    main()
