"""A tiny model that is served."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.models import build_model
from tests.helpers.tinker import Asked, asking


@pytest.fixture(scope="module")
def folder(session_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tinker") / "base"
    for part in (build_model(session_tokenizer), session_tokenizer):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def asked(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """A server of the module."""
    with asking(folder, tmp_path_factory.mktemp("checkpoints"), slots=4) as found:
        yield found
