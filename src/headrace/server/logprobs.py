"""Log-probabilities in OpenAI's two shapes. Tokens are ids until here; text is rendered last.

`bytes` of a token are always given, so that a client can join tokens that are parts of a
character. Lists keep tokens apart that look alike; the old completions shape has dicts keyed by
text, where the more probable of two look-alikes stays.
"""

import codecs
from typing import Any

from headrace.core.messages import TokenLogprobs
from headrace.text.tokenizer import Tokenizer

LOWEST = -9999.0


def token_string(data: bytes) -> str:
    """A token for display: its text, or OpenAI's `bytes:\\xe2\\x82` when it is no whole text."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(value: float) -> float:
    """JSON has no infinity; OpenAI writes -9999.0 for a token that cannot come."""
    return value if value > LOWEST else LOWEST


def chat_logprobs(found: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion (also of one streamed chunk)."""

    def entry(token: int, value: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": token_string(data), "bytes": list(data), "logprob": finite(value)}

    content = []
    for position, token in enumerate(found.tokens):
        top = found.top[position] if found.top else None
        value = found.values[position]
        item = entry(token, LOWEST if value is None else value)
        item["top_logprobs"] = [entry(*pair) for pair in top or ()]
        content.append(item)
    return {"content": content}


class CompletionLogprobs:
    """`choices[].logprobs` of one completion, in pieces that continue each other's text offsets.

    Offsets count characters of the text of all tokens so far; hidden special tokens have none.
    `at_start`: the first token begins the text (the prompt is echoed), so it may lose a space.
    """

    def __init__(self, tokenizer: Tokenizer, *, at_start: bool, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = at_start
        self._offset = 0

    def render(self, *pieces: TokenLogprobs | None) -> dict[str, Any]:
        """Parallel lists for the tokens of `pieces`, in order."""
        out: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for piece in pieces:
            for position, token in enumerate(piece.tokens if piece else ()):
                assert piece is not None
                top = piece.top[position] if piece.top else None
                self._add(out, token, piece.values[position], top)
        return out

    def _add(
        self,
        out: dict[str, list[Any]],
        token: int,
        value: float | None,
        top: list[tuple[int, float]] | None,
    ) -> None:
        out["tokens"].append(self._string(token))
        out["text_offset"].append(self._offset)
        self._offset += self._length(token)
        if value is None:
            out["token_logprobs"].append(None)
            out["top_logprobs"].append(None)
            return
        out["token_logprobs"].append(finite(value))
        choices = dict[str, float]()
        for other, score in [*(top or ()), (token, value)]:
            name = self._string(other)
            choices[name] = max(finite(score), choices.get(name, LOWEST))
        out["top_logprobs"].append(choices)

    def _string(self, token: int) -> str:
        return token_string(self._tokenizer.token_bytes(token))

    def _length(self, token: int) -> int:
        """Characters that the token adds to the text."""
        if token in self._hidden:
            return 0
        at_start, self._at_start = self._at_start, False
        tokenizer = self._tokenizer
        data = tokenizer.first_token_bytes(token) if at_start else tokenizer.token_bytes(token)
        return len(self._decoder.decode(data))
