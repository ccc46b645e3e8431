"""Requests of Tinker's client: what they ask for, and what is refused."""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_lightning.errors import MOST, UserError, quoted, short
from rlhf_lightning.generation.token_sampling import SamplingParams, check_prompts
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.serving.fields import Fields, RequestError
from rlhf_lightning.tinker.losses import Loss, loss_of
from rlhf_lightning.tinker.wire import Message, array
from rlhf_lightning.types import JSON

SAMPLES = 1024
"""Largest number of samples of a prompt in a request."""
TOP = 128
"""Largest number of most likely tokens that a request may ask for at each position."""
LOGPROBS = 2**23
"""Largest number of log-probabilities in a reply: those of samples and of scored positions of the prompt, with those of
the most likely tokens. Each takes 12 bytes, up to 30 while protobuf is written, and about 210 while JSON is written."""
DATUMS = 4096
"""Largest number of datums of a request."""
STOPS = 64
"""Largest number of stop texts or stop tokens of a request."""
SEEDS = 2**63
TARGETS = {"train_attn": "attention", "train_mlp": "mlp", "train_unembed": "unembedding"}
"""Fields of `lora_config`, with the targets of `LoRA` that they turn on."""
DTYPES = {1: torch.float32, 2: torch.int64, 3: torch.int32}
"""Types of arrays by their number in protobuf messages."""
JSON_DTYPES = {"float32": torch.float32, "int64": torch.int64}


@dataclass(frozen=True)
class Limits:
    """What the served model can take.

    Args:
        vocabulary: Number of tokens that it embeds.
        context: Largest number of tokens of a row.
        width: Size of its hidden states; a larger rank of an adapter is of no use.

    Example:
        >>> Limits(vocabulary=49152, context=8192, width=576).context
        8192
    """

    vocabulary: int
    context: int
    width: int

    def check(self, ids: Tensor, where: str) -> None:
        """Raise `RequestError` for ids outside the vocabulary.

        Args:
            ids: Token ids, `[n]`.
            where: What they are, for the message.
        """
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= self.vocabulary:
            wrong = least if least < 0 else most
            raise RequestError(
                f"{where} has the token id {wrong}, but the model has the ids 0 to {self.vocabulary - 1}; use the "
                "tokenizer that belongs to the model"
            )


@dataclass(frozen=True)
class Datum:
    """A row of training data. Position i predicts `targets[i]` from `tokens[: i + 1]`.

    Attributes:
        tokens: Token ids, int64 `[N]`.
        targets: Token ids to predict, int64 `[N]`.
        inputs: Further inputs of the loss by name, float32 `[N]` each.
    """

    tokens: Tensor
    targets: Tensor
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class ForwardBackward:
    """A request to compute a loss and, unless `forward_only`, to add its gradient to those of the training run."""

    model_id: str
    seq_id: int | None
    data: tuple[Datum, ...]
    loss: Loss
    forward_only: bool


@dataclass(frozen=True)
class AdamParams:
    """Settings of an optimizer step, as Tinker's client names them; a `grad_clip_norm` of 0 is no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True)
class SampleRequest:
    """A request for samples.

    Attributes:
        prompt: Token ids of the prompt.
        params: How the samples are drawn.
        seeds: Seed of each sample.
        scored: Number of tokens at the prompt's end whose log-probabilities are wanted; None for no such list.
        top_prompt: Number of most likely tokens at each scored position of the prompt.
        top_samples: Number of most likely tokens at each position of the samples.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    seeds: tuple[int, ...]
    scored: int | None
    top_prompt: int
    top_samples: int


