"""Training a convolutional VQ tokenizer: pixels, features, codebook; optionally a patch discriminator.

loss = mse [+ w_c chroma] + w_p perceptual + codebook + beta commitment [+ w_d adversarial]: VQ-VAE (van den Oord et
al. 2017, eq. 3) with the terms of VQGAN (Esser et al. 2021, eq. 5-6). The chroma term is ours: on flat-coloured
pictures the codes otherwise spend long on outlines before they carry colour. Codes that no vector has chosen for
`revive_after` steps are moved onto encoder vectors of the current batch (Dhariwal et al. 2020, section 3.1: random
restarts).

Deviation: the discriminator's own loss and the generator's adversarial loss are summed and minimised by the one
optimizer; the former sees detached images, the latter detached discriminator weights, so each moves only its own side.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from consonar import distributed, parallel
from consonar.components import save_tokenizer
from consonar.errors import UserError
from consonar.networks import PERCEPTUAL_DISTANCES
from consonar.networks.discriminator import PatchDiscriminator, save_discriminator
from consonar.options import CountOrZero, NotNegative, ReadOnlyWith, Share
from consonar.origin import Origin
from consonar.records import to_device
from consonar.seeding import generator, integers
from consonar.tokenizers import quantizer
from consonar.tokenizers.base import CodebookTokenizer
from consonar.tokenizers.vqgan import ResidualBlock
from consonar.training.objectives.base import ObjectiveConfig
from consonar.types import ImageBatch, ModelConfig, Objective

FEATURES = ReadOnlyWith(lambda given: given.perceptual_weight > 0, "{}perceptual_weight over 0")
LPIPS = ReadOnlyWith(
    lambda given: given.perceptual == "lpips" and given.perceptual_weight > 0,
    "{}perceptual 'lpips' and {}perceptual_weight over 0",
)
DISCRIMINATOR = ReadOnlyWith(lambda given: given.discriminator_weight > 0, "{}discriminator_weight over 0")
REVIVAL = ReadOnlyWith(lambda given: given.revive_after > 0, "{}revive_after over 0")


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig(ObjectiveConfig):
    """Loss weights of a VQ tokenizer."""

    kind: Literal["reconstruction"] = "reconstruction"
    mse_weight: NotNegative = 1.0
    """Mean squared error of pixels in [-1, 1]."""
    chroma_weight: NotNegative = 0.0
    """Mean squared error of colour differences (pixel minus its grey level), on top of `mse_weight`."""
    perceptual_weight: NotNegative = 0.1
    """Distance of network features, by `perceptual`."""
    perceptual: Annotated[Literal["efficientnet-lite0", "lpips"], FEATURES] = "efficientnet-lite0"
    """Which feature distance: EfficientNet-Lite0 (comes with pip) or LPIPS (needs the VGG16 weights)."""
    perceptual_weights: Annotated[str | None, LPIPS] = None
    """File of torchvision's VGG16 weights, for lpips; None: vgg16-397923af.pth in the cache folder."""
    codebook_weight: NotNegative = 1.0
    """Pulls codes to encoder vectors."""
    commitment_weight: NotNegative = 0.25
    """Pulls encoder vectors to their codes (beta)."""
    discriminator_weight: NotNegative = 0.0
    """Adversarial term; 0 builds no discriminator."""
    discriminator_start: Annotated[CountOrZero, DISCRIMINATOR] = 0
    """Step from which the adversarial term counts."""
    revive_after: CountOrZero = 50
    """Steps without use after which a code is moved onto an encoder vector; 0: never."""
    revive_until: Annotated[Share, REVIVAL] = 0.8
    """Share of training after which codes are left where they are."""

    @property
    def has_discriminator(self) -> bool:
        return self.discriminator_weight > 0

    def check_model(self, model: ModelConfig | None) -> None:
        smallest, size = PERCEPTUAL_DISTANCES[self.perceptual].smallest_input, getattr(model, "image_size", None)
        if self.perceptual_weight > 0 and size is not None and size < smallest:
            raise UserError(
                f"objective.perceptual_weight: {self.perceptual} reads images of {smallest} px or more, "
                f"model.image_size is {size}; set it to 0"
            )


