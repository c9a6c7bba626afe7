"""The reward model and the critic: a LLaMA trunk with a scalar head; and the module that PPO trains.

RLHF needs four models. Two frozen trunks, or one, are enough, since each model is a trunk plus an adapter:

                  two trunks (--reward is a full model)          one trunk (--reward is an adapter on the SFT model)
    policy        SFT trunk + "policy"                           SFT trunk + "policy"
    reference     SFT trunk, no adapter                          SFT trunk, no adapter
    reward        reward trunk + reward head                     SFT trunk + "reward" + reward head
    value         reward trunk + "value" + value head            SFT trunk + "value" (starts as "reward") + value head

Legend   B batch, T tokens, R response tokens, D width, N response tokens of a batch laid end to end

Departures from the paper's code: heads are float32; the reward model reads the ids that were sampled, at the last real
token, never re-tokenised text; whether that token is the EOS is written in the model's config (`score_eos`).
AlpacaFarm's released reward model has seen text without EOS, so a final EOS is left out for it.
"""
import math
import shutil
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from data import length_mask, pack, response_places
from lora import (adapter, adapter_chain, add_lora, copy_lora, load_lora, lora_layers, lora_parameters, merge_lora,
                  merged_readers, read_adapter_config, read_tensors, save_lora, targets_of)
from model import (MAX_LOGITS, WEIGHT_FILES, Linear, Llama, LlamaConfig, ban_mask, empty_llama, eval_mode, fill,
                   fingerprint, hf_config, hf_config_json, hf_name, hf_tensors, last_places, open_checkpoint,
                   our_name, packable, packed_weights, read_json, read_model_config, response_logprobs, save_llama,
                   save_shards, save_weights, write_json)
from ppo import Rollout, join_rollouts
from regularizers import EXACT


def bradley_terry_loss(chosen, rejected):
    """-log sigmoid(chosen - rejected), the mean over pairs (Bradley & Terry 1952; Stiennon et al., arXiv 2009.01325,
    eq. 1).

    chosen, rejected (B,) scores -> scalar, nats per pair. log 2 when the scores say nothing.
    """
    return -F.logsigmoid(chosen - rejected).mean()


class ScalarHead(nn.Linear):
    """One float32 number per state: (.., D) -> (..,). Zero at the start, so that a new head has no opinion."""

    def __init__(self, dim):
        super().__init__(dim, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, states):
        return super().forward(states.float())[..., 0]


def autocast(model, dtype):
    """Fully trained models keep float32 weights and compute in `dtype` (None: in their own); adapters need nothing."""
    return nullcontext() if dtype in (None, torch.float32) else torch.autocast(model.device.type, dtype)


class RewardModel(nn.Module):
    """A trunk (without output matrix, or shared with a policy), the adapter that it uses, and a scalar head.

    score_eos: the model was trained on text with EOS and reads the score there; False (AlpacaFarm's released model): a
    final EOS is left out, and the last token before it is read.
    """

    def __init__(self, trunk, adapter_name=None, score_eos=True, autocast_dtype=None):
        super().__init__()
        self.trunk, self.adapter_name, self.score_eos = trunk, adapter_name, score_eos
        self.autocast_dtype = autocast_dtype
        self.head = ScalarHead(trunk.config.dim).to(trunk.device)

    def scores(self, tokens, lengths, eos_id=2):
        """tokens (B, T) right-padded, lengths (B,) with the EOS counted -> scores (B,), float32."""
        if not self.score_eos:
            ends = tokens.gather(1, lengths[:, None] - 1)[:, 0] == eos_id
            lengths = (lengths - ends.long()).clamp(min=1)
        with adapter(self.trunk, self.adapter_name), autocast(self.trunk, self.autocast_dtype):
            states = self.trunk.hidden(tokens, read=last_places(lengths, tokens.shape[1]))       # (B, D)
        return self.head(states)

    forward = scores


