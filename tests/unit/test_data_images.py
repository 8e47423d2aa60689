"""Sources: layouts of folders, columns of Hugging Face data sets, and what is refused with which words."""

import io
import tarfile

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

import consonar.types
from consonar.data.picture_files import IMAGE_ENDINGS, read_image
from consonar.data.sources import open_source
from consonar.errors import UserError
from consonar.types import IndexedSource


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, format)
    return stream.getvalue()


def red(level: int, size=(5, 4)) -> Image.Image:
    return Image.new("RGB", size, (level, 0, 0))


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def levels(source) -> list[int]:
    return [record.image.getpixel((0, 0))[0] for record in source]


def test_folder_of_classes_is_sorted_and_may_be_nested(tmp_path):
    save(tmp_path / "cat/deep/er/a.BMP", red(1))
    save(tmp_path / "cat/z.png", red(2))
    save(tmp_path / "cat/.hidden.png", red(9))
    (tmp_path / "cat/notes.txt").write_text("not an image, not looked at")
    save(tmp_path / ".elsewhere/b.png", red(3))
    (tmp_path / "dog").symlink_to(tmp_path / ".elsewhere", target_is_directory=True)
    for spec in (str(tmp_path), f"imagefolder:{tmp_path}"):
        source = open_source(spec, image_size=8)
        assert isinstance(source, consonar.types.ImageSource) and isinstance(source, IndexedSource)
        assert source.class_names == ("cat", "dog")
        records = list(source)
        assert [(r.name, r.label) for r in records] == [("cat/deep/er/a.BMP", 0), ("cat/z.png", 0), ("dog/b.png", 1)]
        assert levels(source) == [1, 2, 3] and len(source) == 3 and source.labels == (0, 0, 1)
        assert records[0].image.size == (5, 4), "images of folders keep their size"


def test_flat_folder_has_no_labels(tmp_path):
    save(tmp_path / "b.png", red(2))
    save(tmp_path / "a.png", red(1))
    source = open_source(str(tmp_path), image_size=8)
    assert source.class_names is None and [r.label for r in source] == [None, None] and levels(source) == [1, 2]
    with pytest.raises(UserError, match="no folder 'validation'"):
        open_source(str(tmp_path), split="validation", image_size=8)


def test_split_folders_share_their_classes(tmp_path):
    save(tmp_path / "train/cat/a.png", red(1))
    save(tmp_path / "train/eel/b.png", red(2))
    save(tmp_path / "val/eel/c.png", red(3))
    validation = open_source(str(tmp_path), split="validation", image_size=8)
    assert (
        validation.class_names == ("cat", "eel") and [r.label for r in validation] == [1] and levels(validation) == [3]
    )
    assert levels(open_source(str(tmp_path), image_size=8)) == [1, 2]
    with pytest.raises(UserError) as caught:
        open_source(str(tmp_path), split="test", image_size=8)
    assert "no 'test'; choices: train, val" in one_line(caught)
    save(tmp_path / "plane/d.png", red(4))
    with pytest.raises(UserError, match="split or a class, for 'plane'"):
        open_source(str(tmp_path), image_size=8)


def test_folders_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(UserError) as caught:
        open_source(str(tmp_path), image_size=8)
    assert all(ending in one_line(caught) for ending in IMAGE_ENDINGS)
    save(tmp_path / "cat/a.png", red(1))
    (tmp_path / "dog").mkdir()
    with pytest.raises(UserError, match=r"class folder .*dog' holds no image"):
        open_source(str(tmp_path), image_size=8)
    save(tmp_path / "dog/b.png", red(1))
    save(tmp_path / "new cat/a.png", red(1))
    save(tmp_path / "new\ncat/a.png", red(1))
    with pytest.raises(UserError, match=r"class folders 'new\\ncat' and 'new cat' read alike; rename one"):
        open_source(str(tmp_path), image_size=8)
    save(tmp_path / "stray.png", red(1))
    (tmp_path / "new\ncat").rename(tmp_path / "old cat")
    with pytest.raises(UserError, match=r"stray\.png' lies beside class folders"):
        open_source(str(tmp_path), image_size=8)
    with pytest.raises(UserError, match="it is a file"):
        open_source(str(tmp_path / "stray.png"), image_size=8)
    (tmp_path / "many.tar").touch()
    with pytest.raises(UserError, match=r"it is a file, which webdataset:.*many\.tar reads"):
        open_source(str(tmp_path / "many.tar"), image_size=8)
    with pytest.raises(UserError, match="no folder"):
        open_source(f"imagefolder:{tmp_path}/nowhere", image_size=8)


@pytest.mark.parametrize("spec", ["opnmoji", "/no/such/place", "magic:thing"])
def test_unknown_specs_name_the_choices(spec):
    with pytest.raises(UserError, match=r"choices: openmoji, PATH, .*imagefolder:PATH") as caught:
        open_source(spec, image_size=8)
    assert spec in one_line(caught)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_no_truncated_image_is_half_decoded(format):
    data = encoded(Image.effect_noise((16, 16), 80).convert("RGB"), format)
    assert read_image(data, "whole").size == (16, 16)
    for length in range(len(data)):
        with pytest.raises(UserError, match=r"^dir/x: (not an image|the image is truncated or damaged)") as caught:
            read_image(data[:length], "dir/x")
        one_line(caught)


