"""One golden: what an official implementation computed, compared array by array with what ours computes.

A file `golden_*.py` beside this one handles one official class: `matches(meta)` says whether a golden is its, and
`run(golden)` builds our model from `golden.meta["config"]` and compares every array. Sizes and inputs come from the
json and from the arrays' shapes, never from constants: `python -m tests.parity DIR` runs on any folder of this format.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from fill import compare, load, make_image, make_tokens


@dataclass
class Golden:
    """`arrays` and `meta` of NAME.npz and NAME.json; `errors` maps compared arrays to error over tolerance."""

    name: str
    folder: Path
    errors: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.arrays, self.meta = load(self.name, self.folder)

    @property
    def k(self) -> int:
        return self.meta.get("k", 1)

    def tensor(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key])

    def shape(self, key: str) -> list[int]:
        return self.meta["arrays"][key]["shape"]

    def image(self, key: str) -> torch.Tensor:
        """The image input that the json describes as `make_image((B,3,H,W)[, unit=True])`."""
        text = self.meta["inputs"][key]
        found = re.search(r"make_image\(\(([\d, ]+)\)", text)
        assert found, f"{self.name}: input {key!r} is {text!r}, expected make_image((B,3,H,W))"
        return make_image(tuple(int(n) for n in found[1].split(",")), self.k, unit="unit=True" in text)

    def make_tokens(self, shape: tuple[int, ...] | list[int], vocab_size: int) -> torch.Tensor:
        return make_tokens(tuple(shape), vocab_size, self.k)

    def compare(self, key: str, array: np.ndarray | torch.Tensor, tol: float | None = None) -> None:
        """Floats within the golden's tolerance (or `tol`), integers equal; AssertionError otherwise."""
        self.errors[key] = compare(self.name, key, array, tol, self.folder)

    def compare_indices(self, key: str, indices: torch.Tensor, margin_key: str, margin: float) -> None:
        """Integer indices: equal wherever the golden's margin between best and second best exceeds `margin`."""
        golden, clear = self.arrays[key], self.arrays[margin_key] > margin
        ours = indices.numpy().reshape(golden.shape)
        wrong = (ours != golden) & clear.reshape(golden.shape)
        assert not wrong.any(), f"{self.name}.{key}: {int(wrong.sum())} indices differ beyond the margin {margin}"
        self.errors[key] = 0.0

    def skip(self, key: str, why: str) -> None:
        """An array that has no counterpart in this library, with the reason."""
        self.skipped[key] = why

    def unseen(self) -> list[str]:
        """Arrays of the golden that were neither compared nor skipped nor are auxiliary to another."""
        helpers = {key for key in self.arrays if key.endswith(("__stats", "__min_margin"))}
        return sorted(set(self.meta["arrays"]) - set(self.errors) - set(self.skipped) - helpers)
