"""Task-batched soft prompts: T tasks' learned embeddings in front of their rows (Lester et al. 2021, arXiv 2104.08691).

A row begins with P *soft tokens*, `SOFT`, `SOFT + 1`, ...; what the embeddings give for them is the task's own
`[P, d]`. So they are tokens like others wherever rows are laid, packed, masked, scored and cached, and nothing there
knows of them. No logit belongs to one, so none is ever written.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rayml.algorithms.inner_loop import Params
from rayml.lm.rows import SOFT

PROMPT = "prompt"


class TaskPrompt:
    """Hooks on the input embeddings of `model`, and the prompts that they put in at the moment.

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
        self.embeddings.register_forward_pre_hook(self._note)
        self.embeddings.register_forward_hook(self._put)

    def _note(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Note where soft tokens stand, and which, -1 elsewhere; look up any token in their place."""
        (ids,) = inputs
        soft = ids >= SOFT
        self._indices = torch.where(soft, ids - SOFT, -1) if soft.any() else None
        return (ids.masked_fill(soft, 0),)

    def _put(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self._indices is None:
            return output
        if self.adapters is None or PROMPT not in self.adapters:
            raise ValueError("rows with soft tokens need a prompt")
        prompts, indices = self.adapters[PROMPT].to(output.dtype), self._indices
        tasks = torch.arange(len(prompts), device=output.device).repeat_interleave(len(output) // len(prompts))
        found = prompts[tasks.unsqueeze(1), indices.clamp(min=0)]
        return torch.where((indices >= 0).unsqueeze(-1), found, output)

    def begin(self, adapters: Params | None) -> None:
        """Put in these prompts, `[T, P, d]`, in the forward that comes."""
        self.adapters = adapters

    def untrained_start(self, seed: int) -> Params:
        """Return embeddings `[P, d]` in fp32 that are as long as the vocabulary's, in random directions."""
        some = self.looked_up(torch.arange(min(1000, self.embeddings.num_embeddings)))
        generator = torch.Generator().manual_seed(seed)
        return {PROMPT: torch.randn(self.tokens, some.shape[1], generator=generator) * some.std().cpu()}

    def start_from(self, tokens: Sequence[int], seed: int) -> Params:
        """Return the embeddings of some of these tokens, which come nearer to what the model knows than random ones."""
        generator = torch.Generator().manual_seed(seed)
        known = torch.tensor(sorted({token for token in tokens if token < SOFT}))
        chosen = torch.randint(len(known), (self.tokens,), generator=generator)
        return {PROMPT: self.looked_up(known[chosen])}

    @torch.no_grad()
    def looked_up(self, tokens: Tensor) -> Tensor:
        return self.embeddings(tokens.to(next(self.embeddings.parameters()).device)).float().cpu()