def test_files_that_are_no_images_are_named(tmp_path):
    path = tmp_path / "page.png"
    path.write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"page\.png: not an image \(22 bytes\)"):
        list(open_source(str(tmp_path), image_size=8))
    with pytest.raises(UserError, match=r"gone\.png: cannot be read: No such file"):
        read_image(tmp_path / "gone.png", "gone.png")
    with pytest.raises(UserError, match=r"^float: colour mode 'F'"):
        read_image(encoded(Image.new("F", (2, 2)), "TIFF"), "float")


def table(**columns) -> Dataset:
    features = Features(
        picture=ImageFeature(), label=ClassLabel(names=["a", "b"]), text=Value("string"), id=Value("int64")
    )
    rows = {"picture": [{"bytes": encoded(red(i)), "path": None} for i in (10, 20)]}
    rows |= {"label": [1, -1], "text": ["ten", None], "id": [7, 8]}
    return Dataset.from_dict(rows, features=features)


@pytest.fixture
def dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf-cache")


def test_saved_data_set_columns_are_found_by_type(tmp_path):
    table().save_to_disk(tmp_path / "one")
    DatasetDict(train=table(), val=table().select([1])).save_to_disk(tmp_path / "two")
    for spec in (f"arrow:{tmp_path}/one", f"hf:{tmp_path}/one", f"arrow:{tmp_path}/two"):
        source = open_source(spec, image_size=8)
        assert isinstance(source, IndexedSource) and len(source) == 2 and source.class_names == ("a", "b")
        assert [(r.label, r.caption) for r in source] == [(1, "ten"), (None, None)] and levels(source) == [10, 20]
        assert source.read(1).name != source.read(0).name
    assert levels(open_source(f"arrow:{tmp_path}/two", split="validation", image_size=8)) == [20]
    with pytest.raises(UserError, match="has no splits"):
        open_source(f"arrow:{tmp_path}/one", split="validation", image_size=8)
    with pytest.raises(UserError, match="no 'test'; choices: train, val"):
        open_source(f"arrow:{tmp_path}/two", split="test", image_size=8)
    arrow_file = next((tmp_path / "one").glob("*.arrow"))
    assert levels(open_source(f"arrow:{arrow_file}", image_size=8)) == [10, 20]


def test_a_column_of_lists_holds_several_captions(tmp_path):
    rows = {"captions": [["a cat", None, "the\ncat"], [None]], "tags": [["x"], ["y"]]}
    data = table().remove_columns("text")
    for name, values in rows.items():
        data = data.add_column(name, values)
    data.save_to_disk(tmp_path / "d")
    assert [r.caption for r in open_source(f"arrow:{tmp_path}/d", image_size=8)] == ["a cat\nthe cat", None]
    assert [r.caption for r in open_source(f"arrow:{tmp_path}/d?caption=tags", image_size=8)] == ["x", "y"]


def test_ambiguous_columns_are_listed_and_can_be_chosen(tmp_path):
    data = table().add_column("title", ["x", "y"]).rename_column("text", "note")
    data.save_to_disk(tmp_path / "d")
    with pytest.raises(UserError) as caught:
        open_source(f"arrow:{tmp_path}/d", image_size=8)
    assert "several caption columns: note, title; add ?caption=NAME" in one_line(caught)
    assert [r.caption for r in open_source(f"arrow:{tmp_path}/d?caption=title", image_size=8)] == ["x", "y"]
    source = open_source(f"arrow:{tmp_path}/d?caption=&label=id", image_size=8)
    assert [(r.caption, r.label) for r in source] == [(None, 7), (None, 8)] and source.class_names is None
    with pytest.raises(UserError, match="no caption column 'nope'; choices: note, title"):
        open_source(f"arrow:{tmp_path}/d?caption=nope", image_size=8)
    with pytest.raises(UserError, match=r"unknown 'lable'.*choices: image, label, caption"):
        open_source(f"arrow:{tmp_path}/d?lable=id", image_size=8)
    with pytest.raises(UserError, match=r"\?caption=title&caption=note: caption is given twice; keep one"):
        open_source(f"arrow:{tmp_path}/d?caption=title&caption=note", image_size=8)
    data.select_columns(["id"]).save_to_disk(tmp_path / "e")
    with pytest.raises(UserError, match=r"no image column .*its columns: id"):
        open_source(f"arrow:{tmp_path}/e", image_size=8)


