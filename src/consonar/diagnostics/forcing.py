"""A generator given tokens: its logits under any context, draws from them, sequences of which some tokens are given.

Letters: `B` pictures, `N` tokens, `V` codes.
"""

import torch
from torch import Tensor

from consonar import records
from consonar.diagnostics.subject import Subject
from consonar.records import to_device
from consonar.sampling.decoder import Decoder, guided_logits
from consonar.sampling.sample import SamplerConfig, draw_tokens
from consonar.training import losses
from consonar.types import Condition, Generator

AT_ONCE = 2**24
"""Logits that are drawn from at a time: the sum over codes is float64."""


def forced_logits(generator: Generator, context: Tensor, condition: Condition, sampler: SamplerConfig) -> Tensor:
    """(B, N, V) float32: the logits that sampling would draw from if the tokens before were those of `context`."""
    logits = generator(context, condition)[0].float()
    length = context.shape[1]
    scales = torch.tensor([sampler.scale(i, length) for i in range(length)])
    if (scales == 1).all():
        return logits
    null = generator(context, generator.null_condition(condition))[0].float()
    return guided_logits(logits, null, to_device(scales[:, None], logits.device))


def draw_all(logits: Tensor, uniforms: Tensor, sampler: SamplerConfig) -> Tensor:
    """A token for each position, (B, N) <- logits (B, N, V), numbers (B, N) in [0, 1)."""
    rows = max(1, AT_ONCE // logits.shape[-1])
    pairs = zip(logits.flatten(0, 1).split(rows), uniforms.flatten().split(rows), strict=True)
    return torch.cat([draw_tokens(part, draws[:, None], sampler)[0] for part, draws in pairs]).view(uniforms.shape)


def complete(
    generator: Generator, condition: Condition, tokens: Tensor, keep: Tensor, uniforms: Tensor, sampler: SamplerConfig
) -> Tensor:
    """Sequences (B, N), left to right: the token of `tokens` (B, N) where `keep`, elsewhere one drawn by `uniforms`
    (B, N), with all tokens before it as context, given and drawn ones."""
    length = tokens.shape[1]

    # The decoder hands over one number a token: what is below 0 names the token that is given.
    def draw(logits: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        drawn, entropy = draw_tokens(logits, numbers.clamp(min=0), sampler)
        return torch.where(numbers[:, 0] < 0, -1 - numbers[:, 0].long(), drawn), entropy

    decoder = Decoder(generator, [sampler.scale(i, length) for i in range(length)], draw)
    return decoder(condition, torch.where(keep, -1 - tokens.double(), uniforms))[0]


def forced_draws(subject: Subject) -> Tensor:
    """(n, N): a draw of every token of the held-out pictures under the true tokens before it."""
    drawn, pictures, sampler = [], subject.held_out, subject.settings.sampler
    for part in subject.parts(len(pictures.tokens)):
        tokens, uniforms = (to_device(rows[part], subject.device) for rows in (pictures.tokens, subject.uniforms))
        condition = to_device(records.rows(pictures.condition, part), subject.device)
        logits = forced_logits(subject.generator, tokens, condition, sampler)
        drawn.append(draw_all(logits, uniforms, sampler).cpu())
    return torch.cat(drawn)


def completed(subject: Subject, keep: Tensor) -> Tensor:
    """(K, n, N): `complete` of the held-out pictures for each of K choices `keep` (K, n, N) of tokens that are true."""
    found, pictures, count = [], subject.held_out, len(subject.held_out.tokens)
    rows = torch.arange(count).repeat(len(keep))
    for part in subject.parts(len(rows)):
        chosen = rows[part]
        given = (pictures.tokens[chosen], keep.flatten(0, 1)[part], subject.uniforms[chosen])
        tokens, kept, uniforms = (to_device(tensor, subject.device) for tensor in given)
        condition = to_device(records.rows(pictures.condition, chosen), subject.device)
        found.append(complete(subject.generator, condition, tokens, kept, uniforms, subject.settings.sampler).cpu())
    return torch.cat(found).view(keep.shape)


def scored(logits: Tensor, tokens: Tensor) -> Tensor:
    """(3, B, N) float32: cross-entropy of the true tokens, whether the likeliest token is the true one, and entropy."""
    cross_entropy = -losses.log_probs(logits, tokens[..., None])[..., 0]
    return torch.stack([cross_entropy, (logits.argmax(-1) == tokens).float(), losses.entropy(logits)])


def scores(subject: Subject, context: Tensor, tokens: Tensor, condition: Condition) -> Tensor:
    """(3, n, N) float64 on the CPU: `scored` of tokens (n, N) under a context (n, N), without guidance, at
    temperature 1."""
    found = []
    for part in subject.parts(len(tokens)):
        given, target = (to_device(rows[part], subject.device) for rows in (context, tokens))
        asked = to_device(records.rows(condition, part), subject.device)
        found.append(scored(subject.generator(given, asked)[0].float(), target).double().cpu())
    return torch.cat(found, 1)
