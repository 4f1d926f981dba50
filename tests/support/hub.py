"""A hub on this machine: the few endpoints by which huggingface_hub and ModelScope download."""

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "1234567890123456789012345678901234567890"


class Hub:
    """Serves the files of `folder` as repository owner/name at revisions "main" and "v1".

    `taken` counts what was downloaded.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.taken: Counter[str] = Counter()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Hub":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, http: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(urlsplit(http.path).path)
        parts = path.strip("/").split("/")
        query = {key: values[0] for key, values in parse_qs(urlsplit(http.path).query).items()}
        if path.startswith("/api/models/owner/name") and "tree" not in parts:
            known = parts[-1] in ("name", "main", "v1", SHA)
            self._json(http, self._info() if known else None)
        elif path.startswith("/api/models/owner/name/tree/"):
            self._json(http, [dict(e, oid=e["blob"]) for e in self._files()])
        elif path == "/api/v1/models/owner/name/repo/files":
            self._json(http, {"Code": 200, "Success": True, "Data": {"Files": self._scope()}})
        elif path == "/api/v1/models/owner/name/repo":
            self._file(http, self.folder / query["FilePath"], body)
        elif len(parts) > 4 and parts[:3] == ["owner", "name", "resolve"]:
            known = parts[3] in ("main", "v1", SHA)
            self._file(http, self.folder / "/".join(parts[4:]) if known else None, body)
        else:
            self._json(http, None)

    def _info(self) -> dict[str, Any]:
        names = [{"rfilename": entry["path"]} for entry in self._files()]
        return {"id": "owner/name", "sha": SHA, "siblings": names, "private": False}

    def _files(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": p.name, "size": p.stat().st_size, "blob": _sha(p)[:40]}
            for p in sorted(self.folder.iterdir())
        ]

    def _scope(self) -> list[dict[str, Any]]:
        return [
            {
                "Name": p.name, "Path": p.name, "Type": "blob", "Size": p.stat().st_size,
                "Sha256": _sha(p), "Revision": SHA, "CommittedDate": 1,
            }
            for p in sorted(self.folder.iterdir())
        ]  # fmt: skip

    def _json(self, http: BaseHTTPRequestHandler, value: Any) -> None:
        content = json.dumps(value if value is not None else {"error": "not found"}).encode()
        http.send_response(200 if value is not None else 404)
        if value is None:
            http.send_header("X-Error-Code", "RepoNotFound")
        http.send_header("Content-Type", "application/json")
        http.send_header("Content-Length", str(len(content)))
        http.end_headers()
        http.wfile.write(content)

    def _file(self, http: BaseHTTPRequestHandler, path: Path | None, body: bool) -> None:
        if path is None or not path.is_file():
            self._json(http, None)
            return
        content = path.read_bytes()
        begin, status = 0, 200
        if (given := http.headers.get("Range", "")).startswith("bytes=") and given != "bytes=0-":
            begin, status = int(given[6:].split("-")[0]), 206
        http.send_response(status)
        http.send_header("ETag", f'"{_sha(path)}"')
        http.send_header("X-Repo-Commit", SHA)
        http.send_header("X-Linked-Etag", f'"{_sha(path)}"')
        http.send_header("X-Linked-Size", str(len(content)))
        http.send_header("Content-Length", str(len(content) - begin))
        if status == 206:
            http.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        http.end_headers()
        if body:
            self.taken[path.name] += 1
            http.wfile.write(content[begin:])


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
