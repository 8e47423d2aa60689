"""Labels where they enter: refused when missing or out of range, put into a pinned order, counted in one line."""

from __future__ import annotations

import json
import unicodedata

import pytest
from conftest import picture
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature

from consonar.data.labels import MAX_CLASSES, data_line, describe, read_class_file
from consonar.data.loader import load_images
from consonar.data.sources import open_source
from consonar.data.store_format import METADATA_FILE
from consonar.data.tokenizing import write_token_store
from consonar.data.tokens import TokenStore
from consonar.data.upstream import import_rar_jsonl
from consonar.errors import MissingSplit, UserError


def folder_of(root, *classes, count=2):
    for index, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture(10 * index + number).save(root / name / f"{number}.png")
    return root


def names_file(path, *names):
    path.write_text("\n".join(names) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def half_labelled(tmp_path):
    """A data set of three classes: labels 2, 1, unknown."""
    features = Features(image=ImageFeature(), label=ClassLabel(names=["a", "b", "c"]))
    rows = {"image": [picture(i) for i in range(3)], "label": [2, 1, -1]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "half")
    return f"arrow:{tmp_path / 'half'}"


def test_a_missing_label_of_a_data_set_with_classes_is_refused_when_it_is_tokenised(half_labelled, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"half\[train\]/2: no label, .*--label-default CLASS.*drop"):
        write_token_store(tmp_path / "s", open_source(half_labelled, image_size=16), tokenizer)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("default", "expected"), [("b", [2, 1, 1]), ("0", [2, 1, 0]), ("drop", [2, 1])])
def test_pictures_without_a_label_get_the_default_or_are_dropped(half_labelled, tokenizer, tmp_path, default, expected):
    source = open_source(half_labelled, image_size=16, label_default=default)
    assert write_token_store(tmp_path / "s", source, tokenizer).labels.tolist() == expected
    assert load_images(source, 16, num_classes=3)[1].tolist() == expected
    assert [record.label for record in source] == expected and len(source) == len(expected)


def test_an_unknown_default_class_is_refused_with_the_choices(half_labelled):
    for word in ("dd", "3", "-1", "9" * 5000):
        with pytest.raises(UserError, match=r"--label-default: unknown .*choices: 0\.\.2, a, b, c, drop"):
            open_source(half_labelled, image_size=16, label_default=word)


def test_a_default_class_that_may_be_two_is_refused(tmp_path):
    root = str(folder_of(tmp_path, "0", "1", "10", "11", "2"))
    with pytest.raises(UserError, match=r"2 is the id of class '10' and the name of class 4; .*--classes FILE"):
        open_source(root, image_size=16, label_default="2")
    pinned = names_file(tmp_path.with_suffix(".txt"), "0", "1", "2", "10", "11")
    for word, label in (("2", 2), ("10", 3), ("0", 0)):
        assert open_source(root, image_size=16, classes=pinned, label_default=word).relabel(None) == label


def test_pictures_without_any_label_serve_one_class_and_no_more(tmp_path):
    source = open_source(str(folder_of(tmp_path, ".")), image_size=16)
    assert load_images(source, 16, num_classes=1)[1].tolist() == [0, 0]
    with pytest.raises(UserError, match=r"0\.png: no label, and there are 3 classes"):
        load_images(source, 16, num_classes=3)
    given = open_source(str(tmp_path), image_size=16, label_default="2")
    assert load_images(given, 16, num_classes=3)[1].tolist() == [2, 2]


@pytest.mark.parametrize("label", [3, 7, -2])
def test_a_label_that_no_class_has_is_refused(tmp_path, label):
    features = Features(image=ImageFeature(), label=Value("int64"))
    rows = {"image": [picture(0), picture(1)], "label": [0, label]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "d")
    source = open_source(f"arrow:{tmp_path / 'd'}", image_size=16)
    with pytest.raises(UserError, match=rf"picture 1: label {label}, and there are 3 classes"):
        load_images(source, 16, num_classes=3)


def test_a_file_of_names_pins_the_order_of_the_classes(tmp_path, tokenizer):
    root = folder_of(tmp_path / "data", "10", "2", "1", count=1)
    order = names_file(tmp_path / "names.txt", "1", "2", "3", "10")
    source = open_source(str(root), image_size=16, classes=order)
    assert source.class_names == ("1", "2", "3", "10")
    assert {record.name: record.label for record in source} == {"1/0.png": 0, "10/0.png": 3, "2/0.png": 1}
    store = write_token_store(tmp_path / "s", source, tokenizer)
    assert store.num_classes == 4 and sorted(store.labels.tolist()) == [0, 1, 3]
    assert "no picture of 3" in describe(source) and "no picture of 3" in store.describe()
    with pytest.raises(UserError, match=r"--classes: class of .*: unknown '2'.*choices: 1, 10"):
        open_source(str(root), image_size=16, classes=names_file(tmp_path / "few.txt", "1", "10"))


