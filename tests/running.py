"""What test_train.py and test_runs.py share: a small PPO run, started in every way that a run can
be started, and what it leaves behind.

A child is forked, so that it need not import torch again: it is killed like any process.
"""
import atexit
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import train

ROOT = Path(__file__).resolve().parents[1]
TIMINGS = {"sample_seconds", "score_seconds", "update_seconds"}


def as_flags(settings):
    """{"lr": 1, "whiten_rewards": True} -> ["--lr=1", "--whiten_rewards"]"""
    return [f"--{k}" if value is True else f"--{k}={value}" for k, value in settings.items()]


def ppo_flags(tiny, out, **more):
    """A PPO run on the untrained model: 8 ragged responses of at most 12 tokens per step."""
    return as_flags(dict(
        stage="ppo", model=tiny / "sft", reward=tiny / "reward", out=out,
        prompts=ROOT / "toy" / "unlabeled.json", steps=5, rollout_batch=8, minibatch=4,
        micro_batch=2, response_len=12, prompt_len=60, lr=1e-3, warmup_steps=2, save_every=2,
        dtype="float32", lora_alpha=16) | more)


def stage_flags(tiny, stage, out, **more):
    """Six steps of SFT or of the reward model on ragged micro-batches, with dropout."""
    data = {"sft": {"sft_data": ROOT / "toy" / "sft.json"},
            "reward": {"preference_data": ROOT / "toy" / "preference_val.json"}}[stage]
    return as_flags(dict(
        stage=stage, model=tiny / "sft", out=out, steps=6, batch=6, micro_batch=2, lr=1e-3,
        max_len=100, save_every=2, dtype="float32", lora_dropout=0.1) | data | more)


# --------------------------------------------------------------------------------- ways to start it

def in_child(action, arguments, log, environment):
    """What a forked child does: `action`, its output in a file."""
    with open(log, "a", encoding="utf-8") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))
    os.environ.update(environment)
    action(*arguments)


def fork(action, *arguments, log=os.devnull, **environment):
    """Begin action(*arguments) in a process of its own -> the process (pid, kill(), exitcode)."""
    process = multiprocessing.get_context("fork").Process(
        target=in_child, args=(action, arguments, log, environment))
    process.start()
    atexit.register(process.kill)      # (Python would wait for a child that a failed test has left)
    return process


def ended(process):
    """Wait for a child -> its exit status; -n if signal n has killed it."""
    process.join(60)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("the process does not end")
    return process.exitcode


def run_processes(flags, n, log=os.devnull):
    """train.py by n processes that meet as torchrun's do -> their exit statuses."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(n),
              "LOCAL_WORLD_SIZE": str(n)}
    workers = [fork(train.main, flags, log=log, RANK=str(i), LOCAL_RANK=str(i), **shared)
               for i in range(n)]
    return [ended(worker) for worker in workers]


def torchrun(flags, processes=2):
    """train.py as a user starts it on several GPUs, one thread per process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--local_addr=localhost", f"--nproc_per_node={processes}"]
    return subprocess.Popen([*launcher, str(ROOT / "train.py"), *flags], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def one_line(capsys, flags):
    """What train.py says of a mistake: one line, status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    error = capsys.readouterr().err
    if dist.is_initialized():           # (a child that is forked could not end its parent's group)
        dist.destroy_process_group()
    assert stop.value.code == 2, error
    assert error.startswith("train.py: error: ") and error.count("\n") == 1, error
    return error


# -------------------------------------------------------------------------------- what a run leaves

def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics(folder):
    """The lines of metrics.jsonl without their timings."""
    rows = lines(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def same_run(a, b):
    """Bit for bit: parameters, metrics (timings apart), samples; and nothing else lies there."""
    files = [sorted(p.relative_to(d) for p in d.rglob("*") if p.is_file()) for d in (a, b)]
    assert files[0] == files[1]
    for name in files[0]:
        if name.suffix == ".safetensors" or name.name in ("samples.jsonl", "evals.jsonl"):
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert metrics(a) == metrics(b)


@pytest.fixture(scope="session")
def whole_run(tiny, tmp_path_factory):
    """Five PPO steps by one process, uninterrupted."""
    out = tmp_path_factory.mktemp("whole") / "ppo"
    train.main(ppo_flags(tiny, out))
    return out
