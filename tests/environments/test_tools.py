"""Tools: calls and their answers, unusable tools, and a run with a tool."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.environments.base import StepResult
from rlhf_lightning.environments.tools import ToolEnv, read_call
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation.local_engine import LocalEngine
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.generation.token_sampling import SamplingParams
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.types import Completion
from tests.helpers.models import build_model
from tests.helpers.rows import prompts
from tests.helpers.training import sgd, trainer

TOOL_TEMPLATE = (
    "{% if tools %}tools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


async def wait(seconds: float) -> str:
    """Wait.

    Args:
        seconds: how long.
    """
    await asyncio.sleep(seconds)
    return "waited"


def stuck(text: str) -> str:
    """Never comes back.

    Args:
        text: anything.
    """
    time.sleep(20)
    return text


def untyped(a):  # type: ignore[no-untyped-def]
    return a


def answers(content: str, **options: Any) -> tuple[StepResult, list[str]]:
    env = ToolEnv({"prompt": "Hi"}, [add, wait, stuck], **options)
    result = asyncio.run(env.step({"role": "assistant", "content": content}))
    return result, [message["content"] for message in result.next_messages]


def call(text: str) -> str:
    return f"<tool_call>\n{text}\n</tool_call>"


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("no call", []),
        (call('{"name": "add", "arguments": {"a": 2, "b": 3}}'), ["5"]),
        ('first <tool_call>{"name": "add", "parameters": {"a": 2, "b": 3}}', ["5"]),
        (
            call('{"name": "add", "arguments": "{\\"a\\": 2, \\"b\\": 3}"}')
            + call('{"name": "wait", "arguments": {"seconds": 0}}'),
            ["5", "waited"],
        ),
        (
            call('{"name": "multiply", "arguments": {}}'),
            ["Error: there is no tool 'multiply'; available tools are add, wait, stuck"],
        ),
        (call("add(2, 3)"), ["Error: the call is not valid JSON (Expecting value: line 1 column 1 (char 0))"]),
        (call('{"name": "add"}'), ["Error: TypeError: add() missing 2 required positional arguments: 'a' and 'b'"]),
        (call("[1]"), ['Error: a call must have the form {"name": …, "arguments": {…}}']),
        (call('{"name": "add", "arguments": [1]}'), ["Error: the arguments must be an object"]),
        (call('{"name": "stuck", "arguments": {"text": "a"}}'), ["Error: the call exceeded its time limit of 0.2 s"]),
        (call('{"name": "wait", "arguments": {"seconds": 9}}'), ["Error: the call exceeded its time limit of 0.2 s"]),
    ],
)
def test_tool_calls_and_results(content: str, wanted: list[str]) -> None:
    result, found = answers(content, timeout=0.2)
    assert found == wanted
    assert result.done == (not wanted)
    assert all(message["role"] == "tool" for message in result.next_messages)
    assert result.metrics == {
        "tool_calls": len(wanted),
        "tool_errors": sum(text.startswith("Error") for text in wanted),
    }


def test_tool_calls_in_other_formats() -> None:
    _, found = answers('CALL {"name": "add", "arguments": {"a": 1, "b": 1}};', pattern=r"CALL (.*?);")
    assert found == ["2"]
    _, found = answers(call('{"name": "add", "arguments": {"a": 1, "b": 1}}') * 3, max_calls=2)
    assert found == ["2", "2", "Error: a message may make at most 2 calls"]
    with pytest.raises(ValueError, match="not valid JSON"):
        read_call('{"name": "add", "arguments": "{"}')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "ToolEnv needs tools"),
        ({"tools": "json.dumps"}, "ToolEnv needs tools"),
        ({"tools": ["nowhere.f"]}, r"ToolEnv.tools: 'nowhere.f' cannot be imported"),
        ({"tools": [untyped]}, "has no usable schema"),
        ({"tools": [add, add]}, "two tools have the same name"),
        ({"tools": [add], "pattern": "call"}, "has no group"),
        ({"tools": [add], "pattern": None}, "ToolEnv.pattern is None; it must be text"),
        ({"tools": [add], "pattern": "("}, "not a valid regular expression"),
        ({"tools": [add], "timeout": 0}, "ToolEnv.timeout is 0"),
        ({"tools": [add], "max_calls": 0}, "max_calls is 0"),
    ],
)
def test_invalid_tools_are_rejected_when_the_module_is_created(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyRLModule("x", environment="rlhf_lightning.environments.tools.ToolEnv", environment_args=arguments)


class CallsFirst(LocalEngine):
    """A sampler that begins every episode with a call."""

    text = call('{"name": "add", "arguments": {"a": 20, "b": 22}}') + "<|im_end|>"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer.decode)
        self.tokenizer, self.seen = tokenizer, []

    def generate(self, prompts: Any, params: SamplingParams, seeds: Any) -> list[Completion]:
        self.seen += [self.tokenizer.decode(prompt) for prompt in prompts]
        ids = self.tokenizer(self.text)["input_ids"]
        sampled = super().generate(prompts, params, seeds)
        first = ["tool\n42" not in self.tokenizer.decode(prompt) for prompt in prompts]
        return [
            Completion(list(ids), [-0.5] * len(ids), "stop") if begins else sample
            for begins, sample in zip(first, sampled, strict=True)
        ]


def test_tools_end_to_end(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = TOOL_TEMPLATE
    model = build_model(tokenizer, max_position_embeddings=1024)
    module = PolicyRLModule(
        model,
        tokenizer=tokenizer,
        environment="rlhf_lightning.environments.tools.ToolEnv",
        environment_args={"tools": ["tests.environments.test_tools.add"]},
        sampler=Sampler(max_tokens=8, engine=CallsFirst(model, tokenizer)),
        rewards=[FunctionReward(lambda completions: [float(len(text)) for text in completions], name="length")],
        optimizer=sgd(0.01),
    )
    run = trainer(tmp_path)
    run.fit(module, PromptDataModule(prompts(4), group_size=2, prompts_per_round=4, seed=1))
    engine: Any = module.sampler.engine
    assert '"name": "add"' in engine.seen[0]
    assert "Add two numbers." in engine.seen[0]
    for episode in module.last_episodes:
        assert [message["role"] for message in episode.responses[:3]] == ["assistant", "tool", "assistant"]
        assert episode.responses[1]["content"] == "42"
        (training_sample,) = episode.training_samples
        text = tokenizer.decode([t for t, m in zip(training_sample.ids, training_sample.loss_mask, strict=True) if m])
        assert text.startswith(CallsFirst.text)
        assert "42" not in text.removeprefix(CallsFirst.text)[:2]
    assert float(run.callback_metrics["train/env_tool_calls"]) == 1.0
    assert float(run.callback_metrics["train/env_tool_errors"]) == 0.0
