"""Tokens, models, runs and samples of another origin are refused where they meet; the line says where they differ."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY_VQ, Pictures, picture
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature

from consonar.cli import main
from consonar.components import load_tokenizer, read_origin, save_generator, save_tokenizer
from consonar.data import loader
from consonar.data.store_format import METADATA_FILE
from consonar.data.tokenizing import write_token_store
from consonar.errors import UserError
from consonar.evaluation import runs
from consonar.evaluation.entropy import Sharpness
from consonar.evaluation.evaluate import evaluate
from consonar.evaluation.inputs import encode_reference, open_reference
from consonar.evaluation.runs import RunSettings, evaluate_run
from consonar.origin import Origin, check
from consonar.tokenizers.vq import VQTokenizer
from consonar.training.config import DataConfig
from consonar.training.objectives.alignment import GuardConfig
from consonar.training.objectives.controls import CrossEntropy, CrossEntropyConfig
from consonar.training.objectives.reconstruction import ReconstructionConfig
from consonar.training.run import train

CE = CrossEntropyConfig(rewards={"mse": 1.0}, guard=GuardConfig(measure_kl=False))


@pytest.fixture
def other_tokenizer(tmp_path):
    """Same shape and vocabulary, other weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        save_tokenizer(VQTokenizer(TINY_VQ, name="other-vq"), tmp_path / "other-vq")
    return tmp_path / "other-vq"


@pytest.fixture
def generator_of(tiny_generator, tokenizer, tokenizer_folder, tmp_path):
    """Stores a generator of as many classes as it is given names."""

    def make(*names, known=True, seed=0, fingerprint=None, folder="generator"):
        origin = Origin(
            tokenizer=str(tokenizer_folder), tokenizer_fingerprint=fingerprint or tokenizer.fingerprint,
            class_names=names if known else None,
        )  # fmt: skip
        save_generator(tiny_generator(num_classes=len(names), seed=seed), tmp_path / folder, origin)
        return tmp_path / folder

    return make


