"""The clients of OpenAI and of the Hugging Face hub work against the server, and its OpenAPI document is true."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient, constants
from huggingface_hub.errors import HfHubHTTPError

from fastbert.serving import openapi
from fastbert.serving.app import ENDPOINTS
from fastbert.serving.auth import Keys
from fastbert.serving.server import ServerThread
from fastbert.serving.service import Service
from serving_cases import TEXTS, client_of, loaders, save_models, served

KEY = "a-key"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(models: SimpleNamespace) -> Iterator[ServerThread]:
    with served(loaders(models), keys=Keys([KEY])) as server:
        yield server


@pytest.fixture(scope="module")
def encoder(server: ServerThread) -> Any:
    return server.server.service.models["encoder"].model


def test_openai(server: ServerThread, encoder: Any) -> None:
    """Catches an answer or an error that the client of OpenAI does not understand."""
    expected = encoder.encode(TEXTS)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        assert [model.id for model in client.models.list()][:2] == ["encoder", "reranker"]
        assert client.models.retrieve("tagger").owned_by == "fastbert"
        answer = client.embeddings.create(model="encoder", input=TEXTS)  # asks for base64 by itself
        assert np.allclose([each.embedding for each in answer.data], expected, atol=2e-6)
        assert answer.usage.total_tokens == len(encoder.tokenizer.encode_packed(TEXTS).input_ids)
        assert answer.truncated == 0  # type: ignore[attr-defined]
        plain = client.embeddings.create(model="encoder", input=TEXTS[0], encoding_format="float", dimensions=4)
        assert len(plain.data[0].embedding) == 4
        with pytest.raises(openai.NotFoundError) as missing:
            client.embeddings.create(model="none", input="a")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as wrong:
            client.embeddings.create(model="encoder", input=[])
        assert wrong.value.param == "input"
    wrong_key = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with wrong_key, pytest.raises(openai.AuthenticationError):
        wrong_key.models.list()


def test_huggingface_hub(server: ServerThread, encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an answer or an error that the client of the hub does not understand."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # which forbids the client this machine, too

    def client(path: str) -> InferenceClient:
        return InferenceClient(model=server.url + path, token=KEY)

    expected = encoder.encode(TEXTS)
    for path in ("/embed", "/"):
        assert np.allclose(client(path).feature_extraction(TEXTS), expected, atol=2e-6)
    prompted = client("/embed").feature_extraction(TEXTS[0], prompt_name="query", normalize=True, truncate=True)
    assert np.allclose(prompted, encoder.encode(TEXTS[:1], prompt_name="query"), atol=2e-6)
    scores = client("/similarity").sentence_similarity(TEXTS[0], other_sentences=TEXTS[1:])
    assert np.allclose(scores, encoder.similarity(expected[:1], expected[1:])[0], atol=2e-6)
    classes = client("/predict?model=classifier").text_classification(TEXTS[0])
    assert {each.label for each in classes} == {"bad", "fair", "good"}
    entities = client("/entities").token_classification(TEXTS[0], aggregation_strategy="simple")
    recognizer = server.server.service.models["tagger"].model
    assert [(each.entity_group, each.start, each.end) for each in entities] == [
        (each["entity_group"], each["start"], each["end"]) for each in recognizer(TEXTS[0])
    ]
    with pytest.raises(HfHubHTTPError, match="prompt_name"):
        client("/embed").feature_extraction(TEXTS[0], prompt_name="none")
    assert np.allclose(asyncio.run(_ask(server.url)), expected, atol=2e-6)


async def _ask(url: str) -> Any:
    async with AsyncInferenceClient(model=f"{url}/embed", token=KEY) as client:
        return await client.feature_extraction(TEXTS)


def test_the_document_names_all_routes(models: SimpleNamespace) -> None:
    """Catches a route that the document lacks, one that it made up, and a page that loads files from elsewhere."""
    paths = openapi.document()["paths"]
    documented = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    answering = {(each.method, each.path.replace(":path", "")) for each in ENDPOINTS}
    probes = {("GET", path) for path in ("/health", "/ready", "/metrics")}
    assert documented == answering - {("POST", "/")} | probes
    page = openapi.page()
    assert "<!--" not in page and all(path in page for path in paths)
    assert re.findall(r"""(?:src|href)=["']([^"']*)""", page) == ["data:,", "openapi.json"], "also for the icon"
    assert not re.search(r"@import|url\(|https?:", page)
    assert page.count("<button>") == page.count("<section data-method=") == len(documented), "each can be tried"
    assert 'data-path="/v1/models/{name}"' in page and f'name="name" value="{openapi.MODEL}"' in page
    with client_of(Service(loaders(models, "encoder"))) as client:
        assert client.get("/docs").text == openapi.page("encoder") and "&quot;encoder&quot;" in client.get("/docs").text
        assert client.get("/openapi.json").json() == openapi.document("encoder")


@pytest.mark.slow
def test_schemathesis(models: SimpleNamespace, tmp_path: Path) -> None:
    """Catches an answer that the OpenAPI document does not allow, a wrong request that is taken, and one that ends in a
    500.

    A request that the document allows may be refused: it may have ids that the vocabulary lacks.
    """
    statuses = "[checks.negative_data_rejection]\nexpected-statuses = [400, 404, 405, 413, 415, 424]\n"
    (tmp_path / "schemathesis.toml").write_text(statuses)
    program = Path(sys.executable).with_name("schemathesis")
    with served(loaders(models)) as server:
        done = subprocess.run(
            [
                str(program), "run", f"{server.url}/openapi.json", "--max-examples=4", "--seed=1", "--no-color",
                "--phases=examples,coverage,fuzzing", "--exclude-checks=positive_data_acceptance",
            ],
            cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-8000:]
        assert server.server.service.alive
