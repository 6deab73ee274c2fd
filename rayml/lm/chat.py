"""Dialogues, written by the model's own chat template; the assistant's turns are the targets."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from rayml.errors import DataError
from rayml.lm.rows import TokenRow, cut_left
from rayml.lm.tokens import mark_specials, remove_marks, tokenize
from rayml.tasks.kinds import CHAT

Turns = Sequence[tuple[str, str]]
"""(role, text)."""
ANSWERS = {"enable_thinking": False}
"""Template arguments for answers without a thought: where the template knows thoughts, an empty one precedes them."""


def chat_text(tokenizer: Any, turns: Turns, asks: bool = False, **arguments: bool) -> str:
    """Return turns as the chat template writes them, with special tokens that were typed marked (`rayml.lm.tokens`).

    Args:
        asks: end the text where the assistant's next answer begins.
        arguments: of the template.

    Raises:
        DataError: the template refuses the turns, or leaves out the text of one.
    """
    template = own_template(tokenizer) or CHAT
    marked_turns = [(role, mark_specials(tokenizer, text)) for role, text in turns]
    try:
        text = render(tokenizer, template, marked_turns, takes_parts(tokenizer, template), asks, arguments)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the model's chat template refuses a dialogue ({turns[0][1][:60]!r}): {error}") from None
    if missing := first_missing(text, marked_turns, asks):
        role, said = missing[0], remove_marks(missing[1])[:60]
        raise DataError(
            f"the model's chat template leaves out what the {role} says ({said!r}); use another template, or rows of "
            "input and target"
        )
    return text


def render(tokenizer: Any, template: str, turns: Turns, in_parts: bool, asks: bool, arguments: dict[str, bool]) -> str:
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text} for role, text in turns
    ]
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=asks, **arguments
    )


@lru_cache(maxsize=16)
def takes_parts(tokenizer: Any, template: str) -> bool:
    """Return whether a template expects a turn's content in parts, as those of models that see images do."""
    turns = [("user", "\ufdd4"), ("assistant", "\ufdd5")]
    for in_parts in (False, True):
        try:
            if not first_missing(render(tokenizer, template, turns, in_parts, False, {}), turns, False):
                return in_parts
        except (TemplateError, TypeError, ValueError):  # the template may index into a text as if it were parts
            continue
    return False


def first_missing(text: str, turns: Turns, asks: bool) -> tuple[str, str] | None:
    """Return the first turn whose text is missing from a rendered dialogue, or out of order.

    If an answer is asked for, templates may drop the thoughts before the assistant's earlier answers.
    """
    end = 0
    for role, said in turns:
        expected = said.rpartition("</think>")[2] if asks and role == "assistant" else said
        begin = text.find(expected.strip(), end)
        if begin < 0:
            return role, said
        end = begin + len(expected.strip())
    return None


def own_template(tokenizer: Any) -> str | None:
    """Return the model's chat template; of several, the one called `default`, as in transformers.

    Raises:
        DataError: there are several, and none is called `default`.
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
    """Return the prompt tokens for generating the assistant's answer to these turns."""
    return tokenize(tokenizer, chat_text(tokenizer, turns, asks=True, **arguments), add_special_tokens=False)[0]


def answer_spans(tokenizer: Any, turns: Turns) -> tuple[str, list[tuple[int, int]]]:
    """Return the dialogue's marked text, and the span of each of the assistant's turns in the plain text.

    A span includes what ends the turn. Few templates mark the assistant's turns (`{% generation %}`), so a turn is what
    it adds to the text that asks for it.

    Raises:
        DataError: the template writes the beginning of a dialogue differently when more turns follow.
    """
    whole = chat_text(tokenizer, turns, **ANSWERS)
    spans = []
    for position, (role, _) in enumerate(turns):
        if role == "assistant":
            begin, end = (chat_text(tokenizer, turns[: position + more], not more, **ANSWERS) for more in (0, 1))
            if not (whole.startswith(begin) and whole.startswith(end)):
                raise DataError(
                    "the model's chat template changes earlier turns when later ones follow, so the assistant's "
                    f"turns cannot be located: {turns[0][1][:60]!r}; use rows of input and target"
                )
            spans.append((len(remove_marks(begin)), len(remove_marks(end.rstrip()))))
    return whole, spans


def chat_row(tokenizer: Any, turns: Turns, max_tokens: int) -> TokenRow:
    """Return a dialogue's row, whose targets are the assistant's turns; a long dialogue loses its beginning.

    Raises:
        DataError: as in `answer_spans`, or the last turn alone is too long.
    """
    text, spans = answer_spans(tokenizer, turns)
    if not own_template(tokenizer):  # a model's own template ends a turn with a token that ends the text
        text += tokenizer.eos_token
        spans[-1] = spans[-1][0], len(remove_marks(text))
    tokens, offsets = tokenize(tokenizer, text, add_special_tokens=False)
    is_target = [any(first < stop and last > start for start, stop in spans) for first, last in offsets]
    if not any(is_target):
        raise DataError(f"the model's chat template leaves no token to learn from {turns[-1][1][:60]!r}")
    last = max(position for position, targeted in enumerate(is_target) if targeted)
    tokens, is_target = tokens[: last + 1], is_target[: last + 1]
    cut = max(0, len(tokens) - max_tokens)
    start, stop = spans[-1]
    last_turn = next(position for position, (first, end) in enumerate(offsets) if first < stop and end > start)
    if cut >= last_turn:
        raise DataError(
            f"the assistant's turn {turns[-1][1][:60]!r} leaves no room for what it answers within "
            f"data.max_tokens={max_tokens}; raise it or shorten the turn"
        )
    tokens, is_target = cut_left(tokenizer, tokens, max_tokens), is_target[cut:]
    start = next(position for position in range(1, len(tokens)) if is_target[position])
    loss_masked = tuple(position for position in range(start, len(tokens)) if not is_target[position])
    return TokenRow(tokens, start, loss_masked)
