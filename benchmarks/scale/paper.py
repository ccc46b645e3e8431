"""Estimates of the memory and time of one GPU, for 0.6B, 8B and 70B models on 1, 8 and 64 GPUs.

Weights, gradients, optimizer and cache are exact: they come from the real configs, built without memory. Activations
come from the fit in `activations`. Times are lower bounds by the slowest of arithmetic, memory and
links at an assumed utilization, not measurements. README.md in this folder lists the assumptions.
"""

from dataclasses import asdict, dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim import AdamW

from benchmarks.scale.activations import predicted
from benchmarks.steps.flops import Shape, forward
from rlhf_lightning.models.memory import cache_bytes, checkpointed_bytes, logit_bytes, optimizer_bytes, tensor_bytes
from rlhf_lightning.models.token_logprobs import LOGIT_BYTES

COMPUTE = 2
"""Bytes of a number in the layers' computations (bfloat16)."""


@dataclass(frozen=True)
class Hardware:
    """A GPU and its links. Rates are per GPU and direction."""

    name: str = "H200 SXM, 8 a node"
    memory: float = 141e9  # NVIDIA H200 data sheet
    flops: float = 989e12  # dense bfloat16: half of the data sheet's 1,979, which assumes sparsity
    bandwidth: float = 4.8e12  # of memory, bytes/s, same data sheet
    node_link: float = 450e9  # NVLink 4: 900 GB/s for both directions together, same data sheet
    network: float = 50e9  # NDR InfiniBand, 400 Gb/s per GPU, as in NVIDIA's DGX H200
    node: int = 8
    utilization: float = 0.4  # assumed, of `flops`: the target of benchmarks/gpu for SFT
    link_utilization: float = 0.8  # assumed, for the links and the memory bandwidth


@dataclass(frozen=True)
class Load:
    """The work of one GPU."""

    tokens: int = 8192  # tokens of a micro-batch, in rows of
    row: int = 2048
    trained: float = 0.5  # fraction of tokens whose logits are needed
    rows: int = 64  # decoded side by side while sampling
    prompt: int = 512
    response: int = 512


# Sizes as published in the config.json of each model.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "0.6B": (
        "Qwen3",
        {"shape": Shape(1024, 3072, 28, 16, 8, 128, 151_936), "tied": True},
    ),
    "8B": ("Qwen3", {"shape": Shape(4096, 12_288, 36, 32, 8, 128, 151_936), "tied": False}),
    "70B": ("Llama", {"shape": Shape(8192, 28_672, 80, 64, 8, 128, 128_256), "tied": False}),
}


SIZE = {"bf16-mixed": 4, "bf16-true": 2}
"""Bytes of a weight, a gradient and each of the optimizer's moments, by `trainer.precision`."""


@cache
def build(name: str, precision: str) -> Any:
    """The model, without memory for its weights."""
    import transformers

    from benchmarks.scale.activations import config_of

    family, facts = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**config_of(facts["shape"]), tie_word_embeddings=facts["tied"])
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    return model.bfloat16() if precision == "bf16-true" else model


@dataclass
class Memory:
    """Bytes on one GPU while training all weights with AdamW."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    """With FSDP2: two layers, embedding and head. With DDP: buckets, as large as the gradients."""
    activations: float
    casts: float
    """Copies of the layers' weights in bfloat16 that autocast keeps to the end of the forward, sharded or not."""
    logits: float

    @property
    def total(self) -> float:
        """The total."""
        return sum(asdict(self).values())


def training_memory(
    name: str, gpus: int, sharded: bool, checkpointing: bool, load: Load, precision: str = "bf16-mixed"
) -> Memory:
    """Memory of a full SFT step."""
    family, facts = MODELS[name]
    shape, model = facts["shape"], build(name, precision)
    parameters = list(model.parameters())
    shards = gpus if sharded else 1
    kept = predicted(shape, family, precision, load.tokens)
    if checkpointing:
        kept = checkpointed_bytes(model, round(kept), load.tokens, COMPUTE)
    # The head computes in the precision of its weights. Its own gradient is among `gradients`.
    head = SimpleNamespace(vocabulary=shape.vocab, model=model, lm_head=None, wide_head=False)
    width = parameters[0].element_size()
    gradients = tensor_bytes(parameters)
    layers = SIZE[precision] * shape.layers * shape.layer_weights
    unsharded = 2 * layers / shape.layers + gradients - layers
    return Memory(
        weights=tensor_bytes(parameters) / shards,
        gradients=gradients / shards,
        optimizer=optimizer_bytes(lambda p: AdamW(p, fused=False), parameters) / shards,
        gathered=unsharded if shards > 1 else gradients * (gpus > 1),
        activations=kept,
        casts=COMPUTE * shape.layers * shape.layer_weights if precision == "bf16-mixed" else 0.0,
        logits=logit_bytes(head, round(load.trained * load.tokens), width, LOGIT_BYTES),
    )


