"""A server whose answers come from vLLM, on the CPU; and the tiny model in a shape that its kernels take."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from serving_process import Server
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from rayml.lm.catalog import resolve_model

BESIDE = Path(sys.prefix) / "vllm"
"""Where `make .venv/.vllm` puts vLLM: on nobody's path but these servers'."""
NEEDED = pytest.mark.skipif(
    not (BESIDE / "vllm").is_dir() and find_spec("vllm") is None,
    reason="vLLM is not there: `make .venv/.vllm`",
)
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tiny_for_vllm(folder: Path) -> str:
    """Write the tiny model with heads of 32, the smallest that vLLM has kernels for on a CPU, and a chat template."""
    config = AutoConfig.from_pretrained(resolve_model("tiny"))
    config.head_dim = 32
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("tiny"))
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return str(folder)


class VllmServer(Server):
    """`rayml serve RUN engine=vllm`."""

    deployment = "Answerer"
    start_seconds = 900
    forks = False  # vLLM is on their path alone

    def __init__(self, run: Path | str, *settings: str, **more):
        path = [str(BESIDE), os.environ.get("PYTHONPATH", "")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
            super().__init__(run, "engine=vllm", *settings, **more)
