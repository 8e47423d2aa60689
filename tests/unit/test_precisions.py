"""What a job multiplies in: chosen, applied, undone, recorded; and the models whose weights follow it."""

import json

import pytest
import torch
from conftest import Pictures
from torch.nn import functional as F

from consonar import cli, precision
from consonar.data.tokenizing import write_token_store
from consonar.data.tokens import TokenStore
from consonar.errors import UserError
from consonar.evaluation.features import cached_features
from consonar.evaluation.inputs import folder_image_set
from consonar.evaluation.settings import EvaluationSettings
from consonar.float32 import exact, tf32
from consonar.sampling import job as jobs
from consonar.sampling.sample import SamplerConfig, sample
from consonar.training.run import train

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16
LABELS = torch.tensor([0, 1, 2, 0])


def flags():
    """What PyTorch may round float32 products to: of products, of convolutions, on the CPU, and the older answer."""
    backends = torch.backends
    parts = (
        backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul, backends.mkldnn.conv,
    )  # fmt: skip
    return [part.fp32_precision for part in parts], torch.get_float32_matmul_precision()


@pytest.mark.parametrize("level", ["highest", "high", "medium"])
@pytest.mark.filterwarnings("error")
def test_tf32_is_as_a_job_wants_it_inside_and_as_it_was_after(level, monkeypatch):
    before = flags()
    try:
        torch.set_float32_matmul_precision(level)
        found = flags()
        for name in precision.PRECISIONS:
            with pytest.raises(KeyError), precision.multiplying(name, CUDA):
                allowed = name == "tf32"
                # Both of PyTorch's interfaces: torch.compile reads the older one.
                assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is allowed
                assert flags()[0][:3] == ["tf32" if allowed else "ieee"] * 3
                with exact(CUDA):
                    assert flags() == (["ieee"] * 5, "highest")
                assert torch.backends.cudnn.allow_tf32 is allowed
                raise KeyError
            assert flags() == found
        with precision.multiplying("fp32", CPU):
            assert not {"tf32", "bf16"} & set(flags()[0][3:])
        assert flags() == found
    finally:
        torch.set_float32_matmul_precision(before[1])
        torch.backends.mkldnn.matmul.fp32_precision = before[0][3]
        torch.backends.cuda.matmul.fp32_precision = before[0][0]


def test_what_the_newer_interface_was_set_to_comes_back(monkeypatch):
    before, part = flags(), torch.backends.cuda.matmul
    try:
        part.fp32_precision = "tf32"  # the older one refuses to answer from now on
        with tf32(False, CUDA):
            assert flags()[0][:3] == ["ieee"] * 3
        assert part.fp32_precision == "tf32" and torch.backends.cudnn.conv.fp32_precision == before[0][1]
    finally:
        torch.set_float32_matmul_precision(before[1])
        for where, value in zip((part, torch.backends.mkldnn.matmul), (before[0][0], before[0][3]), strict=True):
            where.fp32_precision = value


def test_autocast_is_as_a_job_wants_it():
    x = torch.ones(2, 2)
    for name, autocast in (("bf16", True), ("bf16", False), ("fp32", True)):
        with torch.autocast("cpu", BF16), precision.multiplying(name, CPU, autocast=autocast):
            assert (x @ x).dtype == (BF16 if name == "bf16" and autocast else torch.float32)
        with torch.autocast("cpu", BF16):
            assert (x @ x).dtype == BF16


@pytest.mark.parametrize("job", ["training", "sampling", "measuring"])
def test_a_precision_that_is_not_there_is_refused_in_one_line(job):
    with pytest.raises(UserError, match=r"^--precision: 'tf32' is of CUDA devices .*; choices: fp32, bf16$"):
        precision.pick_precision("tf32", CPU, "--precision", job)
    with pytest.raises(UserError, match=r"^--precision: .*'fp16'.*auto, fp32, tf32, bf16"):
        precision.pick_precision("fp16", CPU, "--precision", job)


def test_weights_are_copied_and_the_model_is_left(tiny_generator, tokenizer):
    for model in (tiny_generator(), tokenizer):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        assert precision.with_weights(model, "fp32", CPU) is model
        low = precision.with_weights(model, "bf16", CPU)
        assert low is not model and precision.with_weights(low, "bf16", CPU) is low
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        for key, value in low.state_dict().items():
            assert value.dtype == (torch.float32 if key == "quantize.embedding.weight" else BF16), key
            assert torch.equal(value, before[key].to(value.dtype))
        back = precision.with_weights(low, "fp32", CPU)
        assert {value.dtype for value in back.state_dict().values()} == {torch.float32}
    assert precision.with_weights(half := tiny_generator().half(), "bf16", CPU) is not half
    assert precision.with_weights(tokenizer.encode, "bf16", CPU) == tokenizer.encode  # no module: its own affair


def test_samples_in_bf16_are_those_of_bf16_weights(tiny_generator, tokenizer):
    generator = tiny_generator()
    plain = sample(generator, tokenizer, LABELS)
    drawn = sample(generator, tokenizer, LABELS, precision="bf16")
    assert (plain.precision, drawn.precision) == ("fp32", "bf16")  # auto is fp32 on a CPU
    assert drawn.images.dtype == drawn.entropy.dtype == torch.float32
    assert next(generator.parameters()).dtype == torch.float32
    low = tiny_generator().bfloat16()
    again = sample(low, tokenizer.bfloat16(), LABELS, precision="bf16")
    assert torch.equal(again.tokens, drawn.tokens) and torch.equal(again.images, drawn.images)
    assert not torch.equal(drawn.images, plain.images)
    # What is asked for is what is done, whatever the weights are and autocast says.
    with torch.autocast("cpu", BF16):
        raised = sample(low, tokenizer, LABELS, precision="fp32")
    assert torch.equal(raised.tokens, sample(low.float(), tokenizer.float(), LABELS).tokens)


