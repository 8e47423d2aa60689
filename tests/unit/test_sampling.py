import numpy as np
import pytest
import torch
from rounding import assert_rounding

from consonar.components import load_tokenizer
from consonar.errors import UserError
from consonar.sampling.sample import SamplerConfig, filter_logits, sample, sample_tokens, uniforms
from consonar.seeding import choose

PROBABILITIES = torch.tensor([[0.125, 0.5, 0.25, 0.125]])


def kept(**settings) -> list[int]:
    return filter_logits(PROBABILITIES.log(), **settings).isfinite()[0].nonzero().flatten().tolist()


def test_top_k():
    assert kept(top_k=1) == [1] and kept(top_k=2) == [1, 2]
    assert kept(top_k=0) == kept(top_k=4) == kept(top_k=99) == [0, 1, 2, 3]
    # Equally likely tokens stay together: which one is dropped would depend on the sorting.
    assert kept(top_k=3) == [0, 1, 2, 3]


def test_top_p():
    assert kept(top_p=1e-9) == kept(top_p=0.5) == [1]  # the most likely token always stays
    assert kept(top_p=0.51) == kept(top_p=0.75) == [1, 2]
    assert len(kept(top_p=0.76)) == 3 and kept(top_p=1.0) == [0, 1, 2, 3]


def test_top_p_counts_what_top_k_left():
    """After top-k 2 the two tokens have 2/3 and 1/3."""
    assert kept(top_k=2, top_p=0.66) == [1] and kept(top_k=2, top_p=0.67) == [1, 2]


def test_filter_treats_rows_alone_and_keeps_values(rng):
    logits = torch.randn(5, 30, generator=rng)
    filtered = filter_logits(logits, top_k=7, top_p=0.8)
    assert torch.equal(filtered, torch.cat([filter_logits(row[None], top_k=7, top_p=0.8) for row in logits]))
    assert torch.equal(filtered[filtered.isfinite()], logits[filtered.isfinite()])


def test_choose_is_the_inverse_transform():
    edges = [0, 0.125 - 1e-12, 0.125 + 1e-12, 0.625 - 1e-12, 0.625 + 1e-12, 0.875 - 1e-12, 0.875 + 1e-12, 1 - 2**-53]
    uniform = torch.tensor(edges, dtype=torch.float64)
    logits = PROBABILITIES.double().log().expand(len(uniform), -1)
    assert choose(logits, uniform[:, None])[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("blocked", [[0], [3], [0, 1, 3]])
def test_choose_never_takes_a_token_of_probability_zero(blocked):
    logits = PROBABILITIES.log().clone()
    logits[:, blocked] = -torch.inf
    uniform = torch.tensor([0, 2**-53, 0.25, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert not torch.isin(choose(logits.expand(len(uniform), -1), uniform[:, None]), torch.tensor(blocked)).any()


def test_choose_follows_the_distribution(rng):
    draws = choose(PROBABILITIES.log(), torch.rand(1, 40000, generator=rng))[0]
    shares = draws.bincount(minlength=4) / 40000
    torch.testing.assert_close(shares, PROBABILITIES[0], rtol=0, atol=5 * 0.5 / 200)


def test_uniforms_belong_to_seeds():
    numbers = uniforms([5, 7, 5], 6)
    assert numbers.dtype == torch.float64 and torch.equal(numbers[0], numbers[2])
    assert not torch.equal(numbers[0], numbers[1])
    assert torch.equal(numbers[1:2], uniforms([7], 6))
    assert torch.equal(numbers[:, :4], uniforms([5, 7, 5], 4))


def test_a_seed_is_its_number_whatever_its_type():
    for seeds in (np.array([5, 7], np.uint8), torch.tensor([5, 7]), [np.int64(5), torch.tensor(7)]):
        assert torch.equal(uniforms(seeds, 6), uniforms([5, 7], 6))
    for seeds in ([0.5, 1], torch.tensor([1.0]), ["5"]):
        with pytest.raises(UserError, match=r"seeds: .*one integer for each image"):
            uniforms(seeds, 6)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"condition": 5}, r"classes: .*one class id for each image"),
        ({"condition": None}, r"classes: .*one class id for each image"),
        ({"seeds": 5}, r"seeds: .*one integer for each image"),
        ({"seeds": [-1, 0]}, r"seeds: -1 is not between 0 and 2\^63 - 1"),
        ({"seeds": [0, 2**70]}, r"seeds: \d+ is not between 0 and 2\^63 - 1"),
        ({"batch_size": "2"}, r"batch_size: '2' is not a number of images"),
        ({"batch_size": 1.5}, r"batch_size: 1\.5 is not a number of images"),
        ({"config": {"temperature": 1}}, r"config: a dict; give a SamplerConfig"),
        ({"tokenizer": None}, r"tokenizer: a NoneType is none; load one with `load_tokenizer`"),
        ({"generator": "openmoji"}, r"generator: a str is none; load one with `load_generator`"),
    ],
)  # fmt: skip
def test_what_is_of_another_kind_is_refused(given, words, tiny_generator, tokenizer):
    settings = {"generator": tiny_generator(), "tokenizer": tokenizer, "condition": [0, 1]} | given
    with pytest.raises(UserError, match=words) as caught:
        sample(**settings)
    assert "\n" not in str(caught.value)


