"""The benchmark's clocks run on equal work: peers' meta-gradients are rayml's, or they are left out."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_config

from rayml.config import dump_config

JOBS = Path(__file__).parents[1] / "jobs"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(JOBS))
    import benchmark

    return benchmark


@pytest.mark.parametrize("labels", ["options", "vocabulary"])
def test_peers_come_to_the_same_meta_gradient_and_one_that_does_not_is_left_out(benchmark, tmp_path, labels):
    config = make_config(tmp_path, tasks_per_step=3, data={"label_loss": labels, "labels": "words"}, inner={"lr": 0.5})
    ways, missing = benchmark.peers(None)
    assert ways.keys() | missing.keys() >= {"PEFT loop", "torch.func", "higher", "TorchOpt", "learn2learn", "Betty"}
    ways = {name: ways[name] for name in ("PEFT loop", "torch.func")}
    ways["nearly"] = lambda work: [1.01 * gradient for gradient in ways["PEFT loop"](work)]
    ways["broken"] = lambda work: [][0]
    case = benchmark.measure(config, SimpleNamespace(shape=None, repeats=2), ways, torch.device("cpu"))
    assert max(case["apart"][name] for name in ("PEFT loop", "torch.func")) < 1e-4
    assert case["failed"].keys() == {"nearly", "broken"}
    assert case["seconds"].keys() == {"rayml", "PEFT loop", "torch.func"}
    assert min(case["peak_bytes"].values()) > 0
    ours, loop = case["flops"]["rayml"], case["flops"]["PEFT loop"]
    if labels == "vocabulary":
        assert ours >= loop > 0, "padding to the longest of all tasks"
    else:
        assert loop > ours > 0.95 * loop, "without the rows of the output layer that no label needs"


def test_a_report_of_random_weights_over_an_axis(benchmark, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text(dump_config(make_config(tmp_path, data={"max_tokens": 16})))
    command = ["benchmark.py", str(tmp_path / "config.yaml"), "tasks_per_step=2", "--shape=llama-tiny", "--repeats=2"]
    command += ["data.ways=2", "data.shots=1", "inner.steps=1"]
    monkeypatch.setattr(sys, "argv", [*command, "--axis=lora.rank=2,4", f"--out={tmp_path / 'out'}"])
    benchmark.main()
    result = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [case["changed"] for case in result["cases"]] == [[], ["lora.rank=2"], ["lora.rank=4"]]
    assert (tmp_path / "out" / "lora.rank.png").stat().st_size > 10_000
    assert "| lora.rank=4 | rayml |" in capsys.readouterr().out
