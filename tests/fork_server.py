"""Python programs start as forks of a process that has imported PyTorch, where a test is not about their start.

`start` and `run` are `subprocess.Popen` and `subprocess.run` for `[sys.executable, "-m", MODULE, ...]`,
`[sys.executable, "-c", CODE, ...]` and `[sys.executable, SCRIPT, ...]`. What a program does, its signals and its exit
code are those of a process of its own; only the import of the libraries is missing, which takes 2 to 8 s. Ranks of
`torch.distributed.run` are forks as well.

As a program this file is the server: `python fork_server.py SOCKET MODULE ...`. It ends with the one that started it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TORCH = "torch", "torch.distributed.run", "numpy", "safetensors.torch", "tokenizers", "tqdm", "fastbert"
TRAINERS = *TORCH, "transformers.trainer", "sentence_transformers", "datasets", "accelerate"
COMPILER = "torch", "triton", "triton.backends.nvidia.compiler"
SERVER = "FASTBERT_TESTS_FORK_SERVER"  # the variable that names the socket to ranks of torch.distributed.run
# What libraries read while they are imported. Programs that want other values have another server.
READ_AT_IMPORT = "PYTHONHASHSEED", "OMP_NUM_THREADS", "TRITON_INTERPRET", "ATEN_CPU_CAPABILITY", "CUDA_VISIBLE_DEVICES"
NUMBER = struct.Struct("i")


def start(
    args: Sequence[Any], *, env: dict[str, str], modules: tuple[str, ...] = TORCH, **options: Any
) -> subprocess.Popen[Any]:
    """Does what `subprocess.Popen` does, by a fork of a server that has imported the modules."""
    if sys.platform != "linux":
        return subprocess.Popen(args, env=env, **options)
    address = os.environ.get(SERVER) or _server(modules, tuple((name, env.get(name)) for name in READ_AT_IMPORT))
    return _Forked(address, args, env=env, **options)


def run(args: Sequence[Any], *, timeout: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """Does what `subprocess.run` does, with the output as text."""
    with start(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(args, process.returncode, output, errors)


class _Forked(subprocess.Popen[Any]):
    """This is a program that a server has forked. The server sends its number, and at its end its exit code."""

    def __init__(self, address: str, args: Sequence[Any], **options: Any) -> None:
        self._address = address
        super().__init__(args, **options)

    def _execute_child(self, args: Any, *others: Any) -> None:  # type: ignore[override]
        cwd, env, own_session = others[4], others[5], others[20]
        program, *arguments = map(os.fspath, args)
        assert program == sys.executable, f"expected Python, got {program}"
        request = {"arguments": arguments, "cwd": os.fspath(cwd or os.getcwd()), "env": env, "own_session": own_session}
        streams = [fd if fd != -1 else place for place, fd in enumerate((others[9], others[12], others[14]))]
        self._status, status = os.pipe()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            server.connect(self._address)
            socket.send_fds(server, [json.dumps(request).encode()], [*streams, status])
        os.close(status)
        self.pid = self._receive()
        self._child_created = True
        self._close_pipe_fds(*others[9:15])  # type: ignore[attr-defined]

    def _receive(self) -> int:
        return NUMBER.unpack(os.read(self._status, NUMBER.size))[0]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if wait_flags and not select.select([self._status], [], [], 0)[0]:
            return 0, 0
        status = self._receive()
        os.close(self._status)
        return self.pid, status

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(False):  # type: ignore[attr-defined]
            try:
                pid, status = (0, 0) if self.returncode is not None else self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode


@functools.cache
def _server(modules: tuple[str, ...], settings: tuple[tuple[str, str | None], ...]) -> str:
    """The socket of a server, which is started once for each set of modules and settings."""
    folder = tempfile.mkdtemp(prefix="fastbert-fork-")
    address = os.path.join(folder, "socket")
    environment = {name: value for name, value in os.environ.items() if name not in READ_AT_IMPORT}
    environment |= {name: value for name, value in settings if value is not None}
    root = Path(__file__).resolve().parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "kernels")])
    line = [sys.executable, __file__, address, *modules]
    process = subprocess.Popen(line, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(process.stdin.close)
    assert process.stdout.read(1) == b".", f"the server ended with {process.wait()}"
    process.stdout.close()
    return address


def serve(address: str, modules: Sequence[str]) -> Callable[[], object]:
    """Forks a process for each request. In that process it returns the program to run."""
    own_path = sys.path[1:]  # without the folder of this file
    for name in modules:
        importlib.import_module(name)
    if "triton" in modules:
        importlib.import_module("triton.runtime.cache").triton_key()  # It reads 400 MB, once in a process.
    sys.modules.pop("torch.distributed.run", None)  # It is run as __main__.
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    os.write(1, b".")
    running: dict[int, int] = {}  # where the exit code of each process is sent
    while True:
        ready = select.select([listener, woken, 0], [], [])[0]
        if 0 in ready:
            os._exit(0)
        if woken in ready:
            os.read(woken, 4096)
            _send_exit_codes(running)
        if listener not in ready:
            continue
        connection, _ = listener.accept()
        message, fds, _, _ = socket.recv_fds(connection, 1 << 20, 4)
        connection.close()
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            listener.close()
            for place, fd in enumerate(fds[:3]):
                os.dup2(fd, place)
            for fd in (*fds, *running.values(), woken, wake):
                os.close(fd)
            return _program(json.loads(message), address, own_path)
        for fd in fds[:3]:
            os.close(fd)
        running[pid] = fds[3]
        os.write(fds[3], NUMBER.pack(pid))


def _send_exit_codes(running: dict[int, int]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        fd = running.pop(pid)
        with contextlib.suppress(BrokenPipeError):  # Nobody waits for it any more.
            os.write(fd, NUMBER.pack(status))
        os.close(fd)


def _program(request: dict[str, Any], address: str, path: list[str]) -> Callable[[], object]:
    """Makes this process what the request asks for."""
    if request["own_session"]:
        os.setsid()
    os.chdir(request["cwd"])
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(request["env"], **{SERVER: address})
    arguments = [word for word in request["arguments"] if word != "-u"]
    option = arguments.pop(0) if arguments[0] in ("-m", "-c") else None
    program, *sys.argv[1:] = arguments
    sys.argv[0] = option or program
    first = os.getcwd() if option else str(Path(program).resolve().parent)
    theirs = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [first, *filter(None, theirs), *(folder for folder in path if folder not in before)]
    if program == "torch.distributed.run":
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        subprocess_handler.Popen = start  # type: ignore[assignment]
    if option == "-c":
        return functools.partial(exec, compile(program, "<string>", "exec"), {"__name__": "__main__"})
    if option == "-m":
        return functools.partial(runpy.run_module, program, run_name="__main__", alter_sys=True)
    return functools.partial(runpy.run_path, program, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])()
