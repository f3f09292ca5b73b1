"""Loader processes: what passes between, what leaks, and who dies of what."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from bitdelta_core.engine import loader_processes
from bitdelta_core.engine.accelerator import Plain
from bitdelta_core.engine.delta_loader import ProcessLoader
from bitdelta_core.engine.host_buffers import SMALLEST, HostBuffers
from bitdelta_core.engine.loader_processes import LoaderProcess, LoaderProcesses, ProcessDied
from bitdelta_core.engine.loader_wire import MAX_DESCRIPTORS, receive, send
from bitdelta_core.engine.shared_memory import SharedMemory, mapped
from bitdelta_core.errors import DeltaUnavailable
from tests.tiny import make_base
from tests.unit.loader_harness import CPU, Place, ThreadedProcess, filled, host_buffers, process_loader


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    work = tmp_path_factory.mktemp("place")
    base = make_base(work / "base", num_hidden_layers=2, hidden_size=44, intermediate_size=90)
    return Place(base, work, device="cpu")


@pytest.fixture(scope="module")
def processes(place: Place) -> Iterator[LoaderProcesses]:
    """One real process; tests may kill it."""
    one = LoaderProcesses(place.setup(), 1)
    yield one
    one.close()


@pytest.fixture
def threaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_processes, "_launch", ThreadedProcess)


def descriptors(pid: int | str = "self") -> list[str]:
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return sorted(found)


def memories(pid: int | str = "self") -> int:
    """Mapped ones."""
    return Path(f"/proc/{pid}/maps").read_text().count("bitdelta-host-buffer")


def test_messages_of_any_size_and_their_descriptors() -> None:
    ours, theirs = socket.socketpair()
    values = [None, b"x" * 5_000_000, {"a": (1, 2)}, b""]

    def write() -> None:
        for i, value in enumerate(values):
            memory = SharedMemory(100 + i)
            send(ours, value, [memory.fd] * (i % 2))
        ours.close()

    writer = threading.Thread(target=write)
    writer.start()
    for i, value in enumerate(values):
        got = receive(theirs)
        assert got is not None
        assert (got.value, len(got.descriptors)) == (value, i % 2)
        for descriptor in got.descriptors:
            assert mapped(descriptor, 100 + i).numel() == 100 + i
            os.close(descriptor)
    assert receive(theirs) is None
    writer.join()
    theirs.close()


def test_a_message_that_is_cut_short() -> None:
    whole = pickle.dumps(b"x" * 100)
    for cut in (3, 8, 50):
        ours, theirs = socket.socketpair()
        ours.sendall((len(whole).to_bytes(8, "little") + whole)[:cut])
        ours.close()
        with theirs, pytest.raises(EOFError):
            receive(theirs)


def test_more_descriptors_than_a_message_takes() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(OSError, match="at most"):
        send(ours, None, [0] * (MAX_DESCRIPTORS + 1))


def test_both_sides_see_one_memory(processes: LoaderProcesses) -> None:
    memory = SharedMemory(SMALLEST)
    memory.bytes_.fill_(7)
    processes.call("touch", memory=memory)
    assert (memory.bytes_ == 0).all()


def test_steps_come_first(processes: LoaderProcesses) -> None:
    """Where cores are few, the engine's process has them."""
    processes.call("touch", memory=SharedMemory(SMALLEST))
    ours, theirs = (os.getpriority(os.PRIO_PROCESS, pid) for pid in (0, processes._processes[0].pid))
    assert theirs == min(19, ours + loader_processes.NICENESS)


def test_nothing_leaks(place: Place, processes: LoaderProcesses) -> None:
    """Neither descriptors nor memory, here or there, of many loads, failed ones among them."""
    loader, hosts = ProcessLoader(processes), host_buffers(processes)
    bad = place.deltas["sign"].parent / "nothing"

    def load() -> None:
        filled(loader, place.deltas["sign"], hosts)
        loader.open(place.deltas["lora"])  # never filled
        with pytest.raises(Exception, match="cannot be read"):
            loader.open(bad)

    load()
    pid = processes._processes[0].pid
    deadline = time.monotonic() + 30
    while len(hosts._kept) < 2:  # the second buffer is made in the background
        assert time.monotonic() < deadline
        time.sleep(0.01)
    before = descriptors(), descriptors(pid), memories(), memories(pid)
    for _ in range(10):
        load()
    gc.collect()
    assert (descriptors(), descriptors(pid), memories(), memories(pid)) == before


