"""Files that hold no rows as they stand: what they are, by their first bytes or lines, and what to do with them."""

import re

from rayml.errors import DataError

ARROW = "Arrow's: name the folder that `Dataset.save_to_disk` wrote, hf:FOLDER, or save it as Parquet"
BYTES = {
    b"PK\x03\x04": "a zip, or an Excel file; unzip it, or save it as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file; save it as CSV",
    b"ARROW1": ARROW,
    b"\xff\xff\xff\xff": ARROW,
    b"\x93NUMPY": "an array of NumPy's; save texts and labels as CSV or JSONL",
    b"SQLite format 3": "a data base; export the table as CSV",
    b"%PDF": "a PDF; save its text as CSV or JSONL",
}
LINES = {
    r"version https://git-lfs\.": "a pointer of Git LFS, and not the file itself; get that by: git lfs pull",
    r"sep=": "its first line is Excel's mark of the delimiter; leave that line out",
    r"<(\?xml|!doctype|html)": "XML or HTML; save its rows as CSV or JSONL",
}
SUFFIXES = {".yaml": "YAML", ".yml": "YAML", ".toml": "TOML", ".xml": "XML", ".arrow": "Arrow's"}


def refuse_bytes(data: bytes, name: str) -> None:
    """Raise DataError if a file's first bytes say that it is no text, nor Parquet."""
    is_tar = data[257:262] == b"ustar"
    what = "a tar; unpack it" if is_tar else next((what for mark, what in BYTES.items() if data.startswith(mark)), "")
    if what:
        raise DataError(f"{name}: {what}")


def refuse_text(text: str, name: str, suffix: str) -> None:
    """Raise DataError if a text's first line or its suffix says that it holds no rows."""
    begin = text.lstrip()[:4096]
    what = next((what for line, what in LINES.items() if re.match(line, begin, re.IGNORECASE)), "")
    what = what or (f"{SUFFIXES[suffix]}; save its rows as CSV or JSONL" if suffix in SUFFIXES else "")
    if what:
        raise DataError(f"{name}: {what}")
