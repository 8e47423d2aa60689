"""DINOv2 and CLIP as feature networks: tiny ones that the test makes and saves as transformers does."""

import builtins
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from consonar import cli, hub
from consonar.errors import UserError
from consonar.evaluation.check import check_results
from consonar.evaluation.evaluate import evaluate
from consonar.evaluation.settings import EvaluationSettings
from consonar.networks import FeatureNetwork, ScoringNetwork, load_feature_network
from consonar.networks.vision_transformers import KINDS

MEANS = {"dinov2": (0.485, 0.456, 0.406), "clip": (0.48145466, 0.4578275, 0.40821073)}
STDS = {"dinov2": (0.229, 0.224, 0.225), "clip": (0.26862954, 0.26130258, 0.27577711)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By kind: a folder, and the model in it."""
    transformers = pytest.importorskip("transformers")
    place, made = tmp_path_factory.mktemp("models"), {}
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    dinov2 = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=70, patch_size=14
    )
    vision = {**small, "image_size": 32, "patch_size": 8}
    text = {**small, "vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 1, "bos_token_id": 0}
    clip = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    for kind, model in (("dinov2", transformers.Dinov2Model(dinov2)), ("clip", transformers.CLIPModel(clip))):
        for weight in model.parameters():  # so that pictures are told apart
            torch.nn.init.normal_(weight, std=0.3)
        model.eval().save_pretrained(place / f"tiny-{kind}")
        made[kind] = place / f"tiny-{kind}", model
    return made


@pytest.fixture
def pictures(rng):
    return torch.randint(0, 256, (5, 3, 48, 48), generator=rng).float() / 127.5 - 1


def resized(pictures, kind, size):
    """What Pillow makes of 8-bit pictures, normalised."""
    levels = ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    arrays = [np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in levels]
    mean, std = (torch.tensor(values[kind]).view(3, 1, 1) for values in (MEANS, STDS))
    return (torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255 - mean) / std


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [48, 300])
def test_pictures_are_made_ready_as_pillow_does(models, rng, kind, size):
    coarse = torch.randint(0, 256, (2, 3, 12, 12), generator=rng).float() / 127.5 - 1
    pictures = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    network = load_feature_network(f"{kind}:{models[kind][0]}")
    assert network.image_size == (224 if kind == "dinov2" else 32)
    found, expected = network.pixels(pictures), resized(pictures, kind, network.image_size)
    level = 1 / 255 / min(STDS[kind])
    # Pillow rounds between rows and columns, too.
    assert (found - expected).abs().max() <= 2.01 * level and (found - expected).abs().mean() < 0.4 * level


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_model(models, pictures, kind):
    folder, model = models[kind]
    state = torch.random.get_rng_state()
    network = load_feature_network(f"{kind}:{folder}")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(network, FeatureNetwork) and not isinstance(network, ScoringNetwork)
    features = network(pictures)
    assert features.shape == (5, network.num_features) == (5, 16 if kind == "dinov2" else 12)
    assert features.dtype == torch.float32 and not features.requires_grad
    with torch.no_grad():
        pixels = network.pixels(pictures)
        if kind == "dinov2":
            expected = model(pixels).last_hidden_state[:, 0]  # the class token
        else:
            expected = model.visual_projection(model.vision_model(pixels).pooler_output)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-2
    torch.testing.assert_close(network(pictures[3:4]), features[3:4], rtol=1e-4, atol=1e-5)


def test_the_name_is_short_and_the_hash_is_of_the_weights(models, tmp_path):
    folder, model = models["dinov2"]
    shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)
    first, same = (load_feature_network(f"dinov2:{place}") for place in (folder, tmp_path / "elsewhere" / folder.name))
    assert first.name == same.name == "dinov2:tiny-dinov2" and first.weights_sha256 == same.weights_sha256
    with torch.no_grad():
        model.layernorm.bias[0] += 1
    model.save_pretrained(tmp_path / "other")
    with torch.no_grad():
        model.layernorm.bias[0] -= 1
    assert load_feature_network(f"dinov2:{tmp_path / 'other'}").weights_sha256 != first.weights_sha256


def test_a_name_of_the_hub_is_two_files(models, tmp_path, monkeypatch):
    folder, _ = models["clip"]
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        return str(folder / file)

    monkeypatch.setattr(hub, "download", download)
    network = load_feature_network("clip:owner/tiny-clip")
    assert asked == [("owner/tiny-clip", "config.json"), ("owner/tiny-clip", "model.safetensors")]
    assert network.name == "clip:tiny-clip"
    assert network.weights_sha256 == load_feature_network(f"clip:{folder}").weights_sha256

    def offline(repository, file):
        raise OSError("no network")

    monkeypatch.setattr(hub, "download", offline)
    with pytest.raises(UserError, match=r"cannot download config\.json of .*owner/tiny-clip \(no network\).*put it at"):
        load_feature_network("clip:owner/tiny-clip")
    put = tmp_path / "cache" / "released" / "owner" / "tiny-clip"
    shutil.copytree(folder, put)  # by hand
    assert load_feature_network("clip:owner/tiny-clip").weights_sha256 == network.weights_sha256


def test_what_is_no_such_network_is_one_line(models, tmp_path, monkeypatch, capfd):
    dinov2, clip = (models[kind][0] for kind in ("dinov2", "clip"))
    damaged, lacking, empty = (tmp_path / name for name in ("damaged", "lacking", "empty"))
    for copy in (damaged, lacking):
        shutil.copytree(dinov2, copy)
    (damaged / "model.safetensors").write_bytes((dinov2 / "model.safetensors").read_bytes()[:500])
    deeper = json.loads((dinov2 / "config.json").read_text()) | {"num_hidden_layers": 3}
    (lacking / "config.json").write_text(json.dumps(deeper))
    empty.mkdir()
    for name, message in (
        ("dinov2", "feature_network: unknown 'dinov2'.*choices: efficientnet-lite0.*dinov2:FOLDER, clip:FOLDER"),
        ("dinov2:", "dinov2: names no folder; write dinov2:FOLDER or dinov2:OWNER/NAME"),
        (f"dinov2:{tmp_path / 'nowhere'}", "no folder .*nowhere; choices: a folder, OWNER/NAME of the hub"),
        (f"dinov2:{clip}", r"model_type in config\.json: unknown 'clip'; choices: dinov2"),
        (f"clip:{dinov2}", "unknown 'dinov2'; choices: clip"),
        (f"dinov2:{empty}", r"config\.json"),
        (f"dinov2:{damaged}", "damaged: not a network that transformers saved"),
        (f"dinov2:{lacking}", r"lacking lacks \d+ weights, the first encoder"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_feature_network(name)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # transformers says nothing of its own
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.partition(".")[0] == "transformers":
            raise ImportError("No module named 'transformers'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"No module.*pip install 'consonar\[text\]'"):
        load_feature_network(f"dinov2:{dinov2}")


def test_evaluate_measures_with_one(models, tmp_path, monkeypatch):
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))
    for seed, name in enumerate(("samples", "reference")):
        images = np.random.default_rng(seed).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    cli.main([
        "evaluate", str(tmp_path / "samples.npz"), "--reference", str(tmp_path / "reference.npz"), "--device", "cpu",
        "--feature-network", f"clip:{models['clip'][0]}", "--metrics", "fd,kid", "--draws", "2", "--out",
        str(tmp_path / "r.json"),
    ])  # fmt: skip
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["metrics"].keys() == {"FD(clip:tiny-clip)", "KID(clip:tiny-clip)"}
    assert content["feature_network"]["name"] == "clip:tiny-clip" and "clip:tiny-clip" in content["protocol"]


def test_results_say_what_loads_the_network_again(models, tmp_path, monkeypatch):
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))
    for seed, name in enumerate(("samples", "reference")):
        images = np.random.default_rng(seed).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    network = load_feature_network(f"dinov2:{models['dinov2'][0]}")
    settings = EvaluationSettings(metrics=("fd", "kid", "coverage"))
    found = evaluate(tmp_path / "samples.npz", tmp_path / "reference.npz", settings, feature_network=network)
    assert found.feature_network["place"] == f"dinov2:{models['dinov2'][0]}"
    found.to_json(tmp_path / "results.json")
    checked = check_results(tmp_path / "results.json")
    assert checked.reproduced and len(checked.numbers) == 3


def test_a_network_that_has_moved_is_named_to_the_check(models, tmp_path, monkeypatch):
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path / "cache"))
    kept, images = tmp_path / "kept", np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    shutil.copytree(models["dinov2"][0], kept)
    np.savez(tmp_path / "a.npz", arr_0=images)
    np.savez(tmp_path / "b.npz", arr_0=images[::-1] // 2)
    found = evaluate(tmp_path / "a.npz", tmp_path / "b.npz", feature_network=f"dinov2:{kept}", metrics=("fd",))
    found.to_json(results := tmp_path / "results.json")
    moved = kept.rename(tmp_path / "other")
    with pytest.raises(
        UserError, match=r"kept: no folder .* named by SAMPLES, --reference, --tokenizer, --feature-netw"
    ):
        check_results(results)
    checked = check_results(results, feature_network=f"dinov2:{moved}")
    assert checked.reproduced and checked.differs == [] and checked.numbers[0].name == "FD(dinov2:kept)"
    content = json.loads(results.read_text())
    for other, line in (
        (f"clip:{models['clip'][0]}", "is clip:tiny-clip, SHA"),
        (f"dinov2:{moved}", "is of dinov2:kept, 0"),
    ):
        with pytest.raises(UserError, match=rf"^--feature-network: {other} .*{line}.*; say where that lies now"):
            check_results(results, feature_network=other)
        content["feature_network"]["sha256"] = "0" * 64
        results.write_text(json.dumps(content))
