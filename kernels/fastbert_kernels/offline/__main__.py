"""This module runs the command when Python is asked for `-m fastbert_kernels.offline`."""

import sys

from fastbert_kernels.offline.command import main

if __name__ == "__main__":
    sys.exit(main())
