"""What captions claim of scenes: each claim holds where it is so and no other; the detector finds what is there."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from consonar.components import load_tokenizer
from consonar.data.scene_source import Scenes
from consonar.data.scenes import KINDS, read_caption
from consonar.data.transforms import from_uint8
from consonar.errors import UserError
from consonar.evaluation.compositional import SCORE, ceilings, shares
from consonar.metrics.shares import mean_of, wilson
from consonar.model_folders import shipped_or_folder
from consonar.networks.scene_claims import claims, degree, degrees, kind_of
from consonar.networks.scene_detector import Found, Sight, load_scene_detector, look
from consonar.recipes import find_recipe

CAPTION = "two red apples above a small dog on a pale blue ground"
APPLES = [Found("apple", "red", 0.9, x, 0.25, 0.4) for x in (0.25, 0.75)]
DOG = Found("dog", "", 0.8, 0.5, 0.75, 0.27)
SIGHT = Sight((*APPLES, DOG), "pale blue")


def of(caption, *objects, ground="pale blue"):
    return dict(claims(read_caption(caption), Sight(objects, ground)))


def holds(caption, sight):
    return all(held for _, held in claims(read_caption(caption), sight))


def test_all_that_a_true_picture_shows_holds():
    found = list(claims(read_caption(CAPTION), SIGHT))
    assert [name for name, _ in found] == ["object", "count", "colour", "object", "size", "position", "ground"]
    assert all(held for _, held in found)
    assert holds("a dog below two apples", SIGHT) and holds("an apple", SIGHT)


@pytest.mark.parametrize(
    ("objects", "ground", "wrong"),
    [
        ((*APPLES,), "pale blue", {"object", "size", "position"}),
        ((APPLES[0], DOG), "pale blue", {"count"}),
        ((*APPLES, replace(APPLES[0], x=0.5), DOG), "pale blue", {"count"}),
        ((APPLES[0], replace(APPLES[1], colour="pink"), DOG), "pale blue", {"colour"}),
        ((*APPLES, replace(DOG, side=0.45)), "pale blue", {"size"}),
        ((APPLES[0], replace(APPLES[1], y=0.8), DOG), "pale blue", {"position"}),
        ((*APPLES, DOG), "white", {"ground"}),
        ((*APPLES, replace(DOG, confidence=0.2)), "pale blue", {"object", "size", "position"}),
    ],
)
def test_one_thing_wrong_breaks_its_claim_alone(objects, ground, wrong):
    found = list(claims(read_caption(CAPTION), Sight(objects, ground)))
    assert {name for name, held in found if not held} == wrong
    assert degree(read_caption(CAPTION), Sight(objects, ground)) < degree(read_caption(CAPTION), SIGHT) <= 1


def test_kinds_are_read_off_scenes():
    scenes = Scenes("validation", count=400)
    assert all(kind_of(scenes.placed(index)[0]) == KINDS[index % len(KINDS)] for index in range(400))
    assert kind_of(read_caption("a small red dog")) == kind_of(read_caption("two dogs and a cat")) == "mixed"


@pytest.mark.parametrize("size", [64, 96])
def test_the_detector_sees_held_out_scenes_and_tells_wrong_captions(size):
    scenes = Scenes("validation", size, count=64)
    images = from_uint8(torch.from_numpy(np.stack([np.asarray(record.image) for record in scenes])))
    captions = [record.caption for record in scenes]
    detector = load_scene_detector()
    sights = look(detector, images)
    pairs = [holds(caption, sight) for caption, sight in zip(captions, sights, strict=True)]
    assert sum(pairs) >= 58
    assert degrees(captions, sights) == degrees(captions, look(detector, images[:7]) + look(detector, images[7:]))
    others = [holds(caption, sight) for caption, sight in zip(captions[8:], sights, strict=False)]
    assert sum(others) <= 2
    assert look(detector, torch.ones(1, 3, size, size))[0] == Sight((), "white")
    assert look(detector, torch.zeros(1, 3, size, size))[0].ground == ""
    with pytest.raises(UserError, match="pictures of 32 px or more, not of 16"):
        look(detector, images[:, :, :16, :16])


@pytest.mark.parametrize(("name", "least"), [("scenes-64", 18), ("scenes-64-f4", 26)])
def test_the_shipped_tokenizers_keep_what_captions_say(name, least):
    """Of 32 scenes; the model cards have 400."""
    tokenizer, folder = load_tokenizer(name), shipped_or_folder("tokenizer", name)
    assert tokenizer.config == find_recipe(f"tokenizer-{name}").model and tokenizer.name == name
    assert (folder / "model.safetensors").stat().st_size < 8e6
    assert tokenizer.fingerprint in (folder / "README.md").read_text()
    scenes = list(Scenes("validation", count=32))
    images = from_uint8(torch.from_numpy(np.stack([np.asarray(record.image) for record in scenes])))
    sights = look(load_scene_detector(), tokenizer.decode(tokenizer.encode(images)))
    kept = [holds(str(scene.caption), sight) for scene, sight in zip(scenes, sights, strict=True)]
    assert sum(kept) >= least


def test_ceilings_are_of_each_different_prompt():
    found = ceilings(load_scene_detector(), ["a dog", "a red cat", "a dog"], 64, None, 0)
    assert list(found) == ["true pictures"] and found["true pictures"][SCORE].value == 1
    assert set(found["true pictures"]) >= {f"{SCORE} (single)", f"{SCORE} (colour)", "claims (colour)"}


def test_the_score_is_the_mean_over_kinds_with_intervals_over_prompts():
    captions = ["a dog", "a dog", "a cat", "a cat", "a red dog", "a red dog"]
    judged = [[("object", held)] for held in (True, True, True, False)] + [[("object", True), ("colour", False)]] * 2
    found = shares(captions, judged)
    assert found[f"{SCORE} (single)"].value == 0.75 and found[f"{SCORE} (colour)"].value == 0
    assert found[SCORE].value == 0.375 and found["claims (object)"].value == pytest.approx(2.5 / 3)
    assert found[f"{SCORE} (single)"].interval == wilson(0.75, 2) and found[f"{SCORE} (colour)"].interval[1] > 0.5


def test_intervals():
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # Wilson 1927, worked by hand
    assert wilson(0.0, 10) == pytest.approx((0, 0.2775), abs=1e-3) and wilson(1.0, 10)[1] == 1
    mean, (low, high) = mean_of([0.5, 0.5], [(0.4, 0.6)] * 2)
    assert (mean, low, high) == pytest.approx((0.5, 0.5 - 0.1 / 2**0.5, 0.5 + 0.1 / 2**0.5))
