"""Work on weights without a server: convert files, save what the ranks of a model hold."""

from pathlib import Path

from headrace.core.config import Config
from headrace.engine.parts import locate, settle
from headrace.loader.convert import convert_folder

__all__ = ["convert_folder", "save_ranks"]


def save_ranks(config: Config, out: str, ranks: int) -> list[str]:
    """Load each of `ranks` ranks in turn and save what it holds; returns the names of the files.

    `out`: a folder for --load-format sharded_state, or the URL of a store for remote.

    Raises:
        LoadError: the model cannot be loaded, or `out` not be written.
    """
    resolved, info, _ = settle(locate(config))
    import torch

    from headrace.dist.comm import LoneRank
    from headrace.loader import build_of, load_model
    from headrace.runner.weights import WeightService

    asked, names = resolved.model, []
    for rank in range(ranks):
        group, dtype = LoneRank(rank, ranks), getattr(torch, asked.dtype)
        quantization = asked.quantization
        model = load_model(
            info, dtype, group, asked.load_format, quantization=quantization, options=resolved.load
        )
        service = WeightService(
            model, info, build_of(info, dtype, group, quantization), resolved.load
        )
        if "://" in out:
            _, data = service.do("save_remote", {"url": out})
        else:
            _, data = service.do("save_sharded", {"path": str(Path(out).expanduser())})
        names += data["files"]
    return names
