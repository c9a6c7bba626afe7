"""The studies' plans: every variant is a run that train.py accepts and that no other variant
repeats; that a study runs, is resumed and skips what is done; and the statistics of the
frontier."""
import json
import math
import random
from types import SimpleNamespace

import pytest

import train
from conftest import ROOT
from eval import read_json
from toy import frontier, study


def arguments(which, **more):
    return SimpleNamespace(**dict(study=which, seeds=0, only=None, base_steps=0, more="",
                                  processes=1, parallel=2, out="runs/none_such",
                                  data="runs/none_such/data.jsonl") | more)


@pytest.mark.parametrize("which", study.STUDIES)
def test_no_two_variants_are_the_same_run(which):
    """Each variant's flags are ones that train.py takes, and differ from each other in effect, not
    only in spelling: a sweep over rank that repeats the default would be counted twice."""
    args, variants = arguments(which), study.STUDIES[which].variants
    jobs = [study.Job(0, "ppo", variant) for variant in variants]
    configs = [train.parse(job.flags(args)).configs["ppo"] for job in jobs]
    folder = str(jobs[0].folder(args))
    alike = [repr(config).replace(str(job.folder(args)), folder)
             for config, job in zip(configs, jobs)]
    assert len(set(alike)) == len({job.slug for job in jobs}) == len(variants)
    if which == "paper":                                            # "kl" is the default run
        default = train.parse(["--stage=ppo", f"--out={folder}", "--steps=48", "--eval_every=12"])
        assert configs[0] == default.configs["ppo"]
    else:                                              # KL and answers are of one distribution
        assert {config.eval_temperature for config in configs} == {1.0}


def test_seed_by_seed_and_sweeps_have_one_seed():
    """Stopped at any time, a study has compared what it has run. The paper's: 13 variants of three
    seeds, 8 of one. The frontier's: 30 runs of six seeds that no setting was chosen with."""
    args = arguments("paper")
    order = study.jobs(args, [])
    assert [job.seed for job in order] == sorted(job.seed for job in order)
    assert sum(job.stage == "ppo" for job in order) == 47 and len(order) == 53
    assert all(job.seed == 0 for job in order if job.variant in study.SWEEPS)
    assert [job.stage for job in order if job.seed == 1][:3] == ["sft", "reward", "ppo"]
    order = study.jobs(arguments("frontier"), [])
    assert sorted({job.seed for job in order}) == [10, 11, 12, 13, 14, 15]
    assert len(order) == 6 * (30 + 2)


def test_the_committed_outcomes_are_those_of_the_plan(capsys):
    """`python toy/study.py` in a fresh clone finds nothing to do: no variant is without its runs,
    and each was made with the flags that stand in VARIANTS. What there is of the frontier was made
    with its flags."""
    assert study.main(["--dry_run"]) == 0
    assert "47 trainings, 47 of them done" in capsys.readouterr().out
    assert study.main(["--dry_run", "--seeds=4", "--only=kl", "--only=rank 1"]) == 0
    todo = capsys.readouterr().out.splitlines()[1:]
    assert len(todo) == 3 and all("--seed 3" in line for line in todo)
    assert study.main(["frontier", "--dry_run"]) == 0
    with pytest.raises(SystemExit):
        study.main(["--only=k1"])
    assert "--only k1: the variants are kl, none" in capsys.readouterr().err


def test_the_study_runs_is_resumed_and_skips_what_is_done(tmp_path, capsys):
    """One variant, cut down to a step of everything: SFT, reward model, PPO, outcome. The outcome
    alone is enough to skip all of it, on another machine say; without it the finished run folder is
    read, not run again. Other outcomes in the file stay as they are."""
    rows = json.loads((ROOT / "toy" / "test.json").read_text())[:4]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = tmp_path / "data" / "study.jsonl"
    more = f"--steps 1 --rollout_batch 8 --minibatch 8 --eval_data {tmp_path}/rows.json"
    args = ["--seeds=1", "--only=kl", "--base_steps=1", f"--out={tmp_path / 'runs'}",
            f"--data={data}"]

    def start(*words, more=more):
        return study.main([*args, f"--more={more}", *words]), capsys.readouterr().out

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
        start(more=f"{more} --lr 1e-3")
    assert stop.value.code == 2 and "(now '--steps 48" in capsys.readouterr().err
    other = json.dumps(found | {"variant": "none"}) + "\n"
    data.write_text(other)
    log = tmp_path / "runs" / "kl_seed0" / "log.txt"
    log.write_text("")
    assert start()[0] == 0 and data.read_text() == other + line
    assert "ppo: finished" in log.read_text() and "step " not in log.read_text()
    # what the frontier keeps of such a run
    job = study.Job(0, "ppo", study.PAPER[0])
    study.keep(job, arguments("frontier", out=tmp_path / "runs", data=tmp_path / "frontier.jsonl"))
    kept = json.loads((tmp_path / "frontier.jsonl").read_text())
    for end, row in (("sft", found["curve"][0]), ("ppo", found["curve"][-1])):
        for key, (value, se) in kept[end].items():
            expected = (row[key]["value"], row[key]["se"])
            assert (value, se) == pytest.approx(expected, abs=1e-5, nan_ok=True)
    records = read_json(tmp_path / "runs" / "kl_seed0" / "ppo" / "eval.json")["records"]
    tokens = [record["after"]["tokens"] for record in records]
    assert kept["ppo"]["tokens"][0] == pytest.approx(sum(tokens) / 4, abs=1e-5)


