"""The reward model: Bradley and Terry's loss by hand and by counting, what a score may depend on,
learning, and its files.

A preference says which of two answers is better, never how good either is: everything here follows
from that.
"""
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora import adapter, lora_parameters
from model import InputError, Llama, LlamaConfig, load_llama, read_json
from reward import (RewardModel, bradley_terry_loss, build_models, load_reward_model,
                    save_reward_model, score_responses)


def gradients(chosen, rejected):
    """d loss / d chosen, d loss / d rejected."""
    chosen, rejected = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    return torch.autograd.grad(bradley_terry_loss(chosen, rejected), (chosen, rejected))


def two_scores(dtype=torch.float64):
    """Scores of 16 pairs, about as often in the right order as in the wrong one."""
    return torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=dtype).unbind()


# ----------------------------------------------------------------------------- Bradley-Terry's loss

@pytest.mark.parametrize("margin, expected", [(0.0, 0.693147), (2.0, 0.126928), (-2.0, 2.126928),
                                              (200.0, 0.0), (-200.0, 200.0)])
def test_bradley_terry_by_hand(margin, expected):
    """-log of the probability sigmoid(margin) that the chosen answer wins. Equal scores are a coin
    toss, log 2. A pair that is wrong by 200 costs 200 nats, not inf: the log is never taken of a
    sigmoid that has become 0."""
    loss = bradley_terry_loss(torch.tensor([margin]), torch.tensor([0.0]))
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_bradley_terry_equals_a_loop_and_is_a_mean_over_pairs():
    """P(chosen wins) = e^chosen / (e^chosen + e^rejected), one pair after the other."""
    chosen, rejected = two_scores()
    losses = [-math.log(math.exp(c) / (math.exp(c) + math.exp(r)))
              for c, r in zip(chosen.tolist(), rejected.tolist())]
    loss = bradley_terry_loss(chosen, rejected).item()
    assert loss == pytest.approx(sum(losses) / 16, abs=1e-12)


def test_either_answer_wins_with_certainty():
    """P(a beats b) + P(b beats a) = 1: the loss knows no draw and no bias towards the first of a
    pair."""
    for a, b in zip(*two_scores()):
        first = bradley_terry_loss(a[None], b[None]).item()
        second = bradley_terry_loss(b[None], a[None]).item()
        assert math.exp(-first) + math.exp(-second) == pytest.approx(1, abs=1e-12)


def test_only_differences_of_scores_matter():
    """Adding 100 to every score changes nothing, so a reward model's zero is arbitrary. What PPO
    sees depends on it (a constant is paid per answer), what the pairs can teach does not."""
    chosen, rejected = two_scores()
    shifted = bradley_terry_loss(chosen + 100, rejected + 100).item()
    assert shifted == pytest.approx(bradley_terry_loss(chosen, rejected).item(), abs=1e-12)


def test_the_gradient_is_antisymmetric_and_says_how_surprising_the_label_was():
    """What the chosen score is raised by, the rejected one is lowered by: (sigmoid(margin) - 1) /
    B, near 0 for a pair that is understood and near 1 / B for one that is upside down."""
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
    """Four annotators prefer a, one prefers b: the best margin is log(4 / 1) = 1.386294, and the
    loss there is the entropy of the labels, .500402 nats. Noise does not only slow learning; it
    fixes the scale of the scores."""
    margin = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    sign = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0])
    for _ in range(500):
        loss = bradley_terry_loss(sign * margin, torch.zeros(5))
        margin.data -= torch.autograd.grad(loss, margin)[0]
    assert margin.item() == pytest.approx(1.386294, abs=1e-5)
    assert loss.item() == pytest.approx(0.500402, abs=1e-5)


# -------------------------------------------------------------------------- what a score depends on

@pytest.fixture(scope="module", params=["full", "adapter"])
def reward_model(tiny, request):
    """Untrained, with a random head: fully trained weights, or an adapter on the SFT trunk."""
    if request.param == "full":
        return load_reward_model(tiny / "reward")
    return load_reward_model(tiny / "reward_adapter", trunk=load_llama(tiny / "sft"))


