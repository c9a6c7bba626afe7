"""Run folders: continuing, stopping, doing again; who may write; settings, data and mistakes."""
import dataclasses
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval
import train
from eval import load_answering, load_run
from model import InputError, Llama, LlamaConfig, save_llama
from running import (ROOT, as_flags, ended, fork, metrics, one_line, ppo_flags, run_processes,
                     same_run, stage_flags, torchrun, whole_run)

STEPS = dict(steps=14, save_every=3)          # long enough to be stopped on the way


def steps_done(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def wait_for(what, process=None):
    """Wait until what() is true; a process that ends before, or hangs, is an error."""
    for _ in range(6_000):
        if what():
            return
        assert process is None or process.exitcode is None, "the process has ended"
        time.sleep(0.01)
    raise AssertionError("a minute, and nothing happens")


def checkpoint_step(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["step"]


@pytest.fixture(scope="session")
def long_run(tiny, tmp_path_factory):
    """Fourteen PPO steps by one process, uninterrupted."""
    out = tmp_path_factory.mktemp("long") / "ppo"
    train.main(ppo_flags(tiny, out, **STEPS))
    return out


@pytest.fixture(scope="session")
def long_run_of_two(tiny, tmp_path_factory):
    """The same by two processes."""
    out = tmp_path_factory.mktemp("long") / "ppo"
    assert run_processes(ppo_flags(tiny, out, **STEPS), 2) == [0, 0]
    return out


# ----------------------------------------------------------------------------------------- stopping

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves_it(tiny, long_run, tmp_path, number):
    """A scheduler's SIGTERM or Ctrl-C: the step in progress is finished and saved,
    though no checkpoint was due, the status is 128 + the signal's number, and the same command ends
    where the uninterrupted run ended, to the bit."""
    out, log = tmp_path / "ppo", tmp_path / "log"
    flags = ppo_flags(tiny, out, **STEPS)
    process = fork(train.main, ppo_flags(tiny, out, steps=14, save_every=100), log=log)
    wait_for(lambda: steps_done(out) >= 2, process)
    os.kill(process.pid, number)
    assert ended(process) == 128 + number
    step = checkpoint_step(out)
    assert 2 <= step < 14 and step == len(metrics(out))
    assert f"stopped after step {step}; the same command" in log.read_text()
    train.main(flags)
    same_run(long_run, out)


@pytest.mark.parametrize("stops", [True, False])
def test_ddp_is_gone_before_its_process_group_ends(tiny, tmp_path, monkeypatch, stops):
    """DistributedDataParallel holds the group. Freed after the group was ended, it joins a thread
    that may be waiting for Python's lock, which it holds itself: of runs of two processes that were
    told to stop, up to every second one hung, its checkpoint saved and its folder locked."""
    made, alive, wrap, destroy = [], [], train.wrap, train.dist.destroy_process_group

    def watched_wrap(*args):
        ddp = wrap(*args)
        made.append(weakref.ref(ddp))
        return ddp

    def watched_destroy():
        alive.append(made[0]() is not None)
        destroy()

    monkeypatch.setattr(train, "wrap", watched_wrap)
    monkeypatch.setattr(train.dist, "destroy_process_group", watched_destroy)
    if stops:
        monkeypatch.setattr(train.Stopper, "asked", lambda *_: signal.SIGTERM)
        with pytest.raises(SystemExit):
            train.main(ppo_flags(tiny, tmp_path / "run"))
    else:
        train.main(ppo_flags(tiny, tmp_path / "run", steps=1))
    assert alive == [False]


def test_a_second_signal_ends_at_once(tiny, tmp_path):
    """A step of LLaMA-7B takes minutes; whoever presses Ctrl-C twice will not wait for it."""
    def endless(*_):
        os.write(1, b"in the step\n")
        while True:
            time.sleep(0.01)
            if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and not told:
                told.append(os.write(1, b"asked once\n"))

    told = []
    log = tmp_path / "log"
    process = fork(broken, "update", endless, ppo_flags(tiny, tmp_path / "ppo"), log=log)
    for text in ("in the step", "asked once"):
        wait_for(lambda: log.is_file() and text in log.read_text(), process)
        process.terminate()
    assert ended(process) == -signal.SIGTERM


def broken(name, replacement, flags):
    """train.py with one of its functions replaced."""
    setattr(train, name, replacement)
    train.main(flags)


def test_a_signal_that_comes_while_the_processes_agree_counts_next_time(monkeypatch, one_process):
    """Each step ends with a question to all processes, whether one was asked to stop. A signal
    during the question is not in its answer; written over by it, it would be lost."""
    stopper, gather = train.Stopper(), train.gather

    def interrupted(local):
        parts = gather(local)
        os.kill(os.getpid(), signal.SIGTERM)
        return parts

    monkeypatch.setattr(train, "gather", interrupted)
    with pytest.raises(ZeroDivisionError), stopper:      # (an error: the end raises no signal)
        assert not stopper.asked()
        monkeypatch.undo()
        assert stopper.asked() == signal.SIGTERM
        raise ZeroDivisionError


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 1)])
def test_a_signal_that_comes_after_the_last_look_is_not_lost(tmp_path, number, status):
    """Between the last step and the end of the loop a signal is only noted; then it does what it
    does to any program, or a run that was told to stop would go on to evaluate for minutes."""
    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with train.Stopper():
            os.kill(os.getpid(), number)
            print("noted", flush=True)
        print("evaluated", flush=True)

    process = fork(work, log=tmp_path / "log")
    assert ended(process) == status
    assert "noted" in (tmp_path / "log").read_text()
    assert "evaluated" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_whose_torchrun_is_gone_stop_and_the_same_command_continues(
        tiny, long_run_of_two, tmp_path, number):
    """kill -9 of torchrun alone - an out-of-memory killer, a job script - leaves its
    workers running in sessions of their own, unseen, and the folder locked. They stop at the next
    step, as they do when torchrun passes a signal on, and save it. What continues ends where the
    uninterrupted run ended, to the bit."""
    out, flags = tmp_path / "ppo", ppo_flags(tiny, tmp_path / "ppo", **STEPS)
    process = torchrun(ppo_flags(tiny, out, steps=14, save_every=100))
    wait_for(lambda: steps_done(out) >= 1)
    process.send_signal(number)
    process.wait()
    wait_for(lambda: not locked(out))
    process.communicate()
    assert not (out / "finished.json").exists() and checkpoint_step(out) == len(metrics(out)) < 14
    assert run_processes(flags, 2) == [0, 0]
    same_run(long_run_of_two, out)


