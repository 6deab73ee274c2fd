"""Faults on a cluster of several nodes on this machine, and what becomes of a run: `python tests/faults.py --times 3`.

Each node is a raylet of its own with its own workers. A run is left alone once; then others meet a fault at a random
step each.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from conftest import make_config
from forks import fork_server
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from rayml.config import dump_config
from rayml.lm.lora import B
from rayml.runs.checkpoint import STATE, newest_checkpoint
from rayml.runs.folder import RunFolder

ROOT = Path(__file__).parents[1]
STEPS, EVERY, WORKERS = 60, 10, 3
PATIENCE_SECONDS = 240
TOLERANCE = 1e-3
"""Relative, where another number of workers summed in another order."""


class Machines:
    """A Ray cluster with a head that does no work, three nodes with room for one worker each, and spare ones."""

    def __init__(self, spare: int = 0):
        os.environ["OMP_NUM_THREADS"] = "1"  # all of them share this machine's cores
        os.environ.pop(fork_server.TESTS, None)  # workers are looked for among their raylet's children
        os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "1"
        # A folder of its own, and short, for the sockets in it.
        self.folder = tempfile.mkdtemp(prefix="ray")
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "temp_dir": self.folder}
        )
        self.have(WORKERS + spare)

    def __enter__(self) -> "Machines":
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)

    def have(self, nodes: int) -> None:
        """Add nodes until there are as many."""
        while len(self.cluster.worker_nodes) < nodes:
            self.cluster.add_node(num_cpus=3)  # two for a worker, one for its episodes
        self.cluster.wait_for_nodes()

    def busy(self) -> list[tuple[Any, psutil.Process]]:
        """Return the nodes that train, with their worker processes, in any order."""
        found = []
        for node in self.cluster.worker_nodes:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            found += [(node, child) for child in raylet.children() if "RayTrainWorker" in " ".join(child.cmdline())]
        return found

    def lose(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)

    def announce_loss(self, node: Any, seconds: int) -> None:
        """Tell Ray that a node will be taken away as a pod does that is evicted; only that here a node has no host."""
        job = yaml.safe_load((ROOT / "cluster/kubernetes/train.yaml").read_text())
        container = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
        *shell, script = container["lifecycle"]["preStop"]["exec"]["command"]
        script = script.replace("drain-node", f"drain-node --node-id={node.node_id}")
        script = script.replace("seconds=100", f"seconds={seconds}").replace("seq 110", f"seq {seconds}")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = os.environ | {"RAY_ADDRESS": self.cluster.address, "PATH": path}
        subprocess.run([*shell, script], env=env, check=True, capture_output=True)


class Training:
    """`rayml train` in a process of its own, on a cluster."""

    def __init__(self, machines: Machines, folder: Path, **changes: Any):
        run = changes.pop("run", {})
        config = make_config(
            folder,
            workers=changes.pop("workers", WORKERS),
            tasks_per_step=WORKERS,
            # Rates so small that rounding, which another number of workers changes, is not made larger step by step.
            outer={"steps": STEPS, "optimizer": "sgd", "lr": 1e-4},
            inner={"steps": 20, "lr": 1e-3},
            algorithm={"learn_rates": False},
            run={"dir": str(folder / "run"), "checkpoint_every": EVERY, "keep_checkpoints": 20} | run,
            **changes,
        )
        (folder / "config.yaml").write_text(dump_config(config))
        self.machines, self.folder, self.run = machines, folder, RunFolder(folder / "run")
        self.log = (folder / "log").open("w+")
        self.begin()

    def begin(self, *options: str) -> None:
        command = [beside_python("rayml"), "train", str(self.folder / "config.yaml"), *options]
        env = os.environ | {"RAY_ADDRESS": self.machines.cluster.address}
        self.process = subprocess.Popen(command, env=env, stdout=self.log, stderr=self.log, start_new_session=True)

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is logged.

        Raises:
            AssertionError: training ended, or hangs.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.step() < step:
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, f"no step {step}: {self.output()}"
            time.sleep(0.02)

    def step(self) -> int:
        return max((record["step"] for record in self.run.records()), default=0)

    def weights(self) -> dict[str, torch.Tensor]:
        """Wait for the end; return what was learned.

        Raises:
            AssertionError: training failed, or hangs.
        """
        try:
            code = self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired as error:
            self.process.kill()
            raise AssertionError(f"hangs: {self.output()}") from error
        assert code == 0, self.output()
        steps = [record["step"] for record in self.run.records()]
        assert steps == list(range(1, STEPS + 1)), "every step is logged once"
        found = newest_checkpoint(self.run.checkpoints)
        assert found
        return load_file(found / STATE)

    def output(self) -> str:
        return Path(self.log.name).read_text()


def beside_python(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


# The faults, once training is at the step


def kill_worker(training: Training) -> None:
    random.choice(training.machines.busy())[1].kill()


def kill_node(training: Training) -> None:
    training.machines.lose(random.choice(training.machines.busy())[0])


def kill_driver(training: Training) -> None:
    training.process.kill()
    training.process.wait()
    training.begin("--resume")


def kill_head(training: Training) -> None:
    training.machines.__exit__()
    training.process.wait(PATIENCE_SECONDS)  # it cannot go on without
    training.machines = Machines(spare=1)
    training.begin("--resume")


def stop_worker(training: Training) -> None:
    random.choice(training.machines.busy())[1].send_signal(signal.SIGSTOP)


def preempt_node(training: Training) -> None:
    node, worker = random.choice(training.machines.busy())
    training.machines.announce_loss(node, seconds=6)
    worker.wait(60)  # Ray Train leaves it at the deadline
    assert newest_checkpoint(training.run.checkpoints), "there was no checkpoint first"
    assert training.process.poll() is None, "training was over before"
    training.machines.lose(node)


FAULTS: dict[str, Callable[[Training], None]] = {
    "a worker process, SIGKILL": kill_worker,
    "a node (its raylet, SIGKILL), with a spare one": kill_node,
    "a node, without a spare one, `workers=[2, 3]`": kill_node,
    "the driver, SIGKILL, and submitted again": kill_driver,
    "the head and all nodes, and submitted again": kill_head,
    "a worker that hangs (SIGSTOP), `run.longest_wait=20`": stop_worker,
    "a worker process, SIGKILL, `engine=zero`": kill_worker,
    "a worker that hangs (SIGSTOP), `run.longest_wait=20`, `engine=zero`": stop_worker,
    "a node, with notice of 6 s, and a spare one": preempt_node,
}


def difference(ours: dict[str, torch.Tensor], undisturbed: dict[str, torch.Tensor]) -> float:
    """Return how far the start is from the undisturbed one, relative to it; 0 where all is bit for bit the same.

    Of all B together: they begin at zero, so that all of them was learned.
    """
    if all(torch.equal(ours[name], weight) for name, weight in undisturbed.items()):
        return 0.0
    names = [name for name in undisturbed if name.startswith("start/") and name.endswith(B)]
    whole, apart = (
        torch.cat([t.flatten() for t in tensors])
        for tensors in ([undisturbed[name] for name in names], [ours[name] - undisturbed[name] for name in names])
    )
    return float(apart.norm() / whole.norm())


def settings(fault: str) -> dict[str, Any]:
    changes: dict[str, Any] = {"engine": engine(fault)}
    if "workers=" in fault:
        changes["workers"] = [2, 3]
    if "hangs" in fault:  # else it costs 15 minutes
        changes["run"] = {"longest_wait": 20}
    if "notice" in fault:  # whose checkpoint is to be the only one
        changes["run"] = {"checkpoint_every": STEPS}
    return changes


def engine(fault: str) -> str:
    return "zero" if "zero" in fault else "local"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=3, help="runs a fault, each at another random step")
    parser.add_argument("--only", default="", help="faults with this in their name")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    random.seed(asked.seed)
    undisturbed = {}
    for kind in {engine(fault) for fault in FAULTS if asked.only in fault}:
        with tempfile.TemporaryDirectory() as folder, Machines() as machines:
            undisturbed[kind] = Training(machines, Path(folder), engine=kind).weights()
    print("| what is lost | at step | ended | final weights | seconds |")
    print("|---|---|---|---|---|")
    for name, fault in FAULTS.items():
        for _ in range(asked.times * (asked.only in name)):
            with tempfile.TemporaryDirectory() as folder:
                print(f"| {name} | {row(name, fault, Path(folder), undisturbed[engine(name)])} |", flush=True)


def row(name: str, fault: Callable[[Training], None], folder: Path, undisturbed: dict[str, torch.Tensor]) -> str:
    with Machines(spare=int("workers=" not in name)) as machines:
        training = Training(machines, folder, **settings(name))
        step = random.randint(4, STEPS // 4 if fault is preempt_node else STEPS - 15)
        training.wait_for_step(step)
        began = time.monotonic()
        at = training.step()
        fault(training)
        try:
            found = difference(training.weights(), undisturbed)
        except AssertionError as error:
            print(error, file=sys.stderr)
            return f"{at} | no: {str(error).strip().splitlines()[-1]} | | {time.monotonic() - began:.0f}"
        finally:
            if training.machines is not machines:
                training.machines.__exit__()
    same = "bit-identical" if not found else f"relative difference {found:.0e}"
    if fault is stop_worker and "gives no sign of life" not in training.output():
        same += ", but it was not named"
    return f"{at} | yes | {same} | {time.monotonic() - began:.0f}"


if __name__ == "__main__":
    main()
