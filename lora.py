"""LoRA: low-rank adapters on linear layers (Hu et al., arXiv 2106.09685).

         x ------------------+
         |                   |
      W (out, in)      lora_A (r, in)         h = W x + (alpha / r) * B A x        LoRA eq. 3
      frozen                 |
         |             lora_B (out, r)        A random, B = 0: a new adapter changes nothing
         +------ + ----------+
                 h

A layer holds any number of *named* adapters beside its untouched base, so one frozen trunk can be
policy, value and reward model at once; with no adapter active it is the reference. Which one is
active is always explicit:

    add_lora(model, "policy", r=8, alpha=64)
    with adapter(model, "policy"): ...        # the policy
    with adapter(model, None): ...            # the reference, the same as outside of every `with`

Departures from the paper's code, and why:
* A and B are float32 whatever the trunk's dtype: bf16 has 8 bits of mantissa, and at lr 1e-5 most
   of A would never move (a step is smaller than half the spacing of the numbers). They are cast to
   the trunk's dtype in the forward.
* Dropout defaults to 0, and 0 means 0.
* Merging is an export function. Nothing is merged in place during training.
* With activation checkpointing, the backward recomputes each block after the `with` has closed.
   The active name is captured in the forward and entered again (`recompute_context`); otherwise
   gradients would silently be the base's.
"""
import math
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import (HF_NAMES, InputError, fill, hf_name, read_json, save_weights,
                   tensor_readers, write_json)


class LoRALinear(nn.Module):
    """A frozen linear layer and float32 adapters: lora_A[name] (r, in), lora_B[name] (out, r)."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.alpha, self.dropout = {}, {}
        self.active = None

    def add(self, name, r, alpha, dropout):
        out_features, in_features = self.base.weight.shape
        device = self.base.weight.device
        self.lora_A[name] = nn.Parameter(torch.empty(r, in_features, device=device))
        self.lora_B[name] = nn.Parameter(torch.zeros(out_features, r, device=device))
        nn.init.kaiming_uniform_(self.lora_A[name], a=math.sqrt(5))      # uniform(+-1 / sqrt(in))
        self.alpha[name], self.dropout[name] = alpha, dropout

    def scaling(self, name):
        return self.alpha[name] / self.lora_A[name].shape[0]

    def forward(self, x):
        out = self.base(x)                                                       # (.., out)
        if self.active is None:
            return out
        A, B = self.lora_A[self.active].to(x.dtype), self.lora_B[self.active].to(x.dtype)
        low = F.linear(F.dropout(x, self.dropout[self.active], self.training), A)          # (.., r)
        return out + F.linear(low * self.scaling(self.active), B)


def lora_layers(model, name=None):
    """{module path: LoRALinear} of a model; with a name, of the layers that hold that adapter."""
    return {path: m for path, m in model.named_modules()
            if isinstance(m, LoRALinear) and (name is None or name in m.lora_A)}


def layers_with(model, name):
    """lora_layers; InputError if no layer holds that adapter."""
    layers = lora_layers(model, name)
    if not layers:
        raise InputError(f"the model has no adapter called {name}")
    return layers


def replace_module(model, path, module):
    """Put `module` where `path` (layers.0.attention.wq) leads."""
    parent, child = path.rpartition(".")[::2]
    setattr(model.get_submodule(parent), child, module)


def add_lora(model, name, r, alpha, dropout=0.0, targets=("wq", "wk", "wv", "wo")):
    """Add an adapter to every linear layer called by one of `targets`; freeze all that is no
    adapter.

    The new adapter computes exactly what the base computes (B = 0) and is not active until
    `adapter(model, name)`. InputError: a name that is in use, a target that the model does not
    have.
    """
    if lora_layers(model, name):
        raise InputError(f"there is an adapter called {name} already: choose another name")
    modules = {path: m for path, m in model.named_modules()
               if path.split(".")[-1] in targets and isinstance(m, (nn.Linear, LoRALinear))}
    absent = set(targets) - {path.split(".")[-1] for path in modules}
    if absent:
        raise InputError(f"adapter {name}: the model has no linear layer called {min(absent)}")
    for path in sorted(modules):
        layer = modules[path]
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer).train(model.training)
            replace_module(model, path, layer)
        layer.add(name, r, alpha, dropout)
    for path, p in model.named_parameters():
        if ".lora_" not in path:
            p.requires_grad_(False)
    model.checkpoint_context = recompute_context


class adapter:
    """Inside, the layers of `model` use the adapter `name`, or none (None: the base model). Nests,
    and restores on exit. InputError if no layer holds that adapter.

    (A class, since it is entered again whenever a checkpointed graph is run backward.)"""

    def __init__(self, model, name):
        if name is not None:
            layers_with(model, name)
        self.model, self.name, self.layers = model, name, list(lora_layers(model).values())

    def __enter__(self):
        self.before = [layer.active for layer in self.layers]
        for layer in self.layers:
            layer.active = self.name if self.name in layer.lora_A else None
        return self.model

    def __exit__(self, *error):
        for layer, earlier in zip(self.layers, self.before):
            layer.active = earlier


def recompute_context(block):
    """(context of a checkpointed block's forward, of its recomputation). Called in the forward; the
    second is entered in the backward pass, when the `with` of the forward has closed."""
    names = {layer.active for layer in lora_layers(block).values()} - {None}
    return nullcontext(), adapter(block, names.pop() if names else None)


def lora_parameters(model, name):
    """A and B of one adapter, layer by layer: the parameters that an optimiser trains. InputError
    if no layer holds it."""
    return list(adapter_parameters(model, name).values())


@torch.no_grad()
def merge_lora(model, name):
    """W <- W + (alpha / r) B A in every layer, in float32, then drop the adapter. For export.

    InputError, before anything is changed, if a layer shares its weights with another (a tied
    head): the other would change too."""
    layers = layers_with(model, name)
    uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    for path, layer in layers.items():
        if uses.count(id(layer.base.weight)) > 1:
            raise InputError(f"adapter {name}: the weights of {path} are those of another layer as "
                             "well (tied): merged into one it would change both")
    for layer in layers.values():
        delta = layer.lora_B[name] @ layer.lora_A[name] * layer.scaling(name)
        layer.base.weight.copy_(layer.base.weight.float() + delta)
    remove_lora(model, name)


def remove_lora(model, name):
    """Drop an adapter; with a layer's last one, the plain linear layer comes back."""
    for path, layer in lora_layers(model, name).items():
        del layer.lora_A[name], layer.lora_B[name]
        layer.active = None
        if not layer.lora_A:
            replace_module(model, path, layer.base)


# --------------------------------------------------------------------------------- PEFT's files

def peft_key(path, matrix):
    """layers.0.attention.wq, lora_A ->
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"""
    return f"base_model.model.{hf_name(path)}.{matrix}.weight"


def adapter_parameters(model, name):
    """A and B of one adapter, by PEFT's names."""
    found = {}
    for path, layer in layers_with(model, name).items():
        found[peft_key(path, "lora_A")] = layer.lora_A[name]
        found[peft_key(path, "lora_B")] = layer.lora_B[name]
    return found


def describe(model, name):
    """r, alpha, dropout and targets of an adapter."""
    layers = layers_with(model, name)
    first = next(iter(layers.values()))
    return {"r": first.lora_A[name].shape[0], "alpha": first.alpha[name],
            "dropout": first.dropout[name],
            "targets": tuple(sorted({path.split(".")[-1] for path in layers}))}


def save_lora(model, name, folder, base_model=""):
    """Write adapter_config.json and adapter_model.safetensors, with PEFT's layout and key names."""
    about = describe(model, name)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
              "r": about["r"], "lora_alpha": about["alpha"], "lora_dropout": about["dropout"],
              "target_modules": [HF_NAMES[target] for target in about["targets"]], "bias": "none",
              "fan_in_fan_out": False, "inference_mode": True}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_weights(adapter_parameters(model, name), Path(folder) / "adapter_model.safetensors")
    write_json(Path(folder) / "adapter_config.json", config)