def test_memory_goes_in_both_processes(processes: LoaderProcesses) -> None:
    processes.call("touch", memory=SharedMemory(SMALLEST))
    pid = processes._processes[0].pid
    before, undone = memories(pid), []
    memory = SharedMemory(SMALLEST)
    memory.when_freed(lambda: undone.append(True))
    processes.call("touch", memory=memory)
    assert memories(pid) == before
    gc.collect()
    here = memories()
    del memory
    gc.collect()
    assert (memories(), undone) == (here - 1, [True])
    processes.call("touch", memory=SharedMemory(SMALLEST))
    assert memories(pid) == before


def test_a_process_that_is_killed_is_started_again(place: Place, processes: LoaderProcesses) -> None:
    """Between loads and in the middle of one: nobody notices."""
    loader, hosts = ProcessLoader(processes), host_buffers(processes)
    expected = filled(place.threads(), place.deltas["dense"])
    opened = loader.open(place.deltas["dense"])
    before = processes.restarts
    os.kill(processes._processes[0].pid, signal.SIGKILL)
    host = hosts.take(opened.layout.nbytes)
    host.bytes_.fill_(0xA5)
    opened.fill(host)
    assert torch.equal(host.bytes_, expected)
    os.kill(processes._processes[0].pid, signal.SIGSTOP)
    killer = threading.Timer(0.2, os.kill, (processes._processes[0].pid, signal.SIGKILL))
    killer.start()
    assert torch.equal(filled(loader, place.deltas["dense"], hosts), expected)
    assert processes.restarts == before + 2
    processes.check_integrity()


