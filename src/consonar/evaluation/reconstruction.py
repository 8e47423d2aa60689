"""How well a tokenizer reconstructs images, and how much of its codebook it uses.

PSNR and SSIM (Wang et al. 2004, IEEE TIP 13(4), Eq. 13) are calculated on images rounded to 8 bits, as they would be
saved, on a scale of 0 to 1. rFD is the Fréchet distance between the features of the originals and of their
reconstructions; with the Inception network it would be rFID.

Deviation from Wang et al.: SSIM is taken per RGB channel and averaged (theirs is on grey images), at full size.

Shapes: `B` batch, `N` tokens per image, `V` vocabulary, `F` features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional

from consonar.errors import UserError
from consonar.evaluation.features import FeatureNetwork
from consonar.evaluation.statistics import Moments, frechet_distance
from consonar.precision import in_float32
from consonar.tokenizers import quantizer
from consonar.types import Tokenizer

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


def round_to_8_bits(images: Tensor) -> Tensor:
    """Images in [-1, 1] (clamped there) -> float64 in [0, 1], multiples of 1/255: what an 8-bit file would hold."""
    return ((images.double().clamp(-1, 1) + 1) * 127.5).round() / 255


@in_float32
def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """(B,) peak signal-to-noise ratio in dB, 10 log10(1 / MSE), of (B, 3, H, W) in [0, 1]; inf for equal images."""
    mse = (images - originals).square().flatten(1).mean(1)
    return -10 * mse.log10()


def gaussian_window() -> Tensor:
    """(11,) float64 Gaussian of standard deviation 1.5 pixels, sum 1; the 11 x 11 window is its outer product."""
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    weights = (-offsets.square() / (2 * SSIM_SIGMA**2)).exp()
    return weights / weights.sum()


def gaussian_filter(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H - 10, W - 10): weighted means over the 11 x 11 window, only where it fits entirely."""
    window = gaussian_window().to(images.device, images.dtype)

    def bands(size: int) -> Tensor:  # (size - 10, size): row i holds the window from column i on
        return torch.stack([functional.pad(window, (i, size - len(window) - i)) for i in range(size - len(window) + 1)])

    # Band matrices instead of two convolutions: 1.5 times faster at 64 px, 3.5 at 256 px (float64, one CPU thread).
    return bands(images.shape[-2]) @ images @ bands(images.shape[-1]).T


@in_float32
def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """(B,) structural similarity in [-1, 1] of (B, C, H, W) in [0, 1] (Wang et al. 2004, Eq. 13); 1 for equal images.

    Gaussian window 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03, no padding, mean over positions and channels. Raises
    UserError for images under 11 px.
    """
    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise UserError(f"SSIM: images of {images.shape[-2]} x {images.shape[-1]} px; at least {SSIM_WINDOW} px needed")
    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = gaussian_filter(images), gaussian_filter(originals)
    variance_x = gaussian_filter(images.square()) - mean_x.square()
    variance_y = gaussian_filter(originals.square()) - mean_y.square()
    covariance = gaussian_filter(images * originals) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(1)


def usage_and_perplexity(counts: Tensor) -> tuple[float, float]:
    """Share of codes that occur, in [0, 1], and exp(entropy) of their frequencies, 1 to V, from counts (V,).

    Raises UserError when nothing was counted.
    """
    if counts.sum() == 0:
        raise UserError("codebook usage: no tokens were counted; is the image set empty?")
    return quantizer.usage(counts), quantizer.perplexity(counts)


@torch.inference_mode()
def reconstruction_metrics(
    tokenizer: Tokenizer,
    batches: Iterable[Tensor],
    *,
    feature_network: FeatureNetwork | None = None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Reconstruction metrics of `tokenizer` over `batches` of images (B, 3, H, W) in [-1, 1] on the tokenizer's device.

    Keys: `num_images`; `psnr` (dB, mean over images; inf when one is reproduced exactly), `ssim` and `l1` (mean
    absolute difference on [0, 1]), all of 8-bit images; `usage` (share of the vocabulary that occurs in these images)
    and `perplexity`; with `perceptual(reconstructions, originals) -> (B,)`, called with 8-bit-rounded images in
    [-1, 1], also `perceptual`; with `feature_network` also `rFD(NAME)`. Memory does not grow with the number of images.
    Raises UserError for no images, images under 11 px, tokens outside the vocabulary, or one image with rFD.
    """
    sums = dict.fromkeys(("psnr", "ssim", "l1", *(("perceptual",) if perceptual else ())), 0.0)
    counts = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)  # (V,)
    moments = [Moments(feature_network.num_features) for _ in range(2)] if feature_network else []
    num_images = 0
    for images in batches:
        tokens = tokenizer.encode(images)  # (B, N)
        counts += _count_codes(tokens, tokenizer)
        pair = [round_to_8_bits(tokenizer.decode(tokens)), round_to_8_bits(images)]
        sums["psnr"] += float(psnr(*pair).sum())
        sums["ssim"] += float(ssim(*pair).sum())
        sums["l1"] += float((pair[0] - pair[1]).abs().flatten(1).mean(1).sum())
        as_input = [(rounded * 2 - 1).float() for rounded in pair]
        if perceptual:
            sums["perceptual"] += float(perceptual(*as_input).sum())
        if feature_network:
            for side, rounded in zip(moments, as_input, strict=True):
                side.update(feature_network(rounded))
        num_images += len(images)
    if num_images == 0:
        raise UserError("reconstruction metrics: no images were given")
    usage, perplexity = usage_and_perplexity(counts)
    metrics = {name: total / num_images for name, total in sums.items()}
    metrics |= {"num_images": num_images, "usage": usage, "perplexity": perplexity}
    if feature_network:
        if num_images < 2:
            raise UserError("rFD: a covariance needs at least 2 images, there is 1")
        reconstructed, original = moments
        metrics[f"rFD({feature_network.name})"] = frechet_distance(
            original.mean, original.cov, reconstructed.mean, reconstructed.cov
        )
    return metrics


def _count_codes(tokens: Tensor, tokenizer: Tokenizer) -> Tensor:
    flat = tokens.flatten().cpu()
    outside = flat[(flat < 0) | (flat >= tokenizer.vocab_size)]
    if len(outside):
        raise UserError(f"token {outside[0]} from tokenizer {tokenizer.name}, which has {tokenizer.vocab_size} codes")
    return torch.bincount(flat, minlength=tokenizer.vocab_size)
