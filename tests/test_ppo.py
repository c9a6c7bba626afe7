"""PPO's arithmetic against loops, hand calculation, enumeration and finite differences.

The batch of these tests is ragged: rows of 4, 1, 3 and 6 tokens in six columns, so that padding, a
one-token response and a full row all occur. Each test says what goes wrong in training when its
claim fails.
"""
import math

import pytest
import torch

from ppo import (Rollout, average_statistics, check_first_step, explained_variance, gae,
                 join_rollouts, masked_mean, policy_loss, rollout_statistics, shape_rewards,
                 value_loss, whiten, with_advantages)

LENGTHS = (4, 1, 3, 6)
MASK = torch.arange(6) < torch.tensor(LENGTHS)[:, None]                    # (4, 6)
N = sum(LENGTHS)
POISON = [math.nan, math.inf, -1e30]


def noise(*shape, seed=0, scale=1.0, dtype=torch.float64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ragged(seed, **kwargs):
    """(4, 6) standard normal numbers, the padding too: finite garbage, as a model leaves it
    there."""
    return noise(4, 6, seed=seed, **kwargs)


def poisoned(x, poison):
    return torch.where(MASK, x, poison)


def true_values(x):
    """The numbers at the True positions, row by row, as a plain list."""
    return [x[b, t].item() for b, length in enumerate(LENGTHS) for t in range(length)]


def assert_equal(got, expected):
    """Bit-equal numbers or tensors; NaN equals nothing."""
    assert torch.equal(torch.as_tensor(got), torch.as_tensor(expected))


# --------------------------------------------------------------------------------------------------
# masked statistics

def test_masked_mean_by_hand():
    """(1 + 2 + 6) / 3: the mean is over tokens of the batch, not over rows first (which would give
    (1.5 + 6) / 2), and the padding, 99 here, counts neither above nor below the line."""
    x, mask = torch.tensor([[1.0, 2.0], [6.0, 99.0]]), torch.tensor([[True, True], [True, False]])
    assert masked_mean(x, mask).item() == 3.0
    assert masked_mean(x, torch.zeros_like(mask)).item() == 0.0     # nothing counts: 0, not 0 / 0


def test_whiten_by_hand():
    """1, 2, 3 have mean 2 and (biased) variance 2/3: they become -1.224745, 0, 1.224745. The
    unbiased variance, torch's default, would give -1, 0, 1. Padding, 99 here, is 0 afterwards."""
    x, mask = torch.tensor([[1.0, 2.0], [3.0, 99.0]]), torch.tensor([[True, True], [True, False]])
    expected = [-1.224745, 0.0, 1.224745, 0.0]
    assert whiten(x, mask).flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_whiten_without_the_shift_only_scales():
    """1, 2, 3 become 1.224745, 2.449490, 3.674235. Code that centres and then adds the mean back,
    as the paper's does, gives .775, 2, 3.225: each token is paid or charged for existing, and the
    policy learns a length."""
    x, mask = torch.tensor([[1.0, 2.0], [3.0, 99.0]]), torch.tensor([[True, True], [True, False]])
    scaled, expected = whiten(x, mask, shift_mean=False), [1.224745, 2.44949, 3.674235, 0.0]
    assert scaled.flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_whiten_without_the_shift_keeps_a_zero_reward_zero():
    """Rewards are 0 but for the last token. Scaled they still are, so an extra token costs nothing
    and earns nothing."""
    rewards = torch.zeros(4, 6)
    rewards[[0, 1, 2, 3], [3, 0, 2, 5]] = torch.tensor([1.0, -2.0, 0.5, 3.0])
    scaled = whiten(rewards, MASK, shift_mean=False)
    assert torch.equal(scaled == 0, rewards == 0) and torch.equal(scaled.sign(), rewards.sign())


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_equals_a_loop_over_the_real_tokens(shift_mean):
    """One mean and one variance for the whole ragged batch, counted over its 14 real tokens."""
    x = ragged(1, scale=3.0) + 5
    values = true_values(x)
    mean = sum(values) / N
    var = sum((v - mean) ** 2 for v in values) / N
    expected = [(v - mean * shift_mean) / math.sqrt(var + 1e-8) for v in values]
    got = whiten(x, MASK, shift_mean)
    assert true_values(got) == pytest.approx(expected, abs=1e-10)
    assert torch.equal(got[~MASK], torch.zeros(24 - N, dtype=torch.float64))


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_no_gradient_of_whitened_numbers_comes_from_the_padding(poison, shift_mean):
    """The gradient of a masked square is 2 x (x - mean) * 0: of NaN, that is NaN for every
    token."""
    weights, mask = torch.tensor([[1.0, 3.0, 1.0]]), torch.tensor([[True, True, False]])
    gradients = []
    for padding in (poison, 7.0):
        x = torch.tensor([[1.0, 2.0, padding]], requires_grad=True)
        (whiten(x, mask, shift_mean) * weights).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients) and torch.isfinite(gradients[0]).all()
    assert gradients[0][0, 2] == 0


