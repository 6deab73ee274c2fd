"""What workers send: the collectives of real steps on gloo processes, counted, against the formula of `rayml plan`."""

import io
import json
from collections import Counter
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from conftest import NoHeartbeat, make_config, on_workers, toy_tasks
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from rayml.config import dump_config, load_config
from rayml.lm import zero
from rayml.lm.load import load_shape, load_tokenizer
from rayml.planning import step as formula
from rayml.planning.scaling import Machines, predict, scaling
from rayml.planning.shape import shape_of
from rayml.planning.step import Transfer, traffic
from rayml.training import replicated, sharded
from rayml.training.stream import Job
from rayml.training.worker import share_of_tasks

COLLECTIVES = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "broadcast_": "broadcast",
}
SINGLE_NUMBERS = 8
"""Bytes; such collectives agree on a loss, or on whether a gradient was finite."""
SMALL = 3000
"""Elements; of the tiny model's tensors some have fewer, and stay whole."""
WAYS = {
    "adapters": {"tasks_per_step": 4},
    "adapters, meta-sgd": {"algorithm": {"name": "meta_sgd"}},
    "adapters, multitask, zero 3": {"algorithm": {"name": "multitask"}, "engine": "zero"},
    "adapters, zero 3": {"engine": "zero", "tasks_per_step": 4},
    "adapters, zero 3, checkpointing": {"engine": "zero", "model": {"activation_checkpointing": True}},
    "full": {"mode": "full"},
    "full, zero 1": {"mode": "full", "engine": "zero", "zero": {"stage": 1}, "tasks_per_step": 2},
    "full, zero 2": {"mode": "full", "engine": "zero", "zero": {"stage": 2}, "algorithm": {"name": "multitask"}},
    "full, zero 3": {"mode": "full", "engine": "zero", "zero": {"stage": 3}, "tasks_per_step": 2},
}
"""Changes of the config; `tasks_per_step` is for each worker."""


