"""A Connection is uvicorn's with limits of time and memory for slow clients."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from fastbert.serving.answers import dump
from fastbert.serving.errors import ApiError

HEAD_BYTES = 2**16  # the largest head of a request


def connection_class(seconds: float) -> Any:
    """Returns the class of a server's connections. seconds: the time limit for the head of a request."""
    return type("BoundedConnection", (Connection,), {"seconds": seconds})


class Connection(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
    """A Connection refuses data that are not HTTP, and a head that is late or too large, in OpenAI's format.

    It closes without an answer if nothing arrived, or if the client does not read. seconds: the time limit for the
    head, and for a client to read a part of the data that wait to be sent.
    """

    seconds = 30.0
    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None
    _n_head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._end_reading()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        last = self.cycle
        super().data_received(data)
        if self.transport.is_closing() or self.cycle is not last or not (last is None or last.response_complete):
            self._end_head()  # the head is complete, and these data may be the body
            return
        self._n_head_bytes += len(data)
        if self._n_head_bytes > HEAD_BYTES:
            self._refuse(ApiError(431, "headers_too_large", f"the headers have more than {HEAD_BYTES} bytes"))
        elif self._head_timer is None:
            self._await_head()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.seconds, self._refuse_late_head)

    def _end_head(self) -> None:
        self._n_head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse_late_head(self) -> None:
        if self._n_head_bytes:
            message = f"the headers did not arrive within {self.seconds:g} seconds"
            self._refuse(ApiError(408, "headers_timeout", message))
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answers data that are not HTTP. uvicorn calls this method."""
        self._refuse(ApiError(400, "invalid_http", "the request is not HTTP/1.1"))

    def _refuse(self, error: ApiError) -> None:
        if self.transport.is_closing():
            return
        body = dump(error.body)
        lines = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", "content-type: application/json",
            f"content-length: {len(body)}", "connection: close", "", "",
        )  # fmt: skip
        self.transport.write("\r\n".join(lines).encode("ascii") + body)
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._end_reading()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end_reading()

    def _await_reader(self) -> None:
        n_waiting = self.transport.get_write_buffer_size()
        self._read_timer = self.loop.call_later(self.seconds, self._check_reader, n_waiting)

    def _check_reader(self, n_waiting: int) -> None:
        if self.transport.get_write_buffer_size() < n_waiting:
            self._await_reader()
        else:
            self.transport.abort()

    def _end_reading(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None
