"""The tokenizer: a folder with `tokenizer.json`, its begin and end tokens, and the digest that ties an index to it.

Invariant: a text encodes to the same ids whatever stands beside it; begin and end are added by templates only.
"""

import hashlib
import os
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from data_pipeline.errors import UserError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of data workers

LONG = 1 << 16
"""Characters from which on a text is remembered, the last one only: its pieces come one by one, and each needs all of its tokens."""


class Tokenizer:
    """Words to ids and back."""

    def __init__(self, folder: str | Path) -> None:
        """Reads `folder/tokenizer.json`, which must know `<s>` and `</s>`.

        Raises:
            UserError: the file is missing, is no tokenizer, or lacks a special token.
        """
        file = Path(folder) / "tokenizer.json"
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {file.resolve()}: {error.strerror} (data.tokenizer names a folder with tokenizer.json)") from None
        try:
            self._tokenizer = FastTokenizer.from_buffer(content)
        except Exception as error:  # noqa: BLE001  the Rust binding raises bare Exception
            raise UserError(f"{file} is not a tokenizer: {error} (write it anew with the `tokenizers` package)") from None
        self._tokenizer.encode_special_tokens = True  # "</s>" in a caption is words, not the end of a text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.digest = hashlib.sha256(content).hexdigest()
        self.begin = self._special("<s>", file)
        self.end = self._special("</s>", file)
        self.special = {i: t.content for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        """Special tokens by id."""
        self._last_long: tuple[str, list[int]] = "", []
        self.size: int = self._tokenizer.get_vocab_size()
        self._template_ids: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, no special tokens added; a new list."""
        if len(text) < LONG:
            return self._encoded(text)
        if text != self._last_long[0]:
            self._last_long = text, self._encoded(text)
        return list(self._last_long[1])

    def encode_template(self, text: str) -> list[int]:
        """Ids of a template's own words, in which special tokens are special; never for words out of data."""
        if text not in self._template_ids:  # templates are few
            self._tokenizer.encode_special_tokens = False
            try:
                self._template_ids[text] = self.encode(text)
            finally:
                self._tokenizer.encode_special_tokens = True
        return self._template_ids[text]

    def knows(self, token: str) -> bool:
        """Whether `token` is one token where a template writes it."""
        found = self._tokenizer.token_to_id(token)
        return found is not None and self.encode_template(token) == [found]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens left out."""
        return self._tokenizer.decode(ids)

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = True  # pickling loses it

    def _encoded(self, text: str) -> list[int]:
        (found,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)  # offsets are not asked for: they cost a third
        return found.ids

    def _special(self, token: str, file: Path) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise UserError(f"{file} has no token {token} (begin and end of a text are <s> and </s>)")
        return found
