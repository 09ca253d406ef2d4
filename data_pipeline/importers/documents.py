"""Interleaved documents whose images are files: texts and the names of images, in order, become one sample.

Invariant: a document is never lost for one image that is gone: that image is left out, said, and the rest keeps its order. Texts that
come to stand side by side become one, with what the layout has between texts: as two they would be read without a space.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_pipeline.importers import members
from data_pipeline.importers.images import ImageFolder, image_member
from data_pipeline.samples import BadSample
from data_pipeline.shards.write import Refused, Sample


@dataclass(frozen=True)
class ImageName:
    """An image of a document by the path of its file."""

    path: str


def document(
    key: str, parts: Sequence[str | ImageName], images: ImageFolder, file: str, row: int, between: str
) -> Iterator[Sample | Refused]:
    """What was left out of the document, then the document; only the reason where no text, or of all its images none, is left. Texts
    that no image parts are joined by `between`.
    """
    found: list[str | bytes] = []
    for part in parts:
        if isinstance(part, str):
            if found and isinstance(found[-1], str):
                found[-1] = f"{found[-1]}{between}{part}"
            else:
                found.append(part)
            continue
        try:
            found.append(image_member(images.read(part.path))[1])
        except BadSample as error:
            yield Refused(file, row, f"image of a document: {error}")
    try:
        if any(isinstance(part, ImageName) for part in parts) and not any(isinstance(part, bytes) for part in found):
            raise BadSample("no image of the document is left")
        yield Sample(key, members.document(found))
    except BadSample as error:
        yield Refused(file, row, str(error))
