"""Quantise the weights of a base's linears: 8 bits a weight by torchao, 4 by bitsandbytes.

Activations, adapters and their gradients stay as they are. The embedding, and the output head, which is often the same
tensor, keep their precision: labels are told apart there. torchao's packed 4-bit formats want CUDA or XPU to be made;
bitsandbytes' NF4 in blocks of 64 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314) is made and run on CPU and GPU alike.
Both keep the quantised weights as safetensors, and say in `config.json` how to load them.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rayml.errors import ConfigError
from rayml.lm.load import DTYPES

LIBRARY = {"int8": "torchao>=0.18", "int4": "bitsandbytes>=0.50"}


def check_library(kind: str) -> None:
    """Raise ConfigError where the library that quantises so is not installed."""
    name = LIBRARY[kind].partition(">")[0]
    if find_spec(name) is None:
        raise ConfigError(f"--quantize {kind}: {name} is not installed; pip install '{LIBRARY[kind]}'")


def quantize_base(base: str, dtype: str, kind: str, folder: Path) -> None:
    """Write the base of a resolved model quantised; what is not quantised is kept in `dtype`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=DTYPES[dtype], use_safetensors=True, quantization_config=quantization(kind, dtype)
    )
    model.save_pretrained(folder)


def quantization(kind: str, dtype: str) -> Any:
    """Return the transformers config of int8 or int4."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "int4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[dtype])
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())
