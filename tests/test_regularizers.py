"""Regularisers against enumeration: a vocabulary so small that every expectation is a sum one can
write out.

p is the policy, q the reference, d = log p - log q of one token. The oracles below are loops over
plain floats, written in probabilities (p, q, and their average m) where the module works with
log-probs.
"""
import math

import pytest
import torch

from regularizers import exact, sampled

SAMPLED = ("kl", "clamped_kl", "bregman", "bregman_paper", "squared_error", "jensen_shannon",
           "jensen_shannon_paper")
EXACT = ("kl", "reverse_kl", "jensen_shannon")
P, Q = (0.7, 0.2, 0.1), (0.2, 0.3, 0.5)

ONE_SAMPLE = {                  # penalty of a token that p and q give these probabilities
    "kl": lambda p, q: math.log(p / q),
    "clamped_kl": lambda p, q: max(math.log(p / q), 0.0),
    "bregman": lambda p, q: q / p - 1 + math.log(p / q),
    "bregman_paper": lambda p, q: p / q - 1 - math.log(p / q),
    "squared_error": lambda p, q: 0.5 * math.log(p / q) ** 2,
    "jensen_shannon": lambda p, q: 0.5 * (q / p * math.log(q / ((p + q) / 2))
                                          + math.log(p / ((p + q) / 2))),
    "jensen_shannon_paper": lambda p, q: 0.5 * math.log(max(p, q) / ((p + q) / 2)),
}


