"""Reads YAML files and `key=value` overrides into typed configs, strictly.

Invariant: what comes out has no unknown key and no wrong type; anything else is a one-line user error that names the file, the key and
the cure. Knows no section: the schema is passed in.
"""

import difflib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from data_pipeline.config import DataConfig
from data_pipeline.errors import UserError

Schema = TypeVar("Schema")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""As OmegaConf's: the one in C takes more than the one in Python."""


@dataclass
class _Run:
    seed: int = 0


@dataclass
class _Train:
    steps: int | None = None


@dataclass
class DataView:
    """What this package reads of a stage's YAML."""

    run: _Run = field(default_factory=_Run)
    train: _Train = field(default_factory=_Train)
    data: DataConfig = field(default_factory=DataConfig)


def load_data_view(path: Path, overrides: Sequence[str] = ()) -> DataView:
    """The `data` section, the seed and the length in steps of a stage's YAML.

    Raises:
        UserError: what is wrong, where, and the cure.
    """
    return load(DataView, path, overrides, keep=("data", "run.seed", "train.steps"))


def load(schema: type[Schema], path: str | Path, overrides: Sequence[str] = (), keep: Sequence[str] = ()) -> Schema:
    """The config of one stage.

    Args:
        schema: the dataclass of the whole tree.
        path: its YAML; `base: other.yaml` in it inherits, relative to the file.
        overrides: `section.key=value`, applied last.
        keep: keys to read where the schema is only a part of the tree; all by default.

    Raises:
        UserError: what is wrong, where, and the cure.
    """
    layers = [(str(file), layer) for file, layer in _layers(Path(path))]
    layers += [(f"override {override}", _override(override)) for override in overrides]
    merged = OmegaConf.structured(schema)
    for where, layer in layers:
        part = OmegaConf.masked_copy(layer, []) if keep else layer
        for key in keep:
            section, _, name = key.rpartition(".")
            holder = OmegaConf.select(layer, section) if section else layer
            if isinstance(holder, DictConfig) and name in holder:  # also as null, which takes back what a base gives
                OmegaConf.update(part, key, holder[name])
        merged = _merge(schema, merged, part, where)
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} not given (give it in the YAML or as key=value)")
    try:
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_one_line(error)} (give it in the YAML or as key=value)") from None


def _override(override: str) -> DictConfig:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not key=value (for example train.steps=100)")
    layer = OmegaConf.create()
    OmegaConf.update(layer, key, _parse_value(override, value))
    return layer


def _layers(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Path, DictConfig]]:
    """The file and what it inherits, base first."""
    if path.resolve() in seen:
        raise UserError(f"{path}: `base` leads back to itself (break the circle)")
    try:
        layer = _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such config: {path} (the repository's own are in configs/)") from None
    except (OSError, ValueError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read: {_one_line(error)} (check its permissions and encoding)") from None
    except Exception as error:  # noqa: BLE001  yaml raises its own tree of errors, which OmegaConf does not wrap
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())} (mend that line)") from None
    if not isinstance(layer, DictConfig):
        raise UserError(f"{path} is not a mapping of sections (begin with `run:`)")
    base = layer.pop("base", None)
    below = _layers(path.parent / str(base), (*seen, path.resolve())) if base is not None else []
    return [*below, (path, layer)]


def _merge(schema: type, merged: DictConfig, layer: DictConfig, where: str) -> DictConfig:
    _check_sections(schema, layer, where)
    try:
        return OmegaConf.merge(merged, layer)  # type: ignore[return-value]
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        raise UserError(f"{where}: unknown key {key}{_nearest(schema, key)}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {error.full_key or 'value'}: {_one_line(error)} (give it another value)") from None


def _check_sections(schema: type, layer: DictConfig, where: str, above: str = "") -> None:
    """Raises UserError for a plain value where a section belongs: OmegaConf would not say which key it is."""
    for name, hint in get_type_hints(schema).items():
        if name not in layer or OmegaConf.is_missing(layer, name):
            continue
        if is_dataclass(hint):
            _check_section(hint, layer[name], where, above + name)
        elif get_origin(hint) is dict and is_dataclass(get_args(hint)[1]) and isinstance(layer[name], DictConfig):
            for key, value in layer[name].items():
                _check_section(get_args(hint)[1], value, where, f"{above}{name}.{key}")


def _check_section(schema: Any, value: Any, where: str, key: str) -> None:
    if not isinstance(value, DictConfig):
        raise UserError(f"{where}: {key} is a section, not {value!r} (known keys: {', '.join(f.name for f in fields(schema))})")
    _check_sections(schema, value, where, f"{key}.")


def _nearest(schema: type, key: str) -> str:
    """A hint that names the known key that looks most like this one."""
    parent, _, name = key.rpartition(".")
    known: Any = schema
    for part in parent.split(".") if parent else []:
        hints = get_type_hints(known) if is_dataclass(known) else {}
        name_of = re.sub(r"\[.*", "", part)
        if name_of in hints:  # else a key of a mapping, whose values `known` describes already
            known = _inner_dataclass(hints[name_of])
    names = [f.name for f in fields(known)] if is_dataclass(known) else []
    close = difflib.get_close_matches(name, names, 1, 0.5)
    if close:
        return f" (did you mean {close[0]}?)"
    return f" (known: {', '.join(names)})" if names else ""


def _inner_dataclass(hint: Any) -> Any:
    if is_dataclass(hint):
        return hint
    return next((found for a in get_args(hint) if is_dataclass(found := _inner_dataclass(a))), None)


def _parse_value(override: str, text: str) -> Any:
    try:
        return _parse(f"value: {text}").value
    except Exception as error:  # noqa: BLE001  as for a file: yaml's own errors
        raise UserError(f"override {override!r}: {_one_line(error)} (quote the value)") from None


def _parse(text: str) -> Any:
    """YAML, in which 24:00:00 is a time: YAML 1.1 reads it as a number of base 60."""
    clocks = [
        (node.start_mark.index, node.end_mark.index)
        for node in _scalars(yaml.compose(text, _LOADER))
        if ":" in node.value and _is_number(node)
    ]
    for start, end in reversed(clocks):
        text = f'{text[:start]}"{text[start:end]}"{text[end:]}'
    return OmegaConf.load(io.StringIO(text))


def _scalars(node: yaml.Node | None) -> Iterator[yaml.ScalarNode]:
    """In the order of the text."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _scalars(item)
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            for item in pair:
                yield from _scalars(item)


def _is_number(node: yaml.ScalarNode) -> bool:
    return not node.style and node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