def test_whiten_of_equal_numbers_is_finite():
    """If every advantage is the same there is nothing to learn: 0, not 0 / 0."""
    assert torch.equal(whiten(torch.full((4, 6), 2.0), MASK), torch.zeros(4, 6))


@pytest.mark.parametrize("poison", POISON)
def test_poison_in_the_padding_changes_no_statistic(poison):
    """NaN, inf and huge numbers in the padding: mean, whitening and explained variance stay
    bit-equal."""
    x, y = ragged(1), ragged(2)
    assert_equal(masked_mean(poisoned(x, poison), MASK), masked_mean(poisoned(x, 0.0), MASK))
    for shift_mean in (True, False):
        sick = whiten(poisoned(x, poison), MASK, shift_mean)
        assert_equal(sick, whiten(poisoned(x, 0.0), MASK, shift_mean))
    assert_equal(explained_variance(poisoned(x, poison), poisoned(y, poison), MASK),
                 explained_variance(poisoned(x, 0.0), poisoned(y, 0.0), MASK))


def test_explained_variance_is_1_for_a_perfect_critic_and_0_for_a_constant_one():
    """The first number to look at when PPO does not learn. A critic that is off by a constant still
    orders the states rightly and has 1; one that says the opposite of the truth has 1 - 4 = -3."""
    returns = ragged(3)
    constant = torch.full_like(returns, 2.0)
    for values, expected in [(returns, 1), (returns + 7, 1), (constant, 0), (-returns, -3)]:
        got = explained_variance(values, returns, MASK).item()
        assert got == pytest.approx(expected, abs=1e-10)


# --------------------------------------------------------------------------------------------------
# --- shaped rewards

def test_shaped_rewards_by_hand():
    """kl_coef .1. Row 0 (3 tokens, score 2): -.1, -.2, -.3 + 2. Row 1 (1 token, score -1): +.5 - 1,
    for a negative penalty earns. The score sits on the last real token, never in the last
    column."""
    penalty = torch.tensor([[1.0, 2.0, 3.0, 9.0], [-5.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    rewards = shape_rewards(torch.tensor([2.0, -1.0]), penalty, mask, 0.1)
    assert rewards[0].tolist() == pytest.approx([-0.1, -0.2, 1.7, 0.0], abs=1e-6)
    assert rewards[1].tolist() == pytest.approx([-0.5, 0.0, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("kl_coef", [0.02, 1.0, 0.0, -0.02])
def test_shaped_rewards_of_a_row_sum_to_score_minus_penalty(kl_coef):
    """The objective of RLHF: sum over tokens = score - kl_coef * KL of the sequence (Ziegler et
    al., eq. 2). Also for no regulariser (0: only the score is left) and for negative KL, the
    paper's worst."""
    scores, penalty = noise(4, seed=1), ragged(2)
    rewards = shape_rewards(scores, penalty, MASK, kl_coef)
    for b, length in enumerate(LENGTHS):
        total = scores[b].item() - kl_coef * sum(penalty[b, t].item() for t in range(length))
        assert rewards[b].sum().item() == pytest.approx(total, abs=1e-10)
        bare = shape_rewards(torch.zeros_like(scores), penalty, MASK, kl_coef)
        where_the_score_went = (rewards - bare)[b].nonzero().flatten().tolist()
        assert where_the_score_went == [length - 1]


@pytest.mark.parametrize("poison", POISON)
def test_poison_in_the_padding_changes_no_reward(poison):
    """The padding of the reward is 0, whatever the penalty says there, and the arguments are left
    as they were."""
    scores, penalty = noise(4, seed=1), poisoned(ragged(2), poison)
    before = penalty.clone()
    rewards = shape_rewards(scores, penalty, MASK, 0.02)
    assert_equal(rewards, shape_rewards(scores, poisoned(ragged(2), 0.0), MASK, 0.02))
    assert torch.equal(rewards[~MASK], torch.zeros(24 - N, dtype=torch.float64))
    assert torch.equal(penalty.nan_to_num(), before.nan_to_num())


# --------------------------------------------------------------------------------------------------
# --------------------------------------------------------------------------------------- advantages

def test_gae_by_hand():
    """r = 0, 0, 1 and V = .5, .6, .7, gamma 1, lam .5. From the end: delta = 1 - .7 = .3; then .7 -
    .6 + .5 * .3 = .25; then .6 - .5 + .5 * .25 = .225. values[t] is of the state *before* token t,
    so that the last delta is 1 - .7, with nothing behind it. Returns are advantage + value."""
    advantages, returns = gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.7]]),
                              torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=0.5)
    assert advantages[0].tolist() == pytest.approx([0.225, 0.25, 0.3], abs=1e-6)
    assert returns[0].tolist() == pytest.approx([0.725, 0.85, 1.0], abs=1e-6)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 0.0)])
