"""Recipes of published rows: reAR (arXiv 2510.04450) and VA-pi (arXiv 2512.19680).

Settings are those of the released configurations (QY-H00/reAR, ali-vilab/alitok, Lil-Shake/VA-Pi); numbers are the
articles' and their project pages': FID and IS of ImageNet by the ADM protocol on 50,000 samples at 256 x 256, and
GenEval of captions. We have repeated none of these runs. A docstring says what was published, on how many GPUs, and
what is assumed where nothing was.

The folders that the recipes name are made once, from released files and from ImageNet (docs/training.md):

    consonar convert maskgit-vqgan-imagenet-f16-256.bin --to models/maskgit-vqgan
    consonar tokenize --tokenizer models/maskgit-vqgan --data imagefolder:IMAGENET --views ten_crop \\
        --out tokens/imagenet-maskgit-vqgan

`loop.batch_size` is the batch of one optimiser step over all processes and micro-batches. With P processes of torchrun,
one pass reads batch_size / (P * loop.accumulation) images; all splits of a batch train the same way.

Deviations from the released code, all reAR rows: the encode term counts at noised positions too, as in the article
(`objective.mask_noised` is the released code); logging, validation and checkpoints come at intervals of our own; the
blocks are not compiled unless `loop.compile` is set. Heads have three linear maps as released (article: two).
"""

from dataclasses import replace

from consonar.generators.alitok import ALITOK_PRESETS
from consonar.generators.rear import REAR_PRESETS
from consonar.training.config import DataConfig, LoopConfig, TrainConfig
from consonar.training.noise import NoiseConfig
from consonar.training.objectives.alignment import GuardConfig
from consonar.training.objectives.autoregressive import AutoregressiveConfig
from consonar.training.objectives.controls import CrossEntropyConfig
from consonar.training.objectives.policy import PolicyConfig
from consonar.training.optim import OptimConfig

PLAIN = AutoregressiveConfig(class_dropout=0.1)
# Heads at layer 0 and at three quarters of the depth (15 of 20, 18 of 24); the largest noise rate falls from 1 at the
# start to 0 at three quarters of the run (187,500 of 250,000 steps).
REGULARISED = replace(
    PLAIN,
    embedding_weight=1.0,
    head_depth=3,
    head_width=2048,
    noise=NoiseConfig(schedule="truncated_linear", max_rate=1.0, anneal_end=0.75, corruption="uniform"),
)
# 100 epochs of ImageNet are 62,500 steps of 2,048 images.
OPTIM = OptimConfig(
    lr=4e-4, min_lr=1e-5, warmup_steps=62_500, beta1=0.9, beta2=0.96, weight_decay=0.03, max_grad_norm=1.0
)
LOOP = LoopConfig(
    steps=250_000, batch_size=2048, precision="bf16", ema_decay=0.0,
    log_every=50, validate_every=5_000, sample_every=5_000, save_every=5_000,
)  # fmt: skip
# VA-pi for captions, as the released script for LlamaGen names it.
IN_WORDS = PolicyConfig(
    rewards={"mse": 1.0, "lpips": 1.0}, group_size=8, advantage_clamp=5.0, clip_range=0.2, ce_weight=0.1,
    kl_weight=0.01, context_noise=0.5,
)  # fmt: skip


def rear_s() -> TrainConfig:
    """reAR-S on MaskGIT-VQGAN, ImageNet 256, 400 epochs: published FID 2.00, IS 295.7

    Published: 8 A800, 256 images each; guidance 22.0, power_cosine, power 2.75, temperature 1. The article counts 201M
    parameters; the released configuration, which this is, has 218.4M without heads (231.0M with them).
    """
    return TrainConfig(
        recipe="rear-s",
        tokenizer="models/maskgit-vqgan",
        model=REAR_PRESETS["S"],
        objective=REGULARISED,
        data=DataConfig(tokens="tokens/imagenet-maskgit-vqgan"),
        optim=OPTIM,
        loop=LOOP,
        seed=42,
    )


def rear_b() -> TrainConfig:
    """reAR-B on MaskGIT-VQGAN, ImageNet 256, 400 epochs: published FID 1.91, IS 300.9

    Published: 261M parameters; 8 A800, 2 micro-batches of 128 images each; guidance 15.0, power_cosine, power 2.5,
    temperature 1.
    """
    return replace(rear_s(), recipe="rear-b", model=REAR_PRESETS["B"], loop=replace(LOOP, accumulation=2))


