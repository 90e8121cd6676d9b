"""A Pool runs one function on several devices, with one process for each, and returns the results.

The function and its weights are written to a file once, and every process maps this file, so memory holds the weights
once. Each process has its own pipe, and a thread in the calling process that sends jobs and waits for results.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import signal
import tempfile
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from multiprocessing.connection import wait
from typing import Any, Protocol

import torch

from fastbert.checks import expect
from fastbert.pipelines.messages import from_message, to_message
from fastbert.threads import processor_limit, set_threads

logger = logging.getLogger("fastbert")

AHEAD = {"cpu": 2, "cuda": 3}  # jobs that a process has at once: it need not wait for the next one
STOP_SECONDS = 5.0  # until a process that does not end is killed


class Work(Protocol):
    """A `Work` is the function that the processes of a pool run. It can be pickled."""

    def to(self, device: torch.device) -> Any:
        """Moves the weights to the device of a process."""

    def __call__(self, job: Any) -> Any:
        """Returns tensors, or lists, tuples and dicts of them, for one job."""


class WorkerDied(RuntimeError):
    """A `WorkerDied` says that a process of a pool ended by itself or was killed. The pool cannot be used any more."""


class RemoteTraceback(Exception):
    """A `RemoteTraceback` is the cause of an error from another process, and holds its traceback."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n\n{self.text.rstrip()}"


def default_devices() -> list[str]:
    """Returns every GPU, or without a GPU the CPU four times, as sentence-transformers does."""
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else ["cpu"] * 4


def as_devices(name: str, devices: Any) -> list[torch.device]:
    """Returns the devices of a list.

    Raises ValueError for an empty list, for GPUs and CPUs together, and for a GPU that this machine does not have.
    """
    expect(isinstance(devices, (list, tuple)) and len(devices) > 0, name, devices, "a list of at least one device")
    parsed = [torch.device(device) for device in devices]
    types = sorted({device.type for device in parsed})
    expect(len(types) == 1, name, [str(device) for device in parsed], "devices of one type: others compute other bits")
    if types == ["cuda"]:  # checked here, and not in a process that is started for it
        n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for device in parsed:
            expect((device.index or 0) < n_gpus, name, str(device), f"one of the {n_gpus} GPUs that PyTorch finds here")
    return parsed


