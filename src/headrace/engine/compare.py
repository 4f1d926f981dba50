"""A model of ours beside transformers' own, layer by layer, on the same checkpoint and tokens.

Both run in this process; ours in a prompt and single tokens after it, over a paged cache as in a
server. Knows no architecture. Invariant: what is compared is what layers pass on, so the first
point that differs is where the description is wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headrace import ops
from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo, read_model_info
from headrace.dist.comm import SoloGroup
from headrace.layers.batch import ForwardBatch
from headrace.loader import load_model
from headrace.models.decoder import Decoder
from headrace.ops.meta import AttentionMeta
from headrace.runner.pool import KvPool

_PAGE = 16
_SINGLE = 4  # tokens at the end that run one by one
_ATTENTION = ("self_attn", "attn", "attention", "self_attention", "norm_attn_norm.attn")
Seen = dict[str, list[Tensor]]
"""Name of a point -> rows of its tokens, of one or more passes."""


@dataclass(frozen=True)
class Point:
    """A place in the network. `largest` size of an element there, by transformers; `error`: the
    largest difference, as a part of it."""

    name: str
    largest: float
    error: float


@dataclass(frozen=True)
class Comparison:
    """`points` in the order of the network; `attention`: error of each layer's attention alone, of
    the layers where transformers has such a module. `same_tokens`: positions with the same best
    token, of `tokens`."""

    architecture: str
    tolerance: float
    tokens: int
    same_tokens: int
    points: list[Point]
    attention: dict[str, float] = field(default_factory=dict)

    @property
    def first_difference(self) -> str | None:
        """The first point beyond the tolerance; NaN is beyond it."""
        wrong = (point.name for point in self.points if not point.error <= self.tolerance)
        return next(wrong, None)

    @property
    def in_attention(self) -> bool | None:
        """Whether the attention of that layer differs too; None where that cannot be said."""
        error = self.attention.get(self.first_difference or "")
        return None if error is None else not error <= self.tolerance


@torch.inference_mode()
def compare(folder: Path, dtype: str, tokens: int, tolerance: float, seed: int = 0) -> Comparison:
    """Run both on `tokens` random tokens.

    Raises:
        LoadError: the checkpoint does not fit one of them, or is no decoder with layers of ours.
    """
    info = read_model_info(folder)
    model = load_model(info, getattr(torch, dtype), SoloGroup(), model_impl="headrace")
    if not isinstance(model, Decoder):
        raise LoadError(f"{info.architecture} is no decoder of headrace", field="architectures")
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(min(3, info.vocab_size - 1), info.vocab_size, (tokens,), generator=drawn)
    ours = _ours(model, ids)
    del model
    theirs = _theirs(info, getattr(torch, dtype), ids)
    errors = {
        name: _point(name, torch.cat(ours[name]).float(), torch.cat(theirs[name]).float())
        for name in ours
        if name in theirs
    }
    best = [torch.cat(seen["logits"]).argmax(-1) for seen in (ours, theirs)]
    attention = _attention_errors(errors, tolerance)
    return Comparison(
        architecture=info.architecture,
        tolerance=tolerance,
        tokens=tokens,
        same_tokens=int((best[0] == best[1]).sum()),
        points=list(errors.values()),
        attention=attention,
    )


def _attention_errors(errors: dict[str, Point], tolerance: float) -> dict[str, float]:
    """Taken out of `errors`. Some modules of transformers add the stream to what they give: one
    that differs in a layer that does not says nothing."""
    found = {}
    for name in [name for name in errors if name.endswith(" attention")]:
        layer, error = name.removesuffix(" attention"), errors.pop(name).error
        if error <= tolerance or not errors[layer].error <= tolerance:
            found[layer] = error
    return found


def _point(name: str, ours: Tensor, theirs: Tensor) -> Point:
    if ours.shape != theirs.shape:
        raise LoadError(f"{name}: {tuple(ours.shape)} here, {tuple(theirs.shape)} in transformers")
    largest = float(theirs.abs().max())
    return Point(name, largest, float((ours - theirs).abs().max()) / max(largest, 1e-30))


# ---- ours --------------------------------------------------------------------------------------


class _Tap:
    """Stands in for a layer, or for its attention, and notes what comes out."""

    def __init__(self, inner: Any, name: str, seen: Seen) -> None:
        self._inner, self._name, self._seen = inner, name, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, x: Tensor, *rest: Any) -> Any:
        if self._name == "layer 0":
            self._seen.setdefault("embedding", []).append(x.clone())
        result = self._inner(x, *rest)
        whole = ops.combine(*result) if isinstance(result, tuple) else result
        self._seen.setdefault(self._name, []).append(whole.clone())
        return result


def _ours(model: Decoder, ids: Tensor) -> Seen:
    seen: Seen = {}
    for index, layer in enumerate(model.layers):
        name = f"layer {index}"
        layer.attention = _Tap(layer.attention, f"{name} attention", seen)  # type: ignore[assignment]
        model.layers[index] = _Tap(layer, name, seen)  # type: ignore[call-overload]
    pages = -(-len(ids) // _PAGE)
    dtype = model.dtype
    caches = KvPool(model.state_specs(), pages, _PAGE, dtype).caches
    prompt = max(1, len(ids) - _SINGLE)
    for start, stop in [(0, prompt), *((at, at + 1) for at in range(prompt, len(ids)))]:
        hidden = model.forward(_batch(ids, start, stop, caches))
        seen.setdefault("final norm", []).append(hidden.clone())
        seen.setdefault("logits", []).append(model.logits(hidden).clone())
    return seen


def _batch(ids: Tensor, start: int, stop: int, caches: Sequence[Any]) -> ForwardBatch:
    """Positions start..stop of one sequence in pages 0, 1, ..., all of which is prompt."""
    positions = torch.arange(start, stop)
    meta = AttentionMeta(
        page_table=torch.arange(-(-len(ids) // _PAGE), dtype=torch.int32)[None],
        rows=torch.zeros(1, dtype=torch.int32),
        query_start=torch.tensor([0, stop - start], dtype=torch.int32),
        context=torch.tensor([stop], dtype=torch.int32),
        slots=positions,
        page_size=_PAGE,
    )
    return ForwardBatch(
        ids=ids[start:stop],
        positions=positions,
        meta=meta,
        caches=list(caches),
        prompt_lens=torch.tensor([len(ids)], dtype=torch.int32),
    )


# ---- theirs ------------------------------------------------------------------------------------


def _theirs(info: ModelInfo, dtype: torch.dtype, ids: Tensor) -> Seen:
    causal = _load(info, dtype)
    layers = _layers(causal, info)
    seen: Seen = {}

    def note(name: str) -> Any:
        return lambda module, given, result: seen.setdefault(name, []).append(_rows(result))

    def note_input(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen["embedding"] = [_rows(given[0] if given else named["hidden_states"])]

    layers[0].register_forward_pre_hook(note_input, with_kwargs=True)
    for index, layer in enumerate(layers):
        layer.register_forward_hook(note(f"layer {index}"))
        attention = _attention(layer)
        if attention is not None:
            attention.register_forward_hook(note(f"layer {index} attention"))
    inner = causal.base_model
    # Llama 4's text model is under another name than it says.
    inner = causal.get_submodule("model") if inner is causal else inner
    inner.register_forward_hook(note("final norm"))
    seen["logits"] = [causal(ids[None], use_cache=False).logits[0]]
    return seen


def _rows(result: Any) -> Tensor:
    """[tokens, hidden] of what a module returned."""
    found: Tensor = result if isinstance(result, Tensor) else result[0]
    return found.reshape(-1, found.shape[-1]).clone()


def _attention(layer: nn.Module) -> nn.Module | None:
    for name in _ATTENTION:
        try:
            return layer.get_submodule(name)
        except AttributeError:
            continue
    return None


def _layers(causal: nn.Module, info: ModelInfo) -> nn.ModuleList:
    for module in causal.modules():
        if isinstance(module, nn.ModuleList) and len(module) == info.num_layers:
            return module
    raise LoadError(f"transformers has no list of {info.num_layers} layers", field="architectures")


def _load(info: ModelInfo, dtype: torch.dtype) -> Any:
    """By its class, or by its model_type where the class has another name in transformers."""
    import transformers

    known = getattr(transformers, info.architecture, transformers.AutoModelForCausalLM)
    try:
        causal = known.from_pretrained(
            info.path,
            dtype=dtype,
            # Falcon's own way of attention adds ALiBi's slopes twice.
            attn_implementation="sdpa" if info.hf.get("alibi") else "eager",
            local_files_only=True,
            trust_remote_code=False,
        )
    except (ImportError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise LoadError(f"transformers cannot load {info.path}: {error}") from error
    return causal.eval()