def lora_settings(fields: Fields, limits: Limits) -> tuple[LoRA, int]:
    """Adapter settings and the seed of its initialization, from the fields of `create_model`.

    Args:
        fields: The request; `lora_config` and `optimizer_config` are taken.
        limits: What the model can take.

    Raises:
        RequestError: If they cannot be followed.
    """
    check_optimizer(fields)
    config = fields.take("lora_config")
    if config is None:
        raise RequestError("the request has no lora_config; this server trains LoRA adapters only")
    found = Fields(config, "lora_config")
    rank = found.whole("rank", 1, limits.width)
    if rank is None:
        raise RequestError("lora_config.rank is missing; give a whole number, for example 32")
    seed = found.whole("seed", 0, SEEDS - 1)
    lora = lora_of(rank, {name: optional_flag(found, name, True) for name in TARGETS})
    found.finish()
    return lora, secrets.randbelow(SEEDS) if seed is None else seed


def lora_of(rank: int, trained: Mapping[str, bool]) -> LoRA:
    """Adapter settings with Tinker's alpha of 32.

    Args:
        rank: The rank.
        trained: Values of `TARGETS`.

    Raises:
        RequestError: If nothing would be trained.
    """
    targets = [target for name, target in TARGETS.items() if trained[name]]
    if not targets:
        raise RequestError(f"lora_config trains nothing; set one of {quoted(TARGETS)}")
    return LoRA(rank, target=targets)


def check_optimizer(fields: Fields) -> None:
    """Raise `RequestError` for an optimizer other than AdamW; takes the field `optimizer_config`."""
    config = fields.take("optimizer_config")
    kind = Fields(config, "optimizer_config").text("type") if config is not None else "adamw"
    if kind != "adamw":
        raise RequestError(f"optimizer_config.type is {kind!r}; this server has only adamw")


def optional_flag(fields: Fields, name: str, default: bool) -> bool:
    """True or false, with a default."""
    value = fields.take(name)
    if value is not None and not isinstance(value, bool):
        raise fields.error(name, value, "true or false")
    return default if value is None else value


