"""The one training loop: plain AR to the bit, accumulation, moving average, overfitting, the stored curve."""

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import TINY_VQ
from torch.nn import functional as F

from consonar.components import load_generator, load_tokenizer
from consonar.data.loader import TokenBatches
from consonar.data.tokens import TokenStore
from consonar.distributed import World
from consonar.errors import NonFiniteLoss, UserError
from consonar.files.weights import map_tensors
from consonar.generators.rear import ReARConfig, ReARGenerator
from consonar.seeding import derive_seed, draw_weights, uniform
from consonar.seeding import generator as seeded
from consonar.training.checkpoints import State, list_resume, load_resume
from consonar.training.config import DataConfig
from consonar.training.loop import Built, Running, train_loop
from consonar.training.noise import NoiseConfig
from consonar.training.objectives.autoregressive import Autoregressive, AutoregressiveConfig
from consonar.training.objectives.base import codebook_of
from consonar.training.objectives.reconstruction import ReconstructionConfig
from consonar.training.optim import build_optimizer
from consonar.training.run import train
from consonar.training.tracking import Tracker, read_metrics
from consonar.training.trainee import Trainee

REAR = AutoregressiveConfig(embedding_weight=1.0, head_width=16, noise=NoiseConfig(schedule="truncated_linear"))
PLAIN = AutoregressiveConfig(class_dropout=0)
CURVE = Path(__file__).with_name("curve.json")
# Attention does not change when every key moves by the same vector: this gradient is rounding noise, and Adam
# amplifies it.
NO_GRADIENT = "k_norm.bias"


def resume_file(run: Path) -> dict:
    return load_resume(list_resume(run / "checkpoints")[-1])


def column(run: Path, key: str) -> list[float]:
    return [line[key] for line in read_metrics(run / "metrics.jsonl") if key in line]


def assert_close(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        if not key.endswith(NO_GRADIENT):
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=2e-5, msg=key)


def hand_written(config) -> dict[str, torch.Tensor]:
    """Teacher forcing with cross-entropy, and nothing else of this library but the model and the data order."""
    shape = config.model.sized(32, 16, 3)
    model = ReARGenerator(shape)
    model.reset_parameters(seeded(config.seed, "init"))
    batches = TokenBatches(TokenStore.open(config.data.tokens), batch_size=8, seed=config.seed)
    linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    rest = [p for p in model.parameters() if all(p is not w for w in linear)]
    optim = config.optim
    groups = [{"params": linear, "weight_decay": optim.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    fused = build_optimizer(model, optim).param_groups[0]["fused"]  # whichever is faster here
    optimizer = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), fused=fused)
    for step in range(config.loop.steps):
        torch.manual_seed(derive_seed(config.seed, "dropout", 0, step))
        for group in optimizer.param_groups:
            group["lr"] = optim.lr
        batch = batches.batch(step)
        logits, _ = model.train()(batch.tokens, batch.condition)
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), batch.tokens.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        optimizer.step()
    return model.state_dict()


def test_weight_zero_and_noise_zero_are_plain_ar_bit_for_bit(make_config, tmp_path):
    constant = {"warmup_steps": 0, "min_lr": 2e-3}
    shape = ReARConfig(width=32, num_layers=2, num_heads=4, dropout=0.1)
    config = make_config(loop={"steps": 5}, optim=constant, model=shape, objective=PLAIN)
    expected = hand_written(config)
    plain = load_generator(train(config, tmp_path / "plain", quiet=True)).state_dict()
    switched_off = AutoregressiveConfig(
        embedding_weight=0, class_dropout=0,
        noise=NoiseConfig(schedule="truncated_linear", max_rate=0),
    )  # fmt: skip
    config = make_config(loop={"steps": 5}, optim=constant, model=shape, objective=switched_off)
    off = load_generator(train(config, tmp_path / "off", quiet=True)).state_dict()
    assert expected.keys() == plain.keys() == off.keys()
    for key in expected:
        assert torch.equal(plain[key], expected[key]), key
        assert torch.equal(off[key], expected[key]), key


