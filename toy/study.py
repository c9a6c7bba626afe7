"""The paper in miniature: every variant of PPO that it compares, in the toy world, several seeds.

    python toy/study.py                         run what is not there yet: progress, and time left
    python toy/study.py --dry_run               the plan and its commands, nothing is started
    python tools/figures.py toy/study.jsonl     the outcome as a table, and as pictures

Everything is done by commands that a reader would type: one SFT and one reward model per seed
(`train.py --stage sft`, `--stage reward`), then for each variant a copy of that folder, in which
`train.py --stage ppo` runs with the variant's flags. A finished run's outcome is one line of
toy/study.jsonl: what has one is not run again, here or on another machine; what was cut short
continues. Seed 0 of everything comes first, so that a study that is stopped early can be used.

What all share are the toy world's defaults (train.py, TOY) but for the number of steps. LoRA and
full fine-tuning have learning rates of their own. Sweeps have one seed: their rows say n 1, and
their error holds no spread between seeds.
"""
import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import read_rows  # noqa: E402
from eval import Parser, mistakes_in_one_line  # noqa: E402
from model import InputError, whole_file  # noqa: E402
from tools.figures import outcome  # noqa: E402

# seconds on two quiet cores: a stage, a PPO run apart from its steps, a PPO step, an evaluation
SECONDS = {"sft": 50, "reward": 145, "start": 20, "step": 1.6, "evaluation": 6}


@dataclass(frozen=True)
class Variant:
    """A row of the study: its name, the flags in which it differs from the default run, and the
    groups of figures that show it (tools/figures.py, FIGURES)."""
    name: str
    flags: str = ""
    groups: tuple = ("regularizer",)
    slower: float = 1.0          # time of a step, relative to the default's


BOTH, LORA_FULL, NONE = ("regularizer", "lora_full"), ("lora_full",), ()
PAPER = [      # the paper's eight
    Variant("kl", "", BOTH),
    Variant("none", "--regularizer none", BOTH),
    Variant("jensen_shannon_paper", "--regularizer jensen_shannon_paper"),
    Variant("clamped_kl", "--regularizer clamped_kl"),
    Variant("squared_error", "--regularizer squared_error"),
    Variant("bregman_paper", "--regularizer bregman_paper"),
    Variant("dropout only", "--regularizer none --lora_dropout 0.1"),
    Variant("negative kl", "--kl_coef -0.02"),
]
OURS = [       # what it did not have: k3, an unbiased JS in the reward, true gradients in the loss
    Variant("bregman", "--regularizer bregman"),
    Variant("jensen_shannon", "--regularizer jensen_shannon"),
    Variant("exact kl in the loss", "--regularizer_mode loss", slower=1.2),
    Variant("full, kl", "--lora_rank 0 --lr 3e-4", LORA_FULL, 1.3),
    Variant("full, none", "--lora_rank 0 --lr 3e-4 --regularizer none", LORA_FULL, 1.3),
]
SWEEPS = [     # one seed only ("kl" has rank 8 and alpha 32)
    Variant("exact js in the loss", "--regularizer jensen_shannon --regularizer_mode loss", NONE,
            1.2),
    Variant("full, kl, lr 1e-3", "--lora_rank 0 --lr 1e-3", NONE, 1.3),
    *(Variant(f"rank {rank}", f"--lora_rank {rank}", NONE) for rank in (1, 2, 32)),
    *(Variant(f"alpha {alpha}", f"--lora_alpha {alpha}", NONE) for alpha in (1, 2, 8)),
]
VARIANTS = PAPER + OURS + SWEEPS


@dataclass(frozen=True)
class Job:
    """One training: of a variant, or of the SFT or the reward model that all variants of a seed
    start from."""
    seed: int
    stage: str                        # sft | reward | ppo
    variant: Variant | None = None

    @property
    def slug(self):
        """A name for folders."""
        if not self.variant:
            return f"seed{self.seed}"
        return f"{re.sub('[ ,]+', '_', self.variant.name)}_seed{self.seed}"

    def folder(self, args):
        return Path(args.out) / self.slug

    def changes(self, args):
        """The flags in which it differs from the default run."""
        if not self.variant:
            return ["--steps", str(args.base_steps)] if args.base_steps else []
        changes = ["--steps", str(args.steps), "--eval_every", str(args.eval_every)]
        changes += self.variant.flags.split()
        return changes + ["--eval_data", args.eval_data] if args.eval_data else changes

    def flags(self, args):
        """All flags of train.py."""
        return ["--stage", self.stage, "--out", str(self.folder(args)), "--seed", str(self.seed),
                *self.changes(args)]

    def finished(self, args, lines):
        """Whether its result stands. lines: the outcomes so far. InputError if its outcome is one
        of other settings: the two must not meet in one table."""
        if not self.variant:
            return (self.folder(args) / self.stage / "finished.json").is_file()
        before = {(line["variant"], line["seed"]): line["flags"] for line in lines}
        key, now = (self.variant.name, self.seed), " ".join(self.changes(args))
        if before.get(key, now) != now:
            raise InputError(f"{args.data} has {key[0]!r}, seed {key[1]}, with {before[key]!r} "
                             f"(now {now!r}): give the same, or another --data and --out")
        return key in before

    def seconds(self, args):
        """About how long it takes on two quiet cores."""
        if not self.variant:
            return SECONDS[self.stage]
        evaluations = args.steps // args.eval_every + 1
        return (SECONDS["start"] + args.steps * SECONDS["step"] * self.variant.slower
                + evaluations * SECONDS["evaluation"])


