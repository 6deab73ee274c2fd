"""Dialogues: turns as the model's own chat template writes them, of which the assistant's are learned."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from rayml.errors import DataError
from rayml.lm.rows import TokenRow
from rayml.lm.tokens import marked, plain, tokenize
from rayml.tasks.kinds import CHAT

Turns = Sequence[tuple[str, str]]
"""(role, text)."""


def chat_text(tokenizer: Any, turns: Turns, asks: bool = False) -> str:
    """Return turns as the chat template writes them; with `asks`, up to where the assistant's answer begins.

    What looks like a special token in a turn is marked: it is text (`rayml.lm.tokens`).

    Raises:
        DataError: the template refuses them.
    """
    messages = [{"role": role, "content": marked(tokenizer, text)} for role, text in turns]
    template = own_template(tokenizer) or CHAT
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=asks
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the model's chat template refuses a dialogue ({turns[0][1][:60]!r}): {error}") from None


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


def chat_prompt(tokenizer: Any, turns: Turns) -> list[int]:
    """Return the tokens that the assistant's answer to these turns is written behind."""
    return tokenize(tokenizer, chat_text(tokenizer, turns, asks=True), add_special_tokens=False)[0]


def answer_spans(tokenizer: Any, turns: Turns) -> tuple[str, list[tuple[int, int]]]:
    """Return the dialogue's marked text, and each of the assistant's turns, with what ends it, as characters of the
    plain one.

    Templates that mark the assistant's turns (`{% generation %}`) are few, so a turn is what its text adds to the text
    that asks for it.

    Raises:
        DataError: the template writes the beginning of a dialogue otherwise when more follows.
    """
    whole = chat_text(tokenizer, turns)
    found = []
    for position, (role, _) in enumerate(turns):
        if role == "assistant":
            begin, end = (chat_text(tokenizer, turns[: position + more], asks=not more) for more in (0, 1))
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
