"""Sampling jobs: many images to a file or folder, in shards that survive an interruption.

Shard k holds images k * shard_size .. and is a function of the settings alone, so a second call with the same settings
skips the shards that are there and whole, and any number of processes share them. What comes out: a picture (.png,
one grid), an .npz in ADM layout (`arr_0` uint8 (n, H, W, 3), plus labels, seeds, tokens, entropy and the settings), or
a folder of PNG files.
"""

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from consonar.config_io import to_dict
from consonar.data.captions import CaptionFeatures
from consonar.data.picture_files import IMAGE_ENDINGS, save_grid
from consonar.data.transforms import from_uint8, to_uint8
from consonar.distributed import ALONE, World, of_every, seconds_of_patience
from consonar.errors import UserError
from consonar.files.lock import Beat
from consonar.files.readers import read_npz
from consonar.files.shared_work import SharedWork
from consonar.files.weights import component_fingerprint
from consonar.files.writers import write_atomically, write_json
from consonar.json_types import Json
from consonar.origin import Origin, check, of_tokenizer
from consonar.precision import pick_precision, with_weights
from consonar.records import device_of
from consonar.sampling.checks import check_batch_size, check_condition
from consonar.sampling.pictures import PictureDecoder
from consonar.sampling.sample import SamplerConfig, Samples, check_fit, decoder_of, draw
from consonar.seeding import check_seed
from consonar.types import Condition, Generator, TextEncoder, Tokenizer

MAX_GRID_IMAGES = 1024
MOST_IMAGES = 10_000_000
"""Of one job; their classes and seeds are held in memory."""
OTHER_ENDINGS = {
    *IMAGE_ENDINGS, ".npy", ".zip", ".tar", ".tgz", ".gz", ".xz", ".7z", ".pt", ".pth", ".bin", ".ckpt", ".safetensors",
    ".json", ".jsonl", ".html", ".txt", ".md", ".log", ".csv", ".tsv", ".yaml", ".yml", ".toml", ".pdf", ".svg", ".mp4",
    ".pkl", ".h5", ".parquet", ".",
} - {".png"}  # fmt: skip
"""Endings of files that are not written here; any other dot (t0.9) is part of a folder's name."""

PLACES = ("generator", "tokenizer", "origin")
"""Settings of a job that say where things lie or come from; the hashes beside them say what they are."""

Arrange = Callable[[Path, Path, Iterator[np.ndarray]], None]
"""(folder to fill, what it will be called, pictures (H, W, 3) in their order) -> None."""


@dataclass(frozen=True)
class Prompts:
    """What images are asked for in words, as `features` of the text encoder with this fingerprint."""

    texts: tuple[str, ...]
    features: CaptionFeatures
    fingerprint: str

    @classmethod
    def read_by(cls, encoder: TextEncoder, texts: Sequence[str]) -> Self:
        """Raises `UserError` as the encoder does."""
        return cls(tuple(texts), CaptionFeatures(texts, encoder), encoder.fingerprint)


