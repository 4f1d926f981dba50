"""`headrace bench compare`: several servers, one client, the same prompts, in turn.

A TOML file names the servers and how to start them. All of them stay up; in every round each
workload runs on one server after the other (backwards in every other round), so that a slow minute
of the machine hits all. Before each block the machine's own limits are measured: numbers of blocks
whose limits differ must not be compared. The first server is set against the best of the others.
"""

import argparse
import contextlib
import dataclasses
import os
import shlex
import statistics
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from headrace.bench import client, load, report, startup, workloads
from headrace.bench.client import Target
from headrace.bench.flags import natural_int, positive_float, positive_int
from headrace.bench.process import ServerProcess, ended_by_sigterm
from headrace.bench.workloads import Workload
from headrace.core.errors import BadRequest, HeadraceError
from headrace.core.hardware import detect
from headrace.core.ports import free_port

START = "start"
"""The workload that starts a server anew: seconds from its process to its first token."""

_WARMUP = Workload("load", 1, 1, 256, 8)


class Launch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A server as the file describes it: started by `command`, or one that runs at `url`.

    {port} and $VARIABLES in `command` are replaced.
    """

    command: str = ""
    url: str = ""
    env: dict[str, str] = {}

    def __post_init__(self) -> None:
        if bool(self.command) == bool(self.url):
            raise ValueError("a server has either a command or a url")

    def words(self, port: int) -> list[str]:
        """The command for a server on `port`.

        Raises:
            BadRequest: a variable is not set.
        """
        text = self.command.replace("{port}", str(port))
        words = [os.path.expandvars(word) for word in shlex.split(text)]
        unset = [word for word in words if "$" in word]
        if unset:
            raise BadRequest(f"a variable is not set in {unset[0]!r}", field="command")
        return words


class Peer:
    """One of the servers, started when first needed; a context manager that ends it."""

    def __init__(self, name: str, launch: Launch, timeout: float) -> None:
        self.name = name
        self._launch = launch
        self._timeout = timeout
        self._process: ServerProcess | None = None
        self._target = Target(base_url="")

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.__exit__()
            self._process = None

    def start(self) -> float:
        """End the server if it runs and start it; seconds until its first token.

        Raises:
            HeadraceError: it does not start or answer, or it is not ours to start.
        """
        self.__exit__()
        if self._launch.url:
            raise HeadraceError("a server given by its url cannot be started")
        port = free_port()
        command = self._launch.words(port)
        self._process = ServerProcess(command, port, self._timeout, self._launch.env)
        self._process.wait_port()
        self._process.wait_health()
        return self._connect(self._process.base_url) - self._process.started

    def measure(self, workload: Workload, seed: int) -> float:
        """Run a workload on the server."""
        if self._launch.url and not self._target.base_url:
            self._connect(self._launch.url)
        elif not self._launch.url and self._process is None:
            self.start()
        return load.run_async(workloads.measure(self._target, workload, seed))

    def _connect(self, base_url: str) -> float:
        """Warm the server up; the time of its first token."""
        self._target = load.run_async(_target(base_url))
        first = load.run_async(startup.first_token_at(self._target))
        load.run_async(workloads.measure(self._target, _WARMUP, seed=0))
        return first


async def _target(base_url: str) -> Target:
    target = Target(base_url=base_url, backend="completions", reconnect=True)
    async with client.open_session(target) as session:
        return dataclasses.replace(target, model=await client.first_model(session, target))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument(
        "file", type=Path, help="TOML: a table for each server, with `command` or `url`"
    )
    parser.add_argument("--servers", nargs="+", metavar="NAME", help="only these, in this order")
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=(START, *workloads.FULL),
        default=[START, *workloads.FULL],
        help="what to measure (default: everything)",
        metavar="NAME",
    )
    parser.add_argument("--rounds", type=positive_int, default=3, help="default: 3")
    parser.add_argument("--short", action="store_true", help="small workloads, to try a setup")
    parser.add_argument("--seed", type=natural_int, default=1)
    parser.add_argument(
        "--timeout", type=positive_float, default=300.0, help="seconds for a start (default: 300)"
    )
    parser.add_argument("--threads", type=int, default=0, help="of the noise probe; 0: all cores")
    report.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and report; 1 when something could not be measured.

    Raises:
        HeadraceError: the file is wrong, or names no such server.
    """
    launches = read_launches(args.file, args.servers)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ended_by_sigterm())
        peers = [
            stack.enter_context(Peer(name, launch, args.timeout))
            for name, launch in launches.items()
        ]
        blocks = compare(peers, args)
    result = {
        "servers": {name: launch.command or launch.url for name, launch in launches.items()},
        "short": args.short,
        "seed": args.seed,
        "blocks": blocks,
        "rows": summarize(blocks, list(launches)),
    }
    report.emit(args, result, table(result))
    return int(any(block["errors"] for block in blocks))


