"""Small random sentence encoders, in folders as sentence-transformers writes them."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaModel

from rayml.lm.catalog import resolve_model

BERT_TARGETS = ["query", "value", "dense"]


def write_encoder(
    folder: Path,
    pooling: dict | None = None,
    is_unit: bool = True,
    is_causal: bool = False,
    reading: dict | None = None,
    told: dict | None = None,
) -> str:
    """Write a BERT, or a Llama, of 0.2 M parameters without an output head; return its folder.

    Args:
        pooling: of `1_Pooling/config.json`.
        reading: `sentence_bert_config.json`.
        told: `config_sentence_transformers.json`.
    """
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("tiny" if is_causal else "tiny-masked"))
    common = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    common |= {"num_attention_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.1}
    torch.manual_seed(0)
    kind, config = (LlamaModel, LlamaConfig) if is_causal else (BertModel, BertConfig)
    kind(config(**common, pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    names = ["Transformer", "Pooling", *(["Normalize"] if is_unit else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (name, path) in enumerate(zip(names, paths, strict=False))
    ]
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": 64, **(pooling or {"pooling_mode_mean_tokens": True})},
        "sentence_bert_config.json": {"max_seq_length": 128, "do_lower_case": False, **(reading or {})},
        "config_sentence_transformers.json": told or {},
    }
    for name, holds in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(holds))
    return str(folder)
