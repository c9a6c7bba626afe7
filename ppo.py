"""PPO's arithmetic: rewards, advantages, losses (Schulman et al., arXiv 1707.06347; Ziegler et al., arXiv 1909.08593).

Pure functions of tensors, and the record that a rollout leaves behind. `response_mask` is bool, True where a token
counts (up to and including EOS). What is in the padding - NaN, even - changes neither values nor gradients: masked
places are replaced with torch.where, since 0 * NaN is NaN.

Legend   B sequences, T tokens of a row (prompt + response), R response tokens

    state s_t = prompt + response[:t]      action = response[t]      values[t] = V(s_t), the state that predicts token t
    rewards[t] = -kl_coef * penalty[t], and the reward model's score on top at the last token

Departures from the paper's code (numbers as in the README):
2. Padding enters nothing, and the value after the last token is 0 (it bootstrapped from the state after EOS).
3. Rewards are not whitened unless asked for, and then scaled only: re-adding the mean to each token pays or charges it
   for existing, which is a length bias.
"""
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Rollout:
    """What one batch of responses leaves behind for the update; rows in the order of the global batch."""
    tokens: torch.Tensor               # (B, T) int64, prompt + response, right-padded
    prompt_lengths: torch.Tensor       # (B,) int64
    response_lengths: torch.Tensor     # (B,) int64, the EOS counted
    finished: torch.Tensor             # (B,) bool, whether the response ends with EOS
    scores: torch.Tensor               # (B,) float32, the reward model's
    logprobs: torch.Tensor             # (B, R) float32, of the sampled tokens, by the policy before the update
    ref_logprobs: torch.Tensor         # (B, R) float32
    values: torch.Tensor               # (B, R) float32
    entropy: torch.Tensor              # (B, R) float32, of the policy's next-token distribution
    kl: torch.Tensor                   # (B, R) float32, exact KL(policy || reference) over the vocabulary

    advantages: torch.Tensor | None = None   # (B, R) float32, whitened over the global batch
    returns: torch.Tensor | None = None      # (B, R) float32, what the critic is trained towards

    @property
    def response_mask(self):
        """(B, R) bool, True up to and including EOS."""
        return torch.arange(self.logprobs.shape[1], device=self.logprobs.device) < self.response_lengths[:, None]

    def rows(self, index):
        """The same record for some of the rows, its padding cut to the longest of them."""
        T = int((self.prompt_lengths + self.response_lengths)[index].max())
        R = int(self.response_lengths[index].max())

        def pick(name, x):
            return x if x is None else x[index] if x.dim() == 1 else x[index, :T if name == "tokens" else R]
        return Rollout(*(pick(f.name, getattr(self, f.name)) for f in fields(self)))

    def to(self, device):
        return Rollout(*(x if x is None else x.to(device) for x in (getattr(self, f.name) for f in fields(self))))


def join_rollouts(parts):
    """Rollouts of several processes -> one, part after part; the narrower ones are padded with zeros on the right."""
    def join(tensors):
        if tensors[0] is None or tensors[0].dim() == 1:
            return None if tensors[0] is None else torch.cat(tensors)
        width = max(t.shape[1] for t in tensors)
        return torch.cat([F.pad(t, (0, width - t.shape[1])) for t in tensors])
    return Rollout(*(join([getattr(part, f.name) for part in parts]) for f in fields(Rollout)))


# ------------------------------------------------------------------------------------------------- masked statistics

