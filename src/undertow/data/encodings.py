"""The bytes of a text file -> its text: UTF-8, what a byte order mark says, or Windows-1252; never a guess unsaid."""

from __future__ import annotations

import codecs
import re

UTF8 = "UTF-8"
WINDOWS = "Windows-1252"
ALLOWED = "UTF-8, in UTF-16 or UTF-32 with a byte order mark, or in Windows-1252"
DAMAGED = "UTF-8 with bad bytes as U+FFFD"

# UTF-32 first: its little-endian mark begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_ASCII = re.compile("[\0-\x7f]+")
_CONTROL = re.compile("[\0-\x08\x0e-\x1f\x7f]")  # what no text holds: all control characters but white space


def marked(start: bytes) -> str | None:
    """The codec that a file's byte order mark names; None where it has none."""
    return next((codec for mark, codec in MARKS if start.startswith(mark)), None)


def text_of(data: bytes) -> tuple[str, str] | None:
    """A file's text and the encoding it was read in; None where the bytes are no text.

    UTF-8 is kept byte for byte. UTF-16 and UTF-32 are known by their byte order mark, which is left out. What holds a
    NUL otherwise is no text. UTF-8 with a few bad bytes (a file cut inside a character) has U+FFFD in their place. All
    else is read as Windows-1252, the encoding of old Western archives, unless it then held control characters or
    bytes without a meaning, or most bytes were no ASCII: text of another alphabet would come out as nonsense.
    """
    codec = marked(data)
    if codec is not None and codec != "utf-8-sig":
        try:
            text = data.decode(codec)
        except UnicodeDecodeError:
            return None
        return (text, codec.upper()) if text else None
    if b"\0" in data:
        return None
    try:
        return data.decode(), UTF8
    except UnicodeDecodeError:
        pass
    mended = data.decode(errors="replace")
    bad = mended.count("\ufffd")
    if codec is not None or len(_ASCII.sub("", mended)) > 2 * bad:  # characters of two bytes and more are no accident
        return None if _CONTROL.search(mended) else (mended, DAMAGED)
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        return None
    high = len(_ASCII.sub("", text))
    return None if 2 * high > len(text) or _CONTROL.search(text) else (text, WINDOWS)
