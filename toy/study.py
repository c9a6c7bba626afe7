"""Studies in the toy world: many PPO runs, several seeds, by commands that a reader would type.

    python toy/study.py                         the paper in miniature: run what is not there yet
    python toy/study.py frontier                four penalties along their frontiers
    python toy/study.py frontier --dry_run      the plan and its commands, nothing is started
    python tools/figures.py toy/study.jsonl     the paper's outcome as a table, and as pictures
    python toy/frontier.py                      the frontier's

One SFT and one reward model per seed (`train.py --stage sft`, `--stage reward`), then for each
variant a copy of that folder, in which `train.py --stage ppo` runs with the variant's flags. A
finished run's outcome is one line of toy/study.jsonl, or toy/frontier.jsonl: what has one is not
run again, here or on another machine; what was cut short continues. Seed by seed, so that a study
that is stopped early can be used.

What all share are the toy world's defaults (train.py, TOY) but for the study's own flags. In the
paper's study LoRA and full fine-tuning have learning rates of their own, and its sweeps have one
seed: their rows say n 1, and their error holds no spread between seeds.
"""
import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import read_rows  # noqa: E402
from eval import Parser, mistakes_in_one_line  # noqa: E402
from model import InputError, whole_file  # noqa: E402
from tools.figures import outcome  # noqa: E402


@dataclass(frozen=True)
class Variant:
    """A row of a study: its name, the flags in which it differs from the default run, and the
    groups of figures that show it (tools/figures.py, FIGURES)."""
    name: str
    flags: str = ""
    groups: tuple = ("regularizer",)


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
    Variant("exact kl in the loss", "--regularizer_mode loss"),
    Variant("full, kl", "--lora_rank 0 --lr 3e-4", LORA_FULL),
    Variant("full, none", "--lora_rank 0 --lr 3e-4 --regularizer none", LORA_FULL),
]
SWEEPS = [     # one seed only ("kl" has rank 8 and alpha 32)
    Variant("exact js in the loss", "--regularizer jensen_shannon --regularizer_mode loss", NONE),
    Variant("full, kl, lr 1e-3", "--lora_rank 0 --lr 1e-3", NONE),
    *(Variant(f"rank {rank}", f"--lora_rank {rank}", NONE) for rank in (1, 2, 32)),
    *(Variant(f"alpha {alpha}", f"--lora_alpha {alpha}", NONE) for alpha in (1, 2, 8)),
]
# penalty -> its flags, and coefficients so spaced that neighbouring KLs are within a factor of
# about 1.6; the last one of each Jensen-Shannon is there for the comparison at 0.1
PENALTIES = {
    "kl in the reward": ("--regularizer kl", (.36, .24, .16, .1, .07, .046, .03)),
    "paper's jensen_shannon in the reward": ("--regularizer jensen_shannon_paper",
                                             (6.4, 4.2, 2.8, 1.8, 1.2, .8, .5, .1)),
    "exact kl in the loss": ("--regularizer kl --regularizer_mode loss",
                             (.36, .24, .16, .1, .07, .046, .03)),
    "exact jensen_shannon in the loss": ("--regularizer jensen_shannon --regularizer_mode loss",
                                         (2.4, 1.6, 1.05, .7, .46, .3, .2, .1))}


@dataclass(frozen=True)
class Study:
    """What is run: variants, with the seeds first, first + 1, .. (`seeds` of them); sweeps, with
    the first seed alone; flags, of all PPO runs."""
    variants: list
    first: int
    seeds: int
    flags: str
    data: str
    sweeps: tuple = ()


STUDIES = {
    "paper": Study(PAPER + OURS + SWEEPS, 0, 3, "--steps 48 --eval_every 12", "study.jsonl",
                   tuple(SWEEPS)),
    "frontier": Study([Variant(f"{penalty}, {c}", f"{flags} --kl_coef {c}")
                       for penalty, (flags, coefficients) in PENALTIES.items()
                       for c in coefficients], 10, 6,
                      f"--steps 48 --eval_temperature 1 "
                      f"--eval_data {os.path.relpath(ROOT / 'toy' / 'study.json')}",
                      "frontier.jsonl")}


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
        return f"{re.sub('[^a-z0-9._-]+', '_', self.variant.name)}_seed{self.seed}"

    def folder(self, args):
        return Path(args.out) / self.slug

    def changes(self, args):
        """The flags in which it differs from the default run."""
        if self.variant:
            return [*STUDIES[args.study].flags.split(), *self.variant.flags.split(),
                    *args.more.split()]
        return ["--steps", str(args.base_steps)] if args.base_steps else []

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

    def needs(self):
        """The training that has to be done before this one, or None."""
        earlier = {"sft": None, "reward": Job(self.seed, "sft"), "ppo": Job(self.seed, "reward")}
        return earlier[self.stage]


def jobs(args, lines):
    """All trainings in the order in which they are begun; of SFT and reward models those that some
    variant still needs."""
    order, it = [], STUDIES[args.study]
    for seed in range(it.first, it.first + (args.seeds or it.seeds)):
        chosen = [v for v in it.variants if not args.only or v.name in args.only]
        variants = [Job(seed, "ppo", v) for v in chosen if seed == it.first or v not in it.sweeps]
        if not all(job.finished(args, lines) for job in variants):
            order += [Job(seed, "sft"), Job(seed, "reward")]
        order += variants
    return order


# ----------------------------------------------------------------------------------------- running

