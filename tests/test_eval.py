"""Statistics of the evaluation, by hand and by simulation; and that a finished run can be read back."""
import json
import random
import re
import shutil
import sys

import pytest
import torch

import eval as evaluation
import train
from conftest import ROOT
from model import Llama, LlamaConfig, save_llama

sys.path.insert(0, str(ROOT / "tests"))
from test_train import ppo_flags  # noqa: E402


def test_a_draw_is_half_a_win_and_swapping_sides_gives_the_rest():
    """CHECKS 37. Two wins, one draw, one loss of four: (1 + 1 + .5 + 0) / 4 = .625, and .375 the other way round."""
    ours, theirs = [3, 2, 1, 0], [1, 1, 1, 1]
    assert evaluation.win_rate(ours, theirs) == 0.625
    assert evaluation.win_rate(theirs, ours) == 0.375
    with pytest.raises(ValueError):
        evaluation.win_rate([1, 2], [1])                    # answers that are not paired cannot be compared


def test_a_score_that_is_no_number_is_refused():
    """NaN compares as neither above nor below: counted as a loss, a broken judge would look like a hopeless policy."""
    for sides in ([[float("nan"), 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, float("nan")]]):
        with pytest.raises(ValueError, match="not a number"):
            evaluation.win_rate(*sides)


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
    out, by_seed = capsys.readouterr().out.split("\n\nby seed")
    rows = {line.split()[0]: line.split() for line in out.splitlines()[3:]}
    assert rows["a"][1:3] == ["2", "60.0%"] and rows["b"][1:3] == ["1", "40.0%"]
    assert rows["a"][-2] == "+10.0%"                                            # (seed 0 alone has a partner)
    only, = by_seed.strip().splitlines()[1:]                                    # (b has one seed)
    assert only.split()[:4] == ["a", "50.0%", "70.0%", "+10.0%"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)                        # import matplotlib: ImportError
    evaluation.main(["figures", str(tmp_path), "--out", str(tmp_path / "figures")])
    out = capsys.readouterr().out
    assert [float(x) for x in next(l for l in out.splitlines() if l.split()[:2] == ["a", "10.000"]).split()[1:3]] == [10, 0.6]
    assert not (tmp_path / "figures").exists()
    assert "Win rate over training" in out and "Factual precision" not in out        # these data say nothing about facts


def test_runs_that_share_a_seed_are_not_averaged_as_seeds(tmp_path):
    """Two runs of seed 0 with the same settings - from other reward models, say - are no sample of seeds: each has a row of
    its own, called by its path. The same file named twice is one run, and a path that is none is not passed over."""
    for name, seed, won in (("a", 0, 0.5), ("b", 0, 0.7), ("c", 1, 0.4)):
        (tmp_path / f"{name}.json").write_text(json.dumps(variant(seed, {"x": [10, 10 * won, 0]})))
    a, b, c = (tmp_path / f"{name}.json" for name in "abc")
    assert [len(runs) for runs in evaluation.load_outcomes([a, c, a]).values()] == [2]
    apart = evaluation.load_outcomes([a, b])
    assert list(apart) == [str(a), str(b)] and all(len(runs) == 1 for runs in apart.values())
    assert sorted(evaluation.load_outcomes([tmp_path])) == [str(a), str(b), str(c)]
    with pytest.raises(FileNotFoundError, match="there is no .*typo"):
        evaluation.load_outcomes([a, tmp_path / "typo"])


