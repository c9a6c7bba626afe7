"""The curves of several runs beside each other: what a failure looks like in the log.

    python course/gallery.py runs/healthy runs/rate runs/critic     -> figures/gallery.png

A line per run folder, a panel per column of metrics.jsonl. (Needs matplotlib.)
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval import Parser, mistakes_in_one_line  # noqa: E402
from model import InputError  # noqa: E402
from tools.figures import COLOURS, MARKERS, lines_of, panels, write_figures  # noqa: E402

COLUMNS = {"score": "score, logits", "kl_per_token": "KL from SFT, nats per token",
           "entropy": "entropy, nats per token", "clip_frac": "share of tokens clipped",
           "value_loss": "critic's loss", "explained_variance": "explained variance of returns",
           "length": "length, tokens", "eos_rate": "share of answers that end"}


def draw(figure, runs):
    """A panel per column, a line per run."""
    axes = panels(figure, len(COLUMNS), shared=False)
    for axis, (key, label) in zip(axes, COLUMNS.items()):
        for i, (name, rows) in enumerate(runs.items()):
            axis.plot([row["step"] for row in rows], [row[key] for row in rows], label=name,
                      color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
                      markersize=2, markevery=6, linewidth=0.8)
        axis.set_title(label, fontsize="medium")
        if key in ("kl_per_token", "value_loss"):                  # (a failure is off the scale)
            axis.set_yscale("symlog", linthresh=1)
        if key == "explained_variance":
            axis.set_ylim(-1, 1)
    figure.supxlabel("PPO step", fontsize="medium")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)


def main(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, such as runs/toy")
    parser.add_argument("--out", default="figures", help="folder of the picture")
    with mistakes_in_one_line("gallery.py"):
        args = parser.parse_args(argv)
        runs = {Path(run).name: lines_of(Path(run) / "ppo" / "metrics.jsonl") for run in args.runs}
        empty = [name for name, rows in runs.items() if not rows]
        if empty:
            raise InputError(f"{empty[0]} holds no ppo/metrics.jsonl: expected the folder of a run")
        write_figures(args.out, [("gallery", draw, runs)])


if __name__ == "__main__":
    main()
