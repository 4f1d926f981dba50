"""Token ids to text as they arrive: never half a character, linear in the number of tokens.

A token is the bytes it adds (`Tokenizer.token_bytes`); a stream is those bytes through an
incremental UTF-8 decoder. So at most three bytes are ever held back, and no window of tokens is
decoded twice. Does not know stop strings, requests or processes.

Invariant: the pieces and the end, joined, are `decode(prompt_tail + ids)` without the text of
`prompt_tail`. It holds for every id sequence of a byte-level vocabulary, valid UTF-8 or not (if
the tail ends inside a character, the stream completes that character). With byte fallback it
holds for valid UTF-8; an invalid run shows U+FFFD once per maximal invalid part where `decode`,
which sees the whole run, shows it once per byte.
"""

import codecs
from collections.abc import Iterable, Sequence

from headrace.core.errors import Unsupported
from headrace.text.tokenizer import Tokenizer


class IncrementalDecoder:
    """Decodes one sequence that continues `prompt_tail`, the last few ids of the prompt.

    The tail decides whether the sequence starts a text (some decoders drop a space there) and
    carries a character that the prompt left unfinished; four ids are enough for both.
    `spaces_between_special_tokens` changes nothing, see `Tokenizer.decode`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_tail: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        if decoder := tokenizer.contextual_decoder():
            raise Unsupported(f"text of a tokenizer with the {decoder} decoder cannot be streamed")
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._started = False
        self._unfinished = b""
        self.push(prompt_tail)

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids make certain."""
        added = [self._bytes(token_id) for token_id in ids if token_id not in self._skipped]
        data = self._unfinished + b"".join(added)
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._unfinished = data[used:]
        return text

    def finish(self) -> str:
        """U+FFFD for a character that was never completed, else nothing."""
        text = self._unfinished.decode("utf-8", "replace")
        self._unfinished = b""
        return text

    def _bytes(self, token_id: int) -> bytes:
        if self._started:
            return self._tokenizer.token_bytes(token_id)
        self._started = token_id in self._tokenizer
        return self._tokenizer.first_token_bytes(token_id)