def test_a_seed_that_was_not_evaluated_is_in_no_curve_and_not_counted(tmp_path, monkeypatch, capsys):
    """A run without --eval_data beside one with: the table's mean is of the one, and says so, whichever comes first."""
    for seed, more in ((0, {"curve": [], "wins": {}}), (1, {})):
        (tmp_path / f"{seed}.json").write_text(json.dumps(variant(seed, {"x": [10, 7, 0]}, variant="a") | more))
    (tmp_path / "b.json").write_text(json.dumps(variant(0, {"x": [1, 0, 0]}, variant="b") | {"curve": [], "wins": {}}))
    variants = evaluation.load_outcomes([tmp_path])
    evaluation.main(["table", str(tmp_path)])
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[3:] if line}
    assert rows["a"][1:3] == ["1", "70.0%"] and rows["b"][1] == "0"
    panels = {file: panels for file, _, _, panels in evaluation.figure_data(variants)}
    assert all(set(lines) == {"a"} for panel in panels.values() for lines in panel.values()) and "win_steps" in str(panels)


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
    (["generate", "nowhere", "--prompt", "x"], "no folder nowhere"), (["generate", "x"], "required"), (["export", "x", "--outputs", "y"], "--output"),
    (["winrate", "nowhere.json"], "no data file at nowhere.json"), (["recover", "a", "b", "c"], "holds no model")])
def test_a_missing_run_is_one_line(argv, message, capsys):
    """Status 2 and what was expected there."""
    with pytest.raises(SystemExit) as stop:
        evaluation.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("command", [["generate", "--prompt=x"], ["table"], ["figures"]])
def test_the_folder_of_all_stages_is_no_ppo_run_but_names_it(command, tmp_path, capsys):
    """runs/toy instead of runs/toy/ppo is the likeliest slip of all."""
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo" / "config.json").write_text("{}")
    with pytest.raises(SystemExit):
        evaluation.main([command[0], str(tmp_path), *command[1:]])
    assert f"did you mean {tmp_path / 'ppo'}?" in capsys.readouterr().err


def test_a_judge_that_is_an_adapter_needs_its_trunk(tmp_path, capsys):
    """--reward ADAPTER alone is no model: the message names the flag."""
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "pairs.json").write_text(json.dumps([{"instruction": "Who?", "output_1": "Me.", "output_2": "You."}]))
    with pytest.raises(SystemExit):
        evaluation.main(["winrate", str(tmp_path / "pairs.json"), "--reward", str(tmp_path)])
    assert "is an adapter: name the model that it was trained on with --model" in capsys.readouterr().err


SETTINGS = {"stage": "ppo", "model": "../m", "reward": "../r", "lora_rank": 8, "lora_alpha": 64.0, "regularizer": "kl", "steps": 1,
            "seed": 0}


@pytest.mark.parametrize("command, file, content, message", [
    *((command, "config.json", content, "does not describe a PPO run") for command in ("figures", "generate")
      for content in ([], None, {"run": 5}, {"run": {"stage": "ppo"}}, {"run": {"stage": "sft"}}, {"run": SETTINGS | {"model": 5}},
                      {"run": SETTINGS | {"steps": None}})),
    *(("table", "eval.json", content, "holds no records of an evaluation")
      for content in ([], {}, None, {"records": []}, {"records": [{"index": 0}]})),
    *(("table", "eval.json", {"records": [{"instruction": "?", "reference": x, "before": x, "after": x}]},
       "eval.json is not as this project writes it") for x in (None, {}, {"text": "!"})),
    ("figures", "metrics.jsonl", {"step": 1} | {k: "x" for k, _ in evaluation.TRAINING}, "metrics.jsonl is not as this project"),
    ("figures", "metrics.jsonl", {"step": 1}, "metrics.jsonl is not as this project writes it"),
    ("figures", "evals.jsonl", {"step": 1}, "evals.jsonl is not as this project writes it"),
    ("figures", "metrics.jsonl", {"a": 1}, "metrics.jsonl holds a line that is no record of a step"),
    ("figures", "evals.jsonl", [1], "evals.jsonl holds a line that is no record of a step")])
def test_a_run_folder_with_something_else_in_it_is_one_line(tmp_path, command, file, content, message, capsys):
    """Files that are JSON but not what a run writes: the file is named."""
    (tmp_path / "policy").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"run": SETTINGS}))
    (tmp_path / file).write_text(json.dumps(content) + "\n")
    with pytest.raises(SystemExit) as stop:
        evaluation.main([command, str(tmp_path), *["--prompt=x"] * (command == "generate")])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and message in err, err


# ------------------------------------------------------------------------------------------ exports and judges' files

