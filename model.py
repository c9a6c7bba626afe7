"""LLaMA: layers, KV cache, sampler, checkpoint files (Touvron et al., arXiv 2302.13971 and 2307.09288).

This is the network that everything else trains or reads. It does not know that LoRA exists: `lora.py` swaps some of
its linear layers for layers that know.

Legend   B batch, T tokens, V vocabulary, D width, H query heads, K key/value heads, F feed-forward width, d head width,
         S cache slots (those in use), N response tokens of a whole batch laid end to end

    tokens (B, T) -> tok_embeddings -> x (B, T, D)
    n_layers times:  x = x + attention(attention_norm(x))     wq wk wv -> rotate q, k -> softmax(q k' / sqrt d) v -> wo
                     x = x + feed_forward(ffn_norm(x))        w2(silu(w1 x) * w3 x)
    norm -> `hidden` (B, T, D), or (N, D) of the places that are read -> output -> logits

Decisions that are easy to get wrong:
1. Names are Meta's (wq, w1, attention_norm); the order of rotary pairs inside a head is Hugging Face's (first half,
   second half), so Hugging Face weights load by renaming alone. Meta's files interleave the pairs: wq and wk rows are
   permuted once, on reading.
2. Padding is on the right only. With a causal mask no real token can see it, so training builds no mask at all.
3. A token costs one uniform number (inverse CDF), keyed by (seed, row): what a row samples depends neither on its
   batch mates nor on how many processes share the work.
4. Inside `packed_weights` layers multiply by copies of their weights: a weight that is changed there (by merging an
   adapter, say) changes nothing.
"""
import hashlib
import itertools
import json
import math
import os
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 1 << 22       # made at one time, in float32: 16 MiB, which stay in a processor's cache
BANNED = -1e30  # logit of an id that must not be drawn: probability 0, yet finite, so that 0 * BANNED is 0 and not NaN


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
            if self.dim % self.n_heads:
                raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head width {self.head_dim} is odd: rotary embeddings turn pairs")
        if not 0 < self.rope_theta < math.inf or not 0 <= self.norm_eps < math.inf:
            raise ValueError(f"rope_theta {self.rope_theta} must be above 0, norm_eps {self.norm_eps} at least 0")


# ---------------------------------------------------------------------------------------------------------- layers

def normalised(x, eps):
    """r x with r = 1 / sqrt(mean(x^2) + eps), in float32 -> r x, r"""
    y = x.float()
    r = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * r).to(x.dtype), r


class Normalise(torch.autograd.Function):
    """`normalised`, with its gradient in one go, and with the mean over the width D:

        d(r x_i)/dx_j = r (i = j) - r^3 x_i x_j / D        so        dx = r (g - r^2 x mean(g x))

    Written out it takes fewer passes over a CPU's memory than autograd's, and keeps x as it is, not float32 copies.
    """

    @staticmethod
    def forward(ctx, x, eps):
        y, r = normalised(x, eps)
        ctx.save_for_backward(x, r)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, r = ctx.saved_tensors
        g, y = grad.float(), x.float()
        along = (g * y).mean(-1, keepdim=True) * r * r
        return torch.addcmul(g, y, along, value=-1).mul_(r).to(x.dtype), None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the statistics in float32 (Zhang & Sennrich, arXiv 1910.07467)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        if x.device.type != "cpu":
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)       # one kernel each way, not eight
        return self.weight * (Normalise.apply(x, self.eps) if torch.is_grad_enabled() else normalised(x, self.eps)[0])


def rope_angles(positions, head_dim, theta):
    """cos and sin of position * theta^(-2i/d), float32 (RoFormer, eq. 15), laid out for `rotate`: pair i sits at i
    and i + d/2, and sin is negated in the first half. positions (...,) -> two of (..., d)."""
    i = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[..., None] * theta ** (-i / head_dim)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i + d/2}) of every head by its position's angle. x (B, T, H, d);
    cos, sin (.., T, 1, d)."""
    return Rotation.apply(x, cos, sin) if torch.is_grad_enabled() else turned(x, cos, sin)


class Rotation(torch.autograd.Function):
    """The gradient of a rotation is turned back, by -sin: a pass over memory fewer than autograd's."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return turned(grad, cos, -sin), None, None


def turned(x, cos, sin):
    """x cos + (x with its halves exchanged) sin"""
    half = x.shape[-1] // 2
    if x.device.type == "cpu":
        return torch.addcmul(x * cos, x.roll(half, -1), sin)
    out = x * cos                                                # a GPU's roll is slower than all the rest
    out[..., :half].addcmul_(x[..., half:], sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


class Linear(nn.Linear):
    """x W', without bias. Inside `packed_weights` the product is oneDNN's, on a packed copy of W."""
    copies = None      # inside packed_weights: {False: W, True: W', for the gradient of x}, each packed on first use

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x):
        if not is_packed(self):
            return F.linear(x, self.weight)
        return PackedProduct.apply(x, self) if torch.is_grad_enabled() else packed_product(x, self)

    def keeps_copies(self):
        """Whether it has copies inside packed_weights."""
        return self.weight.device.type == "cpu" and packable(self.weight.dtype)


class PackedProduct(torch.autograd.Function):
    """x W' of a packed layer, whose weight has no gradient."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return packed_product(x, layer)

    @staticmethod
    def backward(ctx, grad):
        return input_gradient(grad, ctx.layer), None


def input_gradient(grad, layer):
    """grad W: the gradient of x, given that of x W'."""
    return packed_product(grad, layer, back=True) if is_packed(layer) else grad @ layer.weight


def is_packed(layer):
    """Whether the layer is to use packed weights: not where W gets a gradient,
    nor in autocast, whose casts happen in torch's own products alone."""
    gets_gradient = layer.weight.requires_grad and torch.is_grad_enabled()
    return getattr(layer, "copies", None) is not None and not (gets_gradient or torch.is_autocast_enabled("cpu"))


def packed_product(x, layer, back=False):
    """x W' (.., out) of x (.., in), or back: x W (.., in) of x (.., out)."""
    if back not in layer.copies:
        weight = layer.weight.detach().t() if back else layer.weight.detach()
        # in blocks, in the order in which the kernel for 32 rows reads them: the best one for many rows, too
        layer.copies[back] = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)
    return torch.ops.mkldnn._linear_pointwise(x, layer.copies[back], None, "none", [], "")


