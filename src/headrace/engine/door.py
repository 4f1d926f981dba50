"""What stands before the application: which hosts are answered, how long a head may be, TLS.

Knows no routes and no keys.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from headrace.core.errors import Forbidden, LoadError
from headrace.core.serve_options import ServeOptions
from headrace.server.errors import error_response

logger = logging.getLogger(__name__)

_TOO_LONG = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"connection: close\r\ncontent-length: 0\r\n\r\n"
)
_LARGEST_READ = 1 << 18
# What a header costs besides its letters; HTTP/2 counts the same (RFC 9113, 6.5.2).
_EACH_HEADER = 32
_SECONDS_BETWEEN_LOOKS = 10.0


class CheckHost:
    """Answers only requests for hosts it knows: a page of another site whose name suddenly means
    127.0.0.1 (DNS rebinding) brings that site's name."""

    def __init__(self, app: ASGIApp, allowed: Callable[[str], bool]) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = next((v for name, v in scope["headers"] if name == b"host"), b"").decode(
                "latin1"
            )
            if not self._allowed(host_name(host)):
                error = Forbidden(f"The host {host!r} is not served here (--allow-hosts).")
                await error_response(error, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


def guarded_by_host(app: ASGIApp, serve: ServeOptions) -> ASGIApp:
    """The application behind --allow-hosts."""
    if serve.allow_hosts == "*" or (serve.allow_hosts == "auto" and not is_local(serve.host)):
        return app
    if serve.allow_hosts == "auto":
        return CheckHost(app, is_local)
    names = {host_name(name.strip()) for name in serve.allow_hosts.split(",")}
    return CheckHost(app, lambda host: host in names)


def host_name(host: str) -> str:
    """A Host header without its port, in small letters."""
    name, colon, port = host.rpartition(":")
    bare = name if colon and port.isdecimal() and (":" not in name or "]" in name) else host
    return bare.strip("[]").rstrip(".").lower()


def is_local(host: str) -> bool:
    """Whether a host means this machine whoever resolves it; "" is a client without Host."""
    if host in ("", "localhost") or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class TooLong(Exception):
    """A request's head has more bytes than it may."""


def short_headed(most: int) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, which answers 431 to a request whose target and headers (and trailers)
    have more than `most` bytes and closes. The parser alone would collect any number."""

    class ShortHeaded(HttpToolsProtocol):
        _in_head = True
        # Since the head began: what the parser was given, and what came out of it.
        _given = _parsed = 0

        def data_received(self, data: bytes) -> None:
            if self._in_head:
                # The parser says nothing before a header is whole. One read may hold a body too.
                self._given += len(data)
                if self._given > most + _LARGEST_READ:
                    self.send_400_response("")
                    return
            super().data_received(data)

        def on_message_begin(self) -> None:
            self._in_head, self._given, self._parsed = True, 0, 0
            super().on_message_begin()

        def on_url(self, url: bytes) -> None:
            self._count(len(url))
            super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            self._count(len(name) + len(value) + _EACH_HEADER)
            super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._in_head = False
            super().on_headers_complete()

        def _count(self, size: int) -> None:
            self._parsed += size
            if self._parsed > most:
                raise TooLong  # the parser stops, and `send_400_response` is called

        def send_400_response(self, msg: str) -> None:
            if max(self._given - _LARGEST_READ, self._parsed) <= most:
                super().send_400_response(msg)
                return
            self.transport.write(_TOO_LONG)
            self.transport.close()

    return ShortHeaded


class NotEveryBadRequest(logging.Filter):
    """Keeps clients that send no HTTP from filling the log: uvicorn has a line for each."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.msg != "Invalid HTTP request received."


def tls_options(serve: ServeOptions) -> dict[str, Any]:
    """uvicorn's options for HTTPS; none without a certificate.

    Raises:
        LoadError: names the option whose file is missing.
    """
    if not serve.ssl_certfile:
        if serve.ssl_keyfile or serve.ssl_ca_certs:
            raise LoadError("--ssl-keyfile and --ssl-ca-certs need --ssl-certfile")
        return {}
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        path = getattr(serve, name)
        if path and not Path(path).is_file():
            raise LoadError(f"--{name.replace('_', '-')} {path}: no such file")
    return {
        "ssl_certfile": serve.ssl_certfile,
        "ssl_keyfile": serve.ssl_keyfile or None,
        "ssl_keyfile_password": serve.ssl_keyfile_password.reveal() or None,
        "ssl_ca_certs": serve.ssl_ca_certs or None,
        "ssl_cert_reqs": ssl.CERT_REQUIRED if serve.ssl_ca_certs else ssl.CERT_NONE,
    }


async def refresh_certificates(context: ssl.SSLContext, serve: ServeOptions) -> None:
    """Give new connections a renewed certificate; runs until cancelled."""
    files = [Path(path) for path in (serve.ssl_certfile, serve.ssl_keyfile) if path]
    seen = [file.stat().st_mtime_ns for file in files]
    while True:
        await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
        try:
            now = [file.stat().st_mtime_ns for file in files]
            if now != seen:
                password = serve.ssl_keyfile_password.reveal() or None
                context.load_cert_chain(serve.ssl_certfile, serve.ssl_keyfile or None, password)
                seen = now
                logger.info("The certificate was renewed")
        except OSError as error:  # ssl.SSLError is one: half-written files are read again
            logger.warning("The certificate cannot be renewed: %s", error)
