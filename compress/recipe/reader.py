"""Turns recipe data into typed objects, and every mistake into one sentence with file, line, key and way out."""

from __future__ import annotations

import functools
import itertools
import json
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from compress.errors import CompressError, RecipeError
from compress.nearest import listed, nearest, shown, unknown
from compress.passes import PASSES
from compress.passes.base import Pass
from compress.recipe import yaml_lines
from compress.recipe.yaml_lines import KeyPath, dotted

CONFIG = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Places:
    """Where each key was written: `recipes/x.yaml:7`, or the `--set` option that gave it."""

    source: str
    lines: Mapping[KeyPath, str]

    def error(self, key: KeyPath, message: str) -> RecipeError:
        """Return the error for a key; a key that is not there takes the place of what is in it, or should hold it."""
        inside = [written for written in self.lines if key and written[: len(key)] == key]
        around = [key[:end] for end in range(len(key), -1, -1)]
        known = next((written for written in (key, *inside, *around) if written in self.lines), None)
        where = self.source if known is None else self.lines[known]
        path = f"{dotted(key)}: " if key else ""
        return RecipeError(f"{where}: {path}{message}")


def override(raw: dict[str, Any], text: str, places: dict[KeyPath, str]) -> None:
    """Apply one `--set key=value` to recipe data, in place; `places` learns where the value came from.

    Raises:
        RecipeError: no `=`, a key that leads nowhere, or a value that is not YAML.
    """
    source = f"--set {text if len(text) <= 80 else text[:77] + '...'}"
    name, equals, value_text = text.partition("=")
    if not equals or not re.fullmatch(r"[^.\s\[\]]+(?:\.[^.\s\[\]]+|\[\d+\])*", name.strip()):
        raise RecipeError(f"{source}: is not of the form key=value, e.g. sampler.steps=8 or passes.0.cache.interval=3")
    key: KeyPath = tuple(
        int(part) if part.isdigit() else part for part in re.sub(r"\[(\d+)\]", r".\1", name.strip()).split(".")
    )
    value, _ = yaml_lines.parse(value_text, source)
    here: Any = raw
    for depth, part in enumerate(key):
        if isinstance(here, list):
            if not isinstance(part, int) or part >= len(here):
                have = f"0 to {len(here) - 1}" if here else "none, the list is empty"
                raise RecipeError(f"{source}: {dotted(key[:depth])} is a list; its indices are {have}")
        elif isinstance(here, dict):
            part = str(part)
        else:
            raise RecipeError(f"{source}: {dotted(key[:depth])} is {kind(here)}, which holds no keys")
        if depth == len(key) - 1:
            here[part] = value
        elif isinstance(here, dict) and here.get(part) is None:
            here[part] = {}
        here = here[part]
    for known in [known for known in places if known[: len(key)] == key]:
        del places[known]
    places[key] = source


def validate(model: type[Model], raw: dict[str, Any], places: Places, at: KeyPath = ()) -> Model:
    """Build a pydantic model from plain data.

    Raises:
        RecipeError: the first mistake, in the order of the file.
    """
    try:
        # Through JSON, where pydantic's strict mode takes a list for a tuple but still no text for a number.
        return model.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
    keys = [_real(raw, mistake["loc"]) for mistake in mistakes]
    # What is wrong about a list or a mapping as a whole may only follow from what is wrong inside it.
    inner = [own for own in keys if not any(own != key and key[: len(own)] == own for key in keys)]
    written = list(places.lines)

    def order(index: int) -> tuple[bool, int]:
        key = (*at, *keys[index])
        nearest_written = next((key[:end] for end in range(len(key), -1, -1) if key[:end] in places.lines), ())
        return mistakes[index]["type"] == "missing", written.index(nearest_written) if nearest_written else -1

    first = min((index for index, key in enumerate(keys) if key in inner), key=order)
    key, others = keys[first], len(set(inner)) - 1
    more = f" ({others} more after this one)" if others else ""
    raise places.error((*at, *key), _message(model, key, mistakes[first]) + more)


def read_passes(raw: Any, places: Places) -> tuple[Pass, ...]:
    """Build the passes of a recipe, each from the fields of its dataclass.

    Raises:
        RecipeError: an unknown pass or field, a value that is not allowed, or an illegal order.
    """
    if raw is None:
        return ()
    if not isinstance(raw, list):
        raise places.error(("passes",), f"is {kind(raw)}, not a list of passes; known: {listed(PASSES)}")
    built: list[Pass] = []
    for index, item in enumerate(raw):
        at: KeyPath = ("passes", index)
        if isinstance(item, str):
            item = {item: None}
        if not isinstance(item, dict) or len(item) != 1:
            found = f"{len(item)} keys" if isinstance(item, dict) else kind(item)
            raise places.error(at, f"is {found}, not one pass; write `- name: {{fields}}`, names: {listed(PASSES)}")
        ((name, given),) = item.items()
        if name not in PASSES:
            raise places.error((*at, name), unknown(name, "a pass", PASSES))
        if given is not None and not isinstance(given, dict):
            raise places.error((*at, name), f"is {kind(given)}, not a mapping; fields: {listed(_field_names(name))}")
        built.append(_read_pass(name, given or {}, places, (*at, name)))
    order = list(PASSES)
    for index, (before, after) in enumerate(itertools.pairwise(built), start=1):
        if after.label in [step.label for step in built[:index]]:
            raise places.error(("passes", index), f"{after.label!r} is there twice; give one with all its fields")
        if order.index(after.name) < order.index(before.name):
            raise places.error(
                ("passes", index),
                f"{after.name!r} cannot come after {before.name!r}; the legal order is {' < '.join(order)}",
            )
    return tuple(built)


