"""Every model on the device, as on the CPU: generators trained and sampled, tokenizers, feature networks, rewards."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import TINY_VQ, stir
from contracts.test_generators import KINDS, make_condition, make_generator
from contracts.test_tokenizers import TINY_CONV, TINY_PIXELS, TINY_VIT

from consonar.networks.efficientnet import EfficientNetLite0Features
from consonar.networks.inception import InceptionFeatures, InceptionV3
from consonar.networks.lpips import LPIPS, VGG16Features
from consonar.records import device_of, to_device
from consonar.sampling.sample import SamplerConfig, sample, sample_tokens
from consonar.seeding import generator as seeded
from consonar.tokenizers import TOKENIZERS
from consonar.tokenizers.alitok import AliTokConfig, AliTokTokenizer
from consonar.tokenizers.titok import TiTokConfig, TiTokTokenizer
from consonar.tokenizers.vq import VQTokenizer
from consonar.tokenizers.vqgan import MaskGITConfig, MaskGITTokenizer, VQGANPlusConfig, VQGANPlusTokenizer
from consonar.training.rewards import Resources, build_rewards
from consonar.types import ImageBatch, Tokenizer

CUDA = torch.device("cuda", 0)
CONVOLUTIONAL = {"code_dim": 4, **TINY_CONV}
TOKENIZER_CASES = {
    "vq": lambda: VQTokenizer(TINY_VQ),
    "maskgit-vq": lambda: MaskGITTokenizer(MaskGITConfig(vocab_size=32, **CONVOLUTIONAL)),
    "vqgan-plus": lambda: VQGANPlusTokenizer(VQGANPlusConfig(vocab_size=32, **CONVOLUTIONAL)),
    "vqgan-plus, cosine": lambda: VQGANPlusTokenizer(
        VQGANPlusConfig(vocab_size=32, l2_normalize=True, downsample="average", **CONVOLUTIONAL)
    ),
    "vqgan-plus, signs": lambda: VQGANPlusTokenizer(
        VQGANPlusConfig(vocab_size=16, quantizer="lookup-free", **CONVOLUTIONAL)
    ),
    "titok": lambda: TiTokTokenizer(TiTokConfig(num_tokens=6, pixel_decoder=TINY_PIXELS, **TINY_VIT)),
    "titok, pixels": lambda: TiTokTokenizer(TiTokConfig(num_tokens=6, pixel_decoder=None, **TINY_VIT)),
    "alitok": lambda: AliTokTokenizer(AliTokConfig(num_prefix_tokens=3, num_buffer_tokens=2, **TINY_VIT)),
}
SAMPLERS = {
    "guided": SamplerConfig(guidance_scale=2.0, guidance_schedule="power_cosine"),
    "filtered": SamplerConfig(top_k=5, top_p=0.9, temperature=0.8),
    "greedy": SamplerConfig(temperature=0.0),
}


def make_tokenizer(name: str) -> Tokenizer:
    """The frozen tiny tokenizer of a name in `TOKENIZER_CASES`, stirred: untrained, some decode all tokens alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = TOKENIZER_CASES[name]().eval().requires_grad_(False)
    stir(made, seeded(0, name))
    return made


@pytest.fixture(params=KINDS)
def model(request):
    return make_generator(request.param)


@pytest.fixture
def condition(model, rng):
    return make_condition(model, rng)


def test_generators_train_as_on_the_cpu(cuda, model, condition, rng) -> None:
    tokens = torch.randint(32, (3, model.num_tokens), generator=rng)
    moved, results = copy.deepcopy(model).to(CUDA), []
    for net in (model, moved):
        logits, _ = net(to_device(tokens, device_of(net)), to_device(condition, device_of(net)), tap_layers=(0,))
        logits.square().mean().backward()
        gradients = [parameter.grad.cpu() for parameter in net.parameters() if parameter.grad is not None]
        results.append((logits.detach().cpu(), gradients))
    torch.testing.assert_close(*results)
    cuda.clear()  # tables that are kept have been made
    with torch.autocast("cuda", torch.bfloat16):
        moved(tokens.to(CUDA), to_device(condition, CUDA))[0].float().square().mean().backward()
    assert all(where.startswith("device/") for _, where in cuda.waits)  # the copies of this test


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_generators_sample_as_on_the_cpu(cuda, model, condition, sampler) -> None:
    here, _ = sample_tokens(model, condition, range(3), sampler)
    moved = copy.deepcopy(model).to(CUDA)
    there, entropy = sample_tokens(moved, to_device(condition, CUDA), range(3), sampler)
    assert there.is_cuda and entropy.is_cuda and torch.equal(here, there.cpu())
    with torch.autocast("cuda", torch.bfloat16):
        sample_tokens(moved, to_device(condition, CUDA), range(3), sampler, num_tokens=3)


