"""How well a tokenizer reconstructs images, and how much of its codebook it uses.

rFD is the Fréchet distance between the features of originals and reconstructions; with Inception it would be rFID.
Shapes: `B` batch, `N` tokens per image, `V` vocabulary.
"""

import hashlib
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor

from consonar.components import load_tokenizer, weights_sha256
from consonar.data.bad_images import BadImages, bad_images_record
from consonar.data.sources import find_source
from consonar.data.splits import HELD_OUT
from consonar.data.transforms import check_pixels
from consonar.distributed import ALONE, World, in_turn, machine_name
from consonar.errors import UserError, check_choice
from consonar.evaluation.image_sets import ImageSet, hashed
from consonar.evaluation.inputs import as_input, fitting, open_reference
from consonar.evaluation.kept import keep_reconstructions
from consonar.evaluation.results import RECONSTRUCTION, check_unmeasured, library_versions, replacing
from consonar.evaluation.settings import ENOUGH
from consonar.files.readers import home_expanded, read_json
from consonar.files.writers import write_json
from consonar.json_types import Json
from consonar.metrics.distribution import Moments, frechet_distance
from consonar.metrics.pixels import LARGEST_PSNR, SSIM_WINDOW, psnr, ssim
from consonar.model_folders import SHIPPED, from_anywhere
from consonar.networks import PERCEPTUAL_DISTANCES, FeatureNetwork, load_feature_network, record_of
from consonar.networks.base import LayerDistance
from consonar.precision import multiplying, pick_precision
from consonar.records import device_of
from consonar.tokenizers import quantizer
from consonar.training.origins import FILE as ORIGIN
from consonar.types import Tokenizer

HASHES = ("data_sha256", "validation_sha256")


def round_to_8_bits(images: Tensor) -> Tensor:
    """Images in [-1, 1] (clamped there) -> float64 in [0, 1], multiples of 1/255: what an 8-bit file would hold."""
    return ((images.double().clamp(-1, 1) + 1) * 127.5).round() / 255