def locked(folder):
    """Whether a process is writing to a run folder."""
    try:
        os.close(train.hold(folder))
    except InputError:
        return True
    return False


# ------------------------------------------------------------------------------ kill -9, full disks

def test_a_run_that_is_killed_again_and_again_continues_to_the_bit(tiny, long_run, tmp_path):
    """kill -9 at random moments: before the first step, in a step, while a
    checkpoint or a record is written. What came after the last checkpoint is lost and done again,
    its lines in the records too."""
    out, moments, kills = tmp_path / "ppo", random.Random(0), 0
    for goal in (0, 2, 4, 0, 5, 7, 9):                        # steps that are done before the kill
        process = fork(train.main, ppo_flags(tiny, out, **STEPS))
        wait_for(lambda: steps_done(out) >= goal or process.exitcode is not None)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        kills += ended(process) == -signal.SIGKILL
        if (out / "checkpoint.pt").exists():
            assert checkpoint_step(out) % 3 == 0
    assert kills >= 4                                        # (a fast machine may be done sooner)
    train.main(ppo_flags(tiny, out, **STEPS))
    same_run(long_run, out)


@pytest.mark.parametrize("name, nth", [("torch.save", 1), ("torch.save", 2), ("save_file", 1),
                                       ("os.replace", 1), ("os.replace", 2)])
def test_a_kill_in_the_middle_of_writing_a_file_leaves_the_old_one(tiny, whole_run, tmp_path, name,
                                                                   nth):
    """The hardest moments, made to happen: half of a checkpoint or of the weights is
    written, or all of it and not yet renamed."""
    out = tmp_path / "ppo"
    process = fork(dies_in, name, nth, ppo_flags(tiny, out))
    assert ended(process) == -signal.SIGKILL
    if (out / "checkpoint.pt").exists():
        assert checkpoint_step(out) in (2, 4)
    assert not (out / "finished.json").exists()
    train.main(ppo_flags(tiny, out))
    same_run(whole_run, out)


def dies_in(name, nth, flags):
    """train.py that is killed in the middle of the nth call of a function that writes."""
    import model
    module, attribute = {"torch.save": (torch, "save"), "save_file": (model, "save_file"),
                         "os.replace": (os, "replace")}[name]
    original, calls = getattr(module, attribute), itertools.count(1)

    def dying(*args, **kwargs):
        if next(calls) < nth:
            return original(*args, **kwargs)
        if name != "os.replace":
            original(*args, **kwargs)
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, attribute, dying)
    train.main(flags)


@pytest.mark.parametrize("room, save_every, name", [
    (300, 2, "config.json"), (4000, 100, "metrics.jsonl"), (60_000, 2, "checkpoint.pt"),
    (20_000, 100, "adapter_model.safetensors")])
def test_a_file_that_cannot_be_written_is_one_line(tiny, whole_run, tmp_path, room, save_every,
                                                   name):
    """A disk that is full, here a limit on the size of a file: one line with the path,
    status 2, the old checkpoint stands, no temporary file is left; and with room again the same
    command continues to the bit."""
    out, log = tmp_path / "ppo", tmp_path / "log"
    assert stopped_after(2, ppo_flags(tiny, out)) == 143
    process = fork(with_small_files, room, ppo_flags(tiny, out, save_every=save_every), log=log)
    assert ended(process) == 2
    errors = [line for line in log.read_text().splitlines() if "error" in line]
    assert len(errors) == 1 and "Traceback" not in log.read_text()
    assert re.match(f"train.py: error: cannot write {out}/.*{name}", errors[0]), errors[0]
    assert checkpoint_step(out) == 2 and not list(out.rglob("*.tmp"))
    train.main(ppo_flags(tiny, out))
    same_run(whole_run, out)