def test_gae_equals_the_sum_of_discounted_td_errors(gamma, lam):
    """GAE's eq. 16 as it is printed: A_t = sum over l of (gamma lam)^l delta_{t+l}, to each row's
    own end. In float64 to 1e-10; float32 agrees to 1e-5, on numbers up to 5."""
    rewards, values = ragged(1), ragged(2)
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    for b, length in enumerate(LENGTHS):
        r, v = rewards[b, :length].tolist(), values[b, :length].tolist() + [0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-10)
            assert returns[b, t].item() == pytest.approx(expected + v[t], abs=1e-10)
    in_single = gae(rewards.float(), values.float(), MASK, gamma, lam)
    for single, double in zip(in_single, (advantages, returns)):
        assert torch.allclose(single.double(), double, rtol=0, atol=1e-5)


def test_gae_is_a_mixture_of_n_step_returns():
    """What lam means, from the other side: the return is a weighted mean of "n rewards, then trust
    the critic", with weights (1 - lam) lam^(n-1), and the last one, which needs no critic, takes
    what weight is left."""
    gamma, lam, length = 0.9, 0.7, 6
    rewards, values = ragged(1)[3].tolist(), ragged(2)[3].tolist()
    _, returns = gae(ragged(1), ragged(2), MASK, gamma, lam)
    for t in range(length):
        mixture, weight_left = 0.0, 1.0
        for n in range(1, length - t + 1):
            n_step = sum(gamma ** k * rewards[t + k] for k in range(n))
            last = t + n == length
            n_step += 0.0 if last else gamma ** n * values[t + n]
            weight = weight_left if last else (1 - lam) * lam ** (n - 1)
            mixture, weight_left = mixture + weight * n_step, weight_left - weight
        assert returns[3, t].item() == pytest.approx(mixture, abs=1e-10)


def test_lam_1_is_monte_carlo():
    """With lam = 1 the return is what actually came, sum of gamma^k r: the critic's opinion of
    later states cancels, and the advantage is that minus the value. No bias, all the variance."""
    rewards, gamma = ragged(1), 0.9
    for values in (ragged(2), ragged(3)):
        advantages, returns = gae(rewards, values, MASK, gamma, 1.0)
        for b, length in enumerate(LENGTHS):
            for t in range(length):
                to_go = sum(gamma ** (k - t) * rewards[b, k].item() for k in range(t, length))
                surprise = to_go - values[b, t].item()
                assert returns[b, t].item() == pytest.approx(to_go, abs=1e-10)
                assert advantages[b, t].item() == pytest.approx(surprise, abs=1e-10)


def test_lam_0_is_temporal_difference():
    """With lam = 0 the return is one reward and then the critic: r_t + gamma V(s_{t+1}), and r
    alone at the end. Little variance, all of the critic's bias."""
    rewards, values, gamma = ragged(1), ragged(2), 0.9
    _, returns = gae(rewards, values, MASK, gamma, 0.0)
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            next_value = values[b, t + 1].item() if t + 1 < length else 0.0
            expected = rewards[b, t].item() + gamma * next_value
            assert returns[b, t].item() == pytest.approx(expected, abs=1e-10)


def test_gae_of_a_row_does_not_depend_on_padding_or_batch_mates():
    """A row alone, cut to its own length, gives the same advantages: a batch is a convenience, not
    a model."""
    rewards, values = ragged(1), ragged(2)
    together = gae(rewards, values, MASK, 1.0, 0.95)
    for b, length in enumerate(LENGTHS):
        row = [x[b:b + 1, :length] for x in (rewards, values, MASK)]
        alone = gae(*row, 1.0, 0.95)
        for x, y in zip(together, alone):
            assert torch.allclose(x[b, :length], y[0], rtol=0, atol=1e-12)


