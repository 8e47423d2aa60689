"""Which metrics are calculated, and what they are of: chosen by name, in any order of the files, and recorded."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from consonar import cli, networks
from consonar.errors import UserError
from consonar.evaluation.evaluate import evaluate
from consonar.evaluation.image_sets import ImageSet
from consonar.evaluation.inputs import ReferenceSet, SampleSet
from consonar.evaluation.runs import RunSettings
from consonar.evaluation.sample_metrics import key_of
from consonar.evaluation.settings import EvaluationSettings
from consonar.metrics.distribution import Moments, frechet_distance

ALL = ("fd", "fd-infinity", "fd-per-class", "sfd", "kid", "is", "precision", "recall", "density", "coverage",
       "copy-rate")  # fmt: skip


class Quarters:
    """Means of quarters, of rows as spatial features, and classes by brightness; inputs are rounded as by a network."""

    name, weights_sha256, num_features, num_spatial = "quarters", "s" * 64, 12, 6

    def __call__(self, images):
        return self.outputs(images)[0]

    def outputs(self, images):
        features = functional.adaptive_avg_pool2d(images, 2).flatten(1) * (1 + 1e-7 * len(images)) + 3
        return features, images.mean(3)[:, :, :2].flatten(1), (4 * images.mean((2, 3))).softmax(1)


@pytest.fixture(autouse=True)
def setting(tmp_path, monkeypatch):
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(networks.FEATURE_NETWORKS, "quarters", lambda device: Quarters())


def pictures(count, seed):
    """Of three classes, one after the other, the last ones brighter; some occur twice."""
    rng, labels = np.random.default_rng(seed), np.arange(count) * 3 // count
    images = rng.integers(0, 150, (count, 4, 4, 3)) + 50 * labels[:, None, None, None]
    images[1] = images[0]
    return images.astype(np.uint8), labels


def in_memory(images, labels):
    labels = torch.from_numpy(labels)
    return ImageSet("memory", lambda size: (images[i : i + size] for i in range(0, len(images), size)), lambda: labels)


def measured(order=None, metrics=ALL, network=None, **options):
    """Metrics of 240 samples against 160 and 90 images, all in the file's order or another one."""
    sets = [pictures(count, seed) for seed, count in enumerate((240, 160, 90))]
    if order is not None:
        drawn = [np.random.default_rng(order).permutation(len(labels)) for _, labels in sets]
        sets = [(images[rows], labels[rows]) for (images, labels), rows in zip(sets, drawn, strict=True)]
    (images, labels), *others = sets
    known = dict(zip(("train", "validation"), (in_memory(*other) for other in others), strict=True))
    given = SampleSet(in_memory(images, labels), len(images), 4, "0", labels=torch.from_numpy(labels))
    settings = EvaluationSettings(metrics=metrics, **options)
    return evaluate(given, ReferenceSet("known", known), settings, feature_network=network or Quarters())


@pytest.mark.parametrize("most", [60, 10_000])
def test_no_number_depends_on_the_order_of_files_or_on_batch_sizes(most, monkeypatch):
    """Values, spreads over parts, errors, classes: all that is written."""
    monkeypatch.setattr("consonar.metrics.kernels.SUBSET", 20)
    monkeypatch.setattr("consonar.metrics.kernels.kernel_distance_error.__defaults__", (20,))
    monkeypatch.setattr("consonar.metrics.distribution.InceptionScore.drawn.__func__.__defaults__", (50,))
    options = {"draws": 3, "max_neighbours_images": most}
    one, other = measured(**options), measured(order=5, batch_size=7, **options)
    names = {"sFD(quarters) train", "IS(quarters)", "precision", "coverage", "copy rate (features)"}
    names |= {f"{kind}(quarters) {name}" for kind in ("FD", "FD-infinity", "FD per class", "KID")
              for name in ("train", "validation")}  # fmt: skip
    assert names <= one.metrics.keys() == other.metrics.keys()
    for name, found in one.metrics.items():
        again = other.metrics[name]
        assert again.value == pytest.approx(found.value, rel=1e-4, abs=1e-9), name
        for part in ("spread", "error", "classes"):
            expected = getattr(found, part)
            assert getattr(again, part) == (expected and pytest.approx(expected, rel=1e-4, abs=1e-7)), (name, part)
        assert found.spread is not None or name.startswith(("FD-infinity", "FD per class"))
    for name in ("FD-infinity(quarters) train", "KID(quarters) train"):
        assert one.metrics[name].error > 0
    assert one.metrics["FD per class(quarters) train"].classes.keys() == {"0", "1", "2"}


