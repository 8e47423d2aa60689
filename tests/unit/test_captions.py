"""Features of captions on the disk: what is read is what the encoder gives, and nothing is encoded twice."""

import gc
import resource
import weakref
from multiprocessing.pool import ThreadPool
from queue import Queue

import numpy as np
import pytest
import torch

from consonar.data import captions as module
from consonar.data.captions import CaptionFeatures, all_captions, in_lines
from consonar.data.loader import ImageBatches
from consonar.data.picture_files import wrapped
from consonar.errors import UserError
from consonar.origin import Origin
from consonar.training.captions import read_by, told
from consonar.types import TextCondition


class Spelling:
    """A text encoder of letters: a token a letter, its features its number; counts what it is asked."""

    name, width, length = "spelling", 3, 6

    def __init__(self, fingerprint="one"):
        self.fingerprint, self.uncut, self.asked = f"{fingerprint}, {self.length}", fingerprint, []

    def is_cut(self, caption):
        return len(caption) > self.length

    def encode(self, captions):
        self.asked += captions
        features, mask = torch.zeros(len(captions), 6, 3), torch.zeros(len(captions), 6, dtype=torch.bool)
        for row, text in enumerate(captions):
            letters = torch.tensor([float(ord(letter)) for letter in text[:6]])
            features[row, 6 - len(letters) :] = letters[:, None] * torch.tensor([1.0, 0.5, 1 / 3])
            mask[row, 6 - len(letters) :] = True
        mask &= torch.tensor([text != "<b>" for text in captions])[:, None]
        return TextCondition(features, mask)


CAPTIONS = ["bee", "a", "bee", "elephants", "cow", "dog", "ant"]


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(module, "PER_FILE", 2)


def test_what_is_read_is_what_the_encoder_gives(tmp_path):
    expected = Spelling().encode(CAPTIONS)
    for _ in range(2):  # encoded; then from the files
        features = CaptionFeatures(CAPTIONS, Spelling(), folder=tmp_path)
        rows = torch.tensor([6, 0, 2, 3, 1, 4, 5, 3])
        found = features.read(rows)
        assert len(features) == 7
        assert torch.equal(found.features, expected.features[rows]) and torch.equal(found.mask, expected.mask[rows])


def test_of_several_captions_one_is_read_as_drawn(tmp_path):
    items = ["bee", ("cow", "dog", "ant"), ("elephants", "a")]
    features = CaptionFeatures(items, Spelling(), folder=tmp_path)
    assert len(features) == 3
    rows, draws = torch.tensor([1, 1, 1, 2, 2, 0]), torch.tensor([0, 4, 2, 1, 6, 5])
    expected = Spelling().encode(["cow", "dog", "ant", "a", "elephants", "bee"])
    assert torch.equal(features.read(rows, draws).features, expected.features)
    assert torch.equal(features.read(rows[:1]).features, expected.features[:1])  # without draws the first
    flat = CaptionFeatures(["bee", "cow", "dog", "ant", "elephants", "a"], Spelling(), folder=tmp_path)
    assert flat.content != features.content


