"""Read an adapter's folder without trusting its author.

Only safetensors files are opened, never a pickle. The names, ranks and shapes of the tensors, the base, and every
number are checked against the model that is served.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from rayml.algorithms.base import Algorithm
from rayml.algorithms.inner_loop import Params
from rayml.algorithms.prototypes import MEANS, MIX, SCALE
from rayml.algorithms.registry import trusted_algorithm
from rayml.errors import ConfigError, RunError
from rayml.lm.lora import A, B
from rayml.lm.peft_files import CARD, PREFIX, PROMPT_KEY, READOUT, WEIGHTS, AdapterCard
from rayml.lm.soft_prompt import PROMPT
from rayml.tasks.templates import compile_template

CONFIG = "adapter_config.json"
FILES = CONFIG, WEIGHTS, CARD, READOUT
MOST_CONFIG_BYTES = 1_000_000
MOST_PROMPTS = 16
MOST_LOG = 20
"""The largest log-scale, and log-mix, of a readout."""
KNOWN = set(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode "  # noqa: SIM905
    # Of LoRA. Its target modules are read off the names of its weights.
    "r lora_alpha lora_dropout use_rslora init_lora_weights target_modules exclude_modules layers_to_transform "
    "layers_pattern megatron_core eva_config loftq_config corda_config qalora_group_size "
    # Of a soft prompt. Its initialization does not matter.
    "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers prompt_tuning_init "
    "prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs".split()
)
"""Fields of PEFT's configs that are applied here, or do not change what is computed. All others must be unset."""
PLAIN_CARD = AdapterCard("", "", "", "{input}", 0)
"""The card of plain PEFT's adapters, and of the bare base: it takes texts as they are, and has no labels."""
PLAIN_INITS = True, False, None, "gaussian", "orthogonal", "eva"
"""Values of init_lora_weights that do not change the base's weights, as PiSSA, OLoRA, CorDA and LoftQ do."""


@dataclass(frozen=True)
class AdapterConstraints:
    """What an adapter has to fit in order to be served."""

    names: tuple[str, ...]
    """The base's names: in the run's config, where it was loaded from, and on the Hub."""
    linears: Mapping[str, tuple[int, int]]
    """`(out, in)` of every linear layer that may be adapted."""
    scale: float
    """The factor of every update in the task-batched layer: the run's alpha / rank."""
    most_rank: int
    most_bytes: int
    algorithm: Algorithm
    """The run's. Adapters may have been learned by it, or by any that comes with rayml."""
    prompt_width: int = 0
    """The width of the embeddings if soft prompts are served; 0 if LoRA is."""
    prototype_size: int = 0
    """The width of prototypes."""
    vocabulary: int = 0
    """The number of tokens; 0 for a sentence encoder, which has no label tokens."""


def read_adapter(folder: Path, fits: AdapterConstraints) -> tuple[Params, AdapterCard]:
    """Return the weights and the card of an adapter in a folder, which rayml or plain PEFT wrote.

    Raises:
        RunError: it does not fit the base, or cannot be trusted; with the reason.
    """
    try:
        size = (folder / WEIGHTS).stat().st_size
    except OSError:
        raise RunError(f"has no {WEIGHTS} (only safetensors files are read, never pickles)") from None
    if size > fits.most_bytes:
        raise RunError(f"has {size} bytes; at most {fits.most_bytes}")
    config = _read_json(folder / CONFIG)
    _check_base(config, fits)
    unknown = [key for key, value in config.items() if key not in KNOWN and value and (key, value) != ("bias", "none")]
    if unknown:
        raise RunError(f"asks for {', '.join(unknown)[:120]}, which is not served")
    extra_scale = 1.0
    if fits.prompt_width:
        weights = _read_prompt(folder / WEIGHTS, config, fits)
    else:
        # The layer scales all adapters alike, so B takes what this adapter's config asks for beyond that.
        extra_scale = _check_lora_config(config, fits) / fits.scale
        weights = _read_lora(folder / WEIGHTS, fits, config["r"])
    card = _read_card(folder / CARD)
    soft_tokens = len(weights[PROMPT]) if fits.prompt_width else 0
    if card == PLAIN_CARD:
        card = replace(card, soft_tokens=soft_tokens)
    if card.soft_tokens != soft_tokens:  # a row would begin with tokens that no embedding belongs to
        raise RunError(f"{CARD} has soft_tokens={card.soft_tokens}, and the weights have {soft_tokens}")
    try:
        algorithm = trusted_algorithm(card.algorithm, card.settings, fits.algorithm)
    except ConfigError as error:
        raise RunError(str(error)) from None
    if algorithm.prototypes:
        weights |= _read_readout(folder / READOUT, card, fits)
    if extra_scale != 1:
        weights |= {name: weight * extra_scale for name, weight in weights.items() if name.endswith(B)}
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise RunError(f"{name} holds numbers that are not finite")
    if algorithm.keeps_states and not (card.labels and (card.shown or MEANS in weights)):
        raise RunError(f"{CARD} keeps no examples, which {algorithm.name} needs for its answers")
    return weights, card


