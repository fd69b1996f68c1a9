# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Remove the markup that spreadsheets, web pages and word processors leave in reports.

- Excel's escapes of control characters ("_x000D_"), HTML entities ("&nbsp;"), and "\\n" written as two characters.
- HTML tags: tags that break a line become a line break, others are removed. "nodules <5 mm" is not a tag.
- Zero-width characters (soft hyphens, zero-width spaces, direction marks) are removed, ligatures are expanded.
"""

import html
import re
from collections.abc import Callable

# Fast check: a report that does not match has no markup and is returned unchanged.
_SUSPECT = re.compile(
    r"[&<\r\\\u00ad\u034f\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufb00-\ufb04]|_[xX][0-9a-fA-F]{4}_"
)
_BREAKS = "br|p|div|li|ul|ol|tr|table|tbody|thead|h[1-6]|hr|section|article|pre|blockquote|dl|dt|dd"
_INLINE = (
    "wbr|b|i|u|em|strong|span|font|small|big|sup|sub|a|s|strike|del|ins|mark|code|center|label|html|body|head|td|th"
)
_ESCAPES = re.compile(r"_[xX]([0-9a-fA-F]{4})_|&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,30});|&nbsp")
_MARKS = re.compile(
    rf"(?P<line>\r\n?|[\u2028\u2029]|\\r\\n|\\[rn]|</?(?:{_BREAKS})(?:\s[^<>]*)?/?>)"
    rf"|(?P<nothing></?(?:{_INLINE}|[a-z]+:[a-z]+)(?:\s[^<>]*)?/?>|<!--.*?-->"
    r"|[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff])"
    r"|(?P<ligature>[\ufb00-\ufb04])",
    re.IGNORECASE | re.DOTALL,
)
_LIGATURES = {"\ufb00": "ff", "\ufb01": "fi", "\ufb02": "fl", "\ufb03": "ffi", "\ufb04": "ffl"}


def without_markup(report: str) -> tuple[str, list[int] | None]:
    """
    Remove the markup of a report, and map the remaining characters to the original ones.

    Returns:
        The text, and the index in `report` of each of its characters and of its end; `None` if nothing changed.
    """
    if not _SUSPECT.search(report):
        return report, None
    text, places = report, list(range(len(report) + 1))
    # Decode escapes twice: a second export turns "&nbsp;" into "&amp;nbsp;" and "<br>" into "&lt;br&gt;".
    for pattern, replace in ((_ESCAPES, _character), (_ESCAPES, _character), (_MARKS, _mark)):
        text, places = _replaced(text, places, pattern, replace)
    return text, places


def _character(match: re.Match) -> str:
    return chr(int(match[1], 16)) if match[1] else html.unescape(match[0])


def _mark(match: re.Match) -> str:
    if match["line"]:
        return "\n"
    return _LIGATURES[match["ligature"]] if match["ligature"] else ""


def _replaced(
    text: str, places: list[int], pattern: re.Pattern, replace: Callable[[re.Match], str]
) -> tuple[str, list[int]]:
    parts, kept, end = [], [], 0
    for match in pattern.finditer(text):
        new = replace(match)
        parts += [text[end : match.start()], new]
        kept += places[end : match.start()] + [places[match.start()]] * len(new)
        end = match.end()
    return "".join([*parts, text[end:]]), kept + places[end:]
