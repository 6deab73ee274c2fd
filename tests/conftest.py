"""What tests share: a cache for the tiny model, toy tasks, one local Ray a process, and gloo processes."""

import atexit
import faulthandler
import gc
import multiprocessing.forkserver
import os
import random
import re
import shutil
import socket
import sys
import tempfile
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

# One of several processes (`make test`) has a core: else they wait for each other in the middle of every product.
os.environ |= {"OMP_NUM_THREADS": "1"} if "PYTEST_XDIST_WORKER" in os.environ else {}

import pytest
import torch
import torch.multiprocessing
from forks import fork_server

os.environ.setdefault("RAYML_CACHE", str(Path(tempfile.gettempdir()) / f"rayml-test-cache-{os.getuid()}"))
os.environ["WANDB_MODE"] = "offline"
# For the S3 server of test_storage; here, since workers have them from when the shared Ray starts.
os.environ |= {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "of-rayml", "AWS_REGION": "us-east-1"}

from rayml.algorithms.inner_loop import InnerLoop, Params
from rayml.config import Config
from rayml.lm import precision
from rayml.lm.catalog import resolve_model
from rayml.lm.load import load_base, load_tokenizer
from rayml.lm.lora import B, TaskLoRA
from rayml.lm.model import TaskLM
from rayml.tasks.task import Example, Task

fork_server.set_up()
# As the command line does (rayml/cli/app.py).
gc.set_threshold(50_000, 20, 20)
atexit.register(gc.freeze)
SPLITS = {"val": 0.0, "test": 0.0, "val_tasks": ["toy-4"], "test_tasks": ["toy-5"]}
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")
TOGETHER = {"test_storage": "test_train", "test_page": "test_server"}
TOGETHER |= dict.fromkeys(("test_faults", "test_traffic", "test_workers"), "test_full")
TOGETHER |= dict.fromkeys(("test_encode", "test_kinds"), "test_own_data")
"""Files that share with another what is long to make: `straight`, `server`, what gloo's processes are forked from, and
the quickstart's model out of its wheel."""
WITH_RAY = (
    *("test_train", "test_train_algorithms", "test_compare", "test_api", "test_golden", "test_precision"),
    *("test_trackers", "test_sentence", "test_masked", "test_continue", "test_readout_files", "test_own_algorithm"),
    *("test_soft_prompt", "test_starts"),
)
"""Files that share a Ray in the tests' process, one after the other: with the last of them it ends. Idle, it takes a
sixth of a core."""
LONGEST = (
    *("test_server", "test_interrupt", "test_jobs", "test_gpu_evidence", "test_sweep", "test_wheel", "test_full"),
    *("test_own_data", "test_families", "test_benchmark", "test_abilities", "test_cli"),
)


def group(nodeid: str) -> str:
    """Return the file whose process a test is run in."""
    file = Path(nodeid.partition("::")[0]).stem
    return TOGETHER.get(file, file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Among several processes, a file is one's at a time. (xdist's own groups do nothing with pytest 9.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group(nodeid)

    return Files(config, log)


def pytest_collection_modifyitems(items):
    """Files with Ray come first, then the longest, so that no process is left alone with one of them at the end."""
    order = {name: index for index, name in enumerate(WITH_RAY + LONGEST)}
    items.sort(key=lambda item: order.get(group(item.nodeid), len(order)))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem):
    """End the shared Ray where no test that uses it follows at once."""
    if "ray" in sys.modules and (nextitem is None or group(nextitem.nodeid) not in WITH_RAY):
        sys.modules["ray"].shutdown()


def pytest_terminal_summary(terminalreporter):
    """Name the commands that bring what skipped tests miss: what stands in `...` in their reasons; else the set-up."""
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", ())]
    commands = Counter((re.findall("`(.+)`", reason) or ["make test"])[0] for reason in reasons)
    for command, tests in commands.items():
        terminalreporter.write_line(f"{tests} skipped; this brings what they need: {command}")


@pytest.fixture(scope="session", autouse=True)
def _without_bf16():
    """What is opened runs in float32, as it was made: else a timing would choose, and what is compared be rounded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "cpu_bf16", lambda: None)
        yield


@pytest.fixture(scope="session")
def tiny() -> str:
    return resolve_model("tiny")


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory):
    """One Ray for all runs of two workers or fewer: starting it takes longer than most of them."""
    share_ray(tmp_path_factory)


def share_ray(tmp_path_factory) -> None:
    import ray

    from rayml.ray_start import start_ray

    if not ray.is_initialized():
        start_ray(make_config(tmp_path_factory.mktemp("ray"), workers=2))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One server of two to three replicas for the page and the API; the last test of the API ends it."""
    from serving_process import Server
    from serving_run import make_run

    from rayml.serving.ports import end_orphans

    server = Server(
        make_run(tmp_path_factory.mktemp("server")).path,
        "replicas.min=2",
        "replicas.max=3",
        "replicas.target_ongoing_requests=4",
        "replicas.upscale_delay_seconds=1",
        "replicas.downscale_delay_seconds=4",
        "replicas.queued_requests=60",
        "replicas.ongoing_requests=16",
        "limits.retry_after_seconds=1",
        "limits.adapters_per_key=150",
        "adapters.known_seconds=0.2",
        "replicas.drain_seconds=90",  # a busy machine takes long to end what has begun
        "limits.body_seconds=20",  # longer than a busy machine takes to hand a whole body on
    )
    yield server
    if server.process.poll() is None and server.stop():
        server.process.kill()
    end_orphans()


