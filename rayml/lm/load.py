"""Base models and their tokenizers, loaded. Safetensors only, and code that comes with a model is never run."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which transformers imports, warns of no GPU

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
)
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils import logging as transformers_logging

from rayml.errors import ConfigError
from rayml.lm.rows import mark_masked
from rayml.lm.sentence import MARK, mark_sentences, read_sentences
from rayml.lm.weight_files import unreadable, untaken

transformers_logging.disable_progress_bar()
NO_LIMIT = 1 << 30
"""Tokens of a model that states none."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(path: str):
    """Return the fast tokenizer of a resolved model.

    Raises:
        ConfigError: it cannot be loaded, or is not a fast one (the seam of prompt and target needs offsets).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        sentences = read_sentences(path)
        masked = not sentences and is_masked(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name: no tokenizer at {path!r}: {error}") from error
    if masked:
        mark_masked(tokenizer)
    if sentences:
        mark_sentences(tokenizer, sentences)
    needed = ("pad_token", "mask_token") if masked else () if sentences else ("eos_token",)
    lacking = [name for name in needed if getattr(tokenizer, name) is None]
    if not tokenizer.is_fast or lacking:
        raise ConfigError(f"model.name: {path!r} has no fast tokenizer with {' and '.join(lacking or needed)}")
    return tokenizer


def load_base(path: str, dtype: str, attention: str = "sdpa", deepspeed: dict[str, Any] | None = None):
    """Return the causal, or masked, LM of a resolved model, or its sentence encoder, frozen and in eval mode.

    Args:
        deepspeed: a ZeRO-3 config, to shard each weight over the workers as it is read.

    Raises:
        ConfigError: there is none, or it is not whole.
    """
    sharded_loading = HfDeepSpeedConfig(deepspeed) if deepspeed else None  # acts on from_pretrained while it lives
    model = _from_pretrained(path, dtype=DTYPES[dtype], attn_implementation=attention)
    del sharded_loading
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack a 4-bit linear at its first forward on a CPU, for a kernel without a gradient.
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
    return with_sentences(model, path).requires_grad_(False).eval()


def _from_pretrained(path: str, **settings: Any) -> Any:
    """Return a model that is what its files hold: what is missing would be drawn anew at every load."""
    talks = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what it would report is an error here
    try:
        model, info = auto_model(path).from_pretrained(
            path,
            config=read_config(path),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **settings,
        )
    except (ImportError, OSError, ValueError, SafetensorError) as error:  # a quantised one needs its own library
        said = unreadable(path) or f"no causal language model at {path!r}: {error}"
        raise ConfigError(f"model.name: {said}") from error
    finally:
        transformers_logging.set_verbosity(talks)
    lacking = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if read_sentences(path):
        lacking = [key for key in lacking if not key.startswith("pooler.")]  # no vector is made by it
    if lacking:
        raise ConfigError(
            f"model.name: {path!r} has no weights for {', '.join(lacking[:4])}{', ...' if len(lacking) > 4 else ''} of "
            f"{type(model).__name__}, or of another shape; take a checkpoint that was saved with its output head"
        )
    # What quantised a model has its own names for what it keeps.
    extra = [] if hasattr(model.config, "quantization_config") else untaken(model, info["unexpected_keys"])
    if extra:
        raise ConfigError(
            f"model.name: {path!r} has weights that {type(model).__name__} does not take, with its config.json: "
            f"{', '.join(extra[:4])}{', ...' if len(extra) > 4 else ''}; mend num_hidden_layers, model_type, or what "
            "else belongs to them"
        )
    return model


def read_config(path: str) -> Any:
    """Return a resolved model's config; a masked model's knows its tokenizer's padding, which must not be seen.

    Raises:
        ConfigError: they speak of two tokens.
    """
    config = plain_config(path)
    if is_masked(path):
        pad = load_tokenizer(path).pad_token_id
        if config.pad_token_id not in (None, pad):
            raise ConfigError(
                f"model.name: pad_token_id is {config.pad_token_id} in the config.json of {path!r}, and {pad} in its "
                "tokenizer; make them one"
            )
        config.pad_token_id = pad
    return config


def plain_config(path: str) -> Any:
    """Return a resolved model's config.

    Raises:
        ConfigError: it is an encoder-decoder's, or its folder holds an adapter, too.
    """
    if (Path(path) / "adapter_config.json").exists():
        raise ConfigError(
            f"model.name: {path!r} holds a PEFT adapter beside the model (adapter_config.json), which transformers "
            "would put into it; move the adapter elsewhere, or merge it"
        )
    config = AutoConfig.from_pretrained(path)
    if config.is_encoder_decoder:
        raise ConfigError(f"model.name: {config.model_type} at {path!r} is an encoder-decoder; take a causal model")
    return config


def check_weights(path: str) -> None:
    """Raise ConfigError if a folder's weights are not all there; none is read."""
    is_quantized = hasattr(plain_config(path), "quantization_config")  # whose library wants a device
    if Path(path).is_dir() and not is_quantized:  # the Hub's are fetched by the workers
        _from_pretrained(path, device_map="meta")


def load_shape(path: str, attention: str = "eager"):
    """Return the causal LM of a resolved model on the meta device: from its config.json alone, without weights.

    Raises:
        ConfigError: there is no such config.
    """
    try:
        with torch.device("meta"):
            bare = auto_model(path).from_config(plain_config(path), attn_implementation=attention)
            return with_sentences(bare, path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name: no causal language model's config at {path!r}: {error}") from error


def is_masked(path: str) -> bool:
    """Return whether a model predicts masked tokens, and not the next: by what its config says that it is."""
    kinds = getattr(AutoConfig.from_pretrained(path), "architectures", None) or []
    return any(kind.endswith("ForMaskedLM") for kind in kinds)


def context_tokens(model: Any) -> int:
    """Return the longest text that a model takes, on the meta device or any other; NO_LIMIT where it states none."""
    config = model.config.get_text_config()
    stated = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    rope = getattr(config, "rope_parameters", None) or {}
    for one in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
        if one.get("rope_type") in ("dynamic", "longrope"):
            # Beyond it positions hang on the longest row of a batch: its neighbours would change a text.
            original = getattr(config, "original_max_position_embeddings", None)
            stated.append(one.get("original_max_position_embeddings") or original)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name.rsplit(".", 1)[-1]:
            unused = 0 if module.padding_idx is None else module.padding_idx + 1  # as RoBERTa counts
            stated.append(module.num_embeddings - unused)
    return min((most for most in stated if most), default=NO_LIMIT)


def auto_model(path: str) -> Any:
    if read_sentences(path):
        return AutoModel
    return AutoModelForMaskedLM if is_masked(path) else AutoModelForCausalLM


def with_sentences(model: Any, path: str) -> Any:
    """Note with a sentence encoder how its sentences are pooled; a head of its own for that, such as BERT's, goes."""
    sentences = read_sentences(path)
    if sentences:
        setattr(model, MARK, sentences)
        model.config.use_cache = False
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
    return model


def checkpoint_activations(model) -> None:
    """Recompute each layer in the backward. Only the layers' own flag is raised: dropout stays off."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()  # the embeddings need none: it would lengthen every backward
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.training = True
