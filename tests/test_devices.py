"""A device that is not there: nothing is left behind on the CPU where a GPU samples, scores and
trains by PPO.

`Elsewhere` wraps a CPU tensor and says that it lies on another device. Operations are done on the
CPU; one that mixes the two places is refused, as a GPU would. torch knows such tensors as "meta",
the one device that every build has. Float32 only: a module's `to(dtype)` does not reach what is
wrapped.
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
from ppo import rollout_statistics, with_advantages
from reward import build_models

PLACE = torch.device("meta")


class Elsewhere(torch.Tensor):
    """A tensor on the device that is not there."""

    @staticmethod
    def __new__(cls, here):
        about = dict(strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
                     device=PLACE)
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


def is_here(x):
    """Whether something is a tensor of the CPU that cannot mix (a single number may)."""
    return type(x) in (torch.Tensor, torch.nn.Parameter) and x.dim() > 0


def is_there(x):
    return isinstance(x, Elsewhere)


def unwrap(x):
    return x.here if is_there(x) else x


def do(func, args, kwargs):
    """One operation: unwrap, do it on the CPU, wrap what belongs elsewhere."""
    name = func.overloadpacket.__name__
    to = torch.device(kwargs["device"]) if kwargs.get("device") else None
    if to != PLACE and not any(map(is_there, tree_leaves((args, kwargs)))):
        return func(*args, **kwargs)
    together = tree_leaves((args, kwargs))
    if name in ("index", "index_put_") and is_there(args[0]):      # by indices of either place
        together = tree_leaves((args[0], args[2:]))
    mixed = any(map(is_here, together)) and any(map(is_there, together))
    if mixed and name not in ("_to_copy", "copy_"):
        raise RuntimeError(f"{func}: one tensor is on the CPU, another is not")
    if to:
        kwargs = kwargs | {"device": "cpu"}
    out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if name == "copy_" or name.endswith("_") and not name.endswith("__"):
        return args[0]

    def wrap(x):
        return Elsewhere(x) if isinstance(x, torch.Tensor) and to in (None, PLACE) else x

    # (or a wrapped view of an ordinary tensor could not be made in inference)
    with torch.inference_mode(False):
        return tree_map(wrap, out)


@pytest.fixture
def elsewhere(monkeypatch):
    """The device; what torch itself decides by a device's name, it decides as for a GPU without
    autocast."""
    asked, tensor = torch.is_autocast_enabled, torch.tensor

    def is_autocast_enabled(device):
        return device != PLACE.type and asked(device)

    def make_tensor(data, device="cpu", **more):
        return tensor(data, **more).to(device)

    monkeypatch.setattr(torch, "is_autocast_enabled", is_autocast_enabled)
    monkeypatch.setattr(torch, "tensor", make_tensor)
    with Placing():
        yield PLACE


def test_the_device_that_is_not_there_refuses_to_mix(elsewhere):
    """The stand-in itself: it computes, moves to and fro, and finds what was left behind."""
    x = torch.arange(6.0).view(2, 3).to(elsewhere)
    assert x.device == (x + 1).device == elsewhere and x.sum().item() == 15
    assert (x * torch.tensor(2.0)).sum() == 30
    assert x.to("cpu").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.ones(2, device=elsewhere).device == elsewhere
    with pytest.raises(RuntimeError, match="one tensor is on the CPU"):
        x + torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="one tensor is on the CPU"):
        torch.ones(3) + x.sum()
    with pytest.raises(RuntimeError, match="one tensor is on the CPU"):
        torch.ones(9)[torch.arange(3, device=elsewhere)]


PROMPTS = [[1] + [5 + i] * (1 + i % 4) for i in range(12)]


@pytest.mark.parametrize("limits, options", [
    (20, {}), ([1 + (7 * i) % 20 for i in range(12)], {"batch_size": 3}),
    (20, {"temperature": 0.7, "top_p": 0.8})])
def test_sampling_on_another_device(tiny, elsewhere, limits, options):
    """Refilled places, leaving rows, limits, top_p: the ids that the CPU samples."""
    here, there = load_llama(tiny / "sft"), load_llama(tiny / "sft", elsewhere)
    assert there.device == elsewhere
    expected = generate(here, PROMPTS, limits, seed=3, **options)
    assert generate(there, PROMPTS, limits, seed=3, **options) == expected


class Alone(torch.nn.Module):
    """What DistributedDataParallel is to one process."""

    def __init__(self, module):
        super().__init__()
        self.module, self.forward, self.no_sync = module, module.forward, contextlib.nullcontext


def ppo_step(cfg, step, net, reward_model, optimizer, inputs):
    """A step of train.ppo without its run folder -> what is logged of it."""
    prompts, samples = train.respond(cfg, step, net, inputs)
    rollout = train.collect(cfg, step, net, reward_model, inputs, prompts, samples)
    rollout = with_advantages(rollout, cfg.regularizer_in("reward"), cfg.kl_coef,
                              cfg.missing_eos_penalty, cfg.gamma, cfg.lam, cfg.whiten_rewards)
    stats = train.update(cfg, step, Alone(net).eval(), optimizer, rollout)
    return rollout_statistics(rollout) | stats


@pytest.mark.parametrize("reward, flags", [
    ("reward", []), ("reward_adapter", ["--lora_rank=0"]),
    ("reward_adapter", ["--regularizer_mode=loss", "--checkpoint_activations"])])
def test_a_step_of_ppo_on_another_device(tiny, elsewhere, reward, flags):
    """Sampling, scoring by the four models on one or two trunks, losses, gradients and an optimiser
    step: what is logged of two steps is what the CPU logs, to rounding."""
    command = train.parse([
        "--stage=ppo", f"--model={tiny / 'sft'}", f"--reward={tiny / reward}", "--prompts=-",
        "--rollout_batch=4", "--minibatch=2", "--micro_batch=1", "--ppo_epochs=1",
        "--response_len=6", "--dtype=float32", "--lora_alpha=16", *flags])
    cfg, tokenizer = command.configs["ppo"], Tokenizer(tiny / "sft" / "tokenizer.model")
    banned_ids = tokenizer.banned_ids(tokenizer.vocab_size)
    inputs = SimpleNamespace(tokenizer=tokenizer, banned_ids=banned_ids, rows=PROMPTS)
    logged, start = [], None
    for device in ("cpu", elsewhere):
        torch.manual_seed(0)
        net, reward_model = build_models(cfg.model, cfg.reward, device, torch.float32, banned_ids,
                                         cfg.lora_rank, cfg.lora_alpha)
        groups = [{"params": p, "name": name} for name, p in net.groups().items()]
        parameters = [p for group in groups for p in group["params"]]
        if start is None:
            start = [p.detach().clone() for p in parameters]
        with torch.no_grad():                # (an adapter begins with random numbers of its device)
            for p, q in zip(parameters, start, strict=True):
                p.copy_(q)
        recompute = cfg.checkpoint_activations
        net.policy.checkpoint_activations = net.critic.checkpoint_activations = recompute
        optimizer = torch.optim.SGD(groups, lr=1e-3, foreach=False)
        for step in (1, 2):
            logged.append(ppo_step(cfg, step, net, reward_model, optimizer, inputs))
    assert logged[0] == pytest.approx(logged[2], rel=1e-3, abs=1e-5)
    assert logged[1] == pytest.approx(logged[3], rel=1e-3, abs=1e-5)
    assert logged[0]["score"] != logged[1]["score"]


@pytest.mark.parametrize("gpus, processes, device, backend", [
    (2, 2, "cuda:1", "nccl"), (4, 2, "cuda:1", "nccl"), (1, 2, "cuda:0", "gloo"),
    (0, 2, "cpu", "gloo")])
def test_each_process_finds_its_gpu(monkeypatch, gpus, processes, device, backend):
    """The last of two processes on a machine with so many GPUs. NCCL refuses two processes on one
    GPU, so that they share it over gloo: the README's command runs on a machine with one GPU, too."""
    chosen = []

    def init_process_group(backend, timeout, device_id=None):
        chosen.extend([backend, device_id])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: chosen.append(f"cuda:{i}"))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    for name, value in (("LOCAL_RANK", processes - 1), ("LOCAL_WORLD_SIZE", processes),
                        ("WORLD_SIZE", processes), ("RANK", 0)):
        monkeypatch.setenv(name, str(value))
    assert train.start_processes() == device
    expected = [device] if gpus else []
    expected += [backend, torch.device(device) if backend == "nccl" else None]
    assert chosen == expected


