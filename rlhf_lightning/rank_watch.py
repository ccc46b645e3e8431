"""Ends all ranks of a run when one of them fails, dies, hangs, or waits in vain, and tells each of them why.

With PyTorch alone, the other ranks wait until the timeout of the process group, and then report a socket error. Here
each rank has a thread with a connection to rank 0. Failures are sent to all ranks. A closed connection means that a
process died; a silent one means that a process is suspended or a machine is unreachable. Then the main thread ends by
itself (because gloo raises an error), or the thread ends the process.
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

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)
GRACE = 10.0
"""Seconds that a rank has to end by itself after it was notified."""
SILENCE = 300.0
"""Seconds without a sign of life after which a rank counts as hanging; at most the timeout of the process group."""
TELLING = 5.0
"""Seconds that a process waits, before it continues, for the other ranks to be notified of a failure or of the end."""
YEAR = 366 * 24 * 60
PARENT = "RLHF_RANK_PARENT"
"""Environment variable of a rank that another rank started: process id of that one."""
# Messages of gloo and NCCL about a lost connection, for which they raise plain RuntimeErrors.
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
    """What one rank tells another.

    Attributes:
        rank: The sender's rank, in its first note.
        name: The sender's name in messages, in its first note.
        beat: Where the sender's main thread is; a sign of life.
        told: True if the receiver knows how the run ends.
        done: True if the sender has finished.
        end: Why the run ends.
        code: Exit code of the ranks that did not fail themselves.
        waited: True if the sender waited for the other ranks in vain.
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
        """Why another rank ended the run; None while none has."""
        self._own: End | None = None
        self._deadline: float | None = None
        self._reaped = self._met = False
        self._parent = os.environ.pop(PARENT, None)
        self._parted: set[int | None] = set()
        """Ranks that have finished or failed, so that their closed connection has no further meaning."""
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
        """Watch the process that started this one, and the processes that this one started.

        Args:
            children: The started processes by rank.
        """
        self.children = children
        if self._thread is None and (children or self._parent):
            self._start()

    def connect(self, rank: int, world: int) -> None:
        """Watch all ranks, after the process group was created. All ranks must call this together.

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
                    "rank %d cannot reach port %d of %s (%s): if another rank stops or dies, only the timeout of the "
                    "process group ends this rank",
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
        """Tell the other ranks that this one ends by an exception. Returns when they know, or cannot be reached.

        Args:
            error: The exception.
        """
        if self._over.is_set() or self._thread is None:
            return
        waited = _says(error, TIMED_OUT)
        if _says(error, LOST):
            self._ended.wait(TELLING)  # another rank caused this, and its reason is about to arrive
        if self.end is None:
            me = _name(self.rank, self.world)
            if isinstance(error, KeyboardInterrupt):
                self._own = End(f"{me} was interrupted", 130)
            elif waited and self.rank == 0:
                self._settle(End(self._in_vain(None)))
            elif not waited:
                self._own = End(f"{me} failed: {_described(error)}")
            end = self._own or self.end
            note: Note = {"end": end.text, "code": end.code} if end else {"waited": True}
            for peer in list(self._peers):
                self._send(peer, **note)
        self._until(lambda: self._all_know() and (not waited or bool(self.end)))

    def stop(self) -> None:
        """Tell the other ranks that this one has finished, so that its end, or that of rank 0, is no failure."""
        if self._over.is_set() or self.end is not None or self._thread is None:
            return
        for peer in list(self._peers):
            self._send(peer, done=True)
        if self.rank == 0:
            # The end of rank 0 closes the connections of ranks that still run, so they must be notified first.
            self._until(self._all_know)
        self._over.set()

    def reason(self, error: BaseException) -> End | None:
        """Why an exception was raised in the main thread, if another rank caused it; None otherwise.

        Args:
            error: The exception.
        """
        if self._thread is None or not (_says(error, LOST) or _says(error, TIMED_OUT) or self.end):
            return None
        self._ended.wait(TELLING)
        return self.end

    def reap(self, failed: bool) -> End | None:
        """Wait for the ranks that this process started, then kill those that still run.

        Args:
            failed: True if they end because of a failure; otherwise they may have work left.

        Returns:
            What went wrong with one of them, or None.
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
                end = End(f"rank {rank} did not end with the others, and was killed")
            elif child.returncode and not failed:
                end = End(f"rank {rank} {_exit(child.returncode)} after the others had finished")
        self._deadline = time.monotonic() + GRACE if failed else None  # exit handlers may wait for other ranks
        self._over.set()
        return end

    def _all_know(self) -> bool:
        return all(peer.told or peer.rank in self._parted for peer in self._peers)

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
                # A rank with children ends last, since it kills those that do not end by themselves.
                # Before the ranks have connected, there is no work to end, so the grace period is short.
                self._deadline = time.monotonic() + ((GRACE if self._met else 1) + (2 if self.children else 0))
            elif time.monotonic() > self._deadline and not _writing and (self._over.is_set() or not self._reaped):
                self._leave(end)

    def _look(self) -> None:
        """Check what needs no message: processes that ended, and ranks that are silent."""
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
            if child.poll() and rank not in self._parted:
                known = next((peer for peer in self._peers if peer.rank == rank), None)
                name = known.name if known else f"rank {rank} (process {child.pid})"
                self._died(rank, name, known.place if known else "")
                return
        if self._parent and os.getppid() != int(self._parent) and 0 not in self._parted:
            self._conclude(End(f"the process that started this rank (process {self._parent}) died. {KILLED}"))
            return
        for peer in self._peers:
            if peer.rank not in self._parted and now - peer.seen > self.silence:
                text = f"{peer.name} has given no sign of life for {self.silence:g} s: it was stopped, is in a "
                text += "call that holds Python's interpreter, or its machine cannot be reached."
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
                if peer.rank not in self._parted and not (self.end or self._own or self._over.is_set()):
                    self._died(peer.rank, peer.name, peer.place)
            return
        token, said = self._token.encode(), peer.buffer + data
        if peer.rank is None and not (said.startswith(token) or token.startswith(said)):
            self._selector.unregister(peer.socket)  # a stranger that connected to this port
            peer.socket.close()
            return
        *lines, peer.buffer = said.split(b"\n")
        for line in lines:
            message = json.loads(line.removeprefix(token))
            if peer.rank is None:
                peer.rank, peer.name = message["rank"], message["name"]
                self._peers.append(peer)
            peer.seen = time.monotonic()
            self._heed(peer, message)

    def _heed(self, peer: _Peer, message: Note) -> None:
        peer.place = message.get("beat", peer.place)
        peer.told = peer.told or "told" in message
        if "done" in message or "end" in message:
            self._parted.add(peer.rank)
            self._send(peer, told=True)
        if self.end or self._own or self._over.is_set():
            return
        if "end" in message:
            self._conclude(End(message["end"], message["code"]), besides=peer)
        elif "waited" in message:
            self._conclude(End(self._in_vain(peer)))

    def _died(self, rank: int | None, name: str, place: str) -> None:
        child = self.children.get(rank) if rank is not None else None
        how = "died, or its connection was lost"
        if child is not None:
            try:
                how = _exit(child.wait(2))
            except subprocess.TimeoutExpired:
                how = "closed its connection"
        self._conclude(End(f"{name} {how}.{_last(place)} {KILLED}"))

    def _in_vain(self, waiting: _Peer | None) -> str:
        """On rank 0, which knows where all ranks are: text about who waited for whom, and where."""
        who = waiting.name if waiting else _name(self.rank, self.world)
        others: list[str] = []
        for peer in self._peers:
            silent = time.monotonic() - peer.seen
            if silent > 3 * self.beat:
                others.insert(0, f"{peer.name} has given no sign of life for {silent:.0f} s.{_last(peer.place)}")
            elif peer is not waiting:
                others.append(f"{peer.name} is at {peer.place or 'an unknown place'}")
        if waiting:
            others.insert(0, f"{_name(self.rank, self.world)} is at {_place(self._main)}")
        limit = f" for {self.limit:g} s (--rank_timeout, or the strategy's timeout)" if self.limit else ""
        more = f", and {len(others) - 8} more" if len(others) > 8 else ""
        return f"{who} waited{limit} for the other ranks in vain: {'; '.join(others[:8])}{more}. {RESUME}"

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
            except OSError:  # the connection is lost, which the reading side detects
                return

    def _leave(self, end: End) -> None:
        """End this process, because its main thread did not end by itself."""
        if not self._reaped:
            # In a thread, because writing to the console may block forever.
            saying = threading.Thread(target=_say, args=[end], daemon=True)
            saying.start()
            saying.join(2)
        for child in self.children.values():
            if child.poll() is None:
                child.kill()
        os._exit(end.code)