class Job:
    """What is drawn: image i is of class labels[i], (n,) int64, and has the seed `seed` + i, from 0 to 2^63 - 1; for a
    generator of captions it is of prompt labels[i] of `prompts`, with their features.

    The generator is called `source`, and `origin` is what it was made of. `device`: where both models are moved to;
    None: where the generator is. `precision` is one of `precision.CHOICES`; `compile` compiles the decoder; pictures
    are reduced to `image_size`. Raises `UserError` for a seed outside that range, wrong classes, a tokenizer that does
    not fit, one that `origin` does not name, another precision, and a size above the tokenizer's.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        labels: Tensor,
        *,
        seed: int,
        sampler: SamplerConfig,
        source: str,
        origin: Origin | None = None,
        precision: str = "auto",
        device: torch.device | None = None,
        compile: bool = False,
        prompts: Prompts | None = None,
        image_size: int | None = None,
    ) -> None:
        check_seed(seed, "seed", len(labels))
        if image_size is not None and image_size not in range(1, tokenizer.image_size + 1):
            raise UserError(f"image_size: {image_size} is not from 1 to {tokenizer.image_size}, which are decoded")
        device = device or device_of(generator)
        self.precision = pick_precision(precision, device, "precision", "sampling")
        check_fit(generator, tokenizer, sampler)
        used, origin = of_tokenizer(tokenizer), origin or Origin()
        remedy = "its codes mean something else: leave --tokenizer away, or train a generator on its tokens"
        check("tokenizer", used, origin, source, remedy)
        self.prompts = prompts
        check_condition(labels if prompts is None else prompts.features.read(labels[:1]), generator)
        self.sampler = sampler
        self.labels, self.seeds = labels, range(seed, seed + len(labels))
        self.settings: Json = {  # everything the result depends on, written beside it
            "generator": source,
            "generator_sha256": component_fingerprint(to_dict(generator.config), generator.state_dict()),
            "tokenizer": tokenizer.name,
            "tokenizer_fingerprint": used.tokenizer_fingerprint,
            "origin": to_dict(origin),
            "sampler": to_dict(sampler),
            "seed": seed,
            "num_samples": len(labels),
            "num_classes": generator.num_classes,
            "labels_sha256": component_fingerprint({}, {"labels": labels}),
            **({} if prompts is None else {"prompts": list(prompts.texts), "text_encoder": prompts.fingerprint}),
            **({} if image_size is None else {"image_size": image_size}),
            "precision": self.precision,
            "torch": torch.__version__,
        }
        # By now hashed as they came.
        self.generator = with_weights(generator, self.precision, device)
        decoding = with_weights(tokenizer, self.precision, device)
        self.pictures = PictureDecoder(decoding, compile=compile, image_size=image_size)

    def condition(self, rows: slice) -> Condition:
        """Of the images `rows`."""
        return self.labels[rows] if self.prompts is None else self.prompts.features.read(self.labels[rows])


def check_count(num_samples: int, key: str, seed: int = 0) -> None:
    """Raises `UserError` for a number of images that no job has, and for a first seed that leaves them none."""
    if not 1 <= num_samples <= MOST_IMAGES:
        raise UserError(f"{key}: {num_samples} is not between 1 and {MOST_IMAGES:,}; draw more in jobs of other seeds")
    check_seed(seed, "seed", num_samples)


def balanced_labels(num_samples: int, num_classes: int) -> Tensor:
    """Classes 0, 1, ..., 0, 1, ...: every class as often as the others, give or take one; (num_samples,) int64.

    For fewer samples than classes: classes at equal steps over all of them, not the first ones.
    """
    if num_samples < num_classes:
        return torch.arange(num_samples) * num_classes // max(num_samples, 1)
    return torch.arange(num_samples) % num_classes


def run_job(
    job: Job,
    out: Path,
    *,
    batch_size: int = 64,
    shard_size: int = 512,
    progress: Callable[[int], None] | None = None,
    restart: bool = False,
    world: World = ALONE,
    arrange: Arrange | None = None,
) -> Path:
    """Draws the job into `out` (.png, .npz, or a folder) and returns it. `progress` gets the number of images done;
    `arrange` writes a folder in another way.

    Processes that call it with the same job share its shards, those of torchrun (`world`) as well as others; who ends
    last makes `out` of them. Raises `UserError` when `out` exists, for no images or a batch or shard size below 1, and
    when OUT.parts holds unfinished samples of another job (`restart`: those are removed) or other things.
    """
    old = {"precision": "fp32", "num_classes": job.settings["num_classes"]}  # what older versions did not say
    work = SharedWork(
        out=out, settings=job.settings, what="samples", unread=PLACES, old=old, patience=seconds_of_patience()
    )
    work.tidy()
    check_place(job, out, batch_size, shard_size)
    shards = [
        (work.folder / f"shard_{start:08d}_{shard_size}.npz", slice(start, start + shard_size))
        for start in range(0, len(job.labels), shard_size)
    ]
    decoder, done = decoder_of(job.generator, job.sampler), 0

    def make(index: int, beat: Beat) -> None:
        nonlocal done
        path, rows = shards[index]
        labels, seeds = job.labels[rows], job.seeds[rows]
        if not is_whole(path, labels, seeds):
            drawn = draw(decoder, job.pictures, job.condition(rows), seeds, batch_size, job.precision, beat)
            write_atomically(path, partial(write_npz, arrays=as_arrays(drawn, labels, seeds)))
        done += len(labels)
        if progress:
            progress(done)

    def finish(beat: Beat) -> None:
        try:
            assemble(shards, job, out, arrange, beat)
        except (FileNotFoundError, zipfile.BadZipFile) as error:
            raise UserError(f"{work.folder}: changed while {out} was made of it; the same command goes on") from error

    of_every(None, world)  # nobody looks for `out` after another process has made it
    work.run([path for path, _ in shards], make, finish, restart)
    return out


def check_place(job: Job, out: Path, batch_size: int, shard_size: int) -> None:
    """Raises `UserError` as `check_new` does, for no images, more than a picture takes, and for a size below 1."""
    for key, count in (("num_samples", len(job.labels)), ("batch_size", batch_size), ("shard_size", shard_size)):
        check_batch_size(count, key)
    check_new(out)
    if out.suffix.lower() == ".png" and len(job.labels) > MAX_GRID_IMAGES:
        many = f"{len(job.labels)} images do not fit one picture (at most {MAX_GRID_IMAGES})"
        raise UserError(f"--out: {many}; use .npz or a folder")


def check_new(out: Path) -> None:
    """Raises `UserError` for an output that exists, and for one that is plainly another kind of file."""
    if out.exists():
        raise UserError(f"--out: {out} exists; choose another name")
    stem, dot, last = out.name.rpartition(".")
    ending = (dot + last).lower()
    if ending in OTHER_ENDINGS or (ending in (".png", ".npz") and not stem):
        raise UserError(f"--out: samples are not written as {out.name}; choices: NAME.png, NAME.npz, or a folder")


def is_whole(path: Path, labels: Tensor, seeds: Sequence[int]) -> bool:
    """Whether a shard is there, undamaged, and has the images of these classes and seeds."""
    keys = ("labels", "seeds", "arr_0", "tokens", "entropy")
    try:
        arrays = read_npz(path, keys)
    except UserError:  # missing, cut short, or something else
        return False
    complete = len(arrays) == len(keys) and all(array.shape[:1] == labels.shape for array in arrays.values())
    return complete and np.array_equal(arrays["labels"], labels.numpy()) and np.array_equal(arrays["seeds"], seeds)


def as_arrays(drawn: Samples, labels: Tensor, seeds: Sequence[int]) -> dict[str, Any]:
    """What a shard holds."""
    return {
        "arr_0": to_uint8(drawn.images).numpy(),
        "labels": labels.numpy(),
        "seeds": np.array(seeds),
        "tokens": drawn.tokens.numpy(),
        "entropy": drawn.entropy.numpy(),
    }


def write_npz(path: Path, arrays: dict[str, Any]) -> None:
    """Arrays by name; of type `Any`, else mypy holds them against a flag of `savez`."""
    with path.open("wb") as file:
        np.savez(file, **arrays)


def assemble(shards: Sequence[tuple[Path, slice]], job: Job, out: Path, arrange: Arrange | None, beat: Beat) -> None:
    """Writes the finished output from the job's shards, one shard in memory at a time."""
    if out.suffix.lower() == ".png":
        images = np.concatenate([np.load(path)["arr_0"] for path, _ in shards])
        asked = [] if job.prompts is None else [job.prompts.texts[label] for label in job.labels.tolist()]
        save_grid(from_uint8(torch.from_numpy(images)), out, captions=asked)
    elif out.suffix.lower() == ".npz":
        write_atomically(out, partial(merge_npz, [path for path, _ in shards], job, beat))
    else:
        unfinished = shards[0][0].with_name("pictures")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        if arrange is None:
            what = "class" if job.prompts is None else "prompt"
            for index, picture in enumerate(pictures_of(shards, beat)):
                Image.fromarray(picture).save(unfinished / f"{index:06d}_{what}{int(job.labels[index])}.png")
        else:
            arrange(unfinished, out, pictures_of(shards, beat))
        write_json(unfinished / "settings.json", job.settings)
        unfinished.rename(out)


def pictures_of(shards: Sequence[tuple[Path, slice]], beat: Beat) -> Iterator[np.ndarray]:
    """uint8 (H, W, 3) each, a shard in memory at a time."""
    for path, _ in shards:
        beat()
        with np.load(path) as arrays:
            yield from arrays["arr_0"]


def merge_npz(shards: Sequence[Path], job: Job, beat: Beat, out: Path) -> None:
    """Concatenates the arrays of all shards into one .npz without holding the images of more than one shard."""
    with np.load(shards[0]) as first, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for key in first.files:
            header = np.lib.format.header_data_from_array_1_0(first[key])
            header["shape"] = (len(job.labels), *header["shape"][1:])
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for path in shards:
                    beat()
                    with np.load(path) as arrays:
                        member.write(np.ascontiguousarray(arrays[key]).tobytes())
        with archive.open("settings.npy", "w") as member:
            np.lib.format.write_array(member, np.array(json.dumps(job.settings)), allow_pickle=False)
