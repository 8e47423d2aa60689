"""Streaming image sets, feature extraction and the feature cache; the shipped feature network when it is installed."""

import threading
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
import torch
from PIL import Image

from consonar.distributed import World
from consonar.errors import UserError
from consonar.evaluation import features as sets
from consonar.evaluation import image_sets as inputs
from consonar.evaluation.image_sets import ImageSet
from consonar.evaluation.settings import EvaluationSettings
from consonar.files import lock
from consonar.networks import load_feature_network
from consonar.networks.efficientnet import load_efficientnet_lite0
from consonar.types import ImageRecord


class MeanColour:
    """A feature network that counts how often it is called."""

    name, weights_sha256, num_features = "mean-colour", "0", 3

    def __init__(self):
        self.calls = 0

    def __call__(self, images):
        self.calls += 1
        return images.mean((2, 3))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)


def in_memory(images, name="memory"):
    return ImageSet(name, lambda size: (images[i : i + size] for i in range(0, len(images), size)))


def test_an_npz_is_streamed_in_batches(tmp_path, images):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", arr_0=images, arr_1=np.arange(10))
        image_set, shape = inputs.npz_image_set(tmp_path / "a.npz")
        assert shape == (10, 8, 8, 3)
        for _ in range(2):
            batches = list(image_set.stream(4))
            assert [len(batch) for batch in batches] == [4, 4, 2]
            assert np.array_equal(np.concatenate(batches), images)


def test_wrong_npz_files_are_named(tmp_path, images):
    cases = {
        "No such file": None,
        "not an .npz": b"text",
        "it holds other": {"other": images},
        "expected uint8": {"images": images.astype(np.float32)},
        "images holds no image": {"images": images[:0]},
    }
    for number, (message, content) in enumerate(cases.items()):
        path = tmp_path / f"{number}.npz"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content:
            np.savez(path, **content)
        with pytest.raises(UserError, match=message) as caught:
            inputs.npz_image_set(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_npz_stops_with_one_line(tmp_path, images):
    path = tmp_path / "damaged.npz"
    np.savez(path, images=images)
    content = bytearray(path.read_bytes())
    content[1000] ^= 255
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged or cut short.*make it again"):
        list(inputs.npz_image_set(path)[0].stream(4))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"not an \.npz, damaged or cut short"):
        inputs.npz_image_set(path)


