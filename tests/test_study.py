"""The studies' plans: every variant is a run that train.py accepts and that no other variant
repeats; that a study runs, is resumed and skips what is done; and the statistics of the
frontier."""
import json
import math
import random
import re
from types import SimpleNamespace

import pytest

import train
from conftest import ROOT
from eval import read_json
from toy import best_of_n, frontier, study


def arguments(which, **more):
    return SimpleNamespace(**dict(study=which, seeds=None, only=None, base_steps=0, more="",
                                  parallel=2, out="runs/none_such",
                                  data="runs/none_such/data.jsonl") | more)


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """Outcomes of the grid of learning rates and coefficients, all alike."""
    rows = [{"variant": job.variant.name, "seed": job.seeds[-1],
             "ppo": {"win_reference": [0.5, 0.0]}} for job in study.rates()]
    (tmp_path / "toy").mkdir()
    path = tmp_path / "toy" / "rates.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(study, "ROOT", tmp_path)
    return path, rows


@pytest.mark.parametrize("which", study.STUDIES)
def test_no_two_variants_are_the_same_run(which, grid):
    """Each variant's flags are ones that train.py takes, and differ from each other in effect, not
    only in spelling: a sweep over rank that repeats the default would be counted twice. (Where
    spread comes from is measured by runs that differ in a seed or in their processes alone.)"""
    args, plan, found = arguments(which), study.STUDIES[which](), set()
    variants = {job.variant.name: job for job in reversed(plan)}        # (each with its first seed)
    for job in variants.values():
        config = train.parse(job.flags(args)).configs["ppo"]
        assert config.eval_temperature == 1.0       # KL and answers are of one distribution
        alike = repr(config).replace(str(job.folder(args)), "").replace(f"={job.seeds[-1]},", "=,")
        found.add((alike, job.seeds, job.variant.processes))
    assert len(found) == len(variants)
    assert len({job.slug for job in plan}) == len(plan)


def test_the_plans(grid):
    """Stopped at any time, a study has compared what it has run: seed by seed, the SFT and the
    reward model of a seed before what starts from them. The seeds are those that were
    announced."""
    plans = {which: study.jobs(arguments(which), []) for which in study.STUDIES}
    runs = {which: [job for job in plan if job.stage == "ppo"] for which, plan in plans.items()}
    assert {which: (len(runs[which]), len(plans[which])) for which in runs} == {
        "frontier": (180, 192), "rates": (48, 52), "need": (64, 112), "ranks": (66, 78),
        "context": (39, 55)}
    for which in ("frontier", "rates", "need", "ranks"):
        plan = plans[which]
        seeds = [job.seeds[-1] for job in plan if "further" not in job.slug]
        assert seeds == sorted(seeds) and all(len(set(job.seeds)) == 1 for job in plan)
    for plan in plans.values():
        assert all(job.needs() in (None, *plan[:i]) for i, job in enumerate(plan))
    seeds = {which: {job.seeds[-1] for job in plan} for which, plan in plans.items()}
    assert seeds["rates"] == {90, 91}
    assert seeds["frontier"] == seeds["ranks"] == set(range(10, 16))
    assert seeds["need"] == set(range(10, 34))
    lora = [job for job in runs["need"] if "LoRA" in job.variant.name]
    assert len(lora) == 48 and len({job.seeds for job in lora}) == 24
    # where spread comes from: one thing at a time is another than in the run with all seeds 10
    for job in runs["context"][-15:]:
        changed = sum(seed != 10 for seed in job.seeds) + (job.variant.processes > 1)
        assert changed == 1


def test_the_settings_of_question_two_are_the_best_of_their_grid(grid):
    """The mean over both seeds counts, ties go to the smaller, and each cell chooses for itself;
    nothing is chosen from half a grid."""
    path, rows = grid
    assert study.chosen("LoRA without").split()[-2:] == ["--lr", "1e-3"]
    wins = {("LoRA with KL (lr 2e-3), 0.1", 90): 0.9, ("LoRA with KL (lr 2e-3), 0.1", 91): 0.4,
            ("LoRA with KL (lr 4e-3), 0.2", 90): 0.7, ("LoRA with KL (lr 4e-3), 0.2", 91): 0.7,
            ("LoRA without (lr 4e-3)", 90): 0.6, ("LoRA without (lr 1e-3)", 91): 0.6}
    for row in rows:
        row["ppo"]["win_reference"][0] = wins.get((row["variant"], row["seed"]), 0.5)
    path.write_text("\n".join(map(json.dumps, rows)))
    assert study.chosen("LoRA with KL") == "--regularizer kl --lr 4e-3 --kl_coef 0.2"
    assert study.chosen("LoRA without") == "--regularizer none --lr 1e-3"
    assert study.chosen("all weights with KL").endswith("--lr 1.5e-4 --kl_coef 0.05")
    path.write_text("\n".join(map(json.dumps, rows[:-1])))
    with pytest.raises(study.InputError, match="whole grid"):
        study.chosen("all weights without")


