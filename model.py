"""LLaMA: layers, log-probabilities, KV cache and sampler, files (Touvron et al., arXiv 2302.13971,
2307.09288).

This is the network that everything else trains or reads. Its layers do not know that LoRA exists:
`lora.py` swaps some of its linear layers for layers that know.

Legend   B batch, T tokens, V vocabulary, D width, H query heads, K key/value heads, d head width,
         S slots of the KV cache that a step reads, N tokens of a whole batch laid end to end

    tokens (B, T) -> tok_embeddings -> x (B, T, D)
    n_layers times:  x = x + attention(attention_norm(x))
                     x = x + feed_forward(ffn_norm(x))
    norm -> `hidden` (B, T, D) -> output -> logits (B, T, V)

Decisions that are easy to get wrong:
1. Names are Meta's (wq, w1, attention_norm). The order of rotary pairs inside a head is Hugging
   Face's (first half, second half), so Hugging Face weights load by renaming alone; Meta's files
   interleave the pairs, and tools/convert.py permutes their rows once.
2. Padding is on the right only. With a causal mask no real token can see it, so training builds no
   mask.
3. A token costs one uniform number (inverse CDF), keyed by (seed, row): what a row samples depends
   neither on its batch mates nor on how many processes share the work.
"""
import hashlib
import itertools
import json
import math
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BANNED = -1e30             # logit of an id that is never drawn: finite, since 0 * infinity is NaN
MAX_LOGITS = 1 << 22       # made at one time, in float32: 16 MiB


