"""What can be said of LPIPS in closed form, and its files; the official package's values are in `golden_lpips.py`."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import golden_lpips
import numpy as np
import pytest
import torch
from fill import GOLDENS
from golden import Golden
from safetensors.torch import save_file

from consonar.errors import UserError
from consonar.networks import lpips
from consonar.networks.lpips import LPIPS, VGG16Features, load_lpips, weighted_difference


@lru_cache
def filled() -> LPIPS:
    return golden_lpips.filled()


def images() -> tuple[torch.Tensor, torch.Tensor]:
    return golden_lpips.images_of(Golden("lpips_vgg", GOLDENS))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file as torchvision publishes it (with a classifier), by the fill rule."""
    path = tmp_path_factory.mktemp("lpips") / "vgg16.pth"
    torch.save({**filled().trunk.state_dict(), "classifier.6.bias": torch.zeros(1000)}, path)
    yield path
    path.unlink()


def test_released_shapes():
    with torch.device("meta"):
        trunk = VGG16Features()
    ours = {key: list(value.shape) for key, value in trunk.state_dict().items()}
    vgg16, released = (
        json.loads((GOLDENS / "manifests" / f"{name}.json").read_text())["state_dict"]
        for name in ("torchvision_vgg16", "lpips_vgg_v0.1")
    )
    assert ours == {key: shape for key, shape in vgg16.items() if key.startswith("features.")}
    starts = [0, *(i for i, layer in enumerate(trunk.features) if isinstance(layer, torch.nn.MaxPool2d))]
    slices = {key.split(".")[2]: key.split(".")[1] for key in released if key.startswith("net.")}
    assert {number: f"slice{sum(int(number) >= start for start in starts)}" for number in slices} == slices
    with np.load(lpips.LINEAR_WEIGHTS) as arrays:
        assert {key: list(arrays[key].shape) for key in arrays} == {
            key: shape for key, shape in released.items() if key.startswith("lin") and not key.startswith("lins")
        }
        assert all((arrays[key] >= 0).all() for key in arrays)  # hence never negative


def test_one_layer_in_closed_form():
    a, b = torch.tensor([3.0, 4.0, 0.0]).view(1, 3, 1, 1), torch.tensor([0.0, 0.0, 2.0]).view(1, 3, 1, 1)
    weight = torch.tensor([1.0, 10.0, 100.0])
    assert weighted_difference(a, b, weight).item() == pytest.approx(0.36 + 6.4 + 100)
    assert weighted_difference(7 * a, a, weight).item() == pytest.approx(0, abs=1e-10)  # length does not count
    assert weighted_difference(torch.zeros_like(a), a, weight).item() == pytest.approx(0.36 + 6.4)
    low = weighted_difference(a.bfloat16(), b.bfloat16(), weight)
    assert low.dtype == torch.float32 and low.item() == pytest.approx(0.36 + 6.4 + 100)


def test_gradient_reaches_the_first_images_alone():
    distance = filled()
    first, second = (image[:, :, :16, :16].clone().requires_grad_() for image in images())
    distance(first, second).sum().backward()
    assert first.grad.isfinite().all() and (first.grad.abs().amax((1, 2, 3)) > 0).all()
    assert second.grad is None and all(p.grad is None for p in distance.parameters())
    # A step against the gradient lowers the distance by its squared length times the step, to first order.
    with torch.no_grad():
        step = 0.01 * distance(first, second).sum() / first.grad.square().sum()
        moved = distance(first - step * first.grad, second).sum()
        expected = distance(first, second).sum() - step * first.grad.square().sum()
    assert moved.item() == pytest.approx(expected.item(), rel=1e-3)


def test_gradient_where_every_feature_is_zero():
    """d/da (a / (|a| + eps) - u)^2 = -2 u / eps at a = 0, with u = b / (|b| + eps)."""
    a, b = torch.zeros(1, 2, 1, 1, requires_grad=True), torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    weighted_difference(a, b, torch.ones(2)).sum().backward()
    torch.testing.assert_close(a.grad.flatten(), torch.tensor([-1.2e10, -1.6e10]))


def test_it_is_frozen_and_stays_in_evaluation_mode():
    distance = filled()
    assert distance.train() is distance and not any(module.training for module in distance.modules())
    assert not any(p.requires_grad for p in distance.parameters())


@torch.no_grad()
def test_a_file_gives_the_same_distance_and_leaves_random_numbers_alone(weights, tmp_path):
    first, second = (image[:, :, :16, :16] for image in images())
    expected = filled()(first, second)
    state = torch.get_rng_state()
    loaded = load_lpips(weights, check_hash=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(loaded(first, second), expected, rtol=1e-4, atol=1e-6)
    assert len(loaded.weights_sha256) == 64
    again = tmp_path / "vgg16.safetensors"
    save_file(filled().trunk.state_dict(), again)
    torch.testing.assert_close(load_lpips(again, check_hash=False)(first, second), expected, rtol=1e-4, atol=1e-6)
    again.unlink()


def refused(path, *, check_hash=False) -> str:
    with pytest.raises(UserError) as caught:
        load_lpips(path, check_hash=check_hash)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("lpips: ")
    return message


def test_a_missing_file_is_named_with_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path))
    message = refused(None, check_hash=True)
    assert str(tmp_path / "vgg16-397923af.pth") in message
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in message
    assert str(tmp_path / "mine.pth") in refused(tmp_path / "mine.pth")


def test_the_default_file_and_its_hash(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path))
    (tmp_path / "vgg16-397923af.pth").symlink_to(weights)
    digest = load_lpips(check_hash=False).weights_sha256
    message = refused(None, check_hash=True)
    assert digest[:8] in message and "397923af" in message
    monkeypatch.setattr(lpips, "WEIGHTS", replace(lpips.WEIGHTS, sha256_prefix=digest[:8]))
    assert load_lpips().weights_sha256 == digest


def test_damaged_and_other_files_are_refused_in_one_line(weights, tmp_path):
    whole = weights.read_bytes()
    for name, content in {
        "short.pth": whole[: len(whole) // 2], "text.pth": b"not weights\n", "empty.pth": b"",
        "text.safetensors": b"not weights",
    }.items():  # fmt: skip
        path = tmp_path / name
        path.write_bytes(content)
        assert "not a file of weights" in refused(path) and name in refused(path)
        path.unlink()
    for value, expected in (
        ([1, 2], "holds a list"),
        ({"classifier.6.bias": torch.zeros(1000)}, "missing features.0.weight"),
        ({"features.0.weight": torch.zeros(64, 3, 5, 5)}, "features.0.weight is (64, 3, 5, 5)"),
        ({"features.30.weight": torch.zeros(1)}, "unknown features.30.weight"),
    ):
        torch.save(value, tmp_path / "other.pth")
        assert expected in refused(tmp_path / "other.pth")


def test_a_file_of_the_hub_put_there_by_hand(weights, tmp_path, monkeypatch):
    """No network: what lies in the folder that the message names is taken; what does not is one line."""
    from consonar import hub

    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path))

    def unplugged(repository, file):
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "download", unplugged)
    name = "hf:someone/vgg/vgg16.pth"
    with pytest.raises(UserError, match=r"cannot download vgg16.pth .*put it at") as caught:
        load_lpips(name)
    place = Path(str(caught.value).rsplit("put it at ", 1)[1])
    place.parent.mkdir(parents=True)
    place.symlink_to(weights)
    first, second = images()
    torch.testing.assert_close(load_lpips(name)(first, second), filled()(first, second), rtol=1e-4, atol=1e-6)
