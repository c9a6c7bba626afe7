"""Studies in the toy world: many PPO runs, several seeds, by commands that a reader would type.

    python toy/study.py frontier              question 1 of toy/README.md: runs what is not there
    python toy/study.py rates                 learning rates and coefficients for question 2
    python toy/study.py need                  question 2
    python toy/study.py ranks                 question 3
    python toy/study.py context               question 4 (and toy/best_of_n.py)
    python toy/study.py frontier --dry_run    the plan and its commands, nothing is started
    python toy/frontier.py                    what came out

One SFT and one reward model per seed (`train.py --stage sft`, `--stage reward`), then for each
variant a copy of that folder, in which `train.py --stage ppo` runs with the variant's flags. A
finished run's outcome is one line of toy/STUDY.jsonl: what has one is not run again, here or on
another machine; what was cut short continues. Seed by seed, so that a study that is stopped early
can be used.

What all share are the toy world's defaults (train.py, TOY) but for the study's own flags.
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
from eval import Parser, mistakes_in_one_line, summarise  # noqa: E402
from model import InputError, read_json, whole_file  # noqa: E402


@dataclass(frozen=True)
class Variant:
    """A row of a study: its name, the flags in which it differs from the default run, and in how
    many processes it is trained."""
    name: str
    flags: str = ""
    processes: int = 1


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
# question 2: what trains, with a penalty or without -> flags, learning rates, coefficients
CELLS = {
    "LoRA with KL": ("--regularizer kl", ("1e-3", "2e-3", "4e-3"), (.05, .1, .2)),
    "LoRA without": ("--regularizer none", ("1e-3", "2e-3", "4e-3"), ()),
    "all weights with KL": ("--lora_rank 0 --regularizer kl", ("1.5e-4", "3e-4", "6e-4"),
                            (.05, .1, .2)),
    "all weights without": ("--lora_rank 0 --regularizer none", ("1.5e-4", "3e-4", "6e-4"), ())}
# question 4: the paper's other variants at the common coefficient; k3, and the unbiased JS
OTHERS = [
    Variant("none", "--regularizer none"),
    Variant("clamped_kl", "--regularizer clamped_kl"),
    Variant("squared_error", "--regularizer squared_error"),
    Variant("bregman_paper", "--regularizer bregman_paper"),
    Variant("dropout only", "--regularizer none --lora_dropout 0.1"),
    Variant("negative kl", "--kl_coef -0.02"),
    Variant("bregman", "--regularizer bregman"),
    Variant("jensen_shannon", "--regularizer jensen_shannon")]
TEST = os.path.relpath(ROOT / "toy" / "study.json")
VALIDATION = os.path.relpath(ROOT / "toy" / "val.json")
STAGES = ("sft", "reward", "ppo")


@dataclass(frozen=True)
class Job:
    """One training: of a variant, or of an SFT or a reward model that variants start from. seeds:
    of SFT, of the reward model and of PPO, up to what it is."""
    seeds: tuple
    variant: Variant | None = None

    @property
    def stage(self):
        return STAGES[len(self.seeds) - 1]

    @property
    def slug(self):
        """A name for folders."""
        if not self.variant:
            return "seed" + "_".join(dict.fromkeys(map(str, self.seeds)))
        return f"{re.sub('[^a-z0-9._-]+', '_', self.variant.name.lower())}_seed{self.seeds[-1]}"

    def folder(self, args):
        return Path(args.out) / self.slug

    def changes(self, args):
        """The flags in which it differs from the default run."""
        if self.variant:
            evaluated_on = VALIDATION if args.study == "rates" else TEST
            common = ["--steps", "48", "--eval_temperature", "1", "--eval_data", evaluated_on]
            return [*common, *self.variant.flags.split(), *args.more.split()]
        return ["--steps", str(args.base_steps)] if args.base_steps else []

    def flags(self, args):
        """All flags of train.py."""
        return ["--stage", self.stage, "--out", str(self.folder(args)),
                "--seed", str(self.seeds[-1]), *self.changes(args)]

    def finished(self, args, lines):
        """Whether its result stands. lines: the outcomes so far. InputError if its outcome is one
        of other settings: the two must not meet in one table."""
        if not self.variant:
            return (self.folder(args) / self.stage / "finished.json").is_file()
        before = {(line["variant"], line["seed"]): line["flags"] for line in lines}
        key, now = (self.variant.name, self.seeds[-1]), " ".join(self.changes(args))
        if before.get(key, now) != now:
            raise InputError(f"{args.data} has {key[0]!r}, seed {key[1]}, with {before[key]!r} "
                             f"(now {now!r}): give the same, or another --data and --out")
        return key in before

    def needs(self):
        """The training that has to be done before this one, or None."""
        return Job(self.seeds[:-1]) if self.seeds[1:] else None


def seed_by_seed(variants, seeds):
    """All variants with each seed, whose SFT and reward model they share."""
    return [Job((seed,) * 3, variant) for seed in seeds for variant in variants]


def along(flags, name, coefficients):
    """A variant per coefficient."""
    return [Variant(f"{name}, {c}", f"{flags} --kl_coef {c}") for c in coefficients]


def frontier():
    """Question 1: four penalties along their frontiers."""
    variants = [variant for penalty, (flags, coefficients) in PENALTIES.items()
                for variant in along(flags, penalty, coefficients)]
    return seed_by_seed(variants, range(10, 16))


def rates():
    """The grid from which question 2 chooses, on seeds and data of its own."""
    variants = []
    for cell, (flags, learning_rates, coefficients) in CELLS.items():
        for lr in learning_rates:
            name, own = f"{cell} (lr {lr})", f"{flags} --lr {lr}"
            variants += along(own, name, coefficients) or [Variant(name, own)]
    return seed_by_seed(variants, (90, 91))


def chosen(cell):
    """A cell's flags: of its grid those with the best mean win rate, ties to the smaller.
    InputError while a run of the grid is missing."""
    data, runs = ROOT / "toy" / "rates.jsonl", {}
    for row in read_rows(data) if data.is_file() else []:
        runs.setdefault(row["variant"], []).append(row["ppo"]["win_reference"][0])
    grid = list(dict.fromkeys(job.variant for job in rates()
                              if job.variant.name.startswith(f"{cell} (")))
    if any(len(runs.get(variant.name, ())) < 2 for variant in grid):
        raise InputError(f"{data} does not have the whole grid: python toy/study.py rates")
    return max(grid, key=lambda variant: sum(runs[variant.name])).flags


def need():
    """Question 2: whether a KL penalty is needed, under LoRA and without it."""
    cells = {cell: Variant(cell, chosen(cell)) for cell in CELLS}
    lora, full = list(cells.values())[:2], list(cells.values())[2:]
    return seed_by_seed(lora + full, range(10, 18)) + seed_by_seed(lora, range(18, 34))


def ranks():
    """Question 3: what a run costs in precision, by how much of the model is trained."""
    lr = re.search("--lr [^ ]+", chosen("all weights with KL"))[0]
    kinds = {"rank 1": "--lora_rank 1", "rank 32": "--lora_rank 32",
             "all weights": f"--lora_rank 0 {lr}"}
    variants = [v for name, flags in kinds.items() for v in along(flags, name, (.2, .1, .05))]
    further = along(kinds["all weights"], "all weights, further", (.03, .02))
    return seed_by_seed(variants, range(10, 16)) + seed_by_seed(further, range(10, 16))


def context():
    """Question 4: other penalties, and where spread comes from: one seed at a time, or the number
    of processes alone, is another than in the run that all four share."""
    plan = seed_by_seed(OTHERS, (10, 11, 12))
    for seed in (11, 12, 13, 14):
        plan += [Job((seed, 10, 10), Variant(f"SFT's seed, {seed}")),
                 Job((10, seed, 10), Variant(f"reward model's seed, {seed}")),
                 Job((10, 10, seed), Variant(f"PPO's seed, {seed}"))]
    plan += [Job((10, 10, 10), Variant(f"processes, {n}", processes=n)) for n in (2, 4, 8)]
    return plan


STUDIES = {it.__name__: it for it in (frontier, rates, need, ranks, context)}


def jobs(args, lines):
    """All trainings in the order in which they are begun; of SFT and reward models those that some
    variant still needs."""
    order = {}
    for job in STUDIES[args.study]():
        if args.only and job.variant.name not in args.only:
            continue
        if args.seeds and job.seeds[-1] not in args.seeds:
            continue
        chain = [job]
        while not job.finished(args, lines) and (needed := chain[0].needs()):
            chain.insert(0, needed)
        order |= dict.fromkeys(chain)
    return list(order)


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
    """Train, as a reader would: a copy of the models that it starts from, and train.py beside them
    -> whether it went to its end. busy[job]: the process, for who wants to stop it."""
    folder, needed = job.folder(args), job.needs()
    for stage in STAGES[:len(job.seeds) - 1]:
        if not (folder / stage).exists():
            shutil.copytree(needed.folder(args) / stage, folder / f"{stage}.tmp",
                            dirs_exist_ok=True)
            os.replace(folder / f"{stage}.tmp", folder / stage)
    folder.mkdir(parents=True, exist_ok=True)
    start, processes = [sys.executable], job.variant.processes if job.variant else 1
    if processes > 1:     # (--local_addr: it would wait for a host name that does not resolve)
        start += ["-m", "torch.distributed.run", "--standalone", "--local_addr=localhost",
                  f"--nproc_per_node={processes}"]
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        # Ctrl-C is ours: what runs is told once, and given its time
        busy[job] = subprocess.Popen(
            [*start, str(ROOT / "train.py"), *job.flags(args)], stdout=log, stderr=log,
            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return busy[job].wait() == 0


def command_line(job, args):
    """What `run` does, as one would type it."""
    many = job.variant and job.variant.processes > 1
    start = f"torchrun --nproc_per_node={job.variant.processes}" if many else "python"
    train = f"OMP_NUM_THREADS=1 {start} train.py {' '.join(job.flags(args))}"
    folder, needed = job.folder(args), job.needs()
    if not needed or needed.folder(args) == folder:
        return train
    models = " ".join(str(needed.folder(args) / s) for s in STAGES[:len(job.seeds) - 1])
    return f"mkdir -p {folder} && cp -r {models} {folder} && {train}"


def keep(job, args):
    """Append a finished variant's outcome to the data: what SFT and the last step came to."""
    summary = summarise(read_json(job.folder(args) / "ppo" / "eval.json")["records"])
    append(args.data, {"variant": job.variant.name, "flags": " ".join(job.changes(args)),
                       "seed": job.seeds[-1], "sft": short(summary["before"]),
                       "ppo": short(summary["after"])})


