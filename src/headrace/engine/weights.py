"""Work on weights without a server: convert files, save what the ranks of a model hold."""

import time
from pathlib import Path

from headrace.core.config import Config
from headrace.engine.parts import locate, settle
from headrace.loader.convert import convert_folder

__all__ = ["convert_folder", "save_ranks", "time_load"]


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
        build = build_of(info, dtype, group, quantization, load_format=asked.load_format)
        service = WeightService(model, info, build, resolved.load)
        if "://" in out:
            _, data = service.do("save_remote", {"url": out})
        else:
            _, data = service.do("save_sharded", {"path": str(Path(out).expanduser())})
        names += data["files"]
    return names


def time_load(config: Config, weight_cache: str = "") -> dict[str, float]:
    """Load a model in this process and let it go: seconds, bytes held, and bytes of memory.

    `peak` and `after` are above what the process had when loading began.
    """
    resolved, info, _ = settle(locate(config))
    import torch

    from headrace import ops
    from headrace.dist.comm import SoloGroup
    from headrace.layers.held import held_bytes
    from headrace.loader import build_of, get_model_loader, load_model
    from headrace.models import make_model

    asked = resolved.model
    ops.set_threads(resolved.run.threads)
    dtype = getattr(torch, asked.dtype)
    # What is imported and built for the first time is no part of loading.
    first = build_of(info, dtype, SoloGroup(), asked.quantization, load_format=asked.load_format)
    make_model(info, first)
    get_model_loader(asked.load_format, resolved.load)
    before = _reset_peak()
    began = time.perf_counter()
    model = load_model(
        info,
        dtype,
        SoloGroup(),
        asked.load_format,
        quantization=asked.quantization,
        weight_cache=weight_cache,
        options=resolved.load,
    )
    seconds = time.perf_counter() - began
    peak, after = _resident("VmHWM") - before, _resident("VmRSS") - before
    return {"seconds": seconds, "held": held_bytes(model), "peak": peak, "after": after}


def _reset_peak() -> int:
    """From now on VmHWM is the peak; returns the memory in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(key: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="utf-8").split(f"{key}:")[1]
    return int(text.split()[0]) << 10
