"""How tokens are sampled, and the pieces of text that come of it. Without torch, for the server's gateway."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    max_tokens: int
    temperature: float = 0.0
    """0 chooses the most probable token."""
    top_p: float = 1.0
    """Sample among the fewest tokens that have this probability together (Holtzman et al. 2019)."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Texts that end the answer, and are not part of it."""
    logprobs: int | None = None
    """Return each token's log-probability, and those of this many most probable tokens; None returns neither."""
    fits_context: bool = False
    """`max_tokens` is a default, and is lowered if the context has no room for all of them."""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A chosen token and its alternatives, with log-probabilities before temperature and top_p."""

    text: str
    logprob: float
    top: list[tuple[str, float]]


@dataclass(slots=True)
class Piece:
    """The next piece of a text."""

    text: str
    scores: list[TokenScore] = field(default_factory=list)
    tokens: int = 0
    """Tokens of the text so far."""
    finish_reason: str | None = None
    """`stop` for the end of the text, or a stop text; `length` for `max_tokens`."""
