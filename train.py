"""The stages of RLHF - SFT, reward model, PPO - as plain DistributedDataParallel loops.

    python train.py                                  one process, the toy world
    torchrun --nproc_per_node=2 train.py             two processes: the same but for rounding
    torchrun --nproc_per_node=2 train.py --stage ppo --model runs/sft --reward runs/reward
             --prompts unlabeled.json --out runs/ppo

In order: settings, run folder, processes, what the stages share, the three stages, main. Read `ppo`
and what follows it first.

Legend   B sequences of a global batch, T tokens, R response tokens

Departures from the paper's code (numbers as in the README):
1. True accumulation: each loss is summed over tokens and divided by the *global* number of response
   tokens; one clip and one optimiser step per minibatch. (The paper's code steps on each of 8
   reuses of the same 16 sequences.)
5. No dropout in the update by default; with it, old_logprobs are taken without.
6. Ids in, ids out: the reward model scores what was sampled, and EOS is looked for in ids.
11. Checkpoints hold all that a resumed run needs, the first learning rate is above 0, logged KL is
   not clamped, logged gradient norms are from before the clipping.
Beside these: policy and critic, which share no parameter, are clipped apart.

Every random number is a function of (seed, step, row or epoch): no generator's state has to be
saved, and results depend neither on the number of processes nor on where a run was interrupted.
(The masks of dropout, if there is any, belong to a process and its micro-batches as well.)
"""
import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
# torch imports this by itself when a model is made; after init_process_group its default arguments
# would keep the group, and with it threads that can crash a process which has done all its work
import torch.distributed.nn.functional
from torch.nn.parallel import DistributedDataParallel

from data import (Tokenizer, batch_indices, even_batch_indices, length_mask, load_eval_rows,
                  load_preferences, load_prompts, load_sft, micro_batches, pack, permutation, say,
                  split_by_instruction)
from eval import (Parser, accuracy_report, evaluate, load_run, mistakes_in_one_line,
                  pair_accuracy, report, score_pairs, summarise, torch_dtype)
from lora import add_lora, merge_lora, read_adapter_config, save_lora
from model import (InputError, Llama, LlamaConfig, fingerprint, keyed_seed, load_llama, read_json,
                   pad_right, read_model_config, sample_responses, save_llama,
                   whole_file, write_json, writing)
from ppo import (average_statistics, check_first_step, join_rollouts, masked_mean, policy_loss,
                 rollout_statistics, value_loss, weighted_mean, with_advantages)
from regularizers import EXACT, SAMPLED
from reward import (ActorCritic, RewardModel, assess, bradley_terry_loss, build_models, is_adapter,
                    reward_config, save_reward_model)


# -------------------------------------------------------------------------------------- settings

def knob(default, help, low=0, choices=None):
    """A setting: default, meaning and unit, smallest value or choices."""
    return field(default=default, metadata={"help": help, "low": low, "choices": choices})


@dataclass(frozen=True)
class Common:
    """Settings of every stage. Defaults are the paper's, but for dropout (0.1 there) and the
    missing-EOS penalty (none there); without --model those in TOY replace some of them."""
    model: str = knob("", "model folder to start from (none: a new tiny model, in the toy world)")
    tokenizer: str = knob("", "sentencepiece file (default: tokenizer.model in --model)")
    seed: int = knob(0, "seed of everything random")
    dtype: str = knob("auto", "of frozen weights; auto: float32 on a CPU, bfloat16 on a GPU",
                      choices=("auto", "float32", "bfloat16"))
    micro_batch: int = knob(8, "sequences (or pairs) per forward pass of a process", 1)
    checkpoint_activations: bool = knob(False, "recompute each layer in the backward pass: less "
                                               "memory, a third more time")
    save_every: int = knob(20, "steps between checkpoints", 1)
    max_grad_norm: float = knob(1.0, "gradients are clipped to it, policy and critic apart", 1e-6)
    lr: float = knob(1e-5, "peak learning rate")
    steps: int = knob(0, "optimiser steps (0: from epochs); of PPO: rollout batches")
    lora_rank: int = knob(8, "rank of the adapters (0: train all weights)")
    lora_alpha: float = knob(64.0, "the adapters' product is scaled by alpha / rank", 1e-6)
    lora_dropout: float = knob(0.0, "dropout of the adapters in the update (the paper: 0.1)")

    def __post_init__(self):
        for f in fields(self):
            value, low = getattr(self, f.name), f.metadata["low"]
            if f.type in (int, float) and not low <= value < math.inf:
                raise InputError(f"--{f.name} {value}: expected a number, at least {low}")


@dataclass(frozen=True)
class Supervised(Common):
    """Settings of the sft and reward stages."""
    epochs: float = knob(1.0, "passes over the data", 1e-6)
    batch: int = knob(16, "demonstrations, or pairs, per optimiser step", 1)
    beta2: float = knob(0.999, "decay of Adam's second moment in the sft and reward stages")
    max_len: int = knob(512, "longest row of sft and reward, tokens; the rest is cut off", 2)


@dataclass(frozen=True)
class SFTConfig(Supervised):
    """Settings of supervised fine-tuning: cosine decay of the learning rate after 3 % warm-up."""
    sft_data: str = knob("", "demonstrations: JSON rows of instruction, input, output")
    epochs: float = knob(3.0, "passes over the data", 1e-6)
    batch: int = knob(128, "demonstrations, or pairs, per optimiser step", 1)
    lr: float = knob(2e-5, "peak learning rate")


@dataclass(frozen=True)
class RewardConfig(Supervised):
    """Settings of the reward model; its learning rate decays as SFT's."""
    preference_data: str = knob("", "comparisons: JSON rows of instruction, input, output_1, "
                                    "output_2, preference")
    preference_test: str = knob("", "comparisons for the accuracy (default: a tenth of the "
                                    "instructions of --preference_data)")
    lr: float = knob(3e-6, "peak learning rate")


