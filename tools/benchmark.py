"""How fast, how large: generation, scoring, a LoRA update and a whole PPO step, beside what a user would run instead.

    python tests/benchmark.py                          sizes S, M and 135M, one process and two; on a GPU LLaMA-7B,
                                                       a row's repetitions ending after 90 seconds
    python tests/benchmark.py --sizes S --jobs generate update --repetitions 5
    python tests/benchmark.py --peer_python VENV/bin/python       where the peers are installed, if not here:
                                                       pip install torch transformers peft
                                                       trl==1.12.0 datasets pandas rich

Cores are shared and noisy, so every figure is a ratio. Each program runs in a process of its own and waits; the driver
lets them take turns (ours, theirs, ours, ...), and each brackets its repetition with a float32 matrix product (on a GPU
bfloat16): `ceiling` is the share of that product's speed that the *useful* arithmetic reached. Useful FLOPs (two per
multiply-add; norms, softmax and rotations not counted), for a model with N weights in its layers and head, of which H
are the head's:

    forward      2 (N - H) per token + 2 H per token whose logits are needed + attention: 4 D layers per key that a
                 query sees; without the last layer's output and feed-forward weights where nothing is read of a token
    LoRA update  forward + the same again for the gradients of activations (frozen weights need none of their own);
                 attention 3 times; adapters 6 per weight and token
    full update  three times forward

`memory` is the peak resident size of the process (of all its processes), or what torch.cuda.max_memory_allocated says.
Decoding is bound by reading: of generation it also says how fast the steps after the prompts read the weights, once
each, and the keys and values so far, beside a copy's speed (reading and writing).
"""
import argparse
import contextlib
import copy
import itertools
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SIZES = {      # dim, layers, heads, key/value heads, ffn, vocabulary, tied
    "S": (256, 6, 8, 8, 688, 4096, False), "M": (512, 8, 8, 8, 1376, 32000, False),
    "135M": (576, 30, 9, 3, 1536, 49152, True),
    "7B": (4096, 32, 32, 32, 11008, 32000, False)}
SHAPES = {"generate": dict(batch=32, prompt=64, new=128), "uneven": dict(batch=32, prompt=64, new=128, total=128),
          "update": dict(batch=16, length=192), "score": dict(batch=32, length=192),
          "ppo": dict(batch=64, prompt=64, new=64, epochs=2, minibatches=4)}
SHAPES_7B = {"generate": dict(batch=64, prompt=192, new=300), "uneven": dict(batch=32, prompt=192, new=300, total=128),
             "update": dict(batch=8, length=492), "score": dict(batch=16, length=492),
             "ppo": dict(batch=128, prompt=192, new=300, epochs=2, minibatches=1, micro=8, generate=32)}
PEERS = {"generate": "transformers", "uneven": "transformers", "update": "transformers + peft", "ppo": "TRL"}
CUDA = torch.cuda.is_available()
DEVICE = "cuda:0" if CUDA else "cpu"


# ------------------------------------------------------------------------------------------------------ useful work

def weights(size):
    """(weights of the layers' matrices, weights of the head, adapter weights of r 8 on wq wk wv wo)."""
    dim, layers, heads, kv, ffn, vocab, _ = SIZES[size]
    narrow = dim * kv // heads
    return (layers * (2 * dim * dim + 2 * dim * narrow + 3 * dim * ffn), dim * vocab,
            layers * 8 * (2 * 2 * dim + 2 * (dim + narrow)))


def attention_flops(size, tokens):
    """QK' and AV of one causal row of so many tokens."""
    dim, layers = SIZES[size][:2]
    return 4 * dim * layers * tokens * (tokens + 1) // 2


def forward_flops(size, tokens, read, logits=None):
    """One row of so many tokens: of which `read` need more of the last layer than keys and values for the others'
    attention, and `logits` (None: those) the head."""
    dim, layers, heads, kv, ffn = SIZES[size][:5]
    block, head, _ = weights(size)
    past_attention = dim * dim + 3 * dim * ffn
    return (2 * block * tokens - 2 * past_attention * (tokens - read) + 2 * head * (read if logits is None else logits)
            + attention_flops(size, tokens))