@pytest.fixture(autouse=True)
def _with_ray(request):
    if request.node.get_closest_marker("ray") and group(request.node.nodeid) in WITH_RAY:
        request.getfixturevalue("local_ray")


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """A run of ten steps in one go, on two workers, with validations."""
    from rayml.training.driver import train

    share_ray(tmp_path_factory)
    folder = tmp_path_factory.mktemp("straight")
    changes = {"lora": {"start": "principal"}, "validation": {"every": 5, "episodes": 4}, "workers": 2}
    return train(make_config(folder, data={"splits": SPLITS}, **changes))


@pytest.fixture
def local_mode(local_ray):
    with training_here():
        yield


class NoHeartbeat:
    """In place of a worker's signature, where there is no other to wait for."""

    def __call__(self, step: int) -> None: ...

    def doing(self, what: str) -> None: ...

    def note(self, text: str, warning: str | None) -> None: ...


@contextmanager
def training_here():
    """Train in this process, by Ray Train's local mode: for tests of what is learned, not of how workers start.

    That mode keeps no checkpoints, so they are put where Ray Train would put them.
    """
    import ray.train

    from rayml.runs.checkpoint import folder_name
    from rayml.runs.files import copy_folder
    from rayml.training import driver, worker

    def keep(run, learning, record):
        part = worker.write_part(learning)
        copy_folder(part, run.checkpoints / folder_name(learning.done))
        shutil.rmtree(part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "scaling", lambda *_: ray.train.ScalingConfig(num_workers=0))
        patch.setattr(worker, "Heartbeat", lambda *_: NoHeartbeat())
        patch.setattr(worker, "report", keep)
        yield


@pytest.fixture(scope="session")
def tokenizer(tiny):
    return load_tokenizer(tiny)


def tiny_lm(path: str, rank: int = 4, attention: str = "sdpa") -> TaskLM:
    """A fresh tiny model, in fp32, with hooks."""
    module = load_base(path, "float32", attention)
    return TaskLM(module, TaskLoRA(module, TARGETS, rank, alpha=8.0))


def perturbed_start(lm: TaskLM, seed: int = 0) -> Params:
    """A start whose B is not zero: with B = 0 the gradient of A vanishes, and half the code would go untested."""
    generator = torch.Generator().manual_seed(seed)
    start = lm.adapter.untrained_start(seed)
    noise = {name: 0.05 * torch.randn(w.shape, generator=generator) for name, w in start.items()}
    return {name: w + noise[name] * name.endswith(B) for name, w in start.items()}


class Losses:
    """A side of episodes that is nothing but its losses."""

    def __init__(self, losses):
        self.losses = losses


def meta_gradient(algorithm, support_losses, query_losses, start, inner_lrs, steps, weights):
    """An algorithm's meta-gradient of given losses, fast weights to `[T]`; of the rates, too, where it learns them."""
    inner = InnerLoop(inner_lrs, steps, learns_inner_lrs=algorithm.learned_rates != "none")
    return algorithm.meta_gradient(Losses(support_losses), Losses(query_losses), start, inner, weights)


def toy_tasks(tasks: int = 6, classes: int = 5, per_class: int = 20, seed: int = 0) -> tuple[Task, ...]:
    """Tasks whose classes are told apart by a two-letter word among random ones."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = rng.sample([a + b for a in letters for b in letters], tasks * classes)
    found = []
    for t in range(tasks):
        options = tuple(words[t * classes : (t + 1) * classes])
        examples = {
            Example(" ".join(rng.sample([word, word, "".join(rng.choices(letters, k=2))], 3)), word)
            for word in options
            for _ in range(per_class * 3)
        }
        kept = {word: sorted((e for e in examples if e.target == word), key=str)[:per_class] for word in options}
        found.append(Task(f"toy-{t}", tuple(e for group in kept.values() for e in group), options))
    return tuple(found)


def write_tasks(path: Path, tasks: tuple[Task, ...]) -> Path:
    """Write tasks as the JSONL that users write."""
    import json

    rows = [
        json.dumps({"task": t.name, "input": e.input, "target": e.target, "options": list(t.options)})
        for t in tasks
        for e in t.examples
    ]
    path.write_text("\n".join(rows) + "\n")
    return path


def make_config(folder: Path, **changes) -> Config:
    """A config of seconds: the tiny model on the toy tasks."""
    values = {
        "model": {"name": "tiny", "dtype": "float32", "attention": "sdpa"},
        "data": {
            "path": str(write_tasks(folder / "toy.jsonl", toy_tasks())),
            "ways": 3,
            "shots": 2,
            "queries": 2,
            "labels": "letters",
            "splits": {"val": 0.0, "test": 0.0, "test_tasks": ["toy-5"]},
        },
        "run": {"dir": str(folder / "run"), "checkpoint_every": 5},
        "lora": {"rank": 4, "start": "random"},
        "inner": {"steps": 2},
        "outer": {"steps": 10, "warmup_steps": 0},
        "validation": {"every": 0},
    }
    for key, value in changes.items():
        if isinstance(value, dict):
            values[key] = values.get(key, {}) | value
        else:
            values[key] = value
    return Config.model_validate(values)


def on_workers(function, workers: int, *arguments) -> None:
    """Run `function(rank, *arguments)` on gloo processes; an exception in one fails the test.

    They are forked from a process that has imported what would take each of them seconds.
    """
    multiprocessing.set_forkserver_preload(["deepspeed", "peft", "rayml.lm.load"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        multiprocessing.forkserver.ensure_running()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.start_processes(
        _worker, (workers, port, function, arguments), nprocs=workers, start_method="forkserver"
    )


def _worker(rank: int, workers: int, port: int, function, arguments) -> None:
    faulthandler.enable()  # a process that aborts says where
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(workers), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=workers)
    function(rank, *arguments)
    # Nobody closes connections that another still reads from; and what the interpreter's teardown does with the
    # threads of gloo and DeepSpeed (it aborted once) is not what is tested here.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
