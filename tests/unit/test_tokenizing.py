"""Token stores made in shards: by several processes, on after any of them was ended, the same as by one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import Pictures, picture, save_pictures
from forked import Child, call, on_two, two
from PIL import Image

from consonar import cli
from consonar.data import bad_images, tokenizing
from consonar.data.bad_images import BadImages
from consonar.data.image_folder import ImageFolder
from consonar.data.tokenizing import LEFT_OUT, write_token_store
from consonar.data.tokens import TokenStore
from consonar.errors import BadImage, UserError
from consonar.files.lock import hold


def tokenize(how, words):
    """The command, in shards of four; `how` says what befalls it."""
    inner = tokenizing.Encoder.write

    def write(self, source, shard, *rest):
        print("made", shard, flush=True)
        for count in inner(self, source, shard, *rest):
            if how == f"kill {shard}":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "ask" and shard > 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if how == "hang" and os.environ["RANK"] == "1":
                time.sleep(60)
            yield count

    tokenizing.ITEMS_PER_SHARD, tokenizing.Encoder.write = 4, write
    cli.main(["tokenize", *words])


def content(store: Path) -> tuple[list[dict], dict]:
    opened = TokenStore.open(store)
    opened.check_content()
    return opened.table.to_pylist(), json.loads((store / "store.json").read_text())


@pytest.fixture
def words(picture_folder, tokenizer_folder):
    """They tokenise the 24 pictures of the split train in six shards."""
    return [
        "--tokenizer", str(tokenizer_folder), "--data", str(picture_folder), "--split", "train", "--batch-size", "4",
        "--device", "cpu", "--out",
    ]  # fmt: skip


@pytest.fixture
def in_shards(monkeypatch):
    monkeypatch.setattr(tokenizing, "ITEMS_PER_SHARD", 4)


def test_a_killed_command_goes_on_to_the_same_store(words, tmp_path):
    whole = call(tokenize, "well", [*words, str(tmp_path / "whole")])
    assert whole.code == 0, whole.err
    words.append(str(tmp_path / "t"))
    for shard in (2, 4):
        killed = call(tokenize, f"kill {shard}", words)
        assert killed.code == -signal.SIGKILL and not (tmp_path / "t").exists()
    done = call(tokenize, "well", words)
    assert done.code == 0, done.err
    assert done.out.splitlines()[1:3] == ["made 4", "made 5"], "of what was there nothing is made again"
    assert content(tmp_path / "t") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t", "whole"]


@pytest.mark.parametrize("kind", ["torchrun", "independent"])
def test_processes_share_a_store(kind, words, tmp_path):
    words.append(str(tmp_path / "t"))
    if kind == "torchrun":
        ended = on_two(tokenize, "well", words)
        assert [rank.code for rank in ended] == [0, 0], ended
        assert sum(" images x " in rank.out for rank in ended) == 1, "one of them says so"
    else:  # who comes late finds the store; neither comes to a finished one
        call(tokenize, "kill 1", words)
        ended = [each.end() for each in [Child(tokenize, "well", words) for _ in range(2)]]
        assert all(each.code == 0 or "exists" in each.err for each in ended), ended
        assert 0 in [each.code for each in ended]
    made = sorted(line for each in ended for line in each.out.splitlines() if line.startswith("made"))
    assert made == [f"made {shard}" for shard in range(kind == "independent", 6)], "each shard once"
    rows, metadata = content(tmp_path / "t")
    assert [row["name"] for row in rows] == [f"train/all/{index:03d}.png" for index in range(24)]
    assert metadata["counts"]["items"] == 24 and [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.slow
def test_processes_that_are_asked_to_end_leave_nothing_half_made_and_go_on(words, tmp_path):
    """SIGTERM comes to each in its second shard."""
    out = tmp_path / "t"
    ended = on_two(tokenize, "ask", [*words, str(out)])
    assert [rank.code for rank in ended] == [143, 143], ended
    assert all(rank.err == "consonar: asked to end; the same command goes on\n" for rank in ended), ended
    assert {path.name for path in (tmp_path / "t.parts").iterdir()} == {
        "job.json", "shard_00000000.tokens", "shard_00000001.tokens"
    }  # fmt: skip
    ended = on_two(tokenize, "well", [*words, str(out)])
    assert [rank.code for rank in ended] == [0, 0], ended
    made = sorted(line for rank in ended for line in rank.out.splitlines() if line.startswith("made"))
    assert made == [f"made {shard}" for shard in range(2, 6)] and len(content(out)[0]) == 24


def test_a_process_that_hangs_at_a_shard_is_named(in_shards, tokenizer, tmp_path, picture_folder, monkeypatch):
    monkeypatch.setenv("CONSONAR_TIMEOUT", "1")
    others = []

    def hangs(done, total):
        if not others:
            others.append(hold(tmp_path / "t.parts" / "shard_00000005"))
            others[0].__enter__()

    with pytest.raises(UserError, match=rf"shard_00000005: process {os.getpid()} on .* has not got on for \d+ s"):
        write_token_store(tmp_path / "t", ImageFolder(picture_folder), tokenizer, batch_size=4, progress=hangs)
    others[0].__exit__(None, None, None)
    assert len(write_token_store(tmp_path / "t", ImageFolder(picture_folder), tokenizer)) == 24


@pytest.mark.slow
def test_a_hung_rank_is_named_and_ends_the_other(words, tmp_path):
    other, hung = two(tokenize, "hang", [*words, str(tmp_path / "t")], CONSONAR_TIMEOUT="2")
    try:
        ended = other.end()
    finally:
        hung.process.kill()
        hung.end()
    named = (
        rf"consonar: \S+: process {hung.process.pid} on \S+ \(since .*\) holds it and has not got on for \d+ s; end it"
    )
    assert ended.code == 2 and re.fullmatch(named + ", and the same command goes on\n", ended.err), ended.err


def test_while_another_process_is_at_a_shard_the_others_are_made(in_shards, tokenizer, tmp_path, picture_folder):
    source, seen = ImageFolder(picture_folder), []
    with ExitStack() as other:
        other.enter_context(hold(tmp_path / "t.parts" / "shard_00000001"))

        def progress(done, total):
            seen.append(done)
            if done == 20:
                other.close()  # it was ended

        # Such a folder is not ours before its record is there.
        with pytest.raises(UserError, match="holds something else"):
            write_token_store(tmp_path / "t", source, tokenizer)
        with pytest.raises(KeyboardInterrupt):
            stop = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
            write_token_store(tmp_path / "a", source, tokenizer, progress=stop)
        record = tmp_path / "t.parts" / "job.json"
        settings = tokenizing.settings_of(source, tokenizer, tokenizing.Encoder(tokenizer, "center", 4, "fp32", False))
        record.write_text(json.dumps(settings))
        store = write_token_store(tmp_path / "t", source, tokenizer, batch_size=4, progress=progress)
    assert seen == [4, 8, 12, 16, 20, 24]
    names = store.table.column("name").to_pylist()
    assert names == sorted(names) and len(names) == 24


def test_other_settings_are_refused_until_nothing_is_left_of_the_first(in_shards, tokenizer, tmp_path, picture_folder):
    source = ImageFolder(picture_folder)

    def stop(done, total):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_token_store(tmp_path / "t", source, tokenizer, batch_size=2, progress=stop)
    with pytest.raises(UserError, match=r"unfinished tokens of another job \(another views\); remove it or choose"):
        write_token_store(tmp_path / "t", source, tokenizer, views="center_flip")
    with pytest.raises(UserError, match=r"another job \(another label_default\)"):
        write_token_store(tmp_path / "t", source, tokenizer, settings={"label_default": "1"})
    assert len(write_token_store(tmp_path / "t", source, tokenizer)) == 24


@pytest.mark.parametrize("file", ["tokens.arrow", "store.json", LEFT_OUT])
def test_a_shard_that_was_damaged_is_named_and_made_again(file, in_shards, tokenizer, tmp_path, picture_folder):
    source, finished = (
        ImageFolder(picture_folder),
        write_token_store(tmp_path / "whole", ImageFolder(picture_folder), tokenizer),
    )

    def stop(done, total):
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_token_store(tmp_path / "t", source, tokenizer, progress=stop)
    shard = tmp_path / "t.parts" / "shard_00000001.tokens"
    data = bytearray((shard / file).read_bytes())
    if file == "tokens.arrow":  # one token of another picture
        where = TokenStore.open(shard)._block_starts[0] * 2
        data[where] ^= 1
    else:
        del data[1:]
    (shard / file).write_bytes(data)
    with pytest.raises(UserError, match=r"shard_00000001\.tokens: was damaged, and is removed; the same command"):
        write_token_store(tmp_path / "t", source, tokenizer)
    again = write_token_store(tmp_path / "t", source, tokenizer)
    assert again.metadata.content_sha256 == finished.metadata.content_sha256


class Broken(Pictures):
    """An indexed source with some pictures that cannot be read."""

    def __init__(self, count: int, *broken: int) -> None:
        super().__init__(count)
        self.broken = broken

    def __len__(self) -> int:
        return self.count

    def read(self, index):
        if index in self.broken:
            raise BadImage(f"picture {index}: damaged")
        return next(iter(Pictures(1, index)))


def test_bad_images_are_counted_over_shards_and_calls_and_listed_by_row(in_shards, tokenizer, tmp_path):
    listing = tmp_path / "t-bad-images.txt"
    source = Broken(20, 1, 6, 7, 18)

    def stop(done, total):
        if done >= 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_token_store(tmp_path / "t", source, tokenizer, bad=BadImages("skip", 0.2, listing), progress=stop)
    with pytest.raises(UserError, match="picture 1: damaged"):  # by now it is to stop at the first
        write_token_store(tmp_path / "t", source, tokenizer)
    with pytest.raises(UserError, match=r"bad images: 4 of 20 .*more than the share of 0\.15 .*picture 18"):
        write_token_store(tmp_path / "t", source, tokenizer, bad=BadImages("skip", 0.15, listing))
    bad = BadImages("skip", 0.2, listing)
    store = write_token_store(tmp_path / "t", source, tokenizer, bad=bad)
    assert store.table.column("name").to_pylist() == [f"picture {i}" for i in range(20) if i not in (1, 6, 7, 18)]
    assert store.metadata.left_out == 4 and bad.note.startswith("4 of 20 pictures cannot be read")
    rows = [line.split("\t")[1] for line in listing.read_text().splitlines()]
    assert rows == ["20", "1", "6", "7", "18"]


def test_small_pictures_are_counted_over_shards_and_calls(in_shards, tokenizer_folder, tmp_path, capsys):
    folder = save_pictures(tmp_path / "pictures") / "train/a"
    Image.open(next(folder.iterdir())).resize((15, 40)).save(folder / "small.png")
    words = ["--tokenizer", str(tokenizer_folder), "--data", str(tmp_path / "pictures"), "--out", str(tmp_path / "t")]
    cli.main(["tokenize", *words])
    assert "train: smaller than 16 px, and enlarged: 1 of 13 pictures\n" in capsys.readouterr().out
    assert TokenStore.open(tmp_path / "t").metadata.enlarged == 1


def test_the_list_of_bad_images_is_bounded_and_keeps_other_parts(in_shards, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(bad_images, "MOST_LISTED", 2)
    listing = tmp_path / "list.txt"
    for part in ("train", "validation"):
        bad = BadImages("skip", 1.0, listing)
        write_token_store(tmp_path / part, Broken(12, *range(5)), tokenizer, bad=bad, part=part)
        assert bad.note.startswith({"train": "5 of 12", "validation": "10 of 24"}[part])
    lines = listing.read_text().splitlines()
    assert [line.split("\t")[:2] for line in lines[:3]] == [["train", "12"], ["train", "0"], ["train", "1"]]
    assert lines[2].endswith("(and 3 more pictures behind it)") and len(lines) == 6


def test_the_other_store_is_kept_where_pictures_were_left_out_of_it(in_shards, tmp_path, tokenizer_folder, capsys):
    for index in range(8):
        path = tmp_path / "data" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(path)
    (tmp_path / "data" / "a" / "2.png").write_bytes(b"x")
    argv = ["tokenize", "--tokenizer", str(tokenizer_folder), "--data", str(tmp_path / "data"), "--bad-images", "skip"]
    argv += ["--out", str(tmp_path / "t"), "--validation-split", "25%"]
    cli.main(argv)
    listed = (tmp_path / "t-bad-images.txt").read_text()
    shutil.rmtree(tmp_path / "t-validation")
    capsys.readouterr()
    cli.main(argv)
    assert "train: is there already" in capsys.readouterr().out
    (tmp_path / "t.parts").mkdir()  # of a process that was ended while it tidied
    (tmp_path / "t.parts" / "job.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    assert "t exists; choose another" in capsys.readouterr().err and not (tmp_path / "t.parts").exists()
    assert (tmp_path / "t-bad-images.txt").read_text() == listed and "2.png: not an image" in listed
