"""`pretrain` trains a BERT on raw text.

For several processes: torchrun --nproc-per-node N -m fastbert.training.pretrain, with the options of the command.
"""

from __future__ import annotations

import logging
import sys

from fastbert.training import options
from fastbert.training.distributed import Processes
from fastbert.training.run import Result, Run
from fastbert.training.settings import Settings
from fastbert.training.stopping import StopSignals


def pretrain(settings: Settings) -> Result:
    """Trains a BERT on raw text, from a shape or from a checkpoint, and writes a folder that transformers can read.

    With torchrun, every process calls it. Raises ValueError and OSError if a run cannot start or continue, and
    FloatingPointError if a loss or a gradient is not finite, with the step and its documents.
    """
    processes = Processes.start(settings.device)
    try:
        run = Run(settings, processes)
        with StopSignals() as stop:
            return run.train(stop)
    finally:
        processes.close()


def main() -> int:
    """Runs pre-training with the command-line options, under torchrun. Returns the exit code of `fastbert pretrain`."""
    settings = options.parse()
    logging.basicConfig(format="fastbert: %(levelname)s: %(message)s")
    try:
        result = pretrain(settings)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"fastbert: error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0 if result.signal is None else 128 + result.signal


if __name__ == "__main__":
    sys.exit(main())
