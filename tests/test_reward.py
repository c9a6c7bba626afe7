"""The reward model: Bradley and Terry's loss by hand and by counting, what a score may depend on, and learning.

A preference says which of two answers is better, never how good either is: everything here follows from that.
"""
import math

import pytest
import torch

from lora import adapter
from model import Llama, LlamaConfig, load_llama
from reward import RewardModel, bradley_terry_loss, load_reward_model


def gradients(chosen, rejected):
    """d loss / d chosen, d loss / d rejected."""
    chosen, rejected = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    return torch.autograd.grad(bradley_terry_loss(chosen, rejected), (chosen, rejected))


def two_scores(dtype=torch.float64):
    """Scores of 16 pairs, about as often in the right order as in the wrong one."""
    return torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=dtype).unbind()


# ------------------------------------------------------------------------------------------------- Bradley-Terry's loss

@pytest.mark.parametrize("margin, expected", [(0.0, 0.693147), (2.0, 0.126928), (-2.0, 2.126928), (200.0, 0.0), (-200.0, 200.0)])
def test_bradley_terry_by_hand(margin, expected):
    """-log of the probability sigmoid(margin) that the chosen answer wins. Equal scores are a coin toss, log 2. A pair
    that is wrong by 200 costs 200 nats, not inf: the log is never taken of a sigmoid that has become 0."""
    assert bradley_terry_loss(torch.tensor([margin]), torch.tensor([0.0])).item() == pytest.approx(expected, abs=1e-5)


def test_bradley_terry_equals_a_loop_and_is_a_mean_over_pairs():
    """P(chosen wins) = e^chosen / (e^chosen + e^rejected), one pair after the other."""
    chosen, rejected = two_scores()
    losses = [-math.log(math.exp(c) / (math.exp(c) + math.exp(r))) for c, r in zip(chosen.tolist(), rejected.tolist())]
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx(sum(losses) / 16, abs=1e-12)


def test_either_answer_wins_with_certainty():
    """P(a beats b) + P(b beats a) = 1: the loss knows no draw and no bias towards the first of a pair."""
    for a, b in zip(*two_scores()):
        first, second = bradley_terry_loss(a[None], b[None]).item(), bradley_terry_loss(b[None], a[None]).item()
        assert math.exp(-first) + math.exp(-second) == pytest.approx(1, abs=1e-12)


def test_only_differences_of_scores_matter():
    """Adding 100 to every score changes nothing, so a reward model's zero is arbitrary. What PPO sees depends on it (a
    constant is paid per answer), what the pairs can teach does not."""
    chosen, rejected = two_scores()
    assert bradley_terry_loss(chosen + 100, rejected + 100).item() == pytest.approx(
        bradley_terry_loss(chosen, rejected).item(), abs=1e-12)


def test_the_gradient_is_antisymmetric_and_says_how_surprising_the_label_was():
    """What the chosen score is raised by, the rejected one is lowered by: (sigmoid(margin) - 1) / B, near 0 for a pair that
    is understood and near 1 / B for one that is upside down."""
    chosen, rejected = two_scores()
    up, down = gradients(chosen, rejected)
    assert torch.equal(up, -down)
    expected = [-1 / (1 + math.exp(c - r)) / 16 for c, r in zip(chosen.tolist(), rejected.tolist())]
    assert up.tolist() == pytest.approx(expected, abs=1e-12)


def test_hopeless_and_trivial_pairs_have_finite_gradients():
    """In float32, at margins of -200 and 200: -1 / B and 0, never NaN."""
    up, _ = gradients(torch.tensor([-200.0, 200.0]), torch.zeros(2))
    assert up.tolist() == pytest.approx([-0.5, 0.0], abs=1e-6)


def test_noisy_labels_bound_the_margin():
    """Four annotators prefer a, one prefers b: the best margin is log(4 / 1) = 1.386294, and the loss there is the entropy
    of the labels, .500402 nats. Noise does not only slow learning; it fixes the scale of the scores."""
    margin = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    sign = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0])
    for _ in range(500):
        loss = bradley_terry_loss(sign * margin, torch.zeros(5))
        margin.data -= torch.autograd.grad(loss, margin)[0]
    assert margin.item() == pytest.approx(1.386294, abs=1e-5)
    assert loss.item() == pytest.approx(0.500402, abs=1e-5)


# ------------------------------------------------------------------------------------------- what a score depends on

@pytest.fixture(scope="module", params=["full", "adapter"])
def reward_model(tiny, request):
    """Untrained, with a random head: fully trained weights, or an adapter on the SFT trunk."""
    if request.param == "full":
        return load_reward_model(tiny / "reward")
    return load_reward_model(tiny / "reward_adapter", trunk=load_llama(tiny / "sft"))


def scores_of(model, rows, fill=0, extra=0):
    """Scores of id lists, padded on the right with `fill` to the longest of them and `extra` columns more."""
    width = max(map(len, rows)) + extra
    tokens = torch.tensor([row + [fill] * (width - len(row)) for row in rows])
    with torch.no_grad():
        return model.scores(tokens, torch.tensor([len(row) for row in rows]))


