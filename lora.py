"""LoRA: low-rank adapters on linear layers (Hu et al., arXiv 2106.09685).

         x ------------------+
         |                   |
      W (out, in)      lora_A (r, in)         h = W x + (alpha / r) * B A x        LoRA eq. 3
      frozen                 |
         |             lora_B (out, r)        A random, B = 0: a new adapter changes nothing
         +------ + ----------+
                 h

A layer holds any number of *named* adapters beside its untouched base, so one frozen trunk can be policy, value and
reward model at once; with no adapter active it is the reference model. Which one is active is always explicit:

    add_lora(model, "policy", r=8, alpha=64)
    with adapter(model, "policy"): ...        # the policy
    with adapter(model, None): ...            # the reference, the same as outside of every `with`

Departures from the paper's code, and why:
1. A and B are float32 whatever the trunk's dtype: bf16 has 8 bits of mantissa, and at lr 1e-5 most of A would never
   move (a step is smaller than half the spacing of the numbers). They are cast to the trunk's dtype in the forward.
2. Dropout defaults to 0, and 0 means 0.
3. Merging is an export function. Nothing is merged in place during training.
4. With activation checkpointing, the backward recomputes each block after the `with` has closed. The active name is
   captured in the forward and entered again (`recompute_context`); otherwise gradients would silently be the base's.
"""
import json
import math
import numbers
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

PEFT_NAMES = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
              "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
PEFT_PARENTS = {"attention": "self_attn", "feed_forward": "mlp"}
OUR_NAMES = {v: k for k, v in PEFT_NAMES.items()}


class LoRALinear(nn.Module):
    """A frozen linear layer and its adapters. lora_A[name] (r, in), lora_B[name] (out, r), both float32."""
    copies = None      # inside model.packed_weights, where adapters do not change: what `factors` has made

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
        nn.init.kaiming_uniform_(self.lora_A[name], a=math.sqrt(5))       # uniform(+-1 / sqrt(in)), as loralib and PEFT
        self.alpha[name], self.dropout[name] = alpha, dropout

    def remove(self, name):
        for d in (self.lora_A, self.lora_B, self.alpha, self.dropout):
            del d[name]

    def rank(self, name):
        return self.lora_A[name].shape[0]

    def scaling(self, name):
        return self.alpha[name] / self.rank(name)

    def keeps_copies(self):
        """Yes, inside packed_weights: without copies decoding would cast and transpose A and B at every token."""
        return True

    def factors(self, dtype):
        """The active adapter's A (r, in) and B' (r, out) in this dtype; B' is contiguous, which makes the products of
        the backward pass twice as fast."""
        kept, key = {} if self.copies is None or torch.is_grad_enabled() else self.copies, (self.active, dtype)
        if key not in kept:
            kept[key] = (self.lora_A[self.active].to(dtype), self.lora_B[self.active].to(dtype).t().contiguous())
        return kept[key]

    def forward(self, x):
        if self.active is None:
            return self.base(x)
        A, B = self.factors(x.dtype)
        rows = x.flatten(0, -2)                                                                    # (N, in)
        low = F.linear(F.dropout(rows, self.dropout[self.active], self.training), A)               # (N, r)
        # in place: one product fewer to store
        out = self.base(rows).addmm_(low, B.to(low.dtype), alpha=self.scaling(self.active))        # (N, out)
        return out.view(*x.shape[:-1], -1)


def lora_layers(model, name=None):
    """[(module path, LoRALinear)] of a model; with a name, those that hold that adapter."""
    return [(path, m) for path, m in model.named_modules()
            if isinstance(m, LoRALinear) and (name is None or name in m.lora_A)]


def no_adapter(model, name):
    """The error of asking for an adapter that no layer holds."""
    have = sorted({name for _, layer in lora_layers(model) for name in layer.lora_A})
    return ValueError(f"no adapter called {name}: the model has {have or 'none'}")


