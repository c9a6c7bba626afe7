"""How fast, how large: generation, scoring, a LoRA update and a whole PPO step, beside what a user
would run instead.

    python tools/benchmark.py                sizes S, M and 135M, one process and two; on a GPU
                                             LLaMA-7B, a row's repetitions ending after 90 seconds
    python tools/benchmark.py --sizes S --jobs generate update --repetitions 5
    python tools/benchmark.py --peer_python VENV/bin/python      the environment of the peers: torch
                                             transformers peft trl==1.12.0 datasets pandas rich

Cores are shared and noisy, so every figure is a ratio. Each program runs in a process of its own
and waits; the driver lets them take turns (ours, theirs, ours, ...), and each brackets its
repetition with a float32 matrix product (on a GPU bfloat16): `ceiling` is the share of that
product's speed that the *useful* arithmetic reached. Useful FLOPs (two per multiply-add; norms,
softmax and rotations not counted), for a model with N weights in its layers and head, of which H
are the head's:

    forward      2 (N - H) per token + 2 H per token whose logits are needed + attention: 4 D layers
                 per key that a query sees; without the last layer's output and feed-forward weights
                 where nothing is read of a token (they are computed all the same: a loss)
    LoRA update  forward + the same again for the gradients of activations (frozen weights need none
                 of their own); attention 3 times; adapters 6 per weight and token
    full update  three times forward

`MiB` is the peak resident size of all processes of a program, or what
torch.cuda.max_memory_allocated says.
"""
import argparse
import copy
import itertools
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model import LlamaConfig, ban_mask, empty_llama, generate      # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda:0" if CUDA else "cpu"
PPO_EPOCHS = 2
SIZES = {"S": LlamaConfig(4096, 256, 6, 8, ffn_dim=688),
         "M": LlamaConfig(32000, 512, 8, 8, ffn_dim=1376),
         "135M": LlamaConfig(49152, 576, 30, 9, 3, ffn_dim=1536, tie_embeddings=True),
         "7B": LlamaConfig()}
PEERS = {"generate": "transformers", "uneven": "transformers", "update": "transformers + peft",
         "ppo": "TRL"}


@dataclass(frozen=True)
class Shape:
    """What a job works on, over all its processes."""
    batch: int             # rows at a time
    prompt: int            # tokens of a row that are given
    new: int = 0           # tokens of a row that are generated
    rows: int = 0          # rows in all (0: one batch)
    minibatches: int = 1   # optimiser steps per pass of PPO over its rows
    micro: int = 16        # rows per forward pass of PPO
    decoded: int = 0       # rows that PPO decodes at once (0: all)


SHAPES = {"generate": Shape(32, 64, 128), "uneven": Shape(32, 64, 128, rows=128),
          "update": Shape(16, 192), "score": Shape(32, 192),
          "ppo": Shape(64, 64, 64, minibatches=4)}
SHAPES_7B = {"generate": Shape(64, 192, 300), "uneven": Shape(32, 192, 300, rows=128),
             "update": Shape(8, 492), "score": Shape(16, 492),
             "ppo": Shape(128, 192, 300, micro=8, decoded=32)}