class Evaluation(NamedTuple):
    """What the policy and the critic say of given responses; 0 in the padding."""
    logprobs: torch.Tensor             # (B, R) of the response's tokens, nats
    values: torch.Tensor | None        # (B, R), values[t] = V(state that predicts token t)
    entropy: torch.Tensor | None       # (B, R) of the next-token distribution, nats, detached; None in training
    ref_logprobs: torch.Tensor | None  # (B, R), if the reference was asked
    divergence: torch.Tensor | None    # (B, R) exact divergence from the reference, differentiable, if it was asked


class ActorCritic(nn.Module):
    """Policy and critic as one module, so that one DistributedDataParallel and one backward serve both.

    policy: Llama with the adapter `policy_adapter` (None: fully trained, then `ref` is a frozen copy). critic: a trunk,
    maybe the same one, with `value_adapter`; None in the SFT stage, which trains the policy's half alone.
    banned_mask (V,): ids that are never sampled.
    """

    def __init__(self, policy, policy_adapter=None, critic=None, value_adapter=None, banned_mask=None, ref=None,
                 autocast_dtype=None):
        super().__init__()
        self.policy, self.policy_adapter = policy, policy_adapter
        self.critic, self.value_adapter = critic, value_adapter
        self.value_head = ScalarHead(critic.config.dim).to(critic.device) if critic is not None else None
        self.ref, self.autocast_dtype, self.banned_mask = ref, autocast_dtype, banned_mask

    @contextmanager
    def acting(self, trained=True):
        """The policy to sample from, or (trained=False) the reference, in the precision that the update uses."""
        with adapter(self.policy, self.policy_adapter if trained else None), autocast(self.policy, self.autocast_dtype):
            yield self.policy if trained else self.ref or self.policy

    def forward(self, tokens, prompt_lengths, response_lengths, divergence=None):
        """tokens (B, T) right-padded, lengths (B,) -> Evaluation.
        divergence: name of an exact one, needs the reference."""
        places = response_places(prompt_lengths, response_lengths, tokens.shape[1])              # (N,)
        targets = tokens.flatten()[places]
        states = lambda trunk: trunk.hidden(tokens, read=places - 1)                             # (N, D)
        with autocast(self.policy, self.autocast_dtype):
            ref = None
            if divergence:
                with torch.no_grad(), self.acting(trained=False) as ref_model:
                    ref = ref_model.output, states(ref_model)
            with adapter(self.policy, self.policy_adapter):
                flat = response_logprobs(self.policy.output, states(self.policy), targets, self.banned_mask, ref,
                                         divergence and EXACT[divergence])
            if self.critic is not None:
                with adapter(self.critic, self.value_adapter):
                    value_states = states(self.critic)
        values = self.value_head(value_states) if self.critic is not None else None
        logprobs, entropy, ref_logprobs, diverged = flat
        mask = length_mask(response_lengths, int(response_lengths.max()))                        # (B, R)
        return Evaluation(*(x if x is None else torch.zeros(mask.shape, device=x.device).masked_scatter(mask, x)
                            for x in (logprobs, values, entropy, ref_logprobs, diverged)))


def by_length(prompts, responses, size):
    """Groups of `size` row indices, rows of similar length together, so that little is spent on padding."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    return [order[i:i + size] for i in range(0, len(order), size)]


@torch.no_grad()
def score_responses(reward_model, prompts, responses, eos_id, micro_batch):
    """The reward model's score of each response, ids in -> (B,) float32 on the CPU."""
    device, scores = reward_model.trunk.device, torch.zeros(len(prompts))
    with eval_mode(reward_model), packed_weights(reward_model):
        for index in by_length(prompts, responses, micro_batch):
            tokens, prompt_lengths, lengths = pack([prompts[i] for i in index], [responses[i] for i in index])
            scores[index] = reward_model.scores(tokens.to(device), (prompt_lengths + lengths).to(device), eos_id).cpu()
    return scores


