"""Masked models: label words at a mask, against stock models asked row by row; training, adapting, PEFT, serving."""

import asyncio
import json
import pickle
from dataclasses import replace

import pytest
import torch
from conftest import make_config, training_here
from peft import PeftModel
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    DistilBertConfig,
    ModernBertConfig,
    RobertaConfig,
)

from rayml.adapter import load_adapter
from rayml.algorithms.inner_loop import task_gradients
from rayml.errors import DataError
from rayml.lm.batch import collate
from rayml.lm.catalog import resolve_model
from rayml.lm.check_tasks import check_tasks
from rayml.lm.encode import Encoder
from rayml.lm.load import load_base, load_tokenizer
from rayml.lm.lora import B, TaskLoRA
from rayml.lm.model import TaskLM
from rayml.lm.option_scoring import PromptEnsemble, weighted_prompts
from rayml.lm.sampling import Sampling
from rayml.lm.scorer import trained_curves
from rayml.model import load
from rayml.serving.errors import ApiError
from rayml.serving.replica import Replica
from rayml.serving.schema import AdapterRequest, ClassifyRequest
from rayml.serving.settings import Serving
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.task import Example, Task
from rayml.training.driver import train

TARGETS = ("query", "value")
TASKS = [[("hello", "A"), ("a rather longer one", "B"), ("x", "A")], [("other words", "B"), ("y", "C")]]


@pytest.fixture(scope="module")
def path() -> str:
    return resolve_model("tiny-masked")


@pytest.fixture(scope="module")
def words(path):
    return load_tokenizer(path)


def lm_of(path: str) -> TaskLM:
    module = load_base(path, "float32")
    return TaskLM(module, TaskLoRA(module, TARGETS, 4, 8.0))