@dataclass(frozen=True)
class PPOConfig(Common):
    """Settings of PPO: linear decay of the learning rate after the warm-up."""
    reward: str = knob("", "reward model folder: a full model, or an adapter on --model")
    prompts: str = knob("", "prompts for PPO: JSON rows of instruction, input")
    steps: int = knob(781, "optimiser steps (0: from epochs); of PPO: rollout batches", 1)
    rollout_batch: int = knob(256, "responses per PPO step, over all processes", 1)
    minibatch: int = knob(128, "responses per optimiser step, over all processes", 1)
    ppo_epochs: int = knob(2, "passes over each rollout batch", 1)
    generate_batch: int = knob(0, "responses decoded at once by a process (0: all)")
    prompt_len: int = knob(192, "longest prompt, tokens; longer ones are dropped", 1)
    response_len: int = knob(300, "longest response, tokens", 1)
    warmup_steps: int = knob(5, "PPO steps until the peak learning rate")
    gamma: float = knob(1.0, "discount")
    lam: float = knob(0.95, "lambda of GAE")
    clip: float = knob(0.2, "PPO's clip range of the ratio")
    value_clip: float = knob(0.2, "clip range of the value around its old value")
    vf_coef: float = knob(0.1, "weight of the value loss; acts through --max_grad_norm alone: "
                             "Adam divides the critic's own scale out")
    whiten_rewards: bool = knob(False, "divide rewards by their standard deviation (no shift)")
    regularizer: str = knob("kl", "penalty for leaving the reference",
                            choices=("none", *(SAMPLED | EXACT)))
    regularizer_mode: str = knob("reward", "charge the sampled penalty to the reward, or add the "
                                           "exact divergence to the loss",
                                 choices=("reward", "loss"))
    kl_coef: float = knob(0.02, "weight of the penalty; negative: pays for leaving", -math.inf)
    missing_eos_penalty: float = knob(1.0, "charged to a response without EOS", -math.inf)
    eval_data: str = knob("", "evaluation: JSON rows of instruction, input, output")
    eval_every: int = knob(0, "PPO steps between evaluations (0: only at the end)")
    eval_drop_long: bool = knob(False, "leave out evaluation rows that do not fit the model "
                                       "(default: refuse them)")
    eval_temperature: float = knob(0.7, "temperature of the evaluation's answers")

    def __post_init__(self):
        super().__post_init__()
        if self.rollout_batch % self.minibatch:
            fitting = self.minibatch * math.ceil(self.rollout_batch / self.minibatch)
            raise InputError(f"--rollout_batch {self.rollout_batch} is not a multiple of "
                             f"--minibatch {self.minibatch}: try {fitting}")
        allowed = SAMPLED if self.regularizer_mode == "reward" else EXACT
        if self.regularizer not in ("none", *allowed):
            raise InputError(f"--regularizer {self.regularizer} with --regularizer_mode "
                             f"{self.regularizer_mode}: the reward takes one-sample penalties, "
                             f"the loss exact divergences; here one of {', '.join(allowed)}")
        if self.eval_every and not self.eval_data:
            raise InputError("--eval_every needs --eval_data: there is nothing to evaluate on")

    def regularizer_in(self, mode):
        """Name of the penalty in the "reward" or the "loss", or None."""
        acts = self.regularizer_mode == mode and self.regularizer != "none"
        return self.regularizer if acts else None


STAGES = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}
NEEDS = {"sft": ["sft_data"], "reward": ["preference_data"], "ppo": ["prompts", "reward"]}
PATHS = ("model", "reward", "tokenizer", "sft_data", "preference_data", "preference_test",
         "prompts")
OWN = ("lr", "steps", "epochs", "batch", "lora_rank", "lora_alpha", "lora_dropout")  # --sft_lr, ..
FREE = ("micro_batch", "checkpoint_activations", "save_every", "generate_batch", "eval_data",
        "eval_every", "eval_drop_long", "eval_temperature")   # may change when a run is continued

TOY_FOLDER = os.path.relpath(Path(__file__).resolve().parent / "toy")
TOY_MODEL = LlamaConfig(vocab_size=960, dim=128, n_layers=3, n_heads=4, ffn_dim=352, norm_eps=1e-5,
                        max_seq_len=256, tie_embeddings=True)
TOY_COMMON = {"tokenizer": f"{TOY_FOLDER}/tokenizer.model", "micro_batch": 32}
TOY_SUPERVISED = TOY_COMMON | {"lora_rank": 0, "max_len": 160, "beta2": 0.95}
TOY = {
    "sft": TOY_SUPERVISED | {"sft_data": f"{TOY_FOLDER}/sft.json", "epochs": 10.0, "batch": 16,
                             "lr": 2e-3},
    "reward": TOY_SUPERVISED | {"preference_data": f"{TOY_FOLDER}/preference.json",
                                "preference_test": f"{TOY_FOLDER}/preference_test.json",
                                "epochs": 3.0, "batch": 32, "lr": 8e-4},
    "ppo": TOY_COMMON | {"prompts": f"{TOY_FOLDER}/unlabeled.json",
                         "eval_data": f"{TOY_FOLDER}/test.json", "steps": 80, "rollout_batch": 128,
                         "minibatch": 64, "lr": 2e-3, "lora_alpha": 32.0, "vf_coef": 1.0,
                         "kl_coef": 0.1, "prompt_len": 32, "response_len": 64,
                         "missing_eos_penalty": 3.0}}


@dataclass(frozen=True)
class Command:
    """A command line: what is to be done, and where."""
    stage: str         # "all", or one stage
    redo: str          # the stage to run again, "eval", or ""
    out: str
    start: str         # --model: what the first stage starts from ("": a new toy model)
    folders: dict      # stage -> where it writes, whether or not it is to be run
    configs: dict      # stage that is to be run -> its settings


