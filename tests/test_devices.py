"""A device that is not there: nothing is left behind on the CPU where a GPU samples, scores and trains by PPO.

`Elsewhere` wraps a CPU tensor and says that it lies on another device. Operations are done on the CPU; one that mixes
the two places is refused, as a GPU would. torch knows such tensors as "meta", the one device that every build has.
Float32 only: a module's `to(dtype)` does not reach what is wrapped.
"""
import contextlib
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import train
from conftest import GPUS, ROOT
from data import Tokenizer
from model import Recorded, generate, load_llama, recording_stream
from reward import build_models

PLACE = torch.device("meta")


class Elsewhere(torch.Tensor):
    """A tensor on the device that is not there."""

    @staticmethod
    def __new__(cls, here):
        about = dict(strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=PLACE)
        self = torch.Tensor._make_wrapper_subclass(cls, here.shape, **about)
        self.here = here
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return do(func, args, kwargs or {})

    def tolist(self):
        return self.here.tolist()


class Placing(TorchDispatchMode):
    """Inside, what asks for the other device gets it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return do(func, args, kwargs or {})


def do(func, args, kwargs):
    """One operation: unwrap, do it on the CPU, wrap what belongs elsewhere."""
    name, to = func.overloadpacket.__name__, kwargs.get("device") and torch.device(kwargs["device"])
    if to != PLACE and not any(isinstance(x, Elsewhere) for x in tree_leaves((args, kwargs))):
        return func(*args, **kwargs)
    indexed = name in ("index", "index_put_") and isinstance(args[0], Elsewhere)         # by indices of either place
    together = tree_leaves((args[0], args[2:]) if indexed else (args, kwargs))
    there = any(isinstance(x, Elsewhere) for x in together)
    here = any(type(x) in (torch.Tensor, torch.nn.Parameter) and x.dim() for x in together)    # (single numbers may mix)
    if name not in ("_to_copy", "copy_") and here and there:
        raise RuntimeError(f"{func}: one tensor is on the CPU, another is not")
    unwrap = lambda x: x.here if isinstance(x, Elsewhere) else x
    out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs) | ({"device": "cpu"} if to else {}))
    if name == "copy_" or name.endswith("_") and not name.endswith("__"):
        return args[0]
    with torch.inference_mode(False):      # (or a wrapped view of an ordinary tensor could not be made in inference)
        return tree_map(lambda x: Elsewhere(x) if isinstance(x, torch.Tensor) and to in (None, PLACE) else x, out)


@pytest.fixture
def elsewhere(monkeypatch):
    """The device; what torch itself decides by a device's name, it decides as for a GPU without autocast."""
    asked, tensor = torch.is_autocast_enabled, torch.tensor
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device != PLACE.type and asked(device))
    monkeypatch.setattr(torch, "tensor", lambda data, device="cpu", **more: tensor(data, **more).to(device))
    with Placing():
        yield PLACE


def test_the_device_that_is_not_there_refuses_to_mix(elsewhere):
    x = torch.arange(6.0).view(2, 3).to(elsewhere)
    assert x.device == (x + 1).device == elsewhere and x.sum().item() == 15 and (x * torch.tensor(2.0)).sum() == 30
    assert x.to("cpu").tolist() == [[0, 1, 2], [3, 4, 5]] and torch.ones(2, device=elsewhere).device == elsewhere
    with pytest.raises(RuntimeError, match="one tensor is on the CPU"):
        x + torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="one tensor is on the CPU"):
        torch.ones(3) + x.sum()
    with pytest.raises(RuntimeError, match="one tensor is on the CPU"):
        torch.ones(9)[torch.arange(3, device=elsewhere)]


