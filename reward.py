"""The reward model and the critic: a LLaMA trunk with a scalar head; and the module that PPO
trains.

RLHF needs four models. Two frozen trunks, or one, are enough: each model is a trunk plus an
adapter.

                two trunks                             one trunk
                (--reward is a full model)             (--reward is an adapter on the SFT model)
    policy      SFT trunk + "policy"                   SFT trunk + "policy"
    reference   SFT trunk, no adapter                  SFT trunk, no adapter
    reward      reward trunk + reward head             SFT trunk + "reward" + reward head
    value       reward trunk + "value" + value head    SFT trunk + "value" (a copy of "reward")

Legend   B batch, T tokens, R response tokens, D width, N response tokens of a batch laid end to end

Departures from the paper's code: heads are float32; the reward model reads the ids that were
sampled, at the last real token, never re-tokenised text; whether that token is the EOS is written
in the model's config (`score_eos`). AlpacaFarm's released reward model has seen text without EOS: a
final EOS is left out for it.
"""
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data import length_mask, micro_batches, pack, response_places
from lora import adapter, add_lora, describe, load_lora, lora_parameters, merge_lora, save_lora
from model import (InputError, TokenStats, ban_mask, empty_llama, eval_mode, fill, fingerprint,
                   hf_config, hf_config_json, hf_name, load_llama, read_json, response_logprobs,
                   save_weights, tensor_readers, weight_readers, write_json)
from ppo import Rollout, join_rollouts
from regularizers import exact


def bradley_terry_loss(chosen, rejected):
    """-log sigmoid(chosen - rejected), the mean over pairs (Bradley & Terry 1952; Stiennon et al.,
    arXiv 2009.01325, eq. 1). chosen, rejected (B,) scores -> scalar, nats per pair: log 2 when the
    scores say nothing."""
    return -F.logsigmoid(chosen - rejected).mean()


class ScalarHead(nn.Linear):
    """One float32 number per state: (.., D) -> (..,). Zero at the start: no opinion."""

    def __init__(self, dim):
        super().__init__(dim, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, states):
        return super().forward(states.float())[..., 0]


def autocast(model, dtype):
    """Fully trained models keep float32 weights and compute in `dtype`."""
    if dtype in (None, torch.float32):
        return nullcontext()
    return torch.autocast(model.device.type, dtype)


class RewardModel(nn.Module):
    """A trunk (without output matrix, or a policy's), the adapter that it uses, and a scalar head.

    score_eos: the model was trained on text with EOS and reads the score there; False (AlpacaFarm's
    released model): a final EOS is left out, and the last token before it is read."""

    def __init__(self, trunk, adapter_name=None, score_eos=True, autocast_dtype=None):
        super().__init__()
        self.trunk, self.adapter_name, self.score_eos = trunk, adapter_name, score_eos
        self.autocast_dtype = autocast_dtype
        self.head = ScalarHead(trunk.config.dim).to(trunk.device)

    def scores(self, tokens, lengths, eos_id=2):
        """tokens (B, T) right-padded, lengths (B,) with the EOS counted -> scores (B,), float32."""
        last = lengths - 1
        if not self.score_eos:
            ends = tokens.gather(1, last[:, None])[:, 0] == eos_id
            last = torch.where(ends & (last > 0), last - 1, last)
        with adapter(self.trunk, self.adapter_name), autocast(self.trunk, self.autocast_dtype):
            states = self.trunk.hidden(tokens)                                   # (B, T, D)
        return self.head(states[torch.arange(len(last), device=last.device), last])

    forward = scores


