"""PPO's arithmetic: rewards, advantages, losses, statistics (Schulman et al., arXiv 1707.06347;
Ziegler et al., arXiv 1909.08593).

Pure functions of tensors, and the record that a rollout leaves behind. `response_mask` is bool,
True where a token counts (up to and including EOS). What is in the padding - NaN, even - changes
neither values nor gradients: masked places are replaced with torch.where, since 0 * NaN is NaN.

Legend   B sequences, T tokens of a row (prompt + response), R response tokens

    state s_t = prompt + response[:t]       action = response[t]
    values[t] = V(s_t), the state that predicts token t
    rewards[t] = -kl_coef * penalty[t], and the reward model's score on top at the last token

Departures from the paper's code (numbers as in the README):
2. Padding enters nothing, and the value after the last token is 0 (it bootstrapped from the state
   after EOS).
3. Rewards are not whitened unless asked for, and then scaled only: re-adding the mean to each token
   pays or charges it for existing, which is a length bias.
6. The missing-EOS penalty looks at ids; it looked for EOS in text, where it never is.
"""
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from regularizers import sampled


@dataclass(frozen=True)
class Rollout:
    """What one batch of responses leaves behind for the update, rows in the order of the batch."""
    tokens: Tensor               # (B, T) int64, prompt + response, right-padded
    prompt_lengths: Tensor       # (B,) int64
    response_lengths: Tensor     # (B,) int64, the EOS counted
    finished: Tensor             # (B,) bool, whether the response ends with EOS
    scores: Tensor               # (B,) float32, the reward model's
    logprobs: Tensor             # (B, R) float32, of the sampled tokens, before the update
    ref_logprobs: Tensor         # (B, R) float32
    values: Tensor               # (B, R) float32
    entropy: Tensor              # (B, R) float32, of the policy's next-token distribution
    kl: Tensor                   # (B, R) float32, exact KL(policy || reference)
    sampled_logprobs: Tensor | None = None   # (B, R) float32, as the sampler had them
    penalty: Tensor | None = None      # (B, R) float32, what kl_coef multiplies in the reward
    advantages: Tensor | None = None   # (B, R) float32, whitened over the global batch
    returns: Tensor | None = None      # (B, R) float32, what the critic is trained towards

    @property
    def response_mask(self):
        """(B, R) bool, True up to and including EOS."""
        columns = torch.arange(self.logprobs.shape[1], device=self.logprobs.device)
        return columns < self.response_lengths[:, None]

    def map(self, change):
        """The same record with change(name, tensor) in place of each tensor that is there."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return Rollout(**{name: change(name, x) for name, x in held.items() if x is not None})

    def rows(self, index):
        """The same record for some of the rows, its padding cut to the longest of them."""
        T = int((self.prompt_lengths + self.response_lengths)[index].max())
        R = int(self.response_lengths[index].max())

        def pick(name, x):
            if x.dim() == 1:
                return x[index]
            return x[index, :T if name == "tokens" else R]
        return self.map(pick)

    def to(self, device):
        return self.map(lambda name, x: x.to(device))


def join_rollouts(parts):
    """Rollouts of several processes -> one, part after part, padded with zeros to one width."""
    def join(name, _):
        tensors = [getattr(part, name) for part in parts]
        if tensors[0].dim() == 1:
            return torch.cat(tensors)
        width = max(t.shape[1] for t in tensors)
        return torch.cat([F.pad(t, (0, width - t.shape[1])) for t in tensors])
    return parts[0].map(join)


# ----------------------------------------------------------------------------- masked statistics

def masked_mean(x, mask):
    """Mean of x where mask is True; 0 if it is True nowhere. x, mask of one shape -> scalar."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def masked_variance(x, mask):
    """Biased variance of x where mask is True -> scalar."""
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


def whiten(x, mask, shift_mean=True):
    """(x - mean) / sqrt(var + 1e-8) over the True positions, biased variance; without shift_mean
    x / sqrt(var + 1e-8). x, mask (B, R) -> (B, R), 0 in the padding."""
    x = torch.where(mask, x, 0.0)
    scale = torch.rsqrt(masked_variance(x, mask) + 1e-8)
    if shift_mean:
        x = x - masked_mean(x, mask)
    return torch.where(mask, x * scale, 0.0)