# keys of adapter_config.json that change nothing here; any other that is set means another adapter
NEUTRAL = {"auto_mapping", "base_model_name_or_path", "inference_mode", "task_type", "revision",
           "peft_version", "megatron_core", "qalora_group_size", "peft_type", "r", "lora_alpha",
           "lora_dropout", "target_modules", "bias", "init_lora_weights", "eva_config"}


def read_adapter_config(folder):
    """r, alpha, dropout and targets of a PEFT folder. InputError names what is no plain LoRA."""
    path = Path(folder) / "adapter_config.json"
    config = read_json(path)
    plain = {"peft_type": ("LORA",), "bias": ("none", None),
             "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva")}
    odd = [k for k, allowed in plain.items() if config.get(k) not in allowed]
    odd += [k for k in config if config[k] and k not in NEUTRAL]
    if not isinstance(config.get("target_modules"), list):
        odd.append("target_modules")
    if odd:
        raise InputError(f"{path}: {odd[0]} = {config.get(odd[0])} is not implemented here (plain "
                         "LoRA only)")
    # target_modules: names, or (PEFT's "all-linear") each layer's path
    named = {module.split(".")[-1] for module in config["target_modules"]}
    targets = [ours for ours, theirs in HF_NAMES.items() if theirs in named]
    return {"r": config["r"], "alpha": config["lora_alpha"], "targets": tuple(sorted(targets)),
            "dropout": config.get("lora_dropout", 0.0)}


def load_lora(model, name, folder):
    """Read a PEFT folder into the adapter `name`, which is added if the model does not have it.

    InputError names what differs: the file's r, alpha, targets, widths or depth are not those of
    the adapter or the model, or it holds more than an adapter. Then none is added."""
    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        raise InputError(f"{folder} has no {file.name}: tools/convert.py makes one from *.bin")
    config, readers = read_adapter_config(folder), tensor_readers(file)
    whole = [key for key in readers if ".lora_" not in key]
    if whole:
        raise InputError(f"{folder} brings whole weights ({whole[0]}), of a resized vocabulary or "
                         "of modules_to_save: only plain LoRA is implemented here")
    have = lora_layers(model, name)
    if not have:
        add_lora(model, name, **config)
    mine = describe(model, name)
    for key in ("r", "alpha", "targets"):
        if config[key] != mine[key]:
            raise InputError(f"adapter {name}: {folder} has {key} {config[key]}, expected "
                             f"{mine[key]}")
    try:
        fill(adapter_parameters(model, name), readers, folder)
    except InputError:
        if not have:
            remove_lora(model, name)
        raise