def test_nothing_is_worth_anything_after_the_last_token():
    """The critic says 100 in the padding and would say it of any next state. After EOS the episode
    is over, and a response that was cut off at the length limit (row 3, which fills its columns)
    ends in the same way: the return of the last token is its reward, whatever the critic thinks.
    Bootstrapping instead pays for the states after the end."""
    rewards, values = ragged(1), torch.where(MASK, ragged(2), 100.0)
    _, returns = gae(rewards, values, MASK, 1.0, 0.95)
    for b, length in enumerate(LENGTHS):
        last_reward = rewards[b, length - 1].item()
        assert returns[b, length - 1].item() == pytest.approx(last_reward, abs=1e-12)


def test_advantages_and_returns_carry_no_gradient():
    """They are numbers that say how good an action was: through them the critic would be trained to
    make actions look good."""
    values = ragged(2).requires_grad_()
    assert not any(x.requires_grad for x in gae(ragged(1), values, MASK, 1.0, 0.95))


@pytest.mark.parametrize("poison", POISON)
def test_poison_in_the_padding_changes_no_advantage(poison):
    """NaN, inf and huge numbers in the padding: bit-equal, 0 in the padding, and rewards and values
    are not written to."""
    rewards, values = poisoned(ragged(1), poison), poisoned(ragged(2), poison)
    before = values.clone()
    for got, clean in zip(gae(rewards, values, MASK, 1.0, 0.95),
                          gae(poisoned(ragged(1), 0.0), poisoned(ragged(2), 0.0), MASK, 1.0, 0.95)):
        assert_equal(got, clean)
        assert torch.equal(got[~MASK], torch.zeros(24 - N, dtype=torch.float64))
    assert torch.equal(values.nan_to_num(), before.nan_to_num())


# --------------------------------------------------------------------------------------------------
# -------------------------------------------------------------------------------------- policy loss

def ragged_update(seed=0):
    """logprobs of the new policy, old_logprobs, advantages: ratios between about .5 and 2, on both
    sides of the clip."""
    old_logprobs = -ragged(seed + 10).abs() - 0.1
    return old_logprobs + ragged(seed + 11, scale=0.3), old_logprobs, ragged(seed + 12)


def policy_gradient(logprobs, *args):
    """d loss / d logprobs."""
    logprobs = logprobs.clone().requires_grad_()
    return torch.autograd.grad(policy_loss(logprobs, *args)[0], logprobs)[0]


def test_policy_loss_by_hand():
    """Four tokens, clip .2, one per corner of PPO's figure 1. Ratio 1.5 with A = +1: max(-1.5,
    -1.2) = -1.2, the gain beyond 1.2 does not count. Ratio 1.5, A = -1: 1.5, a mistake is never
    clipped. Ratio .5, A = +1: -.5. Ratio .5, A = -1: max(.5, .8) = .8. Their mean is .15; the clip
    decides two of four."""
    ratio, advantages = torch.tensor([[1.5, 1.5, 0.5, 0.5]]), torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    logprobs, old_logprobs = ratio.log() - 2, torch.full((1, 4), -2.0)
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss, stats = policy_loss(logprobs, old_logprobs, advantages, mask, 0.2)
    assert loss.item() == pytest.approx((-1.2 + 1.5 - 0.5 + 0.8) / 4, abs=1e-6)
    assert float(stats["clip_frac"]) == 0.5
    gradient = policy_gradient(logprobs, old_logprobs, advantages, mask, 0.2)
    assert gradient[0].tolist() == pytest.approx([0.0, 1.5 / 4, -0.5 / 4, 0.0], abs=1e-6)


def test_clipped_tokens_have_exactly_zero_gradient():
    """The trust region of PPO: a token that has moved far enough in the right direction is let go,
    with gradient 0, and every other token keeps its own, -A ratio / N."""
    logprobs, old_logprobs, advantages = ragged_update(seed=1)
    ratio = (logprobs - old_logprobs).exp()
    up, down = (ratio > 1.2) & (advantages > 0) & MASK, (ratio < 0.8) & (advantages < 0) & MASK
    let_go = up | down
    gradient = policy_gradient(logprobs, old_logprobs, advantages, MASK, 0.2)
    _, stats = policy_loss(logprobs, old_logprobs, advantages, MASK, 0.2)
    assert up.sum() == down.sum() == 2                          # the batch has all kinds
    assert (gradient[let_go] == 0).all() and (gradient[~MASK] == 0).all()
    pulled = MASK & ~let_go
    assert torch.allclose(gradient[pulled], (-advantages * ratio / N)[pulled], rtol=0, atol=1e-12)
    assert float(stats["clip_frac"]) == pytest.approx(let_go.sum().item() / N, abs=1e-6)


