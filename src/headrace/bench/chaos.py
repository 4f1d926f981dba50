"""`headrace bench chaos`: harms processes of an engine while it streams, and compares the answers.

Every round runs the same mixed requests (greedy and sampled, grammars, n > 1, logprobs, stops,
penalties), harms one process at a random moment, and wants of each request bit by bit what the
quiet run gave. The time until news comes again is what clients notice of it.
"""

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from headrace.bench import report
from headrace.bench.flags import positive_float, positive_int
from headrace.bench.harm import KINDS, ON_ORDER, Harm
from headrace.core.errors import HeadraceError
from headrace.engine.engine import Engine

ROLES = ("scheduler", "detokenizer")
SCHEMA = (
    '{"type":"object","properties":{"place":{"type":"string"},"depth":{"type":"integer"}},'
    '"required":["place","depth"],"additionalProperties":false}'
)
# What must agree beside text and tokens.
_KEPT = ("finish_reason", "prompt_tokens", "completion_tokens")

Call = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--rounds", type=positive_int, default=200, help="default: 200")
    parser.add_argument("--streams", type=positive_int, default=32, help="requests of a round")
    parser.add_argument(
        "--how",
        nargs="+",
        choices=KINDS,
        default=["kill"],
        help="what happens to a process, one of these in each round (default: kill)",
    )
    parser.add_argument(
        "--role", choices=ROLES, help="always this process, if it may be (default: a random one)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments and processes")
    parser.add_argument("--model-path", default="", help="default: the demo model")
    parser.add_argument("--weight-cache", default="", help="as of the server")
    parser.add_argument("--standby", action="store_true", help="as of the server")
    parser.add_argument(
        "--pause", type=float, default=0.0, help="seconds between rounds (default: 0)"
    )
    parser.add_argument(
        "--watchdog", type=positive_float, default=1.0, help="--watchdog-timeout with stop"
    )
    report.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run and report; 1 when an answer differed.

    Raises:
        HeadraceError: the engine could not be started.
    """
    # A short window, so that rounds do not add up to longer and longer pauses.
    options = {
        "model_path": args.model_path,
        "weight_cache": args.weight_cache,
        "standby": args.standby,
        "restart_window": 1,
    }
    roles = (args.role,) if args.role else ROLES
    with Harm(args.how, args.watchdog) as harm, Engine(**options, **harm.options) as engine:
        chaos = Chaos(engine, calls(args.streams), harm, args.seed)
        for number in range(args.rounds):
            time.sleep(max(0.0, args.pause))
            wrong = chaos.round(roles, args.how)
            report.note(f"round {number + 1} of {args.rounds}: {len(wrong)} answers differ")
    result = chaos.summary()
    report.emit(args, result, "\n".join(f"{name:<24}{value}" for name, value in result.items()))
    return 1 if chaos.wrong else 0


def calls(count: int) -> list[Call]:
    """Arguments of `Engine.async_generate`, of every kind."""
    found = []
    for i in range(count):
        sampling: dict[str, Any] = {
            "max_new_tokens": 40 + i * 5 % 120,
            "temperature": 0.9 if i % 2 else 0.0,
            "sampling_seed": i,
            "ignore_eos": True,
            "stream_interval": 1 + i % 3,
        }
        call: Call = {"prompt": f"Report {i} of the wheel: the water" * (1 + i % 3)}
        if i % 4 == 0:
            call |= {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
        if i % 8 == 1:
            call["custom_logit_processor"] = "no_repeat_ngram"
            sampling["custom_params"] = {"ngram_size": 2}
        if i % 8 == 3:
            sampling |= {"json_schema": SCHEMA, "ignore_eos": False}
        if i % 8 == 5:
            sampling["n"] = 2
        if i % 8 == 6:
            sampling |= {"frequency_penalty": 0.5, "min_new_tokens": 20, "ignore_eos": False}
        if i % 8 == 7:
            sampling["stop"] = ["e th"]
        found.append(call | {"sampling_params": sampling, "stream": i % 5 != 4})
    return found


class Chaos:
    """Rounds against one engine; `wrong` are the numbers of calls whose answers differed."""

    def __init__(self, engine: Engine, calls: Sequence[Call], harm: Harm, seed: int) -> None:
        self.wrong: list[int] = []
        self.silences: list[float] = []
        self.seconds: list[float] = []
        # Rounds in which harm was done: there may be no step to fail any more.
        self.harmed = 0
        self._engine = engine
        self._calls = calls
        self._harm = harm
        self._random = random.Random(seed)
        quiet = Progress()
        self.quiet = asyncio.run(self._answers(quiet))
        self._length = time.perf_counter() - quiet.times[0]
        self._tokens = quiet.tokens

    def round(self, roles: Sequence[str], kinds: Sequence[str]) -> list[int]:
        """Do one of `kinds` to one of `roles` while the calls run; returns whose answers differ."""
        role, kind = self._random.choice(roles), self._random.choice(kinds)
        if kind in ON_ORDER:
            role = "scheduler"
        # In tokens, so that some are left to come however fast this round is.
        progress = Progress(int(self._random.uniform(-0.1, 0.7) * self._tokens))
        answers = asyncio.run(self._answers(progress, role, kind))
        self.seconds.append(time.perf_counter() - progress.times[0])
        self.harmed += kind not in ON_ORDER or not self._harm.pending
        wrong = [
            i
            for i, (found, right) in enumerate(zip(answers, self.quiet, strict=True))
            if found != right
        ]
        self.wrong += wrong
        return wrong

    def summary(self) -> dict[str, Any]:
        """Plain data; seconds."""
        silences = sorted(self.silences)
        return {
            "rounds": len(self.seconds),
            "rounds_with_harm": self.harmed,
            "streams": len(self._calls),
            "wrong_answers": len(self.wrong),
            "quiet_seconds": round(self._length, 3),
            "round_seconds_median": round(statistics.median(self.seconds), 3),
            "silence_seconds_median": round(statistics.median(silences), 3),
            "silence_seconds_p99": round(silences[int(0.99 * (len(silences) - 1))], 3),
            "silence_seconds_max": round(silences[-1], 3),
        }

    async def _answers(self, progress: "Progress", role: str = "", kind: str = "") -> list[Any]:
        """The answer to each call, or its error."""
        everything = asyncio.gather(*(self._answer(call, progress) for call in self._calls))
        if role:
            due = asyncio.create_task(progress.due.wait())
            await asyncio.wait((due, everything), return_when=asyncio.FIRST_COMPLETED)
            due.cancel()
            pid = self._engine.get_all_child_pids()[ROLES.index(role)]
            harmed = time.perf_counter()
            self._harm.do(kind, pid)
        answers = await everything
        if role:
            after = [harmed, *(at for at in progress.times if at > harmed)]
            self.silences.append(max((b - a for a, b in pairwise(after)), default=0.0))
        return answers

    async def _answer(self, call: Call, progress: "Progress") -> Any:
        parts: dict[int, Any] = {}
        try:
            result = await self._engine.async_generate(**call)
            if call["stream"]:
                async for part in result:
                    before = parts.get(part.get("index", 0))
                    parts[part.get("index", 0)] = part
                    progress.heard(_length(part) - (_length(before) if before else 0))
                result = [parts[index] for index in sorted(parts)]
        except HeadraceError as error:
            return error.message
        return [_essence(one) for one in (result if isinstance(result, list) else [result])]


class Progress:
    """When news came, and how many streamed tokens; `due` is set when `target` of them are there,
    or at once if it is not above 0."""

    def __init__(self, target: int = 0) -> None:
        self.times = [time.perf_counter()]
        self.tokens = 0
        self.due = asyncio.Event()
        self._target = target
        self.heard(0)

    def heard(self, tokens: int) -> None:
        """So many more."""
        self.times.append(time.perf_counter())
        self.tokens += tokens
        if self.tokens >= self._target:
            self.due.set()


def _length(result: dict[str, Any]) -> int:
    return int(result["meta_info"]["completion_tokens"])


def _essence(result: dict[str, Any]) -> tuple[Any, ...]:
    """What must be the same in every run."""
    meta = result["meta_info"]
    kept = {name: meta[name] for name in meta if name in _KEPT or "logprobs" in name}
    return result["text"], result["output_ids"], kept
