"""From what an adapter hands over to what the scheduler takes: token ids, bounds, a seed.

Knows no sockets and no requests in flight.
"""

import random
from collections.abc import Callable, Sequence

import msgspec

from headrace.core.config import Config, Limits
from headrace.core.errors import BadRequest, TooLong
from headrace.core.messages import GenerateRequest
from headrace.core.model_info import ModelInfo
from headrace.frontend.async_tokenizer import AsyncTokenizer
from headrace.frontend.encode import for_model, shortened
from headrace.frontend.requests import continued
from headrace.frontend.validate import validate
from headrace.text.tokenizer import Tokenizer

# Raises BadRequest for a request that a feature cannot serve.
RequestCheck = Callable[[GenerateRequest], None]


class Refused(Exception):
    """A feature cannot serve a request; `error` is for its client."""

    def __init__(self, error: BadRequest) -> None:
        super().__init__(error.message)
        self.error = error


class Preparation:
    """The steps of one frontend, in order."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer | None,
        texts: AsyncTokenizer,
        checks: Sequence[RequestCheck],
    ) -> None:
        self._truncate = config.serve.allow_auto_truncate
        self._tokenizer = tokenizer
        self._bos = tokenizer.bos_token_id if tokenizer else None
        self._special = tokenizer.special_ids if tokenizer else frozenset[int]()
        self._texts = texts
        self._checks = checks
        self._seeds = random.Random(config.model.random_seed)

    async def prepare(
        self, requests: Sequence[GenerateRequest], info: ModelInfo, limits: Limits
    ) -> list[GenerateRequest]:
        """Requests ready to be sent. Samples of a group share their seed.

        Raises:
            BadRequest: a field is out of its bounds. Refused: a feature says no.
        """
        seeds: dict[str, int] = {}
        prepared = []
        for request in requests:
            self._refuse_huge(request, limits.context_length)
        for request in await self._texts.with_ids(requests):
            assert request.sampling.n == 1, "fan_out first"
            checked = self._check(request, info, limits)
            for check in self._checks:
                try:
                    await self._texts.apply(check, checked)
                except BadRequest as error:
                    raise Refused(error) from None
            if checked.sampling.seed is None:
                seed = seeds.setdefault(checked.group or checked.rid, self._seeds.getrandbits(63))
                sampling = msgspec.structs.replace(checked.sampling, seed=seed)
                checked = msgspec.structs.replace(checked, sampling=sampling)
            prepared.append(checked)
        return prepared

    def _refuse_huge(self, request: GenerateRequest, most: int) -> None:
        """Spend no time on a text of which the length says that it has too many tokens."""
        cut = self._truncate or (request.pool is not None and request.pool.cut)
        if self._tokenizer is None or request.text is None or cut or len(request.text) <= most:
            return
        fewest = self._tokenizer.fewest_tokens(len(request.text))
        if fewest > most:
            raise TooLong(
                f"The input (at least {fewest} tokens) is longer than the model's context length "
                f"({most} tokens).",
                field="text",
            )

    def _check(self, request: GenerateRequest, info: ModelInfo, limits: Limits) -> GenerateRequest:
        fitting = for_model(continued(request, self._bos), info)
        fitting = shortened(fitting, limits.max_request_tokens, self._special, self._truncate)
        return validate(fitting, info.vocab_size, limits, self._truncate)
