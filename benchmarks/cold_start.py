"""A fresh process times one competitor from the start of the process to its first vector, and prints JSON.

    python benchmarks/cold_start.py fastbert FOLDER cuda bfloat16

It prints {"import": s, "load": s, "first": s, "total": s, "second": s}: the import of the library, the loading of the
checkpoint, the first vector on the host, their sum, and one more vector. The suites run it. PyTorch's own import
counts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

TEXT = "From nothing to the first vector."
COMPETITORS = ("fastbert", "transformers", "sentence-transformers")


def loader(competitor: str) -> Callable[[str, str, str], Callable[[str], Any]]:
    """Imports a library. Returns a function that loads (folder, device, dtype) and returns a function from a text to a
    vector.
    """
    if competitor == "fastbert":
        import fastbert

        encoder_class = fastbert.SentenceEncoder
        return lambda folder, device, dtype: encoder_class.from_pretrained(folder, device=device, dtype=dtype).encode
    if competitor == "sentence-transformers":
        from sentence_transformers import SentenceTransformer

        def load_sentence_transformer(folder: str, device: str, dtype: str) -> Callable[[str], Any]:
            model = SentenceTransformer(
                folder, device=device, model_kwargs={"torch_dtype": dtype}, local_files_only=True
            )
            return lambda text: model.encode(text, show_progress_bar=False)

        return load_sentence_transformer
    if competitor == "transformers":
        import torch
        from transformers import AutoModel, AutoTokenizer

        def load_transformers(folder: str, device: str, dtype: str) -> Callable[[str], Any]:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()

            @torch.inference_mode()
            def encode(text: str) -> Any:
                inputs = tokenizer(text, return_tensors="pt").to(device)
                return model(**inputs).last_hidden_state.mean(1).float().cpu().numpy()

            return encode

        return load_transformers
    raise SystemExit(f"competitor: got {competitor!r}, expected one of {', '.join(COMPETITORS)}")


def main(competitor: str, folder: str, device: str, dtype: str) -> None:
    marks = [time.perf_counter()]
    load = loader(competitor)
    marks.append(time.perf_counter())
    encode = load(folder, device, dtype)
    marks.append(time.perf_counter())
    for _ in range(2):
        encode(TEXT)
        marks.append(time.perf_counter())
    spans = [end - start for start, end in zip(marks[:-1], marks[1:], strict=True)]
    seconds = dict(zip(("import", "load", "first", "second"), spans, strict=True))
    print(json.dumps({**seconds, "total": sum(spans[:3])}))


if __name__ == "__main__":
    if len(sys.argv) != 5:
        raise SystemExit("usage: cold_start.py COMPETITOR FOLDER DEVICE DTYPE")
    main(*sys.argv[1:])
