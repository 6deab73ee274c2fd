"""Adapters that rayml writes, in stock PEFT."""

import pytest
import torch
from conftest import TARGETS, perturbed_start, tiny_lm
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rayml.errors import RunError
from rayml.lm.batch import TaskBatch
from rayml.lm.decode import Decoder
from rayml.lm.generate import Generation
from rayml.lm.load import load_base
from rayml.lm.lora import TaskLoRA
from rayml.lm.model import TaskLM
from rayml.lm.peft_files import AdapterCard, load_learned, save_adapter, save_model, weight_name, write_card
from rayml.lm.sampling import Sampling


@pytest.mark.parametrize("last_layers", [None, 2])
def test_an_exported_adapter_gives_equal_logits_in_stock_peft(tiny, tmp_path, last_layers):
    module = load_base(tiny, "float32")
    lm = TaskLM(module, TaskLoRA(module, TARGETS, 4, alpha=8.0, last_layers=last_layers))
    weights = perturbed_start(lm)
    shape = {"rank": 4, "alpha": 8.0, "targets": list(TARGETS), "last_layers": last_layers}
    card = AdapterCard("mine", "tiny", "float32", "{input}:", 40, {"A": "ham"}, shape)
    save_adapter(tmp_path / "mine", weights, shape, tiny)
    write_card(tmp_path / "mine", card)

    stock = PeftModel.from_pretrained(load_base(tiny, "float32"), tmp_path / "mine")
    tokens = torch.randint(2, 90, (3, 12), generator=torch.Generator().manual_seed(0))
    lm.adapter.adapters = {name: weight[None] for name, weight in weights.items()}
    with torch.no_grad():
        ours, theirs = module(input_ids=tokens).logits, stock(input_ids=tokens).logits
        bare = load_base(tiny, "float32")(input_ids=tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - bare).abs().max() > 1e-2

    again, read, own_model = load_learned(tmp_path / "mine")
    assert read == card
    assert own_model is None
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_an_adapter_on_a_bfloat16_base_is_computed_as_peft_does(tiny, tokenizer, tmp_path):
    """With PEFT's default, which keeps adapters in float32: the same logits, in training and where texts are written,
    and the same gradients."""
    module = load_base(tiny, "bfloat16")
    lm = TaskLM(module, TaskLoRA(module, TARGETS, 4, alpha=8.0))
    weights = perturbed_start(lm)
    shape = {"rank": 4, "alpha": 8.0, "targets": list(TARGETS), "last_layers": None}
    save_adapter(tmp_path / "mine", weights, shape, tiny)
    stock = PeftModel.from_pretrained(load_base(tiny, "bfloat16"), tmp_path / "mine", is_trainable=True)
    theirs = {weight_name(n.replace(".default", "")): p for n, p in stock.named_parameters() if p.requires_grad}
    assert {p.dtype for p in theirs.values()} == {torch.float32}
    tokens = torch.randint(2, 90, (3, 12), generator=torch.Generator().manual_seed(0))
    fast = {name: weight[None].clone().requires_grad_() for name, weight in weights.items()}
    batch = TaskBatch(tokens, tokens.roll(-1, 1), 1)
    logits = lm.target_logits(fast, batch)[0]
    expected = stock(input_ids=tokens).logits.flatten(0, 1)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, expected)

    def loss(logits):
        return torch.nn.functional.cross_entropy(logits.float(), batch.targets.flatten())

    loss(logits).backward()
    loss(expected).backward()
    for name, weight in fast.items():
        torch.testing.assert_close(weight.grad[0], theirs[name].grad, rtol=0.02, atol=1e-4)

    generation = Generation(tokenizer, tokens[0].tolist(), weights, Sampling(2), frozenset())
    seen, take = [], generation.take
    generation.take = lambda logits: (seen.append(logits), take(logits))
    Decoder(lm, most_rows=1, cache_tokens=100).join([generation])
    torch.testing.assert_close(seen[0], expected[11].float(), rtol=0, atol=2**-8)


def test_an_exported_model_loads_in_stock_transformers_with_equal_logits(tiny, tokenizer, tmp_path):
    """The head is tied to the embeddings: both have to be what was learned."""
    lm = TaskLM(load_base(tiny, "float32"), None)
    generator = torch.Generator().manual_seed(0)
    learned = {n: p + 0.05 * torch.randn(p.shape, generator=generator) for n, p in lm.module.named_parameters()}
    tokens = torch.randint(2, 90, (3, 12), generator=generator)
    batch = TaskBatch(tokens, tokens.roll(-1, 1), 1)
    with torch.no_grad():
        ours, _ = lm.target_logits({name: weight[None] for name, weight in learned.items()}, batch)
        save_model(tmp_path / "mine", lm.module, learned, tokenizer)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "mine")(input_ids=tokens).logits
    torch.testing.assert_close(ours, theirs.flatten(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("left", [0, 300])
def test_an_adapter_that_is_not_whole_is_refused(tiny, tmp_path, left):
    lm = tiny_lm(tiny)
    lora = {"targets": list(TARGETS), "rank": 4, "alpha": 8.0, "last_layers": None}
    save_adapter(tmp_path, perturbed_start(lm), lora, tiny)
    write_card(tmp_path, AdapterCard("t", "tiny", "float32", "{input}", 64, lora=lora))
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    with pytest.raises(RunError, match="no adapter that `rayml adapt` wrote"):
        load_learned(tmp_path)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(RunError, match="no adapter"):
        load_learned(tmp_path)


def test_hooks_without_adapters_are_the_bare_base(tiny):
    lm = tiny_lm(tiny)
    tokens = torch.arange(2, 12)[None]
    assert torch.equal(lm.module(input_ids=tokens).logits, load_base(tiny, "float32")(input_ids=tokens).logits)
