"""HTML built of elements, so that no text reaches the page unescaped."""

import html
from typing import Any

from rlhf_lightning.files import visible


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def text(value: Any) -> Html:
    """A value as text of the page: escaped, and what no page can hold made visible."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(visible(str(value))))


def el(tag: str, *children: Any, **attributes: Any) -> Html:
    """An element. Children are escaped unless they are elements; `class_` is the class; `None` leaves out."""
    given = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    head = "".join(f' {name}="{text(value)}"' for name, value in given.items())
    inner = "".join(text(child) for child in children if child is not None)
    return Html(f"<{tag}{head}>{inner}</{tag}>")


def join(parts: list[Html]) -> Html:
    """Elements one after the other."""
    return Html("\n".join(parts))


def table(head: list[Any], rows: list[list[Any]], class_: str | None = None) -> Html:
    """A table that scrolls within itself where the screen is narrow."""
    labeled = [[el("td", cell, data_label=label) for label, cell in zip(head, row, strict=True)] for row in rows]
    body = [el("tr", *cells) for cells in labeled]
    top = el("thead", el("tr", *(el("th", cell, scope="col") for cell in head)))
    return el("div", el("table", top, el("tbody", *body), class_=class_), class_="scroll")


def details(title: str, *children: Any) -> Html:
    """What is folded away until it is asked for."""
    return el("details", el("summary", title), *children)


def number(value: Any, digits: int = 4) -> str:
    """A figure in so many digits; a dash where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    whole = isinstance(value, int) or (abs(value) < 1e15 and value.is_integer())
    return f"{int(value)}" if whole else f"{value:.{digits}g}"
