"""Statistics of the evaluation, by hand and by simulation; and that a finished run can be read back."""
import json
import random
import sys

import pytest

import eval as evaluation
import train
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests"))
from test_train import ppo_flags  # noqa: E402


def test_a_draw_is_half_a_win_and_swapping_sides_gives_the_rest():
    """CHECKS 37. Two wins, one draw, one loss of four: (1 + 1 + .5 + 0) / 4 = .625, and .375 the other way round."""
    ours, theirs = [3, 2, 1, 0], [1, 1, 1, 1]
    assert evaluation.win_rate(ours, theirs) == 0.625
    assert evaluation.win_rate(theirs, ours) == 0.375
    with pytest.raises(ValueError):
        evaluation.win_rate([1, 2], [1])                    # answers that are not paired cannot be compared


def test_standard_error_of_a_win_rate_is_the_textbooks():
    """Of 400 prompts, 240 wins: sqrt(.6 * .4 / 400) = .0245. The bootstrap finds it without knowing the formula; its own
    scatter with 1000 resamples is about 2 %, so 10 % is far."""
    result = evaluation.win_rate_with_error([1] * 240 + [0] * 160, [0.5] * 400)
    assert result["value"] == 0.6
    assert result["se"] == pytest.approx(0.0245, rel=0.1)


def test_the_interval_covers_the_truth_19_times_in_20():
    """CHECKS 37. 1000 simulated evaluations of 200 prompts with a true win rate of .55 (draws included): the 95 % interval
    contains it in 93 to 97 % of them."""
    rng, covered = random.Random(0), 0
    for _ in range(1000):
        ours = rng.choices([1, 0, -1], [0.5, 0.1, 0.4], k=200)          # win, draw, loss: .5 + .05 = .55
        result = evaluation.win_rate_with_error(ours, [0] * 200)
        covered += result["low"] <= 0.55 <= result["high"]
    assert 930 <= covered <= 970


