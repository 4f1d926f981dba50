"""Files and batches in one SQLite file, so that they survive a restart.

Every method blocks and belongs to one thread (`BatchDb.call`). Knows the stored objects, not what
the lines of a batch do. Invariants: the result of a line is stored once; a batch gets its output
files and its final status in one transaction.
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import orjson

from headrace.core.errors import LoadError, NotFound
from headrace.core.tenant import tag_of, tagged

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
  id TEXT PRIMARY KEY, created INTEGER NOT NULL, expires INTEGER, name TEXT NOT NULL,
  purpose TEXT NOT NULL, content BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS batches (
  id TEXT PRIMARY KEY, created INTEGER NOT NULL, status TEXT NOT NULL, object TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS results (
  batch TEXT NOT NULL, line INTEGER NOT NULL, ok INTEGER NOT NULL, result BLOB NOT NULL,
  PRIMARY KEY (batch, line));
PRAGMA user_version = 1;
"""
_UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")


class BatchDb:
    """The open file."""

    def __init__(self, path: str, clock: Callable[[], float] = time.time) -> None:
        """Raises LoadError when `path` is not a database that can be written."""
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, "headrace-batches")
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise LoadError(f"--batch-store {path}: {error}") from None

    async def call(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run a method of this object in its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        self._db.close()

    def now(self) -> int:
        """Unix seconds."""
        return int(self._clock())

    # -- files --------------------------------------------------------------------------------

    def add_file(
        self, name: str, purpose: str, content: bytes, seconds: int | None, tag: str = ""
    ) -> Any:
        """Store a file that expires after `seconds`, of the tenant with this tag; its object."""
        id, now = tagged("file-", tag), self.now()
        expires = None if seconds is None else now + seconds
        row = (id, now, expires, name, purpose, content)
        self._db.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)", row)
        return self.file(id)

    def file(self, id: str) -> dict[str, Any]:
        """A file object. Raises NotFound."""
        found = self._files("id = ?", id)
        return found[0] if found else missing("File", id)

    def files(self, purpose: str | None, tag: str = "") -> list[dict[str, Any]]:
        """The file objects of a tenant, of one purpose if given, newest first."""
        found = self._files("purpose = ?", purpose) if purpose else self._files("1 = ?", 1)
        return [file for file in found if tag_of(file["id"]) == tag]

    def _files(self, where: str, value: Any) -> list[dict[str, Any]]:
        self._db.execute("DELETE FROM files WHERE expires <= ?", (self.now(),))
        rows = self._db.execute(
            "SELECT id, length(content), created, expires, name, purpose FROM files "
            f"WHERE {where} ORDER BY created DESC, rowid DESC",
            (value,),
        )
        return [
            {
                "id": id,
                "object": "file",
                "bytes": size,
                "created_at": created,
                "expires_at": expires,
                "filename": name,
                "purpose": purpose,
                "status": "processed",
            }
            for id, size, created, expires, name, purpose in rows
        ]

    def content(self, id: str) -> bytes:
        """The bytes of a file. Raises NotFound."""
        self.file(id)
        (content,) = self._db.execute("SELECT content FROM files WHERE id = ?", (id,)).fetchone()
        return bytes(content)

    def delete_file(self, id: str) -> None:
        """Forget a file. Raises NotFound."""
        self.file(id)
        self._db.execute("DELETE FROM files WHERE id = ?", (id,))

    # -- batches ------------------------------------------------------------------------------

    def add_batch(self, batch: dict[str, Any]) -> None:
        """Store a new batch object."""
        row = (batch["id"], batch["created_at"], batch["status"], orjson.dumps(batch).decode())
        self._db.execute("INSERT INTO batches VALUES (?, ?, ?, ?)", row)

    def batch(self, id: str) -> dict[str, Any]:
        """A batch object with its counts so far. Raises NotFound."""
        row = self._db.execute("SELECT object FROM batches WHERE id = ?", (id,)).fetchone()
        if row is None:
            return missing("Batch", id)
        batch: dict[str, Any] = orjson.loads(row[0])
        done, good = self._db.execute(
            "SELECT count(*), total(ok) FROM results WHERE batch = ?", (id,)
        ).fetchone()
        if done:
            batch["request_counts"] |= {"completed": int(good), "failed": done - int(good)}
        return batch

    def batches(
        self, after: str | None, limit: int, tag: str = ""
    ) -> tuple[list[dict[str, Any]], bool]:
        """(a tenant's batch objects, newest first, behind the one with id `after`; whether there
        are more)."""
        ids = [
            id
            for (id,) in self._db.execute(
                "SELECT id FROM batches ORDER BY created DESC, rowid DESC"
            )
            if tag_of(id) == tag
        ]
        if after is not None:
            ids = ids[ids.index(after) + 1 :] if after in ids else []
        return [self.batch(id) for id in ids[:limit]], len(ids) > limit

    def unfinished(self) -> list[str]:
        """Ids of batches that still have work, oldest first."""
        marks = ",".join("?" * len(_UNFINISHED))
        rows = self._db.execute(
            f"SELECT id FROM batches WHERE status IN ({marks}) ORDER BY created, rowid", _UNFINISHED
        )
        return [id for (id,) in rows]

    def update(self, id: str, **changes: Any) -> dict[str, Any]:
        """Change fields of a batch object; returns it."""
        batch = self.batch(id) | changes
        row = (batch["status"], orjson.dumps(batch).decode(), id)
        self._db.execute("UPDATE batches SET status = ?, object = ? WHERE id = ?", row)
        return batch

    def done_lines(self, id: str) -> set[int]:
        """Numbers of the lines that have a result."""
        rows = self._db.execute("SELECT line FROM results WHERE batch = ?", (id,))
        return {line for (line,) in rows}

    def add_result(self, id: str, line: int, ok: bool, result: bytes) -> None:
        """Store the result of a line, unless it has one."""
        row = (id, line, int(ok), result)
        self._db.execute("INSERT OR IGNORE INTO results VALUES (?, ?, ?, ?)", row)

    def finish(self, id: str, status: str, seconds: int | None) -> dict[str, Any]:
        """Make the output and error files, which expire after `seconds`, and end the batch."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            changes: dict[str, Any] = {"status": status, f"{status}_at": self.now()}
            counted = self.batch(id)["request_counts"]
            for ok, field, name in ((1, "output_file_id", "output"), (0, "error_file_id", "error")):
                rows = self._db.execute(
                    "SELECT result FROM results WHERE batch = ? AND ok = ? ORDER BY line", (id, ok)
                )
                if content := b"".join([bytes(result) + b"\n" for (result,) in rows]):
                    file = self.add_file(
                        f"{id}_{name}.jsonl", "batch_output", content, seconds, tag_of(id)
                    )
                    changes[field] = file["id"]
            self._db.execute("DELETE FROM results WHERE batch = ?", (id,))
            batch = self.update(id, **changes, request_counts=counted)
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        return batch


def missing(kind: str, id: str) -> Any:
    raise NotFound(f"{kind} {id!r} not found.", field="id")