def update_flops(size, tokens, read, logits=None, full=False):
    """Forward and backward of one row; with adapters, or of all weights."""
    forward, attention = forward_flops(size, tokens, read, logits), attention_flops(size, tokens)
    return 3 * forward if full else 2 * forward + attention + 6 * weights(size)[2] * tokens


def useful_flops(job, size, s, lengths, full_critic=False):
    """All of a job. Generation: the prompt once, then each new token once; the PPO step: sampling, four scoring
    passes, and `epochs` updates of policy and critic - a LoRA critic, whoever runs it, unless full_critic: what a peer
    does beyond that is its own loss."""
    if job in ("generate", "uneven"):
        return sum(forward_flops(size, s["prompt"] + n - 1, n) for n in lengths)
    if job == "update":
        return s["batch"] * update_flops(size, s["length"], s["length"] - 1)
    if job == "score":
        return s["batch"] * forward_flops(size, s["length"], 1, 0)
    tokens, new = s["prompt"] + s["new"], s["new"]
    sample = forward_flops(size, tokens - 1, new)
    policy, critic, reward = (forward_flops(size, tokens, *read) for read in ((new,), (new, 0), (1, 0)))
    look = 2 * policy + critic + reward                                                     # (the reference's, too)
    learn = update_flops(size, tokens, new) + update_flops(size, tokens, new, 0, full_critic)
    return s["batch"] * (sample + look + s["epochs"] * learn)


