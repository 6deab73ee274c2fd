"""Soft prompts: T of them side by side against embeddings laid by hand, PEFT's prompt tuning, training, serving."""

import asyncio
import json
from dataclasses import replace

import pytest
import torch
from conftest import make_config, training_here
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from rayml.adapter import load_adapter
from rayml.algorithms.inner_loop import task_gradients
from rayml.errors import ConfigError, RunError
from rayml.lm.batch import IGNORE, collate
from rayml.lm.catalog import resolve_model
from rayml.lm.encode import Encoder
from rayml.lm.load import load_base, load_shape
from rayml.lm.lora import stack_adapters
from rayml.lm.model import TaskLM
from rayml.lm.option_scoring import PromptEnsemble, weighted_prompts
from rayml.lm.peft_files import PROMPT_KEY, WEIGHTS, AdapterCard, save_adapter, write_card
from rayml.lm.soft_prompt import PROMPT, TaskPrompt
from rayml.model import load
from rayml.runs.folder import RunFolder
from rayml.serving.adapter_files import read_adapter
from rayml.serving.replica import Replica
from rayml.serving.schema import AdapterRequest, ClassifyRequest
from rayml.serving.served import adapter_constraints
from rayml.serving.settings import Serving
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.task import Example
from rayml.training.driver import train

P = 3
TASKS = [[("hello", "A"), ("a longer one", "B"), ("x", "A")], [("other words", "B"), ("y", "C"), ("zz", "C")]]


@pytest.fixture
def encoder(tokenizer) -> Encoder:
    return Encoder(tokenizer, "{input}:", 48, soft_tokens=P)


def lm_of(path: str) -> TaskLM:
    module = load_base(path, "float32")
    return TaskLM(module, TaskPrompt(module, P))


def prompts(lm: TaskLM) -> torch.Tensor:
    """`[2, P, d]`"""
    starts = [lm.adapter.untrained_start(seed)[PROMPT] for seed in (1, 2)]
    return torch.stack(starts)


def by_hand(model, tokenizer, prompt: torch.Tensor, text: str, label: str) -> torch.Tensor:
    """The loss of a label behind a prompt's embeddings, among the whole vocabulary, by stock transformers."""
    tokens = torch.tensor(tokenizer(f"{text}: {label}")["input_ids"])
    words = model.get_input_embeddings()(tokens)
    logits = model(inputs_embeds=torch.cat([prompt, words]).unsqueeze(0)).logits[0]
    return torch.nn.functional.cross_entropy(logits[-2].unsqueeze(0), tokens[-1:])


