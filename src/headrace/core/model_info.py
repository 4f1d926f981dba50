"""What the torch-free half of headrace needs to know about a checkpoint, from its config.json.

Reads plain JSON, never runs code of a checkpoint. The architecture's own fields stay in `hf` for
the model file that understands them.
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from headrace.core.errors import LoadError
from headrace.core.pooling import Pooling, read_pooling

_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "seq_length",
    "max_seq_len",
    "model_max_length",
)
OWN_NAMES = "headrace_tensor_names"
"""Key of config.json: tensors have the decoder's names, whatever the family's checkpoints say."""

_DTYPES = {"float32", "float16", "bfloat16"}
# What no model has more of: a file that says so is to be refused before memory is taken for it.
_MOST_LAYERS = 1 << 12
_MOST = 1 << 28
# What a field of a wrong type raises where it is read.
WRONG_FIELD = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint seen from the scheduler: sizes, context, end-of-sequence ids, defaults.

    `hf` is config.json as a dict; `generation` is generation_config.json as a dict. A model with
    `pooling` makes vectors or scores instead of text.
    """

    path: str
    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    hf: dict[str, Any]
    generation: dict[str, Any]
    pooling: Pooling | None = None

    @property
    def text(self) -> dict[str, Any]:
        """config.json of the text model, which multimodal checkpoints nest."""
        nested = self.hf.get("text_config")
        return nested if isinstance(nested, dict) else self.hf

    @property
    def task(self) -> str:
        """What it does with a text: generate, embed or classify."""
        if self.pooling is None:
            return "generate"
        return "classify" if self.pooling.labels else "embed"

    @property
    def embedding_size(self) -> int:
        """Elements of a whole embedding."""
        dense = self.pooling.dense if self.pooling is not None else ()
        return dense[-1].outputs if dense else self.hidden_size

    def chunk_size(self, asked: int, context_length: int | None) -> tuple[int, str]:
        """Most prompt tokens in a step, and why; -1 stands for no chunks, 0 asks to choose."""
        if self.pooling is not None and self.pooling.encoder:
            whole = context_length or self.context_length
            return max(asked, whole), "an encoder reads a text in one piece"
        return asked or 2048, "it keeps steps short on a CPU"


def read_model_info(
    path: Path, overrides: dict[str, Any] | None = None, *, is_embedding: bool = False
) -> ModelInfo:
    """Read `path`/config.json and generation_config.json.

    `overrides` replaces top-level keys of config.json (--json-model-override-args). `is_embedding`:
    a model that could generate is to make embeddings.

    Raises:
        LoadError: the folder is no checkpoint, or a needed field is missing.
    """
    hf = _read_json(path / "config.json", required=True) | (overrides or {})
    generation = _read_json(path / "generation_config.json", required=False)
    try:
        return _model_info(path, hf, generation, is_embedding)
    except WRONG_FIELD as error:
        raise LoadError(f"{path}/config.json has a field of a wrong type: {error!r}") from error


def _model_info(
    path: Path, hf: dict[str, Any], generation: dict[str, Any], is_embedding: bool
) -> ModelInfo:
    text = hf["text_config"] if isinstance(hf.get("text_config"), dict) else hf
    architectures = hf.get("architectures") or []
    if not isinstance(architectures, list) or not architectures:
        raise LoadError(f"{path}/config.json names no architecture (field 'architectures')")
    heads = _number(text, path, "num_attention_heads", "n_head", "n_heads")
    hidden = _number(text, path, "hidden_size", "n_embd", "n_embed", "d_model")
    layers = _number(text, path, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    if layers > _MOST_LAYERS:
        raise LoadError(f"{path}/config.json has {layers} layers; the most is {_MOST_LAYERS}")
    return ModelInfo(
        path=str(path),
        architecture=str(architectures[0]),
        model_type=str(hf.get("model_type", "")),
        vocab_size=_number(text, path, "padded_vocab_size", "vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_given(text, path, "num_key_value_heads", "multi_query_group_num") or heads,
        head_dim=_given(text, path, "head_dim", "kv_channels") or max(hidden // heads, 1),
        context_length=_context_length(text) - _position_offset(hf),
        dtype=_dtype(text, hf),
        eos_token_ids=_eos_ids(text, hf, generation),
        hf=hf,
        generation=generation,
        pooling=read_pooling(path, str(architectures[0]), hf, is_embedding),
    )


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise LoadError(f"{path} does not exist: is {path.parent} a model folder?") from None
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise LoadError(f"{path} holds {type(value).__name__}, not an object")
    return value


def _number(hf: dict[str, Any], path: Path, *keys: str) -> int:
    found = _given(hf, path, *keys)
    if not found:
        raise LoadError(f"{path}/config.json has no integer field {' or '.join(map(repr, keys))}")
    return found


def _given(hf: dict[str, Any], path: Path, *keys: str) -> int:
    """The first of these fields that says something, 0 for none."""
    key = next((key for key in keys if hf.get(key)), keys[0])
    value = hf.get(key) or 0
    if type(value) is not int or not 0 <= value <= _MOST:
        raise LoadError(
            f"{path}/config.json: {key} must be an integer of 1 to {_MOST}, not {value!r}",
            field=key,
        )
    return value


def _context_length(hf: dict[str, Any]) -> int:
    for key in _CONTEXT_KEYS:
        if type(hf.get(key)) is int and hf[key] > 0:
            return int(hf[key])
    return 2048


def _position_offset(hf: dict[str, Any]) -> int:
    """Positions of the RoBERTa family begin after the padding token's id."""
    if hf.get("model_type") not in ("roberta", "xlm-roberta", "camembert"):
        return 0
    return int(hf.get("pad_token_id") or 0) + 1


def _dtype(text: dict[str, Any], hf: dict[str, Any]) -> str:
    for source in (text, hf):
        for key in ("dtype", "torch_dtype"):
            value = str(source.get(key, "")).removeprefix("torch.")
            if value in _DTYPES:
                return value
    return "float32"


def _eos_ids(*sources: dict[str, Any]) -> tuple[int, ...]:
    """Ids from the generation config (the last source) first, then the model config."""
    found: list[int] = []
    for source in reversed(sources):
        value = source.get("eos_token_id")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, int) and item not in found:
                found.append(item)
    return tuple(found)
