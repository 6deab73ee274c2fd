"""OpenAI's shapes for what a replica wrote: one body, or server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from rayml.lm.sampling import Piece, TokenScore

Written = AsyncIterator[tuple[int, Piece, int]]
"""Which prompt, what its text grew by, and the tokens of the prompt."""


class ResponseBodies:
    """The bodies of one request.

    Args:
        model: as the client named it.
        chat: chat completions, or completions.
        logprobs: give log-probabilities.
    """

    def __init__(self, model: str, chat: bool, logprobs: bool):
        self.chat, self.logprobs = chat, logprobs
        kind = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.kind, self.chunk_kind = kind, f"{kind}.chunk" if chat else kind

    def whole(self, pieces: Sequence[tuple[int, Piece, int]]) -> dict[str, Any]:
        """Return the one body of everything that was written."""
        texts, scores, ends, usage = gather(pieces)
        choices = [self.choice(index, texts[index], scores[index], ends[index]) for index in sorted(ends)]
        return self.head | {"object": self.kind, "choices": choices, "usage": usage}

    def choice(self, index: int, text: str, scores: list[TokenScore], end: str | None) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **content, "logprobs": self.scores(scores), "finish_reason": end}

    def scores(self, scores: list[TokenScore]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.chat:
            tops = [[entry(*other) for other in score.top] for score in scores]
            entries = zip(scores, tops, strict=True)
            return {"content": [entry(score.text, score.logprob) | {"top_logprobs": top} for score, top in entries]}
        offsets = [sum(len(score.text) for score in scores[:index]) for index in range(len(scores))]
        return {
            "tokens": [score.text for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [dict(score.top) for score in scores],
            "text_offset": offsets,
        }

    async def events(self, written: Written, with_usage: bool) -> AsyncIterator[str]:
        """Yield server-sent events, the last of them `[DONE]`; with the usage before it, if it is wanted."""
        seen: list[tuple[int, Piece, int]] = []
        begun: set[int] = set()
        async for index, piece, prompt_tokens in written:
            seen.append((index, Piece("", [], piece.tokens, piece.finish_reason), prompt_tokens))
            choice = self.choice(index, piece.text, piece.scores, piece.finish_reason)
            if self.chat:
                delta: dict[str, str] = {} if index in begun else {"role": "assistant"}
                choice.pop("message")
                choice["delta"] = delta | ({"content": piece.text} if piece.text or delta else {})
            begun.add(index)
            yield event(self.head | {"object": self.chunk_kind, "choices": [choice]})
        if with_usage:
            yield event(self.head | {"object": self.chunk_kind, "choices": [], "usage": gather(seen)[3]})
        yield "data: [DONE]\n\n"


def gather(
    pieces: Sequence[tuple[int, Piece, int]],
) -> tuple[dict[int, str], dict[int, list[TokenScore]], dict[int, str | None], dict[str, int]]:
    """Return, by prompt, the text, the scores and why it ended; and the tokens of all."""
    texts: dict[int, str] = {}
    scores: dict[int, list[TokenScore]] = {}
    ends: dict[int, str | None] = {}
    prompts: dict[int, int] = {}
    tokens: dict[int, int] = {}
    for index, piece, prompt_tokens in pieces:
        texts[index] = texts.get(index, "") + piece.text
        scores.setdefault(index, []).extend(piece.scores)
        ends[index], prompts[index], tokens[index] = piece.finish_reason, prompt_tokens, piece.tokens
    read, made = sum(prompts.values()), sum(tokens.values())
    return texts, scores, ends, {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
