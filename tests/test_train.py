"""The loops and the method: the first step, accumulation, processes, memory layouts, learning."""
import math
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train
from data import Example, pack
from lora import add_lora, lora_parameters
from model import (InputError, Llama, LlamaConfig, ban_mask, generate, keyed_seed, load_llama,
                   save_llama)
from ppo import masked_mean, with_advantages
from reward import ActorCritic, RewardModel, assess, build_models, save_reward_model
from running import (ROOT, lines, metrics, ppo_flags, run_processes, same_run, stage_flags,
                     whole_run)

SMALL = LlamaConfig(vocab_size=50, dim=32, n_layers=1, n_heads=2, ffn_dim=48)


# ----------------------------------------------------------------------------------- the first step

def test_first_step_starts_at_the_reference_with_ratio_one(whole_run):
    """Before anything has moved KL is exactly 0 (not nearly), the ratio of the
    first minibatch is 1, nothing is clipped, and what the sampler computed with its cache is what
    the full forward computes."""
    first = metrics(whole_run)[0]
    assert first["kl_per_token"] == first["k1_per_token"] == first["k3_per_token"] == 0
    assert first["first_ratio_max"] <= 1e-5 and first["first_clip_frac"] == 0
    assert first["sampling_gap"] <= 1e-4
    assert metrics(whole_run)[-1]["kl_per_token"] > 0


@pytest.mark.parametrize("name", ["kl", "sampled_logprobs", "logprobs"])
def test_a_run_whose_first_step_breaks_an_assumption_stops_there(tiny, tmp_path, monkeypatch, name):
    """A policy that starts elsewhere than the reference, a cache that computes something else, an
    update whose forward is not the rollout's: none of them fails by itself, and each makes all that
    follows meaningless. So the run looks, once, and keeps nothing."""
    collect = train.collect

    def broken(*args):
        rollout = collect(*args)
        return replace(rollout, **{name: getattr(rollout, name) + 1e-3})

    monkeypatch.setattr(train, "collect", broken)
    with pytest.raises(RuntimeError, match="step 1 broke an assumption"):
        train.main(ppo_flags(tiny, tmp_path / "ppo", save_every=1))
    assert not (tmp_path / "ppo" / "checkpoint.pt").exists()


def test_full_fine_tuning_starts_at_a_kl_of_exactly_0(tmp_path):
    """At the toy model's width, where two kernels for one product would round differently: policy
    and frozen copy are one model, and have to be computed in the same way and dtype."""
    torch.manual_seed(0)
    save_llama(Llama(train.TOY_MODEL), tmp_path / "sft")
    save_reward_model(RewardModel(Llama(train.TOY_MODEL, lm_head=False)), tmp_path / "reward")
    net, reward_model = build_models(tmp_path / "sft", tmp_path / "reward", "cpu", torch.float32,
                                     rank=0)
    prompts = [[1, *range(5 + i, 40)] for i in range(8)]
    responses = [[*range(40, 60 + i), 2] for i in range(8)]
    rollout = assess(net, reward_model, prompts, responses, 2, 8)
    assert (rollout.kl == 0).all() and torch.equal(rollout.logprobs, rollout.ref_logprobs)


# ---------------------------------------------------------------------- numbers that are not finite

@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_model_that_computes_no_numbers_is_reported(tiny, temperature):
    """NaN has no largest id and no cumulative probability: without a check, garbage or an error
    from deep inside torch. In a run the line names the step."""
    model = load_llama(tiny / "sft")
    with torch.no_grad():
        model.layers[1].feed_forward.w2.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="hidden states .* not finite"):
        generate(model, [[1, 5], [1]], 20, temperature)
    cfg, inputs = ppo_inputs(tiny)
    with pytest.raises(FloatingPointError, match="step 3: .*hidden states"):
        train.respond(cfg, 3, ActorCritic(model), inputs)


def ppo_inputs(tiny, **more):
    """Settings and inputs of a PPO run, without starting it."""
    command = train.parse(ppo_flags(tiny, "out", **more))
    return command.configs["ppo"], train.read_inputs(command, "ppo")


