"""Identities of requests: fresh ids, and the n samples of one prompt. Pure but for the dice."""

import uuid
from collections.abc import Container, Sequence

import msgspec

from headrace.core.deadline import PATIENT, deadline
from headrace.core.errors import BadRequest
from headrace.core.messages import GenerateRequest, pack_ids, unpack_ids
from headrace.core.tenant import Tenant, own

MAX_SAMPLES = 128


def new_rid() -> str:
    """A fresh request id."""
    return uuid.uuid4().hex


def namespace(cache_salt: str | None, extra_key: str | None) -> str:
    """The prefix-cache namespace of a request; "" is the one of requests with neither."""
    return f"{cache_salt or ''}\0{extra_key or ''}" if cache_salt or extra_key else ""


def owned(request: GenerateRequest, tenant: Tenant) -> GenerateRequest:
    """The request of a tenant: its cached prefixes and its session are nobody else's. Takes the
    caller's deadline along."""
    if (limit := deadline.get()) is not PATIENT:
        request = msgspec.structs.replace(
            request, within=limit.whole, first_token_within=limit.first_token
        )
    if not tenant.name:
        return request
    session = request.session
    if session is not None:
        session = msgspec.structs.replace(session, id=own(session.id))
    return msgspec.structs.replace(
        request,
        namespace=own(request.namespace),
        session=session,
        tenant=request.tenant or tenant.name,
        weight=request.weight if request.tenant else tenant.weight,
    )


def check_fresh(rids: Sequence[str], taken: Container[str]) -> None:
    """Raise BadRequest for an id that is taken, or comes twice."""
    used = [rid for rid in rids if rid in taken]
    if not used and len(set(rids)) < len(rids):
        used = [rid for rid in rids if rids.count(rid) > 1]
    if used:
        raise BadRequest(f"rid {used[0]!r} is in use by another request", field="rid")


def fan_out(request: GenerateRequest) -> list[GenerateRequest]:
    """The n samples of a request: `rid_0` to `rid_<n-1>`, one group, told apart by their index.

    Samples with the same seed differ: the noise is keyed by the seed and the sample index.

    Raises:
        BadRequest: n is out of its bounds.
    """
    n = request.sampling.n
    if not 1 <= n <= MAX_SAMPLES:
        raise BadRequest(f"n must be 1 to {MAX_SAMPLES}, not {n}", field="n")
    if n == 1:
        return [request]
    sampling = msgspec.structs.replace(request.sampling, n=1)
    return [
        msgspec.structs.replace(
            request,
            rid=f"{request.rid}_{i}",
            sampling=sampling,
            group=f"{request.rid}_0",
            sample_index=i,
        )
        for i in range(n)
    ]


def continued(request: GenerateRequest, bos: int | None) -> GenerateRequest:
    """What a request of a session becomes, since the scheduler puts in front what came before it:
    one that goes on has no token of beginning, one without a limit of output is marked so."""
    session = request.session
    if session is None:
        return request
    fill = request.sampling.max_new_tokens is None
    request = msgspec.structs.replace(request, session=msgspec.structs.replace(session, fill=fill))
    ids = unpack_ids(request.ids)
    if not session.rid or bos is None or len(ids) < 2 or ids[0] != bos:
        return request
    return msgspec.structs.replace(request, ids=pack_ids(ids[1:]))