def scores_of(model, rows, fill=0, extra=0):
    """Scores of id lists, padded on the right with `fill` to the longest of them and `extra`
    columns more."""
    width = max(map(len, rows)) + extra
    tokens = torch.tensor([row + [fill] * (width - len(row)) for row in rows])
    with torch.no_grad():
        return model.scores(tokens, torch.tensor([len(row) for row in rows]))


@pytest.fixture(scope="module")
def rows():
    """Five rows of random ids, each ending with EOS, which is 2."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 80, (n - 1,), generator=generator).tolist() + [2]
            for n in (5, 23, 1, 12, 9)]


def test_a_score_does_not_depend_on_padding_or_batch_mates(reward_model, rows):
    """A row scored alone, among longer ones, and behind 17 columns of any id: one number per
    answer, to 1e-5. A model that reads the last column instead of the last real token scores the
    padding."""
    alone = torch.stack([scores_of(reward_model, [row])[0] for row in rows])
    assert alone.shape == (5,) and alone.dtype == torch.float32
    assert alone.std() > 0.1                                                # the five do differ
    for together in (scores_of(reward_model, rows),
                     scores_of(reward_model, rows, fill=77, extra=17),
                     scores_of(reward_model, rows[::-1]).flip(0)):
        assert torch.allclose(together, alone, rtol=0, atol=1e-5)


def test_a_score_depends_on_every_token_up_to_the_last(reward_model, rows):
    """The score is read at the last real token, from which attention looks back over all of the
    answer: changing any one token, the first included, changes the score."""
    row, score = rows[3], scores_of(reward_model, [rows[3]])
    for t in range(len(row)):
        changed = row[:t] + [row[t] + 1] + row[t + 1:]
        assert (scores_of(reward_model, [changed]) - score).abs() > 1e-4, t


def test_scores_of_responses_come_back_in_their_order(reward_model, rows):
    """Rows of similar length share a forward pass, two at a time: each answer still gets its own
    score, to 1e-5, and a model that was in training is put back after dropout was off."""
    prompts, responses = [row[:1] for row in rows], [row[1:] or [2] for row in rows]
    reward_model.train()
    scores = score_responses(reward_model, prompts, responses, 2, micro_batch=2)
    assert reward_model.training
    alone = [scores_of(reward_model.eval(), [p + r])[0] for p, r in zip(prompts, responses)]
    assert torch.allclose(scores, torch.stack(alone), rtol=0, atol=1e-5)


def hidden_at_the_end(trunk, name, row):
    """The trunk's state (D,) of the row's last token, with the adapter `name` on."""
    with torch.no_grad(), adapter(trunk, name):
        return trunk.hidden(torch.tensor([row]))[0, -1]


def test_a_reward_adapter_scores_with_its_own_adapter_on(tiny, rows):
    """One trunk, several adapters: the reward model switches its own on whatever is active outside,
    and reads the state of the last token through its head. With the adapter off the scores would be
    another model's."""
    trunk = load_llama(tiny / "sft")
    model = load_reward_model(tiny / "reward_adapter", trunk=trunk)

    def by_hand(name):
        state = hidden_at_the_end(trunk, name, rows[3])
        return (state @ model.head.weight[0] + model.head.bias).item()

    score = scores_of(model, [rows[3]]).item()
    assert score == pytest.approx(by_hand("reward"), abs=1e-5)
    assert abs(score - by_hand(None)) > 1e-2
    with adapter(trunk, None):
        assert scores_of(model, [rows[3]]).item() == score


def test_score_eos_says_whether_the_eos_is_read(tiny, rows):
    """Ours are trained on text + EOS and read the EOS. AlpacaFarm's released model is not: there a
    final EOS is left out, and the answer scores the same with and without it; a row that was cut
    off keeps its last token."""
    ours, theirs = load_reward_model(tiny / "reward"), load_reward_model(tiny / "reward")
    theirs.score_eos = False
    whole, without = [rows[3]], [rows[3][:-1]]
    assert torch.allclose(scores_of(theirs, whole), scores_of(theirs, without), rtol=0, atol=1e-5)
    assert torch.allclose(scores_of(theirs, whole), scores_of(ours, without), rtol=0, atol=1e-5)
    assert (scores_of(ours, whole) - scores_of(ours, without)).abs() > 1e-2


