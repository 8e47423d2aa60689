"""The weight rule behind the goldens (`tests/goldens/README.md`), and the comparison."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

GOLDENS = Path(__file__).parents[1] / "goldens"


def value_for(key: str, shape: tuple[int, ...], codebook: bool = False) -> np.ndarray:
    """Values of one tensor, float64: a function of its official state-dict key and its shape alone."""
    count = int(np.prod(shape))
    phase = zlib.crc32(key.encode()) % 9973
    wave = np.sin(1000.0 * np.sin(0.7 * np.arange(count, dtype=np.float64) + phase))
    if len(shape) >= 2:
        value = wave if codebook else 2.0 * wave / np.sqrt(float(np.prod(shape[1:])))
    elif key.endswith(("bias", "running_mean")):
        value = 0.02 * wave
    else:
        value = 1.0 + 0.05 * wave
    return value.reshape(shape)


@torch.no_grad()
def fill(module: nn.Module, codebook_keys: tuple[str, ...] | list[str] = (), prefix: str = "") -> nn.Module:
    """Overwrites every floating tensor of `module` by the rule; `prefix` + our key is the official key."""
    for key, tensor in module.state_dict().items():
        if tensor.ndim and tensor.is_floating_point():
            value = value_for(prefix + key, tuple(tensor.shape), prefix + key in codebook_keys)
            tensor.copy_(torch.from_numpy(value).to(tensor.dtype))
    return module


def load(name: str, folder: Path = GOLDENS) -> tuple[dict[str, np.ndarray], dict]:
    with np.load(folder / f"{name}.npz") as arrays:
        return dict(arrays), json.loads((folder / f"{name}.json").read_text())


def make_tokens(shape: tuple[int, ...], vocab: int, k: int = 1) -> torch.Tensor:
    return torch.from_numpy((7919 * np.arange(int(np.prod(shape))) + k) % vocab).view(shape)


def make_image(shape: tuple[int, ...], k: int = 1, unit: bool = False) -> torch.Tensor:
    image = np.sin(0.013 * np.arange(int(np.prod(shape))) + k).astype(np.float32).reshape(shape)
    return torch.from_numpy((image + 1) / 2 if unit else image)


def compare(
    name: str, key: str, array: np.ndarray | torch.Tensor, tol: float | None = None, folder: Path = GOLDENS
) -> float:
    """Error over tolerance (`tol`, else the golden's own), at most 1; AssertionError otherwise. Integers are equal."""
    arrays, meta = load(name, folder)
    golden, info = arrays[key], meta["arrays"][key]
    array = np.asarray(array.detach() if isinstance(array, torch.Tensor) else array)
    assert list(array.shape) == info["shape"], f"{name}.{key}: shape {array.shape}, golden {info['shape']}"
    if golden.dtype.kind in "iub":
        assert (array == golden).all(), f"{name}.{key}: {(array != golden).mean():.3f} of the entries differ"
        return 0.0
    if info.get("stride"):
        array, scale = array.ravel()[:: info["stride"]], max(1.0, float(arrays[f"{key}__stats"][2]))
    else:
        scale = max(1.0, float(np.abs(golden.astype(np.float64)).max()))
    error = float(np.abs(array.astype(np.float64) - golden).max()) / scale
    tolerance = tol or meta["tolerance"].get("tol", 1e-6)
    assert error <= tolerance, f"{name}.{key}: error {error:.3g} over the tolerance {tolerance:.3g}"
    return error / tolerance
