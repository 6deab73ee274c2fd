"""Decode a file's text, and split it into lines, items and tokens."""

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

Located = tuple[str, dict[str, Any] | str]
"""The place of a record, for error messages; and the record, or a message about what is wrong with it."""
Records = Iterator[Located]
BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16: its mark begins with UTF-16's
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
ENCODINGS = (
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258", "cp874", "cp866"),
    *("koi8_r", "iso8859_2", "iso8859_5", "iso8859_6", "iso8859_15", "cp850", "cp852", "cp437", "mac_roman"),
    *("mac_cyrillic", "gb18030", "big5", "cp949", "cp932", "euc_jp"),
)
"""Encodings of the web, of MS-DOS and of old Macs, the most usual first."""
EAST_ASIAN = {"gb18030": "gb2312", "cp949": "euc_kr", "cp932": "shift_jis", "big5": "big5", "euc_jp": "euc_jp"}
"""East Asian encodings, each with a smaller one that holds its frequent characters. Text decoded by mistake rarely
consists of those."""
UTF_16 = "utf-16-le", "utf-16-be"
ESCAPED = {"iso2022_jp": b"\x1b$", "iso2022_kr": b"\x1b$)C", "hz": b"~{", "utf-7": b"+"}
"""Encodings that use ASCII bytes alone, each with the bytes that introduce other characters. Bytes that look like the
last two may also be plain text."""
SAMPLE = 1 << 16  # bytes, or characters, that are looked at
MIN_DISTINCT = 8  # distinct characters needed to tell East Asian encodings apart
CHAOS_MARGIN = 0.02  # how much more chaos than the best match an East Asian encoding may have
MAX_CHAOS = 0.4
SCORE_MARGIN = 0.2  # single-byte encodings this close to the best score are ordered by how usual they are
MAX_SHOWN = 10
MIN_ASCII_SHARE = 0.01  # of a text's characters: every text has some white space
MAX_CONTROL_SHARE = 0.01
WHITE = "\t\n\r\x0b\x0c\x85"
ASCII = set(map(chr, range(128)))
READ_AS_UTF_8 = "to read it as it is: rayml data convert {} rows.jsonl --encoding utf-8"
HALF_WIDTH = re.compile(r"[\uff61-\uff9f]")
# Kana, Han and their punctuation, Thai
UNSPACED = r"[\u0e00-\u0e7f\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003134f]"


def decode(data: bytes, name: str, encoding: str | None = None) -> tuple[str, str]:
    """Return a file's text and its encoding.

    The encoding is the one given, or that of the byte order mark, or UTF-8. Otherwise it is guessed from the bytes, if
    they leave no doubt.

    Args:
        name: what errors call the file.

    Raises:
        DataError: the encoding is unknown or in doubt; the message has the line of the first byte that is not UTF-8.
    """
    known = encoding or next((bom_encoding for bom, bom_encoding in BOMS.items() if data.startswith(bom)), None)
    candidates, problem = ([], "") if known else (disguised_encodings(data), f"{name}: not plain ASCII")
    if not candidates:
        try:
            text = data.decode(known or "utf-8")
            if known or not data.isascii() or is_text(text):
                return text, known or "utf-8"
            raise DataError(f"{name}: is no text, by its control characters; {READ_AS_UTF_8.format(shlex.quote(name))}")
        except LookupError:
            names = "Python's names are known, such as cp1252 or big5"
            raise DataError(f"--encoding: {encoding!r} unknown; {names}") from None
        except UnicodeDecodeError as error:
            candidates = [] if known else likely_encodings(data)
            line = 1 + data[: error.start].count(b"\n")
            problem = f"{name}:{line}: not {known or 'utf-8'}: {error.reason}"
            if b"\0" in data[:SAMPLE] and not candidates:
                raise DataError(f"{name}: is no text; save it as CSV or JSONL, or unpack it") from None
    if len(candidates) == 1 and candidates[0] in (*EAST_ASIAN, *UTF_16, *ESCAPED):
        return data.decode(candidates[0]), candidates[0]
    by_sample: dict[str, str] = {}  # the first of those that read the same
    for candidate in candidates:
        by_sample.setdefault(non_ascii_sample(data, candidate), candidate)
    looks = " or ".join(f"{candidate} ({sample})" for sample, candidate in [*by_sample.items()][:MAX_SHOWN])
    raise DataError(
        f"{problem}; {f'looks like {looks}: ' if looks else ''}name its encoding: "
        f"rayml data convert {shlex.quote(name)} rows.jsonl --encoding {candidates[0] if candidates else 'NAME'}"
    )


def disguised_encodings(data: bytes) -> list[str]:
    """Return the likely encodings of bytes that are valid UTF-8, but probably something else.

    UTF-16 has a NUL in every ASCII character. The escaped encodings consist of ASCII bytes. One result leaves no doubt;
    none means UTF-8.
    """
    if b"\0" in data:
        texts = {encoding: data.decode(encoding) for encoding in UTF_16 if can_decode(data, encoding)}
        counts = {encoding: sum(map(str.isascii, text)) for encoding, text in texts.items() if is_text(text)}
        most = max(counts.values(), default=0)
        likeliest = [encoding for encoding, count in counts.items() if count == most]
        return [encoding for encoding in likeliest if most > MIN_ASCII_SHARE * len(texts[encoding])]
    for encoding, mark in ESCAPED.items():
        if data.isascii() and mark in data and can_decode(data, encoding):
            text = data.decode(encoding)
            if is_text(text) and len(set(text) - ASCII) > 1:
                return [encoding] if encoding.startswith("iso2022") else [encoding, "utf-8"]
    return []