def test_a_job_records_its_precision_and_another_is_another_job(tiny_generator, tokenizer, tmp_path):
    generator = tiny_generator()

    def run(name, stop=None):
        job = jobs.Job(generator, tokenizer, LABELS, seed=0, sampler=SamplerConfig(), source="run", precision=name)

        def progress(done):
            if done == stop:
                raise KeyboardInterrupt

        jobs.run_job(job, tmp_path / "a.npz", shard_size=2, progress=progress)
        return job.settings

    with pytest.raises(KeyboardInterrupt):
        run("bf16", stop=2)
    with pytest.raises(UserError, match=r"another job \(another precision: --precision bf16 goes on\)"):
        run("auto")
    settings = run("bf16")
    assert settings["precision"] == "bf16"
    assert settings["generator_sha256"] == jobs.Job(
        generator, tokenizer, LABELS, seed=0, sampler=SamplerConfig(), source="run"
    ).settings["generator_sha256"]  # fmt: skip
    (tmp_path / "a.npz").unlink()
    with pytest.raises(KeyboardInterrupt):
        run("fp32", stop=2)
    record = tmp_path / "a.npz.parts" / "job.json"
    before = json.loads(record.read_text())
    assert before.pop("precision") == "fp32" and before.pop("num_classes") == generator.num_classes
    record.write_text(json.dumps(before))  # as versions wrote it that had no other precision and said no classes
    run("fp32")


def test_a_store_records_its_precision(tokenizer, tmp_path):
    for name in (None, "bf16"):
        options = {} if name is None else {"precision": name}
        store = write_token_store(tmp_path / str(name), Pictures(5), tokenizer, batch_size=2, **options)
        assert TokenStore.open(store.path).metadata.precision == (name or "fp32")
        assert store.fingerprint == tokenizer.fingerprint
    rows, views = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    exact_ones, low = (TokenStore.open(tmp_path / name).read(rows, views) for name in ("None", "bf16"))
    assert 0.7 < (exact_ones == low).float().mean() <= 1


class Uncast(torch.nn.Module):
    """An own tokenizer, that of the package inside, which gives its networks what it is given."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.name, self.fingerprint, self.grid = inner, "uncast", "0", inner.grid
        self.vocab_size, self.num_tokens, self.code_dim = inner.vocab_size, inner.num_tokens, inner.code_dim
        self.image_size = inner.image_size

    def encode(self, images):
        return self.inner.search(self.inner.latents(images).float().flatten(0, 1)).view(len(images), -1)

    def embed(self, tokens):
        return self.inner.embed(tokens)

    def decode_embeddings(self, codes):
        return self.inner.pixels(codes)

    def decode(self, tokens):
        return self.decode_embeddings(self.embed(tokens))


def test_a_tokenizer_that_does_not_cast_multiplies_under_autocast(tokenizer, tiny_generator, tmp_path):
    own = Uncast(tokenizer).eval()
    exact_ones, low = (
        write_token_store(tmp_path / name, Pictures(5), own, precision=name).read(
            torch.arange(5), torch.zeros(5).long()
        )
        for name in ("fp32", "bf16")
    )
    assert 0.7 < (exact_ones == low).float().mean() < 1
    assert sample(tiny_generator(), own, LABELS, precision="bf16").images.isfinite().all()


def test_reference_features_of_one_precision_do_not_serve_another(picture_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CONSONAR_CACHE", str(tmp_path))
    images, _, _ = folder_image_set(picture_folder / "validation" / "all")

    class Network:
        name, weights_sha256, num_features, types = "mean", "x", 3, []

        def __call__(self, images):
            self.types.append(F.linear(images.mean((2, 3)), torch.eye(3)).dtype)
            return images.mean((2, 3))

    network = Network()
    for name in ("fp32", "bf16", "fp32"):
        settings = EvaluationSettings(precision=name)
        with settings.multiplying():
            cached_features(network, images, settings)
    assert network.types == [torch.float32, BF16]
    with pytest.raises(UserError, match="precision: 'tf32'"):
        EvaluationSettings(precision="tf32")
    assert EvaluationSettings(precision="auto").precision == "fp32"


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "openmoji", "--precision", "tf32", "--device", "cpu", "--out", "a.png"],
        ["tokenize", "--tokenizer", "openmoji-64", "--data", "openmoji", "--precision", "tf32", "--device", "cpu",
         "--out", "a"],
        ["evaluate", "a.npz", "--reference", "openmoji-64", "--precision", "tf32", "--device", "cpu"],
    ],
)  # fmt: skip
def test_commands_refuse_what_the_device_has_not_before_they_begin(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and "--precision: 'tf32' is of CUDA devices" in lines[0]
    assert not any(tmp_path.iterdir())


def test_a_run_refuses_what_the_device_has_not(make_config, tmp_path):
    with pytest.raises(UserError, match=r"^loop\.precision: 'tf32' is of CUDA devices"):
        train(make_config(loop={"precision": "tf32"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
