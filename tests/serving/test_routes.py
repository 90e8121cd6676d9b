"""Each route answers in OpenAI's or TEI's shape, with the numbers that the models give in Python."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from fastbert import SentenceEncoder
from fastbert.pipelines.inputs import Pair
from fastbert.pipelines.modules import Normalize
from fastbert.pipelines.token_heads import TokenVectors
from fastbert.serving.calls import Call
from fastbert.serving.service import Service
from fastbert.serving.work import Lane
from serving_cases import PROMPT, TEXTS, client_of, error_of, loaders, numbers, save_models

LONG = " ".join(["fish"] * 60)  # the models read 40 tokens


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def service(models: SimpleNamespace) -> Service:
    return Service(loaders(models))


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with client_of(service) as client:
        yield client


@pytest.fixture
def encoder(client: TestClient, service: Service) -> Any:
    return service.models["encoder"].model


def ask(client: TestClient, path: str, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def close(ours: Any, expected: Any) -> bool:
    """Sums of a few hundred terms in float32, in batches of other sizes."""
    return np.allclose(np.asarray(ours), np.asarray(expected), rtol=0, atol=2e-6)


def vectors_of(answer: Any) -> list[Any]:
    assert [each["index"] for each in answer["data"]] == list(range(len(answer["data"])))
    assert {each["object"] for each in answer["data"]} == {"embedding"}
    return [each["embedding"] for each in answer["data"]]


def test_openai_embeddings(client: TestClient, encoder: Any) -> None:
    """Catches vectors that are not encode's, wrong counts of tokens, and a form that OpenAI's clients do not read."""
    answer = ask(client, "/v1/embeddings", model="encoder", input=TEXTS, user="me")
    assert answer["object"] == "list" and answer["model"] == "encoder" and answer["truncated"] == 0
    tokens = encoder.tokenizer.encode_packed(TEXTS)
    assert answer["usage"] == dict.fromkeys(("prompt_tokens", "total_tokens"), len(tokens.input_ids))
    assert close(vectors_of(answer), encoder.encode(TEXTS))
    packed = ask(client, "/v1/embeddings", model="encoder", input=TEXTS, encoding_format="base64")
    assert close([numbers(text) for text in vectors_of(packed)], encoder.encode(TEXTS))
    short = ask(client, "/v1/embeddings", model="encoder", input=TEXTS[0], dimensions=5)
    expected = encoder.encode(TEXTS[0], truncate_dim=5, normalize_embeddings=True)
    assert np.shape(vectors_of(short)) == (1, 5) and close(vectors_of(short)[0], expected)


def test_token_ids_are_inputs(client: TestClient, encoder: Any) -> None:
    """Catches ids that get special tokens twice or never, and a list of ids that is taken for several inputs."""
    rows = [ids.tolist() for ids in (encoder.tokenizer.encode_packed([text]).input_ids for text in TEXTS)]
    with_special = vectors_of(ask(client, "/v1/embeddings", model="encoder", input=rows))
    bare = vectors_of(ask(client, "/v1/embeddings", model="encoder", input=[row[1:-1] for row in rows]))
    one = vectors_of(ask(client, "/v1/embeddings", model="encoder", input=rows[0]))
    expected = encoder.encode(TEXTS)
    assert close(with_special, expected) and close(bare, expected) and close(one, expected[:1])
    cut = ask(client, "/v1/embeddings", model="encoder", input=[rows[0], [rows[0][1]] * 50])
    assert cut["truncated"] == 1 and cut["usage"]["total_tokens"] == len(rows[0]) + 40


def test_truncation_is_said_or_refused(client: TestClient, encoder: Any) -> None:
    """Catches texts that are cut in silence (sentence-transformers#4060), and a count over other callers' texts."""
    answer = ask(client, "/v1/embeddings", model="encoder", input=["fish", LONG, LONG])
    assert answer["truncated"] == 2 and close(vectors_of(answer)[1], encoder.encode(LONG))
    response = client.post("/embed", json={"inputs": ["fish", LONG]})
    assert response.headers["X-Truncated"] == "1" and len(response.json()) == 2
    assert "X-Truncated" not in client.post("/embed", json={"inputs": "fish"}).headers
    for path, body in {
        "/embed": {"inputs": LONG},
        "/v1/embeddings": {"input": [LONG], "model": "encoder"},
        "/rerank": {"query": "fish", "texts": [LONG]},
        "/predict": {"inputs": LONG},
    }.items():
        refused = client.post(path, json={**body, "truncate": False})
        assert refused.status_code == 413 and error_of(refused)["code"] == "text_too_long", refused.text


def test_the_end_that_is_cut(client: TestClient, encoder: Any) -> None:
    """Catches a text that is cut at its end where its beginning was to be cut, for texts, pairs and token ids."""
    ids = encoder.tokenizer.encode_packed([LONG + " river"], max_length=99).input_ids.tolist()
    expected = encoder.encode(" ".join(["fish"] * 37 + ["river"]))
    for inputs in (LONG + " river", ids, ids[1:-1]):
        left = client.post("/embed", json={"inputs": inputs, "truncation_direction": "Left"})
        assert close(left.json()[0], expected) and left.headers["X-Truncated"] == "1"
        for direction in ("Right", None):
            right = ask(client, "/embed", inputs=inputs, truncation_direction=direction)
            assert close(right[0], encoder.encode(LONG)) and not close(right[0], expected)
    short = ask(client, "/rerank", query="a", texts=["fish " * 35 + "river"])
    pair = {"query": "a", "texts": ["boats and " * 9 + "fish " * 35 + "river"]}
    assert ask(client, "/rerank", **pair, truncation_direction="left") == short
    assert ask(client, "/rerank", **pair) != short and encoder.tokenizer.truncation_side == "right"


def test_models_are_listed(client: TestClient) -> None:
    """Catches a list that OpenAI's clients do not read, and a model that is not found by its name."""
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list" and [each["id"] for each in listed["data"]][:2] == ["encoder", "reranker"]
    assert client.get("/v1/models/tagger").json() == listed["data"][3]
    assert error_of(client.get("/v1/models/owner/none"))["code"] == "model_not_found"


def test_embed(client: TestClient, encoder: Any) -> None:
    """Catches vectors without their prompt, and a form other than TEI's, which is a list also for one text."""
    assert close(ask(client, "/embed", inputs=TEXTS[0]), encoder.encode(TEXTS[:1]))
    assert close(ask(client, "/", inputs=TEXTS), encoder.encode(TEXTS))
    prompted = ask(client, "/embed", inputs=TEXTS, prompt_name="query", truncation_direction="Right")
    assert close(prompted, encoder.encode(TEXTS, prompt=PROMPT)) and not close(prompted, encoder.encode(TEXTS))
    assert np.shape(ask(client, "/embed", inputs="", normalize=False)) == (1, 32)
    of_splade = ask(client, "/?model=sparse", inputs=TEXTS)
    assert of_splade == ask(client, "/embed_sparse?model=sparse", inputs=TEXTS), "as TEI, which has no vectors of them"


def test_vectors_of_tokens_and_sparse_vectors(client: TestClient, encoder: Any, service: Service) -> None:
    """Catches token vectors in another text, and sparse vectors that are not those of the head."""
    of_tokens = ask(client, "/embed_all", inputs=TEXTS)
    expected = encoder.encode(TEXTS, output_value="token_embeddings")
    assert all(close(own, other) for own, other in zip(of_tokens, expected, strict=True))
    answer = ask(client, "/embed_sparse", inputs=TEXTS)
    rows = service.models["sparse"].model.encode(TEXTS, output="sparse").to_dense()
    for values, row in zip(answer, rows, strict=True):
        assert [each["index"] for each in values] == row.nonzero().flatten().tolist()
        assert close([each["value"] for each in values], row[row != 0])


def test_a_model_of_token_vectors(models: SimpleNamespace) -> None:
    """Catches hidden states in the place of a ColBERT's vectors, and dense vectors that the model does not make."""
    plain = SentenceEncoder.from_pretrained(models.encoder, device="cpu", dtype="float32")
    heads = {"multi": TokenVectors([Normalize()], document_length=9)}
    encoder = SentenceEncoder(plain.model, plain.tokenizer, heads=heads, has_dense=False)
    with client_of(Service({"colbert": lambda: encoder})) as client:
        response = client.post("/", json={"inputs": TEXTS})
        for own, expected in zip(response.json(), encoder.encode_document(TEXTS), strict=True):
            assert len(own) <= 9 and close(own, expected)
        assert response.headers["X-Truncated"] == "1"
        assert client.post("/embed", json={"inputs": TEXTS}).status_code == 424


def test_similarity(client: TestClient, encoder: Any) -> None:
    """Catches numbers that belong to other sentences."""
    inputs = {"source_sentence": TEXTS[0], "sentences": TEXTS[1:]}
    answer = ask(client, "/similarity", inputs=inputs, parameters={"prompt_name": "query"})
    vectors = encoder.encode(TEXTS, prompt=PROMPT)
    assert close(answer, encoder.similarity(vectors[:1], vectors[1:])[0])
    assert ask(client, "/", inputs=inputs) == ask(client, "/similarity", inputs=inputs)


def test_rerank(client: TestClient, service: Service) -> None:
    """Catches an order that is not that of the scores, scores without the sigmoid, and equal texts out of order."""
    texts = [*TEXTS, TEXTS[0], TEXTS[0]]
    ranks = ask(client, "/rerank", query="a river", texts=texts, return_text=True)
    expected = service.models["reranker"].model.predict([("a river", text) for text in texts])
    assert all(close(rank["score"], expected[rank["index"]]) for rank in ranks)
    assert [rank["text"] for rank in ranks] == [texts[rank["index"]] for rank in ranks]
    scores = [rank["score"] for rank in ranks]
    assert scores == sorted(scores, reverse=True)
    same = [rank["index"] for rank in ranks if rank["text"] == TEXTS[0]]
    assert same == sorted(same)
    (raw,) = ask(client, "/rerank", query="a river", texts=TEXTS[:1], raw_scores=True)
    assert close(torch.sigmoid(torch.tensor(raw["score"])), expected[0]) and "text" not in raw


def test_predict(client: TestClient, service: Service) -> None:
    """Catches labels of other texts, pairs that are read as two texts, and a shape that is not TEI's."""
    classifier = service.models["classifier"].model
    one = ask(client, "/predict?model=classifier", inputs=TEXTS[0])
    assert {each["label"] for each in one} == {"bad", "fair", "good"} and close(sum(each["score"] for each in one), 1)
    assert one == sorted(one, key=lambda each: -each["score"])
    pair = ask(client, "/predict?model=classifier", inputs=TEXTS[:2], raw_scores=True)
    expected = classifier.predict([TEXTS[:2]])[0]
    assert close([each["score"] for each in pair], sorted(expected, reverse=True))
    mixed = ask(client, "/predict?model=classifier", inputs=[[TEXTS[0]], TEXTS[:2]])
    assert close([each["score"] for each in mixed[0]], [each["score"] for each in one])
    assert [each["label"] for each in mixed[1]] == [each["label"] for each in pair]
    assert ask(client, "/predict?model=classifier", inputs=TEXTS[0], parameters={}) == [one]
    for function in ("softmax", "sigmoid", "none"):
        parameters = {"function_to_apply": function, "top_k": 2}
        ((best, second),) = ask(client, "/predict?model=classifier", inputs=TEXTS[:2], parameters=parameters)
        logits = torch.tensor(sorted(expected, reverse=True))
        all_scores = {"softmax": logits.softmax(0), "sigmoid": logits.sigmoid(), "none": logits}[function]
        assert close([best["score"], second["score"]], all_scores[:2])


def test_entities(client: TestClient, service: Service) -> None:
    """Catches token classification that is refused (TEI#707), and entities of long texts that are cut."""
    recognizer = service.models["tagger"].model
    texts = [*TEXTS, "", " ".join(TEXTS * 3)]
    answer = ask(client, "/entities", inputs=texts)
    for own, expected in zip(answer, recognizer(texts), strict=True):
        assert [(each["start"], each["end"], each["entity_group"], each["word"]) for each in own] == [
            (each["start"], each["end"], each["entity_group"], each["word"]) for each in expected
        ]
        assert close([each["score"] for each in own], [each["score"] for each in expected])
    assert any(answer) and answer[0] == ask(client, "/predict?model=tagger", inputs=texts[0])
    options = {"aggregation_strategy": "none", "ignore_labels": []}
    tokens = ask(client, "/entities", inputs=texts[0], parameters=options)
    assert [each["word"] for each in tokens] == recognizer.tokenizer.tokenize(texts[0])


def test_tokenize(client: TestClient, encoder: Any) -> None:
    """Catches tokens whose places are not theirs, and special tokens that have one."""
    rows = ask(client, "/tokenize", inputs=[TEXTS[0], LONG])
    assert [token["id"] for token in rows[0]] == encoder.tokenizer.encode_packed(TEXTS[:1]).input_ids.tolist()
    assert [token["special"] for token in rows[0]] == [True, *[False] * (len(rows[0]) - 2), True]
    assert rows[0][0]["start"] is None and len(rows[1]) == 62
    for token in rows[0][1:-1]:
        assert token["text"] == TEXTS[0][token["start"] : token["stop"]]
    (bare,) = ask(client, "/tokenize", inputs=TEXTS[0], add_special_tokens=False, prompt_name=None)
    assert bare == rows[0][1:-1]


def test_decode(client: TestClient, encoder: Any) -> None:
    """Catches texts of other ids, special tokens that stay, and ids that the vocabulary lacks."""
    rows = [encoder.tokenizer.encode_packed([text]).input_ids.tolist() for text in TEXTS[:2]]
    assert ask(client, "/decode", ids=rows) == TEXTS[:2] and ask(client, "/decode", ids=rows[0]) == TEXTS[:1]
    assert ask(client, "/decode", ids=rows[0], skip_special_tokens=False) == [f"[CLS] {TEXTS[0]} [SEP]"]
    for ids, param in (([], "ids"), ([[]], "ids[0]"), ([1, 10**9], "ids"), ([[1], "a"], "ids[1]"), ("a", "ids")):
        response = client.post("/decode", json={"ids": ids})
        assert response.status_code == 400 and error_of(response)["param"] == param


def test_models_are_chosen(client: TestClient, service: Service) -> None:
    """Catches a model that a name does not choose, in any script, and a task that goes to a model without it."""
    of_first = client.get("/info").json()
    assert of_first["model_id"] == of_first["served_model_name"] == "encoder"
    assert of_first["max_concurrent_requests"] == 2**19, "a number, as clients of TEI expect"
    pooling = {name: client.get(f"/info?model={name}").json()["model_type"] for name in ("encoder", "sparse")}
    assert pooling == {"encoder": {"embedding": {"pooling": "mean"}}, "sparse": {"embedding": {"pooling": "splade"}}}
    info = client.get("/info?model=reranker").json()
    assert list(info["model_type"]) == ["reranker"] and info["max_input_length"] == 40 and info["tasks"]
    by_header = client.post("/predict", json={"inputs": "fish"}, headers={"X-Model": "classifier"})
    assert len(by_header.json()) == 3
    assert len(ask(client, "/predict", inputs="fish")) == 1, "the first classifier is the reranker"
    for path, body in {"/embed?model=tagger": {"inputs": "a"}, "/embed_sparse?model=encoder": {"inputs": "a"}}.items():
        refused = client.post(path, json=body)
        assert refused.status_code == 424 and error_of(refused)["code"] == "unsupported_task"
    scope, receive, headers = {"query_string": b""}, cast(Any, None), {b"x-model": "modèle".encode()}
    named = Call(scope, receive, service, "/", "", headers)
    assert named._name() == "modèle"
    unknown = client.post("/embed?model=none", json={"inputs": "a"})
    assert unknown.status_code == 404 and error_of(unknown)["param"] == "model"


def test_the_guess_is_no_smaller_than_the_tokens(client: TestClient, service: Service) -> None:
    """Catches a guess that a text exceeds: then more tokens would wait to be queued than the queue may hold."""
    for name, texts in {"encoder": [*TEXTS, LONG, ""], "reranker": [*TEXTS, Pair(TEXTS[0], LONG)]}.items():
        model = service.models[name]
        lane = Lane(min(model.tasks))
        for text in texts:
            assert model.encode(lane, [text]).n_tokens <= model.bound(lane, text) <= 40
