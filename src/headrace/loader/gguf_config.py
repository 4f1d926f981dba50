"""What a GGUF file says of its model, in the words of config.json, and its tensors' usual names.

Architectures whose tensors differ from the checkpoint's by name alone, or by the order of rotated
rows, which is undone. Reads metadata and shapes; no values.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headrace.core.errors import LoadError
from headrace.loader.gguf import GgufFile

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Family:
    """`rotated`: rows of q and k lie in pairs, as llama.cpp turns them.

    `from_one`: norms are stored with the 1 that checkpoints leave out. `extra`: fields of
    config.json that the file implies. `experts`: each feed-forward has some.
    """

    architecture: str
    rotated: bool = False
    from_one: bool = False
    extra: tuple[tuple[str, Any], ...] = ()
    experts: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM", rotated=True),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
    "qwen3moe": Family("Qwen3MoeForCausalLM", extra=(("norm_topk_prob", True),), experts=True),
    "gemma": Family("GemmaForCausalLM", from_one=True),
    "smollm3": Family("SmolLM3ForCausalLM", rotated=True),
}
"""general.architecture -> family."""

_NAMES = (
    (r"^token_embd\.", "model.embed_tokens."),
    (r"^output_norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
    (r"^blk\.(\d+)\.", r"model.layers.\1."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attn_(q|k|v)\.", r".self_attn.\1_proj."),
    (r"\.attn_output\.", ".self_attn.o_proj."),
    (r"\.attn_(q|k)_norm\.", r".self_attn.\1_norm."),
    (r"\.ffn_gate_inp\.", ".mlp.gate."),
    (r"\.ffn_(gate|up|down)_exps\.", r".mlp.experts.\1_proj."),
    (r"\.ffn_(gate|up|down)\.", r".mlp.\1_proj."),
)


def family_of(file: GgufFile) -> Family:
    """Raises LoadError for an architecture that is not known."""
    name = file.metadata.get("general.architecture")
    if name not in FAMILIES:
        raise LoadError(
            f"{file.path}: GGUF architecture {name!r} is not supported; "
            f"known: {', '.join(FAMILIES)}",
            field="general.architecture",
        )
    return FAMILIES[str(name)]


def config_of(file: GgufFile) -> dict[str, Any]:
    """config.json of the model.

    Raises:
        LoadError: a field is missing or of a wrong type.
    """
    family, fields = family_of(file), _Fields(file)
    heads = fields.whole("attention.head_count")
    hidden = fields.whole("embedding_length")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise LoadError(f"{file.path} has no tensor token_embd.weight")
    return {
        "architectures": [family.architecture],
        "model_type": file.metadata["general.architecture"],
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": fields.whole("feed_forward_length"),
        "num_hidden_layers": fields.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.whole("attention.head_count_kv", heads),
        "head_dim": fields.whole("attention.key_length", hidden // heads),
        "max_position_embeddings": fields.whole("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon", 1e-6),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "torch_dtype": "float32" if embedding.kind == "F32" else "bfloat16",
        **dict(family.extra),
        **(_experts(fields) if family.experts else {}),
        **_scaling(file, fields),
        **_tokens(file),
    }


def _experts(fields: "_Fields") -> dict[str, Any]:
    return {
        "num_experts": fields.whole("expert_count"),
        "num_experts_per_tok": fields.whole("expert_used_count"),
        "moe_intermediate_size": fields.whole("expert_feed_forward_length"),
    }


def _scaling(file: GgufFile, fields: "_Fields") -> dict[str, Any]:
    kind = fields.text("rope.scaling.type", "none")
    if "rope_freqs.weight" in file.tensors:
        factors = file.values(file.tensors["rope_freqs.weight"]).tolist()
        return {"rope_scaling": {"rope_type": "factors", "factors": factors}}
    if kind in ("none", ""):
        return {}
    scaling: dict[str, Any] = {
        "rope_type": kind,
        "factor": fields.number("rope.scaling.factor", 1.0),
    }
    original = fields.whole("rope.scaling.original_context_length", 0)
    if original:
        scaling["original_max_position_embeddings"] = original
    return {"rope_scaling": scaling}


def _tokens(file: GgufFile) -> dict[str, Any]:
    found = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = file.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if isinstance(value, int):
            found[f"{ours}_token_id"] = value
    return found


class _Fields:
    """Metadata of the model's architecture, checked."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.prefix = file, file.metadata["general.architecture"]

    def whole(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._wrong(name, "a whole number", value)
        return value

    def number(self, name: str, default: float) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number", value)
        return float(value)

    def text(self, name: str, default: str) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a string", value)
        return value

    def _get(self, name: str, default: Any) -> Any:
        return self.file.metadata.get(f"{self.prefix}.{name}", default)

    def _wrong(self, name: str, wanted: str, value: Any) -> LoadError:
        key = f"{self.prefix}.{name}"
        return LoadError(f"{self.file.path}: {key} must be {wanted}, not {value!r}", field=key)


def usual_name(name: str) -> str:
    """The checkpoint's name of a GGUF tensor."""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def single_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """The name, or those of all experts whose matrices are stacked in it."""
    if len(shape) != 3:
        return [name]
    return [name.replace(".experts.", f".experts.{index}.") for index in range(shape[0])]


def usual_values(family: Family, name: str, values: "Tensor", config: dict[str, Any]) -> "Tensor":
    """The checkpoint's values of a tensor, by its usual name."""
    if family.from_one and name.endswith("norm.weight"):
        return values - 1
    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if family.rotated and f".self_attn.{part}." in name:
            return _unpaired(values, int(config[heads]))
    return values


def _unpaired(values: "Tensor", heads: int) -> "Tensor":
    """Rows of a head from (0, n/2, 1, n/2 + 1, ...) to (0, 1, 2, ...)."""
    paired = values.reshape(heads, -1, 2, *values.shape[1:])
    return paired.transpose(1, 2).reshape(values.shape)
