"""Several runs beside each other: a table, and pictures where matplotlib is installed.

    python tools/figures.py runs/toy/ppo runs/none/ppo

A RUN is the folder of a PPO run; train.py's --eval_every gives its curves their points. Runs whose
settings differ in the seed alone are one variant, and a row of the table; what distinguishes the
others names them.

Over seeds: the mean, with an error that holds the spread between prompts and that between seeds
(over_seeds). Differences between two variants are paired by seed and prompt, so that what all
share - the SFT model, the reward model, how hard a prompt is - drops out (difference).
"""
import itertools
import json
import math
import sys
from functools import lru_cache
from pathlib import Path
from statistics import fmean

import numpy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import read_rows  # noqa: E402
from eval import (SYSTEMS, Parser, groups_of, judge, mistakes_in_one_line,  # noqa: E402
                  outcomes, ppo_settings, ratio_with_error, summarise, with_se)
from model import InputError, read_json  # noqa: E402

# columns of metrics.jsonl that are drawn
TRAINING = {"score": "score, logits", "kl_per_token": "KL from SFT, nats per token",
            "entropy": "entropy, nats per token", "clip_frac": "share of tokens clipped",
            "explained_variance": "explained variance of returns", "length": "length, tokens",
            "eos_rate": "share of answers that end"}
INPUTS = ("stage", "seed", "model", "reward", "tokenizer", "prompts")   # they make no other variant
UNKNOWN = dict.fromkeys(("value", "se", "low", "high"), float("nan")) | {"seeds": 0}


# ----------------------------------------------------------------------------- one run: its outcome

def outcome(folder):
    """What a PPO run folder tells:

    path, seed, settings; evaluation: what the answers were made with; curve: the evaluation at each
    step that has one (step 0 is SFT), of each quantity {"value", "se"}; wins: per group of prompts
    [how many, wins against the reference, wins against SFT]; training: rows of metrics.jsonl."""
    folder = Path(folder)
    settings, _ = ppo_settings(folder)
    evals, won, evaluation = lines_of(folder / "evals.jsonl"), {}, None
    if (folder / "eval.json").is_file():
        finished = read_json(folder / "eval.json")
        won, evaluation = wins(finished["records"]), finished["settings"]
        evals = [row for row in evals if row["step"] < settings["steps"]]
        evals.append({"step": settings["steps"]} | summarise(finished["records"]))
    curve = [{"step": row["step"]} | row["after"] for row in evals]
    if evals:
        by_definition = {"win_before": 0.5, "kl_per_token": 0.0, "kl_per_sequence": 0.0}
        sft = {key: {"value": value, "se": 0.0} for key, value in by_definition.items()}
        curve.insert(0, {"step": 0} | sft | evals[-1]["before"])
    own = {key: value for key, value in settings.items() if key not in INPUTS}
    return {"path": str(folder), "seed": settings["seed"], "settings": own,
            "evaluation": evaluation, "wins": won, "curve": curve,
            "training": lines_of(folder / "metrics.jsonl")}


def lines_of(path):
    """Records of a file of JSON lines; none where there is no file, or nothing in it."""
    return read_rows(path) if path.is_file() and path.stat().st_size else []


def wins(records):
    """{group of prompts: [how many, wins against the reference, wins against SFT]}; a draw is
    half a win."""
    judged = {name: judge(records, name) for name in SYSTEMS}
    against_reference = outcomes(judged["after"], judged["reference"])
    against_sft = outcomes(judged["after"], judged["before"])
    counts = {}
    for group, first, second in zip(groups_of(records), against_reference, against_sft):
        total = counts.setdefault(str(group), [0, 0, 0])
        total[0] += 1
        total[1] += first
        total[2] += second
    return counts


# --------------------------------------------------------------------------- several runs: variants

def variants_of(runs):
    """Outcomes -> {variant: its outcomes, one per seed}, in order.

    Two runs of one variant with one seed - of other reward models, say - are no sample of seeds:
    each is a variant of its own, called by its path as well."""
    if len({json.dumps(run["evaluation"]) for run in runs if run["evaluation"]}) > 1:
        raise InputError("the runs were evaluated on different data, or at different temperatures: "
                         "evaluate them alike (train.py --redo eval)")
    by_name, variants = {}, {}
    for run, name in zip(runs, names_of(runs)):
        by_name.setdefault(name, []).append(run)
    for name, alike in by_name.items():
        apart = len({run["seed"] for run in alike}) < len(alike)
        for run in alike:
            own = f"{name}, {run['path']}" if apart else name
            variants.setdefault(own, []).append(run)
    return variants