def is_text(text: str) -> bool:
    """Return whether a text has hardly any control characters, unassigned or private ones, and no escapes or NULs."""
    sample = text[:SAMPLE]
    odd = sum(category(character) in ("Cc", "Cn", "Co") for character in sample if character not in WHITE)
    return "\0" not in text and not re.search(r"\x1b[$(]", text) and odd <= MAX_CONTROL_SHARE * len(sample)


def likely_encodings(data: bytes) -> list[str]:
    """Return the encodings that bytes which are not UTF-8 may be in, the likeliest first.

    charset-normalizer rates the chaos that each makes of the bytes. A single result is East Asian: its characters are
    frequent ones, and there are enough of them. Single-byte encodings can decode nearly any bytes, so several of them
    are always returned.
    """
    text = data.decode("utf-8", errors="replace")
    if 2 * text.count("\ufffd") < sum(not character.isascii() for character in text):
        return []  # UTF-8 with a few broken bytes
    sample = b"\n".join(line for line in re.split(rb"[\r\n]+", data) if not line.isascii())[:SAMPLE]
    sample = sample[: sample.rfind(b"\n")] if len(sample) == SAMPLE else sample
    all_matches = from_bytes(sample, cp_isolation=list(ENCODINGS), threshold=MAX_CHAOS)
    matches = [match for match in all_matches if is_plausible(match) and can_decode(data, match.encoding)]
    least_chaos = min((match.chaos for match in matches), default=0.0)
    east_asian = [
        match for match in matches if match.encoding in EAST_ASIAN and match.chaos <= least_chaos + CHAOS_MARGIN
    ]
    if east_asian:
        names = sorted((match.encoding for match in east_asian), key=ENCODINGS.index)
        distinct = {character for match in east_asian for character in str(match) if not character.isascii()}
        if len(distinct) >= MIN_DISTINCT * len(east_asian):
            return names
        return [*names, *[name for name in EAST_ASIAN if name not in names]]
    scores = {
        encoding: match.coherence - match.chaos
        for match in matches
        for encoding in match.could_be_from_charset
        if encoding in ENCODINGS and encoding not in EAST_ASIAN
    }
    close = max(scores.values(), default=0.0) - SCORE_MARGIN
    return sorted(scores, key=lambda encoding: (max(close - scores[encoding], 0), ENCODINGS.index(encoding)))


def non_ascii_sample(data: bytes, encoding: str) -> str:
    """Return the first words with characters beyond ASCII, as an encoding reads them."""
    words = data[:SAMPLE].decode(encoding, errors="replace").split()
    shown = [word for word in words if not word.isascii()] or [word for word in words if re.search(r"~\{|\+", word)]
    return " ".join(shown or words)[:24]


def is_plausible(match: CharsetMatch) -> bool:
    """Return whether a decoded text consists of characters that are frequent where its encoding is used."""
    frequent = EAST_ASIAN.get(match.encoding)
    characters = [character for character in str(match) if not character.isascii()]
    return not frequent or sum(is_rare(character, frequent) for character in characters) <= 0.1 * len(characters)


def is_rare(character: str, encoding: str) -> bool:
    try:  # EUC-KR composes rare syllables of several characters
        return len(character.encode(encoding)) > 2 or bool(HALF_WIDTH.match(character))
    except UnicodeEncodeError:
        return True


def can_decode(data: bytes, encoding: str) -> bool:
    try:
        return bool(data.decode(encoding))
    except UnicodeDecodeError:
        return False


def split_lines(text: str) -> list[str]:
    r"""Return a text's lines. They end with `\n`, `\r\n`, or in old files `\r`, and with nothing else.

    >>> split_lines("a\u2028b\x0cc\r\nd")
    ['a\u2028b\x0cc', 'd']
    """
    return re.split(r"\r?\n" if "\n" in text else r"\r", text)


def comma_separated(text: str) -> list[str]:
    """Return the items of a comma-separated line, or of a JSON list. An item with a comma is quoted.

    >>> comma_separated('"yes, please", no'), comma_separated('["yes, please", "no"]')
    (['yes, please', 'no'], ['yes, please', 'no'])
    """
    items = json.loads(text) if text.strip().startswith("[") else next(csv.reader([text], skipinitialspace=True), [])
    return [str(item).strip() for item in items if str(item).strip()]


def join_tokens(tokens: Sequence[str]) -> str:
    """Return tokens as one text: with spaces, except beside a script that is written without them.

    >>> join_tokens(["北", "京", "is", "large"])
    '北京is large'
    """
    text = ""
    for token in tokens:
        needs_space = text and not re.search(UNSPACED + r"\Z", text) and not re.match(UNSPACED, token)
        text += f" {token}" if needs_space else token
    return text
