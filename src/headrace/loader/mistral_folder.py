"""A folder in Mistral's own form as one with config.json and tokenizer.json. No torch.

params.json becomes config.json and tekken.json tokenizer.json, in a folder of the user's cache that
is made again when they change; `MISTRAL_KEY` in config.json says where the weights are.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo

MISTRAL_KEY = "headrace_mistral_folder"

# tokenizer.json and what belongs to it is taken as it is where there is one.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
}
_BEHIND = {"n_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps"}
_IGNORED = {"_sliding_window", "model_type", "tied_embeddings", "max_position_embeddings"}
_CONTEXT = 32768
_THETA = 10000.0


def weights_folder(info: ModelInfo) -> Path:
    """Where the weights of a model are: beside its config.json, but for this form."""
    return Path(info.hf.get(MISTRAL_KEY, info.path))


def model_folder(folder: Path) -> Path:
    """The folder to serve `folder` from.

    Raises:
        LoadError: params.json or tekken.json is missing or not understood, or the cache cannot be
            written.
    """
    folder = folder.expanduser().resolve()
    own = [path for path in folder.iterdir() if path.suffix in (".json", ".jinja", ".model")]
    state = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in own)
    digest = hashlib.sha256(f"{folder} {state}".encode()).hexdigest()[:16]
    made = _cache() / f"{folder.name}-{digest}"
    if (made / "config.json").is_file():
        return made
    config = config_of(_read(folder / "params.json"), folder / "params.json")
    try:
        made.mkdir(parents=True, exist_ok=True)
        _write_tokenizer(folder, made)
        _write(made / "config.json", config | {MISTRAL_KEY: str(folder)})  # where it is, all are
    except OSError as error:
        raise LoadError(f"{made} cannot be written: {error}") from error
    return made


def config_of(params: dict[str, Any], path: Path) -> dict[str, Any]:
    """params.json as the config.json of the same model.

    Raises:
        LoadError: a field is missing, has a wrong type, or is one that is not supported.
    """
    own = {"rope_theta", "sliding_window", "max_seq_len", "moe", "quantization"}
    known = {*_FIELDS, *_BEHIND, *_IGNORED, *own}
    for name, value in params.items():
        if name not in known and value not in (None, False, {}, []):
            raise LoadError(f"{path}: field {name!r} is not supported", field=name)
    config: dict[str, Any] = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "dtype": "bfloat16",
        "tie_word_embeddings": bool(params.get("tied_embeddings", False)),
        "num_key_value_heads": params.get("n_kv_heads") or params.get("n_heads"),
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": float(params.get("rope_theta") or _THETA),
        "sliding_window": params.get("sliding_window") or params.get("_sliding_window"),
        "max_position_embeddings": params.get("max_seq_len")
        or params.get("max_position_embeddings")
        or _CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if params.get("quantization"):
        config["quantization_config"] = _quantization(params["quantization"], path)
    for theirs, ours in _FIELDS.items():
        value = params.get(theirs)
        if theirs == "head_dim" and value is None and isinstance(params.get("dim"), int):
            value = params["dim"] // max(1, int(params.get("n_heads") or 1))
        if type(value) is not int or value <= 0:
            raise LoadError(f"{path}: {theirs} must be a positive integer", field=theirs)
        config[ours] = value
    moe = params.get("moe")
    if moe:
        config |= {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": moe.get("num_experts"),
            "num_experts_per_tok": moe.get("num_experts_per_tok"),
        }
    return config


def _quantization(found: Any, path: Path) -> dict[str, Any]:
    format = found.get("qformat_weight") if isinstance(found, dict) else found
    if format != "fp8_e4m3":
        raise LoadError(
            f"{path}: quantization.qformat_weight must be fp8_e4m3, not {format!r}",
            field="quantization",
        )
    usual = {"quant_method": "fp8", "activation_scheme": "static"}
    return usual | {"modules_to_not_convert": ["lm_head"]}


def _write_tokenizer(folder: Path, made: Path) -> None:
    if (folder / "tokenizer.json").is_file():
        for name in _TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, made / name)
        return
    found = sorted(folder.glob("tekken*.json"))
    if not found:  # --skip-tokenizer-init or --tokenizer-path may make up for it
        return
    from headrace.loader.tekken import tokenizer_of

    tokenizer, tokenizer_config = tokenizer_of(_read(found[-1]), found[-1])
    _write(made / "tokenizer.json", tokenizer)
    _write(made / "tokenizer_config.json", tokenizer_config)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoadError(f"{path} does not exist: is it a folder in Mistral's form?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise LoadError(f"{path} holds {type(value).__name__}, not an object")
    return value


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "headrace" / "mistral"


def _write(path: Path, content: dict[str, Any]) -> None:
    """The file appears whole or not at all."""
    text = json.dumps(content, ensure_ascii=False)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    Path(file.name).replace(path)