def add_lora(model, name, r, alpha, dropout=0.0, targets=("wq", "wk", "wv", "wo")):
    """Add an adapter to every linear layer called by one of `targets`; freeze everything else that is no adapter.

    The new adapter computes exactly what the base computes (B = 0) and is not active until `adapter(model, name)`.
    ValueError: r < 1, dropout outside [0, 1), a name in use, a target that the model does not have.
    """
    whole = isinstance(r, numbers.Integral) and not isinstance(r, bool)
    if not whole or r < 1 or not math.isfinite(alpha) or not 0 <= dropout < 1 or not targets:
        raise ValueError(f"adapter {name}: got r {r}, alpha {alpha}, dropout {dropout}, targets {targets}: expected a "
                         "whole number of at least 1, a finite number, one in [0, 1), and a layer's name at least")
    if not name.isidentifier() or hasattr(nn.ParameterDict(), name):
        raise ValueError(f"an adapter cannot be called {name!r}: its name becomes part of parameter names, "
                         "so it must be a word of letters, digits and _, "
                         "and none of ParameterDict's own (keys, values, half, ..)")
    if lora_layers(model, name):
        raise ValueError(f"there is an adapter called {name} already: merge it first, or choose another name")
    modules = dict(model.named_modules())
    found = {t: [p for p, m in modules.items() if p.split(".")[-1] == t and isinstance(m, (nn.Linear, LoRALinear))]
             for t in targets}
    for target, paths in found.items():
        if not paths:
            raise ValueError(f"adapter {name}: the model has no linear layer called {target}")
    for path in sorted(p for paths in found.values() for p in paths):
        layer = modules[path]
        if not isinstance(layer, LoRALinear):
            parent, child = path.rpartition(".")[::2]
            layer = LoRALinear(layer).train(model.training)
            setattr(modules[parent], child, layer)
        layer.add(name, r, alpha, dropout)
    for path, p in model.named_parameters():
        if ".lora_" not in path:
            p.requires_grad_(False)
    for m in modules.values():
        if hasattr(m, "checkpoint_context"):
            m.checkpoint_context = recompute_context


class adapter:
    """Inside, the layers of `model` use the adapter `name`, or none (None: the base model). Nests; restores on exit.

    ValueError if no layer holds that adapter. May be entered again: a graph can be run backward twice.
    """

    def __init__(self, model, name):
        self.model, self.name, self.layers = model, name, [layer for _, layer in lora_layers(model)]
        if name is not None and not any(name in layer.lora_A for layer in self.layers):
            raise no_adapter(model, name)

    def __enter__(self):
        self.before = [layer.active for layer in self.layers]
        for layer in self.layers:
            layer.active = self.name if self.name in layer.lora_A else None
        return self.model

    def __exit__(self, *error):
        for layer, active in zip(self.layers, self.before):
            layer.active = active


def recompute_context(block):
    """(context of the forward, context of its recomputation) of a checkpointed block; called when the block is run."""
    return nullcontext(), adapter(block, next((m.active for _, m in lora_layers(block) if m.active is not None), None))


def lora_parameters(model, name):
    """A and B of one adapter, layer by layer: the parameters that an optimiser trains."""
    return [p for _, layer in lora_layers(model, name) for p in (layer.lora_A[name], layer.lora_B[name])]


@torch.no_grad()
def copy_lora(model, source, target):
    """Overwrite the adapter `target` with the values of `source` (same layers and r)."""
    for p, q in zip(lora_parameters(model, target), lora_parameters(model, source), strict=True):
        p.copy_(q)


