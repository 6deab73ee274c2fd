"""The process of one step: it gets ready, waits for its turn, and measures."""

import argparse
import gc
import importlib
import os
import sys
from pathlib import Path

import torch

from gpu_steps import SHAPES, STEPS
from gpu_steps.bench import Bench
from gpu_steps.sizes import SIZES


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=[step.name for step in STEPS])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--ready", type=Path, required=True, help="is written when it is its turn to wait")
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    step = next(step for step in STEPS if step.name == options.step)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.set_threshold(50_000, 20, 20)  # looking for garbage takes a tenth of the imports' time
    module = importlib.import_module(f"gpu_steps.{step.module}")
    options.ready.touch()
    sys.stdin.readline()  # until here it has touched no device
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    size = SIZES[options.shape]
    module.run(
        Bench(step.name, size, device, options.file, options.scratch, options.model, options.data), *step.arguments
    )
    gc.freeze()  # nor is any looked for at the end


if __name__ == "__main__":
    main()
