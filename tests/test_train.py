"""The system: processes, resuming, stopping, the first step, learning, and what happens to bad input."""
import ctypes
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_module
import train
from data import Example, Tokenizer, format_prompt, pack
from eval import load_answering, load_run
from lora import adapter, add_lora, lora_parameters
from model import (KVCache, Llama, LlamaConfig, ban_mask, generate, load_llama, packed_weights, prefill, read_model_config,
                   save_llama)
from ppo import Rollout
from reward import ActorCritic, RewardModel, assess, build_models, save_reward_model

ROOT = Path(__file__).resolve().parents[1]
TIMINGS = {"sample_seconds", "score_seconds", "update_seconds"}


def ppo_flags(tiny, out, **more):
    """Flags of a small PPO run on the untrained model: 8 ragged responses of at most 12 tokens per step."""
    flags = dict(stage="ppo", model=tiny / "sft", reward=tiny / "reward", prompts=ROOT / "toy" / "unlabeled.json", out=out,
                 steps=5, rollout_batch=8, minibatch=4, micro_batch=2, response_len=12, prompt_len=60, lr=1e-3,
                 warmup_steps=2, save_every=2, dtype="float32", lora_alpha=16, kl_target=0.01, kl_horizon=100) | more
    return [f"--{k}={v}" if v is not True else f"--{k}" for k, v in flags.items()]


def launch(flags, processes=1, **kwargs):
    """train.py as a user starts it, one thread per process."""
    start = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen([*start, str(ROOT / "train.py"), *flags], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, **kwargs)


def finish(process, expect=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == expect, out + err
    return out


def metrics(folder, drop=TIMINGS):
    return [{k: v for k, v in json.loads(line).items() if k not in drop}
            for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_run(a, b):
    """Bit for bit: parameters, metrics (timings apart), samples."""
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.suffix in (".safetensors", ".jsonl"))
    assert files == sorted(p.relative_to(b) for p in b.rglob("*") if p.suffix in (".safetensors", ".jsonl"))
    for name in files:
        if name.name != "metrics.jsonl":
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert metrics(a) == metrics(b)


@pytest.fixture(scope="module")
def whole_run(tiny, tmp_path_factory):
    """Five PPO steps by one process, uninterrupted."""
    out = tmp_path_factory.mktemp("whole") / "ppo"
    finish(launch(ppo_flags(tiny, out)))
    return out


# ------------------------------------------------------------------------------------------- processes and resuming

def test_two_processes_do_what_one_does(tiny, whole_run, tmp_path):
    """CHECKS 31. The same global batch of ragged rows: what is sampled is identical, losses and statistics agree to
    rounding (sums in another order), and so do the parameters after 5 steps of 4 optimiser steps each. The run itself
    compares the parameters of its processes at the end, to the bit."""
    finish(launch(ppo_flags(tiny, tmp_path / "two"), processes=2))
    samples = [[json.loads(line) for line in (d / "samples.jsonl").read_text().splitlines()] for d in (whole_run, tmp_path / "two")]
    assert [[s["response"] for s in run] for run in samples][0] == [s["response"] for s in samples[1]]
    for a, b in zip(metrics(whole_run), metrics(tmp_path / "two"), strict=True):
        assert a["length"] == b["length"] and a["eos_rate"] == b["eos_rate"]      # the same responses at every step
        for key in ("policy_loss", "value_loss", "score", "kl_per_token"):
            assert a[key] == pytest.approx(b[key], abs=1e-6), (a["step"], key)
    a, b = (load_file(d / "policy" / "adapter_model.safetensors") for d in (whole_run, tmp_path / "two"))
    assert max((a[k] - b[k]).abs().max() for k in a) <= 1e-5
    assert max(v.abs().max() for k, v in a.items() if "lora_B" in k) > 1e-4      # something was learned at all


def test_processes_that_disagree_are_found_out(monkeypatch, one_process):
    """A bug on one process only (a step skipped, say) would go on silently: the sums of the parameters are compared."""
    monkeypatch.setattr(train, "gather", lambda x: [x, [x[0] + 1e-6]])
    with pytest.raises(RuntimeError, match="different parameters"):
        train.check_same_parameters([torch.ones(3)])


def test_frozen_weights_are_compared_before_training_too(monkeypatch, one_process):
    """Nothing is broadcast: a process that has read another base model must be found out."""
    seen, net = [], torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False))
    net[0].weight.data.fill_(3.0)
    net[0].requires_grad_(False)
    monkeypatch.setattr(train, "gather", lambda x: [seen.append(x) or x])
    train.wrap(net, "cpu")
    assert seen == [[12.0, net[1].weight.double().sum().item()]]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_continues_bit_for_bit(tiny, whole_run, tmp_path, sent):
    """CHECKS 32, 34. SIGTERM (as Ctrl-C) finishes the step and writes a checkpoint; kill -9 loses what came after the last
    one (save_every 2). Either way the same command ends where the uninterrupted run ended: parameters, metrics, samples.
    """
    out = tmp_path / "ppo"
    process = launch(ppo_flags(tiny, out))
    while not (out / "metrics.jsonl").is_file() or len((out / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(sent)
    process.communicate(timeout=60)
    if process.returncode != 0:                                     # (a fast machine may have finished before the signal)
        assert process.returncode == (128 + sent if sent == signal.SIGTERM else -sent)
        assert (out / "checkpoint.pt").is_file() and not (out / "finished.json").is_file()
        torch.load(out / "checkpoint.pt", weights_only=True)
        assert "continuing after step" in finish(launch(ppo_flags(tiny, out)))
    same_run(whole_run, out)


def test_any_process_says_why_it_stops(tiny, tmp_path, monkeypatch, capsys):
    """Numbers that are not finite may turn up in the share of one process alone, which need not be the one that prints."""
    def broken(*_):
        raise FloatingPointError("step 3: hidden states are not finite")

    monkeypatch.setattr(train, "start_processes", lambda: "cpu")
    monkeypatch.setattr(train, "Stopper", lambda: None)
    monkeypatch.setattr(train, "ppo", broken)
    for processes, says in ((1, "train.py: stopped: step 3: hidden states are not finite\n"),
                            (2, "train.py: stopped: step 3: hidden states are not finite (process 1)\n")):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        monkeypatch.setenv("RANK", str(processes - 1))
        with pytest.raises(SystemExit) as stop:
            train.main(ppo_flags(tiny, tmp_path / "run"))
        assert stop.value.code == 1 and capsys.readouterr().out.endswith(says)


def test_an_evaluation_decodes_no_more_rows_at_once_than_a_rollout(monkeypatch, one_process):
    """805 rows of LLaMA-7B on two processes would hold 104 GB of keys and values; what a rollout fits in, an evaluation
    does."""
    def answer(*_, batch_size, **__):
        seen.append(batch_size)
        raise StopIteration

    seen, net = [], SimpleNamespace(policy=SimpleNamespace(config=SimpleNamespace(max_seq_len=64)))
    monkeypatch.setattr("eval.answer", answer)
    inputs = SimpleNamespace(tokenizer=None, eval_rows=[{"prompt": [1]}] * 30)
    for flags in ([], ["--generate_batch=5"]):
        with pytest.raises(StopIteration):
            train.evaluation(train.parse(["--stage=ppo", "--rollout_batch=12", "--minibatch=4", *flags]), inputs, net, None)
    assert seen == [12, 5]


def test_a_run_does_not_continue_on_another_trunk(tiny, tmp_path, capsys, monkeypatch):
    """Checkpoints hold what trains. A frozen model that was replaced in between - an SFT that was run again, say - would go
    unnoticed by its path, and the rest of the run would train something else."""
    shutil.copytree(tiny / "sft", tmp_path / "sft")
    flags = ppo_flags(tiny, tmp_path / "run", model=tmp_path / "sft")
    monkeypatch.setattr(train.Stopper, "asked", lambda self, device: setattr(self, "signal", signal.SIGTERM) or True)
    with pytest.raises(SystemExit):
        train.main(flags)
    monkeypatch.undo()
    tensors = load_file(tmp_path / "sft" / "model.safetensors")
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, tmp_path / "sft" / "model.safetensors")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    assert stop.value.code == 2 and "is not the one that this checkpoint was written with" in capsys.readouterr().err
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("content", [b"", b"PK", torch.zeros(2), {"step": 1}])
def test_a_damaged_checkpoint_is_one_line(tiny, tmp_path, content, one_process, capsys):
    """Empty, cut off, or something else: status 2, and the way out."""
    run = train.Run(train.parse(ppo_flags(tiny, tmp_path / "run")), "ppo")
    run.folder.mkdir()
    torch.save(content, run.folder / "checkpoint.pt")
    if isinstance(content, bytes):
        (run.folder / "checkpoint.pt").write_bytes(content)
    with pytest.raises(ValueError, match="checkpoint.pt is no checkpoint that can be read: damaged. --redo ppo"):
        run.open()


def test_a_signal_that_comes_while_the_processes_agree_counts_the_next_time(monkeypatch, one_process):
    """Each step ends with a question to all processes, whether one was asked to stop. A signal during the question is not
    in its answer; written over by it, it would be lost."""
    stopper, reduce = train.Stopper(), torch.distributed.all_reduce
    monkeypatch.setattr(train.dist, "all_reduce", lambda flag, op: (reduce(flag, op=op), stopper.note(signal.SIGTERM, None)))
    assert not stopper.asked("cpu")
    monkeypatch.undo()
    assert stopper.asked("cpu") and stopper.signal == signal.SIGTERM


@pytest.mark.parametrize("number, ends_with", [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 1)])
def test_a_signal_that_comes_after_the_last_step_is_not_lost(number, ends_with):
    """While the result is being written a signal is only noted; once that is done it does what it does to any program."""
    program = "import os, signal, train\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n" \
              f"stopper = train.Stopper()\nos.kill(os.getpid(), {int(number)})\nprint('written', flush=True)\n" \
              "try:\n    stopper.rest()\nexcept KeyboardInterrupt:\n    raise SystemExit(1)\nprint('evaluated')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (ends_with, "written\n"), done.stderr


