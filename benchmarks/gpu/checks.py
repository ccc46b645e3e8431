"""Checks of correctness on a device. Each returns numbers, their limits, and whether it `passed`.

A check that needs CUDA, or a package that is not installed, returns `skipped` with the reason.
"""

import copy
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from torch import Tensor

from benchmarks.steps import ours
from benchmarks.steps.workload import Workload
from rlhf_lightning import SFTDataModule, SFTModule
from rlhf_lightning.data.batching import pad_tokens
from rlhf_lightning.generation.local_engine import LocalEngine
from rlhf_lightning.generation.token_sampling import SamplingParams
from rlhf_lightning.models import liger
from rlhf_lightning.models.lora import LoRA, is_quantized
from rlhf_lightning.models.token_logprobs import TokenLogprobs

VOCABULARY = 2000
# Head size 64, which the kernels support; weights large enough that outputs differ.
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
OPTIONS: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 64},
    # Before transformers 5.23 its default is sdpa, which ignores the soft cap of the scores.
    "Gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 64, "attn_implementation": "eager"},
}
STEP = Workload(
    vocab=1024,
    layers=2,
    hidden=128,
    intermediate=256,
    heads=4,
    kv_heads=2,
    head_dim=32,
    batch=4,
    prompt_tokens=30,
    response_tokens=30,
    groups=2,
    group_size=3,
    new_tokens=12,
)


def run(name: str, device: str, root: Path) -> dict[str, Any]:
    """Run a check by its name in `plan.CHECKS`; models are written to the folder `root`."""
    kind, _, what = name.partition("-")
    if device != "cuda" and (name == "sampler-graphs" or kind in ("step", "qlora", "liger")):
        return {"skipped": "needs CUDA" + (": the other device is the CPU" if kind == "step" else "")}
    if name == "forward-bf16":
        return bf16(device)
    if kind == "forward":
        return forward(what, device)
    if kind == "liger":
        return kernels(what, device)
    if kind == "sampler":
        return graphs(device) if what == "graphs" else sampler(device, what == "bf16")
    return step(what, device, root) if kind == "step" else qlora(device, root)