def rear_l() -> TrainConfig:
    """reAR-L on MaskGIT-VQGAN, ImageNet 256, 400 epochs: published FID 1.86, IS 316.9

    Published: 461M parameters; 8 A800, 2 micro-batches of 128 images each. The project page names guidance 10.0 for
    these numbers (11.0: FID 1.90, IS 323.2), the released configuration 15.0 with power_cosine, power 2.5.
    """
    return replace(rear_b(), recipe="rear-l", model=REAR_PRESETS["L"])


def ar_l() -> TrainConfig:
    """Plain AR, otherwise `rear-l`: published FID 3.02, IS 256.2

    The authors' own baseline, without a released configuration; guidance is not stated. Plain AR of the sizes S and B
    is no published row.
    """
    return replace(rear_l(), recipe="ar-l", objective=PLAIN)


def rear_l_vqgan_plus() -> TrainConfig:
    """reAR-L on VQGAN+ (12 bit), ImageNet 256, 400 epochs: no number published

    Published: the configuration alone, `rear-l` with learning rate 1e-4, on 8 GPUs, for the tokenizer with 4,096 codes
    of width 64 (`vqgan_plus_12bit.bin`); 468M parameters. The released code cannot run it: its heads are made for codes
    of width 256.
    """
    data, optim = DataConfig(tokens="tokens/imagenet-vqgan-plus-12bit"), replace(OPTIM, lr=1e-4)
    return replace(rear_l(), recipe="rear-l-vqgan-plus", tokenizer="models/vqgan-plus-12bit", data=data, optim=optim)


def rear_b_titok() -> TrainConfig:
    """reAR-B on TiTok-B64, ImageNet 256, 400 epochs: published FID 4.01

    Published: the row, and 261M parameters (those of `rear-b`; 4,096 codes make it 265.2M). Assumed, for no
    configuration was released: everything else as in `rear-b`. Guidance is not stated.
    """
    data = DataConfig(tokens="tokens/imagenet-titok-b64")
    return replace(rear_b(), recipe="rear-b-titok", tokenizer="models/titok-b64", data=data)


def ar_b_titok() -> TrainConfig:
    """Plain AR, otherwise `rear-b-titok`: published FID 4.45

    Assumed as there.
    """
    return replace(rear_b_titok(), recipe="ar-b-titok", objective=PLAIN)


def rear_b_alitok() -> TrainConfig:
    """reAR on AliTok-B, AliTok's own generator, ImageNet 256, 800 epochs: published FID 1.42

    Published: the row, 177M parameters, and that AliTok's settings were kept, which are those of `ar-b-alitok`.
    Assumed, for no configuration was released: reAR's part as in `rear-b`, with layer 18 of 24 and noise until three
    quarters of the run. Guidance is not stated; AliTok-B itself has 16.0, power_cosine, power 1.8.
    """
    return replace(
        rear_b(),
        recipe="rear-b-alitok",
        tokenizer="models/alitok",
        model=ALITOK_PRESETS["B"],
        data=DataConfig(tokens="tokens/imagenet-alitok"),
        loop=replace(LOOP, steps=500_000, accumulation=2),
    )


def ar_b_alitok() -> TrainConfig:
    """AliTok-B (arXiv 2506.05289), plain AR, ImageNet 256, 800 epochs: published FID 1.50, IS 305.9

    Published: 177M parameters; 16 GPUs of 128 images each (`loop.accumulation` 2 fits the batch on 8); guidance 16.0,
    power_cosine, power 1.8, temperature 1.
    """
    return replace(rear_b_alitok(), recipe="ar-b-alitok", objective=PLAIN)