def test_prompts_about_one_person_count_as_one_draw():
    """100 persons, 4 prompts each, and each wins all or none of hers: 60 do. That is 100 draws, not 400, and the error is
    sqrt(.6 * .4 / 100) = .0490, twice what 400 independent prompts would have (.0245)."""
    wins, persons = [1] * 240 + [0] * 160, [i // 4 for i in range(400)]
    assert evaluation.win_rate_with_error(wins, [0.5] * 400, persons)["se"] == pytest.approx(0.0490, rel=0.1)
    assert evaluation.win_rate_with_error(wins, [0.5] * 400, persons)["value"] == 0.6


def test_the_interval_over_persons_covers_the_truth_19_times_in_20():
    """CHECKS 37, where answers about one person err together: each of 60 persons wins her 4 prompts with probability .25 or
    .85, true mean .55. Resampling prompts as if they were independent would cover it in 85 % only."""
    rng, covered, persons = random.Random(0), 0, [i // 4 for i in range(240)]
    for _ in range(1000):
        chances = [p for p in rng.choices([0.25, 0.85], k=60) for _ in range(4)]
        result = evaluation.win_rate_with_error([float(rng.random() < p) for p in chances], [0.5] * 240, persons)
        covered += result["low"] <= 0.55 <= result["high"]
    assert 930 <= covered <= 970


def test_win_rate_at_equal_length_is_the_logistic_fit_at_difference_zero():
    """Of 100 answers that are 5 tokens longer 90 win, of 100 that are 5 shorter 50. Two groups, two parameters: the fit goes
    through logit(.9) = log 9 and logit(.5) = 0, half-way at length 0 is log 3, and sigmoid(log 3) = 3/4: the plain win
    rate, .70, said less than it should. Error by the delta method: .75 * .25 * sqrt(1/(100*.09) + 1/(100*.25)) / 2 = .0364.
    1e-3: the weak prior that keeps the fit finite."""
    ours, lengths = [1] * 90 + [0] * 10 + [1] * 50 + [0] * 50, [15] * 100 + [5] * 100
    result = evaluation.win_rate_at_equal_length(ours, [0.5] * 200, lengths, [10] * 200)
    assert result["value"] == pytest.approx(0.75, abs=1e-3)
    assert result["se"] == pytest.approx(0.0364, rel=0.1) and result["low"] < 0.70 < result["high"]
    swapped = evaluation.win_rate_at_equal_length([0.5] * 200, ours, [10] * 200, lengths)
    assert swapped["value"] == pytest.approx(0.25, abs=1e-3)


def test_where_length_decides_everything_equal_length_is_a_draw():
    """The longer answer wins each time: the slope would be infinite without its prior, and nothing is known of quality."""
    lengths = [11, 12, 13, 9, 8, 7] * 10
    result = evaluation.win_rate_at_equal_length([float(n > 10) for n in lengths], [0.5] * 60, lengths, [10] * 60)
    assert result["value"] == pytest.approx(0.5, abs=1e-6) and 0.2 < result["low"] < result["high"] < 0.8
    assert 0.99 < evaluation.win_rate_at_equal_length([1.0] * 60, [0.5] * 60, [10] * 60, [10] * 60)["value"] < 1


def test_a_mean_over_seeds_holds_the_spread_of_prompts_and_of_seeds():
    """Win rates .5, .6, .7 with errors .03, .04, .05. Between seeds .01 / 3, prompts (.0009 + .0016 + .0025) / 3 (they are the
    same for every seed, so three seeds do not make them fewer): sqrt(.003333 + .001667) = .0707. Satterthwaite: 2 * (.005 /
    .003333)^2 = 4.5 degrees of freedom, and Student's quantile is between that of 5 (2.571) and of 4 (2.776)."""
    result = evaluation.over_seeds([{"value": v, "se": e} for v, e in ((0.5, 0.03), (0.6, 0.04), (0.7, 0.05))])
    assert (result["value"], result["seeds"]) == (pytest.approx(0.6), 3)
    assert result["se"] == pytest.approx(0.005 ** 0.5)
    assert 2.571 < (result["high"] - 0.6) / result["se"] < 2.776
    one = evaluation.over_seeds([{"value": 0.6, "se": 0.04}])
    assert (one["se"], one["seeds"]) == (pytest.approx(0.04), 1) and one["high"] == pytest.approx(0.6 + 1.96 * 0.04)


def test_intervals_over_three_seeds_cover_the_truth():
    """Seeds scatter by .05, prompts (shared by the seeds) by .03. Two degrees of freedom are few: 1.96 standard errors of the
    seeds alone would cover 71 %. Here 93 to 98 % of 1000: Satterthwaite's degrees are themselves an estimate."""
    rng, covered = random.Random(0), 0
    for _ in range(1000):
        prompts = rng.gauss(0, 0.03)
        result = evaluation.over_seeds([{"value": 0.6 + prompts + rng.gauss(0, 0.05), "se": 0.03} for _ in range(3)])
        covered += result["low"] <= 0.6 <= result["high"]
    assert 930 <= covered <= 980


@pytest.mark.parametrize("df, quantile", [(1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (60, 2.000), (1e9, 1.960)])
def test_students_quantile_is_the_tables(df, quantile):
    """97.5 % points as any table of Student's t prints them."""
    assert evaluation.student_quantile(df) == pytest.approx(quantile, abs=1e-3)


def variant(seed, wins, **more):
    """A hand-made outcome: two evaluations, three persons."""
    rate = sum(w for _, w, _ in wins.values()) / sum(n for n, _, _ in wins.values())
    number = lambda value: {"value": value, "se": 0.02}
    row = lambda step, kl, value: {"step": step, "kl_per_token": number(kl), "score": number(1.0), "win_reference": number(value)}
    return {"seed": seed, "settings": {"regularizer": "kl", "seed": seed}, "wins": wins, "reference": {},
            "curve": [row(0, 0.0, 0.25), row(10, 0.5, rate)],
            "training": {key: [1, 2] for key in ("step", *dict(evaluation.TRAINING))}} | more


def test_variants_are_compared_prompt_by_prompt():
    """Wins of a: 4 of 4 and 1 of 2, of b: 3 of 4 and .5 of 2. In both groups a wins a quarter more: 5/6 - 3.5/6 = .25, and
    since the groups agree the error is 0, though each win rate alone has a large one. Seeds without a partner say nothing."""
    a, b = variant(0, {"x": [4, 4, 0], "y": [2, 1, 0]}), variant(0, {"x": [4, 3, 0], "y": [2, 0.5, 0]})
    result = evaluation.difference([a], [b], 1)
    assert result["value"] == pytest.approx(0.25) and result["se"] == pytest.approx(0, abs=1e-9)
    assert evaluation.difference([a], [b | {"seed": 1}], 1) is None


def test_study_data_become_a_table_and_figures(tmp_path, monkeypatch, capsys):
    """Files as toy/study.py writes them. Without matplotlib the same numbers are printed: (.5 + .7) / 2 = .6 for variant a
    at step 10, with two seeds; and a row per variant in the table."""
    for name, seed, won in (("a", 0, 0.5), ("a", 1, 0.7), ("b", 0, 0.4)):
        wins = {"x": [10, 10 * won, 0], "y": [10, 10 * won, 0]}
        (tmp_path / f"{name}{seed}.json").write_text(json.dumps(variant(seed, wins, variant=name)))
    evaluation.main(["table", str(tmp_path), "--base", "b"])
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[3:]}
    assert rows["a"][1:3] == ["2", "60.0%"] and rows["b"][1:3] == ["1", "40.0%"]
    assert rows["a"][-2] == "+10.0%"                                            # (seed 0 alone has a partner)
    monkeypatch.setitem(sys.modules, "matplotlib", None)                        # import matplotlib: ImportError
    evaluation.main(["figures", str(tmp_path), "--out", str(tmp_path / "figures")])
    out = capsys.readouterr().out
    assert [float(x) for x in next(l for l in out.splitlines() if l.split()[:2] == ["a", "10.000"]).split()[1:3]] == [10, 0.6]
    assert not (tmp_path / "figures").exists()
    assert "Win rate over training" in out and "Factual precision" not in out        # these data say nothing about facts


def test_figures_are_drawn_where_matplotlib_is(tmp_path):
    """Three of the four, since these data say nothing about facts, and the training curves."""
    pytest.importorskip("matplotlib")
    (tmp_path / "a.json").write_text(json.dumps(variant(0, {"x": [10, 5, 5]})))
    evaluation.main(["figures", str(tmp_path / "a.json"), "--out", str(tmp_path / "out")])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"win_steps.png", "win_kl.png", "training.png"}


def test_an_outcome_holds_the_curve_of_a_run(tiny, tmp_path, one_process):
    """Evaluated every 2 of 3 steps and at the end: SFT is step 0. The answers before training are made once and taken over;
    they are what the finished run, read back from its files, says with its adapter off."""
    rows = json.loads((ROOT / "toy" / "test.json").read_text())[:6]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    cfg = train.parse(ppo_flags(tiny, tmp_path / "ppo", steps=5, lr=1e-2, eval_every=2, eval_data=tmp_path / "rows.json"))
    run, inputs = train.Run(cfg, "ppo"), train.load_inputs(cfg, ["ppo", "eval"])
    train.ppo(run, inputs, one_process, train.Stopper())
    train.final_evaluation(run, inputs, one_process)
    found = evaluation.outcome(run.folder)
    assert [row["step"] for row in found["curve"]] == [0, 2, 4, 5]
    assert found["curve"][0]["kl_per_token"]["value"] == 0 < found["curve"][3]["kl_per_token"]["value"]
    assert found["training"]["step"] == [1, 5] and sum(n for n, _, _ in found["wins"].values()) == 6
    evals = [json.loads(line) for line in (run.folder / "evals.jsonl").read_text().splitlines()]
    last = evaluation.summarise(json.loads((run.folder / "eval.json").read_text())["records"])
    text = lambda summary: json.dumps({k: summary[k] for k in ("reference", "before")}, sort_keys=True)
    assert text(evals[0]) == text(evals[1]) == text(last)
    assert evals[1]["after"]["score"]["value"] != evals[0]["after"]["score"]["value"]


def test_precision_pools_facts_and_says_when_there_are_none():
    """Three answers with 1 of 1, 1 of 3 and 0 of 0 true facts: 2 of 4, not the mean of 1, 1/3 and nothing."""
    assert evaluation.ratio_with_error([(1, 1), (1, 3), (0, 0)])["value"] == 0.5
    nothing = evaluation.ratio_with_error([(0, 0)])["value"]
    assert nothing != nothing


def test_accuracy_of_a_reward_model_counts_ties_as_half_and_splits_by_flaw():
    """Beside it stands what the rule "the longer one wins" would get: here 1 of 3 (a tie is half)."""
    rows = [dict(chosen=2.0, rejected=1.0, chosen_tokens=5, rejected_tokens=9, flaw="short"),
            dict(chosen=1.0, rejected=1.0, chosen_tokens=4, rejected_tokens=4, flaw="short"),
            dict(chosen=0.0, rejected=1.0, chosen_tokens=4, rejected_tokens=6, flaw="long")]
    accuracy = evaluation.pair_accuracy(rows)
    assert accuracy["accuracy"] == 0.5 and accuracy["longer_wins"] == pytest.approx(0.5 / 3)
    assert accuracy["by_flaw"] == {"long": {"accuracy": 0.0, "pairs": 1}, "short": {"accuracy": 0.75, "pairs": 2}}


def test_a_finished_run_is_read_back_and_evaluated(tiny, tmp_path, one_process, capsys):
    """The policy in the files is the policy that was trained: its KL from the reference, measured on answers sampled
    after reading it back, is above 0, while the SFT model's answers come from the very same files with the adapter off.
    Records keep every instruction, in order (CHECKS 38)."""
    rows = json.loads((ROOT / "toy" / "test.json").read_text())[:6]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    cfg = train.parse(ppo_flags(tiny, tmp_path / "ppo", steps=3, lr=1e-2, eval_data=tmp_path / "rows.json"))
    run, inputs = train.Run(cfg, "ppo"), train.load_inputs(cfg, ["ppo", "eval"])
    train.ppo(run, inputs, one_process, train.Stopper())
    train.final_evaluation(run, inputs, one_process)
    records = json.loads((run.folder / "eval.json").read_text())["records"]
    assert [r["instruction"] for r in records] == [r["instruction"] for r in rows]
    assert [r["reference"]["text"] for r in records] == [r["output"] for r in rows]
    assert sum(r["after"]["kl"] for r in records) > 0
    summary = evaluation.summarise(records)
    assert summary["reference"]["precision_famous"]["value"] == 1.0             # references are true
    evaluation.main(["table", str(run.folder)])
    assert "factual precision" in capsys.readouterr().out


def test_generate_answers_a_prompt_and_a_file(tiny, tmp_path, one_process, capsys):
    """The command line on a finished run: text on the screen, or rows in the order of the file."""
    cfg = train.parse(ppo_flags(tiny, tmp_path / "ppo", steps=1))
    train.ppo(train.Run(cfg, "ppo"), train.load_inputs(cfg, ["ppo"]), one_process, train.Stopper())
    evaluation.main(["generate", str(tmp_path / "ppo"), "--prompt", "Who is it?", "--max_new_tokens", "5"])
    assert capsys.readouterr().out.strip()
    (tmp_path / "in.json").write_text(json.dumps([{"instruction": "One?"}, {"instruction": "Two?"}]))
    evaluation.main(["generate", str(tmp_path / "ppo"), "--input", str(tmp_path / "in.json"), "--output", str(tmp_path / "out.json")])
    assert [r["instruction"] for r in json.loads((tmp_path / "out.json").read_text())] == ["One?", "Two?"]


@pytest.mark.parametrize("argv, message", [
    (["table", "nowhere"], "expected PPO run folders"), (["figures", "nowhere"], "expected PPO run folders"),
    (["generate", "nowhere", "--prompt", "x"], "no finished PPO run")])
def test_a_missing_run_is_one_line(argv, message, capsys):
    """Status 2 and what was expected there."""
    with pytest.raises(SystemExit) as stop:
        evaluation.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1
