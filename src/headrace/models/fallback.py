"""Any decoder that transformers implements, with our attention, cache, scheduler and sampler.

transformers computes everything but attention, operator by operator in torch: right, not fast, and
the bits of a row may depend on how many rows there are. Code that comes with a checkpoint is never
run. Knows no architecture.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace import ops
from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo
from headrace.core.plan import StateSpec
from headrace.dist.topology import Shard
from headrace.layers.batch import ForwardBatch
from headrace.layers.build import Build
from headrace.ops.meta import KvCache

_NAME = "headrace"


class TransformersModel:
    """The `Model` around a transformers module.

    Raises:
        LoadError: transformers does not know the architecture, or cannot load the checkpoint, or
            some layer is no attention over keys and values.
    """

    recordable = False  # computes between operators

    def __init__(self, info: ModelInfo, build: Build) -> None:
        if build.shard != Shard() or build.split.stage.shard.size > 1:
            raise LoadError("--model-impl transformers runs on one rank", field="model_impl")
        if build.quant.name != "none":
            raise LoadError("--model-impl transformers does not quantize", field="quantization")
        self._attention = _PagedAttention()
        self._causal = _load(info, build.dtype)
        _tell(self._causal, self._attention)
        # What memory planning counts.
        self.tensors = dict(self._causal.state_dict())
        self._layers = self._attention.probe(self._body)
        if len(self._layers) != info.num_layers:
            raise LoadError(
                f"{len(self._layers)} of {info.num_layers} layers of {info.architecture} are "
                "attention over keys and values; others are not supported",
                field="architectures",
            )
        self._head = _HeadOnly(self._causal)

    def _body(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states [tokens, hidden]."""
        output = self._causal.base_model(
            input_ids=ids[None], position_ids=positions[None], use_cache=False
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def forward(self, batch: ForwardBatch) -> Tensor:
        with self._attention.over(batch, self._layers):
            return self._body(batch.ids, batch.positions)

    def cos_sin(self, batch: ForwardBatch) -> Tensor:
        return torch.empty(len(batch.ids), 0)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)

    def state_specs(self) -> list[StateSpec]:
        return list(self._layers.values())

    def prefix_scope(self, prompt_len: int) -> str:
        return ""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        raise LoadError("transformers loads its own weights", field="model_impl")

    def fill(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.load_weights(weights)

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


class _PagedAttention:
    """What transformers calls for attention: reads and writes our cache.

    While probing it notes what each layer keeps instead.
    """

    def __init__(self) -> None:
        self._batch: ForwardBatch | None = None
        self._caches: dict[int, KvCache] = {}
        self._seen: dict[int, StateSpec] = {}

    def probe(self, body: Any) -> dict[int, StateSpec]:
        """What each layer keeps, by its index, from a pass over two tokens."""
        with torch.inference_mode():
            body(torch.zeros(2, dtype=torch.int64), torch.arange(2))
        return dict(sorted(self._seen.items()))

    def over(self, batch: ForwardBatch, layers: dict[int, StateSpec]) -> "_PagedAttention":
        """A context in which attention is over this batch."""
        self._batch = batch
        self._caches = dict(zip(layers, batch.caches, strict=True))
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        self._batch = None

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """query [1, heads, tokens, dim] -> [1, tokens, heads, value's dim]."""
        window = int(options.get("sliding_window") or 0)
        width = value.shape[-1]
        dim = max(query.shape[-1], width)
        q, k, v = (_flat(x, dim) for x in (query, key, value))
        if self._batch is None:
            self._seen[module.layer_idx] = StateSpec(
                kv_heads=k.shape[1], head_dim=dim, window=window
            )
            return torch.zeros_like(q)[None, :, :, :width], None
        meta, cache = self._batch.meta, self._caches[module.layer_idx]
        ops.write_kv(k, v, cache, meta.slots)
        sinks = options.get("s_aux")
        mixed = ops.paged_attention(
            q,
            cache,
            meta,
            scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
            window=window,
            soft_cap=float(options.get("softcap") or 0.0),
            sinks=None if sinks is None else sinks.float().contiguous(),
        )
        return mixed[None, :, :, :width], None


def _flat(x: Tensor, dim: int) -> Tensor:
    """[1, heads, tokens, d] -> [tokens, heads, dim], zeros after d: they change no product."""
    return F.pad(x[0].transpose(0, 1), (0, dim - x.shape[-1])).contiguous()


class _HeadOnly:
    """The causal model's own way from hidden states to logits, scales and caps included."""

    def __init__(self, causal: Any) -> None:
        self._given = _Given()
        self._causal = copy.copy(causal)
        self._causal._modules = dict(causal._modules)
        self._causal._modules[causal.base_model_prefix] = self._given

    def __call__(self, hidden: Tensor) -> Tensor:
        self._given.hidden = hidden[None]
        ids = torch.zeros(1, len(hidden), dtype=torch.int64)
        logits: Tensor = self._causal(input_ids=ids, use_cache=False).logits[0]
        return logits.float().contiguous()


class _Given(nn.Module):
    """Stands where the layers were, and gives the hidden states they gave."""

    hidden: Tensor

    def forward(self, *args: Any, **fields: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=self.hidden)


def _load(info: ModelInfo, dtype: torch.dtype) -> Any:
    import transformers
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _dispatch)
    known = getattr(transformers, info.architecture, None)
    if known is None:
        raise LoadError(
            f"architecture {info.architecture!r} is known neither here nor to transformers "
            f"{transformers.__version__}",
            field="architectures",
        )
    try:
        causal = known.from_pretrained(
            info.path,
            dtype=dtype,
            attn_implementation=_NAME,
            local_files_only=True,
            use_safetensors=True,  # other files may hold programs
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise LoadError(f"transformers cannot load {info.path}: {error}") from error
    return causal.eval().requires_grad_(False)


def _dispatch(module: Any, *args: Any, **fields: Any) -> tuple[Tensor, None]:
    """One function for all of transformers; the module knows whose it is."""
    result: tuple[Tensor, None] = module.headrace_attention(*args, **fields)
    return result


def _tell(causal: nn.Module, attention: _PagedAttention) -> None:
    for module in causal.modules():
        if hasattr(module, "layer_idx"):
            # Not a submodule: it holds no weights.
            object.__setattr__(
                module,
                "headrace_attention",
                lambda *args, module=module, **fields: attention(module, *args, **fields),
            )