@dataclass(frozen=True)
class Case:
    """A row of the table."""
    job: str
    size: str
    processes: int
    trunks: int                  # of the PPO step
    batch: int                   # rows at a time (0: the job's own)
    dtype: torch.dtype
    checkpointing: bool          # recompute activations

    @property
    def config(self):
        return SIZES[self.size]

    @property
    def shape(self):
        shape = (SHAPES_7B if self.size == "7B" else SHAPES)[self.job]
        return replace(shape, batch=self.batch or shape.batch)

    @property
    def local_batch(self):
        return self.shape.batch // self.processes

    def new_tokens(self):
        """Of each row of one process: all the same, or geometric with a third of the maximum as
        mean, cut there."""
        s = self.shape
        rows = (s.rows or s.batch) // self.processes
        if self.job != "uneven":
            return [s.new] * rows
        u = torch.rand(rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        drawn = torch.log(u) / math.log(1 - 3 / s.new)
        return drawn.ceil().clamp(1, s.new).int().tolist()

    def tokens(self):
        """What tokens/s counts, of all processes: those generated, or else those of each row."""
        if self.shape.new:
            return sum(self.new_tokens()) * self.processes
        return self.shape.batch * self.shape.prompt


# ------------------------------------------------------------------------------------- useful work

def weights(c):
    """Weights of the layers' matrices, of the head, and of adapters of r 8 on wq wk wv wo."""
    narrow = c.n_kv_heads * c.head_dim
    layer = 2 * c.dim * c.dim + 2 * c.dim * narrow + 3 * c.dim * c.ffn_dim
    adapter = 8 * (2 * 2 * c.dim + 2 * (c.dim + narrow))
    return c.n_layers * layer, c.dim * c.vocab_size, c.n_layers * adapter


def attention_flops(c, tokens):
    """q k' and a v of one causal row of so many tokens."""
    return 4 * c.dim * c.n_layers * tokens * (tokens + 1) // 2


def forward_flops(c, tokens, read, logits):
    """One row of so many tokens: of which `read` need more of the last layer than keys and values
    for the others' attention, and `logits` the head."""
    layers, head, _ = weights(c)
    past_attention = c.dim * c.dim + 3 * c.dim * c.ffn_dim
    return (2 * layers * tokens - 2 * past_attention * (tokens - read) + 2 * head * logits
            + attention_flops(c, tokens))


def update_flops(c, tokens, read, logits):
    """Forward and backward of one row, with adapters."""
    return (2 * forward_flops(c, tokens, read, logits) + attention_flops(c, tokens)
            + 6 * weights(c)[2] * tokens)


def useful_flops(case):
    """All of a job. Generation: the prompt once, then each new token once; the PPO step: sampling,
    four scoring passes, and updates of policy and critic - a LoRA critic, whoever runs it: what a
    peer does beyond that is its own loss."""
    c, s = case.config, case.shape
    if case.job in ("generate", "uneven"):
        lengths = case.new_tokens() * case.processes
        return sum(forward_flops(c, s.prompt + n - 1, n, n) for n in lengths)
    if case.job == "update":
        return s.batch * update_flops(c, s.prompt, s.prompt - 1, s.prompt - 1)
    if case.job == "score":
        return s.batch * forward_flops(c, s.prompt, 1, 0)
    tokens, new = s.prompt + s.new, s.new
    sample = forward_flops(c, tokens - 1, new, new)
    policy, critic = forward_flops(c, tokens, new, new), forward_flops(c, tokens, new, 0)
    look = 2 * policy + critic + forward_flops(c, tokens, 1, 0)    # (the reference's is the other)
    learn = update_flops(c, tokens, new, new) + update_flops(c, tokens, new, 0)
    return s.batch * (sample + look + PPO_EPOCHS * learn)


# -------------------------------------------------------------------------------------------- ours

class Job(NamedTuple):
    step: Callable               # one repetition
    more: Callable = dict        # further figures of the repetition that has just ended


def our_model(case, lm_head=True):
    """Random weights, frozen."""
    torch.manual_seed(0)
    model = empty_llama(case.config, DEVICE, case.dtype, lm_head).requires_grad_(False)
    for p in model.parameters():
        if p.dim() == 2:
            p.normal_(std=0.02)
        else:
            p.fill_(1.0)
    return model


def random_prompts(case, rows, seed):
    ids = torch.Generator().manual_seed(seed)
    shape = (rows, case.shape.prompt)
    return torch.randint(4, case.config.vocab_size, shape, generator=ids).tolist()


def our_generate(case, turns):
    model, limits = our_model(case), case.new_tokens()
    prompts = random_prompts(case, len(limits), turns.rank)

    def step():
        generate(model, prompts, limits, eos_id=-1, batch_size=case.local_batch)
    return Job(step)


def our_update(case, turns):
    """LoRA r 8 on wq wk wv wo, the loss over all positions, AdamW: as train.py's sft stage."""
    from lora import add_lora
    from reward import ActorCritic
    from train import trainable, wrap
    policy = our_model(case)
    add_lora(policy, "policy", 8, 64)
    policy.checkpoint_activations = case.checkpointing
    net = ActorCritic(policy, "policy")
    module = wrap(net, DEVICE) if case.processes > 1 else net
    optimizer = torch.optim.AdamW(trainable(net), lr=1e-4, fused=True)
    tokens = torch.tensor(random_prompts(case, case.local_batch, turns.rank), device=DEVICE)
    begin = torch.ones(case.local_batch, dtype=torch.int64, device=DEVICE)
    lengths = begin * (case.shape.prompt - 1)

    def step():
        (-module(tokens, begin, lengths).logprobs.mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return Job(step)


def our_score(case, turns):
    from reward import RewardModel, score_responses
    model = RewardModel(our_model(case, lm_head=False))
    rows = random_prompts(case, case.local_batch, turns.rank)
    prompts, responses = [r[:8] for r in rows], [r[8:] for r in rows]

    def step():
        score_responses(model, prompts, responses, 2, 16)
    return Job(step)


def four_models(case):
    """As reward.build_models makes them from files."""
    from lora import add_lora, lora_parameters
    from reward import ActorCritic, RewardModel
    policy = our_model(case)
    trunk = policy if case.trunks == 1 else our_model(case, lm_head=False)
    add_lora(policy, "policy", 8, 64)
    reward = RewardModel(trunk)
    if case.trunks == 1:
        add_lora(trunk, "reward", 8, 64)
        reward.adapter_name = "reward"
    reward.requires_grad_(False)
    add_lora(trunk, "value", 8, 64)
    for p in lora_parameters(policy, "policy"):
        p.requires_grad_(True)
    policy.checkpoint_activations = trunk.checkpoint_activations = case.checkpointing
    banned = ban_mask(case.config.vocab_size, [0, 1], DEVICE)
    return ActorCritic(policy, "policy", trunk, "value", banned), reward


def our_ppo(case, turns):
    """The body of train.py's ppo stage."""
    import train
    from ppo import with_advantages
    s, (net, reward) = case.shape, four_models(case)
    cfg = train.PPOConfig(
        rollout_batch=s.batch, minibatch=s.batch // s.minibatches, micro_batch=s.micro,
        ppo_epochs=PPO_EPOCHS, response_len=s.new, generate_batch=s.decoded)
    inputs = SimpleNamespace(tokenizer=SimpleNamespace(eos_id=-1), banned_ids=[0, 1],
                             rows=random_prompts(case, 2 * s.batch, 0))
    groups = [{"params": p, "name": name} for name, p in net.groups().items()]
    optimizer = torch.optim.AdamW(groups, lr=1e-5, eps=1e-5, weight_decay=0.0, fused=True)
    ddp, number, laps = train.wrap(net, DEVICE).eval(), itertools.count(1), {}

    def step():
        n, start = next(number), time.perf_counter()
        prompts, samples = train.respond(cfg, n, net, inputs)
        sampled = time.perf_counter()
        rollout = train.collect(cfg, n, net, reward, inputs, prompts, samples)
        rollout = with_advantages(rollout, "kl", cfg.kl_coef, cfg.missing_eos_penalty, cfg.gamma,
                                  cfg.lam, cfg.whiten_rewards)
        scored = time.perf_counter()
        train.update(cfg, n, ddp, optimizer, rollout)
        laps.update(sample=sampled - start, score=scored - sampled,
                    update=time.perf_counter() - scored)
    return Job(step, lambda: {"parts": laps})


# ---------------------------------------------------------------------------------- what others run

def peer_config(case, **more):
    from transformers import LlamaConfig
    c = case.config
    return LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, max_position_embeddings=2048,
        tie_word_embeddings=c.tie_embeddings, pad_token_id=0, **more)


def peer_model(case, **more):
    from transformers import LlamaForCausalLM
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return LlamaForCausalLM(peer_config(case, **more)).to(case.dtype)


def peer_lora():
    from peft import LoraConfig
    return LoraConfig(r=8, lora_alpha=64, lora_dropout=0.0, task_type="CAUSAL_LM",
                      target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


def peer_generate(case, turns):
    """transformers' generate, sampling, no EOS. It has no places to refill and ends no row alone:
    uneven rows are decoded in batches of the same size, each to its longest row."""
    from transformers import GenerationConfig
    model, lengths, size = peer_model(case).eval(), case.new_tokens(), case.local_batch
    ids = torch.tensor(random_prompts(case, len(lengths), turns.rank), device=DEVICE)

    @torch.inference_mode()
    def step():
        for i in range(0, len(lengths), size):
            part, new = ids[i:i + size], max(lengths[i:i + size])
            config = GenerationConfig(eos_token_id=None, pad_token_id=0, max_new_tokens=new,
                                      do_sample=True, top_k=0)
            out = model.generate(input_ids=part, attention_mask=torch.ones_like(part),
                                 generation_config=config)
            assert out.shape[1] == case.shape.prompt + new
    return Job(step)


def peer_update(case, turns):
    from peft import get_peft_model
    model = get_peft_model(peer_model(case, use_cache=False).train(), peer_lora())
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    net = model
    if case.processes > 1:
        net = torch.nn.parallel.DistributedDataParallel(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.tensor(random_prompts(case, case.local_batch, turns.rank), device=DEVICE)

    def step():
        net(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return Job(step)


def peer_tokenizer(vocab_size):
    """A word for each id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    words = {f"w{i}": i for i in range(vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")), pad_token="w0",
        bos_token="w1", eos_token="w2", padding_side="left")


def peer_ppo(case, turns):
    """TRL's PPOTrainer with peft adapters on the policy; it trains all weights of its critic. The
    trainer runs by itself: a callback hands every finished step to the driver."""
    from datasets import Dataset
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    torch.manual_seed(0)
    s = case.shape
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, report_to="none", disable_tqdm=True,
        bf16=case.dtype == torch.bfloat16, learning_rate=1e-5, num_sample_generations=0,
        num_mini_batches=s.minibatches, num_ppo_epochs=PPO_EPOCHS, total_episodes=s.batch * 1000,
        per_device_train_batch_size=case.local_batch, gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=case.local_batch, response_length=s.new, temperature=1.0)

    class Turns(TrainerCallback):
        def on_step_end(self, *_, **__):
            turns.next()

    policy, reference = LlamaForCausalLM(peer_config(case)), None
    if case.processes > 1:                 # there TRL needs a reference of its own
        reference = copy.deepcopy(policy).eval().requires_grad_(False)
    reward = LlamaForSequenceClassification(peer_config(case, num_labels=1))
    rows = Dataset.from_dict({"input_ids": random_prompts(case, 2 * s.batch, 0)})
    trainer = PPOTrainer(
        args=config, processing_class=peer_tokenizer(case.config.vocab_size), model=policy,
        ref_model=reference, reward_model=reward.eval().requires_grad_(False),
        value_model=LlamaForSequenceClassification(peer_config(case, num_labels=1)),
        train_dataset=rows, peft_config=peer_lora(), callbacks=[Turns()])
    return Job(trainer.train)


BUILDERS = {"our generate": our_generate, "our update": our_update, "our score": our_score,
            "our ppo": our_ppo, "peer generate": peer_generate, "peer update": peer_update,
            "peer ppo": peer_ppo}


# ------------------------------------------------------------------------------ one process's part

def all_sum(x):
    if not torch.distributed.is_initialized():
        return x
    t = torch.tensor([float(x)], dtype=torch.float64, device=DEVICE)
    torch.distributed.all_reduce(t)
    return t.item()


def synchronise():
    if CUDA:
        torch.cuda.synchronize()
    all_sum(0)


def shortest(action):
    """Seconds of the fastest of four."""
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        action()
        if CUDA:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def matrix_speed():
    """FLOP/s of a square matrix product; on a GPU larger and in bfloat16."""
    n, dtype = (8192, torch.bfloat16) if CUDA else (1536, torch.float32)
    a = torch.randn(n, n, device=DEVICE).to(dtype)
    return all_sum(2 * n ** 3 / shortest(lambda: a @ a))


def peak_bytes():
    if CUDA:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def forget_peak():
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


class Turns:
    """A repetition for each line on stdin, answered with its figures by process 0."""

    def __init__(self):
        self.rank, self.start, self.more = int(os.environ.get("RANK", 0)), None, dict
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)                      # whatever a library prints goes to stderr

    def next(self):
        """End the repetition in progress, if there is one, report it; wait for the next."""
        synchronise()
        if self.start:
            seconds = time.perf_counter() - self.start
            speed, peak = (self.speed + matrix_speed()) / 2, all_sum(peak_bytes())
            answer = {"seconds": seconds, "speed": speed, "peak": peak} | self.more()
            if self.rank == 0:
                print(json.dumps(answer), file=self.answers, flush=True)
        if sys.stdin.readline().strip() != "go":
            os._exit(0)
        self.speed = matrix_speed()
        forget_peak()
        synchronise()
        self.start = time.perf_counter()


def work(side, case, threads):
    """A worker: build the job, then do it whenever it is its turn."""
    turns = Turns()
    torch.set_num_threads(threads)
    torch.set_grad_enabled(case.job in ("update", "ppo"))
    backend = "nccl" if CUDA else "gloo"
    if case.processes > 1:
        torch.distributed.init_process_group(backend)
    elif case.job == "ppo" and side == "our":
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    kind = "generate" if case.job == "uneven" else case.job
    job = BUILDERS[f"{side} {kind}"](case, turns)
    turns.more = job.more
    while True:
        turns.next()
        job.step()


# -------------------------------------------------------------------------------------- the driver

class Program:
    """The processes of one side of one comparison."""

    def __init__(self, side, case, args):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.processes, self.log = [], subprocess.DEVNULL
        if args.logs:
            name = f"{side}-{case.job}-{case.size}-{case.processes}.log"
            self.log = open(Path(args.logs) / name, "w")
        python, many = sys.executable, str(case.processes)
        if side == "peer":
            python = args.peer_python
        command = [python, __file__, *sys.argv[1:], f"--batch={case.batch}",
                   "--worker", side, case.job, case.size, many, str(case.trunks)]
        for rank in map(str, range(case.processes)):
            env = dict(os.environ)
            if case.processes > 1:
                env |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": many,
                        "LOCAL_WORLD_SIZE": many, "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port)}
            self.processes.append(subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
                env=env))

    def go(self):
        """One repetition -> its figures; None if the program has died (its log says why)."""
        try:
            for p in self.processes:
                p.stdin.write("go\n")
                p.stdin.flush()
            line = self.processes[0].stdout.readline()
        except BrokenPipeError:
            return None
        return json.loads(line) if line else None

    def end(self):
        for p in self.processes:
            p.kill()
            p.wait()


def compare(case, args):
    """Take turns -> {"our": [figures of each repetition], "peer": [..]}, a warm-up left out."""
    sides = ["our"]
    if case.job in PEERS and args.peers and not (CUDA and case.job == "ppo"):
        sides.append("peer")        # (on a GPU not TRL: its critic trains whole, over 100 GB)
    programs = {side: Program(side, case, args) for side in sides}
    found, start = {"our": [], "peer": []}, time.perf_counter()
    for i in range(args.repetitions + 1):
        if i > 1 and time.perf_counter() - start > args.row_seconds:
            break
        for side, program in programs.items():
            figures = program.go()
            if figures and i > 0:
                found[side].append(figures)
    for program in programs.values():
        program.end()
    return found


def median(rows, name):
    return statistics.median(row[name] for row in rows)


def spread(values, form):
    """Median, and in brackets the smallest and largest."""
    middle, least, most = (format(f(values), form) for f in (statistics.median, min, max))
    return f"{middle} ({least}-{most})"


def mebibytes(rows):
    return f"{max(row['peak'] for row in rows) / 2 ** 20:,.0f}"


def show(name, columns):
    widths = (24, 9, 20, 8, 21, 9, 20, 8)
    print(f"{name:22}" + "".join(f"{c:>{w}}" for c, w in zip(columns, widths)), flush=True)


def report(case, args):
    """One row of the table."""
    found = compare(case, args)
    ours, theirs = found["our"], found["peer"]
    name = f"{case.job:9} {case.size:5} {case.processes}"
    if not ours:
        return show(name, ["did not run (--logs FOLDER keeps what it said)"])
    columns = [spread([case.tokens() / o["seconds"] for o in ours], ",.0f"),
               f"{median(ours, 'seconds'):.2f}",
               spread([useful_flops(case) / o["seconds"] / o["speed"] for o in ours], ".2f"),
               mebibytes(ours)]
    if theirs:
        times = [t["seconds"] / o["seconds"] for o, t in zip(ours, theirs)]
        columns += [PEERS[case.job], f"{median(theirs, 'seconds'):.2f}", spread(times, ".2f"),
                    mebibytes(theirs)]
    show(name, columns)
    if "parts" in ours[0]:
        show("", [parts(case, [o["parts"] for o in ours])])


def parts(case, rows):
    """Of a PPO step: seconds and share of each part."""
    seconds = {name: median(rows, name) for name in rows[0]}
    total = sum(seconds.values())
    each = [f"{name} {s:.2f} s ({s / total:.0%})" for name, s in seconds.items()]
    return f"trunks {case.trunks}: {', '.join(each)}; {useful_flops(case) / 1e9:,.0f} useful GFLOP"


def table(args):
    """A row for each job, size and number of processes."""
    machine = torch.cuda.get_device_name() if CUDA else f"{os.cpu_count()} cores"
    print(f"torch {torch.__version__}, {args.dtype}, {machine}, a single process with "
          f"{args.threads} threads; median (least-most) of {args.repetitions} repetitions, fewer "
          f"after {args.row_seconds:.0f} s; matrix product {matrix_speed() / 1e9:,.0f} GFLOP/s\n")
    show("job, size, processes", ["tokens/s", "seconds", "of the ceiling", "MiB", "beside",
                                  "seconds", "times as fast", "MiB"])
    for job, size, processes in itertools.product(args.jobs, args.sizes, args.processes):
        for trunks in args.trunks if job == "ppo" else [0]:
            report(make_case(job, size, processes, trunks, args), args)


def make_case(job, size, processes, trunks, args):
    return Case(job, size, int(processes), int(trunks), args.batch, getattr(torch, args.dtype),
                args.checkpointing)


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--sizes", nargs="+", choices=SIZES, default=["7B"] if CUDA else ["S", "M", "135M"])
    add("--jobs", nargs="+", choices=SHAPES, default=list(SHAPES))
    add("--processes", type=int, nargs="+", default=[1] if CUDA else [1, 2])
    add("--trunks", type=int, nargs="+", choices=(1, 2), default=[2, 1] if CUDA else [2],
        help="of the PPO step; on one, policy, value and reward are adapters")
    add("--repetitions", type=int, default=5)
    add("--row_seconds", type=float, default=90 if CUDA else math.inf,
        help="no further repetition of a row after so long (there is one at least)")
    add("--batch", type=int, default=0, help="rows at a time, of all processes (0: the job's own)")
    add("--threads", type=int, default=os.cpu_count(),
        help="of a single process; of two, each has one")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if CUDA else "float32")
    add("--checkpointing", action=switch, default=CUDA, help="recompute activations")
    add("--peers", action=switch, default=True)
    add("--peer_python", default=sys.executable, help="python of the environment with the peers")
    add("--logs", help="folder for what the programs print")
    add("--worker", nargs=5, help=argparse.SUPPRESS)
    return parser


def main():
    args = make_parser().parse_args()
    if args.worker:
        side, *row = args.worker
        case = make_case(*row, args)
        work(side, case, 1 if case.processes > 1 else args.threads)
    if args.logs:
        os.makedirs(args.logs, exist_ok=True)
    table(args)


if __name__ == "__main__":
    main()
