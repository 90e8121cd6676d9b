"""An ApiError is an error answer in OpenAI's format."""

from __future__ import annotations

from typing import Any

INVALID, OVERLOADED, SERVER = "invalid_request_error", "overloaded_error", "server_error"


class ApiError(Exception):
    """An ApiError has an HTTP status and a message for the caller. The message contains no text of a request.

    code: an identifier for programs. param: the name of the wrong field. retry_after: seconds.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        """Returns the type of the error: overload, a failure of the server, or an invalid request."""
        if self.status in (429, 503):
            return OVERLOADED
        return SERVER if self.status >= 500 else INVALID

    @property
    def body(self) -> dict[str, Any]:
        """Returns the object to send."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Returns the headers for the status."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return {**headers, "WWW-Authenticate": "Bearer"} if self.status == 401 else headers


class ClientGone(Exception):
    """A ClientGone ends a call whose caller has closed the connection."""


def invalid(param: str, message: str) -> ApiError:
    """Returns the error of a field with an invalid value."""
    return ApiError(400, "invalid_value", f"{param}: {message}", param=param)
