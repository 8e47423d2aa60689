"""What every objective keeps: finite loss, terms that sum to it, exact zeros, a frozen tokenizer."""

from dataclasses import replace

import pytest
import torch

from consonar.distributed import World
from consonar.errors import UserError
from consonar.files.writers import file_sha256
from consonar.networks import lpips
from consonar.tokenizers.vq import VQConfig, VQTokenizer
from consonar.training.config import TrainConfig
from consonar.training.noise import NoiseConfig
from consonar.training.objectives.autoregressive import Autoregressive, AutoregressiveConfig
from consonar.training.objectives.reconstruction import Reconstruction, ReconstructionConfig, TokenizerTrainee
from consonar.training.trainee import Trainee
from consonar.types import EncodedBatch, ImageBatch, TokenBatch

NOISY = NoiseConfig(schedule="constant", max_rate=0.5)
CONSISTENCY = {
    "plain": AutoregressiveConfig(),
    "noise": AutoregressiveConfig(noise=NOISY),
    "mask": AutoregressiveConfig(noise=replace(NOISY, corruption="mask")),
    "nearest": AutoregressiveConfig(noise=replace(NOISY, corruption="nearest", num_neighbours=4)),
    "heads": AutoregressiveConfig(embedding_weight=0.7, head_width=16),
    "encode": AutoregressiveConfig(embedding_weight=0.7, heads="encode", head_depth=1),
    "rear": AutoregressiveConfig(embedding_weight=0.7, head_width=16, head_depth=2, mask_noised=True, noise=NOISY),
}
RECONSTRUCTION = {
    "plain": ReconstructionConfig(perceptual_weight=0),
    "weighted": ReconstructionConfig(perceptual_weight=0, mse_weight=3, codebook_weight=0.5, commitment_weight=0.1),
    "adversarial": ReconstructionConfig(perceptual_weight=0, discriminator_weight=0.3),
    "late": ReconstructionConfig(perceptual_weight=0, discriminator_weight=0.3, discriminator_start=5),
}
WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture
def batch(rng):
    images = torch.rand(6, 3, 16, 16, generator=rng) * 2 - 1
    tokens = torch.randint(32, (6, 16), generator=rng)
    return EncodedBatch(images, torch.arange(6) % 3, tokens=tokens)


@pytest.fixture
def consistency(tokenizer, tiny_generator):
    def make(config: AutoregressiveConfig) -> tuple[Autoregressive, Trainee]:
        trainee = Trainee(tiny_generator(), config.head_specs(2, tokenizer.code_dim))
        return Autoregressive(config, tokenizer, total_steps=10, seed=3), trainee

    return make


@pytest.fixture
def reconstruction(tokenizer):
    def make(config: ReconstructionConfig) -> tuple[Reconstruction, TokenizerTrainee]:
        tokenizer.requires_grad_(True)
        trainee = TokenizerTrainee(tokenizer, discriminator=config.discriminator_weight > 0)
        return Reconstruction(config, total_steps=10, seed=3, world=WORLD), trainee

    return make


def prepare(objective, trainee, batch, step=0):
    return objective.prepare(trainee, batch, step)


@pytest.mark.parametrize("name", CONSISTENCY)
def test_consistency_terms_sum_to_the_loss(name, consistency, batch):
    config = CONSISTENCY[name]
    objective, trainee = consistency(config)
    loss, terms = objective.loss(trainee, prepare(objective, trainee, batch), 0)
    assert loss.isfinite() and loss.ndim == 0
    expected = {f"align_{spec.name}" for spec in trainee.specs}
    assert set(terms) == {"cross_entropy"} | expected
    weighted = terms["cross_entropy"] + config.embedding_weight * sum(terms[key] for key in expected)
    torch.testing.assert_close(loss, torch.as_tensor(weighted))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainee.parameters())


@pytest.mark.parametrize("name", CONSISTENCY)
def test_consistency_leaves_the_tokenizer_alone(name, consistency, batch):
    objective, trainee = consistency(CONSISTENCY[name])
    before = {key: value.clone() for key, value in objective.tokenizer.state_dict().items()}
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=0.1)
    objective.loss(trainee, prepare(objective, trainee, batch), 0)[0].backward()
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in objective.tokenizer.state_dict().items())
    assert all(parameter.grad is None for parameter in objective.tokenizer.parameters())
    assert not {id(p) for p in trainee.parameters()} & {id(p) for p in objective.tokenizer.parameters()}


@pytest.mark.parametrize("name", CONSISTENCY)
def test_rollout_corrupts_the_context_alone(name, consistency, batch):
    objective, trainee = consistency(CONSISTENCY[name])
    rollout = prepare(objective, trainee, batch)
    assert torch.equal(rollout.tokens, batch.tokens)  # targets stay clean
    assert torch.equal(rollout.context[~rollout.corrupted], batch.tokens[~rollout.corrupted])
    if CONSISTENCY[name].noise.schedule == "none":
        assert not rollout.corrupted.any()
    elif name == "mask":
        assert (rollout.context[rollout.corrupted] == trainee.generator.mask_token).all()
    elif name == "nearest":
        assert (rollout.context[rollout.corrupted] != batch.tokens[rollout.corrupted]).all()
    again = prepare(objective, trainee, batch)
    assert torch.equal(again.context, rollout.context) and torch.equal(again.condition, rollout.condition)
    if CONSISTENCY[name].noise.schedule != "none":
        assert not torch.equal(prepare(objective, trainee, batch, step=1).context, rollout.context)


