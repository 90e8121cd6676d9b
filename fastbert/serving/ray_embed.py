"""This module encodes blocks of a long input on a Ray cluster, by Ray Data. It uses actors with one model each.

Ray Data distributes blocks, and restarts an actor that was lost with its process or its node. The block of a lost actor
is encoded again. Each block has exactly one file, so no row is lost or repeated.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastbert.pipelines.bulk import BlockEncoder, BulkJob, Counts
from fastbert.text.blocks import Block

logger = logging.getLogger("fastbert")


def need_ray() -> None:
    """Raises ImportError, which names the package to install, if Ray is missing."""
    if importlib.util.find_spec("ray") is None:
        raise ImportError("--ray needs Ray: pip install 'fastbert-engine[ray]'")


@dataclass(frozen=True)
class Resources:
    """A Resources holds the cluster resources of each actor."""

    n_actors: int
    num_cpus: float
    num_gpus: int


def resources_of(nodes: Sequence[dict[str, Any]], n_actors: int | None) -> Resources:
    """Returns the resources for one actor per GPU. Without GPUs there is one actor per node.

    An actor per node gets as many processors as the smallest node has. nodes: the result of `ray.nodes()`. n_actors:
    another number of actors; without GPUs they share the processors of the nodes.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    n_gpus = int(sum(node.get("GPU", 0) for node in alive))
    if n_gpus:
        return Resources(min(n_actors or n_gpus, n_gpus), 1, 1)
    if not alive:
        raise RuntimeError("--ray: the cluster has no node with a processor")
    n_actors = n_actors or len(alive)
    least = min(int(node["CPU"]) for node in alive)
    actors_a_node = -(-n_actors // len(alive))
    return Resources(n_actors, max(1, least // actors_a_node), 0)


class BlockActor:
    """A BlockActor loads the model once, and encodes blocks."""

    def __init__(
        self, model: str, loading: dict[str, Any], max_length: int | None, job: BulkJob, n_threads: int | None
    ) -> None:
        import torch

        from fastbert.pipelines.sentence import SentenceEncoder
        from fastbert.threads import set_threads

        set_threads(n_threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        encoder = SentenceEncoder.from_pretrained(model, device=device, **loading)
        if max_length is not None:
            encoder.max_seq_length = max_length
        self.encode = BlockEncoder(encoder, job)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Encodes the blocks of a batch, which is columns by name. Returns the counts and the process of each block."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        records = [self._record(row) for row in rows]
        return {name: [record[name] for record in records] for name in records[0]}

    def _record(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encodes a block. It returns an error as a value, because Ray Data would send its text without its type."""
        block = Block(int(row["index"]), str(row["path"]), int(row["start"]), int(row["end"]))
        counts, failure = Counts(), b""
        try:
            counts = self.encode(block)
        except Exception as error:
            failure = _pickled(error)
        return {"index": block.index, "process": os.getpid(), "failure": failure, **asdict(counts)}


def embed_blocks(
    address: str,
    model: str,
    loading: dict[str, Any],
    max_length: int | None,
    job: BulkJob,
    todo: Sequence[Block],
    n_actors: int | None = None,
    n_threads: int | None = None,
    progress: Callable[[dict[str, Any]], Any] | None = None,
) -> Counts:
    """Writes the files of blocks on a cluster, and returns the counts.

    address: the argument of `ray.init`; "" means RAY_ADDRESS or else a new cluster on this machine. model: a folder
    that exists on all nodes. loading: arguments of `SentenceEncoder.from_pretrained`. progress: is called with the
    record of each block. Raises ImportError without Ray. Raises the error of a block without a second attempt.
    """
    need_ray()
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(address=address or None, log_to_driver=False, logging_level=logging.WARNING)
    counts = Counts()
    try:
        resources = resources_of(ray.nodes(), n_actors)
        logger.info("embed: %d blocks, %s", len(todo), resources)
        ray.data.DataContext.get_current().enable_progress_bars = False
        blocks = ray.data.from_items([asdict(block) for block in todo], override_num_blocks=len(todo))
        records = blocks.map_batches(
            BlockActor,
            fn_constructor_args=(model, loading, max_length, job, n_threads),
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=min(resources.n_actors, len(todo))),
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
        )
        logging.getLogger("ray.data").setLevel(logging.WARNING)  # Ray Data sets the level when it makes a dataset
        for record in records.iter_rows():
            if record["failure"]:
                raise pickle.loads(record["failure"])
            counts.add(Counts(record["texts"], record["truncated"], record["truncated_tokens"]))
            if progress is not None:
                progress(record)
    finally:
        if started:
            ray.shutdown()
    return counts


def _pickled(error: Exception) -> bytes:
    """Returns the pickled error. If it cannot be pickled, an error with its text replaces it."""
    try:
        pickle.loads(pickled := pickle.dumps(error))
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return pickled