def test_the_default_is_all_that_keeps_no_more_than_some_vectors():
    assert set(map(key_of, measured(metrics=()).metrics)) == set(ALL) - {"fd-infinity", "fd-per-class"}


@pytest.mark.parametrize("key", ALL)
def test_a_metric_is_calculated_alone_with_the_value_that_it_has_among_others(key):
    alone, among = measured(metrics=(key,)), measured()
    names = {name for name in among.metrics if key_of(name) == key}
    assert alone.metrics.keys() == names != set() and set(alone.unavailable) <= {"copy rate (tokens)"}
    for name in names:
        assert alone.metrics[name].value == pytest.approx(among.metrics[name].value, rel=1e-9)
    assert bool(alone.noise_floor) == (key in ("fd", "fd-infinity", "sfd"))


def test_a_distance_per_class_is_over_all_images_of_a_class():
    """Also where no more than a few images are compared one by one."""
    found = measured(max_neighbours_images=10).metrics["FD per class(quarters) train"]
    (samples, ours), (train, theirs) = pictures(240, 0), pictures(160, 1)
    sides = []
    for images, labels in ((train, theirs), (samples, ours)):
        moments = Moments(12)
        moments.update(Quarters()(torch.from_numpy(images[labels == 1]).permute(0, 3, 1, 2).float() / 127.5 - 1))
        sides += [moments.mean, moments.cov]
    assert found.classes["1"] == pytest.approx(frechet_distance(*sides), rel=1e-3)
    assert found.value == pytest.approx(np.mean(list(found.classes.values())), rel=1e-9)


def test_classes_of_fewer_images_than_ten_for_a_feature_are_said():
    settings = EvaluationSettings(metrics=("fd-per-class",))
    for ours, theirs, few in ((30, 360, 10), (360, 357, 119), (360, 360, None)):
        (images, labels), other = pictures(ours, 0), pictures(theirs, 1)
        given = SampleSet(in_memory(images, labels), ours, 4, "0", labels=torch.from_numpy(labels))
        found = evaluate(
            given, ReferenceSet("r", {"reference": in_memory(*other)}), settings, feature_network=Quarters()
        )
        *lines, paired = found.remarks
        said = f"FD per class(quarters) is biased upwards: the smallest class has {few} images"
        assert [line.startswith(said) for line in lines] == [True] * bool(few) and "by their numbers" in paired


def test_the_bias_of_a_spatial_distance_by_few_images_is_said_too():
    """6 spatial features: of 59 samples and images, not of 60; in a line beside that of the 12 other features."""
    both = ["FD", "FD", "sFD", "sFD"]
    for metrics, count, said in ((("sfd",), 59, both[2:]), (("sfd",), 60, []), (("fd", "sfd"), 59, both)):
        (images, _), other = pictures(count, 0), pictures(count, 1)
        given, known = SampleSet(in_memory(images, other[1]), count, 4, "0"), {"reference": in_memory(*other)}
        found = evaluate(given, ReferenceSet("r", known), metrics=metrics, feature_network=Quarters()).remarks
        assert [line.partition("(quarters) is biased upwards by few ")[0] for line in found] == said
        assert not said or f"{count} draws from the Gaussian of the reference set itself (6 features)" in found[-2]


def of_classes(images, labels, path, class_names):
    """Samples as a job writes them."""
    settings = json.dumps({"origin": {"class_names": class_names}})
    np.savez(path, arr_0=images, labels=labels, **({"settings": settings} if class_names else {}))
    return path


