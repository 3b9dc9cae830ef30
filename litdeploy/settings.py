"""Recipes and targets as YAML files: found by name or path, read strictly, faults named with their line."""

from __future__ import annotations

import json
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from litdeploy.errors import SettingsError


class Settings(BaseModel):
    """Base of every settings model: immutable, unknown keys refused, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=Settings)


class _Loader(yaml.SafeLoader):
    """Plain data only (safe), and `1e-4` is a number as in YAML 1.2 and Python, not a string as in YAML 1.1."""


_Loader.yaml_implicit_resolvers = {key: list(rules) for key, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def folder(kind: str) -> Path:
    """The folder `recipes/` or `profiles/`: inside the package where it was installed, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / kind
    return inside if inside.is_dir() else package.parent / kind


def names(kind: str) -> list[str]:
    """Names of the settings that come with litdeploy."""
    return sorted(path.stem for path in folder(kind).glob("*.yaml"))


def read(model: type[S], name_or_path: str | Path, kind: str) -> S:
    """Reads one settings file.

    Args:
        model: what it must hold.
        name_or_path: a file's path, or the name of one in `kind` without its ending.
        kind: `recipes` or `profiles`.

    Raises:
        SettingsError: no such file, not YAML, an unknown key or a wrong value; it names the file and the line.
    """
    path = Path(name_or_path)
    if not path.is_file():
        shipped = folder(kind) / f"{name_or_path}.yaml"
        if path.suffix in {".yaml", ".yml"} or not shipped.is_file():
            raise SettingsError(
                f"{name_or_path}: no such file, and none of this name in {kind}/. Those that come with litdeploy: "
                f"{', '.join(names(kind)) or 'none'}."
            )
        path = shipped
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise SettingsError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}.") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: not a text file.") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: holds a {type(values).__name__}; a mapping of keys to values is needed.")
    return parse(model, values, str(path), root)


def parse(model: type[S], values: dict[str, Any], source: str, root: yaml.Node | None = None) -> S:
    """Checks `values` against `model`.

    Args:
        source: what a message calls the origin of the values.
        root: the YAML document, for line numbers.

    Raises:
        SettingsError: names each fault, its line where known, and the nearest key for an unknown one.
    """
    try:
        # JSON is the mode in which strict models take lists for tuples, as YAML writes them.
        return model.model_validate_json(json.dumps(values))
    except (TypeError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise SettingsError(f"{source}: {error}.") from None
        faults = [_fault(model, dict(detail), source, root) for detail in error.errors()]
        raise SettingsError("\n".join(faults)) from None


def _fault(model: type[Settings], detail: dict[str, Any], source: str, root: yaml.Node | None) -> str:
    keys = detail["loc"]
    line = _line(root, keys)
    where = source + (f" line {line}" if line else "")
    dotted = ".".join(str(key) for key in keys)
    if detail["type"] == "extra_forbidden":
        known = _fields_at(model, keys[:-1])
        near = get_close_matches(str(keys[-1]), known, n=1)
        return f"{where}: unknown key '{dotted}'." + (
            f" Did you mean '{near[0]}'?" if near else f" Known here: {', '.join(sorted(known))}."
        )
    if detail["type"] == "missing":
        return f"{where}: '{dotted}' is missing."
    message = detail["msg"].removeprefix("Value error, ")
    at = f"{dotted}: " if dotted else ""
    return f"{where}: {at}{message[0].lower() + message[1:]} (found {detail['input']!r})."


def _fields_at(model: type[BaseModel], keys: tuple[str | int, ...]) -> list[str]:
    for key in keys:
        field = model.model_fields.get(str(key))
        if field is None:
            return []
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
        nested = [kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)


def _line(node: yaml.Node | None, keys: tuple[str | int, ...]) -> int | None:
    """Line of the key (or item) that `keys` leads to; of the nearest one above it where it is not in the file."""
    line = None
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            found = [(name, value) for name, value in node.value if name.value == str(key)]
            if not found:
                break
            name, node = found[0]
            line = name.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
        else:
            break
    return line