class Counting(TorchDispatchMode):
    """Sums the bytes of the whole tensors that torch.distributed is called with."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = COLLECTIVES[function._schema.name.removeprefix("c10d::")]
            # The whole of an all-gather is its first argument, that of a reduce-scatter its second.
            whole = args[name == "reduce-scatter"]
            size = sum(t.nbytes for t in (whole if isinstance(whole, list | tuple) else [whole]))
            self.bytes[name] += size * (size > SINGLE_NUMBERS)
        return function(*args, **(kwargs or {}))


def steps(rank, workers, config, model, tasks):
    """Take two steps, in which DeepSpeed learns the order of the layers, and count a third one."""
    replicated.fetch_once = sharded.fetch_once = lambda value: value  # there is no Ray here
    job = Job(config, model, config.encoder(load_tokenizer(model)), tasks, None, None)
    kind = sharded.Sharded if config.is_sharded else replicated.Replicated
    learning = kind(job, torch.device("cpu"), NoHeartbeat())
    sampler = config.data.sampler(0)
    share = share_of_tasks(config)
    per_worker = config.tasks_per_step // share.workers
    counting = Counting()
    for number in range(3):
        episodes = [
            learning.encoder.episode(sampler.episode(tasks, share.rank * per_worker + i)) for i in range(per_worker)
        ]
        with counting if number == 2 else nullcontext():
            learning.step(episodes, learning.prepare(episodes), waited=0.0)
    return counting.bytes


def planned(config, model, workers):
    found = Counter()
    for sent in traffic(shape_of(load_shape(model), config, SMALL), config, workers):
        found[sent.collective] += sent.tensor_bytes
    return found


def count(rank, workers, ways, model, tasks):
    zero.load, zero.load_full = partial(zero.load, whole_below=SMALL), partial(zero.load_full, whole_below=SMALL)
    for name, config in ways.items():
        found, expected = steps(rank, workers, config, model, tasks), planned(config, model, workers)
        if config.model.activation_checkpointing:  # what is let go of in between depends on what is fetched ahead
            without = planned(ways["adapters, zero 3"], model, workers)
            assert without["all-gather"] <= found.pop("all-gather") <= expected.pop("all-gather")
        assert found == expected, f"{name}: sent {dict(found)}, the formula says {dict(expected)}"
    keep_nothing()
    for name in ("adapters, zero 3", "full, zero 3"):
        found, expected = steps(rank, workers, ways[name], model, tasks), planned(ways[name], model, workers)
        # What lies below the first adapters needs no backward: the formula counts all of their layer.
        allowed = 0.02 * expected["all-gather"] * name.startswith("adapters")
        assert 0 <= expected.pop("all-gather") - found.pop("all-gather") <= allowed, name
        assert found == expected, name


def keep_nothing():
    """Let DeepSpeed treat the tiny model as a very large one, of which no weight lives until its backward."""
    import deepspeed

    initialize, formula.REUSED = deepspeed.initialize, 0

    def keeping_nothing(**settings):
        nothing = dict.fromkeys(("stage3_max_reuse_distance", "stage3_prefetch_bucket_size"), 0)
        settings["config"]["zero_optimization"] |= nothing
        return initialize(**settings)

    deepspeed.initialize = keeping_nothing


# Eight take minutes on two cores.
@pytest.mark.workers
@pytest.mark.parametrize("workers", [2, *(pytest.param(more, marks=pytest.mark.cluster) for more in (4, 8))])
def test_what_is_sent_is_what_the_plan_says(tiny, tmp_path, workers):
    pytest.importorskip("deepspeed")
    ways = {
        name: make_config(
            tmp_path, **way | {"workers": workers, "tasks_per_step": workers * way.get("tasks_per_step", 1)}
        )
        for name, way in WAYS.items()
    }
    on_workers(count, workers, workers, ways, tiny, toy_tasks())


def test_a_ring_sends_as_much_as_by_hand():
    """Four workers, 400 bytes: a quarter at a time, in three turns; an all-reduce has two such rounds."""
    assert Transfer("x", "all-gather", 400, 1).by_each(4) == 300
    assert Transfer("x", "reduce-scatter", 400, 1).by_each(4) == 300
    assert Transfer("x", "all-reduce", 400, 1).by_each(4) == 600
    assert Transfer("x", "all-reduce", 400, 1).by_each(1) == 0


# What it would take on more GPUs

SLOW = Machines(peak_flops=1e9, utilisation=0.5, node_gpus=2, link_bytes=1e6, network_bytes=1e5, latency=0.25)


def test_a_prediction_by_hand(tiny, tmp_path):
    config = make_config(tmp_path, workers=2, tasks_per_step=4)
    shape = shape_of(load_shape(tiny), config)
    one, two, eight = (predict(shape, config, workers, SLOW) for workers in (1, 2, 8))
    # Two inner steps on six rows and the query's six, of 256 tokens, forward and backward, two tasks a worker.
    flops = 2 * 2 * shape.layer_parameters * (2 * 2 * 6 + 2 * 6) * 256
    assert one.compute_seconds == two.compute_seconds == pytest.approx(flops / 0.5e9)
    assert (one.tasks, two.tasks, eight.tasks) == (2, 4, 16)
    sent = 4 * (shape.adapter(4) + 2 * len(shape.adapted) + 3 + 8) * 2 * 7 / 8
    assert eight.sent_bytes == sent
    assert eight.communication_seconds == pytest.approx(sent / 1e5 + 3 * 0.25)  # beyond the node; three hops
    assert one.communication_seconds == one.sent_bytes == 0
    assert two.communication_seconds == pytest.approx(two.sent_bytes / 1e6 + 0.25)
    assert eight.slowest == pytest.approx(eight.compute_seconds + eight.communication_seconds)
    assert eight.fastest == max(eight.compute_seconds, eight.communication_seconds)


def test_mode_full_shares_rows_until_there_are_no_more(tiny, tmp_path):
    config = make_config(tmp_path, mode="full", engine="zero", workers=2, tasks_per_step=4)
    shape = shape_of(load_shape(tiny), config)
    seconds = [predict(shape, config, workers, SLOW).compute_seconds for workers in (1, 2, 6, 512)]
    assert seconds[0] == pytest.approx(2 * seconds[1])
    assert seconds[0] == pytest.approx(6 * seconds[2])
    assert seconds[2] == seconds[3]


def test_the_command_prints_json_and_draws(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(make_config(tmp_path, workers=2, tasks_per_step=4)))
    picture = tmp_path / "scaling.png"
    scaling(load_config(path), [8, 16], [5e10, 1e9], Machines(), picture, True, Console(quiet=True))
    rows = json.loads(capsys.readouterr().out)["predictions"]
    assert [(row["network_bytes"], row["workers"]) for row in rows] == [(5e10, 8), (5e10, 16), (1e9, 8), (1e9, 16)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
    out = Console(file=io.StringIO(), width=110)
    scaling(load_config(path), [8, 16], [5e10, 1e9], Machines(), picture, False, out)
    text = out.file.getvalue()
    assert "Predicted, not measured" in text
    assert len([line for line in text.splitlines() if " MiB " in line]) == 3  # one node has no network
