"""A file's text, whatever it was written in, its lines, and words of scripts with and without spaces."""

import codecs
import csv
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from charset_normalizer import CharsetMatch, from_bytes

from rayml.errors import DataError

Found = Iterator[tuple[str, dict[str, Any] | str]]
"""Where a record stood, and the record, or what is wrong with it."""
BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins as UTF-16's does
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
ENCODINGS = (
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258", "cp874", "cp866"),
    *("koi8_r", "iso8859_2", "iso8859_5", "iso8859_15", "gb18030", "big5", "cp949", "cp932", "euc_jp", "iso2022_jp"),
    *("utf_16_le", "utf_16_be"),
)
"""Those of the web."""
NARROW = {"gb18030": "gb2312", "cp949": "euc_kr", "cp932": "shift_jis", "big5": "big5", "euc_jp": "euc_jp"}
"""Encodings of East Asia, each with the one of its frequent characters, which text of another rarely falls into."""
SAMPLE = 1 << 16
LATIN = {"cp1252", "cp1250", "cp1254", "cp1257", "cp1258", "iso8859_2", "iso8859_15"}
FEWEST_SEEN, CLEAR, CLEAR_LATIN = 8, 0.02, 0.15
"""Distinct characters that an East Asian encoding is told by, and how much less mess the others' text has to hold; more
among those that differ in a few accents."""
HALF_WIDTH = re.compile(r"[\uff61-\uff9f]")
# Kana, Han and their punctuation, Thai
UNSPACED = r"[\u0e00-\u0e7f\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003134f]"


def decoded(data: bytes, name: str, encoding: str | None = None) -> tuple[str, str]:
    """Return a file's text, and what it was written in.

    That is what was asked for, or what its first bytes say, or UTF-8; or else what it is seen to be, without a doubt.

    Args:
        name: what errors call the file.

    Raises:
        DataError: it is none of these, with the line of the first byte that is not UTF-8, and what to do.
    """
    taken = encoding or next((known for mark, known in BOMS.items() if data.startswith(mark)), "utf-8")
    some = data[:SAMPLE]
    if taken == "utf-8" and 4 * some.count(0) > len(some):  # Latin letters in UTF-16 are every other byte
        taken = "utf-16-le" if some[1::2].count(0) > some[::2].count(0) else "utf-16-be"
    try:
        return data.decode(taken), taken
    except LookupError:
        raise DataError(f"--encoding: {encoding!r} unknown; Python's names are known, such as cp1252 or big5") from None
    except UnicodeDecodeError as error:
        found = [] if taken != "utf-8" or encoding else likely(data)
        if len(found) == 1:
            return data.decode(found[0]), found[0]
        line = data[: error.start].count(b"\n") + 1
        if b"\0" in data[:SAMPLE] and not found:
            raise DataError(f"{name}: is no text; save it as CSV or JSONL, or unpack it") from None
        looks = f"looks like {' or '.join(f'{one} ({sample(data, one)})' for one in found[:3])}: " if found else ""
        raise DataError(
            f"{name}:{line}: not {taken}: {error.reason}; {looks}say what it is: "
            f"rayml data convert {name} rows.jsonl --encoding {found[0] if found else 'NAME'}"
        ) from None


def likely(data: bytes) -> list[str]:
    """Return the encodings that bytes which are no UTF-8 may be in, the likeliest first: one, where there is no doubt.

    Those with the same text are one. charset-normalizer says how much of a mess each makes of it; a text in East Asian
    characters has to be of the frequent ones, and of enough of them.
    """
    some, text = data[:SAMPLE], data.decode("utf-8", errors="replace")
    if 2 * text.count("\ufffd") < sum(not character.isascii() for character in text):
        return []  # UTF-8, but for a few bytes
    if b"\0" not in some:
        some = b"\n".join(line for line in re.split(rb"[\r\n]+", data) if not line.isascii() or b"\x1b" in line)[
            :SAMPLE
        ]
        some = some[: some.rfind(b"\n")] if len(some) == SAMPLE else some
    matches = [match for match in from_bytes(some, cp_isolation=list(ENCODINGS)) if plausible(match)]
    if not matches:
        return []
    best = min(matches, key=lambda match: match.chaos)
    close = [match for match in matches if match.chaos <= best.chaos + clear_of(best, match)]
    eastern = [match for match in close if match.encoding in NARROW]
    readable = [match for match in close if match.coherence >= max(one.coherence for one in close) - 0.1]
    first = [min(match.could_be_from_charset, key=ENCODINGS.index) for match in eastern or readable]
    names = [name for name in sorted(first, key=ENCODINGS.index) if decodes(data, name)]
    seen = {character for match in eastern for character in str(match) if not character.isascii()}
    few = bool(eastern) and len(seen) < FEWEST_SEEN * len(eastern)
    return [*names, *[name for name in NARROW if name not in names]] if few else names


def sample(data: bytes, encoding: str) -> str:
    """Return the first words that are not ASCII, as an encoding has them."""
    line = next(line for line in data.splitlines() if not line.isascii())
    some = [word for word in line.decode(encoding, errors="replace").split() if not word.isascii()]
    return " ".join(some)[:24]


def clear_of(best: CharsetMatch, match: CharsetMatch) -> float:
    return CLEAR_LATIN if {best.encoding, match.encoding} <= LATIN else CLEAR


def plausible(match: CharsetMatch) -> bool:
    """Return whether a text is of characters that are frequent where its encoding is used."""
    narrow = NARROW.get(match.encoding)
    characters = [character for character in str(match) if not character.isascii()]
    return not narrow or sum(is_rare(one, narrow) for one in characters) <= 0.1 * len(characters)


def is_rare(character: str, encoding: str) -> bool:
    try:  # EUC-KR composes rare syllables of several characters
        return len(character.encode(encoding)) > 2 or bool(HALF_WIDTH.match(character))
    except UnicodeEncodeError:
        return True


def decodes(data: bytes, encoding: str) -> bool:
    try:
        return bool(data.decode(encoding))
    except UnicodeDecodeError:
        return False


def lines(text: str) -> list[str]:
    r"""Return a text's lines, which end with `\n`, `\r\n`, or in old files `\r`, and with nothing else.

    >>> lines("a\u2028b\x0cc\r\nd")
    ['a\u2028b\x0cc', 'd']
    """
    return re.split(r"\r?\n" if "\n" in text else r"\r", text)


def comma_separated(text: str) -> list[str]:
    """Return what stands between commas, or in a JSON list; what has a comma in it stands in quotes.

    >>> comma_separated('"yes, please", no'), comma_separated('["yes, please", "no"]')
    (['yes, please', 'no'], ['yes, please', 'no'])
    """
    found = json.loads(text) if text.strip().startswith("[") else next(csv.reader([text], skipinitialspace=True), [])
    return [str(one).strip() for one in found if str(one).strip()]


def joined(tokens: Sequence[str]) -> str:
    """Return tokens as one text, with spaces but where one of two neighbours is of a script that sets none.

    >>> joined(["北", "京", "is", "large"])
    '北京is large'
    """
    text = ""
    for token in tokens:
        apart = text and not re.search(UNSPACED + r"\Z", text) and not re.match(UNSPACED, token)
        text += f" {token}" if apart else token
    return text
