"""The stages of RLHF - SFT, reward model, PPO - as plain DistributedDataParallel loops.

    python train.py                                  one process, the toy world
    torchrun --nproc_per_node=2 train.py             two processes, the same results but for rounding
    torchrun --nproc_per_node=2 train.py --stage ppo --model runs/sft --reward runs/reward
             --prompts unlabeled.json --out runs/ppo

Read `ppo`, `ppo_step` and `update` first; in order: settings, run folder, processes, the three stages, main.

Legend   B sequences of a global batch, T tokens, R response tokens

Departures from the paper's code (numbers as in the README):
1. True accumulation: each loss is summed over tokens and divided by the *global* number of response tokens; one clip
   and one optimiser step per minibatch. (The paper's code steps on each of 8 reuses of the same 16 sequences.)
5. No dropout in the update by default; with it, old_logprobs are taken without.
6. Token in, token out: the missing-EOS penalty looks at ids, the reward model scores the ids that were sampled.
11. Checkpoints hold all that a resumed run needs, the first learning rate is above 0, logged KL is not clamped, logged
   gradient norms are from before the clipping. Policy and value are clipped apart: they share no parameter.
Every random number is a function of (seed, step, row or epoch), so no generator's state has to be saved, and results
depend neither on the number of processes nor on where a run was interrupted. (The masks of dropout, if there is any,
belong to a process and its micro-batches as well.)
"""
import argparse
import contextlib
import ctypes
import difflib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None                  # (Windows)

import torch
import torch.distributed as dist
# torch imports this by itself when a model is made; after init_process_group its default arguments would keep the
# group, and with it threads that can crash a process which has done all its work
import torch.distributed.nn.functional
from torch.nn.parallel import DistributedDataParallel

from data import (Tokenizer, batch_indices, even_batch_indices, length_mask, load_eval_rows, load_preferences,
                  load_prompts, load_sft, pack, permutation, split_by_instruction)
from eval import (Parser, accuracy_report, check_rows, evaluate, load_run, pair_accuracy, read_evaluation, report,
                  run_settings, score_pairs, summarise)
from lora import add_lora, base_folder, lora_parameters, merge_lora
from model import (Llama, LlamaConfig, fingerprint, generate, keyed_seed, packed_weights, read_json, read_model_config,
                   read_text, save_llama, write_json)
from ppo import (adapt_kl_coef, explained_variance, gae, join_rollouts, masked_mean, policy_loss, shape_rewards,
                 value_loss, whiten)
from regularizers import EXACT, SAMPLED, sampled
from reward import (ActorCritic, RewardModel, assess, bradley_terry_loss, build_models, check_new_folder,
                    check_reward_model, count_parameters, is_adapter, kv_cache_bytes, load_trunk, save_policy,
                    save_reward_model, training_memory)

STAGES = ("sft", "reward", "ppo")
PAPER_COMPAT = ("reuse_minibatch", "whiten_shift")
HERE = os.path.relpath(Path(__file__).resolve().parent)


# -------------------------------------------------------------------------------------------------------- settings

LARGEST = {int: 2 ** 31 - 1, float: 1e30}      # of a setting: what float32 and torch's shapes hold


