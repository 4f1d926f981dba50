"""The error of a grammar that cannot be enforced, with the place in it."""

from headrace.core.errors import BadRequest


class Refused(BadRequest):
    """`place` is a JSON Pointer (RFC 6901, as a fragment: "#/a/0") or, in EBNF, a line."""

    def __init__(self, field: str, why: str, place: str = "") -> None:
        if place.startswith("/"):
            place = f"#{place}"
        super().__init__(f"{field}: {why}" + (f" (at {place})" if place else ""), field=field)
        self.why = why
        self.place = place


def step(pointer: str, key: str | int) -> str:
    """A JSON Pointer one level deeper (RFC 6901)."""
    return f"{pointer}/{str(key).replace('~', '~0').replace('/', '~1')}"
