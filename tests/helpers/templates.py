"""Chat templates written for the tests, and the texts trained under them."""

from typing import Any

from rlhf_lightning.data.rendering import Rendered

TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # The generation prompt ends with a space, which the answer's first word would swallow.
    "space": "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    # Reasoning of earlier turns is dropped, and the generation prompt opens a block that history does not have.
    "thinking": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n"
    "</think>\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    # A marker that moves with the end of the conversation.
    "moving": "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% else %}<|pad|>{% endif %}",
    "text end": "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "endless": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
}


def trained(tokenizer: Any, row: Rendered) -> list[str]:
    """The texts of a row's trained stretches."""
    texts, run = [], []
    for token, flag in [*zip(row.ids, row.loss_mask, strict=True), (0, 0)]:
        if flag:
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


QUIET = {"enable_thinking": False}
THINKING = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool.function.name }} {% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if loop.last and message.role == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""As Qwen3's: the last answer carries an empty thought, which the generation prompt has where thinking is off."""
