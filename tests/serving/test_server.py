"""The server with OpenAI's API, asked by OpenAI's client."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from rlhf_lightning.evaluation.policy import Policy
from rlhf_lightning.generation.local_engine import LocalEngine
from rlhf_lightning.generation.token_sampling import SamplingParams
from rlhf_lightning.serving.fields import RequestError
from rlhf_lightning.serving.server import BODY
from rlhf_lightning.web import Access
from tests.helpers.models import build_model
from tests.helpers.serving import Scripted, Served, scripted, serving

openai = pytest.importorskip("openai")
KEY = "correct-horse-battery"
TEXTS = ["Hello there", "one two", "three", "How are you today?", "user", "four five one", "one", "Hello"]


@pytest.fixture(scope="module")
def policy(session_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """A model that babbles bytes, in float64, so that the other rows of a batch do not change a token."""
    folder = tmp_path_factory.mktemp("serving") / "base"
    build_model(session_tokenizer, max_position_embeddings=2048).save_pretrained(folder)
    session_tokenizer.save_pretrained(folder)
    policy = Policy(str(folder))
    policy.model.double()
    return policy


@pytest.fixture(scope="module")
def served(policy: Policy) -> Iterator[Served]:
    with serving(policy) as found:
        yield found


def client(url: str, key: str = "none") -> Any:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def asked(served: Served) -> Iterator[Any]:
    """A client of the module's server."""
    with client(served.url) as found:
        yield found


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def chat(asked: Any, text: str = "Hello", **options: Any) -> Any:
    return asked.chat.completions.create(model="tiny", messages=user(text), **options)


def expected(served: Served, text: str, seed: int = 0, **options: Any) -> tuple[str, int, str]:
    """Text, number of tokens and end of a response, without a server."""
    prompt = served.policy.renderer.prompt(user(text))  # type: ignore[arg-type]
    [found] = served.engine.generate([prompt], replace(served.sampler.params, **options), [seed])
    return served.policy.renderer.decode(found.ids), len(found.ids), found.stop_reason


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}])
def test_answer_is_that_of_the_sampler(served: Served, asked: Any, options: dict[str, Any]) -> None:
    for text in TEXTS[:3]:
        answer = chat(asked, text, max_tokens=24, seed=5, **options)
        [choice] = answer.choices
        wanted = expected(served, text, 5, max_tokens=24, **options)
        assert (choice.message.content, answer.usage.completion_tokens, choice.finish_reason) == wanted
        prompt = len(served.policy.renderer.prompt(user(text)))  # type: ignore[arg-type]
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (prompt, prompt + wanted[1])
        assert (answer.model, choice.message.role) == ("tiny", "assistant")


def test_streamed_pieces_are_the_whole_answer(served: Served, asked: Any) -> None:
    """The model writes parts of characters, too."""
    texts = []
    for seed in range(6):
        whole = chat(asked, max_tokens=40, seed=seed)
        chunks = list(chat(asked, max_tokens=40, seed=seed, stream=True, stream_options={"include_usage": True}))
        deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
        texts.append("".join(delta.content or "" for delta in deltas))
        assert texts[-1] == whole.choices[0].message.content == expected(served, "Hello", seed, max_tokens=40)[0]
        assert deltas[0].role == "assistant"
        assert sum(bool(delta.content) for delta in deltas) > 3
        ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
        assert ends == [None] * (len(ends) - 1) + [whole.choices[0].finish_reason]
        assert chunks[-1].usage == whole.usage
        assert len({chunk.id for chunk in chunks}) == 1
    assert any("\ufffd" in text for text in texts)
    without = list(chat(asked, max_tokens=3, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in without)


def test_concurrent_answers_equal_single_ones(served: Served) -> None:
    """More requests than slots, with settings of their own, streamed and not."""
    options: list[dict[str, Any]] = [
        {"max_tokens": 5 + 4 * i, "temperature": 0.0 if i % 2 else 0.8, "top_p": 0.95 if i % 3 else 1.0}
        for i in range(8)
    ]

    async def one(asked: Any, text: str, more: dict[str, Any], streamed: bool) -> str:
        answer = await asked.chat.completions.create(model="tiny", messages=user(text), seed=3, stream=streamed, **more)
        if not streamed:
            return str(answer.choices[0].message.content)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0) as asked:
            return list(
                await asyncio.gather(*(one(asked, TEXTS[i], options[i], i % 2 == 0) for i in range(len(TEXTS))))
            )

    wanted = [expected(served, text, 3, **more)[0] for text, more in zip(TEXTS, options, strict=True)]
    assert asyncio.run(all_of_them()) == wanted