def test_a_folder_is_streamed_in_the_order_of_names(tmp_path, images):
    for index in (2, 0, 1):
        Image.fromarray(images[index]).save(tmp_path / f"{index}.png")
    (tmp_path / "note.txt").write_text("not an image")
    image_set, shape, digest = inputs.folder_image_set(tmp_path)
    assert shape == (3, 8, 8, 3)
    assert np.array_equal(np.concatenate(list(image_set.stream(2))), images[:3])
    Image.fromarray(images[5]).save(tmp_path / "1.png")
    assert inputs.folder_image_set(tmp_path)[2] != digest
    Image.fromarray(images[0, :4]).save(tmp_path / "3.png")
    with pytest.raises(UserError, match=r"3\.png: 8 x 4 px; the first has 8 x 8 px"):
        list(inputs.folder_image_set(tmp_path)[0].stream(2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no images; looked for files ending in \.png"):
        inputs.folder_image_set(tmp_path / "empty")
    grids = tmp_path / "sweep" / "runs" / "plain-0" / "samples"
    grids.mkdir(parents=True)
    Image.fromarray(images[0]).save(grids / "step_000001.png")
    (grids.parent / "metrics.jsonl").touch()
    for folder in (tmp_path / "sweep", grids):
        with pytest.raises(UserError, match=r"holds grids of the run .*plain-0, which are no samples"):
            inputs.folder_image_set(folder)
    (grids.parent / "mine").mkdir()
    Image.fromarray(images[0]).save(grids.parent / "mine" / "000000.png")
    assert inputs.folder_image_set(grids.parent / "mine")[1] == (1, 8, 8, 3)


def test_a_source_is_cropped_to_the_size(images):
    class Source:
        name, class_names = "source", None

        def __iter__(self):
            yield ImageRecord(Image.fromarray(images[0]), "right size")
            yield ImageRecord(Image.new("RGB", (30, 20), (10, 20, 30)), "larger")

    (batch,) = inputs.source_image_set(Source(), 8).stream(5)
    assert batch.shape == (2, 8, 8, 3)
    assert np.array_equal(batch[0], images[0])
    assert (batch[1] == (10, 20, 30)).all()


def test_pixels_map_to_minus_one_and_one():
    images = np.zeros((1, 2, 2, 3), np.uint8)
    images[0, 0, 1] = 255
    tensor = sets.as_input(images, None)
    assert tensor.shape == (1, 3, 2, 2)
    assert tensor[0, 0].tolist() == [[-1, 1], [-1, -1]]


def test_extracted_moments_rows_and_parts(images):
    part_of = torch.tensor([0, 1, -1, 0, 1, 1, 0, 0, 1, -1])
    seen = []
    found = sets.extract_features(
        MeanColour(),
        in_memory(images),
        EvaluationSettings(batch_size=4, max_neighbours_images=6),
        part_of=part_of,
        progress=lambda *x: seen.append(x),
    )
    expected = images.mean((1, 2)) / 127.5 - 1
    assert found.rows.shape == (6, 3) and np.allclose(found.rows, expected[found.indices], atol=1e-6)
    assert np.allclose(found.moments.mean, expected.mean(0), atol=1e-6)
    assert [part.moments.count for part in found.parts] == [4, 4]
    for part, kept in enumerate(found.parts):
        assert np.allclose(kept.moments.cov, np.cov(expected[part_of == part], rowvar=False), atol=1e-6)
    assert seen == [("memory", 4, 10), ("memory", 8, 10), ("memory", 10, 10)]


def test_reference_features_are_calculated_once(cache, images):
    network = MeanColour()
    first = sets.cached_features(network, in_memory(images), EvaluationSettings(batch_size=4, max_neighbours_images=6))
    calls = network.calls
    # Another batch size and name, the same pixels: the same entry.
    again = sets.cached_features(
        network, in_memory(images, "other name"), EvaluationSettings(batch_size=7, max_neighbours_images=6)
    )
    assert network.calls == calls == 3
    assert again.moments.count == 10
    assert torch.equal(again.rows, first.rows) and torch.equal(again.moments.cov, first.moments.cov)
    assert len(list(cache.iterdir())) == 1
    # One pixel, the number of rows kept, or other weights: another entry.
    images[0, 0, 0, 0] ^= 1
    sets.cached_features(network, in_memory(images), EvaluationSettings(batch_size=4, max_neighbours_images=6))
    sets.cached_features(network, in_memory(images), EvaluationSettings(batch_size=4, max_neighbours_images=5))
    network.weights_sha256 = "1"
    sets.cached_features(network, in_memory(images), EvaluationSettings(batch_size=4, max_neighbours_images=5))
    assert len(list(cache.iterdir())) == 4


def test_a_file_with_all_vectors_serves_fewer_of_any_seed(cache, images):
    settings, network = EvaluationSettings(batch_size=4, max_neighbours_images=6, seed=3), MeanColour()
    asked = sets.extract_features(network, in_memory(images), settings)
    whole = sets.cached_features(network, in_memory(images), EvaluationSettings(batch_size=4), max_rows=10)
    calls = network.calls
    found = sets.cached_features(network, in_memory(images), settings)
    assert network.calls == calls and len(whole.rows) == 10 and len(list(cache.iterdir())) == 1
    assert torch.equal(found.rows, asked.rows) and torch.equal(found.indices, asked.indices)


def test_who_comes_second_waits_and_reads(cache, images, monkeypatch):
    settings, second, waiting, reached = EvaluationSettings(), MeanColour(), [], threading.Event()
    look = lock.Waiting.look
    monkeypatch.setattr(lock.Waiting, "look", lambda self, held: (reached.set(), look(self, held)))
    with ThreadPool(1) as pool:

        class First(MeanColour):
            def __call__(self, images_of_batch):
                waiting.append(pool.apply_async(sets.cached_features, (second, in_memory(images), settings)))
                assert reached.wait(60)
                return super().__call__(images_of_batch)

        first = sets.cached_features(First(), in_memory(images), settings)
        assert torch.equal(waiting[0].get(60).rows, first.rows)
    assert second.calls == 0 and len(waiting) == len(list(cache.iterdir())) == 1


def test_a_group_of_processes_waits_for_no_other_job(cache, images, monkeypatch):
    """Else those that exchange with the one that waits would take it for hung."""
    monkeypatch.setattr(sets, "of_every", lambda value, world: [value])
    monkeypatch.setattr(sets, "in_turn", lambda work, items, world: map(work, items))
    monkeypatch.setattr(lock.Waiting, "look", None)
    group, settings = World(0, 2, torch.device("cpu")), EvaluationSettings()
    inner = MeanColour()

    class Outer(MeanColour):
        def __call__(self, images_of_batch):
            sets.cached_features(inner, in_memory(images), settings, world=group)
            return super().__call__(images_of_batch)

    sets.cached_features(Outer(), in_memory(images), settings)
    assert inner.calls == 1


def test_a_damaged_cache_entry_is_named(cache, images):
    sets.cached_features(MeanColour(), in_memory(images), EvaluationSettings(batch_size=4, max_neighbours_images=6))
    (entry,) = cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:500])
    with pytest.raises(UserError, match=r"not an .npz.*delete it"):
        sets.cached_features(MeanColour(), in_memory(images), EvaluationSettings(batch_size=4, max_neighbours_images=6))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"rows": np.zeros((5, 3), "f4")}, r"rows is \(5, 3\), not finite numbers in \(6, 3\)"),
        ({"indices": np.arange(5)}, r"indices is \(5,\)"),
        ({"indices": np.arange(6) + 4}, "not of these 10"),
        ({"mean": np.full(3, np.nan)}, r"mean is \(3,\), not finite"),
        ({"scatter": np.eye(4)}, r"scatter is \(4, 4\)"),
        ({"count": np.array(7)}, "of 7 images, not of these 10"),
    ],
)
def test_a_whole_cache_entry_of_something_else_is_named(cache, images, changes, fault):
    settings = EvaluationSettings(batch_size=4, max_neighbours_images=6)
    sets.cached_features(MeanColour(), in_memory(images), settings)
    (entry,) = cache.iterdir()
    np.savez(entry, **{**np.load(entry), **changes})
    with pytest.raises(UserError, match=f"feature cache: .*{fault}.*delete it, it is made again"):
        sets.cached_features(MeanColour(), in_memory(images), settings)


