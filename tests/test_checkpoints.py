"""Files that other people made, read without a conversion script; and files of ours that their tools read.

golden/make_golden.py says where the expected numbers come from: transformers, peft, loralib, and AlpacaFarm's formula.
"""
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT
from golden.make_golden import write_model
from lora import adapter, add_lora, base_folder, load_lora, lora_layers, lora_parameters, merge_lora, save_lora
from model import Llama, LlamaConfig, fingerprint, generate, load_llama, read_model_config, save_llama
from reward import (ActorCritic, RewardModel, load_paper_adapters, load_reward_model, load_trunk, recover, save_reward_model)

GOLDEN = ROOT / "tests" / "golden"


def largest(difference):
    return difference.abs().max().item()


def as_bin(folder, legacy=False, shards=1):
    """The golden case mha with its weights in pickles instead of safetensors."""
    tensors = load_file(write_model("mha", folder) / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        return folder
    weight_map = {name: f"pytorch_model-{i % shards + 1:05}-of-{shards:05}.bin" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        torch.save({k: v for k, v in tensors.items() if weight_map[k] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# ----------------------------------------------------------------------------------------------------------- weights in

@pytest.mark.parametrize("kwargs", [{}, {"legacy": True}, {"shards": 3}], ids=["zip", "legacy", "sharded"])
def test_pickled_weights_are_the_same_model(kwargs, tmp_path):
    """LLaMA-7B went around as pytorch_model-00001-of-00033.bin, and AlpacaFarm writes such files."""
    expected = load_file(GOLDEN / "mha" / "expected.safetensors")
    with torch.no_grad():
        assert largest(load_llama(as_bin(tmp_path, **kwargs))(expected["tokens"]) - expected["logits"]) <= 1e-5


class Trap:
    """A pickle that runs a command when it is read, as pickles can."""
    def __reduce__(self):
        return os.mkdir, (self.where,)


def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(tmp_path):
    """A checkpoint from the internet is a program, unless only tensors are let in."""
    trap = Trap()
    trap.where = str(tmp_path / "sprung")
    torch.save({"lm_head.weight": trap}, as_bin(tmp_path) / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read as tensors"):
        load_llama(tmp_path)
    assert not (tmp_path / "sprung").exists()


def cut(path, share):
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_pickle_is_refused_by_name(share, tmp_path):
    cut(as_bin(tmp_path) / "pytorch_model.bin", share)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read"):
        load_llama(tmp_path)


def test_an_index_that_names_a_missing_shard_is_refused_by_name(tmp_path):
    (as_bin(tmp_path, shards=3) / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(FileNotFoundError, match="pytorch_model-00002-of-00003.bin, which pytorch_model.bin.index.json names"):
        load_llama(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text("[]")
    with pytest.raises(ValueError, match="weight_map"):
        load_llama(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"x": torch.zeros(1)}}])
def test_a_pickle_of_something_else_is_refused(content, tmp_path):
    torch.save(content, as_bin(tmp_path) / "pytorch_model.bin")
    with pytest.raises(ValueError, match="expected a dictionary of tensors"):
        load_llama(tmp_path)


@pytest.mark.parametrize("change, says", [
    ({"sliding_window": 64, "max_position_embeddings": 128}, "sliding_window = 64"), ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"), ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear")])
def test_more_that_would_compute_something_else_is_refused_by_name(change, says, tmp_path):
    """A model that loads and means something else is worse than none."""
    config = json.loads((write_model("mha", tmp_path) / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=says):
        load_llama(tmp_path)


def test_a_window_as_long_as_the_sequence_is_no_window(tmp_path):
    config = json.loads((write_model("mha", tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": 128, "max_position_embeddings": 128}))
    load_llama(tmp_path)


def test_quantised_weights_are_not_taken_for_numbers(tmp_path):
    """int8 codes of the right shape would be copied as if they were weights."""
    file = write_model("mha", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].mul(100).to(torch.int8)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="int8"):
        load_llama(tmp_path)


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(number, tmp_path):
    """One NaN in 7 billion weights makes every answer garbage, without a word."""
    file = write_model("mha", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = number
    save_file(tensors, file)
    with pytest.raises(ValueError, match="layers.1.feed_forward.w3.weight holds numbers that are not finite"):
        load_llama(tmp_path)


def test_a_tied_pair_may_be_there_twice_but_not_differ(tmp_path):
    """Some tied checkpoints carry a copy under the other name. A different one contradicts the config: which is meant?"""
    file = write_model("tied", tmp_path) / "model.safetensors"
    expected, tensors = load_file(GOLDEN / "tied" / "expected.safetensors"), load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    with torch.no_grad():
        assert largest(load_llama(tmp_path)(expected["tokens"]) - expected["logits"]) <= 1e-5
    save_file(tensors | {"lm_head.weight": torch.zeros(128, 64)}, file)
    with pytest.raises(ValueError, match="two different matrices"):
        load_llama(tmp_path)


@pytest.mark.parametrize("key, value", [("vocab_size", "128"), ("num_hidden_layers", 2.0), ("rms_norm_eps", "small"), ("hidden_size", -64),
                                        ("num_attention_heads", 0), ("rope_scaling", "linear"), ("rope_theta", 1e6),
                                        ("rope_scaling", {"type": []}), ("rms_norm_eps", float("nan")), ("rms_norm_eps", -1.0),
                                        ("sliding_window", "a")])
def test_a_config_with_nonsense_in_it_is_one_line(key, value, tmp_path):
    """The golden config says rope_theta 10000 in rope_parameters: two that disagree are nonsense too."""
    config = json.loads((write_model("mha", tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=key.removeprefix("rms_")):
        load_llama(tmp_path)


def test_each_tensor_is_read_from_the_file_that_the_index_names(tmp_path):
    """A stale copy of a tensor in another shard must not win, and one that is not where it should be is missed."""
    as_bin(tmp_path, shards=2)
    index = json.loads((tmp_path / "pytorch_model.bin.index.json").read_text())
    name = "model.norm.weight"
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"][name])
    torch.save(torch.load(tmp_path / other) | {name: torch.zeros(64)}, tmp_path / other)
    assert load_llama(tmp_path).norm.weight.abs().min() > 0
    right = tmp_path / index["weight_map"][name]
    torch.save({k: v for k, v in torch.load(right).items() if k != name}, right)
    with pytest.raises(ValueError, match=f"{right.name} has no {name}"):
        load_llama(tmp_path)


def test_a_lost_shard_of_metas_is_noticed(tmp_path):
    """13B comes as two files; one alone has half of every matrix's rows."""
    (tmp_path / "params.json").write_text(json.dumps({"dim": 64, "n_layers": 1, "n_heads": 4, "norm_eps": 1e-6}))
    torch.save({"output.weight": torch.zeros(64, 64), "layers.0.feed_forward.w1.weight": torch.zeros(88, 64),
                "layers.0.attention.wq.weight": torch.zeros(32, 64)}, tmp_path / "consolidated.00.pth")
    with pytest.raises(ValueError, match="1 files .* hold 32 rows of wq, params.json says 64"):
        load_llama(tmp_path)
    shutil.copy(tmp_path / "consolidated.00.pth", tmp_path / "consolidated.02.pth")
    with pytest.raises(ValueError, match="a shard is missing"):
        load_llama(tmp_path)
    (tmp_path / "consolidated.02.pth").rename(tmp_path / "consolidated.01.pth")
    with pytest.raises(ValueError, match="two of the shards are the same"):
        load_llama(tmp_path)


def test_metas_params_alone_tell_the_sizes_of_llama_7b_and_70b(tmp_path):
    """For a dry run before the weights are here: 11008 and 28672 by Meta's rule, 32000 where it says -1."""
    for params, ffn_dim in (({"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-6, "vocab_size": -1}, 11008),
                            ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
                              "n_layers": 80, "norm_eps": 1e-5, "vocab_size": -1}, 28672)):
        (tmp_path / "params.json").write_text(json.dumps(params))
        assert read_model_config(tmp_path).ffn_dim == ffn_dim and read_model_config(tmp_path).vocab_size == 32000
    with pytest.raises(FileNotFoundError, match="consolidated"):
        load_llama(tmp_path)


@pytest.mark.parametrize("key, value", [("n_layers", 2.5), ("n_heads", "4"), ("n_kv_heads", "2"), ("max_seq_len", "9"), ("dim", None),
                                        ("vocab_size", "64"), ("multiple_of", 0), ("norm_eps", "small"), ("ffn_dim_multiplier", "1")])
def test_params_that_are_no_sizes_are_named(key, value, tmp_path):
    """A params.json that was edited by hand: one line that says which key, not a TypeError from within."""
    params = {"dim": 64, "n_layers": 1, "n_heads": 4, "norm_eps": 1e-6} | {key: value}
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(ValueError, match=f"{key} = {value!r} is not a"):
        read_model_config(tmp_path)


@pytest.mark.parametrize("n", [1, 3, 64, 65, 4096 * 11008, 32000 * 4096 + 1])
def test_a_fingerprint_reads_the_first_and_the_last_number_of_a_weight(n):
    """Of LLaMA-7B's sizes, too: 4096 x 11008 has no float32 for its last place, and a rounded one lies behind the end."""
    weight = torch.zeros(n, dtype=torch.bfloat16)
    model = SimpleNamespace(config="c", named_parameters=lambda: [("w", weight)])
    seen = {fingerprint(model)}
    for place in {0, n - 1}:
        weight[place] = 1.0
        seen.add(fingerprint(model))
    assert len(seen) == (3 if n > 1 else 2)


PEAK = """
import sys, threading, time
sys.path.insert(0, sys.argv[2])
import torch
from model import load_llama
rss = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
torch.nn.init.normal_(torch.empty(1, device="meta"))          # torch imports 70 MB of itself the first time
before, peak, done = rss(), [0], threading.Event()
def watch():
    while not done.wait(0.0005):
        peak[0] = max(peak[0], rss())
thread = threading.Thread(target=watch)
thread.start()
model = load_llama(sys.argv[1], dtype=torch.bfloat16)
peak[0] = max(peak[0], rss())
done.set(); thread.join()
print(peak[0] - before, sum(p.numel() * 2 for p in model.parameters()))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc to see memory")
def test_loading_needs_the_model_and_one_tensor(tmp_path):
    """A float32 file is read tensor by tensor into bfloat16. Anonymous memory only: pages mapped from the file are the
    system's cache, which processes share. 30 M parameters: 60 MB kept, 120 MB in the file, 16 MB the largest tensor."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=4000, dim=1024, n_layers=2, n_heads=8, ffn_dim=2048, max_seq_len=64)
    for n in range(2):                     # two files, one of them a pickle
        save_llama(Llama(config), tmp_path / str(n))
    tensors = load_file(tmp_path / "1" / "model.safetensors")
    torch.save(tensors, tmp_path / "1" / "pytorch_model.bin")
    (tmp_path / "1" / "model.safetensors").unlink()
    largest_tensor = max(t.numel() for t in tensors.values()) * 4
    for n in range(2):
        out = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path / str(n)), str(ROOT)], capture_output=True, text=True, check=True)
        grown, kept = map(int, out.stdout.split())
        assert kept <= grown <= kept + 2 * largest_tensor + 10e6


# ---------------------------------------------------------------------------------------------- AlpacaFarm's reward model

def alpacafarm(folder, **config):
    """AlpacaFarm's reward-model folder of the golden case: backbone_model.*, reward_head.*, a config.json without sizes."""
    golden, backbone = load_file(GOLDEN / "alpacafarm.safetensors"), folder / "sft10k"
    backbone.mkdir()
    tensors = {f"backbone_model.{k}": v for k, v in load_file(write_model("mha", backbone) / "model.safetensors").items()}
    tensors |= {"reward_head.weight": golden["head_weight"], "reward_head.bias": golden["head_bias"]}
    torch.save(tensors, folder / "pytorch_model.bin")
    config = {"architectures": ["RewardModel"], "model_type": "reward_model", "backbone_model_name_or_path": str(backbone)} | config
    (folder / "config.json").write_text(json.dumps(config))
    return golden, folder


def left_aligned(golden):
    """AlpacaFarm pads on the left, we on the right."""
    rows = [row[20 - n:] for row, n in zip(golden["rows"], golden["lengths"].tolist())]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def test_alpacafarms_reward_model_gives_alpacafarms_scores(tmp_path):
    """Its file as it is: the head reads the last token of rows that it pads on the left."""
    golden, folder = alpacafarm(tmp_path)
    model = load_reward_model(folder)
    with torch.no_grad():
        assert largest(model.scores(left_aligned(golden), golden["lengths"]) - golden["scores"]) <= 1e-5


def test_alpacafarms_reward_model_is_read_without_the_eos_that_it_never_saw(tmp_path):
    """It was trained on text, in which no EOS is: an EOS that our policy ends with must not change the score."""
    golden, folder = alpacafarm(tmp_path)
    model, tokens, lengths = load_reward_model(folder), left_aligned(golden), golden["lengths"]
    ended = torch.nn.functional.pad(tokens, (0, 1)).scatter(1, lengths[:, None], 2)
    with torch.no_grad():
        assert largest(model.scores(ended, lengths + 1) - golden["scores"]) <= 1e-5
        model.score_eos = True
        assert largest(model.scores(ended, lengths + 1) - golden["scores"]) > 0.1


def test_alpacafarms_reward_model_without_its_backbones_folder(tmp_path):
    """config.json names a path of the machine it was made on. The policy is its kin and knows the sizes; without it, rotary
    frequencies in the file tell the head width, and LLaMA's 128 is assumed - which does not divide 64, and is refused."""
    golden, folder = alpacafarm(tmp_path, backbone_model_name_or_path="/somewhere/else")
    policy = load_llama(tmp_path / "sft10k")
    score = lambda model: model.scores(left_aligned(golden), golden["lengths"])
    with torch.no_grad():
        assert largest(score(load_reward_model(folder, trunk=policy)) - golden["scores"]) <= 1e-5
        with pytest.raises(ValueError, match="backbone_model_name_or_path"):
            load_reward_model(folder)
        tensors = torch.load(folder / "pytorch_model.bin")
        tensors["backbone_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        torch.save(tensors, folder / "pytorch_model.bin")
        assert largest(score(load_reward_model(folder)) - golden["scores"]) <= 1e-5


# -------------------------------------------------------------------------------------------------------- weight diffs

def diff_of(folder, reward=False, model_sum=None, rotary=False):
    """A base of 100 tokens, and a diff to a tuned model of 101 ([PAD]), made as AlpacaFarm makes it: tuned - (base, its
    vocabulary extended by the mean row). -> the tuned tensors."""
    generator = torch.Generator().manual_seed(0)
    base = Llama(LlamaConfig(vocab_size=100, dim=32, n_layers=2, n_heads=2, ffn_dim=64, max_seq_len=64))
    save_llama(base.half(), folder / "base")             # LLaMA-7B as transformers converts it is float16
    raw = {k: t.float() for k, t in load_file(folder / "base" / "model.safetensors").items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        raw[name] = torch.cat([raw[name], raw[name].mean(0)[None]])
    tuned = {k: t + 0.05 * torch.randn(t.shape, generator=generator) for k, t in raw.items()}
    diff, prefix = {k: tuned[k] - raw[k] for k in raw}, "backbone_model." if reward else ""
    tuned, diff = ({prefix + k: t for k, t in tensors.items()} for tensors in (tuned, diff))
    if reward:
        head = {"reward_head.weight": torch.randn(1, 32, generator=generator), "reward_head.bias": torch.ones(1)}
        tuned, diff = tuned | head, diff | head
    total = sum(t.sum() for t in tuned.values()).item()
    if rotary:
        diff |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(8) for i in range(2)}
        total += 2 * sum(10000 ** (-i / 8) for i in range(8))
    (folder / "diff").mkdir()
    torch.save(diff, folder / "diff" / "pytorch_model.bin")
    (folder / "diff" / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 101}))
    (folder / "diff" / "model_sum.txt").write_text(str(total if model_sum is None else model_sum))
    return tuned


@pytest.mark.parametrize("kind", [{}, {"rotary": True}], ids=["plain", "with rotary frequencies"])
def test_a_released_diff_gives_the_tuned_model(kind, tmp_path):
    """sft10k is published as a difference to LLaMA-7B; [PAD]'s row as the difference to the mean row."""
    tuned = diff_of(tmp_path, **kind)
    total, published = recover(tmp_path / "base", tmp_path / "diff", tmp_path / "sft10k")
    assert abs(total - published) < 4 * kind.get("rotary", 0) + 1e-3 * abs(published)
    model = load_llama(tmp_path / "sft10k")
    assert model.config.vocab_size == 101
    assert largest(model.output.weight - tuned["lm_head.weight"]) <= 1e-6
    assert largest(model.layers[1].feed_forward.w2.weight - tuned["model.layers.1.mlp.down_proj.weight"]) <= 1e-6


def test_a_released_reward_models_diff_gives_a_reward_model(tmp_path):
    """The head is not a difference, it comes whole; and the result knows that it has not seen an EOS."""
    tuned = diff_of(tmp_path, reward=True)
    recover(tmp_path / "base", tmp_path / "diff", tmp_path / "reward", dtype=torch.bfloat16)
    model = load_reward_model(tmp_path / "reward")
    assert not model.score_eos and model.trunk.config.vocab_size == 101
    assert torch.equal(model.head.weight, tuned["reward_head.weight"].bfloat16().float())
    assert torch.equal(model.trunk.norm.weight, tuned["backbone_model.model.norm.weight"].bfloat16().float())


def test_a_diff_for_another_model_is_refused(tmp_path):
    """By the published sum when the shapes fit, as LLaMA-7B's do in a wrong conversion; by name when they do not."""
    diff_of(tmp_path, model_sum=12345.0)
    with pytest.raises(ValueError, match="model_sum.txt says 12345"):
        recover(tmp_path / "base", tmp_path / "diff", tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        load_llama(tmp_path / "out")                       # what is left of it is no model
    wide, deep = LlamaConfig(100, 64, 2, 2, ffn_dim=64), LlamaConfig(100, 32, 3, 2, ffn_dim=64)
    for config, says in ((wide, "has shape .*32.*, the base .*64"), (deep, "layers.2.* is in only one of them")):
        save_llama(Llama(config), tmp_path / says[:4])
        with pytest.raises(ValueError, match="diff for another model: .*" + says):
            recover(tmp_path / says[:4], tmp_path / "diff", tmp_path / "other")
    with pytest.raises(ValueError, match="holds a model already"):
        recover(tmp_path / "base", tmp_path / "diff", tmp_path / "base")


# ------------------------------------------------------------------------------------------------------------ adapters

def mha(folder):
    return load_llama(write_model("mha", folder))


def test_the_papers_released_adapters_give_loralibs_numbers(tmp_path):
    """Policy and value adapters and the value head of one file, by renaming alone; alpha 16 is not in it."""
    golden = load_file(GOLDEN / "loralib.safetensors")
    net = ActorCritic(mha(tmp_path), "policy", mha(tmp_path), "value")
    load_paper_adapters(net, GOLDEN / "loralib.bin", alpha=16)
    with torch.no_grad(), adapter(net.policy, "policy"), adapter(net.critic, "value"):
        assert largest(net.policy(golden["tokens"]) - golden["logits"]) <= 1e-5
        assert largest(net.value_head(net.critic.hidden(golden["tokens"])) - golden["values"]) <= 1e-5
    assert all(p.dtype == torch.float32 for p in lora_parameters(net.policy, "policy"))


def test_what_the_papers_file_does_not_say_has_to_be_given(tmp_path):
    """A wrong alpha would scale the adapter silently; so would a guess. What it does say, r and the layers, is checked."""
    model = mha(tmp_path)
    with pytest.raises(ValueError, match="does not say alpha"):
        load_lora(model, "policy", GOLDEN / "loralib.bin")
    assert not lora_layers(model)                          # refused before the model was touched
    add_lora(model, "small", r=2, alpha=16)
    with pytest.raises(ValueError, match="has r 4, expected 2"):
        load_lora(model, "small", GOLDEN / "loralib.bin", alpha=16)
    add_lora(model, "loud", r=4, alpha=64)
    with pytest.raises(ValueError, match="has alpha 16, expected 64"):
        load_lora(model, "loud", GOLDEN / "loralib.bin", alpha=16)
    torch.save({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no policy adapter"):
        load_lora(model, "policy", tmp_path / "pytorch_model.bin", alpha=16)


def test_an_older_peft_folder_has_its_tensors_in_a_pickle(tmp_path):
    expected = load_file(GOLDEN / "mha" / "expected.safetensors")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text((GOLDEN / "mha" / "adapter" / "adapter_config.json").read_text())
    torch.save(load_file(GOLDEN / "mha" / "adapter" / "adapter_model.safetensors"), tmp_path / "adapter" / "adapter_model.bin")
    model = mha(tmp_path)
    load_lora(model, "policy", tmp_path / "adapter")
    with torch.no_grad(), adapter(model, "policy"):
        assert largest(model(expected["tokens"]) - expected["adapter_logits"]) <= 1e-5


def peft_folder(folder, base):
    """peft's golden adapter, said to be trained on `base`."""
    folder.mkdir()
    config = json.loads((GOLDEN / "mha" / "adapter" / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    (folder / "adapter_model.safetensors").write_bytes((GOLDEN / "mha" / "adapter" / "adapter_model.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.2)])
def test_an_sft_model_that_is_an_adapter_is_merged_when_it_is_read(dtype, tolerance, tmp_path):
    """PPO from such a model: its reference, "the adapter off", has to be the SFT model and not LLaMA. The sum is taken in
    float32 and rounded once."""
    (tmp_path / "base").mkdir()
    write_model("mha", tmp_path / "base")
    expected = load_file(GOLDEN / "mha" / "expected.safetensors")
    model = load_trunk(peft_folder(tmp_path / "sft", tmp_path / "base"), dtype=dtype)
    assert not lora_layers(model) and model.output.weight.dtype == dtype
    with torch.no_grad():
        assert largest(model(expected["tokens"]).float() - expected["adapter_logits"]) <= tolerance
    reference = load_llama(tmp_path / "base")
    load_lora(reference, "sft", tmp_path / "sft")
    merge_lora(reference, "sft")
    assert torch.equal(model.layers[0].attention.wq.weight, reference.layers[0].attention.wq.weight.to(dtype))


def test_the_base_of_an_adapter_is_sought_from_here_and_from_above(tmp_path, monkeypatch):
    """A run folder names it as it was typed, runs/sft; found from elsewhere too, or one line that says what to do."""
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    write_model("mha", tmp_path / "runs" / "sft")
    folder = peft_folder(tmp_path / "runs" / "ppo", "runs/sft")
    assert base_folder(folder).resolve() == tmp_path / "runs" / "sft"
    monkeypatch.chdir(tmp_path)
    assert base_folder(folder).resolve() == tmp_path / "runs" / "sft"
    with pytest.raises(FileNotFoundError, match="no-such/hub-model, which is no model folder here"):
        base_folder(peft_folder(tmp_path / "lost", "no-such/hub-model"))
    assert base_folder(tmp_path / "runs" / "sft") == tmp_path / "runs" / "sft"


def test_an_adapter_on_an_adapter_is_merged_after_it(tmp_path):
    """PPO's policy, trained on an SFT model that was an adapter itself: LLaMA, then SFT's product, then PPO's."""
    (tmp_path / "base").mkdir()
    write_model("mha", tmp_path / "base")
    sft = peft_folder(tmp_path / "sft", tmp_path / "base")
    model = load_trunk(sft)
    add_lora(model, "policy", r=2, alpha=4)
    for p in lora_parameters(model, "policy"):
        torch.nn.init.normal_(p, std=0.1)
    save_lora(model, "policy", tmp_path / "policy", sft)
    merge_lora(model, "policy")
    tokens = load_file(GOLDEN / "mha" / "expected.safetensors")["tokens"]
    with torch.no_grad():
        assert largest(load_trunk(tmp_path / "policy")(tokens) - model(tokens)) <= 1e-5
    peft_folder(tmp_path / "loop", tmp_path / "loop")
    with pytest.raises(FileNotFoundError, match="no model folder"):
        base_folder(tmp_path / "loop")
    peft_folder(tmp_path / "egg", tmp_path / "hen")
    with pytest.raises(FileNotFoundError, match="no model folder"):          # (and no longer chain leads back)
        base_folder(peft_folder(tmp_path / "hen", tmp_path / "egg"))


@pytest.mark.parametrize("config, tensors, says", [
    ({"r": 8}, {}, "of rank r 8"), ({"r": -4}, {}, "whole number"), ({"r": True}, {}, "whole number"), ({"lora_alpha": float("nan")}, {}, "lora_alpha"),
    ({"alora_invocation_tokens": [5]}, {}, "alora"), ({"init_lora_weights": "pissa"}, {}, "pissa"), ({"target_modules": ["k_proj"]}, {}, "not in this model"),
    ({}, {"layers.1.self_attn.q_proj.lora_A": None}, "is missing"), ({}, {"layers.0.self_attn.q_proj.lora_B": torch.full((64, 4), torch.nan)}, "finite"),
    ({}, {"layers.0.self_attn.q_proj.lora_B": torch.ones(64, 4, dtype=torch.int8)}, "int8")])
def test_an_adapter_that_does_not_add_up_is_refused_in_both_ways_of_reading(config, tensors, says, tmp_path):
    """Merged on reading or put beside the base: neither may take half an adapter, or another kind of one, for a plain one."""
    (tmp_path / "base").mkdir()
    write_model("mha", tmp_path / "base")
    folder = peft_folder(tmp_path / "sft", tmp_path / "base")
    about, found = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(about | config))
    for name, value in tensors.items():
        key = f"base_model.model.model.{name}.weight"
        found.pop(key) if value is None else found.update({key: value})
    save_file(found, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=says):
        load_trunk(folder)
    with pytest.raises(ValueError, match=says):
        load_lora(load_llama(tmp_path / "base"), "policy", folder)


def test_an_adapter_of_another_model_is_not_merged(tmp_path):
    save_llama(Llama(LlamaConfig(vocab_size=128, dim=32, n_layers=2, n_heads=2, ffn_dim=64)), tmp_path / "narrow")
    save_llama(Llama(LlamaConfig(vocab_size=128, dim=64, n_layers=1, n_heads=4, ffn_dim=64)), tmp_path / "shallow")
    with pytest.raises(ValueError, match="another model's"):
        load_trunk(peft_folder(tmp_path / "a", tmp_path / "narrow"))
    with pytest.raises(ValueError, match="layers.1.* is not in this model"):
        load_trunk(peft_folder(tmp_path / "b", tmp_path / "shallow"))


def test_a_reward_adapter_fits_the_merged_model_whatever_the_dtype(tmp_path):
    """One-trunk PPO on an SFT model that is itself an adapter: the trunk's fingerprint is that of the merged weights."""
    (tmp_path / "base").mkdir()
    write_model("mha", tmp_path / "base")
    sft = peft_folder(tmp_path / "sft", tmp_path / "base")
    trunk = load_trunk(sft)
    add_lora(trunk, "reward", r=2, alpha=4)
    save_reward_model(RewardModel(trunk, "reward"), tmp_path / "reward")
    load_reward_model(tmp_path / "reward", trunk=load_trunk(sft, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="another model"):
        load_reward_model(tmp_path / "reward", trunk=load_trunk(tmp_path / "base"))


# --------------------------------------------------------------------------------------------------- limits of each row

def test_a_row_ends_at_its_own_limit_whatever_its_batch_mates_do(tmp_path):
    """A prompt near the end of the positions gets a short answer; the others the full one, the same as alone."""
    model, prompts = mha(tmp_path), [[1, 5, 9], [1, 7], [1, 30, 31, 32]]
    whole = generate(model, prompts, 20, eos_id=-1, seed=3, banned_ids=())
    limited = generate(model, prompts, 20, eos_id=-1, seed=3, banned_ids=(), limits=[20, 3, 99])
    assert [len(r) for r in limited] == [20, 3, 20]
    assert limited == [whole[0], whole[1][:3], whole[2]]
    with pytest.raises(ValueError, match="exceed"):
        generate(model, prompts, 127, banned_ids=())
    assert len(generate(model, prompts, 127, eos_id=-1, banned_ids=(), limits=[5, 126, 5])[1]) == 126
