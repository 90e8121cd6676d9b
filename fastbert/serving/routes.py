"""This module holds the routes. Each turns a call into a JSON answer in the format of OpenAI or TEI.

TEI is text-embeddings-inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastbert._version import __version__
from fastbert.pipelines.token_logits import softmax
from fastbert.serving import answers, schemas
from fastbert.serving.calls import Call
from fastbert.serving.errors import ApiError, invalid
from fastbert.serving.served import Served, ServedClassifier, ServedEncoder, ServedTagger
from fastbert.serving.service import TOKENIZERS
from fastbert.text import offsets

# The functions of logits that the Hub's client may request. "" is the model's own function, which is applied already.
FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "": lambda scores: scores,
    "none": lambda logits: logits,
    "sigmoid": lambda logits: 1 / (1 + np.exp(-logits)),
    "softmax": softmax,
}


async def list_models(call: Call) -> Any:
    """Lists the models, as OpenAI does."""
    return {"object": "list", "data": [_model(call, name) for name in call.service.models]}


async def get_model(call: Call) -> Any:
    """Describes one model, as OpenAI does."""
    return _model(call, call.service.named(call.scope["path_params"]["name"]).name)


def _model(call: Call, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": call.service.started, "owned_by": "fastbert"}


async def embeddings(call: Call) -> Any:
    """Makes a vector of each input, as OpenAI does. `truncated` counts inputs that were cut."""
    fields = call.fields
    call.model = call.service.named(schemas.text("model", fields.required("model")))
    if "embed" not in call.model.tasks:
        raise ApiError(424, "unsupported_task", "the model makes no dense vectors", param="model")
    as_base64 = fields.as_base64()
    vectors, _ = await _vectors(call, "input")
    return answers.embeddings(call.model.name, vectors, call.n_tokens, call.n_truncated, as_base64)


async def embed(call: Call) -> Any:
    """Makes a vector of each input."""
    call.choose_model("embed")
    vectors, _ = await _vectors(call, "inputs")
    if call.fields.as_base64():
        return [answers.encoded(vector) for vector in vectors]
    return list(map(answers.numbers, vectors))


async def _vectors(call: Call, name: str) -> tuple[list[np.ndarray], bool]:
    """Returns the vectors of a call's inputs, and whether a single input came."""
    model, fields = call.model, call.fields
    assert isinstance(model, ServedEncoder)
    texts, single = _inputs(call, name)
    dimensions = fields.whole("dimensions", model.model.get_embedding_dimension())
    lane = call.lane("embed", normalize=fields.flag("normalize", True), dimensions=dimensions)
    answer = await call.compute(lane, texts, fields.get("truncate", bool))
    return answer.results, single


def _inputs(call: Call, name: str) -> tuple[list[Any], bool]:
    assert call.model is not None
    vocab_size = call.model.bert.config.vocab_size
    return schemas.inputs(name, call.fields.required(name), call.service.settings.limits, vocab_size)


def _texts(call: Call) -> tuple[list[str], bool]:
    return schemas.text_or_texts("inputs", call.fields.required("inputs"), call.service.settings.limits)


async def embed_all(call: Call) -> Any:
    """Makes a vector of each token of each input."""
    call.choose_model("embed_all")
    texts, _ = _inputs(call, "inputs")
    answer = await call.compute(call.lane("embed_all"), texts, call.fields.get("truncate", bool))
    return list(map(answers.numbers, answer.results))


async def embed_sparse(call: Call) -> Any:
    """Makes a sparse vector over the vocabulary of each input."""
    call.choose_model("sparse")
    texts, _ = _inputs(call, "inputs")
    answer = await call.compute(call.lane("sparse"), texts, call.fields.get("truncate", bool))
    return [
        [{"index": index, "value": value} for index, value in zip(ids.tolist(), weights.tolist(), strict=True)]
        for ids, weights in answer.results
    ]


async def similarity(call: Call) -> Any:
    """Compares a sentence with others, by the function that the model names."""
    model = call.choose_model("embed")
    inputs, parameters = call.fields.object("inputs"), call.fields.object("parameters")
    limits = call.service.settings.limits
    source = schemas.text("inputs.source_sentence", inputs.required("source_sentence"))
    others = schemas.texts("inputs.sentences", inputs.required("sentences"), limits)
    lane = call.lane("embed", parameters)
    answer = await call.compute(lane, [source, *others], parameters.get("truncate", bool))
    first, *rest = (vector[None] for vector in answer.results)
    # Each pair is computed alone, so that its bits do not depend on other sentences of the request.
    scores = [float(model.model.similarity_pairwise(first, vector)) for vector in rest]
    if not all(map(math.isfinite, scores)):
        raise ApiError(500, "not_finite", "the model gave NaN or infinity for a pair of this request")
    return scores


async def rerank(call: Call) -> Any:
    """Orders texts by their score beside a query, best first; of equal scores the earlier text is first."""
    call.choose_model("rerank")
    fields = call.fields
    query = schemas.text("query", fields.required("query"))
    texts = schemas.texts("texts", fields.required("texts"), call.service.settings.limits)
    lane = call.lane("rerank", raw=fields.flag("raw_scores", False))
    pairs = [schemas.Pair(query, text) for text in texts]
    answer = await call.compute(lane, pairs, fields.get("truncate", bool))
    scores = [float(result[0]) for result in answer.results]
    ranks: list[dict[str, Any]] = [
        {"index": i, "score": scores[i]} for i in sorted(range(len(texts)), key=lambda i: -scores[i])
    ]
    if fields.flag("return_text", False):
        ranks = [{**rank, "text": texts[rank["index"]]} for rank in ranks]
    return ranks


