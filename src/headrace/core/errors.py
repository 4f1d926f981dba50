"""Every error a caller can meet, each with its HTTP status and error type.

    HeadraceError
    ├── BadRequest        400  the request is wrong; names the field
    │   └── TooLong       400  longer than the context (code context_length_exceeded)
    ├── Unauthorized      401  missing or wrong API key
    ├── Forbidden         403  this key may not do that
    ├── NotFound          404  unknown model, request or file
    ├── Unsupported       501  valid, but this server cannot do it
    ├── RateLimited       429  this key has used what it may; come back later
    ├── Overloaded        503  the queue is full; come back later
    ├── Cancelled         499  aborted by the client or the operator
    ├── WorkerLost        500  a child process died
    └── LoadError         500  the model, tokenizer or config cannot be loaded

A scheduler never raises for a request: it finishes it with a reason. These classes are what
the edges (HTTP, Engine, CLI) raise and show. Does not know HTTP frameworks.
"""


class HeadraceError(Exception):
    """Base of all errors that carry a message meant for people."""

    status = 500
    kind = "InternalServerError"
    code: str | None = None
    # Seconds after which asking again may help, where that is known.
    retry_after: float | None = None

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class BadRequest(HeadraceError):
    """The request cannot be served as written; `field` is the offending field."""

    status = 400
    kind = "BadRequestError"


class TooLong(BadRequest):
    """Prompt plus requested output does not fit the model's context."""

    code = "context_length_exceeded"


class Unauthorized(HeadraceError):
    status = 401
    kind = "AuthenticationError"


class Forbidden(HeadraceError):
    status = 403
    kind = "PermissionDeniedError"
    code = "forbidden"


class NotFound(HeadraceError):
    status = 404
    kind = "NotFoundError"


class Unsupported(HeadraceError):
    status = 501
    kind = "NotImplementedError"


class RateLimited(HeadraceError):
    status = 429
    kind = "RateLimitError"
    code = "rate_limit_exceeded"


class Overloaded(HeadraceError):
    status = 503
    kind = "ServiceUnavailableError"


class Cancelled(HeadraceError):
    status = 499
    kind = "Cancelled"


class WorkerLost(HeadraceError):
    status = 500
    kind = "InternalServerError"


class LoadError(HeadraceError):
    status = 500
    kind = "LoadError"