def test_several_responses(asked: Any) -> None:
    three, again = (chat(asked, n=3, seed=11, max_tokens=12) for _ in range(2))
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]
    assert texts[0] == chat(asked, seed=11, max_tokens=12).choices[0].message.content
    assert three.usage.completion_tokens == sum(
        chat(asked, seed=11 + 1_000_003 * i, max_tokens=12).usage.completion_tokens for i in range(3)
    )
    pieces = ["", "", ""]
    for chunk in chat(asked, n=3, seed=11, max_tokens=12, stream=True):
        pieces[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert pieces == texts
    free = {chat(asked, max_tokens=12).choices[0].message.content for _ in range(3)}
    assert len(free) > 1, "without a seed, answers differ"


def test_stop_texts(served: Served, asked: Any) -> None:
    whole = expected(served, "Hello", max_tokens=60, temperature=0.0)[0]
    stop = whole[10:13]
    end = whole.index(stop)
    answer = chat(asked, max_tokens=60, temperature=0, stop=["not there", stop])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (whole[:end].rstrip(), "stop")
    pieces = [
        c.choices[0].delta.content or "" for c in chat(asked, max_tokens=60, temperature=0, stop=stop, stream=True)
    ]
    assert "".join(pieces) == whole[:end].rstrip()


def test_completions_of_texts(served: Served, asked: Any) -> None:
    prompts = ["one two ", "Hello"]
    ids = [served.policy.renderer.raw_ids(prompt) for prompt in prompts]
    params = replace(served.sampler.params, max_tokens=9, temperature=0.0)
    wanted = [
        served.policy.tokenizer.decode(found.ids, skip_special_tokens=True)  # white space is kept
        for found in served.engine.generate(ids, params, [0, 0])
    ]
    for given in (prompts, ids):
        answer = asked.completions.create(model="tiny", prompt=given, max_tokens=9, temperature=0)
        assert [choice.text for choice in answer.choices] == wanted
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    stream = asked.completions.create(model="tiny", prompt="one two ", max_tokens=9, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == wanted[0]


def test_logprobs(served: Served, asked: Any) -> None:
    prompt = served.policy.renderer.prompt(user("Hello"))  # type: ignore[arg-type]
    params = replace(served.sampler.params, max_tokens=10, temperature=0.7)
    [found] = served.engine.generate([prompt], params, [2])
    answer = chat(asked, max_tokens=10, temperature=0.7, seed=2, logprobs=True)
    chunks = list(chat(asked, max_tokens=10, temperature=0.7, seed=2, logprobs=True, stream=True))
    streamed = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    for given in (answer.choices[0].logprobs.content, streamed):
        assert [one.logprob for one in given] == pytest.approx(found.logprobs)
        assert [one.token for one in given] == [served.policy.tokenizer.decode([token]) for token in found.ids]


def test_models_and_health(asked: Any, served: Served) -> None:
    assert [model.id for model in asked.models.list()] == ["tiny"]
    assert asked.models.retrieve("tiny").max_model_len == 2048
    with pytest.raises(openai.NotFoundError):
        asked.models.retrieve("gpt/x")
    with urlopen(served.url.replace("/v1", "/health")) as reply:
        assert json.load(reply) == {"status": "ok", "sampling": 0, "waiting": 0}


# -- tools ------------------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": "zwölf"}}\n</tool_call>'
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tool_policy(policy: Policy, session_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tmp_path_factory.mktemp("tools") / "base"
    build_model(session_tokenizer, max_position_embeddings=2048).save_pretrained(folder)
    session_tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return Policy(str(folder))


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"I add.\n\n{CALL}\n{CALL}", "I add.", 2),
        (CALL, None, 1),
        ("2 <tool_cal", "2 <tool_cal", 0),
        ("No <tool_call>{broken</tool_call>", "No <tool_call>{broken</tool_call>", 0),
    ],
)
def test_tool_calls(tool_policy: Policy, text: str, content: str | None, calls: int) -> None:
    ids = [*tool_policy.renderer.raw_ids(text), tool_policy.renderer.stop_token_ids[0]]
    sampler = Scripted(lambda row: ids)
    with scripted(tool_policy, sampler) as url, client(url) as asked:
        [choice] = chat(asked, tools=[TOOL]).choices
        chunks = list(chat(asked, tools=[TOOL], stream=True))
        unseen = chat(asked, tools=[TOOL], tool_choice="none").choices[0]
    assert choice.message.content == content
    assert choice.finish_reason == ("tool_calls" if calls else "stop")
    found = choice.message.tool_calls or []
    assert [(call.function.name, json.loads(call.function.arguments)) for call in found] == [
        ("add", {"a": "zwölf"})
    ] * calls
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == (content or "")
    streamed = [call for delta in deltas for call in delta.tool_calls or []]
    assert [(call.index, call.function.arguments) for call in streamed] == [
        (i, call.function.arguments) for i, call in enumerate(found)
    ]
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason
    prompts = [tool_policy.tokenizer.decode(row.prompt) for row in sampler.rows]
    assert ["Adds." in prompt for prompt in prompts] == [True, True, False]
    assert unseen.message.content == text.strip()


