"""Compression of a run's base: against plain references, and the result is a run like any other."""

import copy
import json
from functools import partial

import pytest
import torch
from conftest import make_config, perturbed_start, tiny_lm, toy_tasks
from rich.console import Console
from serving_run import make_run

from rayml.algorithms.inner_loop import adapt, expand, task_gradients
from rayml.algorithms.outer_loop import Learner, initial_log_inner_lrs
from rayml.compression.command import Distillation, compress_run, evenly_spaced
from rayml.compression.distill import (
    Student,
    Teacher,
    divergence,
    keep_layers,
    query_losses,
    with_base_gradients,
    write_student,
)
from rayml.compression.shrink import cut_adapters, cut_mlps, gated_mlps, quantize_base
from rayml.errors import ConfigError, RunError
from rayml.lm.batch import TaskBatch
from rayml.lm.label_trie import IGNORE
from rayml.lm.load import load_base
from rayml.lm.lora import TaskLoRA
from rayml.lm.model import TaskLM
from rayml.lm.sides import side_batch
from rayml.model import load

QUIET = Console(quiet=True)
HOW = Distillation(steps=2, lr=1e-3, temperature=2.0, hard=0.3)


def compressed(run, to, quantize=None, distill=None, prune=None, how=HOW):
    return compress_run(str(run), str(to), quantize, distill, prune, how, 2, None, QUIET, QUIET)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "made").path


def encoded(config, tokenizer, episodes: int):
    encoder, sampler = config.encoder(tokenizer), config.data.sampler(1)
    return [encoder.episode(sampler.episode(toy_tasks()[:4], index)) for index in range(episodes)]


def dequantized(model):
    """A plain copy whose linears hold what the quantised ones stand for."""
    from bitsandbytes.functional import dequantize_4bit

    plain = load_base(str(model.plain_path), "float32")
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear) and linear is not model.get_output_embeddings():
            weight = linear.weight
            state = getattr(weight, "quant_state", None)
            whole = dequantize_4bit(weight.data, state) if state is not None else weight.dequantize()
            plain.get_submodule(name).weight.data.copy_(whole)
    return plain


@pytest.mark.parametrize(("kind", "library", "bits"), [("int8", "torchao", 8), ("int4", "bitsandbytes", 4)])
def test_a_quantised_base_is_its_dequantised_one_in_forward_and_gradient(
    tmp_path, tiny, tokenizer, kind, library, bits
):
    pytest.importorskip(library)
    quantize_base(tiny, "float32", kind, tmp_path / "base")
    model = load_base(str(tmp_path / "base"), "float32")
    model.plain_path = tiny
    linear = model.model.layers[0].mlp.down_proj
    assert (linear.in_features, linear.out_features) == (128, 64)
    stored = linear.weight.qdata if kind == "int8" else linear.weight.data
    assert stored.numel() * stored.element_size() * 8 == 128 * 64 * bits
    assert model.get_output_embeddings().weight.dtype == torch.float32
    lms = [TaskLM(m, TaskLoRA(m, ("q_proj", "down_proj"), 4, 8.0)) for m in (dequantized(model), model)]
    start = perturbed_start(lms[0])
    batch = side_batch(encoded(make_config(tmp_path), tokenizer, 2), "support", 1)
    for lm in lms:
        with torch.no_grad():
            lm.losses(expand(start, 2), batch)  # a forward that needs no gradient comes first
    (wanted, gradients), (found, ours) = (
        task_gradients(partial(lm.losses, batch=copy.deepcopy(batch)), expand(start, 2)) for lm in lms
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5)
    plain = TaskLM(load_base(tiny, "float32"), None)
    assert not torch.allclose(plain.losses(None, batch), lms[1].losses(None, batch), rtol=1e-6)


