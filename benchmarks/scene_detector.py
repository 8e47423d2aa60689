"""The detector of `evaluate --prompts`: trains it, and measures it on scenes that it has not seen.

    python benchmarks/scene_detector.py train --pictures 150016    writes networks/pretrained/scene-detector
    python benchmarks/scene_detector.py measure                    writes benchmarks/results/scene_detector.json

Half of the pictures are scenes as `data.scenes` draws them, of any pairing; half are zero to five emoji of any object,
colour and size anywhere, some of them spliced of two objects, which are none. All are softened, as generators' pictures
are: blurred, noisy, paler, tinted. It never sees what a tokenizer made, so that it favours none.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from common import write_result
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from consonar.components import load_tokenizer
from consonar.data import scenes
from consonar.data.scene_source import Scenes
from consonar.data.transforms import from_uint8
from consonar.files.weights import save_component
from consonar.networks.scene_claims import CONFIDENCE, claims, kind_of
from consonar.networks.scene_detector import (
    COLOUR_NAMES,
    FOLDER,
    OBJECT_NAMES,
    SIDE,
    STRIDE,
    SceneDetector,
    Sight,
    detector_sha256,
    load_scene_detector,
    look,
)  # fmt: skip
from consonar.tokenizers.base import CodebookTokenizer

OF_EACH = 4
CELLS = SIDE // STRIDE
rendered = lru_cache(maxsize=None)(scenes.sprite.__wrapped__)


def free_placement(rng: random.Random) -> list[scenes.Placed]:
    """Zero to five emoji that do not overlap, whatever they are."""
    placed: list[scenes.Placed] = []
    wanted, tries = rng.choice((0, 1, 1, 2, 2, 3, 3, 4, 4, 5)), 0
    while len(placed) < wanted and tries < 60:
        tries += 1
        side = rng.randint(13, 44 if wanted == 1 else 32 if wanted == 2 else 26)
        left, top = rng.randint(-1, SIDE + 1 - side), rng.randint(-1, SIDE + 1 - side)
        apart = all(
            left + side <= one.left + 2 or one.left + one.side <= left + 2
            or top + side <= one.top + 2 or one.top + one.side <= top + 2
            for one in placed
        )  # fmt: skip
        if apart:
            colour = rng.choice(COLOUR_NAMES) if rng.random() < 0.6 else ""
            placed.append(scenes.Placed(rng.choice(OBJECT_NAMES), colour, left, top, side))
    return placed


def picture(rng: random.Random) -> tuple[np.ndarray, list[scenes.Placed]]:
    """uint8 (SIDE, SIDE, 3), and the emoji on it."""
    if rng.random() < 0.5:
        placed = scenes.place(scenes.draw_scene(rng.choice(scenes.KINDS), rng), SIDE, rng)
    else:
        placed = free_placement(rng)
    ground = scenes.GROUNDS[rng.choice(list(scenes.GROUNDS))] if rng.random() < 0.5 else (255, 255, 255)
    if rng.random() < 0.1:
        ground = tuple(rng.randint(190, 255) for _ in range(3))
    canvas, kept = Image.new("RGB", (SIDE, SIDE), ground), []
    for one in placed:
        emoji = rendered(one.object, one.colour, one.side)
        if rng.random() < 0.06:
            emoji, half = emoji.copy(), one.side // 2
            box = rng.choice([(0, 0, half, one.side), (0, half, one.side, one.side)])
            emoji.paste(rendered(rng.choice(OBJECT_NAMES), rng.choice(COLOUR_NAMES), one.side).crop(box), box)
        else:
            kept.append(one)
        canvas.paste(emoji, (one.left, one.top), emoji)
    return np.asarray(canvas), kept


def target_of(placed: list[scenes.Placed]) -> np.ndarray:
    """(7, CELLS, CELLS): heat of the centre, side, down, right, object, colour, weight."""
    target = np.zeros((7, CELLS, CELLS), np.float32)
    rows, columns = np.mgrid[:CELLS, :CELLS] + 0.5
    for one in placed:
        x, y = ((low + one.side / 2) / STRIDE for low in (one.left, one.top))
        row, column = min(int(y), CELLS - 1), min(int(x), CELLS - 1)
        heat = np.exp(-((rows - row - 0.5) ** 2 + (columns - column - 0.5) ** 2) / 0.9)
        near = (heat > 0.3) & (heat > target[6])
        values = [np.full_like(rows, one.side / SIDE), y - rows, x - columns]
        values += [
            np.full_like(rows, OBJECT_NAMES.index(one.object)),
            np.full_like(rows, COLOUR_NAMES.index(one.colour)),
        ]
        for channel, value in enumerate(values, 1):
            target[channel][near] = value[near]
        target[6][near] = heat[near]
        target[0] = np.maximum(target[0], heat)
    return target


def soften(images: Tensor, rng: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] as a generator might draw them."""
    out = []
    for part in images.split(8):
        factor, noise, strength = (float(torch.rand((), generator=rng)) for _ in range(3))
        if factor < 0.6:
            small = round(SIDE * (0.45 + 0.9 * factor))
            part = functional.interpolate(part, size=(small, small), mode="bilinear", antialias=True)
            part = functional.interpolate(part, size=(SIDE, SIDE), mode="bicubic")
        count = (len(part), 1, 1, 1)
        grey = part.mean(1, keepdim=True)
        part = grey + (part - grey) * (1 - 0.5 * strength * torch.rand(count, generator=rng))
        part = part * (1 + 0.2 * (torch.rand(count, generator=rng) - 0.5))
        part = part + 0.08 * (torch.rand((len(part), 3, 1, 1), generator=rng) - 0.5)
        part = part + (0.08 * noise if noise > 0.4 else 0) * torch.randn(part.shape, generator=rng)
        out.append(part.clamp(0, 1))
    return torch.cat(out)


