"""A tokenizer for an event loop: long texts are worked on in threads, short ones at once.

The tokenizers library releases the GIL while it encodes. Knows nothing of what the texts are for.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from headrace.core.errors import BadRequest
from headrace.core.messages import GenerateRequest, pack_ids
from headrace.text.tokenizer import Tokenizer

# In characters and tokens. Shorter texts are tokenized faster than a thread is woken.
_LONG = 4096
_THREADS = 2


class AsyncTokenizer:
    """Encodes and decodes; `tokenizer` is None on a server that was told to load none."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(_THREADS, "headrace-tokenize")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text."""
        work = self._need("text").encode_batch
        if sum(map(len, texts)) < _LONG:
            return work(texts, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, work, texts, add_special_tokens)

    async def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of token ids."""
        work = self._need("tokens").decode
        if len(ids) < _LONG:
            return work(ids, skip_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, work, ids, skip_special_tokens)

    async def with_ids(self, requests: Sequence[GenerateRequest]) -> list[GenerateRequest]:
        """The requests with `ids` in place of `text`; equal texts are tokenized once."""
        texts = list({r.text: None for r in requests if r.text is not None and not r.ids})
        if not texts:
            return list(requests)
        packed = map(pack_ids, await self.encode(texts, add_special_tokens=True))
        known = dict(zip(texts, packed, strict=True))
        return [
            request
            if request.ids or request.text is None
            else msgspec.structs.replace(request, ids=known[request.text], text=None)
            for request in requests
        ]

    async def apply(
        self, check: Callable[[GenerateRequest], None], request: GenerateRequest
    ) -> None:
        """Run a check that reads the request's grammar; of a long one in a thread."""
        if sum(len(text) for _, text in request.sampling.grammars) < _LONG:
            check(request)
        else:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._threads, check, request)

    def _need(self, field: str) -> Tokenizer:
        if self._tokenizer is None:
            raise BadRequest(
                f"{field}: this server has no tokenizer (--skip-tokenizer-init); use input_ids",
                field=field,
            )
        return self._tokenizer
