"""A taskset of verifiers with a tool."""

import verifiers.v1 as vf
from calculator_server import CalculatorToolset


class CalculatorConfig(vf.TaskConfig):
    tools: vf.ToolsetConfig = vf.ToolsetConfig()


class CalculatorData(vf.TaskData):
    answer: str


class CalculatorTask(vf.Task[CalculatorData, vf.State, CalculatorConfig]):
    @classmethod
    def toolsets(cls, config: CalculatorConfig) -> list[vf.Toolset]:
        return [CalculatorToolset(config.tools)]

    @vf.reward(weight=1.0)
    async def correct(self, trace: vf.Trace) -> float:
        return float(self.data.answer in (trace.branches[-1].messages[-1].content or ""))


class CalculatorTasksetConfig(vf.TasksetConfig):
    task: CalculatorConfig = CalculatorConfig()


class CalculatorTaskset(vf.Taskset[CalculatorTask, CalculatorTasksetConfig]):
    def load(self) -> list[CalculatorTask]:
        return [CalculatorTask(CalculatorData(prompt="What is 12 * 34?", answer="408"), self.config.task)]


__all__ = ["CalculatorTaskset"]