@torch.inference_mode()
def reconstruction_metrics(
    tokenizer: Tokenizer,
    batches: Iterable[Tensor],
    *,
    feature_network: FeatureNetwork | None = None,
    perceptual: LayerDistance | None = None,
    world: World = ALONE,
) -> dict[str, float]:
    """Metrics of `tokenizer` over `batches` of images (B, 3, H, W) in [-1, 1] on its device.

    `psnr` (dB, mean over images), `ssim` (of images of 11 px or more) and `l1` (mean absolute difference), all of
    images rounded to 8 bits on a scale of 0 to 1; `exact`, how many are reproduced exactly, where any are;
    `num_images`; `usage` (share of the vocabulary that occurs) and `perplexity`; with
    `perceptual(reconstructions, originals) -> (B,)`, called with 8-bit-rounded images in [-1, 1], also
    `perceptual(NAME)`; with `feature_network` also `rFD(NAME)`. Memory does not grow with the number of images. The
    processes of `world` take turns at the batches; all get the same. Raises
    UserError for no images, tokens outside the vocabulary, or one image with rFD.
    """
    with_ssim, judged = tokenizer.image_size >= SSIM_WINDOW, f"perceptual({perceptual.name})" if perceptual else None
    sums = dict.fromkeys(("exact", "psnr", *(["ssim"] if with_ssim else []), "l1", *([judged] if judged else [])), 0.0)
    num_images, size = 0, tokenizer.vocab_size
    counts = torch.zeros(size, dtype=torch.int64)  # (V,)
    moments = [Moments(feature_network.num_features) for _ in range(2)] if feature_network else []

    def of_batch(images: Tensor) -> tuple[int, Tensor, dict[str, float], list[Tensor]]:
        tokens = tokenizer.encode(images)  # (B, N)
        if len(outside := tokens[(tokens < 0) | (tokens >= size)]):
            raise UserError(f"token {outside[0]} from tokenizer {tokenizer.name}, which has {size} codes")
        pair = [round_to_8_bits(check_pixels(tokenizer.decode(tokens))), round_to_8_bits(images)]
        l1 = (pair[0] - pair[1]).abs().flatten(1).mean(1)  # (B,)
        found = {"exact": float((l1 == 0).sum()), "psnr": float(psnr(*pair).sum()), "l1": float(l1.sum())}
        if with_ssim:
            found["ssim"] = float(ssim(*pair).sum())
        rounded = [(side * 2 - 1).float() for side in pair]
        if perceptual and judged:
            found[judged] = float(perceptual(*rounded).sum())
        features = [feature_network(side).cpu() for side in rounded] if feature_network else []
        return len(images), quantizer.code_counts(tokens, size).cpu(), found, features

    for count, codes, found, features in in_turn(of_batch, fitting(batches, of_batch), world):
        num_images += count
        counts += codes
        sums = {name: total + found[name] for name, total in sums.items()}
        for kept, rows in zip(moments, features, strict=True):
            kept.update(rows)
    if num_images == 0:
        raise UserError("reconstruction metrics: no images were given")
    exact = int(sums.pop("exact"))
    metrics = {name: total / num_images for name, total in sums.items()} | ({"exact": exact} if exact else {})
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
    name: str | Path,
    *,
    reference: str | None = None,
    into: Path | None = None,
    feature_network: str | FeatureNetwork = "efficientnet-lite0",
    perceptual: str | None = None,
    batch_size: int = 64,
    device: str = "cpu",
    precision: str = "fp32",
    overwrite: bool = False,
    validation_split: str | None = None,
    held_out: float | None = None,
    bad: BadImages | None = None,
    world: World = ALONE,
) -> Json:
    """`measure_reconstruction` of a tokenizer (as `load_tokenizer` takes it) on the validation images of `reference` or
    its one set. None: of the data that it was trained on; of these, however `reference` spells them, always what was
    held out then, unless `validation_split` says otherwise. `held_out` is the share of data without splits that is
    measured, where it need not be told by what it was trained on. Written into the folder `into`, where one is named.

    The protocol says so where what is held out now is not what was when it was trained (pictures came or went), and
    where pictures are measured that it was trained on.

    Raises `UserError` where `into` has such results, unless `overwrite`.
    """
    if into is not None:
        check_unmeasured(into, RECONSTRUCTION, overwrite=overwrite)
    place = torch.device(device)
    chosen = pick_precision(precision, place, "precision", "measuring")
    tokenizer = load_tokenizer(name).to(device)
    known = trained_on(name)
    spec = known.get("images") if reference is None else reference
    if spec is None:
        raise UserError(f"--data: missing; name the images that {name} is to reconstruct")
    is_same = is_trained_on(str(spec), known, tokenizer.image_size)
    split = validation_split or (known.get("validation_split") if is_same and held_out is None else None)
    share = (HELD_OUT if is_same else 0) if held_out is None else held_out
    images = open_reference(
        spec, tokenizer.image_size, bad=bad, held_out=share, validation_split=split, enlarge=True
    ).images
    if not images:
        raise UserError(f"--reference: {spec} holds statistics, but a tokenizer is measured on images")
    measured = images.get("validation") or next(iter(images.values()))
    note = note_of_training(known, measured, validation_split, is_same=is_same, holds_out="validation" in images)
    network = load_feature_network(feature_network, device)
    judge = load_perceptual_distance(perceptual, tokenizer.image_size, device)
    saved = nullcontext() if into is None else replacing(into, RECONSTRUCTION, overwrite=overwrite, world=world)
    with saved as staged, multiplying(chosen, place, autocast=True):
        return measure_reconstruction(
            staged, tokenizer, measured, network, judge, world, batch_size=batch_size, bad=bad, held_out=share,
            checkpoint_sha256=weights_sha256(name, "tokenizer"), tokenizer_place=from_anywhere("tokenizer", str(name)),
            note=note, reference=spec, validation_split=split, precision=chosen,
        )  # fmt: skip


def trained_on(name: str | Path) -> Json:
    """What is known of the data of a tokenizer, as `data` of a run's settings has it, and the hashes of what it was
    trained on and of what was held out; `name` may also be a model folder in the run."""
    if name in SHIPPED["tokenizer"]:
        return {"images": str(name).partition("-")[0]}
    folder = Path(name).absolute()
    run = folder.parent if (folder.parent / ORIGIN).is_file() else folder
    config, origin = (read_json(path) if path.is_file() else {} for path in (run / "config.json", run / ORIGIN))
    return {**(config.get("data") or {}), **{key: origin.get(key) for key in HASHES}}


