"""Say in one line why this machine cannot run rayml, before anything is downloaded. For any Python, old ones too."""

import platform
import sys

MACHINE = platform.system(), platform.machine().lower()
REASONS = [
    (
        not (3, 11) <= sys.version_info[:2] <= (3, 13),
        "rayml needs Python 3.11, 3.12 or 3.13, and this is " + platform.python_version() + ": make PYTHON=python3.12",
    ),
    (
        MACHINE == ("Darwin", "x86_64"),
        "rayml cannot run on an Intel Mac: torch 2.13 and Ray 2.60 have no wheels for it. Take a Linux machine",
    ),
    (
        MACHINE[0] == "Windows",
        "rayml runs on Linux and macOS. On Windows take WSL (https://learn.microsoft.com/windows/wsl)",
    ),
    (sys.maxsize < 2**32, "rayml needs a 64-bit Python, and this is a 32-bit one"),
]

for is_so, reason in REASONS:
    if is_so:
        sys.exit(reason)
