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
"""
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from data import length_mask, pack, response_states, response_tokens
from lora import adapter, add_lora, copy_lora, load_lora, lora_layers, merge_lora, save_lora, targets_of
from model import (ban_mask, empty_llama, eval_mode, fill, fingerprint, hf_config, hf_config_json, hf_name, hf_tensors,
                   load_llama, our_name, read_json, response_logprobs, save_llama, save_weights, write_json)
from ppo import Rollout, join_rollouts
from regularizers import exact


def bradley_terry_loss(chosen, rejected):
    """-log sigmoid(chosen - rejected), the mean over pairs (Bradley & Terry 1952; Stiennon et al., arXiv 2009.01325, eq. 1).

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
        last = lengths - 1
        if not self.score_eos:
            ends = tokens.gather(1, last[:, None])[:, 0] == eos_id
            last = (last - ends.long()).clamp(min=0)
        with adapter(self.trunk, self.adapter_name), autocast(self.trunk, self.autocast_dtype):
            hidden = self.trunk.hidden(tokens)                                    # (B, T, D)
        return self.head(hidden[torch.arange(len(tokens), device=tokens.device), last])

    forward = scores


class Evaluation(NamedTuple):
    """What the policy and the critic say of given responses; 0 in the padding."""
    logprobs: torch.Tensor             # (B, R) of the response's tokens, nats
    values: torch.Tensor | None        # (B, R), values[t] = V(state that predicts token t)
    entropy: torch.Tensor              # (B, R) of the next-token distribution, nats, detached
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
        """tokens (B, T) right-padded, lengths (B,) -> Evaluation. divergence: name of an exact one, needs the reference."""
        R = int(response_lengths.max())
        mask = length_mask(response_lengths, R)                                   # (B, R)
        targets = response_tokens(tokens, prompt_lengths, R)[mask]                # (N,)
        states = lambda hidden: response_states(hidden, prompt_lengths, R)[mask]  # (B, T, D) -> (N, D)
        with autocast(self.policy, self.autocast_dtype):
            ref = None
            if divergence:
                with torch.no_grad(), self.acting(trained=False) as ref_model:
                    ref = ref_model.output, states(ref_model.hidden(tokens))
            with adapter(self.policy, self.policy_adapter):
                flat = response_logprobs(self.policy.output, states(self.policy.hidden(tokens)), targets,
                                         self.banned_mask, ref, lambda p, q: exact(divergence, p, q))
            if self.critic is not None:
                with adapter(self.critic, self.value_adapter):
                    value_states = states(self.critic.hidden(tokens))
        values = self.value_head(value_states) if self.critic is not None else None
        logprobs, entropy, ref_logprobs, diverged = flat
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
    with eval_mode(reward_model):
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
    with eval_mode(net):
        for index in groups:
            batch = [x.to(device) for x in pack([prompts[i] for i in index], [responses[i] for i in index])]
            out = net(*batch, divergence="kl")
            finished = torch.tensor([responses[i][-1] == eos_id for i in index])
            parts.append(Rollout(*batch, finished, scores[index], out.logprobs, out.ref_logprobs,
                                 out.values, out.entropy, out.divergence).to("cpu"))
    return join_rollouts(parts).rows(torch.tensor(sum(groups, [])).argsort())


# ------------------------------------------------------------------------------------------------- the four models

def build_models(model_path, reward_path, device, dtype, banned_ids=(), rank=8, alpha=64.0, dropout=0.0):
    """The four models of PPO on one or two trunks, ready to train. -> ActorCritic (reference included), RewardModel.

    rank, alpha: of the policy's adapter, and on two trunks of the value's; on one trunk the value adapter is a copy of the
    reward adapter and has its rank and alpha.

    rank 0 trains all weights of policy and critic instead, kept in float32 and computed in `dtype`; so is the frozen
    copy that is the reference, or KL would not be exactly 0 at the start.
    """
    policy = load_llama(model_path, device, dtype if rank else torch.float32).requires_grad_(False)
    reward_model = load_reward_model(reward_path, device, dtype, trunk=policy).requires_grad_(False)
    banned_mask = ban_mask(policy.config.vocab_size, banned_ids, device)
    if rank == 0:
        reward_model.autocast_dtype = dtype
        critic = load_critic(model_path, reward_path, device).requires_grad_(True)
        return ActorCritic(load_llama(model_path, device), None, critic, None, banned_mask, policy, dtype), reward_model
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
    trunk = load_llama(model_path, device) if is_adapter(reward_path) else None
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
        net.policy.load_state_dict(load_llama(folder, net.policy.device).state_dict())


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
    """Read what save_reward_model wrote: a full model, or an adapter, which joins `trunk` under `adapter_name`.

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
    config = hf_config(about, path)
    model = RewardModel(empty_llama(config, device, dtype, lm_head=False), score_eos=about.get("score_eos", False))
    fill(model, ((reward_name(k), t) for k, t in hf_tensors(path) if "lm_head" not in k), path)
    return model


def load_reward_adapter(path, about, trunk, adapter_name):
    """The adapter half of load_reward_model."""
    if trunk is None:
        raise ValueError(f"{path} is an adapter: name the model that it was trained on")
    if fingerprint(trunk) != about.get("trunk_fingerprint"):
        raise ValueError(f"{path} was trained on another model than the one given (fingerprint "
                         f"{about.get('trunk_fingerprint')}, this one has {fingerprint(trunk)})")
    load_lora(trunk, adapter_name, path)
    model = RewardModel(trunk, adapter_name, about.get("score_eos", True))
    try:
        head = load_file(path / "reward_head.safetensors")
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path}/reward_head.safetensors cannot be read ({e})") from None
    fill(model.head, ((k.removeprefix("reward_head."), t) for k, t in head.items()), path)
    return model


def reward_name(name):
    """backbone_model.model.layers.0... -> trunk.layers.0...; reward_head.weight -> head.weight"""
    if name.startswith("backbone_model."):
        return "trunk." + our_name(name.removeprefix("backbone_model."))
    return name.replace("reward_head.", "head.")