@torch.no_grad()
def assess(net, reward_model, prompts, responses, eos_id, micro_batch):
    """What policy, critic, reference and reward model say of responses, ids in. -> Rollout on the CPU, rows as given.

    Rows of similar length share a forward pass. Dropout is off: these are PPO's old_logprobs.
    """
    device = net.policy.device
    scores = score_responses(reward_model, prompts, responses, eos_id, micro_batch)
    groups, parts = by_length(prompts, responses, micro_batch), []
    # a policy that trains whole is packed like its frozen reference: another kernel rounds otherwise, and KL is not 0
    with eval_mode(net), packed_weights(net), packed_weights(net.policy, frozen_only=False):
        for index in groups:
            batch = [x.to(device) for x in pack([prompts[i] for i in index], [responses[i] for i in index])]
            out = net(*batch, divergence="kl")
            finished = torch.tensor([responses[i][-1] == eos_id for i in index])
            parts.append(Rollout(*batch, finished, scores[index], out.logprobs, out.ref_logprobs,
                                 out.values, out.entropy, out.divergence).to("cpu"))
    return join_rollouts(parts).rows(torch.tensor(sum(groups, [])).argsort())


# ------------------------------------------------------------------------------------------------- the four models

def load_trunk(path, device="cpu", dtype=torch.float32):
    """A model from its folder (load_llama); or, from an adapter's folder, the model that it was trained on with the
    adapter merged in, tensor by tensor, in float32: such an SFT model is then an ordinary one, and PPO's reference."""
    base, adapters = adapter_chain(path)
    config, readers = open_checkpoint(base)
    for folder in adapters:
        readers = merged_readers(readers, folder)
    model = empty_llama(config, device, dtype)
    fill(model, readers, path)
    return model


def build_models(model_path, reward_path, device, dtype, banned_ids=(), rank=8, alpha=64.0, dropout=0.0):
    """The four models of PPO on one or two trunks, ready to train. -> ActorCritic (reference included), RewardModel.

    rank, alpha: of the policy's adapter, and on two trunks of the value's; on one trunk the value adapter is a copy of
    the reward adapter and has its rank and alpha.

    rank 0 trains all weights of policy and critic instead, kept in float32 and computed in `dtype`; so is the frozen
    copy that is the reference, or KL would not be exactly 0 at the start.
    """
    policy = load_trunk(model_path, device, dtype if rank else torch.float32).requires_grad_(False)
    reward_model = load_reward_model(reward_path, device, dtype, trunk=policy).requires_grad_(False)
    banned_mask = ban_mask(policy.config.vocab_size, banned_ids, device)
    if rank == 0:
        reward_model.autocast_dtype = dtype
        critic = load_critic(model_path, reward_path, device).requires_grad_(True)
        return ActorCritic(load_trunk(model_path, device), None, critic, None, banned_mask, policy, dtype), reward_model
    critic = reward_model.trunk
    add_lora(policy, "policy", rank, alpha, dropout)
    if critic is policy:                                    # one trunk: the value adapter starts as the reward adapter
        layers = lora_layers(critic, "reward")
        first = layers[0][1]
        add_lora(critic, "value", first.rank("reward"), first.alpha["reward"], dropout, targets_of(layers))
        copy_lora(critic, "reward", "value")
    else:
        add_lora(critic, "value", rank, alpha, dropout)
    return ActorCritic(policy, "policy", critic, "value", banned_mask), reward_model


def load_critic(model_path, reward_path, device):
    """A trunk in float32 that computes what the reward model computes, its adapter (if it is one) merged."""
    trunk = load_trunk(model_path, device) if is_adapter(reward_path) else None
    model = load_reward_model(reward_path, device, trunk=trunk)
    if model.adapter_name:
        merge_lora(model.trunk, model.adapter_name)
        model.trunk.output = None
    return model.trunk


def save_policy(net, folder, base_model):
    """The trained policy in `folder`: an adapter (PEFT's files) of base_model, or a whole model (Hugging Face's)."""
    if net.policy_adapter:
        save_lora(net.policy, net.policy_adapter, folder, base_model)
    else:
        save_llama(net.policy, folder)


def load_policy(net, folder):
    """Put what save_policy wrote in place of an untrained policy."""
    if net.policy_adapter:
        load_lora(net.policy, net.policy_adapter, folder)
    else:
        fill(net.policy, open_checkpoint(folder)[1], folder)


