"""Routes by which another server takes this one's weights (--load-format remote_instance).

Everything is asked of the scheduler's ranks through `headrace.frontend.weights`.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from headrace.core.errors import BadRequest
from headrace.frontend.weights import weights
from headrace.server.admin import json_response
from headrace.server.context import Context
from headrace.server.generation import read_body
from headrace.server.schemas import body_of, read

Name = Annotated[str, Field(min_length=1, max_length=256)]
Ports = Annotated[list[Annotated[int, Field(ge=1, le=65535)]], Field(max_length=1024)]

Rank = Annotated[int, Field(ge=0)] | None


class InitWeightsSendGroupBody(BaseModel):
    """POST /init_weights_send_group_for_remote_instance. Without `ports` the seed takes free ones.

    `master_address` is an address of this server, on which it will listen. `rank`: the only one
    that shall; without it every one does.
    """

    model_config = ConfigDict(extra="allow")

    master_address: Name
    ports: Ports = []
    group_rank: int = 0
    world_size: int = 2
    group_name: Name = "weight_send_group"
    backend: str = "gloo"
    rank: Rank = None


class SendWeightsBody(BaseModel):
    """POST /send_weights_to_remote_instance."""

    model_config = ConfigDict(extra="allow")

    master_address: str = ""
    ports: Ports = []
    group_name: Name = "weight_send_group"
    rank: Rank = None


BODIES = (InitWeightsSendGroupBody, SendWeightsBody)


def routes(context: Context) -> APIRouter:
    """Both of them."""
    router = APIRouter()
    init, send = (
        f"/{name}_remote_instance" for name in ("init_weights_send_group_for", "send_weights_to")
    )

    @router.post(init, openapi_extra=body_of(InitWeightsSendGroupBody))
    async def init_weights_send_group(http: Request) -> Response:
        """Listen for a server that will take the weights; answers with the port of each rank."""
        body = read(InitWeightsSendGroupBody, await _raw(http, context))
        for field, wanted in (("backend", "gloo"), ("world_size", 2), ("group_rank", 0)):
            if getattr(body, field) != wanted:
                raise BadRequest(f"{field} must be {wanted!r}", field=field)
        details: dict[str, Any] = {
            "master_address": body.master_address,
            "ports": body.ports,
            "group_name": body.group_name,
            "rank": body.rank,
        }
        reply = await weights(context.manager, "open_group", details)
        return json_response({"success": True, "message": reply.message, **reply.data})

    @router.post(send, openapi_extra=body_of(SendWeightsBody))
    async def send_weights(http: Request) -> Response:
        """Send the weights to who joins the group; answers at once."""
        body = read(SendWeightsBody, await _raw(http, context))
        details = {"group_name": body.group_name, "rank": body.rank}
        reply = await weights(context.manager, "send", details)
        return json_response({"success": True, "message": reply.message})

    return router


async def _raw(http: Request, context: Context) -> bytes:
    context.check_ready()
    return await read_body(http, context.config.serve, any_type=True) or b"{}"
