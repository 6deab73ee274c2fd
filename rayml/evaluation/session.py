"""A finished run, loaded in this process to adapt and score with."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from rayml.config import Config
from rayml.engine import local, zero
from rayml.evaluation.curves import Scorer
from rayml.lm.depth import rate_factors
from rayml.lm.encode import Encoder
from rayml.lm.load import load_tokenizer, resolve_model
from rayml.lm.lora import linear_kinds
from rayml.lm.model import TaskLM, hooks
from rayml.lm.parameters import trained_parameters
from rayml.lm.precision import Precision, device_for, settled
from rayml.lm.start import untrained_start
from rayml.meta.adapt import Params
from rayml.meta.learner import initial_log_rates
from rayml.runs.checkpoint import read_checkpoint, step_of
from rayml.runs.files import Place, local_copy
from rayml.runs.folder import RunFolder
from rayml.tasks.task import Task


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
    untrained: Params
    """Where training began."""
    precision: Precision
    """What the base runs in here; `config.model` has it, too."""

    @property
    def device(self) -> torch.device:
        return next(iter(self.start.values())).device

    def scorer(self) -> Scorer:
        """Return what scores episodes as the run's own algorithm does."""
        inner = self.config.inner
        return Scorer(self.lm, self.encoder, self.config.algorithm, inner.steps, inner.unfreeze_every)


def open_session(run: RunFolder, which: str | None = None, every_linear: bool = False) -> Session:
    """Load a run's base and its learned start on this machine's GPU, or CPU.

    Args:
        which: the "best" or the "newest" checkpoint; None as `RunFolder.trained` chooses.
        every_linear: let adapters change linears that this run's do not (in mode adapters).

    Raises:
        RunError: no run there, or no such checkpoint in it.
    """
    config, folder = run.trained(which)
    config, precision, lm, encoder, base = load(config, every_linear, run.made_in())
    if lm.adapter:
        untrained = {name: weight.to(lm.device) for name, weight in run.read_untrained().items()}
    else:
        untrained = {n: p.detach().float() for n, p in trained_parameters(lm.module, config.full).items()}
    start, log_rates, step = learned(config, folder, untrained, lm.device)
    rates = {name: rate.exp() for name, rate in log_rates.items()}
    return Session(config, lm, encoder, base, start, rates, step, untrained, precision)


def untrained_session(config: Config, tasks: Sequence[Task]) -> Session:
    """Load a config's base, with the start that training on these tasks would begin from, and its rates."""
    config, precision, lm, encoder, base = load(config)
    start = {name: weight.to(lm.device) for name, weight in untrained_start(config, lm, encoder, tasks).items()}
    factors = rate_factors(lm.module, start, config.inner.layer_decay)
    log_rates = initial_log_rates(start, config.inner.lr, config.inner.modules, per_weight=False, factors=factors)
    rates = {name: rate.exp() for name, rate in log_rates.items()}
    return Session(config, lm, encoder, base, start, rates, 0, start, precision)


def load(
    config: Config, every_linear: bool = False, made_in: str | None = None
) -> tuple[Config, Precision, TaskLM, Encoder, str]:
    """Return the base with its hooks, whole, what encodes for it, and where it was loaded from.

    Before them come the config with the dtype and the attention that it was loaded with, and why those.

    Args:
        made_in: the dtype that a run was trained in.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    base = resolve_model(config.model.name)
    config, precision = settled(config, base, [device_for(config, base, device)], made_in)
    module = local.load(base, config.model.dtype, config.model.attention, device)
    shape = config.lora.shape()
    if every_linear:
        shape |= {"targets": linear_kinds(module), "last_layers": None}
    lm = TaskLM(module, hooks(module, shape if config.mode == "adapters" else {}, config.soft_tokens))
    return config, precision, lm, config.encoder(load_tokenizer(base)), base


def learned(config: Config, folder: Place, names: Iterable[str], device: torch.device) -> tuple[Params, Params, int]:
    """Return the start, the logarithms of its inner rates, and the outer step, of a checkpoint."""
    if config.is_sharded:
        with local_copy(folder) as here:
            step, whole = step_of(folder), zero.consolidate(here)
        start = {name: whole[name].to(device) for name in names}
        return start, initial_log_rates(start, config.inner.lr, config.inner.modules, per_weight=False), step
    saved = read_checkpoint(folder)
    parts = [
        {k.removeprefix(kind): v.to(device) for k, v in saved.tensors.items() if k.startswith(kind)}
        for kind in ("start/", "log_rate/")
    ]
    return parts[0], parts[1], saved.step


def start_of(run: RunFolder) -> tuple[Params, Params]:
    """Return what a run of adapters has learned: its start, and the logarithms of its inner rates; on the CPU."""
    config, folder = run.trained()
    return learned(config, folder, (), torch.device("cpu"))[:2]