def test_a_failed_training_is_named_and_the_study_goes_on(tmp_path, monkeypatch, capsys):
    """A variant that blows up must not cost the others; one whose SFT failed is not tried. The exit
    status says so. And nothing begins before what it needs is done."""
    def run(job, args, busy):
        name = job.variant.name if job.variant else None
        assert job.needs() is None or job.needs() in ended
        tried.append((job.seed, job.stage, name))
        ended.append(job)
        return not (job.seed == 1 and job.stage == "sft" or name == "none")

    tried, kept, ended = [], [], []
    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "keep", lambda job, args: kept.append((job.seed, job.variant.name)))
    args = ["--seeds=2", "--only=kl", "--only=none", f"--out={tmp_path}",
            f"--data={tmp_path / 'study.jsonl'}"]
    assert study.main(args) == 1
    assert kept == [(0, "kl")] and (1, "ppo", "kl") not in tried
    out = capsys.readouterr().out
    assert "none_seed0" in out and "FAILED, see" in out and out.count("skipped") == 3


# -------------------------------------------------------------------------------------- statistics

def test_a_curve_is_read_between_its_neighbours_in_the_square_root_of_kl():
    """By hand: from KL .04 (root .2) to .36 (root .6), .16 (root .4) is half way. Outside of its
    points a curve says nothing; a parabola through points of a parabola is that parabola."""
    points = [(0.36, 0.7), (0.04, 0.5), (1.0, 0.6)]
    assert frontier.interpolated(points, 0.16) == pytest.approx(0.6)
    assert frontier.interpolated(points, 0.64) == pytest.approx(0.65)       # root .8: half way
    assert frontier.interpolated(points, 0.04) == pytest.approx(0.5)
    assert frontier.interpolated(points, 0.03) is None
    assert frontier.interpolated(points, 1.1) is None
    arch = [(kl, 0.5 + math.sqrt(kl) - kl) for kl in (0.05, 0.1, 0.3, 0.6)]
    assert frontier.fitted(arch, 0.2) == pytest.approx(0.5 + math.sqrt(0.2) - 0.2)
    assert frontier.fitted(arch, 0.7) is None and frontier.fitted(points, 0.16) is None


def test_students_interval_and_p_value():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t 3.4641 with 2 degrees of freedom;
    the table's 97.5 % quantile is 4.3027, and p, in closed form for 2 degrees, is
    1 - t / sqrt(t^2 + 2) = 1 - sqrt(12 / 14)."""
    s = frontier.student([1.0, 2.0, 3.0])
    assert (s["mean"], s["n"]) == (2.0, 3)
    assert s["high"] - 2 == pytest.approx(4.3027 / math.sqrt(3), rel=1e-3)
    assert s["p"] == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-3)
    assert frontier.p_value(2.5706, 5) == pytest.approx(0.05, rel=1e-3)
    assert frontier.student([1.0]) is None


@pytest.mark.parametrize("seeds", [4, 6, 8])
def test_the_interval_over_seeds_covers_the_truth_19_times_in_20(seeds):
    """4000 simulated studies with this number of seeds. (A percentile bootstrap of so few covers 80
    to 88 %.)"""
    rng, covered = random.Random(seeds), 0
    for _ in range(4000):
        s = frontier.student([rng.gauss(0.03, 0.08) for _ in range(seeds)])
        covered += s["low"] <= 0.03 <= s["high"]
    assert 0.93 <= covered / 4000 <= 0.97


def test_holms_adjustment():
    """By hand: .01 * 3, then .02 * 2, then .04 * 1; no one falls below an earlier one."""
    assert frontier.holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert frontier.holm([0.03, 0.02]) == pytest.approx([0.04, 0.04])
    assert frontier.holm([0.9, 0.6, 0.001]) == pytest.approx([1.0, 1.0, 0.003])


def outcome(penalty, coefficient, seed, kl, win):
    ends = {"win_reference": win, "win_before": 0.5, "annotator": 3, "score": 1, "tokens": 12,
            "precision_obscure": 1 - kl, "kl_per_token": kl}
    return {"variant": f"{penalty}, {coefficient}", "seed": seed,
            "ppo": {key: [value, 0.0] for key, value in ends.items()}}


def test_penalties_are_compared_where_both_went_equally_far(tmp_path, capsys):
    """Two curves over KL, one 10 points below the other; of two seeds, in one the second penalty
    does not reach .5. At the common coefficient the lower one, which goes further, looks better."""
    kl, paper = "kl in the reward", "paper's jensen_shannon in the reward"
    rows = []
    for seed, most in ((10, 0.9), (11, 0.4)):
        rows += [outcome(kl, c, seed, d, 0.4 + 0.3 * math.sqrt(d))
                 for c, d in ((0.36, 0.1), (0.1, 0.2), (0.03, 0.9))]
        rows += [outcome(paper, c, seed, d, 0.3 + 0.3 * math.sqrt(d))
                 for c, d in ((6.4, 0.1), (2.8, 0.2), (0.1, most))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = frontier.load(tmp_path / "rows.jsonl")
    for distance, seeds in ((0.15, 2), (0.3, 2), (0.5, 1)):
        values = [frontier.at_distance(found, p, "win_reference", distance) for p in (paper, kl)]
        assert frontier.paired(*values) == pytest.approx([-0.1] * seeds)
    frontier.main([str(tmp_path / "rows.jsonl"), f"--out={tmp_path / 'figures'}"])
    out = capsys.readouterr().out
    assert "KL 0.3   interpolated  -10.0%" in out and "n 2 | -10.0% -10.0%" in out
    assert "reward minus kl in the reward: +" not in out.split("At a common coefficient")[0]
    common = out.split("At a common coefficient")[1]
    assert "KL 0.650 and 0.200" in common
