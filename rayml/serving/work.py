"""What waits for the model: queries to classify, texts to write, adapters to learn."""

from collections.abc import Callable
from concurrent.futures import Future

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
    """A request to adapt; its result are the weights, and the losses on the way."""

    def __init__(self, request: AdaptationRequest, steps: int):
        self.request, self.steps = request, steps
        self.learned: Future[tuple[Params, Losses]] = Future()
