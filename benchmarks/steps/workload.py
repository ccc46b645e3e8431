"""The model, the rows and the sizes that both sides get."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
    "end",
    "member",
    "law",
    "car",
    "city",
    "community",
    "name",
    "president",
    "team",
    "minute",
    "idea",
    "body",
    "information",
    "back",
    "parent",
    "face",
    "others",
    "level",
    "office",
    "door",
    "health",
    "person",
    "art",
    "war",
    "history",
    "party",
    "result",
    "change",
    "morning",
    "reason",
    "research",
    "girl",
    "guy",
    "moment",
    "air",
    "teacher",
    "force",
    "education",
]


MAX_LENGTH = 16_384
"""Upper bound of the tokens of a row in any workload."""


@dataclass
class Workload:
    """Sizes of one run; every field is an argument of the command line."""

    vocab: int = 8192
    layers: int = 4
    hidden: int = 256
    intermediate: int = 768
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 0  # 0 for hidden / heads
    batch: int = 16
    batches: int = 1  # per epoch
    prompt_tokens: int = 125
    response_tokens: int = 45
    groups: int = 4
    group_size: int = 8
    new_tokens: int = 128
    generate_batch: int = 32
    bf16: bool = False
    bf16_weights: bool = False  # also weights and optimizer, not only the computation under autocast
    compile: bool = False  # both sides' layers, with `torch.compile`
    device: str = "cpu"
    cuda_graphs: bool = False
    tokenizer: str = ""
    data: str = ""
    seed: int = 0

    def build(self, folder: Path) -> None:
        """Write a model with random weights, and its tokenizer."""
        import torch
        from transformers import AutoModelForCausalLM, Qwen3Config

        torch.manual_seed(self.seed)
        tokenizer = self.load_tokenizer()
        config = Qwen3Config(
            **self.sizes,
            tie_word_embeddings=True,
            max_position_embeddings=MAX_LENGTH,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.to(getattr(torch, self.dtype)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the model, under their names in the config."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
        }

    @property
    def head_size(self) -> int:
        """Size of an attention head."""
        return self.head_dim or self.hidden // self.heads

    @property
    def dtype(self) -> str:
        """Dtype of the weights."""
        return "bfloat16" if self.bf16 and self.bf16_weights else "float32"

    @property
    def autocast(self) -> bool:
        """True if float32 weights are computed with in bfloat16 (autocast)."""
        return self.bf16 and not self.bf16_weights

    @property
    def precision(self) -> str:
        """The precision, as Lightning's Trainer names it."""
        return "bf16-mixed" if self.autocast else "bf16-true" if self.bf16 else "32-true"

    def load_tokenizer(self) -> Any:
        """The named tokenizer, or one made from the generator's words."""
        from transformers import AutoTokenizer

        if self.tokenizer:
            return AutoTokenizer.from_pretrained(self.tokenizer)
        from rlhf_lightning.quickstart.model import make_tokenizer

        return make_tokenizer([" ".join(WORDS)] * 3)

    def conversations(self) -> list[dict[str, Any]]:
        """SFT rows: the first ones of `data`, or generated ones."""
        if self.data:
            lines = Path(self.data).read_text().splitlines()[: self.batch * self.batches]
            return [{"messages": json.loads(line)["messages"]} for line in lines]
        return [{"messages": pair["prompt"] + pair["chosen"]} for pair in self.pairs()]

    def pairs(self, count: int | None = None) -> list[dict[str, Any]]:
        """Prompts with two responses each; their lengths are within a quarter of the given numbers of tokens."""
        tokenizer, rng = self.load_tokenizer(), random.Random(self.seed)
        # Counted word by word, since tokenizing the whole text after each word would take minutes.
        counts = {word: len(tokenizer(f" {word}")["input_ids"]) for word in WORDS}

        def text(tokens: int) -> str:
            wanted, words = round(tokens * rng.uniform(0.75, 1.25)), [rng.choice(WORDS)]
            tokens = len(tokenizer(words[0])["input_ids"])
            while tokens < wanted:
                words.append(rng.choice(WORDS))
                tokens += counts[words[-1]]
            return " ".join(words)

        return [
            {
                "prompt": [{"role": "user", "content": text(self.prompt_tokens)}],
                "chosen": [{"role": "assistant", "content": text(self.response_tokens)}],
                "rejected": [{"role": "assistant", "content": text(self.response_tokens)}],
            }
            for _ in range(count or self.batch * self.batches)
        ]

    def prompts(self) -> list[dict[str, Any]]:
        """RL prompts."""
        return [{"prompt": pair["prompt"]} for pair in self.pairs(self.groups)]


def count_vowels(texts: list[str]) -> list[float]:
    """A reward that differs between random texts."""
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in texts]
