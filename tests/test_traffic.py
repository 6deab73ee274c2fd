"""What workers send: the collectives of real steps on gloo processes, counted, against the formula of `rayml plan`."""

from collections import Counter
from functools import partial

import pytest
import torch
from conftest import make_config, on_workers, toy_tasks
from torch.utils._python_dispatch import TorchDispatchMode

from rayml.distributed import replicated, sharded
from rayml.distributed.job import Job
from rayml.engine import zero
from rayml.lm.load import load_shape, load_tokenizer
from rayml.planning import traffic as formula
from rayml.planning.read import shape_of
from rayml.planning.traffic import traffic

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
    "adapters": {},
    "adapters, meta-sgd": {"algorithm": {"name": "meta_sgd"}},
    "adapters, multitask, zero 3": {"algorithm": {"name": "multitask"}, "engine": "zero"},
    "adapters, zero 3": {"engine": "zero"},
    "full": {"mode": "full"},
    "full, zero 1": {"mode": "full", "engine": "zero", "zero": {"stage": 1}},
    "full, zero 2": {"mode": "full", "engine": "zero", "zero": {"stage": 2}, "algorithm": {"name": "multitask"}},
    "full, zero 3": {"mode": "full", "engine": "zero", "zero": {"stage": 3}},
}


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
    replicated.get = sharded.get = lambda value: value  # there is no Ray here
    job = Job(config, model, config.encoder(load_tokenizer(model)), tasks, None, None)
    kind = sharded.Sharded if config.is_sharded else replicated.Replicated
    learning = kind(job, torch.device("cpu"), lambda step: None)
    sampler = config.data.sampler(0)
    per_worker = config.tasks_per_step // learning.workers
    counted = None
    for _ in range(3):
        episodes = [
            learning.encoder.episode(sampler.episode(tasks, learning.rank * per_worker + i)) for i in range(per_worker)
        ]
        with Counting() as counting:
            learning.step(episodes, waited=0.0)
        counted = counting.bytes
    return counted


def count(rank, workers, ways, model, tasks):
    zero.load, zero.load_full = partial(zero.load, whole_below=SMALL), partial(zero.load_full, whole_below=SMALL)
    for name, config in ways.items():
        found, expected = steps(rank, workers, config, model, tasks), planned(config, model, workers)
        assert found == expected, f"{name}: sent {dict(found)}, the formula says {dict(expected)}"


def planned(config, model, workers):
    found = Counter()
    for sent in traffic(shape_of(load_shape(model), config, SMALL), config, workers):
        found[sent.collective] += sent.tensor_bytes
    return found


@pytest.mark.workers
@pytest.mark.parametrize("workers", [2, 4, pytest.param(8, marks=pytest.mark.cluster)])
def test_what_is_sent_is_what_the_plan_says(tiny, tmp_path, workers):
    pytest.importorskip("deepspeed")
    ways = {name: make_config(tmp_path, workers=workers, tasks_per_step=8, **way) for name, way in WAYS.items()}
    on_workers(count, workers, workers, ways, tiny, toy_tasks())


def count_large(rank, workers, ways, model, tasks):
    """As for a model so large that no weight lives from its forward to its backward."""
    import deepspeed

    initialize, formula.REUSED = deepspeed.initialize, 0

    def keeping_nothing(**settings):
        nothing = dict.fromkeys(("stage3_max_reuse_distance", "stage3_prefetch_bucket_size"), 0)
        settings["config"]["zero_optimization"] |= nothing
        return initialize(**settings)

    deepspeed.initialize = keeping_nothing
    zero.load, zero.load_full = partial(zero.load, whole_below=SMALL), partial(zero.load_full, whole_below=SMALL)
    for name, config in ways.items():
        found, expected = steps(rank, workers, config, model, tasks), planned(config, model, workers)
        print(name, dict(found), dict(expected), flush=True)


@pytest.mark.workers
def test_large(tiny, tmp_path):
    pytest.importorskip("deepspeed")
    ways = {
        name: make_config(tmp_path, workers=2, tasks_per_step=8, **WAYS[name])
        for name in ("adapters, zero 3", "full, zero 3")
    }
    on_workers(count_large, 2, 2, ways, tiny, toy_tasks())