@pytest.mark.parametrize("name", ["logprobs", "ref_logprobs", "values", "scores", "kl"])
def test_nan_stops_the_run_and_overwrites_nothing(tiny, tmp_path, monkeypatch, capsys, name):
    """The line names step and tensor, the status is 1; the checkpoint of step 2 stays as
    it was, and there is no result."""
    join, steps = train.join_rollouts, []

    def poisoned(parts):
        steps.append(len(steps) + 1)
        poison = math.nan if len(steps) == 3 else 1.0
        return join(parts).map(lambda key, x: x * poison if key == name else x)

    monkeypatch.setattr(train, "join_rollouts", poisoned)
    with pytest.raises(SystemExit) as stop:
        train.main(ppo_flags(tiny, tmp_path / "ppo"))
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.startswith(f"train.py: stopped: step 3: {name} of the")
    assert torch.load(tmp_path / "ppo" / "checkpoint.pt", weights_only=True)["step"] == 2
    assert not (tmp_path / "ppo" / "policy").exists() and len(metrics(tmp_path / "ppo")) == 2


def test_any_process_says_why_it_stops(tiny, tmp_path, monkeypatch, capsys):
    """Numbers that are not finite may turn up in the share of one process alone, which need not be
    the one that prints."""
    def broken(*_):
        raise FloatingPointError("step 3: values are not finite")

    monkeypatch.setattr(train, "ppo", broken)
    monkeypatch.setattr(train, "start_processes", lambda: "cpu")
    monkeypatch.setattr(train.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(train, "first_does", lambda action: None)
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            train.main(ppo_flags(tiny, tmp_path / "run"))
        assert stop.value.code == 1
        assert "train.py: stopped: step 3: values are not finite" in capsys.readouterr().err


# -------------------------------------------------------------------------------- true accumulation

class Bare:
    """What stands in for DistributedDataParallel where there is one process and no gradient."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *args):
        return self.module(*args)


def test_sft_loss_is_cross_entropy_of_response_tokens():
    """Only the response is learned; the token at index i is predicted by the state at
    index i - 1."""
    torch.manual_seed(0)
    model = Llama(SMALL)
    examples = [Example([1, 5, 6], [7, 8, 2]), Example([1, 9], [10, 2])]
    packed = pack([e.prompt for e in examples], [e.response for e in examples])
    logprobs = ActorCritic(model)(*packed).logprobs
    losses = []
    for e in examples:
        ids = torch.tensor([e.prompt + e.response])
        all_tokens = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="none")
        losses += all_tokens[len(e.prompt) - 1:].tolist()
    assert -logprobs[0].sum().item() == pytest.approx(sum(losses[:3]), abs=1e-5)
    assert -logprobs[1].sum().item() == pytest.approx(sum(losses[3:]), abs=1e-5)
    assert logprobs[1, 2] == 0                                               # padding
    mean, _ = train.sft_loss(Bare(ActorCritic(model)), examples)
    assert mean.item() == pytest.approx(sum(losses) / 5, abs=1e-6)


def test_ragged_micro_batches_add_up_to_one_batch(one_process):
    """The mean over micro-batches of their means is not the mean over tokens: each is
    weighted by its tokens. Answers of 2 to 9 tokens in micro-batches of 1, 2 and 5 give loss and
    gradient of the whole batch of 8. Statistics come back as numbers, which JSON can hold."""
    torch.manual_seed(0)
    net = ActorCritic(Llama(SMALL))
    ddp = train.wrap(net, "cpu")
    examples = [Example([1, 5], [*range(6, 6 + n), 2]) for n in range(1, 9)]

    def loss_and_gradient(size):
        ddp.zero_grad(set_to_none=False)
        table = train.accumulate(ddp, examples, len, lambda e: len(e.response), size,
                                 train.sft_loss)
        assert all(type(row["loss"]) is float for row in table)
        loss = sum(row["loss"] * row["terms"] for row in table) / 44      # 2 + 3 + .. + 9 tokens
        return loss, torch.cat([p.grad.flatten().clone() for p in net.parameters()])

    whole_loss, whole = loss_and_gradient(8)
    assert whole.abs().max() > 1e-3
    for size in (1, 2, 5):
        loss, gradient = loss_and_gradient(size)
        assert loss == pytest.approx(whole_loss, abs=1e-6)
        assert (gradient - whole).abs().max() <= 1e-6


def test_gradients_travel_between_processes_once_per_batch():
    """Of three micro-batches the first two add up where they are (no_sync), and the last one takes
    all along: a third of the traffic."""
    done = []

    @contextmanager
    def no_sync():
        done.append("stays")
        yield
        done.append("added")

    def loss_of(ddp, items):
        done.append(items)
        return torch.zeros((), requires_grad=True), {}

    train.accumulate(SimpleNamespace(no_sync=no_sync), [1, 2, 3], int, int, 1, loss_of)
    assert done == ["stays", [1], "added", "stays", [2], "added", [3]]


def test_the_shares_of_two_processes_average_to_the_whole_batch(monkeypatch):
    """DDP averages gradients over processes, so each share weighs its terms times their number: or
    twice the processes would be half the step. Terms x * w of 1, 2, 3, 4, 6: the gradient of their
    mean is 16 / 5, of which one process has 1, 3 and 6."""
    w, gradients = torch.nn.Parameter(torch.zeros(())), []
    monkeypatch.setattr(train, "world_size", lambda: 2)
    for process in (0, 1):
        monkeypatch.setattr(train, "rank", lambda: process)
        w.grad = None
        train.accumulate(SimpleNamespace(no_sync=nullcontext), [1, 2, 3, 4, 6], int, lambda x: 1, 2,
                         lambda ddp, items: ((w * torch.tensor(items)).mean(), {}))
        gradients.append(w.grad.item())
    assert sum(gradients) / 2 == pytest.approx(16 / 5)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_ppo_does_not_depend_on_the_size_of_micro_batches(tiny, whole_run, tmp_path, size):
    """Ragged responses, weighted by their tokens: the same losses, gradients and
    parameters as in micro-batches of 2, but for the order of sums."""
    train.main(ppo_flags(tiny, tmp_path / "ppo", micro_batch=size))
    assert_alike(whole_run, tmp_path / "ppo")


def assert_alike(a, b):
    """The same run but for the order of sums: losses and statistics to 1e-6, parameters to 1e-5."""
    for x, y in zip(metrics(a), metrics(b), strict=True):
        assert (x["length"], x["eos_rate"]) == (y["length"], y["eos_rate"])    # the same responses
        for key in ("policy_loss", "value_loss", "score", "kl_per_token", "explained_variance"):
            assert x[key] == pytest.approx(y[key], abs=1e-6), (x["step"], key)
        for key in ("policy_grad_norm", "critic_grad_norm"):
            assert x[key] == pytest.approx(y[key], rel=1e-5, abs=1e-6), (x["step"], key)
    texts = [[row["response"] for row in lines(d / "samples.jsonl")] for d in (a, b)]
    assert texts[0] == texts[1]
    a, b = (load_file(d / "policy" / "adapter_model.safetensors") for d in (a, b))
    assert max((a[k] - b[k]).abs().max() for k in a) <= 1e-5
    assert max(v.abs().max() for k, v in a.items() if "lora_B" in k) > 1e-4      # it has learned


def test_every_sequence_is_used_epochs_times_in_true_minibatches(tiny, tmp_path, monkeypatch):
    """Optimiser steps per PPO step = epochs * rollout / minibatch, and each response is
    in `epochs` of them. (The paper's code took 32 steps of 16 sequences where 4 of 128 were meant.)
    The first learning rate is above 0, and the logged gradient norm is from before the clipping:
    with a bound of 1e-6 it is still above that bound."""
    used, rates = [], []
    loss, step = train.ppo_loss, torch.optim.AdamW.step

    def watched_loss(cfg, rollout, ddp, index):
        used.extend(rollout.rows(index).scores.tolist())         # (no two responses score alike)
        return loss(cfg, rollout, ddp, index)

    def watched_step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(train, "ppo_loss", watched_loss)
    monkeypatch.setattr(torch.optim.AdamW, "step", watched_step)
    train.main(ppo_flags(tiny, tmp_path / "ppo", steps=1, rollout_batch=8, minibatch=4,
                         ppo_epochs=3, micro_batch=3, max_grad_norm=1e-6))
    assert len(rates) == 3 * 8 // 4 and min(rates) > 0
    assert [used.count(score) for score in set(used)] == [3] * 8
    row = metrics(tmp_path / "ppo")[0]
    assert row["optimizer_steps"] == 6 and row["lr"] == rates[0]
    assert row["policy_grad_norm"] > 1e-4 and row["critic_grad_norm"] > 1e-4


def test_learning_rate_is_never_zero():
    """Warm-up 1/5, 2/5 .. 1 over 5 steps, then down linearly to 1/776 of the peak at the last of
    781; a cosine ends above 0 as well."""
    rates = [train.learning_rate(s, 781, 5, 1.0, "linear") for s in range(1, 782)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0 and rates[-1] == pytest.approx(1 / 776)
    assert min(rates) > 0
    cosine = [train.learning_rate(s, 100, 3, 1.0, "cosine") for s in range(1, 101)]
    assert min(cosine) > 0 and cosine[3] == 1.0
    assert cosine[3 + 49] == pytest.approx((1 + math.cos(math.pi * 49 / 97)) / 2)


# -------------------------------------------------------------------------- any number of processes

@pytest.mark.parametrize("n", [2, 4])
def test_several_processes_do_what_one_does(tiny, whole_run, tmp_path, n):
    """The same global batch of ragged rows: what is sampled is identical, losses and
    statistics agree to rounding (sums in another order), and so do the parameters after 5 steps of
    4 optimiser steps each. With 4 processes each has one response of a minibatch, and no two as
    many tokens. The run itself compares the parameters of its processes at the end, to the bit; one
    of them prints."""
    log = tmp_path / "log"
    assert run_processes(ppo_flags(tiny, tmp_path / "ppo"), n, log=log) == [0] * n
    assert log.read_text().count("step    5/5") == 1
    assert_alike(whole_run, tmp_path / "ppo")


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_supervised_stages_do_not_depend_on_the_processes(tiny, tmp_path, stage):
    """6 steps on ragged micro-batches by one process and by
    two. A micro-batch weighed wrongly would show here."""
    more = {"lora_dropout": 0}
    train.main(stage_flags(tiny, stage, tmp_path / "one", **more))
    assert run_processes(stage_flags(tiny, stage, tmp_path / "two", **more), 2) == [0, 0]
    name = "model.safetensors" if stage == "sft" else "adapter_model.safetensors"
    one, two = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
    assert max((one[k] - two[k]).abs().max() for k in one) <= 1e-5
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    if stage == "sft":
        before = load_file(tiny / "sft" / "model.safetensors")
        assert max((one[k] - before[k]).abs().max() for k in one) > 1e-3     # it has learned


def test_processes_that_disagree_are_found_out(monkeypatch, one_process):
    """A bug on one process only (a step skipped, say) would go on silently: the sums of the
    parameters are compared."""
    monkeypatch.setattr(train, "gather", lambda x: [x, [x[0] + 1e-6]])
    with pytest.raises(RuntimeError, match="different parameters"):
        train.check_same_parameters([torch.ones(3)])


def test_frozen_weights_are_compared_before_training_too(monkeypatch, one_process):
    """Nothing is broadcast: a process that has read another base model must be found out."""
    seen = []
    net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False))
    net[0].weight.data.fill_(3.0)
    net[0].requires_grad_(False)
    monkeypatch.setattr(train, "gather", lambda x: [seen.append(x) or x])
    train.wrap(net, "cpu")
    assert seen == [[12.0, net[1].weight.double().sum().item()]]


def test_a_batch_that_does_not_split_over_the_processes_is_refused(monkeypatch):
    """Unequal shares would weigh sequences differently from one process to the next."""
    monkeypatch.setattr(train, "world_size", lambda: 3)
    says = "--minibatch 128 does not split over .*: give a multiple of 3"
    with pytest.raises(InputError, match=says):
        train.check_processes(train.PPOConfig())


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_no_thread_outlives_the_process_group(tiny, tmp_path):
    """One that lets go of its last tensor while Python ends, kills the process when all work is
    done. torch's own module torch.distributed.nn.functional keeps a group in its default arguments
    if it is imported when there is one. (In a fresh process: here it was imported long ago.)"""
    program = ("import os, sys, train; train.main(sys.argv[1:]); tasks = '/proc/self/task'; "
               "print([open(f'{tasks}/{t}/comm').read() for t in os.listdir(tasks)])")
    flags = ppo_flags(tiny, tmp_path / "run", steps=1)
    out = subprocess.run([sys.executable, "-c", program, *flags], cwd=ROOT, capture_output=True,
                         text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}).stdout
    assert "gloo" not in out.splitlines()[-1], out.splitlines()[-1]


# ----------------------------------------------------------------------------- keyed random numbers

def test_the_same_seed_twice_is_equal_and_another_differs(tiny, whole_run, tmp_path):
    """Anything else would make a comparison of two settings meaningless."""
    train.main(ppo_flags(tiny, tmp_path / "again"))
    train.main(ppo_flags(tiny, tmp_path / "other", seed=1))
    same_run(whole_run, tmp_path / "again")
    assert metrics(whole_run) != metrics(tmp_path / "other")


def test_what_is_sampled_belongs_to_seed_step_and_row(tiny):
    """One prompt in all 8 rows and a policy that does not move: rows differ, steps differ, seeds
    differ, or the same answers would be drawn and learned from over and over. The same key draws
    the same again, however many rows are decoded at once: that is what a run that is continued, or
    shared by more processes, relies on."""
    net = ActorCritic(load_llama(tiny / "sft"))

    def drawn(step, **more):
        cfg, inputs = ppo_inputs(tiny, **more)
        inputs = replace(inputs, rows=inputs.rows[:1])
        return train.respond(cfg, step, net, inputs)[1].responses

    first = drawn(1)
    assert len(set(map(tuple, first))) == 8
    for other in (drawn(2), drawn(1, seed=1)):
        assert all(a != b for a, b in zip(first, other))
    assert drawn(1) == drawn(1, generate_batch=3) == first


def test_masks_of_dropout_belong_to_seed_step_epoch_micro_batch_and_process(monkeypatch):
    """Change one part of the key and the masks are others; the same key gives the same again, which
    a run that is continued needs."""
    def masks_of(*key):
        """Of three micro-batches."""
        drawn = []

        def loss_of(ddp, items):
            drawn.append(F.dropout(torch.ones(100), 0.5).tolist())
            return torch.zeros((), requires_grad=True), {}

        ddp = SimpleNamespace(no_sync=nullcontext)
        train.accumulate(ddp, [1, 2, 3], int, int, 1, loss_of, *key)
        return drawn

    key = [0, 3, 1, 2]
    masks = masks_of(*key)
    for place in range(4):
        other = list(key)
        other[place] += 1
        masks += masks_of(*other)
    monkeypatch.setattr(train, "rank", lambda: 1)
    monkeypatch.setattr(train, "world_size", lambda: 2)
    masks += masks_of(*key)
    assert len(masks) == 5 * 3 + 1
    assert all(a != b for i, a in enumerate(masks) for b in masks[:i])
    assert masks_of(*key) == masks[-1:]
    assert keyed_seed(1, 23) != keyed_seed(12, 3)              # .. nor do keys run together


def test_dropout_acts_in_the_update_alone(tiny, tmp_path):
    """"Dropout only" is a variant of the paper. Sampling and old_logprobs are without it, so step 1
    still starts at the reference; the update is not: its first ratio is reported, and stands off 1
    once B has moved."""
    train.main(ppo_flags(tiny, tmp_path / "ppo", lora_dropout=0.5, regularizer="none", steps=3))
    rows = metrics(tmp_path / "ppo")
    assert rows[0]["kl_per_token"] == 0
    assert rows[2]["sampling_gap"] < 1e-4 < rows[2]["first_ratio_max"]


# ----------------------------------------------------------------------------------- memory layouts

LAYOUTS = {"two trunks": {}, "one trunk": {"reward": "reward_adapter"}, "full": {"lora_rank": 0},
           "full, adapter reward": {"lora_rank": 0, "reward": "reward_adapter"}}


def layout_flags(tiny, out, layout, **more):
    changes = LAYOUTS[layout] | more
    if "reward" in changes:
        changes["reward"] = tiny / changes["reward"]
    return ppo_flags(tiny, out, steps=2, **changes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_and_recomputing_activations_changes_nothing(tiny, tmp_path, layout):
    """Both memory layouts and full fine-tuning run; KL is 0 at step 1 in each;
    --checkpoint_activations gives the same numbers (here to the last bit but for the order of sums:
    1e-6)."""
    train.main(layout_flags(tiny, tmp_path / "a", layout))
    train.main(layout_flags(tiny, tmp_path / "b", layout, checkpoint_activations=True))
    a, b = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert a[0]["kl_per_token"] == 0 and a[1]["kl_per_token"] > 0
    for x, y in zip(a, b, strict=True):
        for key in ("policy_loss", "value_loss", "policy_grad_norm", "critic_grad_norm"):
            assert x[key] == pytest.approx(y[key], rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_computes_with_float32_masters(tiny, tmp_path, layout):
    """The update must not be lost in bf16: only frozen weights, and what is computed, are. KL is
    exactly 0 at the start here too, with full fine-tuning as well."""
    train.main(layout_flags(tiny, tmp_path / "ppo", layout, dtype="bfloat16"))
    written = next((tmp_path / "ppo" / "policy").glob("*.safetensors"))
    assert {t.dtype for t in load_file(written).values()} == {torch.float32}
    first, second = metrics(tmp_path / "ppo")
    assert first["kl_per_token"] == 0 < second["kl_per_token"]


def test_one_trunk_holds_one_copy_of_the_weights(tiny):
    """One trunk: policy, value and reward are adapters on the very same tensors; the value starts
    as the reward adapter and computes what it computes. Two trunks: reward and value share theirs.
    What is trained is adapters and the head."""
    for reward, trunks in (("reward_adapter", 1), ("reward", 2)):
        net, reward_model = build_models(tiny / "sft", tiny / reward, "cpu", torch.float32, (0, 1),
                                         rank=8, alpha=16.0)
        assert (net.policy is net.critic) == (trunks == 1)
        assert net.critic is reward_model.trunk and net.ref is None
        names = [n for n, p in net.named_parameters() if p.requires_grad]
        names = [n for n in names if not n.startswith("value_head.")]
        assert all(".lora_" in n and ".reward" not in n for n in names)
        groups = net.groups()
        grouped = sorted(map(id, groups["policy"] + groups["critic"]))
        assert grouped == sorted(map(id, train.trainable(net)))
        tokens, n = torch.randint(3, 900, (2, 9)), torch.tensor([9, 7])
        with torch.no_grad():
            net.value_head.load_state_dict(reward_model.head.state_dict())
            values = net(tokens, torch.tensor([4, 4]), n - 4).values
            scores = reward_model.scores(tokens, n - 1, eos_id=2)
        # the last value reads the last token but one
        assert torch.allclose(values[torch.arange(2), n - 5], scores, atol=1e-5)


def test_seven_billion_parameters_train_a_quarter_of_a_percent():
    """r 8 on wq wk wv wo of LLaMA-7B: 8,388,608 per adapter; with the value adapter and
    its head 16,781,313."""
    with torch.device("meta"):
        policy, critic = Llama(LlamaConfig()), Llama(LlamaConfig(), lm_head=False)
        add_lora(policy, "policy", 8, 64)
        add_lora(critic, "value", 8, 64)
        net = ActorCritic(policy, "policy", critic, "value")
    assert sum(p.numel() for p in lora_parameters(policy, "policy")) == 8_388_608
    assert sum(p.numel() for p in train.trainable(net)) == 16_781_313


def test_an_evaluation_decodes_no_more_rows_at_once_than_a_rollout(monkeypatch, one_process):
    """805 rows of LLaMA-7B on two processes would hold 104 GB of keys and values; what a rollout
    fits in, an evaluation does."""
    def answer(*_, batch_size, **__):
        seen.append(batch_size)
        raise StopIteration

    seen, rows = [], [{"prompt": [1], "reference": [2], "index": 0}] * 30
    inputs = train.Inputs(SimpleNamespace(eos_id=2), [], rows=(), held_out=(), eval_rows=rows)
    monkeypatch.setattr("eval.answer", answer)
    for flags in ([], ["--generate_batch=5"]):
        command = train.parse(["--stage=ppo", "--rollout_batch=12", "--minibatch=4", *flags])
        with pytest.raises(StopIteration):
            train.evaluation(command.configs["ppo"], inputs, None, None)
    assert seen == [12, 5]


# ----------------------------------------------------------------------------------------- learning

class CountingReward(RewardModel):
    """Scores a response by how often it says token 7: a reward whose maximum everyone can see."""

    def scores(self, tokens, lengths, eos_id=2):
        return (tokens == 7).sum(-1).float()


@cache
def learn(seed, **settings):
    """40 PPO steps of a tiny random model on the counting reward -> mean scores and KL per token,
    per step."""
    cfg = train.PPOConfig(model="-", seed=seed, steps=40, rollout_batch=32, minibatch=16,
                          micro_batch=32, response_len=8, lr=1e-2, warmup_steps=2, vf_coef=1.0,
                          missing_eos_penalty=0.0, **{"regularizer": "none"} | settings)
    config = LlamaConfig(vocab_size=32, dim=32, n_layers=1, n_heads=2, ffn_dim=64, max_seq_len=64)
    torch.manual_seed(seed)
    policy, critic = Llama(config), Llama(config, lm_head=False)
    for p in [*policy.parameters(), *critic.parameters()]:
        if p.dim() == 2:        # wide, as trained weights are: an adapter on the attention of
            torch.nn.init.normal_(p, std=0.3)     # a freshly initialised model hardly moves
    add_lora(policy, "policy", 8, 16)
    add_lora(critic, "value", 8, 16)
    reward_model = CountingReward(critic)
    net = ActorCritic(policy, "policy", critic, "value", ban_mask(32, (0, 1)))
    prompts = [[1, i] for i in range(3, 30)]
    inputs = train.Inputs(SimpleNamespace(eos_id=2), [0, 1], prompts, held_out=(), eval_rows=())
    groups = [{"params": p, "name": name} for name, p in net.groups().items()]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, eps=1e-5, weight_decay=0.0)
    ddp, scores, kl, places = train.wrap(net, "cpu").eval(), [], [], set()
    for step in range(1, cfg.steps + 1):
        prompts, samples = train.respond(cfg, step, net, inputs)
        rollout = train.collect(cfg, step, net, reward_model, inputs, prompts, samples)
        rollout = with_advantages(rollout, cfg.regularizer_in("reward"), cfg.kl_coef, 0.0,
                                  cfg.gamma, cfg.lam, False)
        train.update(cfg, step, ddp, optimizer, rollout)
        scores.append(rollout.scores.mean().item())
        kl.append(masked_mean(rollout.kl, rollout.response_mask).item())
        if step > 1:
            places.add(tuple(p.grad.data_ptr() for p in train.trainable(net)))
    assert len(places) == 1      # gradients stay in DDP's buckets, and take no memory beside
    return torch.tensor(scores), torch.tensor(kl)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_learns_to_say_the_token_that_pays(one_process, seed):
    """A uniform policy says token 7 about 0.27 times in 8 tokens; the mean of the last 5
    steps is above the first 5 by more than 3 standard deviations of a batch's mean."""
    scores, _ = learn(seed)
    # a count of about 0.27 has deviation 0.5; 32 of them
    deviation = scores[:5].std().clamp(min=0.5 / 32 ** 0.5)
    assert scores[-5:].mean() > scores[:5].mean() + 3 * deviation


def test_the_kl_penalty_holds_the_policy(one_process):
    """A large coefficient keeps the policy at the reference (KL below 0.01 nats per
    token), none lets it go, and a negative one pays for leaving, so that it goes furthest."""
    settings = {"large": {"regularizer": "kl", "kl_coef": 20.0}, "none": {},
                "negative": {"regularizer": "kl", "kl_coef": -0.5}}
    final = {name: learn(0, **s)[1][-5:].mean().item() for name, s in settings.items()}
    assert final["large"] < 0.01 < final["none"] < final["negative"], final


def test_exact_kl_in_the_loss_holds_it_too(one_process):
    """Loss mode differentiates the divergence over the whole vocabulary; a large coefficient pins
    the policy as well."""
    _, free = learn(0)
    _, held = learn(0, regularizer="kl", regularizer_mode="loss", kl_coef=10.0)
    assert held[-5:].mean() < 0.01 < free[-5:].mean()
