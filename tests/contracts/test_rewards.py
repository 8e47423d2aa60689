"""What every registered reward keeps: one finite number per image, whatever the chunks; the original itself is best."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import rated, save_clip

from consonar.data.scenes import Placed, picture_of
from consonar.data.transforms import from_uint8
from consonar.errors import UserError
from consonar.networks import lpips
from consonar.networks.discriminator import PatchDiscriminator, save_discriminator
from consonar.networks.lpips import VGG16Features
from consonar.training.rewards import PLACED_REWARDS, REWARDS, PlacedReward, Resources, build_rewards
from consonar.types import Grid

SIDE = 32
RECONSTRUCTION_REWARDS = frozenset(REWARDS) - {"patch-discriminator", "compositional", "clip", "hpsv2"}
"""Those that compare with the original."""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """`build_rewards` with LPIPS on a random VGG16 and an untrained discriminator."""
    folder = tmp_path_factory.mktemp("rewards")
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        torch.save(VGG16Features().state_dict(), folder / "vgg16.pth")
        save_discriminator(PatchDiscriminator(8), folder / "discriminator")
        patch.setattr(lpips, "WEIGHTS", replace(lpips.WEIGHTS, sha256_prefix=""))
        save_clip(folder / "clip", ["a", "dog"])
        of_clip = {"clip": str(folder / "clip"), "hpsv2": str(folder / "clip")}
        files = Resources(
            torch.device("cpu"), None, str(folder / "vgg16.pth"), str(folder / "discriminator"), **of_clip
        )
        yield lambda weights, dtype=None, **options: build_rewards(weights, replace(files, dtype=dtype), **options)
    (folder / "vgg16.pth").unlink()


@pytest.fixture
def originals(rng):
    """Blocks of colour, like pictures: flat places and edges."""
    return torch.rand(5, 3, 8, 8, generator=rng).repeat_interleave(4, 2).repeat_interleave(4, 3) * 1.8 - 0.9


def perturbations(originals, rng):
    noise = torch.randn(originals.shape, generator=rng)
    return {
        "a little noise": originals + 0.02 * noise,
        "noise": originals + 0.3 * noise,
        "brighter": originals + 0.1,
        "less contrast": 0.8 * originals,
        "moved by a pixel": originals.roll(1, 3),
        "inverted": -originals,
        "another image": originals.roll(1, 0),
    }


@pytest.mark.parametrize("name", PLACED_REWARDS)
def test_a_run_in_bf16_ranks_the_draws_of_a_picture_as_one_in_float32(name, build, originals, rng):
    """Blocks of the picture replaced, as draws replace tokens. Only LPIPS multiplies in bf16: what that moves is under
    2 % of the spread within a group, and under 1 % of the reward. Few pictures: without bf16 a CPU takes half a second
    for each."""
    originals = originals[:2]
    blocks = torch.rand(2, 6, 3, 8, 8, generator=rng) * 1.8 - 0.9
    kept = torch.rand(2, 6, 1, 8, 8, generator=rng) < 0.8
    small = torch.where(kept, originals[:, None, :, ::4, ::4], blocks)
    images = small.repeat_interleave(4, 3).repeat_interleave(4, 4).flatten(0, 1)
    exact, found = (rated(build({name: 1.0}, dtype=dtype), images, originals)[0] for dtype in (None, torch.bfloat16))
    assert found.dtype == torch.float32 and torch.equal(found, exact) == (name != "lpips")
    moved, exact = (found - exact).view(2, 6), exact.view(2, 6)
    spread = exact.std(1).mean()
    assert (moved - moved.mean(1, keepdim=True)).std() < 0.02 * spread and (moved.abs() < 0.01 * exact.abs()).all()


def test_the_table_is_complete():
    assert set(PLACED_REWARDS) <= RECONSTRUCTION_REWARDS <= set(REWARDS)


@pytest.mark.parametrize("name", REWARDS)
def test_one_finite_number_for_each_image_whatever_the_chunks(name, build, originals, rng):
    images = (originals + 0.1 * torch.randn(originals.shape, generator=rng)).requires_grad_()
    total, values, _ = rated(build({name: 2.0}), images, originals)
    assert set(values) == {name} and values[name].shape == (5,) and values[name].dtype == torch.float32
    assert torch.equal(total, 2 * values[name]) and values[name].isfinite().all()
    assert not total.requires_grad and not total.is_inference()  # the latter could not enter a loss
    chunked = rated(build({name: 2.0}, chunk=2), images, originals)[0]
    torch.testing.assert_close(chunked, total, rtol=1e-4, atol=1e-5)
    order = torch.tensor([3, 1, 4, 0, 2])
    moved = rated(build({name: 2.0}), images[order], originals[order])[0]
    torch.testing.assert_close(moved, total[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(RECONSTRUCTION_REWARDS))
def test_no_image_is_better_than_the_original_itself(name, build, originals, rng):
    rewards = build({name: 1.0})
    best = rated(rewards, originals, originals)[0]
    scores = {what: rated(rewards, images, originals)[0] for what, images in perturbations(originals, rng).items()}
    for what, score in scores.items():
        assert (score < best).all(), what
    assert (scores["noise"] < scores["a little noise"]).all()


@pytest.mark.parametrize("name", sorted(set(REWARDS) - RECONSTRUCTION_REWARDS))
def test_rewards_that_need_no_original_ignore_it(name, build, originals):
    rewards = build({name: 1.0})
    if name == "compositional":  # finds nothing in blocks of colour
        dog = picture_of("white", [Placed("dog", "", 3, 2, 27)], 32)
        originals = from_uint8(torch.from_numpy(np.stack([np.asarray(dog)] * 5)))
    total = rated(rewards, originals, originals)[0]
    assert torch.equal(rated(rewards, originals, torch.zeros_like(originals))[0], total)
    assert not torch.equal(rated(rewards, -originals, originals)[0], total)


@pytest.mark.parametrize("grid", [Grid(4, 4), Grid(32, 32), Grid(1, 1), Grid(5, 7, prefix=3)], ids=str)
@pytest.mark.parametrize("name", PLACED_REWARDS)
def test_the_mean_over_cells_is_the_reward(name, grid, build, originals, rng):
    rewards = build({name: 0.7}, chunk=2)
    images = originals + 0.2 * torch.randn(originals.shape, generator=rng)
    total, _, maps = rated(rewards, images, originals, grid)
    assert maps.shape == (5, grid.rows, grid.columns) and (maps <= 0).all()
    torch.testing.assert_close(maps.mean((1, 2)), total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", PLACED_REWARDS)
def test_the_worst_cell_is_where_the_image_differs(name, build, originals):
    images = originals.clone()
    images[:, :, 8:16, 24:] = -images[:, :, 8:16, 24:]  # the cell in row 1, column 3 of 4 x 4
    maps = rated(build({name: 1.0}), images, originals, Grid(4, 4))[2]
    assert (maps.flatten(1).argmin(1) == 7).all()
    if name in ("mse", "l1"):
        assert ((maps < 0).sum((1, 2)) == 1).all()


@pytest.mark.parametrize("name", sorted(set(REWARDS) - set(PLACED_REWARDS)))
def test_rewards_without_a_place_are_refused_where_one_is_needed(name, build, originals):
    rewards = build({"mse": 1.0, name: 0.5})
    with pytest.raises(UserError, match=rf"'{name}' has no place.*choices: {', '.join(PLACED_REWARDS)}") as caught:
        rewards.check_places()
    assert "\n" not in str(caught.value) and not isinstance(rewards.functions[name], PlacedReward)
    watched = build({"mse": 1.0, name: 0.0})  # a weight of 0 does not count
    watched.check_places()
    pairs = ((-originals, originals), (originals, -originals))
    assert torch.equal(*(rated(watched, images, others, Grid(4, 4))[2] for images, others in pairs))