def names_of(runs):
    """What each run is called: the settings in which the runs differ."""
    keys = dict.fromkeys(itertools.chain(*(run["settings"] for run in runs)))
    differ = [key for key in keys if len({repr(run["settings"].get(key)) for run in runs}) > 1]
    names = []
    for run in runs:
        own = ", ".join(f"{key} {run['settings'].get(key)}" for key in differ)
        names.append(own or run["settings"]["regularizer"])
    return names


def over_seeds(results):
    """One quantity from several seeds, each {"value", "se"} -> its mean over seeds, with an error
    that holds both spreads.

        se^2 = s^2 / K + mean(se_k^2)       s: standard deviation between the K seeds,
                                            se_k: error of the prompts within seed k

    The prompts are the same for every seed, so their part does not shrink with K. (s holds a share
    of the noise that se_k holds as well: slightly conservative.) The interval is Student's, with
    Satterthwaite's degrees of freedom: three seeds say little about their own spread. One seed: no
    spread between seeds is known, and none added."""
    results = [r for r in results if r["value"] == r["value"]]      # (without facts, no precision)
    if not results:
        return UNKNOWN
    values, K = torch.tensor([r["value"] for r in results], dtype=torch.float64), len(results)
    prompts, seeds, quantile = fmean([r["se"] ** 2 for r in results]), 0.0, 1.96
    if K > 1:
        seeds = values.var().item() / K
    if seeds > 0:
        quantile = student_quantile((K - 1) * ((seeds + prompts) / seeds) ** 2)
    value, se = values.mean().item(), (prompts + seeds) ** 0.5
    return {"value": value, "se": se, "low": value - quantile * se, "high": value + quantile * se,
            "seeds": K}


@lru_cache
def half_student(df):
    """|T| of Student's t with df degrees of freedom as angles, t = sqrt(df) tan(angle), in which
    its density is cos(angle)^(df - 1) -> angles, P(|T| up to there)."""
    angle = numpy.linspace(0, math.pi / 2, 100001)
    mass = (numpy.cos(angle).clip(0) ** (df - 1)).cumsum()
    return angle, mass / mass[-1]


def student_quantile(df):
    """97.5 % quantile of Student's t with df degrees of freedom."""
    df = min(df, 1e4)
    angle, mass = half_student(df)
    return df ** 0.5 * math.tan(numpy.interp(0.95, mass, angle))


def difference(runs, base):
    """Win rate against the reference of one variant minus that of another, paired by seed and
    prompt; UNKNOWN where no seed has both."""
    partners, results = {run["seed"]: run["wins"] for run in base}, []
    for run in runs:
        ours, theirs = run["wins"], partners.get(run["seed"], {})
        if ours and ours.keys() == theirs.keys():
            pairs = [(won - theirs[group][1], n) for group, (n, won, _) in ours.items()]
            results.append(ratio_with_error(pairs, list(ours)))
    return over_seeds(results)


def evaluated(runs):
    return [run for run in runs if run["curve"]]


def value_at(runs, place, key):
    """A quantity at a place of the curve (0: SFT, -1: the last step), over seeds."""
    return over_seeds([run["curve"][place].get(key, UNKNOWN) for run in evaluated(runs)])


# --------------------------------------------------------------------------------------- the tables

COLUMNS = (("vs reference", "win_reference", "{:.1%}"), ("vs SFT", "win_before", "{:.1%}"),
           ("KL/token", "kl_per_token", "{:.3f}"), ("tokens", "tokens", "{:.1f}"),
           ("gold", "annotator", "{:.2f}"), ("proxy", "score", "{:.2f}"),
           ("famous", "precision_famous", "{:.1%}"), ("obscure", "precision_obscure", "{:.1%}"),
           ("no facts", "no_facts", "{:.1%}"))