def test_the_committed_outcomes_are_those_of_the_plan(capsys):
    """`python toy/study.py frontier` in a fresh clone finds nothing to do: no variant is without
    its runs, and each was made with the flags that stand in PENALTIES. What there is of the others
    was made with their flags."""
    assert study.main(["frontier", "--dry_run"]) == 0
    assert "180 trainings, 180 of them done" in capsys.readouterr().out
    for which in study.STUDIES:
        assert study.main([which, "--dry_run"]) == 0
    with pytest.raises(SystemExit):
        study.main(["context", "--only=k1"])
    assert "--only k1: the variants are none, clamped_kl" in capsys.readouterr().err


def test_the_study_runs_is_resumed_and_skips_what_is_done(tmp_path, monkeypatch, capsys):
    """One variant, cut down to a step of everything: SFT, reward model, PPO, outcome. The outcome
    alone is enough to skip all of it, on another machine say; without it the finished run folder is
    read, not run again. Other outcomes in the file stay as they are."""
    rows = json.loads((ROOT / "toy" / "test.json").read_text())[:4]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = tmp_path / "data" / "context.jsonl"
    more = f"--steps 1 --rollout_batch 8 --minibatch 8 --eval_data {tmp_path}/rows.json"
    args = ["context", "--seeds=10", "--only=none", "--base_steps=1", f"--out={tmp_path / 'runs'}",
            f"--data={data}"]

    def start(*words, more=more):
        return study.main([*args, f"--more={more}", *words]), capsys.readouterr().out

    _, plan = start("--dry_run")
    assert plan.count("train.py --stage") == 3
    base, folder = tmp_path / "runs" / "seed10", tmp_path / "runs" / "none_seed10"
    assert f"cp -r {base}/sft {base}/reward {folder} && " in plan
    assert not (tmp_path / "runs").exists()
    status, out = start()
    assert status == 0 and out.count(" done in ") == 3, out
    line = data.read_text()
    found, records = json.loads(line), read_json(folder / "ppo" / "eval.json")["records"]
    assert (found["variant"], found["seed"]) == ("none", 10)
    for name, system in (("sft", "before"), ("ppo", "after")):      # a mean of what was answered
        tokens = [record[system]["tokens"] for record in records]
        assert found[name]["tokens"][0] == pytest.approx(sum(tokens) / 4, abs=1e-5)
    status, out = start()
    assert status == 0 and "1 trainings, 1 of them done" in out
    with pytest.raises(SystemExit) as stop:
        start(more=f"{more} --lr 1e-3")
    assert stop.value.code == 2 and "(now '--steps 48" in capsys.readouterr().err
    other = json.dumps(found | {"variant": "bregman"}) + "\n"
    data.write_text(other)
    log = folder / "log.txt"
    log.write_text("")
    assert start()[0] == 0 and data.read_text() == other + line
    assert "ppo: finished" in log.read_text() and "step " not in log.read_text()
    # best-of-n from the same models: its score never falls with n, and one answer is SFT's own
    monkeypatch.setattr(best_of_n, "LARGEST", 5)
    lines = list(best_of_n.best_of_n(folder / "ppo", 10, tmp_path / "rows.json"))
    assert [line["variant"] for line in lines] == ["best of n, 1", "best of n, 2", "best of n, 4"]
    scores = [line["ppo"]["score"][0] for line in lines]
    assert scores == sorted(scores) and scores[0] < scores[-1]
    kl = [line["ppo"]["kl_per_sequence"][0] for line in lines]
    assert kl == pytest.approx([0, 0.19315, 0.63629], abs=1e-5)             # log n - (n - 1) / n


