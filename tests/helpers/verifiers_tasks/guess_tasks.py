"""An environment of verifiers with several turns, which answers guesses until the secret is found."""

from typing import Any

import verifiers.v1 as vf


class GuessData(vf.TaskData):
    secret: int


class GuessTask(vf.Task[GuessData]):
    @vf.reward(weight=1.0)
    async def found(self, trace: vf.Trace) -> float:
        return float(str(self.data.secret) in (trace.branches[-1].messages[-1].content or ""))


class GuessTaskset(vf.Taskset[GuessTask, vf.TasksetConfig]):
    INFINITE = True

    def load(self) -> Any:
        secret = 0
        while True:
            yield GuessTask(GuessData(prompt="Guess a number.", secret=secret), self.config.task)
            secret += 1


class GuessConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig()
    rounds: int = 2


class GuessEnv(vf.Env[GuessConfig]):
    async def run(self, task: Any, agents: Any) -> None:
        async with agents.agent.interaction(task) as chat:
            segment = await chat.turn()
            for _ in range(self.config.rounds - 1):
                if segment.terminated or str(task.data.secret) in segment.last_reply:
                    break
                segment = await chat.turn("No, another one.")


__all__ = ["GuessEnv", "GuessTaskset"]
