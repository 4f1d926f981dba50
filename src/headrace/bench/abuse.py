"""`headrace bench abuse`: what a server survives, and what it costs those who behave.

    disconnects   clients that vanish in every state; afterwards nothing may be held
    hostile       bodies nobody should send, beside a stream that must not notice
    overload      four times what the server can do, and two tenants of unequal hunger
    soak          everything for a long time: memory stays flat, no answer is lost or different

Each starts a server of its own. The exit code says whether every check held. Client and server
share the machine: latencies are compared with those beside harmless requests of the same client.
"""

import argparse
import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from headrace.bench import abuse_load, abuse_soak, report
from headrace.bench.abuse_site import Check
from headrace.bench.flags import positive_float, positive_int
from headrace.core.errors import BadRequest

Suite = Callable[[argparse.Namespace], Coroutine[Any, Any, list[Check]]]

SUITES: dict[str, Suite] = {
    "disconnects": abuse_load.disconnects,
    "hostile": abuse_load.hostile,
    "overload": abuse_load.overload,
    "soak": abuse_soak.soak,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; what follows `--` goes to the server."""
    parser.add_argument("suite", nargs="*", default=[], help=f"of {', '.join(SUITES)}; default all")
    parser.add_argument(
        "--count", type=positive_int, default=1000, help="disconnects and bodies (default: 1000)"
    )
    parser.add_argument(
        "--seconds", type=positive_float, default=30.0, help="of overload and soak (default: 30)"
    )
    parser.add_argument("--seed", type=positive_int, default=1)
    parser.add_argument("--server", default="", help="more arguments of `headrace serve`, as one")
    report.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the suites and report.

    Raises:
        HeadraceError: a server did not start, or there is no such suite.
    """
    for name in args.suite:
        if name not in SUITES:
            raise BadRequest(f"suite must be of {', '.join(SUITES)}, not {name!r}", field="suite")
    found = {name: asyncio.run(SUITES[name](args)) for name in args.suite or SUITES}
    result = {
        name: [{"what": c.what, "value": c.value, "ok": c.ok} for c in checks]
        for name, checks in found.items()
    }
    report.emit(args, {"suites": result}, table(found))
    return 0 if all(check.ok for checks in found.values() for check in checks) else 1


def table(found: dict[str, list[Check]]) -> str:
    """One line per check."""
    rows = [
        [name, check.what, check.value, "ok" if check.ok else "FAILED"]
        for name, checks in found.items()
        for check in checks
    ]
    return "\n".join(report.align(["suite", "check", "measured", ""], rows))
