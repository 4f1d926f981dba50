"""Regular expressions of JSON Schema (ECMA 262) in the engine's dialect, and of some formats.

The dialects differ where they would silently mean something else: what `.` and `\\s` match, and
brackets, `&&`, `--`, `~~` inside a class. The engine itself refuses look-around, back-references
and word boundaries, and reads \\d and \\w as ECMA does. Pure.
"""

import re

# Characters of \s beyond Unicode's White_Space, and line ends that `.` does not match.
_SPACE = r"[\s\x{FEFF}]"
_NOT_SPACE = r"[^\s\x{FEFF}]"
_ANY = r"[^\n\r\x{2028}\x{2029}]"
_TOKEN = re.compile(r"\\.|\[\^?|\(\?(?::|<(?![=!]))|\(\?|\{,|.", re.DOTALL)
_CLASS_TOKEN = re.compile(r"\\.|\]|.", re.DOTALL)
# Escapes that mean something in ECMA 262, next to those of punctuation.
_ESCAPES = frozenset("dDwWsStnrfvbBxupP0123456789k")

_YEAR_DAY = (
    r"[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_LEAP_DAY = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29"
_DATE = f"(?:{_YEAR_DAY}|{_LEAP_DAY})"
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?"
    r"(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}[Tt]{_TIME}$"}
"""Formats as patterns, where the engine's own would let invalid values pass. No leap seconds."""


class UnknownSyntax(ValueError):
    """The text says what cannot be translated."""


def translate(pattern: str) -> str:
    """An ECMA 262 pattern in the engine's dialect, with the same meaning.

    Raises:
        UnknownSyntax: a construct that ECMA 262 does not have, or reads differently.
    """
    out, at = [], 0
    while at < len(pattern):
        match = _TOKEN.match(pattern, at)
        assert match is not None
        token, at = match[0], match.end()
        if token in ("(?", "{,"):
            raise UnknownSyntax(f"{token!r} is not supported in a pattern")
        if token.startswith("["):
            body, at = _class(pattern, at)
            out.append(f"{token}{body}]")
        elif token == ".":
            out.append(_ANY)
        else:
            out.append(_escape(token))
    return "".join(out)


def _class(pattern: str, at: int) -> tuple[str, int]:
    """The rest of a character class, without its end, and where it ends."""
    out: list[str] = []
    while True:
        match = _CLASS_TOKEN.match(pattern, at)
        if match is None:
            raise UnknownSyntax("a character class does not end")
        token, at = match[0], match.end()
        if token == "]":
            if not out:
                raise UnknownSyntax("an empty character class is not supported")
            return "".join(out), at
        if token in "[&~":
            out.append("\\" + token)
        elif token == "-" and out and out[-1] == "-":
            raise UnknownSyntax("'--' in a character class is not supported")
        else:
            out.append(_escape(token))


def _escape(token: str) -> str:
    if len(token) == 1 or not token.startswith("\\"):
        if token == "\\":
            raise UnknownSyntax("a pattern ends with a backslash")
        return token
    if token == r"\s":
        return _SPACE
    if token == r"\S":
        return _NOT_SPACE
    if token[1].isalnum() and token[1] not in _ESCAPES:
        raise UnknownSyntax(f"the escape {token} is not supported")
    return token