def knob(default, help, low=None, choices=None, high=None):
    """A setting: its default, what it means and in which unit, its smallest and largest value or its choices."""
    high = LARGEST.get(type(default)) if high is None else high
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Config:
    """All settings. Defaults are the paper's, but for dropout (0.1 there) and the missing-EOS penalty (none there);
    without --model the dictionary TOY replaces some of them."""
    stage: str = knob("all", "what to run", choices=("all", *STAGES))
    model: str = knob("", "model folder to start from (none: a new tiny model for the toy world)")
    reward: str = knob("", "reward model folder: a full model (two trunks) or an adapter on --model (one trunk)")
    tokenizer: str = knob("", "sentencepiece file (default: tokenizer.model in --model)")
    sft_data: str = knob("", "demonstrations: JSON rows of instruction, input, output")
    preference_data: str = knob("", "comparisons: JSON rows of instruction, input, output_1, output_2, preference")
    preference_test: str = knob("", "comparisons for the accuracy (default: --reward_holdout of --preference_data)")
    prompts: str = knob("", "prompts for PPO: JSON rows of instruction, input")
    eval_data: str = knob("", "evaluation: JSON rows of instruction, input and a reference output")
    out: str = knob("runs/default", "run folder; the same command continues what is in it")
    redo: str = knob("", "set the results of this stage, and of those that build on it, aside, and run it again",
                     choices=("", *STAGES, "eval"))
    seed: int = knob(0, "seed of everything random", low=0, high=2 ** 63 - 1)
    dtype: str = knob("auto", "of frozen weights; auto is float32 on a CPU and bfloat16 on a GPU (a CPU without "
                              "bfloat16 of its own, AVX-512 BF16 or AMX, is far slower in it)",
                      choices=("auto", "float32", "bfloat16"))
    max_len: int = knob(512, "longest row of the sft and reward stages, tokens; longer ones lose their tail", low=2)
    micro_batch: int = knob(8, "sequences per forward pass of one process (pairs, in the reward stage)", low=1)
    max_grad_norm: float = knob(1.0, "gradients are clipped to this norm, policy and value apart", low=0)
    checkpoint_activations: bool = knob(False, "recompute each layer in the backward pass: "
                                               "less memory, a third more time")
    cuda_graphs: bool = knob(True, "on a GPU, record the decoding step as a CUDA graph and replay it, instead of "
                                   "starting its kernels one by one")
    beta2: float = knob(0.999, "decay of Adam's second moment in the sft and reward stages (PPO: 0.999)", low=0)
    save_every: int = knob(20, "steps between checkpoints", low=1)

    sft_epochs: float = knob(3.0, "passes over --sft_data", low=0)
    sft_steps: int = knob(0, "optimiser steps (0: from --sft_epochs)", low=0)
    sft_batch: int = knob(128, "demonstrations per optimiser step", low=1)
    sft_lr: float = knob(2e-5, "peak learning rate, cosine decay after 3 %% warm-up", low=0)
    sft_lora_rank: int = knob(8, "rank of the SFT adapter, merged at the end (0: train all weights)", low=0)
    sft_lora_alpha: float = knob(64.0, "alpha of the SFT adapter", low=0)
    sft_lora_dropout: float = knob(0.0, "dropout of the SFT adapter", low=0)

    reward_epochs: float = knob(1.0, "passes over --preference_data", low=0)
    reward_steps: int = knob(0, "optimiser steps (0: from --reward_epochs)", low=0)
    reward_batch: int = knob(16, "pairs per optimiser step", low=1)
    reward_lr: float = knob(3e-6, "peak learning rate, cosine decay after 3 %% warm-up", low=0)
    reward_lora_rank: int = knob(8, "rank of the reward adapter (0: train all weights)", low=0)
    reward_lora_alpha: float = knob(64.0, "alpha of the reward adapter", low=0)
    reward_lora_dropout: float = knob(0.0, "dropout of the reward adapter", low=0)
    reward_holdout: float = knob(0.1, "share of the instructions of --preference_data kept for the accuracy "
                                       "(one at least)", low=0)

    steps: int = knob(781, "PPO steps, one rollout batch each (781: 10 passes over AlpacaFarm's 20,001 prompts)", low=1)
    rollout_batch: int = knob(256, "responses per PPO step, over all processes", low=1)
    minibatch: int = knob(128, "responses per optimiser step, over all processes", low=1)
    ppo_epochs: int = knob(2, "passes over each rollout batch", low=1)
    generate_batch: int = knob(0, "responses decoded at once by one process (0: all of its share)", low=0)
    prompt_len: int = knob(192, "longest prompt, tokens; longer ones are dropped", low=1)
    response_len: int = knob(300, "longest response, tokens", low=1)
    lr: float = knob(1e-5, "peak learning rate, linear decay after --warmup_steps", low=0)
    warmup_steps: int = knob(5, "PPO steps until the peak learning rate", low=0)
    lora_rank: int = knob(8, "rank of the policy adapter, "
                             "and of the value adapter on two trunks (0: train all weights)", low=0)
    lora_alpha: float = knob(64.0, "alpha of the adapters: the update is scaled by alpha / rank", low=0)
    lora_dropout: float = knob(0.0, "dropout of the adapters in the update (the paper: 0.1)", low=0)
    gamma: float = knob(1.0, "discount", low=0)
    lam: float = knob(0.95, "lambda of GAE", low=0)
    clip: float = knob(0.2, "PPO's clip range of the ratio", low=0)
    value_clip: float = knob(0.2, "clip range of the value around its old value", low=0)
    vf_coef: float = knob(0.1, "weight of the value loss", low=0)
    whiten_rewards: bool = knob(False, "divide shaped rewards by their standard deviation (never shifts them)")
    regularizer: str = knob("kl", "penalty for leaving the reference",
                            choices=("none", *(SAMPLED | EXACT)))
    regularizer_mode: str = knob("reward", "charge the sampled penalty to the reward, or add the exact one to the loss",
                                 choices=("reward", "loss"))
    divergence: str = knob("", "sampled: a number per drawn token; exact: a sum over the vocabulary, differentiable "
                               "(default: what --regularizer_mode needs)", choices=("", "sampled", "exact"))
    kl_coef: float = knob(0.02, "weight of the penalty, in the reward (and so whitened with the advantages) or, as it "
                                "is, beside the clipped loss; negative: pays for leaving")
    kl_target: float = knob(0.0, "true KL per sequence, nats, that the weight is steered to (0: the weight is fixed)",
                            low=0)
    kl_horizon: float = knob(10000.0, "sequences over which that steering acts", low=1)
    paper_compat: str = knob("", "dynamics of the paper's code where they differ, a comma list: reuse_minibatch (each "
                                 "optimiser step takes the gradient of an eighth of a minibatch, 8 times), "
                                 "whiten_shift (whitened rewards get their mean back); its dropout is --lora_dropout "
                                 "0.1, its Jensen-Shannon --regularizer jensen_shannon_paper; padding in the "
                                 "statistics, bf16 adapters and re-tokenised text are not carried")
    missing_eos_penalty: float = knob(1.0, "subtracted from the score of a response that has no EOS")
    eval_every: int = knob(0, "PPO steps between evaluations (0: only at the end)", low=0)
    eval_drop_long: bool = knob(False, "leave out evaluation rows that do not fit the model (default: refuse them)")
    eval_temperature: float = knob(0.7, "temperature of the evaluation's answers", low=0)
    dry_run: bool = knob(False, "check all inputs, print sizes, memory per process and steps, and stop; "
                                "needs no weights")

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            low, high = f.metadata["low"], f.metadata["high"]
            if f.type is float and not math.isfinite(value):
                raise ValueError(f"--{f.name} {value} is not a finite number")
            if low is not None and value < low:
                raise ValueError(f"--{f.name} {value} is below {low}")
            if f.type in LARGEST and abs(value) > high:
                raise ValueError(f"--{f.name} {value} is too large: at most {high}")
            if choices and value not in choices:
                raise ValueError(f"--{f.name} {value!r} is not one of {', '.join(filter(None, choices))}")
        if self.rollout_batch % self.minibatch:
            above = self.minibatch * (self.rollout_batch // self.minibatch + 1)
            raise ValueError(f"--rollout_batch {self.rollout_batch} is not a multiple of --minibatch {self.minibatch}: "
                             f"try {above}" + f" or {above - self.minibatch}" * (above > self.minibatch))
        self.check_divergence()
        self.check_paper_compat()
        allowed = ("none", *(SAMPLED if self.regularizer_mode == "reward" else EXACT))
        if self.regularizer not in allowed:
            raise ValueError(f"--regularizer {self.regularizer} with --regularizer_mode "
                             f"{self.regularizer_mode}: the reward takes one-sample penalties, "
                             f"the loss exact divergences; here one of {', '.join(allowed)}")
        for name in ("lora_dropout", "sft_lora_dropout", "reward_lora_dropout", "reward_holdout", "beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be below 1")
        for name in ("gamma", "lam"):
            if getattr(self, name) > 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at most 1")
        for stage in ("sft", "reward"):
            if not getattr(self, f"{stage}_epochs") and not getattr(self, f"{stage}_steps"):
                raise ValueError(f"--{stage}_epochs 0 trains nothing: give a number above 0, or --{stage}_steps")
        if 0 < self.eval_temperature < 1e-3:
            raise ValueError(f"--eval_temperature {self.eval_temperature}: expected 0 (greedy), or at least 0.001")
        for name in ("lora", "sft_lora", "reward_lora"):
            if getattr(self, f"{name}_rank") and not getattr(self, f"{name}_alpha"):
                raise ValueError(f"--{name}_alpha 0 would make the adapter nothing: give a number above 0 (64, say)")
        if not self.max_grad_norm:
            raise ValueError("--max_grad_norm 0 would make every gradient 0: give a large number for no clipping")
        if self.kl_target and (self.regularizer == "none" or self.kl_coef <= 0 or self.kl_horizon < self.rollout_batch):
            raise ValueError("--kl_target steers --kl_coef: it needs a --regularizer, a --kl_coef above 0, and a "
                             f"--kl_horizon of at least --rollout_batch ({self.rollout_batch})")
        if self.eval_every and not self.eval_data and self.stage in ("all", "ppo"):
            raise ValueError("--eval_every needs --eval_data: there is nothing to evaluate on")
        if self.reward and self.stage in ("all", "sft", "reward"):
            raise ValueError(f"--reward goes with --stage ppo: --stage {self.stage} would not use it")
        if self.model and Path(self.out).resolve() in (Path(self.model).resolve(), Path(self.reward or "-").resolve()):
            raise ValueError(f"--out {self.out} is the folder of an input: choose another one")

    def check_divergence(self):
        """The reward takes sampled penalties, the loss exact ones; an empty --divergence becomes the one that fits."""
        fitting = "sampled" if self.regularizer_mode == "reward" else "exact"
        if self.divergence == "exact" and fitting == "sampled":
            raise ValueError("--divergence exact with --regularizer_mode reward: a sum over the "
                             "vocabulary is the same whichever token is drawn: its own "
                             "token's gradient is 0, the rest not implemented: --regularizer_mode loss")
        if self.divergence == "sampled" and fitting == "exact":
            raise ValueError("--divergence sampled with --regularizer_mode loss: the derivative "
                             "of a one-sample form is not the divergence's gradient (k1's is 0 "
                             "on average): --divergence exact, or --regularizer_mode reward")
        object.__setattr__(self, "divergence", fitting)

    def check_paper_compat(self):
        """Only known switches, and none beside a setting that it contradicts."""
        unknown = [name for name in self.compat if name not in PAPER_COMPAT]
        if unknown:
            raise ValueError(f"--paper_compat {unknown[0]!r} is not one of {', '.join(PAPER_COMPAT)}")
        if "whiten_shift" in self.compat and self.whiten_rewards:
            raise ValueError("--whiten_rewards scales only, --paper_compat whiten_shift re-adds the mean: "
                             "give one of them")
        if "reuse_minibatch" in self.compat and self.minibatch % 8:
            raise ValueError("--paper_compat reuse_minibatch takes eighths of --minibatch: "
                             f"{self.minibatch} is not a multiple of 8")

    def folder(self, stage):
        """Where a stage writes: --out itself for a single stage with --model, else a folder of its own in it."""
        return Path(self.out) if self.model and self.stage != "all" else Path(self.out) / stage

    def input_model(self, stage):
        """The model that a stage starts from: --model, or the SFT model of this run ("": a new one)."""
        if stage == "sft" or (self.model and self.stage != "all"):
            return self.model
        return str(self.folder("sft"))

    def reward_path(self):
        """The reward model of the ppo stage."""
        return self.reward or str(self.folder("reward"))

    def trunk_dtype(self, device):
        """The dtype of frozen weights on a device."""
        name = self.dtype if self.dtype != "auto" else "bfloat16" if device.startswith("cuda") else "float32"
        return getattr(torch, name)

    @property
    def loss_divergence(self):
        """Name of the exact divergence in the loss, or None."""
        return self.regularizer if self.divergence == "exact" and self.regularizer != "none" else None

    @property
    def compat(self):
        """The switches of --paper_compat."""
        return [name for name in self.paper_compat.split(",") if name]

    @property
    def step_batch(self):
        """Responses per optimiser step. The paper's code adds the gradient of the same 16 sequences 8 times, clipping
        after each, where a minibatch of 128 was meant: that is 8 times this one gradient, clipped once."""
        return self.minibatch // 8 if "reuse_minibatch" in self.compat else self.minibatch


TOY_MODEL = LlamaConfig(vocab_size=960, dim=128, n_layers=3, n_heads=4, ffn_dim=352, norm_eps=1e-5, max_seq_len=256,
                        tie_embeddings=True)
TOY = {"tokenizer": f"{HERE}/toy/tokenizer.model", "sft_data": f"{HERE}/toy/sft.json",
       "preference_data": f"{HERE}/toy/preference.json", "preference_test": f"{HERE}/toy/preference_test.json",
       "prompts": f"{HERE}/toy/unlabeled.json", "eval_data": f"{HERE}/toy/test.json",
       "out": "runs/toy", "micro_batch": 32,
       "sft_epochs": 10.0, "sft_batch": 16, "sft_lr": 2e-3, "sft_lora_rank": 0, "max_len": 160, "beta2": 0.95,
       "reward_epochs": 3.0, "reward_batch": 32, "reward_lr": 8e-4, "reward_lora_rank": 0,
       "steps": 80, "rollout_batch": 128, "minibatch": 64, "lr": 2e-3, "warmup_steps": 5, "lora_alpha": 32.0,
       "vf_coef": 1.0, "kl_coef": 0.1, "prompt_len": 32, "response_len": 64, "missing_eos_penalty": 3.0}

PHASES = ("sample", "score", "update")      # of a PPO step, as the log times them

SHARED = ("model", "tokenizer", "seed", "dtype", "max_grad_norm")
PATHS = ("model", "reward", "tokenizer", "sft_data", "preference_data", "preference_test", "prompts", "eval_data")
READ_BY = {      # the settings that decide what a stage's result is; a run folder made with others is not continued
    "sft": (*SHARED, "sft_data", "max_len", "beta2",
            *(f.name for f in fields(Config) if f.name.startswith("sft_") and f.name != "sft_data")),
    "reward": (*SHARED, "preference_data", "preference_test", "max_len", "beta2",
               *(f.name for f in fields(Config) if f.name.startswith("reward_"))),
    "ppo": (*SHARED, "reward", "prompts", "steps", "rollout_batch", "minibatch", "ppo_epochs", "prompt_len",
            "response_len", "lr", "warmup_steps", "lora_rank", "lora_alpha", "lora_dropout", "gamma", "lam", "clip",
            "value_clip", "vf_coef", "whiten_rewards", "regularizer", "regularizer_mode", "divergence", "paper_compat",
            "kl_coef", "kl_target", "kl_horizon", "missing_eos_penalty")}
RANKS = {"sft": "sft_lora_rank", "reward": "reward_lora_rank", "ppo": "lora_rank"}
ALIASES = ("lr", "steps", "lora_rank", "lora_alpha", "lora_dropout")      # --lr with --stage sft means --sft_lr


def parse(argv):
    """Command line -> Config. ValueError, one line, for what makes no sense."""
    parser = Parser(description="SFT, reward model and PPO with LoRA. Without --model: the toy world. With --stage sft "
                                f"or reward, {', '.join(f'--{name}' for name in ALIASES)} are that stage's.",
                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        toy = f" [toy world: {TOY[f.name]}]" if f.name in TOY else ""
        parser.add_argument(f"--{f.name}", help=f"{f.metadata['help']} (default: {f.default!r}){toy}",
                            choices=f.metadata["choices"], **kind)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        near = unknown[0].startswith("-") and difflib.get_close_matches(
            unknown[0].split("=")[0].lstrip("-"), [f.name for f in fields(Config)], n=1)
        raise ValueError(f"unknown argument {unknown[0]}"
                         + (f": did you mean --{near[0]}?" if near else " (see --help)"))
    given = vars(given)
    empty = next((name for name in ("model", "out") if given.get(name) == ""), None)
    if empty:
        raise ValueError(f"--{empty} is empty: a variable of the shell that is not set? Give a path, or leave it out")
    stage = given.get("stage", "all")
    for name in ALIASES if stage in ("sft", "reward") else ():
        if name in given:
            if f"{stage}_{name}" in given:
                raise ValueError(f"--{name} and --{stage}_{name} are the same setting of --stage {stage}: "
                                 "give one of them")
            given[f"{stage}_{name}"] = given.pop(name)
    cfg = Config(**(({} if given.get("model") else TOY) | given))
    for name, reason in without_effect(cfg, given):
        note(f"--{name}", f"has no effect {reason}")
    return cfg


def without_effect(cfg, given):
    """Settings that were given although nothing reads them beside the others: (name, why), for the user to see."""
    read = {name for stage in STAGES if cfg.stage in ("all", stage) for name in READ_BY[stage]}
    others = {name for stage in STAGES for name in READ_BY[stage]} - read
    if cfg.stage in ("sft", "reward"):
        others |= {f.name for f in fields(Config) if f.name.startswith("eval_")} | {"generate_batch"}
    reasons = [(others, f"with --stage {cfg.stage}"),
               ({"kl_coef", "regularizer_mode", "divergence"} if cfg.regularizer == "none" else (),
                "with --regularizer none"),
               ({"kl_horizon"} if not cfg.kl_target else (), "without --kl_target"),
               ({"reward_holdout"} if cfg.preference_test else (), "with --preference_test"),
               ({"eval_temperature", "eval_drop_long"} if not cfg.eval_data else (), "without --eval_data"),
               ({"eval_every"} if cfg.eval_every > cfg.steps else (), f"with --steps {cfg.steps}")]
    reasons += [({f"{stage}_epochs"}, f"with --{stage}_steps") for stage in ("sft", "reward")
                if getattr(cfg, f"{stage}_steps")]
    reasons += [({rank.replace("rank", "alpha"), rank.replace("rank", "dropout")}, f"with --{rank} 0")
                for rank in RANKS.values() if not getattr(cfg, rank)]
    found = {name: next((why for names, why in reasons if name in names), None) for name in given if given[name]}
    return [(name, why) for name, why in found.items() if why]


# ------------------------------------------------------------------------------------------------------ run folder

WRITTEN = ("finished.json", "metrics.jsonl", "samples.jsonl", "evals.jsonl", "checkpoint.pt", "eval.json", "policy",
           "tokenizer.model", "model.safetensors", "adapter_config.json", "adapter_model.safetensors",
           "reward_head.safetensors", "config.json")      # in the order in which they are set aside


class Run:
    """The folder of one stage: config.json, metrics.jsonl, samples.jsonl, checkpoint.pt, and the result."""
    held = {}      # folders that this process writes to, held open: path -> file descriptor

    def __init__(self, cfg, stage):
        self.folder, self.stage, self.cfg = cfg.folder(stage), stage, cfg
        self.replaced = []       # the runs whose results are set aside once this one begins (--redo)
        settings = asdict(cfg) | {"model": cfg.input_model(stage), "reward": cfg.reward_path()}
        self.data = {k: digest(settings[k]) for k in READ_BY[stage] if k in PATHS}
        settings |= {k: self.relative(settings[k]) for k in PATHS}
        self.settings = {"stage": stage} | {k: settings[k] for k in READ_BY[stage]}

    def relative(self, path):
        """A path from the folder: a run can be continued from anywhere, and moved with its inputs. (Links are followed:
        from a folder behind a link, .. leads elsewhere.)"""
        return path and os.path.relpath(Path(path).resolve(), self.folder.resolve())

    @property
    def finished(self):
        return (self.folder / "finished.json").is_file()

    @property
    def evaluation_settings(self):
        return {"eval_data": self.relative(self.cfg.eval_data), "temperature": self.cfg.eval_temperature,
                "eval_data_digest": digest(self.cfg.eval_data)}

    def evaluated(self):
        """Whether eval.json stands, and was made with these evaluation settings (of which an older one may not know
        all)."""
        if not (self.folder / "eval.json").is_file():
            return False
        found = read_evaluation(self.folder)
        return all(found.get(k, v) == v or v is None for k, v in self.evaluation_settings.items())

    def check(self):
        """Refuse a folder that was made with other settings or data; True if the stage has been run to its end."""
        self.check_writable()
        if not (self.folder / "config.json").is_file():
            check_new_folder(self.folder)
            if (self.folder / "checkpoint.pt").is_file():
                raise ValueError(f"{self.folder} holds a checkpoint, but no config.json that says what it was made "
                                 f"with: choose another --out, or --redo {self.stage}")
            return False
        before = run_settings(self.folder)
        if before.get("stage") != self.stage:
            raise ValueError(f"{self.folder} holds something that is not a run of stage {self.stage}: "
                             "choose another --out")
        known = read_json(self.folder / "config.json").get("data")
        known = known if isinstance(known, dict) else {}
        moved = [k for k, now in self.data.items() if now and known.get(k) == now]      # (or not: it is the same file)
        other = [f"{k} {before.get(k)!r} (now {v!r})" for k, v in self.settings.items()
                 if k not in moved and not self.same(k, before)]
        if not other:
            other = [f"other content of {getattr(self.cfg, k)}" for k, now in self.data.items()
                     if now and known.get(k, now) != now]
        if other:
            raise ValueError(f"{self.folder} was made with {', '.join(other)}: "
                             f"give the same, another --out, or --redo {self.stage}")
        return self.finished

    def same(self, name, before):
        """Whether a setting is what it was; ValueError for a path that leads nowhere any more."""
        was, now = before.get(name), self.settings[name]
        if name not in PATHS or not (was and now and isinstance(was, str)):
            return was == now
        if was != now and not (self.folder / was).exists():
            raise ValueError(f"{self.folder} was made with {name} {was!r} as seen from there, where nothing is now: "
                             f"move a run together with its inputs, choose another --out, or --redo {self.stage}")
        return (self.folder / was).resolve() == (self.folder / now).resolve()

    def check_writable(self):
        """Refuse a folder in which this stage's files could not be written, before it has run."""
        above = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise ValueError(f"cannot write to {self.folder}: "
                             f"{above} is {'not writable' if above.is_dir() else 'a file'}")
        odd = [name for name in WRITTEN if (self.folder / name).exists()
               and (self.folder / name).is_dir() != (name == "policy")]
        if odd:
            raise ValueError(f"{self.folder / odd[0]} is a {'file' if odd[0] == 'policy' else 'folder'}, which is in "
                             "the way of what this stage writes: remove it, or choose another --out")

    def hold(self):
        """Keep other processes from writing to the folder until this one ends, however it ends, or releases it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.folder.resolve() in self.held or not fcntl:
            return
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(f"another process is writing to {self.folder}: wait for it, or choose another --out"
                             ) from None
        except OSError:
            pass                 # (a file system that knows no locks)
        self.held[self.folder.resolve()] = descriptor

    def release(self):
        """Let others write to the folder."""
        if self.folder.resolve() in self.held:
            os.close(self.held.pop(self.folder.resolve()))

    def open(self):
        """Make the folder, or cut the records of an earlier try back to its checkpoint. -> checkpoint or None.

        The models have been read by now: a mistake in their files has set nothing aside."""
        def make_room():
            for run in (self, *self.replaced):
                run.hold()
            if self.finished and self not in self.replaced:
                raise ValueError(f"another process has finished {self.folder} meanwhile: give the command again")
            for run in self.replaced:
                run.set_aside()

        def begin():
            write_json(self.folder / "config.json", {"run": self.settings, "data": self.data})
            for name in ("metrics.jsonl", "samples.jsonl", "evals.jsonl"):
                cut_lines(self.folder / name, checkpoint["step"] if checkpoint else 0)

        first_does(make_room)
        checkpoint = self.read_checkpoint()
        steps = gather(checkpoint and checkpoint["step"])
        if len(set(steps)) > 1:
            raise ValueError(f"the processes see different checkpoints in {self.folder} (steps {steps}): "
                             "--out must be a shared folder")
        first_does(begin)
        if checkpoint:
            say(f"{self.stage}: continuing after step {checkpoint['step']} of {self.folder}")
        return checkpoint

    def read_checkpoint(self):
        """The checkpoint, or None where there is none; ValueError if it is damaged."""
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            return None
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:      # (torch.load names a damaged file in many ways)
            checkpoint = type(e).__name__
        if not isinstance(checkpoint, dict) or not {"step", "parameters", "optimizer", "trunks"} <= checkpoint.keys():
            raise ValueError(f"{path} is no checkpoint that can be read: damaged? --redo {self.stage}")
        return checkpoint

    def append(self, name, row):
        if is_main():
            with open(self.folder / name, "a", encoding="utf-8") as f:
                f.write(json.dumps(row, ensure_ascii=False) + "\n")

    def save_checkpoint(self, step, parameters, optimizer, **extra):
        """All that the next step needs, under a temporary name and then renamed:
        a kill leaves the old or the new one."""
        if is_main():
            state = {"step": step, "parameters": [p.detach().cpu() for p in parameters],
                     "optimizer": optimizer.state_dict()} | extra
            with open(self.folder / "checkpoint.pt.tmp", "wb") as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())      # or after a power cut the new name could be there, and the content not
            os.replace(self.folder / "checkpoint.pt.tmp", self.folder / "checkpoint.pt")

    def finish(self, **summary):
        if is_main():
            write_json(self.folder / "finished.json", summary)
            (self.folder / "checkpoint.pt").unlink(missing_ok=True)
            for name in ("previous", "previous.part"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        shares = f" ({shares_of(summary['phases'])})" if "phases" in summary else ""
        say(f"{self.stage}: {summary['steps']} steps in {clock(summary['seconds'])}{shares}, "
            f"written to {self.folder}\n")
        dist.barrier()

    def set_aside(self):
        """--redo: move what this stage has written to a subfolder `previous`, which goes when the stage is finished
        again. A try that was not finished takes no finished result's place there: it goes."""
        previous, moving = self.folder / "previous", self.folder / "previous.part"

        def rename():
            shutil.rmtree(previous, ignore_errors=True)
            os.replace(moving, previous)
        if (moving / WRITTEN[-1]).exists():      # (a kill came before the last step)
            rename()
        written = [f for f in (self.folder / n for n in WRITTEN) if f.exists()]
        if moving.exists() or written and (self.finished or not (previous / "finished.json").is_file()):
            moving.mkdir(exist_ok=True)          # (if it is there, a kill has come between: the rest follows)
            for file in written:
                os.replace(file, moving / file.name)
            rename()
        else:
            for file in written:
                shutil.rmtree(file) if file.is_dir() else file.unlink()

    def check_redo(self):
        """Refuse to redo what this stage has not made."""
        self.check_writable()
        if not (self.folder / "config.json").is_file():
            check_new_folder(self.folder)
        elif run_settings(self.folder).get("stage") != self.stage:
            raise ValueError(f"--redo {self.stage}: {self.folder} was not made by this stage, it is left alone")


def digest(path):
    """A short hash of a file's content; None where there is no file (a model's folder is known by its weights)."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if path and Path(path).is_file() else None


def cut_lines(path, step):
    """Drop the lines of a JSONL file that are later than `step`, and a half-written last one."""
    if path.is_file():
        lines = [line for line in read_text(path).split("\n")[:-1] if line]
        try:
            kept = [line for line in lines if json.loads(line)["step"] <= step]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} holds a line that is no record of a step: remove that line") from None
        Path(f"{path}.tmp").write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(f"{path}.tmp", path)


@torch.no_grad()
def restore(checkpoint, parameters, optimizer, trunks):
    """Put a checkpoint's parameters and optimiser state in place; returns the step it was taken after. trunks:
    fingerprints of the frozen weights, which are in no checkpoint and have to be the same ones."""
    if checkpoint["trunks"] != trunks:
        raise ValueError("the base model is not the one that this checkpoint was written with: restore it, or run the "
                         "stage again with --redo")
    if [p.shape for p in checkpoint["parameters"]] != [p.shape for p in parameters]:
        raise ValueError("the checkpoint holds other parameters than this model trains: choose another --out")
    for p, saved in zip(parameters, checkpoint["parameters"]):
        p.copy_(saved)
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["step"]


# ------------------------------------------------------------------------------------------------------- processes

def rank():
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size():
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_main():
    return rank() == 0


def say(text):
    """One process prints."""
    if is_main():
        print(text, flush=True)


def start_processes():
    """Join the processes that torchrun started (or be the only one). -> this process's device."""
    local, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        torch.cuda.set_device(local % gpus)
    else:
        keep_freed_memory()
    if 0 < gpus < here:
        say(f"note: {here} processes for {gpus} GPU{'s' * (gpus > 1)}: they share, memory included "
            f"(--nproc_per_node={gpus}: one for each)")
    # NCCL refuses two processes on one GPU; and while one process writes a checkpoint, the others wait
    backend = "nccl" if gpus >= here and dist.is_nccl_available() else "gloo"
    settings = {"backend": backend, "timeout": timedelta(hours=2)}
    if backend == "nccl":
        settings["device_id"] = torch.device("cuda", local)      # left to guess, barriers warn
    if dist.is_initialized():                                    # by an earlier call here, which a mistake has ended
        dist.destroy_process_group()
    if "WORLD_SIZE" not in os.environ:
        settings |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**settings)
    return f"cuda:{local % gpus}" if gpus else "cpu"


def keep_freed_memory():
    """Have glibc keep freed pieces of up to 32 MiB for the next ones. Left alone it hands what a step has freed back to
    the kernel, and the next step waits for the same pages. (A user's own setting of the allocator stands.)"""
    if sys.platform == "linux" and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)      # (other C libraries have none)
        mallopt(-3, 1 << 25)              # M_MMAP_THRESHOLD, the largest that every glibc takes
        mallopt(-1, (1 << 31) - 1)        # M_TRIM_THRESHOLD


