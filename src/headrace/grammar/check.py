"""What the main process refuses before a request is sent: grammars that cannot be enforced.

Reads the grammar as the scheduler will, without the engine; what only the engine can tell (a schema
that nothing satisfies, a limit) the scheduler answers, also with 400.
"""

from functools import lru_cache

from headrace.core.errors import BadRequest
from headrace.core.messages import GenerateRequest
from headrace.grammar.engine import Backend
from headrace.grammar.refusal import Refused
from headrace.grammar.source import special_tokens
from headrace.text.tokenizer import Tokenizer

_REMEMBERED = 16


class GrammarCheck:
    """Raises BadRequest for a request whose grammar cannot be enforced."""

    def __init__(self, tokenizer: Tokenizer | None, backend: Backend | None) -> None:
        specials = special_tokens(tokenizer)
        self._enabled = backend is not None

        @lru_cache(_REMEMBERED)
        def understood(field: str, text: str) -> None:
            if backend is not None:
                backend.translate(field, text, specials)

        self._understood = understood

    def __call__(self, request: GenerateRequest) -> None:
        for field, text in request.sampling.grammars:
            if not self._enabled:
                raise BadRequest(
                    f"{field}: this server enforces no grammars (--grammar-backend, and a model "
                    "with its tokenizer, are needed)",
                    field=field,
                )
            try:
                self._understood(field, text)
            except Refused as error:
                raise BadRequest(error.message, field=field) from None
