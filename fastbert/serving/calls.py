"""A Call is one HTTP request that the server is answering."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from starlette.types import Receive, Scope

from fastbert.serving.errors import ApiError, ClientGone, invalid
from fastbert.serving.interruption import Interruption
from fastbert.serving.schemas import Fields
from fastbert.serving.served import Served, ServedEncoder
from fastbert.serving.service import Answer, Service
from fastbert.serving.work import Lane

UNWATCHED_SECONDS = 0.02  # delay of the first check for a closed connection; most answers take less


@dataclass
class Call:
    """A Call has the fields of a request, the model that answers, and its entries for the log.

    scope, receive: ASGI's. headers: the first header of each name, in lower case. is_only: whether there is no other
    request at the same time.
    """

    scope: Scope
    receive: Receive
    service: Service
    route: str
    id: str
    headers: Mapping[bytes, bytes]
    is_only: bool = False
    fields: Fields = field(default_factory=lambda: Fields({}))
    model: Served | None = None
    n_texts: int = 0
    n_tokens: int = 0
    n_truncated: int = 0
    started: float = field(default_factory=time.perf_counter)

    def choose_model(self, *tasks: str) -> Served:
        """Returns the model that the query or a header names, or the first model with one of the tasks."""
        self.model = self.service.model_for(frozenset(tasks), self._name())
        return self.model

    def any_model(self) -> Served:
        """Returns the model that the query or a header names, or the first model."""
        name = self._name()
        self.model = next(iter(self.service.models.values())) if name is None else self.service.named(name)
        return self.model

    def _name(self) -> str | None:
        query = self.scope.get("query_string")
        names = parse_qs(query.decode("latin-1")).get("model") if query else None
        return names[-1] if names else self.headers.get(b"x-model", b"").decode("utf-8", "replace") or None

    def lane(self, task: str, fields: Fields | None = None, **options: Any) -> Lane:
        """Returns the lane of a task, with the prompt of the fields, or the model's default prompt."""
        fields = fields or self.fields
        assert self.model is not None
        options["side"] = fields.truncation_side()
        encoder, name = self.model.model, fields.get("prompt_name", str)
        if not isinstance(self.model, ServedEncoder):
            return Lane(task, **options)
        prompts, name = encoder.prompts, name or encoder.default_prompt_name
        if name is not None and name not in prompts:
            raise invalid(f"{fields.path}prompt_name", f"expected one of {', '.join(prompts)}")
        return Lane(task, "" if name is None else prompts[name], **options)

    async def compute(self, lane: Lane, texts: list[Any], truncate: bool | None) -> Answer:
        """Returns the results of texts, unless the caller goes away or the time is up."""
        assert self.model is not None
        if texts and isinstance(texts[0], list):  # token ids take no prompt
            lane = lane._replace(prompt="")
        seconds = self.service.settings.limits.seconds
        late = ApiError(504, "timeout", f"there was no answer within {seconds:g} seconds", retry_after=1)
        with Interruption() as interrupt:
            interrupt.later(seconds, late)
            interrupt.watch(UNWATCHED_SECONDS, self._disconnected, ClientGone())
            started = time.perf_counter()
            answer = await self.service.compute(self.model, lane, texts, truncate, self.is_only)
        if time.perf_counter() - started > seconds:  # a timeout cannot interrupt code in this thread
            raise late
        self.n_texts += len(texts)
        self.n_tokens += answer.tokens.n_tokens
        self.n_truncated += answer.tokens.n_truncated
        return answer

    async def _disconnected(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
