"""Is what runs on a GPU right? The packed forward, bf16, the sampler and its CUDA graphs against the plain way.

    python benchmarks/gpu/check.py [--device cuda]

Prints a line for each check and writes `benchmarks/results/gpu-check.json`; exits with 1 where one fails. With
`--device cpu` the same checks run without a GPU, to try the script itself, and nothing is written.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

import torch  # noqa: E402
import transformers  # noqa: E402
from quickstart import machine  # noqa: E402

from rlhf_lightning.data.batching import pad_tokens  # noqa: E402
from rlhf_lightning.models.scoring import TokenScorer  # noqa: E402
from rlhf_lightning.rollout.draw import SamplingParams  # noqa: E402
from rlhf_lightning.rollout.engine import LocalEngine  # noqa: E402

VOCABULARY = 2000
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
}


def build(name: str, device: str, **options: Any) -> Any:
    """A model of an architecture, random weights."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval().to(device)


def rows(device: str) -> dict[str, torch.Tensor]:
    """Groups that share prompts, rows of their own, one-token responses."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for prompt_length, lengths in ((300, (100, 57, 1, 128)), (40, (200, 3)), (129, (64,)), (1, (5,))):
        prompt = torch.randint(3, VOCABULARY, (prompt_length,), generator=generator).tolist()
        found += [(prompt, torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths]
    batch = pad_tokens([p + r for p, r in found], [[0] * len(p) + [1] * len(r) for p, r in found], 0)
    return {name: value.to(device) for name, value in batch.items()}


def plain(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each row by itself, all logits."""
    result = torch.zeros(batch["mask"].shape, device=batch["mask"].device)
    for i, length in enumerate(batch["lengths"].tolist()):
        ids = batch["input_ids"][i, :length]
        logp = model(ids[None]).logits[0, :-1].float().log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        result[i, 1:length] = logp * batch["mask"][i, 1:length]
    return result


def forward(name: str, device: str, **options: Any) -> dict[str, float]:
    """The largest differences of log-probabilities, and of gradients relative to their norm."""
    model, untouched = build(name, device, **options), build(name, device, **options)
    batch = rows(device)
    scorer = TokenScorer(model)
    found, wanted = scorer(batch["input_ids"], batch["mask"]).logprobs, plain(untouched, batch)
    assert scorer.forward.packs, f"{name} does not pack"
    found.sum().backward()
    wanted.sum().backward()
    pairs = list(zip(model.parameters(), untouched.parameters(), strict=True))
    scale = torch.stack([b.grad.norm() for _, b in pairs]).norm()
    gradients = max(float((a.grad - b.grad).norm() / (b.grad.norm() + 1e-3 * scale)) for a, b in pairs)
    return {"logprobs": float((found - wanted).abs().max()), "gradients": gradients}


def sampling(device: str, bf16: bool, graphs: bool) -> dict[str, Any]:
    """Sampled tokens, and the mean gap of their log-probabilities to the trainer's."""
    model = build("Qwen3", device)
    engine = LocalEngine(model, str, rows=8, cuda_graphs=graphs)
    prompts = [list(range(5, 5 + n)) for n in (10, 10, 40, 3, 90, 10, 7, 64, 33, 12)]
    with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
        samples = engine.generate(prompts, SamplingParams(max_tokens=48), list(range(10)))
        pairs = list(zip(prompts, samples, strict=True))
        batch = pad_tokens([p + s.ids for p, s in pairs], [[0] * len(p) + [1] * len(s.ids) for p, s in pairs], 0)
        batch = {name: value.to(device) for name, value in batch.items()}
        with torch.no_grad():
            scores = TokenScorer(model)(batch["input_ids"], batch["mask"]).logprobs.cpu()
    gaps = [
        (row[len(p) : len(p) + len(s.ids)] - torch.tensor(s.logprobs)).abs()
        for row, (p, s) in zip(scores, pairs, strict=True)
    ]
    return {"gap": float(torch.cat(gaps).mean()), "ids": [sample.ids for sample in samples]}


def main() -> None:
    """Check everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    torch.backends.cuda.matmul.allow_tf32 = False
    checks: dict[str, dict[str, Any]] = {}
    for name, options in (
        ("Qwen3", {}),
        ("Llama", {}),
        ("Mistral", {"sliding_window": 64}),
        ("Gemma2", {"sliding_window": 64, "query_pre_attn_scalar": 64}),
    ):
        found = forward(name, device, **options)
        checks[f"forward, {name}"] = {**found, "passed": found["logprobs"] < 1e-3 and found["gradients"] < 1e-3}
    alone = sampling(device, bf16=False, graphs=False)
    checks["sampler, float32"] = {"gap": alone["gap"], "passed": alone["gap"] < 1e-4}
    half = sampling(device, bf16=True, graphs=False)
    checks["sampler, bf16"] = {"gap": half["gap"], "passed": half["gap"] < 0.02}
    if device == "cuda":
        replayed = sampling(device, bf16=False, graphs=True)
        same = sum(a == b for a, b in zip(alone["ids"], replayed["ids"], strict=True))
        # Over the buffers' whole capacity sums round otherwise, and a draw may lie on the edge.
        checks["CUDA graphs"] = {"gap": replayed["gap"], "equal": same, "passed": replayed["gap"] < 1e-4 and same >= 9}
    for name, result in checks.items():
        print("passed" if result["passed"] else "FAILED", name, {k: v for k, v in result.items() if k != "passed"})
    if device == "cuda":
        report = {"device": torch.cuda.get_device_name(), "machine": machine(), "checks": checks}
        (ROOT / "benchmarks" / "results" / "gpu-check.json").write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(not all(result["passed"] for result in checks.values()))


if __name__ == "__main__":
    main()
