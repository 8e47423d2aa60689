"""PSNR, SSIM, codebook usage and rFD of a real grey-level tokenizer and in closed form."""

import json
import shutil

import numpy as np
import pytest
import scipy.ndimage
import torch
from conftest import picture
from torch.nn import functional

from consonar import networks
from consonar.components import save_tokenizer
from consonar.data.splits import open_splits
from consonar.errors import UserError
from consonar.evaluation.image_sets import ImageSet
from consonar.evaluation.reconstruction import (
    evaluate_tokenizer,
    measure_reconstruction,
    reconstruction_metrics,
    round_to_8_bits,
)
from consonar.files.readers import read_json
from consonar.files.writers import write_json
from consonar.metrics.pixels import gaussian_filter, psnr, ssim
from consonar.types import Grid


class GreyLevels:
    """A tokenizer: 4 x 4 pixel patches, token = the mean grey level in `vocab_size` steps."""

    name, fingerprint, num_tokens, code_dim, image_size, grid = "grey", "0", 16, 1, 16, Grid(4, 4)

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def encode(self, images):
        grey = functional.avg_pool2d(images.mean(1, keepdim=True), 4).flatten(1)
        return ((grey + 1) / 2 * (self.vocab_size - 1)).round().long()

    def embed(self, tokens):
        return (tokens / (self.vocab_size - 1) * 2 - 1)[..., None]

    def decode(self, tokens):
        return self.decode_embeddings(self.embed(tokens))

    def decode_embeddings(self, codes):
        return functional.interpolate(codes.reshape(-1, 1, self.grid.rows, self.grid.columns), scale_factor=4).expand(
            -1, 3, -1, -1
        )


class MeanColour:
    name, weights_sha256, num_features = "mean-colour", "0", 3

    def __call__(self, images):
        return images.mean((2, 3))


class Difference:
    name = "difference"

    def __call__(self, images, originals):
        return (images - originals).abs().mean((1, 2, 3))


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def test_rounding_is_that_of_an_8_bit_file():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 1.7, 200 / 127.5 - 1])
    assert (round_to_8_bits(values) * 255).tolist() == [0, 0, 128, 255, 255, 200]


def test_psnr_of_a_constant_offset():
    original = torch.full((2, 3, 8, 8), 0.25, dtype=torch.float64)
    offset = torch.tensor([0.1, 0.01], dtype=torch.float64)[:, None, None, None]
    assert psnr(original + offset, original).tolist() == pytest.approx([20, 40])
    assert psnr(original, original).tolist() == [100, 100]


def test_gaussian_filter_equals_scipy(rng):
    images = torch.rand(2, 3, 17, 14, generator=rng, dtype=torch.float64)
    expected = scipy.ndimage.gaussian_filter(images.numpy(), sigma=(0, 0, 1.5, 1.5), radius=(0, 0, 5, 5))
    assert np.allclose(gaussian_filter(images), expected[:, :, 5:-5, 5:-5], atol=1e-14)


def test_ssim_equals_the_formula_on_scipy_filters(rng):
    x = torch.rand(1, 3, 20, 16, generator=rng, dtype=torch.float64)
    y = (x + 0.2 * torch.rand(x.shape, generator=rng, dtype=torch.float64)).clamp(max=1)

    def mean(values):
        return scipy.ndimage.gaussian_filter(values, (0, 0, 1.5, 1.5), radius=(0, 0, 5, 5))[:, :, 5:-5, 5:-5]

    a, b = x.numpy(), y.numpy()
    cov = mean(a * b) - mean(a) * mean(b)
    var = mean(a * a) - mean(a) ** 2 + mean(b * b) - mean(b) ** 2
    expected = (2 * mean(a) * mean(b) + 1e-4) * (2 * cov + 9e-4) / ((mean(a) ** 2 + mean(b) ** 2 + 1e-4) * (var + 9e-4))
    assert ssim(x, y).item() == pytest.approx(expected.mean(), rel=1e-10)


def test_ssim_in_closed_form(rng):
    images = torch.rand(2, 3, 12, 12, generator=rng, dtype=torch.float64)
    assert ssim(images, images).tolist() == pytest.approx([1, 1])
    flat = torch.full((1, 3, 12, 12), 0.5, dtype=torch.float64)  # no variance: only the luminance term is left
    assert ssim(flat, flat * 0.5).item() == pytest.approx((2 * 0.125 + 1e-4) / (0.25 + 0.0625 + 1e-4))
    with pytest.raises(UserError, match="at least 11 px"):
        ssim(images[..., :10], images[..., :10])


def test_metrics_of_images_that_the_tokenizer_reproduces():
    levels = torch.tensor([-1.0, 1.0]).repeat(8)[torch.arange(32).reshape(2, 16) % 16]
    tokenizer = GreyLevels(2)
    images = tokenizer.decode(((levels + 1) / 2).long())
    metrics = reconstruction_metrics(tokenizer, [images], feature_network=MeanColour(), perceptual=Difference())
    assert metrics == {
        "psnr": 100, "exact": 2, "ssim": 1, "l1": 0, "perceptual(difference)": 0, "num_images": 2, "usage": 1,
        "perplexity": pytest.approx(2), "rFD(mean-colour)": pytest.approx(0, abs=1e-12),
    }  # fmt: skip