def gather(local):
    """One object per process -> the list of all of them, on every process."""
    if world_size() == 1:
        return [local]      # or gloo copies it on a second set of OpenMP threads, which slows all later work on a CPU
    parts = [None] * world_size()
    dist.all_gather_object(parts, local)
    return parts


def first_does(action):
    """The first process does it, while the others wait; what it refuses, all refuse."""
    refused = None
    if is_main():
        try:
            action()
        except (ValueError, OSError) as e:
            refused = e
    refused = gather(refused)[0]
    if refused:
        raise refused


class Stopper:
    """Ctrl-C and SIGTERM end the run after the step in progress, with a checkpoint; a second Ctrl-C ends it at once."""

    def __init__(self):
        self.signal = 0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def rest(self):
        """Nothing is left that could be continued: signals do again what they did before; so does one that came since
        the last step."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.signal:
            signal.raise_signal(self.signal)

    def note(self, number, _):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def asked(self, device):
        """Whether any process was asked to stop (the processes have to agree)."""
        flag = torch.tensor([self.signal], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag > 0:                 # (else this one's signal stays: it may have come meanwhile, for the next time)
            self.signal = int(flag)
        return bool(flag > 0)

    def leave(self, where, step):
        say(f"stopped after step {step}; the same command (without --redo) continues from {where}")
        dist.barrier()               # the checkpoint is written
        dist.destroy_process_group()
        sys.exit(128 + self.signal)


# ----------------------------------------------------------------------------------------------- what stages share

def learning_rate(step, steps, warmup, peak, shape):
    """Linear warm-up, then linear or cosine decay. Steps count from 1; the rate is above 0 at every one of them."""
    if step <= warmup:
        return peak * step / warmup
    progress = (step - 1 - warmup) / (steps - warmup)
    return peak * (1 - progress if shape == "linear" else (1 + math.cos(math.pi * progress)) / 2)


def set_learning_rate(optimizer, *args):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(*args)
    return group["lr"]


def gradients_travel(ddp, last):
    """True accumulation: gradients of the micro-batches add up locally, and are averaged once, with the last one."""
    return contextlib.nullcontext() if last else ddp.no_sync()


def token_weight(n_local, n_global):
    """Weight of a micro-batch whose loss is the mean over its own n_local items, so that the sum over micro-batches and
    DDP's average over processes is the mean over all n_global items."""
    return n_local * world_size() / n_global


