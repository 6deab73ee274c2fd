"""Which dtype a model runs in: by the facts of devices, and in real runs that are read in the other dtype."""

import json

import pytest
import torch
from conftest import make_config, toy_tasks
from rich.console import Console
from transformers import GPTJConfig

from rayml.experiments.evaluate_command import evaluate_run
from rayml.lm import precision
from rayml.lm.precision import (
    Device,
    choose_precision,
    cpu_bf16,
    has_sdpa,
    inspect_device,
    measured_gflops,
    resolve_precision,
)
from rayml.runs.folder import RunFolder
from rayml.training.driver import train

OLD = Device("cpu", "CPU", None)
AMX = Device("cpu", "CPU", "AMX-BF16", {"float32": 100.0, "bfloat16": 700.0})
ZEN4 = Device("cpu", "CPU", "AVX512-BF16", {"float32": 60.0, "bfloat16": 130.0})
CAPPED = Device("cpu", "CPU", "AVX512-BF16", {"float32": 60.0, "bfloat16": 9.0})
EVEN = Device("cpu", "CPU", "Arm's BF16", {"float32": 60.0, "bfloat16": 63.0})
H100 = Device("cuda", "NVIDIA H100", "tensor cores for bfloat16")
V100 = Device("cuda", "Tesla V100", None)
AUTO = ("auto", "auto")


@pytest.mark.parametrize(
    ("devices", "dtype", "attention"),
    [
        ([OLD], "float32", "sdpa"),
        ([AMX], "bfloat16", "eager"),
        ([ZEN4], "bfloat16", "eager"),
        ([CAPPED], "float32", "sdpa"),
        ([EVEN], "float32", "sdpa"),
        ([H100], "bfloat16", "sdpa"),
        ([V100], "float32", "sdpa"),
        ([AMX, OLD], "float32", "sdpa"),
        ([AMX, EVEN], "bfloat16", "eager"),
        ([AMX, CAPPED, AMX], "float32", "sdpa"),
    ],
)
def test_the_dtype_is_one_that_no_worker_is_slow_in(devices, dtype, attention):
    for order in (devices, devices[::-1]):
        assert choose_precision(AUTO, order)[:2] == (dtype, attention)


@pytest.mark.parametrize(
    ("device", "made_in", "dtype"),
    [
        (OLD, "bfloat16", "float32"),
        (OLD, "float32", "float32"),
        (AMX, "float32", "bfloat16"),
        (EVEN, "bfloat16", "bfloat16"),
        (H100, "float32", "bfloat16"),
        (Device("cpu", "CPU", "AVX512-BF16", {"float32": 60.0, "bfloat16": 90.0}), "float32", "float32"),
    ],
)
def test_what_is_opened_keeps_its_dtype_unless_that_is_slow_here(device, made_in, dtype):
    found = choose_precision(AUTO, [device], made_in)
    assert found.dtype == dtype
    assert ("made in" in found.why) == (dtype != made_in)


def test_what_was_asked_for_is_done_and_warned_of_with_both_rates():
    found = choose_precision(("bfloat16", "auto"), [CAPPED])
    assert found.dtype == "bfloat16"
    assert found.warning == (
        "model.dtype=bfloat16 is slow here, CPU with AVX512-BF16 (float32 60, bfloat16 9 GFLOP/s); "
        "model.dtype=auto takes float32"
    )
    assert "float32 100, bfloat16 700" in str(choose_precision(("float32", "auto"), [AMX]).warning)
    assert choose_precision(("float32", "auto"), [ZEN4]).warning is None or ZEN4.speed("float32") < 0.5
    assert choose_precision(("bfloat16", "eager"), [H100]).warning is None


def test_long_rows_and_models_without_fused_attention_have_their_own():
    assert choose_precision(AUTO, [AMX], max_tokens=512).attention == "sdpa"
    assert choose_precision(AUTO, [OLD], sdpa=False).attention == "eager"
    assert choose_precision(("auto", "sdpa"), [AMX]).attention == "sdpa"


def test_facts_of_this_machine_take_no_time_and_are_measured_where_there_is_a_choice(monkeypatch):
    monkeypatch.setattr(precision, "cpu_bf16", cpu_bf16)  # what this CPU has, unlike in other tests
    found = inspect_device(torch.device("cpu"), (64, 128))
    assert (found.gflops is None) == (cpu_bf16() is None)
    measured = inspect_device(torch.device("cpu"), (64, 128), timed=True).gflops
    assert measured
    assert min(measured.values()) > 0
    assert measured_gflops((64, 128)).keys() == {"float32", "bfloat16"}


def test_a_model_without_fused_attention_is_known_by_its_config(tiny, tmp_path):
    GPTJConfig(vocab_size=100, n_embd=32, n_layer=2, n_head=2, rotary_dim=8).save_pretrained(tmp_path)
    assert has_sdpa(tiny)
    assert not has_sdpa(str(tmp_path))


def test_second_derivatives_take_eager_attention(tiny, tmp_path):
    config = make_config(tmp_path, model={"attention": "auto"}, algorithm={"name": "maml"})
    assert resolve_precision(config, tiny, [OLD])[0].model.attention == "eager"


@pytest.mark.ray
def test_a_run_of_one_dtype_is_read_in_the_other_with_like_scores(tmp_path, local_mode, monkeypatch, capsys):
    """Tolerance: 0.1 in accuracy over 20 episodes of 6 queries, before adapting and after."""
    asked = {"dtype": "auto", "attention": "auto"}
    data = {"labels": "words", "splits": {"val": 0.0, "test": 0.0, "test_tasks": ["toy-5"]}}
    scores: dict[tuple[str, str], tuple[float, float]] = {}
    for made, device in (("bfloat16", AMX), ("float32", OLD)):
        folder = tmp_path / made
        folder.mkdir()
        monkeypatch.setattr("rayml.training.worker.device_for", lambda *_, device=device: device)
        run = train(make_config(folder, model=asked, data=data, outer={"steps": 8, "lr": 0.01}))
        assert json.loads(run.precision.read_text())["dtype"] == made == RunFolder(run.path).trained_dtype()
        for read, here in (("bfloat16", AMX), ("float32", OLD)):
            monkeypatch.setattr(SESSION + ".device_for", lambda *_, here=here: here)
            quiet = Console(quiet=True)
            capsys.readouterr()
            found = evaluate_run(
                run, None, None, None, 20, 0, "test", None, folder / "e.json", quiet, Console(stderr=True)
            )
            said = capsys.readouterr().err
            assert f"{read}, " in said
            assert (f"made in {made}" in said) == (read != made)
            scores[made, read] = found["overall"]["before"]["mean"], found["overall"]["after"]["mean"]
    for made in ("bfloat16", "float32"):
        assert scores[made, "bfloat16"] == pytest.approx(scores[made, "float32"], abs=0.1)
    assert toy_tasks()


SESSION = "rayml.lm.precision"