def in_folders(path, images, labels, class_names):
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        (path / class_names[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path / class_names[label] / f"{row:03d}.png")
    return path


def test_labels_that_number_prompts_are_classes_on_neither_side(tmp_path):
    images, labels = pictures(60, 0)
    ours, theirs = (tmp_path / f"{side}.npz" for side in ("classes", "prompts"))
    np.savez(ours, arr_0=images, labels=labels)
    np.savez(theirs, arr_0=images, labels=labels, settings=json.dumps({"prompts": ["a", "b", "c"]}))
    for samples, reference, bare in ((ours, theirs, "reference carries"), (theirs, ours, "samples carry")):
        found = evaluate(samples, reference, metrics=("fd-per-class",), feature_network=Quarters())
        assert found.unavailable == {"FD per class(quarters)": f"the {bare} no labels"} and not found.metrics


def test_settings_of_another_program_stand_in_a_reference_and_not_in_samples(tmp_path):
    images, labels = pictures(60, 0)
    ours, theirs = (tmp_path / f"{side}.npz" for side in ("ours", "theirs"))
    np.savez(ours, arr_0=images, labels=labels)
    np.savez(theirs, arr_0=images, labels=labels, settings="seed=3 cfg=1.5")
    found = evaluate(ours, theirs, metrics=("fd-per-class",), feature_network=Quarters())
    assert found.metrics["FD per class(quarters)"].classes
    with pytest.raises(UserError, match="settings: not valid JSON"):
        evaluate(theirs, ours, metrics=("fd-per-class",), feature_network=Quarters())


def test_classes_are_paired_by_name_and_foreign_ones_are_refused(tmp_path, monkeypatch):
    """A folder counts classes by name; the samples count them the other way."""
    per_class, (images, labels) = EvaluationSettings(metrics=("fd-per-class",)), pictures(60, 0)
    bright = (labels == 2).astype(int)
    folder = in_folders(tmp_path / "known", *pictures(60, 1)[:1], bright, ("z_dark", "a_bright"))
    named = of_classes(images, bright, tmp_path / "named.npz", ["z_dark", "a_bright"])
    found = evaluate(named, folder, per_class, feature_network=Quarters())
    classes = found.metrics["FD per class(quarters)"].classes
    assert classes.keys() == {"0", "1"} and max(classes.values()) < 0.4, classes
    assert not any("by their numbers" in line for line in found.remarks)
    bare = of_classes(images, bright, tmp_path / "bare.npz", None)
    found = evaluate(bare, folder, per_class, feature_network=Quarters())
    assert min(found.metrics["FD per class(quarters)"].classes.values()) > 4, "dark ones against bright ones"
    assert "FD per class(quarters) pairs classes by their numbers: the samples name none" in found.remarks
    other = of_classes(images, bright, tmp_path / "other.npz", ["z_dark", "b_bright"])
    line = "class of reference .*known, which the samples do not have: unknown 'a_bright'.*z_dark, b_bright"
    with monkeypatch.context() as patched, pytest.raises(UserError, match=line):
        patched.delattr("consonar.evaluation.reference.cached_features")  # before the network reads anything
        evaluate(other, folder, per_class, feature_network=Quarters())
    found = evaluate(other, folder, metrics=("kid",), feature_network=Quarters())
    (line,) = found.remarks
    assert line.startswith("samples of 2 classes, a reference of 2, and 1 are in both (by name): every distance")
    five = of_classes(images, np.arange(60) % 5, tmp_path / "five.npz", None)
    (line,) = evaluate(five, folder, metrics=("kid",), feature_network=Quarters()).remarks
    assert line.startswith("samples of 5 classes, a reference of 2, and 2 are in both (by number)")
    plain = {"arr_0": images, "labels": 0 * bright}
    for classes, said in ((None, 1), (1, 0), (2, 1)):  # not known; a generator without classes; only one of its two
        settings = {} if classes is None else {"settings": json.dumps({"num_classes": classes})}
        np.savez(tmp_path / "plain.npz", **plain, **settings)
        found = evaluate(tmp_path / "plain.npz", folder, metrics=("kid",), feature_network=Quarters())
        assert [line.startswith("samples of 1 classes, a reference of 2") for line in found.remarks] == [True] * said
    half = of_classes(images, np.arange(60) % 2, tmp_path / "half.npz", ["a_bright", "z_dark"])
    assert evaluate(half, folder, metrics=("kid",), feature_network=Quarters()).remarks == ()
    np.savez(tmp_path / "most.npz", arr_0=images, labels=np.arange(60) % 20 // 18)
    np.savez(tmp_path / "even.npz", arr_0=images, labels=np.arange(60) % 2)
    (line,) = evaluate(
        tmp_path / "most.npz", tmp_path / "even.npz", metrics=("kid",), feature_network=Quarters()
    ).remarks
    assert line.startswith("samples and reference have their classes in other shares (40% of the images would have to")


@pytest.mark.parametrize("names", [None, ["z_dark", "a_bright"]])
def test_pictures_of_no_known_class_are_left_out_of_what_is_said_of_classes(tmp_path, names):
    """Label -1; the distances within classes are those without these pictures."""
    (images, _), labels = pictures(60, 0), np.arange(60) % 2
    folder = in_folders(tmp_path / "known", pictures(60, 1)[0], labels, ("z_dark", "a_bright"))
    partly, found = np.where(np.arange(60) < 20, -1, labels), []
    for rows, own in ((slice(20, 60), labels), (slice(0, 60), partly)):
        samples = of_classes(images[rows], own[rows], tmp_path / "samples.npz", names)
        found.append(evaluate(samples, folder, metrics=("fd-per-class",), feature_network=Quarters()))
    without, some = (one.metrics["FD per class(quarters)"].classes for one in found)
    assert some == pytest.approx(without, rel=1e-4) and some.keys() == {"0", "1"}
    said = "20 of 60 images (samples) have no label: what is said of classes is without them"
    assert set(found[1].remarks) - set(found[0].remarks) == {said}
    bare = of_classes(images, partly, tmp_path / "reference.npz", None)  # on the other side
    found = evaluate(of_classes(images, labels, tmp_path / "whole.npz", names), bare, feature_network=Quarters())
    assert said.replace("samples", "reference") in found.remarks
    none = of_classes(images, partly * 0 - 1, tmp_path / "none.npz", names)
    found = evaluate(none, folder, metrics=("kid", "fd-per-class"), feature_network=Quarters())
    assert found.unavailable == {"FD per class(quarters)": "the samples carry no labels"} and found.remarks == ()


@pytest.mark.parametrize(("metrics", "needed"), [(("fd", "kid"), 2), (("precision",), 4), (("density",), 2)])
def test_as_many_samples_are_needed_as_the_chosen_metrics_ask_for(tmp_path, metrics, needed):
    reference = with_labels(tmp_path / "reference.npz", None)
    for count in (1, needed - 1, needed):
        np.savez(tmp_path / "few.npz", arr_0=pictures(60, 1)[0][:count])
        asked = (tmp_path / "few.npz", reference, EvaluationSettings(metrics=metrics, max_neighbours_images=60))
        if count == needed:
            assert evaluate(*asked, feature_network=Quarters()).metrics
            continue
        of = " of 3 neighbours" if needed == 4 else ""
        line = f"few.npz: {count} image{'s' * (count > 1)}; a measurement{of} needs {needed} or more$"
        with pytest.raises(UserError, match=line):
            evaluate(*asked, feature_network=Quarters())


def test_a_reference_is_enlarged_only_where_that_is_said(tmp_path):
    images, labels = pictures(60, 0)
    large = images.repeat(2, 1).repeat(2, 2)
    np.savez(tmp_path / "samples.npz", arr_0=large)
    folder = in_folders(tmp_path / "known", images, labels, "abc")
    with pytest.raises(UserError, match=r"its pictures \(reference\) have 4 px, but the samples have 8 px; .*enlarged"):
        evaluate(tmp_path / "samples.npz", folder, metrics=("kid",), feature_network=Quarters())
    for row, picture in enumerate(sorted(folder.rglob("*.png"))[3:]):
        Image.fromarray(large[row]).save(picture)
    found = evaluate(tmp_path / "samples.npz", folder, metrics=("kid",), feature_network=Quarters())
    assert found.remarks == ("3 of 60 images as reference are smaller than the samples and were enlarged to 8 px",)


def test_metrics_are_chosen_on_the_command_line_and_their_protocol_is_said(tmp_path, capsys):
    for name, seed in (("samples", 0), ("reference", 1)):
        images, labels = pictures(60, seed)
        np.savez(tmp_path / f"{name}.npz", arr_0=images, arr_1=labels)
    cli.main([
        "evaluate", str(tmp_path / "samples.npz"), "--reference", str(tmp_path / "reference.npz"), "--metrics",
        "fd-infinity, kid,fd-per-class", "--feature-network", "quarters", "--out", str(tmp_path / "results.json"),
        "--device", "cpu",
    ])  # fmt: skip
    content, printed = json.loads((tmp_path / "results.json").read_text()), capsys.readouterr().out
    assert content["metrics"].keys() == {f"{kind}(quarters)" for kind in ("FD-infinity", "KID", "FD per class")}
    assert content["config"]["metrics"] == ["fd-infinity", "kid", "fd-per-class"]
    assert content["metrics"]["FD per class(quarters)"]["classes"].keys() == {"0", "1", "2"}
    line = f"60 samples, quarters, against {tmp_path / 'reference.npz'}: 60 images as reference"
    assert content["protocol"] == line and line in printed.replace("\n", "")
    assert f"reference: {tmp_path / 'reference.npz'}, 60 pictures" in printed.replace("\n", "")
    assert "error" in printed


def with_labels(path, labels):
    np.savez(path, arr_0=pictures(60, 0)[0], **({} if labels is None else {"labels": labels}))
    return path


def test_labels_that_are_missing_or_do_not_match_are_one_line(tmp_path):
    three, two = np.arange(60) % 3, np.arange(60) % 2
    settings = EvaluationSettings(metrics=("fd-per-class",))
    samples, reference = tmp_path / "samples.npz", tmp_path / "reference.npz"
    for ours, theirs, message in (
        (three, two, "samples of 3 classes, a reference of 2; class 2 is on one side only"),
        (np.r_[three[:-1], 3], np.r_[three[:-1], 3], "class 3 has 1 sample"),
        (three, two.astype(float), r"labels is float64 \(60,\); expected 1-d integers for 60 images"),
        (three, two[:5], r"labels is int64 \(5,\); expected 1-d integers for 60 images"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            evaluate(with_labels(samples, ours), with_labels(reference, theirs), settings, feature_network=Quarters())
        assert "\n" not in str(caught.value)
    for ours, theirs, who in ((None, three, "samples carry"), (three, None, "reference carries")):
        found = evaluate(
            with_labels(samples, ours), with_labels(reference, theirs), settings, feature_network=Quarters()
        )
        assert found.metrics == {} and found.unavailable == {"FD per class(quarters)": f"the {who} no labels"}


def test_metrics_that_are_not_there_are_one_line():
    with pytest.raises(UserError, match=r"metrics: unknown 'fid' \(did you mean.*choices: fd, fd-infinity"):
        measured(metrics=("kid", "fid"))
    with pytest.raises(UserError, match="metrics: unknown 'fid'"):
        RunSettings(metrics=("fd", "fid"))
    with pytest.raises(UserError, match="metrics: kid; the rows of a run are ranked by fd, add it"):
        RunSettings(metrics=("kid",))
    assert RunSettings(metrics=("kid", "fd")).wants("fd")


@dataclass
class SimpleNetwork:
    """The features of `Quarters`, and none of the rest."""

    name: str
    weights_sha256: str
    num_features: int

    def __call__(self, images):
        return Quarters()(images)


def test_a_metric_that_is_asked_for_is_a_number_or_a_reason():
    scoring = Quarters()
    plain = SimpleNetwork(scoring.name, scoring.weights_sha256, scoring.num_features)
    found = measured(metrics=("fd", "sfd", "is"), network=plain)
    assert found.metrics.keys() == {"FD(quarters) train", "FD(quarters) validation"}
    assert found.unavailable == dict.fromkeys(("sfd", "is"), "quarters gives nothing it is made of")
    assert not measured(metrics=(), network=plain).unavailable.keys() & {"sfd", "is"}  # nobody asked
    with pytest.raises(UserError, match=r"^metrics: sfd: quarters gives nothing .*choose --feature-network inception"):
        measured(metrics=("sfd",), network=plain)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--metrics", "fid", "metrics: unknown 'fid'"),
        ("--feature-network", "nope", "feature_network: unknown 'nope'"),
        ("--feature-network", "dinov2:", "dinov2: names no folder; write dinov2:FOLDER"),
        ("--draws", "31", "60 images; 31 draws"),
    ],
)
def test_what_is_wrong_with_the_options_is_said_before_the_reference_is_opened(
    tmp_path, capsys, monkeypatch, option, value, message
):
    monkeypatch.delattr("consonar.cli.evaluate.open_target")
    with_labels(tmp_path / "samples.npz", None)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["evaluate", str(tmp_path / "samples.npz"), "--reference", "openmoji", option, value])
    assert message in capsys.readouterr().err


def test_an_option_that_a_check_does_not_read_is_named_as_it_was_given(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["evaluate", "--check", str(tmp_path / "results.json"), "--out", "new.json"])
    assert "--out: 'new.json' is read only without --check" in capsys.readouterr().err
