"""Recipes and targets as YAML files: found by name or path, read strictly, errors reported with their line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from litdeploy.errors import SettingsError
from litdeploy.files import is_file, read_small


class Settings(BaseModel):
    """Base of all settings: immutable, without unknown keys or implicit conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=Settings)


# The longest file that ships with litdeploy has 40 lines.
_MOST_BYTES = 2**20
_MOST_NODES = 10_000
_DEEPEST = 20


class _Loader(yaml.SafeLoader):
    """Plain data only: no tags, no key twice, and scalars as in YAML 1.2's core schema, which is what a reader expects.

    YAML 1.1, which PyYAML reads, makes 8 of `010`, 64 of `1:04`, False of `off` and a string of `1e-4`.
    """

    _levels = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # Checked while parsing: the parser's time grows with the square of the depth.
        self._levels += 1
        if self._levels > _DEEPEST:
            raise RecursionError
        node = super().compose_node(parent, index)
        self._levels -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                why = f"the key '{key.value}' is given twice; keep one"
                raise yaml.composer.ComposerError(None, None, why, key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return node

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        return int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10)

    def fetch_tag(self) -> None:
        raise yaml.scanner.ScannerError(
            None, None, "tags (!…) are not allowed: settings are plain data", self.get_mark()
        )


# YAML 1.2.2, section 10.3.2: tag → form of a plain scalar, and the characters that it may begin with.
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
}
_Loader.yaml_implicit_resolvers = {}
for _tag, (_form, _firsts) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$"), _firsts)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def folder(kind: str) -> Path:
    """The folder `recipes/` or `profiles/`: inside an installed package, next to the package in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / kind
    return inside if inside.is_dir() else package.parent / kind


def names(kind: str) -> list[str]:
    """Names of the settings that ship with litdeploy."""
    return sorted(path.stem for path in folder(kind).glob("*.yaml"))


def read(model: type[S], name_or_path: str | Path, kind: str, variants: tuple[str, ...] = ()) -> S:
    """Read one settings file.

    Args:
        model: the settings' class.
        name_or_path: a file's path, or the name of a file in `kind` without its suffix. With `:VARIANT` after it, the
            settings under that key replace the file's others, also within nested mappings.
        kind: `recipes` or `profiles`.
        variants: keys under which a file may hold variants.

    Raises:
        SettingsError: a missing file or variant, invalid YAML, an unknown key or a wrong value; the message names the
            file and the line.
    """
    name, variant = _split(str(name_or_path), variants)
    path = _find(name, kind)
    root = _compose(path)
    changes = {key.value: node for key, node in root.value if key.value in variants}
    root.value = [(key, node) for key, node in root.value if key.value not in variants]
    for key, node in changes.items():
        if not isinstance(node, yaml.MappingNode):
            line = node.start_mark.line + 1
            raise SettingsError(f"{path} line {line}: '{key}' must be a mapping of the settings that it changes.")
    if variant is not None:
        if variant not in changes:
            existing = [name, *(f"{name}:{key}" for key in changes)]
            raise SettingsError(f"{name_or_path}: holds no settings '{variant}'. Name {' or '.join(existing)}.")
        root = _overlaid(root, changes[variant])
    return parse(model, _Loader("").construct_document(root), str(path), root)


def _split(text: str, variants: tuple[str, ...]) -> tuple[str, str | None]:
    """Split `cifar10-resnet:paper` into its parts; a file of exactly that name, or a drive letter, has no variant."""
    name, _, variant = text.rpartition(":")
    if not variants or not name or re.search(r"[/\\.]", variant) or is_file(Path(text)):
        return text, None
    return name, variant


def _find(name: str, kind: str) -> Path:
    path = Path(name)
    if is_file(path):
        return path
    shipped = folder(kind) / f"{name}.yaml"
    if path.suffix in {".yaml", ".yml"} or not is_file(shipped):
        raise SettingsError(
            f"{name}: no such file, and none of this name in {kind}/. litdeploy ships with: "
            f"{', '.join(names(kind)) or 'none'}."
        )
    return shipped


def _compose(path: Path) -> yaml.MappingNode:
    """Parse the document into nodes, which know their lines, and check that it is plain data of a limited size."""
    try:
        loader = _Loader(read_small(path, _MOST_BYTES).decode("utf-8"))
        root = loader.get_single_node()
        _check_size(root, path)
        values = None if root is None else loader.construct_document(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise SettingsError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}.") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: not a text file.") from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}).") from None
    except RecursionError:
        raise SettingsError(f"{path}: nested too deeply; settings are {_DEEPEST} levels deep at most.") from None
    except ValueError as error:  # a number of thousands of digits
        raise SettingsError(f"{path}: holds a value that cannot be read ({error}).") from None
    if values is None:
        return yaml.MappingNode("tag:yaml.org,2002:map", [])
    if not isinstance(root, yaml.MappingNode):
        raise SettingsError(f"{path}: holds a {type(values).__name__}; a mapping of keys to values is needed.")
    return root


def _check_size(root: yaml.Node | None, path: Path) -> None:
    """Count the values with every alias expanded: a few lines of aliases can expand to millions of values.

    Raises:
        SettingsError: too many values, or nested too deeply, as an alias within its own anchor is without end.
    """
    open_nodes = [(root, 1)]
    count = 0
    while open_nodes:
        node, depth = open_nodes.pop()
        count += 1
        if count > _MOST_NODES:
            raise SettingsError(f"{path}: holds more than {_MOST_NODES:,} values, with its aliases expanded.")
        if depth > _DEEPEST:
            raise SettingsError(f"{path}: nested too deeply; settings are {_DEEPEST} levels deep at most.")
        if isinstance(node, yaml.MappingNode):
            open_nodes += [(each, depth + 1) for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            open_nodes += [(each, depth + 1) for each in node.value]


def _overlaid(node: yaml.MappingNode, changes: yaml.MappingNode) -> yaml.MappingNode:
    """Return the mapping with the changes in it: nodes rather than values, so that errors still know their line."""
    merged = {key.value: (key, value) for key, value in node.value}
    for key, value in changes.value:
        _, under = merged.get(key.value, (None, None))
        if isinstance(under, yaml.MappingNode) and isinstance(value, yaml.MappingNode):
            value = _overlaid(under, value)
        merged[key.value] = (key, value)
    return yaml.MappingNode(node.tag, list(merged.values()), node.start_mark, node.end_mark)


def parse(model: type[S], values: dict[str, Any], source: str, root: yaml.Node | None = None) -> S:
    """Validate `values` as settings of class `model`.

    Args:
        source: the origin of the values, for messages.
        root: the YAML document, for line numbers.

    Raises:
        SettingsError: each error with its line, if known, and the nearest key for an unknown one.
    """
    try:
        # Strict models accept lists for tuples, as YAML has them, only from JSON.
        return model.model_validate_json(json.dumps(values))
    except (TypeError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise SettingsError("\n".join(_not_plain(values, source)) or f"{source}: {error}.") from None
        messages = [_message(model, dict(detail), source, root) for detail in error.errors()]
        raise SettingsError("\n".join(messages)) from None


def _not_plain(value: Any, source: str, at: str = "") -> list[str]:
    """A line for each value that no file of settings can hold."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    elif value is None or isinstance(value, str | int | float):
        return []
    else:
        return [
            f"{source}: '{at}' is a {type(value).__name__}, which settings cannot hold. Give text, numbers, true or "
            "false, or lists and dicts of these."
        ]
    return [line for key, each in items for line in _not_plain(each, source, f"{at}.{key}".lstrip("."))]


def _message(model: type[Settings], detail: dict[str, Any], source: str, root: yaml.Node | None) -> str:
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
    # An error of several keys together names them itself.
    found = "" if isinstance(detail["input"], dict) else f" (found {detail['input']!r})"
    return f"{where}: {at}{message[0].lower() + message[1:]}{found}."


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
    """Line of the key (or item) at `keys`, or of the nearest one above it if it is not in the file."""
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