def KL(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def JS(p, q):
    m = [(a + b) / 2 for a, b in zip(p, q)]
    return 0.5 * KL(p, m) + 0.5 * KL(q, m)


DIVERGENCE = {"kl": KL, "reverse_kl": lambda p, q: KL(q, p), "jensen_shannon": JS}


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def pair(V, seed, spread=1.0):
    """Two seeded next-token distributions over V tokens: their logits (V,), float64, standard
    normal, `spread` apart."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(V, generator=generator, dtype=torch.float64)
    return logits, logits + spread * torch.randn(V, generator=generator, dtype=torch.float64)


def penalty_of_every_token(name, logits, ref_logits):
    """sampled(), asked about each token of the vocabulary: logits (V,) -> (V,)."""
    return sampled(name, logits.log_softmax(-1)[None], ref_logits.log_softmax(-1)[None])[0]


# --------------------------------------------------------------------------------------------------
# ------------------------------------------------------------------------------------------ by hand

@pytest.mark.parametrize("name, expected", [
    ("kl",                   (1.252763, -0.405465, -1.609438)),   # log(.7/.2), log(.2/.3), ..
    ("clamped_kl",           (1.252763, 0.0, 0.0)),
    ("squared_error",        (0.784708, 0.082201, 1.295145)),     # 1.252763^2 / 2, ...
    ("bregman",              (0.538477, 0.094535, 2.390562)),     # 2/7 - 1 + 1.252763, ..
    ("bregman_paper",        (1.247237, 0.072132, 0.809438)),     # 7/2 - 1 - 1.252763, ..
    ("jensen_shannon",       (0.105069, 0.025169, 0.727758)),   # (2/7 log(.2/.45) + log(..))/2, ..
    ("jensen_shannon_paper", (0.220916, 0.091161, 0.255413)),     # log(.7/.45)/2, log(.3/.25)/2, ..
])
def test_sampled_penalties_of_three_tokens_by_hand(name, expected):
    """Policy (.7, .2, .1), reference (.2, .3, .5). Only k1 can be negative: it is a log-ratio, not
    a distance, and a token that the policy likes less than the reference does earns reward. The
    others charge every token."""
    penalty = penalty_of_every_token(name, f64(P).log(), f64(Q).log())
    assert penalty.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name, expected", [("kl", 0.634897), ("reverse_kl", 0.675806),
                                            ("jensen_shannon", 0.151358)])
def test_exact_divergences_of_three_tokens_by_hand(name, expected):
    """The two directions of KL differ: KL(policy || ref) weighs tokens by the policy and is what
    RLHF subtracts from the reward. Swapping its arguments gives a plausible curve and another
    method."""
    divergence = exact(name, f64(P).log()[None, None], f64(Q).log()[None, None])
    assert divergence.item() == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------------------------------- what each
# estimates, by enumeration

@pytest.mark.parametrize("name, divergence", [("kl", KL), ("bregman", KL), ("jensen_shannon", JS)])
@pytest.mark.parametrize("seed", range(5))
def test_kl_bregman_and_jensen_shannon_are_unbiased(name, divergence, seed):
    """Averaged over the token that the policy draws (here: over all 50, by their probability) k1
    and k3 are KL, and the one-sample Jensen-Shannon is JS. k3 has less variance, not another
    mean."""
    logits, ref_logits = pair(50, seed)
    p, q = logits.softmax(-1).tolist(), ref_logits.softmax(-1).tolist()
    penalty = penalty_of_every_token(name, logits, ref_logits).tolist()
    assert sum(a * x for a, x in zip(p, penalty)) == pytest.approx(divergence(p, q), abs=1e-10)


@pytest.mark.parametrize("name, closed_form", [
    ("clamped_kl",           lambda p, q: sum(a * math.log(a / b) for a, b in zip(p, q) if a > b)),
    ("squared_error",        lambda p, q: sum(a * math.log(a / b) ** 2 for a, b in zip(p, q)) / 2),
    ("bregman_paper",        lambda p, q: sum(a * a / b for a, b in zip(p, q)) - 1 - KL(p, q)),
    ("jensen_shannon_paper", lambda p, q: sum(a * math.log(2 * max(a, b) / (a + b))
                                              for a, b in zip(p, q)) / 2),
])
@pytest.mark.parametrize("seed", range(5))
def test_the_biased_ones_have_their_own_expectation(name, closed_form, seed):
    """Clamped KL, squared error, the paper's Bregman and its JS average to something else than the
    divergence they are named after: known in closed form, and more than .01 nats per token away
    here (KL is .4 to .8, JS .08 to .16)."""
    logits, ref_logits = pair(50, seed)
    p, q = logits.softmax(-1).tolist(), ref_logits.softmax(-1).tolist()
    mean = sum(a * x for a, x in zip(p, penalty_of_every_token(name, logits, ref_logits).tolist()))
    assert mean == pytest.approx(closed_form(p, q), abs=1e-10)
    assert abs(mean - (JS(p, q) if "jensen" in name else KL(p, q))) > 0.01


@pytest.mark.parametrize("token_kl, low, high", [(0.01, 10, 12), (0.1, 3, 4), (1.0, 0.9, 1.2),
                                                 (3.0, 0.6, 0.8)])
def test_the_papers_jensen_shannon_is_too_large_near_the_reference(token_kl, low, high):
    """JS is quadratic near zero (about KL / 4), the paper's sample is linear, |d| / 4: at a token
    KL of .01 it overcharges 11 times, at .1 still 3 times; they meet near 1, and beyond it charges
    too little. So a kl_coef that was found with it says nothing about one for a true JS."""
    logits, direction = pair(200, seed=0)
    logits, ref_logits = at_token_kl(logits, direction - logits, token_kl, moved="reference")
    p = logits.softmax(-1)
    ratio = ((p * penalty_of_every_token("jensen_shannon_paper", logits, ref_logits)).sum()
             / (p * penalty_of_every_token("jensen_shannon", logits, ref_logits)).sum())
    assert low < ratio.item() < high


@pytest.mark.parametrize("name", EXACT)
def test_exact_equals_a_loop_over_the_vocabulary(name):
    """(B, R, V) logits -> (B, R): one number per position, none mixed with its neighbours. Logits
    are no log-probs: adding 1000 to all of them changes nothing."""
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 2, 4, 50, generator=generator, dtype=torch.float64)
    got = exact(name, logits, ref_logits)
    assert got.shape == (2, 4)
    for b in range(2):
        for t in range(4):
            p, q = logits[b, t].softmax(-1).tolist(), ref_logits[b, t].softmax(-1).tolist()
            assert got[b, t].item() == pytest.approx(DIVERGENCE[name](p, q), abs=1e-10)
    assert torch.allclose(exact(name, logits + 1000, ref_logits - 1000), got, rtol=0, atol=1e-10)
    single = exact(name, logits.float(), ref_logits.float())
    assert torch.allclose(single.double(), got, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------
# limits and bounds

@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_is_exactly_zero_at_the_reference(name):
    """The first rollout comes from the reference itself, B = 0: its penalty is 0, not 1e-8,
    whatever the log-probs."""
    logprobs = torch.tensor([[0.0, -1e-7, -0.1, -3.3, -20.0, -110.0, -200.0]])
    assert torch.equal(sampled(name, logprobs, logprobs.clone()), torch.zeros(1, 7))


@pytest.mark.parametrize("name", EXACT)
def test_exact_is_zero_at_the_reference_and_so_is_its_gradient(name):
    """A divergence has its minimum at p = q: there it pulls nowhere. Exactly 0 in value (the first
    logged KL is 0); the gradient is a sum of probabilities that cancel, hence 1e-7."""
    logits = torch.randn(2, 3, 200, generator=torch.Generator().manual_seed(0), requires_grad=True)
    divergence = exact(name, logits, logits.detach().clone())
    assert torch.equal(divergence, torch.zeros(2, 3))
    assert torch.autograd.grad(divergence.sum(), logits)[0].abs().max() < 1e-7


@pytest.mark.parametrize("name", ["clamped_kl", "squared_error", "bregman", "jensen_shannon",
                                  "jensen_shannon_paper"])
def test_sampled_distances_are_never_negative(name):
    """Each charges every token, so no token can earn reward by drifting. |d| from 1e-3 to 80, both
    signs, in float32."""
    d = torch.logspace(-3, math.log10(80), 2000)
    d = torch.cat([d, -d])[None]
    assert (sampled(name, d - 100, torch.full_like(d, -100.0)) >= 0).all()
    assert (sampled(name, d, torch.zeros_like(d)) >= 0).all()


@pytest.mark.parametrize("name", EXACT)
def test_exact_divergences_are_never_negative(name):
    """Gibbs' inequality, over 1000 pairs from nearly equal to far apart. 1e-6: float32 rounding of
    a sum over V = 50."""
    generator = torch.Generator().manual_seed(0)
    logits, noise = torch.randn(2, 1, 1000, 50, generator=generator)
    spread = torch.logspace(-4, 1, 1000)[:, None]
    assert (exact(name, logits, logits + spread * noise) >= -1e-6).all()


def test_exact_jensen_shannon_ends_at_log_2():
    """JS is bounded, which is its charm: once p and q share no token it is log 2 and pulls no
    further. KL there is 60."""
    logits, ref_logits = torch.tensor([[[60.0, 0.0]]]), torch.tensor([[[0.0, 60.0]]])
    js, kl = exact("jensen_shannon", logits, ref_logits), exact("kl", logits, ref_logits)
    assert js.item() == pytest.approx(math.log(2), abs=1e-6)
    assert kl.item() == pytest.approx(60, abs=1e-4)             # 1e-4: float32 at 60
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = 20 * torch.randn(2, 1, 1000, 50, generator=generator)
    assert (exact("jensen_shannon", logits, ref_logits) <= math.log(2) + 1e-6).all()


def test_the_papers_jensen_shannon_has_a_bound_and_the_unbiased_sample_has_none():
    """The paper's form stays below log(2) / 2 for any token. An unbiased sample cannot: a token
    that the reference likes e^20 times better is rare, and pays for all the times that it was not
    drawn: e^20 log(2) / 2 = 1.681e8."""
    d = torch.linspace(-200, 200, 4001)[None]
    paper = sampled("jensen_shannon_paper", d, torch.zeros_like(d))
    assert (paper <= 0.5 * math.log(2) + 1e-7).all()
    unbiased = sampled("jensen_shannon", torch.tensor([[-20.0]]), torch.tensor([[0.0]])).item()
    assert unbiased == pytest.approx(math.exp(20) * math.log(2) / 2, rel=1e-5)


# -----------------------------------------------------------------------------------------------
# float32, log space

def one_sample_at(name, d):
    """ONE_SAMPLE in float64, at p = 1 and q = exp(-d) or the other way round: both are then at most
    1."""
    p, q = (1.0, math.exp(-d)) if d >= 0 else (math.exp(d), 1.0)
    return ONE_SAMPLE[name](p, q)


@pytest.mark.parametrize("name, lowest, highest", [
    ("kl", -200, 200), ("clamped_kl", -200, 200), ("squared_error", -200, 200),
    ("jensen_shannon_paper", -200, 200),
    ("bregman", -80, 200), ("jensen_shannon", -80, 200), ("bregman_paper", -200, 80)])
def test_sampled_is_accurate_in_float32_from_tiny_to_huge_ratios(name, lowest, highest):
    """k3 and JS grow with q / p = exp(-d), which float32 holds down to d = -80 and a little
    further, the paper's Bregman with p / q; the others last to |d| = 200 at least. Near zero the
    terms of k3 and JS cancel: at d = .001 they are 5e-7 and 1.25e-7, and must not come out as
    rounding noise of 1e-7. Relative error at most 1e-6."""
    sizes = [0.001, 0.01, 0.1, 0.5, 1, 2, 5, 10, 20, 40, 80, 120, 200]
    both_signs = sizes + [-x for x in sizes]
    d = torch.tensor([x for x in both_signs if lowest <= x <= highest])[None]
    expected = [one_sample_at(name, x) for x in d[0].double().tolist()]
    got = sampled(name, d, torch.zeros_like(d))
    assert torch.isfinite(got).all()
    assert got[0].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-13)


@pytest.mark.parametrize("name", SAMPLED)
def test_small_probabilities_do_not_matter_only_their_ratio_does(name):
    """exp(-110) is 0 in float32: code that turns log-probs into probabilities first divides 0 by 0
    there. Near -110 and near -200 a penalty is what it is near 0, for the same d. These d are exact
    in float32 at any of the offsets."""
    d = torch.tensor([[-2.0, -0.5, -0.125, 0.125, 0.5, 2.0]])
    expected = [one_sample_at(name, x) for x in d[0].tolist()]
    for offset in (0.0, -110.0, -200.0):
        ref_logprobs = torch.full_like(d, offset)
        got = sampled(name, d + ref_logprobs, ref_logprobs)[0].tolist()
        assert got == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name, d", [("bregman", -120.0), ("jensen_shannon", -120.0),
                                     ("bregman_paper", 120.0)])
def test_what_float32_cannot_hold_is_not_clamped_in_silence(name, d):
    """At d = -120 (the paper's Bregman: 120) the penalty is about e^120 = 1.3e52, above float32's
    3.4e38. It must come out as inf, so that the run stops and says so; a clamp would train on with
    a made-up number."""
    assert not torch.isfinite(sampled(name, torch.tensor([[d]]), torch.tensor([[0.0]]))).any()


@pytest.mark.parametrize("banned", [-1e30, -math.inf])
@pytest.mark.parametrize("name", EXACT)
def test_tokens_that_may_not_be_sampled_add_nothing(name, banned):
    """PAD, BOS and UNK carry a logit of -1e30 in policy and reference: probability 0 in both, so
    the divergence is that of the other tokens, 0 log 0 is 0, and no gradient - NaN least of all -
    reaches a banned logit. -inf does as well."""
    logits, ref_logits = (x.float()[None, None].clone() for x in pair(50, seed=0))
    allowed = exact(name, logits[..., 2:], ref_logits[..., 2:])
    logits[..., :2] = ref_logits[..., :2] = banned
    logits.requires_grad_()
    divergence = exact(name, logits, ref_logits)
    assert divergence.item() == pytest.approx(allowed.item(), abs=1e-6)
    gradient, = torch.autograd.grad(divergence.sum(), logits)
    assert torch.isfinite(gradient).all() and torch.equal(gradient[..., :2], torch.zeros(1, 1, 2))


@pytest.mark.parametrize("name", EXACT)
def test_exact_divergences_survive_a_reference_that_is_sure(name):
    """Logits 300 apart: probabilities of exp(-300), 0 in float32, beside one of 1. KL(q || p) is
    300 nats, not inf."""
    logits, ref_logits = torch.tensor([[[300.0, 0.0, 0.0]]]), torch.tensor([[[0.0, 300.0, 0.0]]])
    expected = {"kl": 300.0, "reverse_kl": 300.0, "jensen_shannon": math.log(2)}[name]
    assert exact(name, logits, ref_logits).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", SAMPLED)
def test_nan_in_one_token_stays_there(name):
    """Padding may hold anything: a NaN in one place must not reach the next, nor may the arguments
    be written to."""
    logprobs, ref_logprobs = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -1.0, -3.5]])
    clean = sampled(name, logprobs, ref_logprobs)
    poisoned, before = torch.tensor([[-1.0, -2.0, math.nan]]), logprobs.clone()
    assert torch.equal(sampled(name, poisoned, ref_logprobs)[:, :2], clean[:, :2])
    assert torch.equal(logprobs, before)


@pytest.mark.parametrize("function, names", [(sampled, SAMPLED), (exact, EXACT)])
def test_an_unknown_regularizer_is_refused_by_name(function, names):
    """`reverse_kl` has no sampled form here and `bregman` no exact one: a wrong name is an error,
    never a silent kl."""
    for name in {"reverse_kl", "bregman", "kl2"} - set(names):
        with pytest.raises(KeyError, match=name):
            function(name, torch.zeros(1, 1, 3), torch.zeros(1, 1, 3))


# ---------------------------------------------------------------------------------------------- the
# gradient each one gives

def gradient_of_kl(logits, ref_logits):
    """d KL(policy || ref) / d logits (V,), by autograd of the enumerated sum."""
    logits = logits.clone().requires_grad_()
    p, q = logits.softmax(-1), ref_logits.softmax(-1)
    return torch.autograd.grad((p * (p / q).log()).sum(), logits)[0]


def gradient_in_reward(name, logits, ref_logits):
    """What REINFORCE makes, in expectation, of a penalty in the reward: sum over y of p(y) f(y)
    grad log p(y).

    The penalty f is a number there, like any reward: no gradient flows through it."""
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    f = penalty_of_every_token(name, logits, ref_logits).detach()
    return torch.autograd.grad((logp.exp().detach() * f * logp).sum(), logits)[0]


def at_token_kl(start, direction, target, moved):
    """Logits of policy and reference: the one `moved` is start + s * direction, the other start,
    and s > 0 is bisected until KL(policy || reference) is `target` nats."""
    low, high = 0.0, 10.0
    for _ in range(60):
        s = (low + high) / 2
        pair = start + s * direction, start
        if moved == "reference":
            pair = start, start + s * direction
        p, q = (x.softmax(-1) for x in pair)
        if (p * (p / q).log()).sum() < target:
            low = s
        else:
            high = s
    return pair


@pytest.mark.parametrize("seed", range(5))
def test_kl_in_the_reward_descends_the_true_kl(seed):
    """RLHF's old trick: subtract log p - log q from the reward, as a mere number, and the policy
    gradient is that of KL. The term that is missing, p grad log p, sums to zero over the
    vocabulary."""
    logits, ref_logits = pair(50, seed)
    in_reward = gradient_in_reward("kl", logits, ref_logits)
    true = gradient_of_kl(logits, ref_logits)
    assert torch.allclose(in_reward, true, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", EXACT)
def test_exact_divergences_in_the_loss_have_their_true_gradient(name):
    """Finite differences of the loop over the vocabulary, float64: what the loss mode descends is
    the divergence that it logs. The reference is a constant. KL's gradient agrees with autograd of
    the enumerated sum as well."""
    values, ref_logits = pair(12, seed=3)
    logits = values.clone().requires_grad_()
    divergence = exact(name, logits[None, None], ref_logits[None, None])
    gradient, = torch.autograd.grad(divergence.sum(), logits)
    q, h = ref_logits.softmax(-1).tolist(), 1e-5
    for v in range(12):
        step = h * torch.eye(12, dtype=torch.float64)[v]
        up, down = ((values + s).softmax(-1).tolist() for s in (step, -step))
        slope = (DIVERGENCE[name](up, q) - DIVERGENCE[name](down, q)) / (2 * h)
        assert gradient[v].item() == pytest.approx(slope, abs=1e-8)
    if name == "kl":
        assert torch.allclose(gradient, gradient_of_kl(values, ref_logits), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name, gradient_of", [("kl", None), ("squared_error", "kl"),
                                               ("bregman", "reverse_kl")])
def test_sampled_forms_as_a_loss_descend_something_else_than_they_measure(name, gradient_of):
    """Why the sampled forms belong in the reward here and are refused in the loss. Differentiated
    as a loss, on the policy's own tokens: k1 pushes nowhere at all (its expected gradient is 0), k2
    gives the gradient of KL, and k3, though it measures KL, gives that of the reverse KL."""
    values, ref_logits = pair(50, seed=1)
    logits = values.clone().requires_grad_()
    p = values.softmax(-1)                  # the frequencies of the draws: constants in a loss
    got, = torch.autograd.grad((p * penalty_of_every_token(name, logits, ref_logits)).sum(), logits)
    expected = torch.zeros(50, dtype=torch.float64)
    if gradient_of == "kl":
        expected = gradient_of_kl(values, ref_logits)
    if gradient_of == "reverse_kl":
        expected = p - ref_logits.softmax(-1)                   # d/dz sum q (log q - log p)
    assert torch.allclose(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_divergence_in_the_reward_would_push_nowhere(name):
    """Why that combination is refused. A sum over the vocabulary is one number for the state,
    whichever token is drawn: its policy gradient, the sum over y of p(y) f grad log p(y), is f
    times the gradient of 1."""
    values, ref_logits = pair(50, seed=2)
    logits = values.clone().requires_grad_()
    logp, f = logits.log_softmax(-1), exact(name, values[None, None], ref_logits[None, None]).item()
    gradient, = torch.autograd.grad((logp.exp().detach() * f * logp).sum(), logits)
    assert f > 0.05 and gradient.abs().max() < 1e-12


@pytest.mark.parametrize("moved", ["reference", "policy"])
def test_in_the_reward_only_kl_gives_the_gradient_of_kl(moved):
    """The paper's "other regularisers", as penalties in the reward, hardly pull towards the
    reference. The coefficient is how much of KL's gradient g_KL is in a penalty's gradient g: <g,
    g_KL> / <g_KL, g_KL>; 40 seeded pairs of standard normal logits, V = 200, one of the two pushed
    away from the other to a token KL of .1. Each figure below is of another implementation on other
    pairs; ours lies within 2 standard deviations over the pairs."""
    stated = {"kl": 1.0, "clamped_kl": 0.6, "squared_error": 0.13, "jensen_shannon_paper": 0.055,
              "bregman": 0.055, "jensen_shannon": 0.0}
    coefficients = {name: [] for name in SAMPLED}
    for seed in range(40):
        start, other = pair(200, seed)
        logits, ref_logits = at_token_kl(start, other - start, 0.1, moved)
        g_kl = gradient_of_kl(logits, ref_logits)
        for name in SAMPLED:
            g = gradient_in_reward(name, logits, ref_logits)
            coefficients[name].append((g @ g_kl / (g_kl @ g_kl)).item())
    for name, values in coefficients.items():
        mean, sd = torch.tensor(values).mean().item(), torch.tensor(values).std().item()
        print(f"{moved} moved, {name:>20}: {mean:+.3f} +- {sd:.3f}")
        if name in stated:                  # of the paper's Bregman nothing is stated elsewhere
            assert abs(mean - stated[name]) <= 2 * sd + 1e-6, name
    means = {name: sum(values) / 40 for name, values in coefficients.items()}
    assert means["kl"] == pytest.approx(1, abs=1e-6) and 0.5 < means["clamped_kl"] < 0.75
    assert all(abs(means[name]) < 0.25 for name in stated if name not in ("kl", "clamped_kl"))
    # d^2 / 2 + d^3 / 6 + ..: more than k2
    assert means["squared_error"] < means["bregman_paper"] < means["clamped_kl"]