class InputError(ValueError):
    """A user's mistake, in one line: what was got, what was expected, what to do.

    `main` of train.py and eval.py prints it and ends with status 2; a bug keeps its traceback."""


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a LLaMA. The defaults are LLaMA-7B: 6,738,415,616 parameters."""
    vocab_size: int = 32000
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None      # None: as many as n_heads (no grouped-query attention)
    ffn_dim: int = 11008
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_seq_len: int = 2048
    tie_embeddings: bool = False
    head_dim: int | None = None        # None: dim / n_heads

    def __post_init__(self):
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)


# ---------------------------------------------------------------------------------------- layers

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, statistics in float32 (Zhang & Sennrich, 1910.07467)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_angles(positions, head_dim, theta):
    """cos and sin of position * theta^(-2i/d), float32 (RoFormer, eq. 15). (..,) -> (.., d/2)
    each."""
    i = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[..., None] * theta ** (-i / head_dim)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i + d/2}) of every head by its position's angle.

    x (B, H, T, d); cos, sin (.., 1, T, d/2)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(q, k, v, mask=None):
    """softmax(q k' / sqrt d + mask) v; causal without a mask. q (B, H, T, d); k, v (B, K, S, d):
    with K < H each key/value head serves a group of query heads."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                          enable_gqa=grouped)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.wq = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=False)
        self.wk = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.wv = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.wo = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)

    def forward(self, x, cos, sin, cache=None, layer=0):
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.wq(x).view(heads).transpose(1, 2), cos, sin)             # (B, H, T, d)
        k = rotate(self.wk(x).view(heads).transpose(1, 2), cos, sin)             # (B, K, T, d)
        v = self.wv(x).view(heads).transpose(1, 2)                               # (B, K, T, d)
        if cache is None:
            out = attend(q, k, v)
        else:
            out = cache.attend(layer, q, k, v)
        return self.wo(out.transpose(1, 2).flatten(2))                           # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x); w1 is the gate, w3 goes up, w2 down (Shazeer, 2002.05202)."""

    def __init__(self, c):
        super().__init__()
        self.w1 = nn.Linear(c.dim, c.ffn_dim, bias=False)
        self.w2 = nn.Linear(c.ffn_dim, c.dim, bias=False)
        self.w3 = nn.Linear(c.dim, c.ffn_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and added to the stream x."""

    def __init__(self, c):
        super().__init__()
        self.attention_norm = RMSNorm(c.dim, c.norm_eps)
        self.attention = Attention(c)
        self.ffn_norm = RMSNorm(c.dim, c.norm_eps)
        self.feed_forward = FeedForward(c)

    def forward(self, x, cos, sin, cache=None, layer=0):
        x = x + self.attention(self.attention_norm(x), cos, sin, cache, layer)
        return x + self.feed_forward(self.ffn_norm(x))


def no_context(block):
    """Nothing around a checkpointed block, neither in the forward nor in its recomputation."""
    return nullcontext(), nullcontext()


class Llama(nn.Module):
    """The transformer. `lm_head=False` leaves out the output matrix, as reward models do."""

    def __init__(self, config, lm_head=True):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False) if lm_head else None
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        self.tie()
        self.checkpoint_activations = False      # True: recompute each block in the backward pass
        self.checkpoint_context = no_context     # block -> (forward, recompute context); lora.py's

    def tie(self):
        """Make the output matrix the embedding matrix, if the config says so."""
        if self.output is not None and self.config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def hidden(self, tokens, cache=None):
        """tokens (B, T) int64 -> (B, T, D), after the final norm.

        With a cache: the tokens that it has been told to expect."""
        c = self.config
        if cache is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]          # (1, T)
        else:
            positions = cache.positions                                                    # (B, T)
        x = self.tok_embeddings(tokens)
        cos, sin = rope_angles(positions[:, None], c.head_dim, c.rope_theta)      # (.., 1, T, d/2)
        for i, layer in enumerate(self.layers):
            if self.checkpoint_activations and torch.is_grad_enabled():
                context = partial(self.checkpoint_context, layer)
                x = checkpoint(layer, x, cos, sin, use_reentrant=False, context_fn=context)
            else:
                x = layer(x, cos, sin, cache, i)
        return self.norm(x)

    def forward(self, tokens):
        """tokens (B, T) int64 -> logits (B, T, V); logits[:, t] are about token t + 1."""
        return self.output(self.hidden(tokens))

    @property
    def device(self):
        return self.tok_embeddings.weight.device


# ----------------------------------------------------------------------------- log-probabilities

def ban_mask(vocab_size, banned_ids, device="cpu"):
    """(V,) bool, True at the ids that are never sampled."""
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[[int(i) for i in banned_ids if 0 <= i < vocab_size]] = True
    return mask.to(device)


def masked_logits(head, states, banned_mask=None):
    """float32 logits (.., V) with BANNED at the ids of banned_mask (V,)."""
    logits = head(states).float()
    if banned_mask is None:
        return logits
    return logits.masked_fill(banned_mask, BANNED)


class TokenStats(NamedTuple):
    """What is known of N sampled tokens, in nats; of whole responses (B, R), 0 in the padding."""
    logprobs: Tensor              # (N,)
    entropy: Tensor | None        # (N,) of the next-token distribution; None in training
    ref_logprobs: Tensor | None   # (N,) if a reference was asked
    divergence: Tensor | None     # (N,) exact, differentiable, if a reference was asked
    values: Tensor | None = None  # (N,) of the states that predict the tokens, if there is a critic


def token_stats(head, banned_mask, ref_head, divergence, states, targets, ref_states):
    """The plain form: logits -> TokenStats of n targets. (Entropy is of interest without gradients
    alone.)"""
    logits = masked_logits(head, states, banned_mask)                            # (n, V)
    logp = F.log_softmax(logits, dim=-1)
    taken = logp.gather(-1, targets[:, None])[:, 0]
    entropy = ref_taken = diverged = None
    if not torch.is_grad_enabled():
        entropy = -(logp.exp() * logp).sum(-1)
    if ref_head is not None:
        with torch.no_grad():
            ref_logits = masked_logits(ref_head, ref_states, banned_mask)
            ref_taken = F.log_softmax(ref_logits, dim=-1).gather(-1, targets[:, None])[:, 0]
        diverged = divergence(logits, ref_logits)
    return TokenStats(taken, entropy, ref_taken, diverged)


class FrozenHeadLogprobs(torch.autograd.Function):
    """log softmax(W h)[target] of states h (N, D), for a head W (V, D) that does not train: its
    gradient is found on the way.

        d logp[target] / dh = W[target] - sum_v p_v W_v = (onehot - p) W

    What is kept for the backward pass is (N, D); no logits (N, V) are kept, or made twice."""

    @staticmethod
    def forward(ctx, states, targets, head, banned_mask, n):
        logprobs, slopes = [], []
        for h, target in zip(states.split(n), targets.split(n)):
            taken = torch.arange(len(h), device=h.device), target
            logp = F.log_softmax(masked_logits(head, h, banned_mask), dim=-1)    # (n, V)
            logprobs.append(logp[taken])
            p = logp.exp_()
            p[taken] -= 1
            slopes.append(p.to(h.dtype) @ head.weight)                           # (n, D), of -logp
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx, grad):
        slopes, = ctx.saved_tensors
        return -grad[:, None].to(slopes.dtype) * slopes, None, None, None, None


def response_logprobs(head, states, targets, banned_mask=None, ref=None, divergence=None,
                      max_logits=MAX_LOGITS):
    """Log-probability and entropy of each target, and what the reference says of it -> TokenStats.

    head: the output layer. states (N, D) predict the targets (N,). banned_mask (V,) bool: ids that
    the sampler never draws; the same ban applies here, or PPO's ratio would not be 1. ref: (head,
    states) of the frozen reference. divergence: function of both logits (n, V) -> (n,),
    differentiated with respect to the first. Logits are made `max_logits` at a time and not
    kept: a head that trains, or a divergence, makes them again in the backward pass.
    """
    n = max(1, max_logits // head.weight.shape[0])
    if torch.is_grad_enabled() and ref is None and not head.weight.requires_grad:
        # (the usual case: an update under LoRA)
        return TokenStats(FrozenHeadLogprobs.apply(states, targets, head, banned_mask, n),
                          None, None, None)
    ref_head, ref_states = ref or (None, states)             # (without a ref: to fill a place)
    of_some = partial(token_stats, head, banned_mask, ref_head, divergence)
    parts = list(zip(states.split(n), targets.split(n), ref_states.split(n)))
    if torch.is_grad_enabled():
        parts = [checkpoint(of_some, *part, use_reentrant=False) for part in parts]
    else:
        parts = [of_some(*part) for part in parts]
    return TokenStats(*(torch.cat(x) if x[0] is not None else None for x in zip(*parts)))


# -------------------------------------------------------------------------------------- sampling

def keyed_seed(*key):
    """An integer seed that belongs to this key (numbers, strings) alone, on any machine."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


