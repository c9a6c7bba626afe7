"""Statistics of the evaluation, by hand and by simulation; that a finished run can be read back;
what `eval.py` answers, writes and refuses.
"""
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
from data import Pair
from model import InputError, Llama, LlamaConfig, read_json, save_llama
from reward import load_reward_model
from running import ended, fork


# --------------------------------------------------------------------------------------- statistics

def test_a_draw_is_half_a_win_and_swapping_sides_gives_the_rest():
    """Two wins, one draw, one loss of four: (1 + 1 + .5 + 0) / 4 = .625, and .375 the other way
    round."""
    ours, theirs = [3, 2, 1, 0], [1, 1, 1, 1]
    assert evaluation.win_rate(ours, theirs) == 0.625
    assert evaluation.win_rate(theirs, ours) == 0.375


def test_answers_that_are_not_paired_are_not_compared():
    """Two lists of unequal length are a ValueError: cut to the shorter one, a missing answer would
    shift all others."""
    with pytest.raises(ValueError):
        evaluation.win_rate([1, 2], [1])


def test_a_score_that_is_no_number_is_refused():
    """NaN compares as neither above nor below: counted as a loss, a broken judge would look like a
    hopeless policy."""
    nan = float("nan")
    for ours, theirs in (([nan, 1.0], [0.0, 0.0]), ([0.0, 0.0], [1.0, nan])):
        with pytest.raises(FloatingPointError, match="not a number"):
            evaluation.win_rate(ours, theirs)


def test_standard_error_of_a_win_rate_is_the_textbooks():
    """Of 400 prompts, 240 wins: sqrt(.6 * .4 / 400) = .0245. The bootstrap finds it without knowing
    the formula; its own scatter with 1000 resamples is about 2 %, so 10 % is far."""
    result = evaluation.win_rate_with_error([1] * 240 + [0] * 160, [0.5] * 400)
    assert result["value"] == 0.6
    assert result["se"] == pytest.approx(0.0245, rel=0.1)


def test_the_interval_covers_the_truth_19_times_in_20():
    """1000 simulated evaluations of 200 prompts with a true win rate of .55 (draws included): the
    95 % interval contains it in 93 to 97 % of them."""
    rng, covered = random.Random(0), 0
    for _ in range(1000):
        ours = rng.choices([1, 0, -1], [0.5, 0.1, 0.4], k=200)     # win, draw, loss: .5 + .05 = .55
        result = evaluation.win_rate_with_error(ours, [0] * 200)
        covered += result["low"] <= 0.55 <= result["high"]
    assert 930 <= covered <= 970


