"""How well a tokenizer reconstructs images, and how much of its codebook it uses.

rFD is the Fréchet distance between the features of originals and reconstructions; with Inception it would be rFID.
Shapes: `B` batch, `N` tokens per image, `V` vocabulary.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from consonar.components import load_tokenizer, model_folder, weights_sha256
from consonar.data.bad_images import BadImages
from consonar.data.splits import HELD_OUT
from consonar.data.transforms import to_uint8
from consonar.distributed import ALONE, World, in_turn, machine_name
from consonar.errors import UserError
from consonar.evaluation.image_sets import ImageSet
from consonar.evaluation.inputs import as_input, open_reference
from consonar.evaluation.results import RECONSTRUCTION, check_unmeasured, library_versions, replacing
from consonar.files.readers import read_json
from consonar.files.writers import write_atomically, write_json
from consonar.metrics.distribution import Moments, frechet_distance
from consonar.metrics.pixels import SSIM_WINDOW, psnr, ssim
from consonar.networks import FeatureNetwork, load_feature_network, record_of
from consonar.precision import multiplying, pick_precision
from consonar.sampling.job import write_npz
from consonar.tokenizers import quantizer
from consonar.types import Tokenizer

RECONSTRUCTIONS = 32
"""Images that are kept beside their originals."""


def round_to_8_bits(images: Tensor) -> Tensor:
    """Images in [-1, 1] (clamped there) -> float64 in [0, 1], multiples of 1/255: what an 8-bit file would hold."""
    return ((images.double().clamp(-1, 1) + 1) * 127.5).round() / 255


@torch.inference_mode()
def reconstruction_metrics(
    tokenizer: Tokenizer,
    batches: Iterable[Tensor],
    *,
    feature_network: FeatureNetwork | None = None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    world: World = ALONE,
) -> dict[str, float]:
    """Metrics of `tokenizer` over `batches` of images (B, 3, H, W) in [-1, 1] on its device.

    `psnr` (dB, mean over images; inf when one is reproduced exactly), `ssim` (of images of 11 px or more) and `l1`
    (mean absolute difference), all of images rounded to 8 bits on a scale of 0 to 1; `num_images`; `usage` (share
    of the vocabulary that occurs) and `perplexity`; with `perceptual(reconstructions, originals) -> (B,)`, called
    with 8-bit-rounded images in [-1, 1], also `perceptual`; with `feature_network` also `rFD(NAME)`. Memory does
    not grow with the number of images. The processes of `world` take turns at the batches; all get the same. Raises
    UserError for no images, tokens outside the vocabulary, or one image with rFD.
    """
    with_ssim = tokenizer.image_size >= SSIM_WINDOW
    names = ("psnr", *(["ssim"] if with_ssim else []), "l1", *(["perceptual"] if perceptual else []))
    sums = dict.fromkeys(names, 0.0)
    num_images, size = 0, tokenizer.vocab_size
    counts = torch.zeros(size, dtype=torch.int64)  # (V,)
    moments = [Moments(feature_network.num_features) for _ in range(2)] if feature_network else []

    def of_batch(images: Tensor) -> tuple[int, Tensor, dict[str, float], list[Tensor]]:
        tokens = tokenizer.encode(images)  # (B, N)
        if len(outside := tokens[(tokens < 0) | (tokens >= size)]):
            raise UserError(f"token {outside[0]} from tokenizer {tokenizer.name}, which has {size} codes")
        pair = [round_to_8_bits(tokenizer.decode(tokens)), round_to_8_bits(images)]
        found = {
            "psnr": float(psnr(*pair).sum()),
            "l1": float((pair[0] - pair[1]).abs().flatten(1).mean(1).sum()),
        }
        if with_ssim:
            found["ssim"] = float(ssim(*pair).sum())
        rounded = [(side * 2 - 1).float() for side in pair]
        if perceptual:
            found["perceptual"] = float(perceptual(*rounded).sum())
        features = [feature_network(side).cpu() for side in rounded] if feature_network else []
        return len(images), quantizer.code_counts(tokens, size).cpu(), found, features

    for count, codes, found, features in in_turn(of_batch, batches, world):
        num_images += count
        counts += codes
        sums = {name: total + found[name] for name, total in sums.items()}
        for kept, rows in zip(moments, features, strict=True):
            kept.update(rows)
    if num_images == 0:
        raise UserError("reconstruction metrics: no images were given")
    metrics = {name: total / num_images for name, total in sums.items()}
    of_codes = {"usage": quantizer.usage(counts), "perplexity": quantizer.perplexity(counts)}
    metrics |= {"num_images": num_images, **of_codes}
    if feature_network:
        if num_images < 2:
            raise UserError("rFD: a covariance needs at least 2 images, there is 1")
        reconstructed, original = moments
        distance = frechet_distance(original.mean, original.cov, reconstructed.mean, reconstructed.cov)
        metrics[f"rFD({feature_network.name})"] = distance
    return metrics


def evaluate_tokenizer(
    run: Path,
    *,
    reference: str,
    feature_network: str = "efficientnet-lite0",
    device: str = "cpu",
    precision: str = "fp32",
    overwrite: bool = False,
    validation_split: str | None = None,
    bad: BadImages | None = None,
    world: World = ALONE,
) -> dict[str, float]:
    """`measure_reconstruction` of a run's tokenizer on the validation images of `reference` (of the data that it was
    trained on those that were held out, unless `validation_split` says otherwise), or on its one set.

    Raises `UserError` where the run has been measured, unless `overwrite`.
    """
    check_unmeasured(run, RECONSTRUCTION, overwrite=overwrite)
    place = torch.device(device)
    chosen = pick_precision(precision, place, "precision", "measuring")
    sha256 = weights_sha256(run)
    tokenizer = load_tokenizer(model_folder(run)).to(device)
    trained = read_json(run / "config.json").get("data") or {}
    is_same = trained.get("images") == reference
    split = validation_split or (trained.get("validation_split") if is_same else None)
    held_out = HELD_OUT if is_same else 0
    images = open_reference(reference, tokenizer.image_size, bad=bad, held_out=held_out, validation_split=split).images
    if not images:
        raise UserError(f"--reference: {reference} holds statistics, but a tokenizer is measured on images")
    measured = images.get("validation") or next(iter(images.values()))
    network = load_feature_network(feature_network, device)
    saved = replacing(run, RECONSTRUCTION, overwrite=overwrite, world=world)
    with saved as staged, multiplying(chosen, place, autocast=True):
        origin = {"checkpoint_sha256": sha256, "precision": chosen, "reference": reference}
        origin |= {"validation_split": split} if split else {}
        origin |= {"machine": machine_name(device), **library_versions()}
        return measure_reconstruction(staged, tokenizer, measured, network, world, **origin)


def measure_reconstruction(
    folder: Path, tokenizer: Tokenizer, images: ImageSet, network: FeatureNetwork, world: World = ALONE, **origin: str
) -> dict[str, float]:
    """Metrics over the set, written into reconstruction.json with `origin`; some images to reconstructions.npz.

    Of the processes of `world`, which share the work, the first one writes.
    """
    batches = (as_input(batch, tokenizer) for batch in images.stream(64))
    metrics = reconstruction_metrics(tokenizer, batches, feature_network=network, world=world)
    if not world.is_main:
        return metrics
    count = int(metrics["num_images"])
    rows = torch.linspace(0, count - 1, min(RECONSTRUCTIONS, count)).long()
    originals = images.pick(rows)
    with torch.inference_mode():
        decoded = tokenizer.decode(tokenizer.encode(as_input(originals, tokenizer))).clamp(-1, 1)
    arrays = {
        "originals": originals,
        "reconstructions": to_uint8(decoded).cpu().numpy(),
        "names": np.array([f"{images.name} {i}" for i in rows]),
    }
    write_atomically(folder / "reconstructions.npz", lambda partial: write_npz(partial, arrays))
    against = f"reconstructions by {tokenizer.name} against their originals in {images.name}"
    origin |= {
        "protocol": f"{count:,} {against}, {network.name}",
        "images": images.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }
    known = record_of(network)
    origin |= {"feature_network": known.get("place", network.name), "feature_network_sha256": known["sha256"]}
    write_json(folder / RECONSTRUCTION, {**metrics, "origin": origin})
    return metrics
