"""Which logit processors a server has, by the names that clients use.

Knows the command line's form of a plug-in; imports only what the operator named.
"""

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from headrace.core.errors import BadRequest, LoadError
from headrace.core.messages import SamplingParams
from headrace.processors import Facts, LogitProcessor
from headrace.processors.builtin import DisallowedTokens, NoRepeatNgram, ThinkingBudget

GROUP = "headrace.logit_processors"
BUILTIN: Mapping[str, Callable[..., LogitProcessor]] = {
    "disallowed_tokens": DisallowedTokens,
    "no_repeat_ngram": NoRepeatNgram,
    "thinking_budget": ThinkingBudget,
}


class Registry:
    """`facts` is called once, when the first processor is made.

    Raises:
        LoadError: a plug-in that the operator named cannot be had.
    """

    def __init__(self, plugins: str, facts: Callable[[], Facts]) -> None:
        """`plugins`: "NAME=module:Class" or "NAME", with commas."""
        self._classes = dict(BUILTIN)
        for item in filter(None, (part.strip() for part in plugins.split(","))):
            name, _, place = item.partition("=")
            self._classes[name] = _load(name, place)
        self._facts = cache(facts)

    def make(self, sampling: SamplingParams) -> LogitProcessor:
        """The processor that a request names, with its parameters.

        Raises:
            BadRequest: there is none of this name, or its parameters are wrong.
        """
        made = self._classes.get(sampling.custom_logit_processor or "")
        if made is None:
            raise BadRequest(
                "custom_logit_processor: this server has none of that name, but "
                f"{', '.join(sorted(self._classes))}; code from requests is never run",
                field="custom_logit_processor",
            )
        try:
            return made(sampling.custom_params, self._facts())
        except ValueError as error:
            raise BadRequest(f"custom_params: {error}", field="custom_params") from None


def _load(name: str, place: str) -> Callable[..., LogitProcessor]:
    """The class at "module:Class", or that of an entry point."""
    try:
        if not place:
            (entry,) = importlib.metadata.entry_points(group=GROUP, name=name)
            place = entry.value
        module, _, attribute = place.partition(":")
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        where = place or f"one entry point {name!r} of the group {GROUP}"
        raise LoadError(f"--logit-processors {name}: {where} cannot be had: {error}") from None
    if not callable(found):
        raise LoadError(f"--logit-processors {name}: {place} is no class")
    made: Callable[..., LogitProcessor] = found
    return made
