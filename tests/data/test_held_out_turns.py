"""`validation_split` holds out whole rows: no conversation and no prompt of a pair is in both sets."""

from typing import Any

from rlhf_lightning import PreferenceDataModule, SFTDataModule

# Like Qwen3's template, this renders earlier turns without reasoning, so there is a row for each trained turn.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sides(data: Any) -> tuple[set[str], set[str]]:
    data.setup("fit")
    train, held = ({row.where for row in data.prepared[name].rows} for name in ("train", "validation"))
    return train, held


def test_held_out_turns(tokenizer: Any) -> None:
    tokenizer.chat_template = REWRITING
    chats = [
        {
            "messages": [
                message
                for turn in range(3)
                for message in (
                    {"role": "user", "content": f"Question {turn} of {chat}?"},
                    {"role": "assistant", "content": f"Answer {turn} of {chat}."},
                )
            ]
        }
        for chat in range(20)
    ]
    data = SFTDataModule(chats, tokenizer=tokenizer, validation_split=0.2, show_example=False)
    train, held = sides(data)
    assert len(data.prepared["validation"].rows) == 12, "each conversation makes a row of each of its turns"
    assert (len(train), len(held), train & held) == (16, 4, set())


def test_held_out_labels_of_pairs(tokenizer: Any) -> None:
    pairs = [{"prompt": f"Question {c}?", "chosen": f"Good {c}.", "rejected": f"Bad {c}."} for c in range(20)]
    data = PreferenceDataModule(pairs, kind="labels", tokenizer=tokenizer, validation_split=0.2, show_example=False)
    train, held = sides(data)
    assert (len(train), len(held), train & held) == (16, 4, set())
    assert [row.label for row in data.prepared["validation"].rows] == [1, 0] * 4
