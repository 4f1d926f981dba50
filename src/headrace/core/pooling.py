"""How a checkpoint makes one vector of a text: read from its folder, as JSON alone.

`modules.json` and `1_Pooling/config.json` are sentence-transformers' files. Knows no tensors.
"""

import json
from pathlib import Path
from typing import Any, Literal

import msgspec

from headrace.core.errors import LoadError

How = Literal["last", "mean", "cls"]

ENCODERS = frozenset(("BertModel", "RobertaModel", "XLMRobertaModel", "CamembertModel"))
_CLASSIFIER = "ForSequenceClassification"
_DECODERS = frozenset(("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"))
_MODULES = {"Transformer", "Pooling", "Normalize"}
_MODES: dict[str, How] = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
_OLD_KEYS = {
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}


class Pooling(msgspec.Struct, frozen=True, kw_only=True):
    """`how` hidden states become one; then `labels` scores (none: an embedding).

    `normalize`: the embedding has length 1. `encoder`: attention goes both ways, so a text is
    computed in one piece. `sizes`: the embedding's dimensions that may be asked for; empty: any.
    """

    how: How
    normalize: bool = True
    encoder: bool = False
    labels: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()

    @property
    def reuse(self) -> bool:
        """Whether the vector can be had without the states of cached tokens."""
        return self.how == "last" and not self.encoder


def read_pooling(
    path: Path, architecture: str, hf: dict[str, Any], is_embedding: bool
) -> Pooling | None:
    """What the model of this folder pools; None for a model that generates.

    Raises:
        LoadError: the folder asks for something that is not supported.
    """
    encoder = is_encoder(architecture)
    if architecture.endswith(_CLASSIFIER):
        return Pooling(
            how="cls" if encoder else "last", normalize=False, encoder=encoder, labels=_labels(hf)
        )
    if not (is_embedding or encoder or architecture in _DECODERS):
        return None
    how: How = "cls" if encoder else "last"
    normalize = True
    if modules := _modules(path):
        normalize = any(kind == "Normalize" for kind, _ in modules)
        for kind, folder in modules:
            if kind == "Pooling":
                how = _mode(path / folder / "config.json")
    sizes = hf.get("matryoshka_dimensions") or ()
    return Pooling(how=how, normalize=normalize, encoder=encoder, sizes=tuple(map(int, sizes)))


def is_encoder(architecture: str) -> bool:
    """Whether attention goes both ways."""
    return architecture.replace(_CLASSIFIER, "Model") in ENCODERS


def _labels(hf: dict[str, Any]) -> tuple[str, ...]:
    """Names by class; config.json of one without names has only their number."""
    names = hf.get("id2label")
    if isinstance(names, dict) and names:
        return tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(len(names)))
    return tuple(f"LABEL_{i}" for i in range(int(hf.get("num_labels") or 2)))


def _modules(path: Path) -> list[tuple[str, str]]:
    """(kind, folder) of each module of modules.json, in order; empty without the file."""
    found = _read(path / "modules.json")
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise LoadError(f"{path}/modules.json holds no list of modules")
    modules = [
        (str(item.get("type", "")).rpartition(".")[2], str(item.get("path", ""))) for item in found
    ]
    for kind, _ in modules:
        if kind not in _MODULES:
            raise LoadError(
                f"{path}/modules.json has a module {kind!r}; "
                f"supported are {', '.join(sorted(_MODULES))}"
            )
    return modules


def _mode(file: Path) -> How:
    config = _read(file)
    if not isinstance(config, dict):
        raise LoadError(f"{file} does not exist or holds no object")
    mode = config.get("pooling_mode")
    if mode is None:
        modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        mode = _OLD_KEYS.get(modes[0], modes[0]) if len(modes) == 1 else modes
    if not isinstance(mode, str) or mode not in _MODES:
        raise LoadError(f"{file}: pooling_mode {mode!r} is not one of {', '.join(_MODES)}")
    return _MODES[mode]


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise LoadError(f"{file} cannot be read: {error}") from error
