"""A taskset of verifiers with one turn: its own reward and metric."""

import verifiers.v1 as vf


class AdditionData(vf.TaskData):
    answer: str


class AdditionTask(vf.Task[AdditionData]):
    @vf.reward(weight=2.0)
    async def correct(self, trace: vf.Trace) -> float:
        return float(self.data.answer in reply(trace))

    @vf.metric
    async def length(self, trace: vf.Trace) -> float:
        return float(len(reply(trace)))


def reply(trace: vf.Trace) -> str:
    return trace.branches[-1].messages[-1].content or ""


class AdditionConfig(vf.TasksetConfig):
    tasks: int = 3
    broken: bool = False


class AdditionTaskset(vf.Taskset[AdditionTask, AdditionConfig]):
    def load(self) -> list[AdditionTask]:
        if self.config.broken:
            raise ValueError("broken on purpose")
        return [
            AdditionTask(
                AdditionData(prompt=f"What is {i} + 1?", answer=str(i + 1), system_prompt="Be brief."), self.config.task
            )
            for i in range(self.config.tasks)
        ]


__all__ = ["AdditionTaskset"]