def test_a_number_of_tokens_is_one(tokenizer_folder):
    for wrong in (-4, 0, 1.5):
        with pytest.raises(UserError, match=rf"num_tokens: {wrong} is not a number of tokens, 1 or more"):
            load_tokenizer(tokenizer_folder, num_tokens=wrong)


def test_classes_of_numpy_are_classes(tiny_generator, tokenizer):
    tokens = [sample(tiny_generator(), tokenizer, given).tokens for given in ([0, 1], np.array([0, 1]))]
    assert torch.equal(*tokens)


def test_there_is_no_dropout_in_sampling(tiny_generator, tokenizer):
    generator = tiny_generator(dropout=0.5).train()
    generator.blocks[0].eval()
    modes = [part.training for part in generator.modules()]
    sampled = sample(generator, tokenizer.train(), [0, 1]).tokens
    assert [part.training for part in generator.modules()] == modes and tokenizer.training
    assert torch.equal(sampled, sample(generator.eval(), tokenizer.eval(), [0, 1]).tokens)


@pytest.mark.parametrize(
    "classes", [[0.5, 1.7], torch.tensor([1.0]), torch.tensor([True]), torch.zeros(1, 1, dtype=torch.int64), ["a"], "a"]
)
def test_classes_that_are_no_whole_numbers_are_refused_and_not_cut_off(classes, tiny_generator, tokenizer):
    with pytest.raises(UserError, match=r"classes: .*one class id for each image"):
        sample(tiny_generator(), tokenizer, classes)


SETTINGS = {
    "plain": SamplerConfig(),
    "guided": SamplerConfig(guidance_scale=3, guidance_schedule="power_cosine", temperature=0.9, top_k=20),
    "interval": SamplerConfig(guidance_scale=3, guidance_schedule="interval", guidance_interval=4, top_p=0.9),
    "greedy": SamplerConfig(temperature=0),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_sample_does_not_depend_on_its_batch(name, tiny_generator):
    generator, config = tiny_generator(), SETTINGS[name]
    classes, seeds = torch.tensor([2, 0, 1, 0, 2]), [11, 12, 13, 14, 15]
    together, entropy = sample_tokens(generator, classes, seeds, config)
    order = [3, 1, 4, 0, 2]
    shuffled, _ = sample_tokens(generator, classes[order], [seeds[i] for i in order], config)
    assert torch.equal(shuffled, together[order])
    for i in range(5):
        alone, own_entropy = sample_tokens(generator, classes[i : i + 1], seeds[i : i + 1], config)
        assert torch.equal(alone[0], together[i])
        assert_rounding(own_entropy[0], entropy[i], 1000)
    if name != "greedy":
        other, _ = sample_tokens(generator, classes, [s + 100 for s in seeds], config)
        assert not torch.equal(other, together)


@pytest.mark.parametrize("num_classes", [3, 40])
def test_the_number_of_pictures_does_not_choose_the_arithmetic_of_rear(num_classes, tiny_generator):
    """Few classes are always projected once each, many once for each picture; in training the batch decides."""
    generator, rows = tiny_generator(num_classes=num_classes), []
    generator.blocks[0].adaLN_modulation.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    for count in (1, 2, 50):
        sample_tokens(generator, torch.arange(count) % 3, range(count), SamplerConfig(), num_tokens=1)
    assert rows == ([4, 4, 4] if num_classes == 3 else [1, 2, 50])


class Counting:
    """A generator that records how many rows each call has."""

    def __init__(self, generator):
        self.inner, self.rows = generator, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, context, condition, **keywords):
        self.rows.append(len(condition))
        return self.inner(context, condition, **keywords)


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 2), (1.5, 4), (0.0, 4)])
def test_null_rows_run_only_while_guidance_is_on(scale, rows, tiny_generator):
    counting = Counting(tiny_generator())
    sample_tokens(counting, torch.tensor([0, 1]), [0, 1], SamplerConfig(guidance_scale=scale))
    assert counting.rows == [rows] * 16


