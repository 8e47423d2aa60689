"""Token stores and the batches read from them: what is written is read, exactly, from anywhere, or refused."""

import json
import random
import resource
import signal
import threading

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

import consonar
from consonar.data.image_folder import ImageFolder
from consonar.data.loader import ImageBatches, TokenBatches, batch_rows
from consonar.data.picture_files import prefetch
from consonar.data.store_format import METADATA_FILE, TOKENS_FILE
from consonar.data.tokenizing import write_token_store
from consonar.data.tokens import TokenStore
from consonar.data.upstream import import_llamagen_npy, import_rar_jsonl
from consonar.errors import UserError
from consonar.files.lock import hold
from consonar.types import Grid, ImageRecord, Tokenizer


class GreyTokenizer:
    """The mean grey of each cell of a 2 x 2 grid in `vocab_size` steps: 4 tokens an image of 8 px."""

    num_tokens, code_dim, image_size, grid = 4, 1, 8, Grid(2, 2)

    def __init__(self, vocab_size: int = 256) -> None:
        self.vocab_size, self.name, self.fingerprint = vocab_size, f"grey-{vocab_size}", f"hash-of-grey-{vocab_size}"

    def encode(self, images):
        cells = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4).flatten(1)  # (B, 4) in [-1, 1]
        return ((cells + 1) / 2 * (self.vocab_size - 1)).round().long()

    def embed(self, tokens):
        return (tokens.float() / (self.vocab_size - 1) * 2 - 1)[..., None]

    def decode(self, tokens):
        return self.decode_embeddings(self.embed(tokens))

    def decode_embeddings(self, codes):
        cells = codes.view(-1, 1, 2, 2)
        return cells.repeat_interleave(4, -1).repeat_interleave(4, -2).expand(-1, 3, -1, -1)


class Levels:
    """`num` images, a stream: the left half is black, the right half has the grey level `i`."""

    def __init__(self, num: int = 7, labels: bool = True, caption: bool = True) -> None:
        self.num, self.name, self.class_names = num, "levels", ("even", "odd") if labels else None
        self.caption = caption

    def record(self, i: int) -> ImageRecord:
        pixels = np.zeros((8, 8, 3), np.uint8)
        pixels[:, 4:] = i
        label = i % 2 if self.class_names else None
        return ImageRecord(Image.fromarray(pixels), f"level-{i}", label, f"grey {i}" if self.caption else None)

    def __iter__(self):
        return map(self.record, range(self.num))


class IndexedLevels(Levels):
    """The same with random access, as folders have it."""

    def __len__(self) -> int:
        return self.num

    def read(self, index: int) -> ImageRecord:
        return self.record(index)