@pytest.mark.parametrize("clip", [0.2, 0.05, 10.0])
def test_policy_loss_equals_a_loop_over_the_real_tokens(clip):
    """PPO eq. 7, token by token, in probabilities; the mean is over the 14 real tokens of the
    batch."""
    logprobs, old_logprobs, advantages = ragged_update()
    total = 0.0
    for new, old, A in zip(*map(true_values, (logprobs, old_logprobs, advantages))):
        ratio = math.exp(new) / math.exp(old)
        total += min(ratio * A, min(max(ratio, 1 - clip), 1 + clip) * A)
    loss, _ = policy_loss(logprobs, old_logprobs, advantages, MASK, clip)
    assert loss.item() == pytest.approx(-total / N, abs=1e-10)


def test_the_first_minibatch_has_ratio_1_and_the_plain_policy_gradient():
    """Before the first step new and old log-probs are the same: no token is clipped, the loss is
    -mean A, and its gradient that of REINFORCE with a baseline, -A / N. A ratio off 1 here means
    that rollout and update disagree."""
    logprobs, _, advantages = ragged_update()
    loss, stats = policy_loss(logprobs, logprobs.clone(), advantages, MASK, 0.2)
    assert float(stats["clip_frac"]) == 0 and float(stats["ratio_max"]) == 0
    assert float(stats["approx_kl"]) == 0
    assert loss.item() == pytest.approx(-sum(true_values(advantages)) / N, abs=1e-10)
    gradient = policy_gradient(logprobs, logprobs.clone(), advantages, MASK, 0.2)
    assert torch.allclose(gradient, torch.where(MASK, -advantages / N, 0.0), rtol=0, atol=1e-12)


def test_the_first_step_climbs_the_expected_reward():
    """The policy gradient theorem on five actions, enumerated: the loss's gradient with the reward
    as advantage, averaged over the action that the policy draws, is minus the gradient of the
    expected reward."""
    logits, reward = noise(5, seed=1).requires_grad_(), noise(5, seed=2)
    expected, = torch.autograd.grad((logits.softmax(-1) * reward).sum(), logits)
    logp, mask, total = logits.log_softmax(-1), torch.ones(1, 1, dtype=torch.bool), 0.0
    for y in range(5):
        new, A = logp[y].view(1, 1), reward[y].view(1, 1)
        loss, _ = policy_loss(new, new.detach(), A, mask, 0.2)
        gradient, = torch.autograd.grad(loss, logits, retain_graph=True)
        total = total + logp[y].exp().detach() * gradient
    assert torch.allclose(total, -expected, rtol=0, atol=1e-12)


def test_approx_kl_and_ratio_max_say_how_far_the_update_went():
    """k3 of old against new, ratio - 1 - log ratio, is above 0 and small; ratio_max is the farthest
    single token. Both are over real tokens, whatever stands in the padding."""
    logprobs, old_logprobs, advantages = ragged_update()
    _, stats = policy_loss(poisoned(logprobs, 50.0), old_logprobs, advantages, MASK, 0.2)
    log_ratio = [new - old for new, old in zip(true_values(logprobs), true_values(old_logprobs))]
    k3 = sum(math.exp(x) - 1 - x for x in log_ratio) / N
    assert float(stats["approx_kl"]) == pytest.approx(k3, abs=1e-6)
    off = [abs(math.exp(x) - 1) for x in log_ratio]
    assert float(stats["ratio_max"]) == pytest.approx(max(off), abs=1e-6)
    assert float(stats["ratio_mean"]) == pytest.approx(sum(off) / len(off), abs=1e-6)


# --------------------------------------------------------------------------------------------------
# --------------------------------------------------------------------------------------- value loss

def ragged_critic(seed=0):
    """values, old_values, returns: half of the values have left the range old +- .2."""
    old_values = ragged(seed + 20)
    return old_values + ragged(seed + 21, scale=0.3), old_values, ragged(seed + 22)


def value_gradient(values, *args):
    """d loss / d values."""
    values = values.clone().requires_grad_()
    return torch.autograd.grad(value_loss(values, *args)[0], values)[0]


