"""Calls of user code with a time limit."""

import threading
import time

import torch

from rlhf_lightning.environments.user_calls import TimeLimitError, run_calls


def test_calls_with_a_limit_run_in_threads_in_order() -> None:
    names = set()

    def work(i: int) -> int:
        names.add(threading.current_thread())
        time.sleep(0.05)
        assert not torch.is_grad_enabled()
        if i % 7 == 0:
            raise TimeoutError("mine")
        return i

    started = time.perf_counter()
    outcomes = run_calls([lambda i=i: work(i) for i in range(60)], 5.0)
    assert time.perf_counter() - started < 2
    assert [o.value for o in outcomes] == [None if i % 7 == 0 else i for i in range(60)]
    # A TimeoutError of the call's own is not the limit's.
    assert {type(o.error) for o in outcomes} == {TimeoutError, type(None)}
    assert len(names) > 1
    assert isinstance(run_calls([lambda: time.sleep(5)], 0.05)[0].error, TimeLimitError)