def _read_readout(path: Path, card: AdapterCard, fits: AdapterConstraints) -> Params:
    """Return a task's prototypes, their scale and their mix; nothing if the card keeps the task's examples instead."""
    if card.shown and not path.exists():
        return {}
    with open_safetensors(path) as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        classes = (shapes.get(MEANS) or [0])[0]
        size = fits.prototype_size
        if not fits.vocabulary and shapes.get(MEANS) == [classes, size - 1]:
            size -= 1  # kept before texts of pairs were compared (`rayml.lm.pooling.add_no_similarity`)
        expected = {SCALE: [], MIX: [], MEANS: [classes, size]}
        if not 1 <= classes <= len(card.labels) or any(expected.get(name) != shapes[name] for name in shapes):
            raise RunError(f"{READOUT} holds {shapes}; expected {MEANS} of {len(card.labels)} x {fits.prototype_size}")
        readout = {name: file.get_tensor(name).float() for name in shapes}
    if any(abs(readout[name]) > MOST_LOG for name in (SCALE, MIX) if name in readout):
        raise RunError(f"{READOUT} has a scale or a mix that is out of range")
    has_unknown_tokens = any(not 0 <= token < fits.vocabulary for token in card.label_tokens)
    if has_unknown_tokens or len(card.label_tokens) != (len(card.labels) if fits.vocabulary else 0):
        raise RunError(f"{CARD} has label_tokens that are not one token of this base for each label")
    return readout


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path.name} is not a safetensors file: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_CONFIG_BYTES:
            raise RunError(f"{path.name} is larger than {MOST_CONFIG_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path.name} cannot be read: {type(error).__name__}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path.name} is not a JSON object")
    return content


def _check_lora_config(config: dict[str, Any], fits: AdapterConstraints) -> float:
    """Return the factor of the adapter's updates: alpha / rank, or alpha / sqrt(rank)."""
    init = config.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        raise RunError(
            f"init_lora_weights={init!r} changes the base's weights, but this server has the original ones; save it as "
            "plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= fits.most_rank:
        raise RunError(f"rank r={rank!r}; 1 to {fits.most_rank} are served")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise RunError(f"lora_alpha={alpha!r} is not a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_base(config: dict[str, Any], fits: AdapterConstraints) -> None:
    peft_type = "PROMPT_TUNING" if fits.prompt_width else "LORA"
    if config.get("peft_type") != peft_type:
        raise RunError(f"peft_type is {config.get('peft_type')!r}; only {peft_type} is served")

    def last_part(name: str) -> str:
        return name.rstrip("/").rsplit("/", 1)[-1].lower()

    base = str(config.get("base_model_name_or_path") or "")
    if base and base not in fits.names and last_part(base) not in map(last_part, fits.names):
        raise RunError(f"was made for the base {base!r}; this server has {fits.names[0]!r}")


def _read_prompt(path: Path, config: dict[str, Any], fits: AdapterConstraints) -> Params:
    tokens = config.get("num_virtual_tokens")
    if type(tokens) is not int or not 1 <= tokens <= fits.most_rank:
        raise RunError(f"num_virtual_tokens={tokens!r}; 1 to {fits.most_rank} are served")
    with open_safetensors(path) as file:
        shape = file.get_slice(PROMPT_KEY).get_shape() if list(file.keys()) == [PROMPT_KEY] else None
        if shape != [tokens, fits.prompt_width]:
            raise RunError(f"{PROMPT_KEY} has the shape {shape}; this base needs {[tokens, fits.prompt_width]}")
        return {PROMPT: file.get_tensor(PROMPT_KEY).float()}


def _read_lora(path: Path, fits: AdapterConstraints, rank: int) -> Params:
    weights: Params = {}
    with open_safetensors(path) as file:
        for key in list(file.keys()):
            name = key.removeprefix(PREFIX).removesuffix(".weight")
            _check_shape(key, name, file.get_slice(key).get_shape(), fits)
            weights[name] = file.get_tensor(key).float()
    if not weights:
        raise RunError("holds no weights")
    unpaired = [name for name in weights if _partner(name) not in weights]
    if unpaired:
        raise RunError(f"A and B do not come in pairs: {unpaired[:3]}")
    for name, weight in weights.items():
        if weight.shape[0 if name.endswith(A) else 1] != rank:
            raise RunError(f"{name} does not have the rank r={rank} of {CONFIG}")
    return weights


def _partner(name: str) -> str:
    return name.removesuffix(A) + B if name.endswith(A) else name.removesuffix(B) + A


def _check_shape(key: str, name: str, shape: list[int], fits: AdapterConstraints) -> None:
    linear = name.removesuffix(A).removesuffix(B)
    if not key.startswith(PREFIX) or linear not in fits.linears or linear == name:
        raise RunError(f"adapts {key[:120]!r}, which is not a linear layer of this base")
    out_features, in_features = fits.linears[linear]
    rank = (shape or [0])[0 if name.endswith(A) else -1]
    expected = [rank, in_features] if name.endswith(A) else [out_features, rank]
    if shape != expected or not 1 <= rank <= fits.most_rank:
        raise RunError(f"{name} has the shape {shape}; this base needs {expected}, with ranks up to {fits.most_rank}")


def _read_card(path: Path) -> AdapterCard:
    """Return rayml's card; `PLAIN_CARD` if the adapter is by plain PEFT."""
    if not path.exists():
        return PLAIN_CARD
    content = _read_json(path)
    try:
        card = TypeAdapter(AdapterCard).validate_json(json.dumps(content), strict=True)
    except ValidationError:
        raise RunError(f"{CARD} is not what rayml writes") from None
    if card.max_tokens < 1 or len(card.ensemble) > MOST_PROMPTS or len(card.shown_parts) not in (0, len(card.shown)):
        raise RunError(f"{CARD} is not what rayml writes: it reads no tokens, or has more than {MOST_PROMPTS} prompts")
    try:
        for prompt in (card.prompt, *card.ensemble):
            compile_template(prompt)
    except ConfigError as error:
        raise RunError(f"{CARD} is not what rayml writes: {error}") from None
    return card