def short(summary):
    """What is kept of eval.summarise: values and standard errors."""
    return {key: [round(x["value"], 5), round(x["se"], 5)] for key, x in summary.items()}


def append(path, line):
    """Add a line to a file of outcomes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    with whole_file(path) as temporary:
        line = json.dumps(line, ensure_ascii=False)
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
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("study", choices=STUDIES, help="what to run")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, start nothing")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED",
                        help="these of its seeds (default: all)")
    parser.add_argument("--only", action="append", metavar="VARIANT",
                        help="this variant (may be repeated)")
    parser.add_argument("--more", default="", metavar="FLAGS",
                        help="further flags of train.py for all PPO runs, to try it out")
    parser.add_argument("--base_steps", type=int, default=0,
                        help="steps of SFT and reward model, to try it out (0: the toy world's)")
    parser.add_argument("--parallel", type=int, default=2, help="trainings at one time")
    parser.add_argument("--out", default="runs/study", help="run folders")
    parser.add_argument("--data", help="outcomes, a JSON line per run (default: the committed "
                                       "file of the study)")
    with mistakes_in_one_line("study.py"):
        args = parser.parse_args(argv)
        args.data = args.data or os.path.relpath(ROOT / "toy" / f"{args.study}.jsonl")
        names = list(dict.fromkeys(job.variant.name for job in STUDIES[args.study]()))
        unknown = set(args.only or ()) - set(names)
        if unknown:
            raise InputError(f"--only {min(unknown)}: the variants are {', '.join(names)}")
        try:
            return study(args)
        except KeyboardInterrupt:
            print("\nstopped; the same command continues")
            return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # a kill stops as Ctrl-C does
    sys.exit(main())
