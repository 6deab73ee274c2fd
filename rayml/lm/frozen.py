"""The frozen layers below the first adapted one: what they make of a batch depends on its tokens alone.

So it is computed once for each batch, however many inner steps and scorings follow: with adapters in the last 10 of 30
layers, every forward after the first runs 10.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class FrozenLayers:
    """The first `count` decoder layers of a causal LM, which are skipped where their output is known."""

    def __init__(self, model: Any, count: int):
        self.slot: list[Tensor] | None = None
        layers = decoder_layers(model)[:count]
        for place, layer in enumerate(layers):
            layer.forward = self._skippable(layer.forward, is_first=place == 0)
        layers[-1].register_forward_hook(self._keep)

    def _skippable(self, forward: Any, is_first: bool) -> Any:
        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.slot:
                return forward(hidden_states, *args, **kwargs)
            # The first gives what is known, so that every layer above has it as its input, and a checkpointed
            # backward finds it there.
            return self.slot[0] if is_first else hidden_states

        return run

    def _keep(self, _layer: nn.Module, _inputs: Any, output: Any) -> None:
        if self.slot is not None and not self.slot and isinstance(output, Tensor):
            self.slot.append(output.detach())

    @contextmanager
    def known(self, slot: list[Tensor] | None) -> Iterator[None]:
        """Take the layers' output from `slot` inside the block, or put it there; None computes it and forgets it."""
        self.slot = slot
        try:
            yield
        finally:
            self.slot = None


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the decoder layers of a causal LM, in order."""
    count = model.config.num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
