"""Python runs this first wherever this folder is in PYTHONPATH: a worker of Ray is forked, and not begun anew."""

import sys

_is_worker = any(word.endswith("/ray/_private/workers/setup_worker.py") for word in sys.orig_argv[1:4])
if _is_worker or sys.orig_argv[1:3] == ["-m", "gpu_steps"]:
    import fork_server

    fork_server.hand_over()
