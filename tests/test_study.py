"""The study's plan: every variant is a run that train.py accepts and that no other variant repeats,
within two hours; and that it runs, is resumed and skips what is done."""
import json
from types import SimpleNamespace

import pytest

import train
from conftest import ROOT
from toy import study

ARGS = SimpleNamespace(seeds=3, only=None, steps=48, eval_every=12, base_steps=0, eval_data=None,
                       processes=2, out="runs/none_such", data="runs/none_such/data.jsonl")


def test_no_two_variants_are_the_same_run():
    """Each variant's flags are ones that train.py takes, and differ from the default run and from
    each other in effect, not only in spelling: a sweep over rank that repeats the default would be
    counted twice. "kl" is the default run."""
    jobs = [study.Job(0, "ppo", variant) for variant in study.VARIANTS]
    configs = [train.parse(job.flags(ARGS)).configs["ppo"] for job in jobs]
    folder = str(jobs[0].folder(ARGS))
    alike = [repr(config).replace(str(job.folder(ARGS)), folder)
             for config, job in zip(configs, jobs)]
    assert len(set(alike)) == len(study.VARIANTS)
    assert len({job.slug for job in jobs}) == len(study.VARIANTS)
    default = train.parse(["--stage=ppo", f"--out={folder}", "--steps=48", "--eval_every=12"])
    assert configs[0] == default.configs["ppo"]


def test_seed_0_comes_first_and_sweeps_have_one_seed():
    """Stopped at any time, the study has compared what it has run. 13 variants of three seeds, 8 of
    one: 47 PPO runs, three SFT and three reward models; about two hours at most."""
    order = study.jobs(ARGS, [])
    assert [job.seed for job in order] == sorted(job.seed for job in order)
    assert sum(job.stage == "ppo" for job in order) == 47 and len(order) == 53
    assert all(job.seed == 0 for job in order if job.variant in study.SWEEPS)
    assert [job.stage for job in order if job.seed == 1][:3] == ["sft", "reward", "ppo"]
    assert sum(job.seconds(ARGS) for job in order) < 2 * 3600


def test_the_committed_outcomes_are_those_of_the_plan(capsys):
    """`python toy/study.py` in a fresh clone finds nothing to do: no variant is without its runs,
    and each was made with the flags that stand in VARIANTS."""
    assert study.main(["--dry_run"]) == 0
    assert "47 trainings, 47 of them done" in capsys.readouterr().out
    assert study.main(["--dry_run", "--seeds=4", "--only=kl", "--only=rank 1"]) == 0
    todo = capsys.readouterr().out.splitlines()[1:]
    assert len(todo) == 3 and all("--seed 3" in line for line in todo)


def test_the_study_runs_is_resumed_and_skips_what_is_done(tmp_path, monkeypatch, capsys):
    """One variant, cut down to a step of everything: SFT, reward model, PPO, outcome. The
    outcome alone is enough to skip all of it, on another machine say; without it the finished run
    folder is read, not run again. Other outcomes in the file stay as they are."""
    # two threads of so small a model wait for each other, on a busy machine long
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = json.loads((ROOT / "toy" / "test.json").read_text())[:4]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = tmp_path / "data" / "study.jsonl"
    args = ["--seeds=1", "--only=kl", "--steps=1", "--eval_every=1", "--base_steps=1",
            f"--eval_data={tmp_path / 'rows.json'}", "--processes=1", f"--out={tmp_path / 'runs'}",
            f"--data={data}"]

    def start(*more):
        return study.main([*args, *more]), capsys.readouterr().out

    _, plan = start("--dry_run")
    assert plan.count("train.py --stage") == 3
    assert f"cp -r {tmp_path}/runs/seed0 {tmp_path}/runs/kl_seed0" in plan
    assert not (tmp_path / "runs").exists()
    status, out = start()
    assert status == 0 and out.count(" done in ") == 3, out
    line = data.read_text()
    found = json.loads(line)
    assert found["variant"] == "kl" and [row["step"] for row in found["curve"]] == [0, 1]
    status, out = start()
    assert status == 0 and "1 trainings, 1 of them done" in out
    with pytest.raises(SystemExit) as stop:
        start("--steps=3")
    assert stop.value.code == 2 and "with '--steps 1" in capsys.readouterr().err
    other = json.dumps(found | {"variant": "none"}) + "\n"
    data.write_text(other)
    log = tmp_path / "runs" / "kl_seed0" / "log.txt"
    log.write_text("")
    assert start()[0] == 0 and data.read_text() == other + line
    assert "ppo: finished" in log.read_text() and "step " not in log.read_text()


def test_a_failed_training_is_named_and_the_study_goes_on(tmp_path, monkeypatch, capsys):
    """A variant that blows up must not cost the others; one whose SFT failed is not tried. The exit
    status says so."""
    def run(job, args):
        name = job.variant.name if job.variant else None
        tried.append((job.seed, job.stage, name))
        return not (job.seed == 1 and job.stage == "sft" or name == "none")

    tried, kept = [], []
    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "keep", lambda job, args: kept.append((job.seed, job.variant.name)))
    args = ["--seeds=2", "--only=kl", "--only=none", f"--out={tmp_path}",
            f"--data={tmp_path / 'study.jsonl'}"]
    assert study.main(args) == 1
    assert kept == [(0, "kl")] and (1, "ppo", "kl") not in tried
    out = capsys.readouterr().out
    assert "none_seed0" in out and "FAILED, see" in out and out.count("skipped") == 2
