"""Model families against plain forwards, and what is refused: the table in configs/models.md.

`RAYML_WRITE=1 pytest tests/test_families.py` writes the table anew. `-m cluster` shards each family over two workers.
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import make_config, on_workers
from families import CAUSAL, MASKED, make_model
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from rayml.errors import ConfigError
from rayml.lm import zero
from rayml.lm.abilities import NOT_SHARDED, check_model, why_unusable
from rayml.lm.batch import TokenRow, collate
from rayml.lm.decode import Decoder
from rayml.lm.encode import Encoder
from rayml.lm.label_trie import label_trie
from rayml.lm.load import load_base, load_shape, load_tokenizer
from rayml.lm.lora import linear_kinds, stack_adapters
from rayml.lm.model import TaskLM, hooks
from rayml.lm.option_scoring import PromptEnsemble, weighted_prompts
from rayml.lm.peft_files import save_adapter
from rayml.lm.precision import has_sdpa
from rayml.lm.rows import soft_tokens
from rayml.lm.trials import GreedyRow, random_adapter
from rayml.tasks.task import Example

TABLE = Path(__file__).parents[1] / "configs" / "models.md"
COLUMNS = "attention", "batch", "packing", "options", "texts", "PEFT", "full"
EXAMPLES = [
    Example("the river flows by the old town", "a b"),
    Example("short", "a c"),
    Example("few shot learning of labels", "d"),
    Example("one", "d"),
    Example("two", "a b"),
]
LABELS = ["a b", "a c", "d"]
SAME = "same"


@pytest.fixture(scope="module")
def found():
    lines: dict[str, list[str]] = {}
    yield lines
    if os.environ.get("RAYML_WRITE") and len(lines) == len(CAUSAL) + len(MASKED):
        begin, _, _ = TABLE.read_text().partition("\n| family |")
        rows = [["family", *COLUMNS, "refused"], ["---"] * (len(COLUMNS) + 2), *lines.values()]
        TABLE.write_text(begin + "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows))


@pytest.mark.parametrize("family", [*CAUSAL, *MASKED])
def test_a_family_is_as_the_table_says(family, tmp_path, found):
    base = str(make_model(tmp_path, family))
    attention = "sdpa" if has_sdpa(base) else "eager"
    targets, refused = what_fits(base, writes=family in CAUSAL)
    module = load_base(base, "float32", attention)
    lora = {"targets": targets, "rank": 2, "alpha": 4.0, "last_layers": None}
    lm = TaskLM(module, hooks(module, lora if targets else {}, 0 if targets else 2))
    same = {"attention": attention, "full": SAME if trains_whole(module) else "differs"}
    with torch.no_grad():
        torch.manual_seed(0)
        adapters = [random_adapter(lm) for _ in range(2)]
        same |= compared(lm, adapters, base, lora if targets else {})
        if any(one.startswith("texts") for one in refused):
            same["texts"] = "refused"
        elif family in CAUSAL:
            same["texts"] = SAME if writes_as_whole(lm, adapters) else "differs"
    line = [family, *(same.get(column, "") for column in COLUMNS), "; ".join(refused)]
    found[family] = line
    assert "differs" not in line
    if not os.environ.get("RAYML_WRITE"):
        assert f"| {' | '.join(line)} |" in TABLE.read_text().splitlines()


def what_fits(base, writes):
    """All kinds of linears but for those that are refused; and what is refused, with the reason."""
    kinds, refused = linear_kinds(load_shape(base)), []
    if not kinds:
        refused.append("LoRA (no linear layers); soft prompts were compared")
    while reason := why_unusable(base, {"targets": kinds, "rank": 2, "alpha": 4.0}, 0, writes):
        if "cannot write texts" in reason:
            return kinds, [*refused, f"texts ({said(reason)})"]
        named = re.search(r"(never calls its|wrong tasks.*on|in PEFT.*on) ([^;]*);", reason)
        short = {"never": "never called", "wrong": "mixes tasks", "in PE": "another model in PEFT"}
        refused.append(f"{named[2]} ({short[named[1][:5]]})")
        kinds = [kind for kind in kinds if kind not in named[2].split(", ")]
    return kinds, refused


def said(reason):
    return "own cache" if "cache" in reason else "no cache" if "Expected" in reason else "state of its own"


def compared(lm, adapters, base, lora):
    """A batch, packed rows, scored options and PEFT, against each row alone in a plain forward."""
    tokenizer = load_tokenizer(base)
    prompt = "{{ input }} is {{ mask }}." if lm.pad is not None else "{{ input }}:"
    soft = 0 if lora else lm.adapter.tokens
    encoder = Encoder(tokenizer, prompt, 64, soft_tokens=soft)
    labels = dict(zip(LABELS, LABELS if lm.pad is None else ["a", "b", "d"], strict=True))
    examples, labels = [Example(one.input, labels[one.target]) for one in EXAMPLES], list(labels.values())
    tasks = [examples, examples[:2]]
    rows = [encoder.rows(task, is_label=True) for task in tasks]
    known = encoder.competing_tokens(labels, examples[0])
    plain = [[plain_scores(lm, adapters[t], encoder, one, labels, known) for one in of] for t, of in enumerate(tasks)]
    chosen = [
        [s[labels.index(e.target)] for s, e in zip(*both, strict=True)] for both in zip(plain, tasks, strict=True)
    ]
    wanted = -torch.stack([torch.stack(of).mean() for of in chosen])
    both = stack_adapters(adapters)
    batch, packed = (collate(rows, encoder.pad, [known] * 2, packs) for packs in (False, True))
    assert packed.position_ids is not None
    found = {"batch": verdict(lm.losses(both, batch), wanted)}
    found["packing"] = verdict(lm.losses(both, packed), wanted) if lm.packs else "row by row"
    scored = PromptEnsemble(lm, encoder.pad, [weighted_prompts(lm, encoder, of, labels) for of in tasks]).log_probs(
        both
    )
    alike = [verdict(of, torch.stack(one).log_softmax(-1)) for of, one in zip(scored, plain, strict=True)]
    together = lm.forks or lm.pad is not None
    found["options"] = "differs" if "differs" in alike else SAME if together else "row by row"
    folder = Path(base) / "adapter"
    save_adapter(folder, adapters[0], lora, base, "CAUSAL_LM" if lm.pad is None else None)
    found["PEFT"] = verdict(logits(lm, adapters[0], soft), in_peft(base, lm, folder))
    return found


def logits(lm, adapter, soft=0):
    lm.adapter.begin(stack_adapters([adapter]))
    found = lm.module(input_ids=torch.tensor([[*soft_tokens(soft), *range(20, 40)]])).logits[0, soft:]
    lm.adapter.begin(None)
    return found


def in_peft(base, lm, folder):
    kind = AutoModelForCausalLM if lm.pad is None else AutoModelForMaskedLM
    stock = PeftModel.from_pretrained(kind.from_pretrained(base), folder).eval()
    return stock(input_ids=torch.arange(20, 40)[None]).logits[0, -20:]


def plain_scores(lm, adapter, encoder, example, labels, known):
    """The log-probability of each label among the labels, token by token, from a forward of it alone."""
    trie, scores = label_trie(known), []
    for row in encoder.option_rows([example], labels)[0]:
        lm.adapter.begin(stack_adapters([adapter]))
        read = [*row.tokens[: row.start], *row.suffix] if lm.pad is not None else row.tokens
        logits = lm.module(input_ids=torch.tensor([read])).logits[0].float()
        target = row.tokens[row.start :]
        allowed = trie.allowed(target)
        picked = [logits[row.start - 1 + k][c].log_softmax(-1)[c.index(target[k])] for k, c in enumerate(allowed)]
        scores.append(torch.stack(picked).sum())
    lm.adapter.begin(None)
    return torch.stack(scores)


def writes_as_whole(lm, adapters):
    """Two rows, of which one joins later, far past windows of eight tokens, against forwards of the whole text."""
    soft = soft_tokens(0 if lm.adapter.linears else lm.adapter.tokens)
    prompts = [[*soft, *range(20, 20 + length)] for length in (23, 5)]
    rows = [GreedyRow(torch.tensor([prompt]), adapter) for prompt, adapter in zip(prompts, adapters, strict=True)]
    decoder = Decoder(lm, most_rows=2, cache_tokens=0)
    if decoder.reads_in_parts:
        reader = decoder.reader(rows[0])
        assert [decoder.prefill(reader, 9) for _ in range(-(-len(prompts[0]) // 9))][-1]
    else:
        decoder.join(rows[:1])
    decoder.step()
    decoder.join(rows[1:])
    for _ in range(10):
        decoder.step()
    decoder.leave(rows[0])
    decoder.step()
    for row in rows:
        lm.adapter.begin(stack_adapters([row.adapter]))
        logits = lm.module(input_ids=torch.tensor([row.tokens]), use_cache=False).logits[0, row.prompt_tokens - 1 : -1]
        if verdict(torch.stack(row.logits), logits) == "differs":
            return False
    lm.adapter.begin(None)
    return True


def trains_whole(module):
    """Mode full's weights, put in for one call, against the same in the model itself."""
    lm, tokens = TaskLM(module, None), torch.arange(20, 32)[None]
    torch.manual_seed(0)
    own = {name: p.detach() + 0.02 * torch.randn_like(p) for name, p in module.named_parameters()}
    places = torch.arange(12)
    with torch.no_grad():
        found = lm.logits_at(places, {name: w[None] for name, w in own.items()}, tokens)
        before = {name: p.data for name, p in module.named_parameters()}
        for name, parameter in module.named_parameters():
            parameter.data = own[name]
        wanted = module(input_ids=tokens).logits[0]
        for name, parameter in module.named_parameters():
            parameter.data = before[name]
    return verdict(found, wanted) == SAME


