"""What stands before the application, on real sockets: hosts, heads, TLS."""

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import trustme
import uvicorn

from headrace.core.config import Config
from headrace.core.errors import LoadError
from headrace.engine.door import host_name, is_local, refresh_certificates, tls_options
from headrace.engine.http import uvicorn_config
from headrace.server.app import build_app
from tests.support.scripted_manager import ScriptedManager
from tests.support.servers import wait_for


@contextmanager
def door(**options) -> Iterator[tuple[int, uvicorn.Server]]:
    """The port of a server with the uvicorn of `headrace serve`."""
    config = Config.from_flat({"served_model_name": "tiny", "port": 0} | options)
    manager = ScriptedManager(config)
    server = uvicorn.Server(uvicorn_config(build_app(manager, config, manager.info), config))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield listener.getsockname()[1], server
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def port():
    with door(max_header_bytes=4096) as (port, _):
        yield port


def status(port: int, head: bytes, rest: bytes = b"") -> int:
    """The status of the answer to raw bytes; 0 if the connection is just closed."""
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        try:
            client.sendall(head)
            client.sendall(rest)
        except OSError:  # it is closed already
            pass
        try:
            line = client.recv(4096)
        except ConnectionError:
            return 0
        return int(line.split()[1]) if line else 0


def test_hosts(port):
    for host, code in (
        ("localhost", 200),
        (f"127.0.0.1:{port}", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost@evil.example", 403),
    ):
        head = f"GET /health HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n"
        assert status(port, head.encode()) == code, host


def test_listed_hosts():
    with door(allow_hosts="api.example") as (port, _):
        for host, code in (("api.example:443", 200), ("API.example.", 200), ("localhost", 403)):
            head = f"GET /health HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n"
            assert status(port, head.encode()) == code, host


def test_names_of_hosts():
    assert host_name("[::1]:80") == "::1" and host_name("::1") == "::1"
    assert host_name("A.b:1") == "a.b"
    assert is_local("127.9.9.9") and is_local("") and not is_local("10.0.0.1")


def test_long_heads(port):
    plain = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    assert status(port, plain + b"x: " + b"a" * 3000 + b"\r\n\r\n") == 200
    assert status(port, plain + b"x: " + b"a" * 5000 + b"\r\n\r\n") == 431
    assert status(port, plain + b"x: 1\r\n" * 2000 + b"\r\n") == 431
    assert status(port, b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n") == 431
    # A header without an end: refused long before it is in memory.
    assert status(port, plain + b"x: ", b"a" * (10 << 20)) in (0, 431)
    trailers = b"2\r\n{}\r\n0\r\n" + b"x: 1\r\n" * 2000 + b"\r\n"
    post = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    assert status(port, post, trailers) in (0, 400, 431)
    assert status(port, plain + b"\r\n") == 200


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


def issue(authority, folder) -> dict[str, str]:
    cert = authority.issue_cert("localhost")
    cert.private_key_pem.write_to_path(folder / "key.pem")
    (folder / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in cert.cert_chain_pems))
    return {"ssl_certfile": str(folder / "cert.pem"), "ssl_keyfile": str(folder / "key.pem")}


def serial(port: int, context: ssl.SSLContext) -> str:
    with (
        socket.create_connection(("127.0.0.1", port), 10) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as client,
    ):
        return str(client.getpeercert()["serialNumber"])


def test_https_and_renewed_certificates(authority, tmp_path, monkeypatch):
    monkeypatch.setattr("headrace.engine.door._SECONDS_BETWEEN_LOOKS", 0.02)
    options = issue(authority, tmp_path)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with door(**options) as (port, server):
        with httpx.Client(verify=trusting) as client:
            assert client.get(f"https://localhost:{port}/health").status_code == 200
        before = serial(port, trusting)
        serve = Config.from_flat(options).serve

        async def renew() -> None:
            task = asyncio.create_task(refresh_certificates(server.config.ssl, serve))
            await asyncio.sleep(0.05)
            (tmp_path / "cert.pem").write_bytes(b"half a file")
            await asyncio.sleep(0.1)
            issue(authority, tmp_path)
            async with asyncio.timeout(30):
                while await asyncio.to_thread(serial, port, trusting) == before:
                    await asyncio.sleep(0.02)
            task.cancel()

        asyncio.run(renew())
        assert serial(port, trusting) != before


def test_clients_may_have_to_show_a_certificate(authority, tmp_path):
    options = issue(authority, tmp_path)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with door(ssl_ca_certs=str(tmp_path / "ca.pem"), **options) as (port, _):
        url = f"https://localhost:{port}/health"
        with httpx.Client(verify=trusting) as client, pytest.raises(httpx.TransportError):
            client.get(url)
        trusting.load_cert_chain(options["ssl_certfile"], options["ssl_keyfile"])
        with httpx.Client(verify=trusting) as client:
            assert client.get(url).status_code == 200


def test_missing_files_are_named():
    for options in ({"ssl_certfile": "/no/cert"}, {"ssl_keyfile": "/no/key"}):
        with pytest.raises(LoadError, match=next(iter(options)).replace("_", "-")):
            tls_options(Config.from_flat(options).serve)