def test_results_of_tools_are_rendered(tool_policy: Policy) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        *user("2 + 3?"),
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "call_1", "content": "five"},
    ]
    sampler = Scripted(lambda row: [5, 6])
    with scripted(tool_policy, sampler) as url, client(url) as asked:
        asked.chat.completions.create(model="tiny", messages=messages, tools=[TOOL])
    prompt = tool_policy.tokenizer.decode(sampler.rows[0].prompt)
    assert '"arguments": {"a": 1}' in prompt
    assert "tool\nfive" in prompt


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias is not supported by this server; only {} is accepted"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "only 0 is accepted"),
        ({"top_logprobs": 2}, "top_logprobs", "only 0 is accepted"),
        ({"response_format": {"type": "json_object"}}, "response_format", 'only {"type": "text"} is accepted'),
        ({"extra_body": {"beam_width": 4}}, "beam_width", "beam_width is not supported"),
        ({"user": "me"}, "user", "user is not supported"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed with stream: true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not supported"),
        ({"temperature": -1}, "temperature", "a number from 0 to 100"),
        ({"temperature": 1e-9}, None, "temperature is 1e-09; it must be 0, or at least 1e-06"),
        ({"top_p": 0}, None, "top_p is 0.0; it must be in (0, 1]"),
        ({"n": 0}, "n", "a whole number from 1 to 128"),
        ({"seed": "x"}, "seed", 'seed is "x"'),
        ({"stop": [""]}, "stop", "none of them empty"),
        ({"max_tokens": 0}, "max_tokens", "a whole number from 1 to 2048"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "give one of them"),
        ({"max_tokens": 2048}, "messages", "but prompt and response together may have 2048"),
        ({"extra_body": {"min_tokens": 9}, "max_tokens": 5}, "min_tokens", "min_tokens is 9, but max_tokens is 5"),
        ({"tools": [TOOL]}, "messages", "tools"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice", '"auto" or "none"'),
        ({"messages": []}, "messages", "a list of at least one message"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", '"system" or'),
        ({"messages": [{"role": "user", "content": "x", "mood": "glad"}]}, "messages[0].mood", "not supported"),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages[0].name", "shows no names"),
        ({"messages": [{"role": "user"}]}, "messages", "no content"),
        ({"messages": [*user("x"), {"role": "assistant", "content": "y"}]}, "messages", "ends with an assistant"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "only text is supported",
        ),
    ],
)
def test_what_is_refused(asked: Any, options: dict[str, Any], param: str | None, message: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        asked.chat.completions.create(**{"model": "tiny", "messages": user("Hi"), **options})
    assert message in error.value.body["message"]
    assert (error.value.param, error.value.type) == (param, "invalid_request_error")


def test_values_that_change_nothing_are_accepted(asked: Any) -> None:
    neutral = {"frequency_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"}, "store": False}
    given = {**neutral, "top_logprobs": None, "parallel_tool_calls": True, "tool_choice": "auto", "stop": None}
    one = chat(asked, seed=4, max_tokens=5, **given)
    assert one.choices == chat(asked, seed=4, max_completion_tokens=5).choices


@pytest.mark.parametrize("prompt", [[], [1, -5], [[5], ["a"]], 7, [1.5], "", [10**6]])
def test_prompts_that_are_refused(asked: Any, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        asked.completions.create(model="tiny", prompt=prompt)
    assert error.value.param == "prompt"


def test_unknown_model_and_path(asked: Any) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        asked.chat.completions.create(model="gpt", messages=user("x"))
    assert error.value.code == "model_not_found"
    assert "this server has 'tiny'" in error.value.body["message"]
    with pytest.raises(openai.NotFoundError):
        asked.embeddings.create(model="tiny", input="x")


def post(url: str, body: bytes = b"{}", **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and error of a request."""
    given = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    with pytest.raises(HTTPError) as error:
        urlopen(Request(f"{url}/chat/completions", body, given), timeout=20)
    found: dict[str, Any] = json.loads(error.value.read())["error"]
    return error.value.code, found


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"{}", {"Host": "evil.example"}, 421, "start rlhf serve with --allowed_host NAME"),
        (b"{}", {"Origin": "http://evil.example"}, 403, "from a page of another site"),
        (b"{}", {"Content_Type": "text/plain"}, 415, "must be sent as application/json"),
        (b" " * (BODY + 1), {}, 413, f"more than {BODY} bytes"),
        (b"{", {}, 400, "not valid JSON"),
        (b"[" * 100_000, {}, 400, "not valid JSON"),
        (b'{"model": "\xff"}', {}, 400, "not valid JSON"),
        (b'{"model": "\\ud800"}', {}, 400, "not valid JSON"),
        (b"[]", {}, 400, "must be a JSON object"),
        (b"{}", {}, 404, "names no model"),
    ],
)
def test_requests_that_are_no_requests(served: Served, body: bytes, headers: Any, status: int, message: str) -> None:
    found, error = post(served.url, body, **headers)
    assert found == status
    assert message in error["message"]


def test_key_is_needed(policy: Policy) -> None:
    with serving(policy, Access(KEY)) as served:
        with client(served.url, KEY) as asked:
            assert chat(asked, max_tokens=2).choices
            assert [model.id for model in asked.models.list()] == ["tiny"]
        for key in (KEY[:-1], f"{KEY}x"):
            with client(served.url, key) as asked, pytest.raises(openai.AuthenticationError) as error:
                chat(asked)
            assert error.value.code == "invalid_api_key"
        for given in ("", f"Basic {KEY}", KEY, "Bearer", "Bearer \xfc"):
            assert post(served.url, Authorization=given)[0] == 401
        with urlopen(served.url.replace("/v1", "/health")) as reply:
            assert reply.status == 200


# -- load -------------------------------------------------------------------------------------------------------------


def until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_too_many_requests_and_clients_that_leave(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    step = LocalEngine.step

    def slow(self: LocalEngine, *args: Any) -> Any:
        time.sleep(0.01)  # so that the first answer takes longer than the test
        return step(self, *args)

    monkeypatch.setattr(LocalEngine, "step", slow)
    with serving(policy, slots=1, max_waiting=1, max_tokens=1900) as served, client(served.url) as asked:
        stream = chat(asked, temperature=0, stream=True)
        next(iter(stream))
        assert served.batch.load == (1, 0)
        impatient = asked.with_options(timeout=0.5)
        with pytest.raises(openai.APITimeoutError):
            chat(impatient, temperature=0)  # waits for the slot
        until(lambda: served.batch.load == (1, 0))

        async def crowd() -> list[Any]:
            async with openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=1) as many:
                asks = [many.chat.completions.create(model="tiny", messages=user("x"), max_tokens=2) for _ in range(3)]
                return list(await asyncio.gather(*asks, return_exceptions=True))

        kinds = [type(one).__name__ for one in asyncio.run(crowd())]
        assert sorted(kinds) == ["APITimeoutError", "RateLimitError", "RateLimitError"]
        stream.close()  # the client leaves in the middle of its answer
        until(lambda: served.batch.load == (0, 0))
        assert (
            chat(asked, max_tokens=2, temperature=0).choices[0].message.content
            == (expected(served, "Hello", max_tokens=2, temperature=0.0)[0])
        )


def test_shutdown_ends_answers_with_an_error(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream and a waiting request get the error while a forward pass runs, and the client does not ask again."""
    step, stuck, released = LocalEngine.step, threading.Event(), threading.Event()

    def sticks(self: LocalEngine, *args: Any) -> Any:
        if args[0].width > 20:
            stuck.set()
            released.wait(30)
        return step(self, *args)

    monkeypatch.setattr(LocalEngine, "step", sticks)
    with serving(policy, max_tokens=100, grace=0.3) as served, ThreadPoolExecutor() as clients:
        stream = clients.submit(lambda: list(chat(client(served.url), stream=True, extra_body={"min_tokens": 90})))
        assert stuck.wait(20)
        patient = client(served.url).with_options(max_retries=2)
        plain = clients.submit(lambda: chat(patient))
        until(lambda: served.batch.load.waiting == 1)
        served.http.should_exit = True
        try:
            with pytest.raises(openai.APIError, match="the server is shutting down"):
                stream.result(10)
            with pytest.raises(openai.InternalServerError, match="503 - the server is shutting down") as found:
                plain.result(10)
            with pytest.raises(openai.APIConnectionError):
                chat(client(served.url))
        finally:
            released.set()
    assert found.value.body == {
        "message": "the server is shutting down", "type": "server_error", "param": None, "code": None
    }  # fmt: skip
    assert [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == [
        "shutting down: running requests have 0.3 s to finish"
    ]


def test_answers_finish_during_a_shutdown(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    step, begun, released = LocalEngine.step, threading.Event(), threading.Event()

    def held(self: LocalEngine, *args: Any) -> Any:
        begun.set()
        released.wait(30)
        return step(self, *args)

    monkeypatch.setattr(LocalEngine, "step", held)
    with serving(policy) as served, ThreadPoolExecutor() as clients:
        answer = clients.submit(lambda: chat(client(served.url), seed=5, max_tokens=8))
        assert begun.wait(20)
        served.http.should_exit = True
        until(lambda: served.http.ending.begun.is_set())
        released.set()
        assert answer.result(10).choices[0].message.content == expected(served, "Hello", 5, max_tokens=8)[0]


def test_failures_of_the_engine(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    step, broken = LocalEngine.step, [True]

    def fails(self: LocalEngine, *args: Any) -> Any:
        if broken[0] and args[0].width > 30:
            raise RuntimeError("out of luck")
        return step(self, *args)

    with serving(policy) as served, client(served.url) as asked:
        monkeypatch.setattr(LocalEngine, "step", fails)
        with pytest.raises(openai.InternalServerError, match="the server's log has the reason"):
            chat(asked, max_tokens=60, temperature=0)
        with pytest.raises(openai.APIError, match="the server's log has the reason"):
            list(chat(asked, max_tokens=60, temperature=0, stream=True))
        broken[0] = False
        assert chat(asked, max_tokens=4).choices


def test_session_that_cannot_begin(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request gets an error, and the next one tries again."""
    session = LocalEngine.session

    def fails(self: LocalEngine) -> Any:
        monkeypatch.setattr(LocalEngine, "session", session)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(LocalEngine, "session", fails)
    with serving(policy) as served, client(served.url) as asked:
        with pytest.raises(openai.InternalServerError, match="the server's log has the reason"):
            chat(asked, max_tokens=4)
        assert chat(asked, max_tokens=4).choices


def test_model_with_its_own_generate(session_tokenizer: Any, tmp_path: Path) -> None:
    build_model(session_tokenizer, architecture="bloom").save_pretrained(tmp_path)
    session_tokenizer.save_pretrained(tmp_path)
    with serving(Policy(str(tmp_path))) as served, client(served.url) as asked:
        wanted = expected(served, "Hello", 1, max_tokens=10)
        answer = chat(asked, max_tokens=10, seed=1)
        assert (answer.choices[0].message.content, answer.usage.completion_tokens) == wanted[:2]
        stream = chat(asked, max_tokens=10, seed=1, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == wanted[0]


def test_error_in_a_stream_is_its_last_event(policy: Policy) -> None:
    sampler = Scripted(lambda row: [5, 6, 7], RequestError("too hot", status=500, kind="server_error"))
    with scripted(policy, sampler) as url:
        body = json.dumps({"model": "tiny", "messages": user("x"), "stream": True}).encode()
        with urlopen(Request(f"{url}/chat/completions", body, {"Content-Type": "application/json"})) as reply:
            events = [line for line in reply.read().decode().split("\n\n") if line]
    assert json.loads(events[-1].removeprefix("data: "))["error"]["message"] == "too hot"


def test_params_of_a_row(policy: Policy) -> None:
    """What a request gives reaches the sampler; the rest are the server's defaults."""
    sampler = Scripted(lambda row: [5])
    given = {"temperature": 0.5, "top_p": 0.9, "stop": "x", "max_tokens": 7, "seed": -1}
    with scripted(policy, sampler) as url, client(url) as asked:
        chat(asked, **given, extra_body={"top_k": 5, "min_p": 0.1, "min_tokens": 2})
        chat(asked, extra_body={"top_k": -1})
    ends = tuple(policy.renderer.stop_token_ids)
    assert sampler.rows[0].params == SamplingParams(7, 2, 0.5, 0.9, 5, 0.1, ends, ("x",))
    assert sampler.rows[0].seed == 2**63 - 1
    assert sampler.rows[1].params == SamplingParams(16, stop_token_ids=ends)
