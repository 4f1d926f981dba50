"""Weights from a server that runs, over gloo: no checkpoint is read, nothing is packed again.

    new server (rank r)                     seed (rank r)
    POST /init_weights_send_group...  --->  listens on a port for this group, tells what it holds
    POST /send_weights...             --->  a thread of its own sends every blob, in order
    joins, receives, fills its model  <---

The new server has the config and tokenizer; the seed must hold the same architecture, dtype,
quantization and number of ranks. The seed serves on meanwhile: weights do not change.
"""

import json
import logging
import os
import threading
import urllib.error
import urllib.request
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from headrace.core.errors import BadRequest, LoadError, Overloaded
from headrace.core.model_info import ModelInfo
from headrace.dist.comm import GlooGroup, GlooLink, local_address, tcp_store
from headrace.dist.topology import Shard
from headrace.layers.build import Build
from headrace.loader.base import BaseModelLoader, logged_load
from headrace.loader.sharded import check_layout
from headrace.loader.state import Blobs, as_bytes, by_name, describe, fill, layout
from headrace.models import Model, make_model

logger = logging.getLogger(__name__)

API_KEY_VARIABLE = "HEADRACE_SEED_API_KEY"

_JOIN = timedelta(seconds=60)
_SEND = timedelta(minutes=10)
_STATE = "state"
_MOST_GROUPS = 4
_SEED, _NEW = 0, 1


class RemoteInstanceModelLoader(BaseModelLoader):
    """Format remote_instance."""

    packs = False

    def load_model(self, info: ModelInfo, build: Build) -> Model:
        asked = self.options
        seed = asked.remote_instance_weight_loader_seed_instance_ip
        if not seed:
            raise LoadError(
                "--load-format remote_instance needs "
                "--remote-instance-weight-loader-seed-instance-ip",
                field="remote_instance_weight_loader_seed_instance_ip",
            )
        http = asked.remote_instance_weight_loader_seed_instance_service_port
        group = f"weights-{uuid.uuid4().hex}"
        with logged_load(info, build):
            port = self._open(f"http://{_bracketed(seed)}:{http}", seed, group, build)
            model = make_model(info, build)
            try:
                store = tcp_store(seed, port, False, _JOIN)
                state = json.loads(store.get(_STATE))
                check_layout(state["layout"], layout(info, build), f"the seed at {seed}:{http}")
                pair = GlooGroup(Shard(_NEW, 2), store, group, local_address(seed, port), _SEND)
                blobs = _received(pair, state["blobs"])
                fill(model, state["places"], by_name(blobs), f"the seed at {seed}:{http}")
                deque(blobs, maxlen=0)  # to its end: the seed waits for it
            # torch raises RuntimeError and its subclasses for all that goes wrong between hosts.
            except (RuntimeError, OSError, LookupError, TypeError, ValueError) as error:
                raise LoadError(f"weights did not come from {seed}:{http}: {error}") from error
        return model

    def _open(self, url: str, seed: str, group: str, build: Build) -> int:
        """The port on which this rank's weights will be sent."""
        text = self.options.remote_instance_weight_loader_send_weights_group_ports
        try:
            ports = [int(port) for port in text.split(",")] if text else []
            if any(not 0 < port < 65536 for port in ports):
                raise ValueError
        except ValueError:
            raise BadRequest(
                f"ports must be numbers with commas between, not {text!r}",
                field="remote_instance_weight_loader_send_weights_group_ports",
            ) from None
        where = {
            "master_address": seed,
            "ports": ports,
            "group_name": group,
            "rank": build.rank,
        }
        size = {"group_rank": _SEED, "world_size": 2, "backend": "gloo"}
        opened = _post(f"{url}/init_weights_send_group_for_remote_instance", where | size)
        _post(f"{url}/send_weights_to_remote_instance", where)
        try:
            return int(opened["ports"][build.rank])
        except (LookupError, TypeError, ValueError) as error:
            raise LoadError(f"the seed at {url} has no rank {build.rank}") from error


class WeightSender:
    """The seed's side for one rank: groups that were opened, each sent to once."""

    def __init__(self, model: object, info: ModelInfo, build: Build) -> None:
        self._model, self._layout = model, layout(info, build)
        self._groups: dict[str, tuple[Store, str]] = {}

    def open(self, name: str, address: str, port: int = 0) -> int:
        """Listen on a local `address` (a free port if 0) and tell who comes what is held.

        Raises:
            BadRequest: the address cannot be bound. Overloaded: too many groups are open.
        """
        if len(self._groups) >= _MOST_GROUPS:
            raise Overloaded(f"{_MOST_GROUPS} groups are open already")
        try:
            store = tcp_store(address, port, True, _JOIN)
        except OSError as error:
            raise BadRequest(f"{address}:{port} cannot be bound: {error}") from error
        self._groups[name] = store, address
        return store.port

    def send(self, name: str) -> None:
        """Send all weights to who joins the group; returns at once.

        Raises:
            BadRequest: no such group is open.
        """
        if name not in self._groups:
            raise BadRequest(f"group {name!r} is not open", field="group_name")
        store, address = self._groups.pop(name)
        places, blobs = describe(self._model)
        sizes = [[blob, tensor.nbytes] for blob, tensor in blobs.items()]
        state = {"layout": self._layout, "places": places, "blobs": sizes}
        store.set(_STATE, json.dumps(state))
        arguments = (store, name, address, blobs)
        threading.Thread(target=_send_all, args=arguments, name="send-weights", daemon=True).start()


def _send_all(store: Store, name: str, address: str, blobs: Blobs) -> None:
    try:
        pair = GlooGroup(Shard(_SEED, 2), store, name, address, _SEND)
        link = GlooLink(pair, _NEW)
        for blob in blobs.values():
            if blob.nbytes:
                link.send(torch.frombuffer(as_bytes(blob), dtype=torch.uint8))
        # Wait until the other side has all before the connection goes; it may be gone already.
        with suppress(RuntimeError):
            pair.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        logger.warning("sending weights failed: %s", error)
    else:
        logger.info("weights sent: %d tensors", len(blobs))


def _received(pair: GlooGroup, sizes: list[Any]) -> Iterator[tuple[str, Tensor]]:
    link = GlooLink(pair, _SEED)
    for name, size in sizes:
        if type(size) is not int or size < 0:
            raise ValueError(f"blob {name} has {size!r} bytes")
        yield (
            name,
            link.receive((size,), torch.uint8) if size else torch.empty(0, dtype=torch.uint8),
        )
    pair.all_reduce(torch.zeros(1))


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    key = os.environ.get(API_KEY_VARIABLE, "")
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=_JOIN.total_seconds()) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read(2000).decode(errors="replace")
        raise LoadError(f"the seed refused {url}: {error.code} {text}") from error
    except (OSError, ValueError) as error:
        raise LoadError(f"the seed cannot be reached: {url}: {error}") from error
    if not isinstance(found, dict) or not found.get("success"):
        raise LoadError(f"the seed refused {url}: {found}")
    return found


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