# ----------------------------------------------------------------------------------------- learning

def untrained():
    """One layer of width 32 and a head at zero, vocabulary 32."""
    torch.manual_seed(0)
    return RewardModel(Llama(LlamaConfig(vocab_size=32, dim=32, n_layers=1, n_heads=2, n_kv_heads=2,
                                         ffn_dim=64, max_seq_len=16)))


def pairs_of_rows(n, seed):
    """n pairs of ragged rows, ids 8..31, of 6 to 12 tokens: (2, n, 12) tokens and (2, n) lengths;
    the rest is padding, 0."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(8, 32, (2, n, 12), generator=generator)
    lengths = torch.randint(6, 13, (2, n), generator=generator)
    tokens[torch.arange(12) >= lengths[..., None]] = 0
    return tokens, lengths


def scores_of_pairs(model, tokens, lengths):
    """-> scores of the chosen (n,) and of the rejected (n,) rows."""
    return model.scores(tokens.flatten(0, 1), lengths.flatten()).view(2, -1)


def fit(model, tokens, lengths, steps):
    """AdamW on Bradley-Terry over all the pairs, row 0 chosen, row 1 rejected."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimiser.zero_grad()
        bradley_terry_loss(*scores_of_pairs(model, tokens, lengths)).backward()
        optimiser.step()


@torch.no_grad()
def accuracy(model, tokens, lengths):
    chosen, rejected = scores_of_pairs(model, tokens, lengths)
    return (chosen > rejected).double().mean().item()


def test_a_new_reward_model_has_no_opinion():
    """The head starts at zero: every score is 0, every pair costs log 2, and the first gradient is
    not drowned by noise."""
    chosen, rejected = scores_of_pairs(untrained(), *pairs_of_rows(8, seed=0))
    assert torch.equal(chosen, torch.zeros(8)) and torch.equal(rejected, torch.zeros(8))


def test_separable_preferences_are_learned():
    """The chosen answer holds token 7 somewhere, the rejected one nowhere. After 60 steps on 256
    pairs at least 95 % of 500 new pairs are in the right order: the loss has the right sign, and
    the score sees the whole row."""
    def separable(n, seed):
        tokens, lengths = pairs_of_rows(n, seed)
        place = torch.randint(0, 6, (n,), generator=torch.Generator().manual_seed(seed + 1))
        tokens[0, torch.arange(n), place] = 7
        return tokens, lengths

    model = untrained()
    fit(model, *separable(256, seed=10), steps=60)
    assert accuracy(model, *separable(500, seed=20)) >= 0.95


def test_random_preferences_can_be_memorised_but_not_learned():
    """Labels by coin toss: the model learns 64 pairs by heart, and orders 2000 new ones no better
    than the coin, .5 +- .05 (4.5 standard errors). So held-out accuracy is the number to watch:
    accuracy in training proves nothing, and one that is far from .5 here would mean that something
    else than the text tells chosen from rejected."""
    model, memorised = untrained(), pairs_of_rows(64, seed=30)
    fit(model, *memorised, steps=60)
    assert accuracy(model, *memorised) >= 0.95
    assert abs(accuracy(model, *pairs_of_rows(2000, seed=40)) - 0.5) <= 0.05


# -------------------------------------------------------------------------------------------- files

def test_a_full_reward_model_comes_back_bit_for_bit(tiny, rows, tmp_path):
    """Names as AlpacaFarm's (backbone_model.*, reward_head.*), no output matrix, and what else is
    said about it stays in config.json beside the sizes."""
    model = load_reward_model(tiny / "reward")
    save_reward_model(model, tmp_path, run={"seed": 3})
    again, about = load_reward_model(tmp_path), read_json(tmp_path / "config.json")
    assert torch.equal(scores_of(again, rows), scores_of(model, rows))
    assert again.score_eos and not again.training and about["run"] == {"seed": 3}
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {"reward_head.weight", "reward_head.bias"} < names
    assert {name.split(".")[0] for name in names} == {"backbone_model", "reward_head"}
    assert not any("lm_head" in name for name in names)