def test_prompts_about_one_person_count_as_one_draw():
    """100 persons, 4 prompts each, and each wins all or none of hers: 60 do. That is 100 draws, not
    400, and the error is sqrt(.6 * .4 / 100) = .0490, twice what 400 independent prompts would have
    (.0245)."""
    wins, persons = [1] * 240 + [0] * 160, [i // 4 for i in range(400)]
    result = evaluation.win_rate_with_error(wins, [0.5] * 400, persons)
    assert result["se"] == pytest.approx(0.0490, rel=0.1) and result["value"] == 0.6


def test_an_error_is_printed_the_same_each_time():
    """Draws belong to the seed alone, whatever else has drawn from torch's own generator, and there
    are as many as asked for; rows of one group are drawn together."""
    groups = ["a", "a", "b", "c", "c"]
    torch.manual_seed(1)
    times = evaluation.resample(groups, resamples=50, seed=3)
    torch.manual_seed(2)
    assert torch.equal(times, evaluation.resample(groups, resamples=50, seed=3))
    assert not torch.equal(times, evaluation.resample(groups, resamples=50, seed=4))
    assert times.shape == (50, 5) and torch.equal(times[:, 0], times[:, 1])
    assert (times[:, [0, 2, 3]].sum(-1) == 3).all()


def test_the_interval_over_persons_covers_the_truth_19_times_in_20():
    """Where answers about one person err together: each of 60 persons wins her 4 prompts with
    probability .25 or .85, true mean .55. Resampling prompts as if they were independent would
    cover it in 85 % only."""
    rng, covered, persons = random.Random(0), 0, [i // 4 for i in range(240)]
    for _ in range(1000):
        chances = rng.choices([0.25, 0.85], k=60)
        wins = [float(rng.random() < chances[person]) for person in persons]
        result = evaluation.win_rate_with_error(wins, [0.5] * 240, persons)
        covered += result["low"] <= 0.55 <= result["high"]
    assert 930 <= covered <= 970


def test_precision_pools_facts_and_says_when_there_are_none():
    """Three answers with 1 of 1, 1 of 3 and 0 of 0 true facts: 2 of 4, not the mean of 1, 1/3 and
    nothing."""
    assert evaluation.ratio_with_error([(1, 1), (1, 3), (0, 0)], range(3))["value"] == 0.5
    nothing = evaluation.ratio_with_error([(0, 0)], range(1))["value"]
    assert nothing != nothing
    assert evaluation.with_se(evaluation.ratio_with_error([(0, 0)], range(1)), "{:.1%}") == "-"


def record(before, after, index=0, **more):
    """A hand-made record: (score, tokens, finished) of two systems; the reference scores 1."""
    def answer(score, tokens, finished):
        return {"text": "..", "score": score, "tokens": tokens, "finished": finished}

    return {"instruction": "Why?", "index": index, "reference": answer(1.0, 5, True),
            "before": answer(*before), "after": answer(*after) | more}


def test_a_summary_by_hand(tmp_path):
    """Three prompts that no annotator knows, judged by the reward model's scores. After PPO 2, 0, 1
    against 1, 1, 1 before: a win, a loss, a draw. KL of .9 nats over 9 tokens, all answers pooled:
    .1 per token; .3 per answer."""
    records = [record((1.0, 4, True), (2.0, 3, True), 0, kl=0.5),
               record((1.0, 4, True), (0.0, 4, False), 1, kl=0.4),
               record((1.0, 4, False), (1.0, 2, True), 2, kl=0.0)]
    after = evaluation.summarise(records)["after"]
    values = {name: quantity["value"] for name, quantity in after.items()}
    assert values == pytest.approx(
        {"score": 1.0, "tokens": 3.0, "eos_rate": 2 / 3, "win_before": 0.5, "win_reference": 0.5,
         "kl_per_token": 0.1, "kl_per_sequence": 0.3})
    (tmp_path / "eval.json").write_text(json.dumps({"records": records}))
    shown = evaluation.report(tmp_path)
    assert "judged by the reward model itself" in shown and "PPO against SFT: 50.0%" in shown
    assert "factual precision" not in shown


# ---------------------------------------------------------------------- the reward model's accuracy

def test_accuracy_of_a_reward_model_counts_ties_as_half_and_splits_by_flaw():
    """Beside it stands what the rule "the longer one wins" would get: here 1 of 3 (a tie is
    half)."""
    rows = [dict(chosen=2.0, rejected=1.0, chosen_tokens=5, rejected_tokens=9, flaw="short"),
            dict(chosen=1.0, rejected=1.0, chosen_tokens=4, rejected_tokens=4, flaw="short"),
            dict(chosen=0.0, rejected=1.0, chosen_tokens=4, rejected_tokens=6, flaw="long")]
    accuracy = evaluation.pair_accuracy(rows)
    assert accuracy["accuracy"] == 0.5 and accuracy["longer_wins"] == pytest.approx(0.5 / 3)
    assert accuracy["by_flaw"] == {"long": {"accuracy": 0.0, "pairs": 1},
                                   "short": {"accuracy": 0.75, "pairs": 2}}
    shown = evaluation.accuracy_report(accuracy)
    assert "0.500 of 3 held-out pairs" in shown and '"the longer one wins": 0.167' in shown
    assert "long 0.00 (n 1), short 0.75 (n 2)" in shown


def test_pairs_are_scored_as_the_reward_model_scores_their_answers(tiny):
    """Prompt + answer, each answer by itself, 1e-5; the flaw and both lengths stand beside."""
    model = load_reward_model(tiny / "reward")
    pairs = [Pair([1, 5, 6], [7, 8, 9, 2], [7, 2], "short"), Pair([1], [3, 2], [4, 4, 2], "")]
    for pair, row in zip(pairs, evaluation.score_pairs(model, pairs, 2, 1), strict=True):
        assert row["flaw"] == pair.flaw
        for name in ("chosen", "rejected"):
            ids = pair.prompt + getattr(pair, name)
            with torch.no_grad():
                score = model.scores(torch.tensor([ids]), torch.tensor([len(ids)])).item()
            assert row[name] == pytest.approx(score, abs=1e-5)
            assert row[f"{name}_tokens"] == len(getattr(pair, name))


# ----------------------------------------------------------------------------------- a finished run

def ppo_flags(tiny, out, **more):
    """Flags of a small PPO run on the untrained model."""
    flags = dict(stage="ppo", model=tiny / "sft", reward=tiny / "reward", out=out, steps=1,
                 prompts=ROOT / "toy" / "unlabeled.json", rollout_batch=8, minibatch=4,
                 micro_batch=2, response_len=12, prompt_len=60, lr=1e-2, warmup_steps=0,
                 dtype="float32", lora_alpha=16)
    return [f"--{name}={value}" for name, value in (flags | more).items()]


@pytest.fixture(scope="module")
def rows():
    """Six instructions of the toy world with their reference answers."""
    return read_json(ROOT / "toy" / "test.json", list)[:6]


@pytest.fixture(scope="module")
def finished(tiny, rows, tmp_path_factory):
    """A PPO run of five steps, evaluated after every two and at the end -> its folder."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "rows.json").write_text(json.dumps(rows))
    train.main(ppo_flags(tiny, folder / "ppo", steps=5, eval_every=2,
                         eval_data=folder / "rows.json"))
    return folder / "ppo"


def test_a_finished_run_is_read_back_and_evaluated(finished, rows, capsys):
    """The policy in the files is the policy that was trained: its KL from the reference, measured
    on answers sampled after reading it back, is above 0, while the SFT model's answers come from
    the very same files with the adapter off. Records keep every instruction, in order."""
    records = read_json(finished / "eval.json")["records"]
    assert [r["instruction"] for r in records] == [r["instruction"] for r in rows]
    assert [r["reference"]["text"] for r in records] == [r["output"] for r in rows]
    assert all(r["reference"]["finished"] for r in records)
    assert sum(r["after"]["kl"] for r in records) > 0
    summary = evaluation.summarise(records)
    assert summary["reference"]["precision_famous"]["value"] == 1.0         # references are true
    evaluation.main(["table", str(finished)])
    shown = capsys.readouterr().out
    assert "6 evaluation prompts, judged by the simulated annotators" in shown
    assert "factual precision" in shown and "PPO against SFT" in shown


def test_evaluations_along_the_way_share_what_training_does_not_change(finished):
    """Steps 2 and 4 of 5, and the end: the references' answers, and those of the SFT model, which
    is the policy with its adapter off, stay the same to the bit, also when the run is read back
    from its files; the policy's do not, and it has left the reference."""
    lines = (finished / "evals.jsonl").read_text().splitlines()
    evals = [json.loads(line) for line in lines]
    assert [row["step"] for row in evals] == [2, 4]
    last = evaluation.summarise(read_json(finished / "eval.json")["records"])

    def unchanged(summary):
        return json.dumps([summary["reference"], summary["before"]], sort_keys=True)

    assert unchanged(evals[0]) == unchanged(evals[1]) == unchanged(last)
    scores = [summary["after"]["score"]["value"] for summary in (*evals, last)]
    assert len(set(scores)) == 3
    assert all(summary["after"]["kl_per_token"]["value"] > 0 for summary in (*evals, last))


# ------------------------------------------------------------------------------------------ answers

def said(capsys, *argv):
    """What `eval.py generate` prints."""
    evaluation.main(["generate", *map(str, argv)])
    return capsys.readouterr().out


def test_a_run_its_adapter_and_a_whole_policy_answer(tiny, finished, tmp_path, capsys):
    """A run folder, and the model folder with the run's adapter as any PEFT folder is given, are
    one policy; the model folder alone is the SFT model. A fully trained run holds a whole model."""
    greedy = ["--prompt=Who is it?", "--temperature=0", "--max_new_tokens=12"]
    answer = said(capsys, finished, *greedy)
    assert answer.strip()
    assert said(capsys, tiny / "sft", f"--adapter={finished / 'policy'}", *greedy) == answer
    assert said(capsys, tiny / "sft", *greedy) != answer
    train.main(ppo_flags(tiny, tmp_path / "full", lora_rank=0))
    capsys.readouterr()
    answer = said(capsys, tmp_path / "full", *greedy)
    assert answer.strip() and said(capsys, tmp_path / "full" / "policy", *greedy) == answer


QUESTIONS = [{"instruction": "Who is  it?\n", "input": "", "output": "Me."},
             {"instruction": "Translate «Ä» \u2028 \0.", "input": "Grün\n\nGelb",
              "output": "Green."},
             {"instruction": "Who is  it?\n", "output": "You."}]


def wider(tiny, folder):
    """The SFT model with more positions, so that QUESTIONS have room."""
    shutil.copytree(tiny / "sft", folder)
    about = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(about | {"max_position_embeddings": 256}))
    return folder


def written(run, folder, *flags, rows=QUESTIONS):
    """What `eval.py generate` writes of rows."""
    (folder / "rows.json").write_text(json.dumps(rows))
    evaluation.main(["generate", str(run), f"--input={folder / 'rows.json'}",
                     f"--output={folder / 'out.json'}", "--max_new_tokens=4", *flags])
    return json.loads((folder / "out.json").read_text(encoding="utf-8"))


def test_exports_have_the_judges_keys_and_the_exact_instructions_in_order(tiny, tmp_path):
    """Judges join rows by the instruction's text, so each character of it counts, and doubles
    stay. The format does not change the answers."""
    run = wider(tiny, tmp_path / "run")
    asked = [row["instruction"] for row in QUESTIONS]
    rows = written(run, tmp_path, "--format=alpaca_eval", "--generator=ours")
    assert [list(r) for r in rows] == [["instruction", "output", "generator"]] * 3
    joined = [asked[0], asked[1] + "\n\nGrün\n\nGelb", asked[2]]
    assert [r["instruction"] for r in rows] == joined and {r["generator"] for r in rows} == {"ours"}
    pairs = written(run, tmp_path, "--format=alpacafarm")
    assert [list(r) for r in pairs] == [["instruction", "input", "output_1", "output_2"]] * 3
    assert [r["instruction"] for r in pairs] == asked and pairs[1]["input"] == "Grün\n\nGelb"
    assert [r["output_1"] for r in pairs] == ["Me.", "Green.", "You."]
    plain = written(run, tmp_path)
    assert [list(r) for r in plain] == [["instruction", "input", "output"]] * 3
    answers = [r["output"] for r in rows]
    assert [r["output_2"] for r in pairs] == [r["output"] for r in plain] == answers
    assert written(run, tmp_path, "--format=alpaca_eval")[0]["generator"] == "run"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "rows.json", "run"]