class ActorCritic(nn.Module):
    """Policy and critic as one module, so that one DistributedDataParallel and one backward serve
    both.

    policy: Llama with the adapter `policy_adapter` (None: fully trained, then `ref` is a frozen
    copy). critic: a trunk, maybe the same one, with `value_adapter`; None in the SFT stage, which
    trains the policy's half alone. banned_mask (V,): ids that are never sampled."""

    def __init__(self, policy, policy_adapter=None, critic=None, value_adapter=None,
                 banned_mask=None, ref=None, autocast_dtype=None):
        super().__init__()
        self.policy, self.policy_adapter = policy, policy_adapter
        self.critic, self.value_adapter = critic, value_adapter
        if critic is not None:
            self.value_head = ScalarHead(critic.config.dim).to(critic.device)
        self.ref, self.autocast_dtype, self.banned_mask = ref, autocast_dtype, banned_mask

    @contextmanager
    def acting(self, trained=True):
        """The policy, or (trained=False) the reference, in the precision of the update."""
        model, name = self.policy, self.policy_adapter
        if not trained:
            model, name = self.ref or self.policy, None
        with adapter(model, name), autocast(model, self.autocast_dtype):
            yield model

    def forward(self, tokens, prompt_lengths, response_lengths, divergence=None):
        """tokens (B, T) right-padded, lengths (B,) -> TokenStats.
        divergence: name of an exact one, which asks the reference."""
        places = response_places(prompt_lengths, response_lengths, tokens.shape[1])        # (N,)
        targets = tokens.flatten()[places]

        def states_of(model):                                                              # (N, D)
            return model.hidden(tokens).flatten(0, 1)[places - 1]

        ref = compare = None
        if divergence:
            compare = partial(exact, divergence)
            with torch.no_grad(), self.acting(trained=False) as model:
                ref = model.output, states_of(model)
        with self.acting() as model:
            stats = response_logprobs(model.output, states_of(model), targets, self.banned_mask,
                                      ref, compare)
        if self.critic is not None:
            with adapter(self.critic, self.value_adapter), autocast(self.critic,
                                                                    self.autocast_dtype):
                states = states_of(self.critic)
            stats = stats._replace(values=self.value_head(states))           # (the head in float32)
        mask = length_mask(response_lengths, int(response_lengths.max()))                  # (B, R)
        empty = torch.zeros(mask.shape, device=mask.device)
        return TokenStats(*(x if x is None else empty.masked_scatter(mask, x) for x in stats))

    def groups(self):
        """What PPO trains, in two groups that share nothing: name -> parameters."""
        def trained(model, name):
            return lora_parameters(model, name) if name else list(model.parameters())

        critic = trained(self.critic, self.value_adapter) + list(self.value_head.parameters())
        return {"policy": trained(self.policy, self.policy_adapter), "critic": critic}


def packed_groups(prompts, responses, size, device):
    """Rows of similar length together -> their indices; tokens, prompt and response lengths."""
    length = [len(p) + len(r) for p, r in zip(prompts, responses)].__getitem__
    for index in micro_batches(range(len(prompts)), length, size):
        yield index, *pack([prompts[i] for i in index], [responses[i] for i in index], device)


@torch.no_grad()
def score_responses(reward_model, prompts, responses, eos_id, micro_batch):
    """The reward model's score of each response, ids in -> (B,) float32 on the CPU."""
    scores, device = torch.zeros(len(prompts)), reward_model.trunk.device
    with eval_mode(reward_model):
        for index, tokens, before, after in packed_groups(prompts, responses, micro_batch, device):
            scores[index] = reward_model.scores(tokens, before + after, eos_id).cpu()
    return scores


@torch.no_grad()
def assess(net, reward_model, prompts, responses, eos_id, micro_batch):
    """What policy, critic, reference and reward model say of responses, ids in -> Rollout on the
    CPU. Dropout is off: these are PPO's old_logprobs."""
    scores = score_responses(reward_model, prompts, responses, eos_id, micro_batch)
    order, parts = [], []
    with eval_mode(net):
        for index, *packed in packed_groups(prompts, responses, micro_batch, net.policy.device):
            out = net(*packed, divergence="kl")
            finished = torch.tensor([responses[i][-1] == eos_id for i in index])
            parts.append(Rollout(*packed, finished, scores[index], out.logprobs, out.ref_logprobs,
                                 out.values, out.entropy, out.divergence).to("cpu"))
            order += index
    return join_rollouts(parts).rows(torch.tensor(order).argsort())      # in the prompts' order


# ------------------------------------------------------------------------------- the four models

