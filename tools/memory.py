"""The memory bill of a run before it is started: for each stage what is trained, the memory of one
process by item, and the number of steps.

    python tools/memory.py --stage ppo --model LLAMA_DIR --rollout_batch 128       train.py's flags
    python tools/memory.py --size 7B --processes 2 --checkpoint_activations        without any file

Of --model only config.json is read, of the data, if they are there, the number of rows.
Micro-batches are taken to be full of rows of the greatest length, the reward model to be as large
as the model, and the evaluation's prompts to be no longer than --prompt_len. Numbers are of torch's
tensors: what a GPU needs for itself, about 0.5 GB, comes on top. 1 GB is 10^9 bytes.

Legend   D width, F width of SwiGLU, V vocabulary
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import read_rows                                                           # noqa: E402
from eval import Parser, mistakes_in_one_line                                        # noqa: E402
from lora import add_lora, lora_parameters                                           # noqa: E402
from model import MAX_LOGITS, InputError, Llama, LlamaConfig, read_model_config      # noqa: E402
from reward import is_adapter                                                        # noqa: E402
from train import TOY_MODEL, parse                                                   # noqa: E402

SIZES = {"7B": LlamaConfig(),
         "1.1B": LlamaConfig(32000, 2048, 22, 32, 4, 5632)}      # TinyLlama's


@dataclass(frozen=True)
class Layout:
    """A way to hold a stage's models: trained parameters, and bytes by item."""
    name: str
    trained: int
    held: dict           # all the time
    sampling: dict       # while responses are sampled (PPO alone)
    updating: dict       # in an update; scoring needs less

    @property
    def peak(self):
        """Sampling and updating alternate."""
        return sum(self.held.values()) + max(sum(self.sampling.values()),
                                             sum(self.updating.values()))


# ------------------------------------------------------------------------------------ what is held

def count_parameters(config, lm_head=True):
    """Of a LLaMA, counted on tensors without storage."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config, lm_head).parameters())


def count_adapter(config, rank):
    """Of one adapter of a rank."""
    with torch.device("meta"):
        model = Llama(config)
        add_lora(model, "one", rank, 1.0)
    return sum(p.numel() for p in lora_parameters(model, "one"))


def held(frozen, trained, cast=0):
    """frozen, cast: bytes of the weights that do not train, and of copies in another dtype.
    trained: parameters, each with its gradient and Adam's two moments in float32."""
    return {"frozen weights": frozen, "trained weights, gradients, Adam": 16 * trained,
            "weights cast by autocast": cast}


# ----------------------------------------------------------------------------- what an update keeps

def saved_bytes(config, size, full, on_cpu, rank=0, dropout=0.0):
    """Bytes that one token in one layer keeps for the backward pass, `size` of them per number.

    Read off model.Block: each norm keeps its input and a scale in float32, attention q, k, v, its
    result and a float32 per head, SwiGLU w1 x, silu(w1 x) and w3 x. A linear layer keeps its input
    where its weight or its adapter trains: with adapters that is the normed row of wq, wk and wv,
    and wo's, which is attention's result (on a CPU a copy of it). Dropout makes a row and a mask
    (on a CPU of numbers) for each of the four. full: all weights train, in float32: the norms keep
    the normed row, too; in autocast each linear layer keeps its own bfloat16 copy of its input.
    """
    c = config
    heads, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    kept = 2 * (4 * c.dim + 4) + size * (2 * heads + 2 * kv + 3 * c.ffn_dim) + 4 * c.n_heads
    mask = 1
    if on_cpu:
        kept, mask = kept + size * heads, size
    if full:
        inputs = 2 if size == 4 else 5         # of wq, wk, wv and of w1, w3, or a copy for each
        return kept + 2 * 4 * c.dim + size * (inputs * c.dim + c.ffn_dim)
    if dropout:
        return kept + (size + mask) * (3 * c.dim + heads) + size * 4 * rank
    return kept + size * (c.dim + 4 * rank)


def updating(cfg, config, dtype, on_cpu, graphs, rows, tokens, read):
    """Activations and logits of a micro-batch. graphs: forward passes that are kept at once; rows
    of `tokens` tokens, padding included, of which `read` predict something."""
    c, size, full = config, dtype.itemsize, not cfg.lora_rank
    n = rows * tokens
    layer = n * saved_bytes(c, size, full, on_cpu, cfg.lora_rank, cfg.lora_dropout)
    kept, anew = c.n_layers * layer, 0
    if cfg.checkpoint_activations:             # each layer's input; one layer is computed anew
        stream = 4 if full else size
        kept, anew = c.n_layers * n * c.dim * stream, layer
    ends = 4 * c.dim * (n + rows * read)       # the last norm's input, the heads'
    backward = 4 * n * c.ffn_dim * size        # gradients within SwiGLU
    # scoring holds eight float32 tensors at once: logits and log-probabilities of policy and
    # reference, and what their divergence is made of
    logits = min(rows * read * c.vocab_size, max(MAX_LOGITS, c.vocab_size))
    return {"activations of a micro-batch": graphs * (kept + ends) + anew + backward,
            "logits, in chunks": logits * (8 * 4 + size)}


# ------------------------------------------------------------------------------------- the layouts

def supervised_layout(cfg, config, dtype, on_cpu, reward):
    """Of the sft stage or (reward) the reward stage, where a micro-batch is of pairs."""
    r, rows, read = cfg.lora_rank, cfg.micro_batch, cfg.max_len
    if reward:
        rows, read = 2 * rows, 0
    moving = updating(cfg, config, dtype, on_cpu, 1, rows, cfg.max_len, read)
    if r:
        frozen, adapter = count_parameters(config) * dtype.itemsize, count_adapter(config, r)
        return Layout("LoRA", adapter, held(frozen, adapter), {}, moving)
    numbers = count_parameters(config, lm_head=not reward)
    cast = numbers * dtype.itemsize if dtype.itemsize < 4 else 0
    return Layout("all weights", numbers, held(0, numbers, cast), {}, moving)


