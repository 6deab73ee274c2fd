"""Several processes over gloo: however the tasks are spread, and however the base is held, the gradient is one."""

import pickle
from functools import partial

import pytest
import torch
from conftest import TARGETS, meta_gradient, on_workers, perturbed_start, tiny_lm
from test_lora import random_rows

from rayml.algorithms.registry import parse_algorithm
from rayml.lm import zero
from rayml.lm.batch import collate
from rayml.lm.load import checkpoint_activations
from rayml.lm.lora import TaskLoRA
from rayml.lm.model import TaskLM
from rayml.training import collective

pytestmark = pytest.mark.workers
TASKS, STEPS = 4, 2


def task_rows(task, side):
    return random_rows(3, seed=1000 * side + task)


def mean_gradient(lm, tasks):
    """The mean meta-gradient over all workers, of which this one has `tasks`."""
    start = perturbed_start(lm)
    inner_lrs = {name: torch.tensor(0.3) for name in start}
    support, query = (collate([task_rows(task, side) for task in tasks], pad=1) for side in (0, 1))
    losses = [partial(lm.losses, batch=batch) for batch in (support, query)]
    algorithm = parse_algorithm({"name": "fomaml_plus", "start_weight": 0.0})
    found = meta_gradient(algorithm, *losses, start, inner_lrs, STEPS, torch.ones(len(tasks)))
    sent = [*found.start.values(), *found.inner_lrs.values(), found.query_losses.sum()]
    return [total / TASKS for total in collective.sum_over_workers(sent)]


def share_of(rank, workers):
    return range(rank * TASKS // workers, (rank + 1) * TASKS // workers)


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def local_worker(rank, path, expected):
    assert_same(mean_gradient(tiny_lm(path), share_of(rank, 2)), expected)


def zero_worker(rank, path, expected, checkpointing):
    module = zero.load(path, "float32", "sdpa", torch.device("cpu"), whole_below=0)
    if checkpointing:
        checkpoint_activations(module)
    lm = TaskLM(module, TaskLoRA(module, TARGETS, 4, alpha=8.0))
    assert_same(mean_gradient(lm, share_of(rank, 2)), expected)
    for name, parameter in module.named_parameters():
        assert parameter.numel() == 0, f"{name} is whole on rank {rank}"
        assert parameter.ds_tensor.numel() == -(-parameter.ds_numel // 2)


@pytest.fixture(scope="module")
def expected(tiny):
    return [part.clone() for part in mean_gradient(tiny_lm(tiny), range(TASKS))]


def test_two_workers_of_two_tasks_equal_one_of_four(tiny, expected):
    on_workers(local_worker, 2, tiny, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_zero_3_on_two_workers_equals_one_process(tiny, expected, checkpointing):
    pytest.importorskip("deepspeed")
    on_workers(zero_worker, 2, tiny, expected, checkpointing)


def state() -> dict[str, torch.Tensor]:
    """As of an optimizer: large ones, scalars, and another dtype."""
    numbers = torch.arange(300_000.0).view(2, -1)
    return {"start/a": numbers, "exp_avg/a": numbers.T, "step/a": torch.tensor(3.0), "b": numbers[0].bfloat16()}


def receiver(rank):
    pickled, send = [], torch.distributed.broadcast_object_list

    def measured(values, **how):
        pickled.append(len(pickle.dumps(values)))
        send(values, **how)

    torch.distributed.broadcast_object_list = measured
    found = collective.tensors_from_first_worker(state() if rank == 0 else {})
    assert found.keys() == state().keys()
    for name, tensor in state().items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    assert collective.tensors_from_first_worker({}) == {}
    assert max(pickled) < 2000, "names and shapes alone"


def test_a_state_is_sent_to_all_workers_without_being_pickled():
    on_workers(receiver, 2)


def test_whether_numbers_are_finite_is_asked_of_the_device_once(monkeypatch):
    asked, ask = [], torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: (asked.append(1), ask(tensor))[1])
    numbers = [torch.ones(3), torch.ones(2, 2), torch.tensor(1.0)]
    assert collective.all_finite(numbers)
    assert not collective.all_finite([*numbers, torch.tensor([1.0, torch.nan])])
    assert not collective.all_finite([torch.tensor(torch.inf), *numbers])
    assert len(asked) == 3
