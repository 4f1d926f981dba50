"""Operators in C++ (csrc/kernels), each a function with the signature of `ops.ref`.

What is not defined here falls back to `ref`; without the compiled library nothing is.
"""

from headrace.ops.cpu.library import LIBRARY

__all__: list[str] = ["LIBRARY"]

if LIBRARY is not None:
    from headrace.ops.cpu.attention import (
        chunked_attention,
        paged_attention,
        sloped_attention,
    )
    from headrace.ops.cpu.collective import cast, take_part
    from headrace.ops.cpu.elementwise import (
        activate,
        columns,
        combine,
        embedding,
        gated,
        gather,
        position_embedding,
    )
    from headrace.ops.cpu.heads import heads_linear, pack_heads
    from headrace.ops.cpu.mask import mask_logits
    from headrace.ops.cpu.matmul import gated_packed, linear_packed, linear_parts, logits_packed
    from headrace.ops.cpu.moe import moe_packed, pack_experts, router_topk
    from headrace.ops.cpu.norm import layer_norm, rms_norm
    from headrace.ops.cpu.packing import (
        embedding_packed,
        open_packed,
        pack,
        pack_quantized,
        pack_rows,
        stored_dtype,
    )
    from headrace.ops.cpu.rope import latent_kv, rotary, rotary_kv, turn, write_kv
    from headrace.ops.cpu.sampling import log_probs, sample

    __all__ += [
        "activate",
        "cast",
        "chunked_attention",
        "columns",
        "combine",
        "embedding",
        "embedding_packed",
        "gated",
        "gated_packed",
        "gather",
        "heads_linear",
        "latent_kv",
        "layer_norm",
        "linear_packed",
        "linear_parts",
        "log_probs",
        "logits_packed",
        "mask_logits",
        "moe_packed",
        "open_packed",
        "pack",
        "pack_experts",
        "pack_heads",
        "pack_quantized",
        "pack_rows",
        "paged_attention",
        "position_embedding",
        "rms_norm",
        "rotary",
        "rotary_kv",
        "router_topk",
        "sample",
        "sloped_attention",
        "stored_dtype",
        "take_part",
        "turn",
        "write_kv",
    ]
