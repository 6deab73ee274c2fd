"""Task-batched soft prompts: T tasks' learned embeddings in front of their rows (Lester et al. 2021, arXiv 2104.08691).

A row begins with P *soft tokens*, `SOFT`, `SOFT + 1`, ..., for which the embedding layer returns the task's own
`[P, d]`. Wherever rows are batched, packed, masked, scored and cached, they are tokens like any other. No logit belongs
to them, so they are never generated.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rayml.algorithms.inner_loop import Params
from rayml.lm.rows import SOFT

PROMPT = "prompt"


class TaskPrompt:
    """Hooks on the input embeddings of `model`, and the prompts that they currently insert.

    Args:
        model: a causal LM whose parameters are, or will be, frozen.
        tokens: P.
    """

    def __init__(self, model: Any, tokens: int):
        self.tokens = tokens
        self.embeddings = model.get_input_embeddings()
        self.adapters: Params | None = None
        self.linears: dict[str, nn.Linear] = {}  # none is adapted
        self._indices: Tensor | None = None
        self.embeddings.register_forward_pre_hook(self._replace_tokens)
        self.embeddings.register_forward_hook(self._insert_prompts)

    def _replace_tokens(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Remember the index of each soft token, -1 for other tokens, and look up token 0 in their place."""
        (ids,) = inputs
        is_soft = ids >= SOFT
        self._indices = torch.where(is_soft, ids - SOFT, -1) if is_soft.any() else None
        return (ids.masked_fill(is_soft, 0),)

    def _insert_prompts(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self._indices is None:
            return output
        if self.adapters is None or PROMPT not in self.adapters:
            raise ValueError("rows with soft tokens need a prompt")
        prompts, indices = self.adapters[PROMPT].to(output.dtype), self._indices
        tasks = torch.arange(len(prompts), device=output.device).repeat_interleave(len(output) // len(prompts))
        learned = prompts[tasks.unsqueeze(1), indices.clamp(min=0)]
        return torch.where((indices >= 0).unsqueeze(-1), learned, output)

    def begin(self, adapters: Params | None) -> None:
        """Insert these prompts, `[T, P, d]`, in the next forward."""
        self.adapters = adapters

    def untrained_start(self, seed: int) -> Params:
        """Return random embeddings `[P, d]` in fp32 with the standard deviation of the vocabulary's."""
        sample = self._look_up(torch.arange(min(1000, self.embeddings.num_embeddings)))
        generator = torch.Generator().manual_seed(seed)
        return {PROMPT: torch.randn(self.tokens, sample.shape[1], generator=generator) * sample.std().cpu()}

    def start_from(self, tokens: Sequence[int], seed: int) -> Params:
        """Return the embeddings of randomly chosen `tokens`, which are closer to what the model knows than noise."""
        generator = torch.Generator().manual_seed(seed)
        candidates = torch.tensor(sorted({token for token in tokens if token < SOFT}))
        chosen = torch.randint(len(candidates), (self.tokens,), generator=generator)
        return {PROMPT: self._look_up(candidates[chosen])}

    @torch.no_grad()
    def _look_up(self, tokens: Tensor) -> Tensor:
        return self.embeddings(tokens.to(next(self.embeddings.parameters()).device)).float().cpu()
