"""Rewards: what an image is worth, as callables (images, originals, batch) -> (B,), higher is better.

VA-pi (arXiv 2512.19680) rewards a decoded image with -(mse + lpips) against the original, both on [-1, 1] and,
as in the released code, not clamped first. The other rewards are ours. `psnr` and `ssim` are defined on a bounded
range: they clamp first, on both sides.

A reward that is an error with a place (`PlacedReward`) also says where, for each cell of the token grid. Maps of any
size are resized by area, which keeps the mean: that of the cells is the reward itself.

Letters: `B` originals, `G` images of each (1 if not said), `H`, `W` pixels, `h`, `w` places of one layer's map.
"""

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from consonar import records
from consonar.distributed import one_ahead_beside
from consonar.errors import UserError, is_out_of_memory, unknown
from consonar.float32 import exact
from consonar.metrics import pixels
from consonar.networks import PERCEPTUAL_DISTANCES
from consonar.networks.discriminator import load_discriminator
from consonar.networks.efficientnet import EfficientNetLite0Features
from consonar.training.caption_rewards import compositional, likeness
from consonar.training.credit import resize_to_grid
from consonar.types import Grid, ImageBatch, Reward

KEY = "objective.rewards"
DOTTED_PATH = "package.module:function"
TIES = "reward_ties_"
"""Begins the name, in the log, of the share of groups whose draws a reward does not tell apart."""


@dataclass(frozen=True)
class PlacedReward:
    """Minus an error that has a place; follows `consonar.types.Reward`."""

    errors: Callable[[Tensor, Tensor], list[Tensor]]
    """(images (B * G, 3, H, W), originals (B, 3, H, W)) -> maps (B * G, h, w), not negative; the error of an image is
    the sum of its maps' means. The G images of one original follow each other."""

    def __call__(self, images: Tensor, originals: Tensor, batch: ImageBatch) -> Tensor:
        return reward_of(self.errors(images, originals))


def reward_of(layers: list[Tensor]) -> Tensor:
    """Minus the sum of the maps' means: (B,) <- maps (B, h, w)."""
    return -torch.stack([layer.mean((1, 2)) for layer in layers]).sum(0)


@dataclass(frozen=True)
class Resources:
    """What rewards are made from: the device of networks, and the files of `AlignmentConfig`."""

    device: torch.device
    dtype: torch.dtype | None = None
    """Of the run's autocast, for networks that bear it."""
    lpips_weights: str | None = None
    discriminator: str | None = None
    clip: str | None = None
    hpsv2: str | None = None


def pixel_errors(size: Callable[[Tensor], Tensor], images: Tensor, originals: Tensor) -> list[Tensor]:
    """One map, the mean over channels of the `size` of differences: (B * G, H, W)."""
    return [size(images.unflatten(0, (len(originals), -1)) - originals[:, None]).mean(2).flatten(0, 1)]


squared_errors, absolute_errors = partial(pixel_errors, torch.square), partial(pixel_errors, torch.abs)


def as_unit_range(images: Tensor) -> Tensor:
    """[-1, 1], clamped there -> [0, 1]."""
    return (images.clamp(-1, 1) + 1) / 2


def psnr(images: Tensor, originals: Tensor, batch: ImageBatch) -> Tensor:
    """Peak signal-to-noise ratio in dB of clamped images, at most `pixels.LARGEST_PSNR`."""
    return pixels.psnr(as_unit_range(images), as_unit_range(originals))


def ssim(images: Tensor, originals: Tensor, batch: ImageBatch) -> Tensor:
    """Structural similarity of clamped images, in [-1, 1]; 11 px or more."""
    # float64: the variances are differences of nearly equal numbers where a picture is flat.
    return pixels.ssim(as_unit_range(images).double(), as_unit_range(originals).double()).float()


def perceptual(name: str, resources: Resources) -> Reward:
    """Minus one of `PERCEPTUAL_DISTANCES`, at the images' own size."""
    distance = PERCEPTUAL_DISTANCES[name].load(resources.lpips_weights).to(resources.device)
    return PlacedReward(partial(distance.maps, dtype=resources.dtype))


def embedding(resources: Resources) -> Reward:
    """Cosine of the pooled EfficientNet-Lite0 features of both images, resized to 224 px as for a Fréchet distance."""
    network = EfficientNetLite0Features(str(resources.device))
    return lambda images, originals, batch: F.cosine_similarity(network(images), network(originals), dim=1)


def patch_discriminator(resources: Resources) -> Reward:
    """Mean realness over patches; the originals do not matter."""
    assert resources.discriminator is not None  # refused where the reward is asked for without one
    discriminator = load_discriminator(resources.discriminator).to(resources.device)
    return lambda images, originals, batch: discriminator(images).mean((1, 2, 3))


