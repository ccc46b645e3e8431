"""Model of the quickstart: a Qwen3 with half a million parameters, and a tokenizer trained on the data."""

from typing import TYPE_CHECKING

from rlhf_lightning.types import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = 768
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer with a ChatML template; it can encode any text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    trainer.show_progress = False
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = TEMPLATE
    return fast


def make_model(tokenizer: Tokenizer, seed: int) -> "PreTrainedModel":
    """Make a Qwen3 causal language model with random weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=16,
        # Larger than the usual 0.02, because a narrow model then learns sooner to copy from the question.
        initializer_range=0.05,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def write_base(folder: str, conversations: str, seed: int) -> None:
    """Train the tokenizer on a file of conversations, make the model, and save both.

    Args:
        folder: Folder to write.
        conversations: Path of the conversations.
        seed: Seed of the weights.
    """
    from rlhf_lightning.data.conversations import conversation, has_conversation
    from rlhf_lightning.data.records import read_rows

    texts = []
    for row in read_rows(conversations):
        messages = conversation(row.data) if has_conversation(row.data) else [{"content": row.data.get("text")}]
        texts += [message["content"] for message in messages if isinstance(message["content"], str)]
    tokenizer = make_tokenizer([*texts, "user\n", "assistant\n"])
    make_model(tokenizer, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    # Run as its own process, so that the quickstart's process need not load torch while the stages run.
    import sys

    write_base(sys.argv[1], sys.argv[2], int(sys.argv[3]))
