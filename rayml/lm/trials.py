"""Test a model's behaviour with a few forwards of a small copy.

The copy runs the model's own code with random weights in float32, and is just deep enough to have every kind of its
layers. No model is known by name here.
"""

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayml.algorithms.inner_loop import Params
from rayml.errors import ConfigError
from rayml.lm.decode import Decoder
from rayml.lm.load import auto_model, load_shape, read_config
from rayml.lm.lora import is_in_layer, layer_number, linear_kinds, stack_adapters
from rayml.lm.model import TaskLM, hooks
from rayml.lm.peft_files import peft_logits, save_adapter
from rayml.lm.rows import soft_tokens
from rayml.lm.soft_prompt import TaskPrompt

SMALL_PARAMETERS, MOST_PARAMETERS = 20_000_000, 400_000_000
"""A small copy is as deep as the first allows; no copy is made that would exceed the second."""
VOCABULARY = 512
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Rounding error of logits, relative to their norm. The faults looked for are far larger."""


@lru_cache(maxsize=16)
def find_fault(
    base: str, attention: str, targets: tuple[str, ...], rank: int, alpha: float, soft_tokens: int, writes: bool
) -> str | None:
    """Return why a resolved model with LoRA or a soft prompt breaks an assumption of rayml, or None.

    Args:
        targets: of LoRA; empty without LoRA.
        soft_tokens: length of the soft prompt.
        writes: whether the model has to write texts.
    """
    module = small_copy(base, attention)
    if module is None:
        return None
    present = set(linear_kinds(module))  # a shallow copy may lack the layers that have some of the targets
    lora = lora_shape([target for target in targets if target in present], rank, alpha)
    with seeded():
        lm = TaskLM(module, hooks(module, lora if lora["targets"] else {}, soft_tokens))
        return (
            visibility_fault(lm)
            or (adapter_fault(lm, base, lora) if lm.adapter else None)
            or (writing_fault(lm) if writes else None)
        )


def fitting_targets(base: str, attention: str, targets: Sequence[str], rank: int, alpha: float) -> list[str]:
    """Return the LoRA targets that work in a resolved model, each tried alone; and those that cannot be tried."""
    module = small_copy(base, attention)
    if module is None:
        return list(targets)
    present = set(linear_kinds(module))

    def fits(target: str) -> bool:
        lora = lora_shape([target], rank, alpha)
        return target not in present or adapter_fault(TaskLM(module, hooks(module, lora, 0)), base, lora) is None

    with seeded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about targets that are then left out
        return [target for target in targets if fits(target)]


@contextmanager
def seeded() -> Iterator[None]:
    """Draw the same random numbers every time inside the block, without gradients."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        yield


def lora_shape(targets: list[str], rank: int, alpha: float) -> dict[str, Any]:
    return {"targets": targets, "rank": rank, "alpha": alpha, "last_layers": None}


def visibility_fault(lm: TaskLM) -> str | None:
    """Return why a model is not of the kind it was loaded as, or None.

    Two forwards tell: the logits of a causal model must not depend on later tokens, those of a masked model not on
    padding.
    """
    name, tokens = type(lm.module).__name__, sample_tokens(1, 6, lm)
    positions = torch.arange(5, device=lm.device)
    if lm.pad is None:
        changed = tokens.clone()
        changed[0, -1] = tokens[0, 0] + 1
        problem = (
            "looks at later tokens, as encoders do: it is no causal language model; take one, or a masked one, whose "
            "config.json has architectures: [...ForMaskedLM]"
        )
    else:
        changed = torch.cat([tokens, tokens.new_full((1, 3), lm.pad)], 1)
        problem = "sees padding: the rows of a batch would change each other; take another model"
    logits, expected = (lm.logits_at(positions, None, row) for row in (changed, tokens))
    if not expected.isfinite().all():
        return f"model.name: {nonfinite_weights(lm.module) or f'{name} gives logits that are not finite'}"
    return None if is_close(logits, expected) else f"model.name: {name} {problem}"


def nonfinite_weights(module: Any) -> str | None:
    """Return a message that names weights with NaN or infinity; None if there are none."""
    names = [name for name, weight in module.named_parameters() if not weight.isfinite().all()]
    return f"the weights of {type(module).__name__} hold NaN or infinity, such as {names[0]}" if names else None