def test_a_failed_training_is_named_and_the_study_goes_on(tmp_path, monkeypatch, capsys):
    """A variant that blows up must not cost the others; one whose SFT failed is not tried. The exit
    status says so. And nothing begins before what it needs is done."""
    def run(job, args, busy):
        name = job.variant.name if job.variant else None
        assert job.needs() is None or job.needs() in ended
        tried.append((job.seeds[-1], job.stage, name))
        ended.append(job)
        return not (job.seeds == (11,) or name == "none")

    tried, kept, ended = [], [], []
    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "keep",
                        lambda job, args: kept.append((job.seeds[-1], job.variant.name)))
    args = ["context", "--seeds", "10", "11", "--only=bregman", "--only=none", f"--out={tmp_path}",
            f"--data={tmp_path / 'context.jsonl'}"]
    assert study.main(args) == 1
    assert kept == [(10, "bregman")] and (11, "ppo", "bregman") not in tried
    out = capsys.readouterr().out
    assert "none_seed10" in out and "FAILED, see" in out and out.count("skipped") == 3


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


def test_wilsons_interval():
    """By hand, 0 of 8: from 0 to z^2 / (8 + z^2); 4 of 8: 1/2 +- z sqrt(8 / 4 + z^2 / 4) / (8 +
    z^2), which is 21.5 to 78.5 %."""
    assert frontier.wilson(0, 8) == pytest.approx((0, 3.8416 / 11.8416), abs=1e-9)
    assert frontier.wilson(4, 8) == pytest.approx((0.2152, 0.7848), abs=1e-4)


def outcome(name, seed, kl, win, **more):
    ends = {"win_reference": win, "win_before": 0.5, "annotator": 3, "score": 1, "tokens": 12,
            "precision_obscure": 1 - kl, "kl_per_token": kl, "kl_per_sequence": 10 * kl} | more
    return {"variant": name, "seed": seed, "sft": {"precision_obscure": [0.9, 0.0]},
            "ppo": {key: [x, 0.0] for key, x in ends.items()}}


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))


def test_penalties_are_compared_where_both_went_equally_far(tmp_path, capsys):
    """Two curves over KL, one 10 points below the other; of two seeds, in one the second penalty
    does not reach .5. At the common coefficient the lower one, which goes further, looks better."""
    kl, paper = "kl in the reward", "paper's jensen_shannon in the reward"
    rows = []
    for seed, most in ((10, 0.9), (11, 0.4)):
        rows += [outcome(f"{kl}, {c}", seed, d, 0.4 + 0.3 * math.sqrt(d))
                 for c, d in ((0.36, 0.1), (0.1, 0.2), (0.03, 0.9))]
        rows += [outcome(f"{paper}, {c}", seed, d, 0.3 + 0.3 * math.sqrt(d))
                 for c, d in ((6.4, 0.1), (2.8, 0.2), (0.1, most))]
    write(tmp_path / "frontier.jsonl", rows)
    found = frontier.load(tmp_path / "frontier.jsonl")
    for distance, seeds in ((0.15, 2), (0.3, 2), (0.5, 1)):
        by_seed = frontier.paired(frontier.at_distance, found, (paper, kl), "win_reference",
                                  distance)
        assert by_seed == pytest.approx([-0.1] * seeds)
    frontier.main([str(tmp_path), f"--out={tmp_path / 'figures'}"])
    out = capsys.readouterr().out
    assert "KL 0.3   interpolated  -10.0%" in out and "n 2 | -10.0% -10.0%" in out
    assert "reward minus kl in the reward: +" not in out.split("At a common coefficient")[0]
    assert "At a common coefficient" in out and out.count("not made") == 3
    # made-up precision is 1 - KL: .9 at KL .1, as SFT's, and .8 at .2. The roots of .1, .15 and .2
    # are .3162, .3873 and .4472: .0711 / .1310 of the way down
    assert "KL 0.15 minus SFT: -5.4% (" in out
    with pytest.raises(SystemExit):
        frontier.main([str(tmp_path / "none_such")])
    assert "none_such has no frontier.jsonl" in capsys.readouterr().err