def read_launches(path: Path, chosen: Sequence[str] | None) -> dict[str, Launch]:
    """The servers of the file, or the chosen ones in their order."""
    try:
        launches = msgspec.convert(tomllib.loads(path.read_text("utf-8")), dict[str, Launch])
    except OSError as error:
        raise BadRequest(f"cannot read {path}: {error.strerror}", field="file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise BadRequest(f"{path}: {error}", field="file") from None
    unknown = set(chosen or ()) - set(launches)
    if unknown or not launches:
        known = ", ".join(launches) or "nothing"
        raise BadRequest(f"{path} has {known}, not {min(unknown, default='')}", field="servers")
    return {name: launches[name] for name in chosen or launches}


def compare(peers: Sequence[Peer], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A block for each round and workload: the machine's limits, then each server's number."""
    table = workloads.SHORT if args.short else workloads.FULL
    blocks = []
    for turn in range(args.rounds):
        order = peers if turn % 2 == 0 else peers[::-1]
        for number, name in enumerate(args.workloads):
            seed = 1 + (args.seed * args.rounds + turn) * len(args.workloads) + number
            block: dict[str, Any] = {"round": turn + 1, "workload": name, "noise": noise(args)}
            block |= {"values": {}, "errors": {}}
            for peer in order:
                try:
                    value = peer.start() if name == START else peer.measure(table[name], seed)
                except HeadraceError as error:
                    block["errors"][peer.name] = error.message
                    report.note(f"{name}, {peer.name}: {error.message}")
                else:
                    block["values"][peer.name] = value
                    report.note(f"round {turn + 1}, {name}, {peer.name}: {value:.2f}")
            blocks.append(block)
    return blocks


def noise(args: argparse.Namespace) -> dict[str, Any]:
    """What the machine gives at this moment; only the load where no native kernels are built."""
    from headrace import ops
    from headrace.bench.kernels import measure_limits
    from headrace.ops.cpu.library import LIBRARY

    found: dict[str, Any] = {"load_average": os.getloadavg()[0]}
    if LIBRARY is not None:
        threads = args.threads or detect().cores
        ops.set_threads(threads)
        found |= measure_limits(0.1, threads)
    return found


def summarize(blocks: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """For each workload the medians, and the first server's ratio to the best other."""
    rows = []
    for workload in dict.fromkeys(block["workload"] for block in blocks):
        same = [block["values"] for block in blocks if block["workload"] == workload]
        runs = {name: [values[name] for values in same if name in values] for name in names}
        medians = {name: statistics.median(found) for name, found in runs.items() if found}
        unit = "s" if workload == START else workloads.FULL[workload].unit
        rows.append({"workload": workload, "unit": unit, "medians": medians, "runs": runs})
        rows[-1] |= _best_other(medians, names[0], lower=unit == "s")
    return rows


def _best_other(medians: dict[str, float], first: str, lower: bool) -> dict[str, Any]:
    """Ratio above 1: the first server is better than the best of the others."""
    others = {name: value for name, value in medians.items() if name != first}
    if not others or first not in medians:
        return {"best_other": None, "ratio": None}
    best = (min if lower else max)(others, key=others.__getitem__)
    ratio = others[best] / medians[first] if lower else medians[first] / others[best]
    return {"best_other": best, "ratio": ratio}


def table(result: dict[str, Any]) -> str:
    """Medians, ratios, and how steady the machine was."""
    names = list(result["servers"])
    rows = [
        [
            f"{row['workload']} {row['unit']}",
            *(report.number(row["medians"].get(name)) for name in names),
            "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
            row["best_other"] or "-",
        ]
        for row in result["rows"]
    ]
    rounds = max(block["round"] for block in result["blocks"])
    size = "short workloads, not to be quoted" if result["short"] else "full workloads"
    header = ["median", *names, "ratio", "to"]
    return "\n".join(
        [f"{size}; rounds: {rounds}", "", *report.align(header, rows), "", *_noise_lines(result)]
    )


def _noise_lines(result: dict[str, Any]) -> list[str]:
    """The range of each limit over all blocks."""
    found = [block["noise"] for block in result["blocks"]]
    series = {
        "read GB/s": [n["read_bytes_per_s"] / 1e9 for n in found if "read_bytes_per_s" in n],
        "fp32 GFLOP/s": [
            n["operations_per_s"]["fp32"] / 1e9 for n in found if "operations_per_s" in n
        ],
        "load average": [n["load_average"] for n in found],
    }
    return ["machine before each block (least, median, most)"] + [
        f"  {name:<13} {min(v):.1f}  {statistics.median(v):.1f}  {max(v):.1f}"
        for name, v in series.items()
        if v
    ]