def jobs(args, lines):
    """All trainings in the order in which they are done; of SFT and reward models those that some
    variant still needs."""
    order = []
    for seed in range(args.seeds):
        chosen = [v for v in VARIANTS if not args.only or v.name in args.only]
        variants = [Job(seed, "ppo", v) for v in chosen if seed == 0 or v not in SWEEPS]
        if not all(job.finished(args, lines) for job in variants):
            order += [Job(seed, "sft"), Job(seed, "reward")]
        order += variants
    return order


def run(job, args):
    """Train, as a reader would: a copy of the seed's SFT and reward model, and train.py in it ->
    whether it went to its end."""
    folder, base = job.folder(args), Job(job.seed, "reward").folder(args)
    if job.variant:
        for stage in ("sft", "reward"):
            if not (folder / stage).exists():
                shutil.copytree(base / stage, folder / f"{stage}.tmp", dirs_exist_ok=True)
                os.replace(folder / f"{stage}.tmp", folder / stage)
    folder.mkdir(parents=True, exist_ok=True)
    start = [sys.executable]
    if args.processes > 1:     # (--local_addr: it would wait for a host name that does not resolve)
        start += ["-m", "torch.distributed.run", "--standalone", "--local_addr=localhost",
                  f"--nproc_per_node={args.processes}"]
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        # Ctrl-C is ours: torchrun is told once, and given its time
        process = subprocess.Popen([*start, str(ROOT / "train.py"), *job.flags(args)], stdout=log,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait() == 0
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise


def command_line(job, args):
    """What `run` does, as one would type it."""
    start = f"torchrun --nproc_per_node={args.processes}" if args.processes > 1 else "python"
    train = f"{start} train.py {' '.join(job.flags(args))}"
    if not job.variant:
        return train
    return f"cp -r {Job(job.seed, 'reward').folder(args)} {job.folder(args)} && {train}"


def keep(job, args):
    """Append a finished variant's outcome to the data."""
    about = {"variant": job.variant.name, "groups": job.variant.groups,
             "flags": " ".join(job.changes(args))}
    row = json.dumps(about | outcome(job.folder(args) / "ppo"), ensure_ascii=False)
    path = Path(args.data)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    with whole_file(path) as temporary:
        temporary.write_text(f"{before}{row}\n", encoding="utf-8")


def minutes(seconds):
    return f"{seconds / 60:.1f} min"


def study(args):
    """Do what is not done -> exit status. Time left: the estimates, scaled by how long the finished
    ones took here."""
    lines = read_rows(args.data) if Path(args.data).is_file() else []
    order = jobs(args, lines)
    todo = [job for job in order if not job.finished(args, lines)]
    print(f"{len(order)} trainings, {len(order) - len(todo)} of them done; about "
          f"{minutes(sum(job.seconds(args) for job in todo))} on two quiet cores", flush=True)
    if args.dry_run:
        print(*(command_line(job, args) for job in todo), sep="\n")
        return 0
    spent, expected, failed = 0.0, 0.0, []
    for i, job in enumerate(todo):
        start, name = time.time(), f"{i + 1:3}/{len(todo)} | {job.slug:32} {job.stage:6}"
        if job.variant and (job.seed, None) in failed:
            print(f"{name} | skipped: the models that it starts from failed", flush=True)
            continue
        if run(job, args):
            result = "done"
            if job.variant:
                keep(job, args)
        else:
            result = f"FAILED, see {job.folder(args) / 'log.txt'}"
            failed.append((job.seed, job.variant))
        taken = time.time() - start
        spent, expected = spent + taken, expected + job.seconds(args)
        left = sum(later.seconds(args) for later in todo[i + 1:]) * spent / expected
        print(f"{name} | {result} in {minutes(taken)} | left {minutes(left)}", flush=True)
    return 1 if failed else 0


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dry_run", action="store_true", help="print the commands, start nothing")
    parser.add_argument("--seeds", type=int, default=3,
                        help="seeds 0, 1, ... of each variant (sweeps: seed 0 alone)")
    parser.add_argument("--only", action="append", metavar="VARIANT",
                        choices=[v.name for v in VARIANTS], help="this variant (may be repeated)")
    parser.add_argument("--steps", type=int, default=48, help="PPO steps of each run")
    parser.add_argument("--eval_every", type=int, default=12, help="PPO steps between evaluations")
    parser.add_argument("--base_steps", type=int, default=0,
                        help="steps of SFT and reward model, to try it out (0: the toy world's)")
    parser.add_argument("--eval_data", help="evaluation file (none: the toy world's)")
    parser.add_argument("--processes", type=int, default=2, help="processes of each training")
    parser.add_argument("--out", default="runs/study", help="run folders")
    parser.add_argument("--data", default=os.path.relpath(ROOT / "toy" / "study.jsonl"),
                        help="outcomes, a JSON line per run")
    with mistakes_in_one_line("study.py"):
        try:
            return study(parser.parse_args(argv))
        except KeyboardInterrupt:
            print("\nstopped; the same command continues")
            return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # a kill stops as Ctrl-C does
    sys.exit(main())
