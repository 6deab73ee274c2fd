"""Adapter folders that stock PEFT, vLLM and LoRAX load: `adapter_config.json` and `adapter_model.safetensors`.

Beside them lies `rayml.json`: how examples were shown to the model, and the user's own labels.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import load_file, save_file

from rayml.errors import RunError
from rayml.lm.lora import layer_number
from rayml.meta.adapt import Params

CARD, WEIGHTS = "rayml.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterCard:
    """What an adapter needs beside its weights."""

    name: str
    model: str
    """`model.name` of the run."""
    dtype: str
    prompt: str
    max_tokens: int
    labels: dict[str, str] = field(default_factory=dict)
    """What the model sees to the user's own label; empty for free text."""
    lora: dict = field(default_factory=dict)


def save_adapter(folder: Path, weights: Params, card: AdapterCard, base: str) -> None:
    """Write one task's adapter, `[r, in]` and `[out, r]` each, as a stock PEFT folder.

    Args:
        base: where `base_model_name_or_path` is to point.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layers = sorted({layer_number(name) for name in weights})
    LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=card.lora["rank"],
        lora_alpha=card.lora["alpha"],
        target_modules=list(card.lora["targets"]),
        layers_to_transform=layers if card.lora["last_layers"] else None,
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
    ).save_pretrained(str(folder))
    tensors = {f"{PREFIX}{name}.weight": weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CARD).write_text(json.dumps(asdict(card), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_adapter(folder: Path) -> tuple[Params, AdapterCard]:
    """Return the weights and the card of an adapter that `save_adapter` wrote.

    Raises:
        RunError: it is not there, or not whole.
    """
    try:
        card = AdapterCard(**json.loads((folder / CARD).read_text(encoding="utf-8")))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{folder}: no adapter that `rayml adapt` wrote: {error}") from error
    return {name.removeprefix(PREFIX).removesuffix(".weight"): w.float() for name, w in tensors.items()}, card
