"""Operators in C++ (csrc/kernels), each a function with the signature of `ops.ref`.

What is not defined here falls back to `ref`; without the compiled library nothing is.
"""

from headrace.ops.cpu.library import LIBRARY

__all__: list[str] = ["LIBRARY"]

if LIBRARY is not None:
    from headrace.ops.cpu.attention import paged_attention
    from headrace.ops.cpu.elementwise import embedding, gather, gelu_mul, silu_mul
    from headrace.ops.cpu.mask import mask_logits
    from headrace.ops.cpu.matmul import linear_packed, logits_packed
    from headrace.ops.cpu.norm import layer_norm, rms_norm
    from headrace.ops.cpu.packing import embedding_packed, pack
    from headrace.ops.cpu.rope import rotary, rotary_kv, write_kv

    __all__ += [
        "embedding",
        "embedding_packed",
        "gather",
        "gelu_mul",
        "layer_norm",
        "linear_packed",
        "logits_packed",
        "mask_logits",
        "pack",
        "paged_attention",
        "rms_norm",
        "rotary",
        "rotary_kv",
        "silu_mul",
        "write_kv",
    ]
