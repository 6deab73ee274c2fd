"""A frozen causal language model with T adapters side by side."""

import torch
from torch import Tensor, nn

from rayml.lm.batch import IGNORE, TaskBatch
from rayml.lm.lora import TaskLoRA
from rayml.meta.adapt import Params


class TaskLM:
    """Scores target tokens under per-task adapters.

    Args:
        module: the causal LM to call; may be the module of a DeepSpeed engine.
        lora: the hooks that were put on that model.
    """

    def __init__(self, module: nn.Module, lora: TaskLoRA):
        self.module, self.lora = module, lora
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
        self.lora.adapters, self._positions = adapters, positions
        try:
            return self.module(input_ids=batch.tokens, use_cache=False).logits, positions
        finally:
            self._positions = None

    def losses(self, adapters: Params | None, batch: TaskBatch) -> Tensor:
        """Return each task's mean loss over its target tokens, `[T]` in fp32: length and padding do not weigh."""
        logits, positions = self.target_logits(adapters, batch)
        tokens = nn.functional.cross_entropy(logits.float(), batch.targets.flatten()[positions], reduction="none")
        task = positions // (batch.tokens.numel() // batch.tasks)
        total = torch.zeros(batch.tasks, device=tokens.device).index_add(0, task, tokens)
        return total / torch.bincount(task, minlength=batch.tasks)
