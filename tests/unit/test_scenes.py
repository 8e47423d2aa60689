"""Scenes of emoji: a picture shows what its caption says; what validation asks, no training picture showed."""

import shutil
import zlib
from itertools import combinations, islice
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
import torch

from consonar.cli import main
from consonar.data import kept_pictures
from consonar.data.loader import image_batches
from consonar.data.scene_source import Scenes
from consonar.data.scenes import COLOURS, GROUNDS, KINDS, OBJECTS, is_held_out, pairings, read_caption, sprite
from consonar.data.sources import open_source
from consonar.data.tokens import TokenStore
from consonar.data.transforms import to_uint8
from consonar.errors import UserError

SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


def middle(placed):
    return np.array([placed.left + placed.side / 2, placed.top + placed.side / 2])


@pytest.mark.parametrize("size", [32, 64, 96])
def test_emoji_stand_where_the_caption_says_and_do_not_overlap(size):
    scenes = Scenes("train", size, count=400)
    for index in range(len(scenes)):
        scene, ground, placed = scenes.placed(index)
        assert len(placed) == sum(group.count for group in scene.groups)
        assert scene.ground in ("", ground)
        for group in scene.groups:
            assert sum((one.object, one.colour) == (group.object, group.colour) for one in placed) == group.count
        for a in placed:
            assert min(a.left, a.top) >= 0 and max(a.left, a.top) + a.side <= size
        for a, b in combinations(placed, 2):
            touches = abs(a.left - b.left) < (a.side if a.left < b.left else b.side)
            touches_down = abs(a.top - b.top) < (a.side if a.top < b.top else b.side)
            assert not (touches and touches_down), (scene, a, b)
        if scene.relation:
            axis, sign = SIDES[scene.relation]
            first, second = ([p for p in placed if p.object == group.object] for group in scene.groups)
            for a in first:
                for b in second:
                    assert sign * (middle(a) - middle(b))[axis] > 0, scene
        sizes = {group.size: p.side for group in scene.groups for p in placed if p.object == group.object}
        assert "large" not in sizes or sizes["large"] > 1.5 * sizes["small"]


def test_validation_asks_for_what_no_training_picture_shows():
    train, validation = Scenes("train", count=3000), Scenes("validation", count=800)
    seen = {pairing for index in range(len(train)) for pairing in pairings(train.placed(index)[0])}
    assert len(seen) > 1500 and not any(map(is_held_out, seen))
    for index in range(len(validation)):
        asked = pairings(validation.placed(index)[0])
        assert bool(asked) == (KINDS[index % len(KINDS)] != "single")
        assert not asked or not set(asked) <= seen


def test_a_picture_depends_on_its_split_seed_and_number_alone():
    few, many = Scenes("train", count=5), Scenes("train", count=50)
    records = list(few)
    assert [np.asarray(one.image).tolist() for one in records] == [
        np.asarray(one.image).tolist() for one in islice(many, 5)
    ]
    others = [Scenes("train", count=5, seed=1), Scenes("validation", count=5), many]
    assert len({few.content_hash, *(one.content_hash for one in others)}) == 4
    assert [one.caption for one in others[0]] != [one.caption for one in records]
    assert [KINDS[one.label] for one in islice(many, 8)] == list(KINDS)


