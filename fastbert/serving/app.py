"""This module holds the ASGI app. It checks, counts, answers and logs each request in one place."""

from __future__ import annotations

import asyncio
import re
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fastbert.serving import openapi, routes
from fastbert.serving.answers import dump, dump_in_pieces
from fastbert.serving.batcher import log_exception
from fastbert.serving.calls import Call
from fastbert.serving.errors import ApiError, ClientGone
from fastbert.serving.limits import read_json
from fastbert.serving.logs import logger
from fastbert.serving.schemas import Fields
from fastbert.serving.service import Service

Handler = Callable[[Call], Awaitable[Any]]

GONE = 499  # only for the log and the metrics
FEW_TEXTS, FEW_TOKENS = 16, 512  # their answer is written faster than a thread starts
_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_JSON = (b"content-type", b"application/json")


class Endpoint(NamedTuple):
    """An Endpoint is a route that requires the API key. GET routes have no body."""

    method: str
    path: str
    handler: Handler


ENDPOINTS = (
    Endpoint("GET", "/v1/models", routes.list_models),
    Endpoint("GET", "/v1/models/{name:path}", routes.get_model),
    Endpoint("POST", "/v1/embeddings", routes.embeddings),
    Endpoint("POST", "/embed", routes.embed),
    Endpoint("POST", "/embed_all", routes.embed_all),
    Endpoint("POST", "/embed_sparse", routes.embed_sparse),
    Endpoint("POST", "/similarity", routes.similarity),
    Endpoint("POST", "/rerank", routes.rerank),
    Endpoint("POST", "/predict", routes.predict),
    Endpoint("POST", "/entities", routes.entities),
    Endpoint("POST", "/tokenize", routes.tokenize),
    Endpoint("POST", "/decode", routes.decode),
    Endpoint("POST", "/", routes.root),
    Endpoint("GET", "/info", routes.info),
)


def make_app(service: Service, on_failure: Callable[[], None] = lambda: None) -> App:
    """Returns the app of a service. Its models are loaded when the server starts. /health answers during this time.

    on_failure: is called if a model cannot be loaded; `service.error` has the reason.
    """

    def load() -> None:
        try:
            service.load()
        except BaseException:
            on_failure()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # Python does not wait for a daemon thread at exit, so a stop does not wait for a model that is being loaded.
        threading.Thread(target=load, name="fastbert-load", daemon=True).start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    first = next(iter(service.loaders), openapi.MODEL)
    plain = [
        Route("/health", lambda request: _health(service)),
        Route("/ready", lambda request: _ready(service)),
        Route("/metrics", lambda request: _metrics(service, request)),
        Route("/openapi.json", lambda request: JSONResponse(openapi.document(first))),
        Route("/docs", lambda request: HTMLResponse(openapi.page(first))),
    ]
    answering = {(each.method, each.path): Answering(service, each) for each in ENDPOINTS}
    others = [Route(path, each, methods=[method]) for (method, path), each in answering.items()]
    app = App(routes=[*plain, *others], lifespan=lifespan, exception_handlers={HTTPException: _no_route})
    app.by_name, app.state.service = answering, service
    return app


def _health(service: Service) -> Response:
    """Tells whether the process can work. If it cannot, only a restart helps."""
    return JSONResponse({"status": "alive" if service.alive else "failed"}, 200 if service.alive else 503)


def _ready(service: Service) -> Response:
    """Tells whether clients should send requests to this server."""
    return JSONResponse({"status": service.state}, 200 if service.state == "ready" else 503)


def _metrics(service: Service, request: Request) -> Response:
    try:
        _authorize(service, request.headers.get("authorization", "").encode("latin-1"))  # the bytes of the header
    except ApiError as error:
        return _error_response(error)
    return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "unknown_route", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    response = _error_response(ApiError(error.status_code, code, f"{error.detail}: see /docs"))
    response.headers.update(error.headers or {})
    return response


def _authorize(service: Service, authorization: bytes) -> None:
    keys = service.settings.keys
    if keys and not keys.allow(authorization.decode("utf-8", "surrogateescape")):
        raise ApiError(401, "invalid_api_key", "expected the header Authorization: Bearer KEY")


