"""An inner loop never waits for its device: nothing in it asks for a number, or for how many of something there are;
and no device waits for a step to be laid out.

Tensors on the meta device have no numbers: what asks for one fails, and so does what was left on the host. And what is
asked of tensors that have some is counted.
"""

import random
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers.masking_utils
from conftest import TARGETS, make_config, perturbed_start, tiny_lm
from test_packing import ragged_rows
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, LlamaForCausalLM

from rayml.algorithms.inner_loop import InnerLoop, adapt
from rayml.algorithms.registry import REGISTERED
from rayml.lm.batch import TokenRow, collate
from rayml.lm.lora import TaskLoRA
from rayml.lm.model import TaskLM
from rayml.lm.sides import TaskSide
from rayml.training.stream import prefetch

META = torch.device("meta")
TASKS, STEPS = 3, 2
RAYML = str(Path(sys.modules["rayml"].__file__).parent)
WAITS = "_local_scalar_dense", "nonzero", "_unique2", "masked_select", "bincount"


class Waits(TorchDispatchMode):
    """Notes which lines of rayml ask what a GPU can only answer when it has done all that was queued."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        lists = [some for some in args if isinstance(some, list)] if "index" in function._schema.name else []
        by_mask = any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for some in lists for one in some)
        if by_mask or any(name in function._schema.name for name in WAITS):
            frame = sys._getframe(1)
            while frame.f_back and "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            if frame.f_code.co_filename.startswith(RAYML):  # transformers asks once a forward whether rows are packed
                self.lines.append(f"{function} at {frame.f_code.co_filename}:{frame.f_lineno}")
        return function(*args, **(kwargs or {}))


def rows_and_labels(kind):
    rows = ragged_rows(TASKS, random.Random(0))
    labels = [[row.tokens[row.start :] for row in task] for task in rows]
    return rows, {"texts": [], "labels": labels, "both": [labels[0], *([] for _ in labels[1:])]}[kind]


@pytest.fixture
def on_meta(tiny, monkeypatch):
    monkeypatch.setattr(transformers.masking_utils, "is_tracing", lambda *_: True)  # it would ask, as said above
    with META:
        module = LlamaForCausalLM._from_config(AutoConfig.from_pretrained(tiny), attn_implementation="sdpa")
    lora = TaskLoRA(module.requires_grad_(False).eval(), TARGETS, 4, alpha=8.0, last_layers=2)
    lm = TaskLM(module, lora)
    lm.plain_head = True  # tried once, of numbers
    return lm


@pytest.mark.parametrize("kind", ["texts", "labels", "both"])
@pytest.mark.parametrize("packs", [False, True])
def test_an_inner_loop_runs_where_there_are_no_numbers_and_nothing_of_it_lies_on_the_host(on_meta, kind, packs):
    rows, labels = rows_and_labels(kind)
    batch = collate(rows, 1, labels, packs).to(META)
    start = {name: weight.to(META) for name, weight in perturbed_start(on_meta).items()}
    inner_lrs = {name: torch.tensor(0.1, device=META) for name in start}
    *_, adapted = adapt(partial(on_meta.losses, batch=batch), start, inner_lrs, STEPS, TASKS)
    assert {weight.device for weight in adapted.fast.values()} == {META}
    assert batch.frozen[0].device == META, "the lower layers ran once, and there"


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize(
    "settings",
    [*({"name": name} for name in REGISTERED if name != "metaicl"), {"name": "proto_maml", "pooling": "mean"}],
    ids=lambda settings: "-".join(settings.values()),
)
def test_a_meta_gradient_waits_for_nothing(tiny, tmp_path, settings, narrow):
    attention = "eager" if settings["name"] == "maml" else "sdpa"
    algorithm = make_config(tmp_path, algorithm=settings, model={"attention": attention}).algorithm
    lm = tiny_lm(tiny, attention=attention)
    if not narrow:
        vars(lm)["narrow_head"] = None
    start = perturbed_start(lm) | (algorithm.prototypes.start() if algorithm.prototypes else {})
    inner = InnerLoop({n: torch.tensor(0.1) for n in start if not n.startswith("readout")}, STEPS, False)
    prompts = [[row.tokens[: row.start] for row in task] for task in ragged_rows(TASKS, random.Random(0))]
    rows = [[TokenRow([*prompt, 6 + k % 2], len(prompt)) for k, prompt in enumerate(task)] for task in prompts]
    classes = [[k % 2 for k in range(len(task))] for task in rows]
    support, query = (TaskSide(lm, rows, [[[6], [7]]] * TASKS, classes, 1) for _ in range(2))
    weights = torch.ones(TASKS)
    lm.probe()  # once, of numbers
    for side in (support, query):
        side.prepare()
    with Waits() as waits:
        algorithm.meta_gradient(support, query, start, inner, weights)
    assert waits.lines == []


def test_a_step_is_laid_out_while_the_one_before_it_is_taken():
    laid, begun, raised = [threading.Event() for _ in range(3)], [], ValueError("step 3")

    def steps():
        yield from ([{"index": step}] for step in range(3))
        raise raised

    def prepare(episodes):
        begun.append(step := episodes[0]["index"])
        laid[step].set()
        return step * 10

    found = prefetch(steps(), prepare, torch.device("cpu"))
    assert next(found) == ([{"index": 0}], 0)
    assert laid[1].wait(30), "nobody asked for it yet"
    assert begun == [0, 1], "one step ahead, and no more"
    assert [sides for _, sides in (next(found), next(found))] == [10, 20]
    with pytest.raises(ValueError, match="step 3"):
        next(found)


def test_what_is_not_asked_for_is_let_go():
    ended = []

    def steps():
        try:
            yield from ([] for _ in range(100))
        finally:
            ended.append(True)

    for _ in prefetch(steps(), len, torch.device("cpu")):
        break
    assert ended
