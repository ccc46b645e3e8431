"""Models and tokenizers that the tests build on the spot, and the real data where it is there."""

import gc
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported. One thread, as the models are tiny; tests/processors.py tries two.
os.environ["OMP_NUM_THREADS"] = os.environ.get("RLHF_TEST_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import lightning.pytorch as pl
import pytest
import torch
from transformers.utils import logging as transformers_logging

from rlhf_lightning.quickstart.model import make_tokenizer
from tests.helpers.runs import forked_stages as forked_stages

transformers_logging.disable_progress_bar()
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# Forked ranks would wait for the OpenMP threads of their parent, which they do not have.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

SHARED = Path(__file__).resolve().parents[2] / "shared"
CHAT_TEMPLATES = Path(__file__).parent / "data" / "chat_templates"
"""Real ones, for every reader of the repository; see the README there."""
TEXTS = [
    "Hello there, how are you today? I am fine, thank you.",
    "user\nassistant\nsystem\n",
    "one two three four five",
]


DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


# What takes longest comes last of the slow cases, so that what breaks in minutes is seen in minutes.
LAST = ["test_packaging", "test_docs", "test_fuzz", "test_resume", "test_soak"]


def pytest_collection_finish() -> None:
    """Garbage collections leave out the libraries' million objects, which forked ranks would copy for them."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs after the rest."""

    def place(item: pytest.Item) -> int:
        slow = item.get_closest_marker("slow") and item.path.stem in LAST
        return 1 + LAST.index(item.path.stem) if slow else 0

    items.sort(key=place)


@pytest.fixture(params=[pytest.param(d, marks=[pytest.mark.cuda] * (d.type == "cuda"), id=d.type) for d in DEVICES])
def device(request: pytest.FixtureRequest) -> torch.device:
    """A CPU, and a GPU where there is one."""
    return request.param


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    """A command sets logging up for its process; here the next test has the same one."""
    loggers = [logging.getLogger(name) for name in ("rlhf_lightning", "lightning.pytorch", "py.warnings")]
    before = [(list(one.handlers), one.level, one.propagate) for one in loggers]
    yield
    for one, (handlers, level, propagate) in zip(loggers, before, strict=True):
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and tokenizers; users do not have it."""
    if not SHARED.is_dir():
        pytest.skip("the folder shared/ with real data and tokenizers is not here")
    return SHARED


@pytest.fixture(scope="session")
def session_tokenizer() -> Any:
    return make_tokenizer(TEXTS * 5)


@pytest.fixture
def tokenizer(session_tokenizer: Any) -> Any:
    import copy

    return copy.deepcopy(session_tokenizer)


def build_model(
    tokenizer: Any, seed: int = 0, architecture: str = "qwen3", task: str = "CAUSAL_LM", **options: Any
) -> Any:
    """A tiny model of an architecture, random weights large enough that outputs differ."""
    import transformers

    names = {
        "qwen3": "Qwen3",
        "qwen2": "Qwen2",
        "mistral": "Mistral",
        "gemma3": "Gemma3",
        "phi": "Phi",
        "phi3": "Phi3",
        "bloom": "Bloom",
        "mamba": "Mamba",
        "falcon": "Falcon",
        "llama": "Llama",
        "gemma2": "Gemma2",
        "gpt2": "GPT2",
        "cohere": "Cohere",
        "neox": "GPTNeoX",
    }
    config_name = "Gemma3TextConfig" if architecture == "gemma3" else f"{names[architecture]}Config"
    config_class = getattr(transformers, config_name)
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    common |= {"eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 256}
    if architecture == "gpt2":
        sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
        common.pop("max_position_embeddings")
    elif architecture in ("bloom", "mamba", "falcon"):
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2}
        sizes |= {
            "bloom": {"n_head": 4},
            "mamba": {"state_size": 4, "time_step_rank": 4},
            "falcon": {"num_attention_heads": 4, "alibi": False},
        }[architecture]
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        if architecture not in ("neox", "phi"):
            sizes["num_key_value_heads"] = 2
        if architecture in ("mistral", "gemma2", "gemma3", "phi3"):
            sizes["sliding_window"] = 5
        if architecture in ("qwen3", "gemma2", "gemma3"):
            sizes["head_dim"] = 8
        if architecture == "gemma2":  # before transformers 5.23 it is sdpa, which leaves its cap out
            sizes["attn_implementation"] = "eager"
        sizes["initializer_range"] = 0.2
        sizes["tie_word_embeddings"] = architecture != "neox"
    config = config_class(**{**common, **sizes, **options})
    suffix = "ForCausalLM" if task == "CAUSAL_LM" else "ForSequenceClassification"
    if architecture == "gpt2":
        suffix = "LMHeadModel" if task == "CAUSAL_LM" else suffix
    if task == "SEQ_CLS":
        config.num_labels = 1
    torch.manual_seed(seed)
    return getattr(transformers, f"{names[architecture]}{suffix}")(config).eval()


@pytest.fixture
def model(tokenizer: Any) -> Any:
    return build_model(tokenizer)


@pytest.fixture
def base(tmp_path: Path, model: Any, tokenizer: Any) -> str:
    """A model folder."""
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def trainer(root: Path, **options: Any) -> pl.Trainer:
    """A quiet Trainer, on a CPU unless `accelerator` says otherwise."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": root,
        "max_epochs": 1,
    }
    return pl.Trainer(**{**defaults, **options})


def write_rows(path: Path, rows: list[Any]) -> str:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def chats(count: int) -> list[dict[str, Any]]:
    """Conversations of unlike length."""
    rows = []
    for i in range(count):
        answer = " ".join(WORDS[: 1 + i % 7])
        rows.append({"messages": [{"role": "user", "content": f"Count {i}"}, {"role": "assistant", "content": answer}]})
    return rows


def pairs(count: int) -> list[dict[str, Any]]:
    """Pairs whose chosen side is the longer count."""
    return [
        {"prompt": f"Count {i}", "chosen": " ".join(WORDS[: 3 + i % 6]), "rejected": " ".join(WORDS[: 1 + i % 3])}
        for i in range(count)
    ]


def prompts(count: int) -> list[dict[str, Any]]:
    """Prompts with a further column."""
    return [{"prompt": f"Count {i}", "wanted": i % 5} for i in range(count)]


def sgd(rate: float) -> Any:
    """Plain gradient descent: unlike Adam it does not hide a wrong loss scale."""
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)
