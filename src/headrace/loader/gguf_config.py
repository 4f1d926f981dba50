"""What a GGUF file says of its model, in the words of config.json, and its tensors' names here.

Tensors are named as the decoder names them, whatever their checkpoint's names were: config.json
says so by `OWN_NAMES`. What llama.cpp turns or shifts is put back. Reads metadata and shapes, of
values only the factors of rotary positions.
"""

import math
import re
from typing import TYPE_CHECKING, Any

from headrace.core.errors import LoadError
from headrace.core.model_info import OWN_NAMES
from headrace.loader.gguf import GgufFile
from headrace.loader.gguf_families import FAMILIES, Family
from headrace.loader.gguf_fields import Fields

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = (
    (r"^token_embd\.", "model.embed_tokens."),
    (r"^token_embd_norm\.", "model.embed_norm."),
    (r"^position_embd\.", "model.embed_positions."),
    (r"^output_norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
    (r"^blk\.(\d+)\.", r"model.layers.\1."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.(attn_norm_2|attn_output_norm|ffn_norm|post_attention_norm)\.",
     ".post_attention_layernorm."),
    (r"\.post_ffw_norm\.", ".post_feedforward_layernorm."),
    (r"\.attn_(qkv|q|k|v)\.", r".self_attn.\1_proj."),
    (r"\.attn_output\.", ".self_attn.o_proj."),
    (r"\.attn_(q|k)_norm\.", r".self_attn.\1_norm."),
    (r"\.attn_sinks\.weight", ".self_attn.sinks"),
    (r"\.attn_q_(a|b)\.", r".self_attn.q_\1_proj."),
    (r"\.attn_kv_a_mqa\.", ".self_attn.kv_a_proj_with_mqa."),
    (r"\.attn_kv_b\.", ".self_attn.kv_b_proj."),
    (r"\.attn_(q|kv)_a_norm\.", r".self_attn.\1_a_layernorm."),
    (r"\.ffn_gate_inp\.", ".mlp.gate."),
    (r"\.exp_probs_b\.bias", ".mlp.gate.e_score_correction_bias"),
    (r"\.ffn_gate_inp_shexp\.", ".mlp.shared_expert_gate."),
    (r"\.ffn_(gate|up|down)_shexp\.", r".mlp.shared_expert.\1_proj."),
    (r"\.experts\.gate_up_proj_bias", ".mlp.experts.gate_up_proj_bias"),
    (r"\.ffn_down_exps\.bias", ".mlp.experts.down_proj_bias"),
    (r"\.ffn_(gate|up|down)_exps\.", r".mlp.experts.\1_proj."),
    (r"\.ffn_(gate|up|down)\.", r".mlp.\1_proj."),
)  # fmt: skip


def family_of(file: GgufFile) -> Family:
    """Raises LoadError for an architecture that is not known."""
    name = file.metadata.get("general.architecture")
    if name not in FAMILIES:
        raise LoadError(
            f"{file.path}: GGUF architecture {name!r} is not supported; "
            f"known: {', '.join(FAMILIES)}",
            field="general.architecture",
        )
    family, fields = FAMILIES[str(name)], Fields(file)
    return next((other for fits, other in family.variants if fits(fields)), family)


def config_of(file: GgufFile) -> dict[str, Any]:
    """config.json of the model.

    Raises:
        LoadError: a field is missing or of a wrong type.
    """
    family, fields = family_of(file), Fields(file)
    parts = file.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise LoadError(
            f"{file.path} is one of {parts} files: merge them with llama-gguf-split",
            field="split.count",
        )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise LoadError(f"{file.path} has no tensor token_embd.weight")
    config = {
        OWN_NAMES: True,
        "architectures": [family.architecture],
        "model_type": file.metadata["general.architecture"],
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": fields.has("attn_q.bias") or fields.has("attn_qkv.bias"),
        "torch_dtype": "float32" if embedding.kind == "F32" else "bfloat16",
        **_sizes(fields),
        **_positions(fields),
        **_norms(fields),
        **_tokens(file),
    }
    own = family.config(fields)
    scaling = _scaling(fields)
    if scaling:
        config["rope_scaling"] = scaling | own.pop("rope_scaling", {})
    else:
        own.pop("rope_scaling", None)
    return config | own


def _sizes(fields: Fields) -> dict[str, Any]:
    heads = fields.whole("attention.head_count")
    hidden = fields.whole("embedding_length")
    if not heads:
        raise LoadError(f"{fields.file.path}: attention.head_count is 0")
    return {
        "hidden_size": hidden,
        "intermediate_size": fields.whole("feed_forward_length"),
        "num_hidden_layers": fields.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.whole("attention.head_count_kv", heads),
        "head_dim": fields.whole("attention.key_length", hidden // heads),
        "max_position_embeddings": fields.whole("context_length"),
    }


def _positions(fields: Fields) -> dict[str, Any]:
    sizes = _sizes(fields)
    turned = fields.whole("rope.dimension_count", sizes["head_dim"])
    return {
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "partial_rotary_factor": turned / sizes["head_dim"],
    }


def _norms(fields: Fields) -> dict[str, Any]:
    rms = fields.number("attention.layer_norm_rms_epsilon", 0.0)
    layer = fields.number("attention.layer_norm_epsilon", 0.0)
    return ({"rms_norm_eps": rms} if rms else {}) | ({"layer_norm_eps": layer} if layer else {})


def _scaling(fields: Fields) -> dict[str, Any]:
    """Of rotary positions, as `read_rope` takes it; nothing for none."""
    file, kind = fields.file, fields.text("rope.scaling.type", "none")
    factors = {
        name: file.values(file.tensors[f"rope_{name}.weight"]).tolist()
        for name in ("freqs", "factors_short", "factors_long")
        if f"rope_{name}.weight" in file.tensors
    }
    original = fields.whole("rope.scaling.original_context_length", 0)
    scaling: dict[str, Any] = {"original_max_position_embeddings": original} if original else {}
    sharper = fields.number("rope.scaling.attn_factor", 1.0)
    if "freqs" in factors:
        return {"rope_type": "factors", "factors": factors["freqs"]}
    if "factors_long" in factors:
        short = factors.get("factors_short", factors["factors_long"])
        both = {"short_factor": short, "long_factor": factors["factors_long"]}
        return scaling | {"rope_type": "longrope", "attention_factor": sharper, **both}
    if kind in ("none", "", "longrope"):
        return {}
    scaling |= {"rope_type": kind, "factor": fields.number("rope.scaling.factor", 1.0)}
    return scaling | _yarn(fields, scaling["factor"], sharper) if kind == "yarn" else scaling


def _yarn(fields: Fields, factor: float, sharper: float) -> dict[str, Any]:
    found = {
        name: fields.number(f"rope.scaling.yarn_{name}", 0.0)
        for name in ("beta_fast", "beta_slow")
        if fields.number(f"rope.scaling.yarn_{name}", 0.0)
    }
    # A tenth of it, as llama.cpp's logarithm has it.
    every = fields.number("rope.scaling.yarn_log_multiplier", 0.0) * 10
    if every:
        return found | {"mscale": every, "mscale_all_dim": every}
    return found if sharper == 1 else found | {"attention_factor": sharper * _mscale(factor)}


def _mscale(factor: float) -> float:
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def _tokens(file: GgufFile) -> dict[str, Any]:
    """A turn's or a message's end ends a text too."""
    ids = {
        name: value
        for name in ("bos", "padding", "eos", "eot", "eom")
        if isinstance(value := file.metadata.get(f"tokenizer.ggml.{name}_token_id"), int)
    }
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
    found: dict[str, Any] = {"eos_token_id": ends} if ends else {}
    for ours, theirs in (("bos", "bos"), ("pad", "padding")):
        if theirs in ids:
            found[f"{ours}_token_id"] = ids[theirs]
    return found


def usual_name(family: Family, name: str) -> str:
    """The decoder's name of a GGUF tensor."""
    for pattern, replacement in (*family.names, *_NAMES):
        name = re.sub(pattern, replacement, name)
    return name


def single_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """The name, or those of all experts whose matrices are stacked in it."""
    if len(shape) != 3:
        return [name]
    return [name.replace(".experts.", f".experts.{index}.") for index in range(shape[0])]


def usual_values(family: Family, name: str, values: "Tensor", config: dict[str, Any]) -> "Tensor":
    """The values that a checkpoint has, of a tensor by its name here."""
    if family.from_one and name.endswith("norm.weight"):
        return values - 1
    if name.endswith("shared_expert_gate.weight") and values.dim() == 1:
        return values[None]
    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if family.rotated and f".self_attn.{part}." in name:
            return _unpaired(values, int(config[heads]))
    return values


def _unpaired(values: "Tensor", heads: int) -> "Tensor":
    """Rows of a head from (0, n/2, 1, n/2 + 1, ...) to (0, 1, 2, ...)."""
    paired = values.reshape(heads, -1, 2, *values.shape[1:])
    return paired.transpose(1, 2).reshape(values.shape)
