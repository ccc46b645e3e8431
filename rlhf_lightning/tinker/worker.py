"""The thread that computes what clients ask for, one request after the other."""

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future

from rlhf_lightning.errors import UserError
from rlhf_lightning.serving.fields import RequestError
from rlhf_lightning.tinker.replies import Failure, Reply

log = logging.getLogger(__name__)
MOST_WAITING, MOST_BYTES = 512, 2**28
"""Largest number of tasks of a kind that may wait, and of bytes of their requests, which take more in memory."""


class Task(ABC):
    """Work that a client asked for.

    Attributes:
        future: Becomes the reply.
        size: Bytes of the request.
        group: Waiting tasks with an equal group are run together; None for a task that runs alone.
    """

    def __init__(self, size: int, group: Hashable = None) -> None:
        self.future: Future[Reply] = Future()
        self.size, self.group = size, group

    @abstractmethod
    def run(self, tasks: "Sequence[Task]") -> list[Reply]:
        """Do the work of some tasks of this task's group.

        Args:
            tasks: The tasks, including this one.

        Returns:
            Their replies.
        """


class Call(Task):
    """A task that is a call of a function.

    Args:
        function: The function.
        size: Bytes of the request.

    Example:
        >>> from rlhf_lightning.tinker.replies import JSONReply
        >>> call = Call(lambda: JSONReply({"path": None}))
        >>> [reply] = call.run([call])
    """

    def __init__(self, function: Callable[[], Reply], size: int = 0) -> None:
        super().__init__(size)
        self._function = function

    def run(self, tasks: Sequence[Task]) -> list[Reply]:
        """Call the function."""
        return [self._function()]


class Worker:
    """Runs tasks in a thread in the order in which they arrive.

    Example:
        >>> worker = Worker()
        >>> worker.start()
        >>> worker.stop()
    """

    def __init__(self) -> None:
        self._waiting: deque[Task] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="tinker")

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its present task."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def check_room(self, task: Task) -> None:
        """Raise `RequestError` if too many tasks of a task's kind wait; samples do not keep out training.

        Args:
            task: The task, which is not waiting yet.
        """
        with self._changed:
            sizes = [one.size for one in self._waiting if type(one) is type(task)]
        if len(sizes) >= MOST_WAITING or sum(sizes) >= MOST_BYTES:
            raise RequestError(
                f"{len(sizes)} requests of {sum(sizes)} bytes are waiting already; try again later", status=429
            )

    def add(self, task: Task) -> None:
        """Let a task wait for its turn.

        Args:
            task: The task.
        """
        with self._changed:
            self._waiting.append(task)
            self._changed.notify()

    def _next(self) -> list[Task]:
        """Wait for a task, and take those behind it that run together with it; none if the thread ends."""
        with self._changed:
            while not self._waiting and not self._stopping:
                self._changed.wait()
            if self._stopping:
                return []
            tasks = [self._waiting.popleft()]
            while tasks[0].group is not None and self._waiting and self._waiting[0].group == tasks[0].group:
                tasks.append(self._waiting.popleft())
            return tasks

    def _run(self) -> None:
        while tasks := self._next():
            replies: Sequence[Reply]
            try:
                replies = tasks[0].run(tasks)
            except (UserError, RequestError) as error:
                replies = [Failure(str(error), "user")] * len(tasks)
            except Exception:
                log.exception("a request failed")
                replies = [Failure("the server failed; its log has the reason", "server")] * len(tasks)
            for task, reply in zip(tasks, replies, strict=True):
                task.future.set_result(reply)