def verdict(found, wanted):
    return SAME if torch.allclose(found.float(), wanted.float(), atol=2e-4, rtol=1e-3) else "differs"


# Sharded


def loss_and_gradients(module, targets):
    """The losses of two tasks, `[2]`, and what each of their adapters gets, from random rows."""
    lora = {"targets": targets, "rank": 2, "alpha": 4.0, "last_layers": None}
    lm = TaskLM(module, hooks(module, lora, 0))
    torch.manual_seed(0)
    adapters = stack_adapters([random_adapter(lm) for _ in range(2)])
    adapters = {name: weight.requires_grad_() for name, weight in adapters.items()}
    rows = [[TokenRow(torch.randint(5, 250, (length,)).tolist(), length - 3) for length in (9, 14)] for _ in range(2)]
    losses = lm.losses(adapters, collate(rows, pad=1))
    return [losses.detach(), *torch.autograd.grad(losses.sum(), list(adapters.values()))]


def sharded_worker(rank, bases, out):
    verdicts = {}
    for family, (base, targets) in bases.items():
        attention = "sdpa" if has_sdpa(base) else "eager"
        wanted = loss_and_gradients(load_base(base, "float32", attention), targets)
        try:
            found = loss_and_gradients(zero.load(base, "float32", attention, torch.device("cpu"), 0), targets)
            same = all(verdict(*pair) == SAME for pair in zip(found, wanted, strict=True))
            verdicts[family] = SAME if same else "differs"
        except Exception as error:  # the same on both workers
            verdicts[family] = f"{type(error).__name__}: {error}"[:200]
    if rank == 0:
        out.write_text(json.dumps(verdicts))


@pytest.mark.parametrize("family", sorted(NOT_SHARDED))
def test_a_family_that_is_not_the_same_over_two_workers_is_refused(family, tmp_path):
    base = str(make_model(tmp_path, family))
    config = make_config(tmp_path, model={"name": base}, engine="zero", zero={"stage": 3}, workers=2)
    with pytest.raises(ConfigError, match=f"engine: {family} .* use engine=local"):
        check_model(config, base)


@pytest.mark.cluster
def test_families_are_the_same_over_two_workers(tmp_path):
    pytest.importorskip("deepspeed")
    bases = {family: str(make_model(tmp_path / family, family)) for family in [*CAUSAL, *MASKED]}
    fitting = {family: (base, what_fits(base, writes=False)[0]) for family, base in bases.items()}
    on_workers(sharded_worker, 2, {f: pair for f, pair in fitting.items() if pair[1]}, tmp_path / "verdicts.json")
    verdicts = json.loads((tmp_path / "verdicts.json").read_text())
    others = {family: found for family, found in verdicts.items() if found != SAME}
    assert others.keys() == NOT_SHARDED, others
