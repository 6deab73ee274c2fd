"""Compare methods: what `rayml compare` does, for `ray job submit -- python jobs/compare.py CONFIG.yaml key=value`."""

import sys

from rayml.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "compare")
    main()
