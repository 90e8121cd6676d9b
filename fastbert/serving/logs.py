"""This module writes logs as lines of JSON. No line contains a text of a request."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any, TextIO

logger = logging.getLogger("fastbert.serving")


class JsonLines(logging.Formatter):
    """A JsonLines formats a record as JSON: time, level, event, and the fields of `extra={"fields": ...}`."""

    def format(self, record: logging.LogRecord) -> str:
        at = getattr(record, "at", record.created)  # the time of an event that is logged later
        time = datetime.fromtimestamp(at, timezone.utc).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": time, "level": record.levelname.lower(), "event": record.getMessage()}
        line.update(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
        return json.dumps(line, ensure_ascii=False, default=str)


def log_to(stream: TextIO = sys.stderr, level: int = logging.INFO) -> None:
    """Sends the logs of the server and of uvicorn to a stream, and replaces other handlers."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    for name in ("fastbert", "uvicorn"):
        each = logging.getLogger(name)
        each.handlers, each.propagate = [handler], False
        each.setLevel(logging.WARNING)
    logger.setLevel(level)
