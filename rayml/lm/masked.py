"""Masked language models: a label word at the mask of a cloze prompt (PET, Schick and Schütze 2021, arXiv 2001.07676).

What is read last before the target is the mask, and it predicts the target: so rows, losses, scores and adapters are
those of causal models. What is different: the mask has something behind it, padding must not be seen, and a target is
one token.
"""

from collections.abc import Callable
from typing import Any

from rayml.errors import DataError
from rayml.lm.batch import TokenRow
from rayml.lm.tokens import plain, tokenize

MARK = "rayml_predicts_masks"


def mark_masked(tokenizer: Any) -> None:
    """Note that a tokenizer belongs to a masked model: some causal ones have a mask token, too."""
    tokenizer.init_kwargs[MARK] = True


def predicts_masks(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "init_kwargs", {}).get(MARK))


def masked_row(
    tokenizer: Any, prompt: str, target: str, is_label: bool, max_tokens: int, keep: Callable[[int], bool] | None = None
) -> TokenRow:
    """Return the row of a prompt that holds the mask, of which the last counts; a long one loses its beginning.

    Args:
        prompt: marked where users wrote special tokens, as is `target` (`rayml.lm.tokens`).
        keep: whether to keep the token that begins at this character of the prompt.

    Raises:
        DataError: the target is no label, or has not one token; or there is no room.
    """
    if not is_label:
        raise DataError(f"a masked model chooses among labels and writes no text (target: {target[:40]!r})")
    word, _ = tokenize(tokenizer, f" {target.strip()}", add_special_tokens=False)
    if len(word) != 1:
        raise DataError(
            f"label {plain(target)!r} has {len(word)} tokens, and a mask stands for one; rename it, or use "
            "data.labels=letters"
        )
    tokens, offsets = tokenize(tokenizer, prompt)
    if keep is not None:
        kept = [i for i, (a, b) in enumerate(offsets) if a == b or tokens[i] == tokenizer.mask_token_id or keep(a)]
        tokens = [tokens[i] for i in kept]
    mask = len(tokens) - 1 - tokens[::-1].index(tokenizer.mask_token_id)
    first = int(tokens[0] == tokenizer.cls_token_id)
    cut = max(0, len(tokens) - max_tokens)
    if first + cut >= mask:
        raise DataError(f"what stands behind the mask leaves no room for the input within data.max_tokens={max_tokens}")
    read = [*tokens[:first], *tokens[first + cut : mask + 1]]
    return TokenRow([*read, *word], len(read), suffix=tuple(tokens[mask + 1 :]))