def test_factscores_rows_are_one_a_line(tiny, tmp_path):
    """A file of names, each asked for as FActScore does."""
    (tmp_path / "names.txt").write_text("Ada Lövelace\n\nAlan Turing\n", encoding="utf-8")
    evaluation.main(["generate", str(wider(tiny, tmp_path / "run")), "--format=factscore",
                     f"--input={tmp_path / 'names.txt'}", f"--output={tmp_path / 'bios.jsonl'}",
                     "--max_new_tokens=4"])
    lines = (tmp_path / "bios.jsonl").read_text(encoding="utf-8").splitlines()
    bios = [json.loads(line) for line in lines]
    assert [list(b) for b in bios] == [["topic", "output"]] * 2
    assert [b["topic"] for b in bios] == ["Ada Lövelace", "Alan Turing"]
    asked = evaluation.instructions(tmp_path / "names.txt", "factscore")
    assert asked[1]["instruction"] == "Tell me a bio of Alan Turing."


def test_an_answer_depends_on_its_place_and_the_seed_alone(tiny, tmp_path):
    """40 questions, more than are decoded at once, or the first four of them: the same answers;
    another seed gives others."""
    rows = [{"instruction": f"Question {i}?"} for i in range(40)]
    answers = written(tiny / "sft", tmp_path, rows=rows)
    assert written(tiny / "sft", tmp_path, rows=rows[:4]) == answers[:4]
    assert written(tiny / "sft", tmp_path, "--seed=1", rows=rows) != answers


