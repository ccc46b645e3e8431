"""Ends all ranks of a run when one of them fails, dies, hangs or times out, and reports the reason on each of them.

With PyTorch alone, the other ranks wait until the timeout of the process group and then report a socket error. Here
each rank has a thread with a connection to rank 0. Failures are sent to all ranks. A closed connection means that a
process died; a silent connection means that a process is suspended or a machine is unreachable. The main thread then
ends by itself (because gloo raises an error), or the watching thread ends the process.
"""

import json
import logging
import os
import re
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from lightning.pytorch.strategies.launchers.subprocess_script import (
    _set_num_threads_if_needed,
    _SubprocessScriptLauncher,
)

from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.sys_exit import is_library

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)
GRACE = 10.0
"""Seconds that a rank has to end by itself after it was notified."""
SILENCE = 300.0
"""Seconds without a message after which a rank counts as hanging; at most the timeout of the process group."""
TELLING = 5.0
"""Seconds that a process waits for the other ranks to acknowledge its failure or its end."""
YEAR = 366 * 24 * 60
PARENT = "RLHF_RANK_PARENT"
"""Environment variable of a rank that another rank started: the process id of that other rank."""
# Messages of gloo and NCCL about a lost connection or a timeout, for which they raise plain RuntimeErrors.
LOST = ("Connection reset by peer", "Connection closed by peer", "remote process exited", "Broken pipe")
TIMED_OUT = ("Timed out waiting", "Application timeout", "collective operation timeout")
RESUME = "The same command resumes the run."
KILLED = f"If it was killed, the machine may have run out of memory (see the system log). {RESUME}"


@dataclass(frozen=True)
class End:
    """Why the run ends for all ranks.

    Attributes:
        text: The reason.
        code: Exit code of the ranks that did not fail themselves.

    Example:
        >>> End("rank 1 was interrupted", 130).code
        130
    """

    text: str
    code: int = 2


class Note(TypedDict, total=False):
    """A message from one rank to another.

    Attributes:
        rank: The sender's rank, in its first message.
        name: The sender's name for error messages, in its first message.
        beat: Code location of the sender's main thread, sent regularly.
        told: True to acknowledge the receiver's `done` or `end`.
        done: True if the sender has finished.
        end: Why the run ends.
        code: Exit code of the ranks that did not fail themselves.
        waited: True if the sender timed out waiting for the other ranks.
    """

    rank: int
    name: str
    beat: str
    told: bool
    done: bool
    end: str
    code: int
    waited: bool


@dataclass
class _Peer:
    """The other end of a connection."""

    socket: socket.socket
    rank: int | None = None
    name: str = ""
    place: str = ""
    seen: float = field(default_factory=time.monotonic)
    told: bool = False
    buffer: bytes = b""