def _say(end: End) -> None:
    logger = logging.getLogger("rlhf_lightning")
    logger.error("%s", "interrupted" if end.code == 130 else f"error: {end.text}")
    for handler in logger.handlers:
        handler.flush()


def _says(error: BaseException, signs: tuple[str, ...]) -> bool:
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
    """Where a thread is: the innermost frame outside of libraries."""
    frame: FrameType | None = sys._current_frames().get(thread or 0)
    innermost = frame
    while frame is not None and _is_library(frame.f_code.co_filename):
        frame = frame.f_back
    frame = frame or innermost
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}" if frame else ""


def _is_library(file: str) -> bool:
    return "site-packages" in file or file.startswith(("<", str(Path(os.__file__).parent)))


def _listen(host: str) -> socket.socket:
    """A server socket for the ranks of the run, local to this machine if all of them are on it."""
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
            raise ConfigError(f"rank_timeout is {minutes}; it must be above 0 minutes, and at most a year")
        own = getattr(strategy, "_timeout", None)
        if own not in (None, default_pg_timeout, timedelta(minutes=minutes)):
            raise ConfigError(
                f"rank_timeout is {minutes:g} minutes, but trainer.strategy has timeout {own}: set only one of them"
            )
        strategy._timeout = timedelta(minutes=minutes)
    launcher = strategy.launcher
    if type(launcher) not in (type(None), _SubprocessScriptLauncher):
        return  # the ranks are forked by a process that waits for them
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
    """The error to raise for torch's exception about a process group that could not be created; None for any other."""
    text = str(error)
    within = f" within {limit:g} s (--rank_timeout, or the strategy's timeout)" if limit else ""
    if joined := re.search(r"(\d+)/(\d+) clients joined", text):
        return UserError(
            f"only {joined[1]} of {joined[2]} ranks have joined{within}. Start all of them, with the same MASTER_ADDR "
            "and MASTER_PORT; if the others ended, their output says why."
        )
    if place := re.search(r"trying to connect to \((.*?)\)", text):
        return UserError(f"rank 0 does not answer at {place[1]}{within}. Start it, or see its output if it ended.")
    if "connectFullMesh" in text:
        return UserError(
            f"another rank ended, or cannot be reached, before the run began ({text.splitlines()[0][:200]})"
        )
    return None


@contextmanager
def ranks_end_together() -> Iterator[None]:
    """Context of a command that names the rank that caused an exception, and leaves no started rank running.

    Raises:
        UserError: If another rank failed, died, hung, or was waited for in vain, or if a rank that this process started
            did not end properly.
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
    """Context of writing a file, in which the watching thread does not end this process."""
    _writing.append(None)
    try:
        yield
    finally:
        _writing.pop()
