"""The FID Inception network: released shapes, front ends in closed form, its outputs, and the file of its weights.

The goldens (`tests/parity/golden_inception.py`) hold its arithmetic.
"""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from parity.fill import fill
from rounding import assert_rounding

from consonar import cli
from consonar.errors import UserError
from consonar.evaluation import features as sets
from consonar.evaluation.image_sets import ImageSet
from consonar.evaluation.settings import EvaluationSettings
from consonar.files.writers import file_sha256
from consonar.networks import inception, load_feature_network, record_of
from consonar.networks.inception import InceptionFeatures, InceptionV3, load_inception, resize_from_corner

TESTS = Path(__file__).parents[1]


def meta() -> InceptionV3:
    with torch.device("meta"):
        return InceptionV3()


@lru_cache
def filled() -> InceptionV3:
    return fill(meta().to_empty(device="cpu"))


def pictures(count: int, size: int = 24) -> torch.Tensor:
    """8-bit images (count, 3, size, size) in [-1, 1]."""
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0))
    return pixels.float() / 127.5 - 1


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file as it is published, in the old format that has no counters of training batches, by the fill rule."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({k: v for k, v in filled().state_dict().items() if not k.endswith("num_batches_tracked")}, path)
    yield path
    path.unlink()


def test_keys_shapes_and_parameters_are_the_released_ones():
    manifest = json.loads((TESTS / "goldens/manifests/pt_inception-2015-12-05.json").read_text())
    network = meta()
    state = network.state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == manifest["state_dict"]
    assert sum(value.numel() for value in network.parameters()) == manifest["total_parameters"]
    assert sum(value.numel() for value in state.values()) == manifest["total_state_dict_elements"]
    assert {key for key, _ in network.named_buffers()} == set(manifest["buffers_in_state_dict"])


def test_the_tensorflow_resize_counts_positions_from_the_corner():
    ramp = torch.tensor([0.0, 10.0]).view(1, 1, 1, 2).expand(1, 1, 2, 2)
    assert resize_from_corner(ramp, 4)[0, 0].tolist() == [[0, 5, 10, 10]] * 4
    assert resize_from_corner(ramp.mT, 4)[0, 0].tolist() == [[0] * 4, [5] * 4, [10] * 4, [10] * 4]
    oblong = torch.arange(12.0).view(1, 1, 2, 6)
    assert resize_from_corner(oblong, 3)[0, 0].tolist() == [[0, 2, 4], [4, 6, 8], [6, 8, 10]]  # nothing is averaged
    image = torch.rand(2, 3, 7, 7)
    assert torch.equal(resize_from_corner(image, 7), image)


def test_the_front_ends_scale_as_their_sources():
    levels = torch.tensor([0, 1, 128, 255])
    images = (levels / 127.5 - 1).view(4, 1, 1, 1).expand(4, 3, 5, 5)
    pixels = inception.tensorflow_pixels(images)
    assert pixels.shape == (4, 3, 299, 299)
    assert torch.equal(pixels[:, 0, 100, 100], (levels - 128) / 128)
    assert torch.equal(inception.tensorflow_pixels(images + 0.3 / 127.5), pixels)  # to the nearest of 256 levels
    half = inception.half_pixel_pixels(images)
    assert half.shape == (4, 3, 299, 299)
    assert torch.allclose(half[:, 0, 100, 100], levels / 127.5 - 1)
    # Half-pixel centres keep a symmetric picture symmetric; positions from the corner do not.
    ramp = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2).expand(1, 3, 2, 2)
    assert torch.allclose(inception.half_pixel_pixels(ramp), -inception.half_pixel_pixels(ramp).flip(3), atol=1e-6)
    assert inception.tensorflow_pixels(ramp).mean() > 0.2


@torch.no_grad()
def test_the_spatial_features_are_seven_channels_of_the_first_branch():
    network, seen = filled(), []
    hook = network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    _, spatial = network(inception.tensorflow_pixels(pictures(1)))
    hook.remove()
    assert spatial.shape == (1, InceptionFeatures.num_spatial) == (1, 2023)
    expected = seen[0][0, :7]  # (7, 17, 17)
    assert torch.equal(spatial.view(17, 17, 7), expected.permute(1, 2, 0))


def test_outputs_of_an_image_ignore_its_batch():
    network = InceptionFeatures("inception", filled(), "filled")
    assert isinstance(network, sets.FeatureNetwork) and isinstance(network, sets.ScoringNetwork)
    images = pictures(3)
    features, spatial, probabilities = network.outputs(images)
    assert features.shape == (3, network.num_features) and features.dtype == torch.float32
    assert torch.equal(network(images), features)
    for whole, alone in zip((features, spatial, probabilities), network.outputs(images[1:2]), strict=True):
        assert_rounding(whole[1:2], alone, 20_000)  # 94 convolutions of up to 448 x 9 products
    assert features.std(0).max() > 1e-3  # the images are told apart
    assert_rounding(probabilities, (features @ filled().fc.weight.T).softmax(1), 2048)
    other = InceptionFeatures("inception-pytorch-fid", filled(), "filled")(images)
    assert (other - features).abs().max() > 1e-3