def test_every_tokenizer_is_tried() -> None:
    assert {name.split(",")[0] for name in TOKENIZER_CASES} == set(TOKENIZERS)


@pytest.mark.parametrize("name", TOKENIZER_CASES)
def test_tokenizers_code_as_on_the_cpu(cuda, name, rng, tiny_generator) -> None:
    here = make_tokenizer(name)
    images = torch.rand(3, 3, 16, 16, generator=rng) * 2 - 1
    there = copy.deepcopy(here).to(CUDA)
    tokens = there.encode(images.to(CUDA))
    assert tokens.is_cuda and torch.equal(here.encode(images), tokens.cpu())
    torch.testing.assert_close(here.decode(tokens.cpu()), there.decode(tokens).cpu())
    vectors = there.embed(tokens).detach().requires_grad_()
    there.decode_embeddings(vectors).square().mean().backward()
    assert vectors.grad.is_cuda and here.fingerprint == there.fingerprint
    sizes = {"vocab_size": here.vocab_size, "num_tokens": here.num_tokens}
    drawn = sample(tiny_generator(**sizes).to(CUDA), there, [0, 1, 2], batch_size=2)
    assert not drawn.images.is_cuda and drawn.images.shape == images.shape


@pytest.mark.parametrize("name", ["efficientnet-lite0", "inception", "inception-pytorch-fid"])
def test_feature_networks_see_as_on_the_cpu(cuda, name, rng) -> None:
    images = torch.rand(2, 3, 32, 32, generator=rng) * 2 - 1
    if name == "efficientnet-lite0":
        here, there = EfficientNetLite0Features("cpu"), EfficientNetLite0Features("cuda")
    else:
        torch.manual_seed(0)
        network = InceptionV3()
        here, there = (InceptionFeatures(name, copy.deepcopy(network), "x", device) for device in ("cpu", "cuda"))
    features = there(images)
    assert features.is_cuda
    torch.testing.assert_close(here(images), features.cpu(), rtol=1e-4, atol=1e-4)


def test_lpips_measures_as_on_the_cpu(cuda, rng) -> None:
    torch.manual_seed(0)
    here = LPIPS(VGG16Features(), "x")
    there = copy.deepcopy(here).to(CUDA)
    one, two = torch.rand(2, 2, 3, 32, 32, generator=rng) * 2 - 1
    moved = one.to(CUDA).requires_grad_()
    distance = there(moved, two.to(CUDA))
    distance.sum().backward()
    assert moved.grad.is_cuda
    torch.testing.assert_close(here(one, two), distance.detach().cpu())


def test_rewards_measure_as_on_the_cpu(cuda, rng) -> None:
    names = dict.fromkeys(("mse", "l1", "psnr", "ssim", "efficientnet-lite0", "embedding"), 1.0)
    originals, images = torch.rand(2, 3, 32, 32, generator=rng), torch.rand(4, 3, 32, 32, generator=rng)
    batch = ImageBatch(originals, torch.zeros(2, dtype=torch.int64))
    here = build_rewards(names, Resources(torch.device("cpu")), chunk=2).measure(images, batch)[1]
    with torch.autocast("cuda", torch.bfloat16):
        there = build_rewards(names, Resources(CUDA), chunk=2).measure(images.to(CUDA), to_device(batch, CUDA))[1]
    for name in names:
        torch.testing.assert_close(here[name], there[name].cpu(), rtol=1e-3, atol=1e-5)
