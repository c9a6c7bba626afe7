"""Other people's files -> folders of safetensors, which the modules, transformers and PEFT read.

    python tools/convert.py meta   LLAMA OUT       Meta's params.json and consolidated.*.pth
    python tools/convert.py bin    FOLDER OUT      Hugging Face's or PEFT's, with pickled weights
    python tools/convert.py diff   BASE DIFF OUT   AlpacaFarm's weight diffs, such as sft10k
    python tools/convert.py reward FOLDER OUT      AlpacaFarm's reward models
    python tools/convert.py paper  FILE OUT        the paper's released policy adapters
    python tools/convert.py merge  MODEL OUT       a PPO run's policy, its adapter merged; or a
                                                   model folder with the adapter of --adapter

OUT is a new folder. It is written under a temporary name, OUT.tmp, and renamed when it is whole;
when something goes wrong, nothing of it stays. Weights are read one tensor at a time, mapped from
the file where its format allows, and written in shards of 2 GiB: the peak is a shard (but `merge`
holds the model). A pickle can run code when it is read: it is opened for its tensors alone.
"""
import math
import shutil
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from data import model_eos_ids  # noqa: E402
from eval import Parser, load_answering, mistakes_in_one_line  # noqa: E402
from lora import merge_lora  # noqa: E402
from model import (InputError, LlamaConfig, hf_config_json, hf_name, read_json,  # noqa: E402
                   read_model_config, read_text, refuse_lfs_pointer, save_weights, weight_readers,
                   write_json, writing)

SHARD_BYTES = 2 << 30
REWARD = {"architectures": ["LlamaRewardModel"], "score_eos": False}     # (it has seen no EOS)
OUTPUT = "backbone_model.lm_head.weight"             # of a reward model: of no use
UNUSED = ("rotary_emb.inv_freq", "rope.freqs")       # computed, not read


# ----------------------------------------------------------------------------------------- files

@contextmanager
def whole_folder(out):
    """A temporary folder, renamed to `out` when the block ends, removed when it fails.

    InputError if there is an `out` already."""
    out, temporary = Path(out), Path(f"{out}.tmp")
    if out.exists():
        raise InputError(f"{out} exists: give the name of a new folder, or remove it")
    shutil.rmtree(temporary, ignore_errors=True)               # (left by a command that was killed)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_file(source, target):
    with writing(target):
        shutil.copy(source, target)


def copy_tokenizer(folder, *sources):
    """Copy tokenizer.model from the first of the `sources` that has one, if any does."""
    for source in sources:
        if (source / "tokenizer.model").is_file():
            copy_file(source / "tokenizer.model", folder / "tokenizer.model")
            return


def read_pickle(path):
    """The tensors that torch.save wrote, by name, mapped from the file unless its format is old.

    InputError for what is damaged, and for what is anything but a dictionary of tensors."""
    refuse_lfs_pointer(path)
    mapped = zipfile.is_zipfile(path)
    try:
        content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception:                    # (torch.load names what it cannot read in many ways)
        raise InputError(f"{path} cannot be read as tensors: it is damaged (truncated?), or holds "
                         "more than tensors, which is not opened, since a pickle can run code"
                         ) from None
    if not isinstance(content, dict) or not all(map(torch.is_tensor, content.values())):
        raise InputError(f"{path}: expected a dictionary of tensors, got a "
                         f"{type(content).__name__} of other things")
    return {str(name): tensor.detach() for name, tensor in content.items()}


def has_safetensors(folder):
    names = ("model.safetensors", "model.safetensors.index.json")
    return any((folder / name).is_file() for name in names)


def open_weights(folder):
    """Weights of a Hugging Face folder, safetensors or pickled: name -> function that reads one."""
    file, index = folder / "pytorch_model.bin", folder / "pytorch_model.bin.index.json"
    if has_safetensors(folder):
        return weight_readers(folder)
    if file.is_file():
        tensors = read_pickle(file)
    elif index.is_file():
        where = read_json(index).get("weight_map", {})
        shards = {shard: read_pickle(folder / shard) for shard in sorted(set(where.values()))}
        # (a tied model's index may name an lm_head that is in no file)
        tensors = {name: shards[shard][name] for name, shard in where.items()
                   if name in shards[shard]}
    else:
        raise InputError(f"{folder} has no weights: expected {file.name} or model.safetensors, in "
                         "one file, or in shards with their index")
    return {name: tensor.detach for name, tensor in tensors.items()}