class RankWatch:
    """Watches the other ranks from one rank.

    Args:
        limit: Timeout of collectives in seconds, for messages; None if unknown.

    Example:
        >>> watch = RankWatch(limit=1800.0)
        >>> watch.silence
        300.0
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.silence = min(SILENCE, limit or SILENCE)
        self.beat = min(5.0, self.silence / 5)
        self.rank, self.world = 0, 1
        self.end: End | None = None
        """Why another rank ended the run; None while the run goes on."""
        self._own: End | None = None
        self._deadline: float | None = None
        self._reaped = self._met = False
        self._parent = os.environ.pop(PARENT, None)
        self._finished: set[int | None] = set()
        """Ranks that have finished or failed; when their connection closes, nothing has gone wrong."""
        self.children: dict[int, subprocess.Popen] = {}
        self._peers: list[_Peer] = []
        self._selector = selectors.DefaultSelector()
        self._server: socket.socket | None = None
        self._token = ""
        self._ended, self._over = threading.Event(), threading.Event()
        self._sending = threading.Lock()
        self._thread: threading.Thread | None = None
        self._main = threading.main_thread().ident
        self._beaten = 0.0
        self._looked = time.monotonic()

    # -- the main thread ------------------------------------------------------------------------------------------

    def begin(self, children: dict[int, subprocess.Popen]) -> None:
        """Watch the parent process, if it is a rank, and the child processes.

        Args:
            children: The processes that this one started, by rank.
        """
        self.children = children
        if self._thread is None and (children or self._parent):
            self._start()

    def connect(self, rank: int, world: int) -> None:
        """Watch all ranks once the process group exists. All ranks must call this together.

        Args:
            rank: Rank of this process.
            world: Number of ranks.
        """
        self.rank, self.world, self._met = rank, world, True
        if world == 1:
            return
        from torch.distributed.distributed_c10d import _get_default_store

        store, host = _get_default_store(), os.environ["MASTER_ADDR"]
        if rank == 0:
            self._server = _listen(host)
            self._token = secrets.token_hex(16)
            store.set("rlhf_watch", json.dumps([self._server.getsockname()[1], self._token, _name(rank, world)]))
            self._selector.register(self._server, selectors.EVENT_READ, None)
        else:
            port, self._token, name = json.loads(store.get("rlhf_watch"))
            try:
                hub = _Peer(socket.create_connection((host, port), timeout=10), rank=0, name=name)
            except OSError as error:
                log.warning(
                    "rank %d cannot connect to port %d of %s (%s): if another rank stops or dies, this rank ends only "
                    "at the timeout of the process group",
                    rank, port, host, error.strerror or error,
                )  # fmt: skip
                return
            hub.socket.setblocking(False)
            self._peers.append(hub)
            hub.socket.sendall(self._token.encode())
            self._send(hub, rank=rank, name=_name(rank, world))
            self._selector.register(hub.socket, selectors.EVENT_READ, hub)
        if self._thread is None:
            self._start()

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks about an exception; return once they know, or after `TELLING` seconds.

        Args:
            error: The exception.
        """
        if self._over.is_set() or self._thread is None:
            return
        waited = _mentions(error, TIMED_OUT)
        if _mentions(error, LOST):
            self._ended.wait(TELLING)  # another rank caused this, and its reason is about to arrive
        if self.end is None:
            me = _name(self.rank, self.world)
            if isinstance(error, KeyboardInterrupt):
                self._own = End(f"{me} was interrupted", 130)
            elif waited and self.rank == 0:
                self._settle(End(self._timeout_message(None)))
            elif not waited:
                self._own = End(f"{me} failed: {_described(error)}")
            end = self._own or self.end
            note: Note = {"end": end.text, "code": end.code} if end else {"waited": True}
            for peer in list(self._peers):
                self._send(peer, **note)
        self._until(lambda: self._all_know() and (not waited or bool(self.end)))

    def stop(self) -> None:
        """Tell the other ranks that this one has finished, so that its end does not count as a failure."""
        if self._over.is_set() or self.end is not None or self._thread is None:
            return
        for peer in list(self._peers):
            self._send(peer, done=True)
        if self.rank == 0:
            # When rank 0 ends, it closes the connections of ranks that are still running, so they must know first.
            self._until(self._all_know)
        self._over.set()

    def reason(self, error: BaseException) -> End | None:
        """The reason for an exception in the main thread if another rank caused it, else None.

        Args:
            error: The exception.
        """
        if self._thread is None or not (_mentions(error, LOST) or _mentions(error, TIMED_OUT) or self.end):
            return None
        self._ended.wait(TELLING)
        return self.end

    def reap(self, failed: bool) -> End | None:
        """Wait for the ranks that this process started, then kill those that still run.

        Args:
            failed: True if they end because of a failure; otherwise they may still have work to do.

        Returns:
            The failure of one of these ranks, or None.
        """
        self._reaped = True
        until = time.monotonic() + (GRACE + TELLING if failed else self.limit or SILENCE)
        while any(child.poll() is None for child in self.children.values()) and time.monotonic() < until:
            time.sleep(0.02)
        end = None
        for rank, child in self.children.items():
            if child.poll() is None:
                child.kill()
                child.wait()
                end = End(f"rank {rank} did not exit with the others, and was killed")
            elif child.returncode and not failed:
                end = End(f"rank {rank} {_exit(child.returncode)} after the others had finished")
        self._deadline = time.monotonic() + GRACE if failed else None  # exit handlers may wait for other ranks
        self._over.set()
        return end

    def _all_know(self) -> bool:
        return all(peer.told or peer.rank in self._finished for peer in self._peers)

    def _until(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + TELLING
        while not condition() and time.monotonic() < until:
            time.sleep(0.005)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._watch, daemon=True, name="ranks")
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.is_set() or self._deadline:
            for key, _ in self._selector.select(min(1.0, self.beat)):
                if key.data is None:
                    self._accept()
                else:
                    self._receive(key.data)
            end = self.end or self._own
            if end is None:
                self._look()
            elif self._deadline is None:
                # A rank with children ends last, because it kills those that do not end by themselves.
                # Before the ranks have connected, there is no work to end, so the grace period is short.
                self._deadline = time.monotonic() + ((GRACE if self._met else 1) + (2 if self.children else 0))
            elif time.monotonic() > self._deadline and not _writing and (self._over.is_set() or not self._reaped):
                self._leave(end)

    def _look(self) -> None:
        """Send a heartbeat, and check for processes that ended and ranks that are silent."""
        now = time.monotonic()
        if now - self._looked > self.silence / 2:
            # This process itself was suspended, perhaps with all others (Ctrl-Z), so their messages are still unread.
            for peer in self._peers:
                peer.seen = now
        self._looked = now
        if now - self._beaten > self.beat:
            self._beaten = now
            for peer in list(self._peers):
                self._send(peer, beat=_place(self._main))
        for rank, child in self.children.items():
            if child.poll() and rank not in self._finished:
                known = next((peer for peer in self._peers if peer.rank == rank), None)
                name = known.name if known else f"rank {rank} (process {child.pid})"
                self._died(rank, name, known.place if known else "")
                return
        if self._parent and os.getppid() != int(self._parent) and 0 not in self._finished:
            self._conclude(End(f"the process that started this rank (process {self._parent}) died. {KILLED}"))
            return
        for peer in self._peers:
            if peer.rank not in self._finished and now - peer.seen > self.silence:
                text = f"{peer.name} has not responded for {self.silence:g} s: it was suspended, is in a call that "
                text += "holds Python's interpreter lock, or its machine is unreachable."
                text += f"{_last(peer.place)} {RESUME}"
                self._conclude(End(text))
                return

    def _accept(self) -> None:
        assert self._server is not None
        connection, _ = self._server.accept()
        connection.setblocking(False)
        peer = _Peer(connection)
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _receive(self, peer: _Peer) -> None:
        try:
            data = peer.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:  # reset by the other end, which means the same as an empty read
            data = b""
        if not data:
            self._selector.unregister(peer.socket)
            peer.socket.close()
            if peer in self._peers:
                self._peers.remove(peer)
                if peer.rank not in self._finished and not (self.end or self._own or self._over.is_set()):
                    self._died(peer.rank, peer.name, peer.place)
            return
        token, received = self._token.encode(), peer.buffer + data
        if peer.rank is None and not (received.startswith(token) or token.startswith(received)):
            self._selector.unregister(peer.socket)  # not a rank of this run
            peer.socket.close()
            return
        *lines, peer.buffer = received.split(b"\n")
        for line in lines:
            message = json.loads(line.removeprefix(token))
            if peer.rank is None:
                peer.rank, peer.name = message["rank"], message["name"]
                self._peers.append(peer)
            peer.seen = time.monotonic()
            self._handle(peer, message)

    def _handle(self, peer: _Peer, message: Note) -> None:
        peer.place = message.get("beat", peer.place)
        peer.told = peer.told or "told" in message
        if "done" in message or "end" in message:
            self._finished.add(peer.rank)
            self._send(peer, told=True)
        if self.end or self._own or self._over.is_set():
            return
        if "end" in message:
            self._conclude(End(message["end"], message["code"]), besides=peer)
        elif "waited" in message:
            self._conclude(End(self._timeout_message(peer)))

    def _died(self, rank: int | None, name: str, place: str) -> None:
        child = self.children.get(rank) if rank is not None else None
        how = "died, or its connection was lost"
        if child is not None:
            try:
                how = _exit(child.wait(2))
            except subprocess.TimeoutExpired:
                how = "closed its connection"
        self._conclude(End(f"{name} {how}.{_last(place)} {KILLED}"))

    def _timeout_message(self, waiting: _Peer | None) -> str:
        """Message about a rank that timed out, and where the others are; composed on rank 0, which knows all of them.

        Args:
            waiting: The rank that timed out; None for this one.
        """
        who = waiting.name if waiting else _name(self.rank, self.world)
        others: list[str] = []
        for peer in self._peers:
            silent = time.monotonic() - peer.seen
            if silent > 3 * self.beat:
                others.insert(0, f"{peer.name} has not responded for {silent:.0f} s.{_last(peer.place)}")
            elif peer is not waiting:
                others.append(f"{peer.name} is at {peer.place or 'an unknown place'}")
        if waiting:
            others.insert(0, f"{_name(self.rank, self.world)} is at {_place(self._main)}")
        limit = f" after {self.limit:g} s (--rank_timeout, or the strategy's timeout)" if self.limit else ""
        more = f", and {len(others) - 8} more" if len(others) > 8 else ""
        return f"{who} timed out{limit} waiting for the other ranks: {'; '.join(others[:8])}{more}. {RESUME}"

    def _conclude(self, end: End, besides: _Peer | None = None) -> None:
        for peer in list(self._peers):
            if peer is not besides:
                self._send(peer, end=end.text, code=end.code)
        self._settle(end)

    def _settle(self, end: End) -> None:
        if self.end is None:
            self.end = end
            self._ended.set()

    def _send(self, peer: _Peer, **message: Unpack[Note]) -> None:
        with self._sending:
            try:
                peer.socket.sendall(json.dumps(message).encode() + b"\n")
            except OSError:  # the connection is lost; the reading side reports it
                return

    def _leave(self, end: End) -> None:
        """End this process, because its main thread did not end by itself."""
        if not self._reaped:
            # In a thread, because writing to the console may block forever.
            logging_thread = threading.Thread(target=_log_end, args=[end], daemon=True)
            logging_thread.start()
            logging_thread.join(2)
        for child in self.children.values():
            if child.poll() is None:
                child.kill()
        os._exit(end.code)


