"""Fields of a body that have no effect: named in a response header and once in the log.

The one place for all protocols, so that nothing is dropped in silence. With --strict-fields an
unknown field fails its request; fields of a documented API that cannot change an answer here
(`HARMLESS`) never do, because clients always send them.
"""

import functools
import logging
import re
from collections.abc import Sequence

from headrace.core.errors import BadRequest

log = logging.getLogger(__name__)

HEADER = "x-headrace-ignored"
MAX_REPORTED_NAMES = 32
HARMLESS = frozenset(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "log_metrics",
        "keep_alive",
        "context_management",
        "thinking.budget_tokens",
        "max_tool_calls",
        "include",
    )
)


def warnings(names: Sequence[str], *, strict: bool) -> dict[str, str]:
    """The response headers that name fields without effect.

    Raises:
        BadRequest: with `strict`, for the first one that is unknown.
    """
    if not names:
        return {}
    if strict and (unknown := [name for name in names if name not in HARMLESS]):
        raise BadRequest(
            f"{unknown[0]}: has no effect on this server, which refuses such fields "
            "(--strict-fields)",
            field=unknown[0],
        )
    plain = (re.sub(r"[^][A-Za-z0-9_.-]", "?", name[:64]) for name in names[:MAX_REPORTED_NAMES])
    text = ",".join(plain)
    _log(text)
    return {HEADER: text}


@functools.lru_cache(maxsize=256)
def _log(names: str) -> None:
    """Once for each set of names, not for each request."""
    log.warning("fields without effect in a request: %s", names)