def small_run(tiny, folder, device):
    cfg = train.parse(ppo_flags(tiny, folder, steps=1))
    train.ppo(train.Run(cfg, "ppo"), train.load_inputs(cfg, ["ppo"]), device, train.Stopper())
    return str(folder)


ROWS = [{"instruction": "Who is  it?\n", "input": "", "output": "Me."},
        {"instruction": "Translate \u00abÄ\u00bb \u2028 \0.", "input": "Grün\n\nGelb", "output": "Green."},
        {"instruction": "Who is  it?\n", "output": "You."}]


def export(run, folder, *flags, rows=ROWS):
    (folder / "rows.json").write_text(json.dumps(rows))
    evaluation.main(["export", run, "--input", str(folder / "rows.json"), "--output", str(folder / "out.json"), "--max_new_tokens=4", *flags])
    return json.loads((folder / "out.json").read_text(encoding="utf-8"))


def test_exports_have_the_judges_keys_and_the_exact_instructions_in_order(tiny, tmp_path):
    """CHECKS 38. Judges join rows by the instruction's text, so each character of it counts, and doubles stay."""
    run = str(shutil.copytree(tiny / "sft", tmp_path / "run"))             # a model folder will do; of more positions, for the input
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    rows = export(run, tmp_path, "--format=alpaca_eval", "--generator=ours")
    assert [list(r) for r in rows] == [["instruction", "output", "generator"]] * 3
    assert [r["instruction"] for r in rows] == ["Who is  it?\n", "Translate «Ä» \u2028 \0.\n\nGrün\n\nGelb", "Who is  it?\n"]
    assert {r["generator"] for r in rows} == {"ours"}
    pairs = export(run, tmp_path, "--format=alpacafarm")
    assert [list(r) for r in pairs] == [["instruction", "input", "output_1", "output_2"]] * 3
    assert [r["output_1"] for r in pairs] == ["Me.", "Green.", "You."] and pairs[1]["input"] == "Grün\n\nGelb"
    assert [r["output_2"] for r in pairs] == [r["output"] for r in rows]        # the format does not change the answers
    (tmp_path / "names.txt").write_text("Ada Lövelace\n\nAlan Turing\n", encoding="utf-8")
    evaluation.main(["export", run, "--format=factscore", "--input", str(tmp_path / "names.txt"), "--output", str(tmp_path / "bios.jsonl"), "--max_new_tokens=4"])
    bios = [json.loads(line) for line in (tmp_path / "bios.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [list(b) for b in bios] == [["topic", "output"]] * 2 and [b["topic"] for b in bios] == ["Ada Lövelace", "Alan Turing"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bios.jsonl", "names.txt", "out.json", "rows.json", "run"]


def test_an_interrupted_export_continues_and_ends_the_same(tiny, tmp_path, one_process, monkeypatch):
    """805 answers of 7B take an hour. What stands is not decoded again, half a line is, and the result is that of one go."""
    run, rows = small_run(tiny, tmp_path / "run", one_process), [{"instruction": f"Question {i}?"} for i in range(10)]
    whole = export(run, tmp_path, "--batch=3", rows=rows)
    real, calls = evaluation.answer, []

    def failing(*args, **kwargs):
        calls.append(kwargs["row_ids"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(evaluation, "answer", failing)
    with pytest.raises(SystemExit) as stop:
        export(run, tmp_path, "--batch=3", rows=rows)
    assert stop.value.code == 130
    part = tmp_path / "out.json.part"
    part.write_text(part.read_text() + '"half an ans')
    with pytest.raises(SystemExit):
        export(run, tmp_path, "--batch=3", "--temperature=0", rows=rows)          # other settings do not go on behind these
    assert export(run, tmp_path, "--batch=5", rows=rows) == whole
    assert [list(c) for c in calls] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [6, 7, 8, 9]] and not part.exists()


@pytest.mark.parametrize("left", ["", "KEY", "KEY\n", 'KEY\n"half an ans', "K"])
def test_an_export_that_was_cut_off_before_its_first_answer_begins_anew(tmp_path, left):
    """A full disk, or a signal in the first write: a key without answers, or half of it. Were the key written behind it
    once more, all answers would be those of the row before."""
    part, key = tmp_path / "out.json.part", 12345
    part.write_text(left.replace("KEY", str(key)).replace("K", "12"))
    assert evaluation.read_part(part, key) == [] and not part.exists()


@pytest.mark.parametrize("left, says", [('KEY\n"a"\n5\n"b"\n', "line 3: expected an answer"), ('KEY\n{oops\n"b"\n', "line 2")])
def test_a_damaged_part_of_an_export_is_one_line_and_stays(tmp_path, left, says):
    """Answers of an hour: what is wrong in the file is named, and nothing of it is thrown away."""
    part = tmp_path / "out.json.part"
    part.write_text(left.replace("KEY", "7"))
    with pytest.raises(ValueError, match=f"out.json.part.*{says}"):
        evaluation.read_part(part, 7)
    assert part.read_text() == left.replace("KEY", "7")


def test_an_interrupt_says_that_it_was_one(monkeypatch, capsys):
    """Ctrl-C while a model answers: a line and the status that shells give it, no traceback."""
    monkeypatch.setattr(evaluation, "load_outcomes", lambda paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["table", "a", "b"])
    assert stop.value.code == 130 and capsys.readouterr().err == "\neval.py: stopped\n"


def test_presets_decode_as_their_papers_do(tiny, tmp_path, one_process, monkeypatch):
    """alpacafarm: 0.7, 300 tokens; alpacaeval: 0.7, top-p 1, 2048; paper: greedy, 512. A row's answer ends where the model's
    positions do: the tiny one has 128."""
    run, seen = small_run(tiny, tmp_path / "run", one_process), []
    real = evaluation.generate
    monkeypatch.setattr(evaluation, "generate", lambda *a, **k: seen.append(k) or real(*a, **k))
    for preset in ("alpacafarm", "alpacaeval", "paper"):
        export(run, tmp_path, f"--preset={preset}", rows=ROWS[:1])
    evaluation.main(["generate", run, "--prompt=Who?", "--preset=alpacaeval"])
    assert [(k["temperature"], k["top_p"]) for k in seen] == [(0.7, 1.0), (0.7, 1.0), (0.0, 1.0), (0.7, 1.0)]
    assert [k["max_new_tokens"] for k in seen] == [4, 4, 4, 2048] and seen[-1]["limits"][0] < 128
    assert [evaluation.PRESETS[p]["max_new_tokens"] for p in ("alpacafarm", "alpacaeval", "paper")] == [300, 2048, 512]


def test_the_merged_export_is_the_policy(tiny, tmp_path, one_process, capsys):
    """One folder with tokenizer that needs nothing of this project: the same greedy answers as trunk + adapter."""
    run = small_run(tiny, tmp_path / "run", one_process)
    evaluation.main(["export", run, "--format=merged", "--output", str(tmp_path / "merged")])
    assert "user-defined pieces" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "merged").iterdir()} == {"config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json",
                                                                 "special_tokens_map.json", "generation_config.json"}
    answers = [(evaluation.main(["generate", str(path), "--prompt=Who?", "--temperature=0", "--max_new_tokens=12"]), capsys.readouterr().out)[1]
               for path in (run, tmp_path / "merged", tmp_path / "run" / "policy")]      # the policy folder alone is a PEFT folder
    assert answers[0] == answers[1] == answers[2] and answers[0].strip()


