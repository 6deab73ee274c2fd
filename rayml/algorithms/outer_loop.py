"""The outer loop's state: the shared start, the inner rates, the outer optimizer over both, and the step."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor

from rayml.algorithms.inner_loop import Params
from rayml.algorithms.prototypes import is_readout
from rayml.errors import RunError

OPTIMIZERS: dict[str, Any] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def outer_schedule(kind: str, warmup_steps: int, steps: int) -> Callable[[int], float]:
    """Return the factor on the outer rates at each step 0, 1, ...: linear warm-up, then constant, or cosine to 0."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if kind == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))

    return factor


def initial_log_inner_lrs(
    start: Params, lr: float, modules: Sequence[str], per_weight: bool, factors: Mapping[str, float] | None = None
) -> Params:
    """Return the logarithm of the inner rate of each tensor that the inner loop changes: those of the adapter alone.

    Args:
        modules: patterns of those tensors' names; () for all.
        per_weight: one rate for each weight, as in Meta-SGD, instead of one for each tensor.
        factors: by name, what `lr` is multiplied by for some tensors.
    """
    log_rates = {}
    for name, weight in start.items():
        if is_readout(name) or (modules and not any(fnmatchcase(name, pattern) for pattern in modules)):
            continue
        log_rate = math.log(lr * (factors or {}).get(name, 1.0))
        log_rates[name] = torch.full(weight.shape if per_weight else (), log_rate, device=weight.device)
    return log_rates


