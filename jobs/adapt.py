"""Learn one task: what `rayml adapt` does, for `ray job submit -- python jobs/adapt.py RUN --examples ROWS ...`."""

import sys

from rayml.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "adapt")
    main()