def test_sampling_on_another_device(tiny, elsewhere):
    """Refilled places, leaving rows, limits, top_p: the ids that the CPU samples."""
    prompts, limits = [[1] + [5 + i] * (1 + i % 4) for i in range(12)], [1 + (7 * i) % 20 for i in range(12)]
    here, there = load_llama(tiny / "sft"), load_llama(tiny / "sft", elsewhere)
    assert there.device == elsewhere
    for options in ({}, {"batch_size": 3, "limits": limits}, {"temperature": 0.7, "top_p": 0.8}):
        assert generate(there, prompts, 20, seed=3, **options) == generate(here, prompts, 20, seed=3, **options)


class Alone(torch.nn.Module):
    """What DistributedDataParallel is to one process."""

    def __init__(self, module):
        super().__init__()
        self.module, self.forward, self.no_sync = module, module.forward, contextlib.nullcontext


@pytest.mark.parametrize("reward, flags", [("reward", []), ("reward_adapter", ["--lora_rank=0"]),
                                           ("reward_adapter", ["--regularizer_mode=loss", "--checkpoint_activations"])])
def test_a_step_of_ppo_on_another_device(tiny, elsewhere, reward, flags):
    """Sampling, scoring by the four models on one or two trunks, losses, gradients and an optimiser step: what is logged
    of two steps is what the CPU logs, to rounding."""
    cfg = train.parse(["--stage=ppo", f"--model={tiny / 'sft'}", f"--reward={tiny / reward}", "--prompts=-",
                       "--rollout_batch=8", "--minibatch=4", "--micro_batch=2", "--response_len=8", "--dtype=float32",
                       "--lora_alpha=16", *flags])
    tokenizer = Tokenizer(tiny / "sft" / "tokenizer.model")
    inputs = SimpleNamespace(tokenizer=tokenizer, banned_ids=tokenizer.banned_ids(tokenizer.vocab_size),
                             prompts=[[1] + [5 + i] * (1 + i % 4) for i in range(12)])
    rows = []
    for device in ("cpu", elsewhere):
        torch.manual_seed(0)
        net, reward_model = build_models(cfg.model, cfg.reward, device, torch.float32, inputs.banned_ids, cfg.lora_rank,
                                         cfg.lora_alpha)
        with torch.no_grad():                                  # (an adapter begins with random numbers of its device)
            for p, q in zip(train.trainable(net), start if rows else train.trainable(net), strict=True):
                p.copy_(q)
        start = [p.detach().clone() for p in train.trainable(net)]
        net.policy.checkpoint_activations = net.critic.checkpoint_activations = cfg.checkpoint_activations
        optimizer = torch.optim.SGD(train.trainable(net), lr=1e-3, foreach=False)
        for step in (1, 2):
            row, _ = train.ppo_step(cfg, step, net, Alone(net).eval(), reward_model, optimizer, inputs, 0.02)
            rows.append({k: v for k, v in row.items() if not k.endswith("seconds")})
    assert rows[0] == pytest.approx(rows[2], rel=1e-3, abs=1e-5)
    assert rows[1] == pytest.approx(rows[3], rel=1e-3, abs=1e-5) and rows[1]["score"] != rows[0]["score"]


@pytest.mark.parametrize("gpus, processes, device, backend", [(2, 2, "cuda:1", "nccl"), (4, 2, "cuda:1", "nccl"),
                                                              (1, 2, "cuda:0", "gloo"), (0, 2, "cpu", "gloo")])
def test_each_process_finds_its_gpu(monkeypatch, capsys, gpus, processes, device, backend):
    """The last of two processes on a machine with so many GPUs. NCCL refuses two processes on one GPU, so that they share
    it over gloo: the README's command runs on a machine with one GPU, too, and says so. (torchrun's variables; RANK is
    0, or nothing would be printed.)"""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: chosen.append(f"cuda:{i}"))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "init_process_group",
                        lambda backend, timeout, device_id=None: chosen.extend([backend, device_id]))
    for name, value in (("LOCAL_RANK", processes - 1), ("LOCAL_WORLD_SIZE", processes), ("WORLD_SIZE", processes), ("RANK", 0)):
        monkeypatch.setenv(name, str(value))
    assert train.start_processes() == device
    assert chosen == [device] * (gpus > 0) + [backend, torch.device(device) if backend == "nccl" else None]
    assert ("2 processes for 1 GPU: they share" in capsys.readouterr().out) == (gpus == 1)