def packable(dtype):
    """Whether oneDNN is here, and multiplies by packed weights of this dtype on this processor (bfloat16: not with AVX2
    alone)."""
    able = torch.backends.mkldnn.is_available()
    return able and (dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def packed_weights(*models, frozen_only=True):
    """Inside, on a CPU, linear layers keep a packed copy of their weights, and a second one once a gradient has gone
    through. Weights must not change meanwhile: layers that train are left as they are (frozen_only). Any module with
    `copies` and `keeps_copies` takes part.

    A plain product repacks W at every call. Packing it once helps a little for thousands of rows, and a lot in
    decoding, where each weight meets only a few rows.
    """
    layers = dict.fromkeys(m for model in models for m in model.modules()
                           if hasattr(m, "keeps_copies") and m.copies is None and m.keeps_copies()
                           and not (frozen_only and any(p.requires_grad for p in m.parameters())))
    try:
        for layer in layers:
            layer.copies = {}
        yield
    finally:
        for layer in layers:
            layer.copies = None


def attention_dtype(x):
    """The dtype for attention on states x: their own, or autocast's; on a CPU float32 instead of bfloat16, whose
    kernels are slower there, most of all backward."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.float32 if device == "cpu" and x.dtype == torch.bfloat16 else x.dtype


def attend(q, k, v, mask=None):
    """softmax(q k' / sqrt d + mask) v; causal without a mask."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                          enable_gqa=q.shape[1] != k.shape[1])


def attend_by_rows(q, k, v, mask, key_rows, value_rows):
    """`attend` with one query per head, q (B, H, 1, d), on a CPU. Its scores are a weighted sum of d rows of k
    (B, K, d, columns), its answer is one of S rows of v (B, K, slots, d); key_rows (B H, d), value_rows (B H, S) say of
    which, all laid end to end. embedding_bag adds them up in half the time that SDPA takes for such small products."""
    def weighted(weights, rows, table):
        """sum over j of weights[i, j] table[rows[i, j]], for each i."""
        return F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights.to(table.dtype))

    (B, H, _, d), S = q.shape, mask.shape[3]
    scores = weighted(q.reshape(B * H, d) * d ** -0.5, key_rows, k.view(-1, k.shape[3])).view(B, H, -1)
    probs = (scores[:, :, :S] + mask[:, :, 0]).softmax(-1)
    return weighted(probs.view(B * H, S), value_rows, v.view(-1, d)).view(B, H, 1, d)


def at(x, read):
    """The rows `read` (N,) of x (B, T, D), counted through the batch -> (N, D); None: x as it is."""
    return x if read is None else x.flatten(0, 1).index_select(0, read)


class Attention(nn.Module):
    """Causal self-attention; with n_kv_heads < n_heads, each key/value head serves a group of query heads."""

    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.wq = Linear(c.dim, c.n_heads * c.head_dim)
        self.wk = Linear(c.dim, c.n_kv_heads * c.head_dim)
        self.wv = Linear(c.dim, c.n_kv_heads * c.head_dim)
        self.wo = Linear(c.n_heads * c.head_dim, c.dim)

    def forward(self, x, cos, sin, cache=None, layer=0, read=None):
        B, T, _ = x.shape
        q, k, v = (w(x).to(cos.dtype).view(B, T, -1, self.head_dim) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)        # (B, H, T, d), (B, K, T, d) twice
        out = (attend(q, k, v) if cache is None else cache.attend(layer, q, k, v)).to(x.dtype)
        return self.wo(at(out.transpose(1, 2).flatten(2), read))


def gated(a, b):
    """silu(a) b"""
    return F.silu(a).mul_(b)


class Gate(torch.autograd.Function):
    """`gated`, of which only a and b are kept: the backward makes silu(a) again."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return gated(a, b)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * b, a), F.silu(a).mul_(grad)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x); w1 is the gate, w3 goes up, w2 comes down (Shazeer, arXiv 2002.05202)."""

    def __init__(self, c):
        super().__init__()
        self.w1 = Linear(c.dim, c.ffn_dim)
        self.w2 = Linear(c.ffn_dim, c.dim)
        self.w3 = Linear(c.dim, c.ffn_dim)

    def forward(self, x):
        rows = x.flatten(0, -2)
        if x.device.type != "cpu" or len(rows) <= 1024:
            return self.swiglu(x)
        # what is F wide stays in a processor's cache from one operation to the next
        return torch.cat([self.swiglu(some) for some in rows.split(1024)]).view_as(x)

    def swiglu(self, x):
        gate = Gate.apply if torch.is_grad_enabled() else gated
        return self.w2(gate(self.w1(x), self.w3(x)))


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, c):
        super().__init__()
        self.attention_norm = RMSNorm(c.dim, c.norm_eps)
        self.attention = Attention(c)
        self.ffn_norm = RMSNorm(c.dim, c.norm_eps)
        self.feed_forward = FeedForward(c)

    def forward(self, x, cos, sin, cache=None, layer=0, read=None):
        x = at(x, read) + self.attention(self.attention_norm(x), cos, sin, cache, layer, read)
        return x + self.feed_forward(self.ffn_norm(x))


def no_context(block):
    """Nothing around a checkpointed block, neither in the forward nor in the recomputation."""
    return nullcontext(), nullcontext()


class Llama(nn.Module):
    """The transformer. `lm_head=False` leaves the output matrix out (reward models have no use for it)."""
    cuda_graphs = True      # of all models: on a GPU, decode by recordings (see `Recorded`)

    def __init__(self, config, lm_head=True):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size) if lm_head else None
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        self.tie()
        # True: keep one (B, T, D) per block, recompute the rest in the backward
        self.checkpoint_activations = False
        self.checkpoint_context = no_context     # block -> (forward context, recompute context); lora.py sets it

    def tie(self):
        """Make the output matrix the embedding matrix, if the config says so."""
        if self.output is not None and self.config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def hidden(self, tokens, cache=None, read=None):
        """tokens (B, T) int64 -> (B, T, D), after the final norm; or (N, D), the states at the places `read` (N,)
        int64 among the B * T tokens laid end to end: past its attention, the last layer works for those alone.

        With a cache: right-padded prompts (see `prefill`), or, when decoding, one new token per row.
        """
        c = self.config
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]    # (1, T)
        if cache is not None:
            positions = cache.begin(positions, c.n_heads)                        # (1, T), or (B, 1) when decoding
        if positions.shape[1] > c.max_seq_len:
            raise ValueError(f"{positions.shape[1]} tokens are more than max_seq_len {c.max_seq_len} of this model")
        x = self.tok_embeddings(tokens)
        cos, sin = (a[:, :, None].to(attention_dtype(x)) for a in rope_angles(positions, c.head_dim, c.rope_theta))
        for i, layer in enumerate(self.layers):
            run = layer
            if self.checkpoint_activations and torch.is_grad_enabled():
                run = partial(checkpoint, layer, use_reentrant=False,
                              context_fn=partial(self.checkpoint_context, layer))
            x = run(x, cos, sin, cache, i, read if i == c.n_layers - 1 else None)
        return self.norm(x)

    def forward(self, tokens):
        """tokens (B, T) int64 -> logits (B, T, V); logits[:, t] are about token t + 1."""
        return self.output(self.hidden(tokens))

    @property
    def device(self):
        return self.tok_embeddings.weight.device


