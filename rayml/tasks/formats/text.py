"""A file's text, whatever it was written in, and words of scripts with and without spaces."""

import codecs
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rayml.errors import DataError

Found = Iterator[tuple[str, dict[str, Any] | str]]
"""Where a record stood, and the record, or what is wrong with it."""
BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
# Kana, Han and their punctuation, Thai
UNSPACED = r"[\u0e00-\u0e7f\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003134f]"
HAN = re.compile(r"[\u4e00-\u9fff]")


def read_text(path: Path) -> str:
    """Return a file's text: UTF-8 or UTF-16 as its first bytes say, or GB18030 where that reads as Chinese.

    Raises:
        DataError: it is neither, with the line of the first byte that is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    encoding = next((name for mark, name in BOMS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        try:
            text = data.decode("gb18030")
        except UnicodeDecodeError:
            text = ""
        if len(HAN.findall(text)) > 0.2 * len(text):
            return text
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not {encoding}: {error.reason}; convert the file to UTF-8") from None


def joined(tokens: Sequence[str]) -> str:
    """Return tokens as one text, with spaces but where one of two neighbours is of a script that sets none.

    >>> joined(["北", "京", "is", "large"])
    '北京is large'
    """
    text = ""
    for token in tokens:
        apart = text and not re.search(UNSPACED + "$", text) and not re.match(UNSPACED, token)
        text += f" {token}" if apart else token
    return text