def on_a_gpu(program, *arguments):
    """Run a program that may see the GPU, which all other tests hide; skip where there is none.
    -> what it prints"""
    if not shutil.which("nvidia-smi"):
        pytest.skip("there is no GPU")
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    if GPUS is not None:
        environment["CUDA_VISIBLE_DEVICES"] = GPUS
    start = "import sys, torch\nif not torch.cuda.is_available():\n    sys.exit(77)\n"
    done = subprocess.run([sys.executable, "-c", start + program, *arguments], cwd=ROOT,
                          env=environment, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("torch finds no GPU")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("reward, flags", [
    ("reward", ["--dtype=float32"]), ("reward", []),
    ("reward_adapter", ["--regularizer_mode=loss", "--checkpoint_activations"])])
def test_a_gpu_runs_ppo(tiny, tmp_path, reward, flags):
    """Three steps, the first of which checks itself (KL 0, ratio 1, sampled log-probabilities equal
    to recomputed ones), in float32 and in bfloat16."""
    printed = on_a_gpu(
        "import train\ntrain.main(sys.argv[1:])", "--stage=ppo", f"--model={tiny / 'sft'}",
        f"--reward={tiny / reward}", f"--prompts={ROOT / 'toy' / 'unlabeled.json'}",
        f"--out={tmp_path / 'out'}", "--steps=3", "--rollout_batch=8", "--minibatch=4",
        "--micro_batch=2", "--prompt_len=60", "--response_len=12", *flags)
    assert printed.count("step ") == 3
    assert (tmp_path / "out" / "policy" / "adapter_model.safetensors").is_file()


def test_a_step_is_recorded_on_the_gpu_of_its_model(monkeypatch):
    """Which need not be the current one: on another GPU's stream the recording would be empty, and
    its replay do nothing. The first call runs plainly (kernels are loaded), the second records and
    replays, the third replays. (torch's classes are stood in for; the next test records for
    real.)"""
    device, log = torch.device("cuda:1"), []

    def graph(graph, pool=None, stream=None, capture_error_mode="global"):
        log.append(getattr(stream, "device", None))
        return contextlib.nullcontext()

    def recording():
        return SimpleNamespace(replay=lambda: log.append("replay"))

    def stream_on(device=None):
        return SimpleNamespace(device=device)

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", recording)
    monkeypatch.setattr(torch.cuda, "Stream", stream_on)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    recording_stream.cache_clear()
    step, again, other = (Recorded(lambda: log.append("step"), torch.device(name))
                          for name in ("cuda:1", "cuda:1", "cuda:0"))
    for _ in range(3):
        step(8, 64)
    assert log == ["step", device, "step", "replay", "replay"]
    # (cuBLAS keeps memory for each stream)
    assert step.stream is again.stream is not other.stream
    recording_stream.cache_clear()


def test_what_has_other_shapes_is_recorded_apart(monkeypatch):
    """A recording works on the shapes that it was made with: two in turn are two recordings, each
    made when its shapes come for the second time."""
    log, made = [], []

    def recording():
        number = len(made)
        made.append(number)
        return SimpleNamespace(replay=lambda: log.append(number))

    monkeypatch.setattr("model.recording_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", recording)
    step = Recorded(lambda: None, torch.device("cuda:0"))
    for shapes in ((8, 64), (8, 128)) * 3:
        step(*shapes)
    assert log == [0, 1, 0, 1] and made == [0, 1]


def test_nothing_is_recorded_on_a_cpu_under_autocast_or_when_it_is_switched_off(monkeypatch):
    """Autocast keeps casts of its own, which a recording would not find again."""
    monkeypatch.setattr("model.recording_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")

    def able(device):
        return Recorded(lambda: None, torch.device(device)).able

    assert able("cuda:0") and not able("cpu")
    with monkeypatch.context() as inside:
        inside.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert not able("cuda:0")
    monkeypatch.setattr(Recorded, "enabled", False)
    assert not able("cuda:0")


RECORDED = """
from model import Recorded, generate, load_llama
prompts = [[1] + [5 + i] * (1 + i % 4) for i in range(24)]
limits = [1 + (17 * i) % 90 for i in range(24)]
replay, replays = torch.cuda.CUDAGraph.replay, []

def counted(graph):
    replays.append(graph)
    return replay(graph)

torch.cuda.CUDAGraph.replay = counted
last = f"cuda:{torch.cuda.device_count() - 1}"      # (with several GPUs not the current one)
for Recorded.enabled, device in ((True, last), (False, last), (True, "cpu")):
    before, model = len(replays), load_llama(sys.argv[1], device)
    ids = generate(model, prompts, limits, seed=3, eos_id=-1, batch_size=8)
    print(len(replays) - before, *ids)
"""


def test_a_gpu_draws_the_same_tokens_with_and_without_recordings(tiny):
    """In float32, with places that are refilled and rows that leave; and the tokens that the CPU
    draws."""
    printed = on_a_gpu(RECORDED, str(tiny / "sft")).splitlines()
    recorded, plain, cpu = (line.split(" ", 1) for line in printed)
    assert recorded[1] == plain[1] == cpu[1]
    assert int(recorded[0]) > 100 and plain[0] == cpu[0] == "0"


SLIVERS = """
from model import BANNED, sample
logits = torch.full((32000,), BANNED, device="cuda")
logits[::64] = torch.randn(500, generator=torch.Generator().manual_seed(0)).cuda()
drawn = torch.zeros(32000, dtype=torch.int64)
for _ in range(200):
    ids, logprobs = sample(logits.expand(1024, -1), torch.rand(1024, device="cuda"))
    assert logprobs.isfinite().all()
    drawn += torch.bincount(ids.cpu(), minlength=32000)
print(int(drawn.view(500, 64)[:, 1:].sum()))
"""


def test_a_gpu_draws_no_banned_id():
    """200,000 draws among 500 ids with 63 banned ones, of probability 0, between each two: sums
    that are rounded apart give those slivers of probability (see test_model.py)."""
    assert on_a_gpu(SLIVERS) == "0\n"
