"""Requests in the form of OpenAI's API: what they ask for, and what is refused."""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rlhf_lightning.data.prompts import Prompt, prompt_example
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.token_sampling import SamplingParams, check_prompts
from rlhf_lightning.serving.fields import Fields, RequestError
from rlhf_lightning.serving.sampling import Row
from rlhf_lightning.types import JSON

CHOICES = 128
"""Largest number of responses to a prompt."""
PROMPTS = 128
"""Largest number of prompts of a request."""
STOPS = 16
"""Largest number of stop texts."""
SEEDS = 2**63
ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        prompts: Token ids of each prompt.
        params: How the responses to each prompt are sampled.
        n: Number of responses to each prompt.
        seed: Seed of the first response.
        stream: Send the text while it is sampled.
        include_usage: Send the numbers of tokens at the end of a stream.
        logprobs: Send the log-probabilities of the tokens.
        is_chat: True for chat completions, False for completions of a text.
        has_tools: Look for tool calls in the responses.
    """

    prompts: tuple[list[int], ...]
    params: tuple[SamplingParams, ...]
    n: int
    seed: int
    stream: bool
    include_usage: bool
    logprobs: bool
    is_chat: bool
    has_tools: bool = False

    def rows(self) -> list[Row]:
        """The responses; those to the first prompt first."""
        pairs = [pair for pair in zip(self.prompts, self.params, strict=True) for _ in range(self.n)]
        return [
            Row(prompt, params, (self.seed + 1_000_003 * i) % SEEDS, self.logprobs)
            for i, (prompt, params) in enumerate(pairs)
        ]


@dataclass(frozen=True)
class RequestReader:
    """Reads requests to a model.

    Args:
        name: The name by which requests ask for the model.
        renderer: Its renderer.
        defaults: Settings of requests that do not give them, with the model's stop tokens and stop texts.
        vocabulary: Number of tokens that the model embeds.
        max_length: Largest number of tokens of a prompt with its response.

    Example:
        >>> reader = RequestReader("policy", renderer, sampler.params, 49152, 8192)  # doctest: +SKIP
        >>> reader.chat({"model": "policy", "messages": [{"role": "user", "content": "Hi"}]}).n  # doctest: +SKIP
        1
    """

    name: str
    renderer: Renderer = field(repr=False)
    defaults: SamplingParams
    vocabulary: int
    max_length: int

    def chat(self, body: JSON) -> Asked:
        """Read a request for a chat completion.

        Args:
            body: The request.

        Raises:
            RequestError: If it is malformed, or asks for what the server cannot do.
        """
        fields = self._fields(body)
        prompt, has_tools = self._conversation(fields)
        logprobs = fields.flag("logprobs")
        return self._asked(fields, [prompt.ids], "messages", logprobs, True, has_tools)

    def completion(self, body: JSON) -> Asked:
        """Read a request for the completion of a text.

        Args:
            body: The request.

        Raises:
            RequestError: See `chat`.
        """
        fields = self._fields(body)
        return self._asked(fields, self._texts(fields), "prompt", False, False, False)

    def _fields(self, body: JSON) -> Fields:
        fields = Fields(body)
        self.check_name(fields.text("model"))
        return fields

    def check_name(self, name: str | None) -> None:
        """Raise `RequestError` unless a request asks for this model.

        Args:
            name: The name in the request.
        """
        if name != self.name:
            said = "the request names no model" if name is None else f"the model {name!r} does not exist"
            raise RequestError(f"{said}; this server has {self.name!r}", "model", "model_not_found", 404)

    # -- prompts ------------------------------------------------------------------------------------------------------

    def _conversation(self, fields: Fields) -> tuple[Prompt, bool]:
        """The prompt of a chat, rendered with the model's template, and whether the response may call tools."""
        messages = fields.take("messages")
        if not isinstance(messages, list) or not messages:
            raise fields.error("messages", messages, "a list of at least one message")
        choice, tools = fields.take("tool_choice"), fields.take("tools")
        if choice not in (None, "auto", "none"):
            raise fields.error("tool_choice", choice, '"auto" or "none"')
        if tools is not None and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
            raise fields.error("tools", tools, "a list of tools")
        given: list[JSON] = [_message(message, i) for i, message in enumerate(messages)]
        try:
            prompt = prompt_example(self.renderer, {"prompt": given, "tools": None if choice == "none" else tools})
        except UserError as error:
            raise RequestError(str(error), "messages", "invalid_value") from None
        self._check_names(prompt)
        return prompt, choice != "none" and bool(prompt.tools or self.renderer.tools)

    def _check_names(self, prompt: Prompt) -> None:
        """Refuse a name that the model's template leaves out."""
        named = [i for i, one in enumerate(prompt.messages) if one.get("name") and one["role"] != "tool"]
        text = self.renderer.prompt_text(prompt.messages, prompt.tools) if named else ""
        for i in named:
            if prompt.messages[i]["name"] not in text:
                where = f"messages[{i}].name"
                raise RequestError("the chat template of this model shows no names", where, "unsupported_parameter")

    def _texts(self, fields: Fields) -> list[list[int]]:
        """The prompts of a completion: texts, or token ids."""
        value = fields.take("prompt")
        items = value if isinstance(value, list) and not _is_ids(value) else [value]
        prompts: list[list[int]] = []
        for item in items:
            if isinstance(item, str):
                prompts.append(self.renderer.raw_ids(item))
            elif isinstance(item, list) and (ids := _ids(item)):
                prompts.append(ids)
            else:
                raise fields.error("prompt", value, "a text, a list of token ids, or a list of these")
        if not 0 < len(prompts) <= PROMPTS:
            raise RequestError(
                f"prompt has {len(prompts)} prompts; it must have 1 to {PROMPTS}", "prompt", "invalid_value"
            )
        return prompts

    # -- settings -----------------------------------------------------------------------------------------------------

    def _asked(
        self, fields: Fields, prompts: list[list[int]], where: str, logprobs: bool, is_chat: bool, has_tools: bool
    ) -> Asked:
        """The request, with the settings that both kinds of requests have."""
        n, seed = fields.whole("n", 1, CHOICES), fields.whole("seed", -SEEDS, SEEDS - 1)
        stream, options = fields.flag("stream"), fields.take("stream_options")
        if options is not None and not stream:
            raise RequestError("stream_options is only allowed with stream: true", "stream_options", "invalid_value")
        streaming = Fields(options or {}, "stream_options")
        include_usage = streaming.flag("include_usage")
        streaming.finish()
        max_tokens = self._max_tokens(fields, is_chat)
        params = self._sampling(fields)
        fields.finish()
        budgets = tuple(self._budget(prompt, max_tokens, params.min_tokens, where) for prompt in prompts)
        return Asked(
            tuple(prompts),
            tuple(replace(params, max_tokens=budget) for budget in budgets),
            n or 1,
            secrets.randbelow(SEEDS) if seed is None else seed % SEEDS,
            stream,
            include_usage,
            logprobs,
            is_chat,
            has_tools,
        )

    def _max_tokens(self, fields: Fields, is_chat: bool) -> int | None:
        names = ("max_tokens", "max_completion_tokens") if is_chat else ("max_tokens",)
        found = [value for name in names if (value := fields.whole(name, 1, self.max_length)) is not None]
        if len(set(found)) > 1:
            raise RequestError("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
        return found[0] if found else None

    def _sampling(self, fields: Fields) -> SamplingParams:
        """The settings of the distribution and of stops."""
        own = self.defaults
        temperature, top_p = fields.number("temperature", 0, 100), fields.number("top_p", 0, 1)
        top_k, min_p = fields.whole("top_k", -1, self.vocabulary), fields.number("min_p", 0, 1)
        min_tokens, stops = fields.whole("min_tokens", 0, self.max_length), fields.texts("stop", STOPS)
        try:
            return replace(
                own,
                max_tokens=self.max_length,
                min_tokens=min_tokens or 0,
                temperature=own.temperature if temperature is None else temperature,
                top_p=own.top_p if top_p is None else top_p,
                top_k=own.top_k if top_k is None else max(0, top_k),  # -1 is vLLM's word for all
                min_p=own.min_p if min_p is None else min_p,
                stop_strings=(*own.stop_strings, *stops),
            )
        except UserError as error:
            raise RequestError(str(error).removeprefix("sampler."), code="invalid_value") from None

    def _budget(self, prompt: Sequence[int], max_tokens: int | None, min_tokens: int, where: str) -> int:
        """The token budget of the response to a prompt: what is asked for, or the default or the room that is left."""
        room = self.max_length - len(prompt)
        wanted = min(self.defaults.max_tokens, room) if max_tokens is None else max_tokens
        if wanted < 1 or wanted > room:
            asked = "" if max_tokens is None else f" and max_tokens is {max_tokens}"
            raise RequestError(
                f"the prompt has {len(prompt)} tokens{asked}, but prompt and response together may have "
                f"{self.max_length}; shorten the prompt or lower max_tokens",
                where,
                "context_length_exceeded",
            )
        if min_tokens > wanted:
            raise RequestError(f"min_tokens is {min_tokens}, but max_tokens is {wanted}", "min_tokens", "invalid_value")
        try:
            check_prompts([prompt], wanted, self.vocabulary, self.max_length)
        except UserError as error:
            raise RequestError(str(error), where, "invalid_value") from None
        return wanted


def _message(value: JSON, index: int) -> dict[str, JSON]:
    """A message, without empty keys. Keys that no template would show are refused."""
    fields = Fields(value, f"messages[{index}]")
    found: dict[str, JSON] = {name: one for name in MESSAGE_KEYS if (one := fields.take(name)) is not None}
    if found.get("role") not in ROLES:
        raise fields.error("role", found.get("role"), " or ".join(map(json.dumps, ROLES)))
    for name in ("annotations", "refusal", "audio", "function_call"):  # of a reply that is sent back
        if (given := fields.take(name)) not in (None, []):
            raise fields.error(name, given, "null")
    fields.finish()
    return found


def _is_ids(value: list[JSON]) -> bool:
    return bool(value) and all(isinstance(one, int) for one in value)


def _ids(value: list[JSON]) -> list[int]:
    """Token ids; empty if the list has something else."""
    found = [one for one in value if isinstance(one, int) and not isinstance(one, bool)]
    return found if len(found) == len(value) else []
