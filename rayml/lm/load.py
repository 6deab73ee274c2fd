"""Load base models and their tokenizers: from safetensors only, and never with code that comes with a model."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which transformers imports, warns of no GPU

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
)
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils import logging as transformers_logging

from rayml.errors import ConfigError
from rayml.lm.catalog import base_config
from rayml.lm.rows import mark_masked
from rayml.lm.sentence import SENTENCES_KEY, mark_sentences, read_sentences
from rayml.lm.weight_files import find_broken_file, unused_weights

transformers_logging.disable_progress_bar()
NO_LIMIT = 1 << 30
"""Context of a model that states none, in tokens."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(path: str):
    """Return the fast tokenizer of a resolved model.

    Raises:
        ConfigError: it cannot be loaded, or is not a fast one (the seam of prompt and target needs offsets).
    """
    sentences = read_sentences(path)
    predicts_masks = not sentences and is_masked(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name: no tokenizer at {path!r}: {error}") from error
    if predicts_masks:
        mark_masked(tokenizer)
    if sentences:
        if sentences.max_tokens is None:  # as in sentence-transformers
            most = min(tokenizer.model_max_length, context_tokens(load_shape(path)))
            sentences = replace(sentences, max_tokens=most)
        mark_sentences(tokenizer, sentences)
    needed = ("pad_token", "mask_token") if predicts_masks else () if sentences else ("eos_token",)
    missing = [name for name in needed if getattr(tokenizer, name) is None]
    if not tokenizer.is_fast or missing:
        raise ConfigError(f"model.name: {path!r} has no fast tokenizer with {' and '.join(missing or needed)}")
    return tokenizer


def load_base(path: str, dtype: str, attention: str = "sdpa", deepspeed: dict[str, Any] | None = None):
    """Return a resolved model, frozen and in eval mode: a causal or masked LM, or a sentence encoder.

    Args:
        deepspeed: a ZeRO-3 config, which shards each weight over the workers as it is read.

    Raises:
        ConfigError: there is no such model, or it is incomplete.
    """
    sharded_loading = HfDeepSpeedConfig(deepspeed) if deepspeed else None  # from_pretrained shards while this is alive
    model = _from_pretrained(path, dtype=DTYPES[dtype], attn_implementation=attention)
    del sharded_loading
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack a 4-bit linear at its first forward on a CPU, for a kernel without a gradient.
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
    return with_sentences(model, path).requires_grad_(False).eval()


def _from_pretrained(path: str, **settings: Any) -> Any:
    """Return the model with exactly the weights of its files: missing ones would be random at every load."""
    auto_class, config = auto_model(path), read_config(path)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what it would warn about is an error here
    try:
        model, info = auto_class.from_pretrained(
            path,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **settings,
        )
    except (ImportError, OSError, ValueError, SafetensorError) as error:  # ImportError: the library of a quantization
        problem = find_broken_file(path) or f"no causal language model at {path!r}: {error}"
        raise ConfigError(f"model.name: {problem}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if read_sentences(path):
        missing = [key for key in missing if not key.startswith("pooler.")]  # vectors do not use it
    if missing:
        raise ConfigError(
            f"model.name: {path!r} has no weights for {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''} of "
            f"{type(model).__name__}, or of another shape; take a checkpoint that was saved with its output head"
        )
    # Quantized checkpoints have tensors with names of their own.
    unused = [] if hasattr(model.config, "quantization_config") else unused_weights(model, info["unexpected_keys"])
    if unused:
        raise ConfigError(
            f"model.name: {path!r} has weights that {type(model).__name__} does not take, with its config.json: "
            f"{', '.join(unused[:4])}{', ...' if len(unused) > 4 else ''}; correct num_hidden_layers, "
            "model_type, or other settings that belong to them"
        )
    return model


def read_config(path: str) -> Any:
    """Return a resolved model's config; a masked model's has its tokenizer's padding token, which must not be seen.

    Raises:
        ConfigError: the config and the tokenizer name different tokens; or as `plain_config`.
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
    """Return a resolved model's config as it is in the file.

    Raises:
        ConfigError: it is an encoder-decoder, or its folder holds an adapter, too; or as `base_config`.
    """
    if (Path(path) / "adapter_config.json").exists():
        raise ConfigError(
            f"model.name: {path!r} holds a PEFT adapter beside the model (adapter_config.json), which transformers "
            "would put into it; move the adapter elsewhere, or merge it"
        )
    config = base_config(path)
    if config.is_encoder_decoder:
        raise ConfigError(f"model.name: {config.model_type} at {path!r} is an encoder-decoder; take a causal model")
    return config


def check_weights(path: str) -> None:
    """Raise ConfigError if weights of a model's folder are missing; no weight is read."""
    is_quantized = hasattr(plain_config(path), "quantization_config")  # whose library needs a real device
    if Path(path).is_dir() and not is_quantized:  # the workers fetch those of the Hub
        _from_pretrained(path, device_map="meta")


def load_shape(path: str, attention: str = "eager"):
    """Return a resolved model on the meta device: from its config.json alone, without weights.

    Raises:
        ConfigError: there is no such config.
    """
    auto_class, config = auto_model(path), plain_config(path)
    try:
        with torch.device("meta"):
            shape = auto_class.from_config(config, attn_implementation=attention)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name: no causal language model's config at {path!r}: {error}") from error
    return with_sentences(shape, path)


def is_masked(path: str) -> bool:
    """Return whether a model predicts masked tokens, and not the next one, by the architecture in its config."""
    architectures = getattr(base_config(path), "architectures", None) or []
    return any(name.endswith("ForMaskedLM") for name in architectures)


def context_tokens(model: Any) -> int:
    """Return the longest context of a model, in tokens; NO_LIMIT if it states none."""
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            # Beyond this length, positions depend on the longest row of a batch, so that rows would affect each other.
            original = getattr(config, "original_max_position_embeddings", None)
            limits.append(parameters.get("original_max_position_embeddings") or original)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name.rsplit(".", 1)[-1]:
            unused = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts positions from there
            limits.append(module.num_embeddings - unused)
    return min((limit for limit in limits if limit), default=NO_LIMIT)


def auto_model(path: str) -> Any:
    """Return transformers' auto class for a resolved model."""
    if read_sentences(path):
        return AutoModel
    return AutoModelForMaskedLM if is_masked(path) else AutoModelForCausalLM


def with_sentences(model: Any, path: str) -> Any:
    """Mark a sentence encoder with how it pools; a pooling head of its own, such as BERT's, is removed."""
    sentences = read_sentences(path)
    if sentences:
        setattr(model, SENTENCES_KEY, sentences)
        model.config.use_cache = False
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
    return model


def checkpoint_activations(model) -> None:
    """Recompute each layer in the backward. Only the layers' own training flag is set, so that dropout stays off."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()  # gradients at the embeddings would lengthen every backward
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.training = True
