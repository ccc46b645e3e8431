"""Text that is given out while tokens are sampled: its pieces are the text of the whole response."""

from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.generation.text_stream import INCOMPLETE, TextStream


class Bytes:
    """A tokenizer whose ids are bytes, and a renderer with it. 0 ends a response."""

    stop_token_ids = (0,)

    @property
    def tokenizer(self) -> "Bytes":
        return self

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode("utf-8", "replace")


def pieces(stream: TextStream, ids: Sequence[int]) -> list[str]:
    found = [stream.add(token) for token in ids]
    return [*found, stream.finish()]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        (" Grüße, \U0001f600 EN route END and more", ["END"], "Grüße, \U0001f600 EN route"),
        ("ENEND", ["END"], "EN"),
        ("one  \n two \n\n", [], "one  \n two"),
        ("a\n\nb", ["\n\n", "x"], "a"),
        ("a EN", ["END", "N!"], "a EN"),
        ("", ["END"], ""),
    ],
)
def test_pieces_are_final(text: str, stops: list[str], expected: str) -> None:
    stream = TextStream(Bytes(), stops)  # type: ignore[arg-type]
    found = pieces(stream, [*text.encode(), 0])
    assert "".join(found) == stream.text == expected
    assert INCOMPLETE not in "".join(found)
    assert sum(map(bool, found)) >= len(expected.split())


def test_white_space_is_kept_if_asked() -> None:
    stream = TextStream(Bytes(), ["END"], strip=False)  # type: ignore[arg-type]
    assert "".join(pieces(stream, b" one \n END")) == " one \n "


def test_response_that_ends_within_a_character() -> None:
    ids = "ab\U0001f600".encode()
    for cut in (3, 4, 5):
        assert "".join(pieces(TextStream(Bytes()), ids[:cut])) == f"ab{INCOMPLETE}"  # type: ignore[arg-type]
    assert "".join(pieces(TextStream(Bytes()), b"a\xff\xfebc")) == f"a{INCOMPLETE * 2}bc"  # type: ignore[arg-type]


def test_tokenizer_that_drops_the_first_space() -> None:
    words = Tokenizer(models.WordLevel({"▁one": 1, "▁two": 2, "s": 3, "<0xC3>": 4, "<0xBC>": 5, "</s>": 0}, "s"))
    words.add_special_tokens(["</s>"])
    words.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])

    class Words(Bytes):
        def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
            return str(words.decode(list(ids), skip_special_tokens=skip_special_tokens))

    found = pieces(TextStream(Words()), [1, 3, 2, 4, 5, 2, 1, 0])  # type: ignore[arg-type]
    assert found == ["one", "s", " two", "", "ü", " two", " one", "", ""]


def test_pieces_equal_the_renderers_text(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer)
    text = "Hello there, one  two.\n\nHow are you, user? I'm fine: ünïcödé \U0001f600!"
    ids = [*renderer.tokenizer(text, add_special_tokens=False)["input_ids"], renderer.stop_token_ids[0]]
    assert "".join(pieces(TextStream(renderer), ids)) == renderer.decode(ids)