# ------------------------------------------------------------------------ rewards and advantages

def shape_rewards(scores, penalty, response_mask, kl_coef):
    """Reward of each token: -kl_coef * penalty, plus the score at the last token (Ziegler, eq. 2).

    scores (B,), penalty (B, R) nats -> (B, R), 0 in the padding. A row sums to
    score - kl_coef * sum(penalty)."""
    rewards = torch.where(response_mask, -kl_coef * penalty, 0.0)
    n = response_mask.sum(-1, keepdim=True)
    is_last = response_mask & (response_mask.cumsum(-1) == n)
    return torch.where(is_last, rewards + scores[:, None], rewards)


def gae(rewards, values, response_mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438, eq. 16), ending at each
    row's last token.

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)         A_t = delta_t + gamma lam A_{t+1}
        return_t = A_t + V(s_t)

    V and A after the last True token are 0, EOS or not: the episode is over. lam = 0 is TD(0),
    lam = gamma = 1 Monte Carlo. rewards, values (B, R) -> advantages, returns (B, R), 0 in the
    padding, without gradient."""
    rewards, values = rewards.detach(), torch.where(response_mask, values, 0.0).detach()
    advantages = torch.zeros_like(rewards)
    next_advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_advantage = torch.where(response_mask[:, t], next_advantage, 0.0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def with_advantages(rollout, regularizer, kl_coef, missing_eos_penalty, gamma, lam, whiten_rewards):
    """Penalty -> rewards per token -> GAE -> whitened advantages, over the global batch -> Rollout.

    regularizer: name of a sampled penalty, or None (no penalty in the reward)."""
    mask = rollout.response_mask
    charge = torch.where(rollout.finished, 0.0, missing_eos_penalty)
    penalty = torch.zeros_like(rollout.logprobs)
    if regularizer:
        drawn = sampled(regularizer, rollout.logprobs, rollout.ref_logprobs)
        penalty = torch.where(mask, drawn, 0.0)
    rewards = shape_rewards(rollout.scores - charge, penalty, mask, kl_coef)
    if whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, rollout.values, mask, gamma, lam)
    return replace(rollout, penalty=penalty, advantages=whiten(advantages, mask), returns=returns)


# ---------------------------------------------------------------------------------------- losses

def policy_loss(logprobs, old_logprobs, advantages, response_mask, clip):
    """PPO's clipped surrogate, to be minimised (PPO eq. 7):

        mean of max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip)),  ratio = exp(logprobs - old)

    All (B, R) -> scalar over the True positions, and detached stats: clip_frac (share of tokens
    whose gradient the clip has cut off), ratio_max and ratio_mean (of |ratio - 1|), approx_kl (k3
    of old against new, nats per token)."""
    log_ratio = torch.where(response_mask, logprobs - old_logprobs, 0.0)     # (stops NaN gradients)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = masked_mean(torch.maximum(unclipped, clipped), response_mask)
    with torch.no_grad():
        stats = {"clip_frac": masked_mean((clipped > unclipped).float(), response_mask),
                 "ratio_max": (ratio - 1).abs().max(),
                 "ratio_mean": masked_mean((ratio - 1).abs(), response_mask),
                 "approx_kl": masked_mean(torch.expm1(log_ratio) - log_ratio, response_mask)}
    return loss, stats


def value_loss(values, old_values, returns, response_mask, clip):
    """Squared error of the critic, clipped as in PPO's reference code:

        mean of max((v - R)^2, (v_clip - R)^2) / 2,  v_clip = old + clamp(v - old, -clip, clip)

    All (B, R) -> scalar over the True positions, and detached stats: value_clip_frac,
    value_mean."""
    values = torch.where(response_mask, values, 0.0)                         # (stops NaN gradients)
    near_old = old_values + (values - old_values).clamp(-clip, clip)
    plain, clipped = (values - returns).square(), (near_old - returns).square()
    loss = masked_mean(torch.maximum(plain, clipped), response_mask) / 2
    with torch.no_grad():
        moved = ((values - old_values).abs() > clip).float()
        stats = {"value_clip_frac": masked_mean(moved, response_mask),
                 "value_mean": masked_mean(values, response_mask)}
    return loss, stats


# ------------------------------------------------------------------------------------ statistics

def explained_variance(values, returns, response_mask):
    """1 - Var(return - V) / Var(return): 1 a perfect critic, 0 one that says the mean, below 0 a
    harmful one."""
    error = masked_variance(returns - values, response_mask)
    return 1 - error / masked_variance(returns, response_mask).clamp(min=1e-8)


def rollout_statistics(rollout):
    """What is logged of a rollout: means over sequences, or over tokens (`_per_token`), nats."""
    mask = rollout.response_mask
    k3 = sampled("bregman", rollout.logprobs, rollout.ref_logprobs)
    fit = explained_variance(rollout.values, rollout.returns, mask)
    gap = torch.where(mask, (rollout.sampled_logprobs - rollout.logprobs).abs(), 0.0)
    stats = {"score": rollout.scores.mean(), "kl_per_token": masked_mean(rollout.kl, mask),
             "kl_per_sequence": rollout.kl.sum(-1).mean(),
             "k1_per_token": masked_mean(rollout.logprobs - rollout.ref_logprobs, mask),
             "k3_per_token": masked_mean(k3, mask),
             "penalty_per_token": masked_mean(rollout.penalty, mask),
             "entropy": masked_mean(rollout.entropy, mask), "explained_variance": fit,
             "length": rollout.response_lengths.float().mean(),
             "eos_rate": rollout.finished.float().mean(),
             "sampling_gap": gap.max(), "sampling_gap_mean": masked_mean(gap, mask)}
    return {name: x.item() for name, x in stats.items()}


def weighted_mean(rows, name):
    """Mean of a statistic over rows (of micro-batches), each of which counts for its "terms"."""
    pairs = [(row[name], row["terms"]) for row in rows]
    return sum(x * n for x, n in pairs) / sum(n for _, n in pairs)


def average_statistics(table, norms):
    """Statistics of one update: means over all its tokens; gradient norms are averaged over its
    optimiser steps -> {name: number}.

    table: a row per micro-batch: its "optimizer_step", its number of tokens ("terms") and its
    statistics. ratio_max is a maximum; first_..: of the first optimiser step, before which nothing
    has moved."""
    first = [row for row in table if row["optimizer_step"] == 0]
    counts = "optimizer_step", "terms"
    stats = {name: weighted_mean(table, name) for name in table[0] if name not in counts}
    stats |= {name: sum(n[name] for n in norms) / len(norms) for name in norms[0]}
    stats["ratio_max"] = max(row["ratio_max"] for row in table)
    stats["first_ratio_max"] = max(row["ratio_max"] for row in first)
    stats["first_ratio_mean"] = weighted_mean(first, "ratio_mean")
    stats["first_clip_frac"] = weighted_mean(first, "clip_frac")
    stats["optimizer_steps"] = len(norms)
    return stats


def check_first_step(rollout, row, dtype, dropout=0.0):
    """Before anything has moved, policy and reference are one model. RuntimeError says what is
    broken.

    row: the statistics of the step. With dropout in the update the first ratio is not 1, and is
    only reported. In float32, logits of 20 to 30, as trained models have, are accurate to about
    1e-5: the bounds hold for every token. bfloat16 resolves them to 0.1: single tokens may be far
    off, so only means are checked, to 3 %."""
    ratio, gap = row["first_ratio_max"], row["sampling_gap"]
    ratio_bound, gap_bound = 1e-4, 5e-4
    if dtype != torch.float32:
        ratio, gap = row["first_ratio_mean"], row["sampling_gap_mean"]
        ratio_bound = gap_bound = 3e-2
    require_small(rollout.kl.abs().max().item(), 0.0, "KL(policy || reference) is exactly 0: a new "
                  "adapter changes nothing")
    require_small(gap, gap_bound, "log-probabilities at sampling equal the recomputed ones: the KV "
                  "cache agrees with the full forward")
    if not dropout:
        require_small(ratio, ratio_bound, "the first ratio is 1: the update's forward is the "
                      "rollout's")


def require_small(difference, bound, claim):
    """RuntimeError with the claim if the difference is larger, or NaN."""
    if not difference <= bound:
        raise RuntimeError(f"step 1 broke an assumption: {claim}; got a difference of "
                           f"{difference:.2e}, at most {bound:.0e} is rounding")