def uniforms(seed, row, n):
    """n numbers in [0, 1) that belong to one row of one seed (a number or a string)."""
    return torch.rand(n, generator=torch.Generator().manual_seed(keyed_seed(seed, int(row))))


def nucleus(probs, top_p):
    """Zero all but the smallest set of most probable ids whose mass reaches top_p (1904.09751)."""
    p, ids = probs.sort(dim=-1, descending=True, stable=True)
    mass_before = p.double().cumsum(-1) - p
    return torch.zeros_like(probs).scatter(-1, ids, torch.where(mass_before < top_p, p, 0.0))


def sample(logits, u, temperature=1.0, top_p=1.0):
    """Inverse CDF: the first id whose cumulative probability exceeds u * total; below a temperature
    of 0.001: argmax.

    logits (B, V) float32, u (B,) -> ids (B,), and the log-probability of each (B,) at this
    temperature, before the nucleus is cut out, nats."""
    if temperature < 1e-3:
        return logits.argmax(-1), torch.zeros_like(u)
    probs = torch.softmax(logits / temperature, dim=-1)
    if top_p < 1:
        probs = nucleus(probs, top_p)
    # a GPU adds up in parallel and rounds each sum another way: ids of probability 0 get slivers,
    # which in float32 are wide enough for a u to hit
    exact_enough = torch.float64 if probs.is_cuda else torch.float32
    cumulative = probs.cumsum(-1, dtype=exact_enough)
    ids = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)
    ids = ids.clamp(max=logits.shape[1] - 1)                   # (of NaN, which `Decoder` reports)
    return ids[:, 0], probs.gather(1, ids)[:, 0].log()


