"""Rewards in closed form, their weighted sum, a user's own, and what is refused."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import rated
from rounding import assert_rounding

from consonar.errors import UserError
from consonar.networks.discriminator import PatchDiscriminator, load_discriminator, save_discriminator
from consonar.records import Captions
from consonar.training.captions import captions_of_pictures
from consonar.training.rewards import PlacedReward, Resources, Rewards, build_rewards, check_rewards, squared_errors
from consonar.types import Grid, ImageBatch, TextCondition

ON_CPU = Resources(torch.device("cpu"))


def constant(*values: float) -> torch.Tensor:
    """One image of 16 px for each value."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)


def measured(name: str, images, originals):
    return rated(build_rewards({name: 1.0}, ON_CPU), images, originals)[0].tolist()


def refused(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pixel_rewards_in_closed_form():
    images, originals = constant(0.5, 1.0, -2.0), constant(0.0, -1.0, 1.0)
    assert measured("mse", images, originals) == pytest.approx([-0.25, -4, -9])  # not clamped, as in the article
    assert measured("l1", images, originals) == pytest.approx([-0.5, -2, -3])
    red = constant(0.5) * torch.tensor([2.0, 0, 0]).view(3, 1, 1)
    assert measured("mse", red, constant(0.0)) == measured("l1", red, constant(0.0)) == pytest.approx([-1 / 3])
    # The range is 2: 10 log10(4 / 0.25); black for white has the whole range as its error; -2 is shown as -1.
    assert measured("psnr", images, originals) == pytest.approx([10 * math.log10(16), 0, 0])
    assert measured("psnr", constant(0.3), constant(0.3)) == [100]
    # Flat images have no structure to differ in: (2 x y + c1) / (x^2 + y^2 + c1) on [0, 1].
    assert measured("ssim", images, originals) == pytest.approx(
        [(2 * 0.75 * 0.5 + 1e-4) / (0.75**2 + 0.5**2 + 1e-4), 1e-4 / (1 + 1e-4), 1e-4 / (1 + 1e-4)], abs=1e-6
    )
    assert measured("ssim", constant(0.3), constant(0.3)) == pytest.approx([1], abs=1e-6)


def test_captions_that_a_reward_cannot_read_are_told_before_any_is_encoded():
    pets = SimpleNamespace(name="pets", captions=["a dog", "a cat\na corgi in a teacup"])
    line = refused(captions_of_pictures, pets, object(), print, {"mse": 1.0, "compositional": 0.0})
    assert line.startswith(
        "objective.rewards: 'compositional' cannot read data.images: pets, row 1 of the data, counted from 0: "
    )
    assert "'a corgi in a teacup'" in line
    assert "'clip' reads captions" in refused(captions_of_pictures, pets, None, print, ["clip"])
    assert captions_of_pictures(pets, None, print, ["mse"]) is None


def test_half_precision_is_measured_in_full():
    images, originals = constant(0.5 + 2**-8).bfloat16(), constant(0.0).bfloat16()
    assert measured("mse", images, originals) == pytest.approx([-((0.5 + 2**-8) ** 2)])  # not what bfloat16 makes of it

    def own(images, originals, batch):
        assert images.dtype == originals.dtype == torch.float32
        return images[:, 0, 0, 0]

    assert rated(Rewards({"own": own}, {"own": 2.0}), images, originals)[0].dtype == torch.float32


def test_the_total_is_the_weighted_sum_and_a_weight_of_0_only_watches():
    rewards = build_rewards({"mse": 2.0, "l1": 0.5, "psnr": 0.0}, ON_CPU)
    images, originals = constant(0.5, 1.0), constant(0.0, -1.0)
    total, values, maps = rated(rewards, images, originals, Grid(2, 4))
    assert list(values) == ["mse", "l1", "psnr"]
    assert total.tolist() == pytest.approx([-2 * 0.25 - 0.5 * 0.5, -2 * 4 - 0.5 * 2])
    torch.testing.assert_close(maps, total[:, None, None].expand(2, 2, 4))


def test_every_chunk_gets_its_own_rows():
    seen = []

    def labels(images, originals, batch):
        seen.append(batch)
        assert torch.equal(images, originals) and not torch.is_grad_enabled()
        words.extend(batch.captions.read())
        return images[:, 0, 0, 0] - batch.condition.features[:, 0, 0] + batch.indices

    words: list[str] = []
    features = torch.arange(5.0).view(5, 1, 1).expand(5, 2, 3)
    captions = Captions(["a dog", "a cat"], torch.tensor([1, 0, 0, 1, 1]))
    condition = TextCondition(features, torch.ones(5, 2).bool())
    batch = ImageBatch(constant(*range(5)), condition, torch.arange(5) * 10, captions)
    total, _, _ = Rewards({"labels": labels}, {"labels": 1.0}, chunk=2).measure(batch.images, batch)
    assert total.tolist() == [0, 10, 20, 30, 40]
    assert [len(part.indices) for part in seen] == [2, 2, 1]
    assert words == ["a cat", "a dog", "a dog", "a cat", "a cat"]
    assert seen[1].condition.mask.shape == (2, 2) and torch.equal(seen[0].indices, torch.arange(2) * 10)


def test_groups_of_images_share_an_original(rng):
    """G images of each original, one after the other: the same numbers as with the originals repeated."""
    originals, noise = torch.rand(3, 3, 32, 32, generator=rng), torch.randn(12, 3, 32, 32, generator=rng)
    repeated = originals.repeat_interleave(4, 0)
    images, labels = repeated + 0.1 * noise, torch.arange(3)

    def labelled(images, originals, batch):
        assert torch.equal(originals, repeated[batch.condition * 4]) and len(images) <= chunk
        return batch.condition.float()

    weights = {"mse": 1.0, "l1": 1.0, "psnr": 0.0, "efficientnet-lite0": 0.5}
    for chunk in (1, 3, 5, 100):
        rewards = build_rewards(weights, ON_CPU, chunk=chunk)
        rewards = Rewards({**rewards.functions, "own": labelled}, {**weights, "own": 0.0}, chunk=chunk)
        total, values, maps = rewards.measure(images, ImageBatch(originals, labels), grid=Grid(4, 4))
        alone = build_rewards(weights, ON_CPU)
        expected, expected_values, expected_maps = rated(alone, images, repeated, Grid(4, 4))
        assert_rounding(total, expected, 4000)  # EfficientNet's convolutions
        for name in weights:
            assert_rounding(values[name], expected_values[name], 4000)
        assert_rounding(maps, expected_maps, 4000)
        assert values["own"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    images[9] = torch.nan
    with pytest.raises(UserError, match="'mse': returned nan for image 9 of the batch"):
        rated(build_rewards({"mse": 1.0}, ON_CPU, chunk=5), images, originals)


def test_the_precision_of_the_update_does_not_reach_the_rewards(rng):
    images, originals = torch.rand(2, 2, 3, 32, 32, generator=rng)
    rewards = build_rewards({"mse": 1.0, "efficientnet-lite0": 1.0}, ON_CPU)
    expected = rated(rewards, images, originals, Grid(4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        total, values, maps = rated(rewards, images, originals, Grid(4, 4))
    assert torch.equal(total, expected[0]) and torch.equal(maps, expected[2])
    assert all(torch.equal(values[name], expected[1][name]) for name in values)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A user's module, importable for one test; its name."""
    name = f"own_rewards_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(
        "limit = 3\n"
        "def brightness(images, originals, batch):\n"
        "    return -(images.mean((1, 2, 3)) - originals.mean((1, 2, 3))).abs()\n"
        "def shapeless(images, originals, batch):\n    return images.mean()\n"
        "def number(images, originals, batch):\n    return 1.0\n"
        "def broken(images, originals, batch):\n    return images[:, 0, 0, 0].log()\n"
    )
    (tmp_path / f"{name}_unfinished.py").write_text("def f(:\n")
    (tmp_path / f"{name}_needy.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_users_own_reward_by_dotted_path(own_module):
    name = f"{own_module}:brightness"
    rewards = build_rewards({"mse": 1.0, name: 4.0}, ON_CPU)
    total, values, _ = rated(rewards, constant(0.5), constant(0.25))
    assert values[name].tolist() == [-0.25] and total.tolist() == pytest.approx([-1 - 0.0625])


def test_a_users_own_reward_may_have_a_place():
    errors = PlacedReward(lambda images, originals: [images[:, 0] - originals[:, 0]])
    rewards = Rewards({"own": errors}, {"own": 3.0})
    images = constant(0.0).clone()
    images[:, 0, :8] = 1
    total, _, maps = rated(rewards, images, constant(0.0), Grid(2, 2))
    assert maps.tolist() == [[[-3, -3], [0, 0]]] and total.tolist() == [-1.5]


def test_what_a_reward_returns_is_checked(own_module):
    def call(function, count=3):
        images = constant(1.0, 1.0, *[-1.0] * (count - 2))
        rated(build_rewards({f"{own_module}:{function}": 1.0}, ON_CPU, chunk=2), images, images)

    message = refused(call, "shapeless")
    assert f"'{own_module}:shapeless'" in message and "returned shape (), expected (2,), one per image" in message
    assert "returned float, expected a tensor of shape (2,)" in refused(call, "number")
    message = refused(call, "broken")
    assert f"'{own_module}:broken'" in message and "returned nan for image 2 of the batch" in message


def test_a_reward_that_changes_its_pictures_changes_nothing_for_the_others():
    images, originals = constant(0.5, 1.0, -0.5).clone(), constant(0.0, -1.0, 1.0).clone()
    given, batch = (images.clone(), originals.clone()), ImageBatch(originals, torch.arange(3))

    def rude(images, originals, batch):
        values = images.mean((1, 2, 3))
        for tensor in (images, originals, batch.images, batch.condition):
            tensor.zero_()
        return values

    def rude_maps(images, originals):
        maps = [(images - originals).square().mean(1)]
        images.numpy().fill(9)  # a change that PyTorch does not see
        originals.zero_()
        return maps

    def label(images, originals, batch):
        return batch.condition.float()

    functions = {"rude": rude, "placed": PlacedReward(rude_maps), "mse": PlacedReward(squared_errors), "label": label}
    _, values, _ = Rewards(functions, dict.fromkeys(functions, 1.0)).measure(images, batch)
    assert values["rude"].tolist() == [0.5, 1.0, -0.5] and values["label"].tolist() == [0, 1, 2]
    assert values["placed"].tolist() == values["mse"].tolist() == pytest.approx([-0.25, -4, -2.25])
    assert torch.equal(images, given[0]) and torch.equal(originals, given[1])


def test_a_reward_that_raises_is_one_line_with_its_name_and_error(own_module):
    def raises(images, originals, batch):
        raise ValueError("first line\nand what follows")

    def silent(images, originals, batch):
        raise KeyError

    wrong = PlacedReward(lambda images, originals: images.sum())  # not a list of maps
    for function, expected in (
        (raises, "reward 'own': raised ValueError: first line and what follows"),
        (silent, "reward 'own': raised KeyError"),
        (PlacedReward(lambda images, originals: 1 / 0), "reward 'own': raised ZeroDivisionError: division by zero"),
        (wrong, "reward 'own': returned Tensor, expected a list of one or more error maps"),
    ):
        rewards = Rewards({"own": function}, {"own": 1.0})
        assert refused(rated, rewards, constant(0.0), constant(0.0)).startswith(expected)
    assert "raised SyntaxError: " in refused(build_rewards, {f"{own_module}_unfinished:f": 1.0}, ON_CPU)


def test_dotted_paths_to_nowhere_are_refused(own_module):
    def build(name):
        return refused(build_rewards, {name: 1.0}, ON_CPU)

    message = build(f"{own_module}_x:brightness")
    assert f"No module named '{own_module}_x'" in message and "PYTHONPATH" in message
    assert "No module named 'a_package_that_is_not_there'" in build(f"{own_module}_needy:brightness")
    message = build(f"{own_module}:brightnes")
    assert "unknown 'brightnes' (did you mean 'brightness'?)" in message and own_module in message
    assert "is of type int, no function (images, originals, batch)" in build(f"{own_module}:limit")
    for name in (":brightness", "module:"):
        assert f"'{name}' is not of the form package.module:function" in build(name)


def test_names_and_weights_are_checked_before_anything_is_loaded(own_module):
    def check(weights, discriminator=None):
        return refused(check_rewards, weights, {"discriminator": discriminator})

    message = check({"lpip": 1.0})
    assert "objective.rewards: unknown 'lpip' (did you mean 'lpips'?)" in message
    assert "mse" in message and "package.module:function" in message
    for weight in (-1.0, math.nan, math.inf):
        assert f"objective.rewards.mse: {weight} is not 0 or more" in check({"mse": weight})
    for weights in ({}, {"mse": 0.0}):
        assert "no weight is over 0; choices: mse, l1" in check(weights)
    assert "'patch-discriminator' needs the folder" in check({"patch-discriminator": 1.0})
    check_rewards({"patch-discriminator": 1.0, "nowhere:nothing": 2.0, "lpips": 0}, {"discriminator": "nowhere"})


def test_images_too_small_for_a_network_are_refused():
    rewards = build_rewards({"efficientnet-lite0": 1.0}, ON_CPU)
    message = refused(rated, rewards, constant(0.0), constant(0.0))
    assert "'efficientnet-lite0' reads images of 32 px or more, not of 16" in message
    assert refused(rated, rewards, constant(0.0), constant(0.0), Grid(2, 2)) == message
    assert "'ssim' reads images of 11 px or more, not of 8" in refused(
        build_rewards({"ssim": 1.0}, ON_CPU).check_size, 8
    )


def test_a_discriminator_is_stored_and_read(tmp_path, rng):
    discriminator = PatchDiscriminator(8).eval()
    save_discriminator(discriminator, tmp_path / "run" / "discriminator")
    images = torch.rand(2, 3, 16, 16, generator=rng) * 2 - 1
    state = torch.get_rng_state()
    for folder in ("run", "run/discriminator"):
        loaded = load_discriminator(tmp_path / folder)
        with torch.no_grad():
            assert_rounding(loaded(images), discriminator(images), 1000)
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        rewards = build_rewards({"patch-discriminator": 1.0}, replace(ON_CPU, discriminator=str(tmp_path / folder)))
        assert_rounding(rated(rewards, images, -images)[0], loaded(images).mean((1, 2, 3)), 1000)
    assert torch.equal(torch.get_rng_state(), state)


def test_folders_of_something_else_are_refused(tmp_path, tokenizer_folder):
    assert "no config.json" in refused(load_discriminator, tmp_path)
    assert "not the folder of a patch discriminator" in refused(load_discriminator, tokenizer_folder)
    save_discriminator(PatchDiscriminator(8), tmp_path)
    text = (tmp_path / "config.json").read_text()
    for width, expected in ((12, "layers.0.weight is (8, 3, 4, 4)"), ('"a"', "width: 'a'"), (6, "width: 6 is not")):
        (tmp_path / "config.json").write_text(text.replace('"width": 8', f'"width": {width}'))
        assert expected in refused(load_discriminator, tmp_path)


def leave(*given):
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda i, o, b: torch.zeros(len(i), dtype=torch.complex64), "a tensor of torch.complex64"),
        (lambda i, o, b: torch.zeros(len(i)).to_sparse(), "torch.sparse_coo"),
        (lambda i, o, b: torch.zeros(len(i), device="meta"), "on meta"),
        (leave, "raised SystemExit: 3"),
        (PlacedReward(lambda i, o: [i.mean()]), r"an error map of shape (), expected (2, h, w)"),
        (PlacedReward(lambda i, o: i[:, 0]), "returned Tensor, expected a list of one or more error maps"),
        (PlacedReward(lambda i, o: []), "returned list, expected a list of one or more error maps"),
        (PlacedReward(lambda i, o: [i[:1, 0]]), r"an error map of shape (1, 16, 16), expected (2, h, w)"),
        (PlacedReward(lambda i, o: [i[:, 0].to(torch.complex64)]), "a tensor of torch.complex64"),
        (PlacedReward(leave), "raised SystemExit: 3"),
    ],
)
def test_a_reward_that_returns_no_plain_numbers_is_named(reward, words):
    images = constant(0.5, 1.0)
    rewards = Rewards({"mine": reward}, {"mine": 1.0})
    message = refused(rated, rewards, images, images)
    assert message.startswith("reward 'mine': ") and words in message


def test_error_maps_may_be_whole_numbers():
    images = constant(0.5, 1.0)
    ones = PlacedReward(lambda i, o: [torch.full((len(i), 4, 4), 2)])
    assert rated(Rewards({"mine": ones}, {"mine": 1.0}), images, images)[0].tolist() == [-2.0, -2.0]