@pytest.mark.parametrize(("kind", "values"), [("string", ["cat", "dog"]), ("float32", [0.0, 1.0]), ("bool", [0, 1])])
def test_a_label_column_that_holds_no_classes_is_refused_and_not_left_out(tmp_path, kind, values):
    data = table().remove_columns("label").add_column("label", values).cast_column("label", Value(kind))
    data.save_to_disk(tmp_path / "d")
    with pytest.raises(UserError, match=rf"column 'label' of '.*' is {kind}, .*class_encode_column.*\?label="):
        open_source(f"arrow:{tmp_path}/d", image_size=8)
    assert [r.label for r in open_source(f"arrow:{tmp_path}/d?label=&caption=text", image_size=8)] == [None, None]
    encoded = data.class_encode_column("label")
    encoded.save_to_disk(tmp_path / "e")
    assert [r.label for r in open_source(f"arrow:{tmp_path}/e", image_size=8)] == [0, 1]


def test_damaged_picture_in_a_data_set_is_named(tmp_path):
    features = Features(image=ImageFeature())
    rows = {"image": [{"bytes": encoded(red(1))[:-20], "path": None}]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "d")
    with pytest.raises(UserError, match=r"d\[train\]/0: the image is truncated"):
        list(open_source(f"arrow:{tmp_path}/d", image_size=8))


def test_local_folders_that_load_dataset_reads(tmp_path, dataset_cache):
    (tmp_path / "parquet").mkdir()
    table().to_parquet(tmp_path / "parquet/train-00000.parquet")
    for spec in (f"hf:{tmp_path}/parquet", f"hf-stream:{tmp_path}/parquet"):
        source = open_source(spec, image_size=8)
        assert levels(source) == [10, 20] and source.class_names == ("a", "b")
        assert isinstance(source, IndexedSource) == spec.startswith("hf:")
    save(tmp_path / "pictures/train/a/1.png", red(1))
    save(tmp_path / "pictures/train/b/2.png", red(2))
    for spec in (f"hf:{tmp_path}/pictures", f"hf-stream:{tmp_path}/pictures"):
        source = open_source(spec, image_size=8)
        assert levels(source) == [1, 2] and [r.label for r in source] == [0, 1]


def test_data_set_that_cannot_be_opened_says_why(tmp_path, dataset_cache):
    (tmp_path / "empty").mkdir()
    for spec in (f"hf:{tmp_path}/empty", f"arrow:{tmp_path}/nowhere"):
        with pytest.raises(UserError, match=r"^data: ") as caught:
            open_source(spec, image_size=8)
        one_line(caught)


def test_splits_are_found_in_any_case_where_nothing_else_stands_beside_them(tmp_path):
    save(tmp_path / "Train/cat/a.png", red(1))
    save(tmp_path / "VAL/cat/b.png", red(2))
    for split, expected in (("train", [1]), ("validation", [2])):
        source = open_source(str(tmp_path), split=split, image_size=8)
        assert source.class_names == ("cat",) and levels(source) == expected
    save(tmp_path / "Plane/c.png", red(3))
    assert open_source(str(tmp_path), image_size=8).class_names == ("Plane", "Train", "VAL")


def test_two_folders_of_one_split_are_refused_by_name(tmp_path):
    for name in ("train", "val", "validation"):
        save(tmp_path / name / "cat/a.png", red(1))
    with pytest.raises(UserError, match="has val and validation, each a name of 'validation'"):
        open_source(str(tmp_path), split="validation", image_size=8)


@pytest.mark.parametrize("spec", ["", "imagefolder:", "hf:", "arrow:", "~nobody-is-called-so/pictures"])
def test_a_name_that_leads_nowhere_is_not_taken_for_the_working_directory(spec, tmp_path, monkeypatch):
    save(tmp_path / "a.png", red(1))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"is no path|nobody is called so"):
        open_source(spec, image_size=8)


def test_an_image_beside_class_folders_is_told_which_folder_is_one(tmp_path):
    save(tmp_path / "a.png", red(1))
    (tmp_path / "tokens").mkdir()
    with pytest.raises(UserError, match=r"a\.png' lies beside class folders; 'tokens' is one"):
        open_source(str(tmp_path), image_size=8)


def test_a_web_dataset_has_labels_and_its_keys_are_no_captions(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for index in range(2):
            picture = io.BytesIO()
            red(index).save(picture, "PNG")
            for ending, content in (("png", picture.getvalue()), ("cls", str(index).encode())):
                member = tarfile.TarInfo(f"{index}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    source = open_source(f"hf:{tmp_path}", image_size=8)
    assert [(record.label, record.caption) for record in source] == [(0, None), (1, None)] and levels(source) == [0, 1]


def test_classes_of_one_name_in_two_spellings_are_refused_where_they_enter(tmp_path):
    types = Features(image=ImageFeature(), label=ClassLabel(names=["caf\u00e9", "cafe\u0301"]))
    rows = {"image": [{"bytes": encoded(red(1)), "path": None}], "label": [0]}
    Dataset.from_dict(rows, features=types).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(UserError, match="two classes are called 'caf\u00e9'; rename one"):
        open_source(f"arrow:{tmp_path / 'd'}", image_size=8)