# ------------------------------------------------------------------------------------------------------ memory ahead

def linear_parameters(config, lm_head=True):
    """How many of a LLaMA's parameters are weights of linear layers: those of which packed_weights keeps copies."""
    with torch.device("meta"):
        return sum(m.weight.numel() for m in Llama(config, lm_head).modules() if isinstance(m, Linear))


def count_parameters(config, lm_head=True, rank=0):
    """(parameters of a LLaMA, parameters of one adapter of this rank on it), counted on tensors without storage."""
    with torch.device("meta"):
        model = Llama(config, lm_head)
    total = sum(p.numel() for p in model.parameters())
    if rank:
        add_lora(model, "one", rank, 1.0)
    return total, sum(p.numel() for p in lora_parameters(model, "one"))


def saved_bytes(config, size, on_cpu, full=False):
    """Bytes that one token in one layer keeps for the backward pass -> (up to its attention, past it).

    Read off model.Block, at `size` bytes per number: the norm and the adapters of wq, wk and wv keep their input,
    attention q, k, v and its output, which is wo's input (on a CPU in float32, then wo's once more); the other norm its
    input, SwiGLU two rows of width F. Training all weights adds the normed rows, the inputs of w1 and w3, and of w2.
    """
    c, heads, kv = config, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    wide = 4 if on_cpu and not full else size
    to_attention = size * 2 * c.dim + wide * (2 * heads + 2 * kv) + (wide != size) * size * heads
    past_it = size * (c.dim + 2 * c.ffn_dim)
    return to_attention + full * size * c.dim, past_it + full * size * (2 * c.dim + c.ffn_dim)


def training_memory(config, dtype, tokens, rank, frozen, trained, adapters, checkpointing, response_tokens, on_cpu):
    """Bytes of one process that trains: weights, what the optimiser keeps, activations, logits. -> {item: bytes}

    tokens: of one micro-batch, padding included; response_tokens: of those, the ones whose state is read. frozen: per
    frozen trunk (whether it has an output matrix, its dtype); trained: per trunk of which all weights train, whether it
    has an output matrix; adapters: how many of this rank train instead; on_cpu: there model.packed_weights copies.
    """
    size, full = dtype.itemsize, not adapters
    one_adapter = count_parameters(config, rank=rank)[1]
    weights = sum(count_parameters(config, lm_head)[0] * kept_in.itemsize for lm_head, kept_in in frozen)
    numbers = adapters * one_adapter + sum(count_parameters(config, lm_head)[0] for lm_head in trained)
    graphs = adapters or len(trained)                                     # forward passes whose graphs live at once
    to_attention, past_it = saved_bytes(config, size, on_cpu, full)
    layer = tokens * (to_attention + past_it)
    # past its attention, the last layer works for the response alone
    layers = config.n_layers * layer - (tokens - response_tokens) * past_it
    kept = graphs * (config.n_layers * tokens * config.dim * size if checkpointing else layers) + checkpointing * layer
    chunk = min(response_tokens * config.vocab_size, max(MAX_LOGITS, config.vocab_size))
    # packed on first use: for the gradient, too, if adapters train; none in autocast, which full training in bf16 is
    packs = on_cpu * (2 if adapters else size == 4)
    copies = sum(linear_parameters(config, lm_head and response_tokens) * kept_in.itemsize
                 for lm_head, kept_in in frozen if packable(kept_in))
    sampling = linear_parameters(config) * 4 * packable(torch.float32)             # of weights that train
    return {"frozen weights": weights, "packed copies of them": packs * copies,
            "packed copies while sampling": packs * sampling if True in trained else 0,
            "trained weights, gradients, Adam": numbers * 16,
            "copies for autocast": numbers * size if full and size < 4 else 0,
            "activations of a micro-batch": kept + tokens * 4 * config.ffn_dim * size,
            # scoring holds six float32 tensors at once: two log-probabilities, p, their difference, products
            "logits, in chunks": chunk * (6 * 4 + size)}


