"""The paper in miniature: every variant of PPO that it compares, in the toy world, several seeds, one command.

    python toy/study.py                 run what is not there yet: progress, and the time that is left
    python toy/study.py --dry_run       the plan and its commands, nothing is started
    python eval.py table toy/study      the outcome as a table;
    python eval.py figures toy/study --out toy/study   as pictures

Everything is done by the commands that a reader would type: one SFT and one reward model per seed (`train.py --stage
sft`, `--stage reward`), then for each variant a copy of that folder, in which `train.py --stage ppo` runs with the
variant's flags. A finished run's outcome is one small JSON file under toy/study/: what has one is not run again, here
or on another machine; what was cut short continues. Seed 0 of everything comes first, so that a study that is stopped
early can be used.

Settings that all share are the toy world's defaults (train.py, TOY) but for the number of steps. LoRA and full
fine-tuning have learning rates of their own. Sweeps have one seed: their rows say n 1, and their error holds no spread
between seeds.
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

from eval import outcome  # noqa: E402
from model import read_json  # noqa: E402

REGULARIZER, LORA_FULL = "regularizer", "lora_full"      # the figures that a variant is in (eval.FIGURES)
SECONDS = {"sft": 50, "reward": 145, "start": 20}        # on two quiet cores: a stage; a PPO run apart from its steps
STEP, EVALUATION = 1.6, 6                                # a PPO step, one evaluation


@dataclass(frozen=True)
class Variant:
    """A row of the study: its name, the flags in which it differs from the default run, which figures show it."""
    name: str
    flags: str = ""
    groups: tuple = ()
    sweep: bool = False          # one seed only
    slower: float = 1.0          # time of a step, relative to the default's


PAPER = [      # the paper's eight
    Variant("kl", "", (REGULARIZER, LORA_FULL)),
    Variant("none", "--regularizer none", (REGULARIZER, LORA_FULL)),
    Variant("jensen_shannon_paper", "--regularizer jensen_shannon_paper", (REGULARIZER,)),
    Variant("clamped_kl", "--regularizer clamped_kl", (REGULARIZER,)),
    Variant("squared_error", "--regularizer squared_error", (REGULARIZER,)),
    Variant("bregman_paper", "--regularizer bregman_paper", (REGULARIZER,)),
    Variant("dropout only", "--regularizer none --lora_dropout 0.1", (REGULARIZER,)),
    Variant("negative kl", "--kl_coef -0.02", (REGULARIZER,)),
]
OURS = [       # what it did not have: k3, an unbiased JS in the reward, and true gradients in the loss
    Variant("bregman", "--regularizer bregman", (REGULARIZER,)),
    Variant("jensen_shannon", "--regularizer jensen_shannon", (REGULARIZER,)),
    Variant("exact kl in the loss", "--regularizer_mode loss --divergence exact", (REGULARIZER,), slower=1.2),
    Variant("full, kl", "--lora_rank 0 --lr 3e-4", (LORA_FULL,), slower=1.3),
    Variant("full, none", "--lora_rank 0 --lr 3e-4 --regularizer none", (LORA_FULL,), slower=1.3),
]
SWEEPS = [
    Variant("exact js in the loss", "--regularizer jensen_shannon --regularizer_mode loss --divergence exact",
            sweep=True, slower=1.2),
    Variant("full, kl, lr 1e-3", "--lora_rank 0 --lr 1e-3", sweep=True, slower=1.3),
    *(Variant(f"rank {r}", f"--lora_rank {r}", sweep=True) for r in (1, 2, 32)),              # (rank 8 is "kl")
    *(Variant(f"alpha {a}", f"--lora_alpha {a}", sweep=True) for a in (1, 2, 8)),             # (alpha 32 is "kl")
    *(Variant(f"paper's {name}", f"--paper_compat {name}", sweep=True) for name in ("reuse_minibatch", "whiten_shift")),
]
VARIANTS = PAPER + OURS + SWEEPS


@dataclass(frozen=True)
class Job:
    """One training: of a variant, or of the SFT and the reward model that all variants of a seed start from."""
    seed: int
    stage: str                        # sft | reward | ppo
    variant: Variant | None = None

    @property
    def slug(self):
        """A name for files."""
        return (re.sub("[ ,']+", "_", self.variant.name) + "_" if self.variant else "") + f"seed{self.seed}"

    def folder(self, args):
        return Path(args.out) / self.slug

    def data(self, args):
        """Where a variant's outcome is kept."""
        return Path(args.data) / f"{self.slug}.json"

    def flags(self, args):
        """The flags of train.py."""
        found = ["--stage", self.stage, "--out", str(self.folder(args)), "--seed", str(self.seed)]
        if self.variant:
            found += ["--steps", str(args.steps), "--eval_every", str(args.eval_every), *self.variant.flags.split()]
        elif args.base_steps:
            found += ["--steps", str(args.base_steps)]
        return found + ([] if args.eval_data is None or not self.variant else ["--eval_data", args.eval_data])

    def finished(self, args):
        """Whether its result stands. ValueError if it is one of other settings: the two must not meet in one table."""
        if not self.variant:
            return (self.folder(args) / self.stage / "finished.json").is_file()
        if not self.data(args).is_file():
            return False
        before, now = read_json(self.data(args)).get("flags"), " ".join(self.flags(args)[6:])
        if before != now:
            raise ValueError(f"{self.data(args)} was made with {before!r} (now {now!r}): "
                             "give the same, or another --data and --out")
        return True

    def seconds(self, args):
        """About how long it takes on two quiet cores."""
        if not self.variant:
            return SECONDS[self.stage]
        return (SECONDS["start"] + args.steps * STEP * self.variant.slower
                + (args.steps // args.eval_every + 1) * EVALUATION)


def jobs(args):
    """All trainings in the order in which they are done;
    of SFT and reward models those that some variant still needs."""
    order = []
    for seed in range(args.seeds):
        chosen = [v for v in VARIANTS if (seed == 0 or not v.sweep) and (not args.only or v.name in args.only)]
        variants = [Job(seed, "ppo", v) for v in chosen]
        needed = any(not job.finished(args) for job in variants)
        order += [Job(seed, stage) for stage in ("sft", "reward") if needed] + variants
    return order


def run(job, args):
    """Train, as a reader would: a copy of the seed's SFT and reward model, and train.py in it.
    True if it went to its end."""
    folder, base = job.folder(args), Job(job.seed, "reward").folder(args)
    for stage in ("sft", "reward") if job.variant else ():
        if not (folder / stage).exists():
            shutil.copytree(base / stage, folder / f"{stage}.tmp", dirs_exist_ok=True)
            os.replace(folder / f"{stage}.tmp", folder / stage)
    folder.mkdir(parents=True, exist_ok=True)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.processes}"]
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        # Ctrl-C is ours: torchrun is told once, and given its time
        process = subprocess.Popen([*start, str(ROOT / "train.py"), *job.flags(args)],
                                   stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait() == 0
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise


def keep(job, args):
    """Write a finished variant's outcome, a line per quantity, under a temporary name first."""
    Path(args.data).mkdir(parents=True, exist_ok=True)
    about = {"variant": job.variant.name, "order": VARIANTS.index(job.variant), "groups": list(job.variant.groups),
             "flags": " ".join(job.flags(args)[6:])}
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in (about | outcome(job.folder(args) / "ppo")).items()]
    Path(f"{job.data(args)}.tmp").write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")
    os.replace(f"{job.data(args)}.tmp", job.data(args))


def clock(seconds):
    minutes = int(seconds) // 60
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m{int(seconds) % 60:02}s"


def study(args):
    """Do what is not done. The time that is left: the estimates, scaled by how long the finished ones took here."""
    order = jobs(args)
    todo = [job for job in order if not job.finished(args)]
    left = sum(job.seconds(args) for job in todo)
    print(f"{len(order)} trainings, {len(order) - len(todo)} of them done; "
          f"about {clock(left)} on two quiet cores", flush=True)
    if args.dry_run:
        for job in todo:
            copy = f"cp -r {Job(job.seed, 'reward').folder(args)} {job.folder(args)} && " if job.variant else ""
            print(f"{copy}torchrun --nproc_per_node={args.processes} train.py {' '.join(job.flags(args))}")
        return 0
    spent = expected = 0
    failed = []
    for i, job in enumerate(todo):
        start, name = time.time(), f"{i + 1:3}/{len(todo)} | {job.slug:32} {job.stage:6}"
        if job.variant and any(f.seed == job.seed and not f.variant for f in failed):
            print(f"{name} | skipped: the models that it starts from failed", flush=True)
            continue
        if run(job, args):
            keep(job, args) if job.variant else None
            result = "done"
        else:
            failed.append(job)
            result = f"FAILED, see {job.folder(args) / 'log.txt'}"
        spent, expected = spent + time.time() - start, expected + job.seconds(args)
        left = sum(j.seconds(args) for j in todo[i + 1:]) * spent / expected
        print(f"{name} | {result} in {clock(time.time() - start)} | left {clock(left)}", flush=True)
    return 1 if failed else 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dry_run", action="store_true", help="print the plan and its commands only")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of each variant (sweeps: seed 0 alone)")
    parser.add_argument("--only", action="append", metavar="VARIANT", choices=[v.name for v in VARIANTS],
                        help="this variant (may be repeated)")
    parser.add_argument("--steps", type=int, default=48, help="PPO steps of each run")
    parser.add_argument("--eval_every", type=int, default=12, help="PPO steps between evaluations")
    parser.add_argument("--base_steps", type=int, default=0,
                        help="steps of SFT and reward model, to try the study out (0: the toy world's)")
    parser.add_argument("--eval_data", help="evaluation file (none: the toy world's, toy/test.json)")
    parser.add_argument("--processes", type=int, default=2, help="processes of each training")
    parser.add_argument("--out", default="runs/study", help="run folders")
    parser.add_argument("--data", default=os.path.relpath(ROOT / "toy" / "study"),
                        help="outcomes, one JSON file per run")
    args = parser.parse_args(argv)
    try:
        return study(args)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues")
        return 130
    except (ValueError, OSError) as e:
        print(f"study.py: error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # a kill stops as Ctrl-C does, with a checkpoint
    sys.exit(main())