def _log_end(end: End) -> None:
    logger = logging.getLogger("rlhf_lightning")
    logger.error("%s", "interrupted" if end.code == 130 else f"error: {end.text}")
    for handler in logger.handlers:
        handler.flush()


def _mentions(error: BaseException, signs: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _name(rank: int, world: int, pid: int | None = None) -> str:
    return f"rank {rank} of {world} ({socket.gethostname()}, process {pid or os.getpid()})"


def _exit(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _last(place: str) -> str:
    return f" It was last at {place}." if place else ""


def _described(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {str(error)[:500]}{where}"


def _place(thread: int | None) -> str:
    """Code location of a thread: the innermost frame outside libraries."""
    frame: FrameType | None = sys._current_frames().get(thread or 0)
    innermost = frame
    while frame is not None and _in_library(frame.f_code.co_filename):
        frame = frame.f_back
    frame = frame or innermost
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}" if frame else ""


def _in_library(file: str) -> bool:
    return is_library(file) or file.startswith(("<", str(Path(os.__file__).parent)))


def _listen(host: str) -> socket.socket:
    """A server socket for the ranks of the run; only for this machine if all ranks are on it."""
    if host in ("localhost", "127.0.0.1", "::1"):
        return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


# -- a run ------------------------------------------------------------------------------------------------------------

_current: list[RankWatch] = []
_writing: list[None] = []


class _Launcher(_SubprocessScriptLauncher):
    """Lightning's launcher, with the watch instead of an observer that kills this process silently."""

    watch: RankWatch

    def launch(self, function: Callable, *args: Any, trainer: "pl.Trainer | None" = None, **kwargs: Any) -> Any:
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            os.environ[PARENT] = str(os.getpid())
            self._call_children_scripts()
            del os.environ[PARENT]
        first = environment.node_rank() * self.num_processes
        self.watch.begin({first + place: child for place, child in enumerate(self.procs, 1)})
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


def watch_ranks(trainer: "pl.Trainer", minutes: float | None) -> None:
    """Watch the ranks of a trainer's run from its start, and set the timeout of their collectives.

    Args:
        trainer: The Trainer.
        minutes: Timeout of the process group; None for that of the strategy.

    Raises:
        ConfigError: If the timeout is out of range, or the strategy has a different one.
    """
    from datetime import timedelta

    from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout

    strategy: Any = trainer.strategy
    if minutes is not None:
        if not 0 < minutes <= YEAR:
            raise ConfigError(f"rank_timeout is {minutes} minutes; it must be above 0 and at most a year")
        own = getattr(strategy, "_timeout", None)
        if own not in (None, default_pg_timeout, timedelta(minutes=minutes)):
            raise ConfigError(
                f"rank_timeout is {minutes:g} minutes, but trainer.strategy has a timeout of {own}; set only one"
            )
        strategy._timeout = timedelta(minutes=minutes)
    launcher = strategy.launcher
    if type(launcher) not in (type(None), _SubprocessScriptLauncher):
        return  # a parent process forks the ranks and waits for them
    timeout = getattr(strategy, "_timeout", None)
    watch = RankWatch(timeout.total_seconds() if timeout else None)
    _current[:] = [watch]
    if launcher is not None:
        own_launcher = _Launcher(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
        own_launcher.watch = watch
        strategy._launcher = own_launcher
    setup, fail = strategy.setup_environment, strategy.on_exception

    def setup_environment() -> None:
        try:
            setup()
        except RuntimeError as error:
            raise _alone(error, watch.limit) or error from error
        watch.connect(trainer.global_rank, trainer.world_size)

    def on_exception(exception: BaseException) -> None:
        watch.fail(exception)
        fail(exception)

    strategy.setup_environment, strategy.on_exception = setup_environment, on_exception


def _alone(error: RuntimeError, limit: float | None) -> UserError | None:
    """The error for torch's exception about a process group that could not be created; None for other exceptions."""
    text = str(error)
    within = f" within {limit:g} s (--rank_timeout, or the strategy's timeout)" if limit else ""
    if joined := re.search(r"(\d+)/(\d+) clients joined", text):
        return UserError(
            f"only {joined[1]} of {joined[2]} ranks joined{within}. Start all ranks with the same MASTER_ADDR and "
            "MASTER_PORT. If a rank has already exited, see its output for the reason."
        )
    if place := re.search(r"trying to connect to \((.*?)\)", text):
        return UserError(
            f"rank 0 does not respond at {place[1]}{within}. Start it, or if it has exited, see its output for the "
            "reason."
        )
    if "connectFullMesh" in text:
        return UserError(
            f"another rank exited or is unreachable before the run began ({text.splitlines()[0][:200]}). See its "
            "output for the reason."
        )
    return None


@contextmanager
def ranks_end_together() -> Iterator[None]:
    """Context manager for a command: reports the rank that caused an exception, and leaves no child rank running.

    Raises:
        UserError: If another rank failed, died, hung or timed out, or if a rank that this process started did not exit
            properly.
        KeyboardInterrupt: If another rank was interrupted.
    """
    failed = True
    try:
        yield
        if _current:
            _current[0].stop()
        failed = False
    except RuntimeError as error:
        if _current and (end := _current[0].reason(error)):
            raise (KeyboardInterrupt if end.code == 130 else UserError(end.text)) from error
        raise
    finally:
        watch = _current.pop() if _current else None
        end = watch.reap(failed) if watch else None
        if end and not failed:
            raise UserError(end.text)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Context manager for writing a file, in which the watching thread does not end this process."""
    _writing.append(None)
    try:
        yield
    finally:
        _writing.pop()