def test_a_folder_that_does_not_speak_of_eos_was_trained_without(tiny, rows, tmp_path):
    """AlpacaFarm's models know no score_eos: a config that does not say it means theirs."""
    save_reward_model(load_reward_model(tiny / "reward"), tmp_path)
    about = read_json(tmp_path / "config.json")
    del about["score_eos"]
    (tmp_path / "config.json").write_text(json.dumps(about))
    model = load_reward_model(tmp_path)
    assert not model.score_eos
    whole, without = scores_of(model, rows[:2]), scores_of(model, [r[:-1] for r in rows[:2]])
    assert torch.allclose(whole, without, rtol=0, atol=1e-5)


def test_a_reward_adapter_belongs_to_its_trunk_whatever_the_dtype(tiny, tmp_path):
    """One-trunk PPO: the adapter is found again on the same trunk in bfloat16, and refused on any
    other, where its scores would mean nothing."""
    path = tiny / "reward_adapter"
    model = load_reward_model(path, trunk=load_llama(tiny / "sft", dtype=torch.bfloat16))
    assert model.adapter_name == "reward" and model.head.weight.dtype == torch.float32
    other = load_llama(tiny / "sft")
    with torch.no_grad():
        other.layers[0].attention.wq.weight.add_(1)
    with pytest.raises(InputError, match=r"was trained on another model .*fingerprint differs"):
        load_reward_model(path, trunk=other)
    assert not any("lora" in name for name, _ in other.named_parameters())


def test_what_is_no_reward_model_is_named_for_what_it_is(tiny, tmp_path):
    """A real classifier (transformers' score.weight), a policy, AlpacaFarm's config without sizes,
    an empty folder: each says what it is, and what was expected."""
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_reward_model(tmp_path)
    with pytest.raises(InputError, match="no tensor reward_head.weight.*LlamaForCausalLM"):
        load_reward_model(tiny / "sft")
    about = read_json(tiny / "sft" / "config.json")
    tensors = load_file(tiny / "sft" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors | {"score.weight": torch.zeros(1, 64)}, tmp_path / "model.safetensors")
    about["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="reward_head.weight.*LlamaForSequenceClassification"):
        load_reward_model(tmp_path)
    with pytest.raises(InputError, match="tensor lm_head.weight is missing"):
        load_llama(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "reward_model"}')
    with pytest.raises(InputError, match=r"reward_model.*tools/convert\.py reward"):
        load_reward_model(tmp_path)


@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop("reward_head.bias"), r"head\.bias is missing"),
    (lambda t: t.pop("backbone_model.model.norm.weight"),
     r"backbone_model\.model\.norm\.weight is missing"),
    (lambda t: t.update({"reward_head.weight": torch.zeros(2, 64)}),
     r"head\.weight has shape \(2, 64\).*expected \(1, 64\)"),
    (lambda t: t["reward_head.bias"].fill_(math.nan), r"head\.bias holds .* not finite")])