def test_guidance_scale_zero_is_the_unconditional_model(tiny_generator):
    generator = tiny_generator()
    off, _ = sample_tokens(generator, torch.tensor([0, 1]), [3, 3], SamplerConfig(guidance_scale=0))
    null, _ = sample_tokens(generator, torch.tensor([3, 3]), [3, 3], SamplerConfig())
    assert torch.equal(off, null) and torch.equal(off[0], off[1])


def test_tokens_follow_the_uncached_model(tiny_generator):
    """Redraws every token from teacher-forced logits: the sampler is exact, guidance and filter included."""
    generator, config, seeds = tiny_generator(), SETTINGS["guided"], [4, 9]
    classes = torch.tensor([1, 2])
    tokens, _ = sample_tokens(generator, classes, seeds, config)
    with torch.inference_mode():
        conditional = generator(tokens, classes)[0]
        unconditional = generator(tokens, generator.null_condition(classes))[0]
    draws = uniforms(seeds, 16)
    for i in range(16):
        scale = config.scale(i, 16)
        logits = unconditional[:, i] + scale * (conditional[:, i] - unconditional[:, i])
        expected = choose(filter_logits(logits / 0.9, top_k=20), draws[:, i, None])
        assert torch.equal(tokens[:, i : i + 1], expected)


@torch.inference_mode()
def test_fewer_tokens_are_the_first_ones_under_a_schedule_of_that_length(tiny_generator):
    generator, classes = tiny_generator(), torch.tensor([1, 2])
    plain = SamplerConfig()
    whole, _ = sample_tokens(generator, classes, [4, 9], plain)
    assert torch.equal(sample_tokens(generator, classes, [4, 9], plain, num_tokens=6)[0], whole[:, :6])
    rising = SamplerConfig(guidance_scale=9, guidance_schedule="linear", temperature=0)
    short, _ = sample_tokens(generator, classes, [4, 9], rising, num_tokens=2)
    conditional = generator(short, classes)[0][:, 1]
    unconditional = generator(short, generator.null_condition(classes))[0][:, 1]
    assert torch.equal(short[:, 1], (unconditional + 9 * (conditional - unconditional)).argmax(-1))
    for wrong in (0, 17):
        with pytest.raises(UserError, match=rf"num_tokens: {wrong} is not between 1 and the generator's 16"):
            sample_tokens(generator, classes, [4, 9], plain, num_tokens=wrong)


def test_entropy(tiny_generator):
    generator, classes = tiny_generator(), torch.tensor([1, 2])
    tokens, entropy = sample_tokens(generator, classes, [4, 9], SamplerConfig())
    with torch.inference_mode():
        log_probs = generator(tokens, classes)[0].log_softmax(-1)
    assert_rounding(entropy, -(log_probs.exp() * log_probs).sum(-1).mean(1), 1000)


def test_sample_decodes_and_is_split_into_batches(tiny_generator, tokenizer):
    generator, classes = tiny_generator(), torch.tensor([0, 1, 2, 0, 1])
    whole = sample(generator, tokenizer, classes, seeds=range(5))
    parts = sample(generator, tokenizer, classes, seeds=range(5), batch_size=2)
    assert torch.equal(whole.tokens, parts.tokens) and whole.images.shape == (5, 3, 16, 16)
    assert_rounding(whole.images, tokenizer.decode(whole.tokens).clamp(-1, 1), 2000)
    assert whole.images.abs().max() <= 1


@pytest.mark.parametrize(
    ("classes", "seeds", "message"),
    [
        ([0, 3], [0, 1], r"classes: 3 is not a class of this generator; choices: 0\.\.2"),
        ([-1], [0], r"classes: -1 is not a class"),
        ([0, 1], [0], r"seeds: 1 seeds for 2 conditions"),
        ([0, 1], [0, 1, 2, 3], r"seeds: 4 seeds for 2 conditions"),
        ([], [], r"seeds: 0 seeds for 0 conditions"),
    ],
)
def test_wrong_requests(classes, seeds, message, tiny_generator, tokenizer):
    with pytest.raises(UserError, match=message):
        sample(tiny_generator(), tokenizer, torch.tensor(classes, dtype=torch.int64), seeds=seeds, batch_size=2)


def test_a_tokenizer_that_does_not_fit(tiny_generator, tokenizer):
    with pytest.raises(UserError, match=r"tokenizer: tiny-vq has vocab_size 32, the generator was trained with 33"):
        sample(tiny_generator(vocab_size=33), tokenizer, torch.tensor([0]), seeds=[0])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("guidance_scale", -1.0),
        ("guidance_power", 0.0),
    ],
)
def test_wrong_settings(key, value):
    with pytest.raises(UserError, match=f"^{key}: {value} is"):
        SamplerConfig(**{key: value})
