"""Meta-train: what `rayml train` does, for `ray job submit -- python jobs/train.py CONFIG.yaml key=value`."""

import sys

from rayml.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