def build_parser():
    """A flag per setting; those in OWN have one for each supervised stage as well."""
    own = ", ".join(f"--{name}" for name in OWN)
    about = (f"SFT, reward model, PPO with LoRA. Without --model: the toy world. Plain {own} are "
             "those of the named stage (PPO under all); --sft_lr, --reward_steps, .. the others'.")
    parser = Parser(description=about, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=("all", *STAGES), help="what to run (default: all)")
    parser.add_argument("--out", help="run folder; the same command continues what is in it "
                                      "(default: runs/toy in the toy world, else runs/default)")
    parser.add_argument("--redo", choices=(*STAGES, "eval"), help="set the results of this stage, "
                        "and of later ones, aside (ppo.1, ..) and run them again")
    flags = {}
    for stage, kind in STAGES.items():
        for f in fields(kind):
            flags.setdefault(f.name, {})[stage] = f
            if f.name in OWN and stage != "ppo":
                flags[f"{stage}_{f.name}"] = {stage: f}
    for name, by_stage in flags.items():
        f = list(by_stage.values())[-1]
        paper = {stage: own.default for stage, own in by_stage.items()}
        toy = {stage: TOY[stage][f.name] for stage in by_stage if f.name in TOY[stage]}
        if len(set(paper.values())) == 1:
            paper = repr(f.default)
        about = f"{f.metadata['help']} (default: {paper}; toy world: {toy or 'the same'})"
        kind = {"type": f.type, "choices": f.metadata["choices"]}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(f"--{name}", help=about, **kind)
    return parser


def parse(argv):
    """Command line -> Command. InputError for what makes no sense."""
    given = vars(build_parser().parse_args(argv))
    stage, start = given.pop("stage", "all"), given.get("model", "")
    out, redo = given.pop("out", "runs/default" if start else "runs/toy"), given.pop("redo", "")
    alone = start and stage != "all"       # one stage, from models that other commands have made
    folders = {one: Path(out) if alone else Path(out) / one for one in STAGES}
    if stage == "all" and given.get("reward"):
        raise InputError("--reward goes with --stage ppo: --stage all trains a reward model itself")
    named, configs = "ppo" if stage == "all" else stage, {}
    for one in STAGES if stage == "all" else [stage]:
        values = {"tokenizer": f"{start}/tokenizer.model"} if start else dict(TOY[one])
        for f in fields(STAGES[one]):
            # plain --lr is the named stage's; --epochs, which PPO lacks, is every other stage's
            mine = one == named or f.name not in OWN or not hasattr(STAGES[named], f.name)
            if f.name in given and mine:
                values[f.name] = given[f.name]
            if f.name in OWN and f"{one}_{f.name}" in given:
                values[f.name] = given[f"{one}_{f.name}"]
        if one != "sft" and not alone:
            values["model"] = str(folders["sft"])
        if one == "ppo" and not alone:
            values.setdefault("reward", str(folders["reward"]))
        for name in NEEDS[one]:
            if not values.get(name):
                raise InputError(f"--stage {stage} with --model needs --{name}")
        configs[one] = STAGES[one](**values)
    for name in given:
        owner, _, plain = name.partition("_")                              # --sft_lr: sft's lr
        known = owner in configs and plain in OWN
        if not known and not any(hasattr(c, name) for c in configs.values()):
            say(f"note: --{name} does nothing with --stage {stage}")
    if redo in STAGES and redo not in configs:
        raise InputError(f"--redo {redo} does not go with --stage {stage}")
    if redo == "eval" and not ("ppo" in configs and configs["ppo"].eval_data):
        raise InputError("--redo eval needs the stage ppo (or all), and --eval_data")
    return Command(stage, redo, out, start, folders, configs)


# ------------------------------------------------------------------------------------ run folder