def test_heads_do_not_move_the_start_or_the_draws(make_config, tmp_path):
    """With a vanishing weight, reAR sees the batches, classes, dropout masks and start of plain AR."""
    shape = ReARConfig(width=32, num_layers=2, num_heads=4, dropout=0.3)
    tiny = AutoregressiveConfig(embedding_weight=1e-12, head_width=16)
    runs = [
        train(make_config(loop={"steps": 1}, model=shape, objective=objective), tmp_path / name, quiet=True)
        for name, objective in (("ar", AutoregressiveConfig()), ("rear", tiny))
    ]
    assert column(runs[0], "train/cross_entropy") == column(runs[1], "train/cross_entropy")


def test_heads_are_in_the_resume_file_and_never_in_the_model(make_config, tmp_path):
    run = train(make_config(objective=REAR, loop={"ema_decay": 0.9}), tmp_path / "rear", quiet=True)
    exported = map_tensors(run / "model" / "model.safetensors")
    plain = ReARGenerator(ReARConfig(width=32, num_layers=2, num_heads=4, vocab_size=32, num_tokens=16, num_classes=3))
    assert exported.keys() == plain.state_dict().keys()
    stored = resume_file(run)
    for part in ("model", "average"):
        heads = {key for key in stored[part] if key.startswith("heads.")}
        assert len(heads) == 12 and set(stored[part]) - heads == {f"generator.{key}" for key in exported}


def test_codes_are_read_by_the_embeddings_of_the_tokenizer_which_stay_as_they_are(make_config, tmp_path):
    tokenizer = load_tokenizer(make_config().tokenizer)
    codes = codebook_of(tokenizer, torch.device("cpu"))
    shape = ReARConfig(width=32, num_layers=1, num_heads=4, dropout=0.0, tied_code_dim=codes.shape[1])
    rows = load_generator(train(make_config(loop={"steps": 2}, model=shape), tmp_path / "tied", quiet=True)).embeddings
    assert codes.std() > 0 and torch.equal(rows.codebook, codes)
    torch.testing.assert_close(rows(torch.arange(len(codes))[None])[0], rows.projection(codes))
    assert rows.weight.shape == (1 + 3 + 1, 32)  # mask, classes, the null class
    other = make_config(model=replace(shape, tied_code_dim=codes.shape[1] + 1))
    said = f"model.tied_code_dim: {codes.shape[1] + 1}, but the tokenizer's embeddings have {codes.shape[1]}"
    with pytest.raises(UserError, match=said):
        train(other, tmp_path / "other", quiet=True)


def test_accumulation_does_not_change_the_step(make_config, tmp_path):
    runs = [train(make_config(objective=REAR, loop={"accumulation": n}), tmp_path / str(n), quiet=True) for n in (1, 2)]
    for key in ("train/loss", "train/align_current", "train/grad_norm", "validation/cross_entropy"):
        assert column(runs[0], key) == pytest.approx(column(runs[1], key), rel=1e-4)
    assert_close(*(resume_file(run)["model"] for run in runs))


def test_moving_average(make_config, tmp_path):
    """Stored beside the weights, exported instead of them, and what validation measures."""
    decay = 0.7
    config = make_config(loop={"steps": 4, "ema_decay": decay, "save_every": 1, "keep_checkpoints": 9})
    run = train(config, tmp_path / "run", quiet=True)
    files = [load_resume(path) for path in list_resume(run / "checkpoints")]
    exported = load_generator(run)
    for key, value in exported.state_dict().items():
        key = f"generator.{key}"
        for before, after in pairwise(files):
            expected = decay * before["average"][key] + (1 - decay) * after["model"][key]
            torch.testing.assert_close(after["average"][key], expected)
        assert torch.equal(value, files[-1]["average"][key])
    assert not torch.equal(exported.lm_head.weight, files[-1]["model"]["generator.lm_head.weight"])
    store = TokenStore.open(config.data.validation_tokens)
    tokens = store.read(torch.arange(10), torch.zeros(10, dtype=torch.int64))
    logits = exported(tokens, store.labels)[0]
    measured = F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item()
    assert column(run, "validation/cross_entropy")[-1] == pytest.approx(measured, rel=1e-5)