def with_small_files(room, flags):
    """train.py that can write no file of more than `room` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    train.main(flags)


def stopped_after(step, flags):
    """train.py that is told to stop in a step -> its exit status."""
    def told_to_stop():
        asked, steps = train.Stopper.asked, itertools.count(1)

        def told(self):
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return asked(self)

        train.Stopper.asked = told
        train.main(flags)
    return ended(fork(told_to_stop))


def test_a_full_disk_is_one_line_and_with_room_the_run_continues(tiny, whole_run, tmp_path):
    """The same on a real one of 256 KiB: the second checkpoint does not fit beside the first."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk],
                             capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    try:
        out, log = disk / "ppo", tmp_path / "log"
        assert ended(fork(train.main, ppo_flags(tiny, out), log=log)) == 2
        error = log.read_text().splitlines()[-1]
        assert error.startswith(f"train.py: error: cannot write {out}/checkpoint.pt"), error
        assert checkpoint_step(out) == 2 and not list(out.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        train.main(ppo_flags(tiny, out))
        same_run(whole_run, out)
    finally:
        subprocess.run(["umount", disk], check=True)


# --------------------------------------------------------------------------------------- continuing

@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_the_first_two_stages_continue_to_the_bit(tiny, tmp_path, stage):
    """The same with dropout: its masks are a function of the step as well."""
    train.main(stage_flags(tiny, stage, tmp_path / "whole"))
    assert stopped_after(3, stage_flags(tiny, stage, tmp_path / "cut")) == 143
    train.main(stage_flags(tiny, stage, tmp_path / "cut"))
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_run_that_is_stopped_at_its_last_step_writes_its_result(tiny, whole_run, tmp_path):
    """No step is left to be done, but the result is."""
    assert stopped_after(5, ppo_flags(tiny, tmp_path / "ppo")) == 143
    assert not (tmp_path / "ppo" / "policy").exists()
    train.main(ppo_flags(tiny, tmp_path / "ppo"))
    same_run(whole_run, tmp_path / "ppo")


@pytest.mark.parametrize("half", [b'{"st', "{\"step\": 3, \"text\": \"\u00fc".encode()[:-1]])
def test_records_are_cut_at_the_checkpoint(tiny, whole_run, tmp_path, half):
    """A kill can leave lines that are later than the checkpoint, and half a line, cut even inside a
    character: they go, or steps would appear twice."""
    out = tmp_path / "ppo"
    assert stopped_after(2, ppo_flags(tiny, out)) == 143
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(out / name, "ab") as f:
            f.write(b'{"step": 3}\n{"step": 4}\n' + half)
    train.main(ppo_flags(tiny, out))
    same_run(whole_run, out)


def test_a_finished_run_says_so_and_does_nothing(tiny, whole_run, capsys):
    """The same command once more must not cost an hour, nor touch a file; nor does a command that
    changes how it is run: how often it is saved, how many rows at once."""
    before = {p: p.stat().st_mtime_ns for p in whole_run.rglob("*")}
    train.main(ppo_flags(tiny, whole_run))
    train.main(ppo_flags(tiny, whole_run, save_every=7, micro_batch=1, generate_batch=3))
    assert capsys.readouterr().out.count("ppo: finished, in ") == 2
    assert before == {p: p.stat().st_mtime_ns for p in whole_run.rglob("*")}


def test_a_run_does_not_continue_on_another_trunk(tiny, tmp_path, capsys):
    """Checkpoints hold what trains. A frozen model that was replaced in between - an SFT that was
    run again, say - would go unnoticed by its path, and the rest of the run would train something
    else."""
    shutil.copytree(tiny / "sft", tmp_path / "sft")
    shutil.copytree(tiny / "reward", tmp_path / "reward")
    flags = ppo_flags(tiny, tmp_path / "run", model=tmp_path / "sft", reward=tmp_path / "reward")
    assert stopped_after(2, flags) == 143
    for name, setting in (("sft", "model"), ("reward", "reward")):
        weights = tmp_path / name / "model.safetensors"
        whole = weights.read_bytes()
        save_file({k: t * 1.5 for k, t in load_file(weights).items()}, weights)
        assert f"was made with other content of {setting}" in one_line(capsys, flags)
        weights.write_bytes(whole)
    assert checkpoint_step(tmp_path / "run") == 2
    train.main(flags)


def test_a_run_does_not_continue_with_another_reward_adapter(tiny, tmp_path, capsys):
    """On one trunk the reward model is an adapter: trained again on the same trunk it is another
    judge, and the rest of the run would maximise something else than its beginning."""
    shutil.copytree(tiny / "reward_adapter", tmp_path / "reward")
    flags = ppo_flags(tiny, tmp_path / "run", reward=tmp_path / "reward")
    assert stopped_after(2, flags) == 143
    weights = tmp_path / "reward" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    save_file({k: t * 1.5 for k, t in load_file(weights).items()}, weights)
    assert "was made with other content of reward" in one_line(capsys, flags)
    weights.write_bytes(whole)
    train.main(flags)


# --------------------------------------------------------------------------------------- one writer

def test_a_run_folder_is_one_commands_at_a_time(tiny, tmp_path, capsys):
    """The same command twice, as it is typed in two windows: their records would be
    mixed. The second is refused in one line, by all of its processes, and let in when the first has
    ended, or was killed."""
    flags, log = ppo_flags(tiny, tmp_path / "run", steps=1), tmp_path / "log"
    first = fork(broken, "ppo", lambda *_: time.sleep(1000), flags)
    wait_for(lambda: (tmp_path / "run").exists() and locked(tmp_path / "run"), first)
    refusal = f"train.py: error: another process is writing to {tmp_path}/run: wait for it"
    assert one_line(capsys, flags).startswith(refusal)
    assert run_processes(flags, 2, log=log) == [2, 2]
    assert log.read_text().count(refusal) == 1 and "Traceback" not in log.read_text()
    assert not list((tmp_path / "run").iterdir())
    first.kill()
    ended(first)
    train.main(flags)


def test_a_call_after_one_that_a_mistake_has_ended(tiny, tmp_path, capsys):
    """In one process, as in a notebook: weights that cannot be read end the first call when its
    processes have started. The second call can begin, and write to the folder."""
    shutil.copytree(tiny / "sft", tmp_path / "sft")
    flags = ppo_flags(tiny, tmp_path / "run", model=tmp_path / "sft", steps=1)
    (tmp_path / "sft" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(SystemExit):
        train.main(flags)
    assert "truncated?" in capsys.readouterr().err
    shutil.copy(tiny / "sft" / "model.safetensors", tmp_path / "sft")
    train.main(flags)
    assert (tmp_path / "run" / "finished.json").is_file()
    assert not torch.distributed.is_initialized()


# ----------------------------------------------------------------- a whole run: copies, doing again

def toy_flags(out, folder, **more):
    """The default run in a few steps, on little data."""
    return as_flags(dict(
        out=out, sft_steps=3, reward_steps=3, steps=2, rollout_batch=8, minibatch=8,
        response_len=12, preference_data=folder / "pairs.json",
        preference_test=folder / "pairs.json", eval_data=folder / "questions.json") | more)


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    """All stages and the evaluation, in a folder that also holds the data."""
    folder = tmp_path_factory.mktemp("toy")
    for name, source, n in (("pairs", "preference_val", 40), ("questions", "test", 5)):
        rows = json.loads((ROOT / "toy" / f"{source}.json").read_text())[:n]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    train.main(toy_flags(folder / "run", folder))
    return folder


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_copy_of_a_run_goes_on_elsewhere_with_other_settings(toy_run, tmp_path, capsys):
    """`cp -r runs/toy runs/none`, without its ppo folder, is how two regularisers are compared from
    one SFT and one reward model: paths are seen from the folder, so the copy finds its own models,
    and the original is left alone."""
    before = files_of(toy_run)
    shutil.copytree(toy_run / "run", tmp_path / "deep" / "er" / "none")
    shutil.rmtree(tmp_path / "deep" / "er" / "none" / "ppo")
    capsys.readouterr()
    train.main(toy_flags(tmp_path / "deep" / "er" / "none", toy_run, regularizer="none"))
    out = capsys.readouterr().out
    assert "sft: finished" in out and "reward: finished" in out and "ppo: 2 steps" in out
    settings = json.loads((tmp_path / "deep/er/none/ppo/config.json").read_text())["run"]
    assert (settings["model"], settings["reward"]) == ("../sft", "../reward")
    assert before == files_of(toy_run)
    load_run(tmp_path / "deep" / "er" / "none" / "ppo")
    shutil.move(tmp_path / "deep" / "er" / "none", tmp_path / "moved")
    assert eval.report(tmp_path / "moved" / "ppo").startswith("\n5 evaluation prompts")
    load_run(tmp_path / "moved" / "ppo")


@pytest.mark.parametrize("stage, renamed", [
    ("ppo", ["ppo"]), ("reward", ["reward", "ppo"]), ("sft", ["sft", "reward", "ppo"])])
def test_redo_renames_a_stage_and_the_later_ones_and_deletes_nothing(toy_run, tmp_path, stage,
                                                                     renamed):
    """What was made from the model that is made again goes with it: a policy beside another SFT
    model than its own would stand there as finished. Twice makes ppo.1 and ppo.2."""
    out = tmp_path / "run"
    shutil.copytree(toy_run / "run", out)
    before = files_of(out)
    train.main(toy_flags(out, toy_run, redo=stage))
    aside = {Path(f"{p.parts[0]}.1", *p.parts[1:]): content for p, content in before.items()
             if p.parts[0] in renamed}
    after = files_of(out)
    assert aside.items() <= after.items()
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*train.STAGES, *(f"{one}.1" for one in renamed)])
    assert before.keys() == {p for p in after if "." not in p.parts[0]}
    if stage == "ppo":
        train.main(toy_flags(out, toy_run, redo=stage, kl_coef=0.5))     # other settings, as asked
        assert (out / "ppo.2" / "finished.json").is_file()


