"""`run` serves an app until it gets a signal to stop, and then answers all accepted requests."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from types import FrameType

import uvicorn

from fastbert.serving.app import make_app
from fastbert.serving.connection import connection_class
from fastbert.serving.logs import logger
from fastbert.serving.service import Service

BACKLOG = 1024
KEEP_ALIVE_SECONDS = 75  # longer than load balancers keep idle connections, so that they close first
ARRIVAL_SECONDS = 0.2  # the time for requests of the last accepted connections to arrive


class Server(uvicorn.Server):
    """A Server drains after a signal to stop: /ready answers no, and other requests are still answered.

    drain_seconds: the time of draining, in which a load balancer can notice it. After that no connection is accepted,
    and the process ends when all requests have their answers. A second signal ends the draining at once.
    """

    def __init__(self, service: Service, host: str, port: int, drain_seconds: float) -> None:
        limits = service.settings.limits
        seconds = limits.seconds + limits.body_seconds
        super().__init__(
            uvicorn.Config(
                make_app(service, self.stop), host=host, port=port, log_config=None, access_log=False, lifespan="on",
                backlog=BACKLOG, proxy_headers=False, timeout_graceful_shutdown=int(seconds) + 5, server_header=False,
                http=connection_class(limits.body_seconds), timeout_keep_alive=KEEP_ALIVE_SECONDS,
            )
        )  # fmt: skip
        self.service, self.drain_seconds = service, drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None

    def stop(self) -> None:
        """Ends the server without draining."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        address = self.servers[0].sockets[0].getsockname()
        logger.info("listening", extra={"fields": {"host": address[0], "port": address[1]}})

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for _ in range(3):  # the event loop accepts waiting connections
            await asyncio.sleep(0)
        for server in self.servers:
            server.close()
        await asyncio.sleep(ARRIVAL_SECONDS)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None:
            self.should_exit = True
        else:  # later, because this thread may hold a lock of the metrics
            self._loop.call_soon_threadsafe(self._stop_by, sig)

    def _stop_by(self, sig: int) -> None:
        is_ready = self.service.state == "ready"  # otherwise no load balancer sends requests yet
        self.service.drain()
        if is_ready and self.drain_seconds and self._loop is not None:
            self._loop.call_later(self.drain_seconds, self.stop)
            return
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


def run(service: Service, host: str, port: int, drain_seconds: float = 0.0) -> None:
    """Serves until SIGTERM or SIGINT. Raises the error of loading a model.

    A stop does not wait for a model that is being loaded: `service.abandoned` is true, and a thread still loads. Raises
    OSError, before any model is loaded, if the server cannot listen on the address.
    """
    server = Server(service, host, port, drain_seconds)
    try:
        server.run([server.config.bind_socket()])
    except (SystemExit, OverflowError) as error:  # uvicorn's and Python's errors if the server cannot listen
        raise OSError(f"cannot listen on {host}:{port}") from error
    if service.error is not None:
        raise service.error


class ServerThread:
    """A ServerThread runs a server in a thread, on a free port, for tests and notebooks."""

    def __init__(self, service: Service, host: str = "127.0.0.1", port: int = 0) -> None:
        self.server = Server(service, host, port, 0.0)
        self._thread = threading.Thread(target=self.server.run, name="fastbert-server", daemon=True)

    def start(self) -> ServerThread:
        """Starts the server, and returns when it is ready. Raises RuntimeError if a model cannot be loaded."""
        self._thread.start()
        while not (self.server.started and self.server.service.state == "ready"):
            self._thread.join(0.02)
            if not self._thread.is_alive():
                raise RuntimeError("the server did not start") from self.server.service.error
        return self

    def stop(self) -> None:
        """Stops the server after all requests have their answers."""
        self.server.stop()
        self._thread.join()

    def __enter__(self) -> ServerThread:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Returns the address of the server, without a slash at its end."""
        host, port = self.server.servers[0].sockets[0].getsockname()[:2]
        return f"http://{host}:{port}"