def test_a_validation_of_fewer_items_measures_those(make_config, tmp_path):
    config = make_config(loop={"steps": 1})
    run = train(replace(config, data=replace(config.data, validation_items=3)), tmp_path / "run", quiet=True)
    store = TokenStore.open(config.data.validation_tokens)
    rows = next(TokenBatches(store, batch_size=8, seed=config.seed).ordered(8, 3)).indices
    assert len(rows) == 3
    tokens = store.read(rows, torch.zeros(3, dtype=torch.int64))
    logits = load_generator(run)(tokens, store.labels[rows])[0]
    measured = F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item()
    assert column(run, "validation/cross_entropy")[-1] == pytest.approx(measured, rel=1e-5)
    with pytest.raises(UserError, match=r"data.validation_items: -1 is negative; 0 means all"):
        replace(config.data, validation_items=-1)


def test_intervals(make_config, tmp_path):
    every = {"log_every": 2, "validate_every": 3, "sample_every": 4, "save_every": 2, "keep_checkpoints": 2}
    run = train(make_config(loop={"steps": 5} | every), tmp_path / "run", quiet=True)
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 5]
    assert [line["step"] for line in lines if "validation/cross_entropy" in line] == [3, 5]
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step_000004.png", "step_000005.png"]
    kept = [path.name for path in list_resume(run / "checkpoints")]
    assert kept == ["step_00000004.pt", "step_00000005.pt"]


class OneBatch:
    """The same batch at every step."""

    def __init__(self, batches: TokenBatches):
        self.batches = batches

    def batch(self, step: int):
        return self.batches.batch(0)

    def ordered(self, batch_size: int):
        return self.batches.ordered(batch_size)


@pytest.mark.parametrize("kind", ["tokens", "tokenizer"])
def test_the_best_model_is_kept_beside_the_last_and_over_a_resume(kind, make_config, picture_folder, tmp_path):
    loop = {"steps": 4, "validate_every": 1, "keep_best": True, "save_every": 1}
    config = make_config(loop=loop, optim={"lr": 1.0, "min_lr": 1.0, "warmup_steps": 0})
    if kind == "tokenizer":
        data = DataConfig(images=str(picture_folder))
        objective = ReconstructionConfig(perceptual_weight=0)
        config = replace(config, tokenizer=None, model=TINY_VQ, objective=objective, data=data)
    train(config, tmp_path / "run", stop_at=3, quiet=True)
    run = train(config, tmp_path / "run", resume=True, quiet=True)
    metric, pick = {"tokens": ("cross_entropy", min), "tokenizer": ("psnr", max)}[kind]
    key = f"validation/{metric}"
    values = {line["step"]: line[key] for line in read_metrics(run / "metrics.jsonl") if key in line}
    best = json.loads((run / "best.json").read_text())
    assert len(values) == 4 and best == {"step": pick(values, key=lambda step: values[step]), "metric": metric,
                                         "value": pick(values.values())}  # fmt: skip
    kept, last = (map_tensors(run / name / "model.safetensors") for name in ("best", "model"))
    assert all(torch.equal(kept[name], last[name]) for name in kept) == (best["step"] == 4)


def test_a_best_model_needs_data_for_validation(make_config, tmp_path):
    config = make_config(loop={"keep_best": True})
    with pytest.raises(UserError, match=r"loop.keep_best: True is read only with data for validation"):
        train(replace(config, data=replace(config.data, validation_tokens="")), tmp_path / "none")


def test_one_batch_is_learnt_by_heart(make_config, tokenizer, tmp_path):
    config = make_config(loop={"steps": 60, "log_every": 60}, optim={"lr": 1e-2}, objective=PLAIN)
    batches = OneBatch(TokenBatches(TokenStore.open(config.data.tokens), batch_size=4, seed=0))
    trainee = Trainee(ReARGenerator(config.model.sized(32, 16, 3)))
    trainee.generator.reset_parameters(seeded(0, "init"))
    state = State(trainee, build_optimizer(trainee, config.optim))
    tracker = Tracker(tmp_path, config, quiet=True)
    world = World(0, 1, torch.device("cpu"))
    objective = Autoregressive(PLAIN, tokenizer, total_steps=60, seed=0)
    train_loop(Running(config, Built(trainee, objective, batches), state, tracker, tmp_path, world))
    assert column(tmp_path, "train/cross_entropy")[-1] < 0.3  # from ln 32 = 3.47