def shares(n_workers: int) -> list[tuple[int, set[int] | None]]:
    """Returns the number of threads of each process, and the processors that it is pinned to, None for all.

    They share the threads of this process, within `processor_limit`. Processes are pinned if each can have its own
    processors. If a quota of processor time is the limit, they are not pinned, because it does not name processors.
    """
    limit = processor_limit().n_processors
    n_threads = min(torch.get_num_threads(), limit)
    numbers = [max(1, (n_threads + i) // n_workers) for i in reversed(range(n_workers))]
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if limit != len(allowed) or sum(numbers) > limit:
        return [(number, None) for number in numbers]
    ends = [sum(numbers[: i + 1]) for i in range(n_workers)]
    return [(number, set(allowed[end - number : end])) for number, end in zip(numbers, ends, strict=True)]


class Pool:
    """A Pool has a process for each of its devices. It is a context manager, which stops them at the end.

    devices: devices of one type; the list may hold the CPU several times. owner: the object whose work it does.
    Processes start with `start`, or at the beginning of a `with` statement. They end with the pool, and with the
    process that started them.
    """

    def __init__(self, devices: Sequence[Any], work: Work, owner: object) -> None:
        self.devices = as_devices("device", devices)
        self.owner = weakref.ref(owner)
        self._work: Work | None = work
        self._crew: _Crew | None = None

    @property
    def device(self) -> torch.device:
        """Returns the first of the devices."""
        return self.devices[0]

    def start(self) -> Pool:
        """Starts the processes and waits until each has the weights. Raises the error of a process."""
        if self._crew is None:
            expect(self._work is not None, "pool", "a stopped one", "one that runs: start another")
            logger.info("pool: starting processes on %s", ", ".join(map(str, self.devices)))
            crew = _Crew(self.devices)
            weakref.finalize(self, crew.stop)
            try:
                crew.start(self._work)
            except BaseException:
                crew.stop()
                raise
            self._crew, self._work = crew, None
        return self

    def stop(self) -> None:
        """Ends the processes. Jobs without an answer raise WorkerDied. A stopped pool may be stopped again."""
        self._work = None
        if self._crew is not None:
            self._crew.stop()

    def submit(self, job: Any) -> Future[Any]:
        """Gives a job to the first free process. Raises WorkerDied if a process has ended."""
        assert self._crew is not None, "start() comes first"
        return self._crew.submit(job)

    def __enter__(self) -> Pool:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def __getitem__(self, key: str) -> Any:
        """Returns the processes for "processes", as the pools of sentence-transformers do, which are dicts."""
        if key != "processes":
            raise KeyError(f"{key!r}: a pool of fastbert has only the key 'processes'; encode(pool=...) uses it")
        return [] if self._crew is None else list(self._crew.processes)


class _Crew:
    """A `_Crew` holds the processes of a pool, and a thread for each. Threads refer to it, and not to the pool."""

    def __init__(self, devices: list[torch.device]) -> None:
        self.devices = devices
        self.processes: list[Any] = []
        self.connections: list[Any] = []
        self.threads: list[threading.Thread] = []
        self.jobs: queue.SimpleQueue[tuple[bytes, Future[Any]] | None] = queue.SimpleQueue()
        self.failure: WorkerDied | None = None
        self.stopped = False

    def start(self, work: Any) -> None:
        context = torch.multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory(prefix="fastbert-pool-") as folder:
            path = os.path.join(folder, "work.pt")
            try:
                torch.save(work, path)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise TypeError(f"pool: the model cannot be pickled for other processes: {error}") from error
            for device, (n_threads, processors) in zip(self.devices, shares(len(self.devices)), strict=True):
                ours, its = context.Pipe()
                pinned = processors if device.type == "cpu" else None
                process = context.Process(target=_serve, args=(its, path, str(device), n_threads, pinned), daemon=True)
                process.start()
                its.close()
                self.processes.append(process)
                self.connections.append(ours)
            for i in range(len(self.processes)):
                self._receive(i, starting=True)
        for i in range(len(self.processes)):
            thread = threading.Thread(target=self._attend, args=(i,), name=f"fastbert-pool-{i}", daemon=True)
            thread.start()
            self.threads.append(thread)

    def submit(self, job: Any) -> Future[Any]:
        if self.failure is not None:
            raise self.failure
        future: Future[Any] = Future()
        self.jobs.put((pickle.dumps(to_message(job), pickle.HIGHEST_PROTOCOL), future))
        return future

    def stop(self) -> None:
        self.failure = self.failure or WorkerDied("pool: it was stopped")
        self.stopped = True
        for process in self.processes:
            if process.is_alive():
                process.terminate()
        for process in self.processes:
            process.join(STOP_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        for _ in self.threads:
            self.jobs.put(None)
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join(STOP_SECONDS)
        for connection in self.connections:
            connection.close()

    def _attend(self, i: int) -> None:
        """Sends jobs to a process, takes its answers, and ends with it."""
        waiting: deque[Future[Any]] = deque()
        try:
            while True:
                if self._may_send(i, len(waiting)):
                    try:
                        job = self.jobs.get(block=not waiting)
                    except queue.Empty:
                        job = None
                    if job is None and not waiting:
                        return
                    if job is not None:
                        self._send(i, *job, waiting)
                        continue
                result, error = self._receive(i)
                future = waiting.popleft()
                future.set_result(result) if error is None else future.set_exception(error)
        except WorkerDied as error:
            self.failure = self.failure or error
            for future in waiting:
                future.set_exception(self.failure)
            self._refuse()

    def _may_send(self, i: int, n_waiting: int) -> bool:
        """Tells whether a process may get one more job. A process without a job has priority."""
        if n_waiting == 0:
            return True
        return n_waiting < AHEAD.get(self.devices[i].type, AHEAD["cuda"]) and self.jobs.qsize() >= len(self.processes)

    def _send(self, i: int, job: bytes, future: Future[Any], waiting: deque[Future[Any]]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        waiting.append(future)
        if self.failure is not None:
            raise self.failure
        try:
            self.connections[i].send_bytes(job)
        except OSError:
            raise self._died(i) from None

    def _receive(self, i: int, starting: bool = False) -> tuple[Any, BaseException | None]:
        """Waits for the answer of a process: its result, or its error. Raises WorkerDied if the process has ended."""
        connection, process = self.connections[i], self.processes[i]
        try:
            if connection not in wait([connection, process.sentinel]):
                raise EOFError
            message = connection.recv()
        except (EOFError, OSError):
            raise self._died(i, starting) from None
        if message[0] == "result":
            return from_message(message[1]), None
        error = _error_of(message[1], message[2], self.devices[i])
        if starting:
            raise error
        return None, error

    def _died(self, i: int, starting: bool = False) -> WorkerDied:
        process = self.processes[i]
        process.join(STOP_SECONDS)
        code = process.exitcode
        ending = "was closed" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            ending = f"was ended by {signal.Signals(-code).name}"
        hint = "stop the pool and start another"
        if starting:
            line = "if __name__ == '__main__':"
            hint = f"a script that starts processes must be a file, and needs the line `{line}` around its main code"
        return WorkerDied(
            f"pool: process {i} of {len(self.processes)} ({self.devices[i]}, pid {process.pid}) {ending}; {hint}"
        )

    def _refuse(self) -> None:
        """Fails the jobs that no process will take."""
        while True:
            try:
                job = self.jobs.get_nowait()
            except queue.Empty:
                break
            if job is not None and job[1].set_running_or_notify_cancel():
                job[1].set_exception(self.failure)
        if not self.stopped:
            for _ in self.threads:  # each wakes up, and ends
                self.jobs.put(None)


def _error_of(pickled: bytes | None, text: str, device: torch.device) -> BaseException:
    """Returns the error of a process, with its traceback there as its cause."""
    error: BaseException = RuntimeError(f"pool: a process on {device} failed")
    if pickled is not None:
        error = pickle.loads(pickled)
    error.__cause__ = RemoteTraceback(text)
    return error


def _serve(connection: Any, path: str, device_name: str, n_threads: int, processors: set[int] | None) -> None:
    """Answers jobs in a separate process, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one gets the signal, too, and stops it
    try:
        if processors is not None:
            os.sched_setaffinity(0, processors)
        set_threads(n_threads)
        device = torch.device(device_name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        work = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        work.to(device)
        connection.send(("result", None))
    except Exception as error:
        connection.send(_failure(error))
        return
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read_jobs, args=(connection, jobs), daemon=True).start()
    try:
        _answer(connection, jobs, work, device)
    except OSError:
        return  # the caller has gone


def _read_jobs(connection: Any, jobs: queue.SimpleQueue[Any]) -> None:
    """Takes jobs out of the pipe as they come, and None at its end.

    The process on the other side may send a job while this one sends a result. If neither read, both would wait for
    ever: a pipe holds less than a job.
    """
    while True:
        try:
            jobs.put(connection.recv())
        except (EOFError, OSError):
            jobs.put(None)
            return


def _answer(connection: Any, jobs: queue.SimpleQueue[Any], work: Work, device: torch.device) -> None:
    """Answers job after job. On a GPU the next job is launched before the results of this one are read."""
    waiting: Any = None
    while True:
        if waiting is not None and (device.type == "cpu" or jobs.empty()):
            connection.send(waiting())
            waiting = None
        message = jobs.get()
        if message is None:
            return
        answer = _compute(work, from_message(message))
        if waiting is not None:
            connection.send(waiting())
        waiting = answer


def _compute(work: Work, job: Any) -> Any:
    """Returns a function that gives the message with the result of a job, or with its error."""
    try:
        result = work(job)
    except Exception as error:
        failure = _failure(error)
        return lambda: failure

    def message() -> Any:
        try:
            return "result", to_message(result)
        except Exception as error:  # an error of a kernel appears when its result is read
            return _failure(error)

    return message


def _failure(error: BaseException) -> tuple[str, bytes | None, str]:
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:
        return "error", None, text
    return "error", pickled, text
