"""Goldens of the FID Inception network: the classes of pytorch-fid and of torch-fidelity."""

import re
from functools import lru_cache
from typing import Any

import torch
from fill import fill, make_image
from golden import Golden
from torch.nn import functional

from consonar.networks.inception import (
    FRONT_ENDS,
    INPUT_SIZE,
    InceptionV3,
    half_pixel_pixels,
    resize_from_corner,
)

POOLED = {"feat_64": 0, "feat_192": 1, "feat_768": 2}
"""torch-fidelity's outputs that are means of a feature map, and which."""


def matches(meta: dict[str, Any]) -> bool:
    return bool(re.search(r"pytorch_fid.*InceptionV3|torch_fidelity.*InceptionV3", meta["config"].get("cls", "")))


def run(golden: Golden) -> None:
    handle = run_pytorch_fid if "pytorch_fid" in golden.meta["config"]["cls"] else run_torch_fidelity
    with torch.no_grad():
        handle(golden)


@lru_cache
def filled() -> InceptionV3:
    with torch.device("meta"):
        network = InceptionV3()
    return fill(network.to_empty(device="cpu"))


def option(golden: Golden, name: str) -> bool:
    """A switch of the official class, from the text of its call; both that are read here are on by default."""
    return f"{name}=False" not in golden.meta["config"]["cls"].replace(" ", "")


def pool3_and_maps(network: InceptionV3, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The pooled features, and what goes into the layers after the two pools of the stem and before 8 x 8 places."""
    maps: list[torch.Tensor] = []
    layers = network.Conv2d_3b_1x1, network.Mixed_5b, network.Mixed_7a
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: maps.extend(inputs)) for layer in layers]
    pool3, _ = network(pixels)
    for hook in hooks:
        hook.remove()
    return pool3, maps


def run_pytorch_fid(golden: Golden) -> None:
    network = filled()
    for key in golden.meta["inputs"]:
        images = golden.image(key)
        suffix = suffix_of(golden, images.shape[-1])
        scaled = images * 2 - 1 if option(golden, "normalize_input") else images
        pixels = half_pixel_pixels(scaled) if option(golden, "resize_input") else scaled
        pool3, maps = pool3_and_maps(network, pixels)
        found = {f"block{index}_{suffix}": part for index, part in enumerate(maps)}
        found |= {f"block3_{suffix}": pool3[:, :, None, None], f"pool3_{suffix}": pool3}
        found[f"logits_{suffix}"] = network.fc(pool3)
        found[f"logits_unbiased_{suffix}"] = functional.linear(pool3, network.fc.weight)
        if images.shape[-1] != INPUT_SIZE:  # the resize alone, before the scaling
            found["resized"] = half_pixel_pixels(images)
        for name in found.keys() & golden.meta["arrays"].keys():
            golden.compare(name, found[name])


def suffix_of(golden: Golden, size: int) -> str:
    """How arrays of the image with `size` px end: its size, or `small`."""
    return str(size) if any(key.endswith(f"_{size}") for key in golden.meta["arrays"]) else "small"


def run_torch_fidelity(golden: Golden) -> None:
    network, pixels = filled(), pixels_of(golden)
    pool3, maps = pool3_and_maps(network, FRONT_ENDS["inception"](pixels / 127.5 - 1))
    found = {name: maps[index].mean((2, 3)) for name, index in POOLED.items()}
    found |= {"feat_2048": pool3, "resized": resize_from_corner(pixels, INPUT_SIZE)}
    found["feat_logits"] = network.fc(pool3)
    found["feat_logits_unbiased"] = functional.linear(pool3, network.fc.weight)
    for name in found.keys() & golden.meta["arrays"].keys():
        golden.compare(name, found[name])


def pixels_of(golden: Golden) -> torch.Tensor:
    """The 8-bit input as floats 0 to 255, which the json describes with its size `S` set apart."""
    (text,) = golden.meta["inputs"].values()
    shape, size = re.search(r"make_image\(\(([^)]*)\)", text), re.search(r"\bS\s*=\s*(\d+)", text)
    assert shape and "round(255" in text, f"{golden.name}: input {text!r}, expected round(255*make_image((B,3,H,W)))"
    numbers = [size[1] if part.strip() == "S" and size else part for part in shape[1].split(",")]
    return (255 * make_image(tuple(int(number) for number in numbers), golden.k, unit=True)).round()
