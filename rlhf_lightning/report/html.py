"""HTML built from elements, so that no text reaches the page unescaped."""

import html
from collections.abc import Sequence

from rlhf_lightning.files import visible
from rlhf_lightning.types import JSON


class Html(str):
    """A string that is already markup and is not escaped again.

    Example:
        >>> el("p", "1 < 2", Html("<br>"))
        '<p>1 &lt; 2<br></p>'
    """

    __slots__ = ()


Content = str | float | None
"""What an element may contain: `Html`, or a value that is escaped."""


def text(value: Content) -> Html:
    """A value as text of the page: escaped, with invalid characters made visible."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(visible(str(value))))


def el(tag: str, *children: Content, **attributes: Content) -> Html:
    """An HTML element.

    Args:
        tag: Name of the element.
        *children: Elements, or values that are escaped; None is left out.
        **attributes: Attributes; a trailing underscore is dropped (`class_`), others become hyphens, and None is left
            out.
    """
    given = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    head = "".join(f' {name}="{text(value)}"' for name, value in given.items())
    inner = "".join(text(child) for child in children if child is not None)
    return Html(f"<{tag}{head}>{inner}</{tag}>")


def join(parts: list[Html]) -> Html:
    """Elements on consecutive lines."""
    return Html("\n".join(parts))


def table(head: Sequence[Content], rows: Sequence[Sequence[Content]], class_: str | None = None) -> Html:
    """A table that scrolls horizontally on a narrow screen.

    Args:
        head: Titles of the columns.
        rows: Cells of each row.
        class_: Class of the table.
    """
    labeled = [[el("td", cell, data_label=label) for label, cell in zip(head, row, strict=True)] for row in rows]
    body = [el("tr", *cells) for cells in labeled]
    top = el("thead", el("tr", *(el("th", cell, scope="col") for cell in head)))
    return el("div", el("table", top, el("tbody", *body), class_=class_), class_="scroll")


def details(title: str, *children: Content) -> Html:
    """Content that is collapsed until it is opened."""
    return el("details", el("summary", title), *children)


def number(value: JSON, digits: int = 4) -> str:
    """A number with `digits` significant digits; a dash for None.

    Args:
        value: The number, or a text.
        digits: Number of significant digits.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    whole = isinstance(value, int) or (abs(value) < 1e15 and value.is_integer())
    return f"{int(value)}" if whole else f"{value:.{digits}g}"