class Run:
    """The folder of one stage: config.json, metrics.jsonl, samples.jsonl, evals.jsonl,
    checkpoint.pt, the result, finished.json, and eval.json. Paths are stored as seen from it; what
    is compared is the content."""

    def __init__(self, stage, folder, cfg):
        self.stage, self.folder, self.cfg = stage, folder, cfg
        self.settings, self.content = {"stage": stage}, {}     # content: digests, fingerprints
        for f in fields(cfg):
            value = getattr(cfg, f.name)
            if f.name in PATHS and value:
                if Path(value).is_file():
                    self.content[f.name] = digest(value)
                value = os.path.relpath(Path(value).resolve(), folder.resolve())
            if f.name not in FREE:
                self.settings[f.name] = value

    @property
    def finished(self):
        return (self.folder / "finished.json").is_file()

    def check(self, redone=False):
        """Refuse a folder that holds something else, or (unless it is to be made again) that was
        made with other settings or data."""
        path, about = self.folder / "config.json", {}
        if path.is_file():
            about = read_json(path)
        elif not list(self.folder.glob("*.safetensors")):
            return
        before, content = about.get("run", {}), about.get("content", {})
        if before.get("stage") != self.stage:
            raise InputError(f"{self.folder} holds something that is not a run of stage "
                             f"{self.stage}: choose another --out")
        other = []
        for name, value in self.settings.items():
            was = before.get(name)
            # (a path may be another: what lies there is compared as content)
            may_move = name in PATHS and not (self.finished and name in ("model", "reward"))
            if bool(was) != bool(value) or was != value and not may_move:
                other.append(f"{name} {was!r} (now {value!r})")
        other += [f"other content of {name}" for name, value in self.content.items()
                  if content.get(name, value) != value]
        if other and not redone:
            raise InputError(f"{self.folder} was made with {', '.join(other)}: give the same, "
                             f"another --out, or --redo {self.stage}")

    def resume(self, parameters, optimizer, **fingerprints):
        """Continue from the checkpoint, or begin -> the step that was taken last. fingerprints: of
        the models that the stage starts from, by the setting that names them."""
        self.content |= fingerprints
        first_does(self.check)
        step = self.restore(parameters, optimizer)
        if len(set(gather(step))) > 1:
            raise InputError(f"the processes see different checkpoints in {self.folder}: --out "
                             "must be a shared folder")
        first_does(lambda: self.begin(step))
        if step:
            say(f"{self.stage}: continuing after step {step} of {self.folder}")
        return step

    def begin(self, step):
        """Say in the folder what is made there; cut later lines of the records."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "config.json", {"run": self.settings, "content": self.content})
        for path in self.folder.glob("*.jsonl"):
            text = path.read_bytes().decode("utf-8", "replace")
            lines = text.split("\n")[:-1]                  # (the last one is empty, or half a line)
            with whole_file(path) as temporary:
                kept = [line for line in lines if line and json.loads(line)["step"] <= step]
                temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    @torch.no_grad()
    def restore(self, parameters, optimizer):
        """Put a checkpoint's parameters and optimiser state in place -> its step (0: none)."""
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            return 0
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for p, q in zip(parameters, saved["parameters"], strict=True):
            p.copy_(q)
        optimizer.load_state_dict(saved["optimizer"])
        return saved["step"]

    def end_step(self, step, parameters, optimizer, stopper, **records):
        """Keep a step's records, rows for files of JSON lines; a checkpoint, if one is due or if
        somebody asks to stop, which then happens. A kill leaves the old checkpoint or the new
        one."""
        number = stopper.asked()

        def save():
            for name, rows in records.items():
                path = self.folder / f"{name}.jsonl"
                with writing(path), open(path, "a", encoding="utf-8") as f:
                    f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            if number or step % self.cfg.save_every == 0:
                state = {"step": step, "parameters": [p.detach().cpu() for p in parameters],
                         "optimizer": optimizer.state_dict()}
                with whole_file(self.folder / "checkpoint.pt") as temporary:
                    torch.save(state, temporary)

        first_does(save)
        if number:
            say(f"stopped after step {step}; the same command, without --redo, continues "
                f"{self.folder}")
            sys.exit(128 + number)

    def finish(self, save_result, tokenizer, **summary):
        """Write the result (save_result() -> its folder), and last finished.json."""
        def write_all():
            folder = save_result()
            with whole_file(folder / "tokenizer.model") as temporary:
                shutil.copyfile(tokenizer.path, temporary)
            write_json(self.folder / "finished.json", summary)
            (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        first_does(write_all)
        say(f"{self.stage}: {summary['steps']} steps, written to {self.folder}\n")


def digest(path):
    """A short hash of a file's content."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def set_aside(path):
    """Rename a result to path.1, path.2, ..: nothing is deleted."""
    n = 1
    while Path(f"{path}.{n}").exists():
        n += 1
    if path.exists():
        path.rename(f"{path}.{n}")


def hold(folder):
    """Keep other processes from writing to a folder until the descriptor is closed, or we die."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another process is writing to {folder}: wait for it, or choose another "
                         "--out") from None
    return descriptor


# ------------------------------------------------------------------------------------- processes

PARENT = os.getppid()      # torchrun, or a shell


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def start_processes():
    """Join the processes that torchrun started (or be the only one) -> this process's device."""
    local, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # NCCL refuses two processes on one GPU; while one writes a checkpoint, the others wait
    settings = {"backend": "gloo", "timeout": timedelta(hours=2)}
    if gpus >= here and dist.is_nccl_available():
        settings |= {"backend": "nccl", "device_id": torch.device("cuda", local)}
    if world_size() == 1:
        settings |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if dist.is_initialized():                               # by an earlier call, ended by a mistake
        dist.destroy_process_group()
    if gpus:
        torch.cuda.set_device(local % gpus)
    dist.init_process_group(**settings)
    return f"cuda:{local % gpus}" if gpus else "cpu"


def gather(local):
    """One object per process -> the list of all of them, on every process."""
    parts = [local] * world_size()
    if len(parts) > 1:       # (for one process: gloo's own threads would slow a CPU's later work)
        dist.all_gather_object(parts, local)
    return parts


def first_does(action):
    """The first process does it while the others wait; what it refuses, all refuse."""
    refused = ""
    if rank() == 0:
        try:
            action()
        except (InputError, OSError) as e:
            refused = str(e)
    refused = gather(refused)[0]
    if refused:
        raise InputError(refused)


class Stopper:
    """Inside, SIGINT, SIGTERM, and the death of torchrun, which leaves its workers running, ask to
    stop after the step in progress; a second signal ends at once. (Where a step outlasts the 30
    seconds that torchrun waits, the last checkpoint counts: --save_every.)"""

    def __enter__(self):
        self.signal = 0
        self.before = {n: signal.signal(n, self.note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, _):
        self.signal = number
        self.let_go()                                    # (from now on a signal ends the process)

    def let_go(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, error, *_):
        self.let_go()
        if self.signal and not error:                          # it came after the last look
            signal.raise_signal(self.signal)

    def asked(self):
        """The signal that any process has got, or 0."""
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT:
            self.signal = signal.SIGTERM
        return max(gather(self.signal))


# --------------------------------------------------------------------------- what the stages share

@dataclass(frozen=True)
class Inputs:
    """What a stage reads, in each process, before the processes join."""
    tokenizer: Tokenizer
    banned_ids: list
    rows: list            # Examples, Pairs, or prompts as ids
    held_out: list        # Pairs
    eval_rows: list       # dictionaries


def learning_rate(step, steps, warmup, peak, shape):
    """Linear warm-up, then linear or cosine decay; above 0 at each step, counted from 1."""
    if step <= warmup:
        return peak * step / warmup
    progress = (step - 1 - warmup) / (steps - warmup)
    if shape == "linear":
        return peak * (1 - progress)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer, *args):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(*args)
    return group["lr"]