def test_one_stage_alone_is_done_again_with_those_that_build_on_it(toy_run, tmp_path):
    """`--stage sft --redo sft` in the folder of a whole run makes the SFT model only; reward model
    and policy of the one before are set aside with it."""
    out = tmp_path / "run"
    shutil.copytree(toy_run / "run", out)
    train.main([f"--out={out}", "--stage=sft", "--redo=sft", "--steps=1"])
    assert sorted(p.name for p in out.iterdir()) == ["ppo.1", "reward.1", "sft", "sft.1"]


@pytest.mark.parametrize("steps", [2, 3])
def test_a_reward_model_does_not_outlive_the_model_that_it_was_made_from(toy_run, tmp_path, steps):
    """Somebody deletes the SFT model and makes another, or the same once more: reward model and
    policy of the old one, which stand there as finished, are neither taken for the new one's nor
    written over."""
    out = tmp_path / "run"
    shutil.copytree(toy_run / "run", out)
    shutil.rmtree(out / "sft")
    before = files_of(out)
    train.main(toy_flags(out, toy_run, sft_steps=steps))
    after = files_of(out)
    for path, content in before.items():
        assert after[Path(f"{path.parts[0]}.1", *path.parts[1:])] == content, path
    load_run(out / "ppo")


def test_redo_of_the_evaluation_keeps_the_policy_and_the_old_answers(toy_run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(toy_run / "run", out)
    before = files_of(out)
    train.main(toy_flags(out, toy_run, redo="eval"))
    changed = {p for p, content in files_of(out).items() if before.get(p) != content}
    assert changed == {Path("ppo/eval.json.1")}                       # the same answers once more
    train.main(toy_flags(out, toy_run, eval_temperature=0))         # other answers: without --redo
    assert (out / "ppo" / "eval.json.2").read_bytes() == before[Path("ppo/eval.json")]
    assert (out / "ppo" / "eval.json").read_bytes() != before[Path("ppo/eval.json")]


def test_redo_of_the_evaluation_needs_a_policy_and_data(toy_run, tmp_path, capsys):
    flags = [f"--out={toy_run / 'run'}", "--redo=eval"]
    assert "--redo eval needs the stage ppo" in one_line(capsys, [*flags, "--stage=sft"])
    assert "--eval_data" in one_line(capsys, toy_flags(toy_run / "run", toy_run, redo="eval",
                                                       eval_data=""))


@pytest.mark.parametrize("redo", [[], ["--redo=ppo"], ["--redo=sft"]])
def test_what_is_no_run_of_that_stage_is_left_alone(tiny, tmp_path, capsys, redo):
    """Somebody's model, or another stage, in a place where a result would be written: neither
    overwritten nor renamed."""
    for place in ("ppo", "reward"):
        shutil.copytree(tiny / "sft", tmp_path / place)
        error = one_line(capsys, [f"--out={tmp_path}", *redo])
        assert f"{tmp_path / place} holds something that is not a run of stage {place}" in error
        assert [p.name for p in tmp_path.iterdir()] == [place]
        shutil.rmtree(tmp_path / place)


def test_a_redo_that_cannot_begin_has_moved_nothing(toy_run, tmp_path, capsys):
    """The prompts are gone: the PPO run that was made from them is still the run."""
    out = tmp_path / "run"
    shutil.copytree(toy_run / "run", out)
    before = files_of(out)
    flags = toy_flags(out, toy_run, redo="ppo", prompts=tmp_path / "none.json")
    assert "none.json" in one_line(capsys, flags)
    assert before == files_of(out)


def test_a_policy_is_not_put_on_other_weights_than_it_was_trained_on(toy_run, tmp_path):
    """The model folder that a finished run names holds another model now: its adapter would answer,
    and make no sense."""
    out = tmp_path / "run"
    shutil.copytree(toy_run / "run", out)
    load_run(out / "ppo")
    for name, flag, read in (("sft", "model", load_run), ("reward", "reward", load_run),
                             ("sft", "model", lambda f: load_answering(f, None, None, "float32"))):
        weights = out / name / "model.safetensors"
        whole = weights.read_bytes()
        changed = {k: t + 0.01 for k, t in load_file(weights).items()}
        save_file(changed, weights, metadata={"format": "pt"})
        with pytest.raises(InputError, match=f"trained with other weights than its --{flag} holds"):
            read(out / "ppo")
        weights.write_bytes(whole)


# ----------------------------------------------------------------------- the same settings and data

def test_another_setting_for_an_existing_run_is_refused(tiny, whole_run, capsys):
    """Continuing with another learning rate would be neither run: the line names each setting, both
    values, and the ways out."""
    error = one_line(capsys, ppo_flags(tiny, whole_run, lr=0.5, seed=3))
    differences = r"made with seed 0 \(now 3\), lr 0.001 \(now 0.5\): "
    assert re.search(differences + "give the same, another --out, or --redo ppo", error)


def test_a_finished_run_of_another_model_is_not_taken_for_this(tiny, whole_run, tmp_path, capsys):
    """Two SFT models, one --out by mistake: the second policy would never be trained, and the first
    one's table be shown for it."""
    shutil.copytree(tiny / "sft", tmp_path / "sft")
    weights = tmp_path / "sft" / "model.safetensors"
    save_file({k: t * 1.5 for k, t in load_file(weights).items()}, weights)
    error = one_line(capsys, ppo_flags(tiny, whole_run, model=tmp_path / "sft"))
    assert "was made with" in error and "model" in error


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_data_are_known_by_their_content(tiny, tmp_path, capsys, stage):
    """The same rows under another name or in another place are the same data; other rows under the
    same name are not, whether a run is to be continued or stands there as finished."""
    name, source = {"sft": ("sft_data", "sft"), "reward": ("preference_data", "preference_val"),
                    "ppo": ("prompts", "unlabeled")}[stage]
    rows = tmp_path / "mine.json"
    shutil.copy(ROOT / "toy" / f"{source}.json", rows)

    def flags(rows):
        if stage == "ppo":
            return ppo_flags(tiny, tmp_path / "run", prompts=rows)
        return stage_flags(tiny, stage, tmp_path / "run", **{name: rows})

    assert stopped_after(2, flags(rows)) == 143
    edited = rows.read_text().replace("Who", "who")
    rows.write_text(edited)
    assert f"made with other content of {name}: give the same" in one_line(capsys, flags(rows))
    shutil.copy(ROOT / "toy" / f"{source}.json", tmp_path / "yours.json")
    train.main(flags(tmp_path / "yours.json"))
    assert f"made with other content of {name}: give the same" in one_line(capsys, flags(rows))
    train.main(flags(tmp_path / "yours.json"))
    assert "finished" in capsys.readouterr().out


def test_data_that_come_or_go_are_other_data(tiny, tmp_path, capsys):
    """With --preference_test all pairs are trained on, without it nine tenths: a run is one or the
    other."""
    flags = stage_flags(tiny, "reward", tmp_path / "run")
    held_out = f"--preference_test={ROOT / 'toy' / 'preference_val.json'}"
    assert stopped_after(1, flags) == 143
    assert "preference_test" in one_line(capsys, [*flags, held_out])
    shutil.rmtree(tmp_path / "run")
    assert stopped_after(1, [*flags, held_out]) == 143
    assert "preference_test" in one_line(capsys, flags)


def test_a_run_folder_behind_a_link_finds_its_inputs(tiny, tmp_path):
    """runs -> another disk: .. of what lies there is not .. of the link."""
    (tmp_path / "disk" / "far" / "away").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "far" / "away")
    command = train.parse(ppo_flags(tiny, tmp_path / "runs" / "one"))
    run = train.Run("ppo", command.folders["ppo"], command.configs["ppo"])
    run.folder.mkdir()
    for name in ("model", "reward", "prompts"):
        assert (run.folder / run.settings[name]).exists(), run.settings[name]


