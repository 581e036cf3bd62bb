"""Text of strangers in Markdown, YAML and CSV: it is shown as it is, and never means anything there."""

from __future__ import annotations

import json
import re

from redistill_cache.wording import harmless

__all__ = ["Plain", "csv_text", "markdown", "yaml_text"]


class Plain(str):
    """Text that `markdown` leaves as it is: it is ours, or escaped already."""

    __slots__ = ()


# Not what means something at the start of a line only, such as - and +: no value starts one.
MARKDOWN = re.compile(r"[\\`*_{}\[\]()#|~:@$]|(?<=www)\.", re.IGNORECASE)
HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# Spreadsheets take a cell that starts with one of these for a formula.
FORMULA = tuple("=+-@\t\r")


def markdown(value: object) -> str:
    """A value inside a line of Markdown: no markup, no HTML, no link, no new line."""
    if isinstance(value, Plain):
        return value
    text = MARKDOWN.sub(lambda match: "\\" + match[0], single_line(value))
    return "".join(HTML.get(char, char) for char in text)


def yaml_text(value: object) -> str:
    """A YAML scalar, always a text: JSON of printable characters is YAML as well."""
    return json.dumps(single_line(value), ensure_ascii=False)


def single_line(value: object) -> str:
    return harmless(" ".join(str(value).split()))


def csv_text(value: object) -> str:
    """A cell of text that no spreadsheet takes for a formula."""
    text = harmless(value)
    return f"'{text}" if text.startswith(FORMULA) else text