def test_a_step_draws_one_caption_of_each_item_whatever_the_number_of_processes(tmp_path):
    items = [("one", "two"), ("cow", "dog", "ant"), "bee"]
    features = CaptionFeatures(items, Spelling(), folder=tmp_path)

    def batches(size, rank, world_size):
        images = torch.zeros(3, 4, 4, 3, dtype=torch.uint8)
        return ImageBatches(
            3, "here", lambda rows: (images[rows], rows), captions=features, batch_size=size, seed=0, rank=rank,
            world_size=world_size,
        )  # fmt: skip

    seen = {}
    for step in range(8):
        whole = batches(4, 0, 1).batch(step)
        halves = [batches(2, rank, 2).batch(step) for rank in range(2)]
        for row in range(4):
            assert torch.equal(whole.condition.features[row], halves[row % 2].condition.features[row // 2])
            letters = [chr(int(number)) for number in whole.condition.features[row, :, 0] if number]
            seen.setdefault(int(whole.indices[row]), set()).add("".join(letters))
    assert seen == {0: {"one", "two"}, 1: {"cow", "dog", "ant"}, 2: {"bee"}}


def test_lines_are_captions():
    assert all_captions([in_lines(["a\ndog", "a cat"]), "one"], "here") == [("a dog", "a cat"), ("one",)]
    with pytest.raises(
        UserError, match=r"here: 2 of 3 items have no .* \(the first: number 1, counted from 0, ' .n'\)"
    ):
        all_captions(["x", " \n", None], "here")


def test_different_captions_are_encoded_once_and_an_ended_job_goes_on(tmp_path):
    class Ends(Spelling):
        def encode(self, captions):
            if "dog" in captions:
                raise KeyboardInterrupt
            return super().encode(captions)

    with pytest.raises(KeyboardInterrupt):
        CaptionFeatures(CAPTIONS, Ends(), folder=tmp_path)
    second, third, seen = Spelling(), Spelling("other weights"), []
    CaptionFeatures(CAPTIONS, second, folder=tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert second.asked == ["dog", "elephants"]  # two a file: a ant, bee cow, dog elephants
    assert seen[-1] == (6, 6)
    CaptionFeatures(CAPTIONS, third, folder=tmp_path)
    assert sorted(third.asked) == sorted(set(CAPTIONS))
    more = CaptionFeatures(["ape", *CAPTIONS, "zebu"], second := Spelling(), folder=tmp_path)
    assert second.asked == ["ape", "zebu"]  # each is known by itself, whatever stands beside it
    expected = Spelling().encode(["zebu", "cow", "ape"])
    assert torch.equal(more.read(torch.tensor([8, 5, 0])).features, expected.features)


def test_captions_without_words_are_left_out_and_items_without_others_are_told(tmp_path):
    items = ["bee", ("<b>", "cow"), ("dog", "<b>", "ant")]
    for encoder in (Spelling(), Spelling()):  # encoded; then from the files
        features = CaptionFeatures(items, encoder, folder=tmp_path)
        assert "; 1 in which it finds no words are left out" in features.about
        found = features.read(torch.tensor([1, 1, 2, 2]), torch.tensor([0, 1, 0, 1]))
        assert torch.equal(found.features, Spelling().encode(["cow", "cow", "dog", "ant"]).features)
        with pytest.raises(
            UserError, match=r"^here: '<b>' \(number 1, counted from 0; 1 more have none\) has no words for sp"
        ):
            CaptionFeatures(["bee", "<b>", ("<b>",)], encoder, folder=tmp_path, where="here")
    assert encoder.asked == []
    with pytest.raises(UserError, match=r"^caption: '<b>' has no words for spelling$"):
        CaptionFeatures(["<b>"], Spelling(), folder=tmp_path)


def test_those_that_are_cut_are_counted(tmp_path):
    for _ in range(2):  # encoded; then from the files
        features = CaptionFeatures(["bee", "eleven", "elephants", ("cow", "antelopes")], Spelling(), folder=tmp_path)
        assert features.num_cut == 2 and features.about.endswith("5 different, read by spelling; 2 cut after 6 tokens")
    whole = CaptionFeatures(["bee", "eleven"], Spelling(), folder=tmp_path)
    assert told(features, whole) == (features.about,) and told(None, None) == ()
    assert told(whole, features) == ("captions: 2 different, read by spelling", f"validation {features.about}")


def test_what_is_read_later_does_not_hold_the_encoder(tmp_path):
    encoder = Spelling()
    there, seen = weakref.ref(encoder), []
    features = CaptionFeatures(CAPTIONS, encoder, folder=tmp_path, progress=lambda *how_far: seen.append(how_far))
    del encoder
    gc.collect()
    assert there() is None and seen
    assert features.read(torch.tensor([1])).features[0, -1, 0] == ord("a")


def test_who_comes_second_waits_says_how_far_the_first_is_and_reads(tmp_path):
    texts, second, told = ["ant", "bee", "cow", "dog"], Spelling(), Queue()
    given = {"folder": tmp_path, "progress": lambda done, total: told.put(done)}
    with ThreadPool(1) as pool:
        waiting = []

        class First(Spelling):
            def encode(self, captions):
                if not waiting:
                    waiting.append(pool.apply_async(CaptionFeatures, (texts, second), given))
                while told.get(timeout=60) != min(len(self.asked), 4):  # two a file
                    pass
                if "moth" in captions:  # the second goes on before the first has ended
                    assert len(waiting[0].get(60)) == 4
                return super().encode(captions)

        CaptionFeatures([*texts, "moth"], First(), folder=tmp_path)
        assert waiting[0].successful() and second.asked == []


def test_what_no_length_cuts_is_encoded_once_for_all_lengths(tmp_path):
    """A file of captions that all have room serves other lengths, as far as these cut none of them either."""

    class Shorter(Spelling):
        length = 4

        def encode(self, captions):
            found = super().encode([caption[:4] for caption in captions])
            return TextCondition(found.features[:, 2:], found.mask[:, 2:])

    long, captions = Spelling(), [*CAPTIONS, "sheep"]
    first = CaptionFeatures(captions, long, folder=tmp_path)  # two a file: a ant, bee cow, dog elephants, sheep
    assert len(long.asked) == 7 and first.longest == 6
    for encoder, asked in ((Shorter(), ["elep", "shee"]), (Shorter(), []), (Spelling(), [])):
        features = CaptionFeatures(captions, encoder, folder=tmp_path)
        assert encoder.asked == asked
        rows, expected = torch.arange(8), type(encoder)().encode(captions)
        found = features.read(rows)
        assert torch.equal(found.features, expected.features) and torch.equal(found.mask, expected.mask)
    assert len(list(tmp_path.glob("*/*.index.npy"))) == 6  # those of one that is cut and one that is not are two


def test_files_are_mapped_and_damage_is_said(tmp_path):
    CaptionFeatures(CAPTIONS, Spelling(), folder=tmp_path)
    features = CaptionFeatures(CAPTIONS, Spelling(), folder=tmp_path)
    assert all(isinstance(tokens, np.memmap) for tokens, _ in features.encoded.files)
    index = next(tmp_path.glob("*/*.index.npy"))
    for path in (index, index.with_name(index.name.replace(".index", ""))):
        whole = path.read_bytes()
        for bad in (whole[:-5], b"", b"x" * 200):
            path.write_bytes(bad)
            with pytest.raises(UserError, match="delete it, it is made again"):
                CaptionFeatures(CAPTIONS, Spelling(), folder=tmp_path)
        path.unlink()
        CaptionFeatures(CAPTIONS, encoder := Spelling(), folder=tmp_path)
        assert len(encoder.asked) == 2


def test_without_room_features_stay_in_memory(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    features = CaptionFeatures(CAPTIONS, Spelling(), folder=tmp_path / "file")
    assert torch.equal(features.read(torch.arange(7)).features, Spelling().encode(CAPTIONS).features)
    assert "not kept in the cache folder" in capsys.readouterr().err


@pytest.mark.parametrize("written", [module.INDEX, "none"])
def test_features_of_which_one_file_cannot_be_written_stay_in_memory_and_are_made_again(written, tmp_path, monkeypatch):
    keep = module.keep
    monkeypatch.setattr(module, "keep", lambda path, write: path.name.endswith(written) and keep(path, write))
    for _ in range(2):
        features = CaptionFeatures(CAPTIONS, Spelling(), folder=tmp_path)
        assert torch.equal(features.read(torch.arange(7)).features, Spelling().encode(CAPTIONS).features)


def test_a_file_whose_last_bytes_find_no_room_is_an_error(tmp_path):
    """Of `np.save` it is none: the header is written, what is lost is the array, when its file is closed."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (140, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"), (tmp_path / "a.npy").open("wb") as file:
            module.write_array(np.arange(3), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_captions_say_is_part_of_what_a_run_was_made_of(tmp_path):
    origin = Origin(data_sha256="d", validation_sha256=None)
    named = []
    for captions in (CAPTIONS, CAPTIONS, ["bees", *CAPTIONS[1:]], CAPTIONS[::-1]):
        features = CaptionFeatures(captions, Spelling(), folder=tmp_path)
        named.append(read_by(origin, Spelling(), "spelling", features, features))
    assert named[0] == named[1] and len({one.data_sha256 for one in [origin, *named]}) == 4
    assert named[0].validation_sha256 is None


def test_captions_are_cut_to_the_width_of_a_picture():
    assert wrapped("two red apples above a dog", 10, len) == ["two red", "apples", "above a", "dog"]
    assert wrapped("one two three four five six", 5, len) == ["one", "two", "three", "four…"]
    assert wrapped("elephantine", 5, len) == ["elep…"] and wrapped(" \n", 5, len) == [""]
