"""Downloads from a hub: Hugging Face's, or ModelScope with HEADRACE_USE_MODELSCOPE=1. No torch.

Only what a load format reads comes, with config and tokenizer. Two processes that want the same
model make one download: the second waits at a lock. HF_HUB_OFFLINE=1 uses what is there.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace.core.errors import LoadError

logger = logging.getLogger(__name__)

_ALWAYS = ["*.json", "*.model", "*.txt", "*.jinja", "tokenizer*", "*.tiktoken"]
_NEVER = ["original/*", "onnx/*", "openvino*", "adapter_*", "training_args*", "optimizer*"]
_CONSOLIDATED = "consolidated*"
_TRUE = ("1", "true", "yes", "on")


def patterns(load_format: str) -> tuple[list[str], list[str]]:
    """(names to take, names to leave) of a repository."""
    if load_format in ("pt", "npcache"):
        return [*_ALWAYS, "*.bin", "*.pt"], [*_NEVER, _CONSOLIDATED, "scheduler*"]
    if load_format == "mistral":
        return [*_ALWAYS, _CONSOLIDATED], [*_NEVER, "*.index.json", "*.pth"]
    if load_format == "dummy":
        return _ALWAYS, [*_NEVER, "*.bin", _CONSOLIDATED]
    return [*_ALWAYS, "*.safetensors"], [*_NEVER, _CONSOLIDATED]


def download(repo: str, revision: str, download_dir: str, load_format: str) -> Path:
    """The local folder of a repository.

    Raises:
        LoadError: it does not exist, cannot be reached, or a file does not come.
    """
    fetch = _from_modelscope if _use_modelscope() else _from_hugging_face
    with _one_download(f"{fetch.__name__} {repo} {revision} {download_dir}"):
        return fetch(repo, revision, download_dir, *patterns(load_format))


def _use_modelscope() -> bool:
    """SGLang's name of the variable is understood too."""
    names = ("HEADRACE_USE_MODELSCOPE", "SGLANG_USE_MODELSCOPE")
    return any(os.environ.get(name, "").lower() in _TRUE for name in names)


def _from_hugging_face(
    repo: str, revision: str, download_dir: str, wanted: list[str], unwanted: list[str]
) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision or None,
            cache_dir=download_dir or None,
            allow_patterns=wanted,
            ignore_patterns=unwanted,
        )
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise LoadError(
            f"{repo} is no local folder, and getting it from the hub failed: {error}"
        ) from error
    return Path(folder)


def _from_modelscope(
    repo: str, revision: str, download_dir: str, wanted: list[str], unwanted: list[str]
) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise LoadError(
            "ModelScope needs the package modelscope: pip install 'headrace[modelscope]'"
        ) from error
    try:
        folder = snapshot_download(
            repo,
            revision=revision or None,
            cache_dir=download_dir or None,
            allow_patterns=wanted,
            ignore_patterns=unwanted,
            local_files_only=os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE,
        )
    # Its errors have no common base; whatever went wrong, there is no model.
    except Exception as error:
        raise LoadError(
            f"{repo} is no local folder, and getting it from ModelScope failed: {error}"
        ) from error
    return Path(folder)


@contextmanager
def _one_download(what: str) -> Iterator[None]:
    """Inside, no other process of this machine downloads the same."""
    from filelock import FileLock, Timeout

    name = f"headrace-{os.getuid()}-{hashlib.sha256(what.encode()).hexdigest()[:24]}.lock"
    lock = FileLock(Path(tempfile.gettempdir()) / name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another process downloads this model: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
