"""Who asks: the owner of an API key, and what belongs to whom.

The HTTP server sets `caller` for each request; what is made while it is served (cached prefixes,
sessions, files, stored responses) belongs to that tenant and is invisible to others. A server
without named keys has one tenant, `ANYONE`. Knows no HTTP and no keys' texts.
"""

import hashlib
import hmac
import os
import stat
import uuid
from collections.abc import Iterable
from contextvars import ContextVar
from pathlib import Path

import msgspec

from headrace.core.errors import LoadError

_TAG = 12


class Tenant(msgspec.Struct, frozen=True):
    """One owner. `weight` is its share when tenants compete; 0 in a limit means none.

    Limits are of one HTTP process: with `--tokenizer-worker-num N` a tenant may have N times that.
    """

    name: str = ""
    admin: bool = False
    weight: float = 1.0
    max_concurrent: int = 0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0

    @property
    def tag(self) -> str:
        """Twelve characters that stand for the name in ids; "" for `ANYONE`."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:_TAG] if self.name else ""


ANYONE = Tenant()
caller: ContextVar[Tenant] = ContextVar("caller", default=ANYONE)


def own(name: str) -> str:
    """`name` among the names of this caller: two tenants never mean the same thing by it."""
    tag = caller.get().tag
    return f"{tag}\0{name}" if tag else name


def new_id(prefix: str) -> str:
    """A fresh id that tells whose it is: `file-<tag>.<32 hex digits>`, no tag for `ANYONE`."""
    return tagged(prefix, caller.get().tag)


def tagged(prefix: str, tag: str) -> str:
    """A fresh id that belongs to the tenant with this tag."""
    return f"{prefix}{tag}.{uuid.uuid4().hex}" if tag else f"{prefix}{uuid.uuid4().hex}"


def tag_of(id: str) -> str:
    """The tag in an id, "" if it has none."""
    head, dot, _ = id.partition(".")
    return head[-_TAG:] if dot else ""


def is_mine(id: str) -> bool:
    """Whether the caller made what has this id."""
    return tag_of(id) == caller.get().tag


class KeyEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of --api-key-file: a name, its key or the key's SHA-256, and its limits."""

    name: str
    key: str = ""
    key_sha256: str = ""
    admin: bool = False
    weight: float = 1.0
    max_concurrent: int = 0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0

    def tenant(self) -> Tenant:
        return Tenant(
            self.name,
            self.admin,
            self.weight,
            self.max_concurrent,
            self.requests_per_minute,
            self.tokens_per_minute,
        )

    def digest(self) -> bytes:
        return bytes.fromhex(self.key_sha256) if self.key_sha256 else digest(self.key.encode())


def digest(key: bytes) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key).digest()


class KeyRing:
    """Which key belongs to whom. Keeps digests only."""

    def __init__(self, entries: Iterable[tuple[bytes, Tenant]]) -> None:
        self._entries = tuple(entries)

    @property
    def empty(self) -> bool:
        """Everybody may ask everything."""
        return not self._entries

    @property
    def has_admin(self) -> bool:
        return any(tenant.admin for _, tenant in self._entries)

    def tenant(self, tag: str) -> Tenant | None:
        """The tenant with this tag; None if it has no key any more."""
        if not tag:
            return ANYONE
        return next((tenant for _, tenant in self._entries if tenant.tag == tag), None)

    def owner(self, key: bytes) -> Tenant | None:
        """The tenant with this key. Takes as long for a wrong key as for a right one."""
        wanted, found = digest(key), None
        for known, tenant in self._entries:
            if hmac.compare_digest(known, wanted):
                found = tenant
        return found


def read_keys(path: str) -> list[KeyEntry]:
    """The entries of a key file (YAML or JSON), checked.

    Raises:
        LoadError: names the entry and the field, never a key.
    """
    try:
        entries = msgspec.yaml.decode(Path(path).read_bytes(), type=list[KeyEntry])
    except OSError as error:
        raise LoadError(f"--api-key-file {path}: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise LoadError(f"--api-key-file {path}: {error}") from None
    for number, entry in enumerate(entries):
        if problem := _problem(entry, entries[:number]):
            raise LoadError(f"--api-key-file {path}: entry {number} ({entry.name!r}): {problem}")
    return entries


def readable_by_others(path: str) -> bool:
    """Whether more than its owner may read a file."""
    return bool(os.stat(path).st_mode & (stat.S_IRGRP | stat.S_IROTH))


def _problem(entry: KeyEntry, before: list[KeyEntry]) -> str:
    limits = (entry.max_concurrent, entry.requests_per_minute, entry.tokens_per_minute)
    if not 1 <= len(entry.name) <= 64 or not entry.name.isprintable():
        return "name must have 1 to 64 printable characters"
    if entry.name in [other.name for other in before]:
        return "this name appears twice"
    if bool(entry.key) == bool(entry.key_sha256):
        return "give either key or key_sha256"
    if entry.key_sha256 and (len(entry.key_sha256) != 64 or not _is_hex(entry.key_sha256)):
        return "key_sha256 must have 64 hexadecimal digits"
    if entry.key and len(entry.key) < 8:
        return "key must have at least 8 characters"
    if entry.digest() in [other.digest() for other in before]:
        return "this key belongs to another entry, too"
    if not 0.001 <= entry.weight <= 1000.0:
        return "weight must be 0.001 to 1000"
    return "limits must be 0 (none) or more" if min(limits) < 0 else ""


def _is_hex(text: str) -> bool:
    return all(character in "0123456789abcdefABCDEF" for character in text)
