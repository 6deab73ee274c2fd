"""Evaluate: what `rayml evaluate` does, for `ray job submit -- python jobs/evaluate.py RUN`."""

import sys

from rayml.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    main()
