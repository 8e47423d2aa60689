"""Commands that make things: the demo, token stores, runs, samples."""

import sys
from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from consonar.cli.console import counting, say
from consonar.cli.parsing import check_bad_images, check_name, check_output, class_list, is_option, parse, take_option
from consonar.errors import MissingSplit, UserError, unknown


def demo(*, out: Path = Path("runs/demo"), minutes: float = 18.0, seed: int = 0) -> None:
    """Pictures of the shipped generator; then plain AR, reAR and VA-pi on OpenMoji, trained, measured, on a page.

    Args:
        out: Folder to make; the page is OUT/report.html.
        minutes: How long the whole may take on this machine, which is measured first; more is better pictures.
        seed: Of all runs.
    """
    from consonar.demo import run_demo

    check_output(out)
    page = run_demo(out, minutes=minutes, seed=seed, say=say)
    say(f"the page: {page.resolve()}")


SHORT = {
    "--data": "--data.images", "--classes": "--data.classes", "--label-default": "--data.label-default",
    "--bad-images": "--data.bad-images", "--bad-images-limit": "--data.bad-images-limit",
}  # fmt: skip
"""Options of `train` that are called as those of `tokenize`."""


def full_name(word: str) -> str:
    """A word of `train`, with the whole name of an option that is called as in `tokenize`."""
    short = next((name for name in SHORT if is_option(word, name)), None)
    return word if short is None else SHORT[short] + word.removeprefix(short)


def train_command(args: Sequence[str]) -> None:
    """Train a recipe or a YAML file: consonar train rear-openmoji --out runs/mine [--optim.lr 1e-4 ...].

    Words that the options of the configuration do not have: `--data SPEC` is `--data.images SPEC`, `--classes` and
    `--label-default` are `--data.classes` and `--data.label-default`, and `--objective.rewards NAME=WEIGHT,...`
    replaces the rewards, whatever they are called.
    """
    from consonar.config import TrainConfig, read_config
    from consonar.recipes import RECIPES, find_recipe
    from consonar.training.run import train

    if not args or args[0].startswith("-"):
        if {"-h", "--help"} & set(args):
            print("usage: consonar train RECIPE|FILE.yaml --out DIR [options]\n\nrecipes: " + ", ".join(RECIPES))
            print("\nAll options of one recipe: consonar train RECIPE --help")
            return
        raise UserError(f"train: name a recipe or a YAML file; recipes: {', '.join(RECIPES)}")
    default = read_config(Path(args[0])) if args[0].endswith((".yaml", ".yml", ".json")) else find_recipe(args[0])
    args = [full_name(word) for word in args]
    args, rewards = take_option(args, "--objective.rewards")
    if rewards is not None:
        default = with_rewards(default, rewards)

    @dataclass(frozen=True, kw_only=True)
    class Train:
        out: Path
        """Run folder to make."""
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default
        resume: tyro.conf.FlagCreatePairsOff[bool] = False
        """Go on with the run in --out from its last checkpoint."""
        stop_at: int | None = None
        """Stop early after this step (and resume later)."""
        quiet: tyro.conf.FlagCreatePairsOff[bool] = False
        """Print nothing."""

    chosen = parse(Train, args[1:], "train")
    check_output(chosen.out)
    sys.path.append(str(Path.cwd()))  # a reward of one's own lies in the working directory more often than not
    folder = train(chosen.config, chosen.out, resume=chosen.resume, stop_at=chosen.stop_at, quiet=chosen.quiet)
    say(f"run folder: {folder}")