def test_a_half_written_record_is_cut_at_the_checkpoint(tmp_path):
    """A kill can leave lines that are later than the checkpoint, and half a line: both go, or steps would appear twice."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    train.cut_lines(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    for line in ('{"loss": 1}', "[1]", "no JSON"):
        path.write_text(f'{{"step": 1}}\n{line}\n')
        with pytest.raises(ValueError, match="metrics.jsonl holds a line that is no record"):
            train.cut_lines(path, 2)


def test_the_same_seed_twice_is_equal_and_another_differs(tiny, whole_run, tmp_path):
    """CHECKS 33. Anything else would make a comparison of two settings meaningless."""
    for process in launch(ppo_flags(tiny, tmp_path / "again")), launch(ppo_flags(tiny, tmp_path / "other", seed=1)):
        finish(process)
    same_run(whole_run, tmp_path / "again")
    assert metrics(whole_run) != metrics(tmp_path / "other")


def test_a_finished_run_says_so_and_does_nothing(tiny, whole_run):
    """The same command once more must not cost an hour, nor touch a file."""
    before = {p: p.stat().st_mtime_ns for p in whole_run.rglob("*") if p.is_file()}
    assert "finished" in finish(launch(ppo_flags(tiny, whole_run)))
    assert before == {p: p.stat().st_mtime_ns for p in whole_run.rglob("*") if p.is_file()}


def test_nan_stops_the_run_and_overwrites_nothing(tiny, tmp_path, monkeypatch, one_process):
    """CHECKS 34. The message names the step and the tensor; the checkpoint of step 2 stays as it was."""
    cfg = train.parse(ppo_flags(tiny, tmp_path / "ppo", save_every=1))
    run, inputs = train.Run(cfg, "ppo"), train.load_inputs(cfg, ["ppo"])
    collect, steps = train.collect, itertools.count(1)

    def poisoned(*args):
        rollout, gaps = collect(*args)
        poison = float("nan") if next(steps) == 3 else 1.0
        return dataclasses.replace(rollout, ref_logprobs=rollout.ref_logprobs * poison), gaps

    monkeypatch.setattr(train, "collect", poisoned)
    with pytest.raises(FloatingPointError, match="step 3: ref_logprobs"):
        train.ppo(run, inputs, one_process, train.Stopper())
    assert torch.load(run.folder / "checkpoint.pt", weights_only=True)["step"] == 2
    assert not (run.folder / "policy").exists()


def test_full_fine_tuning_starts_at_a_kl_of_exactly_0(tmp_path):
    """At the toy model's width, where a packed product rounds unlike a plain one: policy and frozen copy are one model, and
    have to be computed by the same kernels."""
    torch.manual_seed(0)
    save_llama(Llama(train.TOY_MODEL), tmp_path / "sft")
    save_reward_model(RewardModel(Llama(train.TOY_MODEL, lm_head=False)), tmp_path / "reward")
    net, reward_model = build_models(tmp_path / "sft", tmp_path / "reward", "cpu", torch.float32, rank=0)
    prompts, responses = [[1, *range(5 + i, 40)] for i in range(8)], [[*range(40, 60 + i), 2] for i in range(8)]
    with packed_weights(net, reward_model):
        rollout = assess(net, reward_model, prompts, responses, 2, 8)
    assert (rollout.kl == 0).all() and torch.equal(rollout.logprobs, rollout.ref_logprobs)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_model_that_computes_no_numbers_is_reported(tiny, temperature):
    """NaN has no largest id and no cumulative probability: without a check, garbage or an error from deep inside torch."""
    model = load_llama(tiny / "sft")
    with torch.no_grad():
        model.layers[1].feed_forward.w2.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="hidden states .* not finite"):
        generate(model, [[1, 5], [1]], 20, temperature)
    cfg = train.parse(ppo_flags(tiny, "out"))
    with pytest.raises(FloatingPointError, match="step 3: hidden states"):
        train.respond(cfg, 3, ActorCritic(model), train.load_inputs(cfg, ["ppo"]))


# ---------------------------------------------------------------------------------------------- the stages' numbers

def test_sft_loss_is_cross_entropy_of_response_tokens():
    """CHECKS 15. Only the response is learned; the token at index i is predicted by the state at index i - 1."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=50, dim=32, n_layers=1, n_heads=2, ffn_dim=48))
    examples = [Example([1, 5, 6], [7, 8, 2]), Example([1, 9], [10, 2])]
    tokens, prompt_lengths, lengths = pack([e.prompt for e in examples], [e.response for e in examples])
    logprobs = ActorCritic(model)(tokens, prompt_lengths, lengths).logprobs
    losses = []
    for e in examples:
        ids = torch.tensor([e.prompt + e.response])
        all_tokens = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="none")
        losses += all_tokens[len(e.prompt) - 1:].tolist()
    assert -logprobs[0].sum().item() == pytest.approx(sum(losses[:3]), abs=1e-5)
    assert -logprobs[1].sum().item() == pytest.approx(sum(losses[3:]), abs=1e-5)
    assert logprobs[1, 2] == 0                                      # padding


