"""Tables of results within pages that people write."""


def placed(page: str, begin: str, end: str, text: str) -> str:
    """A page with a text between two marks.

    Raises:
        ValueError: the page has no such marks.
    """
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page has no {begin} … {end}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"