def is_trained_on(spec: str, known: Json, image_size: int) -> bool:
    """Whether `spec` means the data of `known`: the same place, however written, or wherever it lies the same pictures,
    of those trained on or of those held out."""
    if spec == (ours := str(known.get("images") or "")):
        return True
    with suppress(UserError):  # those lie elsewhere now
        here, there = ((kind, home_expanded(target).resolve()) for kind, target in map(find_source, (spec, ours)))
        if here == there:
            return True
    if hashes := {known.get(key) for key in HASHES} - {None}:
        with suppress(UserError):  # other data, without such a split
            split = known.get("validation_split")
            found = open_reference(spec, image_size, held_out=HELD_OUT, validation_split=split, enlarge=True).images
            return any(one.content_hash() in hashes for one in found.values())
    return False


def note_of_training(known: Json, measured: ImageSet, split: str | None, *, is_same: bool, holds_out: bool) -> str:
    """For the end of a protocol: that pictures are `measured` which a tokenizer was trained on, or others than were
    held out then; empty where neither is known. `split` is what was asked for."""
    content, before = measured.content_hash(), known.get("validation_sha256")
    if content is not None and content == known.get("data_sha256"):
        return "; the pictures that it was trained on"
    if not is_same or (content is not None and content == before):
        return ""
    if not holds_out:
        return "; those that it was trained on among them"
    if split is not None and "%" in split:
        return "; some that it was trained on may be among them"
    changed = split is None and None not in (content, before)
    return "; not the pictures that were held out when it was trained" if changed else ""


def load_perceptual_distance(name: str | None, image_size: int, device: str) -> LayerDistance | None:
    """The one called `name`; None: the offline one, where pictures are large enough. `UserError` for another name, and
    where they are too small for the one that is named."""
    check_choice("--perceptual", chosen := name or "efficientnet-lite0", PERCEPTUAL_DISTANCES)
    kind = PERCEPTUAL_DISTANCES[chosen]
    if image_size >= kind.smallest_input:
        return kind.load(None).to(device)
    if name is None:
        return None
    raise UserError(f"--perceptual: {name} reads images of {kind.smallest_input} px or more, not of {image_size}")


def measure_reconstruction(
    folder: Path | None,
    tokenizer: Tokenizer,
    images: ImageSet,
    network: FeatureNetwork,
    judge: LayerDistance | None = None,
    world: World = ALONE,
    *,
    batch_size: int = 64,
    note: str = "",
    bad: BadImages | None = None,
    **origin: str | float | None,
) -> Json:
    """Metrics over the set, and as `origin` what they are of; also written into reconstruction.json of `folder`, where
    there is one, and some images to reconstructions.npz. `note` ends the protocol.

    Of the processes of `world`, which share the work, the first one writes.
    """
    pixels = hashlib.sha256()
    batches = (as_input(batch, tokenizer) for batch in hashed(images.stream(batch_size), pixels.update))
    metrics = reconstruction_metrics(tokenizer, batches, feature_network=network, perceptual=judge, world=world)
    count = int(metrics["num_images"])
    against = f"reconstructions by {tokenizer.name} against their originals in {images.name}"
    if small := images.enlarged():
        note = f", {small:,} of them enlarged to {tokenizer.image_size} px{note}"
    known = record_of(network)
    judged = {"perceptual": judge.name, "perceptual_sha256": judge.weights_sha256} if judge else {}
    left_out, few = bad_images_record(bad), count < ENOUGH * network.num_features
    exact = f"psnr is a mean in which {metrics.get('exact', 0):,} pictures, reproduced exactly, are {LARGEST_PSNR:g} dB"
    biased = (  # as both Gaussians are of samples, and the distance is convex in them; of perfect ones it is 0
        f"rFD({network.name}) is biased upwards by few images ({count:,}, {network.num_features:,} features); compare "
        "it at equal images only"
    )
    content = {
        **metrics,
        "origin": {
            **{key: value for key, value in origin.items() if value is not None},
            "protocol": f"{count:,} {against}, {network.name}{note}",
            "remarks": [biased] * few + [exact] * ("exact" in metrics),
            "images": images.name,
            "images_sha256": pixels.hexdigest(),
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "feature_network": known.get("place", network.name),
            "feature_network_sha256": known["sha256"],
            **judged,
            **({"bad_images": left_out} if left_out else {}),
            "batch_size": batch_size,
            "machine": machine_name(str(device_of(tokenizer))),
            **library_versions(),
        },
    }
    if folder is not None and world.is_main:
        keep_reconstructions(folder, tokenizer, images, count)
        write_json(folder / RECONSTRUCTION, content)
    return content
