"""Files that hold no rows: recognise them by their first bytes or line, and say what to do with them."""

import re

from rayml.errors import DataError

ARROW = "Arrow's: name the folder that `Dataset.save_to_disk` wrote, hf:FOLDER, or save it as Parquet"
BYTES = {
    b"PK\x03\x04": "a zip, or an Excel file; unzip it, or save it as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file; save it as CSV",
    b"ARROW1": ARROW,
    b"\xff\xff\xff\xff": ARROW,
    b"\x93NUMPY": "an array of NumPy's; save texts and labels as CSV or JSONL",
    b"SQLite format 3": "a database; export the table as CSV",
    b"%PDF": "a PDF; save its text as CSV or JSONL",
}
LINES = {
    r"version https://git-lfs\.": "a pointer of Git LFS, and not the file itself; get that by: git lfs pull",
    r"sep=": "its first line is Excel's mark of the delimiter; leave that line out",
    r"<(\?xml|!doctype|html)": "XML or HTML; save its rows as CSV or JSONL",
}
SUFFIXES = {".yaml": "YAML", ".yml": "YAML", ".toml": "TOML", ".xml": "XML", ".arrow": "Arrow's"}


def refuse_bytes(data: bytes, name: str) -> None:
    """Raise DataError if a file's first bytes say that it is neither text nor Parquet."""
    is_tar = data[257:262] == b"ustar"
    reason = "a tar; unpack it" if is_tar else next((text for mark, text in BYTES.items() if data.startswith(mark)), "")
    if reason:
        raise DataError(f"{name}: {reason}")


def refuse_text(text: str, name: str, suffix: str) -> None:
    """Raise DataError if a text's first line, or the file's suffix, says that it holds no rows."""
    start = text.lstrip()[:4096]
    reason = next((reason for line, reason in LINES.items() if re.match(line, start, re.IGNORECASE)), "")
    if not reason and suffix in SUFFIXES:
        reason = f"{SUFFIXES[suffix]}; save its rows as CSV or JSONL"
    if reason:
        raise DataError(f"{name}: {reason}")