def test_a_pruned_model_is_the_whole_one_with_those_neurons_silent(tiny, tokenizer, tmp_path):
    whole, small = (load_base(tiny, "float32") for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    kept = {name: torch.randperm(128, generator=generator)[:96].sort().values for name in gated_mlps(whole)}
    targets = ("gate_proj", "up_proj", "down_proj", "q_proj")
    lm = TaskLM(whole, TaskLoRA(whole, targets, 4, 8.0))
    start = perturbed_start(lm)
    cut_mlps(small, kept)
    pruned = TaskLM(small, TaskLoRA(small, targets, 4, 8.0))
    batch = side_batch(encoded(make_config(tmp_path), tokenizer, 2), "query", 1)
    for name, neurons in kept.items():
        mask = torch.zeros(128)
        mask[neurons] = 1
        whole.get_submodule(name).down_proj.register_forward_pre_hook(lambda _, inputs, mask=mask: (inputs[0] * mask,))
    # The adapters' own hook sees the inputs too, and so the silenced ones.
    with torch.no_grad():
        wanted = lm.target_logits(expand(start, 2), batch)[0]
        found = pruned.target_logits(expand(cut_adapters(start, kept), 2), copy.deepcopy(batch))[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert small.config.intermediate_size == 96


def test_the_divergence_is_that_of_plain_distributions():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(3, 7, generator=generator), torch.randn(3, 7, generator=generator)
    allowed = torch.tensor([[1, 4, IGNORE], [IGNORE, IGNORE, IGNORE], [0, 2, 6]])
    found = divergence(student, teacher, allowed, 2.0)
    for row, among in enumerate([[1, 4], list(range(7)), [0, 2, 6]]):
        p, q = ((side[row, among] / 2).softmax(0) for side in (teacher, student))
        torch.testing.assert_close(found[row], 4 * (p * (p / q).log()).sum())


def test_the_base_and_the_fast_weights_get_the_gradients_of_the_mixed_loss(tiny, tokenizer, tmp_path):
    teacher, lm = tiny_lm(tiny), tiny_lm(tiny)
    batch = side_batch(encoded(make_config(tmp_path), tokenizer, 2), "query", 1)
    fast = expand(perturbed_start(lm), 2)
    with torch.no_grad():
        soft = teacher.target_logits(expand(perturbed_start(lm, seed=5), 2), copy.deepcopy(batch))[0]
    base = {n: p.requires_grad_() for n, p in lm.module.named_parameters() if "layers" in n}
    gradients: dict[str, torch.Tensor] = {}
    mixed = partial(query_losses, lm, copy.deepcopy(batch), soft, HOW)
    losses, ours = task_gradients(with_base_gradients(base, gradients, mixed), fast)

    leaves = {name: weight.clone().requires_grad_() for name, weight in fast.items()}
    plain = plain_mixture(lm, copy.deepcopy(batch), soft, leaves)
    wanted = torch.autograd.grad(plain.sum(), [*leaves.values(), *base.values()])
    torch.testing.assert_close(losses, plain.detach())
    for found, reference in zip([*ours.values(), *gradients.values()], wanted, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-6)
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-4


def plain_mixture(lm: TaskLM, batch: TaskBatch, soft: torch.Tensor, weights) -> torch.Tensor:
    """0.7 KL at temperature 2 and 0.3 cross-entropy, target by target; one target a label."""
    logits, positions = lm.target_logits(weights, batch)
    losses: list[list[torch.Tensor]] = [[], []]
    for row, position in enumerate(positions.tolist()):
        among = [c for c in batch.allowed[row].tolist() if c != IGNORE]
        right = among.index(int(batch.targets.flatten()[position]))
        p, q = ((side[row, among] / 2).softmax(0) for side in (soft, logits))
        loss = 0.7 * 4 * (p * (p / q).log()).sum() - 0.3 * logits[row, among].log_softmax(0)[right]
        losses[position // (batch.tokens.numel() // 2)].append(loss)
    return torch.stack([torch.stack(task).mean() for task in losses])


def test_a_student_gets_closer_to_its_teacher(tiny, tokenizer, tmp_path):
    write_student(tiny, evenly_spaced(4, 2), tmp_path / "student")
    module = load_base(str(tmp_path / "student"), "float32")
    lm = TaskLM(module, TaskLoRA(module, ("q_proj", "v_proj"), 4, 8.0))
    whole = tiny_lm(tiny)
    teacher = Teacher(
        whole, perturbed_start(whole), {n: torch.tensor(0.1) for n in perturbed_start(whole)}, inner_steps=2
    )
    start = lm.adapter.untrained_start(0)
    log_inner_lrs = initial_log_inner_lrs(start, 0.1, (), per_weight=False)
    learner = Learner(
        start, log_inner_lrs, learn_rates=True, lr=1e-2, lr_of_inner_lr=0.02, weight_decay=0, clip_norm=1,
        schedule=lambda _: 1.0,
    )  # fmt: skip
    episodes = encoded(make_config(tmp_path), tokenizer, 8)
    student = Student(lm, learner, 2, Distillation(steps=30, lr=2e-3, temperature=2.0, hard=0.0))

    def apart() -> float:
        support, query = (side_batch(episodes, side, 1) for side in ("support", "query"))
        soft = teacher.logits(*map(copy.deepcopy, (support, query)))
        *_, adapted = adapt(partial(lm.losses, batch=support), learner.start, learner.inner_lrs, 2, 8)
        with torch.no_grad():
            logits, _ = lm.target_logits(adapted.fast, query)
        return float(divergence(logits, soft, query.allowed, 1.0).mean())

    before = apart()
    for _ in range(15):
        student.step(teacher, episodes, 1)
    assert apart() < 0.5 * before


@pytest.mark.parametrize(
    "way", [{"quantize": "int8"}, {"quantize": "int4"}, {"prune": 0.25}, {"distill": "layers=2"}], ids=str
)
def test_the_result_is_a_run_that_can_be_used(run, tmp_path, way):
    if "quantize" in way:
        pytest.importorskip({"int8": "torchao", "int4": "bitsandbytes"}[way["quantize"]])
    found = compressed(run, tmp_path / "small", **way)
    model = load(make_folder(tmp_path / "small"))
    assert model.base == str(tmp_path / "small" / "base")
    assert found["after"]["weights_bytes"] < 0.9 * found["before"]["weights_bytes"]
    assert json.loads((tmp_path / "small" / "compression.json").read_text()) == found
    linears = model.lm.adapter.linears
    assert set(model.start) == {f"{name}.lora_{side}" for name in linears for side in "AB"}
    assert all(model.start[f"{n}.lora_A"].shape[1] == linear.in_features for n, linear in linears.items())
    if "prune" in way:
        compressed(tmp_path / "small", tmp_path / "smaller", quantize="int8")


def make_folder(path):
    from rayml.runs.folder import RunFolder

    return RunFolder(path)


def test_bad_input_is_refused_first(run, tmp_path):
    new = tmp_path / "new"
    for way in ({}, {"prune": 0.5, "quantize": "int8"}, {"prune": 1.0}, {"prune": 0.0}):
        with pytest.raises(ConfigError, match="--prune"):
            compressed(run, new, **way)
    with pytest.raises(ConfigError, match="expected int8 or int4"):
        compressed(run, new, quantize="int2")
    for student, message in (("layers=x", "expected layers=N"), ("layers=4", "the teacher has 4 layers")):
        with pytest.raises(ConfigError, match=message):
            compressed(run, new, distill=student)
    with pytest.raises(RunError, match="exists already"):
        compressed(run, run, prune=0.5)
    with pytest.raises(ConfigError, match="--temperature"):
        compressed(run, new, distill="layers=2", how=Distillation(2, 1e-3, 0.0, 0.3))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("mode: adapters", "mode: full"))
    with pytest.raises(RunError, match="mode full"):
        compressed(run, new, prune=0.5)
    assert not new.exists()


def test_a_student_of_the_last_layer_alone_keeps_what_is_outside_of_layers():
    teacher = {name: torch.ones(1) for name in ("prompt", "readout.log_scale", "m.layers.0.a.A", "m.layers.3.a.A")}
    assert set(keep_layers(teacher, [3])) == {"prompt", "readout.log_scale", "m.layers.0.a.A"}
    assert set(keep_layers(teacher, [0, 3])) == {"prompt", "readout.log_scale", "m.layers.0.a.A", "m.layers.1.a.A"}