class TokenizerTrainee(nn.Module):
    """The tokenizer, how long ago each code was used, and the discriminator if there is one. Of the residual blocks
    every `recompute_every`-th is calculated again for the gradient; 0: none."""

    def __init__(self, tokenizer: CodebookTokenizer, *, discriminator: bool, recompute_every: int = 0):
        super().__init__()
        self.tokenizer = tokenizer
        blocks = [part for part in tokenizer.modules() if isinstance(part, ResidualBlock)]
        for index, block in enumerate(blocks):
            block.recomputed = recompute_every > 0 and index % recompute_every == 0
        self.register_buffer("steps_unused", torch.zeros(tokenizer.vocab_size, dtype=torch.int64))
        self.discriminator = PatchDiscriminator() if discriminator else None
        self.steps_unused: Tensor

    def forward(self, images: Tensor) -> tuple[object, Tensor | None, Tensor | None, Tensor | None]:
        """The tokenizer's `VQOutput`; discriminator scores of real, detached and live reconstructions (or None)."""
        output = self.tokenizer(images)
        if self.discriminator is None:
            return output, None, None, None
        frozen = {key: value.detach() for key, value in self.discriminator.named_parameters()}
        live = functional_call(self.discriminator, frozen, (output.reconstruction,))
        scores = self.discriminator(images), self.discriminator(output.reconstruction.detach()), live
        return output, *(score.float() for score in scores)  # means over patches are not for bf16

    def save(self, folder: Path, origin: Origin) -> None:
        """Writes the tokenizer to `folder`."""
        save_tokenizer(self.tokenizer, folder)

    def export(self, folder: Path, origin: Origin) -> None:
        """Writes the tokenizer to model/ in the run `folder`, and to discriminator/ what it was trained against."""
        self.save(folder / "model", origin)
        if self.discriminator is not None:
            save_discriminator(self.discriminator, folder / "discriminator")

    def parts(self) -> list[nn.Module]:
        """What is compiled, and sharded, each on its own."""
        return [self.tokenizer.encoder, self.tokenizer.decoder]


class Reconstruction(Objective[ImageBatch, ImageBatch]):
    def __init__(self, config: ReconstructionConfig, *, total_steps: int, seed: int, world: distributed.World):
        self.config, self.total_steps, self.seed, self.world = config, total_steps, seed, world
        self.perceptual: nn.Module | None = None
        if config.perceptual_weight > 0:
            distance = PERCEPTUAL_DISTANCES[config.perceptual].load(config.perceptual_weights)
            self.perceptual = distance.to(world.device)

    @torch.no_grad()
    def prepare(self, model: TokenizerTrainee, batch: ImageBatch, step: int) -> ImageBatch:
        """The images as they are; codes that were long unused move onto vectors of them."""
        if self.config.revive_after and step and step < self.config.revive_until * self.total_steps:
            self._revive(model, batch, step)
        model.steps_unused += 1  # here and not in `loss`: a step may be several micro-batches
        return batch

    def _revive(self, model: TokenizerTrainee, batch: ImageBatch, step: int) -> None:
        dead = (model.steps_unused > self.config.revive_after).nonzero().flatten()
        if not len(dead):
            return
        with parallel.whole(model) as found:
            of_image = found.tokenizer.vectors(batch.images).unflatten(0, (len(batch.images), -1))
            vectors = distributed.rows_of_all(of_image, self.world).flatten(0, 1)
            codebook = found.tokenizer.quantize.embedding.weight
        pick = to_device(integers(generator(self.seed, "revive", step), 0, len(vectors), len(dead)), dead.device)
        codebook[dead] = vectors[pick].to(codebook.dtype)
        own = model.tokenizer.quantize.embedding.weight
        if own is not codebook:  # of a model in shards
            own.copy_(parallel.like(own, codebook))
        model.steps_unused[dead] = 0

    def loss(self, model: TokenizerTrainee, prepared: ImageBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images = prepared.images
        output, real, fake, live = model(images)
        terms = {
            "mse": F.mse_loss(output.reconstruction, images),
            "codebook": quantizer.codebook_loss(output.vectors, output.codes),
            "commitment": quantizer.commitment_loss(output.vectors, output.codes),
        }
        config = self.config
        total = config.mse_weight * terms["mse"] + config.codebook_weight * terms["codebook"]
        total = total + config.commitment_weight * terms["commitment"]
        if config.chroma_weight > 0:
            error = output.reconstruction - images
            terms["chroma"] = (error - error.mean(1, keepdim=True)).square().mean()
            total = total + config.chroma_weight * terms["chroma"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(output.reconstruction, images).mean()
            total = total + config.perceptual_weight * terms["perceptual"]
        if real is not None:
            # Before its start the term is 0 times its value: DistributedDataParallel needs every gradient every step.
            started = float(step >= config.discriminator_start)
            terms["discriminator"] = started * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
            terms["adversarial"] = started * -live.mean()
            total = total + terms["discriminator"] + config.discriminator_weight * terms["adversarial"]
        trainee = parallel.unwrap(model)
        counts = quantizer.code_counts(output.tokens, trainee.tokenizer.vocab_size)
        used = distributed.sum_over_ranks(counts, self.world) > 0
        trainee.steps_unused.masked_fill_(used, 0)
        return total, terms

    @torch.no_grad()
    def validate(self, model: TokenizerTrainee, batches: Iterator[ImageBatch]) -> dict[str, float]:
        """PSNR in dB (mean over images, clamped pixels), code usage 0..1 and perplexity on held-out images."""
        tokenizer = model.tokenizer
        counts = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
        psnr, count = 0.0, 0
        for batch in batches:
            tokens = tokenizer.encode(batch.images)
            error = (tokenizer.decode(tokens).clamp(-1, 1) - batch.images).square().mean((1, 2, 3)) / 4
            psnr += float((-10 * error.clamp_min(1e-10).log10()).sum())
            counts += quantizer.code_counts(tokens, tokenizer.vocab_size).cpu()
            count += len(tokens)
        return {"psnr": psnr / count, "usage": quantizer.usage(counts), "perplexity": quantizer.perplexity(counts)}