class Learner:
    """What meta-training learns, held whole by every worker.

    Args:
        start: the shared start, fp32, `[...]` each; changed in place.
        log_inner_lrs: the logarithms of the inner rates, so that the rates stay positive; changed in place.
        learn_rates: whether the inner rates are learned, too.
        optimizer: name of the outer optimizer.
        lr: outer rate of the start.
        lr_of_inner_lr: outer rate of the logarithms: of the inner rates, and of the readout's factors in the start.
        schedule: returns the factor on both outer rates at each step.
        clip_norm: largest gradient norm, for the adapter, the readout and the rates each; 0 does not clip.
    """

    def __init__(
        self,
        start: Params,
        log_inner_lrs: Params,
        *,
        learn_rates: bool,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        lr: float,
        lr_of_inner_lr: float,
        weight_decay: float,
        clip_norm: float,
        schedule: Callable[[int], float],
    ):
        self.start, self.log_inner_lrs = start, log_inner_lrs
        self.clip_norm, self.schedule = clip_norm, schedule
        readout = {name: log for name, log in start.items() if is_readout(name)}
        adapter = {name: weight for name, weight in start.items() if name not in readout}
        self.groups = [(adapter, lr, weight_decay)]
        self.groups += [(logs, lr_of_inner_lr, 0.0) for logs in (readout, log_inner_lrs if learn_rates else {}) if logs]
        self.optimizer = OPTIMIZERS[optimizer](
            [{"params": list(params.values()), "weight_decay": decay} for params, _, decay in self.groups]
        )
        self.step = 0

    @property
    def inner_lrs(self) -> Params:
        """The inner rates of the tensors that the inner loop changes: a scalar each, or one rate for each weight."""
        return {name: log_rate.exp() for name, log_rate in self.log_inner_lrs.items()}

    def update(self, start_gradient: Params, rate_gradient: Params) -> float:
        """Take one outer step on the mean meta-gradient over the tasks; return the start's gradient norm.

        `rate_gradient` may be empty where the rates are not learned.
        """
        # The optimizer changes log(rate), and d loss / d log(rate) = rate * d loss / d rate.
        log_rate_gradient = {name: g * self.log_inner_lrs[name].exp() for name, g in rate_gradient.items()}
        norms = []
        for (params, lr, _), group in zip(self.groups, self.optimizer.param_groups, strict=True):
            gradients = log_rate_gradient if params is self.log_inner_lrs else start_gradient
            group["lr"] = lr * self.schedule(self.step)
            for name, param in params.items():
                param.grad = gradients[name]
            norms.append(float(torch.nn.utils.clip_grad_norm_(params.values(), self.clip_norm or math.inf)))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return norms[0]

    def warm_start(self, start: Params, log_inner_lrs: Params) -> None:
        """Begin at what another run learned. What it did not learn stays where an untrained start is."""
        for params, learned in ((self.start, start), (self.log_inner_lrs, log_inner_lrs)):
            for name in params.keys() & learned.keys():
                params[name].copy_(learned[name])

    def _named_params(self) -> dict[str, Tensor]:
        """Return the start and the rates' logarithms by their names in a checkpoint."""
        params = {f"start/{name}": weight for name, weight in self.start.items()}
        return params | {f"log_rate/{name}": log_rate for name, log_rate in self.log_inner_lrs.items()}

    def state(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on, except `step`, as flat named tensors."""
        tensors = self._named_params()
        for name, param in list(tensors.items()):
            tensors |= {f"{key}/{name}": value for key, value in self.optimizer.state.get(param, {}).items()}
        return tensors

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        """Take over what `state` returned after `step` steps.

        Raises:
            RunError: it lacks something that is learned here.
        """
        missing = sorted(f"start/{name}" for name in self.start if f"start/{name}" not in tensors)
        if missing:
            raise RunError(
                f"the checkpoint has no {', '.join(missing[:3])}: its run did not learn that yet, and cannot be "
                "resumed; begin a new run with what it learned (--continue RUN, another run.dir)"
            )
        self.step = step
        for name, param in self._named_params().items():
            param.copy_(tensors[name])
            saved = {key: tensors.get(f"{key}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            moments = {k: v.to("cpu" if k == "step" else param.device) for k, v in saved.items() if v is not None}
            if moments:
                self.optimizer.state[param] = moments


DECAY = 0.9
"""Of the running mean of gains, for each outer step."""
MOST = 4.0
"""A task's weight is at most this, and at least one over this, before all are scaled to a mean of 1."""


class RecentGains:
    """A running mean of each task's gain: its support loss before adapting minus its query loss after.

    Args:
        tasks: how many there are. All start with a gain of 0, and so with the same weight.
    """

    def __init__(self, tasks: int, device: torch.device | None = None):
        self.gains = torch.zeros(tasks, device=device)

    def weights(self) -> Tensor:
        """Return a weight for each task, `[tasks]`, 1 on average: a factor e for each nat gained less than the mean."""
        raw = (self.gains.mean() - self.gains).exp().clamp(1 / MOST, MOST)
        return raw / raw.mean()

    def by_task(self, task_indices: Tensor, gains: Tensor) -> list[Tensor]:
        """Return sum and number of the gains of some episodes, `[episodes]`, by their tasks: `[tasks]` each."""
        sums, counts = torch.zeros(2, len(self.gains), device=gains.device)
        ones = torch.ones(len(gains), device=gains.device)
        return [sums.index_add_(0, task_indices, gains.float()), counts.index_add_(0, task_indices, ones)]

    def update(self, sums: Tensor, counts: Tensor) -> None:
        """Add the gains of one outer step over all workers: their sum and number by task, `[tasks]` each."""
        new = DECAY * self.gains + (1 - DECAY) * sums / counts.clamp(min=1)
        self.gains = torch.where(counts > 0, new, self.gains)


class StepTimer:
    """Seconds by phase: each call adds the time since the call before to its phase.

    On a GPU it waits for the work that was queued meanwhile.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.begin()

    def begin(self) -> None:
        """Forget all seconds; the first phase begins here."""
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def __call__(self, phase: str) -> None:
        now = self._now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def record(self) -> dict[str, float]:
        """Return the phases for `metrics.jsonl`."""
        return {f"{phase}_seconds": seconds for phase, seconds in self.seconds.items()}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
