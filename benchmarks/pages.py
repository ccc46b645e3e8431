"""Generated tables in hand-written pages."""


def placed(page: str, begin: str, end: str, text: str) -> str:
    """Replace the text between two markers of a page.

    Raises:
        ValueError: If the page does not have these markers.
    """
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page has no {begin} … {end}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"