def pad_right(rows):
    """Lists of numbers of any lengths -> (B, T), padded with zeros: only masks decide."""
    width = max(map(len, rows))
    return torch.tensor([list(row) + [0] * (width - len(row)) for row in rows])


@contextmanager
def eval_mode(model):
    """Dropout off inside; the earlier mode is restored on exit."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class Samples(NamedTuple):
    """What was drawn for each prompt, in the order of the prompts."""
    responses: list       # lists of ids, each up to and including its first EOS
    logprobs: list        # lists of floats: the log-probability with which each id was drawn, nats


def generate(model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, eos_id=2, seed=0,
             banned_ids=(0, 1), **more):
    """sample_responses without the log-probabilities -> a list of lists of ids."""
    return sample_responses(model, prompts, max_new_tokens, temperature, top_p, eos_id, seed,
                            banned_ids, **more).responses


@torch.inference_mode()
def sample_responses(model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, eos_id=2, seed=0,
                     banned_ids=(0, 1), batch_size=None, row_ids=None):
    """Sample a continuation of each prompt; the EOS is included, a row without it is as long as
    allowed.

    prompts: non-empty lists of ids, of any lengths. max_new_tokens: one number, or one for each
    prompt. temperature 0 is greedy. banned_ids are never drawn. batch_size: rows decoded at once
    (None: all); a row that ends makes room for the next prompt. row_ids: the key of each row's
    random numbers (None: its index), so that a share of a batch draws what the whole batch would.
    Returns Samples. InputError for what cannot be generated, FloatingPointError if the model
    computes no finite numbers.
    """
    limits = max_new_tokens
    if not isinstance(limits, list):
        limits = [limits] * len(prompts)
    prompts = [[int(i) for i in prompt] for prompt in prompts]
    check_generate(model, prompts, limits, temperature, top_p)
    if not prompts:
        return Samples([], [])
    row_ids = range(len(prompts)) if row_ids is None else row_ids
    longest = max(limits)
    u = torch.stack([uniforms(seed, row, longest) for row in row_ids])
    pick = partial(sample, temperature=temperature, top_p=top_p)
    banned = ban_mask(model.config.vocab_size, banned_ids, model.device)
    with eval_mode(model):
        return Decoder(model, prompts, limits, u, banned, pick, eos_id,
                       batch_size or len(prompts)).run()


def check_generate(model, prompts, limits, temperature, top_p):
    """InputError for what cannot be generated."""
    room = model.config.max_seq_len
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise InputError(f"got temperature {temperature}, top_p {top_p}: expected at least 0 "
                         "(greedy), and above 0 up to 1")
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if min(len(prompt), limit) < 1 or len(prompt) + limit > room:
            raise InputError(f"prompt {i}: got {len(prompt)} tokens and {limit} new ones, expected "
                             f"at least one of each, and together at most {room}")


class KVCache:
    """Keys and values of all layers; each row has its own length and writes at its own place."""

    def __init__(self, rows, slots, device):
        self.slots = slots       # prompt and new tokens of the longest row
        self.k, self.v = [], []  # per layer (B, K, slots, d), allocated by the first prompts
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)      # (B,) tokens stored

    def expect_prompts(self, rows, width):
        """Right-padded prompts come next, of `width` tokens, into these rows (b,)."""
        self.rows, self.mask = rows, None
        self.positions = torch.arange(width, device=rows.device).expand(len(rows), -1)   # (b, T)

    def expect_next(self):
        """One token comes next for each row, at its own position."""
        device = self.lengths.device
        self.rows = torch.arange(len(self.lengths), device=device)
        self.positions = self.lengths[:, None]                                            # (B, 1)
        unseen = torch.arange(self.seen, device=device) > self.positions                  # (B, S)
        mask = torch.zeros(unseen.shape, dtype=self.k[0].dtype, device=device)
        self.mask = mask.masked_fill(unseen, -math.inf)[:, None, None]              # (B, 1, 1, S)

    def attend(self, layer, q, k, v):
        """Store k, v (b, K, T, d) of a layer; q (b, H, T, d) attends to all that its row holds."""
        if layer == len(self.k):             # zeros: a masked slot has weight 0, and 0 * NaN is NaN
            shape = (len(self.lengths), k.shape[1], self.slots, k.shape[3])
            self.k.append(k.new_zeros(shape))
            self.v.append(v.new_zeros(shape))
        for kept, new in ((self.k[layer], k), (self.v[layer], v)):
            kept[self.rows[:, None], :, self.positions] = new.transpose(1, 2)
        if self.mask is not None:
            k, v = self.k[layer][:, :, :self.seen], self.v[layer][:, :, :self.seen]
        return attend(q, k, v, self.mask)

    def make_visible(self, slots):
        """Have the next step read at least so many slots (S): on a GPU a multiple of 64, so that
        one recording serves as many steps."""
        unit = 64 if self.lengths.is_cuda else 1
        self.seen = min(math.ceil(slots / unit) * unit, self.slots)

    def keep(self, rows):
        """Drop all rows but these; layer by layer, so that the copy is small."""
        for i in range(len(self.k)):
            self.k[i], self.v[i] = self.k[i][rows], self.v[i][rows]
        self.lengths = self.lengths[rows]


@lru_cache
def recording_stream(device):
    """The stream on which a GPU's recordings are made. One per GPU: torch's own is on the GPU that
    was current first, and cuBLAS keeps memory for each stream."""
    return torch.cuda.Stream(device)


class Recorded:
    """A step without arguments, on tensors that stay where they are. On a GPU it is recorded (a
    CUDA graph) when its shapes come for the second time, and replayed from then on: a thousand
    kernels started by one call. What is recorded must not wait for the GPU (`item`, `print`,
    `nonzero`)."""
    enabled = True

    def __init__(self, step, device):
        self.step, self.graphs = step, {}
        # (autocast keeps casts of its own, which a recording would not find again)
        self.able = self.enabled and device.type == "cuda" and not torch.is_autocast_enabled("cuda")
        if self.able:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), recording_stream(device)

    def __call__(self, *shapes):
        if not self.able or shapes not in self.graphs:         # the first time, kernels are loaded
            self.graphs[shapes] = None
            return self.step()
        if self.graphs[shapes] is None:
            graph = self.graphs[shapes] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                self.step()                                    # (recorded, not done)
        self.graphs[shapes].replay()


class Decoder:
    """Rows that are being answered, `size` at a time. A row ends with EOS or at its limit; ended
    rows make room for the prompts that wait, or, when none do, leave the batch."""
    LOOK_EVERY = 8       # steps between looks at what has ended: each look waits for the GPU

    def __init__(self, model, prompts, limits, u, banned, pick, eos_id, size):
        """u (N, M): each prompt's uniform numbers; pick(logits, u) -> ids and log-probabilities."""
        device, B = model.device, min(size, len(prompts))
        N, M = u.shape
        self.model, self.prompts, self.banned, self.pick = model, prompts, banned, pick
        self.eos_id, self.waiting = eos_id, 0                  # waiting: the next prompt to begin
        self.limits, self.u = torch.tensor(limits, device=device), F.pad(u, (0, 1)).to(device)
        # (ended rows go on drawing: what they draw lies behind their `count`, at most in column M)
        self.drawn = torch.zeros((N, M + 1), dtype=torch.int64, device=device)
        self.logprobs = torch.zeros((N, M + 1), device=device)
        self.count = torch.zeros_like(self.limits)             # (N,) ids drawn for each prompt
        self.cache = KVCache(B, max(len(p) + n for p, n in zip(prompts, limits)), device)
        self.state = model.norm.weight.new_zeros(B, model.config.dim)     # (B, D): what comes next
        self.which = torch.zeros(B, dtype=torch.int64, device=device)     # (B,) prompt of each row
        self.last = torch.zeros_like(self.which)                          # (B,) the id drawn last
        self.done = torch.ones(B, dtype=torch.bool, device=device)        # (B,) the place is free

    def run(self):
        """-> Samples."""
        read = Recorded(self.read, self.model.device)
        for step in itertools.count():
            if step % self.LOOK_EVERY == 0:
                if not torch.isfinite(self.state).all():
                    raise FloatingPointError("hidden states of the sampling model are not finite")
                ended = self.done.nonzero()[:, 0]
                if len(ended) == len(self.done) and self.waiting == len(self.prompts):
                    break
                if 8 * len(ended) >= len(self.done):           # fewer are not worth the copying
                    self.replace(ended)
            self.draw()                        # an id in each row; then read it, at its position:
            self.longest += 1                  # an upper bound, without waiting for the GPU
            self.cache.make_visible(self.longest)
            read(len(self.done), self.cache.seen)
        counts = self.count.tolist()
        return Samples([row[:n] for row, n in zip(self.drawn.tolist(), counts)],
                       [row[:n] for row, n in zip(self.logprobs.tolist(), counts)])

    def replace(self, ended):
        """Begin the next prompts in the rows `ended`; drop those for which there is none."""
        n = min(len(ended), len(self.prompts) - self.waiting)
        if n:
            self.begin(ended[:n])
        if n < len(ended):
            rest = (~self.done).nonzero()[:, 0]
            self.cache.keep(rest)
            for name in ("state", "which", "last", "done"):
                setattr(self, name, getattr(self, name)[rest])
        self.longest = int(self.cache.lengths.max())

    def begin(self, rows):
        """Run the next prompts through the model, into these rows (b,) of the cache."""
        prompts = self.prompts[self.waiting:self.waiting + len(rows)]
        lengths = torch.tensor([len(p) for p in prompts], device=rows.device)
        numbers = torch.arange(len(rows), device=rows.device)
        tokens = pad_right(prompts).to(rows.device)                                      # (b, T)
        self.cache.expect_prompts(rows, tokens.shape[1])
        states = self.model.hidden(tokens, self.cache)                                   # (b, T, D)
        self.cache.lengths[rows] = lengths
        self.state[rows] = states[numbers, lengths - 1]
        self.which[rows] = self.waiting + numbers
        self.done[rows] = False
        self.waiting += len(rows)

    def draw(self):
        """Draw one id in every row."""
        logits = masked_logits(self.model.output, self.state, self.banned)                # (B, V)
        place = self.count[self.which]
        ids, logprobs = self.pick(logits, self.u[self.which, place])
        self.drawn[self.which, place] = ids
        self.logprobs[self.which, place] = logprobs
        self.last.copy_(ids)
        self.count[self.which] += ~self.done
        self.done |= (ids == self.eos_id) | (place + 1 == self.limits[self.which])

    def read(self):
        """Feed the ids just drawn to the model and keep its states. (An ended row's slot is not
        counted: its next id is written over it.)"""
        self.cache.expect_next()
        self.state.copy_(self.model.hidden(self.last[:, None], self.cache)[:, 0])
        self.cache.lengths += ~self.done


