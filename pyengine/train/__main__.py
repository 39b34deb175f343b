"""``torchrun --nproc-per-node N -m pyengine.train OPTIONS``: the same as ``pyengine-cli train OPTIONS``."""

import sys

from pyengine.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]], prog_name="python -m pyengine")
