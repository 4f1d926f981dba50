"""Are the files of a checkpoint those that somebody vouches for? No torch.

A manifest is what sha256sum prints, or JSON: {name: sum} or {"files": {name: sum}}, where a sum is
64 hexadecimal digits or an object with the key "sha256" or "checksum".
"""

import hashlib
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from headrace.core.errors import LoadError

_LINE = re.compile(r"\\?([0-9a-fA-F]{64}) [ *](.+)")
_SUM = re.compile(r"[0-9a-fA-F]{64}")


def verify(manifest: Path, folder: Path, needed: Sequence[Path], threads: int = 4) -> None:
    """Every file of `folder` that the manifest names, and every one in `needed`, must be right.

    Raises:
        LoadError: a file is missing, not listed, or has another sum; names it.
    """
    sums = read_manifest(manifest)
    for path in needed:
        if path.name not in sums:
            raise LoadError(f"{path} is not listed in {manifest}", field="model_checksum")
    for name in sums:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise LoadError(f"{manifest} names {name!r}, which is outside of the model's folder")
        if not (folder / name).is_file():
            raise LoadError(f"{folder / name} is listed in {manifest}, but does not exist")
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda name: sha256(folder / name), sums)
        for (name, wanted), digest in zip(sums.items(), found, strict=True):
            if digest != wanted.lower():
                raise LoadError(
                    f"{folder / name} has SHA-256 {digest}, but {manifest} says {wanted}: "
                    "it is damaged or another version",
                    field="model_checksum",
                )


def read_manifest(path: Path) -> dict[str, str]:
    """File name -> sum. Raises LoadError for anything else."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {error}", field="model_checksum") from error
    sums = _from_json(path, text) if text.lstrip().startswith("{") else _from_lines(path, text)
    if not sums:
        raise LoadError(f"{path} lists no files", field="model_checksum")
    return sums


def sha256(path: Path) -> str:
    """64 hexadecimal digits."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error}") from error


def _from_lines(path: Path, text: str) -> dict[str, str]:
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = _LINE.fullmatch(line)
        if line.strip() and match is None:
            raise LoadError(f"{path}:{number} is no line of sha256sum: {line[:100]!r}")
        if match:
            found[match[2].removeprefix("./")] = match[1]
    return found


def _from_json(path: Path, text: str) -> dict[str, str]:
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path} is no JSON: {error}", field="model_checksum") from error
    files = listed.get("files", listed)
    if not isinstance(files, dict):
        raise LoadError(f"{path}: files must map names to sums", field="model_checksum")
    return {name: _sum_of(path, name, value) for name, value in files.items()}


def _sum_of(path: Path, name: str, value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("sha256") or value.get("checksum")
    if not isinstance(value, str) or not _SUM.fullmatch(value):
        raise LoadError(f"{path}: the sum of {name} is no SHA-256: {str(value)[:100]!r}")
    return value