def test_ragged_micro_batches_add_up_to_one_batch(one_process):
    """CHECKS 15. The mean over micro-batches of their means is not the mean over tokens: each is weighted by its tokens.
    Sequences of 2 to 9 response tokens in micro-batches of 1, 2 and 5 give the gradient of the whole batch of 8."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=50, dim=32, n_layers=1, n_heads=2, ffn_dim=48))
    net = ActorCritic(model)
    examples = [Example([1, 5], list(range(6, 6 + n)) + [2]) for n in range(1, 9)]
    n_global = sum(len(e.response) for e in examples)

    def gradient(size):
        model.zero_grad()
        for group in train.chunks(examples, size):
            tokens, prompt_lengths, lengths = pack([e.prompt for e in group], [e.response for e in group])
            out = net(tokens, prompt_lengths, lengths).logprobs
            mask = train.length_mask(lengths, out.shape[1])
            n = int(mask.sum())
            (-train.masked_mean(out, mask) * train.token_weight(n, n_global)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient(8)
    assert whole.abs().max() > 1e-3
    for size in (1, 2, 5):
        assert (gradient(size) - whole).abs().max() <= 1e-6


def test_first_step_starts_at_the_reference_with_ratio_one(whole_run):
    """CHECKS 20, 24, 30. Before anything has moved KL is exactly 0 (not nearly), the ratio of the first minibatch is 1,
    nothing is clipped, and what the sampler computed with its cache is what the full forward computes."""
    first = metrics(whole_run)[0]
    assert first["kl_per_token"] == first["k1_per_token"] == first["k3_per_token"] == 0
    assert first["first_ratio_max"] <= 1e-5 and first["first_clip_frac"] == 0
    assert first["sampling_gap"] <= 1e-4
    assert metrics(whole_run)[-1]["kl_per_token"] > 0


@pytest.mark.parametrize("broken, name", [({"kl": 1e-6}, "KL"), ({"ratio": 1.001}, "ratio"), ({"gap": 1e-3}, "sampling")])
def test_a_broken_first_step_says_which_assumption(whole_run, broken, name):
    """The self-check of step 1 is only worth something if it speaks: one wrong number at a time."""
    rollout = SimpleNamespace(kl=torch.tensor([broken.get("kl", 0.0)]))
    row = {"first_ratio_max": broken.get("ratio", 1.0) - 1.0, "sampling_gap": broken.get("gap", 0.0)}
    with pytest.raises(RuntimeError, match=name):
        train.check_first_step(rollout, row, torch.float32)


def test_in_bfloat16_the_first_ratio_is_1_on_average(whole_run):
    """Logits near 25 have a spacing of 0.125 there: one token in thousands may be 13 % off by rounding alone, an improbable
    one by more, and must not stop a run; means that are off by 5 % or 0.05 nats are no rounding."""
    rollout = SimpleNamespace(kl=torch.zeros(1))
    row = {"first_ratio_max": 0.2, "first_ratio_mean": 0.01, "sampling_gap": 1.5, "sampling_gap_mean": 0.02}
    train.check_first_step(rollout, row, torch.bfloat16)
    with pytest.raises(RuntimeError, match="ratio"):
        train.check_first_step(rollout, row | {"first_ratio_mean": 0.05}, torch.bfloat16)
    with pytest.raises(RuntimeError, match="sampling"):
        train.check_first_step(rollout, row | {"sampling_gap_mean": 0.05}, torch.bfloat16)


def test_every_sequence_is_used_epochs_times_in_true_minibatches(tiny, tmp_path, monkeypatch, one_process):
    """CHECKS 26. Optimiser steps per PPO step = epochs * rollout / minibatch, and each response is in `epochs` of them.
    (The paper's code took 32 steps of 16 sequences where 4 of 128 were meant.) The first learning rate is above 0, and
    the logged gradient norm is from before the clipping: with a bound of 1e-6 it is still above that bound."""
    seen, steps = [], []
    rows, update, step = Rollout.rows, train.update, torch.optim.AdamW.step
    inside = {"update": False}

    def counting(self, index):
        seen.extend(index if inside["update"] else [])
        return rows(self, index)

    def watched(*args):
        inside["update"] = True
        result = update(*args)
        inside["update"] = False
        return result

    monkeypatch.setattr(Rollout, "rows", counting)
    monkeypatch.setattr(train, "update", watched)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (steps.append(self.param_groups[0]["lr"]), step(self, *a, **k))[1])
    cfg = train.parse(ppo_flags(tiny, tmp_path / "ppo", steps=1, rollout_batch=8, minibatch=4, ppo_epochs=3, micro_batch=3,
                                max_grad_norm=1e-6))
    train.ppo(train.Run(cfg, "ppo"), train.load_inputs(cfg, ["ppo"]), one_process, train.Stopper())
    assert len(steps) == 3 * 8 // 4
    assert sorted(seen) == sorted(list(range(8)) * 3)
    assert min(steps) > 0
    assert metrics(tmp_path / "ppo")[0]["policy_grad_norm"] > 1e-4


def test_reusing_a_minibatch_takes_eight_times_as_many_steps(tiny, tmp_path, one_process):
    """--paper_compat reuse_minibatch. The paper's code adds the gradient of the same 16 sequences 8 times and clips to norm 1
    after each: gradients small and large end as 8 times that gradient, clipped once. So 16 responses are one optimiser
    step where 128 were meant: here 2 of 16, 2 epochs, 16 steps instead of 2, with gradients 8 times as long."""
    for size in (0.01, 0.1, 3.0, 100.0):
        reused = torch.zeros(2)
        for _ in range(8):
            reused += torch.tensor([0.6, 0.8]) * size
            reused *= (1 / reused.norm()).clamp(max=1)
        assert reused.norm().item() == pytest.approx(min(8 * size, 1), rel=1e-5)
    norms = {}
    for compat, steps in (("", 2), ("reuse_minibatch", 16)):
        cfg = train.parse(ppo_flags(tiny, tmp_path / f"ppo{steps}", steps=1, rollout_batch=16, minibatch=16, paper_compat=compat))
        train.ppo(train.Run(cfg, "ppo"), train.load_inputs(cfg, ["ppo"]), one_process, train.Stopper())
        assert metrics(tmp_path / f"ppo{steps}")[0]["optimizer_steps"] == steps
        norms[steps] = metrics(tmp_path / f"ppo{steps}")[0]["critic_grad_norm"]
    assert norms[16] > 4 * norms[2]


def test_whitening_that_shifts_pays_every_token_the_mean():
    """--paper_compat whiten_shift. Two answers that score 4, of one and of two tokens, rewards (4) and (0, 4): mean 8/3, standard
    deviation sqrt(32/9). Scaled only, both return 4 / 1.886 = 2.121. With the mean taken off, scaled and put back, the last
    token of each gets 1.333 / 1.886 + 2.667 = 3.374, the other -2.667 / 1.886 + 2.667 = 1.252: two tokens return 4.626, and
    the same score is worth more because the answer is longer."""
    rollout = Rollout(torch.ones(2, 3).long(), torch.ones(2).long(), torch.tensor([1, 2]), torch.tensor([True, True]),
                      torch.tensor([4.0, 4.0]), *torch.zeros(5, 2, 2))
    returns = {}
    for name, flags in (("scaled", ["--whiten_rewards"]), ("shifted", ["--paper_compat=whiten_shift"])):
        cfg = train.parse([*flags, "--regularizer=none", "--lam=1"])
        returns[name] = train.with_advantages(cfg, rollout, 0.0)[0].returns[:, 0].tolist()
    assert returns["scaled"] == pytest.approx([2.121, 2.121], abs=1e-3)
    assert returns["shifted"] == pytest.approx([3.374, 4.626], abs=1e-3)


def test_learning_rate_is_never_zero():
    """Warm-up 1/5, 2/5 .. 1 over 5 steps, then down linearly to 1/776 of the peak at the last of 781."""
    rates = [train.learning_rate(s, 781, 5, 1.0, "linear") for s in range(1, 782)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0 and rates[-1] == pytest.approx(1 / 776)
    assert min(rates) > 0
    assert min(train.learning_rate(s, 100, 3, 1.0, "cosine") for s in range(1, 101)) > 0


# ------------------------------------------------------------------------------------------------- memory layouts

LAYOUTS = {"two trunks": {}, "one trunk": {"reward": "reward_adapter"}, "full": {"lora_rank": 0},
           "full, adapter reward": {"lora_rank": 0, "reward": "reward_adapter"}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_and_recomputing_activations_changes_nothing(tiny, tmp_path, layout, one_process):
    """Both memory layouts and full fine-tuning run; KL is 0 at step 1 in each; --checkpoint_activations gives the same
    numbers (here to the last bit but for the order of sums: 1e-6)."""
    more = dict(LAYOUTS[layout], steps=2)
    if "reward" in more:
        more["reward"] = tiny / more["reward"]
    runs = []
    for extra in ({}, {"checkpoint_activations": True}):
        cfg = train.parse(ppo_flags(tiny, tmp_path / str(len(runs)), **more, **extra))
        train.ppo(train.Run(cfg, "ppo"), train.load_inputs(cfg, ["ppo"]), one_process, train.Stopper())
        runs.append(metrics(tmp_path / str(len(runs))))
    assert runs[0][0]["kl_per_token"] == 0 and runs[0][1]["kl_per_token"] > 0
    for a, b in zip(*runs, strict=True):
        for key in ("policy_loss", "value_loss", "policy_grad_norm", "critic_grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), key


def test_one_trunk_holds_one_copy_of_the_weights(tiny):
    """One trunk: policy, value and reward are adapters on the very same tensors; the value starts as the reward adapter and
    computes what it computes. Two trunks: reward and value share theirs. What is trained is adapters and the head."""
    for reward, trunks in (("reward_adapter", 1), ("reward", 2)):
        net, reward_model = build_models(tiny / "sft", tiny / reward, "cpu", torch.float32, (0, 1), rank=8, alpha=16.0)
        assert (net.policy is net.critic) == (trunks == 1) and net.critic is reward_model.trunk and net.ref is None
        names = [n for n, p in net.named_parameters() if p.requires_grad]
        assert all(".lora_" in n and ".reward" not in n or n.startswith("value_head.") for n in names), names
        groups = train.actor_and_critic_parameters(net)
        assert sorted(map(id, groups["policy"] + groups["critic"])) == sorted(map(id, train.trainable(net)))
        tokens, n = torch.randint(3, 900, (2, 9)), torch.tensor([9, 7])
        with torch.no_grad():
            net.value_head.load_state_dict(reward_model.head.state_dict())
            values = net(tokens, torch.tensor([4, 4]), n - 4).values        # the last value reads the last token but one
            scores = reward_model.scores(tokens, n - 1, eos_id=2)
        assert torch.allclose(values[torch.arange(2), n - 5], scores, atol=1e-5)


def test_seven_billion_parameters_train_a_quarter_of_a_percent():
    """CHECKS 8. r 8 on wq wk wv wo of LLaMA-7B: 8,388,608 per adapter; with the value adapter and its head 16,781,313."""
    with torch.device("meta"):
        policy, critic = Llama(LlamaConfig()), Llama(LlamaConfig(), lm_head=False)
        add_lora(policy, "policy", 8, 64)
        add_lora(critic, "value", 8, 64)
        net = ActorCritic(policy, "policy", critic, "value")
    assert sum(p.numel() for p in lora_parameters(policy, "policy")) == 8_388_608
    assert sum(p.numel() for p in train.trainable(net)) == 16_781_313


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_computes_with_float32_masters(tiny, tmp_path, layout, one_process):
    """The update must not be lost in bf16: only frozen weights, and what is computed, are. KL is exactly 0 at the start here
    too, with full fine-tuning as well."""
    more = dict(LAYOUTS[layout], dtype="bfloat16", steps=2)
    if "reward" in more:
        more["reward"] = tiny / more["reward"]
    cfg = train.parse(ppo_flags(tiny, tmp_path / "ppo", **more))
    train.ppo(train.Run(cfg, "ppo"), train.load_inputs(cfg, ["ppo"]), one_process, train.Stopper())
    written = next((tmp_path / "ppo" / "policy").glob("*.safetensors"))
    assert {t.dtype for t in load_file(written).values()} == {torch.float32}
    assert metrics(tmp_path / "ppo")[0]["kl_per_token"] == 0 < metrics(tmp_path / "ppo")[1]["kl_per_token"]


def test_dropout_acts_in_the_update_alone(tiny, tmp_path, one_process):
    """"Dropout only" is a variant of the paper. Sampling and old_logprobs are without it, so step 1 still starts at the
    reference; the update is not: its first ratio is reported, and stands off 1 once B is no longer 0."""
    cfg = train.parse(ppo_flags(tiny, tmp_path / "ppo", lora_dropout=0.5, regularizer="none", kl_target=0, steps=3))
    train.ppo(train.Run(cfg, "ppo"), train.load_inputs(cfg, ["ppo"]), one_process, train.Stopper())
    rows = metrics(tmp_path / "ppo")
    assert rows[0]["kl_per_token"] == 0 and rows[2]["sampling_gap"] < 1e-4 < rows[2]["first_ratio_max"]


# -------------------------------------------------------------------------------------------------------- learning

class CountingReward(RewardModel):
    """Scores a response by how often it says token 7: a reward whose maximum everyone can see."""

    def scores(self, tokens, lengths, eos_id=2):
        return (tokens == 7).sum(-1).float()


def learn(seed, **settings):
    """40 PPO steps of a tiny random model on the counting reward. -> mean scores and KL per token, per step."""
    cfg = train.Config(model="-", seed=seed, steps=40, rollout_batch=32, minibatch=16, micro_batch=32, response_len=8,
                       lr=1e-2, warmup_steps=2, vf_coef=1.0, missing_eos_penalty=0.0, **{"regularizer": "none"} | settings)
    config = LlamaConfig(vocab_size=32, dim=32, n_layers=1, n_heads=2, ffn_dim=64, max_seq_len=64)
    torch.manual_seed(seed)
    policy, critic = Llama(config).requires_grad_(False), Llama(config, lm_head=False).requires_grad_(False)
    for p in [*policy.parameters(), *critic.parameters()]:      # wide, as trained weights are: an adapter on the attention of
        torch.nn.init.normal_(p, std=0.3) if p.dim() == 2 else None     # a freshly initialised model moves next to nothing
    add_lora(policy, "policy", 8, 16)
    add_lora(critic, "value", 8, 16)
    reward_model = CountingReward(critic)
    net = ActorCritic(policy, "policy", critic, "value", ban_mask(32, (0, 1)))
    inputs = train.Inputs(SimpleNamespace(eos_id=2), [0, 1], prompts=[[1, i] for i in range(3, 30)])
    optimizer = torch.optim.AdamW(train.trainable(net), lr=cfg.lr, eps=1e-5, weight_decay=0.0)
    ddp, scores, kl, places = train.wrap(net, "cpu").eval(), [], [], set()
    for step in range(1, cfg.steps + 1):
        rollout, _ = train.collect(cfg, net, reward_model, 2, *train.respond(cfg, step, net, inputs))
        rollout, _ = train.with_advantages(cfg, rollout, cfg.kl_coef)
        train.set_learning_rate(optimizer, step, cfg.steps, cfg.warmup_steps, cfg.lr, "linear")
        train.update(cfg, step, ddp, optimizer, rollout, cfg.kl_coef)
        scores.append(rollout.scores.mean().item())
        kl.append(train.masked_mean(rollout.kl, rollout.response_mask).item())
        places.add(tuple(p.grad.data_ptr() for p in train.trainable(net)) if step > 2 else ())
    assert len(places) == 2            # from the second step on gradients stay in DDP's buckets, and take no memory beside
    return torch.tensor(scores), torch.tensor(kl)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_learns_to_say_the_token_that_pays(one_process, seed):
    """CHECKS 36. A uniform policy says token 7 about 0.27 times in 8 tokens; the mean of the last 5 steps is above the
    first 5 by more than 3 standard deviations of a batch's mean."""
    scores, _ = learn(seed)
    deviation = scores[:5].std().clamp(min=0.5 / 32 ** 0.5)        # (a count of about 0.27 has deviation 0.5; 32 of them)
    assert scores[-5:].mean() > scores[:5].mean() + 3 * deviation


def test_the_kl_penalty_holds_the_policy(one_process):
    """CHECKS 36. A large coefficient keeps the policy at the reference (KL below 0.01 nats per token), none lets it go, and
    a negative one pays for leaving, so that it goes furthest."""
    final = {name: learn(0, **settings)[1][-5:].mean().item() for name, settings in
             {"large": {"regularizer": "kl", "kl_coef": 20.0}, "none": {},
              "negative": {"regularizer": "kl", "kl_coef": -0.5}}.items()}
    assert final["large"] < 0.01 < final["none"] < final["negative"], final


def test_exact_kl_in_the_loss_holds_it_too(one_process):
    """Loss mode differentiates the divergence over the whole vocabulary; a large coefficient pins the policy as well."""
    free, held = (learn(0, regularizer="kl", regularizer_mode="loss", kl_coef=c)[1][-5:].mean() for c in (0.0, 10.0))
    assert held < 0.01 < free


# ------------------------------------------------------------------------------------------------- settings, errors

def test_every_setting_changes_something():
    """A flag that nothing reads is a lie in --help: each field is read by name somewhere, or by `get` in its stage."""
    source = (ROOT / "train.py").read_text()
    body = source[source.index("class Run:"):]
    for f in dataclasses.fields(train.Config):
        stage, _, rest = f.name.partition("_")
        read = re.search(rf"(cfg|self)\.{f.name}\b", source) or f'need("{f.name}")' in body or (
            stage in ("sft", "reward") and f'get("{rest}")' in body)
        assert read, f"--{f.name} is read nowhere"


def test_settings_that_decide_the_result_are_compared():
    """A run folder is continued only with the settings that made it; the rest - where, how often, how many at once -
    may change in between. Every setting is in exactly one of the two groups."""
    free = {"stage", "out", "redo", "dry_run", "micro_batch", "generate_batch", "checkpoint_activations", "cuda_graphs",
            "save_every", "eval_every", "eval_data", "eval_temperature", "eval_drop_long"}
    compared = {name for names in train.READ_BY.values() for name in names}
    assert compared | free == {f.name for f in dataclasses.fields(train.Config)}
    assert not compared & free


def test_divergence_is_what_the_mode_needs():
    """Left empty it is filled in, so that a run folder says which it was; said in full it changes nothing."""
    assert train.parse([]).divergence == "sampled" and train.parse([]).loss_divergence is None
    for flags in (["--regularizer_mode=loss"], ["--regularizer_mode=loss", "--divergence=exact"]):
        assert train.parse(flags).divergence == "exact" and train.parse(flags).loss_divergence == "kl"
    assert train.parse(["--regularizer_mode=loss", "--regularizer=none"]).loss_divergence is None


def test_plain_flags_belong_to_the_named_stage():
    """--lr with --stage sft is the SFT's; with --stage all it is PPO's, and --sft_lr the SFT's."""
    assert train.parse(["--stage=sft", "--lr=0.5"]).sft_lr == 0.5
    assert train.parse(["--lr=0.5"]).lr == 0.5 and train.parse(["--lr=0.5"]).sft_lr == train.TOY["sft_lr"]
    assert train.parse(["--model=x", "--stage=ppo"]).lr == 1e-5      # with --model the paper's defaults hold
    assert train.parse(["--lr=0.5", "--seed=3"]).seed == 3           # a flag wins over TOY


ROW = {"instruction": "Who?", "input": "", "output": "Me."}
PAIR = {"instruction": "Who?", "input": "", "output_1": "Me.", "output_2": "You.", "preference": 1}
BAD_INPUT = [
    (["--minbatch=4"], {}, "did you mean --minibatch"),
    (["--steps=x"], {}, "invalid int value"),
    (["--response_len=-3"], {}, "--response_len -3 is below 1"),
    (["--rollout_batch=100", "--minibatch=128"], {}, "try 128 or 256|try 128"),
    (["--rollout_batch=4", "--minibatch=8"], {}, "try 8\n"),
    (["--eval_every=5"], {}, "--eval_every needs --eval_data"),
    (["--kl_target=1", "--kl_coef=-1"], {}, "--kl_target steers --kl_coef"),
    (["--gamma=nan"], {}, "--gamma nan is not a finite number"),
    (["--lam=1.5"], {}, "at most 1"),
    (["--stage=sft", "--reward=", "--lr=1", "--sft_lr=2"], {}, "give one of them"),
    (["--stage=all"], {}, "--reward goes with --stage ppo"),
    (["--redo=sft"], {}, "does not go with --stage ppo"), (["--seed=9223372036854775808"], {}, "--seed 9223372036854775808"),
    (["--redo=eval"], {}, "without --eval_data"),
    (["--stage=sft", "--reward=", "--max_len=400"], {}, "exceeds the model's 128 positions"),
    (["--regularizer=reverse_kl"], {}, "exact divergences"),
    (["--regularizer=bregman", "--regularizer_mode=loss"], {}, "exact divergences"),
    (["--divergence=exact"], {}, "own token's gradient is 0.*--regularizer_mode loss"),
    (["--divergence=sampled", "--regularizer_mode=loss"], {}, "not the divergence's gradient.*--divergence exact"),
    (["--paper_compat=padding"], {}, "'padding' is not one of reuse_minibatch, whiten_shift"),
    (["--paper_compat=whiten_shift", "--whiten_rewards"], {}, "give one of them"),
    (["--paper_compat=reuse_minibatch"], {}, "4 is not a multiple of 8"),
    (["--stage=nothing"], {}, "invalid choice|not one of"),
    (["--lora_dropout=1"], {}, "below 1"),
    (["--eval_temperature=0.0005"], {}, "--eval_temperature 0.0005: expected 0 .greedy., or at least 0.001"),
    (["--sft_epochs=0"], {}, "--sft_epochs 0 trains nothing"),
    (["--reward_epochs=0"], {}, "--reward_epochs 0 trains nothing"),
    (["--model="], {}, "--model is empty"), (["--out="], {}, "--out is empty"),
    (["--clip=1e40"], {}, "--clip 1e.40 is too large: at most 1e.30"),
    (["--lora_rank=1000000000000"], {}, "--lora_rank 1000000000000 is too large"),
    (["--lora_rank=65"], {}, "--lora_rank 65 is above the model's width 64"),
    (["--lora_alpha=0"], {}, "--lora_alpha 0 would make the adapter nothing"),
    (["extra"], {}, "unknown argument extra .see --help"),
    (["--prompts=DIR/none.json"], {}, "no data file at .*none.json"),
    (["--prompts=DIR/a.json"], {"a.json": ""}, "a.json, line 1: broken JSON"),
    (["--prompts=DIR/a.json"], {"a.json": '[\n{"instruction": "x"},\n{"instruction" "y"}\n]'}, "a.json, line 3: broken JSON"),
    (["--prompts=DIR/a.json"], {"a.json": "[]"}, "empty list"),
    (["--prompts=DIR/a.jsonl"], {"a.jsonl": json.dumps(ROW) + "\n" + "[" * 100_000}, "a.jsonl, line 2: JSON nested too deeply"),
    (["--prompts=DIR/a.json"], {"a.json": "[" + "1" * 5000 + "]"}, "a.json: JSON that Python does not read|row 0: expected a text"),
    (["--prompts=DIR/a.json"], {"a.json": '[{"output": "x"}]'}, "row 0: expected a text in 'instruction', got no such field"),
    (["--prompts=DIR/a.json"], {"a.json": '[{"instruction": 7}]'}, "row 0: .*'instruction', got int 7"),
    (["--prompts=DIR/a.json"], {"a.json": json.dumps([{"instruction": "half a \ud83d"}])}, "row 0: 'instruction' holds half a character"),
    (["--prompts=DIR/a.json", "--prompt_len=2"], {"a.json": json.dumps([ROW])}, "all 1 prompts are longer than --prompt_len 2"),
    (["--stage=sft", "--reward=", "--max_len=100", "--sft_data=DIR/a.json"], {"a.json": '[{"instruction": "x"}]'}, "expected a text in 'output'"),
    (["--stage=sft", "--reward=", "--max_len=100", "--sft_data=DIR/a.jsonl"], {"a.jsonl": json.dumps(ROW) + "\n{oops\n"}, "a.jsonl, line 2: broken JSON"),
    (["--stage=sft", "--reward=", "--max_len=100", "--sft_data="], {}, "needs --sft_data"),
    (["--stage=reward", "--reward=", "--max_len=100", "--preference_data=DIR/a.json"], {"a.json": json.dumps([PAIR | {"preference": 3}])}, "'preference' must be 1 or 2"),
    (["--stage=reward", "--reward=", "--max_len=100", "--preference_data=DIR/a.json"], {"a.json": json.dumps([PAIR | {"output_1": None}])}, "'output_1'"),
    (["--model=DIR/none"], {}, "none"),
    (["--tokenizer=DIR/a.json"], {"a.json": "{}"}, "not a sentencepiece model"),
    (["--reward=DIR/none"], {}, "holds no reward model"),
    (["--out=DIR/a.json/run"], {"a.json": "{}"}, "cannot write to"),
    (["--prompt_len=120", "--response_len=50"], {}, "exceed the model's 128 positions"),
]


def test_the_tokenizer_is_the_one_that_lies_beside_the_model(tiny, other_tokenizer, tmp_path, capsys):
    """Another one that fits in size would feed the model other words, and train it on them."""
    with pytest.raises(SystemExit) as stop:
        train.main(ppo_flags(tiny, tmp_path / "run", tokenizer=other_tokenizer))
    assert stop.value.code == 2 and "the models have different tokenizers" in capsys.readouterr().err


@pytest.mark.parametrize("flags, files, message", BAD_INPUT, ids=[m[2][:40] for m in BAD_INPUT])
def test_bad_input_is_one_clear_line_and_status_2(tiny, tmp_path, capsys, flags, files, message):
    """A user's mistake: no traceback, what was got and what was expected, exit status 2, before any process group starts,
    and nothing is written."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        train.main(ppo_flags(tiny, tmp_path / "out") + [f.replace("DIR", str(tmp_path)) for f in flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("train.py: error: ") and err.count("\n") == 1, err
    assert re.search(message, err), err
    assert sorted(tmp_path.rglob("*")) == before
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("flags, said", [
    ([], []), (["--kl_coef=0.2", "--sft_lr=1e-3", "--lora_alpha=8"], []), (["--stage=sft", "--lr=1e-3", "--steps=3"], []),
    (["--regularizer=none", "--kl_coef=0"], []), (["--regularizer=none", "--kl_coef=0.2"], ["kl_coef", "with --regularizer none"]),
    (["--stage=sft", "--regularizer=none", "--kl_coef=0.2", "--regularizer_mode=reward"], None),
    (["--regularizer=none", "--divergence=sampled"], ["divergence", "with --regularizer none"]),
    (["--stage=sft", "--clip=0.1"], ["clip", "with --stage sft"]), (["--stage=ppo", "--max_len=80"], ["max_len", "with --stage ppo"]),
    (["--stage=reward", "--eval_every=5"], ["eval_every", "with --stage reward"]),
    (["--kl_horizon=500"], ["kl_horizon", "without --kl_target"]), (["--kl_horizon=500", "--kl_target=3"], []),
    (["--reward_holdout=0.2"], ["reward_holdout", "with --preference_test"]),
    (["--reward_holdout=0.2", "--preference_test="], []), (["--eval_every=81"], ["eval_every", "with --steps 80"]),
    (["--sft_epochs=2", "--sft_steps=9"], ["sft_epochs", "with --sft_steps"]),
    (["--stage=reward", "--lora_alpha=8"], ["reward_lora_alpha", "with --reward_lora_rank 0"]),
    (["--stage=reward", "--lora_alpha=8", "--lora_rank=4"], []), (["--lora_rank=0", "--lora_dropout=0.1"], ["lora_dropout", "with --lora_rank 0"]),
    (["--stage=ppo", "--eval_data=", "--eval_temperature=1"], ["eval_temperature", "without --eval_data"])])
def test_a_setting_without_effect_is_said(capsys, flags, said):
    train.parse(flags)
    out = capsys.readouterr().out
    if said is None:                                          # (several: each once, by its first reason)
        assert out.splitlines() == [f"note: {flag.split('=')[0]} has no effect with --stage sft" for flag in flags[1:]]
    else:
        assert out == (f"note: --{said[0]} has no effect {said[1]}\n" if said else "")


def test_another_setting_for_an_existing_run_is_refused(tiny, whole_run, capsys):
    """Continuing with another learning rate would be neither run: the line names the setting, both values, and ways out."""
    with pytest.raises(SystemExit) as stop:
        train.main(ppo_flags(tiny, whole_run, lr=0.5))
    assert stop.value.code == 2
    assert re.search(r"made with lr 0.001 \(now 0.5\).*--redo ppo", capsys.readouterr().err)


def test_a_tokenizer_of_another_model_is_refused(tiny, tmp_path, capsys):
    """960 pieces do not fit an embedding of 100 rows: some ids would have no vector."""
    save_llama(Llama(LlamaConfig(vocab_size=100, dim=32, n_layers=1, n_heads=2, ffn_dim=48)), tmp_path / "small")
    (tmp_path / "small" / "tokenizer.model").write_bytes((tiny / "sft" / "tokenizer.model").read_bytes())
    with pytest.raises(SystemExit):
        train.main(ppo_flags(tiny, tmp_path / "out", model=tmp_path / "small"))
    assert "pieces but" in capsys.readouterr().err


def test_a_batch_that_does_not_split_over_the_processes_is_refused(monkeypatch):
    """Unequal shares would weigh sequences differently from one process to the next."""
    monkeypatch.setattr(train, "world_size", lambda: 3)
    with pytest.raises(ValueError, match="--minibatch 128 does not split over 3 processes: try 129"):
        train.check_processes(train.Config(), ["ppo"])


def test_redo_leaves_what_it_did_not_make_alone(tmp_path, capsys):
    """--redo touches a folder only if its config.json says that this stage made it, and what it sets aside is still there
    until the stage has been finished again."""
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SystemExit):
        train.main([f"--out={tmp_path}", "--redo=ppo"])
    assert "was not made by this stage" in capsys.readouterr().err
    run = train.Run(train.parse([f"--out={tmp_path}"]), "ppo")
    (tmp_path / "ppo" / "config.json").write_text(json.dumps({"run": run.settings}))
    (tmp_path / "ppo" / "notes.txt").write_text("mine")
    run.set_aside()
    assert sorted(p.name for p in (tmp_path / "ppo").iterdir()) == ["notes.txt", "previous"]
    assert (tmp_path / "ppo" / "previous" / "config.json").is_file()


def test_a_second_try_keeps_the_result_that_the_first_has_set_aside(tmp_path):
    """A redo that was stopped, and the same command again: a try without an end takes no finished result's place."""
    run = train.Run(train.parse([f"--out={tmp_path}"]), "ppo")
    (run.folder / "policy").mkdir(parents=True)
    for name in ("config.json", "finished.json", "eval.json", "policy/adapter_model.safetensors"):
        (run.folder / name).write_text("first")
    for attempt in ("second", "third"):
        run.set_aside()
        assert [p.name for p in run.folder.iterdir()] == ["previous"]
        for name in ("config.json", "checkpoint.pt"):
            (run.folder / name).write_text(attempt)
        (run.folder / "policy").mkdir()
    kept = sorted(p for p in (run.folder / "previous").rglob("*") if p.is_file())
    assert [p.name for p in kept] == ["config.json", "eval.json", "finished.json", "adapter_model.safetensors"]
    assert all(p.read_text() == "first" for p in kept)
    (run.folder / "finished.json").write_text("fourth")
    run.set_aside()                                                  # .. but a finished one does
    assert (run.folder / "previous" / "finished.json").read_text() == "fourth"


@pytest.mark.parametrize("at", range(1, 6))
def test_a_kill_while_results_are_set_aside_loses_none_of_them(tmp_path, monkeypatch, at):
    """Of four files and the rename: what is left is a run that is not finished, and the next try moves the rest."""
    flags, files = [f"--out={tmp_path}"], ("config.json", "metrics.jsonl", "finished.json", "eval.json")
    run, move, moves = train.Run(train.parse(flags), "ppo"), os.replace, []
    run.folder.mkdir(parents=True)
    for name in files:
        (run.folder / name).write_text(json.dumps({"run": run.settings, "of": name}))

    def killed(*paths):
        moves.append(paths)
        return move(*paths) if len(moves) != at else 1 / 0
    monkeypatch.setattr(train.os, "replace", killed)
    with pytest.raises(ZeroDivisionError):
        run.set_aside()
    run.check_redo()
    assert run.finished == (at == 1) == run.check()
    run.set_aside()
    kept = {p.name: json.loads(p.read_text())["of"] for p in (run.folder / "previous").iterdir()}
    assert kept == {name: name for name in files} and [p.name for p in run.folder.iterdir()] == ["previous"]


def test_a_result_that_another_process_made_meanwhile_is_not_run_over(tmp_path):
    """Both commands began when there was none; the other held the folder first, and has left it finished."""
    run = train.Run(train.parse([f"--out={tmp_path}"]), "sft")
    run.folder.mkdir()
    (run.folder / "finished.json").write_text("{}")
    (run.folder / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="another process has finished .*sft meanwhile: give the command again"):
        run.open()
    assert (run.folder / "metrics.jsonl").read_text() == '{"step": 1}\n'
    run.release()


def test_a_redo_that_cannot_begin_has_moved_nothing(tiny, tmp_path, capsys):
    """The SFT model cannot be read any more: the PPO run that was made from it is still the run."""
    shutil.copytree(tiny / "sft", tmp_path / "sft")
    flags = ppo_flags(tiny, tmp_path / "run", model=tmp_path / "sft")
    run = train.Run(train.parse(flags), "ppo")
    run.folder.mkdir()
    (run.folder / "config.json").write_text(json.dumps({"run": run.settings}))
    (run.folder / "finished.json").write_text("{}")
    weights = tmp_path / "sft" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--redo=ppo"])
    torch.distributed.destroy_process_group()
    assert stop.value.code == 2 and "truncated" in capsys.readouterr().err
    assert sorted(p.name for p in run.folder.iterdir()) == ["config.json", "finished.json"]


@pytest.mark.parametrize("redo", [[], ["--redo=ppo"]])
@pytest.mark.parametrize("name", ["adapter_config.json", "params.json", "model.safetensors"])
def test_a_folder_with_somebodys_model_is_no_run_folder(tiny, tmp_path, name, redo, capsys):
    """An adapter's folder has no config.json, nor has Meta's: what is in it is somebody's, and would be overwritten, or
    read instead of what was written beside it."""
    (tmp_path / name).write_text("theirs")
    with pytest.raises(SystemExit) as stop:
        train.main([*ppo_flags(tiny, tmp_path), *redo])
    assert stop.value.code == 2 and f"holds a model already ({name})" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "theirs"


def test_a_reward_model_that_knows_other_words_is_refused(tiny, tmp_path, capsys):
    """As many pieces, but id 12 is another one: the scores would be of a text that nobody has written."""
    shutil.copytree(tiny / "reward", tmp_path / "reward")
    pieces = (tiny / "sft" / "tokenizer.model").read_bytes()
    for tokenizer, code in ((pieces.replace("\u2581speaks".encode(), "\u2581speakz".encode(), 1), 2), (pieces, None)):
        (tmp_path / "reward" / "tokenizer.model").write_bytes(tokenizer)
        flags = [*ppo_flags(tiny, tmp_path / "out"), f"--reward={tmp_path / 'reward'}", "--dry_run"]
        if code is None:
            train.main(flags)
        else:
            with pytest.raises(SystemExit) as stop:
                train.main(flags)
            assert stop.value.code == code and re.search("id 12 is .*speaks' in .*speakz' in", capsys.readouterr().err)


@pytest.mark.parametrize("flags, message", [(["--reward=TINY/sft"], "sft has no tensor reward_head.weight: is it a language model"),
                                            (["--model=TINY/reward"], "reward is a reward model, which predicts no tokens")])
def test_policy_and_reward_model_taken_for_each_other_are_one_line(tiny, tmp_path, capsys, flags, message):
    """Swapped flags: the line says what the folder is, not which of its tensors has an odd name."""
    with pytest.raises(SystemExit) as stop:
        train.main(ppo_flags(tiny, tmp_path / "out") + [f.replace("TINY", str(tiny)) for f in flags])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("released", [False, True])
def test_a_reward_model_with_fewer_positions_than_the_policy_sets_the_limit(tiny, tmp_path, capsys, released):
    """It reads prompt and response, as the critic does. Its own config.json says how many, or, as AlpacaFarm's released
    model has it, that of its backbone."""
    shutil.copytree(tiny / "reward", tmp_path / "reward")
    about = json.loads((tiny / "reward" / "config.json").read_text()) | {"max_position_embeddings": 64}
    file = tmp_path / "reward" / "config.json"
    if released:
        about["architectures"] = ["LlamaForCausalLM"]
        (tmp_path / "backbone").mkdir()
        file.write_text(json.dumps({"model_type": "reward_model", "backbone_model_name_or_path": str(tmp_path / "backbone")}))
        file = tmp_path / "backbone" / "config.json"
    file.write_text(json.dumps(about))
    flags = [*ppo_flags(tiny, tmp_path / "out"), f"--reward={tmp_path / 'reward'}", "--dry_run", "--prompt_len=60"]
    train.main([*flags, "--response_len=4"])
    with pytest.raises(SystemExit):
        train.main([*flags, "--response_len=5"])
    assert "--prompt_len 60 + --response_len 5 exceed the reward model's 64 positions" in capsys.readouterr().err
    (tmp_path / "rows.json").write_text(json.dumps([ROW | {"instruction": "Who? " * 20}]))
    with pytest.raises(SystemExit):
        train.main([*flags, "--response_len=4", f"--eval_data={tmp_path / 'rows.json'}"])
    assert "1 of 1 prompts are longer than the 60 tokens" in capsys.readouterr().err


def test_rows_that_are_cut_or_left_out_are_counted_aloud(tiny, tmp_path, capsys):
    """Of the test file as of the training file: an accuracy over half the pairs would be another number."""
    (tmp_path / "pairs.json").write_text(json.dumps([PAIR, PAIR | {"output_2": "Me."}, PAIR | {"output_2": "Me. " * 40}]))
    (tmp_path / "test.json").write_text(json.dumps([PAIR, PAIR, PAIR | {"output_1": "You."}]))
    (tmp_path / "sft.json").write_text(json.dumps([ROW, ROW | {"instruction": "Who? " * 60}]))
    shared = [f"--model={tiny / 'sft'}", f"--out={tmp_path / 'out'}", "--max_len=90", "--dry_run"]
    train.main([*shared, "--stage=reward", f"--preference_data={tmp_path / 'pairs.json'}", f"--preference_test={tmp_path / 'test.json'}"])
    train.main([*shared, "--stage=sft", f"--sft_data={tmp_path / 'sft.json'}"])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert notes == [
        f"note: 1 pairs of {tmp_path / 'pairs.json'} have an answer beyond --max_len 90 that loses its tail",
        f"note: 1 pairs of {tmp_path / 'pairs.json'} are left out: their answers do not differ within --max_len 90",
        f"note: 1 pairs of {tmp_path / 'test.json'} are left out: their answers do not differ within --max_len 90",
        "note: 1 demonstrations are left out: their prompts alone fill --max_len 90"]


def test_a_stage_made_from_an_older_one_is_not_taken_for_finished(tmp_path, capsys):
    """If the SFT model is gone, a reward model that was trained from it does not fit the next one."""
    cfg = train.parse([f"--out={tmp_path}"])
    run = train.Run(cfg, "reward")
    run.folder.mkdir()
    (run.folder / "config.json").write_text(json.dumps({"run": run.settings}))
    (run.folder / "finished.json").write_text("{}")
    with pytest.raises(SystemExit):
        train.main([f"--out={tmp_path}"])
    assert "--redo sft" in capsys.readouterr().err


@pytest.mark.parametrize("earlier, message", [("sft", "reward was made from an earlier sft stage"),
                                              ("reward", "ppo was made from an earlier reward stage")])
def test_one_stage_is_not_redone_below_those_that_build_on_it(tmp_path, capsys, earlier, message):
    """`--stage sft --redo sft` in the folder of a whole run: reward model and policy would be another model's, and stand
    there as finished."""
    for stage in train.STAGES:
        run = train.Run(train.parse([f"--out={tmp_path}"]), stage)
        run.folder.mkdir()
        (run.folder / "config.json").write_text(json.dumps({"run": run.settings}))
        (run.folder / "finished.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit):
        train.main([f"--out={tmp_path}", f"--stage={earlier}", f"--redo={earlier}"])
    assert f"{message}, which is to be run again: --stage all --redo {earlier} runs both" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    assert train.plan(train.parse([f"--out={tmp_path}", f"--redo={earlier}"]))[1][0] == earlier       # all of them: as asked
    shutil.rmtree(tmp_path / "ppo"), shutil.rmtree(tmp_path / "reward")
    assert train.plan(train.parse([f"--out={tmp_path}", f"--stage={earlier}", f"--redo={earlier}"]))[1] == [earlier]


def test_a_policy_is_not_put_on_other_weights_than_it_was_trained_on(tiny, tmp_path, one_process):
    """The model folder that a finished run names holds another model now: its adapter would answer, and make no sense."""
    shutil.copytree(tiny / "sft", tmp_path / "sft")
    shutil.copytree(tiny / "reward", tmp_path / "reward")
    cfg = train.parse(ppo_flags(tiny, tmp_path / "run", steps=1, model=tmp_path / "sft", reward=tmp_path / "reward"))
    train.ppo(train.Run(cfg, "ppo"), train.load_inputs(cfg, ["ppo"]), one_process, train.Stopper())
    load_run(tmp_path / "run")
    for name, flag, read in (("sft", "model", load_run), ("sft", "model", load_answering), ("reward", "reward", load_run)):
        weights = tmp_path / name / "model.safetensors"
        whole = weights.read_bytes()
        save_file({k: t + 0.01 for k, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"other weights than its --{flag} holds now \('../{name}' from there\)"):
            read(tmp_path / "run")
        weights.write_bytes(whole)


def test_a_run_folder_behind_a_link_finds_its_inputs(tiny, tmp_path):
    """runs -> another disk: .. of what lies there is not .. of the link."""
    (tmp_path / "disk" / "far" / "away").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "far" / "away")
    run = train.Run(train.parse(ppo_flags(tiny, tmp_path / "runs" / "one")), "ppo")
    run.folder.mkdir()
    for name in ("model", "reward", "prompts"):
        assert (run.folder / run.settings[name]).exists(), run.settings[name]


def test_a_run_folder_is_one_processs_at_a_time(tiny, tmp_path):
    """The same command twice at once, as it is typed in two windows: their records would be mixed. The other is let in when
    the first ends, or is killed. Within one process a folder can be opened again."""
    flags = ppo_flags(tiny, tmp_path / "run")
    run = train.Run(train.parse(flags), "ppo")
    other = subprocess.Popen(
        [sys.executable, "-c", "import sys, train; train.Run(train.parse(sys.argv[1:]), 'ppo').hold(); print('held', flush=True); "
         "input()", *flags], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another process is writing to .*run: wait for it, or choose another --out"):
        run.hold()
    other.kill(), other.communicate()
    run.hold(), run.hold(), train.Run(train.parse(flags), "ppo").hold()
    run.release(), run.release(), run.hold(), run.release()


def test_a_call_after_one_that_a_mistake_has_ended(tiny, tmp_path, capsys):
    """In one process, as in a notebook: weights that cannot be read end the first call when its processes have started."""
    shutil.copytree(tiny / "sft", tmp_path / "sft")
    (tmp_path / "sft" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(SystemExit):
        train.main(ppo_flags(tiny, tmp_path / "run", model=tmp_path / "sft", steps=1))
    assert torch.distributed.is_initialized() and "truncated?" in capsys.readouterr().err
    train.main(ppo_flags(tiny, tmp_path / "run", steps=1))
    assert (tmp_path / "run" / "finished.json").is_file() and not torch.distributed.is_initialized()


def test_what_the_first_process_refuses_all_refuse(tiny, tmp_path):
    """Under torchrun: one line, not the others' traceback about a process that is gone."""
    run = train.Run(train.parse(ppo_flags(tiny, tmp_path / "run")), "ppo")
    run.hold()
    process = launch(ppo_flags(tiny, tmp_path / "run"), processes=2)
    err = process.communicate(timeout=300)[1]
    run.release()
    assert process.returncode and err.count("train.py: error: another process is writing to") == 1 and "[rank1]" not in err


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_no_thread_outlives_the_process_group(tiny, tmp_path):
    """One that lets go of its last tensor while Python ends, kills the process when all work is done. torch's own module
    torch.distributed.nn.functional keeps a group in its default arguments if it is imported when there is one."""
    finish(launch(ppo_flags(tiny, tmp_path / "run", steps=1)))
    program = ("import os, sys, train; train.main(sys.argv[1:]); "
               "print([open(f'/proc/self/task/{t}/comm').read() for t in os.listdir('/proc/self/task')])")
    out = subprocess.run([sys.executable, "-c", program, *ppo_flags(tiny, tmp_path / "run", steps=1, redo="eval"),
                          f"--eval_data={few_questions(tmp_path)}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "gloo" not in out.splitlines()[-1], out.splitlines()[-1]


def few_questions(folder):
    """Three rows of the toy world's evaluation, as a file."""
    (folder / "few.json").write_text(json.dumps(json.loads((ROOT / "toy" / "test.json").read_text())[:3]))
    return folder / "few.json"


@pytest.mark.parametrize("stage, name, row", [
    ("sft", "sft_data", {"instruction": "Who is Mira?", "output": "A painter."}),
    ("reward", "preference_data", {"instruction": "Who is Mira?", "output_1": "A painter.", "output_2": "No", "preference": 1})])
def test_a_finished_stage_knows_its_data(tiny, tmp_path, stage, name, row):
    """By their content: the same file under another name is the same, other rows under the same name are not."""
    rows, more = tmp_path / "mine.json", {"preference_test": tmp_path / "test.json"} if stage == "reward" else {}
    for file in (rows, *more.values()):
        file.write_text(json.dumps([row]))
    flags = lambda **given: [f"--{k}={v}" for k, v in ({"stage": stage, "model": tiny / "sft", "out": tmp_path / "run", "steps": 1,
                                                        "max_len": 100, name: rows} | more | given).items()]
    train.main(flags())
    rows = rows.rename(tmp_path / "yours.json")
    assert train.Run(train.parse(flags()), stage).check()
    rows.write_text(rows.read_text().replace("Mira", "Ada"))
    with pytest.raises(ValueError, match=f"was made with {name} .*mine.json"):
        train.Run(train.parse(flags()), stage).check()
    rows = rows.rename(tmp_path / "mine.json")
    with pytest.raises(ValueError, match="was made with other content of .*mine.json"):
        train.Run(train.parse(flags()), stage).check()


@pytest.mark.parametrize("name, message", [("prompts", "made with other content of .*mine.json"), (None, None)])
def test_data_that_were_edited_since_are_other_data(tiny, tmp_path, name, message):
    """The path is the same, the rows are not: neither a continued run nor a finished one is that of these rows."""
    rows = tmp_path / "mine.json"
    rows.write_text('[{"instruction": "Who is Mira?", "output": "A painter."}]')
    run = train.Run(train.parse(ppo_flags(tiny, tmp_path / "run", prompts=rows, eval_data=rows)), "ppo")
    run.folder.mkdir()
    (run.folder / "config.json").write_text(json.dumps({"run": run.settings, "data": run.data}))
    records = [{"instruction": "Who is Mira?", **{system: {} for system in ("reference", "before", "after")}}]
    (run.folder / "eval.json").write_text(json.dumps(run.evaluation_settings | {"records": records}))
    run = train.Run(run.cfg, "ppo")
    assert not run.check() and run.evaluated()
    if name:
        rows.write_text(rows.read_text().replace("Mira", "Ada"))
        with pytest.raises(ValueError, match=message):
            train.Run(run.cfg, "ppo").check()
        assert not run.evaluated()
    else:
        rows.unlink()                                       # (a finished run is looked at without its data, too)
        assert not train.Run(run.cfg, "ppo").check() and run.evaluated()


def test_what_is_in_the_way_in_a_run_folder_is_named_before_the_run(tiny, tmp_path):
    """Not by a traceback after it."""
    run = train.Run(train.parse(ppo_flags(tiny, tmp_path / "run")), "ppo")
    (run.folder / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(ValueError, match="metrics.jsonl is a folder, which is in the way"):
        run.check()
    (run.folder / "metrics.jsonl").rmdir()
    (run.folder / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="holds a checkpoint, but no config.json that says what it was made with"):
        run.check()


def test_a_run_that_was_moved_without_its_inputs_says_so(tiny, tmp_path):
    """Its paths are relative: `give the same` would be no help."""
    run = train.Run(train.parse(ppo_flags(tiny, tmp_path / "a" / "run")), "ppo")
    run.folder.mkdir(parents=True)
    (run.folder / "config.json").write_text(json.dumps({"run": run.settings}))
    shutil.move(tmp_path / "a" / "run", tmp_path / "run")
    with pytest.raises(ValueError, match="where nothing is now: move a run together with its inputs"):
        train.Run(train.parse(ppo_flags(tiny, tmp_path / "run")), "ppo").check()


@pytest.mark.parametrize("file, damage, message", [
    ("model.safetensors", lambda data: data[:len(data) // 2], "cannot be read"),
    ("config.json", lambda data: data.replace(b'"hidden_size": 64', b'"hidden_size": 32'), "has shape .*expected"),
    ("config.json", lambda data: data.replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": 3'), "missing, the first is layers.2"),
    ("config.json", lambda data: data.replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": 1'), "layers.1.* has no place"),
    ("config.json", lambda data: b"[1]", "expected the settings of a LLaMA")])
def test_a_damaged_model_is_one_line_in_every_stage(tiny, tmp_path, capsys, file, damage, message):
    """Truncated, of another width, with missing or with extra tensors: the tensor is named, and nothing is half loaded."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        (model / name).write_bytes((tiny / "sft" / name).read_bytes())
    (model / file).write_bytes(damage((model / file).read_bytes()))
    for flags in (["--stage=sft", f"--sft_data={ROOT / 'toy' / 'sft.json'}", "--max_len=100", "--reward="], []):
        with pytest.raises(SystemExit) as stop:
            train.main(ppo_flags(tiny, tmp_path / "out", model=model) + flags)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and re.search(message, err), err
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------- the supervised stages as a whole

def stage_flags(tiny, stage, out):
    data = {"sft": "sft_data", "reward": "preference_data"}[stage]
    return [f"--stage={stage}", f"--model={tiny / 'sft'}", f"--{data}={ROOT / 'toy' / (data.split('_')[0] + '.json')}", f"--out={out}",
            "--steps=6", f"--{stage}_batch=6", "--micro_batch=2", "--lr=1e-3", "--max_len=100", "--save_every=2", "--dtype=float32",
            *(["--reward_holdout=0.01"] if stage == "reward" else [])]


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_supervised_stages_do_not_depend_on_processes_or_interruptions(tiny, tmp_path, stage):
    """CHECKS 15, 31, 32 for the first two stages: 6 steps on ragged micro-batches by one process, by two, and by one that
    was killed and called again. A micro-batch weighed wrongly, or a step done twice, would show here."""
    one, killed = (launch(stage_flags(tiny, stage, tmp_path / name)) for name in ("one", "killed"))
    while not (tmp_path / "killed" / "checkpoint.pt").is_file() and killed.poll() is None:
        time.sleep(0.005)
    killed.kill()
    killed.communicate()
    finish(one)
    for process in launch(stage_flags(tiny, stage, tmp_path / "killed")), launch(stage_flags(tiny, stage, tmp_path / "two"), processes=2):
        finish(process)
    name = "model.safetensors" if stage == "sft" else "adapter_model.safetensors"
    one, two, before = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name), load_file(tiny / "sft" / "model.safetensors")
    assert max((one[k] - two[k]).abs().max() for k in one) <= 1e-5
    assert max((one[k] - before[k]).abs().max() if stage == "sft" else one[k].abs().max() for k in one) > 1e-3
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert metrics(tmp_path / "one") == metrics(tmp_path / "killed")


# --------------------------------------------------------------------------------------------------------- dry run

def test_a_dry_run_needs_no_weights_and_writes_nothing(tiny, tmp_path, capsys):
    """Before a week on two GPUs: all inputs are read, sizes are printed, and a mistake shows in seconds."""
    (tmp_path / "llama").mkdir()
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / "llama" / name).write_bytes((tiny / "sft" / name).read_bytes())
    before = sorted(tmp_path.rglob("*"))
    flags = ppo_flags(tiny, tmp_path / "out", model=tmp_path / "llama")
    train.main([*flags, "--dry_run"])
    out = capsys.readouterr().out
    assert "5 steps of 8 from 720 rows" in out and "one trunk:" in out and "two trunks (this run):" in out and "KV cache" in out
    assert sorted(tmp_path.rglob("*")) == before and not torch.distributed.is_initialized()
    shutil.copytree(tiny / "reward", tmp_path / "reward")
    (tmp_path / "reward" / "model.safetensors").unlink()
    (tmp_path / "reward" / "model.safetensors.index.json").write_text('{"weight_map": {"reward_head.weight": "1.safetensors"}}')
    train.main([*flags, "--dry_run", f"--reward={tmp_path / 'reward'}"])
    for flag, message in ((f"--reward={tiny / 'sft'}", "is it a language model"), ("--prompts=nowhere.json", "nowhere.json")):
        with pytest.raises(SystemExit):
            train.main([*flags, "--dry_run", flag])
        assert message in capsys.readouterr().err


def test_memory_of_7b_by_item():
    """By hand, bf16, for one of two processes at the paper's batch sizes: the trunk is 6,738,415,616 x 2 bytes, the reward
    trunk the same without 32000 x 4096 output weights; 16,777,216 adapter numbers take 16 bytes each; a token's keys and
    values are 2 x 32 layers x 4096 x 2 bytes, for 128 rows of 492 slots; an activation checkpoint is 4096 x 2 bytes per
    token, layer and trunk."""
    flags = ["--model=x", "--stage=ppo", "--dtype=bfloat16", "--checkpoint_activations", "--micro_batch=8", "--rollout_batch=128"]
    layouts = {name: (trained, memory) for name, trained, memory
               in train.layouts(train.parse(flags), "ppo", LlamaConfig(), torch.bfloat16, 8, "cuda")}
    assert layouts["one trunk"][0] == layouts["two trunks"][0] == 16_781_313
    one, two = (layouts[name][1] for name in ("one trunk", "two trunks"))
    assert one["frozen weights"] == 6_738_415_616 * 2
    assert two["frozen weights"] == (2 * 6_738_415_616 - 32000 * 4096) * 2
    assert one["trained weights, gradients, Adam"] == 16_777_216 * 16
    assert one["KV cache while sampling"] == 2 * 32 * 4096 * 2 * 128 * 492
    checkpoints, tokens = 2 * 32 * 4096 * 2, 8 * 492
    assert tokens * checkpoints < one["activations of a micro-batch"] < 1.8 * tokens * checkpoints
    assert train.peak(one) < sum(one.values())              # sampling's and the update's memory are not needed at once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_takes_what_the_estimate_says(dtype, one_process):
    """The storage of the cache that a rollout of 4 rows of 8 + 8 tokens really holds; on a CPU in float32 either way."""
    config = LlamaConfig(vocab_size=64, dim=64, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=160, max_seq_len=64)
    flags = ["--model=x", "--stage=ppo", "--rollout_batch=4", "--minibatch=4", "--prompt_len=8", "--response_len=8"]
    _, _, memory = next(train.layouts(train.parse(flags), "ppo", config, dtype, 8, "cpu"))
    cache = KVCache(4, 16)
    with torch.no_grad():
        prefill(Llama(config).to(dtype), [[1] * 8] * 4, cache, torch.arange(4))
    assert memory["KV cache while sampling"] == sum(x.untyped_storage().nbytes() for x in (*cache.k, *cache.v))


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that still exist, and the most that there ever were."""

    def __init__(self):
        super().__init__()
        self.held, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if storage._cdata not in self.held:
                self.held.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        return out

    def drop(self, key, size):
        self.held.remove(key)
        self.now -= size


@pytest.mark.parametrize("config", [LlamaConfig(), LlamaConfig(49152, 576, 30, 9, 3, 1536)], ids=["7B", "135M"])
def test_reading_the_prompts_takes_what_the_estimate_says(config, monkeypatch):
    """8 prompts of 192 tokens go through a model in bfloat16 as on a GPU, on tensors without storage: what exists at one
    time beside the cache. (Attention's kernel keeps nothing but its result.)"""
    monkeypatch.setattr(model_module, "attend", lambda q, k, v, mask=None: torch.empty_like(q))
    monkeypatch.setattr(model_module, "attention_dtype", lambda x: x.dtype)
    flags = ["--model=x", "--stage=ppo", "--rollout_batch=8", "--minibatch=8", "--prompt_len=192", "--response_len=8"]
    _, _, memory = next(train.layouts(train.parse(flags), "ppo", config, torch.bfloat16, 8, "cuda"))
    with torch.device("meta"), torch.inference_mode():
        model, tokens, rows = Llama(config).to(torch.bfloat16), torch.zeros(8, 192, dtype=torch.int64), torch.arange(8)
        cache = KVCache(8, 200, "meta")
        cache.prompts_of = rows
        with Live() as live:
            model.hidden(tokens, cache, 192 * rows + 191)
    cached = sum(x.untyped_storage().nbytes() for x in (*cache.k, *cache.v))
    assert memory["KV cache while sampling"] == cached
    assert memory["prompts' activations while sampling"] == pytest.approx(live.most - cached, rel=0.15)


def test_what_autograd_keeps_is_what_the_estimate_says(one_process):
    """saved_bytes against the tensors that autograd really saves in a layer with adapters, each storage counted once; past
    the last layer's attention, of the tokens that are read alone."""
    from reward import saved_bytes
    for dtype, read in itertools.product((torch.float32, torch.bfloat16), (128, 16)):
        config = LlamaConfig(vocab_size=64, dim=64, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=160, max_seq_len=64)
        model = Llama(config).to(dtype)
        add_lora(model, "policy", r=1, alpha=1)
        weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def keep(x):
            if x.untyped_storage().data_ptr() not in weights:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), adapter(model, "policy"):
            hidden = model.hidden(torch.randint(0, 64, (2, 64)), read=torch.arange(read) if read < 128 else None)
        to_attention, past_it = saved_bytes(config, dtype.itemsize, on_cpu=True)
        assert sum(kept.values()) == pytest.approx(128 * 3 * to_attention + (128 * 2 + read) * past_it, rel=0.05)


RESIDENT = """
import sys, train
resident = lambda key: int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024
before = resident("VmRSS")
train.main(sys.argv[1:])
print("resident", resident("VmHWM") - before)
"""


FAULTS = """
import ctypes, resource, train
train.start_processes()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    before = faults()
    pieces = [libc.malloc(SIZE) for _ in range(20)]
    for piece in pieces:
        ctypes.memset(piece, 1, SIZE)
    for piece in reversed(pieces):
        libc.free(piece)
print("faults", faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
@pytest.mark.parametrize("size", [1 << 20, 20 << 20])
@pytest.mark.parametrize("env, kept", [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "100000"}, False)])
def test_what_one_step_frees_the_next_one_gets(size, env, kept):
    """20 pieces of memory, asked for and freed again and again: a page that the kernel gives anew is a fault. An
    allocator that the user has set (here to hand everything back) is left alone."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))} | env
    out = subprocess.run([sys.executable, "-c", FAULTS.replace("SIZE", str(size))], cwd=ROOT, capture_output=True, text=True,
                         env=environment)
    assert out.returncode == 0, out.stderr
    faults, pages = int(out.stdout.rsplit("faults", 1)[1]), 20 * size // os.sysconf("SC_PAGE_SIZE")
    assert faults < pages / 10 if kept else faults > pages / 2, (faults, pages)


@pytest.fixture(scope="module")
def size_m(tmp_path_factory):
    """Two random trunks of width 512, 8 layers and 32000 ids, and prompts of about 62 tokens."""
    folder, config = tmp_path_factory.mktemp("m"), LlamaConfig(32000, 512, 8, 8, 8, 1376, max_seq_len=256)
    torch.manual_seed(0)
    save_llama(Llama(config), folder / "sft")
    save_reward_model(RewardModel(Llama(config, lm_head=False)), folder / "reward")
    for name in ("sft", "reward"):
        shutil.copy(ROOT / "toy" / "tokenizer.model", folder / name)
    rows, tokenizer = [], Tokenizer(ROOT / "toy" / "tokenizer.model")
    for word in ("red", "blue", "tree", "house", "cat", "dog", "sun", "moon"):
        text = word
        while len(tokenizer.encode(format_prompt(f"{text} {word}"), bos=True)) <= 64:
            text += f" {word}"
        rows.append({"instruction": text, "input": "", "output": ""})
    (folder / "prompts.json").write_text(json.dumps(rows))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the resident size is read from Linux's /proc")
@pytest.mark.parametrize("more", [[], ["--checkpoint_activations"], ["--dtype=bfloat16"]])
def test_the_memory_estimate_is_the_resident_size_within_a_tenth(more, size_m, tmp_path):
    """A PPO step in a process whose C library hands freed memory back (it keeps fragments otherwise), against the estimate."""
    if "--dtype=bfloat16" in more and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16 for oneDNN: one step would take minutes")
    flags = [f"--{k}={v}" for k, v in dict(
        stage="ppo", model=size_m / "sft", reward=size_m / "reward", prompts=size_m / "prompts.json", out=tmp_path / "out",
        steps=1, rollout_batch=8, minibatch=8, micro_batch=8, prompt_len=64, response_len=96, warmup_steps=1).items()] + more
    cfg = train.parse(flags)
    memory = next(m for name, _, m in train.layouts(cfg, "ppo", read_model_config(size_m / "sft"), cfg.trunk_dtype("cpu"), 8, "cpu")
                  if name == "two trunks")
    out = subprocess.run([sys.executable, "-c", RESIDENT, *flags], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "2", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)})
    assert out.returncode == 0, out.stderr
    resident = int(out.stdout.rsplit("resident", 1)[1])
    assert train.peak(memory) == pytest.approx(resident, rel=0.1), (memory, resident)
