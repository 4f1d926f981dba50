"""How long the client of a request wants to wait; set for each request by the HTTP server."""

from contextvars import ContextVar
from typing import NamedTuple


class Deadline(NamedTuple):
    """Seconds from the arrival of a request; 0 means for ever."""

    whole: float = 0.0
    first_token: float = 0.0


PATIENT = Deadline()
deadline: ContextVar[Deadline] = ContextVar("deadline", default=PATIENT)
