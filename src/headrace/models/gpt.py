"""Families of the GPT line: layer norm, a feed-forward without gate, often both blocks at once."""

from dataclasses import replace

import torch

from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo
from headrace.layers.names import Layout, grouped_qkv, turned
from headrace.layers.norm import NormSpec
from headrace.layers.rope_scaling import read_rope
from headrace.models.decoder import Decoder
from headrace.models.family import (
    Fields,
    alibi_slopes,
    attention_bias,
    decoder,
    layer_norm,
    layer_types,
    renamed,
    size,
    typed_windows,
    with_ropes,
)
from headrace.models.spec import DecoderSpec


class GPT2LMHeadModel(Decoder):
    """GPT-2: learned positions, matrices stored [in, out]."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        _refuse(hf, "scale_attn_by_inverse_layer_idx", "add_cross_attention")
        return decoder(
            info,
            norm=layer_norm(hf),
            ropes=(),
            positions=size(hf, "n_positions"),
            attention={
                "qkv_bias": True,
                "out_bias": True,
                "rope": None,
                "scale": 0.0 if hf.get("scale_attn_weights", True) else 1.0,
            },
            mlp=_plain_mlp(info, "n_inner", "activation_function", bias=True),
            tied=bool(hf.get("tie_word_embeddings", True)),
            layout=Layout(
                renames=(
                    (r"^transformer\.", ""),
                    (r"^wte\.", "model.embed_tokens."),
                    (r"^wpe\.", "model.embed_positions."),
                    (r"^h\.", "model.layers."),
                    (r"^ln_f\.", "model.norm."),
                    *_GPT_NAMES,
                    (r"\.attn\.c_attn\.", ".self_attn.qkv_proj."),
                    (r"\.attn\.c_proj\.", ".self_attn.o_proj."),
                    (r"\.mlp\.c_fc\.", ".mlp.up_proj."),
                    (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
                ),
                splits=(turned(r"model\.layers\..*_proj\.weight"),),
                ignored=(r"\.attn\.(masked_)?bias$",),
            ),
        )


class GPTJForCausalLM(Decoder):
    """GPT-J: both blocks from one norm, neighbors turn, the head has a bias."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        rope = read_rope({"max_position_embeddings": size(hf, "n_positions")}, info.head_dim)
        return decoder(
            info,
            norm=layer_norm(hf),
            ropes=(replace(rope, dim=int(hf.get("rotary_dim") or info.head_dim)),),
            attention={"interleaved": True},
            mlp=_plain_mlp(info, "n_inner", "activation_function", bias=True),
            layer={"wiring": "parallel"},
            head_bias=True,
            layout=Layout(
                renames=(
                    (r"^transformer\.wte\.", "model.embed_tokens."),
                    (r"^transformer\.ln_f\.", "model.norm."),
                    (r"^transformer\.h\.", "model.layers."),
                    *_GPT_NAMES,
                    (r"\.attn\.out_proj\.", ".self_attn.o_proj."),
                    (r"\.attn\.", ".self_attn."),
                    (r"\.mlp\.fc_in\.", ".mlp.up_proj."),
                    (r"\.mlp\.fc_out\.", ".mlp.down_proj."),
                ),
                ignored=(r"\.self_attn\.(masked_)?bias$", r"\.embed_positions$"),
            ),
        )


