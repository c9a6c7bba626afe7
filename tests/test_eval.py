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


@pytest.mark.parametrize("argv, message", [(["table", "nowhere"], "no eval.json"), (["generate", "nowhere", "--prompt", "x"], "no finished PPO run")])
def test_a_missing_run_is_one_line(argv, message, capsys):
    """Status 2 and what was expected there."""
    with pytest.raises(SystemExit) as stop:
        evaluation.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1