def adapter_fault(lm: TaskLM, base: str, lora: dict[str, Any]) -> str | None:
    """Return why adapters do not work in a model, or None.

    The model may never call a target, or mix up tasks; or PEFT may compute something else from the same adapter.
    """
    name, targets = type(lm.module).__name__, lora["targets"]
    if uncalled := uncalled_targets(lm):
        return f"lora.targets: {name} never calls its {', '.join(uncalled)}; leave it out"
    checks = (
        (keeps_tasks_apart, "gives the rows of a batch to wrong tasks"),
        (exports_to_peft, "is another model in PEFT, which could not be exported"),
    )
    for check, problem in checks:
        if check(lm, base, lora):
            continue
        guilty = []
        for target in targets:
            alone = {**lora, "targets": [target]}
            if not check(TaskLM(lm.module, hooks(lm.module, alone, 0)), base, alone):
                guilty.append(target)
        culprits = ", ".join(guilty or targets) or "its prompt"
        return f"lora.targets: {name} {problem}, with an adapter on {culprits}; leave it out"
    return None


def uncalled_targets(lm: TaskLM) -> list[str]:
    """Return the LoRA targets that a forward never calls."""
    called: set[str] = set()
    linears = lm.adapter.linears if lm.adapter else {}
    handles = [
        linear.register_forward_pre_hook(lambda _linear, _inputs, name=name: called.add(name.rsplit(".", 1)[-1]))
        for name, linear in linears.items()
    ]
    lm.logits_at(torch.tensor([0], device=lm.device), None, sample_tokens(4, 16, lm))
    for handle in handles:
        handle.remove()
    return sorted({name.rsplit(".", 1)[-1] for name in linears} - called)


def keeps_tasks_apart(lm: TaskLM, _base: str, _lora: dict[str, Any]) -> bool:
    """Return whether two tasks side by side get the logits that each gets alone."""
    adapters = [random_adapter(lm) for _ in range(2)]
    rows = [add_soft_tokens(sample_tokens(2, 7, lm), lm) for _ in adapters]
    ends = torch.arange(1, 5, device=lm.device) * rows[0].shape[1] - 1
    try:
        together = lm.logits_at(ends, stack_adapters(adapters), torch.cat(rows))
        alone = [lm.logits_at(ends[:2], stack_adapters([a]), row) for a, row in zip(adapters, rows, strict=True)]
    except Exception:  # the model's code may raise anything: a linear may return a tuple, or get reordered rows
        return False
    finally:
        remove_adapters(lm)
    return is_close(together, torch.cat(alone))


def exports_to_peft(lm: TaskLM, base: str, lora: dict[str, Any], like: Params | None = None) -> bool:
    """Return whether PEFT computes the same from a random adapter that rayml writes.

    Args:
        like: an adapter that has the tensors to try; None tries all that the model can have.
    """
    adapter = random_adapter(lm, like) or {}
    with tempfile.TemporaryDirectory() as folder:
        kind = "CAUSAL_LM" if lm.pad is None else None
        save_adapter(Path(folder), adapter, lora if lora.get("targets") else {}, base, kind)
        return matches_peft(lm, adapter, Path(folder))


def matches_peft(lm: TaskLM, adapter: Params, folder: Path) -> bool:
    """Return whether PEFT, with the adapter in a folder, computes the same logits as rayml with these weights."""
    tokens = sample_tokens(2, 12, lm)
    rows = add_soft_tokens(tokens, lm)
    ends = torch.arange(1, len(rows) + 1, device=lm.device) * rows.shape[1] - 1
    with torch.no_grad():
        ours = lm.logits_at(ends, stack_adapters([adapter]), rows)
        remove_adapters(lm)
        try:
            theirs = peft_logits(lm.module, folder, tokens)[:, -1]
        except Exception:  # PEFT may refuse it in any way
            return False
    return is_close(theirs, ours)


def writing_fault(lm: TaskLM) -> str | None:
    """Return why a model cannot generate text, or None: its cached logits differ from those of the whole text."""
    name = type(lm.module).__name__
    if lm.pad is not None:
        return f"model.name: {name} is a masked model, and writes no text; use tasks with labels"
    problem = f"model.name: {name} cannot write texts here"
    advice = "use tasks with labels, or another model"
    rows = [GreedyRow(add_soft_tokens(sample_tokens(1, n, lm), lm), random_adapter(lm)) for n in (9, 3, 5)]
    decoder = Decoder(lm, most_rows=3, cache_tokens=0)
    try:
        decoder.join(rows[:2])
        decoder.step()
        decoder.join(rows[2:])
        decoder.step()
        decoder.leave(rows[0])
        decoder.step()
    except Exception as error:  # the model's code may raise anything
        return f"{problem} ({type(error).__name__}: {error}); {advice}"
    for row in rows:
        positions = torch.arange(row.prompt_tokens - 1, len(row.tokens) - 1, device=lm.device)
        expected = lm.logits_at(positions, stack_adapters([row.adapter]), torch.tensor([row.tokens], device=lm.device))
        if not is_close(torch.stack(row.logits), expected):
            return f"{problem}: token by token its logits are not those of the whole text; {advice}"
    return None