class Reply(NamedTuple):
    """A Reply is an answer to send. headers: all but content-length."""

    status: int
    body: bytes
    headers: list[tuple[bytes, bytes]]

    async def send(self, send: Send) -> None:
        """Sends it. Raises OSError or RuntimeError where the connection is closed."""
        headers = [*self.headers, (b"content-length", b"%d" % len(self.body))]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


class Answering:
    """An Answering is the ASGI app of an endpoint. It avoids starlette's objects because they are slow."""

    def __init__(self, service: Service, endpoint: Endpoint) -> None:
        self.service, self.endpoint = service, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, headers = self.service, dict(reversed(scope["headers"]))
        sent = headers.get(b"x-request-id", b"").decode("latin-1")
        id_ = sent if sent and _ID.fullmatch(sent) else uuid.uuid4().hex
        is_only = service.is_only_caller(scope.get("client"))
        call = Call(scope, receive, service, self.endpoint.path, id_, headers, is_only)
        service.in_flight += 1
        try:
            reply = await _respond(call, self.endpoint)
        finally:
            service.in_flight -= 1
        seconds, status = time.perf_counter() - call.started, reply.status
        try:
            await reply.send(send)
        except (OSError, RuntimeError):  # errors of asyncio and uvloop for a closed connection
            status = GONE
        # The call is noted later, because uvloop writes an answer only after all ready tasks have run.
        service.later.add(_note, call, status, seconds, time.time())
        service.later.soon()


class App(Starlette):
    """An App finds endpoints by path. starlette handles all other requests.

    by_name: endpoints by method and path. starlette would try all routes one after the other.
    """

    by_name: Mapping[tuple[str, str], Answering]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = self.by_name.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if answering is None:
            await super().__call__(scope, receive, send)
        else:
            await answering(scope, receive, send)


async def _respond(call: Call, endpoint: Endpoint) -> Reply:
    service, error, is_read = call.service, None, endpoint.method != "POST"
    headers = [_JSON, (b"x-request-id", call.id.encode("ascii"))]
    try:
        _authorize(service, call.headers.get(b"authorization", b""))
        service.check_serving()
        if endpoint.method == "POST":
            call.fields = Fields(await read_json(call.headers, call.receive, service.settings.limits))
            is_read = True
        answer = await endpoint.handler(call)
        status, body = 200, await _to_json(answer, call)
    except ApiError as raised:
        error = raised
    except ClientGone:
        error = ApiError(GONE, "client_gone", "the caller closed the connection")
    except Exception as raised:
        log_exception("request failed", raised, id=call.id, route=call.route)
        error = ApiError(500, "internal_error", f"the server failed on this request, whose id is {call.id}")
    if error is not None:
        status, body = error.status, dump(error.body)
        headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    if call.n_truncated:
        headers.append((b"x-truncated", b"%d" % call.n_truncated))
    # The server does not read the rest of a body that is late or too large.
    if service.state == "draining" or (status in (408, 413) and not is_read):
        headers.append((b"connection", b"close"))
    return Reply(status, body, headers)


async def _to_json(answer: Any, call: Call) -> bytes:
    if call.n_texts <= FEW_TEXTS and call.n_tokens <= FEW_TOKENS:
        return dump(answer)
    return await asyncio.to_thread(dump_in_pieces, answer)


def _error_response(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, headers=error.headers)


def _note(call: Call, status: int, seconds: float, at: float) -> None:
    """Counts and logs an answer. at: the time of sending, in seconds since 1970."""
    model = "" if call.model is None else call.model.name
    call.service.metrics.requests.labels(call.route, model, str(status)).inc()
    call.service.metrics.seconds.labels(call.route).observe(seconds)
    fields = {
        "id": call.id, "route": call.route, "model": model, "status": status, "seconds": round(seconds, 4),
        "texts": call.n_texts, "tokens": call.n_tokens, "truncated": call.n_truncated,
    }  # fmt: skip
    logger.info("request", extra={"fields": fields, "at": at})