def build_models(model_path, reward_path, device, dtype, banned_ids=(), rank=8, alpha=64.0,
                 dropout=0.0):
    """The four models of PPO on one or two trunks, ready to train -> ActorCritic (with the
    reference), RewardModel.

    rank, alpha: of the policy's adapter, and on two trunks of the value's; on one trunk the value
    adapter is a copy of the reward adapter and has its rank and alpha. rank 0 trains all weights of
    policy and critic instead, kept in float32 and computed in `dtype`; so is the frozen copy that
    is the reference, or KL would not be exactly 0 at the start."""
    policy = load_llama(model_path, device, dtype if rank else torch.float32).requires_grad_(False)
    reward_model = load_reward_model(reward_path, device, dtype, policy).requires_grad_(False)
    banned_mask = ban_mask(policy.config.vocab_size, banned_ids, device)
    if not rank:
        reward_model.autocast_dtype = dtype
        critic = load_critic(model_path, reward_path, device)
        trained = load_llama(model_path, device)
        net = ActorCritic(trained, None, critic, None, banned_mask, policy, dtype)
        return net, reward_model
    critic = reward_model.trunk
    add_lora(policy, "policy", rank, alpha, dropout)
    if critic is policy:
        add_lora(critic, "value", **describe(critic, "reward") | {"dropout": dropout})
        load_lora(critic, "value", reward_path)
    else:
        add_lora(critic, "value", rank, alpha, dropout)
    return ActorCritic(policy, "policy", critic, "value", banned_mask), reward_model


def load_critic(model_path, reward_path, device):
    """The trunk that a fully trained critic starts from: the reward model's, in float32, its
    adapter, if it is one, merged. (The critic's own head starts at 0.)"""
    trunk = load_llama(model_path, device) if is_adapter(reward_path) else None
    model = load_reward_model(reward_path, device, trunk=trunk)
    if model.adapter_name:
        merge_lora(trunk, model.adapter_name)
        trunk.output = None
    return model.trunk.requires_grad_(True)


# ----------------------------------------------------------------------------------------- files

def is_adapter(path):
    """Whether a folder holds an adapter rather than a full model."""
    return (Path(path) / "adapter_config.json").is_file()


def reward_parameters(model):
    """A reward model's parameters by AlpacaFarm's names; and those of its head alone."""
    head = {f"reward_head.{name}": p for name, p in model.head.named_parameters()}
    trunk = {f"backbone_model.{hf_name(name)}": p for name, p in model.trunk.named_parameters()
             if not name.startswith("output.")}
    return trunk | head, head


def save_reward_model(model, path, **about):
    """A full reward model as a folder (tensors backbone_model.* and reward_head.*, as
    AlpacaFarm's), or, if it is an adapter, a PEFT folder with reward_head.safetensors and its
    trunk's fingerprint."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    everything, head = reward_parameters(model)
    if model.adapter_name is not None:
        save_lora(model.trunk, model.adapter_name, path)
        save_weights(head, path / "reward_head.safetensors")
        config = {"trunk_fingerprint": fingerprint(model.trunk)}
    else:
        save_weights(everything, path / "model.safetensors")
        config = hf_config_json(model.trunk.config, model.trunk.tok_embeddings.weight.dtype)
        config["architectures"] = ["LlamaRewardModel"]
    write_json(path / "config.json", config | {"score_eos": model.score_eos} | about)


def load_reward_model(path, device="cpu", dtype=torch.float32, trunk=None):
    """Read a full reward model, or an adapter, which joins `trunk` under the name "reward".

    InputError if the adapter was trained on another trunk (by fingerprint), or if a tensor is
    missing, extra or of another shape."""
    path = Path(path)
    if is_adapter(path):
        return load_reward_adapter(path, trunk)
    model = RewardModel(empty_llama(reward_config(path), device, dtype, lm_head=False))
    model.score_eos = read_json(path / "config.json").get("score_eos", False)
    fill(reward_parameters(model)[0], weight_readers(path), path)
    return model.eval()


def reward_config(path):
    """LlamaConfig of a full reward model's folder. InputError if it is something else."""
    path = Path(path)
    about = read_json(path / "config.json")
    config = hf_config(about, path / "config.json")
    if "reward_head.weight" not in weight_readers(path):
        raise InputError(f"{path} has no tensor reward_head.weight: it is a model of architecture "
                         f"{about.get('architectures')}, expected a reward model")
    return config


def load_reward_adapter(path, trunk):
    """The adapter half of load_reward_model."""
    about = read_json(path / "config.json")
    if fingerprint(trunk) != about.get("trunk_fingerprint"):
        raise InputError(f"{path} was trained on another model than the one given (its fingerprint "
                         "differs): give the model that it was trained on")
    load_lora(trunk, "reward", path)
    model = RewardModel(trunk, "reward", about.get("score_eos", True))
    fill(reward_parameters(model)[1], tensor_readers(path / "reward_head.safetensors"), path)
    return model.eval()
