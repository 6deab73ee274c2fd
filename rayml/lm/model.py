"""A frozen causal language model with T adapters side by side."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rayml.lm.batch import IGNORE, TaskBatch
from rayml.lm.lora import TaskLoRA
from rayml.meta.adapt import Params


class TaskLM:
    """Scores target tokens under per-task adapters.

    Args:
        module: the causal LM to call; may be the module of a DeepSpeed engine.
        lora: the hooks that were put on that model; None for a model without adapters.
    """

    def __init__(self, module: Any, lora: TaskLoRA | None):
        self.module = module
        self.lora: Any = lora
        self.device = next(module.parameters()).device
        self._positions: Tensor | None = None
        module.get_output_embeddings().register_forward_pre_hook(self._at_targets)

    def _at_targets(self, _head: nn.Module, inputs: tuple[Tensor, ...]):
        """Hand the output layer only the hidden states that predict a target: `[N, L, D]` to `[M, D]`.

        With a vocabulary of 50k to 150k, logits everywhere would be most of the memory and much of the time.
        """
        if self._positions is None:
            return inputs
        (hidden,) = inputs
        return (hidden.flatten(0, 1)[self._positions],)

    def target_logits(self, adapters: Params | None, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Return the logits that predict the target tokens, `[M, V]`, and their places in `batch`, `[M]`.

        Until the next call the model keeps `adapters`, since a checkpointed backward runs parts of the forward anew.
        """
        positions = (batch.targets.flatten() != IGNORE).nonzero().squeeze(1)
        if self.lora is not None:
            self.lora.adapters = adapters
        self._positions = positions
        try:
            return self.module(input_ids=batch.tokens, use_cache=False).logits, positions
        finally:
            self._positions = None

    @torch.no_grad()
    def target_inputs(self, batch: TaskBatch) -> Params:
        """Return what each adapted linear of the bare base sees at the target positions, `[M, in]` in fp32."""
        positions = (batch.targets.flatten() != IGNORE).nonzero().squeeze(1)
        seen: Params = {}

        def keep(name: str):
            def hook(_linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                seen[name] = inputs[0].flatten(0, 1)[positions].float()

            return hook

        hooks = [linear.register_forward_pre_hook(keep(name)) for name, linear in self.lora.linears.items()]
        try:
            self.target_logits(None, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def losses(self, adapters: Params | None, batch: TaskBatch) -> Tensor:
        """Return each task's mean loss over its target tokens, `[T]` in fp32: length and padding do not weigh."""
        logits, positions = self.target_logits(adapters, batch)
        task = positions // (batch.tokens.numel() // batch.tasks)
        logits = only_choices(logits.float(), task, batch.choices)
        tokens = nn.functional.cross_entropy(logits, batch.targets.flatten()[positions], reduction="none")
        total = torch.zeros(batch.tasks, device=tokens.device).index_add(0, task, tokens)
        return total / torch.bincount(task, minlength=batch.tasks)


def only_choices(logits: Tensor, task: Tensor, choices: Sequence[Sequence[int]]) -> Tensor:
    """Return `[M, V]` logits without the tokens that are no choice in their task, `task` being `[M]`."""
    if not any(choices):
        return logits
    allowed = torch.zeros(len(choices), logits.shape[-1], dtype=torch.bool, device=logits.device)
    for t, tokens in enumerate(choices):
        allowed[t, list(tokens) or slice(None)] = True
    return logits.masked_fill(~allowed[task], -torch.inf)
