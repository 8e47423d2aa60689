"""`python -m consonar` is `consonar`."""

from consonar.cli import main

main()
