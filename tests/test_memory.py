"""tools/memory.py: what a run will need is told from the sizes alone, and is what it then takes."""
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_module
import train
from data import Tokenizer, format_prompt
from lora import adapter, add_lora
from model import KVCache, Llama, LlamaConfig, response_logprobs, save_llama
from regularizers import exact
from reward import RewardModel, save_reward_model
from tools import memory

ROOT = Path(__file__).resolve().parents[1]
SMALL = LlamaConfig(vocab_size=64, dim=64, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=160,
                    max_seq_len=64)


def settings(stage="ppo", **more):
    """The settings of a stage, as a command line gives them."""
    names = {"stage": stage, "model": "x", "sft_data": "x", "preference_data": "x", "prompts": "x"}
    if stage == "ppo":
        names["reward"] = "x"
    flags = [f"--{k}" if v is True else f"--{k}={v}" for k, v in (names | more).items()]
    return train.parse(flags).configs[stage]


def storages(tensors):
    """Bytes of the storages behind some tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in tensors}.values())


# ------------------------------------------------------------------------------------ the formulas

def test_memory_of_7b_by_item():
    """By hand, bf16, for one of two processes at the paper's batch sizes: the trunk is
    6,738,415,616 x 2 bytes, the reward trunk the same without 32000 x 4096 output weights;
    16,777,216 adapter numbers take 16 bytes each; a token's keys and values are 2 x 32 layers x
    4096 x 2 bytes, for 128 rows of 492 slots; an activation checkpoint is 4096 x 2 bytes per token,
    layer and trunk."""
    cfg = settings(dtype="bfloat16", checkpoint_activations=True, micro_batch=8)
    one, two = memory.layouts("ppo", cfg, LlamaConfig(), "cuda", processes=2)
    assert (one.name, two.name) == ("one trunk", "two trunks")
    assert one.trained == two.trained == 16_781_313
    assert one.held["frozen weights"] == 6_738_415_616 * 2
    assert two.held["frozen weights"] == (2 * 6_738_415_616 - 32000 * 4096) * 2
    assert one.held["trained weights, gradients, Adam"] == 16_777_216 * 16
    assert one.sampling["KV cache"] == 2 * 32 * 4096 * 2 * 128 * 492
    checkpoints, tokens = 2 * 32 * 4096 * 2, 8 * 492
    activations = one.updating["activations of a micro-batch"]
    assert tokens * checkpoints < activations < 1.8 * tokens * checkpoints
    # sampling's and the update's memory are not needed at once
    both = [*one.held.values(), *one.sampling.values(), *one.updating.values()]
    assert one.peak < sum(both)


def test_what_trains_takes_sixteen_bytes():
    """A float32 master, its gradient and Adam's two moments: 4 x 4 bytes. By hand for all weights
    of LLaMA-7B in PPO: the policy, the critic without output matrix, and the critic's head; the
    reference stays in float32, as the policy's master is."""
    one, two = memory.layouts("ppo", settings(lora_rank=0), LlamaConfig(), "cuda")
    policy, trunk = 6_738_415_616, 6_738_415_616 - 32000 * 4096
    assert one.trained == two.trained == policy + trunk + 4097
    assert one.held["trained weights, gradients, Adam"] == 16 * (policy + trunk)
    assert one.held["frozen weights"] == 4 * policy
    assert two.held["frozen weights"] == 4 * policy + 2 * trunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_takes_what_the_estimate_says(dtype):
    """The storage of the cache that a rollout of 4 rows of 8 + 8 tokens really holds."""
    cfg = settings(rollout_batch=4, minibatch=4, prompt_len=8, response_len=8,
                   dtype=str(dtype).removeprefix("torch."))
    cache = KVCache(4, 16, "cpu")
    cache.expect_prompts(torch.arange(4), 8)
    with torch.no_grad():
        Llama(SMALL).to(dtype).hidden(torch.ones(4, 8, dtype=torch.int64), cache)
    estimate = memory.layouts("ppo", cfg, SMALL, "cpu")[0].sampling["KV cache"]
    assert estimate == storages([*cache.k, *cache.v])


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that still exist, and the most there ever
    were."""

    def __init__(self):
        super().__init__()
        self.held, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.note(x.untyped_storage())
        return out

    def note(self, storage):
        if storage._cdata not in self.held:
            self.held.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())

    def drop(self, key, size):
        self.held.remove(key)
        self.now -= size


@pytest.mark.parametrize("config", [LlamaConfig(), LlamaConfig(49152, 576, 30, 9, 3, 1536)],
                         ids=["7B", "135M"])
def test_reading_the_prompts_takes_what_the_estimate_says(config, monkeypatch):
    """8 prompts of 192 tokens go through a model in bfloat16 as on a GPU, on tensors without
    storage: what exists at one time beside the cache. (Attention's kernel keeps nothing but its
    result.)"""
    monkeypatch.setattr(model_module, "attend", lambda q, k, v, mask=None: torch.empty_like(q))
    cfg = settings(rollout_batch=8, minibatch=8, prompt_len=192, response_len=8, dtype="bfloat16")
    estimate = memory.layouts("ppo", cfg, config, "cuda")[0].sampling
    with torch.device("meta"), torch.inference_mode():
        model, tokens = Llama(config).to(torch.bfloat16), torch.zeros(8, 192, dtype=torch.int64)
        cache = KVCache(8, 200, "meta")
        cache.expect_prompts(torch.arange(8), 192)
        with Live() as live:
            model.hidden(tokens, cache)
    cached = sum(x.untyped_storage().nbytes() for x in (*cache.k, *cache.v))
    assert estimate["KV cache"] == cached
    assert estimate["prompts' activations"] == pytest.approx(live.most - cached, rel=0.15)


def test_scoring_holds_the_logits_that_the_estimate_says():
    """Policy's and reference's log-probabilities and their exact divergence, a chunk of 16 of 64
    states at a time, with 32000 logits each, on tensors without storage."""
    head = torch.nn.Linear(8, 32000, bias=False, device="meta")
    states = torch.zeros(64, 8, device="meta")
    targets = torch.zeros(64, dtype=torch.int64, device="meta")
    with torch.no_grad(), Live() as live:
        response_logprobs(head, states, targets, None, (head, states),
                          lambda logits, ref_logits: exact("kl", logits, ref_logits), 16 * 32000)
    cfg = settings(micro_batch=1, response_len=16, dtype="float32")
    estimate = memory.layouts("ppo", cfg, LlamaConfig(), "cpu")[0].updating["logits, in chunks"]
    assert estimate == pytest.approx(live.most, rel=0.1)


def kept_by_autograd(cfg, n_layers, dtype):
    """Bytes that a forward pass of 32 rows of 64 tokens keeps for the backward pass, weights left
    out."""
    model = Llama(LlamaConfig(**{**vars(SMALL), "n_layers": n_layers}))
    precision, name = nullcontext(), None
    if cfg.lora_rank:
        model.to(dtype)
        name = "policy"
        add_lora(model, name, cfg.lora_rank, 1.0, cfg.lora_dropout)
    elif dtype != torch.float32:
        precision = torch.autocast("cpu", dtype)
    model.checkpoint_activations = cfg.checkpoint_activations
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, []

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept.append(x)
        return x

    tokens = torch.randint(0, 64, (32, 64))
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with hooks, adapter(model, name), precision:
        states = model.hidden(tokens)      # (held: without it the graph would let go what it keeps)
    assert states.requires_grad
    return storages(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flags", [
    {"lora_rank": 1}, {"lora_rank": 1, "lora_dropout": 0.1}, {"lora_rank": 0},
    {"lora_rank": 1, "checkpoint_activations": True},
    {"lora_rank": 0, "checkpoint_activations": True}], ids=str)
def test_what_autograd_keeps_is_what_the_estimate_says(flags, dtype):
    """The tensors that autograd really saves, each storage counted once: of adapters and of all
    weights (in autocast), with dropout and with recomputation. One layer's share is the difference
    between a model of 4 layers and one of 3."""
    cfg = settings("sft", micro_batch=32, max_len=64, **flags)
    real = kept_by_autograd(cfg, 4, dtype) - kept_by_autograd(cfg, 3, dtype)
    four, three = (memory.updating(cfg, LlamaConfig(**{**vars(SMALL), "n_layers": n}), dtype, True,
                                   graphs=1, rows=32, tokens=64, read=64) for n in (4, 3))
    item = "activations of a micro-batch"
    assert four[item] - three[item] == pytest.approx(real, rel=0.05)


# ---------------------------------------------------------------------------------- a whole process

RESIDENT = """
import sys, train

