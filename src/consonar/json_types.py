"""What a JSON object is to Python, for annotations."""

from collections.abc import Mapping
from typing import Any

# Any: a file may hold anything under a key, and whoever reads a key checks it or calculates with it; a union of all
# that JSON has would ask for a cast at each. What has a shape of its own is a dataclass, read by `config_io`.
Json = dict[str, Any]
JsonMap = Mapping[str, Any]
"""The same where it is only read."""
