"""What the numbers of cells are of: those of two protocols are told apart and not compared."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from consonar.evaluation.settings import EvaluationSettings
from consonar.json_types import JsonMap


@dataclass(frozen=True)
class Protocols:
    """Those of all cells, of one kind of number."""

    called: str
    of_rows: dict[str, dict[int, str]] = field(default_factory=dict)
    """Row: seed: what tells its protocol from others."""
    known: dict[str, tuple[str, str]] = field(default_factory=dict)
    """All of these, with the text of each and the hashes of its files."""

    def add(self, row: str, seed: int, key: str, text: str, files: str = "") -> None:
        self.known.setdefault(key, (text, files))
        self.of_rows.setdefault(row, {})[seed] = key

    @property
    def lines(self) -> list[str]:
        """A line each; of several each row names its own."""
        texts = [text for text, _ in self.known.values()]
        told = (f"{text} ({files})" if files and texts.count(text) > 1 else text for text, files in self.known.values())
        return [f"{self.called}{f' {at}' if len(texts) > 1 else ''}: {text}." for at, text in enumerate(told, start=1)]

    def name(self, row: str) -> str:
        """What a row says of its own; "" where all have the same."""
        places = sorted({list(self.known).index(key) + 1 for key in self.of_rows.get(row, {}).values()})
        return f"{self.called.lower()} {' and '.join(map(str, places))}" if len(self.known) > 1 and places else ""

    def alike(self, row: str, other: str, pairs: Iterable[tuple[int, int]] | None) -> list[tuple[int, int]]:
        """Of these pairs of seeds of two rows (None: all equal ones) those between which numbers may be compared."""
        ours, theirs = (self.of_rows.get(name, {}) for name in (row, other))
        pairs = [(seed, seed) for seed in ours] if pairs is None else pairs
        return [(one, two) for one, two in pairs if one in ours and ours[one] == theirs.get(two)]


def measured_as(results: JsonMap) -> tuple[str, str, str]:
    """What tells the protocol of results from others, its text, and the hashes of its files."""
    keys = ("reference", "feature_network", "config")
    reference, network, config = (one if isinstance(one, dict) else {} for one in map(results.get, keys))
    hashes = {key.removesuffix("_sha256"): of for key, of in reference.items() if key.endswith("_sha256")}
    counts, name = sorted({str(line.get("num_samples")) for line in results["rows"]}), network.get("name")
    settings = EvaluationSettings.deciding(config) | {"draws": 1}  # of which no spread enters the tables
    changed = [f"; {key} {value}" for key, value in settings.items() if value != getattr(EvaluationSettings, key)]
    text = results.get("protocol") or f"{', '.join(counts)} samples, {name}, against {reference.get('name')}"
    key = str([hashes or reference.get("name"), name, network.get("sha256"), counts, settings])
    files = ", ".join(f"{file} {str(of)[:12]}" for file, of in {name: network.get("sha256"), **hashes}.items())
    return key, "".join([str(text), *changed]), files
