"""What is searched, compared or summed has the same result inside an update in bf16 as outside of it."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from consonar.components import load_tokenizer
from consonar.evaluation import reconstruction
from consonar.float32 import in_float32
from consonar.metrics import copying, neighbours
from consonar.networks import lpips
from consonar.networks.efficientnet import PerceptualDistance
from consonar.networks.lpips import VGG16Features, load_lpips
from consonar.tokenizers import quantizer
from consonar.training import losses, noise
from consonar.training import policy_gradient as policy


def in_bf16():
    return torch.autocast("cpu", torch.bfloat16)


def test_a_training_pass_in_bf16_searches_the_nearest_code(rng):
    """Of the vectors that it has: bf16 products would choose another one for some of them."""
    tokenizer = load_tokenizer("openmoji-64")
    images = torch.rand(4, 3, 64, 64, generator=rng) * 2 - 1
    with torch.no_grad(), in_bf16():
        output = tokenizer(images)
    distances = torch.cdist(output.vectors.double(), tokenizer.codebook.double())
    chosen = distances.gather(1, output.tokens.flatten()[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.amin(1), rtol=1e-5, atol=1e-6)
    vectors = torch.randn(2000, tokenizer.code_dim, generator=rng)
    with in_bf16():
        found = tokenizer.search(vectors)
    assert torch.equal(found, tokenizer.search(vectors))


def test_feature_distances_are_the_same_in_bf16(rng, tmp_path, monkeypatch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(VGG16Features().state_dict(), tmp_path / "vgg16.pth")
    monkeypatch.setattr(lpips, "WEIGHTS", replace(lpips.WEIGHTS, sha256_prefix=""))
    originals = torch.rand(2, 3, 32, 32, generator=rng) * 2 - 1
    images = originals + 0.002 * torch.randn(originals.shape, generator=rng)
    for network in (PerceptualDistance(), load_lpips(tmp_path / "vgg16.pth")):
        with torch.no_grad():
            expected = network(images, originals)
            with in_bf16():
                found = network(images, originals)
                assert network(originals, originals).max() == 0
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


A, B = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 35).view(7, 5)
LOGITS, TARGETS = A.view(2, 3, 5), A.view(2, 3, 5).softmax(-1)
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
FORMULAS = {
    "squared_distances": (quantizer.squared_distances, A, B),
    "nearest_code": (quantizer.nearest_code, A, B),
    "codebook_loss": (quantizer.codebook_loss, A, A + 0.01),
    "commitment_loss": (quantizer.commitment_loss, A, A + 0.01),
    "distances of features": (neighbours.squared_distances, A, B),
    "cosine distances": (copying._cosine_distances, A, B),
    "psnr": (reconstruction.psnr, IMAGES, IMAGES + 0.01),
    "ssim": (reconstruction.ssim, IMAGES, IMAGES + 0.01),
    "code_neighbours": (noise.code_neighbours, B, 2),
    "soft_cross_entropy": (losses.soft_cross_entropy, LOGITS, TARGETS),
    "entropy": (losses.entropy, LOGITS),
    "codebook_alignment_loss": (losses.codebook_alignment_loss, LOGITS, TARGETS),
    "kl_exact": (policy.kl_exact, LOGITS, LOGITS + 0.01),
    "kl_k3": (policy.kl_k3, A, A + 0.01),
    "group_advantages": (policy.group_advantages, A, "grpo"),
    "probability_ratio": (policy.probability_ratio, A, A + 0.01),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_are_calculated_in_float32(name):
    """Under autocast as without it, and from bf16 tensors as from their values in float32."""
    function, *arguments = FORMULAS[name]
    expected = function(*arguments)
    with in_bf16():
        torch.testing.assert_close(function(*arguments), expected)
    low = [value.bfloat16() if isinstance(value, torch.Tensor) else value for value in arguments]
    raised = [value.float() if isinstance(value, torch.Tensor) else value for value in low]
    torch.testing.assert_close(function(*low), function(*raised))


def test_the_gradient_passes_and_other_types_stay():
    weight = torch.ones(3, requires_grad=True)

    @in_float32
    def product(a, b, *, count):
        assert a.dtype == torch.float32 and count.dtype == torch.int64
        return F.linear(a[None], b[None]) * count

    with in_bf16():
        result = product(weight.bfloat16(), torch.full((3,), 1 + 2**-12), count=torch.tensor(2))
    result.sum().backward()
    assert result.dtype == torch.float32 and torch.equal(weight.grad, torch.full((3,), 2.0))
    assert product(torch.ones(2, dtype=torch.bfloat16, device="meta"), torch.ones(2, device="meta"),
                   count=torch.ones(1, dtype=torch.int64, device="meta")).shape == (1, 1)  # fmt: skip