class GreedyRow:
    """A row of the decoder that takes the most probable token, and records all logits."""

    def __init__(self, prompt: Tensor, adapter: Params | None):
        self.tokens, self.adapter = prompt[0].tolist(), adapter
        self.prompt_tokens = self.most_tokens = len(self.tokens)
        self.logits: list[Tensor] = []

    def take(self, logits: Tensor) -> None:
        self.logits.append(logits)
        self.tokens.append(int(logits.argmax()))


def is_close(logits: Tensor, expected: Tensor) -> bool:
    tolerance = TOLERANCE.get(expected.dtype, 0.1)
    return bool((logits.float() - expected.float()).norm() <= tolerance * expected.float().norm())


def sample_tokens(rows: int, length: int, lm: TaskLM) -> Tensor:
    """Return fixed tokens `[rows, length]`, none of them padding."""
    most = min(lm.module.get_input_embeddings().num_embeddings, VOCABULARY) - 2
    tokens = torch.arange(rows * length, device=lm.device).view(rows, length) * 37 % (most - 5) + 5
    return tokens if lm.pad is None else tokens + (tokens == lm.pad)


def add_soft_tokens(tokens: Tensor, lm: TaskLM) -> Tensor:
    """Return rows with the soft prompt's tokens in front, if the model has a soft prompt."""
    count = lm.adapter.tokens if isinstance(lm.adapter, TaskPrompt) else 0
    soft = torch.tensor(soft_tokens(count), dtype=tokens.dtype, device=tokens.device)
    return torch.cat([soft.expand(len(tokens), -1), tokens], 1)


def random_adapter(lm: TaskLM, like: Params | None = None) -> Params | None:
    """Return a random adapter without near-zero tensors, shaped as `like`; None if the model takes no adapter."""
    start = like or (lm.adapter.untrained_start(0) if lm.adapter else {})
    return {name: (torch.randn_like(w) * w.shape[-1] ** -0.5).to(lm.device) for name, w in start.items()} or None


def remove_adapters(lm: TaskLM) -> None:
    if lm.adapter:
        lm.adapter.begin(None)


def small_copy(base: str, attention: str) -> Any | None:
    """Return a resolved model with random weights in float32, with few layers if it is large; None if still too large.

    Raises:
        ConfigError: the model does not run.
    """
    shape, config = load_shape(base), read_config(base)
    is_shrunk = sum(parameter.numel() for parameter in shape.parameters()) > SMALL_PARAMETERS
    if is_shrunk:
        depth, size = choose_depth(shape)
        if size > MOST_PARAMETERS:
            return None
        shrink_config(config.get_text_config(), depth)
    try:
        with seeded():
            module = auto_model(base).from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
            for parameter in module.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
            module(input_ids=torch.tensor([[5, 6, 7, 8]]))
    except Exception as error:  # the model's code may raise anything
        if is_shrunk:  # the smaller size may be the cause
            return None
        raise ConfigError(
            f"model.name: {type(shape).__name__} does not run: {type(error).__name__}: {error}"
        ) from error
    return module.requires_grad_(False)


def shrink_config(config: Any, depth: int) -> None:
    """Leave a config `depth` layers and a small vocabulary."""
    config.num_hidden_layers, config.vocab_size = depth, min(config.vocab_size, VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(getattr(config, name), config.vocab_size - 1))


def choose_depth(shape: Any) -> tuple[int, int]:
    """Return how many layers a small copy has, and their parameters.

    They show every kind of layer; there are more as long as they stay within `SMALL_PARAMETERS`.
    """
    sizes: dict[int, int] = {}
    for name, parameter in shape.named_parameters():
        if is_in_layer(name):
            sizes[layer_number(name)] = sizes.get(layer_number(name), 0) + parameter.numel()
    kinds = list(getattr(shape.config.get_text_config(), "layer_types", None) or [""])
    depth = max(kinds.index(kind) for kind in kinds) + 1
    size = sum(sizes.get(layer, 0) for layer in range(depth))
    while depth < len(sizes) and size + sizes.get(depth, 0) <= SMALL_PARAMETERS:
        size += sizes.get(depth, 0)
        depth += 1
    return depth, size