@torch.no_grad()
def merge_lora(model, name):
    """W <- W + (alpha / r) B A in every layer, in float32, then drop the adapter. For export: training never merges.

    When a layer's last adapter goes, the plain linear layer comes back. ValueError, before anything is changed, if a
    layer shares its weights with another: the other would change with it.
    """
    modules, layers = dict(model.named_modules()), lora_layers(model, name)
    if not layers:
        raise no_adapter(model, name)
    named = list(model.named_parameters(remove_duplicate=False))
    for path, layer in layers:
        shared = [other for other, p in named if p is layer.base.weight and not other.startswith(f"{path}.")]
        if shared:
            raise ValueError(f"adapter {name}: {path} is {shared[0]} as well (tied): merged into one it changes both")
    for path, layer in layers:
        weight = layer.base.weight
        delta = layer.lora_B[name] @ layer.lora_A[name] * layer.scaling(name)
        weight.copy_((weight.float() + delta).to(weight.dtype))
        drop(modules, path, layer, name)


def drop(modules, path, layer, name):
    """Take one adapter off one layer; a layer without adapters becomes the plain linear layer again."""
    layer.remove(name)
    layer.active = None if layer.active == name else layer.active
    if not layer.lora_A:
        parent, child = path.rpartition(".")[::2]
        setattr(modules[parent], child, layer.base)


# ------------------------------------------------------------------------------------------- PEFT's and loralib's files

def peft_key(path, matrix):
    """layers.0.attention.wq, lora_A -> base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"""
    parts = [PEFT_PARENTS.get(p, PEFT_NAMES.get(p, p)) for p in path.split(".")]
    return f"base_model.model.model.{'.'.join(parts)}.{matrix}.weight"


def save_lora(model, name, folder, base_model=""):
    """Write adapter_config.json and adapter_model.safetensors, in the layout and with the key names of PEFT."""
    layers, folder = lora_layers(model, name), Path(folder)
    if not layers:
        raise no_adapter(model, name)
    nameless = sorted(targets_of(layers) - set(PEFT_NAMES))
    if nameless:
        raise ValueError(f"adapter {name}: PEFT's name of {nameless[0]} is not known here, expected adapters on "
                         f"{', '.join(PEFT_NAMES)}")
    folder.mkdir(parents=True, exist_ok=True)
    first = layers[0][1]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_model),
              "r": first.rank(name), "lora_alpha": first.alpha[name], "lora_dropout": first.dropout[name],
              "target_modules": sorted({PEFT_NAMES[t] for t in targets_of(layers)}), "bias": "none",
              "fan_in_fan_out": False, "inference_mode": True}
    tensors = {peft_key(path, matrix): getattr(layer, matrix)[name].detach().cpu().contiguous()
               for path, layer in layers for matrix in ("lora_A", "lora_B")}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def targets_of(layers):
    """The layer names (wq, ..) among [(path, layer)]."""
    return {path.split(".")[-1] for path, _ in layers}


def read_json_file(path):
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ValueError(f"{path}: broken JSON ({e})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected the settings of an adapter, got a {type(found).__name__}")
    return found


# keys of adapter_config.json that change nothing here; any other that is set means another kind of adapter
NEUTRAL = ("auto_mapping", "base_model_name_or_path", "inference_mode", "revision", "task_type", "peft_version",
           "megatron_core", "qalora_group_size", "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules",
           "bias", "init_lora_weights", "eva_config")


