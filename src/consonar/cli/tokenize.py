"""The command `tokenize`."""

from collections.abc import Iterator, Sized
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from consonar import memory
from consonar.cli import counting, say
from consonar.cli.parsing import BadImageGroup, check_name
from consonar.components import load_tokenizer
from consonar.data.captions import NUMBERED, CaptionFeatures, all_captions
from consonar.data.image_folder import other_files
from consonar.data.labels import describe, known_labels
from consonar.data.sources import called_in, check_captioned, check_mirrored, find_source, open_source
from consonar.data.splits import open_splits
from consonar.data.store_format import METADATA_FILE
from consonar.data.tokenizing import CAPTION_REMEDY, write_token_store
from consonar.data.tokens import TokenStore
from consonar.data.transforms import IMAGE_SIDE, VIEWS
from consonar.distributed import World, barrier, joined
from consonar.errors import MissingSplit, UserError, check_choice, printable
from consonar.files.lock import is_taken
from consonar.files.shared_work import parts_of, remove_shards
from consonar.networks.text_encoders import PretrainedTextEncoder, load_text_encoder
from consonar.precision import pick_precision
from consonar.sampling.checks import check_batch_size
from consonar.tokenizers.base import CodebookTokenizer
from consonar.types import ImageSource, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Options:
    tokenizer: str
    """Name (openmoji-64) or folder of the tokenizer."""
    data: str
    """openmoji, scenes, cifar10, a folder of images (sub-folders are classes), imagefolder:PATH, hf:owner/name."""
    out: Path
    """Folder of the token store to make; validation images go to OUT-validation."""
    split: str | None = None
    """Make only the store of this split, in OUT (default: train and validation)."""
    validation_split: str | None = None
    """Validation images: the name of a split, or a share of the training images that is held out, such as 5% (0%:
    none; default: the split validation, else test, else 5%)."""
    image_size: int | None = None
    """Pixels, for a tokenizer that takes any size (default: its own)."""
    classes: str | None = None
    """Text file that names class 0, 1, ..., one a line, or imagenet (default: classes in the order of their names)."""
    label_default: str | None = None
    """What images without a label become in data with classes: the id or name of a class, or drop."""
    bad: BadImageGroup
    views: str | None = None
    """Crops kept of each training image: center, center_flip, ten_crop, shift_flip (default: center_flip; of scenes,
    and with captions, which may tell left from right, center); of other splits the centre is kept."""
    captions: tyro.conf.FlagCreatePairsOff[bool] = False
    """Refuse images without a caption (default: those that there are go into the store)."""
    text_encoder: str | None = None
    """Make its features of all captions, too, where train finds them: minilm, a folder, or OWNER/NAME of the hub, with
    T5, CLIP or BERT. Implies --captions."""
    batch_size: int = 64
    """Crops per call of the encoder, captions per call of the text encoder."""
    precision: str = "fp32"
    """fp32, tf32 or bf16, in which pictures get other tokens now and then; docs/gpu.md."""
    compile: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compile the encoder, which takes about a minute: for many thousand images."""
    device: str = "auto"
    """auto, cpu or cuda."""


def command(options: Options) -> None:
    check_name(options.out)
    with joined(options.device, "--device") as world:
        tokenize(options, world)


def tokenize(options: Options, world: World) -> None:
    """In each of the processes that share it; the first one says what there is."""
    check_batch_size(options.batch_size, "--batch-size")
    out = options.out
    stores = {"train": out, "validation": out.with_name(f"{out.name}-validation")}
    stores = stores if options.split is None else {options.split: out}
    if captioned := options.captions or options.text_encoder is not None:
        check_captioned(options.data)
    done = options.text_encoder is None  # with it the features of stores that are there may be left to make
    if done and all(is_taken(path) and not parts_of(path).exists() for path in stores.values()):  # nothing is read yet
        raise UserError(f"--out: {out} exists; choose another folder")
    views = views_of(options)
    bad = options.bad.policy(out.with_name(f"{out.name}-bad-images.txt"))
    precision = pick_precision(options.precision, world.device, "--precision", "measuring")
    model = tokenizer_for(options.tokenizer, options.image_size).to(world.device)
    encoder = load_text_encoder(options.text_encoder) if options.text_encoder is not None and world.is_main else None
    sources, note = open_sources(options, model.image_size)
    kinds = {name: views if name == "train" else "center" for name in sources}
    taken = [name for name in sources if is_taken(stores[name])]
    # Of two stores, one that is there is kept when the command that made it was this one, ended in between.
    ours = [name for name in taken if is_store_of(stores[name], sources[name], model, kinds[name], precision)]
    for name in ours:  # of one that was ended while it tidied
        remove_shards(stores[name])
    done = done and len(taken) == len(sources)
    if taken and (ours != taken or done):
        changed = "" if done else ", and not of these images, labels and options"
        raise UserError(f"--out: {stores[taken[0]]} exists{changed}; choose another folder")
    for name, source in sources.items() if captioned else ():
        known = TokenStore.open(stores[name]).captions if name in ours else getattr(source, "captions", None)
        has_words = encoder.has_words if encoder is not None and world.size == 1 else str.strip  # else others wait
        called = NUMBERED if name in ours else partial(called_in, source)
        all_captions(known or (), f"--captions: {source.name}", CAPTION_REMEDY, has_words, called)
    barrier(world)  # nobody looks for stores after another process has made them
    tell = say if world.is_main else lambda text: None
    if note:
        tell(note)
    for name, source in sources.items():
        if name in ours:
            tell(f"{name}: is there already: {stores[name]}")
            continue
        if labelled := known_labels(source) is not None:
            tell(f"{name}: {describe(source)}")
        smaller = f"lower --batch-size ({options.batch_size})"
        with counting(f"tokenize {name}", world.is_main) as count, memory.explained(smaller, world.device):
            store = write_token_store(
                stores[name], source, model, views=kinds[name], batch_size=options.batch_size, precision=precision,
                compile=options.compile, progress=count, bad=bad, part=name,
                settings={"data": options.data, "label_default": options.label_default}, captions=captioned,
                world=world,
            )  # fmt: skip
        shape = f"{len(store)} images x {store.num_views} views x {store.num_tokens} tokens"
        tell(f"{name}: {shape}: {store.path}" if labelled else f"{name}: {store.describe()}: {store.path}")
        for remark in remarks(store, source, model.image_size):
            tell(f"{name}: {remark}")
    bad.load()
    if bad.note:
        tell(bad.note)
    if encoder is not None:  # in the first process; the others have nothing to wait for
        for name in sources:
            tell(f"{name}: {make_features(stores[name], encoder, options.batch_size, world.device)}")


def remarks(store: TokenStore, source: ImageSource, image_size: int) -> Iterator[str]:
    """What was made larger, or not read, of a source."""
    if few := store.metadata.enlarged:
        yield f"smaller than {image_size} px, and enlarged: {few:,} of {len(store):,} pictures"
    if left := other_files(source):
        yield f"not read: {left}"


def make_features(path: Path, encoder: PretrainedTextEncoder, batch_size: int, device: torch.device) -> str:
    """Makes the features of a store's captions, where they are not there; says which captions are not read whole."""
    captions = all_captions(TokenStore.open(path).captions, f"--captions: {path}", CAPTION_REMEDY)
    encoder.network.to(device)
    with counting(f"captions of {path.name}") as count, memory.explained(f"lower --batch-size ({batch_size})", device):
        where = f"--captions: {path}"
        features = CaptionFeatures(captions, encoder, batch_size=batch_size, progress=count, where=where)
    strange = [text for text in features.texts if not encoder.knows(text)]
    example = f" ({printable(strange[0][:60])!r})" if strange else ""
    read = f"{features.about}; the longest has {features.longest} of {encoder.length} tokens"
    return f"{read}; {len(strange):,} with words that it does not know{example}"


