"""What the studies of toy/README.md came to: its four questions, from the committed outcomes.

    python toy/frontier.py                      the tables; with matplotlib also the pictures
    python toy/frontier.py mine --out figures   from another folder's frontier.jsonl, need.jsonl, ..

A penalty's curve, of one seed, runs over its coefficients at the last step of PPO: how far the
policy went (KL from SFT, nats per token) and what came of it. Penalties are compared where they
went equally far: each curve is interpolated in the square root of KL at distances that were named
before the runs, and only in seeds in which both curves reach to both sides of the distance.
Differences are paired by seed, whose SFT and reward model both share; intervals are Student's over
seeds, K - 1 degrees of freedom.
"""
import math
import os
import sys
from pathlib import Path
from statistics import fmean, stdev

import numpy

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import read_rows  # noqa: E402
from eval import Parser, mistakes_in_one_line  # noqa: E402
from model import InputError  # noqa: E402
from toy.study import CELLS, OTHERS, PENALTIES  # noqa: E402
from tools.figures import (COLOURS, MARKERS, X_LABELS, half_student, panels,  # noqa: E402
                           student_quantile, write_figures)

KL, WIN, PRECISION = "kl_per_token", "win_reference", "precision_obscure"
DISTANCES = (0.15, 0.3, 0.5)         # nats per token, named before the runs
REWARD_KL, PAPER_JS, LOSS_KL, LOSS_JS = PENALTIES
COMPARISONS = ((PAPER_JS, REWARD_KL), (LOSS_JS, LOSS_KL), (LOSS_KL, REWARD_KL))
NEED = (("LoRA without", "LoRA with KL"), ("all weights without", "all weights with KL"))
COMMON = 0.1                         # coefficient of the comparison that the paper makes
SPREAD = ("SFT's seed", "reward model's seed", "PPO's seed", "processes")


# ------------------------------------------------------------------------------------- statistics

def interpolated(points, kl):
    """A curve's value at a KL, linear in sqrt(KL) between its two neighbours; None if the curve
    does not reach to both sides. points: (KL, value)."""
    points = sorted(points)
    for (a, y), (b, z) in zip(points, points[1:]):
        if a <= kl <= b and a < b:
            share = (math.sqrt(kl) - math.sqrt(a)) / (math.sqrt(b) - math.sqrt(a))
            return y + share * (z - y)
    return None


def fitted(points, kl):
    """The same by a parabola in sqrt(KL) through all points (least squares)."""
    if len(points) < 4 or interpolated(points, kl) is None:
        return None
    x, y = numpy.sqrt([p[0] for p in points]), [p[1] for p in points]
    return float(numpy.polyval(numpy.polyfit(x, y, 2), math.sqrt(kl)))


def student(differences):
    """Paired differences, one per seed -> mean, 95 % interval, two-sided p value of "the mean is
    0", and their number; None for fewer than two."""
    n = len(differences)
    if n < 2:
        return None
    mean, error = fmean(differences), stdev(differences) / math.sqrt(n)
    reach = student_quantile(n - 1) * error
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "n": n,
            "p": p_value(mean / error, n - 1) if error else 0.0}


def p_value(t, df):
    """P(|T| > |t|) of Student's t."""
    angle, mass = half_student(df)
    return float(1 - numpy.interp(math.atan(abs(t) / math.sqrt(df)), angle, mass))


def holm(p_values):
    """Holm's step-down adjustment (Scandinavian Journal of Statistics 6, 1979): the k-th smallest
    of m is multiplied by m - k + 1, none falls below an earlier one, none exceeds 1."""
    m, adjusted, worst = len(p_values), [0.0] * len(p_values), 0.0
    for k, i in enumerate(sorted(range(m), key=p_values.__getitem__)):
        worst = max(worst, min(1.0, (m - k) * p_values[i]))
        adjusted[i] = worst
    return adjusted


def wilson(k, n):
    """Wilson's 95 % interval of a share k / n (Journal of the American Statistical Association 22,
    1927)."""
    z2 = 1.96 ** 2
    middle, reach = k + z2 / 2, math.sqrt(z2 * (k * (n - k) / n + z2 / 4))
    return (middle - reach) / (n + z2), (middle + reach) / (n + z2)


# ---------------------------------------------------------------------------------------- the data

def load(path):
    """Outcomes of a study -> {variant without its coefficient: {seed: {coefficient: row}}}; None
    is the coefficient of a variant that has none. A file that is not there: no outcomes."""
    found = {}
    for row in read_rows(path) if path.is_file() else []:
        name, comma, coefficient = row["variant"].rpartition(", ")
        key = float(coefficient) if comma else None
        found.setdefault(name or coefficient, {}).setdefault(row["seed"], {})[key] = row
    return found


