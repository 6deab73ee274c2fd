"""Dialogues: turns as the model's own chat template writes them, of which the assistant's are learned."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from rayml.errors import DataError
from rayml.lm.rows import TokenRow
from rayml.lm.tokens import marked, plain, tokenize
from rayml.tasks.kinds import CHAT

Turns = Sequence[tuple[str, str]]
"""(role, text)."""
ANSWERS = {"enable_thinking": False}
"""The template's own way to have learned turns answered at once: an empty thought then stands in what asks for them."""


def chat_text(tokenizer: Any, turns: Turns, asks: bool = False, **arguments: bool) -> str:
    """Return turns as the chat template writes them; with `asks`, up to where the assistant's answer begins.

    What looks like a special token in a turn is marked: it is text (`rayml.lm.tokens`).

    Args:
        arguments: of the template.

    Raises:
        DataError: the template refuses them, or leaves out what a turn says.
    """
    template = own_template(tokenizer) or CHAT
    said = [(role, marked(tokenizer, text)) for role, text in turns]
    try:
        text = rendered(tokenizer, template, said, takes_parts(tokenizer, template), asks, arguments)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the model's chat template refuses a dialogue ({turns[0][1][:60]!r}): {error}") from None
    if lost := left_out(text, said, asks):
        raise DataError(
            f"the model's chat template leaves out what the {lost[0]} says ({plain(lost[1])[:60]!r}); use another "
            "template, or rows of input and target"
        )
    return text


def rendered(
    tokenizer: Any, template: str, turns: Turns, in_parts: bool, asks: bool, arguments: dict[str, bool]
) -> str:
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text} for role, text in turns
    ]
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=asks, **arguments
    )


@lru_cache(maxsize=16)
def takes_parts(tokenizer: Any, template: str) -> bool:
    """Return whether a template reads a turn's content in parts, as those of models that see images do."""
    turns = [("user", "\ufdd4"), ("assistant", "\ufdd5")]
    for in_parts in (False, True):
        try:
            if not left_out(rendered(tokenizer, template, turns, in_parts, False, {}), turns, False):
                return in_parts
        except (TemplateError, TypeError, ValueError):  # such as a template that takes the first part of a text
            continue
    return False


def left_out(text: str, turns: Turns, asks: bool) -> tuple[str, str] | None:
    """Return the first turn whose text does not stand in a rendered dialogue, in its place.

    Where an answer is asked for, what the assistant thought before earlier ones may be gone, as templates have it.
    """
    place = 0
    for role, said in turns:
        kept = said.rpartition("</think>")[2] if asks and role == "assistant" else said
        found = text.find(kept.strip(), place)
        if found < 0:
            return role, said
        place = found + len(kept.strip())
    return None


def own_template(tokenizer: Any) -> str | None:
    """Return the model's chat template: of several that called `default`, as transformers takes it.

    Raises:
        DataError: there are several, and none is called so.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict) and len(template) == 1:
        return next(iter(template.values()))
    if isinstance(template, dict) and "default" not in template:
        raise DataError(
            f"the model has chat templates {', '.join(template)}, and none is called default; rename one in its folder"
        )
    return template["default"] if isinstance(template, dict) else template


def chat_prompt(tokenizer: Any, turns: Turns, **arguments: bool) -> list[int]:
    """Return the tokens that the assistant's answer to these turns is written behind."""
    return tokenize(tokenizer, chat_text(tokenizer, turns, asks=True, **arguments), add_special_tokens=False)[0]


def answer_spans(tokenizer: Any, turns: Turns) -> tuple[str, list[tuple[int, int]]]:
    """Return the dialogue's marked text, and each of the assistant's turns, with what ends it, as characters of the
    plain one.

    Templates that mark the assistant's turns (`{% generation %}`) are few, so a turn is what its text adds to the text
    that asks for it.

    Raises:
        DataError: the template writes the beginning of a dialogue otherwise when more follows.
    """
    whole = chat_text(tokenizer, turns, **ANSWERS)
    found = []
    for position, (role, _) in enumerate(turns):
        if role == "assistant":
            begin, end = (chat_text(tokenizer, turns[: position + more], not more, **ANSWERS) for more in (0, 1))
            if not (whole.startswith(begin) and whole.startswith(end)):
                raise DataError(
                    "the model's chat template changes earlier turns when later ones follow, so the assistant's "
                    f"cannot be told: {turns[0][1][:60]!r}; use rows of input and target"
                )
            found.append((len(plain(begin)), len(plain(end.rstrip()))))
    return whole, found


def chat_row(tokenizer: Any, turns: Turns, max_tokens: int) -> TokenRow:
    """Return a dialogue's row, whose targets are the assistant's turns; a long one loses its beginning.

    Raises:
        DataError: as above, or the last turn alone is too long.
    """
    text, spans = answer_spans(tokenizer, turns)
    if not own_template(tokenizer):  # whose own would end a turn with a token that a text ends with
        text += tokenizer.eos_token
        spans[-1] = spans[-1][0], len(plain(text))
    tokens, offsets = tokenize(tokenizer, text, add_special_tokens=False)
    said = [any(first < stop and last > start for start, stop in spans) for first, last in offsets]
    if not any(said):
        raise DataError(f"the model's chat template leaves no token to learn of {turns[-1][1][:60]!r}")
    last = max(position for position, mine in enumerate(said) if mine)
    tokens, said = tokens[: last + 1], said[: last + 1]
    cut = max(0, len(tokens) - max_tokens)
    begins = next(
        position for position, (first, end) in enumerate(offsets) if first < spans[-1][1] and end > spans[-1][0]
    )
    if cut >= begins:
        raise DataError(
            f"the assistant's turn {turns[-1][1][:60]!r} leaves no room for what it answers within "
            f"data.max_tokens={max_tokens}; raise it or shorten the turn"
        )
    tokens, said = tokens[cut:], said[cut:]
    start = next(position for position in range(1, len(said)) if said[position])
    loss_masked = tuple(position for position in range(start, len(said)) if not said[position])
    return TokenRow(tokens, start, loss_masked)
