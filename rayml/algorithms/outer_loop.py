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
    """Return the factor on the outer rates at each step 0, 1, ...: linear warm-up, then constant or cosine to 0."""

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
    """Return the logarithm of `lr` for each tensor that the inner loop changes: of the adapter alone.

    Args:
        modules: patterns of those tensors' names; () for all.
        per_weight: a rate for each weight, as in Meta-SGD, and not one for each tensor.
        factors: on the rates of some tensors.
    """
    adapter = {name: weight for name, weight in start.items() if not is_readout(name)}
    inner = {n: w for n, w in adapter.items() if not modules or any(fnmatchcase(n, pattern) for pattern in modules)}
    logs = {n: math.log(lr * (factors or {}).get(n, 1.0)) for n in inner}
    return {n: torch.full(w.shape if per_weight else (), logs[n], device=w.device) for n, w in inner.items()}


class Learner:
    """What meta-training learns, whole on every worker.

    Args:
        start: the shared start, fp32, `[...]` each; taken over and changed in place.
        log_inner_lrs: the logarithms of the inner rates, so that they stay positive; taken over and changed in place.
        learn_rates: learn them, too.
        optimizer: of the outer loop.
        lr: outer rate of the start.
        lr_of_inner_lr: outer rate of the logarithms: of the rates, and of the readout's factors in the start.
        schedule: factor on both at each step.
        clip_norm: longest gradient of the adapter, of the readout, and of the rates, by its norm; 0 does not clip.
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
        """The inner rates: for each tensor that the inner loop changes, a scalar or one for each weight."""
        return {name: log_rate.exp() for name, log_rate in self.log_inner_lrs.items()}

    def update(self, start_gradient: Params, rate_gradient: Params) -> float:
        """Take one outer step on the mean meta-gradient over the tasks; return the start's gradient norm.

        `rate_gradient` may be empty where the rates are not learned.
        """
        of_log_rates = {name: g * self.log_inner_lrs[name].exp() for name, g in rate_gradient.items()}
        norms = []
        for (params, lr, _), group in zip(self.groups, self.optimizer.param_groups, strict=True):
            gradient = of_log_rates if params is self.log_inner_lrs else start_gradient
            group["lr"] = lr * self.schedule(self.step)
            for name, param in params.items():
                param.grad = gradient[name]
            norms.append(float(torch.nn.utils.clip_grad_norm_(params.values(), self.clip_norm or math.inf)))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return norms[0]

    def begin_at(self, start: Params, log_inner_lrs: Params) -> None:
        """Begin at what was learned before, in place of where an untrained start is; what was not stays there."""
        for own, given in ((self.start, start), (self.log_inner_lrs, log_inner_lrs)):
            for name in own.keys() & given.keys():
                own[name].copy_(given[name])

    def state(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on, but for `step`, as flat named tensors."""
        tensors = {f"start/{name}": w for name, w in self.start.items()}
        tensors |= {f"log_rate/{name}": rate for name, rate in self.log_inner_lrs.items()}
        for kind, params in (("start", self.start), ("log_rate", self.log_inner_lrs)):
            for name, param in params.items():
                tensors |= {f"{key}/{kind}/{name}": v for key, v in self.optimizer.state.get(param, {}).items()}
        return tensors

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        """Take over what `state` returned after `step` steps.

        Raises:
            RunError: it is of something else that was learned.
        """
        lacking = sorted(f"start/{name}" for name in self.start if f"start/{name}" not in tensors)
        if lacking:
            raise RunError(
                f"the checkpoint has no {', '.join(lacking[:3])}: it is of a run from before that was learned, and "
                "cannot be gone on with; begin a new run with what it learned (--continue RUN, another run.dir)"
            )
        self.step = step
        for kind, params in (("start", self.start), ("log_rate", self.log_inner_lrs)):
            for name, param in params.items():
                param.copy_(tensors[f"{kind}/{name}"])
                saved = {key: tensors.get(f"{key}/{kind}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
                moments = {k: v.to("cpu" if k == "step" else param.device) for k, v in saved.items() if v is not None}
                if moments:
                    self.optimizer.state[param] = moments


MEMORY = 0.9
MOST = 4.0
"""No task weighs more than this many times, or less than one in this many, before weights are scaled to a mean of 1."""


class RecentGains:
    """A running mean of each task's gain, its support loss before adapting minus its query loss after.

    Args:
        tasks: how many there are. All start at no gain, and weigh the same.
    """

    def __init__(self, tasks: int, device: torch.device | None = None):
        self.gains = torch.zeros(tasks, device=device)

    def weights(self) -> Tensor:
        """Return a weight for each task, `[tasks]`, 1 on average: a factor e for each nat gained less than the mean."""
        raw = (self.gains.mean() - self.gains).exp().clamp(1 / MOST, MOST)
        return raw / raw.mean()

    def update(self, sums: Tensor, counts: Tensor) -> None:
        """Add the gains of one outer step over all workers: their sum and number by task, `[tasks]` each."""
        new = MEMORY * self.gains + (1 - MEMORY) * sums / counts.clamp(min=1)
        self.gains = torch.where(counts > 0, new, self.gains)


class StepTimer:
    """Seconds by phase: each call adds what has passed since the one before to its phase.

    On a GPU it waits for the work that was queued meanwhile.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.begin()

    def begin(self) -> None:
        """Forget all seconds; the next phase begins here."""
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