def rows(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("source", [Levels(), IndexedLevels()])
def test_store_reads_back_what_the_tokenizer_said(tmp_path, source):
    tokenizer, seen = GreyTokenizer(), []
    assert isinstance(tokenizer, Tokenizer)
    store = write_token_store(
        tmp_path / "s", source, tokenizer, views="center_flip", batch_size=6, progress=lambda *a: seen.append(a)
    )
    assert seen == [(n, 7 if source.__class__ is IndexedLevels else None) for n in (3, 6, 7)]
    assert len(store) == 7 and (store.num_views, store.num_tokens, store.vocab_size) == (2, 4, 256)
    assert (store.tokenizer_name, store.fingerprint) == ("grey-256", "hash-of-grey-256")
    assert store.class_names == ("even", "odd") and store.num_classes == 2 and store.name == "s"
    assert store.labels.tolist() == [0, 1, 0, 1, 0, 1, 0] and store.labels.dtype == torch.int64
    assert store.table.column("caption").take([6, 0]).to_pylist() == ["grey 6", "grey 0"]
    read = store.read(rows(5, 2, 5), rows(0, 1, 1))
    assert read.dtype == torch.int64 and read.tolist() == [[0, 5, 0, 5], [2, 0, 2, 0], [5, 0, 5, 0]]
    store.check_tokenizer(tokenizer)
    store.check_content()
    metadata = json.loads((tmp_path / "s" / METADATA_FILE).read_text())
    assert metadata["consonar_version"] == consonar.__version__ and metadata["source"] == "levels"
    assert metadata["counts"] == {"items": 7, "labelled": 7, "captioned": 7} and metadata["views"] == "center_flip"
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_other_readers_can_open_the_arrow_file(tmp_path):
    write_token_store(tmp_path / "s", Levels(3), GreyTokenizer())
    row = Dataset.from_file(str(tmp_path / "s" / TOKENS_FILE), in_memory=True)[2]
    assert row == {"tokens": [0, 2, 0, 2], "label": 0, "caption": "grey 2", "name": "level-2"}


def test_token_width_follows_the_vocabulary(tmp_path):
    for vocab_size, width in ((65536, "uint16"), (65537, "int32")):
        tokenizer = GreyTokenizer(vocab_size)
        store = write_token_store(tmp_path / width, Levels(256), tokenizer)
        assert store._flat.dtype == np.dtype(width)
        assert store.read(rows(255), rows(0)).tolist() == [[0, vocab_size - 1] * 2]


def test_ten_crop_of_a_folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        Levels().record(40 * i).image.save(tmp_path / f"images/{i}.png")
    tokenizer = GreyTokenizer()
    store = write_token_store(tmp_path / "s", ImageFolder(tmp_path / "images"), tokenizer, views="ten_crop")
    assert store.num_views == 10 and store.num_classes == 0 and store.class_names is None
    item = torch.stack([store.read(rows(2), rows(view))[0] for view in range(10)])  # (10, 4)
    assert torch.equal(item[5:], item[:5, [1, 0, 3, 2]]), "the flipped crops have their columns swapped"
    with pytest.raises(UserError, match="0 of 3 items"):
        _ = store.labels


def test_thousands_of_rows_in_many_blocks_read_in_one_gather(tmp_path, monkeypatch):
    monkeypatch.setattr("consonar.data.tokens.ROWS_PER_BLOCK", 64)
    lines = [json.dumps({"class_id": i % 10, "tokens": [i % 256, i // 256, 0, 255]}) for i in range(3000)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr("consonar.data.upstream.ITEMS_PER_WRITE", 50)
    store = import_rar_jsonl(tmp_path / "t.jsonl", tmp_path / "s", GreyTokenizer())
    assert len(store.table.column("tokens").chunks) == 30
    picks = torch.randint(3000, (500,), generator=torch.Generator().manual_seed(0))
    read = store.read(picks, torch.zeros_like(picks))
    assert torch.equal(read[:, 0] + 256 * read[:, 1], picks) and (read[:, 3] == 255).all()
    assert torch.equal(store.labels, torch.arange(3000) % 10)


def test_wrong_tokenizer_views_and_rows_are_refused(tmp_path):
    store = write_token_store(tmp_path / "s", Levels(), GreyTokenizer())
    with pytest.raises(UserError) as caught:
        store.check_tokenizer(GreyTokenizer(300))
    assert "'grey-256'" in one_line(caught) and "'grey-300'" in one_line(caught)
    with pytest.raises(UserError, match="exists and is not replaced"):
        write_token_store(tmp_path / "s", Levels(), GreyTokenizer())
    with pytest.raises(
        UserError, match=r"unknown 'centre'.*did you mean 'center'.*choices: center, center_flip, ten_crop, shift_flip"
    ):
        write_token_store(tmp_path / "t", Levels(), GreyTokenizer(), views="centre")
    with pytest.raises(UserError, match="levels holds no items"):
        write_token_store(tmp_path / "t", Levels(0), GreyTokenizer())
    for bad_rows, bad_views in ((rows(7), rows(0)), (rows(-1), rows(0)), (rows(0), rows(1))):
        with pytest.raises(IndexError):
            store.read(bad_rows, bad_views)
    with pytest.raises(UserError, match="no token store at"):
        TokenStore.open(tmp_path / "t")


def test_damaged_stores_are_refused(tmp_path):
    path = tmp_path / "s"
    write_token_store(path, Levels(), GreyTokenizer())
    good = json.loads((path / METADATA_FILE).read_text())

    def refused(**changes) -> str:
        (path / METADATA_FILE).write_text(json.dumps(good | changes))
        with pytest.raises(UserError) as caught:
            store = TokenStore.open(path)
            store.read(rows(0, 6), rows(0, 0))
        return one_line(caught)

    assert "format 2, but this consonar reads 1" in refused(format_version=2)
    assert "7 of 8 items" in refused(counts=good["counts"] | {"items": 8})
    assert "which is not what store.json says" in refused(num_tokens=5)
    message = refused(vocab_size=6)
    assert "token 6;" in message and "0..5" in message and str(path) in message
    with pytest.raises(UserError, match="s: token 6;"):
        TokenStore.open(path).check_content()
    data = (path / TOKENS_FILE).read_bytes()
    (path / TOKENS_FILE).write_bytes(data[: len(data) // 2])
    assert "not a token store, damaged" in refused()
    (path / TOKENS_FILE).unlink()
    assert "cannot be read" in refused()


class Failing(Levels):
    def __init__(self, error: BaseException) -> None:
        super().__init__(50)
        self.error = error

    def record(self, i):
        if i == 20:
            raise self.error
        return super().record(i)


@pytest.mark.parametrize("error", [UserError("a.png: truncated"), KeyboardInterrupt(), OSError("network gone")])
def test_a_failing_write_leaves_nothing(tmp_path, error, monkeypatch):
    monkeypatch.setattr("consonar.data.tokens.ROWS_PER_BLOCK", 4)
    threads = threading.active_count()
    with pytest.raises(type(error)) as caught:
        write_token_store(tmp_path / "s", Failing(error), GreyTokenizer(), batch_size=4)
    assert caught.value is error, "errors of the source are not blamed on the disk"
    assert list(tmp_path.iterdir()) == [] and threading.active_count() == threads


def test_a_store_has_one_writer_and_what_a_killed_one_left_is_removed(tmp_path):
    left = tmp_path / ".s.partial"
    (left / "unfinished").mkdir(parents=True)
    for name in (".lock", "unfinished/tokens.arrow", "unfinished/store.json"):
        (left / name).write_text("half")
    with pytest.raises(UserError, match="no token store"):
        TokenStore.open(tmp_path / "s")
    with hold(left), pytest.raises(UserError, match="is writing it"):
        write_token_store(tmp_path / "s", Levels(), GreyTokenizer())
    (tmp_path / "s").mkdir()  # empty: nothing is replaced
    assert len(write_token_store(tmp_path / "s", Levels(), GreyTokenizer())) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"store.json", "tokens.arrow"}


def test_a_full_disk_is_reported_before_and_while_writing(tmp_path, monkeypatch):
    class Endless(IndexedLevels):
        def __len__(self):
            return 10**15

    with pytest.raises(UserError) as caught:
        write_token_store(tmp_path / "s", Endless(), GreyTokenizer())
    assert "the disk is full; 144000000000.0 MB are needed" in one_line(caught)
    monkeypatch.setattr("consonar.data.tokens.ROWS_PER_BLOCK", 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # the system refuses to let a file of this process grow past 4 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(UserError) as caught:
            write_token_store(tmp_path / "s", Levels(200), GreyTokenizer(), batch_size=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "files may not be so large here (ulimit -f); 1.1 kB are needed" in one_line(caught)
    assert "MB free; nothing was replaced" in one_line(caught)
    assert list(tmp_path.iterdir()) == []


def test_labels_outside_the_classes_and_partly_missing_labels(tmp_path):
    class Wrong(Levels):
        def record(self, i):
            record = super().record(i)
            return ImageRecord(record.image, record.name, self.label if i == 3 else 0)

    source = Wrong()
    source.label = 2
    with pytest.raises(UserError, match=r"^level-3: label 2, and there are 2 classes"):
        write_token_store(tmp_path / "s", source, GreyTokenizer())
    source.label = None
    with pytest.raises(UserError, match=r"^level-3: no label, though .* --label-default CLASS"):
        write_token_store(tmp_path / "s", source, GreyTokenizer(), batch_size=2)
    assert not (tmp_path / "s").exists()
    write_token_store(tmp_path / "old", Levels(labels=False), GreyTokenizer())
    metadata = json.loads((tmp_path / "old" / METADATA_FILE).read_text())
    metadata |= {"num_classes": 2, "class_names": ["even", "odd"]}  # as older versions wrote it
    (tmp_path / "old" / METADATA_FILE).write_text(json.dumps(metadata))
    with pytest.raises(UserError, match=r"0 of 7 items .*--label-default"):
        TokenBatches(TokenStore.open(tmp_path / "old"), batch_size=2, seed=0)


def test_rar_jsonl(tmp_path):
    jsonl = tmp_path / "rar.jsonl"
    jsonl.write_text('{"class_id": 5, "tokens": [1, 2, 3, 4]}\n\n{"class_id": 0, "tokens": [0, 255, 0, 9]}\n')
    store = import_rar_jsonl(jsonl, tmp_path / "s", GreyTokenizer())
    assert store.read(rows(0, 1), rows(0, 0)).tolist() == [[1, 2, 3, 4], [0, 255, 0, 9]]
    assert store.labels.tolist() == [5, 0] and store.num_classes == 6 and store.fingerprint == "hash-of-grey-256"
    assert store.metadata.imported_from == "rar jsonl" and store.num_views == 1
    for line, words in {
        '{"class_id": 5, "tokens": [1, 2, 3]}': "'grey-256' has 4 a crop",
        '{"class_id": 5, "tokens": [1, 2, 3, 256]}': "token 256; 'grey-256' has 0..255",
        '{"class_id": 5, "tokens": [1, 2, 3, -1]}': "token -1",
        '{"class_id": 5, "tokens": [1, 2, 3, 0.5]}': "must be integers",
        '{"class_id": -2, "tokens": [1, 2, 3, 4]}': "class -2",
        '{"class_id": "cat", "tokens": [1, 2, 3, 4]}': "class 'cat'",
        '{"tokens": [1, 2, 3, 4]}': 'the entry "class_id" is missing; there: tokens',
        "[1, 2]": "a list, no table of JSON",
        '{"class_id": 5, "tok': "not a line of the form",
    }.items():
        jsonl.write_text('{"class_id": 5, "tokens": [1, 2, 3, 4]}\n' + line)
        with pytest.raises(UserError) as caught:
            import_rar_jsonl(jsonl, tmp_path / "t", GreyTokenizer())
        assert f"{jsonl}:2: " in one_line(caught) and words in one_line(caught)
        assert not (tmp_path / "t").exists()
    jsonl.write_bytes(b"\x1f\x8b\xff\xfe")
    with pytest.raises(UserError, match=r"rar\.jsonl:1: not a line"):
        import_rar_jsonl(jsonl, tmp_path / "t", GreyTokenizer())
    with pytest.raises(UserError, match="no file"):
        import_rar_jsonl(tmp_path / "x", tmp_path / "t", GreyTokenizer())


def test_llamagen_npy(tmp_path):
    codes, labels = tmp_path / "codes", tmp_path / "labels"
    codes.mkdir(), labels.mkdir()
    tokens = np.random.default_rng(0).integers(0, 256, (12, 2, 4))
    for i in range(12):
        np.save(codes / f"{i}.npy", tokens[i][None] if i % 2 else tokens[i])
        np.save(labels / f"{i}.npy", np.array([i]))

    def convert() -> TokenStore:
        return import_llamagen_npy(codes, labels, tmp_path / "s", GreyTokenizer())

    def refused() -> str:
        with pytest.raises(UserError) as caught:
            convert()
        assert not (tmp_path / "s").exists()
        return one_line(caught)

    np.save(codes / "11.npy", tokens[11][:1])
    assert "11.npy: 1 crops, but 0.npy has 2" in refused()
    np.save(codes / "11.npy", tokens[11] + 256)
    assert "11.npy: token" in refused()
    np.save(codes / "11.npy", tokens[11][None, :, :3])
    assert "11.npy: tokens of shape (2, 3); 'grey-256' has 4 a crop" in refused()
    (codes / "11.npy").write_bytes(b"garbage")
    assert "11.npy: not a .npy file" in refused()
    np.save(codes / "11.npy", tokens[11])
    np.save(labels / "4.npy", np.array([1.5]))
    assert "4.npy: float64 of shape (1,)" in refused()
    (labels / "4.npy").unlink()
    assert "4.npy is missing" in refused() and "11.npy is there" in refused()
    np.save(labels / "4.npy", np.array([4]))
    np.save(labels / "12.npy", np.array([4]))
    assert "13 label files for 12 code files" in refused()
    (labels / "12.npy").unlink()
    store = convert()
    assert store.labels.tolist() == list(range(12)), "the order is that of the numbers, not of the names"
    for view in (0, 1):
        assert np.array_equal(store.read(torch.arange(12), torch.full((12,), view)).numpy(), tokens[:, view])
    with pytest.raises(UserError, match=r"no \.npy file"):
        import_llamagen_npy(tmp_path, labels, tmp_path / "t", GreyTokenizer())


def test_a_single_crop_of_shape_one_by_n(tmp_path):
    np.save(tmp_path / "0.npy", np.array([[9, 8, 7, 6]]))
    (tmp_path / "labels").mkdir()
    np.save(tmp_path / "labels/0.npy", np.array([3]))
    store = import_llamagen_npy(tmp_path, tmp_path / "labels", tmp_path / "s", GreyTokenizer())
    assert store.num_views == 1 and store.read(rows(0), rows(0)).tolist() == [[9, 8, 7, 6]]


@pytest.mark.parametrize(("num_items", "batch_size"), [(10, 4), (3, 8), (8, 8), (1, 1)])
def test_every_epoch_shows_every_item_once(num_items, batch_size):
    stream = torch.cat([batch_rows(step, batch_size, num_items, seed=1) for step in range(2 * num_items)])
    for epoch in range(len(stream) // num_items):
        assert sorted(stream[epoch * num_items : (epoch + 1) * num_items].tolist()) == list(range(num_items))


def test_ranks_share_the_batch_of_one_rank():
    whole = batch_rows(5, 6, 100, seed=3)
    for world_size in (2, 3):
        parts = [batch_rows(5, 6 // world_size, 100, seed=3, rank=r, world_size=world_size) for r in range(world_size)]
        assert torch.equal(torch.stack(parts, 1).flatten(), whole)
    orders = [batch_rows(0, 100, 100, seed=seed).tolist() for seed in (3, 4)] + [
        batch_rows(1, 100, 100, seed=3).tolist()
    ]
    assert len({tuple(order) for order in orders}) == 3 and list(range(100)) not in orders


def test_a_run_that_goes_on_on_other_processes_skips_no_item_and_reads_none_twice():
    """Whatever the sizes are: the batch of all processes stays what it is."""
    draw = random.Random(0)
    for _ in range(200):
        num_items, worlds = draw.randint(1, 50), [draw.choice((1, 2, 3, 4, 6)) for _ in range(3)]
        whole, steps = 12 * draw.randint(1, 3), draw.randint(3, 20)
        stops = sorted(draw.sample(range(1, steps), 2))  # where it ends and goes on
        stream = []
        for step in range(steps):
            world = worlds[sum(step >= stop for stop in stops)]
            ranks = [
                batch_rows(step, whole // world, num_items, seed=1, rank=rank, world_size=world)
                for rank in range(world)
            ]
            stream += torch.stack(ranks, 1).flatten().tolist()
        assert stream == torch.cat([batch_rows(step, whole, num_items, seed=1) for step in range(steps)]).tolist()
        for epoch in range(len(stream) // num_items):
            assert sorted(stream[epoch * num_items : (epoch + 1) * num_items]) == list(range(num_items))


def test_token_batches(tmp_path):
    store = write_token_store(tmp_path / "s", Levels(20), GreyTokenizer(), views="center_flip")
    batches = TokenBatches(store, batch_size=8, seed=0)
    assert batches.num_items == 20
    views = []
    for step in range(20):
        batch, again = batches.batch(step), TokenBatches(store, batch_size=8, seed=0).batch(step)
        assert torch.equal(batch.tokens, again.tokens) and torch.equal(batch.condition, again.condition)
        assert torch.equal(batch.condition, batch.indices % 2)
        assert torch.equal(batch.tokens.max(1).values, batch.indices), "the tokens are those of the items"
        views += [row[0] > row[1] for row, i in zip(batch.tokens.tolist(), batch.indices.tolist(), strict=True) if i]
    assert 0.35 < sum(views) / len(views) < 0.65
    ranks = [TokenBatches(store, batch_size=4, seed=0, rank=r, world_size=2).batch(7) for r in (0, 1)]
    shared = torch.stack([batch.tokens for batch in ranks], 1).flatten(0, 1)
    assert torch.equal(shared, batches.batch(7).tokens), "two ranks see the views that one would"
    parts = list(batches.ordered(8))
    assert [len(part.indices) for part in parts] == [8, 8, 4]
    assert torch.cat([part.tokens for part in parts]).tolist() == [[0, i, 0, i] for i in range(20)]
    part = next(batches.ordered(8, 3)).indices.tolist()
    assert 0 <= part[0] < 6 <= part[1] < 13 <= part[2] < 20 and next(batches.ordered(8, 3)).indices.tolist() == part
    with pytest.raises(UserError, match="batch_size: 0"):
        TokenBatches(store, batch_size=0, seed=0)


def test_a_store_without_classes_has_condition_zero(tmp_path):
    store = write_token_store(tmp_path / "s", Levels(5, labels=False), GreyTokenizer())
    batch = TokenBatches(store, batch_size=5, seed=0).batch(0)
    assert batch.condition.tolist() == [0] * 5 and batch.condition.dtype == torch.int64


def in_memory(images, labels, **place) -> ImageBatches:
    return ImageBatches(len(images), "here", lambda rows: (images[rows], labels[rows]), **place)


def test_image_batches_and_their_flips():
    images = torch.zeros(6, 2, 2, 3, dtype=torch.uint8)
    images[:, :, 1] = torch.arange(6, dtype=torch.uint8).view(6, 1, 1) + 100
    labels = torch.arange(6) * 2
    plain = in_memory(images, labels, batch_size=4, seed=1)
    flipped = in_memory(images, labels, batch_size=4, seed=1, flip=True)
    mirrored = 0
    for step in range(30):
        batch, other = plain.batch(step), flipped.batch(step)
        assert torch.equal(batch.indices, other.indices) and torch.equal(batch.condition, batch.indices * 2)
        expected = (batch.indices + 100) / 127.5 - 1
        assert torch.allclose(batch.images[:, 0, 0, 1], expected) and (batch.images[..., 0] == -1).all()
        flips = other.images[:, 0, 0, 1] == -1
        assert torch.equal(other.images, torch.where(flips.view(-1, 1, 1, 1), batch.images.flip(-1), batch.images))
        assert torch.equal(other.images, flipped.batch(step).images)
        mirrored += int(flips.sum())
    assert 36 <= mirrored <= 84  # of 120, five standard deviations around a half
    ranks = [
        in_memory(images, labels * 0, batch_size=2, seed=1, flip=True, rank=r, world_size=2).batch(3) for r in (0, 1)
    ]
    assert torch.equal(torch.stack([b.images for b in ranks], 1).flatten(0, 1), flipped.batch(3).images)
    assert ranks[0].condition.tolist() == [0, 0]
    assert [batch.indices.tolist() for batch in flipped.ordered(4)] == [[0, 1, 2, 3], [4, 5]]
    (first, second), (third,) = [batch.indices.tolist() for batch in flipped.ordered(2, 3)]
    assert (first // 2, second // 2, third // 2) == (0, 1, 2)
    assert [batch.indices.tolist() for batch in flipped.ordered(9, 9)] == [[0, 1, 2, 3, 4, 5]]
    with pytest.raises(UserError, match="holds no items"):
        in_memory(images[:0], labels, batch_size=1, seed=0)


@pytest.mark.parametrize("source", [Levels(40), IndexedLevels(40)])
def test_prefetch_keeps_the_order_and_runs_ahead(source, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    started, release = [], threading.Event()

    def prepare(record: ImageRecord) -> str:
        started.append(record.name)
        if record.name == "level-0":
            release.wait(10)  # the first item is the slowest; the others overtake it
        if len(started) >= 6:
            release.set()
        return record.name

    stream = prefetch(source, prepare, depth=10)
    assert next(stream) == "level-0" and len(started) >= 6
    assert list(stream) == [f"level-{i}" for i in range(1, 40)]
    assert len(started) == 40
