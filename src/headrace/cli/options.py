"""Server options on the command line, generated from the declarations in `core.config`.

A value comes from, in this order: the flag, the --config file, for secrets the environment, the
declared default. Knows no single option by name.
"""

import argparse
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.core.config import Config
from headrace.core.errors import BadRequest
from headrace.core.option import Option, value_type
from headrace.core.secret import Secret


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """A flag for every option, grouped by component, and --config."""
    parser.usage = "%(prog)s [options]" if parser.usage is None else parser.usage
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags win over it.")
    for part in dataclasses.fields(Config):
        section: Any = part.default
        group = parser.add_argument_group(part.name, (type(section).__doc__ or "").strip())
        for field in dataclasses.fields(section):
            _add_flag(group, field)


def config_from(
    namespace: argparse.Namespace, overrides: Mapping[str, Any] | None = None
) -> Config:
    """The configuration that flags and --config file ask for; `overrides` win over both.

    Raises:
        BadRequest: an unknown key or a bad value in the file, or a bad value of a flag.
    """
    values = _from_file(namespace.config) if namespace.config else {}
    for field, _ in Config().items():
        value = getattr(namespace, field.name, None)
        if value is not None:
            values[field.name] = value
        elif value_type(field) is Secret and (text := os.environ.get(variable(field.name))):
            values.setdefault(field.name, text)
    return Config.from_flat({**values, **(overrides or {})})


def variable(name: str) -> str:
    """The environment variable of an option that is a secret."""
    return f"HEADRACE_{name.upper()}"


def _add_flag(group: Any, field: "dataclasses.Field[Any]") -> None:
    details: Option = field.metadata["option"]
    names = ["--" + field.name.replace("_", "-"), *details.aliases]
    text = details.help.replace("%", "%%") + _shown_default(field)
    kind = value_type(field)
    if kind is bool:
        action: Any = argparse.BooleanOptionalAction if field.default else "store_true"
        group.add_argument(*names, dest=field.name, action=action, default=None, help=text)
        return
    group.add_argument(
        *names,
        dest=field.name,
        type=kind,
        default=None,
        choices=details.choices or None,
        metavar=None if details.choices else kind.__name__.upper(),
        help=text,
    )


def _shown_default(field: "dataclasses.Field[Any]") -> str:
    if not field.default:
        return ""
    return f" [default: {field.default}]"


def _from_file(path: str) -> dict[str, Any]:
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise BadRequest(f"--config {path} cannot be read: {error}", field="config") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise BadRequest(f"--config {path} must hold a mapping of options", field="config")
    return {str(key).replace("-", "_"): value for key, value in loaded.items()}