@dataclass
class Times:
    """Seconds of a step on one GPU."""

    compute: float
    communication: float
    optimizer: float

    @property
    def step(self) -> float:
        """Communication overlaps with arithmetic; the longer of the two counts."""
        return max(self.compute, self.communication) + self.optimizer


def link(gpus: int, hardware: Hardware) -> float:
    """Bytes per second around a ring of GPUs, by its slowest link."""
    return (hardware.node_link if gpus <= hardware.node else hardware.network) * hardware.link_utilization


def training_time(
    name: str, gpus: int, sharded: bool, checkpointing: bool, load: Load, hardware: Hardware, precision: str
) -> Times:
    """Operations of a full SFT step: forward, twice that for backward, and with checkpointing another forward."""
    shape, parameters = MODELS[name][1]["shape"], list(build(name, precision).parameters())
    pairs = load.tokens * load.row / 2
    once = forward(shape, load.tokens, pairs, round(load.trained * load.tokens))
    size, shards = tensor_bytes(parameters), gpus if sharded else 1
    around = (gpus - 1) / gpus
    # DDP: an all-reduce of gradients moves them twice. FSDP2: weights are gathered for forward and backward, gradients
    # are scattered; all in the dtype of the weights, since `fully_shard` is given no other.
    sent = around * size * (3 if sharded else 2)
    state = optimizer_bytes(lambda p: AdamW(p, fused=False), parameters) / shards
    moved = 2 * (size / shards + state) + size / shards  # weights and state read and written, gradients read
    return Times(
        compute=once * (4 if checkpointing else 3) / (hardware.flops * hardware.utilization),
        communication=sent / link(gpus, hardware),
        optimizer=moved / (hardware.bandwidth * hardware.link_utilization),
    )


@dataclass
class Rollout:
    """A round of samples on one GPU."""

    memory: float
    """Bytes of weights, gradients and optimizer state, gathered weights, and the cache."""
    cache: float
    gathers: str
    """How a GPU gets all weights: `held`, `gathered` for the round, or `in step` (gathered for each token)."""
    step: float
    """Seconds of a decoding step of all rows: the longest of reading weights and cache, arithmetic, and gathering."""

    def rate(self, rows: int) -> float:
        """Tokens per second."""
        return rows / self.step


def rollout(name: str, gpus: int, sharded: bool, load: Load, hardware: Hardware, precision: str) -> Rollout:
    """Sampling with the weights that are trained, and a cache in bfloat16."""
    shape, model = MODELS[name][1]["shape"], build(name, precision)
    held = training_memory(name, gpus, sharded, True, load, precision)
    stays = held.weights + held.gradients + held.optimizer
    kept = cache_bytes(model, load.rows, load.prompt + load.response, COMPUTE)
    whole = float(tensor_bytes(model.parameters()))
    split = sharded and gpus > 1
    fits = stays + whole + kept <= 0.9 * hardware.memory
    how = "held" if not split else "gathered" if fits else "in step"
    mean = load.prompt + load.response / 2
    operations = forward(shape, load.rows, load.rows * mean, load.rows)
    read = whole + kept * mean / (load.prompt + load.response)
    seconds = [read / (hardware.bandwidth * hardware.link_utilization), operations / hardware.flops]
    if how == "in step":
        seconds.append((gpus - 1) / gpus * whole / link(gpus, hardware))
    extra = {"held": 0.0, "gathered": whole, "in step": held.gathered}[how]
    return Rollout(stays + kept + extra, kept, how, max(seconds))