def test_value_loss_by_hand():
    """Old value 0, clip .2, three tokens. V .1, return 1: (.1 - 1)^2 = .81, inside the range. V .5,
    return 1: max(.25, (.2 - 1)^2 = .64) = .64, clipped: it has moved enough towards the return,
    gradient 0. V .5, return 0: max(.25, .04) = .25, moved away, and is pulled back. The mean
    .566667, halved: .283333. Gradients (V - return) / 3: -.3, 0, .166667."""
    values, returns = torch.tensor([[0.1, 0.5, 0.5]]), torch.tensor([[1.0, 1.0, 0.0]])
    old_values, mask = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
    loss, _ = value_loss(values, old_values, returns, mask, 0.2)
    assert loss.item() == pytest.approx(0.283333, abs=1e-6)
    gradient = value_gradient(values, old_values, returns, mask, 0.2)
    assert gradient[0].tolist() == pytest.approx([-0.3, 0.0, 0.166667], abs=1e-6)
    assert gradient[0, 1].item() == 0.0


@pytest.mark.parametrize("clip", [0.2, 0.01, 1e6])
def test_value_loss_equals_a_loop_over_the_real_tokens(clip):
    """The worse of two squared errors, that of V and that of V held within old +- clip, halved; the
    mean is over the 14 real tokens. A clip of a million never clips, and leaves half the mean
    squared error."""
    values, old_values, returns = ragged_critic()
    total = plain = 0.0
    for v, old, ret in zip(*map(true_values, (values, old_values, returns))):
        held = min(max(v, old - clip), old + clip)
        total += 0.5 * max((v - ret) ** 2, (held - ret) ** 2)
        plain += 0.5 * (v - ret) ** 2
    loss = value_loss(values, old_values, returns, MASK, clip)[0].item()
    assert loss == pytest.approx(total / N, abs=1e-10)
    assert (loss == pytest.approx(plain / N, abs=1e-10)) == (clip == 1e6)


def test_clipped_values_have_exactly_zero_gradient():
    """A value that has left old +- clip towards the return is let go; one that left it away from
    the return is not."""
    values, old_values, returns = ragged_critic()
    held = torch.minimum(torch.maximum(values, old_values - 0.2), old_values + 0.2)
    let_go = MASK & (held != values) & ((held - returns).abs() > (values - returns).abs())
    pulled = MASK & ~let_go
    gradient = value_gradient(values, old_values, returns, MASK, 0.2)
    assert let_go.sum() >= 2 and (pulled & (held != values)).sum() >= 1     # all three kinds
    assert (gradient[let_go] == 0).all() and (gradient[~MASK] == 0).all()
    assert torch.allclose(gradient[pulled], ((values - returns) / N)[pulled], rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------
# what both losses share

LOSSES = [(policy_loss, ragged_update), (value_loss, ragged_critic)]


@pytest.mark.parametrize("loss_of, batch", LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_gradients_agree_with_finite_differences(loss_of, batch, seed):
    """Central differences in float64, h = 1e-6, for every real token. No token here lies within
    1e-4 of a kink."""
    x, *args = batch(seed=100 * seed)
    leaf = x.clone().requires_grad_()
    gradient, = torch.autograd.grad(loss_of(leaf, *args, MASK, 0.2)[0], leaf)
    h = 1e-6
    for b, t in MASK.nonzero().tolist():
        step = torch.zeros_like(x)
        step[b, t] = h
        up, down = (loss_of(x + s, *args, MASK, 0.2)[0].item() for s in (step, -step))
        assert gradient[b, t].item() == pytest.approx((up - down) / (2 * h), abs=1e-6)


@pytest.mark.parametrize("loss_of, batch", LOSSES)
@pytest.mark.parametrize("poison", POISON)
def test_poison_in_the_padding_changes_no_loss_statistic_or_gradient(loss_of, batch, poison):
    """NaN in the padding of any one argument, or of all: everything is bit-equal. Multiplying by
    the mask does not do that: 0 * NaN is NaN, and so is the gradient of a NaN that torch.where
    hides too late."""
    clean = [poisoned(x, 0.0) for x in batch()]

    def everything(inputs):
        leaf = inputs[0].clone().requires_grad_()
        loss, stats = loss_of(leaf, *inputs[1:], MASK, 0.2)
        return [loss.detach(), torch.autograd.grad(loss, leaf)[0], *stats.values()]

    expected = everything(clean)
    for sick in ({0}, {1}, {2}, {0, 1, 2}):
        inputs = [poisoned(x, poison) if i in sick else x for i, x in enumerate(clean)]
        for got, wanted in zip(everything(inputs), expected):
            assert_equal(got, wanted)


@pytest.mark.parametrize("loss_of, batch", LOSSES)
def test_micro_batches_weighted_by_their_tokens_add_up(loss_of, batch):
    """The mean is over tokens, so rows 0-1 (5 tokens) and rows 2-3 (9 tokens), weighted 5/14 and
    9/14, give the loss of the whole batch, and so do their gradients: accumulation changes the
    memory, not the step. A mean of row means, or a division by the padded size, breaks it."""
    inputs = batch()
    whole = loss_of(*inputs, MASK, 0.2)[0].item()
    parts = []
    for rows in (slice(0, 2), slice(2, 4)):
        parts.append(loss_of(*(x[rows] for x in inputs), MASK[rows], 0.2)[0].item())
    assert whole == pytest.approx(parts[0] * 5 / 14 + parts[1] * 9 / 14, abs=1e-10)


@pytest.mark.parametrize("loss_of, batch", LOSSES)
def test_stats_are_detached_and_arguments_left_alone(loss_of, batch):
    """A statistic that holds on to the graph keeps every activation of the step alive for as long
    as the log does."""
    inputs = [x.requires_grad_() for x in batch()]
    before = [x.detach().clone() for x in inputs]
    loss, stats = loss_of(*inputs, MASK, 0.2)
    assert loss.requires_grad and loss.dim() == 0
    assert stats and not any(torch.as_tensor(value).requires_grad for value in stats.values())
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))


