"""Several runs beside each other: means over seeds and their error, paired differences, the table
and the pictures; and that what a run leaves behind is read as it stands."""
import json
import math
import random
import sys

import pytest

import train
from conftest import ROOT
from eval import summarise
from model import InputError
from tools import figures


def number(value, se=0.02):
    return {"value": value, "se": se}


def row(step, kl, won):
    """One evaluation of a hand-made curve."""
    return {"step": step, "kl_per_token": number(kl), "score": number(1.0),
            "win_reference": number(won)}


def made(seed, wins, **more):
    """A hand-made outcome: SFT and step 10. wins: {person: [prompts, wins over the reference,
    over SFT]}."""
    rate = sum(won for _, won, _ in wins.values()) / sum(n for n, _, _ in wins.values())
    return {"path": "", "seed": seed, "settings": {"regularizer": "kl"},
            "evaluation": {"temperature": 0.7}, "wins": wins,
            "curve": [row(0, 0.0, 0.25), row(10, 0.5, rate)],
            "training": [dict.fromkeys(("step", *figures.TRAINING), n) for n in (1, 2)]} | more


def called(name, seed, wins):
    """An outcome of a run that differs from others in its penalty."""
    return made(seed, wins, settings={"regularizer": name})


@pytest.fixture
def runs(monkeypatch):
    """Hand-made outcomes in place of run folders: put them in, by path."""
    outcomes = {}
    monkeypatch.setattr(figures, "outcome", lambda path: outcomes[path] | {"path": path})
    return outcomes


def shown(capsys, *argv):
    """What the program prints -> {variant of a line of the table: its words}, lines by seed."""
    figures.main([str(a) for a in argv])
    table, by_seed = capsys.readouterr().out.split("\n\n")[:2]
    words = [line.removeprefix("regularizer ").split() for line in table.splitlines()[3:]]
    return {line[0]: line for line in words}, by_seed.splitlines()[1:]


