"""What mode full should compute, in plain torch on one process, and what its tests share."""

import torch

from rayml.config import Config
from rayml.lm.batch import TaskBatch, collate
from rayml.lm.load import load_base
from rayml.lm.model import TaskLM

OUTER, TASKS, STEPS, INNER_LR = 4, 3, 2, 0.1
CHOICES = tuple(range(10, 40))


def full_config(**changes) -> Config:
    """A config of mode full, with dotted changes written as `zero__stage=3`."""
    values: dict = {
        "model": {"name": "tiny", "dtype": "float32", "attention": "sdpa"},
        "data": {"path": "none.jsonl"},
        "run": {"dir": "none"},
        "mode": "full",
        "engine": "zero",
        "algorithm": {"name": "fomaml_plus", "start_weight": 0.3},
        "inner": {"lr": INNER_LR, "steps": STEPS},
        "outer": {
            "optimizer": "sgd",
            "lr": 0.5,
            "warmup_steps": 2,
            "clip_norm": 0.5,
            "weight_decay": 0.1,
        },
        "zero": {"stage": 3},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if key == "algorithm__name":
            values["algorithm"] = {}  # the other's settings
        values.setdefault(section, {})[name] = value
    return Config.model_validate(values)


def side(seed: int, rows: int) -> TaskBatch:
    """Rows of one task, of several lengths; every second task's loss is over some choices alone."""
    from test_lora import random_rows

    labels = [[choice] for choice in CHOICES] if seed % 2 else []
    made = random_rows(rows, seed)
    for row in made:
        row.tokens[-1] = CHOICES[row.tokens[-1] % len(CHOICES)]
    return collate([made], pad=1, labels=[labels])


def meta_batch(step: int, rows: int = 4) -> list[tuple[TaskBatch, TaskBatch]]:
    return [(side(100 * step + 2 * t, rows), side(100 * step + 2 * t + 50, rows)) for t in range(TASKS)]


class Reference:
    """FOMAML or Reptile on a whole model, one task after another."""

    def __init__(self, path: str, config: Config, dtype: str = "float32"):
        self.module = load_base(path, dtype).float().requires_grad_(True)
        self.lm, self.config = TaskLM(self.module, None), config
        self.named = dict(self.module.named_parameters())
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[config.outer.optimizer]
        groups = [
            {"params": [w for w in self.named.values() if (w.dim() > 1) == wide], "weight_decay": decay}
            for wide, decay in ((True, config.outer.weight_decay), (False, 0.0))
        ]
        self.outer = kind(groups, lr=config.outer.lr)
        self.losses: list[dict[str, float]] = []
        self.meta_gradients: list[dict[str, torch.Tensor]] = []
        self.inner_norms: list[float] = []
        self.clipped = 0

    @staticmethod
    def norm(gradient: list[torch.Tensor]) -> float:
        return float(torch.stack([g.double().norm() for g in gradient]).norm())

    def gradient(self, batch: TaskBatch) -> tuple[float, list[torch.Tensor]]:
        loss = self.lm.losses(None, batch).sum()
        return loss.item(), list(torch.autograd.grad(loss, list(self.named.values())))

    @torch.no_grad()
    def task(self, support: TaskBatch, query: TaskBatch) -> tuple[list[float], list[torch.Tensor]]:
        """Return the losses and the task's part of the meta-gradient; the weights are restored."""
        weights = list(self.named.values())
        start = [w.clone() for w in weights]
        reptile = self.config.algorithm.name == "reptile"
        losses, first = [], weights
        for step in range(self.config.inner.steps):
            with torch.enable_grad():
                loss, gradient = self.gradient((support, query)[step % 2 if reptile else 0])
            losses.append(loss)
            first = gradient if step == 0 else first
            self.inner_norms.append(self.norm(gradient))
            for weight, g in zip(weights, gradient, strict=True):
                weight -= self.config.inner.lr * g
        if reptile:
            meta = [(before - w) / self.config.inner.lr for before, w in zip(start, weights, strict=True)]
        else:
            with torch.enable_grad():
                loss, meta = self.gradient(query)
            losses.append(loss)
            norm = self.norm(meta)
            if self.config.outer.clip_norm and norm > self.config.outer.clip_norm:
                self.clipped += 1
                meta = [g * self.config.outer.clip_norm / norm for g in meta]
            if self.config.inner.steps:
                meta = [g + self.config.algorithm.start_weight * f for g, f in zip(meta, first, strict=True)]
        for weight, before in zip(weights, start, strict=True):
            weight.copy_(before)
        return losses, meta

    def step(self, episodes: list[tuple[TaskBatch, TaskBatch]]) -> None:
        total = [torch.zeros_like(w) for w in self.named.values()]
        losses = []
        for support, query in episodes:
            found, meta = self.task(support, query)
            losses.append((found[0], found[1] if self.config.algorithm.name == "reptile" else found[-1]))
            total = [t + g / len(episodes) for t, g in zip(total, meta, strict=True)]
        outer_step, warmup = len(self.losses), self.config.outer.warmup_steps
        for group in self.outer.param_groups:
            group["lr"] = self.config.outer.lr * min(1.0, (outer_step + 1) / (warmup + 1))
        for weight, g in zip(self.named.values(), total, strict=True):
            weight.grad = g
        self.outer.step()
        self.meta_gradients.append(dict(zip(self.named, total, strict=True)))
        support_loss, query_loss = (sum(pair[i] for pair in losses) / len(losses) for i in (0, 1))
        norm = self.norm(total)
        self.losses.append({"support_loss": support_loss, "query_loss": query_loss, "gradient_norm": norm})

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: w.detach().clone() for name, w in self.named.items()}


def run_reference(
    path: str, config: Config, rows: int = 4, dtype: str = "float32", outer_steps: int = OUTER
) -> Reference:
    """Return the reference after `outer_steps`; `dtype` rounds the weights before the first."""
    reference = Reference(path, config, dtype)
    for step in range(outer_steps):
        reference.step(meta_batch(step, rows))
    return reference
