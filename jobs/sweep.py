"""Search settings: what `rayml sweep` does, for `ray job submit -- python jobs/sweep.py CONFIG.yaml --search ...`."""

import sys

from rayml.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "sweep")
    main()
