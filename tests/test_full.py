"""Mode full on two gloo ranks, against a whole model in plain torch; see full_reference.py."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import on_workers
from full_reference import OUTER, full_config, meta_batch, run_reference, side
from transformers import AutoModelForCausalLM

from rayml.algorithms.phased_optimizer import Phase, PhasedOptimizer
from rayml.errors import ConfigError, RunError
from rayml.lm import zero
from rayml.lm.batch import TaskBatch
from rayml.lm.load import load_base
from rayml.lm.model import TaskLM
from rayml.lm.parameters import parameter_groups, trained_parameters
from rayml.training import full
from rayml.training.full import MANIFEST, FullLearner, NotFinite

pytest.importorskip("deepspeed")
CPU = torch.device("cpu")
PARITY = {"rtol": 1e-5, "atol": 1e-5}
REPTILE = {"algorithm__name": "reptile", "outer__lr": 0.05}
# Distance from the fp32 reference, as a share of the way that the weights went. Seen: bf16 0.009, offload 1e-6.
BF16_TOLERANCE, OFFLOAD_TOLERANCE = 0.03, 1e-5


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory) -> str:
    """The tiny model cut to two layers: gathering layer after layer is what takes the time here."""
    folder = tmp_path_factory.mktemp("small")
    AutoModelForCausalLM.from_pretrained(tiny, num_hidden_layers=2).save_pretrained(folder)
    return str(folder)


def new_learner(path, config) -> FullLearner:
    return FullLearner(zero.load_full(path, config, CPU, whole_below=0), config)


def weights(learner) -> dict[str, torch.Tensor]:
    """What the forward reads, whole."""
    import deepspeed

    named = dict(learner.engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: weight.detach().float().clone() for name, weight in named.items()}


def fp32_weights(learner, shards=None) -> dict[str, torch.Tensor]:
    """The fp32 weights, whole; or what `shards` hold in their places."""
    from deepspeed.utils import safe_get_full_fp32_param

    kept = {shard: shard.detach().clone() for shard in shards or {}}
    for shard, value in (shards or {}).items():
        shard.data.copy_(value)
    named = learner.engine.module.named_parameters()
    found = {name: safe_get_full_fp32_param(weight).clone() for name, weight in named}
    for shard, value in kept.items():
        shard.data.copy_(value)
    return found


def recorded_meta_gradients(learner) -> list[dict[str, torch.Tensor]]:
    """A list that every outer step adds its shards of the meta-gradient to."""
    found, outer_step = [], learner.optimizer.outer.step

    def record():
        groups = learner.optimizer.outer.param_groups
        found.append({shard: shard.grad.clone() for group in groups for shard in group["params"]})
        outer_step()

    learner.optimizer.outer.step = record
    return found


def with_dtype(config, dtype):
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def train(learner, outer_steps=range(OUTER), rows=4) -> list[dict[str, float]]:
    steps = [learner.step(meta_batch(step, rows)) for step in outer_steps]
    means = [torch.tensor(step.task_losses).mean(0).tolist() for step in steps]
    return [
        {"support_loss": support, "query_loss": query, "gradient_norm": step.gradient_norm}
        for (support, query), step in zip(means, steps, strict=True)
    ]


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **(tolerance or PARITY), msg=lambda text, n=name: f"{n}: {text}")


def assert_trains_as(path, config, expected, rows=4) -> FullLearner:
    """Losses, norms and weights after OUTER steps are the reference's."""
    learner = new_learner(path, config)
    for record, reference in zip(train(learner, rows=rows), expected["losses"], strict=True):
        assert record == pytest.approx(reference, rel=1e-5, abs=1e-5)
    assert_same(weights(learner), expected["weights"])
    return learner


def largest(model) -> int:
    return max(weight.numel() for weight in model.parameters())


def logits(lm) -> torch.Tensor:
    return lm.target_logits(None, side(7, 4))[0].float()