def test_a_loss_that_is_not_finite_moves_nothing(make_config, tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"step 0: loss nan.*no checkpoint was written yet"):
        train_poisoned(make_config(), tmp_path / "poisoned")


class Diverging(torch.optim.AdamW):
    """Its second step makes an infinite weight, from a finite gradient."""

    steps = 0

    def step(self, closure=None):
        super().step(closure)
        self.steps += 1
        if self.steps == 2:
            self.param_groups[0]["params"][0].data.view(-1)[0] = torch.inf


LOOKS = ("log_every", "save_every", "validate_every", "sample_every")
"""What looks at the weights of a step."""


@pytest.mark.parametrize("look", LOOKS)
def test_a_step_that_makes_weights_that_are_not_finite_stops_the_run_before_they_are_looked_at(
    look, make_config, tmp_path, monkeypatch
):
    config = make_config(loop={"steps": 3, **dict.fromkeys(LOOKS, 9), look: 1})
    monkeypatch.setattr(torch.optim, "AdamW", Diverging)
    with pytest.raises(NonFiniteLoss, match=r"step 1: the step made weights of norm inf; lower optim\.lr") as caught:
        train(config, tmp_path / "run", quiet=True)
    saved = list_resume(tmp_path / "run" / "checkpoints")
    assert [load_resume(path)["step"] for path in saved] == ([1] if look == "save_every" else [])
    assert str(saved[-1] if saved else "no checkpoint") in str(caught.value)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl") if look in ("log_every", "validate_every") else []
    assert {line["step"] for line in lines} == ({1} if lines else set())
    assert not (tmp_path / "run" / "samples" / "step_000002.png").exists()
    assert not (tmp_path / "run" / "model").exists()


def test_weights_that_nothing_looks_at_stop_the_run_by_the_loss_that_they_give(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", Diverging)
    with pytest.raises(NonFiniteLoss, match=r"step 2: loss (nan|inf)"):
        train(make_config(loop={"steps": 9, "log_every": 9}), tmp_path / "run", quiet=True)
    assert not list_resume(tmp_path / "run" / "checkpoints")


def test_a_validation_that_is_not_finite_stops_the_run_before_the_model_is_exported(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(Autoregressive, "validate", lambda *_: {"accuracy": 0.5, "cross_entropy": float("nan")})
    with pytest.raises(NonFiniteLoss, match=r"step 1: validation cross_entropy is nan"):
        train(make_config(loop={"steps": 1}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "model").exists()


def train_poisoned(config, folder: Path) -> None:
    """One step on a model with an infinite weight; it must not move the other weights."""
    trainee = Trainee(ReARGenerator(config.model.sized(32, 16, 3)))
    with torch.no_grad():
        trainee.generator.lm_head.bias[0] = torch.inf
    before = {key: value.clone() for key, value in trainee.state_dict().items()}
    batches = TokenBatches(TokenStore.open(config.data.tokens), batch_size=8, seed=0)
    folder.mkdir()
    try:
        run = Running(
            config,
            Built(trainee, Autoregressive(PLAIN, None, total_steps=6, seed=0), batches),
            State(trainee, build_optimizer(trainee, config.optim)),
            Tracker(folder, config, quiet=True),
            folder,
            World(0, 1, torch.device("cpu")),
        )
        train_loop(run)
    finally:
        assert all(torch.equal(value, before[key]) for key, value in trainee.state_dict().items())


def even(tensor, std, generator):
    """First weights that are the same in every PyTorch; `trunc_normal_` of 2.10 draws others by a seed than 2.13's."""
    return tensor.copy_((uniform(generator or seeded(0), *tensor.shape) - 0.5) * std * 12**0.5)


def test_loss_curve(make_config, tmp_path, monkeypatch):
    """20 steps of reAR against the stored curve: silent changes of the numerics show here."""
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", even)
    for module in ("generators.rear", "training.build"):
        monkeypatch.setattr(f"consonar.{module}.draw_weights", partial(draw_weights, draw=even))
    run = train(make_config(objective=REAR, loop={"steps": 20}), tmp_path / "run", quiet=True)
    stored = json.loads(CURVE.read_text())
    for key, values in stored.items():
        assert column(run, key) == pytest.approx(values, rel=1e-3), key
