"""From new token ids to new text, one stream per request, in a process of its own.

    scheduler --Deltas(ids)--> DetokenizerManager --Deltas(ids, text)--> tokenizer manager

The scheduler decides when and why a request ends; here its text is cut accordingly. Invariant: what
comes in goes out, once and in order, but for streams whose beginning another process has seen.
Imports neither torch nor transformers; knows of a request only what its first delta says.
"""

import logging
import time
from typing import NoReturn

import msgspec

from headrace.core.blame import exhausted
from headrace.core.errors import BadRequest
from headrace.core.messages import Delta, Deltas, FinishReason, StreamStart, unpack_ids
from headrace.frontend.router import Outlet
from headrace.ipc.channels import Receiver
from headrace.ipc.pulse import Pulse
from headrace.text.detokenize import IncrementalDecoder
from headrace.text.stop import StopFilter
from headrace.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class DetokenizerManager:
    """Owns the text streams. Without a tokenizer it passes everything on as it is."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        # By frontend and rid: two frontends may have requests of one name for a moment.
        self._streams: dict[tuple[int, str], TextStream | LostStream] = {}

    def run(self, inbox: Receiver[Deltas], outbox: Outlet, pulse: Pulse) -> NoReturn:
        """Serve for ever."""
        while True:
            pulse.rest()
            waiting = inbox.take(None)
            pulse.begin()
            for deltas in waiting:
                outbox.send(self.advance(deltas))

    def advance(self, deltas: Deltas) -> Deltas:
        """The deltas of one scheduler step, with their text."""
        if self._tokenizer is None:
            return deltas
        made = [self._alone(delta, self._tokenizer) for delta in deltas.items]
        return Deltas([delta for delta in made if delta is not None], deltas.stats)

    def _alone(self, delta: Delta, tokenizer: Tokenizer) -> Delta | None:
        """`_advance`; what goes wrong with one stream is the end of that one."""
        try:
            return self._advance(delta, tokenizer)
        except Exception as error:  # it fails this request, not the server
            if exhausted(error):
                raise
            logger.error("writing the text of request %s failed", delta.rid, exc_info=error)
            key, lost = (delta.origin, delta.rid), LostStream(error)
            if delta.finish is None:
                self._streams[key] = lost
            else:
                self._streams.pop(key, None)
            _, finish = lost.end(delta.ids, delta.finish)
            return msgspec.structs.replace(delta, text="", finish=finish, start=None)

    def _advance(self, delta: Delta, tokenizer: Tokenizer) -> Delta | None:
        key, before = (delta.origin, delta.rid), ""
        stream: TextStream | LostStream
        if delta.start is not None:
            stream = self._streams[key] = TextStream(tokenizer, delta.start)
            before = stream.push(unpack_ids(delta.start.out).tolist())
        elif (found := self._streams.get(key)) is not None:
            stream = found
        else:
            # It ended before its first token, or its text was begun by a process that is gone.
            return None if delta.finish is None else delta
        if delta.finish is None:
            text, finish = stream.push(delta.ids), None
        else:
            del self._streams[key]
            text, finish = stream.end(delta.ids, delta.finish)
        if delta.timeline is not None:
            delta.timeline.text_done = time.monotonic()
        return msgspec.structs.replace(delta, text=before + text, finish=finish, start=None)


class LostStream:
    """A stream whose text cannot be written: nothing more comes of it, and it ends with that."""

    def __init__(self, error: Exception) -> None:
        self._message = f"writing its text failed ({type(error).__name__})"

    def push(self, ids: list[int]) -> str:
        return ""

    def end(self, ids: list[int], finish: FinishReason | None) -> tuple[str, FinishReason | None]:
        """The scheduler says when; an abort stays one."""
        if finish is None or finish.type == "abort":
            return "", finish
        kind = "InternalServerError"
        return "", FinishReason("abort", message=self._message, status=500, kind=kind)


class TextStream:
    """The text of one request as it grows."""

    def __init__(self, tokenizer: Tokenizer, start: StreamStart) -> None:
        self._decoder = IncrementalDecoder(
            tokenizer,
            unpack_ids(start.prompt_tail).tolist(),
            skip_special_tokens=start.skip_special_tokens,
            spaces_between_special_tokens=start.spaces_between_special_tokens,
        )
        self._keep_stop = start.no_stop_trim
        self._filter: StopFilter | None = None
        if start.stop or start.stop_regex:
            self._filter = StopFilter(start.stop, start.stop_regex, self._keep_stop)
        self._failure: BadRequest | None = None

    def push(self, ids: list[int]) -> str:
        """The text that these ids make certain."""
        text = self._decoder.push(ids)
        return text if self._filter is None else self._filtered(text)

    def end(self, ids: list[int], finish: FinishReason) -> tuple[str, FinishReason]:
        """The last text, and the reason to report. A matched stop token gives no text."""
        if finish.type == "stop" and not self._keep_stop and ids[-1:] == [finish.matched]:
            ids = ids[:-1]
        text = self.push(ids)
        tail = self._decoder.finish()
        if self._filter is None:
            return text + tail, finish
        text += self._filtered(tail)
        if self._failure is not None:
            return text, _refusal(self._failure)
        return text + self._filter.finish(), finish

    def _filtered(self, text: str) -> str:
        """Nothing more comes of a stream whose pattern takes too long; it ends with that error."""
        assert self._filter is not None
        if self._failure is None:
            try:
                return self._filter.push(text)
            except BadRequest as error:
                self._failure = error
        return ""


def _refusal(error: BadRequest) -> FinishReason:
    return FinishReason("abort", message=error.message, status=error.status, kind=error.kind)
