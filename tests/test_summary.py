"""The tables of `benchmarks/README.md` against the committed results."""

from pathlib import Path

import pytest

from benchmarks import pages, summary


@pytest.mark.parametrize("path", summary.PAGES, ids=lambda path: path.parent.name)
def test_pages_equal_the_results(path: Path) -> None:
    assert summary.page(path) == path.read_text(encoding="utf-8")


def test_page_starts_with_the_table_against_trl() -> None:
    text = (summary.ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line]
    head = next(line for line in lines if line.startswith("|"))
    assert lines.index(head) == 2
    assert head.startswith("| task |")
    rows = list(summary.rows())
    assert all(row.count("|") == head.count("|") for row in rows)
    assert sum("not measured" in row for row in rows) == 5  # the GPU's


def test_text_is_inserted_between_its_marks() -> None:
    assert pages.placed("a <b> old <e> c", "<b>", "<e>", "new") == "a <b>\n\nnew\n\n<e> c"
    for page in ("a <b> c", "a <e> c", "<e> <b>"):
        with pytest.raises(ValueError, match="has no <b>"):
            pages.placed(page, "<b>", "<e>", "new")