def build(name: str, device: str) -> Any:
    """A model of an architecture with random weights."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **OPTIONS.get(name, {})})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval().to(device)


def rows(device: str) -> dict[str, Tensor]:
    """Rows: groups with shared prompts, single rows, and one-token responses."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for prompt_length, lengths in ((300, (100, 57, 1, 128)), (40, (200, 3)), (129, (64,)), (1, (5,))):
        prompt = torch.randint(3, VOCABULARY, (prompt_length,), generator=generator).tolist()
        found += [(prompt, torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths]
    batch = pad_tokens([p + r for p, r in found], [[0] * len(p) + [1] * len(r) for p, r in found], 0)
    return {name: value.to(device) for name, value in batch.items()}


def dense(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Log-probabilities of each row alone, with the model's own attention and all logits."""
    result = torch.zeros(batch["loss_mask"].shape, device=batch["loss_mask"].device)
    for i, length in enumerate(batch["lengths"].tolist()):
        ids = batch["input_ids"][i, :length]
        logp = model(ids[None]).logits[0, :-1].float().log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        result[i, 1:length] = logp * batch["loss_mask"][i, 1:length]
    return result


def forward(name: str, device: str) -> dict[str, Any]:
    """Packed rows (flex attention on CUDA) against dense ones in float32: values, and gradients over their norm."""
    model = build(name, device)
    untouched, batch = copy.deepcopy(model), rows(device)
    token_logprobs = TokenLogprobs(model)
    found, wanted = token_logprobs(batch["input_ids"], batch["loss_mask"]).logprobs, dense(untouched, batch)
    packs = token_logprobs.packed_forward.packs
    return {"packs": packs, **_compared(model, found, untouched, wanted, packs)}


def kernels(name: str, device: str) -> dict[str, Any]:
    """Packed rows with the kernels of liger-kernel against the same rows without, in float32; likewise."""
    if find_spec("liger_kernel") is None:
        return {"skipped": "liger-kernel not installed"}
    model = build(name, device)
    own, batch = copy.deepcopy(model), rows(device)
    liger.use(model, True, torch.device(device))
    found, wanted = (TokenLogprobs(one)(batch["input_ids"], batch["loss_mask"]).logprobs for one in (model, own))
    attached = liger.kernels_of(model)
    return _compared(model, found, own, wanted, attached is not None and attached.on)


def _compared(model: Any, found: Tensor, other: Any, wanted: Tensor, runs: bool) -> dict[str, Any]:
    """Differences of log-probabilities, and of their gradients; `runs` is False if nothing was compared."""
    found.sum().backward()
    wanted.sum().backward()
    pairs = [(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters(), strict=True)]
    scale = torch.stack([b.norm() for _, b in pairs]).norm()
    gradients = max(float((a - b).norm() / (b.norm() + 1e-3 * scale)) for a, b in pairs)
    values = float((found - wanted).detach().abs().max())
    passed = runs and values < 1e-3 and gradients < 1e-3
    return {"logprobs": values, "gradients": gradients, "limit": 1e-3, "passed": passed}


def bf16(device: str) -> dict[str, Any]:
    """In bfloat16, packed rows may differ from float32 by at most 1.25 times as much as dense ones do."""
    exact, batch = build("Qwen3", device), rows(device)
    narrow = copy.deepcopy(exact).bfloat16()
    token_logprobs = TokenLogprobs(copy.deepcopy(narrow))
    real = batch["loss_mask"] != 0
    with torch.no_grad():
        wanted = dense(exact, batch)[real]
        packed = token_logprobs(batch["input_ids"], batch["loss_mask"]).logprobs[real]
        plain = dense(narrow, batch)[real]
    errors = [float((found - wanted).norm() / wanted.norm()) for found in (packed, plain)]
    packs = token_logprobs.packed_forward.packs
    passed = packs and errors[0] <= 1.25 * errors[1]
    return {"packs": packs, "packed_error": errors[0], "dense_error": errors[1], "passed": passed}


def _sampling(device: str, half: bool, graphed: bool) -> dict[str, Any]:
    """Sampled tokens, and the mean difference of their log-probabilities from the trainer's."""
    model = build("Qwen3", device)
    engine = LocalEngine(model, str, slots=8, cuda_graphs=graphed)
    prompts = [list(range(5, 5 + n)) for n in (10, 10, 40, 3, 90, 10, 7, 64, 33, 12)]
    with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
        samples = engine.generate(prompts, SamplingParams(max_tokens=48), list(range(10)))
        pairs = list(zip(prompts, samples, strict=True))
        batch = pad_tokens([p + s.ids for p, s in pairs], [[0] * len(p) + [1] * len(s.ids) for p, s in pairs], 0)
        batch = {name: value.to(device) for name, value in batch.items()}
        with torch.no_grad():
            scores = TokenLogprobs(model)(batch["input_ids"], batch["loss_mask"]).logprobs.cpu()
    gaps = [
        (row[len(p) : len(p) + len(s.ids)] - torch.tensor(s.logprobs)).abs()
        for row, (p, s) in zip(scores, pairs, strict=True)
    ]
    return {"gap": float(torch.cat(gaps).mean()), "packs": engine.packed_forward.packs, "ids": [s.ids for s in samples]}


def sampler(device: str, half: bool) -> dict[str, Any]:
    """Log-probabilities recorded while sampling, against the trainer's for the same tokens."""
    found = _sampling(device, half, graphed=False)
    limit = 0.02 if half else 1e-4
    return {
        "packs": found["packs"],
        "gap": found["gap"],
        "limit": limit,
        "passed": found["packs"] and found["gap"] < limit,
    }


def graphs(device: str) -> dict[str, Any]:
    """CUDA graphs against eager steps: the same tokens except in at most one row, since sums may round differently."""
    eager, replayed = (_sampling(device, half=False, graphed=graphed) for graphed in (False, True))
    same = sum(a == b for a, b in zip(eager["ids"], replayed["ids"], strict=True))
    passed = replayed["gap"] < 1e-4 and same >= 9
    return {"gap": replayed["gap"], "limit": 1e-4, "equal_rows_of_10": same, "passed": passed}


def step(task: str, device: str, root: Path) -> dict[str, Any]:
    """Change of the weights in one optimizer step (float32, plain gradient descent), on this device and on a CPU."""
    there, here = (_weights(task, replace(STEP, device=name), root, trained=True) for name in (device, "cpu"))
    before = _weights(task, STEP, root, trained=False)
    moved = torch.stack([(here[name] - before[name]).norm() for name in here]).norm()
    apart = torch.stack([(here[name] - there[name]).norm() for name in here]).norm()
    difference = float(apart / moved)
    return {"relative_difference": difference, "limit": 1e-3, "passed": float(moved) > 0 and difference < 1e-3}


def _weights(task: str, work: Workload, root: Path, trained: bool) -> dict[str, Tensor]:
    """The trained weights, in double precision."""
    folder = root / "check-model"
    if not folder.exists():
        folder.mkdir()
        work.build(folder)
    module, data = ours.parts(task, str(folder), work)
    module.optimizer_factory = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    torch.manual_seed(0)  # the reward head is initialized at random
    if trained:
        ours.trainer(1, root, work, []).fit(module, data)
    else:
        module.configure_model()
    return {name: p.detach().cpu().double() for name, p in module.named_parameters() if p.requires_grad}


def qlora(device: str, root: Path) -> dict[str, Any]:
    """SFT of an adapter on 4-bit weights (bitsandbytes): the loss falls, and the 4-bit weights do not change."""
    if find_spec("bitsandbytes") is None:
        return {"skipped": "bitsandbytes not installed"}
    work = Workload(**{**asdict(STEP), "device": device, "bf16": True})
    folder = root / "qlora-model"
    folder.mkdir(exist_ok=True)
    work.build(folder)
    module = SFTModule(str(folder), lora=LoRA(rank=8, quantize="nf4"), optimizer=_adam)
    data = SFTDataModule(work.conversations(), batch_size=work.batch, show_example=False)
    losses: list[float] = []
    module.configure_model()
    frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    ours.trainer(20, root, work, [_Losses(losses)]).fit(module, data)
    same = all(torch.equal(p.detach().cpu(), frozen[n].cpu()) for n, p in module.named_parameters() if n in frozen)
    passed = is_quantized(module.model) and same and losses[-1] < 0.9 * losses[0]
    return {"loss_before": losses[0], "loss_after_20": losses[-1], "weights_stay": same, "passed": passed}


def _adam(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-2)


class _Losses(pl.Callback):
    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