# ----------------------------------------------------------------------------------------- settings

FIELDS = {f.name for config in train.STAGES.values() for f in dataclasses.fields(config)}
OTHER = {"rollout_batch": "256", "minibatch": "32", "regularizer": "bregman", "epochs": "7",
         "eval_temperature": "0.9", "regularizer_mode": "loss", "dtype": "bfloat16", "stage": "sft",
         "redo": "ppo"}
BESIDE = {"batch": ["--stage=sft"], "epochs": ["--stage=sft"], "reward": ["--stage=ppo"],
          "model": ["--stage=sft", "--sft_data=x"]}


def test_every_flag_changes_what_is_done():
    """A flag that nothing reads is a lie in --help. Each is given another value than its default:
    the command is another one; and the setting is read by its name."""
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    walked = set()
    for action in train.build_parser()._actions:
        name = action.dest
        if name == "help":
            continue
        flag = f"--{name}" if action.nargs == 0 else f"--{name}={OTHER.get(name, '7')}"
        beside = BESIDE.get(name, [])
        assert train.parse([*beside, flag]) != train.parse(beside), f"{flag} changes nothing"
        walked.add(name)
    for name in FIELDS:
        assert re.search(rf"\b(cfg|self)\.{name}\b", source), f"--{name} is read nowhere"
    assert FIELDS | {"stage", "out", "redo"} <= walked


