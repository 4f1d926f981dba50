"""Sessions: trees of requests, each of which goes on where another one ended.

    open -> "s"          request a          prompt a
                          +- request b      prompt a + output a + prompt b
                          |   +- request c  ...
                          +- request d      the same beginning, told apart by the radix cache

A session holds tokens only; their keys and values are in the radix cache like those of any other
prefix. The number of sessions and the tokens they hold together are bounded; a session that nobody
uses for its timeout is closed when the next one is opened or used. Knows no pages and no text.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from headrace.core.errors import BadRequest, Overloaded
from headrace.core.messages import GenerateRequest, SessionParams, pack_ids, unpack_ids
from headrace.scheduler.feature import Feature
from headrace.scheduler.request import Request

MAX_ID_LENGTH = 256
# Tokens that all sessions may hold together: 256 MiB.
MAX_TOKENS = 1 << 26


@dataclass
class Node:
    """One request. `tokens` are prompt and output together, int32; None until `spec` has ended."""

    parent: str
    prompt_len: int
    spec: GenerateRequest | None
    tokens: np.ndarray | None = None


@dataclass
class Session:
    """`capacity`: most tokens of one prompt with what came before it; 0 has no such limit."""

    capacity: int
    timeout: float
    used_at: float
    nodes: dict[str, Node] = field(default_factory=dict)

    @property
    def busy(self) -> bool:
        return any(node.tokens is None for node in self.nodes.values())

    def below(self, rid: str) -> list[str]:
        """Every request that goes on from `rid`, however far."""
        children: dict[str, list[str]] = {}
        for name, node in self.nodes.items():
            children.setdefault(node.parent, []).append(name)
        found = children.get(rid, [])
        for name in found:
            found += children.get(name, [])
        return found


class Sessions(Feature):
    """Owns all sessions of one scheduler."""

    def __init__(self, most: int, timeout: float, clock: Callable[[], float]) -> None:
        self._most = most
        self._timeout = timeout
        self._clock = clock
        self._sessions: dict[str, Session] = {}
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, id: str | None, capacity: int, timeout: float | None) -> str:
        """A new session; returns its id. `timeout` in seconds, instead of the server's.

        Raises:
            BadRequest: the id is taken or too long. Overloaded: there are too many sessions.
        """
        self._close_idle()
        id = id or uuid.uuid4().hex
        if id in self._sessions:
            raise BadRequest(f"session_id: {_shown(id)} is open already", field="session_id")
        if len(id) > MAX_ID_LENGTH:
            raise BadRequest(f"session_id may have {MAX_ID_LENGTH} characters", field="session_id")
        if capacity < 0:
            raise BadRequest("capacity_of_str_len must be at least 0", field="capacity_of_str_len")
        if timeout is not None and not timeout > 0:
            raise BadRequest(f"timeout must be more than 0 s, not {timeout}", field="timeout")
        if len(self._sessions) >= self._most:
            raise Overloaded(f"{self._most} sessions are open, the most there may be")
        self._sessions[id] = Session(capacity, timeout or self._timeout, self._clock())
        return id

    def close(self, id: str) -> None:
        """Forget a session; its requests in flight go on. Raises BadRequest."""
        session = self._get(id, "session_id")
        del self._sessions[id]
        self._tokens -= sum(map(_size, session.nodes.values()))

    def displaced(self, spec: GenerateRequest) -> list[str]:
        """The requests that have to end before this one replaces them, by rid.

        Raises:
            BadRequest: there is no such session or request.
        """
        asked = _params(spec)
        session = self._get(asked.id, "session_params")
        if asked.rid and asked.rid not in session.nodes:
            raise BadRequest(
                f"session_params: there is no request {asked.rid!r} in session {_shown(asked.id)}",
                field="session_params",
            )
        if not asked.replace:
            return []
        found = [*session.below(asked.rid), *filter(None, [asked.rid])]
        return [rid for rid in found if session.nodes[rid].tokens is None]

    def extend(self, spec: GenerateRequest, longest: int) -> GenerateRequest:
        """The request with what came before it in front of its prompt, and remember it.

        What it replaces is dropped. `logprobs.start` counts from its own prompt. `longest`: the
        tokens that any request may have.

        Raises:
            BadRequest: what it goes on from has not ended, or the whole is too long.
            Overloaded: sessions hold too many tokens.
        """
        asked = _params(spec)
        session = self._get(asked.id, "session_params")
        if spec.attempt and spec.rid in session.nodes:
            self._tokens -= _size(session.nodes.pop(spec.rid))
        dropped = session.below(asked.rid) if asked.replace else []
        before = self._before(session, asked)
        new = unpack_ids(spec.ids)
        ids = np.concatenate([before, new]) if len(before) else new
        if session.capacity and len(ids) > session.capacity:
            raise BadRequest(
                f"session_params: the prompt has {len(ids)} tokens with what came before it; "
                f"the session was opened for {session.capacity} (capacity_of_str_len)",
                field="session_params",
            )
        if self._tokens + len(ids) > MAX_TOKENS:
            raise Overloaded(f"sessions hold {self._tokens} tokens; there is no room for more")
        if spec.rid in session.nodes and spec.rid not in dropped:
            raise BadRequest(
                f"rid {spec.rid!r} is in use by another request of the session", field="rid"
            )
        for rid in dropped:
            self._tokens -= _size(session.nodes.pop(rid))
        spec = _whole(spec, ids, len(before), longest)
        session.nodes[spec.rid] = Node(asked.rid, len(ids), spec)
        session.used_at = self._clock()
        return spec

    def on_finish(self, request: Request) -> None:
        """Keep what the request has come to; of one that failed, nothing."""
        asked = request.spec.session
        session = self._sessions.get(asked.id) if asked else None
        node = session.nodes.get(request.rid) if session else None
        if session is None or node is None or node.spec is not request.spec:
            return  # it was refused, or its session is another one by now
        session.used_at = self._clock()
        if request.finish is not None and request.finish.status >= 400:
            del session.nodes[request.rid]
            return
        node.tokens, node.spec = request.tokens(), None
        self._tokens += len(node.tokens)

    def _before(self, session: Session, asked: SessionParams) -> np.ndarray:
        """The tokens in front of the prompt."""
        if not asked.rid:
            return np.zeros(0, np.int32)
        node = session.nodes[asked.rid]
        if node.tokens is None:
            raise BadRequest(
                f"session_params: request {asked.rid!r} has not ended", field="session_params"
            )
        found = node.tokens[: node.prompt_len] if asked.drop_previous_output else node.tokens
        if abs(asked.offset) > len(found):
            raise BadRequest(
                f"session_params: offset is {asked.offset}, but {len(found)} tokens came before",
                field="session_params",
            )
        return found[: asked.offset] if asked.offset else found

    def _get(self, id: str, name: str) -> Session:
        self._close_idle()
        if id not in self._sessions:
            raise BadRequest(f"{name}: there is no session {_shown(id)}", field=name)
        return self._sessions[id]

    def _close_idle(self) -> None:
        """Close what nobody used for its timeout."""
        now = self._clock()
        for id, session in list(self._sessions.items()):
            if now - session.used_at > session.timeout and not session.busy:
                self._tokens -= sum(map(_size, session.nodes.values()))
                del self._sessions[id]


def _params(spec: GenerateRequest) -> SessionParams:
    assert spec.session is not None
    return spec.session


def _whole(spec: GenerateRequest, ids: np.ndarray, before: int, longest: int) -> GenerateRequest:
    """The request with the prompt `ids`, of which the first `before` tokens are not its own."""
    logprobs, sampling = spec.logprobs, spec.sampling
    if logprobs is not None and logprobs.start >= 0:
        logprobs = msgspec.structs.replace(logprobs, start=before + logprobs.start)
    if _params(spec).fill:
        room = max(1, longest - len(ids))
        sampling = msgspec.structs.replace(sampling, max_new_tokens=room)
    return msgspec.structs.replace(spec, ids=pack_ids(ids), logprobs=logprobs, sampling=sampling)


def _size(node: Node) -> int:
    return 0 if node.tokens is None else len(node.tokens)


def _shown(id: str) -> str:
    """A session's id as its owner wrote it, see `core.tenant.own`."""
    return repr(id.rpartition("\0")[2])
