"""What operators ask of a running server, for HTTP and Engine alike: pause, sessions, profiles.

Asks the scheduler through the manager and turns a reply that is not ok into an error. Knows no
protocol.
"""

from headrace.core.errors import BadRequest, HeadraceError, Overloaded
from headrace.core.messages import ControlReply
from headrace.frontend.tokenizer_manager import TokenizerManager

# A pause waits for the steps in flight; a trace is written before it is told of.
_PATIENCE = 120.0
_ERRORS: dict[int, type[HeadraceError]] = {500: HeadraceError, 503: Overloaded}


def expect(reply: ControlReply) -> ControlReply:
    """The reply, if it is ok; raises what the scheduler refused it with."""
    if not reply.ok:
        raise _ERRORS.get(reply.data.get("status", 400), BadRequest)(reply.message)
    return reply


async def pause(manager: TokenizerManager, mode: str = "abort") -> ControlReply:
    """Let nobody run: `abort` ends all requests, `retract` frees their pages and lets them wait,
    `in_place` freezes them. When it returns no step is in flight."""
    return expect(await manager.control("pause", _PATIENCE, mode=mode))


async def go_on(manager: TokenizerManager) -> ControlReply:
    """The end of a pause."""
    return expect(await manager.control("continue"))


async def open_session(
    manager: TokenizerManager,
    capacity: int = 0,
    session_id: str | None = None,
    timeout: float | None = None,
) -> str:
    """The id of a new session.

    Raises:
        BadRequest: the id is taken. Overloaded: too many sessions are open.
    """
    reply = await manager.control(
        "open_session", capacity=capacity, session_id=session_id, idle_seconds=timeout
    )
    return str(expect(reply).data["session_id"])


async def close_session(manager: TokenizerManager, session_id: str) -> None:
    """Forget a session. Raises BadRequest if there is none."""
    expect(await manager.control("close_session", session_id=session_id))


async def start_profile(
    manager: TokenizerManager,
    name: str = "",
    start_step: int | None = None,
    num_steps: int | None = None,
) -> ControlReply:
    """Record the scheduler's steps into a file of --profile-dir.

    Raises:
        BadRequest: there is no such folder, a profile is being recorded, a number is out of bounds.
    """
    folder = manager.config.observe.profile_dir
    if not folder:
        raise BadRequest("profiles need a server that was started with --profile-dir")
    reply = await manager.control(
        "start_profile", folder=folder, name=name, start_step=start_step, num_steps=num_steps
    )
    return expect(reply)


async def stop_profile(manager: TokenizerManager) -> ControlReply:
    """End the recording and write it. Raises BadRequest if there is none."""
    return expect(await manager.control("stop_profile", _PATIENCE))