def with_rewards(config: Any, text: str) -> Any:
    """The configuration with the rewards of `NAME=WEIGHT,...`; `UserError` names the part that is not of this form."""
    from consonar.training.alignment import AlignmentConfig

    if not isinstance(config.objective, AlignmentConfig):
        raise UserError(f"objective.rewards: recipe {config.recipe!r} has no rewards")
    weights = {}
    for part in text.split(","):
        reward, equals, weight = part.strip().rpartition("=")
        if reward in weights:
            raise UserError(f"objective.rewards: {reward!r} is given twice, in {text!r}; keep one")
        try:
            weights[reward] = float(weight)
        except ValueError:
            equals = ""
        if not (equals and reward):
            raise UserError(f"objective.rewards: {part!r} is not NAME=WEIGHT, e.g. mse=1,ssim=0.5,my.module:mine=1")
    return replace(config, objective=replace(config.objective, rewards=weights))


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
        views: Crops kept of each training image: center, center_flip, ten_crop; of other splits the centre is kept.
        batch_size: Crops per call of the encoder.
        device: auto, cpu or cuda.
    """
    from consonar.data.bad_images import BadImages, leave_out
    from consonar.data.image_folder import other_files
    from consonar.data.images import open_source
    from consonar.data.labels import describe, known_labels
    from consonar.data.tokens import write_token_store
    from consonar.data.transforms import check_image_size
    from consonar.distributed import pick_device
    from consonar.lock import is_taken
    from consonar.tokenizers import load_tokenizer

    if image_size is not None:
        check_image_size(image_size, "--image-size")
    check_name(out)
    check_bad_images(bad_images, bad_images_limit)
    bad = BadImages(bad_images, bad_images_limit, out.with_name(f"{out.name}-bad-images.txt"))
    place = pick_device(device, "--device")
    if split not in (None, "train") and views not in ("center_flip", "center"):
        raise UserError(f"--views: {views!r} is read only for the split train; of others the centre is kept")
    model = load_tokenizer(tokenizer).to(place)
    if image_size is not None and image_size != model.image_size:
        model = load_tokenizer(tokenizer, num_tokens=round((image_size**2 * model.num_tokens) / model.image_size**2))
        if model.image_size != image_size:
            raise UserError(f"--image-size: {image_size}, but {model.name} takes {model.image_size}")
        model = model.to(place)
    wanted = {split or "train": out}
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
        if name in ours:
            continue
        kept = kinds[name]
        known = known_labels(source) is not None
        if known:
            say(f"{name}: {describe(source)}")
        with counting(f"tokenize {name}") as count:
            store = write_token_store(wanted[name], source, model, views=kept, batch_size=batch_size, progress=count)
        shape = f"{len(store)} images x {store.num_views} views x {store.num_tokens} tokens"
        say(f"{name}: {shape}: {store.path}" if known else f"{name}: {store.describe()}: {store.path}")
        if note := other_files(source):
            say(f"{name}: not read: {note}")
    if bad.note:
        say(bad.note)
        bad.write()  # of a stream it is known now


def is_store_of(path: Path, source: Any, tokenizer: Any, views: str) -> bool:
    """Whether a finished store at `path` is what tokenising these would make, as its metadata tell."""
    from consonar.data.tokens import METADATA_FILE, TokenStore

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
    from consonar.data.upstream import import_llamagen_npy, import_rar_jsonl
    from consonar.tokenizers import load_tokenizer

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


def sample_command(args: Sequence[str]) -> None:
    """Draw images from a trained generator: consonar sample RUN --out samples.png|samples.npz|FOLDER [options]."""
    from consonar.sampling.sample import SamplerConfig

    def sample(
        generator: tyro.conf.Positional[str],
        *,
        out: Path,
        sampler: Annotated[SamplerConfig, tyro.conf.arg(name="")] = SamplerConfig(),  # noqa: B008
        classes: str | None = None,
        num_samples: int | None = None,
        tokenizer: str | None = None,
        seed: int = 0,
        batch_size: int = 64,
        device: str = "auto",
    ) -> None:
        """Draw images from a trained generator into a .png grid, an .npz, or a folder of PNG files.

        Args:
            generator: Run folder, model folder, or a shipped generator (openmoji).
            out: samples.png (one grid), samples.npz (ADM layout), or a folder.
            sampler: How tokens are drawn.
            classes: Class ids or names, e.g. 0,3,3,7 or "Food & Drink" (default: all classes in turn).
            num_samples: How many images; classes repeat in turn (default: one per class given).
            tokenizer: Name or folder (default: the one it was trained with).
            seed: Seed of the first image; image i has seed + i.
            batch_size: Images drawn together; does not change them.
            device: auto, cpu or cuda.
        """
        from consonar.distributed import pick_device
        from consonar.generators import load_generator, load_own_tokenizer, read_origin
        from consonar.sampling.job import make_job, run_job
        from consonar.tokenizers import load_tokenizer

        check_name(out)
        place = pick_device(device, "--device")
        model = load_generator(generator).to(place)
        own = load_own_tokenizer(generator) if tokenizer is None else None
        codec = (own or load_tokenizer(str(tokenizer), num_tokens=model.num_tokens)).to(place)
        origin = read_origin(generator)
        labels = class_list(classes, num_samples, model.num_classes, origin.class_names or ())
        job = make_job(model, codec, labels, seed=seed, sampler=sampler, source=generator, origin=origin)
        with counting("sample") as count:
            run_job(job, model, codec, out, batch_size=batch_size, progress=lambda done: count(done, len(labels)))
        say(f"{len(labels)} images: {out}")

    parse(sample, args, "sample")


def recipes() -> None:
    """List the recipes."""
    from consonar.recipes import RECIPES

    width = max(map(len, RECIPES))
    for name, function in RECIPES.items():
        say(f"{name:{width}}  {(function.__doc__ or '').splitlines()[0]}")
    say("\nAll options of one: consonar train RECIPE --help")
