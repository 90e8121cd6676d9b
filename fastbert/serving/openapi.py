"""This module makes the OpenAPI document of all routes, and a page that shows it without other files."""

from __future__ import annotations

import html
import json
from importlib import resources
from typing import Any

from fastbert._version import __version__
from fastbert.pipelines.entities import STRATEGIES

MODEL = "MODEL"  # placeholder for the name of a model in the examples

_STRING, _FLAG, _NUMBER = {"type": "string"}, {"type": "boolean"}, {"type": "number"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
_NUMBERS = {"type": "array", "items": _NUMBER}
_STRINGS = {"type": "array", "items": _STRING, "minItems": 1}
_TEXT_OR_TEXTS = {"anyOf": [_STRING, _STRINGS]}
_IDS = {"type": "array", "items": _COUNT, "minItems": 1}
_INPUTS = {"anyOf": [_STRING, _IDS, _STRINGS, {"type": "array", "items": _IDS, "minItems": 1}]}
_SEQUENCE = {"type": "array", "items": _STRING, "minItems": 1, "maxItems": 2}
_FORMAT = {"anyOf": [{"type": "string", "enum": ["float", "base64"]}, {"type": "null"}], "default": "float"}
_VECTOR = {"anyOf": [_NUMBERS, {"type": "string", "description": "little-endian float32 numbers in base64"}]}


def _object(required: str = "", /, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required.split(), "properties": properties}


def _array(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _optional(schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}], "description": description}


_TRUNCATE = _optional(_FLAG, "true cuts longer texts, false refuses them; null is the server's choice")
_PROMPT = _optional(_STRING, "name of a prompt of the model, which stands before each text")
_DIRECTION = _optional({"type": "string", "enum": ["right", "left", "Right", "Left"]}, "the end that is cut")
_NORMALIZE = _optional(_FLAG, "whether vectors get length 1; true where nothing is said")
_DIMENSIONS = _optional({"type": "integer", "minimum": 1}, "how many numbers of a vector are kept")
_CUT = {"truncate": _TRUNCATE, "truncation_direction": _DIRECTION}
_PROMPTED = {"prompt_name": _PROMPT, **_CUT}
_OPTIONS = {**_PROMPTED, "normalize": _NORMALIZE, "dimensions": _DIMENSIONS, "encoding_format": _FORMAT}
_RAW = _optional(_FLAG, "whether scores are logits")
_TEXTS = _optional(_FLAG, "whether the answer has the texts, too")
_SKIP = _optional(_FLAG, "whether special tokens are left out; true where nothing is said")
_SPECIAL = _optional(_FLAG, "whether special tokens are listed; true where nothing is said")

_ENTITY = _object(
    "score word start end", entity_group=_STRING, entity=_STRING, score=_NUMBER, word=_STRING, start=_COUNT, end=_COUNT
)
_PREDICTIONS = _array(_object("label score", label=_STRING, score=_NUMBER))
_ENTITY_PARAMETERS = _object(
    aggregation_strategy=_optional({"type": "string", "enum": list(STRATEGIES)}, "how tokens become entities"),
    ignore_labels=_optional(_array(_STRING), "labels, or groups, that are left out"),
)
_PREDICT_PARAMETERS = _object(
    function_to_apply=_optional({"type": "string", "enum": ["sigmoid", "softmax", "none"]}, "what is made of logits"),
    top_k=_optional({"type": "integer", "minimum": 1}, "how many labels are listed"),
)
_MODEL = _object("id object created owned_by", id=_STRING, object=_STRING, created=_COUNT, owned_by=_STRING)
_TOKEN = _object(
    "id text special", id=_COUNT, text=_STRING, special=_FLAG, start=_optional(_COUNT, "first character"),
    stop=_optional(_COUNT, "end, exclusive"),
)  # fmt: skip
_EMBEDDINGS = _object(
    "object data model usage truncated",
    object=_STRING,
    data=_array(_object("object index embedding", object=_STRING, index=_COUNT, embedding=_VECTOR)),
    model=_STRING,
    usage=_object("prompt_tokens total_tokens", prompt_tokens=_COUNT, total_tokens=_COUNT),
    truncated={**_COUNT, "description": "inputs that were cut"},
)
_ERROR = _object(
    "error",
    error=_object(
        "message type code", message=_STRING, type=_STRING, code=_STRING, param=_optional(_STRING, "the field")
    ),
)

