"""Pours checkpoint tensors into their targets, and names every tensor that does not fit."""

from collections.abc import Callable, Iterable

from torch import Tensor

from headrace.core.errors import LoadError
from headrace.quant.base import Targets, WeightTarget


def load_targets(
    targets: Targets, weights: Iterable[tuple[str, Tensor]], ignored: Callable[[str], bool]
) -> None:
    """Fill every target exactly once.

    `ignored` names tensors that checkpoints carry and the model does not need.

    Raises:
        LoadError: a tensor is missing, unexpected, given twice, or has a wrong shape or dtype.
    """
    filled: set[str] = set()
    for name, tensor in weights:
        target = targets.get(name)
        if target is None:
            if ignored(name):
                continue
            raise LoadError(
                f"unexpected tensor {name} with shape {tuple(tensor.shape)}: "
                "the model has no such weight"
            )
        _check(name, tensor, target)
        names = target.covers or (name,)
        if not filled.isdisjoint(names):
            raise LoadError(f"tensor {name} is in the checkpoint twice")
        target.copy(tensor)
        filled.update(names)
    _check_complete(targets, filled)


def _check(name: str, tensor: Tensor, target: WeightTarget) -> None:
    if target.any_length and tensor.dim() == 1:
        pass
    elif tuple(tensor.shape) not in (target.shape, *target.other_shapes):
        raise LoadError(
            f"tensor {name} has shape {tuple(tensor.shape)} in the checkpoint, "
            f"but the model's is {target.shape}"
        )
    if tensor.dtype not in target.dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in target.dtypes)
        raise LoadError(
            f"tensor {name} has dtype {str(tensor.dtype).removeprefix('torch.')}, not {wanted}"
        )


def _check_complete(targets: Targets, filled: set[str]) -> None:
    missing = [
        name
        for name, target in targets.items()
        if not target.covers and not target.optional and name not in filled
    ]
    if missing:
        name = missing[0]
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise LoadError(
            f"missing tensor {name} with shape {targets[name].shape}: "
            f"the checkpoint does not have it{others}"
        )