def views_of(options: Options) -> str:
    """The views of the training images. `UserError` for unknown ones, and for those that these images must not have."""
    captioned = options.captions or options.text_encoder is not None
    if (views := options.views) is None:
        return "center_flip" if find_source(options.data)[0].mirrors and not captioned else "center"
    check_choice("--views", views, VIEWS)
    if views != "center":
        check_mirrored(options.data, "--views", views)
    if options.split not in (None, "train") and views not in ("center_flip", "center"):
        raise UserError(f"--views: {views!r} is read only for the split train; of others the centre is kept")
    return views


def open_sources(options: Options, image_size: int) -> tuple[dict[str, ImageSource], str]:
    """The images of the stores to make, by split, and where those to validate on come from.

    `UserError` for a split that the data do not have.
    """
    split, wanted, key = options.split, options.validation_split, "--validation-split"
    given: dict[str, Any] = {
        "image_size": image_size, "classes": options.classes, "label_default": options.label_default
    }  # fmt: skip
    if split not in (None, "train", "validation"):
        if wanted is not None:
            raise UserError(f"{key}: {wanted!r} is read only for the splits train and validation; leave it away")
        return {split: open_source(options.data, split=split, **given)}, ""
    if split == "validation" and wanted is None:
        with suppress(MissingSplit):  # no pictures to train on are needed beside it
            return {split: open_source(options.data, split=split, **given)}, ""
    splits = open_splits(options.data, wanted, key=key, **given)
    found = {"train": splits.train} | ({"validation": splits.validation} if splits.validation else {})
    if split is not None and split not in found:
        raise UserError(f"--split: no picture of {options.data} is for {split!r}; choices: {', '.join(found)}")
    return found if split is None else {split: found[split]}, splits.note


def tokenizer_for(name: str, image_size: int | None) -> CodebookTokenizer:
    """The tokenizer for images of `image_size` pixels (None: its own); `UserError` where it takes none such."""
    if image_size is not None:
        IMAGE_SIDE.check("--image-size", image_size)
    model = load_tokenizer(name)
    if image_size is not None and image_size != model.image_size:
        model = load_tokenizer(name, num_tokens=round((image_size**2 * model.num_tokens) / model.image_size**2))
        if model.image_size != image_size:
            raise UserError(f"--image-size: {image_size}, but {model.name} takes {model.image_size}")
    return model


def is_store_of(path: Path, source: ImageSource, tokenizer: Tokenizer, views: str, precision: str) -> bool:
    """Whether a finished store at `path` is what tokenising these would make: metadata, labels, images by hash."""
    if not (path / METADATA_FILE).is_file():
        return False
    store = TokenStore.open(path)
    wanted = (tokenizer.fingerprint, views, precision, source.name, source.class_names)
    made = store.metadata.precision or "fp32"  # older versions had no other
    if (store.fingerprint, store.metadata.views, made, store.source, store.class_names) != wanted:
        return False
    if isinstance(source, Sized) and len(source) != len(store) + store.metadata.left_out:
        return False
    if store.metadata.source_sha256 not in (None, getattr(source, "content_hash", None)):
        return False
    if (labels := known_labels(source)) is None:
        return True
    left = iter(labels)  # also of what could not be read
    return all(label in left for label in store.table.column("label").to_pylist())