@pytest.mark.parametrize("packs", [False, True])
def test_prompts_of_several_tasks_equal_embeddings_laid_by_hand(packs, tiny, tokenizer, encoder):
    lm, model = lm_of(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    rows = [encoder.rows([Example(*pair) for pair in task], is_label=True) for task in TASKS]
    rows[1] += encoder.rows([Example("as long as it takes to pack the others", "B")], is_label=True)
    tasks = [*TASKS[:1], [*TASKS[1], ("as long as it takes to pack the others", "B")]]
    batch = collate(rows, tokenizer.eos_token_id, packs=packs)
    assert (batch.position_ids is not None) == packs
    weights = prompts(lm)
    losses, gradients = task_gradients(lambda fast: lm.losses(fast, batch), {PROMPT: weights})
    for t, task in enumerate(tasks):
        prompt = weights[t].clone().requires_grad_()
        loss = torch.stack([by_hand(model, tokenizer, prompt, *pair) for pair in task]).mean()
        (gradient,) = torch.autograd.grad(loss, prompt)
        assert losses[t].item() == pytest.approx(loss.item(), abs=1e-5)
        assert torch.allclose(gradients[PROMPT][t], gradient, atol=1e-5)
        assert gradient.abs().sum() > 0


def test_options_are_scored_behind_the_prompt_also_where_they_fork(tiny, tokenizer, encoder):
    lm, model = lm_of(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    plain = replace(encoder, label_loss="vocabulary", scoring="sum")
    options, text = ["red", "a blue one"], "sky"
    (found,) = PromptEnsemble(lm, plain.pad, [weighted_prompts(lm, plain, [Example(text, "")], options)]).log_probs(
        {PROMPT: prompts(lm)[:1]}
    )
    scores = []
    for option in options:
        tokens = torch.tensor(tokenizer(f"{text}: {option}")["input_ids"])
        first = len(tokenizer(f"{text}:")["input_ids"])
        words = model.get_input_embeddings()(tokens)
        with torch.no_grad():
            logits = model(inputs_embeds=torch.cat([prompts(lm)[0], words]).unsqueeze(0)).logits[0, P:].log_softmax(-1)
        scores.append(sum(logits[index - 1, tokens[index]] for index in range(first, len(tokens))))
    assert torch.allclose(found[0], torch.stack(scores).log_softmax(-1), atol=1e-5)


def test_soft_tokens_come_first_and_do_not_count(encoder, tokenizer):
    row = encoder.row(Example("long " * 40, "A"), is_label=True)
    assert len(row.tokens) == 48 + P
    assert row.tokens[:P] == sorted(row.tokens)[-P:]
    assert encoder.prompt_tokens(Example("hi", ""))[P:] == tokenizer("hi:")["input_ids"]
    batch = collate([[row]], tokenizer.eos_token_id)
    assert int((batch.targets != IGNORE).sum()) == 1


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    changes = {
        "adapter": "soft_prompt",
        "soft_prompt": {"tokens": 4},
        "inner": {"steps": 3, "lr": 1.0},
        "outer": {"steps": 6, "warmup_steps": 0, "lr": 0.01},
    }
    return make_config(tmp_path_factory.mktemp("soft"), **changes)


@pytest.fixture(scope="module")
def run(config, local_ray) -> RunFolder:
    with training_here():
        return train(config)


@pytest.mark.ray
def test_prompts_are_meta_trained_and_adapting_fits_an_unseen_task(run, config):
    """That a tiny random model answers better for it is not to be had; configs/README.md has what a real one gains."""
    model = load(run)
    assert model.start.keys() == {PROMPT}
    assert not torch.allclose(model.start[PROMPT], model.untrained[PROMPT], atol=1e-3)
    losses = model.adapt([(e.input, e.target) for e in prepare_splits(config.data).test[0].examples]).losses
    assert losses[-1] < losses[0] - 0.005


@pytest.fixture(scope="module")
def learned(run, tmp_path_factory):

    folder = tmp_path_factory.mktemp("learned")
    examples = folder / "few.jsonl"
    pairs = [("ab ab xy", "first"), ("ab zz ab", "first"), ("cd cd xy", "second"), ("cd qq cd", "second")]
    examples.write_text("".join(json.dumps({"input": text, "target": label}) + "\n" for text, label in pairs))
    load(run).adapt(examples).save(folder / "adapter")
    return folder / "adapter"


@pytest.mark.ray
def test_the_adapter_is_stock_prompt_tuning_with_equal_logits(learned, run):
    predictor = load_adapter(learned)
    assert set(predictor.predict("ab ab no").probabilities) == {"first", "second"}
    text = "ab ab no\nLabel:"
    tokens = torch.tensor([predictor.encoder.tokenizer(text)["input_ids"]])
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(load(run).base), learned).eval()
    row = predictor.encoder.prompt_tokens(Example("ab ab no", ""))
    with torch.no_grad():
        wanted = stock(input_ids=tokens).logits[0, -1]
        prompt = stack_adapters([predictor.weights])
        found = predictor.lm.logits_at(torch.tensor([len(row) - 1]), prompt, torch.tensor([row]))[0]
    assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.ray
def test_a_server_learns_and_answers_with_prompts_side_by_side(run, tmp_path):
    replica = Replica(Serving(run=str(run.path), store=str(tmp_path / "store")))
    try:
        request = AdapterRequest.model_validate(
            {"examples": [{"input": f"{w} {w} x", "target": w} for w in ("ab", "cd")], "name": "one"}
        )
        other = AdapterRequest.model_validate(
            {"examples": [{"input": f"{w} {w} x", "target": w} for w in ("ef", "gh", "ij")], "name": "two"}
        )

        async def ask():
            ids = ["one.0123456789abcdef", "two.0123456789abcdef"]
            await asyncio.gather(*(replica.learn("me", i, r) for i, r in zip(ids, (request, other), strict=True)))
            asked = ClassifyRequest(model="m", input=["ab ab y", "gh gh y"], options=None)
            together = await asyncio.gather(*(replica.classify("me", i, asked) for i in ids))
            return together, [await replica.classify("me", i, asked) for i in ids]

        together, alone = asyncio.run(ask())
        assert [set(found["answers"][0]["probabilities"]) for found in together] == [{"ab", "cd"}, {"ef", "gh", "ij"}]
        for a, b in zip(together, alone, strict=True):
            for x, y in zip(a["answers"], b["answers"], strict=True):
                assert x["probabilities"] == pytest.approx(y["probabilities"], abs=1e-4)
    finally:
        replica.engine.close()


@pytest.mark.ray
def test_files_that_do_not_fit_are_refused(learned, run, tmp_path):
    model = load(run)
    fits = adapter_constraints(model.config, model.base, model.lm.module, Serving(run="x").adapters)
    weights, card = read_adapter(learned, fits)
    assert weights[PROMPT].shape == (4, 64)
    assert card.soft_tokens == 4
    config = learned / "adapter_config.json"
    kept, weights = config.read_text(), (learned / WEIGHTS).read_bytes()
    for change, message in (
        ({"peft_type": "LORA"}, "only PROMPT_TUNING is served"),
        ({"num_virtual_tokens": 10**9}, "num_virtual_tokens"),
        ({"num_virtual_tokens": 5}, "has the shape"),
    ):
        config.write_text(json.dumps(json.loads(kept) | change))
        with pytest.raises(RunError, match=message):
            read_adapter(learned, fits)
    config.write_text(kept)
    save_file({PROMPT_KEY: torch.full((4, 64), float("nan"))}, learned / WEIGHTS)
    with pytest.raises(RunError, match="not finite"):
        read_adapter(learned, fits)
    (learned / WEIGHTS).write_bytes(weights)


def test_the_server_puts_plain_peft_s_prompts_before_a_text_too(tmp_path):
    base, folder = resolve_model("tiny"), tmp_path / "plain"
    config = make_config(tmp_path, adapter="soft_prompt", soft_prompt={"tokens": 4})
    fits = adapter_constraints(config, base, load_shape(base), Serving(run="x").adapters)
    save_adapter(folder, {PROMPT: torch.zeros(5, 64)}, {}, "tiny")
    assert read_adapter(folder, fits)[1].soft_tokens == 5
    write_card(folder, AdapterCard("t", "tiny", "float32", "{input}", 9, soft_tokens=6))
    with pytest.raises(RunError, match="soft_tokens=6, and the weights have 5"):
        read_adapter(folder, fits)


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises((ConfigError, ValueError), match="lora_dropout"):
        make_config(tmp_path, adapter="soft_prompt", regularize={"lora_dropout": 0.1})
    with pytest.raises((ConfigError, ValueError), match="mode=full has none"):
        make_config(tmp_path, adapter="soft_prompt", mode="full")