def metadata(fields: Fields, name: str = "user_metadata") -> dict[str, str]:
    """A client's own notes: texts by text."""
    value = fields.take(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise fields.error(name, value, "an object")
    return {key: one if isinstance(one, str) else str(one) for key, one in value.items()}


def adam_params(fields: Fields) -> AdamParams:
    """Settings of an optimizer step, from the fields of `optim_step`.

    Args:
        fields: The request; `adam_params` is taken.

    Raises:
        RequestError: If a setting is unknown or out of range.
    """
    params = fields.take("adam_params")
    if params is None:
        raise RequestError("the request has no adam_params; this server has only AdamW")
    found = Fields(params, "adam_params")
    most = math.nextafter(1, 0)
    bounds = {
        "learning_rate": (0, 1e6),
        "beta1": (0, most),
        "beta2": (0, most),
        "eps": (0, 1),
        "weight_decay": (0, 1e6),
        "grad_clip_norm": (0, 1e30),
    }
    values = {name: found.number(name, *limits) for name, limits in bounds.items()}
    found.finish()
    return AdamParams(**{name: value for name, value in values.items() if value is not None})


# -- training data ----------------------------------------------------------------------------------------------------


def forward_backward_of_message(body: bytes, limits: Limits) -> ForwardBackward:
    """A request for training in protobuf's form.

    Args:
        body: The message.
        limits: What the model can take.

    Raises:
        RequestError: If it is malformed, or asks for what the server cannot do.
    """
    message = Message(body)
    options: dict[str, float] = {}
    for name, entry in message.entries(7).items():
        if entry.message(2).has(2):
            raise RequestError(f"loss_fn_config.{name} is a text; the options of this server's losses are numbers")
        options[name] = entry.message(2).double(1)
    options = {name: entry.double(2) for name, entry in message.entries(5).items()} | options
    loss = loss_of(message.text(4), options)
    data = []
    for index, datum in enumerate(message.messages(3)):
        tokens: list[Tensor] = []
        for chunk in datum.messages(1):
            if not chunk.has(1):
                raise _only_text(f"data[{index}].model_input")
            tokens.append(array(chunk.message(1).bytes(1), torch.int32).long())
        inputs = {name: _tensor(entry.message(2), index, name) for name, entry in datum.entries(2).items()}
        data.append(_datum(tokens, inputs, loss, limits, index))
    return _forward_backward(message.text(1), message.whole(2), data, loss, bool(message.whole(6)))


def forward_backward_of_json(fields: Fields, limits: Limits, forward_only: bool) -> ForwardBackward:
    """A request for training in JSON's form.

    Args:
        fields: The request.
        limits: What the model can take.
        forward_only: Compute no gradient.

    Raises:
        RequestError: See `forward_backward_of_message`.
    """
    name = "forward_input" if forward_only else "forward_backward_input"
    given = Fields(fields.take(name), name)
    config = given.take("loss_fn_config") or {}
    if not isinstance(config, dict):
        raise given.error("loss_fn_config", config, "an object")
    options = {key: Fields(config, "loss_fn_config").number(key, -1e30, 1e30) for key in config}
    loss = loss_of(given.text("loss_fn") or "", {key: value for key, value in options.items() if value is not None})
    rows = given.take("data")
    if not isinstance(rows, list):
        raise given.error("data", rows, "a list of datums")
    data = []
    for index, row in enumerate(rows):
        datum = Fields(row, f"data[{index}]")
        tokens = [torch.tensor(json_tokens(datum.take("model_input"), f"data[{index}].model_input"))]
        inputs = datum.take("loss_fn_inputs")
        if not isinstance(inputs, dict):
            raise datum.error("loss_fn_inputs", inputs, "an object")
        datum.finish()
        tensors = {key: _json_tensor(value, index, key) for key, value in inputs.items()}
        data.append(_datum(tokens, tensors, loss, limits, index))
    given.finish()
    model_id, seq_id = fields.text("model_id") or "", fields.whole("seq_id", 0, SEEDS)
    return _forward_backward(model_id, seq_id, data, loss, forward_only)


def _forward_backward(
    model_id: str, seq_id: int | None, data: list[Datum], loss: Loss, forward_only: bool
) -> ForwardBackward:
    if not 0 < len(data) <= DATUMS:
        raise RequestError(f"the request has {len(data)} datums; send from 1 to {DATUMS}")
    return ForwardBackward(model_id, seq_id or None, tuple(data), loss, forward_only)


def json_tokens(value: JSON, where: str) -> list[int]:
    """The token ids of a `ModelInput` in JSON's form.

    Args:
        value: The input.
        where: Name of it, for messages.

    Raises:
        RequestError: If it contains something other than tokens.
    """
    chunks = Fields(value, where).take("chunks")
    if not isinstance(chunks, list):
        raise RequestError(f"{where}.chunks must be a list")
    ids: list[int] = []
    for chunk in chunks:
        found = Fields(chunk, f"{where}.chunks")
        if found.text("type") not in (None, "encoded_text"):
            raise _only_text(where)
        tokens = found.take("tokens")
        given = (
            [token for token in tokens if type(token) is int and abs(token) < MOST] if isinstance(tokens, list) else []
        )
        if not isinstance(tokens, list) or len(given) < len(tokens):
            raise found.error("tokens", tokens, "a list of token ids")
        ids += given
    return ids


def _datum(tokens: list[Tensor], inputs: dict[str, Tensor], loss: Loss, limits: Limits, index: int) -> Datum:
    """A datum, after checking that its parts belong together."""
    where = f"data[{index}]"
    ids = torch.cat(tokens) if tokens else torch.zeros(0, dtype=torch.long)
    if not 0 < len(ids) <= limits.context:
        raise RequestError(f"{where}.model_input has {len(ids)} tokens; the model takes from 1 to {limits.context}")
    wanted = {"target_tokens", *loss.inputs}
    if missing := wanted - inputs.keys():
        raise RequestError(f"{where}.loss_fn_inputs lacks {quoted(sorted(missing))}, which {loss.name} needs")
    if unknown := inputs.keys() - wanted - set(loss.optional_inputs):
        raise RequestError(
            f"{where}.loss_fn_inputs has {quoted(sorted(unknown))}, which {loss.name} does not use; leave it out"
        )
    for name, values in inputs.items():
        if len(values) != len(ids):
            raise RequestError(
                f"{where}.loss_fn_inputs.{name} has {len(values)} values, but model_input has {len(ids)} tokens"
            )
        if not values.isfinite().all():
            raise RequestError(f"{where}.loss_fn_inputs.{name} has values that are not finite")
    targets = inputs["target_tokens"]
    if targets.is_floating_point():
        raise RequestError(f"{where}.loss_fn_inputs.target_tokens are floats; they must be token ids")
    limits.check(ids, f"{where}.model_input")
    limits.check(targets, f"{where}.loss_fn_inputs.target_tokens")
    numbers = {name: values.float() for name, values in inputs.items() if name != "target_tokens"}
    return Datum(ids, targets.long(), {"weights": torch.ones(len(ids)), **numbers})


def _tensor(message: Message, index: int, name: str) -> Tensor:
    """A tensor in protobuf's form."""
    where = f"data[{index}].loss_fn_inputs.{name}"
    if message.has(2):
        raise RequestError(f"{where} is sparse, with several targets per position; this server takes one per position")
    if message.whole(3) not in DTYPES:
        raise RequestError(f"{where} has the dtype {message.whole(3)}; use float32 or int64")
    values = array(message.bytes(1), DTYPES[message.whole(3)])
    _check_shape(values, message.wholes(4), where)
    return values


def _json_tensor(value: JSON, index: int, name: str) -> Tensor:
    """A tensor in JSON's form."""
    where = f"data[{index}].loss_fn_inputs.{name}"
    fields = Fields(value, where)
    data, dtype, shape = fields.take("data"), fields.text("dtype"), fields.take("shape")
    fields.finish()
    if dtype not in JSON_DTYPES:
        raise RequestError(f"{where}.dtype is {dtype!r}; use float32 or int64")
    kinds = (int, float) if JSON_DTYPES[dtype].is_floating_point else (int,)
    if not isinstance(data, list) or not all(type(one) in kinds for one in data):
        raise RequestError(f"{where}.data must be a list of numbers, and of whole ones for the dtype int64")
    sizes = [] if shape is None else shape
    if not isinstance(sizes, list) or not all(type(size) is int for size in sizes):
        raise RequestError(f"{where}.shape must be a list of whole numbers")
    try:
        values = torch.tensor(data, dtype=JSON_DTYPES[dtype])
    except (OverflowError, ValueError) as error:  # which of them, depends on the dtype
        raise RequestError(f"{where}.data: {error}") from None
    _check_shape(values, [size for size in sizes if isinstance(size, int)], where)
    return values


def _check_shape(values: Tensor, shape: list[int], where: str) -> None:
    """Raise `RequestError` unless a shape, if there is one, is that of one value per token."""
    if len(shape) > 1:
        raise RequestError(
            f"{where} has the shape {short(shape)}; this server takes one value per token, not several targets per "
            "position"
        )
    if shape and shape[0] != len(values):
        raise RequestError(f"{where} has {len(values)} values, but the shape {short(shape)}")


def _only_text(where: str) -> RequestError:
    return RequestError(f"{where} has a chunk other than text; this server has no models for images or audio")


# -- samples ----------------------------------------------------------------------------------------------------------


def sample_request(fields: Fields, limits: Limits, stop_token_ids: tuple[int, ...]) -> SampleRequest:
    """A request for samples.

    Args:
        fields: The request; the fields that name the model are left.
        limits: What the model can take.
        stop_token_ids: Tokens that end a sample if the request gives no `stop`.

    Raises:
        RequestError: If it is malformed, or asks for what the server cannot do.
    """
    prompt = json_tokens(fields.take("prompt"), "prompt")
    samples = fields.whole("num_samples", 1, SAMPLES) or 1
    last = fields.whole("prompt_logprobs_last_n", 1, limits.context) or len(prompt)
    most = min(TOP, limits.vocabulary)
    top_prompt = fields.whole("topk_prompt_logprobs", 0, most) or 0
    top_samples = fields.whole("topk_sample_logprobs", 0, most) or 0
    wants_logprobs = fields.flag("prompt_logprobs") or top_prompt > 0
    if fields.whole("prompt_alt_tokens_k", 0, TOP) or fields.take("target_prompt_logprobs") is not None:
        raise RequestError(
            "prompt_alt_tokens_k and target_prompt_logprobs are not supported by this server; topk_prompt_logprobs is"
        )
    # Only the loss stable_reinforce uses these records, and it is refused; the cookbook's rl_loop asks for them.
    fields.flag("record_stability_info")
    found = Fields(fields.take("sampling_params"), "sampling_params")
    seed = found.whole("seed", -SEEDS, SEEDS - 1)
    params = _sampling_params(found, limits.context - len(prompt), stop_token_ids)
    found.finish()
    try:
        check_prompts([prompt], params.max_tokens, limits.vocabulary, limits.context)
    except UserError as error:
        raise RequestError(str(error).replace("sampler.", "sampling_params.")) from None
    first = secrets.randbelow(SEEDS) if seed is None else seed
    seeds = tuple((first + 1_000_003 * i) % SEEDS for i in range(samples))
    scored = min(last, len(prompt) - 1) if wants_logprobs else None
    most_logprobs = samples * params.max_tokens * (1 + top_samples) + (scored or 0) * (1 + top_prompt)
    if most_logprobs > LOGPROBS:
        raise RequestError(
            f"the reply could have {most_logprobs} log-probabilities (num_samples is {samples}, "
            f"sampling_params.max_tokens {params.max_tokens}, topk_sample_logprobs {top_samples}, topk_prompt_logprobs "
            f"{top_prompt}), but this server sends up to {LOGPROBS}; lower one of them, or send several requests"
        )
    return SampleRequest(tuple(prompt), params, seeds, scored, top_prompt, top_samples)


def _sampling_params(fields: Fields, room: int, stop_token_ids: tuple[int, ...]) -> SamplingParams:
    """How samples are drawn.

    Args:
        fields: `sampling_params` of the request.
        room: Number of tokens after the prompt that the model has positions for.
        stop_token_ids: See `sample_request`.
    """
    stop = fields.take("stop")
    stops = [stop] if isinstance(stop, str) else stop
    texts = tuple(one for one in stops if isinstance(one, str) and one) if isinstance(stops, list) else ()
    tokens = tuple(one for one in stops if type(one) is int) if isinstance(stops, list) else stop_token_ids
    if stops is not None and (not isinstance(stops, list) or len(stops) not in (len(texts), len(tokens))):
        raise fields.error("stop", stop, "a text, a list of texts, or a list of token ids")
    if len(texts) + len(tokens) > STOPS:
        raise RequestError(f"sampling_params.stop has {len(texts) + len(tokens)} entries; give at most {STOPS}")
    temperature, top_p = fields.number("temperature", 0, 1e6), fields.number("top_p", 0, 1)
    top_k, most = fields.whole("top_k", -1, MOST), fields.whole("max_tokens", 1, MOST)
    try:
        return SamplingParams(
            max_tokens=most or max(1, room),
            temperature=1.0 if temperature is None else temperature,
            top_p=1.0 if top_p is None else top_p,
            top_k=max(0, top_k or 0),
            stop_token_ids=tokens,
            stop_strings=texts,
        )
    except UserError as error:
        raise RequestError(str(error).replace("sampler.", "sampling_params.")) from None