def test_a_damaged_reward_model_is_refused_by_name(tiny, tmp_path, change, says):
    """A head that is missing would be zero, and every answer would score the same."""
    save_reward_model(load_reward_model(tiny / "reward"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=says):
        load_reward_model(tmp_path)


# ---------------------------------------------------------------------------------- the four models

@pytest.mark.parametrize("reward, trunks", [("reward", 2), ("reward_adapter", 1)])
def test_four_models_stand_on_one_or_two_trunks(tiny, rows, reward, trunks):
    """Policy, reference, reward and value are never four copies: two full trunks, or one with three
    adapters. At the start the policy is the reference, to the bit, and the critic's states are the
    reward model's, so that it begins with what that has learned."""
    sft, device = tiny / "sft", "cpu"
    net, reward_model = build_models(sft, tiny / reward, device, torch.float32, (0, 1), 4, 8)
    assert (reward_model.trunk is net.policy) == (trunks == 1) and net.critic is reward_model.trunk
    assert net.ref is None and torch.equal(net.value_head.weight, torch.zeros(1, 64))
    trained = {id(p) for group in net.groups().values() for p in group}
    assert trained == {id(p) for p in net.parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in net.parameters() if p.requires_grad)
    tokens = torch.tensor([rows[1]])
    with torch.no_grad(), adapter(net.policy, "policy"):
        policy = net.policy(tokens)
    with torch.no_grad(), adapter(net.policy, None):
        assert torch.equal(net.policy(tokens), policy)
    value_state = hidden_at_the_end(net.critic, "value", rows[1])
    reward_state = hidden_at_the_end(net.critic, reward_model.adapter_name, rows[1])
    assert torch.equal(value_state, reward_state)


@pytest.mark.parametrize("reward", ["reward", "reward_adapter"])
def test_full_fine_tuning_has_a_frozen_reference_and_its_own_critic(tiny, rows, reward):
    """--lora_rank 0: all weights of policy and critic train in float32; the reference is a copy
    that does not, and computes the same bits; the critic's states are the reward model's, 1e-5 (an
    adapter is merged into it)."""
    net, reward_model = build_models(tiny / "sft", tiny / reward, "cpu", torch.float32, (0, 1), 0)
    trained = {id(p) for group in net.groups().values() for p in group}
    assert trained == {id(p) for p in net.parameters() if p.requires_grad}
    assert all(p.requires_grad for p in [*net.policy.parameters(), *net.critic.parameters()])
    assert not any(p.requires_grad for p in [*net.ref.parameters(), *reward_model.parameters()])
    assert net.critic is not reward_model.trunk and net.critic.output is None
    tokens = torch.tensor([rows[1]])
    with torch.no_grad():
        assert torch.equal(net.policy(tokens), net.ref(tokens))
    value_state = hidden_at_the_end(net.critic, None, rows[1])
    reward_state = hidden_at_the_end(reward_model.trunk, reward_model.adapter_name, rows[1])
    assert torch.allclose(value_state, reward_state, rtol=0, atol=1e-5)


def test_what_policy_and_critic_say_is_read_at_the_state_before_each_token(tiny):
    """Two rows, prompts of 3 and 1 ids, responses of 2 and 4, of which 0 and 1 are banned: logprobs
    and values of each response token by hand from the row alone, 1e-5, and 0 in the padding."""
    net, _ = build_models(tiny / "sft", tiny / "reward", "cpu", torch.float32, (0, 1), 4, 8)
    for p in lora_parameters(net.policy, "policy") + list(net.value_head.parameters()):
        torch.nn.init.normal_(p, std=0.1)
    rows, before, after = [[1, 11, 12, 21, 2], [1, 31, 32, 33, 2]], [3, 1], [2, 4]
    with torch.no_grad():
        out = net(torch.tensor(rows), torch.tensor(before), torch.tensor(after), divergence="kl")
    for i, row in enumerate(rows):
        tokens = torch.tensor([row])
        with torch.no_grad(), adapter(net.policy, "policy"):
            logits = net.policy(tokens)[0, before[i] - 1:-1]
        with torch.no_grad():
            ref_logits = net.policy(tokens)[0, before[i] - 1:-1]
        with torch.no_grad(), adapter(net.critic, "value"):
            values = net.value_head(net.critic.hidden(tokens))[0, before[i] - 1:-1]
        logp, ref_logp = (x[:, 2:].log_softmax(-1) for x in (logits, ref_logits))
        taken = torch.tensor(row[before[i]:])[:, None] - 2
        expected = {"logprobs": logp.gather(1, taken)[:, 0], "values": values,
                    "ref_logprobs": ref_logp.gather(1, taken)[:, 0],
                    "entropy": -(logp.exp() * logp).sum(-1),
                    "divergence": (logp.exp() * (logp - ref_logp)).sum(-1)}
        for name, x in expected.items():
            got = getattr(out, name)[i]
            assert torch.allclose(got[:after[i]], x, rtol=0, atol=1e-5), name
            assert torch.equal(got[after[i]:], torch.zeros(4 - after[i])), name