def in_shards(tensors):
    """(name, tensor) pairs, in the order in which they come -> dictionaries of SHARD_BYTES."""
    shard, size = {}, 0
    for name, tensor in tensors:
        shard[name] = tensor.detach().cpu().clone()      # safetensors takes none that share memory
        size += tensor.numel() * tensor.element_size()
        if size >= SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def save_model(tensors, folder):
    """Write (name, tensor) pairs as model.safetensors or, if it gets large, in shards."""
    names = []
    for shard in in_shards(tensors):
        save_weights(shard, folder / f"{len(names)}.safetensors")
        names.append(list(shard))
        shard.clear()                                    # before the next one is read
    if len(names) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, in_this in enumerate(names):
        file = f"model-{i + 1:05}-of-{len(names):05}.safetensors"
        (folder / f"{i}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(in_this, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def eos_of(*folders):
    """eos_token_id, a number or a list, as the first of these folders says that says one."""
    for folder in folders:
        ids = sorted(set(model_eos_ids(folder)))
        if ids:
            return {"eos_token_id": ids[0] if len(ids) == 1 else ids}
    return {}


# ---------------------------------------------------------------------------------- Meta's files

WQ = "layers.0.attention.wq.weight"


def meta_shards(folder):
    """The tensors of each consolidated.*.pth. InputError if they do not belong together."""
    files = sorted(folder.glob("consolidated.*.pth"))
    found = [file.name for file in files]
    if not files or found != [f"consolidated.{i:02}.pth" for i in range(len(files))]:
        raise InputError(f"{folder} holds {', '.join(found) or 'no consolidated.*.pth'}: a shard "
                         "is missing")
    shards = [read_pickle(file) for file in files]
    shapes = [{name: tensor.shape for name, tensor in shard.items()} for shard in shards]
    for file, other in zip(files, shapes):
        if other != shapes[0]:
            raise InputError(f"{file} and {files[0].name} are shards of different models")
    return shards


def meta_config(folder, shards):
    """LlamaConfig of Meta's params.json and, where it leaves out the widths of the vocabulary and
    the feed-forward layers, of the tensors."""
    file = folder / "params.json"
    said = {key: value for key, value in read_json(file).items() if value is not None}
    given = {"n_kv_heads": said.get("n_heads"), "max_seq_len": 2048, "rope_theta": 10000.0} | said
    for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len"):
        if type(given.get(key)) is not int:
            raise InputError(f"{file}: {key} = {given.get(key)!r} is not a whole number")
    for key in ("norm_eps", "rope_theta"):
        if type(given.get(key)) not in (int, float):
            raise InputError(f"{file}: {key} = {given.get(key)!r} is not a number")
    for key in ("use_scaled_rope", "moe", "lora_args", "quantization_args"):
        if given.get(key):
            raise InputError(f"{file}: {key} is not implemented here (plain LLaMA only)")
    rows = {}
    for name in ("output.weight", "layers.0.feed_forward.w1.weight", WQ):
        if name not in shards[0]:
            raise InputError(f"{folder}: tensor {name} is missing")
        rows[name] = len(shards) * len(shards[0][name])
    vocab_size, ffn_dim, q_rows = rows.values()
    if q_rows != given["dim"]:
        raise InputError(f"{folder}: {len(shards)} files consolidated.*.pth hold {q_rows} rows of "
                         f"wq, params.json says {given['dim']}: a shard is missing, or one is too "
                         "many")
    if any(torch.equal(shards[0][WQ], shard[WQ]) for shard in shards[1:]):
        raise InputError(f"{folder}: two of the shards are the same")
    return LlamaConfig(vocab_size, given["dim"], given["n_layers"], given["n_heads"],
                       given["n_kv_heads"], ffn_dim, given["norm_eps"], given["rope_theta"],
                       given["max_seq_len"])


def joined(shards, name, head_dim):
    """A tensor of Meta's model-parallel shards, joined on the side that was split."""
    kind = name.split(".")[-2]
    if kind.endswith("norm"):
        return shards[0][name]
    by_column = kind in ("wo", "w2", "tok_embeddings")
    tensor = torch.cat([shard[name] for shard in shards], dim=int(by_column))
    return half_split(tensor, head_dim) if kind in ("wq", "wk") else tensor


def half_split(weight, head_dim):
    """Rows of wq or wk: within each head, pairs (0, 1) (2, 3) .. -> first members, then second."""
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def command_meta(args):
    source = Path(args.llama)
    with whole_folder(args.out) as folder:
        shards = meta_shards(source)
        config = meta_config(source, shards)
        tensors = ((hf_name(name), joined(shards, name, config.head_dim))
                   for name in shards[0] if not name.endswith(UNUSED))
        save_model(tensors, folder)
        copy_tokenizer(folder, source, source.absolute().parent)
        write_json(folder / "config.json", hf_config_json(config, shards[0][WQ].dtype))


# ---------------------------------------------------------------- Hugging Face's and PEFT's files

def command_bin(args):
    source = Path(args.folder)
    with whole_folder(args.out) as folder:
        if (source / "adapter_config.json").is_file():
            tensors = read_pickle(source / "adapter_model.bin")
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            save_weights(tensors, folder / "adapter_model.safetensors")
        elif has_safetensors(source):
            raise InputError(f"{source} holds safetensors: there is nothing to convert")
        else:
            check_plain(source)
            tensors = ((name, read()) for name, read in open_weights(source).items()
                       if not name.endswith(UNUSED))
            save_model(tensors, folder)
        for file in sorted(source.iterdir()):
            pickled = file.suffix in (".bin", ".pt", ".pth") or ".bin.index" in file.name
            if file.is_file() and not pickled:
                copy_file(file, folder / file.name)


def check_plain(source):
    """InputError unless it is a model whose config.json the modules read."""
    if (source / "model_sum.txt").is_file():
        raise InputError(f"{source} is a weight diff, no model: use the command diff")
    config = source / "config.json"
    if config.is_file() and read_json(config).get("model_type") == "reward_model":
        raise InputError(f"{config} does not say the model's sizes (AlpacaFarm's): use the command "
                         "reward")
    read_model_config(source)


# ---------------------------------------------------------------------------- AlpacaFarm's models

def plain_name(name):
    """A tensor of a reward model -> its name in the language model that it began as."""
    return name.removeprefix("backbone_model.")


class Recovered:
    """(name, tensor) of base + diff, one at a time. total: the sum of the numbers read so far.

    The reward model's head is no difference, it comes whole. InputError if a shape is another."""

    def __init__(self, base, diff, dtype, where):
        self.base, self.diff, self.dtype, self.where = base, diff, dtype, where
        self.total = 0.0

    def __iter__(self):
        for name, read in self.diff.items():
            tensor = read().float()
            if plain_name(name) in self.base:
                weight = self.base[plain_name(name)]().float()
                tensor = tensor + self.with_mean_rows(weight, tensor, name)
            self.total += tensor.double().sum().item()
            if name != OUTPUT:
                yield name, tensor.to(self.dtype)

    def with_mean_rows(self, weight, like, name):
        """A weight of the base, its vocabulary extended by the mean row to that of `like`
        (AlpacaFarm's [PAD])."""
        extra = len(like) - len(weight)
        if extra > 0 and name.endswith(("embed_tokens.weight", "lm_head.weight")):
            weight = torch.cat([weight, weight.mean(0, keepdim=True).expand(extra, -1)])
        if weight.shape != like.shape:
            raise InputError(f"{self.where} is a diff for another model: {name} has shape "
                             f"{tuple(like.shape)}, the base {tuple(weight.shape)}")
        return weight


def check_names(base, diff, where):
    """InputError if base and diff (readers by name) have not the same tensors, but for a head."""
    odd = set(base) ^ {plain_name(name) for name in diff}
    odd = sorted(name for name in odd if not name.startswith("reward_head."))
    if odd:
        raise InputError(f"{where} is a diff for another model: {odd[0]} is in only one of them")


def published_sum(diff):
    """The number in a weight diff's model_sum.txt; None if there is no such file."""
    file = diff / "model_sum.txt"
    if not file.is_file():
        return None
    text = read_text(file).strip()
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{file}: expected a number, got {text[:40]!r}") from None


def check_sum(total, published, rotary, args):
    """AlpacaFarm's own check, to a relative 1e-5: the sum of all weights is the published one.

    rotary: the sum of the rotary frequencies, which transformers once counted as weights: with them
    or without, one has to fit."""
    if published is None:
        print(f"the weights sum to {total:.4f}; the diff has no model_sum.txt to compare it with")
        return
    if not any(math.isclose(s, published, rel_tol=1e-5) for s in (total, total + rotary)):
        raise InputError(f"the recovered weights sum to {total:.4f}, {args.diff}/model_sum.txt "
                         f"says {published:.4f}: {args.base} is not the model that this diff was "
                         "made for")
    print(f"the weights sum to {total:.4f}, published is {published:.4f}: they agree")


def command_diff(args):
    base, diff, dtype = Path(args.base), Path(args.diff), getattr(torch, args.dtype)
    with whole_folder(args.out) as folder:
        config, published = read_model_config(base), published_sum(diff)
        found = open_weights(diff)
        readers = {name: read for name, read in found.items() if not name.endswith(UNUSED)}
        base_readers = {name: read for name, read in open_weights(base).items()
                        if not name.endswith(UNUSED)}
        check_names(base_readers, readers, diff)
        recovered = Recovered(base_readers, readers, dtype, diff)
        save_model(recovered, folder)
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        rotary = (len(found) - len(readers)) * (config.rope_theta ** -steps).sum().item()
        check_sum(recovered.total, published, rotary, args)
        copy_tokenizer(folder, diff, base)
        embeddings = [read() for name, read in readers.items() if "embed_tokens" in name]
        about = hf_config_json(replace(config, vocab_size=len(embeddings[0])), dtype)
        if "reward_head.weight" in readers:
            about |= REWARD
        write_json(folder / "config.json", about | eos_of(diff, base))


def reward_config(source, backbone, readers):
    """LlamaConfig of AlpacaFarm's reward model, whose config.json only names its backbone's folder.

    From that folder, if it is given or here; else from the tensors, which tell neither the head
    width (LLaMA's 128, unless there are rotary frequencies) nor norm_eps (LLaMA 1's 1e-6): said
    aloud. The vocabulary is the tensors': AlpacaFarm added a [PAD]."""
    layer, shapes = "backbone_model.model.layers.0.", {}
    for name in ("reward_head.weight", "backbone_model.model.embed_tokens.weight",
                 layer + "mlp.gate_proj.weight", layer + "self_attn.k_proj.weight"):
        if name not in readers:
            raise InputError(f"{source} has no tensor {name}: expected AlpacaFarm's reward model")
        shapes[name] = readers[name]().shape
    _, (vocab_size, dim), (ffn_dim, _), (kv_width, _) = shapes.values()
    if backbone:
        return replace(read_model_config(backbone), vocab_size=vocab_size, tie_embeddings=False)
    n_layers = sum(name.endswith("q_proj.weight") for name in readers)
    frequencies = [len(read()) for name, read in readers.items() if name.endswith(UNUSED)]
    head_dim = 2 * frequencies[0] if frequencies else 128
    if dim % head_dim or kv_width % head_dim:
        raise InputError(f"{source}/config.json does not say the head width: give the model that "
                         "it was trained from with --backbone")
    print(f"note: without --backbone, heads are {head_dim} wide and norm_eps is 1e-6, as LLaMA's")
    return LlamaConfig(vocab_size, dim, n_layers, dim // head_dim, kv_width // head_dim, ffn_dim)


def command_reward(args):
    source = Path(args.folder)
    about = read_json(source / "config.json")
    named, backbone = about.get("backbone_model_name_or_path"), args.backbone
    if not backbone and named and (Path(named) / "config.json").is_file():
        backbone = named
    if about.get("model_type") != "reward_model":
        raise InputError(f"{source}/config.json is not AlpacaFarm's (model_type reward_model): if "
                         "it says the model's sizes, use the command bin")
    with whole_folder(args.out) as folder:
        readers = open_weights(source)
        config = reward_config(source, backbone, readers)
        kept = {name: read for name, read in readers.items()
                if name != OUTPUT and not name.endswith(UNUSED)}
        save_model(((name, read()) for name, read in kept.items()), folder)
        sources = source, Path(backbone or source)
        copy_tokenizer(folder, *sources)
        config = hf_config_json(config, readers["reward_head.weight"]().dtype)
        write_json(folder / "config.json", config | eos_of(*sources) | REWARD)


# --------------------------------------------------------------------------------------- adapters

def command_paper(args):
    file = Path(args.file)
    tensors = {}
    for name, tensor in read_pickle(file).items():
        # (base_model.model.layers.. is the value adapter, value_head the critic's head)
        if name.startswith("model.layers.") and name.endswith(("lora_A", "lora_B")):
            tensors[f"base_model.model.{name}.weight"] = tensor.clone()
    if not tensors:
        raise InputError(f"{file} holds no policy adapter: expected tensors "
                         "model.layers.0.self_attn.q_proj.lora_A, ..")
    targets = sorted({name.split(".")[-3] for name in tensors})
    rank = min(next(iter(tensors.values())).shape)
    with whole_folder(args.out) as folder:
        save_weights(tensors, folder / "adapter_model.safetensors")
        write_json(folder / "adapter_config.json",
                   {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank,
                    "lora_alpha": args.alpha, "lora_dropout": 0.0, "bias": "none",
                    "target_modules": targets, "inference_mode": True})


def write_tokenizer(tokenizer, folder, max_seq_len):
    """What transformers' AutoTokenizer wants (it needs sentencepiece and protobuf)."""
    copy_file(tokenizer.path, folder / "tokenizer.model")
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id,
           "unk_token": tokenizer.unk_id}
    pieces = {name: tokenizer.sp.id_to_piece(i) for name, i in ids.items() if i >= 0}
    write_json(folder / "special_tokens_map.json", pieces)
    write_json(folder / "tokenizer_config.json",
               pieces | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True,
                         "add_eos_token": False, "legacy": True, "model_max_length": max_seq_len,
                         "clean_up_tokenization_spaces": False})
    if has_user_defined_pieces(tokenizer.sp):
        print(f"note: {tokenizer.path} has user-defined pieces, which transformers' LlamaTokenizer "
              "does not know: give the model ids from this project's tokenizer")


