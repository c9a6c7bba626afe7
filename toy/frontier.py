"""The frontier: what a penalty buys at a distance from the SFT model, from toy/frontier.jsonl.

    python toy/frontier.py                      the tables; with matplotlib also the pictures
    python toy/frontier.py mine.jsonl --out figures

A penalty's curve, of one seed, runs over its coefficients at the last step of PPO: how far the
policy went (KL from SFT, nats per token) and what came of it. Penalties are compared where they
went equally far: each curve is interpolated in the square root of KL at distances that were named
before the runs (toy/README.md), and only in seeds in which both curves reach to both sides of the
distance. Differences are paired by seed, whose SFT and reward model both penalties share; intervals
are Student's over seeds, K - 1 degrees of freedom.
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
from toy.study import PENALTIES  # noqa: E402
from tools.figures import (COLOURS, MARKERS, half_student, panels,  # noqa: E402
                           student_quantile)

KL, WIN, PRECISION = "kl_per_token", "win_reference", "precision_obscure"
DISTANCES = (0.15, 0.3, 0.5)         # nats per token, named before the runs
COMPARISONS = (                      # (penalty, the one that it is compared with)
    ("paper's jensen_shannon in the reward", "kl in the reward"),
    ("exact jensen_shannon in the loss", "exact kl in the loss"),
    ("exact kl in the loss", "kl in the reward"))
COMMON = 0.1                         # coefficient of the comparison that the paper makes


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


# ---------------------------------------------------------------------------------------- the data

def load(path):
    """Outcomes -> {penalty: {seed: {coefficient: row}}}."""
    found = {penalty: {} for penalty in PENALTIES}
    for row in read_rows(path):
        penalty, coefficient = row["variant"].rsplit(", ", 1)
        found[penalty].setdefault(row["seed"], {})[float(coefficient)] = row
    return found


def curve(rows, key):
    """(KL, value) of one seed's runs, by coefficient."""
    return [(row["ppo"][KL][0], row["ppo"][key][0]) for row in rows.values()]


def at_distance(found, penalty, key, kl, how=interpolated):
    """{seed: the penalty's value there}, of the seeds whose curve reaches to both sides of it."""
    values = {seed: how(curve(rows, key), kl) for seed, rows in found[penalty].items()}
    return {seed: value for seed, value in values.items() if value is not None}


def paired(ours, theirs):
    """Differences of the seeds that both have."""
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def at_coefficient(found, penalty, key, coefficient):
    """{seed: the value of the run with this coefficient}"""
    return {seed: rows[coefficient]["ppo"][key][0] for seed, rows in found[penalty].items()
            if coefficient in rows}


# -------------------------------------------------------------------------------------- the tables

def percent(x):
    return "-" if x is None else f"{x:.1%}"


def interval(s):
    """mean (low to high), p and n of `student`."""
    if s is None:
        return "-"
    return f"{s['mean']:+.1%} ({s['low']:+.1%} to {s['high']:+.1%}), p {s['p']:.3f}, n {s['n']}"


def grid_table(found):
    """Each coefficient: the mean over seeds of KL, win rate, gold and proxy score, precision."""
    keys = (KL, WIN, "win_before", "annotator", "score", PRECISION, "tokens")
    lines = [f"{'means over seeds':46}{'n':>3}{'KL':>8}{'win':>8}{'vs SFT':>8}{'gold':>7}"
             f"{'proxy':>7}{'obscure':>9}{'tokens':>8}"]
    for penalty, seeds in found.items():
        for coefficient in PENALTIES[penalty][1]:
            rows = [rows[coefficient] for rows in seeds.values() if coefficient in rows]
            if rows:
                kl, win, sft, gold, proxy, obscure, tokens = (
                    fmean(row["ppo"][key][0] for row in rows) for key in keys)
                lines.append(f"{f'{penalty}, {coefficient}':46}{len(rows):3}{kl:8.3f}{win:8.1%}"
                             f"{sft:8.1%}{gold:7.2f}{proxy:7.2f}{obscure:9.1%}{tokens:8.1f}")
    return "\n".join(lines)