def masked_mean(x, mask):
    """Mean of x where mask is True; 0 if it is True nowhere. x, mask of one shape -> scalar."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def whiten(x, mask, shift_mean=True):
    """(x - mean) / sqrt(var + 1e-8) over the True positions, biased variance; without shift_mean x / sqrt(var + 1e-8).

    x, mask (B, R) -> (B, R), 0 in the padding.
    """
    x = torch.where(mask, x, 0.0)
    mean = masked_mean(x, mask)
    var = masked_mean((x - mean).square(), mask)
    centred = x - mean if shift_mean else x
    return torch.where(mask, centred * torch.rsqrt(var + 1e-8), 0.0)


# -------------------------------------------------------------------------------------------- rewards and advantages

def shape_rewards(scores, penalty, response_mask, kl_coef):
    """Reward of each token: -kl_coef * penalty, plus the sequence's score at its last token (Ziegler et al., eq. 2).

    scores (B,), penalty (B, R) nats -> (B, R), 0 in the padding. A row sums to score - kl_coef * sum(penalty).
    """
    rewards = torch.where(response_mask, -kl_coef * penalty, 0.0)
    is_last = response_mask & (response_mask.cumsum(-1) == response_mask.sum(-1, keepdim=True))
    return torch.where(is_last, rewards + scores[:, None], rewards)


def gae(rewards, values, response_mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438, eq. 16), ending at each row's last token.

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)         A_t = delta_t + gamma lam A_{t+1}
        return_t = A_t + V(s_t)

    V and A after the last True token are 0, EOS or not: the episode is over. lam = 0 is TD(0), lam = gamma = 1 Monte
    Carlo. rewards, values (B, R) -> advantages, returns (B, R), 0 in the padding, without gradient.
    """
    rewards = torch.where(response_mask, rewards, 0.0).detach()
    values = torch.where(response_mask, values, 0.0).detach()
    advantages = torch.zeros_like(rewards)
    next_advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(response_mask[:, t], delta + gamma * lam * next_advantage, 0.0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, torch.where(response_mask, advantages + values, 0.0)


def explained_variance(values, returns, response_mask):
    """1 - Var(return - V) / Var(return): 1 is a perfect critic, 0 one that says the mean, below 0 a harmful one."""
    values, returns = torch.where(response_mask, values, 0.0), torch.where(response_mask, returns, 0.0)
    error = returns - values
    spread = lambda x: masked_mean((x - masked_mean(x, response_mask)).square(), response_mask)
    return 1 - spread(error) / spread(returns).clamp(min=1e-8)


# ------------------------------------------------------------------------------------------------------------ losses

def policy_loss(logprobs, old_logprobs, advantages, response_mask, clip):
    """PPO's clipped surrogate, to be minimised (PPO eq. 7): mean of max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip)).

    ratio = exp(logprobs - old_logprobs). All (B, R) -> scalar over the True positions, and detached stats: clip_frac
    (share of tokens whose gradient the clip has cut off), ratio_max, ratio_mean (of |ratio - 1|), approx_kl (k3 of old
    against new, nats per token).
    """
    log_ratio = torch.where(response_mask, logprobs - old_logprobs, 0.0)
    advantages = torch.where(response_mask, advantages, 0.0)
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = masked_mean(torch.maximum(unclipped, clipped), response_mask)
    with torch.no_grad():
        stats = {"clip_frac": masked_mean((clipped > unclipped).float(), response_mask),
                 "ratio_max": (ratio - 1).abs().max(),
                 "ratio_mean": masked_mean((ratio - 1).abs(), response_mask),
                 "approx_kl": masked_mean(torch.expm1(log_ratio) - log_ratio, response_mask)}
    return loss, stats


def value_loss(values, old_values, returns, response_mask, clip):
    """Squared error of the critic, clipped as in PPO's reference code: mean of max((v - R)^2, (v_clip - R)^2) / 2.

    v_clip = old_values + clamp(v - old_values, -clip, clip). All (B, R) -> scalar over the True positions, and detached
    stats: value_clip_frac, value_mean.
    """
    values = torch.where(response_mask, values, 0.0)
    old_values = torch.where(response_mask, old_values, 0.0)
    returns = torch.where(response_mask, returns, 0.0)
    near_old = old_values + (values - old_values).clamp(-clip, clip)
    plain, clipped = (values - returns).square(), (near_old - returns).square()
    loss = masked_mean(torch.maximum(plain, clipped), response_mask) / 2
    with torch.no_grad():
        stats = {"value_clip_frac": masked_mean(((values - old_values).abs() > clip).float(), response_mask),
                 "value_mean": masked_mean(values, response_mask)}
    return loss, stats


def adapt_kl_coef(kl_coef, kl, target, horizon, sequences):
    """Proportional controller of the penalty (Ziegler et al., section 2.2): raises it while KL is above its target.

    error = clamp(kl / target - 1, -0.2, 0.2);  kl_coef * (1 + error * sequences / horizon). kl and target: true KL per
    sequence, nats. It multiplies, so the sign of kl_coef stays (for horizon >= sequences).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * sequences / horizon)