def test_metrics_do_not_depend_on_the_batches(rng):
    images = torch.rand(7, 3, 16, 16, generator=rng) * 2 - 1
    tokenizer, options = GreyLevels(64), {"feature_network": MeanColour()}
    at_once = reconstruction_metrics(tokenizer, [images], **options)
    in_parts = reconstruction_metrics(tokenizer, images.split(3), **options)
    # 1e-6: the features are float32.
    assert in_parts == {key: pytest.approx(value, rel=1e-6) for key, value in at_once.items()}
    reconstruction, original = round_to_8_bits(tokenizer.decode(tokenizer.encode(images))), round_to_8_bits(images)
    mse = (reconstruction - original).square().mean((1, 2, 3))
    assert at_once["psnr"] == pytest.approx(float((10 * torch.log10(1 / mse)).mean()))
    assert at_once["l1"] == pytest.approx(float((reconstruction - original).abs().mean()))
    assert at_once["usage"] == len(tokenizer.encode(images).unique()) / 64
    assert not any(name.startswith("perceptual") for name in at_once)


def test_pictures_smaller_than_the_window_of_ssim_have_all_other_metrics(rng):
    tokenizer, images = GreyLevels(64), torch.rand(3, 3, 16, 16, generator=rng) * 2 - 1
    small = GreyLevels(64)
    small.image_size, small.grid, small.num_tokens = 8, Grid(2, 2), 4
    whole = reconstruction_metrics(tokenizer, [images])
    assert reconstruction_metrics(small, [images[..., :8, :8]]).keys() == whole.keys() - {"ssim"}


def test_wrong_input_is_named():
    with pytest.raises(UserError, match="no images"):
        reconstruction_metrics(GreyLevels(2), [])
    with pytest.raises(UserError, match="at least 2 images"):
        reconstruction_metrics(GreyLevels(2), [torch.zeros(1, 3, 16, 16)], feature_network=MeanColour())
    tokenizer = GreyLevels(4)
    tokenizer.encode = lambda images: torch.full((len(images), 16), 9)
    with pytest.raises(UserError, match="token 9 from tokenizer grey, which has 4 codes"):
        reconstruction_metrics(tokenizer, [torch.zeros(1, 3, 16, 16)])
    tokenizer = GreyLevels(4)
    tokenizer.embed = lambda tokens: torch.full((*tokens.shape, 1), float("nan"))
    with pytest.raises(UserError, match="tokenizer: it decodes to NaN or infinite pixels; its weights are damaged"):
        reconstruction_metrics(tokenizer, [torch.zeros(1, 3, 16, 16)])


def test_a_file_with_pictures_that_are_reproduced_exactly_is_read_again(tokenizer, quarters, tmp_path, monkeypatch):
    black = torch.zeros(2, tokenizer.image_size, tokenizer.image_size, 3, dtype=torch.uint8).numpy()
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: -torch.ones(len(tokens), 3, *black.shape[1:3]))
    images = ImageSet("black", lambda batch_size: iter([black]))
    content = measure_reconstruction(tmp_path, tokenizer, images, networks.load_feature_network("quarters", "cpu"))
    assert read_json(tmp_path / "reconstruction.json") == content
    assert content["origin"]["remarks"][-1] == "psnr is a mean in which 2 pictures, reproduced exactly, are 100 dB"
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "inf.json", {"psnr": float("inf")})


def test_training_data_are_known_however_they_are_spelled(tokenizer, quarters, tmp_path, monkeypatch):
    """Then what was held out is measured, and not the pictures that the tokenizer was trained on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pics").mkdir()
    for index in range(40):
        picture(index).save(tmp_path / "pics" / f"{index}.png")
    save_tokenizer(tokenizer, tmp_path / "run" / "model")
    (tmp_path / "run" / "config.json").write_text('{"data": {"images": "pics"}}')
    parts = open_splits("pics", key="", image_size=16)
    hashes = {"data_sha256": parts.train.content_hash, "validation_sha256": parts.validation.content_hash}
    (tmp_path / "run" / "origin.json").write_text(json.dumps(hashes))
    shutil.copytree("pics", "copy")
    shutil.copytree("pics", "others")
    (tmp_path / "others" / "0.png").rename(tmp_path / "others" / "new.png")

    def measured(spec, name="run", **options):
        found = evaluate_tokenizer(name, reference=spec, feature_network="quarters", **options)
        return found["num_images"], found["origin"]["protocol"].partition("; ")[2]

    for spec in (None, "pics", "./pics", str(tmp_path / "pics"), "imagefolder:pics", "copy"):
        assert measured(spec) == (2, ""), spec
    assert measured("copy", name="run/model") == (2, "")
    assert measured("others") == (40, "")
    assert measured("./pics", validation_split="0%") == (40, "those that it was trained on among them")
    assert measured("copy", validation_split="50%") == (20, "some that it was trained on may be among them")
    (tmp_path / "pics" / "0.png").unlink()
    assert measured("./pics") == (2, "not the pictures that were held out when it was trained")
    hashes["data_sha256"] = open_splits("others", "0%", key="", image_size=16).train.content_hash
    (tmp_path / "run" / "origin.json").write_text(json.dumps(hashes))
    assert measured("others", held_out=0) == (40, "the pictures that it was trained on")