def said(capsys, *argv):
    """The one line on which a mistake ends the program."""
    with pytest.raises(SystemExit) as stop:
        figures.main([str(a) for a in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("figures.py: error: ")
    return error


# ------------------------------------------------------------------------------- over seeds, paired

def test_a_mean_over_seeds_holds_the_spread_of_prompts_and_of_seeds():
    """Win rates .5, .6, .7 with errors .03, .04, .05. Between seeds .01 / 3, prompts (.0009 + .0016
    + .0025) / 3 (they are the same for every seed, so three seeds do not make them fewer):
    sqrt(.003333 + .001667) = .0707. Satterthwaite: 2 * (.005 / .003333)^2 = 4.5 degrees of
    freedom, and Student's quantile is between that of 5 (2.571) and of 4 (2.776)."""
    result = figures.over_seeds([number(0.5, 0.03), number(0.6, 0.04), number(0.7, 0.05)])
    assert (result["value"], result["seeds"]) == (pytest.approx(0.6), 3)
    assert result["se"] == pytest.approx(0.005 ** 0.5)
    assert 2.571 < (result["high"] - 0.6) / result["se"] < 2.776
    one = figures.over_seeds([number(0.6, 0.04)])
    assert (one["se"], one["seeds"]) == (pytest.approx(0.04), 1)
    assert one["high"] == pytest.approx(0.6 + 1.96 * 0.04)


def test_a_seed_without_a_value_is_not_counted():
    """A seed whose answers state no fact has no precision; the mean is of the others, and where
    there are none it is not a number."""
    result = figures.over_seeds([number(0.5, 0.03), number(float("nan"), float("nan"))])
    assert (result["value"], result["se"], result["seeds"]) == (0.5, pytest.approx(0.03), 1)
    assert math.isnan(figures.over_seeds([number(float("nan"))])["value"])
    assert figures.over_seeds([])["seeds"] == 0


def test_intervals_over_three_seeds_cover_the_truth():
    """Seeds scatter by .05, prompts (shared by the seeds) by .03. Two degrees of freedom are few:
    1.96 standard errors of the seeds alone would cover 71 %. Here 93 to 98 % of 1000:
    Satterthwaite's degrees are themselves an estimate."""
    rng, covered = random.Random(0), 0
    for _ in range(1000):
        prompts = rng.gauss(0, 0.03)
        seeds = [number(0.6 + prompts + rng.gauss(0, 0.05), 0.03) for _ in range(3)]
        result = figures.over_seeds(seeds)
        covered += result["low"] <= 0.6 <= result["high"]
    assert 930 <= covered <= 980


@pytest.mark.parametrize("df, quantile", [(1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228),
                                          (60, 2.000), (1e9, 1.960)])
def test_students_quantile_is_the_tables(df, quantile):
    """97.5 % points as any table of Student's t prints them, with three decimals."""
    assert figures.student_quantile(df) == pytest.approx(quantile, abs=1e-3)


def test_variants_are_compared_prompt_by_prompt():
    """Wins of a: 4 of 4 and 1 of 2, of b: 3 of 4 and .5 of 2. In both groups a wins a quarter more:
    5/6 - 3.5/6 = .25, and since the groups agree the error is 0, though each win rate alone has a
    large one. Seeds without a partner say nothing, nor do other prompts."""
    a = made(0, {"x": [4, 4, 0], "y": [2, 1, 0]})
    b = made(0, {"y": [2, 0.5, 0], "x": [4, 3, 0]})
    result = figures.difference([a], [b])
    assert result["value"] == pytest.approx(0.25) and result["se"] == pytest.approx(0, abs=1e-9)
    assert figures.difference([a], [b | {"seed": 1}])["seeds"] == 0
    assert figures.difference([a], [b | {"wins": {"x": [4, 3, 0]}}])["seeds"] == 0


# ------------------------------------------------------------------------------- which runs are one

def test_runs_that_share_a_seed_are_not_averaged_as_seeds():
    """Two runs of seed 0 with the same settings - from other reward models, say - are no sample of
    seeds: each has a row of its own, called by its path."""
    a, b, c = (made(seed, {"x": [10, 5, 0]}, path=path) for path, seed in zip("abc", (0, 0, 1)))
    assert figures.variants_of([a, c]) == {"kl": [a, c]}
    assert figures.variants_of([a, b, c]) == {"kl, a": [a], "kl, b": [b], "kl, c": [c]}


def test_runs_are_called_by_the_settings_in_which_they_differ():
    """Seeds and paths make no variant; a rank does, and names it."""
    runs = [made(seed, {"x": [10, 5, 0]}, settings={"regularizer": "kl", "lora_rank": rank})
            for seed, rank in ((0, 8), (1, 8), (0, 1))]
    names = {name: len(alike) for name, alike in figures.variants_of(runs).items()}
    assert names == {"lora_rank 8": 2, "lora_rank 1": 1}


def test_runs_that_answered_other_prompts_are_not_compared():
    """The validation and the test prompts ask about the same people, four prompts each: nothing but
    what the runs say of their data tells the two apart."""
    runs = [made(seed, {"x": [4, 2, 0]}, evaluation={"temperature": 0.7, "eval_data": data})
            for seed, data in ((0, "1f"), (1, "2e"))]
    with pytest.raises(InputError, match="evaluated on different data"):
        figures.variants_of(runs)


# ------------------------------------------------------------------------------------ what is shown

def test_the_table_has_a_row_per_variant(runs, tmp_path, monkeypatch, capsys):
    """(.5 + .7) / 2 = .6 for variant a, with two seeds; seed 0 alone has a partner in b: +10 %. The
    first row is what PPO started from. A folder named twice is read once. Without matplotlib that
    is all, and one line says why."""
    for name, seed, won in (("a", 0, 0.5), ("a", 1, 0.7), ("b", 0, 0.4)):
        wins = {"x": [10, 10 * won, 0], "y": [10, 10 * won, 0]}
        runs[f"{name}{seed}"] = called(name, seed, wins)
    monkeypatch.setitem(sys.modules, "matplotlib", None)           # import matplotlib: ImportError
    argv = [*runs, "a0", "--base", "regularizer b", "--out", tmp_path / "figures"]
    rows, by_seed = shown(capsys, *argv)
    assert rows["SFT"][1:3] == ["1", "25.0%"]
    assert rows["a"][1:3] == ["2", "60.0%"] and rows["b"][1:3] == ["1", "40.0%"]
    assert rows["a"][-2:] == ["+10.0%", "+-0.0%"] and rows["b"][-1] == "-"
    assert len(by_seed) == 1                                       # (b has one seed)
    assert by_seed[0].split()[1:6] == ["a", "50.0%", "70.0%", "|", "+10.0%"]
    figures.main(list(map(str, argv)))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "figures need matplotlib: pip install matplotlib"
    assert not (tmp_path / "figures").exists()


def test_a_seed_that_was_not_evaluated_is_in_no_curve_and_not_counted(runs, capsys):
    """A run without --eval_data beside one with: the table's mean is of the one, and says so,
    whichever comes first."""
    nothing = {"curve": [], "wins": {}, "evaluation": None}
    wins = {"x": [10, 7, 0]}
    runs |= {"a0": called("a", 0, wins) | nothing, "a1": called("a", 1, wins),
             "b0": called("b", 0, wins) | nothing}
    rows, _ = shown(capsys, *runs)
    assert rows["a"][1:3] == ["1", "70.0%"] and rows["b"][1:3] == ["0", "-"]
    curves = figures.curves_of(figures.variants_of(list(runs.values())), "step",
                               {"win_reference": "win rate"})
    assert list(curves) == ["regularizer a"]
    points = curves["regularizer a"]["win rate"]
    assert [(x, y["value"]) for x, y in points] == [(0, 0.25), (10, 0.7)]


def test_a_figure_shows_what_the_runs_know():
    """Along KL the place of a point is the mean over seeds: (.3 + .5) / 2. These runs say nothing
    about facts."""
    wins = {"x": [10, 5, 0]}
    seeds = [made(0, wins), made(1, wins, curve=[row(0, 0.0, 0.25), row(10, 0.3, 0.7)])]
    points = figures.curves_of({"own": seeds}, "kl_per_token", {"win_reference": "y"})["own"]["y"]
    assert points[1][0] == pytest.approx(0.4) and points[1][1]["value"] == pytest.approx(0.6)
    assert not figures.curves_of({"own": seeds}, "kl_per_token", {"precision_famous": "y"})


def test_figures_are_drawn_where_matplotlib_is(runs, tmp_path):
    """Three of the five: these runs say nothing about facts or annotators."""
    pytest.importorskip("matplotlib")
    runs |= {name: called(name, 0, {"x": [10, 5, 5]}) for name in "ab"}
    figures.main([*runs, "--out", str(tmp_path / "out")])
    drawn = {p.name for p in (tmp_path / "out").iterdir()}
    assert drawn == {"win_steps.png", "win_kl.png", "training.png"}


# --------------------------------------------------------------------------------------- a real run

def test_an_outcome_holds_the_curve_of_a_run(tiny, tmp_path, capsys):
    """Evaluated every 2 of 5 steps and at the end: SFT is step 0. The answers before training are
    made once and taken over; they are what the finished run, read back from its files, says with
    its adapter off. The folder is a RUN."""
    rows = json.loads((ROOT / "toy" / "test.json").read_text())[:6]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    folder = tmp_path / "ppo"
    train.main(["--stage=ppo", f"--model={tiny / 'sft'}", f"--reward={tiny / 'reward'}",
                f"--prompts={ROOT / 'toy' / 'unlabeled.json'}", f"--out={folder}", "--steps=5",
                f"--eval_data={tmp_path / 'rows.json'}", "--eval_every=2", "--rollout_batch=8",
                "--minibatch=4", "--micro_batch=2", "--response_len=12", "--prompt_len=60",
                "--lr=1e-2", "--dtype=float32"])
    found = figures.outcome(folder)
    curve = found["curve"]
    assert [row["step"] for row in curve] == [0, 2, 4, 5]
    assert curve[0]["kl_per_token"]["value"] == 0 < curve[3]["kl_per_token"]["value"]
    assert [row["step"] for row in found["training"]] == [1, 2, 3, 4, 5]
    assert sum(n for n, _, _ in found["wins"].values()) == 6
    evals = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    last = summarise(json.loads((folder / "eval.json").read_text())["records"])

    def before(summary):
        return json.dumps([summary["reference"], summary["before"]], sort_keys=True)

    assert before(evals[0]) == before(evals[1]) == before(last)
    assert evals[1]["after"]["score"]["value"] != evals[0]["after"]["score"]["value"]
    assert curve[3]["score"] == last["after"]["score"]
    capsys.readouterr()
    shown_rows, _ = shown(capsys, folder, "--out", tmp_path / "figures")
    assert shown_rows["SFT"][1] == shown_rows["kl"][1] == "1"


@pytest.mark.parametrize("argv, message", [
    (["{tmp}"], "holds no finished PPO run"), ([], "RUN"),
    (["good", "--base=b"], "--base b: the variants are kl")])
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, argv, message):
    """A folder without a run, nothing at all, a base that is none."""
    if argv[:1] == ["good"]:
        monkeypatch.setattr(figures, "outcome", lambda path: made(0, {"x": [1, 1, 1]}))
    assert message in said(capsys, *(part.replace("{tmp}", str(tmp_path)) for part in argv))