class GPTNeoXForCausalLM(Decoder):
    """GPT-NeoX and Pythia (arXiv 2204.06745): q, k, v stacked by head."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        bias = bool(hf.get("attention_bias", True))
        parallel = bool(hf.get("use_parallel_residual", True))
        part, theta = hf.get("rotary_pct", 0.25), hf.get("rotary_emb_base")
        old = {"rope_theta": theta, "partial_rotary_factor": part}
        heads = info.num_heads
        return decoder(
            info,
            norm=layer_norm(hf),
            ropes=(read_rope(old | hf, info.head_dim),),
            attention={"qkv_bias": bias, "out_bias": bias},
            mlp=_plain_mlp(info, bias=True),
            layer={"wiring": "parallel-two" if parallel else "pre"},
            layout=Layout(
                renames=(
                    (r"^gpt_neox\.embed_in\.", "model.embed_tokens."),
                    (r"^gpt_neox\.final_layer_norm\.", "model.norm."),
                    (r"^gpt_neox\.", "model."),
                    (r"^embed_out\.", "lm_head."),
                    *_MEGATRON_NAMES,
                ),
                splits=(grouped_qkv("query_key_value", heads, heads, info.head_dim),),
                ignored=(r"\.self_attn\.(masked_)?bias$",),
            ),
        )


class OPTForCausalLM(Decoder):
    """OPT (arXiv 2205.01068): learned positions that begin at row 2, ReLU."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        if hf.get("word_embed_proj_dim", info.hidden_size) != info.hidden_size:
            raise LoadError(
                "OPT with projected embeddings is not supported", field="word_embed_proj_dim"
            )
        if not hf.get("do_layer_norm_before", True) or hf.get("_remove_final_layer_norm"):
            raise LoadError("OPT needs do_layer_norm_before", field="do_layer_norm_before")
        bias = bool(hf.get("enable_bias", True))
        affine = bool(hf.get("layer_norm_elementwise_affine", True))
        return decoder(
            info,
            norm=NormSpec(1e-5, "layer", bias=affine, weight=affine),
            ropes=(),
            positions=size(hf, "max_position_embeddings"),
            first_position=2,
            attention={"qkv_bias": bias, "out_bias": bias, "rope": None},
            mlp=_plain_mlp(info, "ffn_dim", "activation_function", bias=bias),
            tied=bool(hf.get("tie_word_embeddings", True)),
            layout=renamed(
                (r"^(model\.)?decoder\.", "model."),
                (r"^model\.final_layer_norm\.", "model.norm."),
                (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
                (r"\.self_attn_layer_norm\.", ".input_layernorm."),
                (r"\.final_layer_norm\.", ".post_attention_layernorm."),
                (r"\.fc1\.", ".mlp.up_proj."),
                (r"\.fc2\.", ".mlp.down_proj."),
            ),
        )


class FalconForCausalLM(Decoder):
    """Falcon (arXiv 2311.16867), both generations of its decoder, with rotary positions or ALiBi.

    Slopes are kept in bf16, and scores are scaled after they were added.
    """

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        sloped = bool(hf.get("alibi"))
        new = bool(hf.get("new_decoder_architecture"))
        grouped = new or not hf.get("multi_query", True)
        kv_heads = int(hf.get("num_kv_heads") or info.num_heads) if grouped else 1
        norms = hf.get("num_ln_in_parallel_attn") or (2 if new else 1)
        parallel = "parallel-two" if new and norms == 2 else "parallel"
        bias = bool(hf.get("bias", False))
        return decoder(
            info,
            norm=layer_norm(hf),
            ropes=() if sloped else None,
            attention={"kv_heads": kv_heads, "qkv_bias": bias, "out_bias": bias}
            | (_falcon_slopes(info) if sloped else {}),
            mlp=_plain_mlp(info, "ffn_hidden_size", "activation", bias=bias),
            layer={"wiring": parallel if new or hf.get("parallel_attn", True) else "pre"},
            tied=bool(hf.get("tie_word_embeddings", True)),
            layout=Layout(
                renames=(
                    (r"^transformer\.word_embeddings\.", "model.embed_tokens."),
                    (r"^transformer\.ln_f\.", "model.norm."),
                    (r"^transformer\.h\.", "model.layers."),
                    (r"\.ln_attn\.", ".input_layernorm."),
                    (r"\.ln_mlp\.", ".post_attention_layernorm."),
                    (r"\.self_attention\.", ".attention."),
                    *_MEGATRON_NAMES,
                ),
                splits=(grouped_qkv("query_key_value", info.num_heads, kv_heads, info.head_dim),),
            ),
        )


class PhiForCausalLM(Decoder):
    """Phi-1 and Phi-2 (arXiv 2309.05463): both blocks from one norm, biases everywhere."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        norm = layer_norm(hf)
        rope = read_rope({"partial_rotary_factor": 0.5} | hf, info.head_dim)
        return decoder(
            info,
            norm=norm,
            ropes=(rope,),
            attention={
                "qkv_bias": True,
                "out_bias": True,
                "qk_norm": "head" if hf.get("qk_layernorm") else "",
            },
            mlp=_plain_mlp(info, bias=True),
            layer={"wiring": "parallel"},
            head_bias=True,
            layout=renamed(
                (r"^model\.final_layernorm\.", "model.norm."),
                (r"\.self_attn\.dense\.", ".self_attn.o_proj."),
                (r"\.self_attn\.([qk])_layernorm\.", r".self_attn.\1_norm."),
                (r"\.mlp\.fc1\.", ".mlp.up_proj."),
                (r"\.mlp\.fc2\.", ".mlp.down_proj."),
            ),
        )


class StableLmForCausalLM(Decoder):
    """StableLM (arXiv 2402.17834): a quarter of a head turns, a gated feed-forward."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        rope = read_rope({"partial_rotary_factor": 0.25} | hf, info.head_dim)
        heads = [rf"\.self_attn\.{n}_layernorm\.norms\." for n in "qk"]
        return decoder(
            info,
            norm=layer_norm(hf),
            ropes=(rope,),
            attention={
                "qkv_bias": bool(hf.get("use_qkv_bias", False)),
                "qk_norm": "heads" if hf.get("qk_layernorm") else "",
            },
            layer={"wiring": "parallel" if hf.get("use_parallel_residual") else "pre"},
            layout=renamed(
                (heads[0] + r"(\d+)\.weight", r".self_attn.q_norm.\1.weight"),
                (heads[1] + r"(\d+)\.weight", r".self_attn.k_norm.\1.weight"),
            ),
        )


class Starcoder2ForCausalLM(Decoder):
    """StarCoder2 (arXiv 2402.19173): a window on every layer, biases everywhere."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        bias = bool(hf.get("use_bias", True))
        window = int(hf.get("sliding_window") or 0)
        return decoder(
            info,
            norm=layer_norm(hf, "norm_epsilon"),
            windows=(window,) * info.num_layers,
            attention={"qkv_bias": bias, "out_bias": bias},
            mlp=_plain_mlp(info, bias=bias),
            tied=bool(hf.get("tie_word_embeddings", True)),
            layout=renamed(
                (r"\.mlp\.c_fc\.", ".mlp.up_proj."), (r"\.mlp\.c_proj\.", ".mlp.down_proj.")
            ),
        )


class NemotronForCausalLM(Decoder):
    """Nemotron (arXiv 2407.14679): layer norm around one, squared ReLU, half of a head turns."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        rope = read_rope({"partial_rotary_factor": 0.5} | hf, info.head_dim)
        return decoder(
            info,
            norm=layer_norm(hf, "norm_eps", from_one=True),
            ropes=(rope,),
            attention=attention_bias(info),
            mlp=_plain_mlp(info, bias=bool(hf.get("mlp_bias", False)))
            | {"activation": str(hf.get("hidden_act", "relu2"))},
        )


class CohereForCausalLM(Decoder):
    """Command-R: both blocks from one norm without bias, neighbors turn, logits scaled."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        return decoder(
            info,
            norm=layer_norm(hf, bias=False),
            attention=attention_bias(info)
            | {
                "interleaved": True,
                "qk_norm": "heads" if hf.get("use_qk_norm") else "",
            },
            layer={"wiring": "parallel"},
            logit_scale=float(hf.get("logit_scale", 0.0625)),
            tied=bool(hf.get("tie_word_embeddings", True)),
        )


class Cohere2ForCausalLM(Decoder):
    """Command-R7B and A (arXiv 2504.00698): layers with a window turn, those without do not."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        bias = bool(hf.get("attention_bias", False))
        types = layer_types(info)
        spec = decoder(
            info,
            norm=layer_norm(hf, bias=False),
            windows=typed_windows(info, types),
            attention={"qkv_bias": bias, "out_bias": bias, "interleaved": True},
            layer={"wiring": "parallel"},
            logit_scale=float(hf.get("logit_scale", 0.0625)),
            tied=bool(hf.get("tie_word_embeddings", True)),
        )
        return with_ropes(spec, [None if kind == "full_attention" else 0 for kind in types])


class BloomForCausalLM(Decoder):
    """BLOOM (arXiv 2211.05100): ALiBi, and a norm after the embedding."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        _refuse(hf, "apply_residual_connection_post_layernorm")
        heads = info.num_heads
        return decoder(
            info,
            norm=layer_norm(hf),
            ropes=(),
            attention={"qkv_bias": True, "out_bias": True, "rope": None}
            | {"slopes": alibi_slopes(heads)},
            mlp=_plain_mlp(info, "n_inner", bias=True) | {"activation": "gelu_new"},
            embedding_norm=True,
            tied=bool(hf.get("tie_word_embeddings", True)),
            layout=Layout(
                renames=(
                    (r"^transformer\.", ""),
                    (r"^word_embeddings\.", "model.embed_tokens."),
                    (r"^word_embeddings_layernorm\.", "model.embed_norm."),
                    (r"^ln_f\.", "model.norm."),
                    (r"^h\.", "model.layers."),
                    (r"\.self_attention\.", ".attention."),
                    *_MEGATRON_NAMES,
                ),
                splits=(grouped_qkv("query_key_value", heads, heads, info.head_dim),),
            ),
        )


class MptForCausalLM(Decoder):
    """MPT (MosaicML, 2023): ALiBi, no biases."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        attention = hf.get("attn_config") or {}
        _refuse(attention, "qk_ln", "prefix_lm")
        if not attention.get("alibi", True):
            raise LoadError("MPT needs ALiBi positions", field="attn_config.alibi")
        most = float(attention.get("alibi_bias_max") or 8)
        # For other numbers of heads than powers of 2 its order is its own.
        size = 1 << (info.num_heads - 1).bit_length()
        slopes = [2.0 ** (-most * (i + 1) / size) for i in range(size)]
        if size != info.num_heads:
            slopes = (slopes[1::2] + slopes[::2])[: info.num_heads]
        return decoder(
            info,
            norm=layer_norm(hf, bias=False),
            ropes=(),
            attention={
                "rope": None,
                "slopes": tuple(slopes),
                "scale": float(attention.get("softmax_scale") or 0.0),
                "clip": float(attention.get("clip_qkv") or 0.0),
            },
            mlp=_plain_mlp(info, "", bias=False),
            tied=bool(hf.get("tie_word_embeddings", True)),
            layout=renamed(
                (r"^transformer\.wte\.", "model.embed_tokens."),
                (r"^transformer\.norm_f\.", "model.norm."),
                (r"^transformer\.blocks\.", "model.layers."),
                (r"\.norm_1\.", ".input_layernorm."),
                (r"\.norm_2\.", ".post_attention_layernorm."),
                (r"\.attn\.Wqkv\.", ".self_attn.qkv_proj."),
                (r"\.attn\.out_proj\.", ".self_attn.o_proj."),
                (r"\.ffn\.", ".mlp."),
            ),
        )


def _falcon_slopes(info: ModelInfo) -> Fields:
    slopes = torch.tensor(alibi_slopes(info.num_heads)).bfloat16().float() * info.head_dim**-0.5
    return {"rope": None, "slopes": tuple(slopes.tolist())}


_GPT_NAMES = (
    (r"\.ln_1\.", ".input_layernorm."),
    (r"\.ln_2\.", ".post_attention_layernorm."),
)
_MEGATRON_NAMES = (
    (r"\.attention\.dense\.", ".self_attn.o_proj."),
    (r"\.attention\.", ".self_attn."),
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.up_proj."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.down_proj."),
)


def _plain_mlp(
    info: ModelInfo, inner: str = "intermediate_size", activation: str = "hidden_act", *, bias: bool
) -> dict[str, object]:
    """A feed-forward without gate, four times as wide unless config.json says otherwise."""
    hf = info.text
    return {
        "inner_size": int(hf.get(inner) or 4 * info.hidden_size),
        "activation": str(hf.get(activation) or "gelu"),
        "gated": False,
        "bias": bias,
    }


def _refuse(hf: dict[str, object], *fields: str) -> None:
    for field in fields:
        if hf.get(field):
            raise LoadError(f"{field} is not supported", field=field)
