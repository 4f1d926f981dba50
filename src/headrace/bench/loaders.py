"""`headrace bench load`: how fast each loader fills a model, beside a plain read of its files.

Every load is a process of its own, so that its peak memory is its own. First the limits of the same
run: the files read from disk, read again from the page cache, and memory copied. Before each load
its files are read plainly: disks are not equally fast from one second to the next. Cold loads and
reads find nothing in the page cache; a plain read from it fills memory of its own, as a load must.
Knows loaders by name only.
"""

import argparse
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from headrace.bench import report
from headrace.bench.shapes import SHAPES, write_config
from headrace.core.config import Config
from headrace.core.errors import HeadraceError

_BLOCK = 8 << 20
_COPY = 256 << 20
_THREADS = '{"enable_multithread_load": true, "num_threads": 4}'

LOADERS: dict[str, dict[str, Any]] = {
    "auto": {},
    "auto, read": {"weight_loader_disable_mmap": True},
    "auto, 4 threads": {"model_loader_extra_config": _THREADS},
    "auto, prefetch": {"weight_loader_prefetch_checkpoints": True},
    "layered": {"load_format": "layered"},
    "runai_streamer": {"load_format": "runai_streamer"},
    "fastsafetensors": {"load_format": "fastsafetensors"},
    "first start with cache": {"weight_cache": True},
    "second start with cache": {"weight_cache": True},
}
"""Row of the table -> options."""

_CHILD = """
import json, sys
from headrace.core.config import Config
from headrace.engine.weights import time_load
options, cache = json.loads(sys.argv[1])
print(json.dumps(time_load(Config.from_flat(options), cache)))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model-path", default="", metavar="FOLDER", help="default: the demo model")
    what.add_argument("--shape", choices=tuple(SHAPES), help="a known shape, weights made up")
    parser.add_argument(
        "--loaders", nargs="+", choices=tuple(LOADERS), default=list(LOADERS), metavar="NAME",
        help=f"default: all of {', '.join(LOADERS)}",
    )  # fmt: skip
    parser.add_argument("--quantization", default="none", choices=("none", "int8", "int4", "fp8"))
    parser.add_argument("--cold", action="store_true", help="empty the page cache before each load")
    parser.add_argument("--runs", type=int, default=2, help="of each; the best counts (default: 2)")
    report.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and report.

    Raises:
        HeadraceError: a load failed.
    """
    with tempfile.TemporaryDirectory(prefix="headrace-load-") as scratch:
        folder = _folder(args, Path(scratch))
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise HeadraceError(f"{folder} has no *.safetensors files")
        result = measure_limits(files)
        result["loads"] = []
        for name in args.loaders:
            report.note(f"{name} ...")
            result["loads"].append(measure(name, args, folder, files, Path(scratch) / "cache"))
    report.emit(args, result, table(result, args.cold))
    return 0


def _folder(args: argparse.Namespace, scratch: Path) -> Path:
    if args.shape:
        from headrace.bench.write_model import write_weights

        (scratch / args.shape).mkdir()
        write_config(args.shape, scratch / args.shape)
        write_weights(scratch / args.shape)
        return scratch / args.shape
    from headrace.assets import demo_model_path

    return Path(args.model_path or demo_model_path())


def measure_limits(files: list[Path]) -> dict[str, Any]:
    """Bytes, and bytes per second: from disk, from the page cache, from memory to memory."""
    size = sum(path.stat().st_size for path in files)
    drop(files)
    disk = _read_rate(files, size)
    cached = max(_read_rate(files, size) for _ in range(3))
    source = np.ones(_COPY, dtype=np.uint8)
    target = source.copy()
    copies = []
    for _ in range(5):
        began = time.perf_counter()
        np.copyto(target, source)
        copies.append(_COPY / (time.perf_counter() - began))
    return {"bytes": size, "disk": disk, "page_cache": cached, "copy": max(copies)}


def drop(files: list[Path]) -> None:
    """Take files out of the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_kept(files: list[Path]) -> float:
    """Seconds to read files into fresh memory on huge pages, block by block."""
    began = time.perf_counter()
    for path in files:
        size, done = path.stat().st_size, 0
        memory = mmap.mmap(-1, size)
        memory.madvise(mmap.MADV_HUGEPAGE)
        with path.open("rb", buffering=0) as file, memoryview(memory) as view:
            while done < size:
                done += os.preadv(file.fileno(), [view[done : done + _BLOCK]], done)
        memory.close()
    return time.perf_counter() - began


def _read_rate(files: list[Path], size: int) -> float:
    buffer = bytearray(_BLOCK)
    began = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return size / (time.perf_counter() - began)


def measure(
    name: str, args: argparse.Namespace, folder: Path, files: list[Path], cache: Path
) -> dict[str, Any]:
    """The best of the runs of one loader; a first start is the first only once."""
    options = {"model_path": str(folder), "quantization": args.quantization, **LOADERS[name]}
    kept = str(cache) if options.pop("weight_cache", False) else ""
    Config.from_flat(options)
    runs = 1 if name.startswith("first") else args.runs
    found, plain = [], []
    for _ in range(runs):
        read = list(cache.glob("*.safetensors")) if name.startswith("second") else files
        if args.cold:
            drop(read)
        plain.append(read_kept(read))
        if args.cold:
            drop([*files, *read])
        command = [sys.executable, "-c", _CHILD, json.dumps([options, kept])]
        child = subprocess.run(command, capture_output=True, text=True)
        if child.returncode:
            raise HeadraceError(f"{name}: {child.stderr.strip().splitlines()[-1]}")
        found.append(json.loads(child.stdout))
    best: dict[str, Any] = min(found, key=lambda one: one["seconds"])
    size = sum(path.stat().st_size for path in files)
    return {"loader": name, "bytes": size, "plain": min(plain), **best}


def table(result: dict[str, Any], cold: bool) -> str:
    """A row for each loader, with its share of the plain read that it can be compared with."""
    rows = []
    for load in result["loads"]:
        rate = load["bytes"] / load["seconds"]
        rows.append(
            [
                load["loader"],
                f"{load['seconds']:.2f}",
                f"{rate / 1e9:.2f}",
                f"{load['plain'] / load['seconds']:.0%}",
                f"{load['peak'] / 1e6:.0f}",
                f"{load['held'] / 1e6:.0f}",
            ]
        )
    header = ["loader", "s", "GB/s", "of plain read", "peak MB", "model MB"]
    limits = ", ".join(
        f"{name} {result[key] / 1e9:.2f} GB/s"
        for name, key in (("disk", "disk"), ("page cache", "page_cache"), ("copy", "copy"))
    )
    state = "cold" if cold else "from the page cache"
    first = f"{result['bytes'] / 1e9:.2f} GB, {state}; plain reads: {limits}"
    return "\n".join([first, *report.align(header, rows)])