def batches(count: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    for index in range(count):
        rng, noise = random.Random(f"{seed}/{index}"), torch.Generator().manual_seed(seed * 10**6 + index)
        drawn = [picture(rng) for _ in range(size)]
        images = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2).float() / 255
        yield 2 * soften(images, noise) - 1, torch.from_numpy(np.stack([target_of(placed) for _, placed in drawn]))


def loss_of(maps: Tensor, target: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The focal loss of centres (Zhou et al. 2019, eq. 1), and cross-entropies and distances at and beside them."""
    heat, chance = target[:, 0], maps[:, 0].sigmoid().clamp(1e-4, 1 - 1e-4)
    count = (heat == 1).sum().clamp(min=1)
    positive = -((1 - chance) ** 2 * chance.log())[heat == 1].sum()
    negative = -(((1 - heat) ** 4) * chance**2 * (1 - chance).log())[heat < 1].sum()
    near, weight = target[:, 6] > 0, target[:, 6][target[:, 6] > 0]
    cells, wanted = maps.permute(0, 2, 3, 1)[near], target.permute(0, 2, 3, 1)[near]
    total = weight.sum().clamp(min=1)
    place = ((cells[:, 1:4] - wanted[:, 1:4]).abs() * torch.tensor([8.0, 1, 1])).sum(1)
    split = 4 + len(OBJECT_NAMES)
    kinds = functional.cross_entropy(cells[:, 4:split], wanted[:, 4].long(), reduction="none")
    colours = functional.cross_entropy(cells[:, split:], wanted[:, 5].long(), reduction="none")
    terms = {"centre": (positive + negative) / count}
    terms |= {name: (weight * value).sum() / total for name, value in
              {"place": 0.5 * place, "object": kinds, "colour": 0.5 * colours}.items()}  # fmt: skip
    return torch.stack(list(terms.values())).sum(), {name: float(term.detach()) for name, term in terms.items()}


def with_norms(network: nn.Module) -> nn.Module:
    """Batch norms after all convolutions of 3 x 3; `without_norms` folds them in."""
    for owner in list(network.modules()):
        for name, layer in list(owner.named_children()):
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                setattr(owner, name, nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels)))
    return network


def without_norms(network: nn.Module) -> nn.Module:
    for owner in list(network.modules()):
        for name, layer in list(owner.named_children()):
            if isinstance(layer, nn.Sequential) and isinstance(layer[1], nn.BatchNorm2d):
                setattr(owner, name, fuse_conv_bn_eval(layer[0], layer[1]))
    return network


def train(pictures: int, batch_size: int, seed: int, folder: Path) -> None:
    torch.manual_seed(seed)
    network = with_norms(SceneDetector()).requires_grad_(True)
    for layer in network.modules():  # `SceneDetector` stays in evaluation mode
        layer.training = True
    nn.init.constant_(network.heads.bias[:1], -4.0)
    network.to(memory_format=torch.channels_last)
    steps = pictures // batch_size
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    start = time.monotonic()
    for step, (images, target) in enumerate(batches(steps, batch_size, seed)):
        with torch.autocast("cpu", torch.bfloat16):
            maps = network(images.to(memory_format=torch.channels_last))
        loss, terms = loss_of(maps.float(), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        rate.step()
        if step % 50 == 0:
            print(
                step,
                f"{time.monotonic() - start:.0f} s",
                {key: round(value, 3) for key, value in terms.items()},
                flush=True,
            )
    state = {key: value.half().contiguous() for key, value in without_norms(network.eval()).state_dict().items()}
    config = {"component": "scene-detector", "objects": list(OBJECT_NAMES), "colours": list(COLOUR_NAMES)}
    save_component(folder, config, state)


def changed(scene: scenes.Scene, rng: random.Random) -> dict[str, scenes.Scene]:
    """The scene with another object, number, colour, size, relation or ground in its first group, by which it is."""
    first, rest = scene.groups[0], scene.groups[1:]
    others = [name for name in OBJECT_NAMES if name not in {group.object for group in scene.groups}]
    found = {"object": replace(first, object=rng.choice(others))}
    if first.count > 1:
        found["count"] = replace(first, count=rng.choice([n for n in (2, 3, 4) if n != first.count]))
    if first.colour:
        found["colour"] = replace(first, colour=rng.choice([one for one in scenes.COLOURS if one != first.colour]))
    if first.size:
        found["size"] = replace(first, size="small" if first.size == "large" else "large")
    whole = {name: replace(scene, groups=(group, *rest)) for name, group in found.items()}
    if scene.relation:
        turned = dict(zip(scenes.RELATIONS, ("right of", "left of", "below", "above"), strict=True))
        whole["position"] = replace(scene, relation=turned[scene.relation])
    if scene.ground:
        whole["ground"] = replace(scene, ground=rng.choice([one for one in scenes.GROUNDS if one != scene.ground]))
    return whole


def accuracy(sights: list[Sight], truths: list[scenes.Scene], confidence: float = CONFIDENCE) -> dict[str, float]:
    """Per cent of pictures that are found to be what they are, by kind, and of captions with one thing changed, by
    what is changed, that are found to be wrong."""
    right, wrong, rng = defaultdict(list), defaultdict(list), random.Random(0)
    for sight, scene in zip(sights, truths, strict=True):
        held = all(one for _, one in claims(scene, sight, confidence))
        right["all"].append(held)
        right[kind_of(scene)].append(held)
        for name, other in changed(scene, rng).items():
            wrong[name].append(not all(one for _, one in claims(other, sight, confidence)))
    table = {f"accepts {name}": found for name, found in right.items()}
    table |= {f"refuses another {name}": found for name, found in wrong.items()}
    return {name: round(100 * sum(found) / len(found), 1) for name, found in table.items()}


def drawn(source: Scenes) -> tuple[Tensor, list[scenes.Scene]]:
    images = np.stack([np.asarray(source.read(index).image) for index in range(len(source))])
    return from_uint8(torch.from_numpy(images)), [source.placed(index)[0] for index in range(len(source))]


def softened(images: Tensor) -> Tensor:
    return 2 * soften((images + 1) / 2, torch.Generator().manual_seed(0)) - 1


def reconstructed(tokenizer: CodebookTokenizer, images: Tensor) -> Tensor:
    return torch.cat([tokenizer.decode(tokenizer.encode(some)) for some in images.split(64)])


def small_emoji(name: str) -> Tensor:
    """Pictures of an object at the smallest size in scenes, 17 of 64 px, beside another one: `OF_EACH` in its own
    colours and in each other."""
    rng, images, others = random.Random(name), [], [one for one in OBJECT_NAMES if one != name]
    for colour in [one for one in COLOUR_NAMES for _ in range(OF_EACH)]:
        other, ground = scenes.Group(rng.choice(others)), rng.choice(list(scenes.GROUNDS))
        scene = scenes.Scene((scenes.Group(name, colour=colour, size="small"), other))
        images.append(np.asarray(scenes.picture_of(ground, scenes.place(scene, SIDE, rng), SIDE)))
    return from_uint8(torch.from_numpy(np.stack(images)))


def by_object(detector: SceneDetector, changed: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Per cent of small emoji that are found to be what they are in pictures that are `changed`, the worst first."""
    shares = {}
    for name in OBJECT_NAMES:
        alone = scenes.Scene((scenes.Group(name),))
        sights = look(detector, changed(small_emoji(name)))
        right = [all(held for _, held in claims(alone, sight)) for sight in sights]
        shares[name] = round(100 * sum(right) / len(right), 1)
    return dict(sorted(shares.items(), key=lambda one: one[1]))


def of_noise(detector: SceneDetector, tokenizer: CodebookTokenizer, truths: list[scenes.Scene]) -> dict[str, float]:
    """Pictures of random tokens, one for each of these scenes: per cent that are found to be it, objects in each."""
    shape = len(truths), tokenizer.num_tokens
    tokens = torch.randint(tokenizer.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    sights = [sight for some in tokens.split(64) for sight in look(detector, tokenizer.decode(some))]
    objects = sum(one.confidence >= CONFIDENCE for sight in sights for one in sight.objects)
    accepted = accuracy(sights, truths)["accepts all"]
    return {"accepts all": accepted, "objects found in each": round(objects / len(sights), 2)}


@torch.inference_mode()
def measure(count: int) -> None:
    """Accuracy on held-out scenes at three sizes, softened ones, and those that came through a tokenizer; by object; on
    pictures of random tokens."""
    detector, images = load_scene_detector(), {}
    for size in (64, 96, 128):
        images[f"{size} px"], truths = drawn(Scenes("validation", size, count=count))
    plain = images["64 px"]
    images["64 px, softened"] = softened(plain)
    tokenizers = {name: load_tokenizer(name) for name in ("scenes-64-f4", "scenes-64", "openmoji-64-f4", "openmoji-64")}
    ways = {f"through {name}": partial(reconstructed, codec) for name, codec in tokenizers.items()}
    images |= {f"64 px, {way}": change(plain) for way, change in ways.items()}
    figures = {name: accuracy(look(detector, of), truths) for name, of in images.items()}
    figures |= {f"random tokens of {name}": of_noise(detector, codec, truths) for name, codec in tokenizers.items()}
    small = {"as drawn": lambda images: images, **dict(islice(ways.items(), 2))}
    figures |= {f"emoji of 17 px, {way}": by_object(detector, change) for way, change in small.items()}
    fresh, others = drawn(Scenes("train", 64, count=count, seed=1))
    sights = look(detector, fresh)
    figures["bounds of confidence, on scenes for training"] = {
        f"{bound:g}": accuracy(sights, others, bound)["accepts all"] for bound in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
    }
    write_result("scene_detector", {"count": count, "detector_sha256": detector_sha256()}, 0, figures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", default="measure", choices=("train", "measure"))
    parser.add_argument("--pictures", type=int, default=150_016)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--count", type=int, default=400, help="scenes to measure")
    given = parser.parse_args()
    if given.what == "train":
        train(given.pictures, given.batch_size, given.seed, given.out)
    else:
        measure(given.count)
