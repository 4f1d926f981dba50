"""A text that never reaches a log, an answer or a file by accident. Knows no options."""

from typing import Any, NoReturn


class Secret:
    """Holds a text; only `reveal` gives it. It has no JSON, no msgpack, no pickled form.

    True if there is a text.
    """

    __slots__ = ("_text",)

    def __init__(self, text: "str | Secret" = "") -> None:
        self._text: str = text._text if isinstance(text, Secret) else text

    def reveal(self) -> str:
        """The text."""
        return self._text

    def __bool__(self) -> bool:
        return bool(self._text)

    def __repr__(self) -> str:
        return "Secret(***)" if self else "Secret()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a secret is not written anywhere")

    def __deepcopy__(self, memo: Any) -> "Secret":
        return self