def pictures(folder, count=6, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture(first + index).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def post_train(make_config, tmp_path):
    def run(init, images, name="run", **changes):
        data = DataConfig(images=str(images), **changes.pop("data", {}))
        loop = {"steps": 1, "batch_size": 4} | changes.pop("loop", {})
        how = {key: changes.pop(key) for key in ("resume", "stop_at") if key in changes}
        changes = {"objective": CE, **changes}
        return train(
            make_config(loop=loop, init=str(init), tokenizer=None, model=None, data=data, **changes),
            tmp_path / name, quiet=True, **how,
        )  # fmt: skip

    return run


def test_two_origins_differ_at_the_first_class_and_at_the_hash():
    names = tuple("abcdef")
    swapped = Origin(class_names=(*names[:4], "f", "e"))
    for theirs, words in (
        (swapped, "class 4 is 'e' (6 classes), in B it is 'f' (6)"),
        (Origin(class_names=names[:5]), "class 5 is 'f' (6 classes), in B it is none (5)"),
    ):
        with pytest.raises(UserError, match=rf"^here: {re.escape(words)}; do this$"):
            check("here", Origin(class_names=names), theirs, "B", "do this")
    one, two = (Origin(tokenizer="t", tokenizer_fingerprint=digit * 64) for digit in "12")
    with pytest.raises(UserError, match=r"^here: the tokenizer is 't' \(1{12}\), in B it is 't' \(2{12}\); do this$"):
        check("here", one, two, "B", "do this")
    for known in (one, swapped):  # what is not known differs from nothing
        check("here", known, Origin(), "B", "do this")
        check("here", Origin(), known, "B", "do this")
    check("here", Origin(class_names=("caf\u00e9",)), Origin(class_names=("cafe\u0301",)), "B", "do this")


def test_post_training_on_pictures_without_labels_is_refused_for_several_classes(generator_of, post_train, tmp_path):
    flat = pictures(tmp_path / "flat")
    with pytest.raises(UserError, match=r"no label, and there are 3 classes; .*--label-default.*class-dropout 1"):
        post_train(generator_of(*"abc"), flat)
    run = post_train(generator_of(*"abc"), flat, data={"label_default": "c"})
    assert read_origin(run).class_names == tuple("abc")
    post_train(generator_of("all"), flat, "unconditional")


def test_a_missing_label_never_becomes_a_class(generator_of, post_train, tmp_path, monkeypatch):
    """In memory and read in every epoch; with every class dropped it is not needed: the null class is what is fed."""
    features = Features(image=ImageFeature(), label=Value("int64"))
    rows = {"image": [picture(i) for i in range(8)], "label": [2] * 7 + [-1]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "d")
    images, seen = f"arrow:{tmp_path / 'd'}", []
    spy_on_conditions(monkeypatch, seen)
    for memory in (4e9, 1):
        monkeypatch.setattr(loader, "MAX_MEMORY", memory)
        with pytest.raises(UserError, match="picture 7: no label, and there are 3 classes"):
            post_train(generator_of(*"abc"), images)
        assert seen == [] and not (tmp_path / "run" / "model").exists()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        dropped = CrossEntropyConfig(rewards={"mse": 1.0}, guard=GuardConfig(measure_kl=False), class_dropout=1.0)
        post_train(generator_of(*"abc"), images, f"dropped {memory:g}", objective=dropped, loop={"batch_size": 8})
        assert seen.pop() == [3] * 8


def spy_on_conditions(monkeypatch, seen):
    original = CrossEntropy.prepare

    def spy(self, model, batch, step):
        rollout = original(self, model, batch, step)
        seen.append(rollout.condition.tolist())
        return rollout

    monkeypatch.setattr(CrossEntropy, "prepare", spy)


@pytest.mark.parametrize("memory", [4e9, 1])
@pytest.mark.parametrize("label", [3, 7])
def test_a_label_beyond_the_classes_does_not_train_the_null_class(
    label, memory, generator_of, post_train, tmp_path, monkeypatch
):
    monkeypatch.setattr(loader, "MAX_MEMORY", memory)
    features = Features(image=ImageFeature(), label=Value("int64"))
    rows = {"image": [picture(i) for i in range(4)], "label": [0, 1, 2, label]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "d")
    with pytest.raises(UserError, match=f"picture 3: label {label}, and there are 3 classes"):
        post_train(generator_of(*"abc"), f"arrow:{tmp_path / 'd'}")


def test_classes_in_another_order_are_refused_by_init_on_tokens_and_images(
    generator_of, make_config, stores, post_train, tmp_path
):
    start = generator_of("b", "a", "c")
    for model in (None, make_config().model):
        with pytest.raises(UserError, match=r"data\.tokens: .*class 0 is 'a' \(3 classes\), in .* it is 'b' \(3\)"):
            train(make_config(init=str(start), model=model), tmp_path / "run", quiet=True)
    for name in "abc":
        pictures(tmp_path / "named" / name)
    with pytest.raises(UserError, match=r"data\.images: .*class 0 is 'a' .*it is 'b'.*--classes FILE"):
        post_train(start, tmp_path / "named")
    (tmp_path / "order.txt").write_text("b\na\nc\n")
    run = post_train(start, tmp_path / "named", data={"classes": str(tmp_path / "order.txt")})
    assert read_origin(run).class_names == ("b", "a", "c")


def test_a_run_on_classes_without_names_keeps_those_of_its_start(generator_of, post_train, tmp_path):
    features = Features(image=ImageFeature(), label=Value("int64"))
    rows = {"image": [picture(i) for i in range(4)], "label": [0, 1, 0, 1]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "d")
    between = post_train(generator_of("dog", "cat"), f"arrow:{tmp_path / 'd'}", "between")
    assert read_origin(between).class_names == ("dog", "cat")
    for name in ("cat", "dog"):
        pictures(tmp_path / "named" / name)
    with pytest.raises(UserError, match=r"class 0 is 'cat' .* it is 'dog'"):
        post_train(between, tmp_path / "named", "after")


def test_validation_with_classes_in_another_order_is_refused(make_config, stores, tokenizer, tmp_path):
    held_out = Pictures(6)
    held_out.class_names = tuple("abd")
    write_token_store(tmp_path / "held", held_out, tokenizer)
    data = DataConfig(tokens=str(stores[0]), validation_tokens=str(tmp_path / "held"))
    with pytest.raises(UserError, match=r"data\.validation_tokens: .*class 2 is 'd' .* it is 'c'"):
        train(make_config(data=data), tmp_path / "run", quiet=True)


def test_another_tokenizer_of_the_same_shape_is_refused_by_sample(generator_of, other_tokenizer, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(
            ["sample", str(generator_of(*"abc")), "--tokenizer", str(other_tokenizer), "--out", str(tmp_path / "a.png")]
        )
    line = capsys.readouterr().err
    fingerprint = load_tokenizer(other_tokenizer).fingerprint[:12]
    assert stop.value.code == 2 and f"'other-vq' ({fingerprint})" in line and "--tokenizer" in line
    assert not (tmp_path / "a.png").exists()


def test_samples_carry_their_origin_and_meet_no_reference_of_another_tokenizer(
    generator_of, other_tokenizer, tokenizer, tmp_path
):
    for name in "abc":
        for split in ("train", "val"):
            pictures(tmp_path / "data" / split / name, 2)
    out = tmp_path / "a.npz"
    main(["sample", str(generator_of(*"abc")), "--num-samples", "8", "--out", str(out)])
    with np.load(out) as arrays:
        origin = json.loads(str(arrays["settings"]))["origin"]
    assert origin["class_names"] == list("abc") and origin["tokenizer_fingerprint"] == tokenizer.fingerprint
    reference = open_reference(str(tmp_path / "data"), 16)
    assert reference.about.startswith("train: 6 pictures, 3 classes (a … c), 0 without a label; validation: 6")
    with pytest.raises(UserError, match="the tokenizer is 'other-vq'"):
        evaluate(out, encode_reference(reference, load_tokenizer(other_tokenizer)))


def test_match_is_refused_for_another_tokenizer_or_other_classes(generator_of, tiny_generator, tokenizer, tmp_path):
    for split in ("train", "val"):
        for name in "abc":
            pictures(tmp_path / "data" / split / name, 2)
    sharpness, own = Sharpness(str(tmp_path / "data"), tokenizer, 4), tiny_generator()
    own = own.requires_grad_(False)
    with pytest.raises(UserError, match=r"--match: .*the tokenizer is .*\(0{12}\), in the run"):
        sharpness.match(own, generator_of(*"abc", fingerprint="0" * 64))
    with pytest.raises(UserError, match=r"--match: .*class 0 is 'c' .*in the reference it is 'a'"):
        sharpness.match(own, generator_of(*"cba"))
    assert sharpness.match(own, generator_of(*"abc")) == pytest.approx(1, abs=2e-3)
    own_order = Sharpness(str(tmp_path / "data"), tokenizer, 4, Origin(class_names=tuple("cdba")))
    labels = [label for batch in own_order.batches(tiny_generator(num_classes=4)) for label in batch.condition.tolist()]
    assert labels == [3, 3, 2, 2, 0, 0]  # the reference's a, a, b, b, c, c


class Colour:
    name, weights_sha256, num_features = "mean-colour", "0", 3

    def __call__(self, images):
        return images.mean((2, 3))


def test_entropy_is_not_measured_under_labels_of_other_classes(
    generator_of, make_config, stores, tmp_path, monkeypatch
):
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runs, "load_feature_network", lambda name, device: Colour())
    for split in ("train", "val"):
        for name in "bac":
            pictures(tmp_path / "data" / split / name, 2)
    run = train(make_config(init=str(generator_of(*"abc")), loop={"steps": 1}), tmp_path / "run", quiet=True)
    few = RunSettings(num_samples=8, draws=1, batch_size=8)
    same = evaluate_run(run, few, reference=str(tmp_path / "data"))
    assert "entropy (teacher-forced)" in same["rows"][0]["metrics"] and same["unavailable"] == {}
    assert same["origin"]["class_names"] == ("a", "b", "c") and same["origin"]["init_sha256"]
    (tmp_path / "data" / "val" / "c").rename(tmp_path / "data" / "val" / "d")
    said = []
    other = evaluate_run(run, few, reference=str(tmp_path / "data"), overwrite=True, progress=said.append)
    reason = other["unavailable"]["entropy (teacher-forced)"]
    assert "class 3 is 'd' (4 classes), in the generator it is none (3)" in reason
    assert "entropy (teacher-forced)" not in other["rows"][0]["metrics"] and any(reason in line for line in said)


def test_a_run_goes_on_with_its_tokens_wherever_they_lie_but_not_with_others(
    make_config, stores, generator_of, tokenizer, tmp_path
):
    start = generator_of(*"abc")
    for source, name in zip(stores, ("tokens", "tokens-validation"), strict=True):
        shutil.copytree(source, tmp_path / name)

    def config(folder, init=start):
        return make_config(
            data=DataConfig(tokens=str(tmp_path / folder)), init=str(init), loop={"steps": 4, "save_every": 2}
        )

    run = train(config("tokens"), tmp_path / "run", stop_at=2, quiet=True)
    for name in ("tokens", "tokens-validation"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    train(config("moved-tokens"), run, resume=True, stop_at=3, quiet=True)

    write_token_store(tmp_path / "tokens", Pictures(40, first=500), tokenizer)
    shutil.copytree(stores[1], tmp_path / "tokens-validation")
    with pytest.raises(UserError, match=r"^--resume: the data is 'pictures' \(\w{12}\), in the start of .*moved"):
        train(config("tokens"), run, resume=True, quiet=True)

    generator_of(*"abc", seed=5)
    with pytest.raises(UserError, match=r"^--resume: the start model is .* \(\w{12}\), in the start of"):
        train(config("moved-tokens"), run, resume=True, quiet=True)
    generator_of(*"abc")
    shutil.rmtree(tmp_path / "moved-tokens-validation")
    write_token_store(tmp_path / "moved-tokens-validation", Pictures(10, first=900), tokenizer)
    with pytest.raises(UserError, match=r"^--resume: the validation data is"):
        train(config("moved-tokens"), run, resume=True, quiet=True)


def test_a_run_goes_on_with_its_pictures_wherever_they_lie_but_not_with_others(generator_of, post_train, tmp_path):
    start, images, loop = generator_of("all"), pictures(tmp_path / "images"), {"steps": 3}
    post_train(start, images, loop=loop, stop_at=1)
    images.rename(tmp_path / "moved")
    post_train(start, tmp_path / "moved", loop=loop, stop_at=2, resume=True)
    picture(77).save(tmp_path / "moved" / "3.png")
    with pytest.raises(UserError, match=r"^--resume: the data is 'imagefolder:"):
        post_train(start, tmp_path / "moved", loop=loop, resume=True)
    picture(3).save(tmp_path / "moved" / "3.png")
    shutil.copytree(start, tmp_path / "kept")
    generator_of("all", seed=5)
    with pytest.raises(UserError, match=r"^--resume: the start model is"):
        post_train(start, tmp_path / "moved", loop=loop, resume=True)
    post_train(tmp_path / "kept", tmp_path / "moved", loop=loop, resume=True)


def test_runs_and_stores_of_older_versions_go_on(make_config, stores, tmp_path):
    """Without hashes nothing is known of the content, and the places are compared as before."""
    for source, name in zip(stores, ("tokens", "tokens-validation"), strict=True):
        shutil.copytree(source, tmp_path / name)
        metadata = json.loads((tmp_path / name / METADATA_FILE).read_text())
        del metadata["content_sha256"]
        (tmp_path / name / METADATA_FILE).write_text(json.dumps(metadata))
    config = make_config(data=DataConfig(tokens=str(tmp_path / "tokens")), loop={"steps": 4})
    run = train(config, tmp_path / "run", stop_at=2, quiet=True)
    (run / "origin.json").unlink()
    train(config, run, resume=True, stop_at=3, quiet=True)
    elsewhere = make_config(data=DataConfig(tokens=str(stores[0])), loop={"steps": 4})
    with pytest.raises(UserError, match=r"--resume: data\.tokens is"):
        train(elsewhere, run, resume=True, quiet=True)


def test_training_says_what_it_reads(make_config, tmp_path, capsys):
    train(make_config(loop={"steps": 1}), tmp_path / "run")
    assert "tiny: 40 pictures, 3 classes (a … c), 0 without a label" in capsys.readouterr().out


def test_a_tokenizer_is_trained_on_from_one_of_its_shape_and_resumed_on_that_alone(
    make_config, picture_folder, other_tokenizer, tmp_path
):
    config = make_config(
        init=str(other_tokenizer), tokenizer=None, model=TINY_VQ, data=DataConfig(images=str(picture_folder)),
        objective=ReconstructionConfig(perceptual_weight=0, revive_after=0),
        optim={"lr": 1e-6, "min_lr": 0.0}, loop={"steps": 2, "save_every": 1},
    )  # fmt: skip
    run = train(config, tmp_path / "run", quiet=True)
    start, trained = (load_tokenizer(folder).state_dict() for folder in (other_tokenizer, run))
    away = max(float((trained[key] - start[key]).abs().max()) for key in start)
    assert 0 < away < 1e-5 and json.loads((run / "origin.json").read_text())["init_sha256"]
    with pytest.raises(UserError, match=r"^model.vocab_size: 16, but the tokenizer in .* has 32"):
        train(replace(config, model=replace(TINY_VQ, vocab_size=16)), tmp_path / "smaller", quiet=True)
    rule = not TINY_VQ.l2_normalize
    with pytest.raises(UserError, match=rf"^model.l2_normalize: {rule}, but the tokenizer in .* has {not rule}"):
        train(replace(config, model=replace(TINY_VQ, l2_normalize=rule)), tmp_path / "other", quiet=True)

    parts = train(config, tmp_path / "parts", stop_at=1, quiet=True)
    save_tokenizer(VQTokenizer(TINY_VQ, name="other-vq"), other_tokenizer)
    with pytest.raises(UserError, match=r"^--resume: the start model is .* \(\w{12}\), in the start of"):
        train(config, parts, resume=True, quiet=True)
