"""When a request was where: the marks that its processes leave, and the stages between them.

    received   sent   arrived   admitted   first_token   finished   text_done   delivered   closed
       | tokenize | dispatch | queue | prefill | decode | detokenize | deliver | send |

A timeline is made by the scheduler for a request that asks for one, and travels with its last
delta; each process fills in its own marks. Marks are seconds of CLOCK_MONOTONIC, which all
processes of a machine share; 0 means that the request never came there. Knows no clocks and no
formats of traces.
"""

import time
from typing import Any, NamedTuple

import msgspec

# What is kept of a request that is computed in very many pieces, or retracted again and again.
MAX_CHUNKS = 64
MAX_RETRACTIONS = 16


class PrefillChunk(msgspec.Struct, array_like=True):
    """Prompt tokens `start..start+count` were computed from `began` to `ended`."""

    began: float
    ended: float
    start: int
    count: int


class Divergence(msgspec.Struct, frozen=True, array_like=True):
    """A prompt of `length` tokens shares its first `at` with the one that `rid` has left in the
    prefix cache, and goes on differently."""

    at: int
    length: int
    rid: str


class Stage(NamedTuple):
    """What a request did from `began` to `ended`, and in which process."""

    name: str
    process: str
    began: float
    ended: float


# (stage, process, the mark that ends it)
_STAGES = (
    ("tokenize", "main", "sent"),
    ("dispatch", "main", "arrived"),
    ("queue", "scheduler", "admitted"),
    ("prefill", "scheduler", "first_token"),
    ("decode", "scheduler", "finished"),
    ("detokenize", "detokenizer", "text_done"),
    ("deliver", "main", "delivered"),
    ("send", "main", "closed"),
)


class Timeline(msgspec.Struct, array_like=True, omit_defaults=True):
    """The marks of one request. `steps` and `model_seconds` count the steps it was part of, and
    how long they took; other requests shared them."""

    received: float = 0.0
    sent: float = 0.0
    arrived: float = 0.0
    admitted: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0
    text_done: float = 0.0
    delivered: float = 0.0
    closed: float = 0.0
    steps: int = 0
    model_seconds: float = 0.0
    chunks: list[PrefillChunk] = []
    retracted: list[float] = []
    diverged: Divergence | None = None

    def ran(self, now: float, seconds: float, start: int, count: int, prompt_len: int) -> None:
        """A step of `seconds` that ended `now` has computed tokens `start..start+count`."""
        self.steps += 1
        self.model_seconds += seconds
        count = min(count, prompt_len - start)
        if count <= 0:
            return
        if len(self.chunks) < MAX_CHUNKS:
            self.chunks.append(PrefillChunk(now - seconds, now, start, count))
        else:
            last = self.chunks[-1]
            last.ended, last.count = now, last.count + count

    def retract(self, now: float) -> None:
        """It gave way and waits again."""
        if len(self.retracted) < MAX_RETRACTIONS:
            self.retracted.append(now)

    def stages(self) -> list[Stage]:
        """What came after what, without gaps. A stage that the request did not come to ends where
        it began, so that the last one ends with the request."""
        found = []
        began = self.received or self.sent or self.arrived
        marks = [getattr(self, mark) for _, _, mark in _STAGES]
        for number, (name, process, _) in enumerate(_STAGES):
            later = [mark for mark in marks[number:] if mark]
            ended = max(began, marks[number] or (later[0] if later else began))
            found.append(Stage(name, process, began, ended))
            began = ended
        return found

    def seconds(self) -> dict[str, float]:
        """How long each stage took, and all of them together (`total`)."""
        stages = self.stages()
        found = {stage.name: round(stage.ended - stage.began, 6) for stage in stages}
        if not self.closed:
            del found["send"]
        return {**found, "total": round(stages[-1].ended - stages[0].began, 6)}

    def to_wire(self) -> dict[str, Any]:
        """The `timings` object of an answer: seconds; chunks and retractions since `received`.

        Without `diverged`: to tell a client how many tokens it guessed right of somebody's prompt
        would let it read that prompt token by token.
        """
        began = self.stages()[0].began
        return {
            "received": round(time.time() - time.monotonic() + began, 6),
            **self.seconds(),
            "steps": self.steps,
            "model": round(self.model_seconds, 6),
            "prefill_chunks": [
                {
                    "at": round(chunk.began - began, 6),
                    "seconds": round(chunk.ended - chunk.began, 6),
                    "start": chunk.start,
                    "tokens": chunk.count,
                }
                for chunk in self.chunks
            ],
            "retractions": [round(at - began, 6) for at in self.retracted],
        }
