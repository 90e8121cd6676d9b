"""Limits bound the requests of one caller, and of all callers together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from fastbert.serving.errors import ApiError, ClientGone, invalid
from fastbert.serving.interruption import Interruption

if TYPE_CHECKING:
    from starlette.types import Receive

CHARACTERS = 16  # the most characters per token, on average over a request
LARGE_BODY = 2**16  # a body of so many bytes is parsed in a thread, not in the event loop


@dataclass(frozen=True)
class Limits:
    """A Limits holds the limits of a server. Raises ValueError for one that is not positive.

    body_bytes, texts: of one request. tokens: of one request, special tokens included. numbers: of an answer with token
    vectors or sparse vectors. queue_tokens: of waiting and running requests to one model; further requests are refused
    with 429. body_seconds: for the headers, for the body, and for a client to read a part of a long answer. seconds:
    from the end of the body to the answer.
    """

    body_bytes: int = 16 * 2**20
    texts: int = 2048
    tokens: int = 2**18
    numbers: int = 2**24
    queue_tokens: int = 2**19
    body_seconds: float = 30.0
    seconds: float = 60.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name}: got {getattr(self, field.name)}, expected a positive number")
        if self.tokens > self.queue_tokens:
            raise ValueError(f"tokens: got {self.tokens}, expected at most queue_tokens = {self.queue_tokens}")

    def check_characters(self, texts: Sequence[str]) -> None:
        """Raises ApiError 413 for texts that certainly have too many tokens, if all their tokens are needed."""
        if sum(map(len, texts)) > CHARACTERS * self.tokens:
            message = f"the texts have more than {CHARACTERS} times {self.tokens} characters"
            raise ApiError(413, "too_many_tokens", message)

    def check_numbers(self, n: int) -> None:
        """Raises ApiError 413 for an answer that is too large."""
        if n > self.numbers:
            message = f"the answer would have {n} numbers, expected at most {self.numbers}: ask for fewer texts at once"
            raise ApiError(413, "answer_too_large", message)


async def read_json(headers: Mapping[bytes, bytes], receive: Receive, limits: Limits) -> dict[str, Any]:
    """Returns the object in the body of a request. Raises ApiError for a body that is late, too large or no JSON.

    Raises ClientGone where the caller closes the connection. headers: by names in lower case.
    """
    content_type = headers.get(b"content-type", b"application/json").partition(b";")[0].strip().lower()
    if content_type != b"application/json":
        raise ApiError(415, "unsupported_media_type", "Content-Type: expected application/json")
    if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        raise ApiError(415, "unsupported_media_type", "Content-Encoding: expected none")
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length[:20]) > limits.body_bytes:
        raise _too_large(limits)
    message = f"the body did not arrive within {limits.body_seconds:g} seconds"
    with Interruption() as interrupt:
        interrupt.later(limits.body_seconds, ApiError(408, "body_timeout", message))
        data = await _read(receive, limits)
    return parse_object(data) if len(data) < LARGE_BODY else await asyncio.to_thread(parse_object, data)


async def _read(receive: Receive, limits: Limits) -> bytes:
    parts: list[bytes] = []
    n_bytes, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        more, n_bytes = message.get("more_body", False), n_bytes + len(parts[-1])
        if n_bytes > limits.body_bytes:
            raise _too_large(limits)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_large(limits: Limits) -> ApiError:
    return ApiError(413, "body_too_large", f"the body has more than {limits.body_bytes} bytes")


def parse_object(data: bytes) -> dict[str, Any]:
    """Returns the object in a body. Raises ApiError if the body is not a JSON object in UTF-8."""
    body = _parse(data)
    if not isinstance(body, dict):
        raise invalid("body", f"expected a JSON object, got {type_name(body)}")
    return body


def _parse(data: bytes) -> Any:
    try:
        return _DECODER.decode(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ApiError(400, "invalid_utf8", f"the body is not UTF-8: byte {error.start}") from None
    except json.JSONDecodeError as error:
        message = f"the body is not JSON: {error.msg} at character {error.pos}"
        raise ApiError(400, "invalid_json", message) from None
    except (RecursionError, ValueError):  # too deep nesting, NaN, or a number with thousands of digits
        message = "the body is not JSON that is read here: NaN, a very long number, or nested too deeply"
        raise ApiError(400, "invalid_json", message) from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def type_name(value: Any) -> str:
    """Returns JSON's name for the type of a value."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "a boolean"
    names: dict[type, str] = {int: "a number", float: "a number", str: "a string", list: "an array", dict: "an object"}
    return names[type(value)]