# ----------------------------------------------------------------------------------------- files

HF_NAMES = {      # a part of a parameter's path: our name (Meta's) -> Hugging Face's and PEFT's
    "tok_embeddings": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm",
    "output": "lm_head", "attention": "self_attn", "feed_forward": "mlp",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def hf_name(name):
    """layers.0.attention.wq.weight -> model.layers.0.self_attn.q_proj.weight"""
    return ".".join(HF_NAMES.get(part, part) for part in name.split("."))


@contextmanager
def writing(path):
    """Whatever goes wrong in writing a file (a full disk, say) is one InputError with its path."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as e:      # (RuntimeError: torch.save's)
        raise InputError(f"cannot write {path}: {e}".splitlines()[0]) from None


@contextmanager
def whole_file(path):
    """A temporary path, renamed to `path` when the block ends: nobody ever sees half of a file."""
    temporary = Path(f"{path}.tmp")
    try:
        with writing(path):
            yield temporary
            with open(temporary, "rb") as f:
                os.fsync(f.fileno())       # or a power cut could leave the name without the content
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    """A JSON file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def save_weights(tensors, path):
    """A safetensors file, whole or not at all."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)             # (safetensors lets nobody but the owner read its files)


def read_text(path):
    """A UTF-8 file's text, with or without a byte order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 text (byte {e.start})") from None


def parse_json(text, where):
    """What a JSON text says; `where`, a file and perhaps its line, is named if it is broken."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise InputError(f"{where}: broken JSON, {e.msg} at line {e.lineno}") from None


def read_json(path, kind=dict):
    """A JSON file's content, of this type."""
    content = parse_json(read_text(path), path)
    if not isinstance(content, kind):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a {kind.__name__}")
    return content


def refuse_lfs_pointer(path):
    """InputError for the few lines that Git leaves in place of a large file."""
    with open(path, "rb") as f:
        if f.read(40).startswith(b"version https://git-lfs"):
            raise InputError(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull")


def tensor_readers(path):
    """The tensors of a safetensors file: name -> function that reads it."""
    refuse_lfs_pointer(path)
    try:
        f = safe_open(path, framework="pt")
        return {name: partial(f.get_tensor, name) for name in f.keys()}
    except SafetensorError as e:
        raise InputError(f"{path} is no safetensors file ({e}): truncated?") from None


def weight_readers(path):
    """All weights of a Hugging Face folder, in one file or in shards: their name -> reader."""
    path = Path(path)
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        return tensor_readers(path / "model.safetensors")
    if not index.is_file():
        raise InputError(f"{path} has no model.safetensors: tools/convert.py makes one from "
                         "pickled weights, *.bin")
    where = read_json(index).get("weight_map", {})
    shards = {file: tensor_readers(path / file) for file in sorted(set(where.values()))}
    return {name: shards[file][name] for name, file in where.items() if name in shards[file]}


def read_model_config(path):
    """LlamaConfig of a Hugging Face folder, without reading its weights."""
    path = Path(path)
    if (path / "adapter_config.json").is_file():
        raise InputError(f"{path} is an adapter, expected a whole model: tools/convert.py merge "
                         "MODEL OUT --adapter ADAPTER makes one")
    if not (path / "config.json").is_file():
        raise InputError(f"{path} holds no model: expected config.json and model.safetensors. "
                         "(From Meta's params.json and *.pth tools/convert.py makes them; a PPO "
                         "run's result is in its folder ppo)")
    return hf_config(read_json(path / "config.json"), path / "config.json")


PLAIN = {"model_type": "llama", "attention_bias": False, "mlp_bias": False, "hidden_act": "silu",
         "partial_rotary_factor": 1.0, "quantization_config": None}      # what `Llama` implements
SIZES = {"vocab_size": "vocab_size", "dim": "hidden_size", "n_layers": "num_hidden_layers",
         "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
         "ffn_dim": "intermediate_size", "head_dim": "head_dim",
         "max_seq_len": "max_position_embeddings"}


def hf_config(raw, file):
    """Hugging Face's config.json -> LlamaConfig; InputError names what `Llama` cannot do."""
    for key, plain in PLAIN.items():
        if raw.get(key, plain) not in (plain, None):
            raise InputError(f"{file}: {key} = {raw[key]} is not implemented: plain LLaMA only "
                             "(AlpacaFarm's reward model: tools/convert.py reward)")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise InputError(f"{file}: rope scaling {rope} is not implemented here")
    sizes = {ours: raw[theirs] for ours, theirs in SIZES.items() if raw.get(theirs) is not None}
    for ours in ("vocab_size", "dim", "n_layers", "n_heads", "ffn_dim"):
        if not isinstance(sizes.get(ours), int):
            raise InputError(f"{file}: {SIZES[ours]} is {raw.get(SIZES[ours])!r}, expected a whole "
                             "number: is this a LLaMA, and was what writes it run to its end?")
    return LlamaConfig(**sizes, norm_eps=raw.get("rms_norm_eps", 1e-6),
                       rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
                       tie_embeddings=raw.get("tie_word_embeddings", False))


def hf_config_json(config, dtype):
    """LlamaConfig -> the dictionary of Hugging Face's config.json."""
    sizes = {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes,
            "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
            "tie_word_embeddings": config.tie_embeddings, "bos_token_id": 1, "eos_token_id": 2,
            "torch_dtype": str(dtype).removeprefix("torch.")}


def load_llama(path, device="cpu", dtype=torch.float32):
    """Read a model from a Hugging Face folder of safetensors, in one file or in shards.

    Tensors are read one at a time and cast on the way: the peak is the model in `dtype` and one
    tensor. The model is in eval mode. InputError names what is missing, extra, of a wrong shape, or
    not implemented here."""
    model, readers = empty_llama(read_model_config(path), device, dtype), weight_readers(path)
    parameters = {hf_name(name): p for name, p in model.named_parameters()}
    if model.config.tie_embeddings and "lm_head.weight" in readers:      # there twice, or alone
        copy = readers.pop("lm_head.weight")
        if not torch.equal(readers.setdefault("model.embed_tokens.weight", copy)(), copy()):
            raise InputError(f"{path}: the config ties the output matrix to the embeddings, but "
                             "the file has two different matrices")
    fill(parameters, readers, path)
    return model


def empty_llama(config, device="cpu", dtype=torch.float32, lm_head=True):
    """A model in eval mode whose weights are allocated, in their final dtype, and hold nothing."""
    with torch.device("meta"):
        model = Llama(config, lm_head).to(dtype)
    model.to_empty(device=device).tie()
    return model.eval()


@torch.no_grad()
def fill(parameters, readers, path):
    """Put tensors (name -> function that reads one) into parameters (by name), one at a time.

    InputError names what is missing, extra, of another shape, quantised, or not finite."""
    readers = {k: r for k, r in readers.items() if not k.endswith("rotary_emb.inv_freq")}
    odd = sorted(set(readers) ^ set(parameters))
    if odd:
        what = "has no place in this model" if odd[0] in readers else "is missing"
        raise InputError(f"{path}: tensor {odd[0]} {what} ({len(odd)} such tensors)")
    for name, read in readers.items():
        tensor, p = read(), parameters[name]
        plain = tensor.is_floating_point() and tensor.element_size() > 1
        if tensor.shape != p.shape or not plain:
            raise InputError(f"{path}: tensor {name} has shape {tuple(tensor.shape)} in "
                             f"{tensor.dtype}, expected {tuple(p.shape)}, not quantised")
        p.copy_(tensor)
        if not all(x.isfinite() for x in p.aminmax()):
            raise InputError(f"{path}: tensor {name} holds numbers that are not finite")


def save_llama(model, path, **about):
    """Write a Hugging Face folder that load_llama and transformers read; `about` joins config.json.

    Adapters have to be merged first (lora.merge_lora): a model that still holds some is refused."""
    names = dict(model.named_parameters())                                      # tied weights: once
    adapters = [name for name in names if ".lora_" in name]
    if adapters:
        raise InputError(f"{adapters[0]} is not a LLaMA weight: merge the adapters before saving")
    Path(path).mkdir(parents=True, exist_ok=True)
    save_weights({hf_name(name): p for name, p in names.items()}, Path(path) / "model.safetensors")
    config = hf_config_json(model.config, model.tok_embeddings.weight.dtype)
    write_json(Path(path) / "config.json", config | about)


def fingerprint(model, adapter=None):
    """A short hash of a model's sizes and of 64 numbers of each weight, the same in any dtype; of
    its adapters only the named one counts."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, p in model.named_parameters():
        if ".lora_" not in name or name.endswith(f".{adapter}"):
            flat = p.detach().flatten()
            n = min(64, flat.numel())          # (places in integers: float32 skips some above 2^24)
            places = torch.arange(n) * (flat.numel() - 1) // max(1, n - 1)
            picked = flat[places.to(flat.device)].bfloat16().cpu().view(torch.int16)
            digest.update(name.replace(".base.", ".").encode() + picked.numpy().tobytes())
    return digest.hexdigest()[:16]