def vapi_llamagen_xxl() -> TrainConfig:
    """VA-pi on LlamaGen-XXL at 384 px, 100 updates: published FID 14.36 -> 7.65, IS 86.55 -> 116.70

    Give `--init` (1.41B parameters), `--tokenizer` (LlamaGen's VQ-16 at 384 px) and `--data`. Published: 8 GPUs of 16
    images with 8 sequences each, 12,800 images or 1 % of ImageNet, 25 minutes; numbers without guidance, temperature 1,
    drawn at 384 and reduced to 256. As in the released script there is no noise and no KL, hence no second model here.
    It drops one class in ten, and units, in the update but not in the draw; this drops classes in both, units in none.
    Validation, which it has not, reads 1,024 images.
    """
    return TrainConfig(
        recipe="vapi-llamagen-xxl",
        model=None,
        data=DataConfig(validation_items=1024),
        objective=PolicyConfig(
            rewards={"mse": 1.0, "lpips": 1.0}, group_size=8, temperature=1.0, advantage_clamp=5.0, clip_range=0.2,
            ce_weight=0.1, kl_weight=0.0, context_noise=0.0, class_dropout=0.1, guard=GuardConfig(measure_kl=False),
        ),
        optim=OptimConfig(
            lr=1e-6, min_lr=1e-6, warmup_steps=0, beta1=0.9, beta2=0.999, weight_decay=1e-4, max_grad_norm=1.0
        ),
        loop=LoopConfig(steps=100, batch_size=128, precision="bf16", log_every=1, save_every=20),
    )  # fmt: skip


def vapi_llamagen_xl() -> TrainConfig:
    """VA-pi on LlamaGen-XL at 384 px, 100 updates: published FID 15.55 -> 9.23, IS 79.16 -> 111.59

    Otherwise `vapi-llamagen-xxl`, with `--init` of 775M parameters. Assumed, for the released script is that of XXL:
    its settings, and 384 px.
    """
    return replace(vapi_llamagen_xxl(), recipe="vapi-llamagen-xl")


def vapi_llamagen_t2i() -> TrainConfig:
    """VA-pi on LlamaGen-XL for captions at 256 px, 200 updates: published GenEval 0.306 -> 0.339

    Give `--init` (777.7M parameters), `--tokenizer` (LlamaGen's VQ-16 for text), `--text-encoder` (Flan-T5-XL) and
    `--data` with captions. Published: the script for 8 GPUs of 16 images with 8 sequences each, xi 0.5; images of
    LAION-COCO; GenEval at guidance 7.5, top-k 2000, temperature 1. The script does not start. It names a KL of 0.01
    behind a switch that it leaves off; here the KL counts. It drops one caption in ten in the update but not in the
    draw; this drops captions in both. Assumed, for none is stated: which images of LAION-COCO.
    """
    start = vapi_llamagen_xxl()
    return replace(
        start,
        recipe="vapi-llamagen-t2i",
        objective=replace(IN_WORDS, class_dropout=0.1),
        loop=replace(start.loop, steps=200),
    )


def ce_llamagen_t2i() -> TrainConfig:
    """The control of `vapi-llamagen-t2i`: cross-entropy alone, same images, captions, noise and steps."""
    objective = CrossEntropyConfig(context_noise=0.5, class_dropout=0.1)
    return replace(vapi_llamagen_t2i(), recipe="ce-llamagen-t2i", objective=objective)


def vapi_janus_1b() -> TrainConfig:
    """VA-pi on Janus-Pro-1B at 384 px, 100 updates: published GenEval 0.725 -> 0.744

    Give `--init`, the generator folder that `convert` makes of a Janus, which brings image tokenizer and words, and
    `--data` with captions. Published: the script for 8 GPUs of 8 images with 8 sequences each, learning rate 1e-7,
    50,000 pairs of FLUX-Reason-6M, no caption dropped, no guidance; GenEval at guidance 5. The script takes for token i
    what the model says once it has read token i, and sets xi to 1, so that it reads nothing but noise; here token i is
    predicted from the place before it, as in the article, and xi is 0.5 as in the text script for LlamaGen. Its KL of
    0.01 is behind a switch that is off; here it counts. Assumed: that learning rate for the aligned arithmetic. All
    weights are trained, as there; with `--lora.rank` adapters are, at a higher rate.
    """
    start = vapi_llamagen_t2i()
    return replace(
        start,
        recipe="vapi-janus-1b",
        objective=IN_WORDS,
        optim=replace(start.optim, lr=1e-7, min_lr=1e-7),
        loop=replace(start.loop, steps=100, batch_size=64),
    )


def ce_janus_1b() -> TrainConfig:
    """The control of `vapi-janus-1b`: cross-entropy alone, same images, captions, noise and steps."""
    return replace(vapi_janus_1b(), recipe="ce-janus-1b", objective=CrossEntropyConfig(context_noise=0.5))