def weights_of(lm: TaskLM, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start = lm.adapter.untrained_start(seed)
    return {n: w + 0.1 * torch.randn(w.shape, generator=generator) * n.endswith(B) for n, w in start.items()}


def test_rows_end_with_what_stands_behind_the_mask(words):
    encoder = Encoder(words, "{{ input }}: {{ mask }}!", 40)
    row = encoder.row(Example("hi", "A"), is_label=True)
    assert words.decode(row.tokens[: row.start]) == "[CLS]hi: [MASK]"
    assert words.decode(list(row.suffix)) == "![SEP]"
    assert row.tokens[row.start :] == words(" A", add_special_tokens=False)["input_ids"]
    plain = replace(encoder, prompt="{input}\nLabel:").row(Example("hi", "A"), is_label=True)
    assert words.decode(plain.tokens[: plain.start]) == "[CLS]hi\nLabel: [MASK]"
    long = encoder.row(Example("long " * 40, "A"), is_label=True)
    assert len(long.tokens) - 1 + len(long.suffix) == 40
    assert long.tokens[0] == words.cls_token_id
    shown = encoder.row(Example("hi", "A"), is_label=True, shown=[Example("yo", "B")])
    assert words.decode(shown.tokens[: shown.start]) == "[CLS]yo: B!\n\nhi: [MASK]"


def test_losses_and_gradients_are_those_of_rows_alone_without_padding(path, words):
    lm, encoder = lm_of(path), Encoder(words, "{input}: {{ mask }} .", 48, "vocabulary")
    rows = [encoder.rows([Example(*pair) for pair in task], is_label=True) for task in TASKS]
    assert not lm.packs
    own = [weights_of(lm, seed) for seed in (1, 2)]
    fast = {name: torch.stack([w[name] for w in own]) for name in own[0]}
    losses, gradients = task_gradients(lambda f: lm.losses(f, collate(rows, encoder.pad)), fast)
    for t, task in enumerate(rows):
        leaves = {name: weight[t].clone().requires_grad_() for name, weight in fast.items()}
        lm.adapter.adapters = {name: leaf.unsqueeze(0) for name, leaf in leaves.items()}
        found = []
        for row in task:
            read = torch.tensor([[*row.tokens[: row.start], *row.suffix]])
            logits = lm.module(input_ids=read).logits[0, row.start - 1]
            found.append(torch.nn.functional.cross_entropy(logits, torch.tensor(row.tokens[row.start])))
        loss = torch.stack(found).mean()
        wanted = torch.autograd.grad(loss, list(leaves.values()))
        assert losses[t].item() == pytest.approx(loss.item(), abs=1e-5)
        for name, gradient in zip(leaves, wanted, strict=True):
            torch.testing.assert_close(gradients[name][t], gradient, rtol=1e-3, atol=1e-6)


KINDS = {
    "bert": BertConfig(
        vocab_size=130, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    ),
    "roberta": RobertaConfig(
        vocab_size=130, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    ),
    "distilbert": DistilBertConfig(vocab_size=130, dim=32, hidden_dim=48, n_layers=2, n_heads=2),
    "modernbert": ModernBertConfig(
        vocab_size=130, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_encoders_are_asked_at_the_mask_of_several_lengths(kind, words, tmp_path):
    torch.manual_seed(0)
    stock = AutoModelForMaskedLM.from_config(KINDS[kind]).eval()
    stock.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    encoder = Encoder(load_tokenizer(str(tmp_path)), "{input}:", 48)
    assert encoder.is_masked
    lm = TaskLM(load_base(str(tmp_path), "float32"), None)
    texts, options = ["hello", "a rather longer one than that"], ["A", "B", "C"]
    ways = weighted_prompts(lm, encoder, [Example(text, "") for text in texts], options)
    (found,) = PromptEnsemble(lm, encoder.pad, [ways]).log_probs(None)
    ids = [words(f" {option}", add_special_tokens=False)["input_ids"][0] for option in options]
    for text, scores in zip(texts, found, strict=True):
        tokens = words(f"{text}: [MASK]", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = stock(input_ids=tokens).logits[0, (tokens[0] == words.mask_token_id).nonzero()[0, 0]]
        torch.testing.assert_close(scores, logits[ids].log_softmax(-1), rtol=1e-4, atol=1e-5)


def test_what_a_mask_cannot_say_is_refused_by_name(words):
    encoder = pickle.loads(pickle.dumps(Encoder(words, "{input}:", 48)))
    with pytest.raises(DataError, match=r"label 'two words' has .* data\.labels=letters"):
        check_tasks(encoder, [Task("t", (Example("x", "two words"), Example("y", "A")), ("two words", "A"))])
    with pytest.raises(DataError, match="writes no text"):
        check_tasks(encoder, [Task("t", (Example("x", "free"),), kind="text")])


@pytest.fixture(scope="module")
def run(tmp_path_factory, local_ray):
    config = make_config(
        tmp_path_factory.mktemp("masked"),
        model={"name": "tiny-masked"},
        lora={"rank": 8, "alpha": 16.0, "targets": ["query", "value", "dense"], "start": "principal"},
        inner={"steps": 3, "lr": 0.002},
        outer={"steps": 12, "warmup_steps": 0, "lr": 0.001},
        tasks_per_step=8,
    )
    with training_here():
        return train(config)


@pytest.mark.ray
def test_a_masked_model_learns_to_learn(run):
    model = load(run)
    tasks = prepare_splits(model.config.data).test
    curves = trained_curves(model, tasks, model.config.data.sampler(seed=7), 40)
    before, after = (sum(curve.scores[k] for curve in curves) / len(curves) for k in (0, -1))
    assert after > before + 0.2, (before, after)


@pytest.mark.ray
def test_its_adapter_is_stock_peft_and_predicts(run, path, tmp_path):
    examples = tmp_path / "few.jsonl"
    pairs = [("ab ab xy", "first"), ("ab zz ab", "first"), ("cd cd xy", "second"), ("cd qq cd", "second")]
    examples.write_text("".join(json.dumps({"input": text, "target": label}) + "\n" for text, label in pairs))
    load(run).adapt(examples).save(tmp_path / "adapter")
    predictor = load_adapter(tmp_path / "adapter")
    found = predictor.predict("ab ab no").probabilities
    stock = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(path), tmp_path / "adapter").eval()
    words = predictor.encoder.tokenizer
    tokens = words("ab ab no\nLabel: [MASK]", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = stock(input_ids=tokens).logits[0, -2]
    ids = [words(f" {letter}", add_special_tokens=False)["input_ids"][0] for letter in "AB"]
    assert list(found.values()) == pytest.approx(logits[ids].softmax(-1).tolist(), abs=1e-4)


@pytest.mark.ray
def test_a_server_classifies_and_says_that_it_writes_nothing(run, tmp_path):
    replica = Replica(Serving(run=str(run.path), store=str(tmp_path / "store")))
    try:
        rows = [{"input": f"{w} {w} x", "target": w} for w in ("ab", "cd")]
        request = AdapterRequest.model_validate({"examples": rows, "name": "one"})

        async def ask():
            await replica.learn("me", "one.0123456789abcdef", request)
            asked = ClassifyRequest(model="m", input=["ab ab y", "a longer cd"], options=None)
            found = await replica.classify("me", "one.0123456789abcdef", asked)
            with pytest.raises(ApiError, match="writes no text"):
                [piece async for piece in replica.write("me", None, ["hi"], Sampling(4))]
            return found

        found = asyncio.run(ask())
        assert [set(answer["probabilities"]) for answer in found["answers"]] == [{"ab", "cd"}] * 2
    finally:
        replica.engine.close()