def test_a_cache_folder_that_cannot_be_written_costs_a_line_and_not_the_work(tmp_path, images, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/below"):
        monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / place))
        features = sets.cached_features(
            MeanColour(), in_memory(images), EvaluationSettings(batch_size=4, max_neighbours_images=6)
        )
        assert features.moments.count == len(images) and features.content
        assert f"consonar: not kept in the cache folder: {tmp_path}" in capsys.readouterr().err
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    sets.cached_features(MeanColour(), in_memory(images), EvaluationSettings(batch_size=4, max_neighbours_images=6))
    assert "the disk is full" in capsys.readouterr().err and not (tmp_path / "cache").exists()
    assert (tmp_path / "file").read_text() == "mine"


def test_unknown_feature_network():
    with pytest.raises(UserError, match=r"feature_network: unknown 'efficientnet'.*choices: efficientnet-lite0"):
        load_feature_network("efficientnet")


def test_efficientnet_features():
    network = load_feature_network("efficientnet-lite0")
    assert isinstance(network, sets.FeatureNetwork) and len(network.weights_sha256) == 64
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = network(images)
    assert features.shape == (2, network.num_features) and features.dtype == torch.float32
    assert not features.requires_grad
    assert torch.allclose(features[1:], network(images[1:]), atol=1e-4)  # an image's features ignore its batch
    # The documented resize, done by hand, changes nothing.
    resized = torch.nn.functional.interpolate(images, size=(224, 224), mode="bilinear", antialias=True)
    assert torch.allclose(network(resized), features, atol=1e-4)


def test_a_backbone_that_one_caller_moves_stays_where_it_was_for_the_others() -> None:
    first = load_efficientnet_lite0()
    second = load_efficientnet_lite0()
    first.to("meta")
    assert not any(parameter.is_meta for parameter in second.parameters())
