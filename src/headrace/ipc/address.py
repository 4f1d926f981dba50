"""Where the processes of one server meet: a private folder of unix sockets.

The folder is named `headrace-<pid>-<random>`, has mode 0700, and is locked by its owner for as long
as the owner lives. The kernel drops the lock with the process, so that folders left by a killed
server are told from living ones, also across pid namespaces. Knows nothing of messages.
"""

import fcntl
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

import msgspec

_PREFIX = "headrace-"
_LOCK = "lock"
_LONGEST_SOCKET_PATH = 107
# Younger folders may be in the making: made, but not locked yet.
_YOUNG_SECONDS = 60.0


class Addresses(msgspec.Struct, frozen=True):
    """ZMQ endpoints of one server. Each is bound by the process it is named after."""

    folder: str
    tokenizer: str
    scheduler: str
    detokenizer: str


def numbered(address: str, number: int) -> str:
    """The address of one of several processes of a kind; the first one has the plain address."""
    return f"{address}-{number}" if number else address


class AddressFolder:
    """The folder of one server, made and removed by the process that serves."""

    def __init__(self, base: Path | None = None) -> None:
        base = base or _base()
        sweep(base)
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))
        self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.addresses = Addresses(
            str(self.path),
            *(f"ipc://{self.path}/{name}" for name in ("tokenizer", "scheduler", "detokenizer")),
        )

    def remove(self) -> None:
        """Remove the folder. May be called twice."""
        remove(str(self.path))
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove(folder: str) -> None:
    """Remove a folder of sockets; one that is gone already is fine."""
    shutil.rmtree(folder, ignore_errors=True)


def sweep(base: Path) -> list[Path]:
    """Remove the folders of this user's dead servers under `base`; returns them."""
    removed = []
    for folder in base.glob(f"{_PREFIX}*-*"):
        if _abandoned(folder):
            remove(str(folder))
            removed.append(folder)
    return removed


def _abandoned(folder: Path) -> bool:
    """Nobody holds the lock of this user's folder, and nobody is about to take it."""
    try:
        status = folder.lstat()
        if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
            return False
        old = time.time() - status.st_mtime > _YOUNG_SECONDS
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return folder.exists() and old
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return old or not _alive(folder.name)


def _alive(name: str) -> bool:
    """Is the process that made the folder `name` there?"""
    pid = name.removeprefix(_PREFIX).partition("-")[0]
    return pid.isdigit() and Path("/proc", pid).exists()


def _base() -> Path:
    """A folder for sockets whose path is short enough for a unix socket."""
    for candidate in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir()):
        if candidate and os.access(candidate, os.W_OK | os.X_OK):
            longest = Path(candidate) / f"{_PREFIX}4194304-12345678" / "detokenizer-64"
            if len(os.fsencode(longest)) <= _LONGEST_SOCKET_PATH:
                return Path(candidate)
    return Path("/tmp")