def load_all(folder):
    """Outcomes of all studies; of question 4 where spread comes from; and rank 8 of question 3,
    which question 1 has run."""
    names = ("frontier", "rates", "need", "ranks", "context", "best_of_n")
    data = {name: load(Path(folder) / f"{name}.jsonl") for name in names}
    if not data["frontier"]:
        raise InputError(f"{folder} has no frontier.jsonl: python toy/study.py frontier")
    data["spread"] = {name: data["context"][name] for name in SPREAD if name in data["context"]}
    # (beside what was announced: with two more coefficients)
    for seed, rows in data["ranks"].get("all weights, further", {}).items():
        rows |= data["ranks"]["all weights"][seed]
    data["by rank"] = {"rank 8": data["frontier"][REWARD_KL]} | data["ranks"]
    return data


def count(found):
    """How many runs there are."""
    return sum(len(rows) for seeds in found.values() for rows in seeds.values())


def curve(rows, key, x=KL):
    """(KL, value) of one seed's runs, by coefficient."""
    return [(row["ppo"][x][0], row["ppo"][key][0]) for row in rows.values()]


def at_distance(found, penalty, key, kl, how=interpolated, x=KL):
    """{seed: the penalty's value there}, of the seeds whose curve reaches to both sides of it."""
    values = {seed: how(curve(rows, key, x), kl) for seed, rows in found.get(penalty, {}).items()}
    return {seed: value for seed, value in values.items() if value is not None}


def at_coefficient(found, penalty, key, coefficient=None):
    """{seed: the value of the run with this coefficient}"""
    return {seed: rows[coefficient]["ppo"][key][0]
            for seed, rows in found.get(penalty, {}).items() if coefficient in rows}


def paired(where, found, pair, *what):
    """Differences between two variants in the seeds that both have. where: at_distance or
    at_coefficient, what: its further arguments."""
    ours, theirs = (where(found, variant, *what) for variant in pair)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


# -------------------------------------------------------------------------------------- the tables

def interval(s):
    """mean (low to high), p and n of `student`."""
    if s is None:
        return "-"
    return f"{s['mean']:+.1%} ({s['low']:+.1%} to {s['high']:+.1%}), p {s['p']:.3f}, n {s['n']}"


def grid_table(found):
    """Each run: the mean over seeds of KL, win rate, gold and proxy score, precision."""
    keys = (KL, WIN, "win_before", "annotator", "score", PRECISION, "tokens")
    lines = [f"{'means over seeds':46}{'n':>3}{'KL':>8}{'win':>8}{'vs SFT':>8}{'gold':>7}"
             f"{'proxy':>7}{'obscure':>9}{'tokens':>8}"]
    for name, seeds in found.items():
        for coefficient in sorted({c for rows in seeds.values() for c in rows}, reverse=True):
            rows = [rows[coefficient] for rows in seeds.values() if coefficient in rows]
            kl, win, sft, gold, proxy, obscure, tokens = (
                fmean(row["ppo"][key][0] for row in rows) for key in keys)
            label = name if coefficient is None else f"{name}, {coefficient:g}"
            lines.append(f"{label:46}{len(rows):3}{kl:8.3f}{win:8.1%}{sft:8.1%}{gold:7.2f}"
                         f"{proxy:7.2f}{obscure:9.1%}{tokens:8.1f}")
    return "\n".join(lines)


