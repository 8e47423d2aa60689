"""What only a CUDA device can show. Run with `make test-gpu`; without a device these tests fail, they do not skip."""

from __future__ import annotations

import copy
import json
import socket
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contracts.test_generators import KINDS, make_condition, make_generator
from device.test_models import SAMPLERS

from consonar import records
from consonar.compiling import compiled
from consonar.components import load_generator
from consonar.distributed import pick_device
from consonar.evaluation.inputs import ReferenceSet, encode_reference, folder_image_set
from consonar.parallel import ParallelConfig
from consonar.precision import multiplying, with_weights
from consonar.records import to_device
from consonar.sampling import decoder as decoding
from consonar.sampling.sample import SamplerConfig, decoder_of, draw_batch, sample, sample_tokens
from consonar.training.noise import NoiseConfig
from consonar.training.objectives.autoregressive import AutoregressiveConfig
from consonar.training.objectives.controls import gumbel_noise
from consonar.training.rewards import PlacedReward, Rewards, squared_errors
from consonar.training.run import train
from consonar.types import ImageBatch

pytestmark = pytest.mark.gpu


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_training_on_cuda_follows_the_cpu(make_config, tmp_path: Path) -> None:
    rear = AutoregressiveConfig(
        embedding_weight=1.0, head_width=16, noise=NoiseConfig(schedule="uniform", max_rate=0.5)
    )
    cpu = losses(train(make_config(objective=rear), tmp_path / "cpu", quiet=True))
    cuda = losses(train(make_config(objective=rear, loop={"device": "cuda"}), tmp_path / "cuda", quiet=True))
    assert cuda == pytest.approx(cpu, rel=1e-4)


@pytest.mark.parametrize("corruption", ["uniform", "mask", "nearest"])
def test_bf16_with_compiled_blocks_trains(make_config, tmp_path: Path, corruption: str) -> None:
    noise = NoiseConfig(schedule="linear", corruption=corruption)
    config = make_config(
        objective=AutoregressiveConfig(embedding_weight=1.0, head_width=16, noise=noise),
        loop={"device": "cuda", "precision": "bf16", "compile": True, "steps": 4, "ema_decay": 0.9},
    )
    values = losses(train(config, tmp_path / "run", quiet=True))
    assert len(values) == 4 and all(torch.isfinite(torch.tensor(values)))
    load_generator(tmp_path / "run")


def test_samples_on_cuda_equal_those_of_the_cpu(tiny_generator) -> None:
    generator, labels = tiny_generator(), torch.tensor([0, 1, 2])
    config = SamplerConfig(guidance_scale=2.0, temperature=0.0)
    expected, _ = sample_tokens(generator, labels, range(3), config)
    actual, _ = sample_tokens(generator.cuda(), labels.cuda(), range(3), config)
    assert (actual.cpu() == expected).float().mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_graphs_draw_the_tokens_of_the_same_step_without(kind, sampler, rng, monkeypatch) -> None:
    """Of all kinds, with several lengths of keys and a shorter last batch; a capture that fails is an error here."""
    monkeypatch.setattr(decoding, "BUCKET", 8)
    model = make_generator(kind)
    condition = to_device(make_condition(model, rng), torch.device("cuda", 0))
    model = model.cuda()
    captured, eager = decoder_of(model, sampler), decoder_of(model, sampler, graphs=False)
    batches = [(condition, range(3)), (records.rows(condition, slice(0, 2)), [7, 8]), (condition, range(3, 6))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given, seeds in batches:
            (tokens, entropy), (expected, spread) = (draw_batch(one, given, seeds) for one in (captured, eager))
            assert torch.equal(tokens, expected)
            torch.testing.assert_close(entropy, spread)
    (batch,) = captured.batches.values()
    assert len(batch.replays) > 1
    assert not eager.batches


def test_a_capture_that_fails_leaves_the_device_as_it_was(tiny_generator) -> None:
    here, config = tiny_generator(), SamplerConfig(temperature=0.0)
    there, classes = copy.deepcopy(here).cuda(), torch.arange(3)
    hook = there.blocks[0].register_forward_hook(lambda module, inputs, output: output * float(output.isfinite().all()))
    stream = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="sampling goes on without CUDA graphs"):
        tokens, _ = sample_tokens(there, classes.cuda(), range(3), config)
    expected, _ = sample_tokens(here, classes, range(3), config)
    assert torch.equal(tokens.cpu(), expected) and torch.cuda.current_stream() == stream
    hook.remove()
    torch.cuda.empty_cache()
    torch.rand(1, device="cuda")
    decoder = decoder_of(there, config)
    assert torch.equal(draw_batch(decoder, classes.cuda(), range(3))[0].cpu(), expected)
    assert [batch for batch in decoder.batches.values() if batch.replays]


