"""`python -m tests.fuzz [FORMAT ...]`: every damage to every format; ends with 1 where something went wrong."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.damage import fuzz
from fuzz.formats import FORMATS


def main(names: list[str]) -> int:
    wrong = 0
    for name in names or FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            faults = fuzz(FORMATS[name], Path(folder))
        print(f"{name}: {'fine' if not faults else f'{len(faults)} faults'}", flush=True)
        for fault in faults[:10]:
            print(f"  {fault}")
        wrong += bool(faults)
    return 1 if wrong else 0


sys.exit(main(sys.argv[1:]))