def read_adapter_config(folder):
    """adapter_config.json of a PEFT folder, checked: plain LoRA without bias, rank patterns or other variants."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: "
                                "expected adapter_config.json and adapter_model.safetensors")
    config = read_json_file(path)
    plain = {"peft_type": ("LORA",), "bias": ("none", None),
             "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva")}
    unusual = [k for k, allowed in plain.items() if config.get(k) not in allowed]
    unusual += [k for k in config if config[k] and k not in NEUTRAL]
    if unusual:
        raise ValueError(f"{path}: {unusual[0]} = {config.get(unusual[0])} is not implemented here (plain LoRA only)")
    r, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if type(r) is not int or r < 1:
        raise ValueError(f"{path}: expected a whole number of at least 1 in r, got {r!r}")
    for key, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{path}: expected a number in {key}, got {value!r}")
    modules = config.get("target_modules")       # names, or (PEFT's "all-linear") each layer's path
    names = sorted({str(m).split(".")[-1] for m in modules}) if isinstance(modules, list) else []
    if not names or not set(names) <= set(OUR_NAMES):
        raise ValueError(f"{path}: target_modules {modules} must be a list of names among {sorted(OUR_NAMES)}")
    return {"r": r, "alpha": alpha, "dropout": dropout, "targets": tuple(sorted(OUR_NAMES[m] for m in names))}


def read_tensors(path):
    """Tensors of a .safetensors file or of a pickle of tensors; ValueError if the file cannot be read as such."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        found = (load_file(path) if path.suffix == ".safetensors"
                 else torch.load(path, map_location="cpu", weights_only=True))
    except SafetensorError as e:
        raise ValueError(f"{path} cannot be read ({e})") from None
    except Exception:      # (torch.load names a damaged or a forbidden file in many ways)
        raise ValueError(f"{path} cannot be read as tensors: it is damaged, or holds more than "
                         "tensors, which is not opened, since a pickle can run code") from None
    if not isinstance(found, dict) or not all(torch.is_tensor(t) for t in found.values()):
        raise ValueError(f"{path}: expected a dictionary of tensors")
    return found


def read_adapter(path, alpha=None, part="policy"):
    """The adapter in a PEFT folder, or in a file of the paper's authors
    -> its config, and its tensors under PEFT's names.

    The paper's released files (pytorch_model.bin: a loralib state dict) hold a policy and a value adapter and the value
    head; `part` says which one is wanted. They do not say alpha, so it has to be given: 64 in the paper.
    """
    path = Path(path)
    if (path / "adapter_config.json").is_file() or path.is_dir() and not (path / "pytorch_model.bin").is_file():
        config = read_adapter_config(path)
        file = next((f for f in (path / "adapter_model.safetensors", path / "adapter_model.bin") if f.is_file()),
                    path / "adapter_model.safetensors")
        tensors = read_tensors(file)
        if alpha not in (None, config["alpha"]):
            raise ValueError(f"{path} has alpha {config['alpha']}, got {alpha}")
    else:
        config, tensors = read_loralib(path / "pytorch_model.bin" if path.is_dir() else path, alpha, part)
    for key, t in tensors.items():
        rank = t.shape[0 if "lora_A" in key else -1] if t.dim() == 2 else None
        if rank != config["r"] or not t.is_floating_point() or not torch.isfinite(t).all():
            raise ValueError(f"{path}: {key} {tuple(t.shape)} in {t.dtype} is no "
                             f"matrix of finite numbers of rank r {config['r']}")
    return config, tensors


def read_loralib(path, alpha, part):
    """The second kind of file of read_adapter."""
    prefix = {"policy": "model.layers.", "value": "base_model.model.layers."}[part]
    tensors = {f"base_model.model.{k.removeprefix('base_model.')}.weight": t.float()
               for k, t in read_tensors(path).items()
               if str(k).startswith(prefix) and k.endswith(("lora_A", "lora_B"))}
    if not tensors:
        raise ValueError(f"{path} holds no {part} adapter: expected tensors {prefix}0.self_attn.q_proj.lora_A, ..")
    if alpha is None:
        raise ValueError(f"{path} does not say alpha (loralib does not store it): give it; the paper's is 64")
    ranks = {t.shape[0] for k, t in tensors.items() if "lora_A" in k}
    targets = {k.split(".")[-3] for k in tensors}
    if len(ranks) != 1 or not targets <= set(OUR_NAMES):
        raise ValueError(f"{path}: ranks {sorted(ranks)} of layers {sorted(targets)} are no plain LoRA adapter")
    return {"r": ranks.pop(), "alpha": alpha, "dropout": 0.0,
            "targets": tuple(sorted(OUR_NAMES[t] for t in targets))}, tensors