def decoding_bytes(size, s, dtype):
    """What the steps after the prompts read: all weights each time, and the keys and values so far."""
    dim, layers, heads, kv = SIZES[size][:4]
    block, head, _ = weights(size)
    seen = s["batch"] * sum(range(s["prompt"] + 1, s["prompt"] + s["new"]))
    itemsize = getattr(torch, dtype).itemsize
    return itemsize * ((s["new"] - 1) * (block + head) + 2 * layers * (dim * kv // heads) * seen)


def set_batch(rows):
    """Give all jobs so many rows at a time (0: leave each its own)."""
    for shape in (*SHAPES.values(), *SHAPES_7B.values()):
        shape["batch"] = rows or shape["batch"]


def response_lengths(job, s, processes):
    """New tokens of each row of one process: all the same, or geometric with a third of the maximum as mean,
    cut there."""
    rows = s.get("total", s["batch"]) // processes
    if job != "uneven":
        return [s.get("new", 0)] * rows
    u = torch.rand(rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = s["new"] / 3
    return (torch.log(u) / torch.log(torch.tensor(1 - 1 / mean))).ceil().clamp(1, s["new"]).int().tolist()


# ------------------------------------------------------------------------------------------------------------- ours

def our_config(size):
    from model import LlamaConfig
    dim, layers, heads, kv, ffn, vocab, tied = SIZES[size]
    return LlamaConfig(vocab, dim, layers, heads, kv, ffn, tie_embeddings=tied)


def our_model(size, dtype, lm_head=True):
    from model import Llama, empty_llama
    torch.manual_seed(0)
    if not CUDA:
        return Llama(our_config(size), lm_head).to(dtype).requires_grad_(False)
    model = empty_llama(our_config(size), "cuda", dtype, lm_head).requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=0.02) if p.dim() == 2 else p.fill_(1.0)
    return model


def random_prompts(size, rows, length, rank):
    return torch.randint(4, SIZES[size][5], (rows, length), generator=torch.Generator().manual_seed(rank)).tolist()


def our_generate(size, s, args, rank):
    from model import generate
    model, rows = our_model(size, args.torch_dtype), response_lengths(args.job, s, args.processes)
    prompts = random_prompts(size, len(rows), s["prompt"], rank)

    def step(limit=s["new"]):
        generate(model, prompts, limit, eos_id=-1, limits=rows, batch_size=s["batch"] // args.processes)

    def prompts_alone():
        synchronise()
        start = time.perf_counter()
        step(1)
        synchronise()
        return {"prompts": time.perf_counter() - start, "copy": copy_speed()}
    if args.job == "generate":
        step.more = prompts_alone
    return step


def our_update(size, s, args, rank):
    """LoRA r 8 on wq wk wv wo, the loss over all positions, AdamW: the body of train.py's sft stage."""
    from lora import add_lora
    from model import packed_weights
    from reward import ActorCritic
    from train import trainable, wrap
    policy = our_model(size, args.torch_dtype)
    add_lora(policy, "policy", 8, 64)
    policy.checkpoint_activations = args.checkpointing
    net = ActorCritic(policy, "policy")
    module = wrap(net, DEVICE) if args.processes > 1 else net
    optimizer = torch.optim.AdamW(trainable(net), lr=1e-4, fused=True)
    rows = s["batch"] // args.processes
    tokens = torch.tensor(random_prompts(size, rows, s["length"], rank), device=policy.device)
    one, rest = (torch.full((rows,), n, device=policy.device) for n in (1, s["length"] - 1))

    args.until_the_end.enter_context(packed_weights(net))

    def step():
        (-module(tokens, one, rest).logprobs.mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return step


def our_score(size, s, args, rank):
    from reward import RewardModel, score_responses
    model = RewardModel(our_model(size, args.torch_dtype, lm_head=False))
    rows = random_prompts(size, s["batch"] // args.processes, s["length"], rank)
    return lambda: score_responses(model, [r[:8] for r in rows], [r[8:] for r in rows], 2, 16)


def our_ppo(size, s, args, rank):
    """train.ppo_step itself, on random models: two trunks, or one on which policy, value and reward are adapters."""
    import train
    from lora import add_lora
    from model import ban_mask, packed_weights
    from reward import ActorCritic, RewardModel
    from types import SimpleNamespace
    policy = our_model(size, args.torch_dtype)
    add_lora(policy, "policy", 8, 64)
    trunk = policy if args.one_trunk else our_model(size, args.torch_dtype, lm_head=False)
    add_lora(trunk, "value", 8, 64)
    if args.one_trunk:
        add_lora(trunk, "reward", 8, 64)
    reward = RewardModel(trunk, "reward" if args.one_trunk else None).requires_grad_(False)
    for name in ("value", "policy"):
        for p in train.lora_parameters(policy if name == "policy" else trunk, name):
            p.requires_grad_(True)
    net = ActorCritic(policy, "policy", trunk, "value", ban_mask(SIZES[size][5], [0, 1], DEVICE))
    policy.checkpoint_activations = trunk.checkpoint_activations = args.checkpointing
    cfg = train.Config(stage="ppo", model="random", rollout_batch=s["batch"], minibatch=s["batch"] // s["minibatches"],
                       micro_batch=s.get("micro", 16), ppo_epochs=s["epochs"], prompt_len=s["prompt"],
                       response_len=s["new"], generate_batch=s.get("generate", 0),
                       checkpoint_activations=args.checkpointing,
                       dtype="float32" if args.dtype == "float32" else "bfloat16")
    optimizer = torch.optim.AdamW(train.trainable(net), lr=1e-5, eps=1e-5, weight_decay=0.0, fused=True)
    inputs = SimpleNamespace(prompts=random_prompts(size, 2 * s["batch"], s["prompt"], 0), banned_ids=[0, 1],
                             tokenizer=SimpleNamespace(eos_id=-1))
    ddp, parts, number = train.wrap(net, DEVICE).eval(), [], iter(range(1, 1000))

    args.until_the_end.enter_context(packed_weights(net, reward))

    def step():
        row, _ = train.ppo_step(cfg, next(number), net, ddp, reward, optimizer, inputs, 0.02)
        parts.append({phase: row[f"{phase}_seconds"] for phase in train.PHASES})
    layouts = {name: train.peak(memory) for name, _, memory in train.layouts(
        cfg, "ppo", our_config(size), args.torch_dtype, 8, DEVICE[:4])}
    estimate = layouts["one trunk" if args.one_trunk else "two trunks"]
    step.more = lambda: {"parts": parts[-1], "estimate": estimate}
    return step


# ---------------------------------------------------------------------------------------------------- what others run

def peer_config(size, **more):
    from transformers import LlamaConfig
    dim, layers, heads, kv, ffn, vocab, tied = SIZES[size]
    return LlamaConfig(vocab_size=vocab, hidden_size=dim, intermediate_size=ffn, num_hidden_layers=layers,
                       num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=2048,
                       tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=0, **more)


def peer_model(size, args, **more):
    from transformers import LlamaForCausalLM
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return LlamaForCausalLM(peer_config(size, **more)).to(args.torch_dtype)


def peer_generate(size, s, args, rank):
    """transformers' generate, sampling, no EOS. It has no places to refill and ends no row alone: uneven rows are
    decoded in batches of the same size, each to its longest row."""
    from transformers import GenerationConfig
    model = peer_model(size, args).eval()
    rows, size_of_batch = response_lengths(args.job, s, args.processes), s["batch"] // args.processes
    ids = torch.tensor(random_prompts(size, len(rows), s["prompt"], rank), device=DEVICE)

    def step():
        for i in range(0, len(rows), size_of_batch):
            part, new = ids[i:i + size_of_batch], max(rows[i:i + size_of_batch])
            config = GenerationConfig(bos_token_id=1, eos_token_id=None, pad_token_id=0, max_new_tokens=new,
                                      do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True)
            with torch.inference_mode():
                out = model.generate(input_ids=part, attention_mask=torch.ones_like(part), generation_config=config)
            assert out.shape[1] == s["prompt"] + new
    return step


def peer_update(size, s, args, rank):
    from peft import LoraConfig, get_peft_model
    model = peer_model(size, args, use_cache=False).train()
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=64, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
                                             target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    net = torch.nn.parallel.DistributedDataParallel(model) if args.processes > 1 else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.tensor(random_prompts(size, s["batch"] // args.processes, s["length"], rank), device=DEVICE)

    def step():
        net(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def peer_ppo(size, s, args, rank):
    """One step of TRL's PPOTrainer with peft adapters on the policy; it trains all weights of its critic. The trainer
    runs by itself: a callback hands every finished step to the driver."""
    import tempfile
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    torch.manual_seed(0)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, SIZES[size][5])}
    words = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                        unk_token="<unk>", padding_side="left")
    judge = lambda: LlamaForSequenceClassification(peer_config(size, num_labels=1))
    reward = judge().eval().requires_grad_(False)
    local = s["batch"] // args.processes
    config = PPOConfig(output_dir=tempfile.mkdtemp(), use_cpu=True, report_to="none", save_strategy="no",
                       eval_strategy="no", num_sample_generations=0, disable_tqdm=True, bf16=args.dtype == "bfloat16",
                       learning_rate=1e-5, seed=0, per_device_train_batch_size=local, gradient_accumulation_steps=1,
                       num_mini_batches=s["minibatches"], num_ppo_epochs=s["epochs"], total_episodes=s["batch"] * 1000,
                       local_rollout_forward_batch_size=local, response_length=s["new"], temperature=1.0, kl_coef=0.05,
                       whiten_rewards=False)
    rows = random_prompts(size, 2 * s["batch"], s["prompt"], 0)

    class Turns(TrainerCallback):
        def on_step_end(self, *_, **__):
            args.next_turn()

    policy = LlamaForCausalLM(peer_config(size))      # in several processes TRL needs a reference of its own
    reference = copy.deepcopy(policy).eval().requires_grad_(False) if args.processes > 1 else None
    trainer = PPOTrainer(args=config, processing_class=tokenizer, model=policy,
                         ref_model=reference, reward_model=reward, value_model=judge(),
                         train_dataset=Dataset.from_dict({"input_ids": rows}),
                         peft_config=LoraConfig(r=8, lora_alpha=64, lora_dropout=0.0, bias="none",
                                                task_type="CAUSAL_LM",
                                                target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
                         callbacks=[Turns()])
    return trainer.train


# -------------------------------------------------------------------------------------------------- one process's part

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


def matrix_speed(n=1536):
    """FLOP/s of a square matrix product, the best of three; on a GPU larger and in bfloat16."""
    n, dtype = (8192, torch.bfloat16) if CUDA else (n, torch.float32)
    a, best = torch.randn(n, n, device=DEVICE).to(dtype), 1e9
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        if CUDA:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return all_sum(2 * n ** 3 / best)


def copy_speed():
    """Bytes per second, read and written, of a large copy."""
    x = torch.empty(1 << 28 if CUDA else 1 << 26, device=DEVICE).fill_(1)
    y, best = torch.empty_like(x), 1e9
    for _ in range(4):
        start = time.perf_counter()
        y.copy_(x)
        if CUDA:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return all_sum(8 * x.numel() / best)


def peak_bytes():
    if CUDA:
        return torch.cuda.max_memory_allocated()
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024


def forget_peak():
    if CUDA:
        return torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def work(args):
    """A worker: build the job, then a repetition for each line on stdin, answered with its time by process 0."""
    rank = int(os.environ.get("RANK", 0))
    args.torch_dtype = getattr(torch, args.dtype)
    torch.set_num_threads(1 if args.processes > 1 else args.threads)
    torch.set_grad_enabled(args.job in ("update", "ppo"))
    if args.side == "ours" and not CUDA:
        from train import keep_freed_memory
        keep_freed_memory()
    if args.processes > 1 or args.job == "ppo" and args.side == "ours":
        backend = "nccl" if CUDA else "gloo"
        more = {} if args.processes > 1 else dict(store=torch.distributed.HashStore(), rank=0, world_size=1)
        torch.distributed.init_process_group(backend, **more)
    shape = (SHAPES_7B if args.size == "7B" else SHAPES)[args.job]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                                     # whatever a library prints goes to stderr
    state = {}

    def next_turn():
        """End the repetition in progress, if there is one, report it; wait for the next."""
        synchronise()
        if "start" in state:
            seconds = time.perf_counter() - state["start"]
            answer = {"seconds": seconds, "speed": (state["speed"] + matrix_speed()) / 2, "peak": all_sum(peak_bytes())}
            answer |= getattr(state.get("step"), "more", dict)()
            if rank == 0:
                print(json.dumps(answer), file=answers, flush=True)
        line = sys.stdin.readline()
        if line.strip() != "go":
            os._exit(0)
        state["speed"] = matrix_speed()
        synchronise()
        forget_peak() if "start" in state else None
        state["start"] = time.perf_counter()

    args.next_turn, args.until_the_end = next_turn, contextlib.ExitStack()
    kind = "generate" if args.job == "uneven" else args.job
    step = state["step"] = globals()[f"{'our' if args.side == 'ours' else 'peer'}_{kind}"](args.size, shape, args, rank)
    if args.side == "peer" and args.job == "ppo":
        next_turn()
        return step()
    while True:
        next_turn()
        step()


# ------------------------------------------------------------------------------------------------------- the driver

class Program:
    """The processes of one side of one comparison."""

    def __init__(self, side, job, size, processes, args):
        python = args.peer_python if side == "peer" else sys.executable
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        dtype = args.peer_dtype or args.dtype if side == "peer" else args.dtype
        command = [python, str(Path(__file__).resolve()), "--worker", f"--side={side}", f"--job={job}",
                   f"--size={size}", f"--processes={processes}", f"--dtype={dtype}", f"--threads={args.threads}",
                   f"--batch={args.batch}"]
        command += ["--checkpointing"] * args.checkpointing + ["--one_trunk"] * bool(args.one_trunk)
        self.log = (open(Path(args.logs) / f"{side}-{job}-{size}-{processes}.log", "w") if args.logs
                    else subprocess.DEVNULL)
        self.processes = [subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(1 if processes > 1 else args.threads)} | (
                {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if processes > 1 else {}))
            for r in range(processes)]

    def go(self):
        """One repetition -> its figures; None if the program has died (its log says why)."""
        try:
            for p in self.processes:
                p.stdin.write("go\n")
                p.stdin.flush()
            line = self.processes[0].stdout.readline()
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else None

    def end(self):
        for p in self.processes:
            p.kill()
            p.wait()


def compare(job, size, processes, args):
    """Take turns. -> figures of ours and of the peer's repetitions (none if there is no peer here),
    warm-up left out."""
    sides = {"ours": Program("ours", job, size, processes, args)}
    if job in PEERS and args.peers and not (CUDA and job == "ppo"):      # (TRL's critic trains whole: over 100 GB)
        sides["peer"] = Program("peer", job, size, processes, args)
    found, start = {side: [] for side in sides}, time.perf_counter()
    for i in range(args.repetitions + args.warm_up):
        if i > args.warm_up and time.perf_counter() - start > args.row_seconds:
            break
        for side, program in sides.items():
            figures = program.go()
            if figures and i >= args.warm_up:
                found[side].append(figures)
    for program in sides.values():
        program.end()
    return found["ours"], found.get("peer", [])


def spread(values, form="{:.2f}"):
    """Median, and in brackets the smallest and largest."""
    return f"{form.format(statistics.median(values))} ({form.format(min(values))}-{form.format(max(values))})"


def report(job, size, processes, args):
    """One line of the table."""
    ours, theirs = compare(job, size, processes, args)
    name = f"{job:9} {size:5} {processes} x {1 if processes > 1 else args.threads}"
    if not ours:
        print(f"{name:22} did not run" + ("" if args.logs else ": --logs FOLDER keeps what it said"), flush=True)
        return
    shape = (SHAPES_7B if size == "7B" else SHAPES)[job]
    lengths = response_lengths(job, shape, processes) * processes
    flops = useful_flops(job, size, shape, lengths)
    tokens = sum(lengths) if "new" in shape else shape["batch"] * shape["length"]
    columns = [spread([tokens / o["seconds"] for o in ours], "{:,.0f}"),
               f"{statistics.median(o['seconds'] for o in ours):.2f}",
               spread([flops / o["seconds"] / o["speed"] for o in ours]),
               f"{max(o['peak'] for o in ours) / 2 ** 20:,.0f}"]
    if theirs:
        pairs = list(zip(ours, theirs))
        columns += [PEERS[job], f"{statistics.median(t['seconds'] for t in theirs):.2f}",
                    spread([t["seconds"] / o["seconds"] for o, t in pairs]),
                    f"{max(t['peak'] for t in theirs) / 2 ** 20:,.0f}"]
    widths = (24, 9, 20, 8, 21, 9, 20, 8)
    print(f"{name:22}" + "".join(f"{c:>{w}}" for c, w in zip(columns, widths)), flush=True)
    if "prompts" in ours[0]:
        speeds = [decoding_bytes(size, shape, args.dtype) / (o["seconds"] - o["prompts"]) for o in ours]
        print(f"{'':22}the prompts {statistics.median(o['prompts'] for o in ours):.2f} s; after them "
              f"{statistics.median(speeds) / 1e9:,.1f} GB/s are read, "
              f"{statistics.median(x / o['copy'] for x, o in zip(speeds, ours)):.0%} of a copy's speed", flush=True)
    if "parts" in ours[0]:
        parts = {k: statistics.median(o["parts"][k] for o in ours) for k in ours[0]["parts"]}
        print(f"{'':22}{'one trunk' if args.one_trunk else 'two trunks'}: "
              + ", ".join(f"{k} {v:.2f} s ({v / sum(parts.values()):.0%})" for k, v in parts.items())
              + f"; {flops / 1e9:,.0f} useful GFLOP, "
              f"{useful_flops(job, size, shape, lengths, full_critic=True) / flops - 1:.0%} more "
              "if the critic trained all its weights, as TRL's does"
              + f"; estimated memory {ours[0]['estimate'] / 2 ** 20:,.0f} MiB" * CUDA, flush=True)


def growth(args):
    """Seconds per token and memory of generation and update as the batch grows: flat until the ceiling, then linear."""
    for size, (job, key) in itertools.product(args.sizes, (("generate", "new"), ("update", "length"))):
        print(f"\n{job}, size {size}: batch, microseconds per token, MiB")
        for batch in (1, 4, 16, 64):
            set_batch(batch)
            more = {"peers": False, "repetitions": 3, "batch": batch}
            ours, _ = compare(job, size, 1, argparse.Namespace(**vars(args) | more))
            tokens = batch * (SHAPES_7B if size == "7B" else SHAPES)[job][key]
            seconds = statistics.median(o["seconds"] for o in ours)
            print(f"{batch:6}{1e6 * seconds / tokens:12.0f}{max(o['peak'] for o in ours) / 2 ** 20:12,.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["7B"] if CUDA else ["S", "M", "135M"])
    parser.add_argument("--jobs", nargs="+", choices=list(SHAPES),
                        default=["ppo", "generate", "update", "score", "uneven"] if CUDA else list(SHAPES))
    parser.add_argument("--processes", type=int, nargs="+", default=[1] if CUDA else [1, 2])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--warm_up", type=int, default=1)
    parser.add_argument("--row_seconds", type=float, default=90 if CUDA else float("inf"),
                        help="no further repetition of a row after so long (there is one at least)")
    parser.add_argument("--batch", type=int, default=0, help="rows at a time, over all processes (0: each job's own)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a single process; of two, each has one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if CUDA else "float32")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=CUDA,
                        help="recompute activations")
    parser.add_argument("--one_trunk", action=argparse.BooleanOptionalAction,
                        help="of the PPO step: policy, value and reward as adapters on one trunk (default: on a GPU the "
                             "two layouts one after the other, else two trunks)")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peer_dtype", choices=("float32", "bfloat16"), help="another than --dtype, for the peers")
    parser.add_argument("--peer_python", default=sys.executable, help="python of the environment that has the peers")
    parser.add_argument("--growth", action="store_true",
                        help="time per token and memory against the batch, instead of the table")
    parser.add_argument("--logs", help="folder for what the programs print")
    args = parser.parse_args()
    if args.logs:
        Path(args.logs).mkdir(parents=True, exist_ok=True)
    if args.growth:
        return growth(args)
    set_batch(args.batch)
    few = f", fewer after {args.row_seconds:.0f} s" if math.isfinite(args.row_seconds) else ""
    print(f"torch {torch.__version__}, {args.dtype}"
          f"{f' beside {args.peer_dtype}' if args.peer_dtype else ''}, "
          f"{torch.cuda.get_device_name() if CUDA else f'{os.cpu_count()} cores'}; "
          "median (least-most) of "
          f"{args.repetitions}{few}; "
          f"matrix product {matrix_speed() / 1e9:,.0f} GFLOP/s, copy {copy_speed() / 1e9:,.0f} GB/s\n")
    titles = ("tokens/s", "seconds", "of the ceiling", "MiB", "beside", "seconds", "times as fast", "MiB")
    print(f"{'job, size, processes':22}" + "".join(f"{t:>{w}}" for t, w in zip(titles, (24, 9, 20, 8, 21, 9, 20, 8))))
    for job in args.jobs:
        for size in args.sizes:
            for processes in args.processes:
                if (size, job) == ("135M", "ppo") and args.jobs != ["ppo"]:      # (that takes minutes: on demand)
                    continue
                both = [False, True] if CUDA and args.one_trunk is None else [bool(args.one_trunk)]
                for one_trunk in both if job == "ppo" else [False]:
                    report(job, size, processes, argparse.Namespace(**vars(args) | {"one_trunk": one_trunk}))


if __name__ == "__main__":
    if "--worker" in sys.argv:
        worker = argparse.ArgumentParser()
        for name in ("side", "job", "size", "dtype"):
            worker.add_argument(f"--{name}")
        for name in ("processes", "threads", "batch"):
            worker.add_argument(f"--{name}", type=int)
        for name in ("worker", "checkpointing", "one_trunk"):
            worker.add_argument(f"--{name}", action="store_true")
        worker = worker.parse_args()
        set_batch(worker.batch)
        work(worker)
    else:
        main()
