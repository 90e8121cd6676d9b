"""`pretrain` makes a BERT of raw text.

On several processes: torchrun --nproc-per-node N -m fastbert.training.pretrain, with the options of the command.
"""

from __future__ import annotations

from fastbert.training.distributed import Processes
from fastbert.training.run import Result, Run
from fastbert.training.settings import Settings
from fastbert.training.stopping import StopSignals


def pretrain(settings: Settings) -> Result:
    """Trains a BERT on raw text, from a shape or from a checkpoint, and leaves a folder that transformers reads.

    Started by torchrun, every process calls it. Raises ValueError and OSError for what a run cannot start or go on
    with, and FloatingPointError for a loss or a gradient that is not finite, with the step and its documents.
    """
    processes = Processes.start(settings.device)
    try:
        with StopSignals() as stop:
            return Run(settings, processes).train(stop)
    finally:
        processes.close()
