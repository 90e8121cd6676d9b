"""This module runs the command when Python is asked for `-m fastbert_kernels.offline`."""

import signal
import sys

from fastbert_kernels.offline.command import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # So that its worker processes end too.
    sys.exit(main())