def pass_fields(step: Pass) -> dict[str, Any]:
    """Return the recipe keys of a pass with every default written out, as plain data."""
    model = pass_model(step.name)
    values = {name: getattr(step, name) for name in model.model_fields}
    plain: dict[str, Any] = model.model_construct(**values).model_dump(mode="json", exclude_none=True)
    return plain


@functools.cache
def pass_model(name: str) -> type[BaseModel]:
    """Return a pydantic model with the fields of a pass's dataclass."""
    cls: Any = PASSES[name]
    hints = get_type_hints(cls, include_extras=True)
    columns: dict[str, Any] = {}
    for column in fields(cls):
        if not column.init:
            continue
        if column.default is not MISSING:
            columns[column.name] = (hints[column.name], column.default)
        elif column.default_factory is not MISSING:
            columns[column.name] = (hints[column.name], Field(default_factory=column.default_factory))
        else:
            columns[column.name] = (hints[column.name], ...)
    model: type[BaseModel] = create_model(f"{cls.__name__}Fields", __config__=CONFIG, **columns)
    return model


def _field_names(name: str) -> list[str]:
    return list(pass_model(name).model_fields)


def _read_pass(name: str, given: dict[str, Any], places: Places, at: KeyPath) -> Pass:
    model = validate(pass_model(name), given, places, at)
    build: Any = PASSES[name]
    try:
        built: Pass = build(**{field: getattr(model, field) for field in type(model).model_fields})
    except (ValueError, CompressError) as error:
        # A pass names the field its error is about as `field: ...`, since it does not know the recipe's file.
        field, colon, message = str(error).partition(": ")
        parts = tuple(int(part) if part.isdigit() else part for part in field.split("."))
        if colon and parts[0] in type(model).model_fields:
            raise places.error((*at, *parts), message) from None
        raise places.error(at, str(error)) from None
    return built


def kind(value: object) -> str:
    """Say what plain data is, in words."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return f"the {'text' if isinstance(value, str) else 'number'} {shown(value)}"


_WANTED = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "none_required": "empty",
}
_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "too_long": ("no longer than", "max_length"),
    "string_too_long": ("no longer than", "max_length"),
}


def _message(model: type[BaseModel], key: KeyPath, mistake: Any) -> str:
    """Turn one pydantic error into words."""
    what, value, context = mistake["type"], mistake.get("input"), mistake.get("ctx") or {}
    if what in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _keys_at(model, key[:-1])
        close = nearest(key[-1], known)
        hint = "" if close is None else f" (did you mean {close!r}?)"
        return f"is not a known key; known: {listed(known)}{hint}"
    if what in ("too_short", "string_too_short"):
        return "must not be empty"
    if what == "missing":
        return "is missing"
    if what in ("literal_error", "enum"):
        known = [name.strip("'") for name in re.split(r", | or ", context.get("expected", ""))]
        return unknown(value, "allowed", known)
    if what in _BOUNDS:
        words, name = _BOUNDS[what]
        return f"{shown(value)} is not allowed; it must be {words} {context.get(name)}"
    if what in _WANTED:
        return f"is {kind(value)}, not {_WANTED[what]}"
    if what == "string_pattern_mismatch":
        return f"{shown(value)} holds characters that are not allowed here"
    return str(mistake["msg"]).removeprefix("Value error, ").rstrip(".")


def _real(raw: Any, location: tuple[int | str, ...]) -> KeyPath:
    """Cut from a pydantic location what names a branch of a union instead of a key."""
    key: list[int | str] = []
    here = raw
    for position, part in enumerate(location):
        if part == "[key]":
            continue
        if isinstance(here, dict) and part in here:
            here = here[part]
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        elif not (isinstance(here, dict) and position == len(location) - 1):
            continue
        key.append(part)
    return tuple(key)


def _keys_at(model: type[BaseModel], key: KeyPath) -> list[str]:
    """List the keys that a (nested) model knows at a path."""
    here: Any = model
    for part in key:
        known = _annotations(here)
        if known is not None:
            here = known.get(str(part))
        elif get_origin(here) in (dict, list, tuple):
            here = get_args(here)[1 if get_origin(here) is dict else 0]
        here = _inside(here)
    return list(_annotations(here) or ())


def _annotations(here: Any) -> dict[str, Any] | None:
    """The keys of a model or dataclass with what they hold; None of anything else."""
    if isinstance(here, type) and issubclass(here, BaseModel):
        return {name: column.annotation for name, column in here.model_fields.items()}
    if isinstance(here, type) and is_dataclass(here):
        hints = get_type_hints(here, include_extras=True)
        return {column.name: hints[column.name] for column in fields(here)}
    return None


def _inside(annotation: Any) -> Any:
    """Step from an annotation through Annotated and `X | None` to what is in it."""
    if get_origin(annotation) is Annotated:
        return _inside(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return next(_inside(argument) for argument in get_args(annotation) if argument is not type(None))
    return annotation