def test_what_kills_every_process_fails(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def dying(self: LoaderProcess, name: str, **_: object) -> None:
        nonlocal calls
        calls += 1
        self.close()
        raise ProcessDied("killed by SIGSEGV")

    monkeypatch.setattr(loader_processes, "_launch", ThreadedProcess)
    monkeypatch.setattr(LoaderProcess, "call", dying)
    processes = LoaderProcesses(place.setup(), 1)
    with pytest.raises(DeltaUnavailable, match=r"ended twice during open: killed by SIGSEGV"):
        ProcessLoader(processes).open(place.deltas["sign"])
    assert calls == 2
    processes.close()


def test_a_process_that_cannot_start_says_so(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loader_processes, "MODULE", "bitdelta_core.no_such_module")
    processes = LoaderProcesses(place.setup(), 1)
    with pytest.raises(DeltaUnavailable, match="exit status 1"):
        processes.call("open", path="x")
    processes.close()
    deadline = time.monotonic() + 20
    while "no_such_module" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "loader process: " in caplog.text
    assert "no_such_module" in caplog.text


@pytest.mark.usefixtures("threaded")
def test_an_interrupted_call_leaves_no_answer_for_the_next(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to a fill that nobody waited for must not be taken for that to another."""
    processes, loader = process_loader(place)
    process = processes._processes[0]

    def interrupted(sock: socket.socket) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loader_processes, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loader.open(place.deltas["sign"])
    with pytest.raises(ProcessDied):
        process.call("open", path="x")
    expected = place.threads().open(place.deltas["lora"]).layout.nbytes
    assert loader.open(place.deltas["lora"]).layout.nbytes == expected
    assert processes.restarts == 1
    processes.close()


@pytest.mark.usefixtures("threaded")
def test_a_buffer_that_could_not_be_mapped_is_sent_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    processes, memory = LoaderProcesses(place.setup(), 1), SharedMemory(SMALLEST)

    def full(fd: int, nbytes: int) -> torch.Tensor:
        raise OSError("no room in the address space")

    with monkeypatch.context() as patch:
        patch.setattr("bitdelta_core.engine.loader_process.mapped", full)
        with pytest.raises(OSError, match="no room"):
            processes.call("touch", memory=memory)
    memory.bytes_.fill_(7)
    processes.call("touch", memory=memory)
    assert (memory.bytes_ == 0).all()
    assert processes.restarts == 0
    processes.close()


def test_memory_of_a_call_that_failed_goes_in_both_processes(place: Place, processes: LoaderProcesses) -> None:
    processes.call("touch", memory=SharedMemory(SMALLEST))
    pid = processes._processes[0].pid
    before = memories(pid)
    for _ in range(3):
        with pytest.raises(TypeError):
            processes.call("touch", memory=SharedMemory(SMALLEST), unheard_of=True)
    processes.call("touch", memory=SharedMemory(SMALLEST))
    assert memories(pid) == before


@pytest.mark.usefixtures("threaded")
def test_closing_ends_whoever_waits(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, gate, errors = threading.Event(), threading.Event(), []

    def slow(*_: object, **__: object) -> None:
        entered.set()
        gate.wait(20)

    monkeypatch.setattr("bitdelta_core.engine.loader_process.Worker.open", slow)
    processes, loader = process_loader(place)

    def wait() -> None:
        with pytest.raises(DeltaUnavailable, match="closed") as caught:
            loader.open(place.deltas["sign"])
        errors.append(caught.value)

    waiting = [threading.Thread(target=wait) for _ in range(3)]
    for thread in waiting:
        thread.start()
    assert entered.wait(20)
    threading.Timer(0.1, gate.set).start()
    processes.close()
    for thread in waiting:
        thread.join(20)
    assert len(errors) == 3
    with pytest.raises(DeltaUnavailable, match="closed"):
        loader.open(place.deltas["sign"])
    processes.check_integrity()


def gone(pid: int) -> bool:
    """Within a while. A zombie has gone."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_processes_end_with_ours_and_when_they_are_forgotten(place: Place) -> None:
    """Killed without a word, in the middle of their start: they find the socket closed."""
    script = """
        import pickle, sys, time
        from bitdelta_core.engine.loader_processes import LoaderProcesses
        processes = LoaderProcesses(pickle.loads(bytes.fromhex(sys.stdin.readline())), 1)
        print(processes._processes[0].pid, flush=True)
        time.sleep(60)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdin.write(pickle.dumps(place.setup()).hex() + "\n")
    parent.stdin.flush()
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    forgotten = LoaderProcesses(place.setup(), 1)
    pid = forgotten._processes[0].pid
    del forgotten
    gc.collect()
    assert gone(pid)
    assert gone(child)


@pytest.mark.usefixtures("threaded")
def test_buffers_are_made_ahead_and_pinned(place: Place) -> None:
    """As many as are kept, once for each size, and unpinned when they go."""
    pinned, unpinned = [], []

    class Pinning(Plain):
        def pin(self, host: torch.Tensor) -> object:  # pyright: ignore[reportIncompatibleMethodOverride]
            pinned.append(host.numel())
            return lambda: unpinned.append(host.numel())

    processes = LoaderProcesses(place.setup(), 1)
    hosts = HostBuffers(Pinning(CPU), keep=3, make_memory=processes.make_memory)
    for nbytes in (1000, 2000, SMALLEST + 1):
        hosts.expect(nbytes)
    deadline = time.monotonic() + 20
    while len(pinned) < 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert sorted(pinned) == [SMALLEST] * 3 + [2 * SMALLEST] * 3
    taken = [hosts.take(10) for _ in range(3)]
    assert hosts.made == 6
    assert len({buffer.shared.key for buffer in taken if buffer.shared}) == 3
    for buffer in [*taken, hosts.take(10)]:
        hosts.give_back(buffer)
        hosts.check_integrity()
    assert (hosts.made, unpinned) == (7, [])
    del taken, buffer
    gc.collect()
    assert unpinned == [SMALLEST], "the fourth is not kept"
    lent = hosts.take(10)
    hosts.close()
    gc.collect()
    assert len(unpinned) == len(pinned) - 1, "one is lent"
    hosts.give_back(lent)
    del lent
    gc.collect()
    assert sorted(unpinned) == sorted(pinned)
    processes.close()
