"""``python -m pyengine``: the same as ``pyengine-cli``."""

from pyengine.cli import main

if __name__ == "__main__":
    main(prog_name="python -m pyengine")
