"""Talks to a model that `rlhf serve` serves, with the client of the package openai: whole, streamed, many at once.

Arguments: the server's URL, for example http://127.0.0.1:8000/v1, and the model's name there (the MODEL of `rlhf
serve`, or its --name). A server with a key takes it from RLHF_SERVE_TOKEN; give the client the same.
"""

import asyncio
import os
import sys

from openai import AsyncOpenAI, OpenAI

QUESTIONS = ["How do I make tea?", "How do I boil an egg?", "Name three colors."]


def main(url: str, model: str, max_tokens: int = 64) -> list[str]:
    """Ask the first question twice, then all of them at the same time; returns their answers."""
    key = os.environ.get("RLHF_SERVE_TOKEN", "none")  # the client wants one, even if the server needs none
    with OpenAI(base_url=url, api_key=key) as client:
        question = [{"role": "user", "content": QUESTIONS[0]}]
        whole = client.chat.completions.create(model=model, messages=question, max_tokens=max_tokens, seed=1)
        print(whole.choices[0].message.content, whole.usage, sep="\n")
        for chunk in client.chat.completions.create(
            model=model, messages=question, max_tokens=max_tokens, temperature=0, stream=True
        ):
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()
    return asyncio.run(ask_all(url, key, model, max_tokens))


async def ask_all(url: str, key: str, model: str, max_tokens: int) -> list[str]:
    """Answers to all questions, which the server samples together."""

    async def ask(client: AsyncOpenAI, question: str) -> str:
        messages = [{"role": "user", "content": question}]
        reply = await client.chat.completions.create(
            model=model, messages=messages, max_tokens=max_tokens, temperature=0
        )
        return reply.choices[0].message.content or ""

    async with AsyncOpenAI(base_url=url, api_key=key) as client:
        answers = await asyncio.gather(*(ask(client, question) for question in QUESTIONS))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"{question} {answer}")
    return answers


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