# (method, path) -> (summary, schema of the body, schema of the answer, an example of the body)
_ROUTES: dict[tuple[str, str], tuple[str, Any, Any, Any]] = {
    ("post", "/v1/embeddings"): (
        "Vectors, as OpenAI gives them",
        _object("model input", model=_STRING, input=_INPUTS, **_OPTIONS),
        _EMBEDDINGS,
        {"model": MODEL, "input": ["A text.", "Another one."]},
    ),
    ("get", "/v1/models"): (
        "The models", None, _object("object data", object=_STRING, data=_array(_MODEL)), None,
    ),
    ("get", "/v1/models/{name}"): ("One model", None, _MODEL, None),
    ("post", "/embed"): (
        "Vectors", _object("inputs", inputs=_INPUTS, **_OPTIONS), _array(_VECTOR), {"inputs": ["A text."]},
    ),
    ("post", "/embed_all"): (
        "A vector of each token",
        _object("inputs", inputs=_INPUTS, **_PROMPTED),
        _array(_array(_NUMBERS)),
        {"inputs": "A text."},
    ),
    ("post", "/embed_sparse"): (
        "Sparse vectors over the vocabulary",
        _object("inputs", inputs=_INPUTS, **_PROMPTED),
        _array(_array(_object("index value", index=_COUNT, value=_NUMBER))),
        {"inputs": "A text."},
    ),
    ("post", "/similarity"): (
        "How alike a sentence and others are",
        _object(
            "inputs",
            inputs=_object("source_sentence sentences", source_sentence=_STRING, sentences=_STRINGS),
            parameters=_optional(_object(**_PROMPTED), "how texts are read"),
        ),
        _NUMBERS,
        {"inputs": {"source_sentence": "A text.", "sentences": ["Another one."]}},
    ),
    ("post", "/rerank"): (
        "Texts in the order of their scores beside a query",
        _object("query texts", query=_STRING, texts=_STRINGS, raw_scores=_RAW, return_text=_TEXTS, **_CUT),
        _array(_object("index score", index=_COUNT, score=_NUMBER, text=_STRING)),
        {"query": "A question?", "texts": ["A text.", "Another one."]},
    ),
    ("post", "/predict"): (
        "Scores of labels, the highest first; of a tagger, its entities",
        _object(
            "inputs", inputs={"anyOf": [_STRING, _SEQUENCE, _array(_SEQUENCE)]}, raw_scores=_RAW,
            parameters=_optional(_PREDICT_PARAMETERS, "with it, one text has its answer in a list, too"), **_CUT,
        ),
        {"anyOf": [_PREDICTIONS, _array(_PREDICTIONS), _array(_ENTITY), _array(_array(_ENTITY))]},
        {"inputs": [["A text.", "Another one."]]},
    ),
    ("post", "/entities"): (
        "Entities with their places, in characters",
        _object("inputs", inputs=_TEXT_OR_TEXTS, parameters=_optional(_ENTITY_PARAMETERS, "which are listed, and how")),
        {"anyOf": [_array(_ENTITY), _array(_array(_ENTITY))]},
        {"inputs": "Ada Lovelace was born in London."},
    ),
    ("post", "/tokenize"): (
        "Tokens with their places, in characters",
        _object("inputs", inputs=_TEXT_OR_TEXTS, add_special_tokens=_SPECIAL, prompt_name=_PROMPT),
        _array(_array(_TOKEN)),
        {"inputs": "A text."},
    ),
    ("post", "/decode"): (
        "The texts of token ids",
        _object("ids", ids={"anyOf": [_IDS, _array(_IDS) | {"minItems": 1}]}, skip_special_tokens=_SKIP),
        _array(_STRING),
        {"ids": [101, 1037, 3793, 102]},
    ),
    ("get", "/info"): ("A model, and the limits of the server", None, {"type": "object"}, None),
    ("get", "/health"): ("Whether the process can go on", None, _object("status", status=_STRING), None),
    ("get", "/ready"): ("Whether requests should be sent here", None, _object("status", status=_STRING), None),
    ("get", "/metrics"): ("Figures for Prometheus", None, None, None),
}  # fmt: skip

