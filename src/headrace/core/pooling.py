"""How a checkpoint makes one vector of a text: read from its folder, as JSON alone.

`modules.json` and the folders it names (`1_Pooling`, `2_Dense`, ...) are sentence-transformers'
files. Knows no tensors.
"""

import json
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from headrace.core.errors import LoadError

How = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]

ENCODERS = frozenset(("BertModel", "RobertaModel", "XLMRobertaModel", "CamembertModel"))
REWARD = "ForRewardModel"
_CLASSIFIER = "ForSequenceClassification"
_DECODERS = frozenset(("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"))
_OLD_KEY = "pooling_mode_"
_ACTIVATIONS = frozenset(("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU"))


class Dense(msgspec.Struct, frozen=True, kw_only=True):
    """A linear layer after the pooling; its weights are in `folder`.

    `activation`: the name of a class of torch.nn.
    """

    folder: str
    inputs: int
    outputs: int
    bias: bool
    activation: str


class Pooling(msgspec.Struct, frozen=True, kw_only=True):
    """`how` hidden states become one; then `labels` scores (none: an embedding).

    `dense`: layers of an embedding. `normalize`: it has length 1. `sizes`: the dimensions that may
    be asked for; empty: any. `encoder`: attention goes both ways, so a text is computed in one
    piece. `sigmoid`: the relevance of a pair is the sigmoid of its score, not the score.
    """

    how: How
    normalize: bool = True
    encoder: bool = False
    labels: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    dense: tuple[Dense, ...] = ()
    sigmoid: bool = False

    @property
    def reuse(self) -> bool:
        """Whether the vector can be had without the states of cached tokens."""
        return self.how == "lasttoken" and not self.encoder


def read_pooling(
    path: Path, architecture: str, hf: dict[str, Any], is_embedding: bool
) -> Pooling | None:
    """What the model of this folder pools; None for a model that generates.

    Raises:
        LoadError: the folder asks for something that is not supported.
    """
    encoder = is_encoder(architecture)
    usual: How = "cls" if encoder else "lasttoken"
    if architecture.endswith((_CLASSIFIER, REWARD)):
        labels = _labels(hf, usual=1 if architecture.endswith(REWARD) else 2)
        sigmoid = _sigmoid(hf, usual=len(labels) == 1)
        return Pooling(how=usual, normalize=False, encoder=encoder, labels=labels, sigmoid=sigmoid)
    if not (is_embedding or encoder or architecture in _DECODERS):
        return None
    modules = _modules(path)
    sizes = hf.get("matryoshka_dimensions") or ()
    return Pooling(
        how=_mode(path / modules[0][1] / "config.json") if modules else usual,
        normalize=not modules or modules[-1][0] == "Normalize",
        encoder=encoder,
        sizes=tuple(map(int, sizes)),
        dense=tuple(_dense(path, folder) for kind, folder in modules if kind == "Dense"),
    )


def is_encoder(architecture: str) -> bool:
    """Whether attention goes both ways."""
    return architecture.replace(_CLASSIFIER, "Model") in ENCODERS


def _labels(hf: dict[str, Any], usual: int) -> tuple[str, ...]:
    """Names by class; config.json of one without names has only their number."""
    names = hf.get("id2label")
    if isinstance(names, dict) and names:
        return tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(len(names)))
    return tuple(f"LABEL_{i}" for i in range(int(hf.get("num_labels") or usual)))


def _sigmoid(hf: dict[str, Any], usual: bool) -> bool:
    """What sentence-transformers' CrossEncoder applies to a score, which config.json may name."""
    own = hf.get("sentence_transformers")
    name = own.get("activation_fn") if isinstance(own, dict) else None
    name = name or hf.get("sbert_ce_default_activation_function")
    if name is None:
        return usual
    kind = str(name).rpartition(".")[2]
    if kind not in ("Sigmoid", "Identity"):
        raise LoadError(f"activation_fn {name!r} is neither Sigmoid nor Identity")
    return kind == "Sigmoid"


def _modules(path: Path) -> list[tuple[str, str]]:
    """(kind, folder) of each module after the transformer, in order; empty without the file."""
    file = path / "modules.json"
    found = _read(file)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise LoadError(f"{file} holds no list of modules")
    modules = [
        (str(item.get("type", "")).rpartition(".")[2], str(item.get("path", ""))) for item in found
    ]
    kinds = [kind for kind, _ in modules]
    inner = kinds[2:-1] if kinds[-1:] == ["Normalize"] else kinds[2:]
    if kinds[:2] != ["Transformer", "Pooling"] or set(inner) - {"Dense"}:
        raise LoadError(
            f"{file} lists {', '.join(kinds)}; supported are Transformer, Pooling, any number of "
            "Dense, and Normalize or not, in this order"
        )
    for _, folder in modules[1:]:
        if Path(folder).name != folder or folder == "..":
            raise LoadError(f"{file} names {folder!r}, which is not the name of a folder in it")
    return modules[1:]


def _mode(file: Path) -> How:
    config = _object(file)
    mode = config.get("pooling_mode")
    if mode is None:
        # Files of old have a flag for each mode; without any they mean the mean.
        flags = [key for key, value in config.items() if key.startswith(_OLD_KEY) and value]
        mode = [_OLD_NAMES.get(flag, flag) for flag in flags] or ["mean"]
    if isinstance(mode, list) and len(mode) == 1:
        mode = mode[0]
    if mode not in _MODES:
        raise LoadError(f"{file}: pooling_mode {mode!r} is not one of {', '.join(_MODES)}")
    return mode


def _dense(path: Path, folder: str) -> Dense:
    file = path / folder / "config.json"
    config = _object(file)
    name = str(config.get("activation_function") or "torch.nn.modules.activation.Tanh")
    activation = name.rpartition(".")[2]
    if not name.startswith("torch.nn.") or activation not in _ACTIVATIONS:
        known = ", ".join(sorted(_ACTIVATIONS))
        raise LoadError(f"{file}: activation_function {name!r} is not one of torch.nn's {known}")
    place = config.get("module_input_name") or "sentence_embedding"
    if config.get("use_residual") or {place, config.get("module_output_name") or place} != {
        "sentence_embedding"
    }:
        raise LoadError(f"{file}: a layer beside another is not supported")
    try:
        inputs, outputs = int(config["in_features"]), int(config["out_features"])
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"{file}: in_features and out_features must be numbers") from error
    bias = config.get("bias", True) is not False
    return Dense(folder=folder, inputs=inputs, outputs=outputs, bias=bias, activation=activation)


def _object(file: Path) -> dict[str, Any]:
    config = _read(file)
    if not isinstance(config, dict):
        raise LoadError(f"{file} does not exist or holds no object")
    return config


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, RecursionError, ValueError) as error:
        raise LoadError(f"{file} cannot be read: {error}") from error


_MODES: tuple[How, ...] = get_args(How)
_OLD_NAMES: dict[str, How] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