def test_noise_and_class_dropout_have_generators_of_their_own(consistency, batch):
    plain = prepare(*consistency(AutoregressiveConfig(class_dropout=0.5)), batch)
    noisy = prepare(*consistency(AutoregressiveConfig(class_dropout=0.5, noise=NOISY)), batch)
    undropped = prepare(*consistency(AutoregressiveConfig(class_dropout=0, noise=NOISY)), batch)
    assert torch.equal(plain.condition, noisy.condition) and (plain.condition == 3).any()
    assert torch.equal(noisy.context, undropped.context)
    assert torch.equal(undropped.condition, batch.condition)


def test_weight_zero_builds_no_head_and_no_term(consistency, batch):
    objective, trainee = consistency(AutoregressiveConfig(embedding_weight=0, noise=NOISY))
    assert len(trainee.heads) == 0
    loss, terms = objective.loss(trainee, prepare(objective, trainee, batch), 0)
    assert torch.equal(loss, terms["cross_entropy"])


def test_mask_noised_zeroes_the_encode_term_at_noised_positions(consistency, batch):
    masked, trainee = consistency(CONSISTENCY["rear"])
    rollout = prepare(masked, trainee, batch)
    everywhere = replace(rollout, corrupted=torch.ones_like(rollout.corrupted))
    _, terms = masked.loss(trainee, everywhere, 0)
    assert terms["align_current"] == 0 and terms["align_next"] > 0
    unmasked, _ = consistency(replace(CONSISTENCY["rear"], mask_noised=False))
    assert unmasked.loss(trainee, everywhere, 0)[1]["align_current"] > 0


def test_noise_follows_the_schedule(consistency, batch):
    objective, trainee = consistency(AutoregressiveConfig(noise=NoiseConfig(schedule="truncated_linear")))
    assert [round(objective.noise_rate(step), 12) for step in (0, 3, 8)] == [1.0, 0.6, 0.0]
    assert objective.state(3) == {"noise_rate": objective.noise_rate(3)}
    assert not prepare(objective, trainee, batch, step=8).corrupted.any()


def test_validation_is_clean_and_weighs_images_equally(consistency, batch):
    objective, trainee = consistency(AutoregressiveConfig(noise=NOISY, class_dropout=0.9))
    whole = objective.validate(trainee, iter([batch]))
    parts = [TokenBatch(batch.tokens[a:b], batch.condition[a:b]) for a, b in ((0, 4), (4, 6))]
    assert objective.validate(trainee, iter(parts)) == pytest.approx(whole, rel=1e-5)
    logits = trainee.generator(batch.tokens, batch.condition)[0]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.tokens.flatten())
    assert whole["cross_entropy"] == pytest.approx(expected.item())
    assert 0 <= whole["accuracy"] <= 1 and 0 < whole["entropy"] < 3.4658


@pytest.mark.parametrize("name", RECONSTRUCTION)
def test_reconstruction_terms_sum_to_the_loss(name, reconstruction, batch):
    config = RECONSTRUCTION[name]
    objective, trainee = reconstruction(config)
    loss, terms = objective.loss(trainee, prepare(objective, trainee, batch), 0)
    active = config.discriminator_weight > 0 and config.discriminator_start == 0
    weights = {"mse": config.mse_weight, "codebook": config.codebook_weight, "commitment": config.commitment_weight}
    if active:
        weights |= {"discriminator": 1, "adversarial": config.discriminator_weight}
    torch.testing.assert_close(loss, sum(weights[key] * terms[key] for key in weights))
    loss.backward()
    # Every parameter takes part from the first step: DistributedDataParallel needs that.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainee.parameters())
    if trainee.discriminator is not None:
        moved = [bool(p.grad.abs().sum() > 0) for p in trainee.discriminator.parameters()]
        assert any(moved) == active


def test_adversarial_terms_move_their_own_side(reconstruction, batch):
    objective, trainee = reconstruction(RECONSTRUCTION["adversarial"])
    rollout = prepare(objective, trainee, batch)
    _, terms = objective.loss(trainee, rollout, 0)
    terms["adversarial"].backward(retain_graph=True)
    assert all(p.grad is None for p in trainee.discriminator.parameters())
    assert trainee.tokenizer.decoder.conv_out.weight.grad.abs().sum() > 0
    trainee.zero_grad(set_to_none=True)
    terms["discriminator"].backward()
    assert all(p.grad is None for p in trainee.tokenizer.parameters())