async def predict(call: Call) -> Any:
    """Scores each text, or pair of texts, by the labels of a classifier; a tagger's answer is that of /entities."""
    model = call.choose_model("predict", "entities")
    if isinstance(model, ServedTagger):
        return await _entities(call, model)
    assert isinstance(model, ServedClassifier)
    fields, limits = call.fields, call.service.settings.limits
    inputs, single = schemas.sequences("inputs", fields.required("inputs"), limits)
    parameters, labels = fields.object("parameters"), model.model.config.id2label
    function = parameters.choice("function_to_apply", "", "sigmoid", "softmax", "none", "")
    lane = call.lane("predict", raw=fields.flag("raw_scores", False) or bool(function))
    top_k = parameters.whole("top_k", 2**31) or len(labels)
    answer = await call.compute(lane, inputs, fields.get("truncate", bool))
    predictions = []
    for result in answer.results:
        scores = FUNCTIONS[function](result).tolist()
        order = sorted(range(len(scores)), key=lambda label: -scores[label])
        predictions.append([{"label": labels[label], "score": scores[label]} for label in order[:top_k]])
    # The Hub's client sends `parameters`, and expects a list inside a list.
    return predictions[0] if single and "parameters" not in fields.body else predictions


async def entities(call: Call) -> Any:
    """Finds the entities of a text, with their places, or those of each text of a list."""
    model = call.choose_model("entities")
    assert isinstance(model, ServedTagger)
    return await _entities(call, model)


async def _entities(call: Call, model: ServedTagger) -> Any:
    texts, single = _texts(call)
    strategy, ignored = schemas.entity_options(call.fields.object("parameters"))
    answer = await call.compute(call.lane("entities"), texts, None)
    pairs = list(zip(answer.tokens.windowed, answer.results, strict=True))
    lists = await call.service.in_thread(
        lambda: [model.entities(text, of_tokens, strategy, ignored) for text, of_tokens in pairs]
    )
    return lists[0] if single else lists


async def tokenize(call: Call) -> Any:
    """Lists the tokens of each input, with their places in it; nothing is cut."""
    model = call.any_model()
    texts, _ = _texts(call)
    special = call.fields.flag("add_special_tokens", True)
    prompt = call.lane("tokenize").prompt if call.fields.body.get("prompt_name") is not None else ""
    call.service.settings.limits.check_characters(texts)
    rows = await call.service.in_thread(_tokens, model, [prompt + text for text in texts], special)
    call.n_texts, call.n_tokens = len(texts), sum(map(len, rows))
    return rows


def _tokens(model: Served, texts: list[str], special: bool) -> list[list[dict[str, Any]]]:
    template = model.tokenizer.template(False)
    n_before = offsets.n_special_tokens(template, 0)
    special_ids = [piece.ids[0] for piece in template if piece.source < 0]
    edges = [
        {"id": id_, "text": model.tokenizer.convert_ids_to_tokens(id_), "special": True, "start": None, "stop": None}
        for id_ in special_ids
    ]
    rows = []
    for text, tokens in zip(texts, model.tokenizer.encode_with_offsets(texts), strict=True):
        row = [
            {"id": id_, "text": text[start:stop], "special": False, "start": start, "stop": stop}
            for id_, (start, stop) in zip(tokens.ids, tokens.offsets.tolist(), strict=True)
        ]
        rows.append([*edges[:n_before], *row, *edges[n_before:]] if special else row)
    return rows


async def decode(call: Call) -> Any:
    """Makes a text of each row of token ids."""
    model, fields = call.any_model(), call.fields
    limits, vocab_size = call.service.settings.limits, model.bert.config.vocab_size
    rows = schemas.rows("ids", fields.required("ids"), limits, min(vocab_size, model.tokenizer.vocab_size))
    call.n_texts, call.n_tokens = len(rows), sum(map(len, rows))
    skip = fields.flag("skip_special_tokens", True)
    return await call.service.in_thread(lambda: model.tokenizer.decode_batch(rows, skip_special_tokens=skip))


async def info(call: Call) -> Any:
    """Describes a model and the limits of the server."""
    service, model = call.service, call.any_model()
    limits, config = service.settings.limits, model.bert.config
    labels = {"id2label": config.id2label, "label2id": config.label2id}
    details = {"pooling": model.pooling} if isinstance(model, ServedEncoder) else labels
    return {
        "model_id": model.name,
        "served_model_name": model.name,
        "model_sha": None,
        "model_dtype": str(model.bert.dtype).removeprefix("torch."),
        "model_type": {model.kind: details},
        "max_concurrent_requests": limits.queue_tokens,  # each request has at least one token
        "max_queue_tokens": limits.queue_tokens,
        "max_input_length": model.limit or model.model.max_length,
        "max_batch_tokens": model.token_budget,
        "max_batch_requests": None,
        "max_client_batch_size": limits.texts,
        "auto_truncate": service.settings.truncate,
        "tokenization_workers": TOKENIZERS,
        "version": __version__,
        "batch_invariant": service.settings.batch_invariant,
        "threads": model.n_threads,
        "device": str(model.bert.device),
        "tasks": sorted(model.tasks),
        "models": list(service.models),
    }


async def root(call: Call) -> Any:
    """Answers as the route does that fits the model and what the request holds."""
    model = call.choose_model("embed", "predict", "entities", "embed_all")
    if "embed" in model.tasks:
        holds_pair = isinstance(call.fields.body.get("inputs"), dict)
        return await (similarity if holds_pair else embed)(call)
    if "rerank" in model.tasks and "query" in call.fields.body:
        return await rerank(call)
    if "sparse" in model.tasks:
        return await embed_sparse(call)
    if "embed_all" in model.tasks:
        return await embed_all(call)
    if "inputs" not in call.fields.body:
        raise invalid("inputs", "expected a value")
    return await predict(call)