_ERRORS = {
    "400": "a field, or the JSON, is wrong", "401": "no API key of this server", "404": "no such model",
    "408": "the body came too slowly", "413": "too many bytes, texts or tokens, or a text that must not be cut",
    "415": "the body is not application/json", "424": "the model does not do this",
    "429": "the queue is full: Retry-After says when to come back", "500": "the model failed on a text",
    "503": "the models are being loaded, or the server stops", "504": "no answer in time",
}  # fmt: skip


def document(model: str = MODEL) -> dict[str, Any]:
    """Returns the OpenAPI document, version 3.1. model: the name of a model in the examples."""
    paths: dict[str, Any] = {}
    for (method, path), (summary, body, answer, example) in _ROUTES.items():
        if example is not None and "model" in example:
            example = {**example, "model": model}
        paths.setdefault(path, {})[method] = _operation(path, summary, body, answer, example)
    return {
        "openapi": "3.1.0",
        "info": {"title": "fastbert serve", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _operation(path: str, summary: str, body: Any, answer: Any, example: Any) -> dict[str, Any]:
    is_text = path == "/metrics"
    content = {"text/plain": {"schema": _STRING}} if is_text else {"application/json": {"schema": answer}}
    responses: dict[str, Any] = {"200": {"description": "the answer", "content": content}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    if path in ("/health", "/ready"):
        responses["503"] = {"description": "no", "content": content}
    else:
        responses |= {status: {"description": text, "content": error} for status, text in _ERRORS.items()}
    operation: dict[str, Any] = {"summary": summary, "responses": responses, "parameters": []}
    if path == "/v1/models/{name}":
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": _STRING}]
    elif _takes_model(path, body):
        query = {"name": "model", "in": "query", "required": False, "schema": _STRING}
        operation["parameters"] = [{**query, "description": "name of the model, by default the first that fits"}]
    if body is not None:
        media = {"schema": body, "example": example}
        operation["requestBody"] = {"required": True, "content": {"application/json": media}}
    return operation


def _takes_model(path: str, body: Any) -> bool:
    """Tells whether the query may name a model: OpenAI's routes name it in the body."""
    return not path.startswith("/v1/") and (body is not None or path == "/info")


def page(model: str = MODEL) -> str:
    """Returns the page of the document as HTML. It contains its style and script, and loads no other files."""
    sections = "\n".join(_section(*key, *value) for key, value in _ROUTES.items())
    sections = sections.replace(f'"&quot;{MODEL}&quot;"', f'"{html.escape(model)}"')
    sections = sections.replace(f"&quot;{MODEL}&quot;", html.escape(json.dumps(model, ensure_ascii=False)))
    errors = "".join(f"<tr><td>{status}</td><td>{html.escape(text)}</td></tr>" for status, text in _ERRORS.items())
    template = resources.files("fastbert.serving").joinpath("docs.html").read_text(encoding="utf-8")
    for name, value in (("VERSION", __version__), ("ROUTES", sections), ("ERRORS", errors)):
        template = template.replace(f"<!-- {name} -->", value)
    return template


def _section(method: str, path: str, summary: str, body: Any, answer: Any, example: Any) -> str:
    parts = [f'<section data-method="{method}" data-path="{html.escape(path)}">']
    parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(summary)}.</p>")
    if body is not None:
        shown = json.dumps(example, ensure_ascii=False, indent=2)
        attributes = f'aria-label="Body of {html.escape(path)}" rows="{shown.count(chr(10)) + 1}" spellcheck="false"'
        parts.append(f"<textarea {attributes}>{html.escape(shown)}</textarea>")
    if "{name}" in path:
        parts.append(f'<label>Name <input name="name" value="&quot;{MODEL}&quot;"></label>')
    if _takes_model(path, body):
        parts.append('<label>Model, by default the first that fits <input name="model"></label>')
    parts.append("<button>Send</button><pre hidden></pre>")
    for title, schema in (("Body", body), ("Answer", answer)):
        if schema is not None:
            shown = html.escape(json.dumps(schema, indent=1))
            parts.append(f"<details><summary>{title}: JSON Schema</summary><pre>{shown}</pre></details>")
    return "".join([*parts, "</section>"])
