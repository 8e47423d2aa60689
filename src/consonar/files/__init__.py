"""Files: read with care, written whole or not at all, held by one process at a time."""