def test_an_answer_ends_where_the_models_positions_do(tiny, tmp_path, monkeypatch, capsys):
    """2,048 new tokens are asked of a model of 128 positions: it gets what is left behind each
    prompt. A prompt that leaves none is refused."""
    seen, generate = [], evaluation.generate

    def watched(model, prompts, **settings):
        seen.append([len(p) + n for p, n in zip(prompts, settings["max_new_tokens"], strict=True)])
        return generate(model, prompts, **settings)

    monkeypatch.setattr(evaluation, "generate", watched)
    written(tiny / "sft", tmp_path, "--max_new_tokens=2048", rows=[{"instruction": "Who?"},
                                                                   {"instruction": "What is it?"}])
    assert seen == [[128, 128]]
    with pytest.raises(SystemExit):
        written(tiny / "sft", tmp_path, rows=[{"instruction": "Who? " * 90}])
    said = capsys.readouterr().err
    assert re.search(r"prompt 0: got \d+ tokens .* together at most 128\n$", said)


def test_chat_answers_line_by_line(finished, monkeypatch, capsys):
    """Each line for itself; an empty one is passed over."""
    lines = iter(["Who?", "  ", "What?"])

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    greedy = ["--max_new_tokens=4", "--temperature=0"]
    evaluation.main(["chat", str(finished), *greedy])
    shown = capsys.readouterr().out
    for question in ("Who?", "What?"):
        assert said(capsys, finished, f"--prompt={question}", *greedy).strip() in shown


