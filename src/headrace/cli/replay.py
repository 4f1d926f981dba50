"""`headrace replay FILE`: run a recorded scheduler again and compare its decisions."""

import argparse
import dataclasses
import json

from headrace.core.errors import BadRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="what a server wrote with --record-schedule")
    parser.add_argument(
        "--steps", default="", metavar="A:B", help="also show the plans of steps A to B"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(namespace: argparse.Namespace) -> int:
    from headrace.sim.replay import replay_file

    outcome = replay_file(namespace.file, steps_of(namespace.steps))
    if namespace.json:
        print(json.dumps(dataclasses.asdict(outcome)))
    else:
        for step in outcome.steps:
            print(" ".join(f"{name}={value}" for name, value in step.items()))
        print(
            f"{outcome.requests} requests in {outcome.seconds:.1f} s: {outcome.plans} plans, "
            f"{outcome.prompt_tokens} prompt tokens, {outcome.tokens} tokens, "
            f"{outcome.retractions} retractions"
        )
        different = f"diverged at {outcome.divergence}"
        print(different if outcome.divergence else "every decision agrees")
    return 1 if outcome.divergence else 0


def steps_of(text: str) -> range:
    """ "3:9" -> steps 3 to 9.

    Raises:
        BadRequest: it is no range.
    """
    first, colon, last = text.partition(":")
    if not text:
        return range(0)
    if not first.isdecimal() or (colon and not last.isdecimal()):
        raise BadRequest(f"--steps must be like 3:9, not {text!r}", field="steps")
    return range(int(first), int(last if colon else first) + 1)
