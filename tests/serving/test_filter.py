"""A server with a filter: what it refuses, withholds and passes, in whole replies and in streams."""

import json
from typing import Any

import pytest

from rlhf_lightning.evaluation.policy import Policy
from rlhf_lightning.filtering import FilterRules, Pattern, Rule, Terms
from tests.helpers.models import build_model
from tests.helpers.serving import Scripted, scripted

openai = pytest.importorskip("openai")
RULES: list[Rule] = [
    Terms(name="asked", terms=["bomb"], roles=["user"]),
    Terms(name="said", terms=["three four"], roles=["assistant"], action="block"),
    Terms(name="noted", terms=["five"], action="mark"),
]


@pytest.fixture(scope="module")
def policy(session_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tmp_path_factory.mktemp("filtered") / "base"
    build_model(session_tokenizer, max_position_embeddings=512).save_pretrained(folder)
    session_tokenizer.save_pretrained(folder)
    return Policy(str(folder))


def says(policy: Policy, text: str) -> Scripted:
    ids = [*policy.renderer.raw_ids(text), policy.renderer.stop_token_ids[0]]
    return Scripted(lambda row: ids)


def create(url: str, text: str = "Hello", **options: Any) -> Any:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client:
        made = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": [{"type": "text", "text": text}]}], **options
        )
        return list(made) if options.get("stream") else made


@pytest.mark.parametrize(("text", "withheld"), [("one two three four", True), ("one five", False)])
def test_responses_are_withheld_whole_and_streamed(policy: Policy, text: str, withheld: bool) -> None:
    with scripted(policy, says(policy, text), FilterRules(RULES, "Not this.").build()) as url:
        answer = create(url, logprobs=True, n=2)
        chunks = create(url, logprobs=True, stream=True)
    shown, end = ("Not this.", "content_filter") if withheld else (text, "stop")
    assert [(one.message.content, one.finish_reason) for one in answer.choices] == [(shown, end)] * 2
    assert [bool(one.logprobs.content) for one in answer.choices] == [not withheld] * 2
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == shown
    assert chunks[-1].choices[0].finish_reason == end
    if withheld:
        assert "three" not in json.dumps([answer.model_dump(), *(chunk.model_dump() for chunk in chunks)])


def test_requests_are_refused_before_anything_is_sampled(policy: Policy, caplog: pytest.LogCaptureFixture) -> None:
    sampler = says(policy, "one")
    with scripted(policy, sampler, FilterRules(RULES).build()) as url:
        for options in ({}, {"stream": True}):
            with pytest.raises(openai.BadRequestError) as refused:
                create(url, "Build a Bo\u200bmb.", **options)
            assert refused.value.code == "content_filter"
            assert "asked" not in str(refused.value), "clients do not learn the rules"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            for prompt in ("a bomb", policy.renderer.raw_ids("a bomb")):
                with pytest.raises(openai.BadRequestError):
                    client.completions.create(model="tiny", prompt=prompt)
        assert sampler.rows == []
        assert create(url, "Hello").choices[0].message.content == "one"
    assert "filter: drop of a request (asked)" in caplog.text


def test_a_rule_that_fails_shows_nothing(policy: Policy) -> None:
    slow = Pattern(name="slow", pattern="(a|aa)+$", timeout=0.02, roles=["assistant"])
    with (
        scripted(policy, says(policy, "a" * 60 + "b"), FilterRules([slow]).build()) as url,
        pytest.raises(openai.InternalServerError, match="the filter of this server failed"),
    ):
        create(url)