def seed_dropout(*key):
    """The masks of dropout belong to (seed, step, epoch, micro-batch) and to the process."""
    torch.manual_seed(keyed_seed(*key, rank()))


def clip_gradients(parameters, max_norm, step, name):
    """Clip to max_norm; returns the norm before. Stops the run, before anything is overwritten, if it is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    require_finite(torch.tensor(norm), f"gradient norm of the {name}", step)
    return norm


def require_finite(x, name, step):
    if not torch.isfinite(x).all():
        raise FloatingPointError(f"step {step}: {name} is not finite; what was saved before it stands "
                                 "(lower --lr, or look at the regularizer: see \"reading the log\" in the README)")


def share(items, length):
    """This process's share of a batch: sorted by length and dealt out, so that shares and micro-batches are even."""
    return sorted(items, key=length)[rank()::world_size()]


def chunks(items, size):
    return [items[i:i + size] for i in range(0, len(items), size)]


def check_same_parameters(parameters):
    """Before and after a stage all processes must hold the same parameters, to the bit."""
    sums = gather([p.detach().double().sum().item() for p in parameters])
    if any(s != sums[0] for s in sums):
        raise RuntimeError("the processes hold different parameters: they read different files, "
                           "or took different steps")


def wrap(module, device):
    """DistributedDataParallel, without its first broadcast, which copies and sends the frozen trunks too: all processes
    have read the same files and drawn from the same seed, which is checked (frozen weights: at their first numbers)."""
    check_same_parameters([p if p.requires_grad else p.flatten()[:64] for p in module.parameters()])
    return DistributedDataParallel(module, device_ids=[device] if device != "cpu" else None, init_sync=False,
                                   gradient_as_bucket_view=True)


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def to(device, tensors):
    return tuple(t.to(device) for t in tensors)


def clock(seconds):
    return (f"{int(seconds) // 3600}h{int(seconds) % 3600 // 60:02}m" if seconds >= 3600
            else f"{int(seconds) // 60}m{int(seconds) % 60:02}s")


def shares_of(seconds):
    """{"sample": 20, "update": 60} -> sample 25 %, update 75 %"""
    return ", ".join(f"{name} {100 * s / max(1e-9, sum(seconds.values())):.0f} %" for name, s in seconds.items())


def count(module):
    n, total = sum(p.numel() for p in trainable(module)), sum(p.numel() for p in module.parameters())
    return f"{n:,} of {total:,} parameters are trained ({100 * n / total:.3f} %)"