# ------------------------------------------------------------------- a rollout and its statistics

def rollout_of(scores, finished, penalty=0.0, padding=0.0, kl=0.25):
    """Two answers, of one and of two tokens, to prompts of one id. Reference log-probs of -1, the
    policy's are `penalty` above, and the sampler's 1/16 below those; values 0, exact KL as given.
    `padding` stands behind the first answer."""
    mask = torch.tensor([[True, False], [True, True]])

    def per_token(x):
        return torch.where(mask, x, padding)
    return Rollout(
        tokens=torch.ones(2, 3).long(), prompt_lengths=torch.ones(2).long(),
        response_lengths=torch.tensor([1, 2]), finished=torch.tensor(finished),
        scores=torch.tensor(scores), logprobs=per_token(penalty - 1.0),
        sampled_logprobs=per_token(penalty - 1.0625), ref_logprobs=per_token(-1.0),
        values=per_token(0.0), entropy=per_token(0.5), kl=torch.where(mask, kl, 0.0))


def with_kl(x):
    return rollout_of([1.0, 1.0], [True, True], kl=x)


def test_rewards_that_are_whitened_are_scaled_and_not_shifted():
    """Two answers that score 4, of one and of two tokens: rewards (4) and (0, 4), mean 8/3,
    standard deviation sqrt(32/9). Scaled only, both return 4 / 1.886 = 2.121. The paper's code
    takes the mean off, scales and puts it back: the last token of each would get 3.374, the other
    1.252, and the same score would be worth 4.626 because the answer is longer."""
    rollout = rollout_of([4.0, 4.0], [True, True])
    shaped = with_advantages(rollout, None, 0.0, 1.0, 1.0, 1.0, whiten_rewards=True)
    assert shaped.returns[:, 0].tolist() == pytest.approx([2.121, 2.121], abs=1e-3)


@pytest.mark.parametrize("padding", [0.0, math.nan])
def test_rewards_and_advantages_of_two_answers_by_hand(padding):
    """Scores 4 and 1, kl_coef .1, every token .5 nats above the reference, and the
    second answer has no EOS, which costs 3: rewards (3.95) and (-.05, -2.05). With values of 0 and
    gamma = lam = 1 the returns are 3.95, and -2.1, -2.05; the advantages are these, whitened: mean
    -.0667, standard deviation 2.8403. Whatever stands in the padding, none of it changes."""
    shaped = with_advantages(rollout_of([4.0, 1.0], [True, False], 0.5, padding), "kl", 0.1, 3.0,
                             1.0, 1.0, False)
    assert shaped.returns.flatten().tolist() == pytest.approx([3.95, 0.0, -2.1, -2.05], abs=1e-5)
    assert shaped.penalty.flatten().tolist() == pytest.approx([0.5, 0.0, 0.5, 0.5], abs=1e-6)
    expected = [(x + 0.2 / 3) / 2.840286 for x in (3.95, -2.1, -2.05)]
    assert shaped.advantages[shaped.response_mask].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("padding", [0.0, math.nan])
def test_what_is_logged_of_a_rollout_by_hand(padding):
    """Means over tokens or over sequences, as the name says: three tokens of .25 nats of exact KL
    are .25 per token and (.25 + .5) / 2 per sequence. k3 of d = .5 is exp(-.5) - 1 + .5 = .106531.
    The true KL is logged whatever the penalty is, and is not clamped. Nothing comes from the
    padding."""
    rollout = rollout_of([4.0, 1.0], [True, False], 0.5, padding)
    row = rollout_statistics(with_advantages(rollout, "kl", 0.1, 3.0, 1.0, 1.0, False))
    assert row["kl_per_token"] == 0.25 and row["kl_per_sequence"] == 0.375
    assert row["k1_per_token"] == row["penalty_per_token"] == pytest.approx(0.5, abs=1e-6)
    assert row["k3_per_token"] == pytest.approx(0.106531, abs=1e-6)
    assert (row["score"], row["length"], row["eos_rate"], row["entropy"]) == (2.5, 1.5, 0.5, 0.5)
    assert row["sampling_gap"] == row["sampling_gap_mean"] == 0.0625