class Cache:
    """A cache folder of its own, with blocks of four pictures; how often one was drawn."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.drawn, draw = folder, [], Scenes.draw
        monkeypatch.setenv("CONSONAR_CACHE", str(folder))
        monkeypatch.setattr(kept_pictures, "BLOCK", 4)
        monkeypatch.setattr(Scenes, "draw", lambda scenes, index: (self.drawn.append(index), draw(scenes, index))[1])

    def count(self):
        """Of pictures drawn since the last count."""
        count = len(self.drawn)
        self.drawn.clear()
        return count

    def files(self):
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    return Cache(tmp_path / "cache", monkeypatch)


def shown(records):
    return [(one.image.tobytes(), one.image.mode, one.image.size, one.caption, one.name) for one in records]


def test_kept_pictures_are_those_that_were_drawn(cache):
    scenes = Scenes("train", 32, count=10)
    truth = [
        (picture.tobytes(), "RGB", (32, 32), caption, f"train-{index:07d}")
        for index, (picture, caption) in enumerate(map(scenes.draw, range(10)))
    ]
    cache.count()
    assert shown(scenes) == truth and sorted(cache.drawn) == list(range(12)) and len(cache.files()) == 3
    cache.count()
    assert shown(Scenes("train", 32, count=10)) == truth
    assert shown(map(Scenes("train", 32, count=100).read, range(10))) == truth and cache.count() == 0
    for other in (Scenes("validation", 32), Scenes("train", 64), Scenes("train", 32, seed=1)):
        assert shown([other.read(0)]) != truth[:1] and cache.count() == 4


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[: len(content) // 2], lambda content: b"x" * len(content),
    lambda content: content.replace(zlib.compress(b"\xff" * 64, 1)[:2], b"\0\0", 1),
])  # fmt: skip
def test_a_damaged_file_of_pictures_is_made_again(cache, damage):
    truth = shown(Scenes("train", 32, count=4))
    (file,) = cache.files()
    file.write_bytes(damage(content := file.read_bytes()))
    assert file.read_bytes() != content
    cache.count()
    assert shown(Scenes("train", 32, count=4)) == truth and cache.count() == 4
    assert file.read_bytes() == content and cache.files() == [file]


def test_two_that_want_the_same_pictures_draw_them_once(cache):
    """As processes do: each has files of its own open."""
    several = [Scenes("train", 32, count=40) for _ in range(3)]
    with ThreadPool(6) as pool:
        found = pool.map(lambda number: shown(several[number % 3]), range(6))
    assert found == [shown(Scenes("train", 32, count=40))] * 6 and cache.count() == 40


def test_pictures_that_cannot_be_kept_are_drawn_all_the_same(cache, capsys):
    truth = shown(Scenes("train", 32, count=12))
    shutil.rmtree(cache.folder)
    cache.folder.write_text("")
    assert shown(Scenes("train", 32, count=12)) == truth
    assert capsys.readouterr().err.count("not kept in the cache folder") == 1


def test_training_holds_no_pictures_of_scenes(cache):
    """Of as many as would fit into memory either: those of the first batches are all that is drawn."""
    scenes = Scenes("train", 32, count=50_000)
    batches = image_batches(scenes, 32, batch_size=3, seed=0)
    rows = torch.cat([batches.rows(step) for step in range(2)]).tolist()
    images = torch.cat([batches.batch(step).images for step in range(2)])
    assert cache.count() <= 4 * len(rows)
    truth = torch.from_numpy(np.stack([np.asarray(scenes.draw(row)[0]) for row in rows]))
    assert torch.equal(to_uint8(images), truth)


def test_captions_are_read_back():
    scenes = Scenes("validation", count=800)
    for index in range(len(scenes)):
        scene = scenes.placed(index)[0]
        assert read_caption(str(scene)) == scene
    assert read_caption("  An apple to the left of\tTWO blue Hats. ") == read_caption("an apple left of two blue hats")
    assert {group.object for group in read_caption("three mice above a small cactus").groups} == {"mouse", "cactus"}


@pytest.mark.parametrize(
    "text",
    ["", "a", "dog", "five dogs", "a blue", "a blue small dog", "a unicorn", "a dog beside a cat", "a dog and",
     "two dogs and three cats", "a dog and a dog", "a dog and a cat and a fox", "a dog on a red ground", "a dog\0"],
)  # fmt: skip
def test_other_captions_are_refused_with_what_would_do(text):
    with pytest.raises(UserError, match=r"^scenes: "):
        read_caption(text)


@pytest.mark.parametrize("colour", COLOURS)
def test_painted_emoji_have_the_colour_and_keep_their_outlines(colour):
    for name in OBJECTS:
        own, painted = (np.asarray(sprite(name, one, 40)).astype(float) for one in ("", colour))
        assert np.array_equal(own[..., 3], painted[..., 3])
        solid = own[..., 3] == 255
        dark = solid & (own[..., :3].max(-1) < 20)
        assert painted[dark][:, :3].max(initial=0) < 25
        bright = painted[solid & (own[..., :3].max(-1) > 150)][:, :3]
        away = {other: np.abs(bright / bright.max(-1, keepdims=True) - np.array(rgb) / max(rgb)).mean()
                for other, rgb in COLOURS.items()}  # fmt: skip
        assert not len(bright) or min(away, key=away.get) == colour, (name, away)


def test_the_ground_is_what_no_emoji_covers():
    scenes = Scenes("train", count=40)
    for index in range(len(scenes)):
        _, ground, placed = scenes.placed(index)
        picture, free = np.asarray(scenes.read(index).image), np.ones((64, 64), bool)
        for one in placed:
            free[one.top : one.top + one.side, one.left : one.left + one.side] = False
        assert (picture[free] == GROUNDS[ground]).all()


def test_the_source_by_name(tmp_path):
    assert len(open_source("scenes", image_size=64)) == 20_000
    for count, held_out in ((7, 7), (100_000, 2_000)):
        assert len(open_source(f"scenes:{count}", image_size=64)) == count
        assert len(open_source(f"scenes:{count}", image_size=64, split="validation")) == held_out
    for split, count in (("train", 9000), ("validation", 2000)):
        other = open_source("scenes:9000?seed=3", image_size=64, split=split)
        assert other.draw(5)[1] == Scenes(split, seed=3).draw(5)[1] != Scenes(split).draw(5)[1]
        assert len(other) == count
    for bad in (
        "scenes:0", "scenes:-1", "scenes:1e3", "scenes:99999999999", "scenes:²", "scenes:?seed=1", "scenes:9?seed=",
        "scenes:9?seed=-1", "scenes:9?seeds=1",
    ):  # fmt: skip
        with pytest.raises(UserError, match="is not a number of scenes"):
            open_source(bad, image_size=64)
    main(["tokenize", "--tokenizer", "openmoji-64", "--data", "scenes:9", "--split", "train", "--out",
          str(tmp_path / "scenes"), "--views", "center"])  # fmt: skip
    store = TokenStore.open(tmp_path / "scenes")
    captions = store.table.column("caption").to_pylist()
    assert captions == [one.caption for one in Scenes("train", count=9)]
    assert store.class_names == KINDS and store.metadata.counts.captioned == 9
