"""`python -m tests.parity DIR`: every golden of a folder against our classes, one line each; exit 1 on any failure."""

import sys
from pathlib import Path

# The files of this folder import each other by their plain names, as pytest has them do.
sys.path.insert(0, str(Path(__file__).parent))

from runner import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