class FrozenHeadLogprobs(torch.autograd.Function):
    """log softmax(W h)[target] of states h (N, D), for a head W (V, D) that does not train:
    its gradient is found on the way.

        d logp[target] / dh = W[target] - sum_v p_v W_v = (onehot - p) W

    so that what is kept for the backward pass is (N, D), and no logits (N, V) are kept, made twice or differentiated.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, banned_mask, rows):
        logprobs, slopes = [], torch.empty_like(hidden)
        for h, target, slope in zip(hidden.split(rows), targets[:, None].split(rows), slopes.split(rows)):
            logp = F.log_softmax(masked_logits(head, h, banned_mask), dim=-1)    # (n, V)
            logprobs.append(logp.gather(-1, target)[:, 0])
            p = logp.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=logp.dtype))
            slope.copy_(input_gradient(p.to(hidden.dtype), head))                # (n, D), of -logp
        ctx.save_for_backward(slopes)
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx, grad):
        slopes, = ctx.saved_tensors
        return -grad[:, None].to(slopes.dtype) * slopes, None, None, None, None


def response_logprobs(head, hidden, targets, banned_mask=None, ref=None, divergence=None, max_logits=MAX_LOGITS):
    """Log-probability of each target, entropy, and what the reference says of the same positions;
    never all logits at once.

    head: the output layer. hidden (N, D): the states that predict the targets (N,). banned_mask (V,) bool: ids that
    the sampler never draws; the same ban applies here, or the ratio of PPO would not be 1. ref: (ref head,
    ref hidden (N, D)), frozen. divergence: function of both log-probabilities (n, V) -> (n,), differentiated with
    respect to the first. Logits are made at most `max_logits` at a time, in float32; a head that trains, or a
    divergence, has them made again in the backward pass. Returns logprobs (N,) [nats], entropy (N,) [nats, detached;
    None in training, where nobody asks for it], ref_logprobs (N,) or None, divergence (N,) or None.

    ValueError if the head has an adapter of its own, which the backward pass would not find active again.
    """
    if not isinstance(head, nn.Linear):
        raise ValueError(f"the output layer is a {type(head).__name__}, expected a plain linear layer: "
                         "an adapter on it can be merged and sampled from, but PPO does not train it")

    def chunk(hidden, ref_hidden, targets):
        logp = F.log_softmax(masked_logits(head, hidden, banned_mask), dim=-1)   # (n, V)
        taken = logp.gather(-1, targets[:, None])[:, 0]
        if training:
            return (taken,)
        entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
        if ref is None:
            return taken, entropy
        with torch.no_grad():
            ref_logp = F.log_softmax(masked_logits(ref[0], ref_hidden, banned_mask), dim=-1)
            ref_taken = ref_logp.gather(-1, targets[:, None])[:, 0]
        return taken, entropy, ref_taken, divergence(logp, ref_logp)

    n, training = max(1, max_logits // head.weight.shape[0]), torch.is_grad_enabled() and ref is None
    if training and not head.weight.requires_grad:
        return FrozenHeadLogprobs.apply(hidden, head, targets, banned_mask, n), None, None, None
    parts = list(zip(hidden.split(n), (hidden if ref is None else ref[1]).split(n), targets.split(n)))
    if len(parts) > 1 and torch.is_grad_enabled():
        outs = [checkpoint(chunk, *part, use_reentrant=False) for part in parts]
    else:
        outs = [chunk(*part) for part in parts]
    outs = [torch.cat(column) for column in zip(*outs)]
    return (*outs, *[None] * (4 - len(outs)))


def masked_logits(head, hidden, banned_mask=None):
    """float32 logits (.., V) with BANNED at the ids of banned_mask (V,)."""
    logits = head(hidden).float()
    return logits if banned_mask is None else logits.masked_fill_(banned_mask, BANNED)


def ban_mask(vocab_size, banned_ids, device="cpu"):
    """(V,) bool, True at the ids that are never sampled."""
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[[int(i) for i in banned_ids if 0 <= i < vocab_size]] = True
    return mask.to(device)


# -------------------------------------------------------------------------------------------------------- sampling

class KVCache:
    """Keys and values of all layers, allocated by the first prompts and copied only when rows leave; every row has its
    own length and writes at its own position. On a CPU, for `attend_by_rows`, the keys lie in memory as columns, of
    which there are as many as are in use: they are copied when more are needed, too (`widen`)."""

    def __init__(self, rows, slots, device="cpu"):
        self.slots = slots       # prompt and new tokens of the longest row
        self.k, self.v = [], []  # per layer (B, K, slots, d), in the dtype of attention
        self.columns = torch.device(device).type == "cpu"
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)        # (B,) tokens stored per row
        self.used = 0            # no row is longer than this
        self.seen = 0            # so many slots are read
        self.prompts_of = None   # the rows whose prompts are coming in; None when decoding
        self.rows = self.mask = self.key_rows = self.value_rows = None

    def begin(self, positions, n_heads):
        """-> positions of the tokens that come now. When decoding, each row's mask over the slots is made, too."""
        if self.prompts_of is not None:
            return positions                                                      # 0..T-1
        # rows of 16: a GPU's kernel copies any other mask, in each layer
        slots = torch.arange(-(-self.seen // 16) * 16, device=positions.device)
        unseen = (slots > self.lengths[:, None])[:, None, None]
        # added to the scores; made once a step, where a bool mask would be turned into this one in each layer
        mask = torch.zeros_like(unseen, dtype=self.k[0].dtype).masked_fill_(unseen, -math.inf)
        self.mask = mask[..., :self.seen]                                         # (B, 1, 1, S)
        self.rows = torch.arange(len(self.lengths), device=positions.device)
        if self.columns:
            _, K, _, d = self.k[0].shape
            heads = torch.arange(len(self.lengths) * K).repeat_interleave(n_heads // K)[:, None]    # each query's
            self.key_rows = heads * d + torch.arange(d)                           # (B H, d)
            self.value_rows = heads * self.slots + slots[:self.seen]              # (B H, S)
        return self.lengths[:, None]

    def attend(self, layer, q, k, v):
        """Store k, v (b, K, T, d) of one layer; q (b, H, T, d) attends to all that its row holds -> (b, H, T, d)."""
        if self.prompts_of is not None:
            if layer == len(self.k):                           # zeros: a masked slot has weight 0, and 0 * NaN is NaN
                B, (_, K, T, d) = len(self.lengths), k.shape
                self.k.append(k.new_zeros(B, K, d, 0).mT if self.columns else k.new_zeros(B, K, self.slots, d))
                self.v.append(v.new_zeros(B, K, self.slots, d))
            self.widen(layer, k.shape[2] + 1)                  # and for what comes next
            for store, x in ((self.k[layer], k), (self.v[layer], v)):
                store[self.prompts_of, :, :x.shape[2]] = x
            return attend(q, k, v)
        self.widen(layer, self.seen)
        for store, x in ((self.k[layer], k), (self.v[layer], v)):
            store[self.rows, :, self.lengths] = x[:, :, 0]
        if self.columns:
            return attend_by_rows(q, self.k[layer].mT, self.v[layer], self.mask, self.key_rows, self.value_rows)
        return attend(q, self.k[layer][:, :, :self.seen], self.v[layer][:, :, :self.seen], self.mask)

    def widen(self, layer, slots):
        """Room for keys in so many slots. Only columns may lack it: they are read whole, so they grow with need."""
        have = self.k[layer].shape[2]
        if slots > have:
            self.k[layer] = F.pad(self.k[layer].mT, (0, min(-(-slots // 64) * 64, self.slots) - have)).mT

    def keep(self, rows):
        """Drop all rows but these; layer by layer, so that the copy is small."""
        for i in range(len(self.k)):
            self.k[i], self.v[i] = self.k[i][rows], self.v[i][rows]
        self.lengths = self.lengths[rows]
        self.reads(int(self.lengths.max()))

    def reads(self, used):
        """No row is longer than `used`: with the token that comes, so many slots have to be read. On a GPU more, a
        multiple of 64, so that one recording serves as many steps."""
        unit = 64 if self.lengths.is_cuda else 1
        self.used, self.seen = used, min(-(-(used + 1) // unit) * unit, self.slots)


def keyed_seed(*key):
    """An integer seed that belongs to this key (numbers and strings) and to nothing else, on any machine."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


def uniforms(seed, row, n):
    """n numbers in [0, 1) that belong to one row of one seed."""
    key = seed if isinstance(seed, str) else int(seed), int(row)           # (numpy's 3 is the same row as Python's)
    return torch.rand(n, generator=torch.Generator().manual_seed(keyed_seed(*key)))


def nucleus(probs, top_p):
    """Zero all but the smallest set of most probable ids whose mass reaches top_p (Holtzman et al., arXiv
    1904.09751)."""
    p, ids = probs.sort(dim=-1, descending=True, stable=True)
    mass_before = p.double().cumsum(-1) - p
    return torch.zeros_like(probs).scatter(-1, ids, torch.where(mass_before < top_p, p, 0.0))


def sample(logits, u, temperature=1.0, top_p=1.0):
    """Inverse CDF: the first id whose cumulative probability exceeds u * total. logits (B, V), u (B,) -> ids (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        probs = nucleus(probs, top_p)
    # a GPU adds up in parallel and rounds each sum another way: ids of probability 0 get slivers, which in float32 are
    # wide enough for a u to hit
    cumulative = probs.cumsum(-1, dtype=torch.float32 if probs.device.type == "cpu" else torch.float64)
    ids = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return ids.clamp(max=logits.shape[1] - 1)              # (of NaN, which `decode` reports: searchsorted says V)


def pad_right(rows, fill=0):
    """Lists of ids of any lengths -> (B, T) int64, the empty places on the right filled (masks decide, not the
    fill)."""
    width = max(map(len, rows))
    return torch.tensor([list(row) + [fill] * (width - len(row)) for row in rows], dtype=torch.int64)


@contextmanager
def eval_mode(model):
    """Dropout off inside; the earlier mode is restored on exit."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, eos_id=2, seed=0, banned_ids=(0, 1),
             batch_size=None, row_ids=None, limits=None, return_logprobs=False):
    """Sample a continuation of each prompt; the EOS is included, a row that never draws it has max_new_tokens ids.

    prompts: list of non-empty id lists of any lengths, or a tensor (B, T). temperature 0 is greedy. Ids in banned_ids
    are never drawn. batch_size: rows decoded at once (None: all); a row that ends makes room for the next prompt.
    row_ids: the key of each row's random numbers (None: its index), so that a share of a batch draws what the whole
    batch would. limits: a smaller max_new_tokens of each row's own.
    Returns a list of lists of ids, in the order of the prompts; with return_logprobs also the log-probability that the
    model (at temperature 1, the banned ids left out) gave to each of them, a list of lists of floats. ValueError for
    what cannot be generated; FloatingPointError if the model computes no finite numbers.
    """
    prompts = [p.tolist() if hasattr(p, "tolist") else p for p in prompts]
    limits = [max_new_tokens] * len(prompts) if limits is None else [min(n, max_new_tokens) for n in limits]
    row_ids = range(len(prompts)) if row_ids is None else row_ids
    check_generate(model, prompts, limits, row_ids, temperature, top_p)
    if not prompts:
        return ([], []) if return_logprobs else []
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    banned = ban_mask(model.config.vocab_size, banned_ids, model.device)
    if banned.all():
        raise ValueError(f"all {len(banned)} ids are banned: none is left to sample")
    responses, logprobs = [None] * len(prompts), [None] * len(prompts)
    u = torch.stack([uniforms(seed, row_ids[i], max(limits)) for i in order])
    pick = lambda logits, u: sample(logits, u, temperature, top_p)
    with eval_mode(model), packed_weights(model, frozen_only=False):
        ids, logps = decode(model, [prompts[i] for i in order], [limits[i] for i in order], u, pick, eos_id, banned,
                            batch_size or len(prompts), return_logprobs)
    for i, row, logp in zip(order, ids, logps):
        row = row[:limits[i]]
        responses[i] = row[:row.index(eos_id) + 1] if eos_id in row else row
        logprobs[i] = logp[:len(responses[i])]
    return (responses, logprobs) if return_logprobs else responses


def check_generate(model, prompts, limits, row_ids, temperature, top_p):
    """Refuse what cannot be generated, in one line."""
    if not len(prompts) == len(limits) == len(row_ids):
        raise ValueError(f"got {len(prompts)} prompts, {len(limits)} limits and {len(row_ids)} row_ids: "
                         "expected as many of each")
    if min(limits, default=1) < 1 or not (temperature == 0 or 1e-3 <= temperature < math.inf) or not 0 < top_p <= 1:
        raise ValueError(f"got max_new_tokens {min(limits, default=1)}, temperature {temperature}, top_p {top_p}: "
                         "expected at least 1; 0 (greedy), or at least 0.001; and above 0 up to 1")
    flat = [p for p in prompts if isinstance(p, str) or not hasattr(p, "__len__")]
    if flat:
        raise ValueError(f"a prompt is {flat[0]!r}: expected lists of ids, one per prompt")
    if not all(prompts):
        raise ValueError("a prompt is empty: expected at least one id (BOS) in each")
    prompt, new = max(((len(p), n) for p, n in zip(prompts, limits)), key=sum, default=(0, 0))
    if prompt + new > model.config.max_seq_len:
        raise ValueError(f"a prompt of {prompt} tokens and {new} new ones exceed the model's "
                         f"max_seq_len {model.config.max_seq_len}: shorten one of them")
    odd = [i for p in prompts for i in p if not 0 <= i < model.config.vocab_size or i != int(i)]
    if odd:
        raise ValueError(f"prompt ids must lie in 0..{model.config.vocab_size - 1}, got {odd[0]}: wrong tokenizer?")


def last_places(lengths, width):
    """Where rows of these lengths (B,) end, among B * width tokens laid end to end."""
    return torch.arange(len(lengths), device=lengths.device) * width + lengths - 1


def prefill(model, prompts, cache, rows):
    """Run prompts through the model, into these rows (b,) of a cache. -> the state of each last token (b, D)."""
    lengths, tokens = torch.tensor([len(p) for p in prompts], device=model.device), pad_right(prompts).to(model.device)
    cache.prompts_of = rows
    states = model.hidden(tokens, cache, last_places(lengths, tokens.shape[1]))
    cache.prompts_of = None
    cache.lengths[rows] = lengths
    cache.reads(int(cache.lengths.max()))
    return states


def make_room(model, prompts, cache, x, row, count, done, waiting):
    """Rows that have ended make room for prompts[waiting:], or, when there are no more, leave the batch.
    -> x, row, count, done, waiting, as `decode` has them."""
    ended = done.nonzero()[:, 0]
    fresh = torch.arange(waiting, min(waiting + len(ended), len(prompts)), device=model.device)
    if len(fresh):
        places = ended[:len(fresh)]
        x[places] = prefill(model, prompts[waiting:waiting + len(fresh)], cache, places)
        row[places], count[places], done[places] = fresh, 0, False
    if len(fresh) < len(ended):
        rest = (~done).nonzero()[:, 0]
        cache.keep(rest)
        x, row, count, done = x[rest], row[rest], count[rest], done[rest]
    return x, row, count, done, waiting + len(fresh)


@lru_cache
def recording_stream(device):
    """The stream on which a GPU's recordings are made. One for all of them, since cuBLAS keeps memory for each stream;
    but one for each GPU: torch's own is on the GPU that was current first, where it records nothing of another's."""
    return torch.cuda.Stream(device)


class Recorded:
    """A step without arguments, on tensors that stay where they are. On a GPU it is recorded when its shapes come for
    the second time, and replayed from then on: a thousand kernels started by one call instead of one by one. What is
    recorded must not wait for the GPU (`item`, `print`, `nonzero`)."""

    def __init__(self, step, device):
        self.step, self.graphs = step, {}
        # (autocast keeps casts of its own, which a recording would not find again)
        self.able = Llama.cuda_graphs and device.type == "cuda" and not torch.is_autocast_enabled("cuda")
        self.pool = torch.cuda.graph_pool_handle() if self.able else None
        self.stream = recording_stream(device) if self.able else None

    def __call__(self, *shapes):
        if not self.able:
            return self.step()
        if shapes not in self.graphs:                          # the first time as it is: its kernels are loaded
            self.graphs[shapes] = None
            return self.step()
        if self.graphs[shapes] is None:
            self.graphs[shapes] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[shapes], self.pool, self.stream, capture_error_mode="thread_local"):
                self.step()                                    # (recorded, not done)
        self.graphs[shapes].replay()


def decode(model, prompts, limits, u, pick, eos_id, banned, size, with_logprobs):
    """Decode N prompts, `size` at a time. limits: new ids per row; u (N, M) uniforms, M >= limits; pick(logits, u)
    -> ids.

    A row ends with EOS or at its limit. Every 8 tokens, and when all are at their limits, ended rows - if they are an
    eighth of the batch - make room for the next prompts, or, when there are none, leave. Returns ids and
    log-probabilities, lists of N rows; what comes after the end of a row is EOS (and 0.0).
    """
    N, M, device = *u.shape, model.device
    slots, limits = max(len(p) + n for p, n in zip(prompts, limits)), torch.tensor(limits, device=device)
    u = F.pad(u, (0, 1)).to(device)
    out = torch.full((N, M + 1), eos_id, device=device)           # the last column takes what ended rows go on saying
    logprobs = torch.zeros((N, M + 1), device=device)
    row, waiting = torch.arange(min(size, N), device=device), min(size, N)       # which prompt is where; the next one
    cache = KVCache(len(row), slots, device)
    x = prefill(model, prompts[:size], cache, row)                               # (B, D)
    count, done = torch.zeros_like(row), torch.zeros_like(row, dtype=torch.bool)
    last = torch.zeros_like(row)                                                 # the id that each row drew last
    horizon = int(limits[row].max())                                             # by then all rows here have ended

    def read():
        """What the model makes of the last ids; an ended row's is written over by its next."""
        x.copy_(model.hidden(last[:, None], cache)[:, 0])
        cache.lengths.add_(~done)

    read = Recorded(read, device)
    for step in itertools.count():
        if step % 8 == 0 or step == horizon:
            if not torch.isfinite(x).all():
                raise FloatingPointError("hidden states of the model that samples are not finite")
            ended = int(done.sum())
            if ended == len(row) and waiting == N:
                return out[:, :M].tolist(), logprobs[:, :M].tolist()
            if 8 * ended >= len(row):
                x, row, count, done, waiting = make_room(model, prompts, cache, x, row, count, done, waiting)
                last, horizon = last[:len(row)], step + int((limits[row] - count).max())
        logits = model.output(x).float().masked_fill_(banned, BANNED)            # (B, V)
        token, place = pick(logits, u[row, count]), count.masked_fill(done, M)
        out[row, place] = token
        if with_logprobs:
            logprobs[row, place] = F.log_softmax(logits, dim=-1).gather(-1, token[:, None])[:, 0]
        last.copy_(token)
        count += ~done
        done |= (token == eos_id) | (count == limits[row])
        if step + 1 < horizon:
            read(len(row), cache.seen)
            cache.reads(min(cache.used + 1, cache.slots - 1))


# ------------------------------------------------------------------------------------------------ checkpoint files

HF_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head", "layers": "model.layers",
            "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "wq": "q_proj", "wk": "k_proj",
            "wv": "v_proj", "wo": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
            "attention": "self_attn", "feed_forward": "mlp"}
OUR_NAMES = {v.removeprefix("model."): k for k, v in HF_NAMES.items()}


def hf_name(name):
    """layers.0.attention.wq.weight -> model.layers.0.self_attn.q_proj.weight"""
    return ".".join(HF_NAMES.get(part, part) for part in name.split("."))


def our_name(name):
    """model.layers.0.self_attn.q_proj.weight -> layers.0.attention.wq.weight"""
    return ".".join(OUR_NAMES.get(part, part) for part in name.removeprefix("model.").split("."))


def load_llama(path, device="cpu", dtype=torch.float32):
    """Read a model from a Hugging Face folder (config.json) or a Meta folder (params.json), told apart by their files.

    Tensors are read one at a time and cast on the way: the peak is the model in `dtype` and one tensor. The model is in
    eval mode: dropout, if adapters have any, waits for `model.train()`. ValueError names what is missing, extra, of a
    wrong shape, or not implemented here; FileNotFoundError if there is no model.
    """
    config, readers = open_checkpoint(path)
    model = empty_llama(config, device, dtype)
    fill(model, readers, path)
    return model


def open_checkpoint(path):
    """LlamaConfig of a model folder, and a dictionary: our name -> function that reads that tensor from the file."""
    path = Path(path)
    if is_meta_folder(path):
        return meta_checkpoint(path)
    return read_model_config(path), {our_name(name): read for name, read in hf_tensors(path).items()}


def is_meta_folder(path):
    """Meta's layout (True) or Hugging Face's (False); FileNotFoundError if neither."""
    if (Path(path) / "config.json").is_file():
        return False
    if (Path(path) / "params.json").is_file():
        return True
    raise FileNotFoundError(f"{path} holds no model: expected config.json (Hugging Face) or params.json (Meta)")


def read_model_config(path):
    """LlamaConfig of a model folder, without reading its weights."""
    path = Path(path)
    if is_meta_folder(path):
        return meta_config(path)[0]
    about = read_json(path / "config.json")
    if isinstance(about, dict) and "LlamaRewardModel" in (about.get("architectures") or ()):
        raise ValueError(f"{path} is a reward model, which predicts no tokens: expected a language model")
    return hf_config(about, path)


def empty_llama(config, device="cpu", dtype=torch.float32, lm_head=True):
    """A model whose weights are allocated once, in their final dtype, and hold nothing yet. In eval mode: what is read
    from files computes what its author saw, without the dropout that an adapter's file may name."""
    with torch.device("meta"):
        model = Llama(config, lm_head).to(dtype)
    model.to_empty(device=device).tie()
    return model.eval()


def read_text(path):
    """A UTF-8 file's text; a ValueError that names the file if it is something else."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")        # with or without a byte order mark
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text (byte {e.start})") from None


def read_json(path):
    """A JSON file's content; a ValueError that names file and line if it is broken."""
    return parse_json(read_text(path), path)


def parse_json(text, path, line=None):
    """What a JSON text says: a file, or one line of a file of JSON lines; a ValueError names it if it is broken."""
    where = f"{path}, line {line}" if line else path
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        lines = "; JSON lines? then its name must end in .jsonl" if e.msg == "Extra data" and not line else ""
        raise ValueError(f"{path}, line {line or e.lineno}: broken JSON ({e.msg}{lines})") from None
    except RecursionError:
        raise ValueError(f"{where}: JSON nested too deeply") from None
    except ValueError as e:                                          # a number of more than 4,300 digits
        raise ValueError(f"{where}: JSON that Python does not read ({e})") from None


def hf_config(raw, path):
    """Hugging Face's config.json -> LlamaConfig; refuses by name what this code does not implement."""
    file = f"{path}/config.json"
    if not isinstance(raw, dict):
        raise ValueError(f"{file} holds a {type(raw).__name__}, expected the settings of a LLaMA")
    rope_theta = refuse_variants(raw, file)
    sizes = {"vocab_size": "vocab_size", "dim": "hidden_size", "n_layers": "num_hidden_layers",
             "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "ffn_dim": "intermediate_size",
             "head_dim": "head_dim", "max_seq_len": "max_position_embeddings"}
    given = {ours: raw[key] for ours, key in sizes.items() if raw.get(key) is not None}
    for key in ("vocab_size", "dim", "n_layers", "n_heads", "ffn_dim"):
        if key not in given:
            raise ValueError(f"{file} has no {sizes[key]!r}: "
                             "is this a LLaMA, and was the stage that writes it run to its end?")
    wrong = [sizes[k] for k, v in given.items() if type(v) is not int or v < 1]
    if wrong:
        raise ValueError(f"{file}: {wrong[0]} = {raw[wrong[0]]!r} is not a whole number of at least 1")
    eps = raw.get("rms_norm_eps")
    try:
        return LlamaConfig(**given, norm_eps=1e-6 if eps is None else numeric(eps, "rms_norm_eps"),
                           rope_theta=rope_theta, tie_embeddings=bool(raw.get("tie_word_embeddings", False)))
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None


def refuse_variants(raw, file):
    """ValueError for a config.json that means another network than `Llama`. -> rope_theta, which has several places."""
    ropes = [r for r in (raw.get("rope_parameters"), raw.get("rope_scaling")) if r]
    kinds = [str(r.get("rope_type", r.get("type", "default")) if isinstance(r, dict) else r) for r in ropes]
    thetas = [numeric(r["rope_theta"], f"{file}: rope_theta") for r in (raw, *ropes)
              if isinstance(r, dict) and r.get("rope_theta") is not None] or [10000.0]
    window = raw.get("sliding_window") if raw.get("use_sliding_window", True) else None
    positions = numeric(raw.get("max_position_embeddings") or 2048, f"{file}: max_position_embeddings")
    model_type = raw.get("model_type") or (raw.get("architectures") or ["llama"])[0]
    refused = {"model_type": (model_type,
                              "llama" not in str(model_type).lower() or raw.get("model_type", "llama") != "llama"),
               "rope_scaling": (next((r for r, kind in zip(ropes, kinds) if kind != "default"), None),
                                set(kinds) - {"default"}),
               "rope_theta": (thetas, len(set(thetas)) > 1),
               "sliding_window": (window, window and numeric(window, f"{file}: sliding_window") < positions),
               **{key: (raw.get(key), raw.get(key, plain) not in (plain, None)) for key, plain in (
                   ("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu"), ("partial_rotary_factor", 1),
                   ("quantization_config", None))}}
    for what, (got, bad) in refused.items():
        if bad:
            raise ValueError(f"{file}: {what} = {got} is not implemented here (plain LLaMA only)")
    return thetas[0]


def numeric(x, what):
    """A number as a float; ValueError for anything else."""
    if type(x) not in (int, float):
        raise ValueError(f"{what} = {x!r} is not a number")
    return float(x)


WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",
                "pytorch_model.bin", "pytorch_model.bin.index.json")


def weight_files(path):
    """The files of a Hugging Face folder that hold its weights, sought in transformers' order: file -> the names that
    the index looks for in it (None: there is no index, all of them)."""
    found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path} has no weights: expected one of {', '.join(WEIGHT_FILES)}")
    if found.suffix != ".json":
        return {found: None}
    index = read_json(found)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise ValueError(f"{found}: expected a weight_map from tensors to files")
    missing = sorted(file for file in set(where.values()) if not (path / file).is_file())
    if missing:
        raise FileNotFoundError(f"{path} has no {missing[0]}, which {found.name} names")
    return {path / file: [name for name in where if where[name] == file] for file in sorted(set(where.values()))}


def hf_tensors(path):
    """Hugging Face's name -> function that reads that tensor, for all weights of a folder."""
    readers = {}
    for file, wanted in weight_files(path).items():
        if file.suffix == ".safetensors":
            file.open("rb").close()      # (safe_open calls a file that may not be read a missing one)
            try:
                f = safe_open(file, framework="pt")
            except SafetensorError as e:
                raise ValueError(f"{file} cannot be read ({e}): truncated?") from None
            found = {name: partial(f.get_tensor, name) for name in f.keys()}
        else:
            found = {name: lambda tensor=tensor: tensor for name, tensor in read_pickle(file).items()}
        lost = [name for name in wanted or () if name not in found]
        if lost:
            raise ValueError(f"{file} has no {lost[0]}, which the index looks for there")
        readers |= found if wanted is None else {name: found[name] for name in wanted}
    return readers


def read_pickle(path):
    """A dictionary of tensors that torch.save wrote, memory-mapped where its format allows. A pickle can run code when
    it is read: weights_only refuses everything but tensors."""
    try:
        content = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception:      # (torch.load names a damaged or a forbidden file in many ways)
        raise ValueError(f"{path} cannot be read as tensors: it is damaged (truncated?), or holds more than tensors, "
                         "which is not opened, since a pickle can run code") from None
    if not isinstance(content, dict) or not all(isinstance(k, str) and torch.is_tensor(t) for k, t in content.items()):
        raise ValueError(f"{path}: expected a dictionary of tensors, got a {type(content).__name__} of other things")
    return content


def meta_config(path):
    """LlamaConfig of Meta's params.json, and the shards consolidated.*.pth, if they are there: the widths that
    params.json leaves out are those of the tensors; without them LLaMA's rules and vocabulary give them."""
    file, files = path / "params.json", sorted(path.glob("consolidated.*.pth"))
    raw = read_json(file)
    given = {k: v for k, v in raw.items() if v is not None} if isinstance(raw, dict) else {}
    optional = {"n_kv_heads", "max_seq_len", "multiple_of"} & given.keys()
    for key in ("dim", "n_layers", "n_heads", *optional, *["vocab_size"] * (given.get("vocab_size", -1) != -1)):
        if type(given.get(key)) is not int or given[key] < 1:
            raise ValueError(f"{file}: {key} = {given.get(key)!r} is not a whole number of at least 1")
    odd = [k for k in ("use_scaled_rope", "moe", "lora_args", "quantization_args") if given.get(k)]
    if odd:
        raise ValueError(f"{path}: {odd[0]} is not implemented here")
    if [f.name for f in files] != [f"consolidated.{i:02}.pth" for i in range(len(files))]:
        raise ValueError(f"{path} holds {', '.join(f.name for f in files)}: a shard is missing")
    shards = [read_pickle(f) for f in files]
    vocab_size, ffn_dim = (shard_widths(path, given, shards) if shards
                           else (given.get("vocab_size", -1), meta_ffn_dim(given)))
    return LlamaConfig(
        vocab_size=vocab_size if vocab_size > 0 else 32000, dim=given["dim"], n_layers=given["n_layers"],
        n_heads=given["n_heads"], n_kv_heads=given.get("n_kv_heads"), ffn_dim=ffn_dim,
        norm_eps=numeric(given.get("norm_eps"), f"{file}: norm_eps"),
        rope_theta=numeric(given.get("rope_theta", 10000.0), f"{file}: rope_theta"),
        max_seq_len=given.get("max_seq_len", 2048)), shards


def meta_ffn_dim(given):
    """The feed-forward width by Meta's rule: two thirds of 4 D, perhaps scaled, rounded up to a multiple."""
    scale, unit = numeric(given.get("ffn_dim_multiplier", 1), "ffn_dim_multiplier"), given.get("multiple_of", 256)
    width = int(scale * int(8 * given["dim"] / 3))
    return -(-width // unit) * unit


def shard_widths(path, given, shards):
    """(vocabulary, feed-forward width) of Meta's shards; ValueError if one of them is missing or there twice."""
    first, n = shards[0], len(shards)
    wanted = ("output.weight", "layers.0.feed_forward.w1.weight", "layers.0.attention.wq.weight")
    absent = [k for k in wanted if any(k not in shard for shard in shards)]
    if absent:
        raise ValueError(f"{path}: {absent[0]} is missing")
    vocab_size, ffn_dim, rows = (first[k].shape[0] * n for k in wanted)
    if rows != given["dim"]:
        raise ValueError(f"{path}: {n} files consolidated.*.pth hold {rows} rows of wq, params.json says "
                         f"{given['dim']}: a shard is missing, or one is too many")
    if any(torch.equal(first[wanted[2]], shard[wanted[2]]) for shard in shards[1:]):
        raise ValueError(f"{path}: two of the shards are the same file")
    return vocab_size, ffn_dim


def meta_checkpoint(path):
    """Meta's params.json and consolidated.*.pth -> LlamaConfig, and our name -> function that reads that tensor.

    Model-parallel shards are joined on the side that was split; rotary pairs go from interleaved to half-split.
    """
    if not any(path.glob("consolidated.*.pth")):
        raise FileNotFoundError(f"{path} has params.json but no consolidated.*.pth")
    config, shards = meta_config(path)

    def read(name):
        kind = name.split(".")[-2]
        if kind.endswith("norm") or kind == "rope":
            return shards[0][name]
        try:
            tensor = torch.cat([shard[name] for shard in shards],
                               dim=1 if kind in ("wo", "w2", "tok_embeddings") else 0)
        except (KeyError, RuntimeError):
            raise ValueError(f"{path}: the shards' parts of {name} do not fit together") from None
        return half_split(tensor, config.head_dim) if kind in ("wq", "wk") else tensor

    return config, {name: partial(read, name) for name in shards[0]}


def half_split(weight, head_dim):
    """Rows of wq or wk: within each head, pairs (0,1)(2,3).. -> first members, then second members."""
    heads = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


@torch.no_grad()
def fill(module, readers, path):
    """Put tensors (our name -> function that reads one) into the module's parameters, one at a time, cast on the way.

    ValueError names what is missing, extra, of another shape, or no plain floating-point numbers.
    """
    params = dict(module.named_parameters(remove_duplicate=False))
    readers = {name: read for name, read in readers.items() if not name.endswith(("rotary_emb.inv_freq", "rope.freqs"))}
    matrices = [name for name in ("tok_embeddings.weight", "output.weight") if name in readers]
    # one matrix, two names: one will do
    if matrices and getattr(module, "config", None) and module.config.tie_embeddings:
        if len(matrices) == 2 and not torch.equal(*(readers[name]() for name in matrices)):
            raise ValueError(f"{path}: the config ties output to embeddings, but the file has two different matrices")
        other = "output.weight" if matrices[0] == "tok_embeddings.weight" else "tok_embeddings.weight"
        readers.pop(other, None), params.pop(other, None)
    for name in sorted(set(readers) - set(params))[:1]:
        raise ValueError(f"{path}: tensor {name} {tuple(readers[name]().shape)} has no place in this model")
    missing = sorted(set(params) - set(readers))
    if missing:
        raise ValueError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}")
    for name, read in readers.items():
        tensor = read()
        if tensor.shape != params[name].shape:
            raise ValueError(f"{path}: tensor {name} has shape {tuple(tensor.shape)}, "
                             f"expected {tuple(params[name].shape)}")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"{path}: tensor {name} is {tensor.dtype}: quantised weights are not implemented here")
        params[name].copy_(tensor)
        if not all(x.isfinite() for x in params[name].aminmax()):
            raise ValueError(f"{path}: tensor {name} holds numbers that are not finite (NaN or infinite)")


def hf_config_json(config, dtype):
    """LlamaConfig -> the dictionary of Hugging Face's config.json."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.vocab_size,
            "hidden_size": config.dim, "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
            "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim, "intermediate_size": config.ffn_dim,
            "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta, "hidden_act": "silu",
            "max_position_embeddings": config.max_seq_len, "tie_word_embeddings": config.tie_embeddings,
            "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
            "torch_dtype": str(dtype).removeprefix("torch.")}


def save_llama(model, path, **extra):
    """Write a Hugging Face folder (config.json, model.safetensors) that load_llama and transformers read.

    Adapters have to be merged first (lora.merge_lora); a model that still holds some is refused. `extra` keys join
    config.json.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}   # tied weights: once
    unknown = [name for name in tensors if name.split(".")[-2] not in HF_NAMES]
    if unknown:
        raise ValueError(f"{unknown[0]} is not a LLaMA weight: merge the adapters before saving")
    save_weights({hf_name(name): t for name, t in tensors.items()}, path / "model.safetensors")
    write_json(path / "config.json", hf_config_json(model.config, model.tok_embeddings.weight.dtype) | extra)


def write_json(path, content):
    """A JSON file under a temporary name, then renamed: whole or not at all."""
    Path(f"{path}.tmp").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(f"{path}.tmp", path)


def save_weights(tensors, path):
    """A safetensors file under a temporary name, then renamed: nobody ever sees half of it."""
    save_file(tensors, f"{path}.tmp", metadata={"format": "pt"})
    os.replace(f"{path}.tmp", path)


def save_shards(tensors, folder, shard_bytes=2 << 30):
    """Write (name, tensor) pairs, in the order in which they come, as safetensors shards with their index."""
    folder, weight_map, shard = Path(folder), {}, {}
    folder.mkdir(parents=True, exist_ok=True)

    def write():
        file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_weights(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in tensors:
        shard[name] = tensor.contiguous()
        if sum(t.numel() * t.element_size() for t in shard.values()) >= shard_bytes:
            write()
    if shard:
        write()
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def fingerprint(model):
    """A short hash of a model's sizes and of 64 values of each weight: the same before and after a change of dtype."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, p in model.named_parameters():
        if ".lora_" not in name:
            flat = p.detach().flatten()
            n = min(64, flat.numel())       # (places in integers: linspace's float32 skips some above 2^24)
            picked = flat[(torch.arange(n) * (flat.numel() - 1) // max(1, n - 1)).to(flat.device)]
            digest.update(name.replace(".base.", ".").encode()
                          + picked.bfloat16().cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