def all_stages(rank, path, expected):
    for stage in (1, 2, 3):
        algorithms(rank, path, stage, expected)


def algorithms(rank, path, stage, expected):
    stage_of, before_engine = {"zero__stage": stage}, []
    choose = zero.trained_parameters
    zero.trained_parameters = lambda model, full: before_engine.append(largest(model)) or choose(model, full)
    learner = assert_trains_as(path, full_config(**stage_of), expected["fomaml"])
    zero.trained_parameters = choose
    assert (before_engine == [0]) == (stage == 3), "stage 3 shards the weights as they are read"
    if stage == 3:
        for name, weight in learner.engine.module.named_parameters():
            assert weight.numel() == 0, f"{name} is whole on rank {rank}"
            assert weight.ds_tensor.numel() == -(-weight.ds_numel // 2)
    assert_restores(learner)
    assert_trains_as(path, full_config(**REPTILE, **stage_of), expected["reptile"])

    learner = new_learner(path, full_config(outer__optimizer="adamw", outer__lr=1e-3, **stage_of))
    found = recorded_meta_gradients(learner)
    train(learner)
    parts = len(found) // OUTER  # the engine steps shard by shard
    for step, reference in enumerate(expected["adamw"]):
        shards = {s: g for part in found[step * parts : (step + 1) * parts] for s, g in part.items()}
        assert_same(fp32_weights(learner, shards), reference)


def assert_restores(learner):
    """Adapting changes what the forward says, and leaves no trace."""
    support = meta_batch(0)[0][0]
    before, after = learner.adapt_and_score(support, partial(logits, learner.lm))
    assert (after - before).abs().max() > 1e-3
    with torch.no_grad():
        assert torch.equal(logits(learner.lm), before)
    kept = weights(learner)
    learner._train(*meta_batch(0)[0], weight=1.0, tasks=0)
    assert_same(weights(learner), kept, rtol=0, atol=0)


def reference_results(path, rows=4, **changes):
    found = run_reference(path, full_config(**changes), rows)
    return {"losses": found.losses, "weights": found.weights()}, found


@pytest.mark.workers
def test_zero_equals_plain_torch(small):
    fomaml, found = reference_results(small)
    assert min(found.inner_norms) > 0.5 * 2, "clipping an inner step at clip_norm must be visible"
    assert found.clipped > 0
    adamw = run_reference(small, full_config(outer__optimizer="adamw", outer__lr=1e-3)).meta_gradients
    reptile = reference_results(small, **REPTILE)[0]
    on_workers(all_stages, 2, small, {"fomaml": fomaml, "reptile": reptile, "adamw": adamw})


CHECKPOINTS = [(1, "bfloat16"), (3, "float32"), (3, "bfloat16")]  # stages 1 and 2 are one class


def rows_and_checkpoints(rank, path, folder, expected):
    for stage, rows in ((1, 3), (3, 1)):
        learner = assert_trains_as(path, full_config(zero__stage=stage), expected[rows], rows)
    with pytest.raises(ValueError, match="one task at a time"):
        learner.step([(two_tasks(), side(0, 4))])
    for stage, dtype in CHECKPOINTS:
        config = with_dtype(full_config(zero__stage=stage, outer__optimizer="adamw", outer__lr=1e-3), dtype)
        straight, half, resumed = (new_learner(path, config) for _ in range(3))
        train(half, range(2))
        half.save(folder / f"{stage}-{dtype}")
        resumed.load(folder / f"{stage}-{dtype}")
        assert resumed.outer_step == 2
        assert train(resumed, range(2, OUTER)) == train(straight)[2:]
        assert_same(fp32_weights(resumed), fp32_weights(straight), rtol=0, atol=0)
        assert_same(weights(resumed), weights(straight), rtol=0, atol=0)
        with torch.no_grad():
            live = logits(half.lm)
        if rank == 0:
            torch.save(live, folder / f"{stage}-{dtype}" / "logits.pt")
    assert_refuses_other_shards(rank, new_learner(path, config), folder)


def assert_refuses_other_shards(rank, learner, folder):
    if rank == 0:
        saved = json.loads((folder / "3-bfloat16" / MANIFEST).read_text())
        (folder / "other").mkdir()
        (folder / "other" / MANIFEST).write_text(json.dumps(saved | {"workers": 3}))
    torch.distributed.barrier()
    with pytest.raises(RunError, match=r"3 workers .* cannot be resumed by 2 .* export the run"):
        learner.load(folder / "other")
    with pytest.raises(RunError, match="not a whole checkpoint"):
        learner.load(folder / "nothing")


def two_tasks() -> TaskBatch:
    one = side(0, 4)
    return TaskBatch(one.tokens, one.targets, 2)


@pytest.mark.workers
def test_uneven_rows_and_exact_checkpoints(small, tmp_path):
    expected = {rows: reference_results(small, rows)[0] for rows in (3, 1)}
    on_workers(rows_and_checkpoints, 2, small, tmp_path, expected)
    for stage, dtype in CHECKPOINTS:
        checkpoint = tmp_path / f"{stage}-{dtype}"
        whole = zero.consolidate(checkpoint)
        assert {weight.dtype for weight in whole.values()} == {torch.float32}
        load_base(small, "float32").save_pretrained(checkpoint / "model", state_dict=whole)
        model = AutoModelForCausalLM.from_pretrained(checkpoint / "model", dtype=dtype, use_safetensors=True)
        with torch.no_grad():
            found = logits(TaskLM(model, None))
        torch.testing.assert_close(found, torch.load(checkpoint / "logits.pt"), rtol=0, atol=1e-5)


def precisions(rank, path, expected):
    for stage, offload, dtype in PRECISIONS:
        config = with_dtype(full_config(zero__stage=stage, zero__offload=offload), dtype)
        learner = new_learner(path, config)
        start, reference = fp32_weights(learner), expected[dtype]
        train(learner, range(2))
        found = fp32_weights(learner)
        off = sum(float((found[n] - reference[n]).norm() ** 2) for n in found) ** 0.5
        way = sum(float((start[n] - reference[n]).norm() ** 2) for n in found) ** 0.5
        print(f"stage {stage}, offload {offload}, {dtype}: {off / way:.1e} of the way")
        assert off < way * (BF16_TOLERANCE if dtype == "bfloat16" else OFFLOAD_TOLERANCE)
        assert {weight.dtype for weight in learner.optimizer.meta_gradients.values()} == {torch.float32}
        assert_restores(learner)


PRECISIONS = [(stage, "none", "bfloat16") for stage in (1, 2, 3)]
PRECISIONS += [(stage, "optimizer", "float32") for stage in (1, 2, 3)]
PRECISIONS += [(3, "all", "float32")]


@pytest.mark.workers
def test_bf16_and_offloading_follow_plain_torch(small):
    expected = {}
    for dtype in ("float32", "bfloat16"):
        expected[dtype] = run_reference(small, full_config(), dtype=dtype, outer_steps=2).weights()
    on_workers(precisions, 2, small, expected)


def test_labels_are_smoothed_in_training_alone(monkeypatch):
    config, smoothings = full_config(regularize__label_smoothing=0.3), []

    def share_loss(lm, share, smoothing):
        smoothings.append(smoothing)
        return torch.zeros(())

    monkeypatch.setattr(full, "share_loss", share_loss)
    learner = FullLearner.__new__(FullLearner)
    learner.config, learner.lm, learner.outer_step, learner._task = config, None, 0, 0
    learner.engine = lambda **_: SimpleNamespace(logits=torch.zeros(1))
    learner.timer, learner._step = (lambda phase: None), lambda *_: None
    learner.adapt_and_score(side(0, 4), lambda: 0.5)
    assert smoothings == [0.0] * config.inner.steps
    learner._train(*meta_batch(0)[0], 1.0, 0)
    assert smoothings[config.inner.steps :] == [0.3] * (config.inner.steps + 1)


def options(rank, path, expected):
    checkpointed = full_config()
    model = checkpointed.model.model_copy(update={"activation_checkpointing": True})
    assert_trains_as(path, checkpointed.model_copy(update={"model": model}), expected["fomaml"])

    config = full_config(full__freeze=["*.mlp.*"], full__last_layers=1, full__embeddings=False)
    learner = new_learner(path, config)
    start = weights(learner)
    train(learner, range(1))
    moved = {name for name, weight in weights(learner).items() if not torch.equal(weight, start[name])}
    assert moved == expected["trained"]
    learner.save(expected["folder"])

    head = new_learner(path, full_config(inner__modules=["*.layers.1.*"]))
    start = weights(head)
    head.run_phase([(side(0, 4), 1.0)], Phase(descends=True))
    moved = {name for name, weight in weights(head).items() if not torch.equal(weight, start[name])}
    assert moved == {name for name in start if ".layers.1." in name}
    assert sum(start.numel() for start in head.optimizer.starts.values()) < sum(w.numel() for w in start.values()) / 2

    partly = new_learner(path, full_config(**REPTILE, inner__modules=["*.layers.1.*"]))
    start = weights(partly)
    train(partly, range(1))
    moved = {name for name, weight in weights(partly).items() if not torch.equal(weight, start[name])}
    assert moved == {name for name in start if ".layers.1." in name}, "reptile learns what its inner loop changes alone"

    multitask = new_learner(path, full_config(algorithm__name="multitask", outer__clip_norm=0))
    weighted = new_learner(path, full_config(algorithm__name="multitask", outer__clip_norm=0))
    episodes = meta_batch(0)
    found = recorded_meta_gradients(multitask), recorded_meta_gradients(weighted)
    multitask.step([episodes[0], episodes[0]])
    weighted.step([episodes[0], episodes[1]], weights=[2.0, 0.0])
    both = [torch.cat([g.flatten() for part in parts for g in part.values()]) for parts in found]
    torch.testing.assert_close(*both)

    broken = new_learner(path, full_config())
    broken.optimizer.param_groups[0]["inner_lr"] = 1e30
    with pytest.raises(NotFinite, match=r"outer step 1: a (loss|gradient) is not finite, in task 0"):
        train(broken)


@pytest.mark.workers
def test_what_is_trained_and_how(small, tmp_path):
    named = [name for name, _ in load_base(small, "float32").named_parameters()]
    trained = {n for n in named if ".layers.1." in n and ".mlp." not in n} | {"model.norm.weight"}
    on_workers(options, 2, small, {"fomaml": reference_results(small)[0], "trained": trained, "folder": tmp_path / "c"})
    whole = zero.consolidate(tmp_path / "c")
    start = load_base(small, "float32").state_dict()
    assert whole.keys() == start.keys()
    assert {name for name in named if not torch.equal(whole[name], start[name])} == trained


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full__freeze": ["*.nothing.*"]}, "full.freeze"),
        ({"full__freeze": ["*"]}, "nothing is left to train"),
        ({"inner__modules": ["*.lora_B"]}, "inner.modules"),
    ],
)
def test_patterns_that_do_nothing_are_refused(small, changes, message):
    config, model = full_config(**changes), load_base(small, "float32")

    def choose():
        parameter_groups(trained_parameters(model, config.full), 0.1, config.inner.modules, 0.0)

    with pytest.raises(ConfigError, match=message):
        choose()


def test_an_optimizer_step_of_an_idle_phase_does_nothing():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = PhasedOptimizer(torch.optim.AdamW([{"params": [weight], "inner_lr": 0.1}]))
    weight.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(weight, torch.ones(3))
    assert not optimizer.state
    assert not optimizer.starts
    for phase, tasks in ((Phase(descends=True), 0), (Phase(collects=True, restores=True), 1)):
        optimizer.enter(phase, tasks=tasks)
        optimizer.step()
    assert optimizer.state[weight]["step"] == 1