def resident(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

before = resident("VmRSS")
train.main(sys.argv[1:])
print("resident", resident("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def size_m(tmp_path_factory):
    """Two random trunks of width 512, 8 layers and 32000 ids, and prompts of about 62 tokens."""
    folder = tmp_path_factory.mktemp("m")
    config = LlamaConfig(32000, 512, 8, 8, 8, 1376, max_seq_len=256)
    torch.manual_seed(0)
    save_llama(Llama(config), folder / "sft")
    save_reward_model(RewardModel(Llama(config, lm_head=False)), folder / "reward")
    for name in ("sft", "reward"):
        shutil.copy(ROOT / "toy" / "tokenizer.model", folder / name)
    rows, tokenizer = [], Tokenizer(ROOT / "toy" / "tokenizer.model")
    for word in ("red", "blue", "tree", "house", "cat", "dog", "sun", "moon"):
        text = word
        while len(tokenizer.encode(format_prompt(f"{text} {word}"), bos=True)) <= 64:
            text += f" {word}"
        rows.append({"instruction": text, "input": "", "output": ""})
    (folder / "prompts.json").write_text(json.dumps(rows))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(),
                    reason="the resident size is read from Linux's /proc")
@pytest.mark.parametrize("rows, variants", [(4, ([], ["--checkpoint_activations"])),
                                            (8, (["--dtype=bfloat16"],))])
def test_the_memory_estimate_is_the_resident_size_within_a_tenth(rows, variants, size_m, tmp_path):
    """A PPO step in a process whose C library hands freed memory back (it keeps fragments
    otherwise), against the estimate; two processes side by side. (oneDNN keeps some 60 MB for
    bfloat16: of fewer rows that would be more than a tenth.)"""
    if rows == 8 and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no bfloat16 for oneDNN: one step would take minutes")
    started = [start_step(rows, more, size_m, tmp_path / str(i)) for i, more in enumerate(variants)]
    for process, two_trunks in started:
        out, err = process.communicate()
        assert process.returncode == 0, err
        resident = int(out.rsplit("resident", 1)[1])
        assert two_trunks.peak == pytest.approx(resident, rel=0.1), (two_trunks, resident)


def start_step(rows, more, size_m, out):
    """Begin one PPO step -> the process, and the estimate for it."""
    flags = ["--stage=ppo", f"--model={size_m / 'sft'}", f"--reward={size_m / 'reward'}",
             f"--prompts={size_m / 'prompts.json'}", f"--out={out}", "--steps=1",
             f"--rollout_batch={rows}", f"--minibatch={rows}", f"--micro_batch={rows}",
             "--prompt_len=64", "--response_len=96", "--warmup_steps=1", "--ppo_epochs=1", *more]
    two_trunks = memory.layouts("ppo", train.parse(flags).configs["ppo"],
                                model_module.read_model_config(size_m / "sft"), "cpu")[1]
    process = subprocess.Popen(
        [sys.executable, "-c", RESIDENT, *flags], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)})
    return process, two_trunks


