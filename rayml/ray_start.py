"""Ray as rayml starts it: on this machine alone, or the cluster that RAY_ADDRESS or a job names."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from rich.console import Console

from rayml.config import Config
from rayml.errors import ConfigError
from rayml.interrupt import reinstall_handlers
from rayml.progress import show_activity, warn

WORKER_ENV = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # By default glibc returns large blocks to the kernel at once; on a CPU, getting new ones took a third of the time.
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
}


@contextmanager
def own_ray(config: Config, at_once: int = 1) -> Iterator[bool]:
    """Start Ray if none runs, for `at_once` runs, and end it after the block; yield whether the cluster is ours."""
    must_start = not ray.is_initialized()
    if must_start:
        with show_activity(Console(stderr=True, markup=False), "starting Ray"):
            start_ray(config, at_once)
    try:
        yield must_start and not os.environ.get("RAY_ADDRESS")
    finally:
        if must_start:
            ray.shutdown()


def start_ray(config: Config, at_once: int = 1) -> None:
    """Start Ray here, with room for the workers of `at_once` runs; or join the cluster that RAY_ADDRESS or a job names.

    A cluster that is too small gets a warning, not an error: its autoscaler may add nodes.
    """
    local_settings: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        # Logical CPUs: training uses every core, and each worker has one more for Ray Data's light tasks.
        workers = config.most_workers * at_once
        threads = max(1, processors() // workers)
        local_settings = {"address": "local", "num_cpus": workers * (threads + 1), "include_dashboard": False}
        slow_log_monitor()
        # This machine is not preempted; and the end of a run shall be noticed at once.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
        # Prestarted processes would lack the environment below, and so would never be used.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # Ray refuses variables that the job sets, too, unless one may override the other. Here, what is set already counts.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    env = {name: os.environ.get(name, value) for name, value in WORKER_ENV.items()}
    ray.init(logging_level=logging.ERROR, log_to_driver=False, runtime_env={"env_vars": env}, **local_settings)
    reinstall_handlers()
    if not local_settings:
        total = ray.cluster_resources()
        try:
            check_resources(config, cpus=int(total.get("CPU", 0)), cpus_each=2, gpus=int(total.get("GPU", 0)))
        except ConfigError as error:
            warn(f"{error}. Waiting up to {config.run.longest_wait:g} s for more nodes")


def slow_log_monitor() -> None:
    """Have a Ray that is started here look for new logs once a minute, not ten times a second: nobody reads them."""
    os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")
    os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "60")


def check_resources(config: Config, cpus: int, cpus_each: int, gpus: int) -> None:
    """Raise ConfigError if the workers do not fit. On a cluster, each needs a second CPU for its stream of episodes."""
    workers = config.fewest_workers
    if config.device == "cuda" and gpus < workers:
        raise ConfigError(f"workers: {workers} need a GPU each, there are {gpus}; lower it, or device=cpu")
    if workers * cpus_each > cpus:
        raise ConfigError(
            f"workers: {workers} need {workers * cpus_each} CPUs, there are {cpus}; "
            f"use workers={max(1, cpus // cpus_each)}"
        )


def processors() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
