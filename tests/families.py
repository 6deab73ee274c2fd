"""Tiny random models of some sixty families, as folders: what people bring."""

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

VOCABULARY = 287
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
FOUR = BASE | {"num_hidden_layers": 4}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
NO_HEAD_DIM = {key: value for key, value in BASE.items() if key not in ("head_dim", "num_key_value_heads")}
LATENT = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4}
SHARED = {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
TURNS = ["linear_attention", "full_attention"]
DELTA = {"layer_types": TURNS, "linear_num_value_heads": 4, "linear_num_key_heads": 2}
DELTA |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
STATES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}

CAUSAL: dict[str, dict[str, Any]] = {
    "llama": BASE,
    "mistral": BASE | {"sliding_window": 8},
    "qwen2": BASE,
    "qwen3": BASE,
    "phi": BASE,
    "phi3": BASE,
    "gemma": BASE,
    "gemma2": BASE | {"sliding_window": 8},
    "gemma3_text": BASE | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": BASE,
    "olmo2": BASE,
    "cohere2": FOUR | {"sliding_window": 8},
    "stablelm": BASE,
    "smollm3": BASE,
    "exaone4": FOUR | {"sliding_window": 8, "sliding_window_pattern": 4},
    "glm4": BASE,
    "nemotron": BASE,
    "ernie4_5": BASE,
    "starcoder2": BASE,
    "gpt_neox": NO_HEAD_DIM,
    "falcon": NO_HEAD_DIM | {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_alibi": NO_HEAD_DIM | {"model_type": "falcon", "alibi": True, "new_decoder_architecture": False},
    "opt": STATES
    | {"ffn_dim": 64, "num_attention_heads": 4, "max_position_embeddings": 512, "word_embed_proj_dim": 16},
    "bloom": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gptj": GPT2 | {"rotary_dim": 4},
    "codegen": GPT2 | {"rotary_dim": 4, "n_ctx": 512},
    "gpt_neo": STATES
    | {
        "num_layers": 2,
        "num_heads": 4,
        "window_size": 8,
        "attention_types": [[["global", "local"], 1]],
        "hidden_size": 32,
    },
    "biogpt": NO_HEAD_DIM,
    "xglm": STATES
    | {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 512},
    "mixtral": BASE | EXPERTS,
    "qwen2_moe": BASE | EXPERTS,
    "qwen3_moe": BASE | EXPERTS,
    "granitemoe": BASE | EXPERTS,
    "olmoe": BASE | EXPERTS,
    "phimoe": BASE | EXPERTS,
    "jetmoe": BASE | EXPERTS | {"kv_channels": 8},
    "gpt_oss": BASE | EXPERTS | {"sliding_window": 8},
    "llama4_text": FOUR | EXPERTS | {"intermediate_size_mlp": 64, "attention_chunk_size": 8},
    "deepseek_v2": NO_HEAD_DIM
    | EXPERTS
    | LATENT
    | {"q_lora_rank": 16, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "deepseek_v3": NO_HEAD_DIM | EXPERTS | LATENT | SHARED | {"q_lora_rank": 16},
    "glm4_moe": BASE | EXPERTS | SHARED,
    "dots1": BASE | EXPERTS | SHARED,
    "ernie4_5_moe": BASE
    | EXPERTS
    | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "hunyuan_v1_moe": BASE | EXPERTS | {"moe_topk": 2, "num_shared_expert": 1},
    "afmoe": FOUR | EXPERTS | {"num_dense_layers": 1, "num_shared_experts": 1, "sliding_window": 8},
    "minimax": BASE | EXPERTS,
    "qwen3_next": BASE | EXPERTS | DELTA,
    "lfm2": BASE | {"layer_types": ["conv", "full_attention"]},
    "bamba": BASE | MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": BASE | MAMBA | {"mamba_d_ssm": 64},
    "jamba": BASE
    | EXPERTS
    | {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "mamba": STATES | {"state_size": 8},
    "mamba2": STATES | {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16},
    "recurrent_gemma": STATES
    | {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "lru_width": 32,
        "attention_window_size": 8,
    },
    "rwkv": STATES | {"attention_hidden_size": 32, "context_length": 512},
    "openai-gpt": GPT2,
    "ctrl": GPT2 | {"dff": 64},
}
ENCODER = NO_HEAD_DIM | {"pad_token_id": 2}
MASKED: dict[str, dict[str, Any]] = {
    "bert": ENCODER,
    "roberta": ENCODER,
    "xlm-roberta": ENCODER,
    "electra": ENCODER | {"embedding_size": 16},
    "albert": ENCODER | {"embedding_size": 16},
    "distilbert": ENCODER | {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "deberta-v2": ENCODER,
    "mpnet": ENCODER,
    "modernbert": ENCODER | {"cls_token_id": 0, "sep_token_id": 1},
}


def make_model(folder: Path, family: str, **changes: Any) -> Path:
    """Make a random model of a family, with a tokenizer of characters; return its folder."""
    masked = family in MASKED
    settings = dict((MASKED if masked else CAUSAL)[family] | changes)
    config = CONFIG_MAPPING[settings.pop("model_type", family)](**settings)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, with every special token that a causal or a masked model wants."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    special |= {"mask_token": "<mask>"}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [f"Ġ{letter}" for letter in string.ascii_lowercase]  # a label of one token
    known = [*special.values(), *alphabet, *letters]
    merges = [("Ġ", letter) for letter in string.ascii_lowercase]
    tokens = Tokenizer(models.BPE({token: index for index, token in enumerate(known)}, merges))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokens, cls_token="<s>", sep_token="</s>", **special)
