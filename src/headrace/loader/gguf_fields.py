"""The metadata of a GGUF file's architecture, each value checked as it is asked for."""

from typing import Any

from headrace.core.errors import LoadError
from headrace.loader.gguf import GgufFile


class Fields:
    """Values by their name behind that of the architecture.

    Raises:
        LoadError: a field is missing or of a wrong type; names it.
    """

    def __init__(self, file: GgufFile) -> None:
        self.file, self.prefix = file, file.metadata["general.architecture"]

    def whole(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._wrong(name, "a whole number", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number", value)
        return float(value)

    def text(self, name: str, default: str) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a string", value)
        return value

    def truth(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def pattern(self, name: str, period: int) -> list[bool]:
        """Of each layer: a list, or one number n for all but each n-th."""
        value, count = self._get(name, period), self.whole("block_count")
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return [index % value < value - 1 for index in range(count)]
        if not isinstance(value, list) or len(value) < count:
            raise self._wrong(name, f"a number or a list of {count}", value)
        return [bool(item) for item in value[:count]]

    def has(self, tensor: str) -> bool:
        """Whether the first layer that could have it does."""
        return f"blk.0.{tensor}" in self.file.tensors

    def _get(self, name: str, default: Any) -> Any:
        return self.file.metadata.get(f"{self.prefix}.{name}", default)

    def _wrong(self, name: str, wanted: str, value: Any) -> LoadError:
        key = f"{self.prefix}.{name}"
        return LoadError(f"{self.file.path}: {key} must be {wanted}, not {value!r}", field=key)
