"""Commands that make token stores: tokenize, import-tokens."""

from collections.abc import Sized
from pathlib import Path
from typing import Any

from consonar.cli.console import counting, say
from consonar.cli.parsing import check_bad_images, check_name
from consonar.errors import MissingSplit, UserError, unknown


def tokenize(
    *,
    tokenizer: str,
    data: str,
    out: Path,
    split: str | None = None,
    image_size: int | None = None,
    classes: str | None = None,
    label_default: str | None = None,
    bad_images: str = "stop",
    bad_images_limit: float = 0.01,
    views: str = "center_flip",
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Tokenise images into a token store, and their validation images into a second one beside it.

    Args:
        tokenizer: Name (openmoji-64) or folder of the tokenizer.
        data: openmoji, a folder of images (sub-folders are classes), imagefolder:PATH, hf:owner/name.
        out: Folder of the token store to make; validation images go to OUT-validation.
        split: Make only the store of this split, in OUT (default: train, and validation where the data have one).
        image_size: Pixels, for a tokenizer that takes any size (default: its own).
        classes: Text file that names class 0, 1, ..., one a line (default: classes in the order of their names).
        label_default: What images without a label become in data with classes: the id or name of a class, or drop.
        bad_images: What is done about images that cannot be read: stop, or skip (leave them out, list them in
            OUT-bad-images.txt).
        bad_images_limit: Share of images that may be left out before skip stops too; one image may always be.
        views: Crops kept of each training image: center, center_flip, ten_crop, shift_flip; of other splits the
            centre is kept.
        batch_size: Crops per call of the encoder.
        device: auto, cpu or cuda.
    """
    from consonar.data.bad_images import BadImages, leave_out
    from consonar.data.sources import open_source
    from consonar.data.transforms import VIEWS
    from consonar.distributed import pick_device
    from consonar.files.lock import is_taken
    from consonar.sampling.sample import check_batch_size

    check_name(out)
    check_bad_images(bad_images, bad_images_limit)
    bad = BadImages(bad_images, bad_images_limit, out.with_name(f"{out.name}-bad-images.txt"))
    place = pick_device(device, "--device")
    check_batch_size(batch_size, "--batch-size")
    if views not in VIEWS:
        raise unknown("--views", views, VIEWS)
    if split not in (None, "train") and views not in ("center_flip", "center"):
        raise UserError(f"--views: {views!r} is read only for the split train; of others the centre is kept")
    model = tokenizer_for(tokenizer, image_size).to(place)
    wanted = {"train" if split is None else split: out}
    if split is None:
        wanted["validation"] = out.with_name(f"{out.name}-validation")
    sources = {}
    for name in wanted:
        try:
            sources[name] = open_source(
                data, split=name, image_size=model.image_size, classes=classes, label_default=label_default
            )
        except MissingSplit:
            if split is not None or name == "train":
                raise
    kinds = {name: views if name == "train" else "center" for name in sources}
    taken = [name for name in sources if is_taken(wanted[name])]
    if len(taken) < len(sources):  # else nothing is made
        sources = {name: leave_out(source, bad, name) for name, source in sources.items()}
        bad.write()
    # Of two stores, one that is there is kept when the command that made it was this one, ended in between.
    ours = [name for name in taken if is_store_of(wanted[name], sources[name], model, kinds[name])]
    if taken and (ours != taken or len(taken) == len(sources)):
        raise UserError(f"--out: {wanted[taken[0]]} exists; choose another folder")
    for name in ours:
        say(f"{name}: is there already: {wanted[name]}")
    for name, source in sources.items():
        if name not in ours:
            write_store(name, source, model, wanted[name], kinds[name], batch_size)
    if bad.note:
        say(bad.note)
        bad.write()  # of a stream it is known now


def tokenizer_for(name: str, image_size: int | None) -> Any:
    """The tokenizer for images of `image_size` pixels (None: its own); `UserError` where it takes none such."""
    from consonar.components import load_tokenizer
    from consonar.data.transforms import check_image_size

    if image_size is not None:
        check_image_size(image_size, "--image-size")
    model = load_tokenizer(name)
    if image_size is not None and image_size != model.image_size:
        model = load_tokenizer(name, num_tokens=round((image_size**2 * model.num_tokens) / model.image_size**2))
        if model.image_size != image_size:
            raise UserError(f"--image-size: {image_size}, but {model.name} takes {model.image_size}")
    return model


def write_store(name: str, source: Any, model: Any, path: Path, views: str, batch_size: int) -> None:
    """Tokenises the images of split `name` into `path`, and says what was found."""
    from consonar.data.image_folder import other_files
    from consonar.data.labels import describe, known_labels
    from consonar.data.tokens import write_token_store

    known = known_labels(source) is not None
    if known:
        say(f"{name}: {describe(source)}")
    with counting(f"tokenize {name}") as count:
        store = write_token_store(path, source, model, views=views, batch_size=batch_size, progress=count)
    shape = f"{len(store)} images x {store.num_views} views x {store.num_tokens} tokens"
    say(f"{name}: {shape}: {store.path}" if known else f"{name}: {store.describe()}: {store.path}")
    if note := other_files(source):
        say(f"{name}: not read: {note}")


def is_store_of(path: Path, source: Any, tokenizer: Any, views: str) -> bool:
    """Whether a finished store at `path` is what tokenising these would make, as its metadata tell."""
    from consonar.data.store_format import METADATA_FILE
    from consonar.data.tokens import TokenStore

    if not (path / METADATA_FILE).is_file():
        return False
    store = TokenStore.open(path)
    wanted = (tokenizer.fingerprint, views, source.name, source.class_names)
    same = (store.fingerprint, store.metadata.get("views"), store.source, store.class_names) == wanted
    return same and (not isinstance(source, Sized) or len(source) == len(store))


def import_tokens(*, format: str, data: Path, tokenizer: str, out: Path, labels: Path | None = None) -> None:
    """Turn the token files of RAR (.jsonl) or LlamaGen (.npy folders) into a token store.

    Args:
        format: rar-jsonl or llamagen-npy.
        data: The .jsonl file, or the folder of codes.
        tokenizer: Name or folder of the tokenizer that made the tokens.
        out: Folder of the token store to make.
        labels: Folder of label files (llamagen-npy).
    """
    from consonar.components import load_tokenizer
    from consonar.data.upstream import import_llamagen_npy, import_rar_jsonl

    formats = ("rar-jsonl", "llamagen-npy")
    if format not in formats:
        raise unknown("--format", format, formats)
    if (labels is None) != (format == "rar-jsonl"):
        raise UserError("--labels: needed by llamagen-npy and by nothing else")
    check_name(out)
    model = load_tokenizer(tokenizer)
    store = import_rar_jsonl(data, out, model) if labels is None else import_llamagen_npy(data, labels, out, model)
    say(store.describe())
    say(f"{len(store)} images x {store.num_views} views x {store.num_tokens} tokens: {out}")