class Runner:
    """Does jobs, `parallel` at a time, each when the one that it needs is done."""

    def __init__(self, args, todo):
        self.args, self.waiting, self.begun, self.total = args, list(todo), 0, len(todo)
        self.changed, self.busy, self.failed = threading.Condition(), {}, set()
        self.start, self.stopped = time.time(), False

    def work(self):
        """One of the threads: the next job, and the next, until there is none."""
        while True:
            with self.changed:
                while (job := self.next_job()) is None:
                    if not self.waiting:
                        return
                    self.changed.wait()
                self.waiting.remove(job)
                self.busy[job] = None
            self.do(job)
            with self.changed:
                del self.busy[job]
                self.changed.notify_all()

    def next_job(self):
        """The first that waits for nothing. (Of a job that is neither waiting nor busy, nor in the
        plan, the result stands.)"""
        undone = {*self.waiting, *self.busy}
        return next((job for job in self.waiting if job.needs() not in undone), None)

    def do(self, job):
        """Run it, keep its outcome, say so."""
        start, result = time.time(), "done"
        if job.needs() in self.failed:
            result = "skipped: the models that it starts from failed"
        elif not run(job, self.args, self.busy):
            log = job.folder(self.args) / "log.txt"
            result = "stopped" if self.stopped else f"FAILED, see {log}"
        with self.changed:
            if result != "done":
                self.failed.add(job)
            elif job.variant:
                keep(job, self.args)
            self.begun += 1
            left = (time.time() - self.start) / self.begun * (self.total - self.begun)
            print(f"{self.begun:3}/{self.total} | {job.slug:44} {job.stage:6} | {result} in "
                  f"{minutes(time.time() - start)} | left {minutes(left)}", flush=True)

    def stop(self):
        """Begin nothing more, and ask what runs to stop."""
        with self.changed:
            self.stopped = True
            self.waiting.clear()
            for process in filter(None, self.busy.values()):
                process.terminate()
            self.changed.notify_all()


def run(job, args, busy):
    """Train, as a reader would: a copy of the seed's SFT and reward model, and train.py in it ->
    whether it went to its end. busy[job]: the process, for who wants to stop it."""
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
        # Ctrl-C is ours: what runs is told once, and given its time
        busy[job] = subprocess.Popen(
            [*start, str(ROOT / "train.py"), *job.flags(args)], stdout=log, stderr=log,
            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return busy[job].wait() == 0


def command_line(job, args):
    """What `run` does, as one would type it."""
    start = f"torchrun --nproc_per_node={args.processes}" if args.processes > 1 else "python"
    train = f"OMP_NUM_THREADS=1 {start} train.py {' '.join(job.flags(args))}"
    if not job.variant:
        return train
    return f"cp -r {Job(job.seed, 'reward').folder(args)} {job.folder(args)} && {train}"


def keep(job, args):
    """Append a finished variant's outcome to the data; of the paper's study all of it, with curves
    and wins by person; of the frontier what SFT and the last step came to."""
    found = outcome(job.folder(args) / "ppo")
    if args.study == "paper":
        found = {"groups": job.variant.groups} | found
    else:
        ends = {"sft": found["curve"][0], "ppo": found["curve"][-1]}
        found = {"seed": job.seed, "train_kl": found["training"]["kl_per_token"][-1]} | {
            name: {key: [round(x["value"], 5), round(x["se"], 5)]
                   for key, x in end.items() if key != "step"} for name, end in ends.items()}
    about = {"variant": job.variant.name, "flags": " ".join(job.changes(args))}
    path = Path(args.data)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    with whole_file(path) as temporary:
        line = json.dumps(about | found, ensure_ascii=False)
        temporary.write_text(f"{before}{line}\n", encoding="utf-8")


def minutes(seconds):
    return f"{seconds / 60:.1f} min"


def study(args):
    """Do what is not done -> exit status."""
    lines = read_rows(args.data) if Path(args.data).is_file() else []
    order = jobs(args, lines)
    todo = [job for job in order if not job.finished(args, lines)]
    print(f"{len(order)} trainings, {len(order) - len(todo)} of them done", flush=True)
    if args.dry_run:
        print(*(command_line(job, args) for job in todo), sep="\n")
        return 0
    runner = Runner(args, todo)
    with ThreadPoolExecutor(args.parallel) as pool:
        threads = [pool.submit(runner.work) for _ in range(args.parallel)]
        try:
            for thread in threads:
                thread.result()
        except KeyboardInterrupt:
            runner.stop()
            raise
    return 1 if runner.failed else 0


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("study", nargs="?", choices=STUDIES, default="paper", help="what to run")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, start nothing")
    parser.add_argument("--seeds", type=int, default=0,
                        help="how many seeds (0: the study's; sweeps: the first alone)")
    parser.add_argument("--only", action="append", metavar="VARIANT",
                        help="this variant (may be repeated)")
    parser.add_argument("--more", default="", metavar="FLAGS",
                        help="further flags of train.py for all PPO runs, to try it out")
    parser.add_argument("--base_steps", type=int, default=0,
                        help="steps of SFT and reward model, to try it out (0: the toy world's)")
    parser.add_argument("--processes", type=int, default=1, help="processes of each training")
    parser.add_argument("--parallel", type=int, default=2, help="trainings at one time")
    parser.add_argument("--out", help="run folders (default: runs/STUDY)")
    parser.add_argument("--data", help="outcomes, a JSON line per run (default: the committed "
                                       "file of the study)")
    with mistakes_in_one_line("study.py"):
        args = parser.parse_args(argv)
        it = STUDIES[args.study]
        args.out = args.out or f"runs/{args.study}"
        args.data = args.data or os.path.relpath(ROOT / "toy" / it.data)
        unknown = set(args.only or ()) - {v.name for v in it.variants}
        if unknown:
            raise InputError(f"--only {min(unknown)}: the variants are "
                             f"{', '.join(v.name for v in it.variants)}")
        try:
            return study(args)
        except KeyboardInterrupt:
            print("\nstopped; the same command continues")
            return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # a kill stops as Ctrl-C does
    sys.exit(main())