@pytest.fixture(scope="module")
def rows():
    """Five rows of random ids, each ending with EOS, which is 2."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 80, (n - 1,), generator=generator).tolist() + [2] for n in (5, 23, 1, 12, 9)]


def test_a_score_does_not_depend_on_padding_or_batch_mates(reward_model, rows):
    """A row scored alone, among longer ones, and behind 17 columns of any id: one number per answer, to 1e-5. A model that
    reads the last column instead of the last real token scores the padding."""
    alone = torch.stack([scores_of(reward_model, [row])[0] for row in rows])
    assert alone.shape == (5,) and alone.dtype == torch.float32
    assert alone.std() > 0.1                                                              # the five do differ
    for together in (scores_of(reward_model, rows), scores_of(reward_model, rows, fill=77, extra=17),
                     scores_of(reward_model, rows[::-1]).flip(0)):
        assert torch.allclose(together, alone, rtol=0, atol=1e-5)


def test_a_score_depends_on_every_token_up_to_the_last(reward_model, rows):
    """The score is read at the last real token, from which attention looks back over all of the answer: changing any one
    token, the first included, changes the score."""
    row, score = rows[3], scores_of(reward_model, [rows[3]])
    for t in range(len(row)):
        changed = row[:t] + [row[t] + 1] + row[t + 1:]
        assert (scores_of(reward_model, [changed]) - score).abs() > 1e-4, t


def test_a_reward_adapter_scores_with_its_own_adapter_on(tiny, rows):
    """One trunk, several adapters: the reward model switches its own on whatever is active outside, and reads the state of
    the last token through its head. With the adapter off the scores would be another model's."""
    trunk = load_llama(tiny / "sft")
    model = load_reward_model(tiny / "reward_adapter", trunk=trunk)
    state = lambda name: hidden_at_the_end(trunk, name, rows[3])
    score = scores_of(model, [rows[3]]).item()
    assert score == pytest.approx((state("reward") @ model.head.weight[0] + model.head.bias).item(), abs=1e-5)
    assert abs(score - (state(None) @ model.head.weight[0] + model.head.bias).item()) > 1e-2
    with adapter(trunk, None):
        assert scores_of(model, [rows[3]]).item() == score


def hidden_at_the_end(trunk, name, row):
    """The trunk's state (D,) of the row's last token, with the adapter `name` on."""
    with torch.no_grad(), adapter(trunk, name):
        return trunk.hidden(torch.tensor([row]))[0, -1]


def test_score_eos_says_whether_the_eos_is_read(tiny, rows):
    """Ours are trained on text + EOS and read the EOS. AlpacaFarm's released model is not: there a final EOS is left out,
    and the answer scores the same with and without it; a row that was cut off keeps its last token."""
    ours, theirs = load_reward_model(tiny / "reward"), load_reward_model(tiny / "reward")
    theirs.score_eos = False
    row = rows[3]
    assert torch.allclose(scores_of(theirs, [row]), scores_of(theirs, [row[:-1]]), rtol=0, atol=1e-5)
    assert torch.allclose(scores_of(theirs, [row]), scores_of(ours, [row[:-1]]), rtol=0, atol=1e-5)
    assert (scores_of(ours, [row]) - scores_of(ours, [row[:-1]])).abs() > 1e-2


# ---------------------------------------------------------------------------------------------------------- learning

def untrained():
    """One layer of width 32 and a head at zero, vocabulary 32."""
    torch.manual_seed(0)
    return RewardModel(Llama(LlamaConfig(vocab_size=32, dim=32, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=64,
                                         max_seq_len=16)))


def pairs_of_rows(n, seed):
    """n pairs of ragged rows, ids 8..31, of 6 to 12 tokens: (2, n, 12) tokens and (2, n) lengths; the rest is padding, 0."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(8, 32, (2, n, 12), generator=generator)
    lengths = torch.randint(6, 13, (2, n), generator=generator)
    tokens[torch.arange(12) >= lengths[..., None]] = 0
    return tokens, lengths


def fit(model, tokens, lengths, steps):
    """AdamW on Bradley-Terry over all the pairs, row 0 chosen, row 1 rejected."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimiser.zero_grad()
        chosen, rejected = model.scores(tokens.flatten(0, 1), lengths.flatten()).view(2, -1)
        bradley_terry_loss(chosen, rejected).backward()
        optimiser.step()


@torch.no_grad()
def accuracy(model, tokens, lengths):
    chosen, rejected = model.scores(tokens.flatten(0, 1), lengths.flatten()).view(2, -1)
    return (chosen > rejected).double().mean().item()


def test_a_new_reward_model_has_no_opinion():
    """The head starts at zero: every score is 0, every pair costs log 2, and the first gradient is not drowned by noise."""
    tokens, lengths = pairs_of_rows(8, seed=0)
    chosen, rejected = untrained().scores(tokens.flatten(0, 1), lengths.flatten()).view(2, -1)
    assert torch.equal(chosen, torch.zeros(8)) and torch.equal(rejected, torch.zeros(8))


def test_separable_preferences_are_learned():
    """The chosen answer holds token 7 somewhere, the rejected one nowhere. After 60 steps on 256 pairs at least 95 % of 500
    new pairs are in the right order: the loss has the right sign, and the score sees the whole row."""
    def separable(n, seed):
        tokens, lengths = pairs_of_rows(n, seed)
        place = torch.randint(0, 6, (n,), generator=torch.Generator().manual_seed(seed + 1))
        tokens[0, torch.arange(n), place] = 7
        return tokens, lengths

    model = untrained()
    fit(model, *separable(256, seed=10), steps=60)
    assert accuracy(model, *separable(500, seed=20)) >= 0.95


def test_random_preferences_can_be_memorised_but_not_learned():
    """Labels by coin toss: the model learns 64 pairs by heart, and orders 2000 new ones no better than the coin, .5 +- .05
    (4.5 standard errors). So held-out accuracy is the number to watch: accuracy in training proves nothing, and one
    that is far from .5 here would mean that something else than the text tells chosen from rejected."""
    model, memorised = untrained(), pairs_of_rows(64, seed=30)
    fit(model, *memorised, steps=60)
    assert accuracy(model, *memorised) >= 0.95
    assert abs(accuracy(model, *pairs_of_rows(2000, seed=40)) - 0.5) <= 0.05
