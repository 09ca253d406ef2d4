"""Parquet with image bytes in its rows, as Hugging Face and others write it: an image and a caption, or images and turns.

Invariant: which columns are read is decided from the first file that can be read, the same for every task.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipeline.errors import UserError
from data_pipeline.importers import members, tables
from data_pipeline.importers.contract import Options, key_of
from data_pipeline.samples import BadSample
from data_pipeline.shards.write import Refused, Sample

SUFFIXES = (".parquet",)
IMAGE_NAMES = ("image", "images", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes")
TEXT_NAMES = ("conversations", "caption", "text", "txt", "alt_text", "alt", "description", "title")


def samples(files: Sequence[Path], options: Options, task: int, tasks: int) -> Iterator[Sample | Refused]:
    """Pairs, or conversations where the text column holds turns.

    Raises:
        UserError: the columns cannot be guessed, or those given are not there.
    """
    units = tables.share(files, task, tasks)
    image, text = _columns(files, options)
    for unit in units:
        for item in [unit] if isinstance(unit, Refused) else tables.rows(files, unit, (image, text)):
            if isinstance(item, Refused):
                yield item
                continue
            row, value = item
            number = unit.file
            try:
                yield Sample(key_of(number, row), _members(_encoded(value[image]), value[text]))
            except BadSample as error:
                yield Refused(files[number].name, row, str(error))


def _members(images: list[bytes], text: Any) -> dict[str, bytes]:
    if isinstance(text, list):
        return members.conversation({"conversations": members.place(text)}, images)
    return members.pair(images, text)


def _encoded(value: Any) -> list[bytes]:
    """The encoded images of a cell: bytes, {bytes, path} as Hugging Face writes it, or a list of these."""
    if value is None:
        return []
    if isinstance(value, list):
        return [image for part in value for image in _encoded(part)]
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise BadSample("no image bytes: the row names a file or nothing")
    return [data]


def _columns(files: Sequence[Path], options: Options) -> tuple[str, str]:
    found = next(((file, schema) for file in files for schema in [tables.schema(file)] if schema is not None), None)
    if found is None:
        raise UserError(f"no Parquet file can be read, first {files[0]} (is it the right folder?)")
    file, schema = found
    image = _column(file, schema, options.image_column, IMAGE_NAMES, _holds_images, "image")
    return image, _column(file, schema, options.text_column, TEXT_NAMES, _holds_text, "text")


def _column(file: Path, schema: pa.Schema, given: str | None, names: Sequence[str], fits: Callable[[pa.DataType], bool], what: str) -> str:
    """The given column, else the first by a usual name, else the only one whose type fits."""
    fitting = [f.name for f in schema if fits(f.type)]
    by_name = {name.lower(): name for name in reversed(fitting)}
    usual = next((by_name[name] for name in names if name in by_name), None)
    chosen = given or usual or (fitting[0] if len(fitting) == 1 else None)
    if chosen is None or chosen not in fitting:
        known = f"those that could be: {', '.join(fitting)}" if fitting else f"none of its columns could be: {', '.join(schema.names)}"
        raise UserError(
            f"{file}: {f'column {given!r} holds no' if given else 'cannot guess the column of'} {what}s ({known}; --{what}-column)"
        )
    return chosen


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_images(kind.value_type)
    if pa.types.is_struct(kind):
        return any(kind[i].name == "bytes" and _is_binary(kind[i].type) for i in range(kind.num_fields))
    return _is_binary(kind)


def _holds_text(kind: pa.DataType) -> bool:
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type):
        return {"from", "value"} <= {kind.value_type[i].name for i in range(kind.value_type.num_fields)}
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
