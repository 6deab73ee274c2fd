"""The maths of adapting, against closed forms and torch's own optimizers, in float64."""

import math

import pytest
import torch
from conftest import meta_gradient

from rayml.algorithms.inner_loop import adapt
from rayml.algorithms.outer_loop import Learner, initial_log_inner_lrs, outer_schedule
from rayml.algorithms.registry import parse_algorithm

CENTRES = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-4.0, 0.25]], dtype=torch.float64)
QUERY_CENTRES = CENTRES * 2 - 1
ONE_EACH = torch.ones(3)
START = {"w": torch.tensor([0.3, 0.7], dtype=torch.float64)}


def quadratic(centres):
    """Task t's loss is half the squared distance of its fast weights to `centres[t]`."""
    return lambda fast: 0.5 * (fast["w"] - centres).square().sum(1)


def fomaml(support_losses, query_losses, start, inner_lrs, steps, weights, start_weight=0.0):
    algorithm = parse_algorithm({"name": "fomaml_plus", "start_weight": start_weight})
    return meta_gradient(algorithm, support_losses, query_losses, start, inner_lrs, steps, weights)


def rate(value):
    return {"w": torch.tensor(value, dtype=torch.float64)}


@pytest.mark.parametrize("steps", [0, 1, 3, 7])
def test_fomaml_gradient_of_a_quadratic_has_its_closed_form(steps):
    alpha = 0.15
    found = fomaml(quadratic(CENTRES), quadratic(QUERY_CENTRES), START, rate(alpha), steps, ONE_EACH)
    # Each step shrinks the distance to the support's centre by 1 - alpha; the query gradient is a difference.
    fast = CENTRES + (1 - alpha) ** steps * (START["w"] - CENTRES)
    gradient = fast - QUERY_CENTRES
    gradient_sum = (START["w"] - fast) / alpha
    torch.testing.assert_close(found.start["w"], gradient.sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.inner_lrs["w"], -(gradient * gradient_sum).sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.query_losses, 0.5 * gradient.square().sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_loss_at_the_start_adds_its_own_gradient(steps):
    tensors = {"w": START["w"], "head": START["w"].clone()}  # the inner loop leaves the head

    def losses(centres):
        return lambda fast: 0.5 * (fast["w"] + fast["head"] - centres).square().sum(1)

    weights = torch.tensor([1.0, 0.5, 2.0])
    alone, beside = (
        fomaml(losses(CENTRES), losses(QUERY_CENTRES), tensors, rate(0.2), steps, weights, start_weight)
        for start_weight in (0.0, 0.7)
    )
    at_start = tensors["w"] + tensors["head"] - CENTRES
    expected = 0.7 * (weights.double()[:, None] * at_start).sum(0) * (steps > 0)
    torch.testing.assert_close(beside.start["w"] - alone.start["w"], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(beside.start["head"], alone.start["head"])
    assert torch.equal(beside.inner_lrs["w"], alone.inner_lrs["w"])
    if steps:
        torch.testing.assert_close(beside.support_losses, 0.5 * at_start.square().sum(1))


def test_the_rate_gradient_is_the_slope_of_the_query_loss_after_one_step():
    def query_loss(alpha):
        return float(
            fomaml(quadratic(CENTRES), quadratic(QUERY_CENTRES), START, rate(alpha), 1, ONE_EACH).query_losses.sum()
        )

    slope = (query_loss(0.2 + 1e-6) - query_loss(0.2 - 1e-6)) / 2e-6
    found = fomaml(quadratic(CENTRES), quadratic(QUERY_CENTRES), START, rate(0.2), 1, ONE_EACH)
    assert float(found.inner_lrs["w"]) == pytest.approx(slope, rel=1e-6)


def test_adapting_is_sgd_on_each_task_alone():
    *_, adapted = adapt(quadratic(CENTRES), START, rate(0.1), steps=4, tasks=3)
    for task, centre in enumerate(CENTRES):
        w = START["w"].clone().requires_grad_()
        optimizer = torch.optim.SGD([w], lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            (0.5 * (w - centre).square().sum()).backward()
            optimizer.step()
        torch.testing.assert_close(adapted.fast["w"][task], w.detach(), rtol=1e-14, atol=0)


def test_adapting_yields_every_step_and_leaves_the_start_alone():
    before = START["w"].clone()
    losses = [quadratic(CENTRES)(step.fast).sum() for step in adapt(quadratic(CENTRES), START, rate(0.1), 3, 3)]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    assert torch.equal(START["w"], before)
    assert START["w"].grad is None


def learner(**changes):
    settings = {
        "learn_rates": True,
        "lr": 0.01,
        "lr_of_inner_lr": 0.02,
        "weight_decay": 0.0,
        "clip_norm": 0.0,
        "schedule": outer_schedule("constant", 0, 10),
    }
    start = {"w": torch.tensor([1.0, -1.0])}
    return Learner(start, initial_log_inner_lrs(start, 0.1, (), per_weight=False), **settings | changes)


# Of very different lengths: AdamW forgets the scale of a gradient that stays the same.
GRADIENTS = [({"w": torch.tensor([3.0, 4.0]) * size}, {"w": torch.tensor(0.5) * size}) for size in (1.0, 0.1, 20.0)]


def test_an_outer_step_is_adamw_on_the_start_and_on_the_logarithm_of_the_rate():
    ours = learner(weight_decay=0.1)
    w, log_rate = torch.tensor([1.0, -1.0]), torch.tensor(math.log(0.1))
    reference = torch.optim.AdamW(
        [{"params": [w], "lr": 0.01, "weight_decay": 0.1}, {"params": [log_rate], "lr": 0.02, "weight_decay": 0.0}]
    )
    for start_gradient, rate_gradient in GRADIENTS:
        w.grad, log_rate.grad = start_gradient["w"].clone(), rate_gradient["w"] * log_rate.exp()
        reference.step()
        assert ours.update({"w": start_gradient["w"].clone()}, rate_gradient) == pytest.approx(
            float(start_gradient["w"].norm())
        )
    torch.testing.assert_close(ours.start["w"], w)
    torch.testing.assert_close(ours.log_inner_lrs["w"], log_rate)
    moment = ours.optimizer.state[ours.log_inner_lrs["w"]]["exp_avg"]
    torch.testing.assert_close(moment, reference.state[log_rate]["exp_avg"])


def test_clipping_shortens_long_gradients_alone():
    ours, plain = learner(clip_norm=1.0), learner()
    for start_gradient, rate_gradient in GRADIENTS:
        norm = float(start_gradient["w"].norm())
        ours.update({"w": start_gradient["w"].clone()}, {"w": rate_gradient["w"] * 0})
        plain.update({"w": start_gradient["w"] / max(1.0, norm)}, {"w": rate_gradient["w"] * 0})
    for moment in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(
            ours.optimizer.state[ours.start["w"]][moment], plain.optimizer.state[plain.start["w"]][moment]
        )


def test_rates_stay_where_they_are_unless_they_are_learned():
    fixed, learned = learner(learn_rates=False), learner()
    for gradients in GRADIENTS:
        fixed.update(*({k: v.clone() for k, v in g.items()} for g in gradients))
        learned.update(*({k: v.clone() for k, v in g.items()} for g in gradients))
    assert float(fixed.inner_lrs["w"]) == pytest.approx(0.1)
    assert float(learned.inner_lrs["w"]) < 0.1


def test_a_learner_goes_on_bit_for_bit_from_its_state():
    ours = learner()
    for gradients in GRADIENTS:
        ours.update({"w": gradients[0]["w"].clone()}, gradients[1])
    again = learner()
    again.load({name: tensor.clone() for name, tensor in ours.state().items()}, step=3)
    for start_gradient, rate_gradient in GRADIENTS:
        ours.update({"w": start_gradient["w"].clone()}, rate_gradient)
        again.update({"w": start_gradient["w"].clone()}, rate_gradient)
    assert all(torch.equal(a, b) for a, b in zip(ours.state().values(), again.state().values(), strict=True))


def test_schedules():
    factor = outer_schedule("cosine", 4, 10)
    assert [round(factor(step), 3) for step in (0, 3, 4, 7, 10)] == [0.2, 0.8, 1.0, 0.5, 0.0]
    assert outer_schedule("constant", 0, 10)(9) == 1.0