def supervised_steps(cfg, stage, n):
    """Optimiser steps of the sft or reward stage with n rows."""
    get = lambda name: getattr(cfg, f"{stage}_{name}")
    return get("steps") or max(1, round(get("epochs") * n / get("batch")))


def supervised(run, module, trunks, items, length, weight, loss_of, stopper):
    """The loop of the sft and reward stages: AdamW, cosine schedule, true accumulation. -> (steps, seconds).

    loss_of(items of a micro-batch) -> mean loss over their weights; length(item) in tokens; weight(item): how many
    terms of the loss it brings (response tokens, or one pair).
    """
    cfg, parameters = run.cfg, trainable(module)
    get = lambda name: getattr(cfg, f"{run.stage}_{name}")
    steps = supervised_steps(cfg, run.stage, len(items))
    optimizer = torch.optim.AdamW(parameters, lr=get("lr"), betas=(0.9, cfg.beta2), weight_decay=0.0, fused=True)
    lengths = [length(item) for item in items]
    batches = even_batch_indices if run.stage == "reward" else lambda lengths, *args: batch_indices(len(lengths), *args)
    with mistakes_in_one_line():
        checkpoint = run.open()
        first = restore(checkpoint, parameters, optimizer, trunks) if checkpoint else 0
    del checkpoint                                             # (it is as large as what trains)
    module.train()
    start, shown = time.time(), []
    for step in range(first + 1, steps + 1):
        lr = set_learning_rate(optimizer, step, steps, round(0.03 * steps), get("lr"), "cosine")
        picked = [items[i] for i in batches(lengths, get("batch"), f"{cfg.seed} {run.stage}", step - 1)]
        loss = accumulate(cfg, step, module, share(picked, length), sum(map(weight, picked)), weight, loss_of)
        norm = clip_gradients(parameters, cfg.max_grad_norm, step, "model")
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)      # they stay in DDP's buckets: others would be made beside those
        run.append("metrics.jsonl", {"step": step, "loss": loss, "lr": lr, "grad_norm": norm})
        shown.append(loss)
        if step % max(1, steps // 12) == 0 or step == steps:
            eta = (time.time() - start) / (step - first) * (steps - step)
            say(f"{run.stage:6} step {step:5}/{steps} | loss {sum(shown) / len(shown):.3f} | lr {lr:.1e} | "
                f"grad {norm:.2f} | eta {clock(eta)}")
            shown = []
        save_and_stop(run, step, parameters, optimizer, stopper, trunks=trunks)
    module.eval()
    check_same_parameters(parameters)
    return steps, time.time() - start


def accumulate(cfg, step, module, mine, n_global, weight, loss_of):
    """Gradients of one global batch, of which this process has the items `mine`.
    -> the loss, a mean over n_global terms."""
    total, micro_batches = 0.0, chunks(mine, cfg.micro_batch)
    for i, micro_batch in enumerate(micro_batches):
        seed_dropout(cfg.seed, step, 0, i)
        n = sum(map(weight, micro_batch))
        with gradients_travel(module, i == len(micro_batches) - 1):
            loss = loss_of(micro_batch)
            (loss * token_weight(n, n_global)).backward()
        total += loss.item() * n
    return sum(gather(total)) / n_global


def save_and_stop(run, step, parameters, optimizer, stopper, **extra):
    """The end of a step: a checkpoint if it is due, or if someone has asked to stop, which then happens."""
    stopping = stopper.asked(parameters[0].device)
    if step % run.cfg.save_every == 0 or stopping:
        run.save_checkpoint(step, parameters, optimizer, **extra)
    if stopping:
        stopper.leave(run.folder, step)


# ----------------------------------------------------------------------------------------------------------- stages

def sft(run, inputs, device, stopper):
    """Supervised fine-tuning: cross-entropy of the demonstrations' responses. Writes a Hugging Face folder."""
    cfg, dtype = run.cfg, run.cfg.trunk_dtype(device)
    full = cfg.sft_lora_rank == 0
    torch.manual_seed(cfg.seed)
    with mistakes_in_one_line():
        model = (load_trunk(cfg.model, device, torch.float32 if full else dtype) if cfg.model
                 else Llama(TOY_MODEL).to(device))
    if not full:
        add_lora(model, "sft", cfg.sft_lora_rank, cfg.sft_lora_alpha, cfg.sft_lora_dropout)
    model.checkpoint_activations = cfg.checkpoint_activations
    net = ActorCritic(model, None if full else "sft", autocast_dtype=dtype if full else None)
    say(f"sft: {len(inputs.examples)} demonstrations from {cfg.sft_data}; {count(net)}")
    ddp = wrap(net, device)

    def loss_of(examples):
        tokens, prompt_lengths, lengths = to(device, pack([e.prompt for e in examples], [e.response for e in examples]))
        logprobs = ddp(tokens, prompt_lengths, lengths).logprobs                  # (B, R)
        return -masked_mean(logprobs, length_mask(lengths, logprobs.shape[1]))

    trunks = [] if full else [fingerprint(model)]
    with packed_weights(net):
        steps, seconds = supervised(run, ddp, trunks, inputs.examples, lambda e: len(e.prompt) + len(e.response),
                                    lambda e: len(e.response), loss_of, stopper)
    if not full:
        merge_lora(model, "sft")
    if is_main():
        save_llama(model.to(dtype), run.folder, run=run.settings, data=run.data)
        shutil.copy(inputs.tokenizer.path, run.folder / "tokenizer.model")
    run.finish(steps=steps, seconds=round(seconds, 1))


def reward(run, inputs, device, stopper):
    """Reward model from the SFT model: Bradley-Terry on pairs. Writes a full model, or an adapter on the SFT model."""
    cfg, dtype = run.cfg, run.cfg.trunk_dtype(device)
    full = cfg.reward_lora_rank == 0
    torch.manual_seed(cfg.seed)
    with mistakes_in_one_line():
        trunk = load_trunk(cfg.input_model("reward"), device, torch.float32 if full else dtype)
    if full:
        trunk.output = None
    else:
        add_lora(trunk, "reward", cfg.reward_lora_rank, cfg.reward_lora_alpha, cfg.reward_lora_dropout)
    trunk.checkpoint_activations = cfg.checkpoint_activations
    model = RewardModel(trunk, None if full else "reward", autocast_dtype=dtype if full else None)
    say(f"reward: {len(inputs.pairs)} pairs from {cfg.preference_data}, "
        f"{len(inputs.held_out)} held out; {count(model)}")
    ddp = wrap(model, device)

    def loss_of(pairs):
        tokens, prompt_lengths, lengths = to(device, pack([p.prompt for p in pairs] * 2,
                                                          [p.chosen for p in pairs] + [p.rejected for p in pairs]))
        chosen, rejected = ddp(tokens, prompt_lengths + lengths).chunk(2)         # (B,) twice
        return bradley_terry_loss(chosen, rejected)

    trunks = [] if full else [fingerprint(trunk)]
    with packed_weights(model):
        steps, seconds = supervised(run, ddp, trunks, inputs.pairs,
                                    lambda p: len(p.prompt) + max(len(p.chosen), len(p.rejected)),
                                    lambda p: 1, loss_of, stopper)
    scored = sum(gather(score_pairs(model, inputs.held_out[rank()::world_size()], inputs.tokenizer.eos_id,
                                    cfg.micro_batch)), [])
    centre(model, scored)
    accuracy = pair_accuracy(scored)
    if is_main():
        if full:
            trunk.to(dtype)
        save_reward_model(model, run.folder, run=run.settings, data=run.data)
        shutil.copy(inputs.tokenizer.path, run.folder / "tokenizer.model")
    say(accuracy_report(accuracy))
    run.finish(steps=steps, seconds=round(seconds, 1), accuracy=accuracy)


@torch.no_grad()
def centre(model, scored):
    """Only differences of scores are learned: make their mean 0, where the head of PPO's critic starts."""
    model.head.bias -= sum(s["chosen"] + s["rejected"] for s in scored) / (2 * len(scored))


def respond(cfg, step, net, inputs):
    """This process's share of a rollout batch: prompts, sampled responses, and the log-probabilities at sampling."""
    picked = batch_indices(len(inputs.prompts), cfg.rollout_batch, f"{cfg.seed} prompts", step - 1)
    mine = range(rank(), cfg.rollout_batch, world_size())
    prompts = [inputs.prompts[picked[i]] for i in mine]
    try:
        with net.acting() as policy:
            return prompts, *generate(
                policy, prompts, cfg.response_len, eos_id=inputs.tokenizer.eos_id, seed=f"{cfg.seed} {step}",
                banned_ids=inputs.banned_ids, batch_size=cfg.generate_batch or None, row_ids=mine, return_logprobs=True)
    except FloatingPointError as e:
        raise FloatingPointError(f"step {step}: {e}") from None


def collect(cfg, net, reward_model, eos_id, prompts, responses, sampled_logprobs):
    """Score what this process has sampled. -> Rollout of the global batch (the same on every process), and the gaps
    between the log-probabilities at sampling and those recomputed for the same tokens, a list."""
    local = assess(net, reward_model, prompts, responses, eos_id, cfg.micro_batch)
    gaps = [abs(a - b) for row, again in zip(sampled_logprobs, local.logprobs.tolist()) for a, b in zip(row, again)]
    parts, gaps = zip(*gather((local, gaps)))
    order = [i % world_size() * len(prompts) + i // world_size() for i in range(cfg.rollout_batch)]
    return join_rollouts(parts).rows(torch.tensor(order)), sum(gaps, [])


def with_advantages(cfg, rollout, kl_coef):
    """Penalty -> rewards per token -> GAE -> whitened advantages, over the global batch. -> Rollout, penalty (B, R)."""
    mask, penalty = rollout.response_mask, torch.zeros_like(rollout.logprobs)
    scores = torch.where(rollout.finished, rollout.scores, rollout.scores - cfg.missing_eos_penalty)
    if cfg.regularizer != "none" and cfg.divergence == "sampled":
        penalty = torch.where(mask, sampled(cfg.regularizer, rollout.logprobs, rollout.ref_logprobs), 0.0)
    rewards = shape_rewards(scores, penalty, mask, kl_coef)
    if cfg.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    # departure 3: whatever the answer, each of its tokens is paid (or charged) the mean
    if "whiten_shift" in cfg.compat:
        rewards = torch.where(mask, whiten(rewards, mask) + masked_mean(rewards, mask), 0.0)
    advantages, returns = gae(rewards, rollout.values, mask, cfg.gamma, cfg.lam)
    return replace(rollout, advantages=whiten(advantages, mask), returns=returns), penalty


def ppo_loss(cfg, ddp, rows, kl_coef):
    """Clipped policy loss + vf_coef * clipped value loss (+ kl_coef * exact divergence, in loss mode)
    of a micro-batch."""
    out = ddp(rows.tokens, rows.prompt_lengths, rows.response_lengths, divergence=cfg.loss_divergence)
    mask = rows.response_mask
    loss, stats = policy_loss(out.logprobs, rows.logprobs, rows.advantages, mask, cfg.clip)
    v_loss, value_stats = value_loss(out.values, rows.values, rows.returns, mask, cfg.value_clip)
    stats |= value_stats | {"policy_loss": loss.detach(), "value_loss": v_loss.detach()}
    loss = loss + cfg.vf_coef * v_loss
    if cfg.loss_divergence:
        loss = loss + kl_coef * masked_mean(out.divergence, mask)
    return loss, stats


def update(cfg, step, ddp, optimizer, rollout, kl_coef):
    """ppo_epochs passes over the rollout batch, one optimiser step per minibatch. -> statistics, means over tokens.

    A minibatch is a slice of one global permutation; each process takes an even share of it. (--paper_compat
    reuse_minibatch: see Config.step_batch.)
    """
    lengths = (rollout.prompt_lengths + rollout.response_lengths).tolist()
    table, norms, device = [], [], ddp.module.policy.device        # table: a row of statistics per micro-batch
    ddp.train()
    for epoch in range(cfg.ppo_epochs):
        order = list(permutation(cfg.rollout_batch, f"{cfg.seed} {step}", epoch))
        for minibatch in chunks(order, cfg.step_batch):
            n_global = int(rollout.response_lengths[minibatch].sum())
            micro_batches = chunks(share(minibatch, lengths.__getitem__), cfg.micro_batch)
            for i, index in enumerate(micro_batches):
                seed_dropout(cfg.seed, step, epoch, len(norms), i)
                rows = rollout.rows(index).to(device)
                n = int(rows.response_lengths.sum())
                with gradients_travel(ddp, i == len(micro_batches) - 1):
                    loss, stats = ppo_loss(cfg, ddp, rows, kl_coef)
                    (loss * token_weight(n, n_global) * (cfg.minibatch // cfg.step_batch)).backward()
                table.append({"optimizer_step": len(norms), "tokens": n} | {k: float(v) for k, v in stats.items()})
            norms.append({f"{name}_grad_norm": clip_gradients(parameters, cfg.max_grad_norm, step, name)
                          for name, parameters in actor_and_critic_parameters(ddp.module).items()})
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)      # (see `supervised`)
    ddp.eval()
    return average_statistics(sum(gather(table), []), norms)


def actor_and_critic_parameters(net):
    """What PPO trains, in two groups that share nothing: {"policy": [...], "critic": [...]}."""
    if net.policy_adapter is None:
        return {"policy": trainable(net.policy), "critic": trainable(net.critic) + trainable(net.value_head)}
    return {"policy": lora_parameters(net.policy, net.policy_adapter),
            "critic": lora_parameters(net.critic, net.value_adapter) + trainable(net.value_head)}


def average_statistics(table, norms):
    """Means over all tokens of all micro-batches and processes, gradient norms over the optimiser steps; ratio_max is a
    maximum. first_..: of the first optimiser step alone, before which nothing has moved."""
    tokens = sum(row["tokens"] for row in table)
    means = {k: sum(row[k] * row["tokens"] for row in table) / tokens
             for k in table[0] if k not in ("optimizer_step", "tokens")}
    first = [row for row in table if row["optimizer_step"] == 0]
    return means | {"ratio_max": max(row["ratio_max"] for row in table),
                    "first_ratio_max": max(row["ratio_max"] for row in first),
                    "first_ratio_mean": (sum(row["ratio_mean"] * row["tokens"] for row in first)
                                         / sum(row["tokens"] for row in first)),
                    "first_clip_frac": max(row["clip_frac"] for row in first),
                    "optimizer_steps": len(norms)} | {k: sum(n[k] for n in norms) / len(norms) for k in norms[0]}


def rollout_statistics(rollout, penalty):
    """What is logged of a rollout: means over sequences, or over tokens (`_per_token`)."""
    mask, log_ratio = rollout.response_mask, rollout.logprobs - rollout.ref_logprobs
    per_token = lambda x: masked_mean(x, mask).item()
    return {"score": rollout.scores.mean().item(), "score_std": rollout.scores.std(correction=0).item(),
            "kl_per_token": per_token(rollout.kl), "kl_per_sequence": rollout.kl.sum(-1).mean().item(),
            "k1_per_token": per_token(log_ratio),
            "k3_per_token": per_token(sampled("bregman", rollout.logprobs, rollout.ref_logprobs)),
            "penalty_per_token": per_token(penalty), "entropy": per_token(rollout.entropy),
            "explained_variance": explained_variance(rollout.values, rollout.returns, mask).item(),
            "length": rollout.response_lengths.float().mean().item(),
            "eos_rate": rollout.finished.float().mean().item()}


def check_first_step(rollout, row, dtype, dropout=0.0):
    """Before anything has moved, policy and reference are one model. RuntimeError says which assumption is broken.

    With dropout in the update the first ratio is not 1, and is only reported. Micro-batches of other shapes round
    differently. float32 logits of 20 to 30, as trained models have, are good to about 1e-5: no token may be off.
    bfloat16 holds such logits to 0.1, so that single tokens are far off and only their mean says something: 3 %.
    """
    exact = dtype == torch.float32
    ratio, ratio_bound = (row["first_ratio_max"], 1e-4) if exact else (row["first_ratio_mean"], 3e-2)
    gap, gap_bound = (row["sampling_gap"], 5e-4) if exact else (row["sampling_gap_mean"], 3e-2)
    claims = [("KL(policy || reference) is exactly 0: a new adapter changes nothing",
               rollout.kl.abs().max().item(), 0.0),
              ("the first ratio is 1: the update's forward is the rollout's", 0 if dropout else ratio, ratio_bound),
              ("log-probabilities at sampling equal the recomputed ones: the KV cache agrees with the full forward",
               gap, gap_bound)]
    for claim, got, bound in claims:
        if not got <= bound:
            raise RuntimeError(f"step 1 broke an assumption: {claim}; "
                               f"got a difference of {got:.2e}, at most {bound:.0e} is rounding")


def step_line(row, steps, eta):
    return (f"step {row['step']:4}/{steps} | score {row['score']:+.2f} | kl {row['kl_per_token']:.3f}/tok "
            f"{row['kl_per_sequence']:.1f}/seq | ent {row['entropy']:.2f} | clip {row['clip_frac']:.2f} | "
            f"vloss {row['value_loss']:.2f} | ev {row['explained_variance']:+.2f} | len {row['length']:.0f} | "
            f"eos {row['eos_rate']:.2f} | "
            + " ".join(f"{phase} {row[f'{phase}_seconds']:.1f}s" for phase in PHASES) + f" | eta {clock(eta)}")


def ppo(run, inputs, device, stopper):
    """PPO with LoRA: roll out, score, shape rewards, estimate advantages, update. Writes the policy."""
    cfg = run.cfg
    torch.manual_seed(cfg.seed)
    with mistakes_in_one_line():
        net, reward_model = build_models(cfg.input_model("ppo"), cfg.reward_path(), device, cfg.trunk_dtype(device),
                                         inputs.banned_ids, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout)
    net.policy.checkpoint_activations = net.critic.checkpoint_activations = cfg.checkpoint_activations
    layout = "one trunk" if reward_model.trunk is net.policy else "two trunks"
    say(f"ppo: {len(inputs.prompts)} prompts from {cfg.prompts}; {layout}{' and frozen copies' if net.ref else ''} in "
        f"{cfg.trunk_dtype(device)}; {count(net)}")
    parameters = trainable(net)
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0, fused=True)
    with mistakes_in_one_line():
        checkpoint = run.open()
        trunks = [fingerprint(net.ref or net.policy), fingerprint(reward_model.trunk)]
        first = restore(checkpoint, parameters, optimizer, trunks) if checkpoint else 0
    kl_coef, start = checkpoint["kl_coef"] if checkpoint else cfg.kl_coef, time.time()
    del checkpoint                                             # (with --lora_rank 0 it is as large as what trains)
    ddp, records, spent = wrap(net, device).eval(), None, dict.fromkeys(PHASES, 0.0)
    with packed_weights(net, reward_model):
        for step in range(first + 1, cfg.steps + 1):
            row, rollout = ppo_step(cfg, step, net, ddp, reward_model, optimizer, inputs, kl_coef)
            spent = {phase: round(seconds + row[f"{phase}_seconds"], 3) for phase, seconds in spent.items()}
            if step == 1:
                check_first_step(rollout, row, cfg.trunk_dtype(device), cfg.lora_dropout)
            if cfg.kl_target:
                kl_coef = adapt_kl_coef(kl_coef, row["kl_per_sequence"], cfg.kl_target, cfg.kl_horizon,
                                        cfg.rollout_batch)
            run.append("metrics.jsonl", row)
            say(step_line(row, cfg.steps, (time.time() - start) / (step - first) * (cfg.steps - step)))
            if step == 1 or step % 10 == 0:
                log_samples(run, step, rollout, inputs.tokenizer)
            if cfg.eval_every and step % cfg.eval_every == 0 and inputs.eval_rows:
                records = evaluation(cfg, inputs, net, reward_model, records)
                log_evaluation(run, step, summarise(records))
            save_and_stop(run, step, parameters, optimizer, stopper, kl_coef=kl_coef, trunks=trunks)
    check_same_parameters(parameters)
    if is_main():
        save_policy(net, run.folder / "policy", cfg.input_model("ppo"))
        shutil.copy(inputs.tokenizer.path, run.folder / "policy" / "tokenizer.model")
    run.finish(steps=cfg.steps, seconds=round(time.time() - start, 1), phases=spent, trunks=trunks)


def ppo_step(cfg, step, net, ddp, reward_model, optimizer, inputs, kl_coef):
    """One step of PPO. -> the numbers that are logged of it, and its Rollout."""
    times = [time.time()]
    sampled_here = respond(cfg, step, net, inputs)                                             # 1. sample
    times.append(time.time())
    rollout, gaps = collect(cfg, net, reward_model, inputs.tokenizer.eos_id, *sampled_here)    # 2. score
    for name in ("logprobs", "ref_logprobs", "values", "scores", "kl"):
        require_finite(getattr(rollout, name), f"{name} of the rollout", step)
    rollout, penalty = with_advantages(cfg, rollout, kl_coef)                                  # 3. rewards, GAE
    require_finite(rollout.advantages, "advantages", step)
    times.append(time.time())
    lr = set_learning_rate(optimizer, step, cfg.steps, cfg.warmup_steps, cfg.lr, "linear")
    stats = update(cfg, step, ddp, optimizer, rollout, kl_coef)                                # 4. clipped losses
    times.append(time.time())
    spent = {f"{phase}_seconds": end - start for phase, start, end in zip(PHASES, times, times[1:])}
    return ({"step": step} | rollout_statistics(rollout, penalty) | stats
            | {"lr": lr, "kl_coef": kl_coef, "sampling_gap": max(gaps), "sampling_gap_mean": sum(gaps) / len(gaps)}
            | spent), rollout


def log_evaluation(run, step, summary):
    """A line of evals.jsonl, and its gist on the screen."""
    run.append("evals.jsonl", {"step": step} | summary)
    won = summary["after"]["win_before"]
    say(f"{'':10} evaluation: won {won['value']:.1%} +-{won['se']:.1%} against SFT, "
        f"score {summary['after']['score']['value']:+.2f}")


def log_samples(run, step, rollout, tokenizer, n=4):
    """A few prompts and responses of the rollout, with their scores, for people to read."""
    ends = rollout.prompt_lengths + rollout.response_lengths
    for i in range(min(n, len(ends))):
        ids, begin = rollout.tokens[i, :ends[i]].tolist(), int(rollout.prompt_lengths[i])
        run.append("samples.jsonl", {"step": step, "prompt": tokenizer.decode(ids[:begin]),
                                     "response": tokenizer.decode_response(ids[begin:]),
                                     "score": rollout.scores[i].item()})


def evaluation(cfg, inputs, net, reward_model, earlier=None):
    """Answers to the evaluation instructions before and after PPO, each process a share (eval.py).
    -> records, in order.

    earlier: what an evaluation at an earlier step returned;
    what the SFT model and the reference say has not changed."""
    mine = range(rank(), len(inputs.eval_rows), world_size())
    records = evaluate(net, reward_model, inputs.tokenizer, [inputs.eval_rows[i] for i in mine], mine, cfg.response_len,
                       cfg.eval_temperature, cfg.seed, cfg.micro_batch, earlier and [earlier[i] for i in mine],
                       cfg.generate_batch or cfg.rollout_batch // world_size())
    return sorted(sum(gather(records), []), key=lambda r: r["index"])


def final_evaluation(run, inputs, device):
    """Read the finished run back from its files, evaluate it, keep the records."""
    with mistakes_in_one_line():
        first_does(run.hold)                # (or another command could replace the policy meanwhile)
        net, reward_model, _ = load_run(run.folder, device, run.cfg.trunk_dtype(device))
    start = time.time()
    records = evaluation(run.cfg, inputs, net, reward_model)
    if is_main():
        write_json(run.folder / "eval.json",
                   run.evaluation_settings | {"seconds": round(time.time() - start, 1), "records": records})
    dist.barrier()


# ------------------------------------------------------------------------------------------------------------- main

@contextlib.contextmanager
def mistakes_in_one_line():
    """A user's mistake - a setting, a file - ends the program with one line on stderr and status 2."""
    try:
        yield
    except (ValueError, OSError) as e:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"train.py: error: {e}", file=sys.stderr)
        sys.exit(2)


@dataclass(frozen=True)
class Inputs:
    """Everything that is read before the first process starts; only what the stages to run need."""
    tokenizer: Tokenizer
    banned_ids: list
    examples: list | None = None       # sft
    pairs: list | None = None          # reward
    held_out: list | None = None
    prompts: list | None = None        # ppo, as ids
    eval_rows: list | None = None


def load_inputs(cfg, stages):
    """Read and check the files of these stages; say what was cut or dropped."""
    model_config = read_model_config(base_folder(cfg.model)) if cfg.model else TOY_MODEL
    tokenizer = Tokenizer(cfg.tokenizer or next((p for p in (Path(cfg.model) / "tokenizer.model",) if p.is_file()),
                                                base_folder(cfg.model) / "tokenizer.model"))
    tokenizer.check_fits(model_config.vocab_size, cfg.model or "the toy model")
    for folder in (cfg.model, base_folder(cfg.model)) if cfg.model else ():
        tokenizer.check_against(folder)
    found = {"tokenizer": tokenizer, "banned_ids": tokenizer.banned_ids(model_config.vocab_size)}
    need = lambda name: getattr(cfg, name) or missing_setting(cfg, name)
    check_earlier_stages(cfg, stages)
    for name in [RANKS[s] for s in stages if s in RANKS]:
        if getattr(cfg, name) > model_config.dim:
            raise ValueError(f"--{name} {getattr(cfg, name)} is above the model's width {model_config.dim}, "
                             "which is no low rank: 4 to 64 are usual")
    positions = {"model": model_config.max_seq_len}
    if cfg.reward:
        positions["reward model"] = check_reward_model(cfg.reward, tokenizer, model_config)
    if {"sft", "reward"} & set(stages) and cfg.max_len > model_config.max_seq_len:
        raise ValueError(f"--max_len {cfg.max_len} exceeds the model's {model_config.max_seq_len} positions: lower it")
    if "sft" in stages:
        found["examples"], cut, left_out = load_sft(need("sft_data"), tokenizer, cfg.max_len)
        note(cut, f"demonstrations are longer than --max_len {cfg.max_len} and lose their tail")
        note(left_out, f"demonstrations are left out: their prompts alone fill --max_len {cfg.max_len}")
        note(sum(len(e.response) == 1 for e in found["examples"]),
             "demonstrations have an empty output: they teach to say nothing")
    if "reward" in stages:
        pairs = load_pairs(need("preference_data"), tokenizer, cfg.max_len)
        if cfg.preference_test:
            found["pairs"], found["held_out"] = pairs, load_pairs(cfg.preference_test, tokenizer, cfg.max_len)
        else:
            found["pairs"], found["held_out"] = split_by_instruction(pairs, cfg.reward_holdout, cfg.seed)
    if "ppo" in stages:
        found["prompts"], _, dropped = load_prompts(need("prompts"), tokenizer, cfg.prompt_len)
        note(dropped, f"prompts are longer than --prompt_len {cfg.prompt_len} and are dropped")
        for which, room in positions.items():
            if cfg.prompt_len + cfg.response_len > room:
                raise ValueError(f"--prompt_len {cfg.prompt_len} + --response_len {cfg.response_len} exceed the "
                                 f"{which}'s {room} positions: lower one of them")
    if cfg.eval_data and {"ppo", "eval"} & set(stages):
        room = min(positions.values()) - cfg.response_len
        rows = load_eval_rows(cfg.eval_data, tokenizer, room, cfg.eval_drop_long)
        check_rows(rows, cfg.eval_data)
        found["eval_rows"] = rows
    return Inputs(**found)


def load_pairs(path, tokenizer, max_len):
    """Comparisons from a file; say what was cut or left out."""
    pairs, cut, left_out = load_preferences(path, tokenizer, max_len)
    note(cut, f"pairs of {path} have an answer beyond --max_len {max_len} that loses its tail")
    note(left_out, f"pairs of {path} are left out: their answers do not differ within --max_len {max_len}")
    return pairs


def check_earlier_stages(cfg, stages):
    """What a stage builds on, and is not made by this command, has to stand."""
    for stage in {"reward", "ppo"} & set(stages):
        if cfg.input_model(stage) != cfg.model and "sft" not in stages:
            require_finished(cfg.input_model(stage), "sft")
    if "ppo" in stages and "reward" not in stages:
        if not cfg.reward and cfg.model and cfg.stage == "ppo":
            missing_setting(cfg, "reward")
        if not cfg.reward:
            require_finished(cfg.reward_path(), "reward")


def require_finished(folder, stage):
    """A stage of this run that another builds on must have been run to its end."""
    if not (Path(folder) / "finished.json").is_file():
        raise FileNotFoundError(f"{folder} holds no finished {stage} model: run --stage {stage} (or --stage all) first")


def note(n, what):
    if n and int(os.environ.get("RANK", 0)) == 0:
        print(f"note: {n} {what}", flush=True)


def missing_setting(cfg, name):
    raise ValueError(f"--stage {cfg.stage} with --model needs --{name}")


def check_processes(cfg, stages):
    """Every batch must split evenly over the processes."""
    names = {"sft": ("sft_batch",), "reward": ("reward_batch",), "ppo": ("minibatch", "rollout_batch", "step_batch")}
    for name in (n for s in stages for n in names.get(s, ())):
        if getattr(cfg, name) % world_size():
            if name == "step_batch":
                raise ValueError(f"an eighth of --minibatch {cfg.minibatch} does not split over {world_size()} "
                                 f"processes: try {-(-cfg.step_batch // world_size()) * world_size() * 8}")
            unit = (math.lcm(world_size(), cfg.minibatch)
                    if name == "rollout_batch" and cfg.minibatch % world_size() == 0 else world_size())
            raise ValueError(f"--{name} {getattr(cfg, name)} does not split over {world_size()} processes: try "
                             f"{-(-getattr(cfg, name) // unit) * unit}")


def builds_on(cfg, later, earlier):
    """Whether the folder of one stage holds a run that started from what is, or will be, in the folder of another."""
    folder, made = cfg.folder(later), cfg.folder(earlier).resolve()
    if STAGES.index(later) <= STAGES.index(earlier) or not (folder / "config.json").is_file():
        return False
    before = run_settings(folder)
    return any(isinstance(before.get(k), str) and (folder / before[k]).resolve() == made for k in ("model", "reward"))


def plan(cfg):
    """What is to be done. -> runs by stage, stages to run, those of them to run again, whether to evaluate."""
    runs = {s: Run(cfg, s) for s in (STAGES if cfg.stage == "all" else (cfg.stage,))}
    order = [*runs] + ["eval"] * ("ppo" in runs and bool(cfg.eval_data))
    if cfg.redo and cfg.redo not in order:
        raise ValueError(f"--redo {cfg.redo} does not go with --stage {cfg.stage}"
                         + (" without --eval_data" if cfg.redo == "eval" and "ppo" in runs else ""))
    redo = order[order.index(cfg.redo):] if cfg.redo else []      # the named stage, and those that build on it
    for s in runs:
        runs[s].check_redo() if s in redo else None
    todo = [s for s in runs if s in redo or not runs[s].check()]
    for s in STAGES:
        old = s not in todo and next((t for t in todo if builds_on(cfg, s, t)), None)
        if old:
            raise ValueError(f"{cfg.folder(s)} was made from an earlier {old} stage, which is to be run again: "
                             + "--stage all " * (cfg.stage != "all")
                             + f"--redo {old} runs both, or move that folder away")
    evaluating = "eval" in order and ("eval" in redo or "ppo" in todo or not runs["ppo"].evaluated())
    return runs, todo, redo, evaluating


def dry_run(cfg, inputs, stages):
    """Sizes, memory of one process by item, and steps of each stage,
    from the configs alone (reward.training_memory)."""
    if not stages:
        return say(f"dry run: all stages are finished in {cfg.out}, there is nothing to train")
    config = read_model_config(base_folder(cfg.model)) if cfg.model else TOY_MODEL
    device, total = "cuda" if torch.cuda.is_available() else "cpu", count_parameters(config)[0]
    dtype = cfg.trunk_dtype(device)
    say(f"dry run: {world_size()} process{'es' * (world_size() > 1)}, frozen weights in {dtype}, "
        f"{total:,} parameters in the model\n")
    rows = {"sft": inputs.examples, "reward": inputs.pairs, "ppo": inputs.prompts}
    for stage in stages:
        get = lambda name: getattr(cfg, name if stage == "ppo" else f"{stage}_{name}")
        steps = cfg.steps if stage == "ppo" else supervised_steps(cfg, stage, len(rows[stage]))
        r, batch = get("lora_rank"), cfg.rollout_batch if stage == "ppo" else get("batch")
        say(f"{stage}: {steps} steps of {batch} from {len(rows[stage])} rows "
            f"({steps * batch / len(rows[stage]):.1f} passes)"
            + (f", {cfg.ppo_epochs * cfg.rollout_batch // cfg.step_batch} optimiser steps each"
               if stage == "ppo" else ""))
        one_trunk = is_adapter(cfg.reward_path()) if "reward" not in stages else cfg.reward_lora_rank > 0
        asked = max((len(row["prompt"]) for row in inputs.eval_rows or []), default=0) + cfg.response_len
        for layout, trained, memory in layouts(cfg, stage, config, dtype, r, device, asked):
            this = " (this run)" if layout == ("one trunk" if one_trunk else "two trunks") else ""
            say(f"  {layout}{this}: {trained:,} parameters are trained ({100 * trained / total:.3f} % of the model's)")
            for item, n in memory.items():
                say(f"    {item:44}{n / 1e9:10.3f} GB")
            say(f"    {'at most at one time':44}{peak(memory) / 1e9:10.3f} GB\n")
    say("Micro-batches are taken to be full of rows of the greatest length, "
        "the reward model to be as large as the model; what a\n"
        "GPU needs for itself (about 0.5 GB) comes on top.")


def layouts(cfg, stage, config, dtype, r, device, longest=0):
    """The ways to hold a stage's models: (name, trained parameters, memory by item); for PPO both, whatever --reward
    is. longest: tokens of the longest row of the evaluation, which is decoded in batches of the rollout's size."""
    adapter = count_parameters(config, rank=r)[1]
    length = cfg.prompt_len + cfg.response_len if stage == "ppo" else cfg.max_len
    tokens = cfg.micro_batch * length * (2 if stage == "reward" else 1)
    respond = {"sft": cfg.micro_batch * cfg.max_len, "reward": 0, "ppo": cfg.micro_batch * cfg.response_len}[stage]
    memory = lambda frozen, trained, adapters: training_memory(
        config, dtype, tokens, r, frozen, trained, adapters, cfg.checkpoint_activations, respond,
        on_cpu=device == "cpu")
    if stage != "ppo":
        lm_head = stage == "sft" or bool(r)
        trained = adapter if r else count_parameters(config, lm_head)[0]
        yield "LoRA" if r else "all weights", trained, memory([(lm_head, dtype)] if r else [],
                                                              [] if r else [lm_head], int(bool(r)))
        return
    rows = min(cfg.generate_batch or cfg.rollout_batch, cfg.rollout_batch // world_size())
    kept_in = torch.float32 if device == "cpu" and r else dtype                             # (model.attention_dtype)
    length = max(length, longest)
    cache = {"KV cache while sampling": kv_cache_bytes(config, kept_in, rows, length),
             # at one time about ten rows of width D: the stream, its norm; q, k, v thrice, or three of SwiGLU's
             "prompts' activations while sampling": rows * (length - cfg.response_len) * 10 * config.dim
                                                    * kept_in.itemsize,
             # with their probabilities and cumulative sums, which are float64 on a GPU (model.sample)
             "logits while sampling": rows * config.vocab_size * (16 if device == "cpu" else 24)}
    both = [("one trunk", [(True, dtype)]), ("two trunks", [(True, dtype), (False, dtype)])]
    for name, frozen in both if r else []:
        yield name, 2 * adapter + config.dim + 1, memory(frozen, [], 2) | cache
    if not r:
        full = sum(count_parameters(config, lm_head)[0] for lm_head in (True, False)) + config.dim + 1
        yield "all weights", full, memory([(True, torch.float32), (False, dtype)], [True, False], 0) | cache


def peak(memory):
    """Sampling and updating alternate: what is held all the time, and the larger of the two."""
    sampling = sum(n for item, n in memory.items() if "sampling" in item)
    updating = sum(n for item, n in memory.items() if item.startswith(("activations", "logits,")))
    return sum(memory.values()) - min(sampling, updating)


def main(argv=None):
    started = time.time()
    with mistakes_in_one_line():
        cfg = parse(sys.argv[1:] if argv is None else argv)
        runs, todo, redo, evaluating = plan(cfg)
        inputs = load_inputs(cfg, todo + ["eval"] * evaluating) if todo or evaluating else None
        check_processes(cfg, todo)
        if cfg.dry_run:
            return dry_run(cfg, inputs, todo)
        device = start_processes()
    Llama.cuda_graphs = cfg.cuda_graphs
    if redo and todo:
        runs[todo[0]].replaced = [runs[s] for s in redo if s in runs]
    if todo and cfg.model and base_folder(cfg.model) != Path(cfg.model):
        say(f"{cfg.model} is an adapter: it is merged into {base_folder(cfg.model)} first, and that model is "
            + ("the reference" if "ppo" in todo else "trained"))
    stopper, spent = Stopper(), {}
    try:
        for stage, run in runs.items():
            if stage in todo:
                begun = time.time()
                {"sft": sft, "reward": reward, "ppo": ppo}[stage](run, inputs, device, stopper)
                spent[stage] = time.time() - begun
            else:
                say(f"{stage}: finished, in {run.folder} (to run it again: --redo {stage})")
        stopper.rest()
        if evaluating:
            begun = time.time()
            final_evaluation(runs["ppo"], inputs, device)
            spent["evaluation"] = time.time() - begun
    except FloatingPointError as e:      # (of any one process: torchrun stops the others)
        print(f"train.py: stopped: {e}" + f" (process {rank()})" * (world_size() > 1), flush=True)
        sys.exit(1)
    finally:
        for run in runs.values():
            run.release()
    if is_main() and "ppo" in runs and (runs["ppo"].folder / "eval.json").is_file():
        with mistakes_in_one_line():
            print(report(runs["ppo"].folder))
    say(f"done in {clock(time.time() - started)}{f' ({shares_of(spent)})' if len(spent) > 1 else ''}: {cfg.out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
