"""WebDataset tars, Parquet and Arrow shards, and streams: every picture once, and a fault named by its shard."""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture, same
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature

from consonar import cli
from consonar.data import loader, shards, tables
from consonar.data.bad_images import BadImages
from consonar.data.loader import image_batches, load_images
from consonar.data.picture_files import ShardStream
from consonar.data.shard_index import in_any_order
from consonar.data.shards import expanded, open_shards
from consonar.data.sources import open_source
from consonar.data.splits import open_splits
from consonar.data.tokenizing import write_token_store
from consonar.data.tokens import TokenStore
from consonar.errors import BadImage, OnlyInOrder, UserError
from consonar.training.config import DataConfig
from consonar.training.objectives.reconstruction import ReconstructionConfig
from consonar.training.run import train
from consonar.training.tracking import read_metrics
from consonar.types import IndexedSource


def encoded(index: int, kind: str = "PNG") -> bytes:
    picture(index).save(buffer := io.BytesIO(), format=kind)
    return buffer.getvalue()


def tar_of(*files: tuple[str, bytes], mode: str = "w") -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode=mode) as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def sample(index: int) -> list[tuple[str, bytes]]:
    return [(f"./s/{index:03d}.png", encoded(index)), (f"./s/{index:03d}.cls", str(index % 3).encode())]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Four shards of three pictures, labels 0, 1, 2."""
    (tmp_path / "wds").mkdir()
    for shard in range(4):
        files = [file for index in range(3 * shard, 3 * shard + 3) for file in sample(index)]
        (tmp_path / "wds" / f"train-{shard:04d}.tar").write_bytes(tar_of(*files))
    return tmp_path / "wds"


def names_and_labels(source) -> list[tuple[str, int | None]]:
    return [(record.name, record.label) for record in source]


EXPECTED = [(f"train-{index // 3:04d}.tar/s/{index:03d}", index % 3) for index in range(12)]


def test_braces_of_numbers_and_words():
    assert list(expanded("{a,b}/t-{08..11}.tar")) == [f"{x}/t-{n}.tar" for x in "ab" for n in ("08", "09", "10", "11")]
    assert list(expanded("{x}.tar")) == ["{x}.tar"]


@pytest.mark.parametrize(
    "form", ["{0}/train-{{0000..0003}}.tar", "{0}/train-*.tar", "{0}", "file://{0}/train-000?.tar"]
)
def test_shards_by_braces_pattern_folder_and_url(form, tars):
    source = open_source("webdataset:" + form.format(tars), image_size=16)
    assert isinstance(source, ShardStream) and source.num_shards == 4
    assert names_and_labels(source) == names_and_labels(source) == EXPECTED
    assert next(iter(source)).image.tobytes() == picture(0).tobytes()


def test_shards_elsewhere_are_read_through_fsspec(tars, tokenizer, tmp_path):
    memory = fsspec.filesystem("memory")
    for path in tars.iterdir():
        memory.pipe(f"/elsewhere/{path.name}", path.read_bytes())
    for form in ("memory://elsewhere/train-{0000..0003}.tar", "memory://elsewhere/*.tar"):
        assert names_and_labels(open_source(f"webdataset:{form}", image_size=16)) == EXPECTED
    source = open_source("webdataset:memory://elsewhere/train-{0000..0004}.tar", image_size=16)
    with pytest.raises(UserError, match=r"^data: no shard memory://elsewhere/train-0004\.tar$"):
        write_token_store(tmp_path / "t", source, tokenizer)
    with pytest.raises(UserError, match=r"data: nowhere://x\.tar: .*nowhere"):
        list(open_source("webdataset:nowhere://x.tar", image_size=16))


def test_a_store_of_shards_has_classes_by_the_file_and_every_picture_once(tars, tokenizer_folder, tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("x\ny\nz\n")
    argv = ["tokenize", "--tokenizer", str(tokenizer_folder), "--data", f"webdataset:{tars}/train-{{0000..0003}}.tar"]
    cli.main([*argv, "--classes", str(tmp_path / "classes.txt"), "--out", str(tmp_path / "t")])
    store = TokenStore.open(tmp_path / "t")
    assert store.class_names == ("x", "y", "z") and store.labels.tolist() == [label for _, label in EXPECTED]
    assert store.table.column("name").to_pylist() == [name for name, _ in EXPECTED]
    assert "12 pictures, 3 classes (x … z), 0 without a label" in capsys.readouterr().out
    assert not (tmp_path / "t-validation").exists(), "of a stream nothing is held out"


def test_what_a_sample_says(tmp_path):
    files = [
        ("a.jpg", encoded(0, "JPEG")), ("a.txt", b" a caption\nanother\n"), ("b.webp", encoded(1, "WEBP")),
        ("b.json", json.dumps({"label": 4, "caption": ["told", "in\nlines"], "fine": "7"}).encode()),
        ("b.npy", b"left out"),
        ("c.left.png", encoded(2)), ("c.right.png", encoded(3)), ("c.cls", b"-1"), ("._c.png", b"of a Mac"),
    ]  # fmt: skip
    (tmp_path / "x.tar").write_bytes(tar_of(*files))
    with pytest.raises(UserError, match=r"x\.tar/c: several pictures: left\.png, right\.png; add \?image=ENDING"):
        list(open_shards("webdataset", str(tmp_path / "x.tar"), "train"))
    right = open_shards("webdataset", f"{tmp_path}/x.tar?image=right.png", "train").shard(0)
    assert [unread.label for unread in right] == [None, 4, None]
    (tmp_path / "x.tar.gz").write_bytes(tar_of(*files[:5], mode="w:gz"))
    first, second = open_shards("webdataset", f"{tmp_path}/x.tar.gz", "train")
    assert (first.label, first.caption, second.label, second.caption) == (
        None,
        "a caption\nanother",
        4,
        "told\nin lines",
    )
    assert [r.label for r in open_shards("webdataset", f"{tmp_path}/x.tar.gz?label=fine", "train")] == [None, 7]
    for data, said in ((b"tench", r"x\.tar/a: label 'tench' is no number"), (b"[1]", r"a\.json: not a table of JSON")):
        (tmp_path / "x.tar").write_bytes(tar_of(("a.png", encoded(0)), ("a.cls" if data[0] == 116 else "a.json", data)))
        with pytest.raises(UserError, match=said):
            list(open_shards("webdataset", str(tmp_path / "x.tar"), "train"))


def test_a_missing_shard_is_named_before_anything_is_read(tars):
    (tars / "train-0002.tar").unlink()
    with pytest.raises(UserError, match=r"data: no shard .*train-0002\.tar \(of 4\)$"):
        open_source(f"webdataset:{tars}/train-{{0000..0003}}.tar", image_size=16)
    with pytest.raises(UserError, match=r"train-0002\.tar \(and 2 more of 6\)$"):
        open_source(f"webdataset:{tars}/train-{{0000..0005}}.tar", image_size=16)
    with pytest.raises(UserError, match=r"no shard is called .*none-\*\.tar"):
        open_source(f"webdataset:{tars}/none-*.tar", image_size=16)
    with pytest.raises(UserError, match="has no splits"):
        open_source(f"webdataset:{tars}/train-*.tar", split="validation", image_size=16)


def cut_between_files(data: bytes) -> bytes:
    return data[: data.index(b"s/007.png") // 512 * 512]


@pytest.mark.parametrize(
    "damage",
    [lambda data: None, cut_between_files, lambda data: data[:2000], lambda data: b"x" * 100, lambda data: b"",
     lambda data: data.replace(b"ustar", b"dirty", 4)],
    ids=["vanished", "cut between files", "cut", "no tar", "empty", "damaged headers"],
)  # fmt: skip
def test_a_shard_that_is_lost_while_others_are_read_is_one_line_and_the_rest_goes_on(damage, tars, tokenizer, tmp_path):
    source, shard = open_source(f"webdataset:{tars}/*.tar", image_size=16), tars / "train-0002.tar"
    whole, done = shard.read_bytes(), []
    if (left := damage(whole)) is None:
        shard.unlink()
    else:
        shard.write_bytes(left)
    with pytest.raises(UserError, match=r"train-0002\.tar"):
        write_token_store(tmp_path / "t", source, tokenizer, batch_size=3, progress=lambda n, _: done.append(n))
    assert not (tmp_path / "t").exists()
    shard.write_bytes(whole)
    again: list[int] = []
    store = write_token_store(tmp_path / "t", source, tokenizer, batch_size=3, progress=lambda n, _: again.append(n))
    assert len(store) == 12 and again == [9, 12], "the first two were there"


def test_bad_pictures_of_shards_are_left_out_with_their_names(tars, tokenizer, tmp_path):
    files = [file for index in range(3) for file in sample(index)]
    files[2] = (files[2][0], encoded(1)[:50])
    del files[4]  # a label without a picture
    (tars / "train-0000.tar").write_bytes(tar_of(*files))
    source = open_source(f"webdataset:{tars}/*.tar", image_size=16)
    with pytest.raises(UserError, match=r"train-0000\.tar/s/001: the image is truncated"):
        write_token_store(tmp_path / "t", source, tokenizer)
    bad = BadImages("skip", 0.01, tmp_path / "list.txt")
    assert len(write_token_store(tmp_path / "t", source, tokenizer, bad=bad)) == 10
    lines = (tmp_path / "list.txt").read_text().splitlines()
    assert lines[0] == "train\t12\tpictures" and lines[1].startswith("train\t1\ttrain-0000.tar/s/001: the image is")
    assert lines[2] == "train\t2\ttrain-0000.tar/s/002: no picture beside cls"


@pytest.mark.parametrize("bare", [0, 1])
def test_shards_of_which_some_have_labels_are_refused_at_the_first_that_shows_it(bare, tmp_path, tokenizer):
    for index in range(3):
        files = [("u.png", encoded(2))] if index == bare else sample(index)
        (tmp_path / f"{index}.tar").write_bytes(tar_of(*files))
    source = open_source(f"webdataset:{tmp_path}/*.tar", image_size=16)
    for _ in range(2):  # and once more where the shards are there
        with pytest.raises(UserError, match=rf"{bare}\.tar/u: no label, though the data have classes; give it one"):
            write_token_store(tmp_path / "t", source, tokenizer)
        assert not (tmp_path / "t.parts" / "shard_00000002.tokens").exists()


@pytest.mark.parametrize(("default", "expected"), [("1", [0, 1, 1]), ("drop", [0, 1])])
def test_pictures_of_shards_without_a_label(default, expected, tmp_path, tokenizer):
    (tmp_path / "x.tar").write_bytes(tar_of(*sample(0), *sample(1), ("u.png", encoded(2))))
    source = open_source(f"webdataset:{tmp_path}/x.tar", image_size=16, label_default=default)
    assert [label for _, label in names_and_labels(source)] == expected
    assert write_token_store(tmp_path / "t", source, tokenizer).labels.tolist() == expected


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def told(record) -> tuple:
    return record.name, record.label, record.caption, record.image.tobytes()


def assert_in_any_order(source) -> None:
    """As an indexed source it has the pictures of the stream, and knows labels and captions before it reads one."""
    expected, indexed = list(source), in_any_order(source)
    assert isinstance(indexed, IndexedSource) and len(indexed) == len(expected) > 6
    for index in (5, 0, len(expected) - 1, 3):
        assert told(indexed.read(index)) == told(expected[index])
    assert indexed.labels == [record.label for record in expected]
    assert indexed.captions == [record.caption for record in expected]
    assert (indexed.name, indexed.class_names, indexed.content_hash) == (
        source.name, source.class_names, source.content_hash
    )  # fmt: skip


def test_tars_are_read_in_any_order_by_an_index_that_is_made_once(tars, cache, monkeypatch):
    """Long names have headers of their own; what is no picture may stand between the files of a sample."""
    files = [("x" * 120 + ".txt", b"said"), ("x" * 120 + ".npy", b"left out"), ("x" * 120 + ".png", encoded(12))]
    (tars / "train-0004.tar").write_bytes(tar_of(("none.json", b'{"caption": "no picture"}'), *files))
    assert_in_any_order(open_source(f"webdataset:{tars}/train-{{0000..0003}}.tar", image_size=16))
    last = in_any_order(open_source(f"webdataset:{tars}", image_size=16))
    assert last.labels[-2:] == [None, None] and last.captions[-2:] == ["no picture", "said"]
    assert last.read(13).image.tobytes() == picture(12).tobytes()
    records = iter(last)
    assert [next(records).name for _ in range(12)] == [name for name, _ in EXPECTED]
    for read in (records.__next__, lambda: last.read(12)):
        with pytest.raises(BadImage, match=r"train-0004\.tar/none: no picture beside json"):
            read()
    assert told(next(records)) == told(last.read(13)), "behind a picture that cannot be read the others follow"
    monkeypatch.setattr("consonar.data.tars.tar_members", None)
    assert in_any_order(open_source(f"webdataset:{tars}", image_size=16)).labels == last.labels
    for path in (cache / "shards").iterdir():
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"shards/\w+\.arrow: not an index of shards.*delete it"):
        in_any_order(open_source(f"webdataset:{tars}", image_size=16))


def test_more_pictures_than_memory_holds_are_read_by_the_index_or_refused(tars, cache, monkeypatch):
    spec = f"webdataset:{tars}/train-{{0000..0003}}.tar"

    def batches(memory, **place):
        monkeypatch.setattr(loader, "MAX_MEMORY", memory)
        source = open_splits(spec, key="split", image_size=16, any_order=True).train
        return image_batches(source, 16, num_classes=3, batch_size=5, seed=0, **place)

    for held, read in zip(*([made.batch(step) for step in range(3)] for made in map(batches, (4e9, 1))), strict=True):
        assert same(vars(held), vars(read))
    with pytest.raises(UserError, match=r"\.tar: train-0000\.tar/s/002: label 2, and there are 2 classes"):
        image_batches(in_any_order(open_source(spec, image_size=16)), 16, num_classes=2, batch_size=5, seed=0)
    monkeypatch.setattr(loader, "MAX_MEMORY", 7 * 3 * 16**2)
    for name, mode in (("p.tar.gz", "w:gz"), ("p.tar.xz", "w:xz"), ("p.tar.bz2", "w:bz2"), ("misnamed.tar", "w:gz")):
        (tars / name).write_bytes(tar_of(*(file for index in range(8) for file in sample(index)), mode=mode))
        with pytest.raises(OnlyInOrder, match=rf"^data: {tars}/{name}: compressed, and read from its beginning alone"):
            open_splits(f"webdataset:{tars}/{name}", "25%", key="split", image_size=16)
    packed = [str(tars / name) for name in ("p.tar.gz", "p.tar.xz", "p.tar.bz2", "misnamed.tar")]
    for spec in (f"file://{tars}/train-{{0000..0003}}.tar", *packed):
        source = open_splits(f"webdataset:{spec}", key="split", image_size=16, any_order=True).train
        with pytest.raises(UserError, match=r"^data\.images: webdataset:.* holds over 7 pictures of 16 px, .*; put sh"):
            image_batches(source, 16, num_classes=3, batch_size=5, seed=0)


def test_a_label_that_changes_makes_another_index(tars, cache, monkeypatch):
    """Also where the hash of the content, which has some of the bytes alone, is the same."""
    monkeypatch.setattr(shards, "PIECES", 2)
    monkeypatch.setattr(shards, "PIECE", 16)
    (path := tars / "BZh.tar").write_bytes(tar_of(("BZh.png", encoded(0)), ("BZh.cls", b"1")))  # not compressed
    before, content = path.stat().st_mtime_ns, set()
    for label in (1, 2):
        path.write_bytes(path.read_bytes().replace(b"\x001" + bytes(60), b"\x00%d" % label + bytes(60)))
        os.utime(path, ns=(before + label, before + label))
        source = in_any_order(open_source(f"webdataset:{path}", image_size=16))
        content.add(source.content_hash)
        assert source.labels == [source.read(0).label] == [label]
    assert len(content) == 1


def test_a_share_of_shards_is_held_out_where_it_is_asked_for(tars, cache, tmp_path, tokenizer_folder):
    argv = [
        "tokenize",
        "--tokenizer",
        str(tokenizer_folder),
        "--data",
        f"webdataset:{tars}",
        "--validation-split",
        "25%",
    ]
    cli.main([*argv, "--out", str(tmp_path / "t")])
    stores = [TokenStore.open(tmp_path / name) for name in ("t", "t-validation")]
    names = [store.table.column("name").to_pylist() for store in stores]
    assert len(names[1]) == 3 and sorted(names[0] + names[1]) == [name for name, _ in EXPECTED]


def test_a_tokenizer_is_trained_on_shards(tars, cache, tmp_path, tokenizer, make_config, monkeypatch):
    """On a part that is held out for it, read when it is needed; of itself nothing is."""
    monkeypatch.setattr(loader, "MAX_MEMORY", 1)
    config = make_config(
        recipe="tokenizer-tiny", tokenizer=None, model=tokenizer.config,
        objective=ReconstructionConfig(perceptual_weight=0), loop={"steps": 1},
        data=DataConfig(images=f"webdataset:{tars}"),
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"data\.validation_split: nothing is held out of webdataset:.*or a share such as"
    ):
        train(config, tmp_path / "run")
    run = train(replace(config, data=replace(config.data, validation_split="25%")), tmp_path / "run", quiet=True)
    assert (run / "model" / "config.json").is_file()
    assert "validation/psnr" in read_metrics(run / "metrics.jsonl")[-1]


@pytest.fixture
def table() -> Dataset:
    features = Features(image=ImageFeature(), label=ClassLabel(names=["a", "b"]), caption=Value("string"))
    rows = {
        "image": [picture(i) for i in range(8)],
        "label": [i % 2 for i in range(8)],
        "caption": [f"c{i}" for i in range(8)],
    }
    return Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "arrow file", "parquet of bytes"])
def test_shards_that_are_tables(kind, table, tmp_path, tokenizer, cache, monkeypatch):
    name = kind.split()[0]
    for shard in range(2):
        part = table.shard(2, shard, contiguous=True).with_format("arrow")[:]
        path = tmp_path / f"{shard}.{name}"
        if kind == "parquet of bytes":
            plain = pa.table({"image": part["image"].combine_chunks().field("bytes"), "label": part["label"]})
            pq.write_table(plain.replace_schema_metadata(None), path)
        elif name == "parquet":
            pq.write_table(part, path, row_group_size=3)
        else:
            with (pa.ipc.new_stream if kind == "arrow stream" else pa.ipc.new_file)(str(path), part.schema) as writer:
                writer.write_table(part, max_chunksize=3)
    source = open_source(f"{name}:{tmp_path}/{{0,1}}.{name}", image_size=16)
    assert isinstance(source, ShardStream) and source.num_shards == 2
    assert source.class_names == (None if "bytes" in kind else ("a", "b"))
    records = list(source)
    assert [r.name for r in records] == [f"{i // 4}.{name}/{i % 4}" for i in range(8)]
    assert [r.label for r in records] == [i % 2 for i in range(8)]
    assert [r.caption for r in records] == [None if "bytes" in kind else f"c{i}" for i in range(8)]
    assert records[5].image.tobytes() == picture(5).tobytes()
    assert_in_any_order(source)
    if kind == "parquet":
        monkeypatch.setattr(tables, "MAX_GROUP", 100)
        (cache / "shards").rename(cache / "before")
        with pytest.raises(OnlyInOrder, match=r"0\.parquet: row groups of .* MB, all .*; write smaller ones, or"):
            in_any_order(source)
        in_order = open_splits(f"parquet:{tmp_path}", key="split", image_size=16, any_order=True).train
        assert len(load_images(in_order, 16)[0]) == 8 and not isinstance(in_order, IndexedSource)
    (tmp_path / f"1.{name}").write_bytes((tmp_path / f"1.{name}").read_bytes()[:-300])
    with pytest.raises(UserError, match=rf"1\.{name}: not a shard \({name}\), damaged or cut short"):
        write_token_store(tmp_path / "t", source, tokenizer)


def test_a_row_group_is_read_once_for_all_its_pictures(table, tmp_path, cache, monkeypatch):
    """Of all pictures it is that of the stream; of a part that is left by a share it is kept until the next one. How
    large it is depends on the columns that are read."""
    rows, read_group, pieces = table.with_format("arrow")[:], pq.ParquetFile.read_row_group, []
    features = pa.array([os.urandom(4096)] * 8, pa.binary(4096))
    pq.write_table(rows.append_column("more", features), tmp_path / "x.parquet", row_group_size=3, use_dictionary=False)
    monkeypatch.setattr(tables, "MAX_GROUP", 3 * 4096)

    def counted(file, piece, columns):
        assert "more" not in columns
        if "image" in columns:
            pieces.append(piece)
        return read_group(file, piece, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    for share, count in ((None, 8), ("25%", 6)):
        source = open_splits(f"parquet:{tmp_path}", share, key="split", image_size=16, any_order=True).train
        assert isinstance(source, IndexedSource) and len(load_images(source, 16)[0]) == count
        assert pieces == ([] if share is None else sorted(set(pieces))) and (share is None or len(pieces) > 1)


def test_a_hugging_face_stream_is_tokenised_in_its_shards(table, tmp_path, tokenizer):
    (tmp_path / "set").mkdir()
    for shard in range(3):
        table.shard(3, shard, contiguous=True).to_parquet(tmp_path / "set" / f"train-{shard}.parquet")
    source = open_source(f"hf-stream:{tmp_path / 'set'}", image_size=16)
    assert isinstance(source, ShardStream) and source.num_shards == 3
    captions = [f"c{i}" for i in range(8)]
    assert [record.caption for record in source] == captions
    store = write_token_store(tmp_path / "t", source, tokenizer)
    assert store.table.column("caption").to_pylist() == captions and store.class_names == ("a", "b")
    assert len(set(store.table.column("name").to_pylist())) == 8


def test_what_shards_hold_and_which_columns_are_read_is_in_their_hash(tars):
    def content(query: str = "") -> str:
        return open_source(f"webdataset:{tars}{query}", image_size=16).content_hash

    before, path = content(), tars / "train-0002.tar"
    assert before == content() and len({before, content("?label=other"), content("?label=third")}) == 3
    whole = path.read_bytes()
    edited = whole.replace(b"\x001" + bytes(60), b"\x007" + bytes(60), 1)  # a label, in a file of the same length
    assert edited != whole and len(edited) == len(whole)
    path.write_bytes(edited)
    assert content() != before
