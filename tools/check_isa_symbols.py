"""Check that code compiled for one instruction set stays in its own namespace.

An inline or template function compiled in an AVX-512 file and emitted as a weak symbol may be the copy
that the linker keeps for everyone, and then crashes on other processors. So every symbol that such an
object file defines must lie in ``pyengine::cpu::<instruction set>``.

    python tools/check_isa_symbols.py BUILD_DIRECTORY
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

_OBJECT = re.compile(r"isa_(?P<isa>\w+?)\.(cpp\.)?o(bj)?$")


def foreign_symbols(path: Path, isa: str) -> list[str]:
    """Symbols visible to the linker that ``path`` defines outside of its instruction set's namespace."""
    lines = subprocess.run(
        ["nm", "--demangle", "--defined-only", "--extern-only", str(path)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    symbols = [line.split(maxsplit=2)[2] for line in lines if len(line.split(maxsplit=2)) == 3]
    return [s for s in symbols if f"pyengine::cpu::{isa}::" not in s]


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    objects = [(p, m["isa"]) for p in Path(sys.argv[1]).rglob("isa_*") if (m := _OBJECT.match(p.name))]
    if not objects:
        print(f"no isa_*.o below {sys.argv[1]}: give the CMake build directory", file=sys.stderr)
        return 2
    bad = 0
    for path, isa in sorted(objects):
        for symbol in foreign_symbols(path, isa):
            print(f"{path}: defines {symbol}, which other files may share")
            bad += 1
    if bad == 0:
        print(f"{len(objects)} object files define only their own instruction set's symbols")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
