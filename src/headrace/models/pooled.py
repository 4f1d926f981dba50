"""A decoder whose hidden states are pooled instead of turned into tokens.

Any decoder family without its vocabulary head, with the layers that follow pooling if any. Knows
no pooling and no family.
"""

from collections.abc import Iterable

import msgspec
from torch import Tensor

from headrace.core.model_info import ModelInfo
from headrace.core.plan import StateSpec
from headrace.core.pooling import REWARD
from headrace.layers.batch import ForwardBatch
from headrace.layers.build import Build
from headrace.layers.kv_scale import with_kv_scales
from headrace.layers.weights import load_targets
from headrace.models.decoder import Decoder
from headrace.models.head import Head, HeadLayer, dense_layers

_BASE = "model."


class PooledDecoder:
    """The `PooledModel` of a decoder-only `family`."""

    def __init__(self, family: type[Decoder], info: ModelInfo, build: Build) -> None:
        # A tied head takes no memory and no tensor of the checkpoint.
        tied = msgspec.structs.replace(info, hf=info.hf | {"tie_word_embeddings": True})
        self.decoder = family(tied, build)
        self.head = Head(_head_layers(info))

    def forward(self, batch: ForwardBatch) -> Tensor:
        return self.decoder.forward(batch)

    def cos_sin(self, batch: ForwardBatch) -> Tensor:
        return self.decoder.cos_sin(batch)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.logits(hidden)

    def scores(self, pooled: Tensor) -> Tensor:
        return self.head(pooled)

    def state_specs(self) -> list[StateSpec]:
        return self.decoder.state_specs()

    def prefix_scope(self, prompt_len: int) -> str:
        return self.decoder.prefix_scope(prompt_len)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Checkpoints saved without a head leave out the prefix of their base model."""
        known = (*self.head.targets(), "lm_head.", _BASE)
        self.fill(
            (name if name.startswith(known) else _BASE + name, tensor)
            for name, tensor in self.decoder.spec.layout.canonical(weights)
        )

    def fill(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        targets = self.decoder.targets() | self.head.targets()
        load_targets(targets, with_kv_scales(weights, targets), self._ignored)

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        own = {name: target.shape for name, target in self.head.targets().items()}
        return self.decoder.checkpoint_shapes() | own

    def _ignored(self, name: str) -> bool:
        unused = ".rotary_emb." in name or name == "lm_head.weight"
        return unused or self.decoder.foreign(name)


def _head_layers(info: ModelInfo) -> list[HeadLayer]:
    hidden, labels = info.hidden_size, len(info.pooling.labels) if info.pooling else 0
    if not labels:
        return dense_layers(info)
    if info.architecture.endswith(REWARD):
        return [
            HeadLayer("score.0", hidden, hidden, bias=True, activation="ReLU"),
            HeadLayer("score.2", hidden, labels, bias=True),
        ]
    return [HeadLayer("score", hidden, labels, bias=False)]
