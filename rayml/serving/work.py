"""What waits for the model: queries to classify, texts to write, adapters to learn."""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

from torch import Tensor

from rayml.adaptation import AdaptationRequest, Losses
from rayml.algorithms.inner_loop import Params
from rayml.lm.generate import Generation
from rayml.lm.queries import Query
from rayml.lm.sampling import Piece


class Waiting:
    """A query whose options are to be scored, and what comes of it, their log-probabilities `[options]`."""

    def __init__(self, query: Query):
        self.query = query
        self.answer: Future[Tensor] = Future()


class Writing(Generation):
    """A text in the making that somebody waits for, piece by piece."""

    cancelled = False
    error: Exception | None = None

    def take(self, logits: Tensor) -> None:
        try:
            super().take(logits)
        except Exception as error:  # this text's own trouble, and no other's
            self.error, self.finish_reason = error, "error"

    def send_to(self, receive: Callable[[Piece | Exception], None]) -> "Writing":
        self.receive = receive
        return self


class Adaptation:
    """A request to adapt; its result are the weights, and the losses on the way.

    Args:
        owner: whose turn it takes.
    """

    def __init__(self, request: AdaptationRequest, steps: int, owner: str = ""):
        self.request, self.steps, self.owner = request, steps, owner
        self.steps_taken = 0
        self.learned: Future[tuple[Params, Losses]] = Future()


def settle(future: Future, result: Any) -> None:
    """Give a result, or an error, to whoever still waits for it."""
    with contextlib.suppress(InvalidStateError):  # cancelled: nobody does
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
