"""Tokenising an image folder: does the loader keep the encoder fed?

Three rates on the same images: the encoder alone on crops that are in memory, decoding and cropping alone, and the
whole `write_token_store`. The encoder never starves when the whole takes hardly longer than the slower of its parts on
as many cores. Run: python benchmarks/tokenizing.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import interleaved, ratio, write_result
from PIL import Image

from consonar.components import load_tokenizer
from consonar.data.picture_files import prefetch
from consonar.data.sources import open_source
from consonar.data.tokenizing import write_token_store
from consonar.data.transforms import center_crop, from_uint8
from consonar.types import ImageRecord


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer("openmoji-64").to(device)
    with tempfile.TemporaryDirectory() as folder:
        images, stores = Path(folder) / "images", iter(Path(folder) / f"store{i}" for i in range(100))
        images.mkdir()
        rng = np.random.default_rng(0)
        for index in range(args.images):
            small = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)
            Image.fromarray(small).resize((320, 256), Image.Resampling.BICUBIC).save(
                images / f"{index:05d}.jpg", quality=90
            )
        source = open_source(str(images), image_size=tokenizer.image_size)
        crops = from_uint8(torch.stack([decoded(record) for record in source])).to(device)

        def encode() -> None:
            with torch.inference_mode():
                for start in range(0, len(crops), 64):
                    tokenizer.encode(crops[start : start + 64]).cpu()

        seconds = interleaved(
            {
                "encoder alone": encode,
                "decoding alone": lambda: list(prefetch(source, decoded, depth=192)),
                "whole": lambda: write_token_store(next(stores), source, tokenizer),
            },
            args.rounds,
        )
    figures = {
        "whole / encoder alone": round(ratio(seconds, "whole", "encoder alone"), 3),
        "decoding alone / encoder alone": round(ratio(seconds, "decoding alone", "encoder alone"), 3),
        "images per second, whole": round(args.images / min(seconds["whole"]), 1),
        "seconds": seconds,
    }
    write_result("tokenizing", {"images": args.images, "source": "jpeg 320x256", "batch_size": 64}, 0, figures)


def decoded(record: ImageRecord) -> torch.Tensor:
    """The 64-px centre crop of a record as (64, 64, 3) uint8."""
    return torch.from_numpy(np.array(center_crop(record.image, 64)))


if __name__ == "__main__":
    main()