def test_files_of_names_that_say_nothing_clear_are_refused(tmp_path):
    for text, expected in (
        ("a\nb\na\n", ":3: 'a' comes twice"),
        ("a\n\nb\n", ":2: no name"),
        ("\n", "names 0 classes"),
    ):
        (tmp_path / "names.txt").write_text(text)
        with pytest.raises(UserError, match=expected):
            read_class_file(tmp_path / "names.txt")
    for line in (b"\xff", "cat".encode("utf-16-le")):
        (tmp_path / "names.txt").write_bytes(b"dog\n" + line)
        with pytest.raises(UserError, match=r"^--classes: .*names\.txt line 2: not text in UTF-8"):
            read_class_file(tmp_path / "names.txt")
    with pytest.raises(UserError, match=r"nowhere: cannot be read.*; name a text file of class names.*or imagenet"):
        read_class_file(tmp_path / "nowhere")
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n\r\n")  # as an editor on Windows writes it
    assert read_class_file(tmp_path / "names.txt") == ("cat", "dog")


def test_one_line_says_how_many_pictures_and_classes_there_are(tmp_path, half_labelled):
    assert describe(open_source(half_labelled, image_size=16)) == (
        "3 pictures, 3 classes (a … c), 1 without a label; no picture of a"
    )
    flat = folder_of(tmp_path / "flat", ".")
    assert describe(open_source(str(flat), image_size=16)) == "2 pictures, no classes"
    numbers = folder_of(tmp_path / "numbers", *map(str, range(12)), count=1)
    line = describe(open_source(str(numbers), image_size=16))
    assert line.startswith("12 pictures, 12 classes (0, 1, 10, 11, 2 …: in the order of text; --classes FILE")


def test_one_line_for_openmoji():
    assert describe(open_source("openmoji", image_size=64)) == (
        "3,906 pictures, 10 classes (Smileys & Emotion … Extras), 0 without a label"
    )


def test_a_class_that_only_validation_has_is_said(tmp_path):
    folder_of(tmp_path / "train", "cat"), folder_of(tmp_path / "val", "cat", "eel")
    assert describe(open_source(str(tmp_path), image_size=16)).endswith("0 without a label; no picture of eel")


def test_a_folder_with_test_alone_has_no_train_split(tmp_path):
    folder_of(tmp_path / "test", "cat", "dog")
    with pytest.raises(MissingSplit, match="has no 'train'; choices: test"):
        open_source(str(tmp_path), image_size=16)
    assert open_source(str(tmp_path), split="test", image_size=16).class_names == ("cat", "dog")
    folder_of(tmp_path / "more", "exam", "test")
    assert open_source(str(tmp_path / "more"), image_size=16).class_names == ("exam", "test")


def test_a_name_is_one_class_however_its_accents_are_composed(tmp_path):
    one, two = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    folder_of(tmp_path / "train", one, "bar", count=1), folder_of(tmp_path / "val", two, count=1)
    train, val = (open_source(str(tmp_path), split=split, image_size=16) for split in ("train", "validation"))
    assert train.class_names == val.class_names == ("bar", one)
    assert [record.label for record in val] == [1]


@pytest.mark.parametrize("label", [5_000_000, 10**12, 2**63, 2**70])
def test_a_class_that_no_collection_has_is_refused_with_its_line(tmp_path, tokenizer, label):
    lines = [json.dumps({"class_id": value, "tokens": [0] * 16}) for value in (0, label)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"t\.jsonl:2: class {label}; it must be an integer from 0 to 99999"):
        import_rar_jsonl(tmp_path / "t.jsonl", tmp_path / "s", tokenizer)
    assert not (tmp_path / "s").exists()


def test_a_store_with_more_classes_than_any_collection_is_refused(tmp_path, tokenizer):
    (tmp_path / "t.jsonl").write_text(json.dumps({"class_id": 3, "tokens": [0] * 16}))
    import_rar_jsonl(tmp_path / "t.jsonl", tmp_path / "s", tokenizer)
    metadata = json.loads((tmp_path / "s" / METADATA_FILE).read_text())
    (tmp_path / "s" / METADATA_FILE).write_text(json.dumps(metadata | {"num_classes": 10**12}))
    with pytest.raises(UserError, match=r"store\.json: num_classes: 1000000000000 is not in \[0, 100000\]"):
        TokenStore.open(tmp_path / "s")
    (tmp_path / "s" / METADATA_FILE).write_text(json.dumps(metadata | {"num_classes": 2}))
    with pytest.raises(UserError, match="a label outside its 2 classes"):
        _ = TokenStore.open(tmp_path / "s").labels


@pytest.mark.parametrize("label", [MAX_CLASSES, 10**12, 2**64 - 1])
def test_a_label_beyond_any_number_of_classes_is_refused_before_the_classes_are_listed(label):
    with pytest.raises(UserError, match=f"label {label}, and there are at most"):
        data_line({0: 1, label: 1}, None)


def test_classes_of_imagenet_are_its_folders_in_order(tmp_path):
    names = read_class_file("imagenet")
    assert len(names) == 1000 and list(names) == sorted(set(names))
    # What released models call these classes.
    assert [names.index(name) for name in ("n01440764", "n02099601", "n02123394", "n15075141")] == [0, 207, 283, 999]
    folder_of(tmp_path / "part", "n02123394", "n02099601", count=1)
    source = open_source(str(tmp_path / "part"), image_size=16, classes="imagenet")
    assert [record.label for record in source] == [207, 283] and len(source.class_names or ()) == 1000
