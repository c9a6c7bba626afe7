"""What keeps the policy near the reference: penalties on one sampled token, and exact divergences.

Legend   B batch, R response tokens, V vocabulary; p the policy, q the reference, r = q/p,
         d = log p - log q, all for the token that was sampled from p; nats per token

    name                   sampled(d)                                expectation under p       >= 0
    kl                     d                                 (k1)    KL(p || q)                no
    clamped_kl             max(d, 0)                                 above KL                  yes
    squared_error          d^2 / 2                           (k2)    about KL near p = q       yes
    bregman                exp(-d) - 1 + d                   (k3)    KL(p || q)                yes
    bregman_paper          exp(d) - 1 - d                            chi^2(p||q) - KL(p||q)    yes
    jensen_shannon         (r log(2r/(1+r)) + log(2/(1+r))) / 2      JS(p, q)                  yes
    jensen_shannon_paper   log(2/(1+exp(-|d|))) / 2                  neither                   yes

With sums over the vocabulary: clamped_kl has the expectation sum p log(p/q) over the tokens with
p > q, squared_error sum p (log p - log q)^2 / 2, bregman_paper sum p^2 / q - 1 - KL,
jensen_shannon_paper sum p log(2 max(p, q) / (p + q)) / 2, which is linear in d near 0 and at most
log(2) / 2. k1, k2, k3 are Schulman's names (joschu.net/blog/kl-approx.html, 2020).

Two ways to use a divergence, which are not the same:
* in the reward: the sampled value is a number, charged to the token that was drawn, and its policy
  gradient is the first half of

      grad E_p[f(d)] = E_p[f(d) grad log p] + E_p[f'(d) grad log p]

  The second half is lost. For k1 it is E_p[grad log p] = 0: nothing is lost, the gradient is that
  of KL. k2, k3 and JS are of second order in d, and so is what is left of them: near p = q they
  hardly push. Share of KL's gradient that each keeps (by enumeration in
  tests/test_regularizers.py, V = 200, token KL 0.1): k1 1.00, clamped about .6, bregman_paper .2 to
  .3, k2, k3 and paper-JS below .2, unbiased JS about 0.
* in the loss: exact(...) is differentiated over the whole vocabulary, and its gradient is the true
  one of each token's divergence at the states visited; of KL with respect to a logit it is
  p (log p - log q - KL). How a token changes the KL of later states is left out; k1 in the reward
  has it, through GAE.
One coefficient weighs differently in the two: what is in the reward is divided by the advantages'
standard deviation when they are whitened, what is in the loss is not. The other two combinations
are refused. An exact divergence in the reward is the same number whichever token is drawn: its
own-token gradient is 0. A sampled form in the loss has a derivative, but not the divergence's: k1's
is 0 on average, k3's that of KL(q || p).

Departures from the paper's code: its Jensen-Shannon and its bregman are kept under the names _paper
(bregman has p/q where k3 has q/p). Its forms took exp(logprob) first and were inf or NaN near -110;
here everything stays in log space, and the difference of nearly equal terms is taken in float64:
near d = 0, JS is d^2/8, which float32 cannot resolve. No sample is clamped: for d below -88 k3 and
JS, for d above 88 bregman_paper overflow float32, and the run stops and says so.
"""
import math

import torch
import torch.nn.functional as F

LOG2 = math.log(2.0)


def log_half_sum(d):
    """log((1 + exp(d)) / 2) without overflow, and exactly 0 at d = 0."""
    small = torch.log1p(torch.expm1(d.clamp(max=1.0)) / 2)
    return torch.where(d < 1, small, F.softplus(d, threshold=40) - LOG2)


def kl_terms(logp, logq):
    """sum p (log p - log q) over the last dimension."""
    return (logp.exp() * (logp - logq)).sum(-1)


def jensen_shannon_terms(logp, logq):
    """(KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2, by log(p/m) = -log((1 + e^-d) / 2)."""
    d = logp - logq
    return -(logp.exp() * log_half_sum(-d) + logq.exp() * log_half_sum(d)).sum(-1) / 2


def k3(d):
    """r - 1 - log r, r = q/p = exp(-d): the line r - 1 touches log r at 1 and lies above it."""
    return torch.expm1(-d) + d


SAMPLED = {      # name -> penalty of a token as a function of its d; one more is one line
    "kl": lambda d: d,
    "clamped_kl": lambda d: d.clamp(min=0),
    "bregman": k3,
    "bregman_paper": lambda d: torch.expm1(d) - d,
    "squared_error": lambda d: d.square() / 2,
    # r = exp(-d): log(2r/(1+r)) = -log((1+e^d)/2) and log(2/(1+r)) = -log((1+e^-d)/2)
    "jensen_shannon": lambda d: -(torch.exp(-d) * log_half_sum(d) + log_half_sum(-d)) / 2,
    "jensen_shannon_paper": lambda d: -log_half_sum(-d.abs()) / 2}
EXACT = {        # name -> divergence as a function of log p, log q (.., V), all of them finite
    "kl": kl_terms,
    "reverse_kl": lambda logp, logq: kl_terms(logq, logp),
    "jensen_shannon": jensen_shannon_terms}


def sampled(name, logprobs, ref_logprobs):
    """One-sample penalty of each token, see the table: log-probabilities (B, R) -> (B, R), nats."""
    d = logprobs.double() - ref_logprobs.double()
    return SAMPLED[name](d).to(logprobs.dtype)


def exact(name, logits, ref_logits):
    """Divergence of two next-token distributions, summed over the vocabulary: logits (B, R, V) of
    policy and reference -> (B, R), nats.

    kl               KL(p || q) = sum p (log p - log q)
    reverse_kl       KL(q || p)
    jensen_shannon   (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2; at most log 2
    Differentiable in both; exactly 0 for equal logits. Log-probabilities end at -1e30, so that a KL
    which is infinite comes out as some 1e29 or 1e30, and 0 * log 0 is 0 in gradients too.
    """
    logp = F.log_softmax(logits, dim=-1).clamp(min=-1e30)
    logq = F.log_softmax(ref_logits, dim=-1).clamp(min=-1e30)
    return EXACT[name](logp, logq)
