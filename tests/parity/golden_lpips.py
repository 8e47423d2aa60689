"""LPIPS against the official package: distances of pairs, per layer, and the features below them."""

import torch
from fill import fill, make_image
from golden import Golden

from consonar.networks.lpips import LPIPS, VGG16Features


def matches(meta: dict) -> bool:
    return meta["config"].get("cls") == "lpips.LPIPS(net='vgg', version='0.1')"


def filled() -> LPIPS:
    with torch.device("meta"):
        trunk = VGG16Features()
    return LPIPS(fill(trunk.to_empty(device="cpu")), "filled")


def images_of(golden: Golden) -> tuple[torch.Tensor, torch.Tensor]:
    """image0 by the rule with k, image1 with k + 0.5 but for its second row; what the json says in words."""
    text = golden.meta["inputs"]["image1"]
    assert "k=1+0.5" in text.replace(" ", "") or "+0.5" in text, f"{golden.name}: image1 is {text!r}"
    first = golden.image("image0")
    second = make_image(tuple(first.shape), golden.k + 0.5)
    second[1] = 0.5 * first[1] + 0.1
    return first, second


@torch.inference_mode()
def run(golden: Golden) -> None:
    distance, (first, second) = filled(), images_of(golden)
    ours = distance(first, second).view(-1, 1, 1, 1)
    assert ours.shape == (len(first), 1, 1, 1)
    golden.compare("distance", ours)
    golden.compare("distance_llamagen_copy", ours)
    golden.compare("distance_self", distance(first, first).view(-1, 1, 1, 1))
    # Their flag maps [0, 1] to [-1, 1]; ours reads [-1, 1] only, so the caller maps.
    as_unit = [(image + 1) / 2 for image in (first, second)]
    golden.compare("distance_normalize_flag", distance(*(2 * image - 1 for image in as_unit)).view(-1, 1, 1, 1))
    maps = distance.maps(first, second)
    sides = [first.shape[-1] // 2**level for level in range(5)]
    assert [tuple(layer.shape) for layer in maps] == [(len(first), side, side) for side in sides]
    golden.compare("per_layer", torch.stack([layer.mean((1, 2)) for layer in maps]))
    for index, layer in enumerate(distance.layers(first)):
        golden.compare(f"feat{index}", layer)