def test_there_are_at_most_55_settings():
    """Two screens. --sft_lr, --reward_lr and --lr are one setting of three stages."""
    assert len(FIELDS | {"stage", "out", "redo"}) <= 55


def test_settings_that_decide_the_result_are_compared():
    """A run folder is continued only with the settings that made it; the rest - where, how often,
    how many at once, what is evaluated - may change in between; data and models count by their
    content."""
    assert set(train.FREE) == {"micro_batch", "generate_batch", "checkpoint_activations",
                               "save_every", "eval_every", "eval_data", "eval_temperature",
                               "eval_drop_long"}
    assert set(train.PATHS) == {"model", "reward", "tokenizer", "sft_data", "preference_data",
                                "preference_test", "prompts"}
    command = train.parse([])
    for stage, config in command.configs.items():
        run = train.Run(stage, command.folders[stage], config)
        own = {f.name for f in dataclasses.fields(config)}
        assert run.settings.keys() == own - set(train.FREE) | {"stage"}


def test_plain_flags_belong_to_the_named_stage():
    """--lr with --stage sft is the SFT's; with --stage all it is PPO's, and --sft_lr the SFT's. A
    flag wins over the toy world's value, and with --model the paper's hold."""
    assert train.parse(["--stage=sft", "--lr=0.5"]).configs["sft"].lr == 0.5
    configs = train.parse(["--lr=0.5", "--reward_lr=0.25", "--seed=3"]).configs
    assert configs["ppo"].lr == 0.5 and configs["reward"].lr == 0.25
    assert configs["sft"].lr == train.TOY["sft"]["lr"] != train.SFTConfig().lr
    assert [config.seed for config in configs.values()] == [3, 3, 3]
    alone = train.parse(["--model=x", "--stage=ppo", "--reward=y", "--prompts=z"])
    assert alone.configs["ppo"] == train.PPOConfig(model="x", reward="y", prompts="z",
                                                   tokenizer="x/tokenizer.model")


def test_a_flag_that_does_nothing_here_is_named(capsys):
    """A setting of another stage, given where only one is run, would be lost in silence."""
    train.parse(["--stage=sft", "--kl_coef=0.3", "--reward_lr=1", "--lr=1", "--sft_steps=3"])
    assert capsys.readouterr().out == ("note: --kl_coef does nothing with --stage sft\n"
                                       "note: --reward_lr does nothing with --stage sft\n")
    train.parse(["--stage=reward", "--reward=x"])
    assert capsys.readouterr().out == "note: --reward does nothing with --stage reward\n"
    train.parse(["--lr=1", "--sft_lr=1", "--epochs=2", "--prompts=x", "--preference_data=y"])
    assert capsys.readouterr().out == ""


def test_help_shows_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and all(f"--{name}" in out for name in FIELDS)
    assert "(default: {'sft': 0, 'reward': 0, 'ppo': 781}; toy world: {'ppo': 80})" in out
    assert "rank of the adapters (0: train all weights) (default: 8; toy" in out


# ----------------------------------------------------------------------------------------- mistakes

