"""A finished run, loaded in this process to adapt and score with."""

from dataclasses import dataclass

import torch

from rayml.config import Config
from rayml.engine import local
from rayml.lm.encode import Encoder
from rayml.lm.load import load_tokenizer, resolve_model
from rayml.lm.lora import TaskLoRA
from rayml.lm.model import TaskLM
from rayml.meta.adapt import Params
from rayml.runs.checkpoint import Saved
from rayml.runs.folder import RunFolder


@dataclass(frozen=True)
class Session:
    """The base with its hooks, and what the run learned."""

    config: Config
    lm: TaskLM
    encoder: Encoder
    base: str
    """Where the base was loaded from."""
    start: Params
    rates: Params
    step: int

    @property
    def device(self) -> torch.device:
        return next(iter(self.start.values())).device


def open_session(run: RunFolder) -> Session:
    """Load a run's base and its learned start on this machine's GPU, or CPU.

    Raises:
        RunError: no run there, or no whole checkpoint in it.
    """
    config, saved = run.trained()
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    base = resolve_model(config.model.name)
    module = local.load(base, config.model.dtype, config.model.attention, device)
    lm = TaskLM(module, TaskLoRA(module, **config.lora.shape()))
    encoder = config.data.encoder(load_tokenizer(base))
    learned = {kind: _part(saved, kind, device) for kind in ("start", "log_rate")}
    rates = {name: rate.exp() for name, rate in learned["log_rate"].items()}
    return Session(config, lm, encoder, base, learned["start"], rates, saved.step)


def _part(saved: Saved, kind: str, device: torch.device) -> Params:
    prefix = f"{kind}/"
    return {k.removeprefix(prefix): v.to(device) for k, v in saved.tensors.items() if k.startswith(prefix)}
