"""Write and read what was learned as folders for stock libraries.

In mode adapters they hold `adapter_config.json` and `adapter_model.safetensors`, which PEFT, vLLM and LoRAX load; in
mode full a whole Hugging Face model. A task's folder also holds `rayml.json`, with how examples are shown to the model
and the user's own labels, and `readout.safetensors`, if it answers by prototypes.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayml.algorithms.inner_loop import Params
from rayml.algorithms.prototypes import MEANS, is_readout
from rayml.errors import RunError
from rayml.lm.encode import Encoder
from rayml.lm.lora import A, layer_number
from rayml.lm.soft_prompt import PROMPT
from rayml.tasks.task import Example

CARD, WEIGHTS, READOUT = "rayml.json", "adapter_model.safetensors", "readout.safetensors"
PREFIX = "base_model.model."
PROMPT_KEY = "prompt_embeddings"
EMBEDS = "FEATURE_EXTRACTION"
"""PEFT's `task_type` of a sentence encoder."""


@dataclass(frozen=True)
class AdapterCard:
    """What an adapter needs besides its weights."""

    name: str
    model: str
    """`model.name` of the run."""
    dtype: str
    prompt: str
    max_tokens: int
    labels: dict[str, str] = field(default_factory=dict)
    """From the label that the model sees to the user's own label; empty for free text."""
    lora: dict = field(default_factory=dict)
    soft_tokens: int = 0
    algorithm: str = ""
    """Its name; "" if it answers by label tokens alone."""
    shown: list[tuple[str, str]] = field(default_factory=list)
    """(input, target) of the examples that answering needs (`Algorithm.keeps`)."""
    label_loss: str = "options"
    kind: str = ""
    ensemble: list[str] = field(default_factory=list)
    scoring: str = "learned"
    shown_parts: list[list[tuple[str, str]]] = field(default_factory=list)
    """The parts of each input in `shown`; empty if inputs have no parts."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings of the algorithm."""
    label_tokens: list[int] = field(default_factory=list)
    """The first token of each label, for answers by prototypes."""
    fields: list[str] | None = None
    """The names of an input's fields in order; empty for texts; None if they differ, or are not known."""

    def examples(self) -> list[Example]:
        """Return the examples in `shown`."""
        parts = self.shown_parts or [[]] * len(self.shown)
        return [
            Example(text, target, tuple((name, part) for name, part in example_parts))
            for (text, target), example_parts in zip(self.shown, parts, strict=True)
        ]


def encoder_of(card: AdapterCard, tokenizer: Any, max_tokens: int | None = None) -> Encoder:
    """Return the encoder of an adapter's task."""
    return Encoder(
        tokenizer,
        card.prompt,
        card.max_tokens if max_tokens is None else max_tokens,
        card.label_loss,
        kind=card.kind,
        ensemble=tuple(card.ensemble),
        scoring=card.scoring,
        soft_tokens=card.soft_tokens,
    )


def write_card(folder: Path, card: AdapterCard) -> None:
    (folder / CARD).write_text(json.dumps(asdict(card), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_adapter(
    folder: Path, weights: Params, lora: dict[str, Any], base: str, kind: str | None = "CAUSAL_LM"
) -> None:
    """Write one adapter as a stock PEFT folder: LoRA, `[r, in]` and `[out, r]` each, or prompt tuning, `[P, d]`.

    A task's prototypes, and the learned parameters of its readout, go into a file beside it.

    Args:
        lora: its shape (`AdapterCard.lora`); empty for a soft prompt.
        base: the value of `base_model_name_or_path`.
        kind: PEFT's `task_type`.
    """
    from peft import LoraConfig, PeftConfig, PromptTuningConfig  # slow to import, and only needed to write

    folder.mkdir(parents=True, exist_ok=True)
    readout = {name: weight for name, weight in weights.items() if is_readout(name)}
    weights = {name: weight for name, weight in weights.items() if name not in readout}
    common: dict[str, Any] = {"task_type": kind, "base_model_name_or_path": base, "inference_mode": True}
    if not lora:
        tokens, width = weights[PROMPT].shape
        peft: PeftConfig = PromptTuningConfig(num_virtual_tokens=tokens, token_dim=width, **common)
        peft.num_transformer_submodules = 1  # type: ignore[attr-defined]  # PEFT sets it in training
        tensors = {PROMPT_KEY: weights[PROMPT]}
    else:
        targets, layers = list(lora["targets"]), None
        if kind == EMBEDS:
            # By full names: the pooler, which rayml leaves out, may have linears with the same last names.
            targets = sorted({name[: -len(A)] for name in weights if name.endswith(A)})
        elif lora["last_layers"]:
            layers = sorted({layer_number(name) for name in weights})
        peft = LoraConfig(
            r=lora["rank"],
            lora_alpha=lora["alpha"],
            target_modules=targets,
            layers_to_transform=layers,
            lora_dropout=0.0,
            bias="none",
            **common,
        )
        tensors = {f"{PREFIX}{name}.weight": weight for name, weight in weights.items()}
    peft.save_pretrained(str(folder))
    for file, params in ((WEIGHTS, tensors), (READOUT, readout if MEANS in readout else {})):
        contiguous = {name: weight.detach().cpu().contiguous() for name, weight in params.items()}
        if contiguous:
            save_file(contiguous, folder / file, metadata={"format": "pt"})


def peft_logits(module: Any, folder: Path, tokens: Tensor) -> Tensor:
    """Return PEFT's logits `[N, L, V]` of tokens `[N, L]` with an adapter's folder; the model is left as it was."""
    from peft import PeftModel

    modules = dict(module.named_modules())
    try:
        return PeftModel.from_pretrained(module, str(folder)).eval()(input_ids=tokens).logits
    finally:  # PEFT replaces modules, even if it fails half-way
        for name, original in modules.items():
            parent, _, last = name.rpartition(".")
            if name:
                setattr(modules[parent], last, original)
        vars(module).pop("peft_config", None)


def save_model(folder: Path, module: Any, weights: Params, tokenizer: Any) -> None:
    """Write the model with the parameters in `weights` as a Hugging Face folder; the model is left as it was."""
    parameters = {name: module.get_parameter(name) for name in weights}
    originals = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name].to(parameter.data)
        module.save_pretrained(folder)
    finally:
        for name, parameter in parameters.items():
            parameter.data = originals[name]
    tokenizer.save_pretrained(folder)


def load_learned(folder: Path) -> tuple[Params, AdapterCard, str | None]:
    """Return the weights and the card of a folder that `rayml adapt` wrote.

    In mode full there are no adapter weights, and the third value is the folder of the model itself; else it is None.

    Raises:
        RunError: the adapter is missing or incomplete.
    """
    try:
        card = AdapterCard(**json.loads((folder / CARD).read_text(encoding="utf-8")))
        if not card.lora and not card.soft_tokens:
            return {}, card, str(folder)
        tensors = load_file(folder / WEIGHTS)
        if (folder / READOUT).exists():
            tensors |= load_file(folder / READOUT)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise RunError(f"{folder}: no adapter that `rayml adapt` wrote: {error}") from error
    return {weight_name(key): tensor.float() for key, tensor in tensors.items()}, card, None


def weight_name(key: str) -> str:
    """Return rayml's name of a tensor that PEFT calls `key`."""
    return PROMPT if key == PROMPT_KEY else key.removeprefix(PREFIX).removesuffix(".weight")