def accumulate(ddp, batch, length, weight, size, loss_of, *key):
    """True accumulation: gradients of the mean loss of a global batch, of which this process takes
    its share, `size` items of similar length at a time -> a row of statistics per micro-batch.

    length(item): in tokens. weight(item): how many terms of the mean it brings.
    loss_of(ddp, items) -> the mean over their own n terms, statistics. Weighted n * world_size /
    n_global, the sum over micro-batches and DDP's average over processes are the mean over all
    n_global terms. Gradients travel once, with the last micro-batch. key, with the micro-batch's
    number and the rank, seeds dropout."""
    table, n_global = [], sum(map(weight, batch))
    groups = micro_batches(batch, length, size, rank(), world_size())
    for i, items in enumerate(groups):
        torch.manual_seed(keyed_seed(*key, i, rank()))
        n = sum(map(weight, items))
        sync = ddp.no_sync() if i < len(groups) - 1 else contextlib.nullcontext()
        with sync:
            loss, stats = loss_of(ddp, items)
            (loss * (n * world_size() / n_global)).backward()
        stats = {"loss": loss} | stats
        table.append({name: x.item() for name, x in stats.items()} | {"terms": n})
    return table


def clip_gradients(parameters, max_norm, step, name):
    """Clip to max_norm -> the norm before. One that is not finite stops the run."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    require_finite(norm, f"gradient norm of the {name}", step)
    return norm.item()


def require_finite(x, name, step):
    if not torch.isfinite(x).all():
        raise FloatingPointError(f"step {step}: {name} is not finite; what was saved before it "
                                 "stands (lower --lr, or look at the regularizer)")


def check_same_parameters(parameters):
    """All processes must hold the same parameters, to the bit."""
    sums = gather([p.detach().double().sum().item() for p in parameters])
    if any(s != sums[0] for s in sums):
        raise RuntimeError("the processes hold different parameters: they read different files, "
                           "or took different steps")


def wrap(module, device):
    """DistributedDataParallel, without its first broadcast, which copies and sends frozen trunks
    too: all processes have read the same files and drawn from the same seed, which is checked (of
    frozen weights at their first numbers)."""
    check_same_parameters([p if p.requires_grad else p.flatten()[:64] for p in module.parameters()])
    return DistributedDataParallel(module, device_ids=[device] if device != "cpu" else None,
                                   init_sync=False, gradient_as_bucket_view=True)


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def clock(seconds):
    """75 -> 1m15s"""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes}m{seconds:02}s"


def eta(start, done, left):
    """Time that `left` steps will take, as `done` have taken it since `start`."""
    return clock((time.time() - start) / done * left)


def parameters_trained(module):
    """How many, as text."""
    n = sum(p.numel() for p in trainable(module))
    total = sum(p.numel() for p in module.parameters())
    return f"{n:,} of {total:,} parameters are trained ({100 * n / total:.3f} %)"


def starting_model(cfg, device, dtype, adapter_name):
    """What a supervised stage trains: all weights of a model, in float32, or an adapter."""
    torch.manual_seed(cfg.seed)
    if cfg.model:
        model = load_llama(cfg.model, device, dtype if cfg.lora_rank else torch.float32)
    else:
        model = Llama(TOY_MODEL).to(device)
    if cfg.lora_rank:
        add_lora(model, adapter_name, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout)
    model.checkpoint_activations = cfg.checkpoint_activations
    return model


def supervised(run, module, trunk, items, pick, weight, loss_of, device):
    """The loop of the sft and reward stages: AdamW, cosine schedule, true accumulation -> steps.

    pick: which items make a batch (data.batch_indices). weight, loss_of: see accumulate; a term is
    a response token, or a pair."""
    cfg, parameters, ddp = run.cfg, trainable(module), wrap(module, device).train()
    steps = cfg.steps or max(1, round(cfg.epochs * len(items) / cfg.batch))
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=0.0,
                                  fused=True)
    first = run.resume(parameters, optimizer, model=fingerprint(trunk))
    start, lengths = time.time(), [len(item) for item in items]
    with Stopper() as stopper:
        for step in range(first + 1, steps + 1):
            lr = set_learning_rate(optimizer, step, steps, round(0.03 * steps), cfg.lr, "cosine")
            picked = pick(lengths, cfg.batch, f"{cfg.seed} {run.stage}", step - 1)
            table = accumulate(ddp, [items[i] for i in picked], len, weight, cfg.micro_batch,
                               loss_of, cfg.seed, step)
            loss = weighted_mean(itertools.chain(*gather(table)), "loss")
            norm = clip_gradients(parameters, cfg.max_grad_norm, step, "model")
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)           # (gradients stay in DDP's buckets)
            if step % max(1, steps // 12) == 0 or step == steps:
                say(f"{run.stage:6} step {step:5}/{steps} | loss {loss:.3f} | lr {lr:.1e} | "
                    f"grad {norm:.2f} | eta {eta(start, step - first, steps - step)}")
            row = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm}
            run.end_step(step, parameters, optimizer, stopper, metrics=[row])
    module.eval()
    check_same_parameters(parameters)
    return steps


# ----------------------------------------------------------------------------------- SFT, reward

def sft(run, inputs, device, dtype):
    """SFT: cross-entropy of the demonstrations' responses. Writes a whole model."""
    cfg = run.cfg
    model = starting_model(cfg, device, dtype, "sft")
    net = ActorCritic(model, "sft" if cfg.lora_rank else None, autocast_dtype=dtype)
    say(f"sft: {len(inputs.rows)} demonstrations from {cfg.sft_data}; "
        f"{parameters_trained(net)}")
    steps = supervised(run, net, model, inputs.rows, batch_indices, lambda e: len(e.response),
                       sft_loss, device)

    def save():
        if cfg.lora_rank:
            merge_lora(model, "sft")
        save_llama(model.to(dtype), run.folder, bos_token_id=inputs.tokenizer.bos_id,
                   eos_token_id=inputs.tokenizer.eos_id, run=run.settings, content=run.content)
        return run.folder

    run.finish(save, inputs.tokenizer, steps=steps)