def has_user_defined_pieces(sp):
    """Whether some pieces were given, not learned: they alone have the score +0, a learned one has
    -0 or less."""
    texts = [i for i in range(len(sp))
             if not (sp.is_control(i) or sp.is_byte(i) or sp.is_unknown(i))]
    return any(math.copysign(1, sp.get_score(i)) > 0 for i in texts)


def command_merge(args):
    with whole_folder(args.out) as folder:
        net, tokenizer = load_answering(args.model, args.adapter, args.tokenizer, args.dtype)
        model = net.policy
        if net.policy_adapter:
            merge_lora(model, net.policy_adapter)
        save_model(((hf_name(name), p) for name, p in model.named_parameters()), folder)
        # the tokenizer's EOS is the one that this project teaches; the model may have more
        ends = sorted({tokenizer.eos_id, *model_eos_ids(Path(args.model))})
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}
        config = hf_config_json(model.config, model.tok_embeddings.weight.dtype)
        write_json(folder / "config.json", config | ids)
        write_json(folder / "generation_config.json", ids)
        write_tokenizer(tokenizer, folder, model.config.max_seq_len)


# ----------------------------------------------------------------------------------- command line

def build_parser():
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, function, help, **places):
        p = commands.add_parser(name, help=help, allow_abbrev=False)
        p.set_defaults(command=function)
        for place, about in places.items():
            p.add_argument(place, metavar=place.upper(), help=about)
        p.add_argument("out", metavar="OUT", help="folder to write; it must not exist")
        return p

    command("meta", command_meta, "Meta's LLaMA -> a Hugging Face folder",
            llama="folder with params.json and consolidated.*.pth")
    command("bin", command_bin, "pickled weights -> the same folder with safetensors",
            folder="Hugging Face or PEFT folder")
    p = command("diff", command_diff, "AlpacaFarm's weight diff + LLaMA -> the tuned model",
                base="Hugging Face folder of the model that the diff was made for",
                diff="folder of the weight diff, such as alpaca-farm-sft10k-wdiff")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                   help="of the written weights (float32)")
    p = command("reward", command_reward, "AlpacaFarm's reward model -> one with its sizes",
                folder="folder of the reward model")
    p.add_argument("--backbone", help="the model that it was trained from, which has the sizes "
                                      "(default: the folder that its config.json names)")
    p = command("paper", command_paper, "the paper's policy adapter -> a PEFT folder",
                file="pytorch_model.bin, as loralib writes it")
    p.add_argument("--alpha", type=float, default=64.0,
                   help="which the file does not say (64, the paper's)")
    p = command("merge", command_merge, "a model and its adapter -> one model, for transformers",
                model="PPO run such as runs/toy/ppo, or a model folder")
    p.add_argument("--adapter", help="a PEFT folder: an adapter on the model folder MODEL")
    p.add_argument("--tokenizer", help="sentencepiece file (default: tokenizer.model of MODEL)")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                   help="to merge in (auto: float32 on a CPU, bfloat16 on a GPU)")
    return parser


@torch.no_grad()
def main(argv=None):
    with mistakes_in_one_line("convert.py"):
        args = build_parser().parse_args(argv)
        args.command(args)


if __name__ == "__main__":
    main()