def distance_table(found, key):
    """Each penalty at each distance, the mean over the seeds that reach it."""
    lines = [f"{'KL from SFT, nats per token':40}" + "".join(f"{kl:>14}" for kl in DISTANCES)]
    for penalty in found:
        cells = []
        for kl in DISTANCES:
            values = list(at_distance(found, penalty, key, kl).values())
            cells.append(f"{fmean(values):.1%} (n {len(values)})" if values else "-")
        lines.append(f"{penalty:40}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def comparison_table(found, key, comparisons):
    """Differences at equal KL, by straight lines and by parabolas."""
    lines = []
    for pair in comparisons:
        lines.append(" minus ".join(pair))
        for kl in DISTANCES:
            for how in (interpolated, fitted):
                by_seed = paired(at_distance, found, pair, key, kl, how)
                if by_seed:
                    lines.append(f"  KL {kl:<5} {how.__name__:13} {interval(student(by_seed))} | "
                                 + " ".join(f"{x:+.1%}" for x in by_seed))
    return "\n".join(lines)


def common_table(found):
    """Differences at one coefficient, as the paper made them."""
    return "\n".join(
        f"{penalty} minus {other}: "
        f"{interval(student(paired(at_coefficient, found, (penalty, other), WIN, COMMON)))}"
        for penalty, other in COMPARISONS[:2])


def cost_table(found):
    """What PPO costs in precision: KL in the reward at each distance minus SFT, paired by seed."""
    sft = {seed: rows[COMMON]["sft"][PRECISION][0]
           for seed, rows in found[REWARD_KL].items() if COMMON in rows}
    lines = [f"SFT: {fmean(sft.values()):.1%}"]
    for kl in DISTANCES:
        there = at_distance(found, REWARD_KL, PRECISION, kl)
        lost = [value - sft[seed] for seed, value in there.items()]
        lines.append(f"KL {kl} minus SFT: {interval(student(lost))}")
    return "\n".join(lines)


def others_table(context, frontier):
    """All penalties of the paper, and two more, with the same seeds; their differences from KL in
    the reward."""
    found = {name: {seed: {None: frontier[name][seed][COMMON]} for seed in (10, 11, 12)}
             for name in (REWARD_KL, PAPER_JS)}
    found |= {it.name: context[it.name] for it in OTHERS if it.name in context}
    lines = [grid_table(found)]
    for name in list(found)[1:]:
        minus = paired(at_coefficient, found, (name, REWARD_KL), WIN)
        lines.append(f"{name} minus {REWARD_KL}: {interval(student(minus))}")
    return "\n".join(lines)


def need_table(found):
    """Question 2: none minus KL, and the share of runs that won less than half against SFT."""
    lines = []
    for pair in NEED:
        lines.append(f"{' minus '.join(pair)}: "
                     f"{interval(student(paired(at_coefficient, found, pair, WIN)))}")
    for cell in CELLS:
        won = at_coefficient(found, cell, "win_before").values()
        if won:
            collapsed = sum(x < 0.5 for x in won)
            low, high = wilson(collapsed, len(won))
            lines.append(f"{cell}: {collapsed} of {len(won)} collapsed ({low:.0%} to {high:.0%})")
    return "\n".join(lines)


def spread_table(spread, frontier):
    """Standard deviations over runs of which one thing is another, and the run that all share."""
    shared = frontier[REWARD_KL][10][COMMON]
    lines = [f"{'one thing at a time is another':34}{'runs':>5}{'win':>8}{'KL':>8}{'obscure':>9}"]
    for name, seeds in spread.items():
        rows = [shared, *(row for rows in seeds.values() for row in rows.values())]
        win, kl, obscure = (stdev(row["ppo"][key][0] for row in rows)
                            for key in (WIN, KL, PRECISION))
        lines.append(f"{name:34}{len(rows):5}{win:8.1%}{kl:8.3f}{obscure:9.1%}")
    return "\n".join(lines)


def primary_table(frontier, need, by_rank):
    """The three tests that were announced, adjusted together, and what the announcement makes of
    them. One whose runs are not all there is not made. by_rank: curves of question 3, rank 8's
    too."""
    at_common = paired(at_coefficient, frontier, COMPARISONS[0], WIN, COMMON)
    tests = (
        ("A paper's Jensen-Shannon minus KL, win rate at KL .3", count(frontier) == 180,
         paired(at_distance, frontier, COMPARISONS[0], WIN, 0.3)),
        ("B LoRA without a penalty minus with KL, win rate", count(need) == 64,
         paired(at_coefficient, need, NEED[0], WIN)),
        ("C LoRA minus all weights, precision at KL .3", count(by_rank) >= 42 + 54,
         paired(at_distance, by_rank, ("rank 8", "all weights"), PRECISION, 0.3)))
    stats = [student(differences) if made else None for _, made, differences in tests]
    lines = []
    for (name, *_), s, p in zip(tests, stats, holm([s["p"] if s else 1.0 for s in stats])):
        found = "not made, runs are missing"
        if s:
            found = f"{interval(s)}; adjusted p {p:.3f}: {verdict(name[0], s, p, at_common)}"
        lines.append(f"{name}: {found}")
    return "\n".join(lines)


def verdict(test, s, p, at_common):
    """What toy/README.md announced for this outcome of test A, B or C."""
    higher, lower = p < 0.05 and s["mean"] > 0, p < 0.05 and s["mean"] < 0
    if test == "A":
        weaker = -0.05 < s["low"] and s["high"] < 0.05 and fmean(at_common) > 0
        return "better" if higher else "only weaker" if lower or weaker else "undecided"
    if test == "B":
        return "needed" if lower else "not needed" if s["low"] > -0.1 else "undecided"
    return "saves" if higher else "does not save" if s["high"] < 0.03 else "undecided"


def report(data):
    """All tables for which there are outcomes."""
    frontier, need, by_rank = data["frontier"], data["need"], data["by rank"]
    pairs = [("rank 8", other) for other in list(by_rank)[1:]]
    equal_kl, differences = "Precision on obscure people at equal KL", "Differences of it"
    parts = [
        ("The three tests", primary_table, frontier, need, by_rank),
        ("1. Penalties along their frontiers", grid_table, frontier),
        ("Win rate against the reference at equal KL", distance_table, frontier, WIN),
        ("Differences of the win rate, paired by seed (95 % intervals)", comparison_table,
         frontier, WIN, COMPARISONS),
        (equal_kl, distance_table, frontier, PRECISION),
        (differences, comparison_table, frontier, PRECISION, COMPARISONS),
        ("What it costs", cost_table, frontier),
        (f"At a common coefficient of {COMMON}, as the paper compares: win rate", common_table,
         frontier),
        ("The grid of question 2, on val.json", grid_table, data["rates"]),
        ("2. With a penalty and without", grid_table, need),
        ("Differences, and runs that lose against SFT", need_table, need),
        ("3. How much is trained", grid_table, data["ranks"]),
        (f"4. Penalties as the paper compares them, at {COMMON}", others_table, data["context"],
         frontier),
        ("Standard deviations", spread_table, data["spread"], frontier),
        ("Best-of-n (KL: its upper bound)", grid_table, data["best_of_n"])]
    if data["ranks"]:
        parts += [(equal_kl, distance_table, by_rank, PRECISION),
                  (differences, comparison_table, by_rank, PRECISION, pairs)]
    return "\n\n".join(f"{title}\n{make(found, *more)}" for title, make, found, *more in parts
                       if found)


# ------------------------------------------------------------------------------------ the pictures

def draw(figure, found, key, label, x, distances):
    """A panel per penalty: its seeds, and the mean at each distance with its interval; the means of
    the others dotted."""
    means = {penalty: [(math.sqrt(kl), s) for kl in distances
                       if (s := student(at_distance(found, penalty, key, kl, x=x).values()))]
             for penalty in found}
    axes = panels(figure, len(found))
    for axis, (penalty, seeds) in zip(axes, found.items()):
        for seed, rows in seeds.items():
            points = sorted(curve(rows, key, x))
            axis.plot([math.sqrt(kl) for kl, _ in points], [y for _, y in points], linewidth=0.6,
                      marker=".", markersize=2, color="#AAAAAA",
                      label="single seeds" if seed == min(seeds) else None)
        for i, (other, there) in enumerate(means.items()):
            own = other == penalty
            axis.errorbar([root for root, _ in there], [s["mean"] for _, s in there],
                          [(s["high"] - s["mean"]) * own for _, s in there], label=other,
                          color=COLOURS[i], marker=MARKERS[i], markersize=4 if own else 2.5,
                          linewidth=1.4 if own else 0.7, linestyle="-" if own else ":",
                          capsize=2 * own)
        axis.set_title(penalty.replace(" in the", "\nin the"), fontsize="medium")
        axis.set_xticks([math.sqrt(kl) for kl in distances], distances)
    figure.supxlabel(f"{X_LABELS[x]}; bars: 95 % interval of the mean over seeds; dotted: the "
                     "others' means", fontsize="medium")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.supylabel(label, fontsize="medium")


LABELS = {WIN: "win rate against the reference", PRECISION: "obscure people: true / stated",
          "annotator": "annotators' score, points", "score": "reward model's score, logits"}
PER_ANSWER = "kl_per_sequence"


def drawings(data):
    """The pictures for which there are outcomes."""
    frontier, best = data["frontier"], data["best_of_n"]
    for key, label in LABELS.items():
        yield f"frontier_{key}", draw, frontier, key, label, KL, (*DISTANCES, 0.8)
        if best:
            shown = {REWARD_KL: frontier[REWARD_KL], "best of n (KL: at most)": best["best of n"]}
            yield f"best_of_n_{key}", draw, shown, key, label, PER_ANSWER, (0.3, 1, 2, 3, 5, 8)
    if data["ranks"]:
        by_rank = dict(data["by rank"])
        del by_rank["all weights"]             # (`further` has them)
        yield "ranks_precision", draw, by_rank, PRECISION, LABELS[PRECISION], KL, DISTANCES


def main(argv=None):
    with mistakes_in_one_line("frontier.py"):
        parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
        parser.add_argument("data", nargs="?", default=os.path.relpath(ROOT / "toy"),
                            help="folder of the outcomes (default: the committed ones)")
        parser.add_argument("--out", default="figures", help="where the pictures go")
        args = parser.parse_args(argv)
        data = load_all(args.data)
        print(report(data))
        write_figures(args.out, drawings(data))


if __name__ == "__main__":
    main()