# ------------------------------------------------------------------------------------ the command

def test_a_bill_needs_no_weights_and_writes_nothing(tiny, tmp_path, capsys):
    """Before a week on two GPUs: the sizes stand in config.json, and the bill is there in
    seconds."""
    (tmp_path / "llama").mkdir()
    shutil.copy(tiny / "sft" / "config.json", tmp_path / "llama")
    before = sorted(tmp_path.rglob("*"))
    memory.main(["--stage=ppo", f"--model={tmp_path / 'llama'}", "--rollout_batch=8",
                 "--minibatch=4", f"--out={tmp_path / 'out'}"])
    out = capsys.readouterr().out
    assert "781 steps of 8 responses and 4 updates" in out and "KV cache" in out
    assert "one trunk:" in out and "two trunks:" in out        # (--reward is not there yet)
    assert sorted(tmp_path.rglob("*")) == before and not torch.distributed.is_initialized()
    for reward, layout in (("reward", "two trunks"), ("reward_adapter", "one trunk")):
        memory.main(["--stage=ppo", f"--model={tmp_path / 'llama'}", f"--reward={tiny / reward}"])
        assert re.findall("(one trunk|two trunks):", capsys.readouterr().out) == [layout]


def test_a_bill_needs_no_file(capsys):
    """Of TinyLlama-1.1B, whose 1,100,048,384 parameters its authors count; an adapter of rank 8 has
    8 x (2 x (2048 + 2048) + 2 x (2048 + 256)) numbers in each of 22 layers."""
    memory.main(["--size=1.1B", "--reward_lora_rank=8"])
    out = capsys.readouterr().out
    assert "1,100,048,384 parameters in the model" in out
    assert "  LoRA: 2,252,800 parameters are trained" in out
    assert re.findall(r"^(\w+): ", out, re.M) == ["sft", "reward", "ppo"] and "one trunk" in out
    assert 8 * (2 * 4096 + 2 * 2304) * 22 == 2_252_800


def test_steps_are_counted_from_the_rows(tmp_path, capsys):
    """96 demonstrations, 2 passes, 16 a step: 12 steps."""
    (tmp_path / "sft.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 96))
    memory.main(["--size=7B", "--stage=sft", f"--sft_data={tmp_path / 'sft.json'}", "--epochs=2",
                 "--batch=16"])
    assert "sft: about 12 steps of 16 rows" in capsys.readouterr().out


@pytest.mark.parametrize("flags, said", [
    (["--size=7B", "--rolout_batch=8"], "--rolout_batch"), (["--size=7B", "--model=x"], "--model"),
    (["--model=nowhere"], "nowhere"), (["--size=3B"], "3B")])
def test_a_mistake_is_one_line(flags, said, capsys):
    """As train.py's: what was got, status 2."""
    with pytest.raises(SystemExit) as stopped:
        memory.main(flags)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and said in lines[0], lines