def table(variants, base):
    """A row per variant at its last step, and its difference from the variant `base`."""
    label = f"minus {base}"
    width, last = max(map(len, variants)) + 2, max(16, len(label) + 2)
    lines = ["mean over seeds +- standard error, of prompts and seeds (one seed: of prompts alone)",
             f"SFT: where {base!r} starts; last column: win rate against the reference, minus that "
             f"of {base!r}, paired by seed and prompt",
             f"{'':{width}}{'seeds':>5}" + "".join(f"{title:>15}" for title, *_ in COLUMNS)
             + f"{label:>{last}}"]
    rows = [("SFT", variants[base], 0)] + [(name, runs, -1) for name, runs in variants.items()]
    for name, runs, place in rows:
        cells = [with_se(value_at(runs, place, key), form) for _, key, form in COLUMNS]
        minus = ""
        if name not in ("SFT", base):
            minus = with_se(difference(runs, variants[base]), "{:+.1%}")
        lines.append(f"{name:{width}}{len(evaluated(runs)):>5}"
                     + "".join(f"{cell:>15}" for cell in cells) + f"{minus:>{last}}")
    return "\n".join(lines)


def table_by_seed(variants, base):
    """What single seeds say of the variants that have several."""
    lines = [f"by seed: win rate against the reference | minus that of {base!r}, with 95 % "
             "interval | KL per token"]
    width = max(map(len, variants)) + 2
    for name, runs in variants.items():
        ends = [run["curve"][-1] for run in evaluated(runs)]
        if len(ends) > 1:
            won = " ".join(f"{end['win_reference']['value']:.1%}" for end in ends)
            kl = " ".join(f"{end['kl_per_token']['value']:.3f}" for end in ends)
            of_all, each = difference(runs, variants[base]), ""
            if name != base and of_all["seeds"]:
                each = [difference([run], variants[base])["value"] for run in evaluated(runs)]
                each = " ".join(f"{x:+.1%}" for x in each if x == x)
                each += f" ({of_all['low']:+.1%} to {of_all['high']:+.1%})"
            lines.append(f"{name:{width}}{won} | {each} | {kl}")
    return "\n".join(lines) if len(lines) > 1 else ""


# ------------------------------------------------------------------------------------- the pictures

X_LABELS = {"step": "PPO step",
            "kl_per_token": "KL from SFT, nats per token, on a square-root scale",
            "kl_per_sequence": "KL from SFT, nats per answer, on a square-root scale"}
FIGURES = (      # file, x, label of y, {key of y: its name}
    ("win_steps", "step", "share of answers preferred",
     {"win_reference": "win rate against the reference"}),
    ("win_kl", "kl_per_token", "share of answers preferred",
     {"win_reference": "win rate against the reference"}),
    ("scores_kl", "kl_per_token", "score per answer",
     {"score": "proxy: reward model's score (logits)",
      "annotator": "gold: annotators' score (points)"}),
    ("precision_kl", "kl_per_token", "supported / stated facts",
     {"precision_famous": "famous people", "precision_obscure": "obscure people"}))
# Okabe and Ito's colours, which colour-blind people tell apart (jfly.uni-koeln.de/color), each with
# a marker of its own
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def series(runs, x, y):
    """Points of one variant: (mean of x, y over seeds) for each step that all seeds have."""
    curves = [{row["step"]: row for row in run["curve"]} for run in runs]
    points = []
    for step in sorted(set.intersection(*map(set, curves))):
        rows = [curve[step] for curve in curves]
        at = step if x == "step" else fmean([row[x]["value"] for row in rows])
        points.append((at, over_seeds([row.get(y, UNKNOWN) for row in rows])))
    return points


def curves_of(variants, x, names):
    """-> {variant: {name of y: points}}, without variants whose runs say nothing about a y."""
    found = {}
    for variant, runs in variants.items():
        if evaluated(runs):
            lines = {name: series(evaluated(runs), x, y) for y, name in names.items()}
            if all(any(y["seeds"] for _, y in points) for points in lines.values()):
                found[variant] = lines
    return found


