"""Asks the ranks of a running server to save or send their weights, for HTTP and Engine alike."""

from typing import Any

from headrace.core.messages import ControlReply
from headrace.frontend.control import expect
from headrace.frontend.tokenizer_manager import TokenizerManager

_PATIENCE = 3600.0


async def weights(manager: TokenizerManager, action: str, details: dict[str, Any]) -> ControlReply:
    """The answer of `runner.weights` to an action; raises what it was refused with."""
    return expect(await manager.control("weights", _PATIENCE, action=action, details=details))


async def saved(manager: TokenizerManager, action: str, details: dict[str, Any]) -> list[str]:
    """The names of the files that an action wrote."""
    return list((await weights(manager, action, details)).data["files"])
