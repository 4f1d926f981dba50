"""What a rank does with its weights beside computing: saves them, sends them.

`WeightService` answers the scheduler's verb "weights" for one rank. Knows no HTTP and no requests.
Invariant: weights are only read, so steps may run meanwhile.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec

from headrace.core.errors import BadRequest
from headrace.core.model_info import ModelInfo
from headrace.core.weight_options import LoadOptions
from headrace.layers.build import Build
from headrace.loader.remote import save_remote
from headrace.loader.remote_instance import WeightSender
from headrace.loader.sharded import DEFAULT_PATTERN, MAX_PART_BYTES, save_beside, save_sharded

Answer = tuple[str, dict[str, Any]]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Those of all actions; each reads its own."""

    path: str = ""
    pattern: str | None = None
    max_size: int | None = None
    url: str = ""
    group_name: str = ""
    master_address: str = ""
    ports: list[Port] = []
    rank: int | None = None  # the only one that groups are for


class WeightService:
    """The actions on the weights of `model`, this rank's part of `info`."""

    def __init__(self, model: object, info: ModelInfo, build: Build, options: LoadOptions) -> None:
        self.model, self.info, self.build = model, info, build
        self._seeds = options.remote_instance_weight_loader_start_seed
        self._sender = WeightSender(model, info, build)

    def do(self, action: str, details: dict[str, Any]) -> Answer:
        """Carry out an action; returns a text and data.

        Raises:
            HeadraceError: unknown action, wrong arguments, or it failed.
        """
        actions: dict[str, Callable[[Arguments], Answer]] = {
            "save_sharded": self._save_sharded,
            "save_remote": self._save_remote,
            "open_group": self._open_group,
            "send": self._send,
        }
        if action not in actions:
            raise BadRequest(f"unknown action {action!r} on weights")
        try:
            arguments = msgspec.convert(details, Arguments)
        except msgspec.ValidationError as error:
            raise BadRequest(str(error)) from None
        return actions[action](arguments)

    def _save_sharded(self, args: Arguments) -> Answer:
        if not args.path:
            raise BadRequest("path must name a folder", field="path")
        folder, pattern = Path(args.path).expanduser(), args.pattern or DEFAULT_PATTERN
        size = MAX_PART_BYTES if args.max_size is None else args.max_size
        paths = save_sharded(self.model, self.info, self.build, folder, pattern, size)
        if self.build.rank == 0:
            save_beside(self.info, folder)
        return f"Saved in {folder}.", {"files": [path.name for path in paths]}

    def _save_remote(self, args: Arguments) -> Answer:
        names = save_remote(self.model, self.info, self.build, args.url)
        return "Saved.", {"files": names}

    def _open_group(self, args: Arguments) -> Answer:
        if not self._seeds:
            raise BadRequest(
                "this server does not give its weights away: start it with "
                "--remote-instance-weight-loader-start-seed"
            )
        rank = self.build.rank
        if args.rank not in (None, rank):
            return "", {"ports": [0]}
        if args.ports and rank >= len(args.ports):
            raise BadRequest(f"ports must have one for each rank, and rank {rank} has none")
        port = args.ports[rank] if args.ports else 0
        return "", {"ports": [self._sender.open(args.group_name, args.master_address, port)]}

    def _send(self, args: Arguments) -> Answer:
        if args.rank in (None, self.build.rank):
            self._sender.send(args.group_name)
        return "Sending weights.", {}