def sft_loss(ddp, examples):
    """Cross-entropy of response tokens given what stands before them, nats per token."""
    packed = pack([e.prompt for e in examples], [e.response for e in examples],
                  ddp.module.policy.device)
    logprobs = ddp(*packed).logprobs                                             # (B, R)
    return -masked_mean(logprobs, length_mask(packed[2], logprobs.shape[1])), {}


def reward(run, inputs, device, dtype):
    """Reward model from the SFT model: Bradley-Terry. Writes a full model, or an adapter."""
    cfg = run.cfg
    trunk = starting_model(cfg, device, dtype, "reward")
    model = RewardModel(trunk, "reward" if cfg.lora_rank else None, autocast_dtype=dtype)
    if not cfg.lora_rank:
        trunk.output = None
    say(f"reward: {len(inputs.rows)} pairs from {cfg.preference_data}, {len(inputs.held_out)} held "
        f"out; {parameters_trained(model)}")
    # (answers are padded to the longest of a micro-batch: pairs of similar length together)
    steps = supervised(run, model, trunk, inputs.rows, even_batch_indices, lambda p: 1, reward_loss,
                       device)
    mine = inputs.held_out[rank()::world_size()]
    scored = gather(score_pairs(model, mine, inputs.tokenizer.eos_id, cfg.micro_batch))
    scored = list(itertools.chain(*scored))
    centre(model, scored)
    accuracy = pair_accuracy(scored)

    def save():
        if not cfg.lora_rank:
            trunk.to(dtype)
        save_reward_model(model, run.folder, run=run.settings, content=run.content)
        return run.folder

    say(accuracy_report(accuracy))
    run.finish(save, inputs.tokenizer, steps=steps, accuracy=accuracy)


def reward_loss(ddp, pairs):
    """Bradley-Terry loss of pairs, nats per pair."""
    answers = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    tokens, before, after = pack([p.prompt for p in pairs] * 2, answers, ddp.module.trunk.device)
    chosen, rejected = ddp(tokens, before + after).chunk(2)                      # (B,) twice
    return bradley_terry_loss(chosen, rejected), {}


@torch.no_grad()
def centre(model, scored):
    """Only differences of scores are learned: make their mean 0, where the critic starts."""
    model.head.bias -= sum(s["chosen"] + s["rejected"] for s in scored) / (2 * len(scored))


# ------------------------------------------------------------------------------------------- PPO

def ppo(run, inputs, device, dtype):
    """PPO with LoRA: sample, score, shape rewards, update policy and critic. Writes the policy."""
    cfg = run.cfg
    torch.manual_seed(cfg.seed)
    net, reward_model = build_models(cfg.model, cfg.reward, device, dtype, inputs.banned_ids,
                                     cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout)
    for trunk in (net.policy, net.critic):
        trunk.checkpoint_activations = cfg.checkpoint_activations
    say(f"ppo: {len(inputs.rows)} prompts from {cfg.prompts}; {parameters_trained(net)}")
    groups = [{"params": p, "name": name} for name, p in net.groups().items()]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, eps=1e-5, weight_decay=0.0, fused=True)
    parameters = [p for group in groups for p in group["params"]]
    first = run.resume(parameters, optimizer, model=fingerprint(net.ref or net.policy),
                       reward=fingerprint(reward_model.trunk, reward_model.adapter_name))
    ddp, start = wrap(net, device).eval(), time.time()
    with Stopper() as stopper:
        for step in range(first + 1, cfg.steps + 1):
            laps = [time.time()]
            prompts, samples = respond(cfg, step, net, inputs)                      # 1. sample
            laps.append(time.time())
            rollout = collect(cfg, step, net, reward_model, inputs, prompts, samples)    # 2. score
            rollout = with_advantages(rollout, cfg.regularizer_in("reward"), cfg.kl_coef,
                                      cfg.missing_eos_penalty, cfg.gamma, cfg.lam,
                                      cfg.whiten_rewards)                        # 3. rewards, GAE
            laps.append(time.time())
            stats = update(cfg, step, ddp, optimizer, rollout)                      # 4. update
            laps.append(time.time())
            row = {"step": step} | rollout_statistics(rollout) | stats | seconds_of(laps)
            if step == 1:
                check_first_step(rollout, row, dtype, cfg.lora_dropout)
            say(step_line(row, cfg.steps, eta(start, step - first, cfg.steps - step)))
            records = {"metrics": [row]}
            if step == 1 or step % 10 == 0:
                records["samples"] = texts_of(step, rollout, inputs.tokenizer)
            if cfg.eval_every and step % cfg.eval_every == 0:
                summary = summarise(evaluation(cfg, inputs, net, reward_model))
                records["evals"] = [{"step": step} | summary]
            run.end_step(step, parameters, optimizer, stopper, **records)
    check_same_parameters(parameters)
    run.finish(lambda: save_policy(net, run.folder / "policy", cfg.model, inputs.tokenizer),
               inputs.tokenizer, steps=cfg.steps)


def respond(cfg, step, net, inputs):
    """This process's share of a rollout batch: prompts, and what the policy samples for them."""
    picked = batch_indices(inputs.rows, cfg.rollout_batch, f"{cfg.seed} prompts", step - 1)
    mine = range(rank(), cfg.rollout_batch, world_size())
    prompts = [inputs.rows[picked[i]] for i in mine]
    try:
        with net.acting() as policy:
            samples = sample_responses(
                policy, prompts, cfg.response_len, seed=f"{cfg.seed} {step}", row_ids=mine,
                eos_id=inputs.tokenizer.eos_id, banned_ids=inputs.banned_ids,
                batch_size=cfg.generate_batch)
    except FloatingPointError as e:
        raise FloatingPointError(f"step {step}: {e}") from None
    return prompts, samples


