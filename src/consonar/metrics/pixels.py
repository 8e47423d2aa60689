"""Likeness of two images by their pixels: PSNR and SSIM (Wang et al. 2004, IEEE TIP 13(4), Eq. 13). Pure functions.

Deviations: no PSNR is over `LARGEST_PSNR`, so that a mean is a number where one image is reproduced exactly. SSIM is
taken per RGB channel and averaged (that of Wang et al. is on grey images), at full size.
"""

import torch
from torch import Tensor
from torch.nn import functional

from consonar.errors import UserError
from consonar.float32 import in_float32

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
LARGEST_PSNR = 100.0
"""dB; what equal images get, whose PSNR is infinite. 8-bit ones that differ reach 89 at 64 px, 101 at 256 px."""


@in_float32
def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """(B,) peak signal-to-noise ratio of (B, 3, H, W) in [0, 1], as `psnr_of` its mean squared error."""
    return psnr_of((images - originals).square().flatten(1).mean(1))


def psnr_of(mse: Tensor) -> Tensor:
    """dB of a mean squared error on the scale of 0 to 1, 10 log10(1 / MSE), at most `LARGEST_PSNR`."""
    return (-10 * mse.log10()).clamp(max=LARGEST_PSNR)


def gaussian_filter(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H - 10, W - 10): means under an 11 x 11 Gaussian (1.5 px), only where it fits entirely."""
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    weights = (-offsets.square() / (2 * SSIM_SIGMA**2)).exp()
    window = (weights / weights.sum()).to(images.device, images.dtype)  # (11,), whose outer product is the window

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
