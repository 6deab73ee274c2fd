"""Readouts in files: beside an adapter, for PEFT and the server; in checkpoints from before; and of mixed runs."""

import json

import pytest
import torch
from conftest import make_config, toy_tasks, write_tasks
from peft import PeftModel
from safetensors.torch import load_file, save_file
from serving_run import TICKETS, make_run

from rayml.adapter import load_adapter
from rayml.algorithms.prototypes import MEANS, SCALE
from rayml.errors import RunError
from rayml.lm.load import load_base
from rayml.lm.lora import stack_adapters
from rayml.lm.peft_files import READOUT, WEIGHTS
from rayml.model import load
from rayml.runs.checkpoint import newest_checkpoint, seal
from rayml.serving.adapter_files import read_adapter
from rayml.serving.replica import Replica
from rayml.serving.settings import Serving
from rayml.training.driver import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("readout"), algorithm={"name": "proto_maml"})


@pytest.fixture
def learned(run, tmp_path):
    """A folder with a readout beside its adapter."""
    load(run).adapt(TICKETS, name="tickets").save(tmp_path / "tickets")
    assert (tmp_path / "tickets" / READOUT).exists()
    return tmp_path / "tickets"


def test_peft_loads_a_folder_with_a_readout(learned, tiny):
    adapter = load_adapter(learned)
    tokens = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    peft = PeftModel.from_pretrained(load_base(tiny, "float32", "sdpa"), str(learned)).eval()
    adapter.lm.adapter.begin(stack_adapters([adapter.weights]))
    with torch.no_grad():
        torch.testing.assert_close(
            adapter.lm.module(tokens).logits, peft(input_ids=tokens).logits, atol=1e-5, rtol=1e-5
        )
    assert not any("readout" in name for name in load_file(learned / WEIGHTS))


def changed(**tensors):
    def change(folder):
        save_file(load_file(folder / READOUT) | tensors, folder / READOUT)

    return change


BROKEN = {
    "readout.safetensors is not a safetensors file": lambda folder: (folder / READOUT).write_bytes(b"\x08" * 40),
    r"readout.safetensors holds .*; expected readout.means of 3 x 64": changed(**{MEANS: torch.zeros(3, 63)}),
    "readout.safetensors has a scale or a mix that is out of range": changed(**{SCALE: torch.tensor(99.0)}),
    "readout.means holds numbers that are not finite": changed(**{MEANS: torch.full((3, 64), torch.nan)}),
}


@pytest.mark.parametrize("said", BROKEN)
def test_the_server_refuses_a_broken_readout_by_its_name(run, learned, said):
    fits = Replica(Serving(run=str(run.path))).adapter_cache.fits
    assert read_adapter(learned, fits)[1].name == "tickets"
    BROKEN[said](learned)
    with pytest.raises(RunError, match=said):
        read_adapter(learned, fits)


@pytest.mark.ray
def test_labels_and_free_text_are_learned_together(tmp_path, local_mode):
    path = write_tasks(tmp_path / "both.jsonl", toy_tasks())
    told = [{"task": f"say-{n}", "input": f"say {n} {i}", "target": f"{n}{i}"} for n in range(3) for i in range(12)]
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in told))
    splits = {"val": 0.0, "test": 0.0, "val_tasks": ["toy-4", "say-1"], "test_tasks": ["toy-5", "say-2"]}
    run = train(
        make_config(
            tmp_path,
            algorithm={"name": "proto_maml"},
            data={"path": str(path), "labels": "words", "splits": splits, "weighting": "uniform"},
            outer={"steps": 4, "lr": 1e-2},
            validation={"every": 4, "episodes": 4},
        )
    )
    last = run.records()[-1]
    assert 0 <= last["val_accuracy_after"] <= 1
    assert last["val_loss_after"] > 0
    model = load(run)
    texts = [{"input": f"say 7 {n}", "target": f"7{n}", "kind": "text"} for n in (1, 2)]
    assert model.adapt(texts, name="say").predict("say 7 3").label is None
    rows = [{"input": text, "target": label, "options": ["billing", "bug", "delivery"]} for text, label in TICKETS]
    assert model.adapt(rows).predict("lost parcel").label in ("billing", "bug", "delivery")


@pytest.mark.ray
def test_a_protonet_run_from_before_its_scale_was_learned(tmp_path, local_mode):
    """It answers as it is; it is not gone on with, and the refusal says what is."""
    changes = {"algorithm": {"name": "protonet"}, "outer": {"steps": 2}, "run": {"checkpoint_every": 2}}
    run = train(make_config(tmp_path, **changes))
    folder = newest_checkpoint(run.checkpoints)
    tensors = {name: of for name, of in load_file(folder / "state.safetensors").items() if SCALE not in name}
    save_file(tensors, folder / "state.safetensors")
    (folder / "manifest_0.json").unlink()
    seal(folder, 2, part=0, parts=1)
    assert load(run).adapt(TICKETS).predict("lost parcel").label
    with pytest.raises(RunError, match=r"no start/readout.scale.*--continue RUN"):
        train(make_config(tmp_path, **changes | {"outer": {"steps": 3}}), resume=True)