def collect(cfg, step, net, reward_model, inputs, prompts, samples):
    """Score what this process has sampled -> Rollout of the global batch, on every process."""
    local = assess(net, reward_model, prompts, samples.responses, inputs.tokenizer.eos_id,
                   cfg.micro_batch)
    parts = gather(replace(local, sampled_logprobs=pad_right(samples.logprobs)))
    # row i of the batch was sampled by process i % world_size, as its row i // world_size
    order = [i % world_size() * len(prompts) + i // world_size() for i in range(cfg.rollout_batch)]
    rollout = join_rollouts(parts).rows(torch.tensor(order))
    for name in ("logprobs", "ref_logprobs", "values", "scores", "kl"):
        require_finite(getattr(rollout, name), f"{name} of the rollout", step)
    return rollout


def update(cfg, step, ddp, optimizer, rollout):
    """ppo_epochs passes over the rollout batch, one optimiser step per minibatch -> statistics.

    A minibatch is a slice of one global permutation; each process takes an even share of it."""
    lr = set_learning_rate(optimizer, step, cfg.steps, cfg.warmup_steps, cfg.lr, "linear")
    require_finite(rollout.advantages, "advantages", step)
    length = (rollout.prompt_lengths + rollout.response_lengths).tolist().__getitem__
    weight = rollout.response_lengths.tolist().__getitem__
    table, norms = [], []
    ddp.train()
    for epoch in range(cfg.ppo_epochs):
        order = permutation(cfg.rollout_batch, f"{cfg.seed} {step}", epoch)
        for begin in range(0, cfg.rollout_batch, cfg.minibatch):
            rows = accumulate(ddp, order[begin:begin + cfg.minibatch], length, weight,
                              cfg.micro_batch, partial(ppo_loss, cfg, rollout),
                              cfg.seed, step, epoch, len(norms))
            table += [row | {"optimizer_step": len(norms)} for row in rows]
            norm = {}
            for group in optimizer.param_groups:
                norm[f"{group['name']}_grad_norm"] = clip_gradients(
                    group["params"], cfg.max_grad_norm, step, group["name"])
            norms.append(norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)               # (gradients stay in DDP's buckets)
    ddp.eval()
    stats = average_statistics(list(itertools.chain(*gather(table))), norms)
    return stats | {"lr": lr}


def ppo_loss(cfg, rollout, ddp, index):
    """Clipped policy loss + vf_coef * clipped value loss (+ kl_coef * exact divergence, in loss
    mode) of some rows of a rollout, and statistics."""
    rows = rollout.rows(index).to(ddp.module.policy.device)
    divergence, mask = cfg.regularizer_in("loss"), rows.response_mask
    out = ddp(rows.tokens, rows.prompt_lengths, rows.response_lengths, divergence)
    loss, stats = policy_loss(out.logprobs, rows.logprobs, rows.advantages, mask, cfg.clip)
    v_loss, value_stats = value_loss(out.values, rows.values, rows.returns, mask, cfg.value_clip)
    stats |= value_stats | {"policy_loss": loss.detach(), "value_loss": v_loss.detach()}
    loss = loss + cfg.vf_coef * v_loss
    if divergence:
        loss = loss + cfg.kl_coef * masked_mean(out.divergence, mask)
    return loss, stats


def seconds_of(laps):
    names = ("sample_seconds", "score_seconds", "update_seconds")
    return {name: end - begin for name, begin, end in zip(names, laps, laps[1:])}


def step_line(row, steps, left):
    """What is shown of a step; metrics.jsonl has more."""
    return (f"step {row['step']:4}/{steps} | score {row['score']:+.2f} | "
            f"kl {row['kl_per_token']:.3f}/tok {row['kl_per_sequence']:.1f}/seq | "
            f"ent {row['entropy']:.2f} | clip {row['clip_frac']:.2f} | "
            f"vloss {row['value_loss']:.2f} | ev {row['explained_variance']:+.2f} | "
            f"len {row['length']:.0f} | eos {row['eos_rate']:.2f} | "
            f"sample {row['sample_seconds']:.1f}s score {row['score_seconds']:.1f}s "
            f"update {row['update_seconds']:.1f}s | eta {left}")


def texts_of(step, rollout, tokenizer):
    """Four prompts and responses of a rollout, with their scores, for people to read."""
    texts = []
    for i in range(min(4, len(rollout.tokens))):
        row = rollout.rows([i])
        ids, begin = row.tokens[0].tolist(), int(row.prompt_lengths)
        texts.append({"step": step, "score": row.scores.item(),
                      "prompt": tokenizer.decode(ids[:begin]),
                      "response": tokenizer.decode_response(ids[begin:])})
    return texts


def save_policy(net, folder, base_model, tokenizer):
    """Write the trained policy: an adapter of base_model, or a whole model -> its folder."""
    if net.policy_adapter:
        save_lora(net.policy, net.policy_adapter, folder, base_model)
    else:
        save_llama(net.policy, folder, bos_token_id=tokenizer.bos_id,
                   eos_token_id=tokenizer.eos_id)
    return folder


def evaluation(cfg, inputs, net, reward_model):
    """Answers to the evaluation instructions, before and after PPO, by all processes -> records."""
    mine = inputs.eval_rows[rank()::world_size()]
    records = evaluate(net, reward_model, inputs.tokenizer, mine, cfg.micro_batch,
                       max_new_tokens=cfg.response_len, temperature=cfg.eval_temperature,
                       seed=f"{cfg.seed} evaluation",
                       batch_size=cfg.generate_batch or cfg.rollout_batch // world_size())
    return sorted(itertools.chain(*gather(records)), key=lambda record: record["index"])


# ------------------------------------------------------------------------------------------ main

def read_inputs(command, stage):
    """Read and check what a stage needs; say what was cut or dropped."""
    cfg, config = command.configs[stage], TOY_MODEL
    check_processes(cfg)
    source = command.start if command.stage == "all" else cfg.model
    if source:
        config = read_model_config(source)
    tokenizer, room = Tokenizer(cfg.tokenizer), config.max_seq_len
    tokenizer.check_model(source or TOY_FOLDER, config.vocab_size)
    asked = cfg.prompt_len + cfg.response_len if stage == "ppo" else cfg.max_len
    if command.stage == "ppo" and is_adapter(cfg.reward):
        read_adapter_config(cfg.reward)
    elif command.stage == "ppo":
        reward_model = reward_config(cfg.reward)
        tokenizer.check_model(cfg.reward, reward_model.vocab_size)
        room = min(room, reward_model.max_seq_len)
    if asked > room:
        raise InputError(f"{asked} tokens (--max_len, or --prompt_len and --response_len) exceed "
                         f"the {room} positions of the model or the reward model: lower them")
    held_out = eval_rows = ()
    if stage == "sft":
        rows = load_sft(cfg.sft_data, tokenizer, asked)
    elif stage == "ppo":
        rows = load_prompts(cfg.prompts, tokenizer, cfg.prompt_len)
        if cfg.eval_data:
            eval_rows = load_eval_rows(cfg.eval_data, tokenizer, room, cfg.response_len,
                                       cfg.eval_drop_long)
    else:
        rows = load_preferences(cfg.preference_data, tokenizer, asked)
        if cfg.preference_test:
            held_out = load_preferences(cfg.preference_test, tokenizer, asked)
        else:
            rows, held_out = split_by_instruction(rows)
    banned_ids = tokenizer.banned_ids(config.vocab_size)
    return Inputs(tokenizer, banned_ids, rows, held_out, eval_rows)


def check_processes(cfg):
    """Every batch must split evenly over the processes."""
    for name in ("batch", "minibatch", "rollout_batch"):
        n = getattr(cfg, name, 0)
        if n % world_size():
            raise InputError(f"--{name} {n} does not split over the processes: give a multiple of "
                             f"{world_size()}")


def evaluation_settings(cfg):
    """What an evaluation's answers depend on, beside the models."""
    return {"temperature": cfg.eval_temperature, "eval_data": digest(cfg.eval_data)}


def needs_evaluation(run, again):
    """Whether a PPO run is to be evaluated: --eval_data is given, and eval.json is missing, or was
    made with other settings."""
    path = run.folder / "eval.json"
    before = read_json(path).get("settings") if path.is_file() else None
    return bool(run.cfg.eval_data) and (again or before != evaluation_settings(run.cfg))


def final_evaluation(run, inputs, device, dtype):
    """Read the finished run back from its files, evaluate it, keep the records."""
    net, reward_model, _ = load_run(run.folder, device, dtype)
    records = evaluation(run.cfg, inputs, net, reward_model)
    content = {"settings": evaluation_settings(run.cfg), "records": records}
    first_does(lambda: write_json(run.folder / "eval.json", content))


def carry_out(command):
    """Run the stages of a command that are not finished, and evaluate what came out."""
    runs = {stage: Run(stage, command.folders[stage], cfg)
            for stage, cfg in command.configs.items()}
    later = list(STAGES)[list(STAGES).index(command.redo):] if command.redo in STAGES else []
    for stage, run in runs.items():
        run.check(redone=stage in later)
    # (what has been made from a stage that is to be run is set aside, too, and made again)
    todo = list(itertools.dropwhile(lambda s: s not in later and runs[s].finished, runs))
    stale = [s for s in STAGES if s in later or s in todo and runs[s].finished]
    again = "ppo" in todo or command.redo == "eval"
    evaluating = "ppo" in runs and needs_evaluation(runs["ppo"], again)
    reading = [stage for stage in runs if stage in todo or stage == "ppo" and evaluating]
    inputs = {stage: read_inputs(command, stage) for stage in reading}
    device, held = start_processes(), []
    dtype = torch_dtype(list(runs.values())[0].cfg.dtype, device)

    def make_room():
        held.append(hold(Path(command.out)))
        for stage in reversed(stale):
            set_aside(command.folders[stage])
        if evaluating:
            set_aside(runs["ppo"].folder / "eval.json")
        if not Path(command.out).exists():            # --out itself was set aside
            held.append(hold(Path(command.out)))

    try:
        if reading:
            first_does(make_room)
        for stage, run in runs.items():
            if stage in todo:
                {"sft": sft, "reward": reward, "ppo": ppo}[stage](run, inputs[stage], device, dtype)
            else:
                say(f"{stage}: finished, in {run.folder} (to run it again: --redo {stage})")
        if evaluating:
            final_evaluation(runs["ppo"], inputs["ppo"], device, dtype)
    finally:
        for descriptor in held:
            os.close(descriptor)
    if "ppo" in runs and (runs["ppo"].folder / "eval.json").is_file():
        say(report(runs["ppo"].folder))


def main(argv=None):
    started, status = time.time(), 0
    with mistakes_in_one_line("train.py"):
        command = parse(sys.argv[1:] if argv is None else argv)
        try:
            carry_out(command)
            say(f"done in {clock(time.time() - started)}: {command.out}")
        except SystemExit as stop:
            status = stop.code
        except FloatingPointError as e:      # (of any one process: torchrun stops the others)
            print(f"train.py: stopped: {e}", file=sys.stderr)
            status = 1
    # only now: a DistributedDataParallel that outlives its group can wait for ever for its threads
    dist.destroy_process_group()
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