def test_a_stream_of_images_gives_moments_of_all_outputs():
    images = ((pictures(5) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
    network = InceptionFeatures("inception", filled(), "filled")
    stream = ImageSet("memory", lambda size: (images[i : i + size] for i in range(0, 5, size)))
    found = sets.extract_features(
        network,
        stream,
        EvaluationSettings(batch_size=2, max_neighbours_images=3, num_neighbours=1),
        part_of=torch.tensor([0, 1, 0, 1, -1]),
    )
    features, spatial, probabilities = (part.double() for part in network.outputs(pictures(5)))
    torch.testing.assert_close(found.moments.mean, features.mean(0), rtol=1e-4, atol=1e-5)
    assert [kept.spatial.count for kept in (found, *found.parts)] == [5, 2, 2]
    torch.testing.assert_close(found.spatial.mean, spatial.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.parts[1].spatial.mean, spatial[[1, 3]].mean(0), rtol=1e-4, atol=1e-5)
    expected = sets.InceptionScore(torch.zeros(2))
    expected.update(probabilities[[0, 2]])
    assert found.parts[0].scores.value == pytest.approx(expected.value, rel=1e-6)


def test_it_is_frozen_and_stays_in_evaluation_mode():
    network = meta()
    assert network.train() is network and not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_file_gives_the_same_features_and_leaves_random_numbers_alone(weights):
    images = pictures(1)
    state = torch.get_rng_state()
    loaded = load_inception("inception", path=weights, check_hash=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert_rounding(loaded(images), InceptionFeatures("inception", filled(), "filled")(images), 20_000)
    assert len(loaded.weights_sha256) == 64


def refused(path, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_inception(path=path, **{"check_hash": False, **options})
    message = str(caught.value)
    assert "\n" not in message and message.startswith("inception: ")
    return message


def test_a_missing_file_is_named_with_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path))
    name = "pt_inception-2015-12-05-6726825d.pth"
    with pytest.raises(UserError) as caught:
        load_feature_network("inception")
    assert str(tmp_path / name) in str(caught.value) and "SHA-256 6726825d" in str(caught.value)
    assert f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{name}" in str(caught.value)
    assert str(tmp_path / "mine.pth") in refused(tmp_path / "mine.pth")


def test_the_default_file_its_hash_and_both_names(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path))
    (tmp_path / inception.WEIGHTS.name).symlink_to(weights)
    digest = file_sha256(weights)
    message = refused(None, check_hash=True)
    assert digest[:8] in message and "6726825d" in message
    monkeypatch.setattr(inception, "WEIGHTS", replace(inception.WEIGHTS, sha256_prefix=digest[:8]))
    assert record_of(load_feature_network("inception")) == {"name": "inception", "sha256": digest}
    placed = f"inception-pytorch-fid:{weights}"
    assert record_of(load_feature_network(placed)) == {
        "name": "inception-pytorch-fid", "sha256": digest, "place": placed,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"inception: no weights at nowhere\.pth"):
        load_feature_network("inception:nowhere.pth")
    assert "choices: inception, inception-pytorch-fid" in refused(weights, name="fid")
    for folder, first in (("samples", 0), ("reference", 10)):
        (tmp_path / folder).mkdir()
        for index in range(first, first + 4):
            picture(index).save(tmp_path / folder / f"{index:02d}.png")
    out = tmp_path / "results.json"
    command = ["evaluate", str(tmp_path / "samples"), "--reference", str(tmp_path / "reference"), "--draws", "1"]
    cli.main([*command, "--metrics", "kid", "--feature-network", "inception-pytorch-fid", "--out", str(out)])
    results = json.loads(out.read_text())
    assert results["feature_network"] == {"name": "inception-pytorch-fid", "sha256": digest}
    assert any(key.startswith("KID(inception-pytorch-fid)") for key in results["metrics"])


def test_damaged_and_other_files_are_refused_in_one_line(weights, tmp_path):
    whole = weights.read_bytes()
    for name, content in {"short.pth": whole[: len(whole) // 2], "text.pth": b"not weights\n"}.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert "not a file of weights" in refused(path) and name in refused(path)
        path.unlink()
    for value, expected in (
        ([1, 2], "holds a list"),
        ({"fc.bias": torch.zeros(1008)}, "missing Conv2d_1a_3x3.conv.weight"),
        ({"fc.bias": torch.zeros(1000)}, "fc.bias is (1000,), the model has (1008,)"),
        ({"AuxLogits.fc.bias": torch.zeros(1)}, "unknown AuxLogits.fc.bias"),
    ):
        torch.save(value, tmp_path / "other.pth")
        assert expected in refused(tmp_path / "other.pth")