def draw(figure, curves, x, y_label):
    """A panel per variant, with one standard error as bars, in front of the other variants in grey:
    ten variants in one panel would hide each other."""
    axes = panels(figure, len(curves))
    for axis, (variant, lines) in zip(axes, curves.items()):
        for i, (name, points) in enumerate(lines.items()):
            label = f"{name}, other variants"
            for other in [its[name] for key, its in curves.items() if key != variant]:
                x_values, values, _ = columns_of(other)
                axis.plot(x_values, values, color="#AAAAAA", linewidth=0.6, linestyle="-:"[i],
                          label=label)
                label = None                                                    # (named once)
            x_values, values, errors = columns_of(points)
            axis.errorbar(x_values, values, errors, color=COLOURS[i], marker=MARKERS[i], label=name,
                          markersize=3, linewidth=1, capsize=1.5)
        axis.set_title(f"{variant} (n {points[-1][1]['seeds']})", fontsize="medium")
        if x == "kl_per_token":
            axis.set_xscale("function", functions=(signed_root, signed_square))
        axis.locator_params(axis="x", nbins=5)
    figure.supxlabel(X_LABELS[x] + "; bars: one standard error, n: seeds", fontsize="medium")
    figure.supylabel(y_label, fontsize="medium")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)


def columns_of(points):
    """x, value and standard error of each point."""
    values = [y["value"] for _, y in points]
    return [at for at, _ in points], values, [y["se"] for _, y in points]


def signed_root(kl):
    """The square root of KL is about how far a policy has gone (Gao et al., arXiv 2210.10760)."""
    return numpy.sign(kl) * numpy.sqrt(numpy.abs(kl))


def signed_square(root):
    return numpy.sign(root) * root ** 2


def panels(figure, n, shared=True):
    """n axes on a figure as wide as a page, in inches."""
    columns = min(4, n)
    rows = math.ceil(n / columns)
    figure.set_size_inches(7.4, 1.2 + 1.35 * rows)
    axes = figure.subplots(rows, columns, sharex=shared, sharey=shared, squeeze=False).flatten()
    for i, axis in enumerate(axes):
        axis.set_visible(i < n)
        axis.xaxis.set_tick_params(labelbottom=not shared or i + columns >= n)
    return axes


def draw_training(figure, runs):
    """Curves of metrics.jsonl, a line per run."""
    axes = panels(figure, len(TRAINING), shared=False)
    for axis, (key, label) in zip(axes, TRAINING.items()):
        for i, run in enumerate(runs):
            rows = run["training"]
            axis.plot([row["step"] for row in rows], [row[key] for row in rows],
                      label=f"seed {run['seed']}", color=COLOURS[i % len(COLOURS)],
                      marker=MARKERS[i % len(MARKERS)], markersize=2, markevery=4, linewidth=0.8)
        axis.set_title(label, fontsize="medium")
    figure.supxlabel("PPO step", fontsize="medium")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(runs))


def drawings(variants, base):
    """Every figure that the runs have the points for; the training curves are those of `base`."""
    yield "training", draw_training, variants[base]
    for file, x, y_label, names in FIGURES:
        curves = curves_of(variants, x, names)
        if curves:
            yield file, draw, curves, x, y_label


def write_figures(folder, all_drawings):
    """Pictures, where matplotlib is installed. Each drawing: the file's name, the function that
    draws on a figure, its further arguments."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        print("\nfigures need matplotlib: pip install matplotlib")
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with rc_context({"font.size": 8}):
        for file, draw_it, *args in all_drawings:
            figure = Figure(layout="constrained")
            draw_it(figure, *args)
            figure.savefig(Path(folder) / f"{file}.png", dpi=200)
            print(Path(folder) / f"{file}.png")


def main(argv=None):
    with mistakes_in_one_line("figures.py"):
        parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
        parser.add_argument("runs", nargs="+", metavar="RUN", help="PPO run folder, such as "
                            "runs/toy/ppo")
        parser.add_argument("--base", metavar="VARIANT", help="what the others are compared with "
                            "(default: the first)")
        parser.add_argument("--out", default="figures", metavar="FOLDER",
                            help="where the pictures go (default: figures)")
        args = parser.parse_args(argv)
        once = {Path(path).resolve(): path for path in args.runs}
        variants = variants_of([outcome(path) for path in once.values()])
        base = args.base or next(iter(variants))
        if base not in variants:
            raise InputError(f"--base {base}: the variants are {', '.join(variants)}")
        print(table(variants, base), table_by_seed(variants, base), sep="\n\n")
        write_figures(args.out, drawings(variants, base))


if __name__ == "__main__":
    main()
