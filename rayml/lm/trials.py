"""What a model does, seen from a few forwards of a small copy: its own code with random weights, in float32, and only
as deep as shows every kind of its layers. No model is known by its name here.
"""

import tempfile
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayml.algorithms.inner_loop import Params
from rayml.errors import ConfigError
from rayml.lm.decode import Decoder
from rayml.lm.load import auto_model, load_shape, read_config
from rayml.lm.lora import in_a_layer, layer_number, linear_kinds, side_by_side
from rayml.lm.model import TaskLM, hooks
from rayml.lm.peft_files import peft_logits, save_adapter
from rayml.lm.rows import soft_tokens
from rayml.lm.soft_prompt import TaskPrompt

FEW, MOST = 20_000_000, 400_000_000
"""Parameters of a small copy: it is as deep as the first allows, and none is made that has more than the last."""
VOCABULARY = 512
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Of logits, as a share of their length: from rounding. What is looked for is far larger."""


@lru_cache(maxsize=16)
def fault(
    base: str, attention: str, targets: tuple[str, ...], rank: int, alpha: float, prompt: int, writes: bool
) -> str | None:
    """Return what a resolved model, with LoRA or soft prompts, does otherwise than rayml takes for granted.

    Args:
        targets: of LoRA; none where there is none.
        prompt: soft tokens.
        writes: whether it is to write texts.
    """
    module = small_copy(base, attention)
    if module is None:
        return None
    present = set(linear_kinds(module))  # a shallow copy may lack layers that have some of the targets
    lora = {"targets": [one for one in targets if one in present], "rank": rank, "alpha": alpha, "last_layers": None}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        lm = TaskLM(module, hooks(module, lora if lora["targets"] else {}, prompt))
        return strange(lm) or (misfit(lm, base, lora) if lm.adapter else None) or (misspelt(lm) if writes else None)


def fitting(base: str, attention: str, targets: Sequence[str], rank: int, alpha: float) -> list[str]:
    """Return the targets that adapters of a resolved model fit, each tried alone; those that cannot be tried, too."""
    module = small_copy(base, attention)
    if module is None:
        return list(targets)
    present = set(linear_kinds(module))

    def fits(target: str) -> bool:
        lora = {"targets": [target], "rank": rank, "alpha": alpha, "last_layers": None}
        return target not in present or misfit(TaskLM(module, hooks(module, lora, 0)), base, lora) is None

    with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about what is then left out
        torch.manual_seed(0)
        return [target for target in targets if fits(target)]


def strange(lm: TaskLM) -> str | None:
    """Return why a model is not what it is loaded as, by two forwards: its logits change with what it must not see."""
    name, tokens = type(lm.module).__name__, some_tokens(1, 6, lm)
    places = torch.arange(5, device=lm.device)
    if lm.pad is None:
        other = tokens.clone()
        other[0, -1] = tokens[0, 0] + 1
        said = (
            "looks at later tokens, as encoders do: it is no causal language model; take one, or a masked one, whose "
            "config.json has architectures: [...ForMaskedLM]"
        )
    else:
        other = torch.cat([tokens, tokens.new_full((1, 3), lm.pad)], 1)
        said = "sees padding: the rows of a batch would change each other; take another model"
    found, wanted = (lm.logits_at(places, None, row) for row in (other, tokens))
    if not wanted.isfinite().all():
        return f"model.name: {unsound(lm.module) or f'{name} gives logits that are no finite numbers'}"
    return None if near(found, wanted) else f"model.name: {name} {said}"


def unsound(module: Any) -> str | None:
    """Return which weights of a model are no finite numbers, or None."""
    broken = [name for name, weight in module.named_parameters() if not weight.isfinite().all()]
    return f"the weights of {type(module).__name__} hold NaN or infinity, such as {broken[0]}" if broken else None


def misfit(lm: TaskLM, base: str, lora: dict[str, Any]) -> str | None:
    """Return why adapters do not fit a model: it never calls a target, or mixes tasks, or PEFT takes them otherwise."""
    name = type(lm.module).__name__
    if never := idle(lm):
        return f"lora.targets: {name} never calls its {', '.join(never)}; leave it out"
    said = "gives the rows of a batch to wrong tasks, with an adapter on"
    for trial in (acts_by_task, as_in_peft):
        if not trial(lm, base, lora):
            guilty = [one for one in lora["targets"] if not _with_one(trial, lm, base, lora, one)]
            return f"lora.targets: {name} {said} {', '.join(guilty or lora['targets']) or 'its prompt'}; leave it out"
        said = "is another model in PEFT, which could not be exported, with an adapter on"
    return None


def _with_one(trial: Any, lm: TaskLM, base: str, lora: dict[str, Any], target: str) -> bool:
    one = {**lora, "targets": [target]}
    return trial(TaskLM(lm.module, hooks(lm.module, one, 0)), base, one)


def idle(lm: TaskLM) -> list[str]:
    """Return the targets that no forward calls."""
    called: set[str] = set()
    linears = lm.adapter.linears if lm.adapter else {}
    found = [
        linear.register_forward_pre_hook(lambda _linear, _inputs, name=name: called.add(name.rsplit(".", 1)[-1]))
        for name, linear in linears.items()
    ]
    lm.logits_at(torch.tensor([0], device=lm.device), None, some_tokens(4, 16, lm))
    for hook in found:
        hook.remove()
    return sorted({name.rsplit(".", 1)[-1] for name in linears} - called)


def acts_by_task(lm: TaskLM, _base: str, _lora: dict[str, Any]) -> bool:
    """Return whether two tasks side by side have the logits that each has alone."""
    adapters = [random_adapter(lm) for _ in range(2)]
    rows = [prompted(some_tokens(2, 7, lm), lm) for _ in adapters]
    ends = torch.arange(1, 5, device=lm.device) * rows[0].shape[1] - 1
    try:
        together = lm.logits_at(ends, side_by_side(adapters), torch.cat(rows))
        alone = [lm.logits_at(ends[:2], side_by_side([a]), row) for a, row in zip(adapters, rows, strict=True)]
    except Exception:  # whatever its code raises: a linear that returns more than a tensor, or gets other rows
        return False
    finally:
        bare(lm)
    return near(together, torch.cat(alone))


def as_in_peft(lm: TaskLM, base: str, lora: dict[str, Any], like: Params | None = None) -> bool:
    """Return whether PEFT computes the same from an adapter that rayml writes.

    Args:
        like: whose tensors it is to have, if not all that the model can have.
    """
    adapter = random_adapter(lm, like) or {}
    with tempfile.TemporaryDirectory() as folder:
        kind = "CAUSAL_LM" if lm.pad is None else None
        save_adapter(Path(folder), adapter, lora if lora.get("targets") else {}, base, kind)
        return same_in_peft(lm, adapter, Path(folder))


def same_in_peft(lm: TaskLM, adapter: Params, folder: Path) -> bool:
    """Return whether PEFT, with the adapter in a folder, computes what rayml does with these weights."""
    tokens = some_tokens(2, 12, lm)
    rows = prompted(tokens, lm)
    ends = torch.arange(1, len(rows) + 1, device=lm.device) * rows.shape[1] - 1
    with torch.no_grad():
        ours = lm.logits_at(ends, side_by_side([adapter]), rows)
        bare(lm)
        try:
            theirs = peft_logits(lm.module, folder, tokens)[:, -1]
        except Exception:  # whatever PEFT says against it
            return False
    return near(theirs, ours)


def misspelt(lm: TaskLM) -> str | None:
    """Return why a model cannot write: what it says token by token is not what it says to the whole text."""
    name = type(lm.module).__name__
    if lm.pad is not None:
        return f"model.name: {name} is a masked model, and writes no text; use tasks with labels"
    said = f"model.name: {name} cannot write texts here"
    advice = "use tasks with labels, or another model"
    rows = [Text(prompted(some_tokens(1, length, lm), lm), random_adapter(lm)) for length in (9, 3, 5)]
    decoder = Decoder(lm, most_rows=3, cache_tokens=0)
    try:
        decoder.join(rows[:2])
        decoder.step()
        decoder.join(rows[2:])
        decoder.step()
        decoder.leave(rows[0])
        decoder.step()
    except Exception as error:  # whatever its code raises
        return f"{said} ({type(error).__name__}: {error}); {advice}"
    for row in rows:
        places = torch.arange(row.first - 1, len(row.tokens) - 1, device=lm.device)
        whole = lm.logits_at(places, side_by_side([row.adapter]), torch.tensor([row.tokens], device=lm.device))
        if not near(torch.stack(row.seen), whole):
            return f"{said}: token by token its logits are not those of the whole text; {advice}"
    return None


class Text:
    """A row of the decoder that takes the likeliest token, and keeps the logits."""

    def __init__(self, prompt: Tensor, adapter: Params | None):
        self.tokens, self.adapter = prompt[0].tolist(), adapter
        self.first = self.most_tokens = len(self.tokens)
        self.seen: list[Tensor] = []

    def take(self, logits: Tensor) -> None:
        self.seen.append(logits)
        self.tokens.append(int(logits.argmax()))


def near(found: Tensor, wanted: Tensor) -> bool:
    tolerance = TOLERANCE.get(wanted.dtype, 0.1)
    return bool((found.float() - wanted.float()).norm() <= tolerance * wanted.float().norm())


def some_tokens(rows: int, length: int, lm: TaskLM) -> Tensor:
    """Return tokens `[rows, length]` that are no padding, the same at every call."""
    most = min(lm.module.get_input_embeddings().num_embeddings, VOCABULARY) - 2
    tokens = torch.arange(rows * length, device=lm.device).view(rows, length) * 37 % (most - 5) + 5
    return tokens if lm.pad is None else tokens + (tokens == lm.pad)


def prompted(tokens: Tensor, lm: TaskLM) -> Tensor:
    """Return rows behind the soft tokens that stand for a prompt, where there is one."""
    count = lm.adapter.tokens if isinstance(lm.adapter, TaskPrompt) else 0
    soft = torch.tensor(soft_tokens(count), dtype=tokens.dtype, device=tokens.device)
    return torch.cat([soft.expand(len(tokens), -1), tokens], 1)


def random_adapter(lm: TaskLM, like: Params | None = None) -> Params | None:
    """Return an adapter of which no tensor is near zero; None where the model has none."""
    start = like or (lm.adapter.untrained_start(0) if lm.adapter else {})
    return {name: (torch.randn_like(w) * w.shape[-1] ** -0.5).to(lm.device) for name, w in start.items()} or None


def bare(lm: TaskLM) -> None:
    """Take off the adapters of the last forward."""
    if lm.adapter:
        lm.adapter.begin(None)


def small_copy(base: str, attention: str) -> Any | None:
    """Return a resolved model's code with random weights, in float32; None where that is too much to try.

    Raises:
        ConfigError: it does not run.
    """
    shape, config = load_shape(base), read_config(base)
    is_cut = sum(parameter.numel() for parameter in shape.parameters()) > FEW
    if is_cut:
        depth, size = shallow(shape)
        if size > MOST:
            return None
        cut(config.get_text_config(), depth)
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            module = auto_model(base).from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
            for parameter in module.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
            module(input_ids=torch.tensor([[5, 6, 7, 8]]))
    except Exception as error:  # whatever its code raises
        if is_cut:  # it may be the cut that does not suit it
            return None
        raise ConfigError(
            f"model.name: {type(shape).__name__} does not run: {type(error).__name__}: {error}"
        ) from error
    return module.requires_grad_(False)


def cut(config: Any, depth: int) -> None:
    """Leave a config few layers, and few tokens."""
    config.num_hidden_layers, config.vocab_size = depth, min(config.vocab_size, VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(getattr(config, name), config.vocab_size - 1))


def shallow(shape: Any) -> tuple[int, int]:
    """Return how many of the first layers show every kind there is, more where all are small, and their parameters."""
    sizes: dict[int, int] = {}
    for name, parameter in shape.named_parameters():
        if in_a_layer(name):
            sizes[layer_number(name)] = sizes.get(layer_number(name), 0) + parameter.numel()
    kinds = list(getattr(shape.config.get_text_config(), "layer_types", None) or [""])
    depth, size = max(kinds.index(kind) for kind in kinds) + 1, 0
    size = sum(sizes.get(layer, 0) for layer in range(depth))
    while depth < len(sizes) and size + sizes.get(depth, 0) <= FEW:
        size += sizes.get(depth, 0)
        depth += 1
    return depth, size