def test_codes_are_counted_once_a_step_however_many_micro_batches(reconstruction, batch):
    objective, trainee = reconstruction(RECONSTRUCTION["plain"])
    for step in range(3):
        rollout = prepare(objective, trainee, batch, step)
        for rows in (slice(0, 2), slice(2, 6)):
            objective.loss(trainee, ImageBatch(rollout.images[rows], rollout.condition[rows]), step)
    used = torch.isin(torch.arange(32), trainee.tokenizer.encode(batch.images))
    assert used.any() and not used.all()
    assert torch.equal(trainee.steps_unused, torch.where(used, 0, 3))


def test_revival_moves_dead_codes_onto_vectors_of_the_batch(reconstruction, batch):
    objective, trainee = reconstruction(ReconstructionConfig(perceptual_weight=0, revive_after=2))
    codebook = trainee.tokenizer.quantize.embedding.weight
    before = codebook.detach().clone()
    trainee.steps_unused[:] = torch.tensor([3] * 4 + [2] * 28)
    prepare(objective, trainee, batch, step=8)  # after `revive_until` of 10 steps: left where they are
    assert torch.equal(codebook, before)
    trainee.steps_unused[:] = torch.tensor([3] * 4 + [2] * 28)
    prepare(objective, trainee, batch, step=5)
    vectors = trainee.tokenizer.vectors(batch.images)
    assert torch.equal(codebook[4:], before[4:])
    assert all((vectors == code).all(1).any() for code in codebook[:4])


def test_reconstruction_validation(reconstruction, batch):
    objective, trainee = reconstruction(RECONSTRUCTION["plain"])
    measured = objective.validate(trainee, iter([batch]))
    tokenizer: VQTokenizer = trainee.tokenizer
    tokens = tokenizer.encode(batch.images)
    error = (tokenizer.decode(tokens).clamp(-1, 1) - batch.images).square().mean((1, 2, 3))
    assert measured["psnr"] == pytest.approx((10 * (4 / error).log10()).mean().item(), rel=1e-5)
    assert measured["usage"] == pytest.approx(len(tokens.unique()) / 32)
    assert 1 <= measured["perplexity"] <= len(tokens.unique()) + 1e-6


def test_lpips_is_the_perceptual_term_when_chosen(reconstruction, batch, tmp_path, monkeypatch):
    path = tmp_path / "vgg16.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(lpips.VGG16Features().state_dict(), path)
    stand_in = replace(lpips.WEIGHTS, sha256_prefix=file_sha256(path)[:8])  # not the published file
    monkeypatch.setattr(lpips, "WEIGHTS", stand_in)
    config = ReconstructionConfig(perceptual="lpips", perceptual_weights=str(path), perceptual_weight=0.5)
    objective, trainee = reconstruction(config)
    path.unlink()
    loss, terms = objective.loss(trainee, prepare(objective, trainee, batch), 0)
    output = trainee.tokenizer(batch.images)
    torch.testing.assert_close(terms["perceptual"], objective.perceptual(output.reconstruction, batch.images).mean())
    assert objective.perceptual.name == "lpips" and terms["perceptual"] > 0
    rest = terms["mse"] + terms["codebook"] + 0.25 * terms["commitment"]
    torch.testing.assert_close(loss, rest + 0.5 * terms["perceptual"])
    terms["perceptual"].backward()
    assert trainee.tokenizer.decoder.conv_out.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in objective.perceptual.parameters())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"perceptual": "lpip"}, "objective.perceptual: unknown 'lpip' (did you mean 'lpips'?)"),
        ({"perceptual_weights": "vgg16.pth"}, "objective.perceptual_weights: 'vgg16.pth' is read only with"),
        ({"perceptual": "lpips", "perceptual_weight": 0, "perceptual_weights": "vgg16.pth"}, "remove it"),
    ],
)
def test_a_perceptual_setting_that_nothing_reads_is_refused(settings, expected):
    with pytest.raises(UserError) as caught:
        ReconstructionConfig(**settings)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("perceptual", "smallest"), [("efficientnet-lite0", 32), ("lpips", 16)])
def test_images_too_small_for_the_perceptual_network_are_refused(perceptual, smallest):
    def config(size: int) -> TrainConfig:
        return TrainConfig(
            recipe="tiny",
            model=VQConfig(image_size=size, channel_multipliers=(1, 1, 2)),
            objective=ReconstructionConfig(perceptual=perceptual),
        )

    assert config(smallest).model.image_size == smallest
    with pytest.raises(UserError, match=f"{perceptual} reads images of {smallest} px or more"):
        config(smallest // 2)


def test_more_neighbours_than_other_codes_are_refused_before_work(consistency):
    noise = replace(NOISY, corruption="nearest", num_neighbours=32)
    with pytest.raises(UserError, match=r"objective\.noise\.num_neighbours: 32 is too many; choices: 1\.\.31"):
        consistency(AutoregressiveConfig(noise=noise))
    consistency(AutoregressiveConfig(noise=replace(noise, num_neighbours=31)))
