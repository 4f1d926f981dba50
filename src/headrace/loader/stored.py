"""What a checkpoint of safetensors files holds, from its index or headers alone."""

from pathlib import Path

from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo
from headrace.loader.files import weight_files
from headrace.loader.safetensors import read_header


def stored_names(info: ModelInfo) -> list[str]:
    """Names of all tensors; none where there are no such files."""
    try:
        files = weight_files(Path(info.path))
    except LoadError:
        return []
    if files.index is not None:
        return list(files.index)
    return [entry.name for path in files.paths for entry in read_header(path)]