ROW = {"instruction": "Who?", "input": "", "output": "Me."}
PAIR = {"instruction": "Who?", "input": "", "output_1": "Me.", "output_2": "You.", "preference": 1}
SFT = ["--stage=sft", "--max_len=100", "--sft_data=DIR/a.json"]
REWARD = ["--stage=reward", "--max_len=100", "--preference_data=DIR/a.json"]
PROMPTS = ["--prompts=DIR/a.json"]
LONG = ROW | {"instruction": "Who? " * 60}
MISTAKES = [       # flags, a.json, what is said
    (["--minbatch=4"], None, "unrecognized arguments: --minbatch=4 .see --help"),
    (["--rollout=4"], None, "unrecognized arguments: --rollout=4"),
    (["extra"], None, "unrecognized arguments: extra"),
    (["--steps=x"], None, "argument --steps: invalid int value: 'x'"),
    (["--response_len=-3"], None, "--response_len -3: expected a number, at least 1"),
    (["--rollout_batch=100", "--minibatch=128"], None, "try 128"),
    (["--rollout_batch=4", "--minibatch=8"], None, "4 is not a multiple of --minibatch 8: try 8\n"),
    (["--eval_every=5"], None, "--eval_every needs --eval_data"),
    (["--gamma=nan"], None, "--gamma nan: expected a number"),
    (["--lr=inf"], None, "--lr inf: expected a number"),
    (["--stage=all", "--reward="], None, "--stage all with --model needs --sft_data"),
    (["--stage=all"], None, "--reward goes with --stage ppo"),
    (["--redo=sft"], None, "--redo sft does not go with --stage ppo"),
    ([*SFT, "--max_len=400"], [ROW], "400 tokens .* exceed the 128 positions"),
    (["--prompt_len=120", "--response_len=50"], None, "170 tokens .* exceed the 128 positions"),
    (["--regularizer=reverse_kl"], None, "exact divergences.* here one of .*kl, clamped_kl"),
    (["--regularizer=bregman", "--regularizer_mode=loss"], None, "here one of .*kl, reverse_kl"),
    (["--regularizer=k1"], None, "argument --regularizer: invalid choice: 'k1'"),
    (["--stage=nothing"], None, "argument --stage: invalid choice: 'nothing'"),
    (["--lora_alpha=0"], None, "--lora_alpha 0.0: expected a number, at least"),
    (["--prompts="], None, "needs --prompts"),
    (["--prompts=DIR/none.json"], None, "none.json"),
    (PROMPTS, "", "a.json: broken JSON"),
    (PROMPTS, '[\n{"instruction": "x"},\n{"instruction" "y"}\n]', "a.json: broken JSON, .* line 3"),
    (PROMPTS, [], "a.json: expected rows"),
    (PROMPTS, [{"output": "x"}], "row 0: expected a text in 'instruction', got NoneType"),
    (PROMPTS, [ROW, {"instruction": 7}], "row 1: expected a text in 'instruction', got int"),
    (PROMPTS, [LONG], "a.json: .*--prompt_len 60"),
    (SFT, [{"instruction": "x"}], "row 0: expected a text in 'output'"),
    (REWARD, [PAIR | {"preference": 3}], "row 0: 'preference' must be 1 or 2"),
    (REWARD, [PAIR | {"output_1": None}], "row 0: expected a text in 'output_1'"),
    (["--eval_data=DIR/a.json"], [ROW, LONG], "1 .*a.json .*128 positions"),
    (["--model=DIR/none"], None, "none"),
    (["--tokenizer=DIR/a.json"], "{}", "a.json is not a sentencepiece model"),
    (["--reward=DIR/none"], None, "none"),
    (["--reward=TINY/sft"], None, "sft has no tensor reward_head.weight.*expected a reward model"),
    (["--model=TINY/reward"], None, "reward"),
    (["--out=DIR/a.json/run"], "{}", "a.json"),
]


@pytest.mark.parametrize("flags, content, message", MISTAKES, ids=[m[2][:40] for m in MISTAKES])
def test_a_mistake_is_one_clear_line_and_status_2(tiny, tmp_path, capsys, flags, content, message):
    """No traceback: what was got, what was expected, what to do; status 2; and nothing is
    written."""
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "a.json").write_text(text)
    before = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    flags = [f.replace("DIR", str(tmp_path)).replace("TINY", str(tiny)) for f in flags]
    basis = ppo_flags(tiny, tmp_path / "out")
    if flags[0] in ("--stage=sft", "--stage=reward"):
        basis = [f for f in basis if not f.startswith("--reward=")]
    assert re.search(message, one_line(capsys, basis + flags))
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == before


@pytest.mark.parametrize("mine", [ValueError("my half-finished change"), KeyError("name"),
                                  RuntimeError("shape"), AssertionError("mine")])
def test_a_bug_keeps_its_traceback(tiny, tmp_path, monkeypatch, mine):
    """A student's own half-finished change raises what Python raises: where it happened
    is what they need. Only a user's mistake (InputError) and the machine's (OSError) are one
    line."""
    def buggy(*_):
        raise mine

    for place in ("ppo_loss", "learning_rate", "save_policy"):
        with monkeypatch.context() as patch:
            patch.setattr(train, place, buggy)
            with pytest.raises(type(mine)) as error:
                train.main(ppo_flags(tiny, tmp_path / place, steps=1))
        assert error.value is mine and error.traceback[-1].name == "buggy"


@pytest.mark.parametrize("mistake", [InputError("what to do"), OSError("no such disk")])
def test_a_mistake_deep_inside_a_run_is_one_line_too(tiny, tmp_path, monkeypatch, capsys, mistake):
    def refusing(*_):
        raise mistake

    monkeypatch.setattr(train, "ppo_loss", refusing)
    assert str(mistake) in one_line(capsys, ppo_flags(tiny, tmp_path / "run"))