def complete_outcomes(lower, none, precision, noise):
    """Made-up outcomes of every planned run. lower: of the paper's Jensen-Shannon, at equal KL;
    none: of no penalty; precision: of LoRA minus all weights."""
    rows, rng = {}, random.Random(0)
    for which in ("frontier", "need", "ranks", "context", "rates"):
        rows[which] = []
        for job in study.STUDIES[which]():
            name, seed = job.variant.name, job.seeds[-1]
            strength = float(name.rpartition(", ")[2]) if which in ("frontier", "ranks") else 1
            if "jensen_shannon" in name:
                strength /= 10
            kl = 0.03 / strength if which != "need" else 0.4
            win = 0.5 + rng.gauss(0, noise) - lower * ("paper" in name) + none * ("without" in name)
            true = 1 - kl / 2 - precision * ("all weights" in name)
            rows[which].append(outcome(name, seed, kl, win, win_before=0.6 - 0.2 * (seed < 13),
                                       precision_obscure=true + rng.gauss(0, noise)))
    return rows


@pytest.mark.parametrize("effects, verdicts", [
    ((0.1, -0.05, 0.1, 0.003), ("only weaker", "needed", "saves")),
    ((-0.1, 0.05, -0.1, 0.003), ("better", "not needed", "does not save")),
    ((0.0, 0.0, 0.0, 0.4), ("undecided", "undecided", "undecided"))])
def test_the_three_tests_decide_as_announced(grid, tmp_path, capsys, effects, verdicts):
    """toy/README.md, written before the runs. With all runs there is a verdict, adjusted for three
    tests; with one missing, its test is not made."""
    rows = complete_outcomes(*effects)
    for which in rows:
        write(tmp_path / f"{which}.jsonl", rows[which])
    write(tmp_path / "best_of_n.jsonl", [outcome(f"best of n, {n}", seed, n / 100, 0.5)
                                         for n in (1, 4, 64) for seed in (10, 11, 12)])
    frontier.main([str(tmp_path), f"--out={tmp_path / 'figures'}"])
    out = capsys.readouterr().out
    tests = out.split("\n\n")[0].splitlines()[1:]
    assert [line[0] for line in tests] == ["A", "B", "C"]
    for line, verdict in zip(tests, verdicts):
        assert line.endswith(f": {verdict}"), line
    assert "n 24" in tests[1] and "n 6" in tests[0]
    assert "LoRA with KL: 3 of 24 collapsed (4% to 31%)" in out
    assert re.search(r"none minus kl in the reward: .*, n 3\n", out)
    assert re.search(r"PPO's seed +5 ", out) and re.search(r"processes +4 ", out)
    assert "best of n, 64" in out and "LoRA without (lr 2e-3)" in out
    write(tmp_path / "need.jsonl", rows["need"][1:])
    frontier.main([str(tmp_path), f"--out={tmp_path / 'figures'}"])
    tests = capsys.readouterr().out.split("\n\n")[0].splitlines()[1:]
    assert "not made" in tests[1] and "not made" not in tests[0] + tests[2]


def test_equal_at_equal_kl_but_higher_at_a_common_coefficient_is_only_weaker():
    """The registered rule for A: within 5 points at equal KL, more at the paper's comparison."""
    level = {"mean": 0.01, "low": -0.03, "high": 0.04}
    assert frontier.verdict("A", level, 0.5, [0.05, 0.02]) == "only weaker"
    assert frontier.verdict("A", level, 0.5, [-0.05, 0.02]) == "undecided"
    assert frontier.verdict("A", level | {"high": 0.06}, 0.5, [0.05]) == "undecided"


def test_what_the_readme_says_of_the_frontier_is_what_the_program_prints():
    """Each percentage behind "What came out" in toy/README.md, and before the paper's own numbers
    each decimal, is one of `python toy/frontier.py`, a loss ("less by 9.9%") without its sign."""
    decimal = re.compile(r"[+-]?\d+\.\d+%?")
    readme = (ROOT / "toy" / "README.md").read_text().split("## What came out")[1]
    outcomes, claims = readme.split("### The paper's claims")
    said = decimal.findall(outcomes) + [n for n in decimal.findall(claims) if n.endswith("%")]
    printed = decimal.findall(frontier.report(frontier.load_all(ROOT / "toy")))
    unsigned = [number.lstrip("+-") for number in printed]
    assert len(said) > 100 and set(said) <= {*printed, *unsigned}
