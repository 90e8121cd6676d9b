"""`fastbert serve` answers over HTTP, in the formats of OpenAI and text-embeddings-inference."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from typing import Any

from fastbert.cli.options import add_command, add_loading_options, add_message_options, positive_int


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = add_command(
        commands,
        "serve",
        "vectors, scores and entities over HTTP",
        """A model is a folder or hub id; NAME=FOLDER gives it a name for requests. The head of a model determines its
routes: vectors, scores of pairs, classes or entities. /docs shows the routes. SIGTERM stops the server after it has
answered the accepted requests. The environment variable FASTBERT_API_KEY may hold an API key.

examples:
  fastbert serve sentence-transformers/all-MiniLM-L6-v2
  fastbert serve minilm=./all-MiniLM-L6-v2 reranker=./cross-encoder --port 8080 --batch-invariant""",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder, hub id, or NAME=FOLDER")
    parser.add_argument("--host", default="127.0.0.1", help="address; 0.0.0.0: all networks (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0: a free one (default: %(default)s)")
    parser.add_argument("--api-key-file", metavar="FILE", help="file with one API key on each line")
    parser.add_argument(
        "--batch-invariant", action="store_true", help="the bits of an answer do not depend on other requests"
    )
    parser.add_argument("--refuse-long", action="store_true", help="long texts are an error, if a request sets nothing")
    parser.add_argument("--max-length", type=positive_int, metavar="N", help="greatest sequence length, in tokens")
    parser.add_argument("--batch-tokens", type=positive_int, metavar="N", help="greatest number of tokens in a batch")
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--body-mib", type=positive_int, default=16, metavar="N", help="size of a request body in MiB (default: 16)"
    )
    limits.add_argument(
        "--max-texts", type=positive_int, default=2048, metavar="N", help="texts in a request (default: 2048)"
    )
    limits.add_argument(
        "--max-tokens", type=positive_int, default=2**18, metavar="N", help="tokens in a request (default: %(default)s)"
    )
    limits.add_argument(
        "--queue-tokens", type=positive_int, default=2**19, metavar="N",
        help="tokens that wait or run for a model; a full queue answers with 429 (default: %(default)s)",
    )  # fmt: skip
    limits.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds until the answer (default: 60)"
    )
    limits.add_argument(
        "--body-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds until the headers, and again until the body (default: 30)",
    )
    limits.add_argument(
        "--drain", type=float, default=2.0, metavar="S",
        help="seconds in which /ready says no, but requests are still accepted, before the stop (default: 2)",
    )  # fmt: skip
    add_loading_options(parser.add_argument_group("model"))
    add_message_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Serves until a signal comes."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"serve: {error.name} is not installed: pip install 'fastbert-engine[serve]'") from error
    from fastbert.serving import logs, server
    from fastbert.serving.auth import Keys
    from fastbert.serving.limits import Limits
    from fastbert.serving.service import Service, Settings

    limits = Limits(
        body_bytes=args.body_mib * 2**20,
        texts=args.max_texts,
        tokens=min(args.max_tokens, args.queue_tokens),
        queue_tokens=args.queue_tokens,
        body_seconds=args.body_timeout,
        seconds=args.timeout,
    )
    settings = Settings(limits, Keys.read(args.api_key_file), args.batch_invariant, not args.refuse_long)
    loaders = {name: _loader(args, source) for name, source in map(_name_and_source, args.models)}
    if len(loaders) < len(args.models):
        raise ValueError("serve: two models have the same name: NAME=FOLDER gives each its own")
    logs.log_to()
    service = Service(loaders, settings)
    server.run(service, args.host, args.port, args.drain)
    if service.abandoned:  # a thread loads or downloads a model; Python would wait for this thread
        logging.shutdown()
        os._exit(0)


def _name_and_source(model: str) -> tuple[str, str]:
    """Splits NAME=FOLDER. Without NAME, a folder has its last part as its name, and a hub id is its own name."""
    name, sign, source = model.partition("=")
    if sign and name and not os.path.exists(model):
        return name, source
    is_folder = os.path.isdir(os.path.expanduser(model))
    return (os.path.basename(os.path.abspath(os.path.expanduser(model))) if is_folder else model), model


def _loader(args: argparse.Namespace, source: str) -> Callable[[], Any]:
    from fastbert.cli import models

    return lambda: models.load_served(source, args)