def load_lora(model, name, path, alpha=None, part="policy"):
    """Read an adapter's file (see read_adapter) into the adapter `name`, which is added if the model does not have it.

    ValueError, naming what differs, if the file's r, alpha, targets or widths are not those of the adapter or model.
    """
    config, tensors = read_adapter(path, alpha, part)
    check_tensors(model, tensors, config, path)
    if not lora_layers(model, name):
        add_lora(model, name, config["r"], config["alpha"], config["dropout"], config["targets"])
    layers = lora_layers(model, name)
    have = {"r": layers[0][1].rank(name), "alpha": layers[0][1].alpha[name],
            "targets": tuple(sorted(targets_of(layers)))}
    for key, value in have.items():
        if config[key] != value:
            raise ValueError(f"adapter {name}: {path} has {key} {config[key]}, expected {value}")
    with torch.no_grad():
        for place, layer in layers:
            for matrix in ("lora_A", "lora_B"):
                getattr(layer, matrix)[name].copy_(tensors[peft_key(place, matrix)])


def adapter_chain(path, seen=()):
    """A model folder and the adapters to merge into it, in this order: a PEFT folder was trained on the model that its
    adapter_config.json names - a path from here, or from the PEFT folder or one above it - or on a PEFT folder
    again. (seen: the folders that have led here; none leads back.)"""
    path = Path(path)
    if not (path / "adapter_config.json").is_file():
        return path, []
    name = str(read_json_file(path / "adapter_config.json").get("base_model_name_or_path") or "(nothing)")
    for folder in (above / name for above in (Path(), path, *path.absolute().parents)):
        if any((folder / file).is_file() for file in ("config.json", "params.json", "adapter_config.json")):
            if folder.resolve() in (*seen, path.resolve()):
                break
            base, adapters = adapter_chain(folder, (*seen, path.resolve()))
            return base, [*adapters, path]
    raise FileNotFoundError(f"{path} is an adapter of {name}, which is no model folder here: write the folder's path "
                            "into base_model_name_or_path of its adapter_config.json")


def base_folder(path):
    """The model folder at the end of adapter_chain; of a model folder itself."""
    return adapter_chain(path)[0]


def merged_readers(readers, folder):
    """Readers of a checkpoint (our name -> function that reads the tensor) with an adapter added to what they read:
    W + (alpha / r) B A in float32, one tensor at a time."""
    config, tensors = read_adapter(folder)
    merged, scaling = dict(readers), config["alpha"] / config["r"]

    def read(name, A, B):
        weight = readers[name]().float()
        if weight.shape != (B.shape[0], A.shape[1]):
            raise ValueError(f"{folder} is {B.shape[0]} x {A.shape[1]} at {name}, "
                             f"the model {tuple(weight.shape)}: another model's")
        return weight + B.float() @ A.float() * scaling

    places = {name: [peft_key(name.removesuffix(".weight"), matrix) for matrix in ("lora_A", "lora_B")]
              for name in readers if name.split(".")[-2] in config["targets"]}
    odd = sorted(set(sum(places.values(), [])) ^ set(tensors))
    if odd:
        raise ValueError(f"{folder}: tensor {odd[0]} is {'not in this model' if odd[0] in tensors else 'missing'}")
    return merged | {name: partial(read, name, *(tensors[key] for key in keys)) for name, keys in places.items()}


def check_tensors(model, tensors, config, folder):
    """Refuse an adapter of another width or depth before the model is touched."""
    expected = {}
    for path, module in model.named_modules():
        if path.split(".")[-1] in config["targets"] and isinstance(module, (nn.Linear, LoRALinear)):
            out_features, in_features = getattr(module, "base", module).weight.shape
            expected[peft_key(path, "lora_A")] = (config["r"], in_features)
            expected[peft_key(path, "lora_B")] = (out_features, config["r"])
    odd = sorted(set(expected) ^ set(tensors))
    if odd:
        raise ValueError(f"{folder}: tensor {odd[0]} is {'missing' if odd[0] in expected else 'not in this model'}")
    for key, shape in expected.items():
        if tensors[key].shape != shape:
            raise ValueError(f"{folder}: {key} has shape {tuple(tensors[key].shape)}, expected {shape}: "
                             "another r or another model's width")