REWARDS: dict[str, Callable[[Resources], Reward]] = {
    "mse": lambda _: PlacedReward(squared_errors),
    "l1": lambda _: PlacedReward(absolute_errors),
    "psnr": lambda _: psnr,
    "ssim": lambda _: ssim,
    "lpips": partial(perceptual, "lpips"),
    "efficientnet-lite0": partial(perceptual, "efficientnet-lite0"),
    "embedding": embedding,
    "patch-discriminator": patch_discriminator,
    "compositional": lambda resources: compositional(resources.device),
    "clip": lambda resources: likeness("clip", resources.clip, resources.device),
    "hpsv2": lambda resources: likeness("hpsv2", resources.hpsv2, resources.device),
}
PLACED_REWARDS = ("mse", "l1", "lpips", "efficientnet-lite0")
"""Those that say where in the image they were lost; a user's own does when it is a `PlacedReward`."""
SMALLEST = {"ssim": pixels.SSIM_WINDOW} | {name: kind.smallest_input for name, kind in PERCEPTUAL_DISTANCES.items()}
Decode = Callable[[Tensor], Tensor]
Measured = tuple[Tensor, dict[str, Tensor], Tensor | None]
"""See `Rewards.measure`."""


class Rewards:
    """Named rewards and their weights, measured together: sum_k w_k r_k."""

    def __init__(self, functions: Mapping[str, Reward], weights: Mapping[str, float], *, chunk: int = 32):
        """`chunk` is how many images the networks see at once: memory, not results, depends on it."""
        assert list(functions) == list(weights) and chunk > 0
        self.functions, self.weights, self.chunk = dict(functions), dict(weights), chunk

    @torch.no_grad()
    def measure(
        self, images: Tensor, batch: ImageBatch, *, grid: Grid | None = None, decode: Decode = torch.Tensor.detach
    ) -> Measured:
        """Weighted sum (B * G,), every reward by name (B * G,), and with a `grid` the sum at its cells, all float32.

        `images` (B * G, 3, H, W) in [-1, 1], or what `decode` makes them of, a chunk beside the judging of the one
        before; the G of row b of `batch` one after the other, so that networks see an original once a chunk. With
        a `grid` after `check_places`. Raises `UserError` for a reward that raises or gives no finite number per image.
        """
        group, rest = divmod(len(images), len(batch.images))
        assert not rest, "the same number of images for each row of the batch"
        whole = self.chunk // group * group  # a group larger than a chunk is cut too
        cut = images.split(whole) if whole else [p for g in images.split(group) for p in g.split(self.chunk)]
        parts, done = list[tuple[dict[str, Tensor], Tensor]](), 0
        # In float32 even inside an update in bf16: samples of one image may differ by less than bf16 would leave.
        with exact(images.device):
            for pictures in one_ahead_beside(decode, cut):
                rows = slice(done // group, -(-(done + len(pictures)) // group))
                done += len(pictures)
                parts.append(self._chunk(pictures.float(), records.rows(batch, rows), grid))
                del pictures  # before those after the next are made
        values = {name: torch.cat([part[name] for part, _ in parts]) for name in self.functions}
        total = torch.stack([self.weights[name] * value for name, value in values.items()]).sum(0)
        check_finite(values | {"weighted sum": total})
        return total, values, None if grid is None else torch.cat([maps for _, maps in parts])

    def sizes(self, values: Mapping[str, Tensor]) -> Tensor:
        """Sum of the magnitudes that the weighted sum of rewards `values` (n,) is made of: what its rounding is of."""
        return torch.stack([self.weights[name] * value.abs() for name, value in values.items()]).sum(0)

    def _chunk(self, images: Tensor, batch: ImageBatch, grid: Grid | None) -> tuple[dict[str, Tensor], Tensor]:
        """Every reward of some images; their sum at the cells (empty: no grid)."""
        self.check_size(min(images.shape[-2:]))
        originals = batch.images.float()
        chosen = torch.arange(len(originals), device=originals.device).repeat_interleave(len(images) // len(originals))
        values, cells = {}, []
        for name, function in self.functions.items():
            seen = images.clone()  # a reward may change what it is given, and those after it must not see that
            with told_in_one_line(f"reward {name!r}"):
                if isinstance(function, PlacedReward):
                    found = checked_maps(name, function.errors(seen, originals.clone()), len(images))
                    layers = [records.to_device(layer, images.device) for layer in found]
                    returned: object = reward_of(layers)
                    if grid is not None and self.weights[name] > 0:
                        cells += [-self.weights[name] * resize_to_grid(layer, grid) for layer in layers]
                else:
                    returned = function(seen, originals[chosen], records.rows(batch, chosen))
            values[name] = records.to_device(checked(name, returned, len(images)), images.device)
        return values, torch.stack(cells).sum(0) if cells else images.new_empty(0)

    def check_size(self, side: int) -> None:
        """Raises `UserError` when a reward cannot read images of `side` pixels."""
        for name in self.functions:
            if side < (smallest := SMALLEST.get(name, 0)):
                raise UserError(f"{KEY}: {name!r} reads images of {smallest} px or more, not of {side}")

    def check_places(self) -> None:
        """Raises `UserError` when a reward with a weight over 0 has no place in the image."""
        counted = [name for name, weight in self.weights.items() if weight > 0]
        if without := [name for name in counted if not isinstance(self.functions[name], PlacedReward)]:
            raise UserError(
                f"{KEY}: {', '.join(map(repr, without))} has no place in the image, as a reward for each token needs; "
                f"choices: {', '.join(PLACED_REWARDS)}, or a PlacedReward of your own"
            )


@contextlib.contextmanager
def told_in_one_line(what: str) -> Iterator[None]:
    """Turns whatever the code inside raises, which is not ours, into a `UserError` that says of `what`."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a script that ends itself would end the run without a word
        if is_out_of_memory(error):  # not the reward's fault, and told where it is known what to change
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{what}: raised {type(error).__name__}{f': {reason}' if reason else ''}") from error


def import_reward(path: str) -> Reward:
    """A user's own reward, from `package.module:function`. Raises `UserError` when there is no such thing to call."""
    module_name, _, attribute = path.partition(":")
    if not (module_name and attribute):
        raise UserError(f"{KEY}: {path!r} is not of the form {DOTTED_PATH}")
    with told_in_one_line(f"{KEY}: {path!r}"):
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise UserError(f"{KEY}: {path!r}: {error}; is its folder installed, or named in PYTHONPATH?") from error
    if attribute not in vars(module):
        functions = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise unknown(f"{KEY}: module {module_name}", attribute, functions)
    reward = vars(module)[attribute]
    if not callable(reward):
        raise UserError(f"{KEY}: {path!r} is of type {type(reward).__name__}, no function (images, originals, batch)")
    return reward


def checked(name: str, value: object, count: int, *, of_places: bool = False) -> Tensor:
    """`value` as float32 (count,), or with `of_places` a map (count, h, w); `UserError` says what was returned."""
    what, expected = ("an error map of ", f"({count}, h, w)") if of_places else ("", f"({count},), one per image")
    if not isinstance(value, Tensor):
        raise UserError(f"reward {name!r}: returned {type(value).__name__}, expected a tensor of shape {expected}")
    if value.ndim != (3 if of_places else 1) or len(value) != count or not value.numel():
        raise UserError(f"reward {name!r}: returned {what}shape {tuple(value.shape)}, expected {expected}")
    if value.is_complex() or value.layout != torch.strided or value.device.type == "meta":
        raise UserError(
            f"reward {name!r}: returned a tensor of {value.dtype}, {value.layout}, on {value.device}; expected real "
            "numbers in a dense tensor that holds them"
        )
    return value.detach().float()


def checked_maps(name: str, maps: object, count: int) -> list[Tensor]:
    """The maps of a reward with a place as float32 (count, h, w); `UserError` names the reward and what it returned."""
    if not isinstance(maps, list | tuple) or not maps or not all(isinstance(layer, Tensor) for layer in maps):
        raise UserError(f"reward {name!r}: returned {type(maps).__name__}, expected a list of one or more error maps")
    return [checked(name, layer, count, of_places=True) for layer in maps]


def check_finite(values: Mapping[str, Tensor]) -> None:
    """Raises `UserError` for the first reward of `values` (n,) that is no number: one wait for the device."""
    finite = torch.stack([value.isfinite() for value in values.values()])  # (rewards, n)
    if not finite.all():
        row, image = (~finite).nonzero()[0].tolist()
        name = list(values)[row]
        raise UserError(f"reward {name!r}: returned {float(values[name][image])} for image {image} of the batch")


def check_rewards(weights: Mapping[str, float], networks: Mapping[str, str | None]) -> None:
    """Raises `UserError` unless the names are known or dotted paths and the weights can be used. Loads nothing."""
    for name, weight in weights.items():
        if name not in REWARDS and ":" not in name:
            raise unknown(KEY, name, [*REWARDS, DOTTED_PATH])
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"{KEY}.{name}: {weight} is not 0 or more; every reward is better when higher, losses too")
    if not any(weights.values()):
        raise UserError(f"{KEY}: no weight is over 0; choices: {', '.join([*REWARDS, DOTTED_PATH])}")
    for name in ("clip", "hpsv2"):
        if name in weights and networks[name] is None:
            raise UserError(f"{KEY}: {name!r} needs --objective.{name}, a CLIP as transformers saves it, or OWNER/NAME")
    if "patch-discriminator" in weights and networks["discriminator"] is None:
        raise UserError(
            f"{KEY}: 'patch-discriminator' needs the folder of a discriminator; one comes from training a tokenizer "
            "with objective.discriminator_weight over 0"
        )


def build_rewards(weights: Mapping[str, float], resources: Resources, *, chunk: int = 32) -> Rewards:
    """Rewards by name, from `REWARDS` or a user's own by dotted path; a weight of 0 is measured and does not count.

    `weights` are as `check_rewards` wants them. Raises `UserError` for files or functions that are missing.
    """
    functions = {name: REWARDS[name](resources) if name in REWARDS else import_reward(name) for name in weights}
    return Rewards(functions, weights, chunk=chunk)
