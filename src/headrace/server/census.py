"""How many values a JSON body has, counted before anything is made of them.

Whatever reads JSON holds Python's lock for as long as it makes objects, 0.3 to 1 us each, and no
stream moves meanwhile; counting takes a tenth of that at most. Numbers are not counted: prompts are
lists of them, and they are cheap. Knows no fields.
"""

import msgspec
import numpy as np

from headrace.core.errors import BadRequest

_BLOCK = 1 << 16


def check_values(raw: bytes, most: int) -> None:
    """Refuse a body with more than `most` strings, lists and objects.

    Raises:
        BadRequest: names the field that has most of them.
    """
    if len(raw) <= 2 * most:  # the shortest value has two characters
        return
    count = count_values(raw)
    if count > most:
        field = _fullest(raw)
        where = f", most of them in {field}" if field else ""
        raise BadRequest(
            f"The body has {count} strings, lists and objects{where}; "
            f"it may have {most} (--max-request-values).",
            field=field or None,
        )


def count_values(raw: bytes | msgspec.Raw) -> int:
    """Strings (keys too), lists and objects of a JSON text; any number for what is not JSON."""
    text, at, found, inside = memoryview(raw), 0, 0, False
    while at < len(text):
        # In blocks, which reuse their memory: touching new memory would cost more than the count.
        block = bytes(text[at : at + _BLOCK])
        if (len(block) - len(block.rstrip(b"\\"))) % 2:  # what is escaped belongs to its backslash
            block = bytes(text[at : at + _BLOCK + 1])
        at += len(block)
        if b"\\" in block:
            block = block.replace(rb"\\", b"").replace(rb"\"", b"")
        letters = np.frombuffer(block, np.uint8)
        quotes = letters == ord('"')
        opens = (letters | 0x20) == ord("{")  # "[" and "{" differ by this bit
        texts = np.bitwise_xor.accumulate(quotes) ^ inside
        ends = int(np.count_nonzero(quotes))
        found += (ends + (not inside)) // 2 + int(np.count_nonzero(opens & ~texts))
        inside ^= ends % 2 == 1
    return found


def _fullest(raw: bytes) -> str:
    """The field of an object that has most values; "" when there is none."""
    try:
        fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError):
        return ""
    return max(fields, key=lambda name: count_values(fields[name]), default="")
