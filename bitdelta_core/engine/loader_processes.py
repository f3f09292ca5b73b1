"""The engine's side of its loader processes: they are started, asked, started again when they die, and ended.

A process has one request at a time. What is asked for may be done twice, so when a process dies, its request goes to
its successor, once; then it fails. Any error on the way ends the process: an answer must not be taken for another's.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

from bitdelta_core.engine.loader_wire import Answer, Buffer, Request, Setup, receive, send
from bitdelta_core.engine.shared_memory import SharedMemory
from bitdelta_core.errors import DeltaUnavailable

log = logging.getLogger(__name__)
MODULE = "bitdelta_core.engine.loader_process"
NICENESS = 5
"""More than the engine's, whose steps and whose own start come first where cores are few"""
_RUN = "import os, runpy; os.nice({}); runpy.run_module('{}', run_name='__main__', alter_sys=True)"


class ProcessDied(Exception):
    """Before it had answered."""


class LoaderProcess:
    """One process. `call` is for one thread at a time."""

    def __init__(self, setup: Setup) -> None:
        """Does not wait until it has started."""
        self._setup = setup
        self._numbers = itertools.count(1)
        self._known: dict[int, weakref.ref[SharedMemory]] = {}
        self._unsure: list[int] = []
        """Of calls that failed"""
        """By key: what it has mapped"""
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = _launch(theirs, setup.threads)
        self.pid = self._process.pid
        assert self._process.stdout is not None
        threading.Thread(target=_log_lines, args=(self._process.stdout,), name="delta-load-log", daemon=True).start()
        self._calling = threading.RLock()
        self._end = weakref.finalize(self, _end, self._socket, self._process, self._calling)

    def call(
        self, name: str, *, memory: SharedMemory | None = None, files: Sequence[int] = (), **arguments: Any
    ) -> Any:
        """What `loader_process.Worker` returns. Blocks.

        Args:
            memory: passed as `buffer`
            files: descriptors of files, passed as `files`

        Raises:
            ProcessDied: the process has.
            Exception: what the method raised.
        """
        try:
            with self._calling:
                answer = self._exchange(name, memory, files, arguments)
        except (EOFError, ConnectionError) as error:
            self.close()
            raise ProcessDied(_how_it_ended(self._process)) from error
        except BaseException:
            self.close()
            raise
        if answer.error is not None:
            raise answer.error
        return answer.value

    def close(self) -> None:
        """At once, whatever it does: it holds nothing that is worth keeping. Any thread."""
        self._end()

    def _exchange(
        self, name: str, memory: SharedMemory | None, files: Sequence[int], arguments: dict[str, Any]
    ) -> Answer:
        if not self._end.alive:
            raise EOFError("it has been ended")
        number = next(self._numbers)
        if number == 1:
            send(self._socket, self._setup)
        gone = tuple(key for key, known in self._known.items() if known() is None)
        for key in gone:
            del self._known[key]
        gone, self._unsure = (*gone, *self._unsure), []
        buffer, descriptors = None, list(files)
        if memory is not None:
            buffer = Buffer(key=memory.key, nbytes=memory.nbytes, is_new=memory.key not in self._known)
            descriptors += [memory.fd] if buffer.is_new else []
            self._known[memory.key] = weakref.ref(memory)
        request = Request(number=number, call=name, arguments=arguments, buffer=buffer, forget=gone)
        send(self._socket, request, descriptors)
        received = receive(self._socket)
        if received is None:
            raise EOFError
        answer: Answer = received.value
        assert answer.number == number, "an answer to another request"
        if answer.error is not None and buffer is not None and buffer.is_new:
            del self._known[buffer.key]  # it may not have mapped it,
            self._unsure.append(buffer.key)  # and if it has, nobody else would tell it to let go
        return answer


class LoaderProcesses:
    """Several. Any thread may call."""

    def __init__(self, setup: Setup, count: int) -> None:
        self._setup = setup
        self._lock = threading.Lock()
        self._processes = [LoaderProcess(setup) for _ in range(count)]
        self._free: queue.LifoQueue[int] = queue.LifoQueue()
        """Indices; last used first"""
        self._closed = False
        self.restarts = 0
        for index in range(count):
            self._free.put(index)

    @property
    def count(self) -> int:
        return len(self._processes)

    def call(self, name: str, **arguments: Any) -> Any:
        """As `LoaderProcess.call`, of any process, once one is free.

        Raises:
            DeltaUnavailable: two processes died of it, or they are closed.
            Exception: what the method raised.
        """
        with self._borrowed() as index:
            for again in (True, False):
                try:
                    return self._processes[index].call(name, **arguments)
                except ProcessDied as died:
                    self._replace(index, died)
                    if not again:
                        raise DeltaUnavailable(f"the loader process has ended twice during {name}: {died}") from died

    def make_memory(self, nbytes: int) -> SharedMemory:
        """With pages."""
        memory = SharedMemory(nbytes)
        self.call("touch", memory=memory)
        return memory

    def close(self) -> None:
        """End them. Whoever waits for one gets DeltaUnavailable."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.close()

    def check_integrity(self) -> None:
        """Assert that no process is lent twice. Not while others call."""
        free = list(self._free.queue)
        assert sorted(free) == sorted(set(free)), "a process is free twice"
        assert set(free) <= set(range(len(self._processes)))

    @contextmanager
    def _borrowed(self) -> Iterator[int]:
        index = self._free.get()
        try:
            yield index
        finally:
            self._free.put(index)

    def _replace(self, index: int, died: ProcessDied) -> None:
        with self._lock:
            if self._closed:
                raise DeltaUnavailable("the engine has been closed") from died
            log.warning("a loader process has ended (%s) and is started again", died)
            self._processes[index] = LoaderProcess(self._setup)
            self.restarts += 1


def _launch(theirs: socket.socket, threads: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _RUN.format(NICENESS, MODULE), str(theirs.fileno())],
        env=_environment(threads),
        pass_fds=(theirs.fileno(),),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a Ctrl-C is for the engine, which ends it
    )


def _environment(threads: int) -> dict[str, str]:
    """Ours, without a GPU and with all the places where we find modules."""
    places = [path or os.getcwd() for path in sys.path]
    own = {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **own}


def _log_lines(stream: IO[bytes]) -> None:
    with stream:
        for line in stream:
            log.warning("loader process: %s", line.decode(errors="replace").rstrip())


def _end(sock: socket.socket, process: subprocess.Popen[bytes], calling: threading.RLock) -> None:
    with suppress(OSError):  # it has gone
        sock.shutdown(socket.SHUT_RDWR)  # wakes who waits for an answer
    process.kill()
    process.wait()
    with calling:  # nobody reads from a number that may soon be another file's
        sock.close()


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    if code is None or code >= 0:
        return f"exit status {code}"
    return f"killed by {signal.Signals(-code).name}"
