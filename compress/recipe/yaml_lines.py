"""YAML read safely: plain data, the line of every key, and one sentence for everything that is wrong."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from compress.errors import RecipeError

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the root, e.g. `("passes", 0, "quantize", "scheme")`."""

MAX_BYTES = 1 << 20
MAX_VALUES = 10_000
MAX_DEPTH = 24
_TOO_DEEP = f"is nested deeper than {MAX_DEPTH} levels"


class _Loader(yaml.SafeLoader):
    """The YAML 1.2 core schema: `yes` and `1:30` are text, `1e-3` is a number."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose one node; refused here, since the scanner takes quadratic time over what is nested deeply."""
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=self.peek_event().start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), "-+0123456789")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    "-+.0123456789",
)


def read(path: Path) -> tuple[Any, dict[KeyPath, int]]:
    """Read a YAML file.

    Returns:
        The value as plain data (dict, list, str, int, float, bool, None), and the line of every key and list item.

    Raises:
        RecipeError: the file is not there, not readable, not text or not YAML; says where.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: this is a folder; name a recipe, a YAML file") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path}: is larger than {MAX_BYTES >> 10} KiB, which no recipe is")
    if b"\0" in raw[:4096] and not raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError(f"{path}: is not a text file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: is not UTF-8 text (byte 0x{raw[error.start]:02x})") from None
    return parse(text, str(path))


def parse(text: str, source: str) -> tuple[Any, dict[KeyPath, int]]:
    """Read YAML text that came from `source` (a file name, or the command line option that holds it)."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        return _Reader(loader, source).read(node)
    except yaml.MarkedYAMLError as error:
        raise RecipeError(f"{_place(source, error.problem_mark)}: {_problem(error, text)}") from None
    except yaml.reader.ReaderError as error:
        raise RecipeError(
            f"{_place(source, None)}: holds the character U+{_code(error.character):04X}, which YAML does not allow"
        ) from None
    finally:
        if loader is not None:
            loader.dispose()


def _code(character: str | bytes | int) -> int:
    return character if isinstance(character, int) else ord(character[:1])


def _place(source: str, mark: Any) -> str:
    return source if mark is None or source.startswith("--") else f"{source}:{mark.line + 1}"


def _problem(error: yaml.MarkedYAMLError, text: str) -> str:
    """Say in plain words what the YAML scanner found."""
    if error.problem == _TOO_DEEP:
        return _TOO_DEEP
    mark = error.problem_mark
    line = text.splitlines()[mark.line] if mark is not None and mark.line < len(text.splitlines()) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return "is indented with a tab; YAML takes spaces only"
    problem = " ".join(str(error.problem or error.context or "it cannot be parsed").split())
    shown = line.strip()
    return f"is not YAML: {problem}" + (f" near {shown[:60]!r}" if shown else "")


class _Reader:
    """Turns a composed YAML tree into plain data and remembers lines."""

    def __init__(self, loader: _Loader, source: str) -> None:
        self.loader = loader
        self.source = source
        self.lines: dict[KeyPath, int] = {}
        self.values = 0

    def read(self, node: yaml.Node) -> tuple[Any, dict[KeyPath, int]]:
        value = self._value(node, ())
        self.lines.setdefault((), node.start_mark.line + 1)
        return value, self.lines

    def _error(self, node: yaml.Node, message: str) -> RecipeError:
        return RecipeError(f"{_place(self.source, node.start_mark)}: {message}")

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            raise self._error(node, f"holds more than {MAX_VALUES} values once its aliases are followed")
        if len(path) > MAX_DEPTH:
            raise self._error(node, _TOO_DEEP)
        if isinstance(node, yaml.MappingNode):
            if node.tag != "tag:yaml.org,2002:map":
                raise self._error(node, f"the tag {_short(node.tag)} is not allowed; only plain data is")
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            if node.tag != "tag:yaml.org,2002:seq":
                raise self._error(node, f"the tag {_short(node.tag)} is not allowed; only plain data is")
            items = []
            for index, item in enumerate(node.value):
                self.lines[(*path, index)] = item.start_mark.line + 1
                items.append(self._value(item, (*path, index)))
            return items
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error(key_node, "a key must be a plain word")
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in found:
                raise RecipeError(
                    f"{_place(self.source, key_node.start_mark)}: the key {dotted((*path, key))!r} is there twice; "
                    f"the first is on line {lines[key]}"
                )
            lines[key] = self.lines[(*path, key)] = line
            found[key] = self._value(value_node, (*path, key))
        return found

    def _scalar(self, node: yaml.Node) -> str | int | float | bool | None:
        text, kind = str(node.value), node.tag.rpartition(":")[2]
        if node.tag == f"tag:yaml.org,2002:{kind}":
            try:
                if kind == "str":
                    text.encode("utf-8")
                    return text
                if kind == "null":
                    return None
                if kind == "bool":
                    return {"true": True, "false": False}[text.lower()]
                if kind == "int":
                    return int(text)
                if kind == "float":
                    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            except (ValueError, KeyError):
                raise self._error(node, f"{text[:40]!r} is not a value of the type {kind}") from None
        raise self._error(node, f"the tag {_short(node.tag)} is not allowed; only plain data is")


def _short(tag: str) -> str:
    return repr(tag.replace("tag:yaml.org,2002:", "!!"))


def dotted(path: KeyPath) -> str:
    """Write a key path the way errors do: `passes[1].quantize.scheme`."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else (f".{key}" if text else key)
    return text


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back unchanged."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.yaml_implicit_resolvers = {
    first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + _Loader.yaml_implicit_resolvers.get(first, [])
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value) if math.isfinite(value) else {math.inf: ".inf", -math.inf: "-.inf"}.get(value, ".nan")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _represent_float)


def write(value: Any) -> str:
    """Write plain data as YAML: keys in the order given, the same text for the same data."""
    return str(
        yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    )