def distance_table(found, key):
    """Each penalty at each distance, the mean over the seeds that reach it."""
    lines = [f"{'KL from SFT, nats per token':40}" + "".join(f"{kl:>14}" for kl in DISTANCES)]
    for penalty in found:
        cells = []
        for kl in DISTANCES:
            values = list(at_distance(found, penalty, key, kl).values())
            cells.append(f"{percent(fmean(values) if values else None)} (n {len(values)})")
        lines.append(f"{penalty:40}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def comparison_table(found, key):
    """Differences at equal KL, by straight lines and by parabolas."""
    lines = []
    for penalty, other in COMPARISONS:
        lines.append(f"{penalty} minus {other}")
        for kl in DISTANCES:
            for how in (interpolated, fitted):
                values = [at_distance(found, p, key, kl, how) for p in (penalty, other)]
                seeds = " ".join(f"{x:+.1%}" for x in paired(*values))
                lines.append(f"  KL {kl:<5} {how.__name__:13} {interval(student(paired(*values)))}"
                             f" | {seeds}")
    return "\n".join(lines)


def common_table(found):
    """Differences at one coefficient, as the paper made them, with how far each went."""
    lines = []
    for penalty, other in COMPARISONS[:2]:
        wins = [at_coefficient(found, p, WIN, COMMON) for p in (penalty, other)]
        kls = [at_coefficient(found, p, KL, COMMON) for p in (penalty, other)]
        went = " and ".join(f"{fmean(kl.values()):.3f}" if kl else "-" for kl in kls)
        lines.append(f"{penalty} minus {other}: {interval(student(paired(*wins)))}; KL {went}")
    return "\n".join(lines)


def spacing(found):
    """The largest factors between neighbouring KLs within the range of the distances."""
    lines = []
    for penalty, seeds in found.items():
        factors = []
        for rows in seeds.values():
            kls = sorted(kl for kl, _ in curve(rows, WIN))
            factors += [b / a for a, b in zip(kls, kls[1:])
                        if b >= DISTANCES[0] and a <= DISTANCES[-1] and a > 0]
        if factors:
            lines.append(f"{penalty:40}median {numpy.median(factors):.2f}, "
                         f"largest {max(factors):.2f}")
    return "\n".join(lines)


def report(found):
    return "\n\n".join((
        grid_table(found),
        "Win rate against the reference at equal KL\n" + distance_table(found, WIN),
        "Differences of the win rate, paired by seed (95 % intervals)\n"
        + comparison_table(found, WIN),
        "Precision on obscure people at equal KL\n" + distance_table(found, PRECISION),
        "Differences of it\n" + comparison_table(found, PRECISION),
        f"At a common coefficient of {COMMON}, as the paper compares: win rate\n"
        + common_table(found),
        "Factors between neighbouring KLs from the first distance to the last\n" + spacing(found)))


# ------------------------------------------------------------------------------------ the pictures

def draw(figure, found, key, label):
    """A panel per penalty: its seeds, and the mean at each distance with its interval; the means of
    the others in grey."""
    means = {}
    for penalty in found:
        values = [list(at_distance(found, penalty, key, kl).values()) for kl in DISTANCES]
        means[penalty] = [student(v) for v in values]
    axes = panels(figure, len(found))
    for axis, (penalty, seeds) in zip(axes, found.items()):
        for seed, rows in seeds.items():
            points = sorted(curve(rows, key))
            axis.plot([math.sqrt(kl) for kl, _ in points], [y for _, y in points], linewidth=0.6,
                      marker=".", markersize=2, color="#AAAAAA",
                      label="single seeds" if seed == min(seeds) else None)
        for i, (other, stats) in enumerate(means.items()):
            there = [(math.sqrt(kl), s) for kl, s in zip(DISTANCES, stats) if s]
            x, y = [x for x, _ in there], [s["mean"] for _, s in there]
            if other == penalty:
                reach = [s["high"] - s["mean"] for _, s in there]
                axis.errorbar(x, y, reach, color=COLOURS[i], marker=MARKERS[i], markersize=4,
                              linewidth=1.4, capsize=2, label=other)
            else:
                axis.plot(x, y, color=COLOURS[i], marker=MARKERS[i], markersize=2.5, linewidth=0.7,
                          linestyle=":", label=other)
        axis.set_title(penalty.replace(" in the", "\nin the"), fontsize="medium")
        axis.set_xticks([math.sqrt(kl) for kl in (*DISTANCES, 0.9)], [*DISTANCES, 0.9])
    figure.supxlabel("KL from SFT, nats per token, on a square-root scale; bars: 95 % interval of "
                     "the mean over seeds; dotted: the other penalties' means", fontsize="medium")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.supylabel(label, fontsize="medium")


def write_figures(found, folder):
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        print("\nfigures need matplotlib: pip install matplotlib")
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with rc_context({"font.size": 8}):
        for file, key, label in (("frontier_win", WIN, "win rate against the reference"),
                                 ("frontier_precision", PRECISION, "obscure people: true / stated"),
                                 ("frontier_gold", "annotator", "annotators' score, points"),
                                 ("frontier_proxy", "score", "reward model's score, logits")):
            figure = Figure(layout="constrained")
            draw(figure, found, key, label)
            figure.savefig(Path(folder) / f"{file}.png", dpi=200)
            print(Path(folder) / f"{file}.png")


def main(argv=None):
    with mistakes_in_one_line("frontier.py"):
        parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
        parser.add_argument("data", nargs="?", default=os.path.relpath(ROOT / "toy/frontier.jsonl"),
                            help="outcomes of toy/study.py frontier (default: the committed ones)")
        parser.add_argument("--out", default="figures", help="where the pictures go")
        args = parser.parse_args(argv)
        found = load(args.data)
        print(report(found))
        write_figures(found, args.out)


if __name__ == "__main__":
    main()