def test_chat_answers_line_by_line(tiny, tmp_path, one_process, monkeypatch, capsys):
    run, lines = small_run(tiny, tmp_path / "run", one_process), iter(["Who?", "  ", "What?"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or (_ for _ in ()).throw(EOFError))
    evaluation.main(["chat", run, "--max_new_tokens=4", "--temperature=0"])
    shown = capsys.readouterr().out
    evaluation.main(["generate", run, "--prompt=Who?", "--max_new_tokens=4", "--temperature=0"])
    assert capsys.readouterr().out.strip() in shown


def test_preferences_are_counted_as_alpaca_eval_counts_them():
    """By hand, on its own format: 2 and 1.8 are wins, 1 and 1.4 losses, 1.5 and AlpacaFarm's 0 draws; what a failed judge
    leaves (null, -1, NaN) is left out. Win rate (1 + .8 + 0 + .4 + .5 + .5) / 6 = .5333; the standard error is s / sqrt(6) with
    s^2 = (.2178 + .0711 + .2844 + .0178 + .0011 + .0011) / 5 = .118667, so .14063."""
    c = evaluation.count_preferences([2, 1.8, 1, 1.4, 1.5, 0, None, -1, float("nan"), "2", True])
    assert (c["n_wins"], c["n_wins_base"], c["n_draws"], c["n_total"], c["left_out"]) == (2, 2, 2, 6, 5)
    assert c["win_rate"] == pytest.approx(3.2 / 6) and c["standard_error"] == pytest.approx(0.140633, abs=1e-5)


def test_a_published_leaderboard_line_comes_out_again(tmp_path, capsys):
    """AlpacaFarm's line of its PPO model: 370 wins, 424 losses, 9 draws: 46.64 % +-1.75 (auto_annotations/eval.py)."""
    annotations = [{"preference": p} for p, n in ((2, 370), (1, 424), (0, 9), (None, 2)) for _ in range(n)]
    (tmp_path / "a.json").write_text(json.dumps(annotations))
    evaluation.main(["winrate", str(tmp_path / "a.json")])
    assert capsys.readouterr().out == ("output_2 wins 46.64% +-1.75% (95 % interval 43.2% to 50.1%) of 803: 370 wins, 424 losses, "
                                       "9 draws; 2 without a judgement left out\n")


def test_pairs_judged_by_a_reward_model(tiny, tmp_path, capsys):
    """Swapping the two answers of every pair gives the rest to one; an adapter needs the model that it belongs to."""
    pairs = [{"instruction": f"Question {i}?", "output_1": "No" * i, "output_2": "Yes, it is."} for i in range(6)]
    swapped = [p | {"output_1": p["output_2"], "output_2": p["output_1"]} for p in pairs]
    won = []
    for name, rows in (("a", pairs), ("b", swapped)):
        (tmp_path / name).with_suffix(".json").write_text(json.dumps(rows))
        evaluation.main(["winrate", str(tmp_path / f"{name}.json"), "--reward", str(tiny / "reward"), "--tokenizer", str(tiny / "sft" / "tokenizer.model")])
        won.append(float(capsys.readouterr().out.split()[2].rstrip("%")))
    assert sum(won) == pytest.approx(100)
    flags = ["winrate", str(tmp_path / "a.json"), "--reward", str(tiny / "reward_adapter"), "--tokenizer", str(tiny / "sft" / "tokenizer.model")]
    evaluation.main([*flags, "--model", str(tiny / "sft")])
    assert "of 6" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluation.main(flags)
    assert "is an adapter" in capsys.readouterr().err


BAD = [(["export", "RUN", "--format=merged", "--output", "RUN"], "holds a model already"),
       (["export", "RUN", "--input=IN", "--output=DIR/no/such.json"], "its folder does not exist"),
       (["export", "RUN", "--format=merged", "--output=DIR/m", "--input=IN"], "no --input goes with it"),
       (["export", "RUN", "--format=merged", "--output=DIR/m", "--temperature=1"], "no --temperature goes with it"),
       (["export", "RUN", "--input=IN", "--output=IN"], "is the file of --input"),
       (["generate", "RUN", "--input=IN", "--output=DIR/run/../in.json"], "is the file of --input: it would be replaced"),
       (["export", "RUN", "--format=factscore", "--input=IN", "--output=x.jsonl"], "expected names, one a line, got JSON"),
       (["export", "RUN", "--format=factscore", "--input=DIR/no", "--output=x.jsonl"], "no file of names at DIR/no"),
       (["export", "RUN", "--output=x.json"], "needs --input"), (["table", "RUN", "--base=kl"], "--base kl: RUN is one run"),
       (["generate", "RUN", "--prompt=x", "--tokenizer=OTHER"], "the models have different tokenizers"),
       (["winrate", "PAIRS", "--reward=RUN", "--tokenizer=OTHER"], "in RUN/tokenizer.model: the models have different tokenizers"),
       (["winrate", "IN", "--reward=RUN"], "has one pair: that is no win rate"),
       (["export", "RUN", "--format=factscore", "--input=EMPTY", "--output=x.jsonl"], "expected names"),
       (["export", "RUN", "--format=alpacafarm", "--input=IN", "--output=DIR/x.json"], "row 0 .*: expected a text in 'output'"),
       (["generate", "RUN", "--prompt=x", "--alpha=64"], "--alpha goes with --adapter"),
       (["generate", "RUN", "--prompt=x", "--adapter=DIR/no"], "DIR/no"), (["generate", "RUN", "--prompt=x", "--batch=0"], "0 is below 1"),
       (["generate", "RUN", "--prompt=x", "--temperature=nan"], "temperature nan"), (["generate", "RUN", "--prompt=x", "--top_p=0"], "top_p 0"),
       (["generate", "RUN", "--prompt=x", "--max_new_tokens=0"], "max_new_tokens 0"), (["generate", "RUN", "--prompt= "], "'instruction' is empty"),
       (["winrate", "IN", "--reward=RUN", "--batch=-1"], "-1 is below 1"), (["winrate", "IN"], "no row has a preference")]


@pytest.mark.parametrize("argv, message", BAD, ids=[m for _, m in BAD])
def test_a_mistake_in_an_export_is_one_line_and_costs_nothing(tiny, other_tokenizer, tmp_path, argv, message, capsys):
    """Before the model answers a thousand questions; nothing is written, or left lying about, and no model overwritten."""
    run = shutil.copytree(tiny / ("reward" if "winrate" in argv else "sft"), tmp_path / "run")
    shutil.copy(tiny / "sft" / "tokenizer.model", run)
    (tmp_path / "pairs.json").write_text(json.dumps([{"instruction": "Who?", "output_1": "Me.", "output_2": "You."}] * 2))
    (tmp_path / "in.json").write_text('[{"instruction": "Who?"}]')
    (tmp_path / "empty").write_text("\n")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for name, value in (("RUN", run), ("IN", tmp_path / "in.json"), ("EMPTY", tmp_path / "empty"), ("DIR", tmp_path),
                        ("PAIRS", tmp_path / "pairs.json"), ("OTHER", other_tokenizer)):
        argv, message = [a.replace(name, str(value)) for a in argv], message.replace(name, str(value))
    with pytest.raises(SystemExit) as stop:
        evaluation.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and re.search(message, err), err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_export_does_not_go_on_with_another_models_answers(tiny, tmp_path, monkeypatch):
    """The same questions and settings to another model: the file that was begun is refused, not finished."""
    for i, name in enumerate("ab"):
        config = LlamaConfig(vocab_size=960, dim=32, n_layers=1, n_heads=2, ffn_dim=64, max_seq_len=200)
        torch.manual_seed(i)
        save_llama(Llama(config), tmp_path / name)
        shutil.copy(tiny / "sft" / "tokenizer.model", tmp_path / name)
    (tmp_path / "in.json").write_text(json.dumps([{"instruction": f"{i}?"} for i in range(3)]))
    flags = ["--input", str(tmp_path / "in.json"), "--output", str(tmp_path / "out.json"), "--max_new_tokens=3", "--batch=1"]
    real, calls = evaluation.answer, []
    monkeypatch.setattr(evaluation, "answer", lambda *a, **k: calls.append(1) or (real(*a, **k) if len(calls) < 3 else 1 / 0))
    with pytest.raises(ZeroDivisionError):
        evaluation.main(["generate", str(tmp_path / "a"), *flags])
    with pytest.raises(SystemExit):
        evaluation.main(["generate", str(tmp_path / "b"), *flags])
    assert (tmp_path / "out.json.part").is_file() and not (tmp_path / "out.json").exists()
