"""The words of `xc-data select`: the columns that a query sees and what samples can be told apart by.

Invariant: imports nothing, so that `--help` costs nothing.
"""

COLUMNS = {
    "key": ("key", "the sample's key"),
    "shard": ("shard", "file name of its tar"),
    "bytes": ("size", "bytes in the tar, headers included"),
    "tokens": ("list_sum([e.tokens for e in elements])", "text tokens"),
    "texts": ("len([1 for e in elements if e.width = 0 and e.digest is not null])", "text elements"),
    "images": ("len([1 for e in elements if e.width > 0])", "images"),
    "width_min": ("list_min([e.width for e in elements if e.width > 0])", "pixels of the narrowest image; null without images"),
    "width_max": ("list_max([e.width for e in elements if e.width > 0])", "pixels of the widest"),
    "height_min": ("list_min([e.height for e in elements if e.width > 0])", "pixels of the lowest"),
    "height_max": ("list_max([e.height for e in elements if e.width > 0])", "pixels of the highest"),
    "aspect": (
        "list_max([greatest(e.width / e.height, e.height / e.width) for e in elements if e.width > 0])",
        "long side by short side, the largest of all images",
    ),
    "text_digests": (
        "[lower(hex(e.digest)) for e in elements if e.width = 0 and e.digest is not null]",
        "of each text's words (case, spaces, NFKC do not count)",
    ),
    "image_digests": ("[lower(hex(e.digest)) for e in elements if e.width > 0]", "of each image's bytes"),
    "phashes": ("[e.phash for e in elements if e.width > 0]", "64-bit perceptual hash of each image, if indexed with --phash"),
}
"""Columns of a query: what each is made of, and what it says."""
UNIQUE = ("text", "image", "near-image")
"""What two samples may not share."""
NEAR_BITS = 4
"""Bits of 64 in which the perceptual hashes of pictures that look alike may differ."""
MOST_NEAR_BITS = 8
"""Beyond, unlike pictures count as alike, and the search is no longer cheap."""


def describe() -> str:
    """The columns of a query and examples, for --help."""
    columns = "\n".join(f"  {name:<14} {what}" for name, (_, what) in COLUMNS.items())
    return f"""columns of the query:
{columns}

examples:
  xc-data select FOLDER --where "width_min >= 224 and aspect <= 3" -o selections/large
  xc-data select FOLDER --where "tokens between 5 and 200" --unique text,image -o selections/clean
  xc-data select FOLDER --unique near-image -o selections/distinct
  xc-data select FOLDER --where "hash(key) % 100 = 0" -o selections/one_percent
then, in the config:
  data: {{sources: {{NAME: {{path: FOLDER, selection: selections/clean}}}}}}"""