# -------------------------------------------------------------------------- judgements from outside

def test_preferences_are_counted_as_alpaca_eval_counts_them():
    """By hand, on its own format: 2, 1.8 and the text "1.7" are wins, 1 and 1.4 losses, 1.5 and
    AlpacaFarm's 0 draws; what a failed judge leaves (null, -1, NaN, a word) is left out. Win rate
    (1 + .8 + .7 + 0 + .4 + .5 + .5) / 7 = .557143. Squared differences sum to .196122 + .058980 +
    .020408 + .310408 + .024694 + 2 * .003265 = .617143; s^2 = .617143 / 6, the standard error
    s / sqrt(7) = .121217."""
    c = evaluation.count_preferences([2, 1.8, "1.7", 1, 1.4, 1.5, 0, None, -1, float("nan"), True,
                                      "none", "-1"])
    assert (c["n_wins"], c["n_wins_base"], c["n_draws"]) == (3, 2, 2)
    assert (c["n_total"], c["left_out"]) == (7, 6)
    assert c["win_rate"] == pytest.approx(3.9 / 7)
    assert c["standard_error"] == pytest.approx(0.121217, abs=1e-5)


def test_a_published_leaderboard_line_comes_out_again(tmp_path, capsys):
    """AlpacaFarm's line of its PPO model: 370 wins, 424 losses, 9 draws: 46.64 % +-1.75
    (auto_annotations/eval.py). The same judgements as texts are the same line."""
    judged = [2] * 370 + [1] * 424 + [0] * 9 + [None] * 2
    for rows in ([{"preference": p} for p in judged],
                 [{"preference": None if p is None else str(p)} for p in judged]):
        (tmp_path / "a.json").write_text(json.dumps(rows))
        evaluation.main(["winrate", str(tmp_path / "a.json")])
        assert capsys.readouterr().out == (
            "output_2 wins 46.64% +-1.75% (95 % interval 43.2% to 50.1%) of 803: 370 wins, 424 "
            "losses, 9 draws; 2 without a judgement left out\n")


# ----------------------------------------------------------------------- mistakes, and what is none

BAD = [
    (["generate", "RUN", "--input=IN", "--output=DIR/no/such.json"], "its folder does not exist"),
    (["generate", "RUN"], "--prompt --input is required"),
    (["generate", "RUN", "--prompt=x", "--input=IN"], "not allowed with"),
    (["generate", "RUN", "--prompt=x", "--output=DIR/a.json"], "there is no --input"),
    (["generate", "RUN", "--prompt=x", "--tempreature=0"], "unrecognized arguments"),
    (["generate", "RUN", "--prompt=x", "--tokenizer=OTHER"], "these are different tokenizers"),
    (["generate", "RUN", "--prompt=x", "--adapter=DIR/no"], "DIR/no has no adapter_model"),
    (["generate", "RUN", "--format=alpacafarm", "--input=IN"], "row 0.*a text in 'output'"),
    (["generate", "RUN", "--format=factscore", "--input=DIR/no"], "No such file.*DIR/no"),
    (["generate", "RUN", "--prompt=x", "--temperature=nan"], "temperature nan"),
    (["generate", "RUN", "--prompt=x", "--top_p=0"], "top_p 0"),
    (["generate", "RUN", "--prompt=x", "--max_new_tokens=0"], "0 new ones"),
    (["generate", "DIR/no", "--prompt=x"], "DIR/no holds no model"),
    (["chat", "DIR"], "DIR holds no model"), (["table", "RUN"], "there is no RUN/eval.json"),
    (["winrate", "IN"], "0 judgements have a preference"),
    (["winrate", "DIR/no"], "No such file.*DIR/no"),
    ([], "arguments are required: COMMAND"), (["recover", "a"], "invalid choice")]