@pytest.mark.parametrize("file, damage, message", [
    ("model.safetensors", lambda data: data[:len(data) // 2], "is no safetensors file .*truncated"),
    ("config.json", lambda data: data.replace(b'"hidden_size": 64', b'"hidden_size": 32'),
     "tensor .* has shape .*expected"),
    ("config.json", lambda data: data.replace(b'hidden_layers": 2', b'hidden_layers": 3'),
     "tensor .*layers.2.* is missing"),
    ("config.json", lambda data: data.replace(b'hidden_layers": 2', b'hidden_layers": 1'),
     "tensor .*layers.1.* has no place"),
    ("config.json", lambda data: b"[1]", "config.json holds a list, expected a dict")])
def test_a_damaged_model_is_one_line_in_every_stage(tiny, tmp_path, capsys, file, damage, message):
    """Truncated, of another width, with missing or with extra tensors: the tensor is named, and
    nothing is half loaded."""
    model = tmp_path / "model"
    shutil.copytree(tiny / "sft", model)
    (model / file).write_bytes(damage((model / file).read_bytes()))
    for flags in (stage_flags(tiny, "sft", tmp_path / "sft", model=model),
                  ppo_flags(tiny, tmp_path / "ppo", model=model)):
        assert re.search(message, one_line(capsys, flags))


def test_other_tokenizers_are_refused(tiny, other_tokenizer, tmp_path, capsys):
    """Another one than the model's that fits in size would feed it other words, and train it on
    them; one that is larger has ids without a vector; a reward model that knows other words would
    score a text that nobody has written."""
    out = tmp_path / "run"
    error = one_line(capsys, ppo_flags(tiny, out, tokenizer=other_tokenizer))
    assert re.search(r"id \d+ is .* different tokenizers", error)
    shutil.copytree(tiny / "reward", tmp_path / "reward")
    pieces = (tiny / "sft" / "tokenizer.model").read_bytes()
    pieces = pieces.replace("\u2581speaks".encode(), "\u2581speakz".encode(), 1)
    (tmp_path / "reward" / "tokenizer.model").write_bytes(pieces)
    error = one_line(capsys, ppo_flags(tiny, out, reward=tmp_path / "reward"))
    assert re.search("id 12 is .*speaks' in .*speakz' in", error)
    small = LlamaConfig(vocab_size=100, dim=32, n_layers=1, n_heads=2, ffn_dim=48)
    save_llama(Llama(small), tmp_path / "small")
    shutil.copy(tiny / "sft" / "tokenizer.model", tmp_path / "small")
    error = one_line(capsys, ppo_flags(tiny, out, model=tmp_path / "small"))
    assert "960 pieces but" in error and "only 100 embeddings" in error


def test_a_model_that_ends_with_an_id_beyond_the_tokenizer_is_refused(tiny, tmp_path, capsys):
    """As chat fine-tunes have it: every answer would run to its limit, be penalised for
    it, and the run look healthy. A mere mismatch within the vocabulary (old LLaMA configs say 1,
    and mean nothing by it) is no reason to refuse."""
    shutil.copytree(tiny / "sft", tmp_path / "sft")
    flags = ppo_flags(tiny, tmp_path / "run", model=tmp_path / "sft", steps=1)
    for said in (960, [2, 960]):
        (tmp_path / "sft" / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
        assert re.search("ends its answers with id 960.*960 pieces", one_line(capsys, flags))
    (tmp_path / "sft" / "generation_config.json").write_text('{"eos_token_id": 1}')
    train.main(flags)


def test_a_reward_model_with_fewer_positions_than_the_policy_sets_the_limit(tiny, tmp_path, capsys):
    """It reads prompt and response, as the critic does."""
    shutil.copytree(tiny / "reward", tmp_path / "reward")
    config = tmp_path / "reward" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 64}))
    flags = ppo_flags(tiny, tmp_path / "out", reward=tmp_path / "reward", steps=1)
    assert "72 tokens" in one_line(capsys, flags) and not (tmp_path / "out").exists()
    train.main([*flags, "--response_len=4"])


def test_rows_that_are_cut_or_left_out_are_counted_aloud(tiny, tmp_path, capsys):
    """Of the test file as of the training file: an accuracy over half the pairs would be
    another number, and so would a win rate over half the questions."""
    files = {"pairs": [PAIR, PAIR | {"output_2": "Me."}, PAIR | {"output_2": "Me. " * 40}],
             "test": [PAIR, PAIR, PAIR | {"output_1": "You."}],
             "sft": [ROW, ROW | {"output": "Me. " * 40}, LONG], "prompts": [ROW, LONG, LONG],
             "eval": [ROW, ROW | {"output": "Me. " * 60}, LONG]}
    path = {name: tmp_path / f"{name}.json" for name in files}
    for name, rows in files.items():
        path[name].write_text(json.dumps(rows))
    for flags in (
            stage_flags(tiny, "sft", tmp_path / "a", sft_data=path["sft"], steps=1),
            stage_flags(tiny, "reward", tmp_path / "b", preference_data=path["pairs"],
                        preference_test=path["test"], steps=1),
            ppo_flags(tiny, tmp_path / "c", prompts=path["prompts"], eval_data=path["eval"],
                      eval_drop_long=True, steps=1)):
        train.read_inputs(command := train.parse(flags), command.stage)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    said = [("sft", 1, "lose their tail"), ("sft", 1, "left out"), ("pairs", 1, "loses its tail"),
            ("pairs", 1, "left out"), ("test", 1, "left out"), ("eval", 2, "left out"),
            ("prompts", 2, "dropped")]
    assert len(notes) == len(said)
    for name, n, what in said:
        about = [note for note in notes if str(path[name]) in note and what in note]
        assert len(about) == 1 and about[0].startswith(f"note: {n} "), (name, what, notes)


def test_what_the_terminal_cannot_show_does_not_end_a_run(tiny, whole_run, tmp_path, monkeypatch):
    """A Windows console without UTF-8 (cp1252): a path or an answer with letters that it lacks is
    printed with escapes, where Python's default would end the run."""
    folder = tmp_path / "\u03a9\u0142"
    shutil.copytree(whole_run, folder)
    screen = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", screen)
    train.main(ppo_flags(tiny, folder))
    screen.flush()
    assert b"ppo: finished, in" in screen.buffer.getvalue()
    assert rb"\u03a9\u0142" in screen.buffer.getvalue()