def ppo_layouts(cfg, config, dtype, on_cpu, processes):
    """Of the ppo stage: --reward an adapter on --model, or a model of its own."""
    r, size = cfg.lora_rank, dtype.itemsize
    policy, trunk = count_parameters(config), count_parameters(config, lm_head=False)
    if r:
        numbers = 2 * count_adapter(config, r)
        frozen, second, cast = policy * size, trunk * size, 0
    else:                                      # the reference is in float32, as the policy
        numbers = policy + trunk
        frozen, second, cast = 4 * policy, trunk * size, 0 if size == 4 else numbers * size
    length = cfg.prompt_len + cfg.response_len
    moving = updating(cfg, config, dtype, on_cpu, 2, cfg.micro_batch, length, cfg.response_len)
    drawing = sampling(cfg, config, size, on_cpu, cfg.rollout_batch // processes)
    trained = numbers + config.dim + 1         # (with the head of the critic)
    return [Layout("one trunk", trained, held(frozen, numbers, cast), drawing, moving),
            Layout("two trunks", trained, held(frozen + second, numbers, cast), drawing, moving)]


def sampling(cfg, config, size, on_cpu, rows):
    """Keys and values of all rows that are decoded at once; their prompts, of which SwiGLU holds
    two rows of D and three of F; logits with their probabilities and cumulative sums (which are
    float64 on a GPU, see model.sample)."""
    c, rows = config, min(cfg.generate_batch or rows, rows)
    slots = rows * (cfg.prompt_len + cfg.response_len)
    return {"KV cache": 2 * c.n_layers * c.n_kv_heads * c.head_dim * slots * size,
            "prompts' activations": rows * cfg.prompt_len * (2 * c.dim + 3 * c.ffn_dim) * size,
            "logits of one token per row": rows * c.vocab_size * (16 if on_cpu else 24)}


def layouts(stage, cfg, config, device="cuda", processes=1):
    """-> the Layouts of a stage; of PPO both, whatever --reward is."""
    auto = "float32" if device == "cpu" else "bfloat16"
    dtype = getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype)
    if stage == "ppo":
        return ppo_layouts(cfg, config, dtype, device == "cpu", processes)
    return [supervised_layout(cfg, config, dtype, device == "cpu", stage == "reward")]


# ------------------------------------------------------------------------------------------ main

def steps(stage, cfg):
    """How many steps of what."""
    if stage == "ppo":
        updates = cfg.ppo_epochs * cfg.rollout_batch // cfg.minibatch
        return f"{cfg.steps} steps of {cfg.rollout_batch} responses and {updates} updates"
    n, path = cfg.steps, Path(cfg.sft_data if stage == "sft" else cfg.preference_data)
    if not n and path.is_file():
        n = max(1, round(cfg.epochs * len(read_rows(path)) / cfg.batch))
    if not n:
        return f"{cfg.epochs:g} passes over the data, {cfg.batch} rows a step"
    return f"about {n} steps of {cfg.batch} rows"


def layout_of(command):
    """The name of the layout that PPO will have; "" where --reward is not there yet."""
    if "reward" in command.configs:
        return "one trunk" if command.configs["reward"].lora_rank else "two trunks"
    path = Path(command.configs["ppo"].reward)
    if not path.is_dir():
        return ""
    return "one trunk" if is_adapter(path) else "two trunks"


def show(layout, total):
    share = 100 * layout.trained / total
    print(f"  {layout.name}: {layout.trained:,} parameters are trained ({share:.3f} %)")
    for about, items in (("", layout.held), ("sampling: ", layout.sampling),
                         ("update: ", layout.updating)):
        for item, n in items.items():
            if n:
                print(f"    {about + item:44}{n / 1e9:10.3f} GB")
    print(f"    {'at most at one time':44}{layout.peak / 1e9:10.3f} GB\n")


def read_command(argv):
    """Our own flags, and train.py's with names in place of data that are not there -> both."""
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                    epilog="And all flags of train.py: see python train.py --help.")
    parser.add_argument("--size", choices=SIZES, help="of a model without files, not --model")
    parser.add_argument("--processes", type=int, default=1, help="that share the work (default: 1)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="what the run will be on (default: cuda)")
    parser.add_argument("--model", default="", help="as train.py's")
    parser.add_argument("--stage", default="all", help="as train.py's")
    own, rest = parser.parse_known_args(argv)
    if own.size and own.model:
        raise InputError("got --size and --model: expected one of them")
    flags = [f"--stage={own.stage}"]
    if own.size or own.model:
        flags.append(f"--model={own.model or own.size}")
        flags += [f"--{name}=?" for name in ("sft_data", "preference_data", "prompts")]
        if own.stage == "ppo":
            flags.append("--reward=?")
    return own, parse(flags + rest)


def main(argv=None):
    with mistakes_in_one_line("memory.py"):
        own, command = read_command(sys.argv[1:] if argv is None else argv)
        config = TOY_MODEL
        if own.size:
            config = SIZES[own.size]
        elif own.model:
            config = read_model_config(own.model)
        total = count_parameters(config)
        print(f"{total:,} parameters in the model; processes {own.processes}, the bill of one, "
              f"on {own.device}\n")
        for stage, cfg in command.configs.items():
            print(f"{stage}: {steps(stage, cfg)}")
            this = layout_of(command) if stage == "ppo" else ""
            for layout in layouts(stage, cfg, config, own.device, own.processes):
                if this in ("", layout.name):
                    show(layout, total)


if __name__ == "__main__":
    main()
