"""Places that keep files by name: a folder, an S3 bucket, a Redis server. No torch.

    file:///folder    s3://bucket/prefix    redis://[:password@]host[:port]/model

S3 takes its endpoint and its keys from the usual AWS_ variables. Redis keeps a file in pieces, as
its values are bounded, and the file's size last. Everything that goes wrong is a LoadError.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from headrace.core.errors import BadRequest, LoadError

_PIECE = 64 << 20


class Store(Protocol):
    """Files by plain names. Safe to use from several threads."""

    def names(self) -> dict[str, int]:
        """Name -> size in bytes."""
        ...

    def read(self, name: str, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end` of a file."""
        ...

    def put(self, name: str, path: Path) -> None:
        """Keep the content of a local file under `name`."""
        ...


def open_store(url: str) -> Store:
    """The store at `url`; nothing is asked of it yet.

    Raises:
        BadRequest: no known scheme. LoadError: the package of its client is not installed.
    """
    parts = urlsplit(url)
    if parts.scheme not in _STORES or (parts.scheme != "file" and not parts.hostname):
        raise BadRequest(
            f"{redacted(url)} is none of file:///folder, s3://bucket/prefix, "
            "redis://host:port/model",
            field="model_path",
        )
    return _STORES[parts.scheme](url)


def redacted(url: str) -> str:
    """The URL without a password, for people to read."""
    head, _, host = url.rpartition("@")
    return f"{urlsplit(head).scheme}://***@{host}" if head else url


@contextmanager
def _told(what: str, *kinds: Any) -> Iterator[None]:
    try:
        yield
    except (OSError, *kinds) as error:
        raise LoadError(f"{what}: {error}") from error


class FileStore:
    """A folder."""

    def __init__(self, url: str) -> None:
        self._folder = Path(unquote(urlsplit(url).path))

    def names(self) -> dict[str, int]:
        with _told(f"{self._folder} cannot be read"):
            return {p.name: p.stat().st_size for p in self._folder.iterdir() if p.is_file()}

    def read(self, name: str, begin: int, end: int) -> bytes:
        with _told(f"{self._folder / name} cannot be read"), (self._folder / name).open("rb") as f:
            f.seek(begin)
            return f.read(end - begin)

    def put(self, name: str, path: Path) -> None:
        with _told(f"{self._folder / name} cannot be written"):
            self._folder.mkdir(parents=True, exist_ok=True)
            fresh = self._folder / f".{name}.tmp"
            with path.open("rb") as source, fresh.open("wb") as target:
                while piece := source.read(_PIECE):
                    target.write(piece)
            fresh.replace(self._folder / name)


class S3Store:
    """The objects of a bucket under a prefix."""

    def __init__(self, url: str) -> None:
        boto3 = _package("boto3", "s3")
        from botocore.exceptions import BotoCoreError, ClientError

        parts = urlsplit(url)
        self._bucket, self._url = parts.netloc, url.rstrip("/")
        self._prefix = f"{parts.path.strip('/')}/" if parts.path.strip("/") else ""
        self._errors = (BotoCoreError, ClientError)
        with _told(f"{url} cannot be reached", *self._errors):
            self._client = boto3.client("s3")

    def names(self) -> dict[str, int]:
        found = {}
        with _told(f"{self._url} cannot be read", *self._errors):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix):
                for item in page.get("Contents", ()):
                    found[item["Key"].removeprefix(self._prefix)] = int(item["Size"])
        return {name: size for name, size in found.items() if name and "/" not in name}

    def read(self, name: str, begin: int, end: int) -> bytes:
        if begin >= end:
            return b""
        with _told(f"{self._url}/{name} cannot be read", *self._errors):
            asked = {"Bucket": self._bucket, "Key": self._prefix + name}
            answer = self._client.get_object(**asked, Range=f"bytes={begin}-{end - 1}")
            content: bytes = answer["Body"].read()
        return content

    def put(self, name: str, path: Path) -> None:
        with _told(f"{self._url}/{name} cannot be written", *self._errors, RuntimeError):
            self._client.upload_file(str(path), self._bucket, self._prefix + name)


class RedisStore:
    """Files of one model: a hash of their sizes, and their pieces."""

    def __init__(self, url: str) -> None:
        redis = _package("redis", "redis")
        from redis.backoff import ConstantBackoff
        from redis.retry import Retry

        parts = urlsplit(url)
        self._model = unquote(parts.path.strip("/"))
        self._url, self._errors = redacted(url), (redis.RedisError,)
        if not self._model or "/" in self._model:
            raise BadRequest(f"{self._url} names no model", field="model_path")
        self._client = redis.Redis(
            host=parts.hostname,
            port=parts.port or 6379,
            username=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
            retry=Retry(ConstantBackoff(0.2), 2),
        )

    def names(self) -> dict[str, int]:
        with _told(f"{self._url} cannot be read", *self._errors, ValueError):
            sizes: Any = self._client.hgetall(self._key())
            return {name.decode(): int(size) for name, size in sizes.items()}

    def read(self, name: str, begin: int, end: int) -> bytes:
        pieces = []
        with _told(f"{self._url}/{name} cannot be read", *self._errors):
            while begin < end:
                number, first = divmod(begin, _PIECE)
                count = min(end - begin, _PIECE - first)
                key = self._key(name, number)
                pieces.append(self._client.getrange(key, first, first + count - 1))
                begin += count
        return b"".join(pieces)

    def put(self, name: str, path: Path) -> None:
        with _told(f"{self._url}/{name} cannot be written", *self._errors), path.open("rb") as file:
            number = 0
            while piece := file.read(_PIECE):
                self._client.set(self._key(name, number), piece)
                number += 1
            self._client.hset(self._key(), name, str(path.stat().st_size))

    def _key(self, name: str = "", number: int = 0) -> str:
        return f"headrace:{self._model}" + (f":{name}:{number}" if name else "")


def _package(name: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise LoadError(
            f"{extra}:// needs the package {name}: pip install 'headrace[{extra}]'"
        ) from error


_STORES: dict[str, Callable[[str], Store]] = {"file": FileStore, "s3": S3Store, "redis": RedisStore}
