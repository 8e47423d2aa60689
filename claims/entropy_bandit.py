"""Which way holds the entropy of a policy: python claims/entropy_bandit.py. Writes claims/results/entropy_bandit.json.

A bandit of 24 codes in 256 contexts whose distributions come from shared weights (tanh network, 32 hidden units), with
the exact gradient of the expected reward, so that nothing but the way of holding entropy differs. 32 contexts at a
time; Adam, 600 updates, 3 seeds. All numbers are means over all contexts.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from consonar.distributed import machine_name
from consonar.evaluation.results import library_versions
from consonar.files.writers import write_atomically
from consonar.seeding import generator
from consonar.training.losses import entropy
from consonar.training.policy_gradient import entropy_penalty

CONTEXTS, BATCH, UPDATES, SEEDS = 256, 32, 600, 3
WAYS = {
    "free": ("free", 0.0), "penalty of every position, 1": ("position", 1.0),
    "penalty of every position, 4": ("position", 4.0), "penalty of the mean, 1": ("mean", 1.0),
    "penalty of the mean, 4": ("mean", 4.0), "dual variable of the mean, rate 0.02": ("dual", 0.02),
    "dual variable of the mean, rate 0.1": ("dual", 0.1), "projection of the logits' gradient": ("logits", 0.0),
    "projection of the weights' gradient": ("weights", 0.0),
}  # fmt: skip
COLUMNS = ("reward gained", "mean entropy moved by", "entropy of a position, without sign", "mean of a batch, at most")


def orthogonal(gradients: list[Tensor], others: list[Tensor], dim: int | None = None) -> list[Tensor]:
    """The gradients without their part along the others: of each row (`dim` -1), or of all numbers together."""
    pairs = list(zip(gradients, others, strict=True))
    if dim is not None:
        return [g - (g * o).sum(dim, True) / (o * o).sum(dim, True).clamp_min(1e-12) * o for g, o in pairs]
    share = torch.stack([(g * o).sum() for g, o in pairs]).sum() / torch.stack([(o * o).sum() for o in others]).sum()
    return [g - share * o for g, o in pairs]


def trained(way: str, strength: float, seed: int) -> list[float]:
    """The numbers of `COLUMNS`, nats and units of reward."""
    rng = generator(seed, "bandit")
    contexts = torch.randn(CONTEXTS, 12, generator=rng)
    weights = [torch.randn(12, 32, generator=rng) / 12**0.5, torch.randn(32, 24, generator=rng) * 3 / 32**0.5]
    rewards = contexts @ torch.randn(12, 24, generator=rng) / 12**0.5 / 2
    rewards = rewards + 0.15 * torch.randn(rewards.shape, generator=rng)

    def logits_of(rows: Tensor | slice) -> Tensor:
        return torch.tanh(1.5 * contexts[rows] @ weights[0]) @ weights[1]

    start = logits_of(slice(None))
    held = entropy(start[None])  # (1, contexts)
    weights = [weight.requires_grad_() for weight in weights]
    optimizer, multiplier, farthest = torch.optim.Adam(weights, lr=3e-3), 0.0, 0.0
    for _ in range(UPDATES):
        rows = torch.randint(CONTEXTS, (BATCH,), generator=rng)
        logits = logits_of(rows)
        now = entropy(logits[None])
        off = float((now - held[:, rows]).detach().mean())
        loss, farthest = -(logits.softmax(-1) * rewards[rows]).sum(-1).mean(), max(farthest, abs(off))
        if way in ("position", "mean"):
            loss = loss + strength * entropy_penalty(now, held[:, rows], of_mean=way == "mean")
        elif way == "dual":
            loss, multiplier = loss - multiplier * now.mean(), multiplier - strength * off
        of_what = [logits] if way == "logits" else weights
        found = list(torch.autograd.grad(loss, of_what, retain_graph=True))
        if way in ("logits", "weights"):
            along = list(torch.autograd.grad(now.sum(), of_what, retain_graph=True))
            found = orthogonal(found, along, -1 if way == "logits" else None)
        if way == "logits":
            found = list(torch.autograd.grad(logits, weights, found))
        for weight, gradient in zip(weights, found, strict=True):
            weight.grad = gradient
        optimizer.step()
    with torch.no_grad():
        end = logits_of(slice(None))
        moved = entropy(end[None]) - held
        gained = ((end.softmax(-1) - start.softmax(-1)) * rewards).sum(-1).mean()
    return [float(gained), float(moved.mean()), float(moved.abs().mean()), farthest]


def main() -> None:
    torch.set_num_threads(1)
    found = {name: [trained(*way, seed) for seed in range(SEEDS)] for name, way in WAYS.items()}
    results = Path(__file__).parent / "results" / "entropy_bandit.json"
    settings = {"contexts": CONTEXTS, "batch": BATCH, "updates": UPDATES, "seeds": SEEDS}
    made = {"settings": settings, "machine": machine_name("cpu"), "versions": library_versions()}
    text = json.dumps({"columns": COLUMNS, **made, "by seed": found}, indent=1) + "\n"
    write_atomically(results, lambda path: path.write_text(text))
    print(f"| way | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name, rows in found.items():
        print(f"| {name} | {' | '.join(f'{sum(column) / SEEDS:.2f}' for column in zip(*rows, strict=True))} |")


if __name__ == "__main__":
    main()