def kv_cache_bytes(config, dtype, rows, slots):
    """Keys and values of all layers for `rows` sequences of up to `slots` tokens."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * rows * slots * dtype.itemsize


# ------------------------------------------------------------------------------------------------------------- files

def save_reward_model(model, path, **extra):
    """A full reward model as a folder (tensors named backbone_model.* and reward_head.*, as AlpacaFarm's), or, if it
    is an adapter, a PEFT folder with reward_head.safetensors and the fingerprint of the trunk that it belongs to."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    head = {f"reward_head.{k}": v.detach().cpu().contiguous() for k, v in model.head.named_parameters()}
    about = {"score_eos": model.score_eos} | extra
    if model.adapter_name is None:
        trunk = {f"backbone_model.{hf_name(k)}": v.detach().cpu().contiguous()
                 for k, v in model.trunk.named_parameters() if not k.startswith("output.")}
        save_weights(trunk | head, path / "model.safetensors")
        config = hf_config_json(model.trunk.config, model.trunk.tok_embeddings.weight.dtype)
        about = config | {"architectures": ["LlamaRewardModel"]} | about
    else:
        save_lora(model.trunk, model.adapter_name, path)
        save_weights(head, path / "reward_head.safetensors")
        about |= {"trunk_fingerprint": fingerprint(model.trunk)}
    write_json(path / "config.json", about)


def is_adapter(path):
    """Whether a folder holds an adapter rather than a full model."""
    return (Path(path) / "adapter_config.json").is_file()


def load_reward_model(path, device="cpu", dtype=torch.float32, trunk=None, adapter_name="reward"):
    """Read a full reward model - one that save_reward_model wrote, or AlpacaFarm's - or an adapter, which joins `trunk`
    under `adapter_name`.

    ValueError if the adapter was trained on another trunk (by fingerprint), or if a tensor is missing, extra or of
    another shape.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no reward model: expected config.json")
    about = read_json(path / "config.json")
    if not isinstance(about, dict):
        raise ValueError(f"{path}/config.json holds a {type(about).__name__}, expected the settings of a reward model")
    if is_adapter(path):
        return load_reward_adapter(path, about, trunk, adapter_name)
    readers = reward_readers(path)
    config = (backbone_config(path, about, readers, trunk) if about.get("model_type") == "reward_model"
              else hf_config(about, path))
    model = RewardModel(empty_llama(config, device, dtype, lm_head=False), score_eos=about.get("score_eos", False))
    fill(model, readers, path)
    return model.eval()


def reward_readers(path):
    """Our name -> function that reads that tensor, for a full reward model; ValueError if it has no head."""
    readers = {reward_name(k): read for k, read in hf_tensors(path).items() if "lm_head" not in k}
    if "head.weight" not in readers:
        raise ValueError(f"{path} has no tensor reward_head.weight: is it a language model? Expected a reward model")
    return readers


def is_model_folder(path):
    """Whether a folder says a LLaMA's sizes."""
    return (path / "config.json").is_file() or (path / "params.json").is_file()


def backbone_config(path, about, readers, policy=None):
    """LlamaConfig of AlpacaFarm's reward model, whose config.json only names the folder of its backbone.

    From that folder, if it is here; else from the policy, if its sizes fit; else from the tensors, which tell neither
    the head width (LLaMA's 128, unless the file has rotary frequencies) nor norm_eps (LLaMA 1's 1e-6). The vocabulary
    is the tensors': AlpacaFarm added a [PAD].
    """
    shape = lambda name: readers[f"trunk.{name}"]().shape
    try:
        (vocab_size, dim), ffn_dim = shape("tok_embeddings.weight"), shape("layers.0.feed_forward.w1.weight")[0]
        kv_width, n_layers = shape("layers.0.attention.wk.weight")[0], sum("attention.wq" in name for name in readers)
    except KeyError as e:
        raise ValueError(f"{path}: tensor {e} is missing: is this a reward model on a LLaMA?") from None
    backbone = Path(about.get("backbone_model_name_or_path") or "-")
    if is_model_folder(backbone):
        return replace(read_model_config(backbone), vocab_size=vocab_size, tie_embeddings=False)
    like = policy and policy.config
    if like and ((like.dim, like.n_layers, like.ffn_dim, like.n_kv_heads * like.head_dim)
                 == (dim, n_layers, ffn_dim, kv_width)):
        return replace(like, vocab_size=vocab_size, tie_embeddings=False)
    frequencies = next((len(read()) for name, read in readers.items() if name.endswith("rotary_emb.inv_freq")), 64)
    head_dim = 2 * frequencies
    if dim % head_dim or kv_width % head_dim:
        raise ValueError(f"{path}/config.json does not say the head width: "
                         "put the backbone's folder into its backbone_model_name_or_path")
    return LlamaConfig(vocab_size, dim, n_layers, dim // head_dim, kv_width // head_dim, ffn_dim, head_dim=head_dim)


def check_reward_model(path, tokenizer, policy_config):
    """What a reward model's files say, its weights only by their names and if they are there: whether it is one, and
    means what the tokenizer's ids mean. -> for how many tokens it has positions; where they do not say, as many as the
    policy."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no reward model: expected config.json, as --stage reward writes it")
    about = read_json(path / "config.json")
    config = policy_config
    if is_adapter(path):
        read_adapter_config(path)
    elif isinstance(about, dict) and about.get("model_type") == "reward_model":          # (AlpacaFarm's says no sizes)
        backbone = Path(about.get("backbone_model_name_or_path") or "-")
        config = read_model_config(backbone) if is_model_folder(backbone) else config
    else:
        config = hf_config(about, path)
        tokenizer.check_fits(config.vocab_size, path)
    if not is_adapter(path):
        with suppress(FileNotFoundError):      # (a dry run needs no weights)
            reward_readers(path)
    tokenizer.check_against(path)
    return config.max_seq_len


def load_reward_adapter(path, about, trunk, adapter_name):
    """The adapter half of load_reward_model."""
    if trunk is None:
        raise ValueError(f"{path} is an adapter: name the model that it was trained on")
    if fingerprint(trunk) != about.get("trunk_fingerprint"):
        raise ValueError(f"{path} was trained on another model than the one given (fingerprint "
                         f"{about.get('trunk_fingerprint')}, this one has {fingerprint(trunk)})")
    load_lora(trunk, adapter_name, path)
    model = RewardModel(trunk, adapter_name, about.get("score_eos", True))
    head = read_tensors(path / "reward_head.safetensors")
    fill(model.head, {k.removeprefix("reward_head."): lambda t=t: t for k, t in head.items()}, path)
    return model.eval()


def reward_name(name):
    """backbone_model.model.layers.0... -> trunk.layers.0...; reward_head.weight -> head.weight"""
    if name.startswith("backbone_model."):
        return "trunk." + our_name(name.removeprefix("backbone_model."))
    return name.replace("reward_head.", "head.")


def load_paper_adapters(net, path, alpha=64.0):
    """Put the paper's released weights (a loralib state dict; alpha is not in it) into policy,
    critic and value head."""
    path = Path(path) / "pytorch_model.bin" if Path(path).is_dir() else Path(path)
    load_lora(net.policy, net.policy_adapter, path, alpha)
    load_lora(net.critic, net.value_adapter, path, alpha, part="value")
    tensors = read_tensors(path)
    head = {"weight": tensors.get("value_head"), "bias": tensors.get("value_head_bias")}
    fill(net.value_head, {k: lambda t=t: t for k, t in head.items() if t is not None}, path)


# ------------------------------------------------------------------------------------------------------ weight diffs

def recover(base, diff, out, dtype=torch.float32):
    """Tuned model = base + released weight diff (AlpacaFarm's sft10k, reward-model-human, ..),
    written to the folder `out`.

    The sum of all weights is compared with the diff's model_sum.txt, as AlpacaFarm does (relative 1e-5). Its sums were
    taken when transformers still counted the rotary frequencies as weights: with them or without, one has to fit.
    One tensor at a time; config.json comes last: without it nothing reads the folder. ValueError if the diff belongs to
    another model, or the sum is another one. Returns the sum, and the published one (None: there is no model_sum.txt).
    """
    base, diff, out = Path(base), Path(diff), Path(out)
    (config, base_readers), diff_readers, sums = open_checkpoint(base), hf_tensors(diff), []
    rotary = [name for name in diff_readers if name.endswith("rotary_emb.inv_freq")]
    diff_readers = {name: read for name, read in diff_readers.items() if name not in rotary}
    check_same_model(base_readers, diff_readers, diff)
    check_new_folder(out)
    published = published_sum(diff)

    def recovered():
        for name, read in diff_readers.items():
            tensor, ours = read().float(), our_name(name.removeprefix("backbone_model."))
            if ours in base_readers:       # (a reward head is whole)
                tensor = tensor + with_mean_rows(base_readers[ours]().float(), tensor, name, diff)
            sums.append(tensor.double().sum().item())
            yield name, tensor.to(dtype)

    save_shards(recovered(), out)
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).double() / config.head_dim)
    total = sum(sums)
    possible = total, total + len(rotary) * frequencies.sum().item()
    if published is not None and not any(math.isclose(s, published, rel_tol=1e-5) for s in possible):
        (out / "model.safetensors.index.json").unlink()
        raise ValueError(f"the recovered weights sum to {total:.4f}, {diff}/model_sum.txt says {published:.4f}: {base} "
                         f"is not the model that this diff was made for; what is in {out} is of no use")
    tokenizer = next((f / "tokenizer.model" for f in (diff, base) if (f / "tokenizer.model").is_file()), None)
    if tokenizer:
        shutil.copy(tokenizer, out / "tokenizer.model")
    vocab_size = next(len(read()) for name, read in diff_readers.items() if name.endswith("embed_tokens.weight"))
    reward = {"architectures": ["LlamaRewardModel"], "score_eos": False} if "reward_head.weight" in diff_readers else {}
    write_json(out / "config.json", hf_config_json(replace(config, vocab_size=vocab_size), dtype) | reward)
    return total, published


def published_sum(diff):
    """The number in a weight diff's model_sum.txt; None if there is no such file."""
    file = diff / "model_sum.txt"
    text = file.read_text().strip() if file.is_file() else None
    try:
        return None if text is None else float(text)
    except ValueError:
        raise ValueError(f"{file}: expected a number, got {text[:40]!r}") from None


def check_new_folder(out):
    """Refuse to write a model where one is, or where weights of another would be read instead."""
    if Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"{out} is a file: expected a folder to write to")
    found = [name for name in (*WEIGHT_FILES, "config.json", "params.json", "adapter_config.json")
             if (Path(out) / name).exists()]
    if found:
        raise ValueError(f"{out} holds a model already ({found[0]}): choose another folder")


def check_same_model(base_readers, diff_readers, diff):
    """Names of a diff against those of the base, before anything is computed."""
    ours = {our_name(name.removeprefix("backbone_model.")) for name in diff_readers}
    ignored = ("rotary_emb.inv_freq", "rope.freqs", "reward_head.weight", "reward_head.bias")
    odd = sorted(name for name in ours ^ set(base_readers) if not name.endswith(ignored))
    if odd:
        raise ValueError(f"{diff} is a diff for another model: {odd[0]} is in only one of them")


def with_mean_rows(weight, like, name, diff):
    """A weight of the base; its vocabulary extended by the mean row to the rows of `like` (AlpacaFarm's [PAD])."""
    extra = len(like) - len(weight)
    if extra > 0 and name.endswith(("embed_tokens.weight", "lm_head.weight")):
        weight = torch.cat([weight, weight.mean(0, keepdim=True).expand(extra, -1)])
    if weight.shape != like.shape:
        raise ValueError(f"{diff} is a diff for another model: "
                         f"{name} has shape {tuple(like.shape)}, the base {tuple(weight.shape)}")
    return weight