@pytest.mark.parametrize("argv, message", BAD, ids=[m for _, m in BAD])
def test_a_mistake_is_one_line_and_costs_nothing(tiny, other_tokenizer, tmp_path, argv, message,
                                                 capsys):
    """Before the model answers a thousand questions; status 2, and nothing is written."""
    run = shutil.copytree(tiny / "sft", tmp_path / "run")
    (tmp_path / "in.json").write_text('[{"instruction": "Who?"}]')
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for name, value in (("RUN", run), ("IN", tmp_path / "in.json"), ("DIR", tmp_path),
                        ("OTHER", other_tokenizer)):
        argv = [a.replace(name, str(value)) for a in argv]
        message = message.replace(name, str(value))
    with pytest.raises(SystemExit) as stop:
        evaluation.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("eval.py: error: ") and err.count("\n") == 1
    assert re.search(message, err), err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_model_whose_own_eos_lies_beyond_the_tokenizer_does_not_answer(tiny, tmp_path, capsys):
    """A chat model ends with an added token, id 960 here, which tokenizer.model does not have: its
    answers would never end. One line instead. Old configs say eos 1, bos 0, and answer."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=968, dim=32, n_layers=1, n_heads=2, ffn_dim=64, max_seq_len=128)
    save_llama(Llama(config), tmp_path, bos_token_id=0, eos_token_id=1)
    shutil.copy(tiny / "sft" / "tokenizer.model", tmp_path)
    asked = [tmp_path, "--prompt=Who?", "--max_new_tokens=12"]
    said(capsys, *asked)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 960]}')
    with pytest.raises(SystemExit) as stop:
        said(capsys, *asked)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert "ends its answers with id 960" in err and "eos_token_id" in err


@pytest.mark.parametrize("error, line", [
    (InputError("--lr is a fish"), "eval.py: error: --lr is a fish\n"),
    (FileNotFoundError(2, "No such file", "a.json"),
     "eval.py: error: [Errno 2] No such file: 'a.json'\n")])
def test_a_users_mistake_is_one_line_of_the_first_process(monkeypatch, capsys, error, line):
    """torchrun's other workers make the same mistake, and stay silent."""
    def broken(folder):
        raise error

    monkeypatch.setattr(evaluation, "report", broken)
    for rank, expected in (("0", line), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as stop:
            evaluation.main(["table", "x"])
        assert stop.value.code == 2 and capsys.readouterr().err == expected


def test_a_bug_keeps_its_traceback(monkeypatch, capsys):
    """A ValueError of one's own half-finished change is no mistake of the user: in one line,
    without the place where it happened, it could not be mended."""
    def half_finished(records):
        raise ValueError("planted")

    monkeypatch.setattr(evaluation, "summarise", half_finished)
    monkeypatch.setattr(evaluation, "read_json", lambda path: {"records": []})
    monkeypatch.setattr("pathlib.Path.is_file", lambda path: True)
    with pytest.raises(ValueError, match="planted") as error:
        evaluation.main(["table", "x"])
    assert error.traceback[-1].name == "half_finished" and capsys.readouterr().err == ""


def on_cp1252(argv):
    """eval.py on a terminal of Western Europe's Windows."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="cp1252")
    evaluation.main([str(word) for word in argv])


def test_what_the_terminal_cannot_show_does_not_end_a_program(tiny, tmp_path):
    """cp1252 has é and no 日: what it lacks is printed as an escape, in answers as in mistakes."""
    rows, log = tmp_path / "rows.json", tmp_path / "log"
    rows.write_text(json.dumps([{"instruction": "é 日"}]))
    asked = ["generate", tiny / "sft", f"--input={rows}", "--max_new_tokens=4"]
    assert ended(fork(on_cp1252, asked, log=log)) == 0
    assert '"é \\u65e5"' in log.read_text(encoding="cp1252")
    log.unlink()
    assert ended(fork(on_cp1252, ["winrate", tmp_path / "日.json"], log=log)) == 2
    said = log.read_text(encoding="cp1252")
    assert said.endswith("\\u65e5.json'\n") and said.count("\n") == 1
