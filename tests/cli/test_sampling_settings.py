"""Commands that sample use the model's own generation config, and name what they do not use of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from rlhf_lightning.cli.main import main
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.evaluation.policy import sampling_settings, unused_settings
from rlhf_lightning.generation.token_sampling import SamplingParams


def test_settings_that_are_not_used_are_named(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(base) / "generation_config.json"
    own = {"do_sample": True, "temperature": 0.5, "repetition_penalty": 1.1, "suppress_tokens": [5], "num_beams": 1}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    with pytest.raises(SystemExit, match="0"):
        main(["generate", base, "--prompt", "Hello", "--max_tokens", "2"])
    assert (
        "temperature 0.5; not supported, and not used: repetition_penalty 1.1, suppress_tokens [5]\n"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1}, None),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"top_k": -1}, {"top_k": 0}),
    ],
)
def test_sampling_settings_of_a_generation_config(own: dict[str, Any], wanted: dict[str, float] | None) -> None:
    config = GenerationConfig(**own)
    assert sampling_settings(config, "g.json") == (own if wanted is None else wanted)
    assert unused_settings(config) == []


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 1.5}, "top_k is 1.5; it must be a whole number"),
    ],
)
def test_invalid_sampling_settings_name_their_file(own: dict[str, Any], words: str) -> None:
    config = GenerationConfig()
    config.update(**own)
    with pytest.raises(ConfigError, match=f"^g.json: {words}.*Correct the file"):
        sampling_settings(config, "g.json")


@pytest.mark.parametrize("own", [{"top_k": 2.0}, {"max_tokens": 8.0}, {"temperature": "0.5"}, {"top_p": True}])
def test_sampling_settings_of_a_wrong_type_are_refused(own: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"sampler\.{next(iter(own))} is .*; it must be a (whole )?number"):
        SamplingParams(**own)
