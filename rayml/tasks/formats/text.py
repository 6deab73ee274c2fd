"""A file's text, whatever it was written in, its lines, and words of scripts with and without spaces."""

import codecs
import csv
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any
from unicodedata import category

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
    *("koi8_r", "iso8859_2", "iso8859_5", "iso8859_6", "iso8859_15", "cp850", "cp852", "cp437", "mac_roman"),
    *("mac_cyrillic", "gb18030", "big5", "cp949", "cp932", "euc_jp"),
)
"""Those of the web, of MS-DOS and of old Macs."""
NARROW = {"gb18030": "gb2312", "cp949": "euc_kr", "cp932": "shift_jis", "big5": "big5", "euc_jp": "euc_jp"}
"""Encodings of East Asia, each with the one of its frequent characters, which text of another rarely falls into."""
WIDE = "utf-16-le", "utf-16-be"
ESCAPED = {"iso2022_jp": b"\x1b$", "iso2022_kr": b"\x1b$)C", "hz": b"~{", "utf-7": b"+"}
"""Encodings that write all characters as ASCII, with what stands before others. The last two may be plain text, too."""
SAMPLE = 1 << 16
FEWEST_SEEN, CLEAR = 8, 0.02
"""Distinct characters that an East Asian encoding is told by, and how much less mess the others' text has to hold."""
MOST_MESS, CLOSE, MOST_SHOWN = 0.4, 0.2, 10
FEWEST_ASCII, MOST_ODD = 0.01, 0.01
"""Shares of a text: it has some white space, and hardly any control characters, or such as stand for nothing."""
NEWLINE, WHITE, ASCII = b"\n", "\t\n\r\x0b\x0c\x85", set(map(chr, range(128)))
AS_IT_STANDS = "it is read as it stands by: rayml data convert {} rows.jsonl --encoding utf-8"
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
    given = encoding or next((known for mark, known in BOMS.items() if data.startswith(mark)), None)
    found, what = ([], "") if given else (disguised(data), f"{name}: not plain ASCII")
    if not found:
        try:
            text = data.decode(given or "utf-8")
            if given or not data.isascii() or is_text(text):
                return text, given or "utf-8"
            raise DataError(f"{name}: is no text, by its control characters; {AS_IT_STANDS.format(shlex.quote(name))}")
        except LookupError:
            known = "Python's names are known, such as cp1252 or big5"
            raise DataError(f"--encoding: {encoding!r} unknown; {known}") from None
        except UnicodeDecodeError as error:
            found = [] if given else likely(data)
            what = f"{name}:{data[: error.start].count(NEWLINE) + 1}: not {given or 'utf-8'}: {error.reason}"
            if b"\0" in data[:SAMPLE] and not found:
                raise DataError(f"{name}: is no text; save it as CSV or JSONL, or unpack it") from None
    if len(found) == 1 and found[0] in (*NARROW, *WIDE, *ESCAPED):
        return data.decode(found[0]), found[0]
    shown: dict[str, str] = {}  # of those that read the same, the first
    for one in found:
        shown.setdefault(sample(data, one), one)
    looks = " or ".join(f"{one} ({text})" for text, one in [*shown.items()][:MOST_SHOWN])
    raise DataError(
        f"{what}; {f'looks like {looks}: ' if looks else ''}say what it is: "
        f"rayml data convert {shlex.quote(name)} rows.jsonl --encoding {found[0] if found else 'NAME'}"
    )


def disguised(data: bytes) -> list[str]:
    """Return the encodings of bytes that pass for UTF-8, but are most likely in another: one, where there is no doubt.

    UTF-16 has NULs wherever there is ASCII; some have nothing but ASCII, with escapes for all else. UTF-8 itself is
    told by its characters of several bytes.
    """
    if b"\0" in data:
        read = {one: data.decode(one) for one in WIDE if decodes(data, one)}
        plain = {one: sum(character.isascii() for character in text) for one, text in read.items() if is_text(text)}
        likeliest = max(plain.values(), default=0)
        return [one for one, count in plain.items() if count == likeliest and count > FEWEST_ASCII * len(read[one])]
    marked = [one for one, mark in ESCAPED.items() if data.isascii() and mark in data and decodes(data, one)]
    for one in marked:
        text = data.decode(one)
        if is_text(text) and len(set(text) - ASCII) > 1:
            return [one] if one.startswith("iso2022") else [one, "utf-8"]
    return []


def is_text(text: str) -> bool:
    """Return whether hardly any of its characters are control characters, or stand for nothing."""
    some = text[:SAMPLE]
    odd = sum(category(one) in ("Cc", "Cn", "Co") for one in some if one not in WHITE)
    return "\0" not in text and not re.search(r"\x1b[$(]", text) and odd <= MOST_ODD * len(some)


def likely(data: bytes) -> list[str]:
    """Return the encodings that bytes which are no UTF-8 may be in, the likeliest first: one, where there is no doubt.

    Those with the same text are one. charset-normalizer says how much of a mess each makes of it. One alone is of East
    Asia, its characters the frequent ones, and enough of them. Of those with a byte a character nearly all read
    anything: there is always a doubt.
    """
    text = data.decode("utf-8", errors="replace")
    if 2 * text.count("\ufffd") < sum(not character.isascii() for character in text):
        return []  # UTF-8, but for a few bytes
    some = b"\n".join(line for line in re.split(rb"[\r\n]+", data) if not line.isascii())[:SAMPLE]
    some = some[: some.rfind(b"\n")] if len(some) == SAMPLE else some
    found = from_bytes(some, cp_isolation=list(ENCODINGS), threshold=MOST_MESS)
    matches = [match for match in found if plausible(match) and decodes(data, match.encoding)]
    least = min((match.chaos for match in matches), default=0.0)
    eastern = [match for match in matches if match.encoding in NARROW and match.chaos <= least + CLEAR]
    if eastern:
        names = sorted((match.encoding for match in eastern), key=ENCODINGS.index)
        seen = {character for match in eastern for character in str(match) if not character.isascii()}
        few = len(seen) < FEWEST_SEEN * len(eastern)
        return [*names, *[name for name in NARROW if name not in names]] if few else names
    worth = {
        one: match.coherence - match.chaos
        for match in matches
        for one in match.could_be_from_charset
        if one in ENCODINGS and one not in NARROW
    }
    close = max(worth.values(), default=0.0) - CLOSE  # of these, the most usual first
    return sorted(worth, key=lambda one: (max(close - worth[one], 0), ENCODINGS.index(one)))


def sample(data: bytes, encoding: str) -> str:
    """Return the first words that are not plain ASCII, as an encoding has them."""
    words = data[:SAMPLE].decode(encoding, errors="replace").split()
    some = [word for word in words if not word.isascii()] or [word for word in words if re.search(r"~\{|\+", word)]
    return " ".join(some or words)[:24]


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