def test_samples_are_decoded_beside_the_next_tokens(tiny_generator, tokenizer) -> None:
    """The pictures are those of tokens drawn and decoded one batch after the other; in bf16 they are drawn as well."""
    models, labels = (tiny_generator().cuda(), tokenizer.cuda()), torch.arange(24) % 3
    whole = sample(*models, labels, batch_size=24, precision="fp32")
    parts = sample(*models, labels, batch_size=4, precision="fp32")
    same = (whole.tokens == parts.tokens).all(1)
    assert same.float().mean() > 0.9 and (whole.images[same] - parts.images[same]).abs().max() < 1e-3
    low = sample(*models, labels, batch_size=4)
    assert low.precision == "bf16" and low.images.isfinite().all() and low.entropy.min() > 0
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"  # PyTorch's default


def test_chunks_decoded_beside_the_judging_of_others_are_worth_the_same(tokenizer) -> None:
    """Either takes its time before it reads or writes, so that what is not waited for would be seen."""
    model, rng = tokenizer.cuda(), torch.Generator().manual_seed(0)
    tokens = torch.randint(32, (24, 16), generator=rng).cuda()
    images = torch.rand(24, 3, model.image_size, model.image_size, generator=rng).cuda()
    batch = ImageBatch(images, torch.zeros(24, dtype=torch.int64).cuda())

    def late(work):
        return lambda *given: (torch.cuda._sleep(2**23), work(*given))[1]

    rewards = {"mse": PlacedReward(late(squared_errors))}
    worth = [
        Rewards(rewards, {"mse": 1.0}, chunk=chunk).measure(tokens, batch, decode=late(model.decode))[0]
        for chunk in (24, 2, 3)
    ]
    for parts in worth[1:]:
        torch.testing.assert_close(parts, worth[0], rtol=1e-4, atol=1e-5)


def test_a_compiled_decoder_makes_the_same_pictures(tokenizer) -> None:
    """Of a whole batch; the two pictures of a shorter one are decoded as written."""
    model, tokens = tokenizer.cuda(), torch.arange(128).view(8, 16).cuda() % 32
    with multiplying("fp32", torch.device("cuda", 0)), torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*is not compiled")
        own, expected = compiled(model, "pixels"), model.decode(tokens)
        torch.testing.assert_close(own.decode(tokens), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own.decode(tokens[:2]), expected[:2], rtol=1e-4, atol=1e-4)


def test_logits_of_bf16_weights_are_float32(tiny_generator) -> None:
    model, labels = tiny_generator().cuda(), torch.arange(3).cuda()
    tokens = torch.zeros(3, 16, dtype=torch.int64).cuda()
    with torch.no_grad():
        exact, low = model(tokens, labels)[0], with_weights(model, "bf16", torch.device("cuda", 0))(tokens, labels)[0]
    assert low.dtype == torch.float32 and (low - exact).norm() < 0.05 * exact.norm()


def test_resume_on_cuda(make_config, tmp_path: Path) -> None:
    config = make_config(loop={"device": "cuda"})
    whole = losses(train(config, tmp_path / "whole", quiet=True))
    train(config, tmp_path / "cut", stop_at=3, quiet=True)
    assert losses(train(config, tmp_path / "cut", resume=True, quiet=True)) == pytest.approx(whole, rel=1e-5)


def test_a_process_that_holds_its_model_in_shards_trains_as_one_that_does_not(make_config, tmp_path: Path, monkeypatch):
    """FSDP2 over NCCL in a group of one, resumed from its shards on the disk, with blocks that are calculated again."""
    config = make_config(loop={"device": "cuda", "activation_checkpointing": 1, "ema_decay": 0.9})
    whole = losses(train(config, tmp_path / "whole", quiet=True))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "TORCHELASTIC_RUN_ID": "none"}
    for key, value in {**group, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(key, str(value))
    sharded = replace(config, parallel=ParallelConfig(strategy="fsdp"))
    train(sharded, tmp_path / "cut", stop_at=3, quiet=True)
    assert all(path.is_dir() for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert losses(train(sharded, tmp_path / "cut", resume=True, quiet=True)) == pytest.approx(whole, rel=1e-4)
    assert load_generator(tmp_path / "cut")


def test_a_reference_is_encoded_as_on_the_cpu(tokenizer, picture_folder: Path) -> None:
    """Its pictures are read on the CPU; the convolutions are float32, not TF32."""
    reference = ReferenceSet("x", {"train": folder_image_set(picture_folder / "train" / "all")[0]})
    here = encode_reference(reference, tokenizer)
    there = encode_reference(reference, tokenizer.to(pick_device("cuda")))
    assert here.tokens and there.tokens
    assert (here.tokens["train"] == there.tokens["train"]).float().mean() > 0.999


def test_noise_of_a_row_is_drawn_on_the_device_from_its_seed_alone() -> None:
    logits = torch.zeros(4, 3, 5, device="cuda")
    noise = gumbel_noise(torch.arange(4), logits)
    assert noise.is_cuda and torch.equal(noise[2:], gumbel_noise(torch.arange(2, 4), logits[2:]))
