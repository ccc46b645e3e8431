"""A trained reward model in a program that uses only transformers.

The folder is that of `rlhf preference fit` (`runs/preference/model`) or of `module.save_pretrained`.
"""

import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def score(folder: str, prompt: str, responses: list[str]) -> torch.Tensor:
    """Scores `[N]` of responses to a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    user = {"role": "user", "content": prompt}
    talks = [[user, {"role": "assistant", "content": response}] for response in responses]
    tokens = tokenizer.apply_chat_template(talks, padding=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        return model(**tokens).logits[:, 0]


if __name__ == "__main__":
    print(score(sys.argv[1], "How are you?", ["Fine, thank you.", "No."]))
