"""VA-pi's loss: advantages, ratio, clipped loss, k3 KL, cross-entropy prior, and the gradient of their sum."""

import ast

import torch

from consonar.training import losses
from consonar.training import policy_gradient as policy


def matches(meta: dict) -> bool:
    return meta["name"].startswith("vapi_grpo")


def run(golden) -> None:
    sizes = golden.meta["config"]
    batch, group, length = sizes["B"], sizes["G"], sizes["T"]
    rewards = golden.tensor("rewards").view(batch, group)
    tokens = golden.tensor("token_indices")  # (B * G, T)
    truth = golden.tensor("gt").repeat_interleave(group, 0)
    for key in ("logits_old", "logits_new", "logits_base", "token_indices", "gt", "rewards"):
        golden.skip(key, "an input")
    equal = policy.group_advantages(torch.full((1, group), 0.5), "grpo")
    golden.compare("equal_rewards_advantage", equal[0])
    cases = sorted({key.split("_")[0] for key in golden.arrays if key.endswith("_grad_logits")})
    assert cases, f"{golden.name}: no case"
    for case in cases:
        run_case(golden, case, rewards, tokens, truth, length)


def run_case(golden, case: str, rewards: torch.Tensor, tokens: torch.Tensor, truth: torch.Tensor, length: int) -> None:
    text = golden.meta["arrays"][f"{case}_loss"]["desc"]
    settings = ast.literal_eval(text[text.index("{") :])
    temperature, clip = settings["temperature"], settings["clip_range"]
    group = rewards.shape[1]
    # Ours draws G samples from one row of logits; here the G rows may differ, so each is an image with one sample.
    actions = tokens[:, None]
    old = policy.token_log_probs(golden.tensor("logits_old"), tokens.view(-1, group, length), temperature)
    logits = golden.tensor("logits_new").requires_grad_()
    log_probs = policy.token_log_probs(logits, actions, temperature)[:, 0]  # (B * G, T)
    prior = policy.token_log_probs(golden.tensor("logits_base"), actions, temperature)[:, 0]
    raw = policy.group_advantages(rewards, "grpo", clamp=0)
    advantages = policy.group_advantages(rewards, "grpo", clamp=settings["adv_clip_max"])
    old = old.reshape(-1, length)
    ratio = policy.probability_ratio(log_probs, old)
    per_token = policy.clipped_policy_loss(ratio, advantages.view(-1, 1), clip, clip)
    kl = policy.kl_k3(log_probs, prior)
    if settings["use_kl_loss"]:
        per_token = per_token + settings["kl_coef"] * kl
    sequence = per_token.mean(1)
    # The official code does not calculate the prior when its weight is 0, and reports 0 then.
    weight = settings["aux_ce_weight"]
    cross_entropy = losses.next_token_loss(logits, truth) if weight else torch.zeros(())
    loss = (sequence.mean() + weight * cross_entropy) / settings["grad_acc"]
    loss.backward()
    found = {
        "token_log_probs": old, "advantages_raw": raw.view(-1), "advantages": advantages.view(-1), "ratio": ratio,
        "per_token_kl": kl, "per_token_loss": per_token, "seq_loss": sequence, "aux_ce": cross_entropy, "loss": loss,
        "clip_frac": policy.clip_fraction(ratio, clip, clip), "grad_logits": logits.grad,
    }  # fmt: skip
    for key, value in found.items():
        golden.compare(f"{case}_{key}", value.detach())