def on_a_gpu(program, *arguments):
    """Run a program that may see the GPU, which all other tests hide; skip where there is none. -> what it prints"""
    if not shutil.which("nvidia-smi"):
        pytest.skip("there is no GPU")
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    environment |= {} if GPUS is None else {"CUDA_VISIBLE_DEVICES": GPUS}
    start = "import sys, torch; torch.cuda.is_available() or sys.exit(77); " + program
    done = subprocess.run([sys.executable, "-c", start, *arguments], cwd=ROOT, env=environment, capture_output=True,
                          text=True)
    if done.returncode == 77:
        pytest.skip("torch finds no GPU")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("reward, flags", [("reward", ["--dtype=float32"]), ("reward", []),
                                           ("reward_adapter", ["--regularizer_mode=loss", "--checkpoint_activations"])])
def test_a_gpu_runs_ppo(tiny, tmp_path, reward, flags):
    """Three steps, the first of which checks itself (KL 0, ratio 1, sampled log-probabilities equal to recomputed ones), in
    float32 and in bfloat16."""
    printed = on_a_gpu(
        "import train; train.main(sys.argv[1:])", "--stage=ppo", f"--model={tiny / 'sft'}", f"--reward={tiny / reward}",
        f"--prompts={ROOT / 'toy' / 'unlabeled.json'}", f"--out={tmp_path / 'out'}", "--steps=3", "--rollout_batch=8",
        "--minibatch=4", "--micro_batch=2", "--prompt_len=60", "--response_len=12", *flags)
    assert printed.count("step ") == 3 and (tmp_path / "out" / "policy" / "adapter_model.safetensors").is_file()


def test_a_step_is_recorded_on_the_gpu_of_its_model(monkeypatch):
    """Which need not be the current one: on another GPU's stream the recording would be empty, and its replay do nothing.
    (torch's classes are stood in for; the next test records for real.)"""
    device, log = torch.device("cuda:1"), []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: log.append("replay")))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: SimpleNamespace(device=device))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool=None, stream=None, capture_error_mode="global":
                        log.append(getattr(stream, "device", None)) or contextlib.nullcontext())
    recording_stream.cache_clear()
    step, again, other = (Recorded(lambda: log.append("step"), torch.device(d)) for d in ("cuda:1", "cuda:1", "cuda:0"))
    for _ in range(3):
        step(8, 64)
    assert log == ["step", device, "step", "replay", "replay"]
    assert step.stream is again.stream is not other.stream           # cuBLAS keeps memory for each stream
    recording_stream.cache_clear()


RECORDED = """
from model import Llama, generate, load_llama
prompts, limits = [[1] + [5 + i] * (1 + i % 4) for i in range(24)], [1 + (17 * i) % 90 for i in range(24)]
replay, replays = torch.cuda.CUDAGraph.replay, []
torch.cuda.CUDAGraph.replay = lambda graph: replays.append(graph) or replay(graph)
last = f"cuda:{torch.cuda.device_count() - 1}"      # (with several GPUs not the current one)
for Llama.cuda_graphs, device in ((True, last), (False, last), (True, "cpu")):
    print(len(replays), *generate(load_llama(sys.argv[1], device), prompts, 90, seed=3, eos_id=-1, batch_size=8, limits=limits))
"""


def test_a_gpu_draws_the_same_tokens_with_and_without_recordings(tiny):
    """In float32, with places that are refilled and rows that leave; and the tokens that the CPU draws."""
    recorded, plain, cpu = (line.split(" ", 1) for line in on_a_gpu(RECORDED, str(tiny / "sft")).splitlines())
    assert recorded[1] == plain[1] == cpu[1] and recorded[0] == "0" and int(plain[0]) > 100 and cpu[0] == plain[0]