def test_statistics_of_micro_batches_are_means_over_their_tokens():
    """Micro-batches of 1 and 3 tokens with losses 1 and 5 have the mean 4, not 3. What is said of
    the first minibatch is of the first optimiser step alone; the farthest ratio is a maximum."""
    def row(step, tokens, x):
        return {"optimizer_step": step, "terms": tokens, "policy_loss": x, "ratio_max": x / 10,
                "ratio_mean": x / 20, "clip_frac": x / 40}

    table = [row(0, 1, 1.0), row(0, 1, 3.0), row(1, 6, 8.0)]
    stats = average_statistics(table, [{"policy_grad_norm": 2.0}, {"policy_grad_norm": 4.0}])
    assert stats["policy_loss"] == (1 + 3 + 6 * 8) / 8 and stats["policy_grad_norm"] == 3
    assert stats["ratio_max"] == 0.8 and stats["first_ratio_max"] == pytest.approx(0.3)
    assert stats["first_ratio_mean"] == pytest.approx(0.1)
    assert stats["first_clip_frac"] == pytest.approx(0.05) and stats["optimizer_steps"] == 2


def test_rollouts_of_several_processes_join_and_come_apart_again():
    """The second process's answers are longer: the first one's rows are padded, and cut again."""
    short, long = rollout_of([1.0, 2.0], [True, False]).rows(torch.tensor([0])), \
        rollout_of([3.0, 4.0], [True, False])
    both = join_rollouts([short, long])
    assert both.logprobs.shape == (3, 2) and both.tokens.shape == (3, 3)
    assert both.scores.tolist() == [1, 3, 4] and both.response_lengths.tolist() == [1, 1, 2]
    assert both.rows(torch.tensor([0, 1])).logprobs.shape == (2, 1)
    assert both.response_mask.tolist() == [[True, False], [True, False], [True, True]]


# --------------------------------------------------------------------- the first step checks itself

FIRST = {"first_ratio_max": 0.0, "first_ratio_mean": 0.0, "sampling_gap": 0.0,
         "sampling_gap_mean": 0.0}


@pytest.mark.parametrize("kl, row, name", [
    (1e-6, {}, "KL"), (math.nan, {}, "KL"), (0.0, {"first_ratio_max": 1e-3}, "ratio"),
    (0.0, {"sampling_gap": 1e-3}, "sampling")])
def test_a_broken_first_step_says_which_assumption(kl, row, name):
    """The self-check of step 1 is only worth something if it speaks: one wrong number at a time."""
    with pytest.raises(RuntimeError, match=f"step 1 broke an assumption: .*{name}"):
        check_first_step(with_kl(kl), FIRST | row, torch.float32)


def test_in_bfloat16_the_first_ratio_is_1_on_average():
    """Logits near 25 have a spacing of 0.125 there: one token in thousands may be 13 % off by
    rounding alone, an improbable one by more, and must not stop a run; means that are off by 5 % or
    0.05 nats are no rounding."""
    rollout = with_kl(0.0)
    row = {"first_ratio_max": 0.2, "first_ratio_mean": 0.01, "sampling_gap": 1.5,
           "sampling_gap_mean": 0.02}
    check_first_step(rollout, row, torch.bfloat16)
    with pytest.raises(RuntimeError, match="ratio"):
        check_first_step(rollout, row | {"first_ratio_mean": 0.05}, torch.bfloat16)
    with pytest.raises(RuntimeError, match="sampling"):
        check_first_step(rollout, row | {"sampling_gap_mean": 0.05}, torch.bfloat16)


def test_with_dropout_the_first_ratio_is_reported_and_not_asserted():
    """The update's masks are not the rollout's: its ratio is off 1. All else has to hold."""
    rollout = with_kl(0.0)
    check_first_step(rollout, FIRST | {"first_ratio_max": 0.5}, torch.float32, dropout=0.1)
    with pytest.raises(RuntimeError, match="sampling"):
        check_first_step(rollout, FIRST | {"sampling_gap": 1e-3}, torch.float32, dropout=0.1)
