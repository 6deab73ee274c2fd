"""What is asked of a text in the making, and what comes of it. Knows no torch: the server's gateway uses it."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    max_tokens: int
    temperature: float = 0.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    """Sample among the fewest tokens that have this much probability together (Holtzman et al. 2019)."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Texts that end the answer, and are no part of it."""
    logprobs: int | None = None
    """Give each token's log-probability, and this many of the most probable tokens' beside it."""
    shrinks: bool = False
    """Nobody asked for `max_tokens`: fewer, where the context has no room for all of them."""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token that was chosen, and what might have been; log-probabilities before temperature and top_p."""

    text: str
    logprob: float
    top: list[tuple[str, float]]


@dataclass(slots=True)
class Piece:
    """What a text grew by."""

    text: str
    scores: list[TokenScore] = field(default_factory=list)
    tokens: int = 0
    """Tokens so far."""
    finish_reason: str | None = None
    """`stop`: the end of the text, or a stop text. `length`: max_tokens."""
