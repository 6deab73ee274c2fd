"""Generated text in OpenAI's response formats: one JSON body, or server-sent events."""

import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from itertools import accumulate
from typing import Any

from rayml.lm.sampling import Piece, TokenScore
from rayml.serving.schema import ChatRequest, CompletionRequest

IndexedPiece = tuple[int, Piece, int]
"""The index of a prompt, the next piece of its text, and the prompt's number of tokens."""


class ResponseBodies:
    """The response bodies to one request."""

    def __init__(self, request: CompletionRequest | ChatRequest):
        self.is_chat, self.has_scores = isinstance(request, ChatRequest), request.top_count is not None
        prefix, self.object = ("chatcmpl", "chat.completion") if self.is_chat else ("cmpl", "text_completion")
        self.chunk_object = f"{self.object}.chunk" if self.is_chat else self.object
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}

    def whole(self, pieces: Sequence[IndexedPiece]) -> dict[str, Any]:
        """Return the body with all texts."""
        texts: dict[int, str] = {}
        scores: dict[int, list[TokenScore]] = {}
        finish_reasons: dict[int, str | None] = {}
        for index, piece, _ in pieces:
            texts[index] = texts.get(index, "") + piece.text
            scores.setdefault(index, []).extend(piece.scores)
            finish_reasons[index] = piece.finish_reason
        choices = [self._choice(index, texts[index], scores[index], finish_reasons[index]) for index in sorted(texts)]
        return self.head | {"object": self.object, "choices": choices, "usage": usage(pieces)}

    def _choice(
        self, index: int, text: str, scores: list[TokenScore], finish_reason: str | None, offset: int = 0
    ) -> dict[str, Any]:
        """Return a text, or its next piece, whose tokens begin at the character `offset`."""
        content = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        return {"index": index, **content, "logprobs": self._logprobs(scores, offset), "finish_reason": finish_reason}

    def _logprobs(self, scores: list[TokenScore], offset: int) -> dict[str, Any] | None:
        if not self.has_scores:
            return None
        if self.is_chat:
            content = [
                chat_logprob(score.text, score.logprob) | {"top_logprobs": [chat_logprob(*top) for top in score.top]}
                for score in scores
            ]
            return {"content": content}
        return {
            "tokens": [score.text for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [dict(score.top) for score in scores],
            "text_offset": list(accumulate((len(score.text) for score in scores[:-1]), initial=offset))
            if scores
            else [],
        }

    async def events(self, pieces: AsyncIterator[IndexedPiece], with_usage: bool) -> AsyncIterator[str]:
        """Yield the pieces as server-sent events; then, if wanted, the usage; and `[DONE]` at the end."""
        seen: list[IndexedPiece] = []
        begun: set[int] = set()
        offsets: Counter[int] = Counter()
        async for index, piece, prompt_tokens in pieces:
            seen.append((index, Piece("", tokens=piece.tokens), prompt_tokens))
            choice = self._choice(index, piece.text, piece.scores, piece.finish_reason, offsets[index])
            offsets[index] += sum(len(score.text) for score in piece.scores)
            if self.is_chat:
                delta: dict[str, str] = {} if index in begun else {"role": "assistant"}
                choice.pop("message")
                choice["delta"] = delta | ({"content": piece.text} if piece.text or delta else {})
            begun.add(index)
            yield event(self.head | {"object": self.chunk_object, "choices": [choice]})
        if with_usage:
            yield event(self.head | {"object": self.chunk_object, "choices": [], "usage": usage(seen)})
        yield "data: [DONE]\n\n"


def usage(pieces: Sequence[IndexedPiece]) -> dict[str, int]:
    """Return the tokens of all prompts and texts. Each piece has its text's number of tokens so far."""
    prompt_tokens = sum({index: tokens for index, _, tokens in pieces}.values())
    completion_tokens = sum({index: piece.tokens for index, piece, _ in pieces}.values())
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def chat_logprob(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
