"""Adapters from files that may lie."""

import json
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from rich.console import Console
from serving_run import (  # noqa: F401
    TEXTS,
    ask,
    change_card,
    change_weights,
    first,
    fits,
    learn,
    learned,
    replica,
    request,
    run,
    write,
)

from rayml.errors import ConfigError, RunError
from rayml.lm.sampling import Sampling
from rayml.serving.adapter_files import read_adapter
from rayml.serving.command import publish_adapter
from rayml.serving.errors import ApiError
from rayml.serving.store import AdapterStore, Manifest, adapter_id
from rayml.tasks.task import Example


def change_config(folder: Path, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def swap(tensors, kind, weight):
    tensors[first(tensors, kind)] = weight


def poison_weights(change):
    return lambda folder: change_weights(folder, change)


def poison_config(**changes):
    return lambda folder: change_config(folder, **changes)


def narrower(tensors):
    swap(tensors, "lora_A", torch.zeros(2, tensors[first(tensors, "lora_A")].shape[1]))


HEAD = "base_model.model.lm_head.lora_A.weight"
POISON = {
    "not finite": poison_weights(lambda t: t[first(t, "lora_B")].fill_(float("nan"))),
    "has the shape": poison_weights(lambda t: swap(t, "lora_A", torch.zeros(4, 7))),
    r"has the shape \[\]": poison_weights(lambda t: swap(t, "lora_A", torch.tensor(1.0))),
    "not have the rank r=4": poison_weights(narrower),
    "B.* finite": poison_config(lora_alpha=1e300),
    "do not come in pairs": poison_weights(lambda t: t.pop(first(t, "lora_A"))),
    "not a linear layer": poison_weights(lambda t: t.update({HEAD: torch.zeros(4, 64)})),
    "holds no weights": poison_weights(lambda t: t.clear()),
    "not a safetensors": lambda d: (d / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle"),
    "never pickles": lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
    "cannot be read": lambda d: (d / "adapter_config.json").write_text("[" * 100_000),
    "not a JSON object": lambda d: (d / "adapter_config.json").write_text("[]"),
    "only LORA": poison_config(peft_type="IA3"),
    "use_dora": poison_config(use_dora=True),
    "bias": poison_config(bias="all"),
    "asks for arrow_config, use_qalora": poison_config(use_qalora=True, arrow_config={"top_k": 2}),
    "asks for some_day_new": poison_config(some_day_new=0.5, and_off=False),
    "rank r=": poison_config(r=10**9),
    "lora_alpha": poison_config(lora_alpha="x"),
    "made for the base": poison_config(base_model_name_or_path="other/model"),
    "not what rayml writes": lambda d: change_card(d, labels=[]),
    "is not what rayml": lambda d: change_card(d, shown=[1]),
    "what rayml writes$": lambda d: change_card(d, prompt=5),
    "rayml.json is not": lambda d: change_card(d, max_tokens="x"),
    "nothing of the input": lambda d: change_card(d, prompt="x"),
    "reads no tokens": lambda d: change_card(d, max_tokens=0),
    "has soft_tokens=5": lambda d: change_card(d, soft_tokens=5),
}


@pytest.mark.parametrize("says", POISON)
def test_a_poisoned_adapter_is_refused_and_nothing_else_suffers(replica, learned, says):
    assert read_adapter(learned, fits(replica))[1].labels
    POISON[says](learned)
    with pytest.raises(RunError, match=says):
        read_adapter(learned, fits(replica))


def test_a_poisoned_adapter_in_the_store_is_422_and_others_answer(replica, learned):
    (fine,) = learn(replica, request(name="fine"))
    POISON["not finite"](learned)
    bad = Manifest(
        id=adapter_id("bad", []), name="bad", created_at=1, expires_at=None,
        examples=0, steps=0, loss_before=None, loss_after=None, seconds=0,
    )  # fmt: skip
    replica.store.publish("public", bad, learned)
    with pytest.raises(ApiError, match="not finite") as refused:
        ask(replica, bad.id, ["a"])
    assert (refused.value.status, refused.value.code) == (422, "adapter_refused")
    assert ask(replica, fine.id, ["a"])


def test_too_large_an_adapter_is_not_even_opened(replica, learned):
    import dataclasses

    small = dataclasses.replace(fits(replica), most_bytes=1000)
    with pytest.raises(RunError, match="at most 1000"):
        read_adapter(learned, small)


def test_plain_peft_adapters_answer_as_peft_does(replica, run, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = replica.model.base
    config = LoraConfig(
        task_type="CAUSAL_LM", r=6, lora_alpha=9, target_modules=["q_proj", "gate_proj"], use_rslora=True
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(tmp_path / "plain")
    publish_adapter(tmp_path / "plain", run.path, None, None, Console(quiet=True))
    prompt = "hello there"
    row = torch.tensor([replica.model.encoder.tokenizer(prompt)["input_ids"]])
    model.eval()
    with torch.no_grad():
        expected = model(row).logits[0, -1].log_softmax(-1)
        text = model.generate(input_ids=row, max_new_tokens=12, do_sample=False, pad_token_id=1)[0, row.shape[1] :]
    found = replica.store.find("public", "plain")
    pieces = write(replica, found.id, [prompt], Sampling(12, logprobs=1))
    assert pieces[0][1].scores[0].logprob == pytest.approx(float(expected.max()), abs=1e-4)
    whole = "".join(piece.text for _, piece, _ in pieces)
    assert whole == replica.model.encoder.tokenizer.decode(text, skip_special_tokens=True).lstrip()


def test_a_downloaded_adapter_scores_in_stock_peft_as_it_is_served(replica, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (manifest,) = learn(replica, request())
    replica.store.fetch("public", manifest, tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(replica.model.base), str(tmp_path)).eval()
    encoder = replica.model.encoder
    answers = ask(replica, manifest.id, TEXTS)
    for text, answer in zip(TEXTS, answers, strict=True):
        (rows,) = encoder.option_rows([Example(text, "")], ["A", "B", "C"])
        with torch.no_grad():
            logits = model(torch.tensor([rows[0].tokens[:-1]])).logits[0, -1]
        scores = logits[[row.tokens[-1] for row in rows]].softmax(-1).tolist()
        assert list(answer["probabilities"].values()) == pytest.approx(scores, abs=1e-4)


def test_a_zip_is_published_without_following_its_paths(run, learned, tmp_path):
    packed = tmp_path / "evil.zip"
    with zipfile.ZipFile(packed, "w") as file:
        for path in learned.iterdir():
            file.write(path, path.name)
        file.writestr("../rayml-escaped", "x")
        file.writestr(str(tmp_path / "rayml-escaped"), "x")
    publish_adapter(packed, run.path, "zipped", str(tmp_path / "store"), Console(quiet=True))
    assert AdapterStore(str(tmp_path / "store")).find("public", "zipped")
    assert not (tmp_path / "rayml-escaped").exists()
    assert not (Path(tempfile.gettempdir()) / "rayml-escaped").exists()
    with pytest.raises(ConfigError, match="--name"):
        publish_adapter(packed, run.path, "../x", str(tmp_path / "store"), Console(quiet=True))
    with pytest.raises(RunError, match="nor a zip"):
        publish_adapter(learned / "rayml.json", run.path, "z", str(tmp_path / "store"), Console(quiet=True))


def test_an_adapter_is_published_under_its_folder_s_whole_name(run, learned, tmp_path):
    publish_adapter(learned.rename(tmp_path / "tickets.v2"), run.path, None, str(tmp_path / "s"), Console(quiet=True))
    assert AdapterStore(str(tmp_path / "s")).find("public", "tickets-v2")


@pytest.mark.parametrize("begun", ["pissa", "olora", "corda", "loftq"])
def test_an_adapter_that_changes_the_base_is_not_published(replica, run, tmp_path, begun):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    here = begun if begun in ("pissa", "olora") else True  # the others want data, or a GPU
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=here)
    get_peft_model(AutoModelForCausalLM.from_pretrained(replica.model.base), config).save_pretrained(tmp_path / begun)
    change_config(tmp_path / begun, init_lora_weights=begun)
    with pytest.raises(RunError, match=f"init_lora_weights='{begun}' changes the base"):
        publish_adapter(tmp_path / begun, run.path, None, str(tmp_path / "store"), Console(quiet=True))


def test_an_adapter_that_peft_reads_otherwise_is_not_published(run, learned, tmp_path):
    targets = json.loads((learned / "adapter_config.json").read_text())["target_modules"]
    change_config(learned, target_modules=targets[:1])
    with pytest.raises(RunError, match="PEFT computes something else"):
        publish_adapter(learned, run.path, "half", str(tmp_path / "store"), Console(quiet=True))


def test_an_adapter_that_an_invocation_turns_on_is_not_read_as_plain_lora(replica, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    common = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}
    for config in (LoraConfig(**common), LoraConfig(**common, alora_invocation_tokens=[7, 8])):
        get_peft_model(AutoModelForCausalLM.from_pretrained(replica.model.base), config).save_pretrained(tmp_path)
        if not config.alora_invocation_tokens:
            assert read_adapter(tmp_path, fits(replica))[0]
    with pytest.raises(RunError, match="asks for alora_invocation_tokens, which is not served"):
        read_adapter(tmp_path, fits(replica))
