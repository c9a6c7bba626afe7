"""tools/convert.py: files that other people made, and the folders that come out of it.

golden/make_golden.py says where the expected numbers come from: transformers, peft, loralib and
AlpacaFarm's formula. Whatever goes wrong is one line, status 2, and leaves nothing behind.
"""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import eval as evaluation
from conftest import ROOT
from golden.make_golden import CASES, SIZES, formula_weights, write_model
from lora import adapter, add_lora, load_lora, lora_parameters, save_lora
from model import (InputError, Llama, LlamaConfig, load_llama, read_model_config, save_llama)
from reward import load_reward_model
from tools import convert

GOLDEN = ROOT / "tests" / "golden"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 13476851111\n"


def run(*argv):
    convert.main([str(a) for a in argv])


@pytest.fixture
def refused(capsys):
    """Run a command that must fail -> its one line; of OUT, its third argument or `out`, nothing
    stays."""
    def refused(*argv, out=None):
        out = out or argv[2]
        with pytest.raises(SystemExit) as stop:
            run(*argv)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1, err
        assert err.startswith("convert.py: error: ")
        assert not list(out.parent.glob(f"{out.name}*"))
        return err
    return refused


def largest(difference):
    return difference.abs().max().item()


def golden(case):
    return load_file(GOLDEN / case / "expected.safetensors")


def logits(folder, tokens):
    with torch.no_grad():
        return load_llama(folder)(tokens)


def new(folder):
    folder.mkdir(parents=True)
    return folder


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---------------------------------------------------------------------------------- Meta's files

def interleaved(weight, head_dim):
    """Hugging Face's row order of wq or wk -> Meta's: 0, d/2, 1, d/2 + 1, .. within each head."""
    rows = []
    for head in range(0, len(weight), head_dim):
        for i in range(head, head + head_dim // 2):
            rows += [i, i + head_dim // 2]
    return weight[rows]


METAS = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
         "model.layers": "layers", "self_attn.q_proj": "attention.wq",
         "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
         "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
         "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
         "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}


def meta_weights(case):
    """The formula's weights under Meta's names and in Meta's order."""
    weights = {}
    for name, values in formula_weights(SIZES | CASES[case]).items():
        for theirs, metas in METAS.items():
            name = name.replace(theirs, metas)
        values = torch.from_numpy(values)
        turned = ".wq." in name or ".wk." in name
        weights[name] = interleaved(values, 16) if turned else values
    return weights


def write_meta(case, folder, shards=1):
    """params.json and consolidated.*.pth, split over `shards` files as Meta's model parallelism
    splits them."""
    sizes = CASES[case]
    params = {"dim": 64, "multiple_of": 16, "n_heads": 4, "n_layers": 2, "vocab_size": -1,
              "n_kv_heads": sizes["num_key_value_heads"], "norm_eps": sizes["rms_norm_eps"],
              "rope_theta": sizes["rope_theta"]}
    (folder / "params.json").write_text(json.dumps(params))
    for rank in range(shards):
        shard = {"rope.freqs": 10000.0 ** (-torch.arange(0, 16, 2) / 16)}
        for name, w in meta_weights(case).items():
            dim = 1 if name.split(".")[-2] in ("wo", "w2", "tok_embeddings") else 0
            shard[name] = w if w.dim() == 1 else w.chunk(shards, dim)[rank].clone()
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    return folder


def meta_forward(w, tokens, kv_heads, eps, theta):
    """LLaMA as Meta publishes it, rotary pairs as complex numbers; one sequence. tokens (T,) ->
    logits (T, V)."""
    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w[f"{name}.weight"]

    T = len(tokens)
    angles = torch.outer(torch.arange(T), theta ** (-torch.arange(0, 16, 2) / 16))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]                       # (T, 1, 8)

    def rope(x):
        pairs = torch.view_as_complex(x.reshape(T, -1, 8, 2))
        return torch.view_as_real(pairs * turn).reshape(T, -1, 16)

    x = w["tok_embeddings.weight"][tokens]
    for i in range(2):
        def linear(x, name, i=i):
            return x @ w[f"layers.{i}.{name}.weight"].T

        h = norm(x, f"layers.{i}.attention_norm")
        q, k, v = (linear(h, f"attention.{n}").view(T, -1, 16) for n in ("wq", "wk", "wv"))
        k, v = (y.repeat_interleave(4 // kv_heads, dim=1) for y in (rope(k), v))
        scores = torch.einsum("thd,shd->hts", rope(q), k) / 4
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        probs = scores.masked_fill(future, -torch.inf).softmax(-1)
        x = x + linear(torch.einsum("hts,shd->thd", probs, v).reshape(T, 64), "attention.wo")
        h = norm(x, f"layers.{i}.ffn_norm")
        gated = F.silu(linear(h, "feed_forward.w1")) * linear(h, "feed_forward.w3")
        x = x + linear(gated, "feed_forward.w2")
    return norm(x, "norm") @ w["output.weight"].T


@pytest.mark.parametrize("case", ["mha", "gqa", "theta"])
@pytest.mark.parametrize("shards", [1, 2])
def test_metas_folder_gives_the_logits_of_metas_formula_and_of_transformers(case, shards, tmp_path):
    """Meta interleaves rotary pairs, Hugging Face splits them in halves: read wrongly, a model
    still talks, but worse.

    max abs 1e-5 against Meta's complex arithmetic, and against transformers' logits of the
    model."""
    run("meta", write_meta(case, new(tmp_path / "meta"), shards), tmp_path / "hf")
    expected, sizes = golden(case), CASES[case]
    by_meta = [meta_forward(meta_weights(case), row, sizes["num_key_value_heads"],
                            sizes["rms_norm_eps"], sizes["rope_theta"])
               for row in expected["tokens"]]
    found = logits(tmp_path / "hf", expected["tokens"])
    assert largest(found - torch.stack(by_meta)) <= 1e-5
    assert largest(found - expected["logits"]) <= 1e-5


@pytest.mark.parametrize("where", ["meta", "."])
def test_metas_tokenizer_is_copied_from_the_folder_or_the_one_above(where, tmp_path):
    """Meta's download has tokenizer.model beside the folders 7B, 13B, ..; train.py wants it
    inside."""
    write_meta("mha", new(tmp_path / "meta"))
    (tmp_path / where / "tokenizer.model").write_bytes(b"pieces")
    run("meta", tmp_path / "meta", tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == b"pieces"


def test_a_lost_shard_of_metas_is_noticed(tmp_path, refused):
    """13B comes as two files; one alone has half of every matrix's rows, and is half as wide."""
    meta, out = write_meta("mha", new(tmp_path / "meta"), shards=2), tmp_path / "hf"
    second = (meta / "consolidated.01.pth").rename(meta / "consolidated.02.pth")
    assert "consolidated.02.pth: a shard is missing" in refused("meta", meta, out)
    second.unlink()
    assert "1 files consolidated.*.pth hold 32 rows of wq, params.json says 64" in refused(
        "meta", meta, out)
    shutil.copy(meta / "consolidated.00.pth", meta / "consolidated.01.pth")
    assert "two of the shards are the same" in refused("meta", meta, out)
    torch.save({"norm.weight": torch.ones(64)}, meta / "consolidated.01.pth")
    assert "shards of different models" in refused("meta", meta, out)
    (meta / "consolidated.01.pth").unlink()
    torch.save({"norm.weight": torch.ones(64)}, meta / "consolidated.00.pth")
    assert "tensor output.weight is missing" in refused("meta", meta, out)
    (meta / "consolidated.00.pth").unlink()
    assert "no consolidated.*.pth" in refused("meta", meta, out)


@pytest.mark.parametrize("key, value", [("n_layers", 2.5), ("n_heads", "4"), ("n_kv_heads", "2"),
                                        ("max_seq_len", "9"), ("dim", None), ("norm_eps", "small"),
                                        ("rope_theta", "1e4"), ("use_scaled_rope", True)])
def test_params_that_are_no_sizes_are_named(key, value, tmp_path, refused):
    """A params.json that was edited by hand, or says what is not implemented: a line that names the
    key, not a TypeError from within."""
    meta = write_meta("mha", new(tmp_path / "meta"))
    change_json(meta / "params.json", **{key: value})
    err = refused("meta", meta, tmp_path / "hf")
    assert f"{key} = {value!r} is not a" in err or f"{key} is not implemented" in err


# --------------------------------------------------------------------------------------- pickles

def as_bin(folder, case="mha", legacy=False, shards=1):
    """A golden case with its weights in pickles instead of safetensors."""
    tensors = load_file(write_model(case, new(folder)) / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        return folder
    weight_map = {name: f"pytorch_model-{i % shards + 1:05}-of-{shards:05}.bin"
                  for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        part = {name: t for name, t in tensors.items() if weight_map[name] == file}
        torch.save(part, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("kind", [{}, {"legacy": True}, {"shards": 3}],
                         ids=["zip", "old format", "shards"])
def test_pickled_weights_are_the_same_model(kind, tmp_path):
    """LLaMA-7B went around as pytorch_model-00001-of-00033.bin, and AlpacaFarm writes such files.
    What lies beside them comes along; pickles do not."""
    source = as_bin(tmp_path / "bin", **kind)
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 128]}')
    torch.save({"lr": 1.0}, source / "optimizer.pt")
    run("bin", source, tmp_path / "hf")
    expected = golden("mha")
    assert largest(logits(tmp_path / "hf", expected["tokens"]) - expected["logits"]) <= 1e-5
    assert {file.name for file in (tmp_path / "hf").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors"}


def test_numbers_and_their_dtype_are_not_touched(tmp_path):
    """A bfloat16 file of 13 GB stays one, bit for bit; not 27 GB, not rounded."""
    source = as_bin(tmp_path / "bin")
    tensors = torch.load(source / "pytorch_model.bin")
    tensors = {name: t.bfloat16() for name, t in tensors.items()}
    torch.save(tensors, source / "pytorch_model.bin")
    run("bin", source, tmp_path / "hf")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(t.dtype == torch.bfloat16 and torch.equal(t, tensors[n]) for n, t in written.items())


def test_a_tied_pair_that_shares_its_memory_is_written(tmp_path):
    """torch.save keeps one storage for both names; safetensors would refuse the second."""
    source = as_bin(tmp_path / "bin", case="tied")
    tensors = torch.load(source / "pytorch_model.bin")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, source / "pytorch_model.bin")
    run("bin", source, tmp_path / "hf")
    expected = golden("tied")
    assert largest(logits(tmp_path / "hf", expected["tokens"]) - expected["logits"]) <= 1e-5


def test_a_large_model_is_written_in_shards(tmp_path, monkeypatch):
    """One file of 13 GB is nobody's friend. With shards of 50 kB (the model has 300 kB, its largest
    matrices 45 kB) each has at least 50 kB but the last, and together they are the model."""
    monkeypatch.setattr(convert, "SHARD_BYTES", 50_000)
    run("bin", as_bin(tmp_path / "bin"), tmp_path / "hf")
    files = sorted(file for file in (tmp_path / "hf").iterdir() if file.suffix == ".safetensors")
    assert len(files) > 3
    assert [f.name for f in files] == [f"model-{i + 1:05}-of-{len(files):05}.safetensors"
                                       for i in range(len(files))]
    sizes = [sum(t.numel() * 4 for t in load_file(file).values()) for file in files]
    assert all(50_000 <= size < 50_000 + 46_000 for size in sizes[:-1])
    expected = golden("mha")
    assert largest(logits(tmp_path / "hf", expected["tokens"]) - expected["logits"]) <= 1e-5


PEAK = """
import sys, threading
sys.path.insert(0, sys.argv[3])
import torch
from tools import convert
convert.SHARD_BYTES = 16 << 20
def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.0005):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch)
thread.start()
convert.main(["bin", sys.argv[1], sys.argv[2]])
done.set(); thread.join()
print(peak[0] - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_converting_needs_a_shard_and_not_the_model(tmp_path):
    """LLaMA-7B has to pass on a machine that cannot hold it. Anonymous memory only: pages mapped
    from the file are the system's cache. A pickle of 29 M parameters, 117 MB, in shards of 16 MiB
    (which may be one tensor, 16 MB, larger) stays below 60 MB."""
    config = LlamaConfig(vocab_size=4000, dim=1024, n_layers=2, n_heads=8, ffn_dim=2048)
    save_llama(Llama(config), tmp_path / "bin")
    tensors = load_file(tmp_path / "bin" / "model.safetensors")
    assert sum(t.numel() * 4 for t in tensors.values()) > 116e6
    torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    argv = [sys.executable, "-c", PEAK, tmp_path / "bin", tmp_path / "hf", ROOT]
    out = subprocess.run([str(a) for a in argv], capture_output=True, text=True, check=True).stdout
    assert int(out) < 60e6


class Trap:
    """A pickle that runs a command when it is read, as pickles can."""
    def __reduce__(self):
        return os.mkdir, (self.where,)


def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(tmp_path, refused):
    """A checkpoint from the internet is a program, unless only tensors are let in."""
    source, trap = as_bin(tmp_path / "bin"), Trap()
    trap.where = str(tmp_path / "sprung")
    torch.save({"lm_head.weight": trap}, source / "pytorch_model.bin")
    err = refused("bin", source, tmp_path / "hf")
    assert "pytorch_model.bin cannot be read as tensors" in err
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_pickle_is_refused_by_name(share, tmp_path, refused):
    file = as_bin(tmp_path / "bin") / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:int(file.stat().st_size * share)])
    assert "pytorch_model.bin cannot be read" in refused("bin", tmp_path / "bin", tmp_path / "hf")


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"x": torch.zeros(1)}}])
def test_a_pickle_of_something_else_is_refused(content, tmp_path, refused):
    source = as_bin(tmp_path / "bin")
    torch.save(content, source / "pytorch_model.bin")
    assert "expected a dictionary of tensors" in refused("bin", source, tmp_path / "hf")


def test_git_lfs_pointers_are_called_what_they_are(tmp_path, refused):
    """A clone without Git LFS has a few lines of text where the weights should be: not
    "damaged"."""
    for command, name in (("bin", "pytorch_model.bin"), ("meta", "consolidated.00.pth")):
        source = as_bin(tmp_path / command)
        write_meta("mha", source)
        (source / name).write_text(LFS_POINTER)
        err = refused(command, source, tmp_path / "hf")
        assert f"{name} is a Git LFS pointer" in err and "git lfs pull" in err


def test_an_index_that_names_a_missing_shard_is_refused_by_name(tmp_path, refused):
    source, out = as_bin(tmp_path / "bin", shards=3), tmp_path / "hf"
    (source / "pytorch_model-00002-of-00003.bin").unlink()
    assert "pytorch_model-00002-of-00003.bin" in refused("bin", source, out)
    (source / "pytorch_model.bin.index.json").write_text("[]")
    assert "pytorch_model.bin.index.json holds a list" in refused("bin", source, out)
    (source / "pytorch_model.bin.index.json").unlink()
    assert "has no weights" in refused("bin", source, out)


def test_each_tensor_is_read_from_the_file_that_the_index_names(tmp_path):
    """A stale copy of a tensor in another shard must not win; and one that is not where it should
    be is missed when the model is loaded."""
    source = as_bin(tmp_path / "bin", shards=2)
    where = json.loads((source / "pytorch_model.bin.index.json").read_text())["weight_map"]
    name = "model.norm.weight"
    right = source / where[name]
    other = source / next(file for file in where.values() if file != right.name)
    torch.save(torch.load(other) | {name: torch.zeros(64)}, other)
    run("bin", source, tmp_path / "hf")
    assert load_llama(tmp_path / "hf").norm.weight.abs().min() > 0
    torch.save({n: t for n, t in torch.load(right).items() if n != name}, right)
    run("bin", source, tmp_path / "less")
    with pytest.raises(InputError, match="norm.weight is missing"):
        load_llama(tmp_path / "less")


def test_bin_does_not_pass_on_what_the_modules_would_refuse(tmp_path, refused):
    """Another architecture, a weight diff that looks like a model, a folder that needs no
    converting: said at once, not after 13 GB have been written."""
    out = tmp_path / "hf"
    source = as_bin(tmp_path / "bin")
    change_json(source / "config.json", model_type="mistral")
    assert "model_type = mistral" in refused("bin", source, out)
    change_json(source / "config.json", model_type="reward_model")
    assert "use the command reward" in refused("bin", source, out)
    (source / "model_sum.txt").write_text("1.0")
    assert "use the command diff" in refused("bin", source, out)
    whole = write_model("mha", new(tmp_path / "whole"))
    assert "nothing to convert" in refused("bin", whole, out)


def test_an_older_peft_folder_has_its_tensors_in_a_pickle(tmp_path):
    source = new(tmp_path / "adapter")
    shutil.copy(GOLDEN / "mha" / "adapter" / "adapter_config.json", source)
    tensors = load_file(GOLDEN / "mha" / "adapter" / "adapter_model.safetensors")
    torch.save(tensors, source / "adapter_model.bin")
    run("bin", source, tmp_path / "peft")
    model, expected = load_llama(write_model("mha", new(tmp_path / "hf"))), golden("mha")
    load_lora(model, "policy", tmp_path / "peft")
    with torch.no_grad(), adapter(model, "policy"):
        assert largest(model(expected["tokens"]) - expected["adapter_logits"]) <= 1e-5


# ---------------------------------------------------------------------- AlpacaFarm's reward model

def alpacafarm(folder, **config):
    """AlpacaFarm's reward model of the golden case: tensors backbone_model.* and reward_head.*, a
    config.json without sizes, the backbone's folder beside it."""
    values = load_file(GOLDEN / "alpacafarm.safetensors")
    backbone, source = write_model("mha", new(folder / "sft10k")), new(folder / "reward-model")
    weights = load_file(backbone / "model.safetensors")
    tensors = {f"backbone_model.{name}": t for name, t in weights.items()}
    tensors["reward_head.weight"] = values["head_weight"]
    tensors["reward_head.bias"] = values["head_bias"]
    torch.save(tensors, source / "pytorch_model.bin")
    about = {"architectures": ["RewardModel"], "model_type": "reward_model",
             "backbone_model_name_or_path": str(backbone)}
    (source / "config.json").write_text(json.dumps(about | config))
    return values, source


def scores(model, values, ended=False):
    """AlpacaFarm pads on the left, we on the right. ended: with an EOS after the last token."""
    lengths = values["lengths"]
    rows = [row[20 - n:] for row, n in zip(values["rows"], lengths.tolist())]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    if ended:
        tokens = F.pad(tokens, (0, 1)).scatter(1, lengths[:, None], 2)
        lengths = lengths + 1
    with torch.no_grad():
        return model.scores(tokens, lengths)


@pytest.mark.parametrize("kind", ["pickle", "safetensors"])
def test_alpacafarms_reward_model_gives_alpacafarms_scores(kind, tmp_path):
    """The head reads the last token of rows that AlpacaFarm pads on the left. It was trained on
    text, in which no EOS is: an EOS that our policy ends with must not change the score."""
    values, source = alpacafarm(tmp_path)
    if kind == "safetensors":
        save_file(torch.load(source / "pytorch_model.bin"), source / "model.safetensors")
        (source / "pytorch_model.bin").unlink()
    run("reward", source, tmp_path / "reward")
    model = load_reward_model(tmp_path / "reward")
    assert largest(scores(model, values) - values["scores"]) <= 1e-5
    assert largest(scores(model, values, ended=True) - values["scores"]) <= 1e-5
    model.score_eos = True
    assert largest(scores(model, values, ended=True) - values["scores"]) > 0.1


def test_alpacafarms_reward_model_without_its_backbone(tmp_path, refused, monkeypatch, capsys):
    """config.json names a path of the machine it was made on. --backbone says the sizes; without
    it, rotary frequencies in the file tell the head width, and LLaMA's 128 is assumed - which does
    not divide 64, and is refused. Guessed sizes are said aloud."""
    values, source = alpacafarm(tmp_path, backbone_model_name_or_path="/somewhere/else")
    run("reward", source, tmp_path / "a", "--backbone", tmp_path / "sft10k")
    assert largest(scores(load_reward_model(tmp_path / "a"), values) - values["scores"]) <= 1e-5
    capsys.readouterr()
    assert "--backbone" in refused("reward", source, tmp_path / "b")
    assert "holds no model" in refused("reward", source, tmp_path / "b", "--backbone", tmp_path)
    tensors = torch.load(source / "pytorch_model.bin")
    tensors["backbone_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    torch.save(tensors, source / "pytorch_model.bin")
    change_json(source / "config.json", backbone_model_name_or_path="")
    monkeypatch.chdir(GOLDEN / "gqa")                # "" is not the folder that one is in
    run("reward", source, tmp_path / "c")
    assert "heads are 16 wide" in capsys.readouterr().out
    assert largest(scores(load_reward_model(tmp_path / "c"), values) - values["scores"]) <= 1e-5


def test_a_language_model_is_not_taken_for_a_reward_model(tmp_path, refused):
    source = as_bin(tmp_path / "bin")
    assert "use the command bin" in refused("reward", source, tmp_path / "reward")
    change_json(source / "config.json", model_type="reward_model")
    assert "has no tensor reward_head.weight" in refused("reward", source, tmp_path / "reward")


# ---------------------------------------------------------------------------------- weight diffs

def diff_of(folder, reward=False, model_sum=None, rotary=False):
    """A base of 100 tokens, and a diff to a tuned model of 101 ([PAD]), made as AlpacaFarm makes
    it: tuned - (base, its vocabulary extended by the mean row). -> the tuned tensors."""
    generator = torch.Generator().manual_seed(0)
    base = Llama(LlamaConfig(vocab_size=100, dim=32, n_layers=2, n_heads=2, ffn_dim=64))
    save_llama(base.half(), folder / "base")         # as transformers converts LLaMA-7B
    raw = load_file(folder / "base" / "model.safetensors")
    raw = {name: t.float() for name, t in raw.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        raw[name] = torch.cat([raw[name], raw[name].mean(0)[None]])
    prefix = "backbone_model." if reward else ""
    tuned = {prefix + name: t + 0.05 * torch.randn(t.shape, generator=generator)
             for name, t in raw.items()}
    diff = {prefix + name: tuned[prefix + name] - t for name, t in raw.items()}
    if reward:
        head = {"reward_head.weight": torch.randn(1, 32, generator=generator),
                "reward_head.bias": torch.ones(1)}
        tuned, diff = tuned | head, diff | head
    total = sum(t.sum() for t in tuned.values()).item()
    if rotary:
        names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)]
        diff |= {name: torch.zeros(8) for name in names}
        total += 2 * sum(10000 ** (-i / 8) for i in range(8))
    new(folder / "diff")
    torch.save(diff, folder / "diff" / "pytorch_model.bin")
    (folder / "diff" / "config.json").write_text('{"model_type": "llama", "vocab_size": 101}')
    (folder / "diff" / "model_sum.txt").write_text(str(total if model_sum is None else model_sum))
    return tuned


@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "with rotary frequencies"])
def test_a_released_diff_gives_the_tuned_model(rotary, tmp_path, capsys):
    """sft10k is published as a difference to LLaMA-7B; [PAD]'s row as the difference to the mean
    row. The sum was published when transformers still counted rotary frequencies as weights."""
    tuned = diff_of(tmp_path, rotary=rotary)
    run("diff", tmp_path / "base", tmp_path / "diff", tmp_path / "sft10k")
    assert "they agree" in capsys.readouterr().out
    model = load_llama(tmp_path / "sft10k")
    assert model.config.vocab_size == 101
    w2 = model.layers[1].feed_forward.w2.weight
    assert largest(model.output.weight - tuned["lm_head.weight"]) <= 1e-6
    assert largest(w2 - tuned["model.layers.1.mlp.down_proj.weight"]) <= 1e-6


def test_a_released_reward_models_diff_gives_a_reward_model(tmp_path):
    """The head is no difference, it comes whole; and the result knows that it has not seen an
    EOS."""
    tuned = diff_of(tmp_path, reward=True)
    run("diff", tmp_path / "base", tmp_path / "diff", tmp_path / "reward", "--dtype=bfloat16")
    model = load_reward_model(tmp_path / "reward")
    assert not model.score_eos and model.trunk.config.vocab_size == 101
    head, norm = tuned["reward_head.weight"], tuned["backbone_model.model.norm.weight"]
    assert torch.equal(model.head.weight, head.bfloat16().float())
    assert torch.equal(model.trunk.norm.weight, norm.bfloat16().float())


def test_a_diff_for_another_model_is_refused(tmp_path, refused):
    """By the published sum when the shapes fit, as LLaMA-7B's do in a wrong conversion; by name
    when they do not. The sum is known at the end alone: what is written by then goes."""
    diff_of(tmp_path, model_sum=12345.0)
    diff, out = tmp_path / "diff", tmp_path / "out"
    err = refused("diff", tmp_path / "base", diff, out, out=out)
    assert "model_sum.txt says 12345" in err
    save_llama(Llama(LlamaConfig(100, 64, 2, 2, ffn_dim=64)), tmp_path / "wide")
    save_llama(Llama(LlamaConfig(100, 32, 3, 2, ffn_dim=64)), tmp_path / "deep")
    err = refused("diff", tmp_path / "wide", diff, out, out=out)
    assert "a diff for another model: " in err and "the base (101, 64)" in err
    err = refused("diff", tmp_path / "deep", diff, out, out=out)
    assert "a diff for another model: model.layers.2." in err and "only one of them" in err
    (diff / "model_sum.txt").write_text("no number")
    err = refused("diff", tmp_path / "base", diff, out, out=out)
    assert "model_sum.txt: expected a number, got 'no number'" in err


@pytest.mark.parametrize("off, fits", [(0.9e-5, True), (1.1e-5, False)])
def test_the_sum_is_compared_to_one_part_in_100000(off, fits, tmp_path, refused):
    """AlpacaFarm's bound: float32 sums of 7 billion numbers agree so far, and no further."""
    tuned = diff_of(tmp_path)
    total = sum(t.double().sum() for t in tuned.values()).item()
    (tmp_path / "diff" / "model_sum.txt").write_text(repr(total * (1 + off)))
    argv = ["diff", tmp_path / "base", tmp_path / "diff", tmp_path / "out"]
    if fits:
        run(*argv)
        load_llama(tmp_path / "out")
    else:
        assert "is not the model that this diff was made for" in refused(*argv, out=argv[3])


@pytest.mark.parametrize("said, kept", [
    ({"config": 1}, 1), ({"config": 2, "generation": 100}, [2, 100]),
    ({"generation": [2, 100]}, [2, 100]), ({}, 2)])
def test_the_models_own_end_of_text_is_kept(said, kept, tmp_path):
    """A chat model ends with a token of its own, said in one of two files, as a number or a list.
    Lost in converting, its answers would never end. Where nothing is said it is LLaMA's, 2."""
    diff_of(tmp_path)
    base = tmp_path / "base"
    change_json(base / "config.json", eos_token_id=said.get("config"))
    generation = {"eos_token_id": said.get("generation")}
    (base / "generation_config.json").write_text(json.dumps(generation))
    run("diff", base, tmp_path / "diff", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == kept


# ---------------------------------------------------------------------------- the paper's adapters

def test_the_papers_released_adapter_gives_loralibs_numbers(tmp_path):
    """The policy's half of a file that holds the value adapter and head as well; alpha is not in
    it, and a wrong one would scale the adapter: 16 are loralib's numbers, 64 (the paper's) are
    not."""
    expected = load_file(GOLDEN / "loralib.safetensors")
    run("paper", GOLDEN / "loralib.bin", tmp_path / "policy", "--alpha=16")
    run("paper", GOLDEN / "loralib.bin", tmp_path / "loud")
    model = load_llama(write_model("mha", new(tmp_path / "hf")))
    for name in ("policy", "loud"):
        load_lora(model, name, tmp_path / name)
    with torch.no_grad(), adapter(model, "policy"):
        assert largest(model(expected["tokens"]) - expected["logits"]) <= 1e-5
    loud = model.layers[0].attention.wq
    assert loud.scaling("loud") == 16 and loud.scaling("policy") == 4
    assert all(p.dtype == torch.float32 for p in lora_parameters(model, "policy"))


def test_a_file_without_a_policy_adapter_is_refused(tmp_path, refused):
    """The value adapter alone, say: a PEFT folder without tensors would be no adapter at all."""
    tensors = {"base_model.model.layers.0.self_attn.q_proj.lora_A": torch.zeros(4, 64)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    err = refused("paper", tmp_path / "pytorch_model.bin", tmp_path / "policy")
    assert "holds no policy adapter" in err


# ---------------------------------------------------------------------------------------- merging

def answer(capsys, *argv):
    """What eval.py generate prints."""
    capsys.readouterr()
    evaluation.main(["generate", *map(str, argv), "--prompt=Who?", "--temperature=0",
                     "--max_new_tokens=12"])
    return capsys.readouterr().out


def a_policy(tiny, folder):
    """An adapter on the tiny model that changes its logits well beyond rounding, as a PEFT
    folder."""
    model = load_llama(tiny / "sft")
    add_lora(model, "policy", r=4, alpha=16)
    generator = torch.Generator().manual_seed(0)
    for p in lora_parameters(model, "policy"):
        torch.nn.init.normal_(p, std=0.1, generator=generator)
    save_lora(model, "policy", folder)
    return model


def test_a_merged_model_is_the_policy(tiny, tmp_path, capsys):
    """One folder that needs nothing of this project, with what AutoTokenizer wants. W + (alpha/r) B
    A computes what W and the adapter compute, 1e-5, and answers the same."""
    model = a_policy(tiny, tmp_path / "policy")
    argv = [tiny / "sft", "--adapter", tmp_path / "policy"]
    run("merge", tiny / "sft", tmp_path / "merged", *argv[1:])
    assert "user-defined pieces" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "merged").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json",
        "special_tokens_map.json", "generation_config.json"}
    tokens = torch.randint(3, 900, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        base = model(tokens)
        with adapter(model, "policy"):
            unmerged = model(tokens)
    assert largest(unmerged - base) > 0.1
    assert largest(logits(tmp_path / "merged", tokens) - unmerged) <= 1e-5
    assert answer(capsys, *argv) == answer(capsys, tmp_path / "merged") != answer(capsys, argv[0])


@pytest.mark.parametrize("rank", [4, 0], ids=["LoRA", "all weights"])
def test_a_finished_runs_policy_is_merged_from_its_folder(rank, tiny, tmp_path, capsys):
    """The run knows its model: MODEL is the run's folder alone. Greedy answers are the run's
    own."""
    flags = {"stage": "ppo", "model": tiny / "sft", "reward": tiny / "reward",
             "out": tmp_path / "run", "prompts": ROOT / "toy" / "unlabeled.json", "steps": 1,
             "rollout_batch": 8, "minibatch": 4, "micro_batch": 2, "response_len": 12,
             "prompt_len": 60, "lr": 1e-2, "dtype": "float32", "lora_rank": rank, "warmup_steps": 0}
    command = [sys.executable, ROOT / "train.py", *(f"--{k}={v}" for k, v in flags.items())]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    run("merge", tmp_path / "run", tmp_path / "merged")
    merged = answer(capsys, tmp_path / "merged")
    assert merged == answer(capsys, tmp_path / "run") != answer(capsys, tiny / "sft")


def test_a_merged_model_ends_its_answers_where_this_project_does(tiny, tmp_path):
    """Old LLaMA folders say eos 1, which means nothing: transformers alone would never stop. What
    the tokenizer says is added, and what the model says is kept."""
    model = shutil.copytree(tiny / "sft", tmp_path / "sft")
    change_json(model / "config.json", eos_token_id=1)
    run("merge", model, tmp_path / "merged")
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "merged" / file).read_text())["eos_token_id"] == [1, 2]


def test_what_is_no_adapter_of_this_model_is_not_merged(tiny, tmp_path, refused):
    """Too few layers, another model's width, a folder that is no run: nothing is written."""
    a_policy(tiny, tmp_path / "policy")
    argv = ["merge", tiny / "sft", tmp_path / "merged", "--adapter"]
    change_json(tmp_path / "policy" / "adapter_config.json", target_modules=["q_proj"])
    assert "k_proj" in refused(*argv, tmp_path / "policy")
    err = refused(*argv, GOLDEN / "mha" / "adapter")
    assert "k_proj.lora_B.weight" in err and "(64, 4)" in err and "(32, 4)" in err
    assert "holds no" in refused("merge", tmp_path, tmp_path / "merged")


def tied(tiny, folder):
    """A model of the tiny one's sizes whose head is its embeddings, with the toy tokenizer."""
    config = replace(read_model_config(tiny / "sft"), tie_embeddings=True)
    save_llama(Llama(config), folder)
    shutil.copy(tiny / "sft" / "tokenizer.model", folder)
    return folder


def test_an_adapter_merges_into_a_tied_model_and_the_head_stays_tied(tiny, tmp_path):
    """One matrix, written once: transformers and load_llama tie it again."""
    base = tied(tiny, tmp_path / "tied")
    a_policy(tiny, tmp_path / "policy")
    run("merge", base, tmp_path / "merged", "--adapter", tmp_path / "policy")
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    before, merged = load_llama(base), load_llama(tmp_path / "merged")
    assert merged.output.weight is merged.tok_embeddings.weight
    assert torch.equal(merged.output.weight, before.output.weight)
    wv, old_wv = (model.layers[1].attention.wv.weight for model in (merged, before))
    assert largest(wv - old_wv) > 0.1


def test_an_adapter_on_a_tied_head_is_refused(tiny, tmp_path, refused):
    """Merged into the one matrix it would change the embeddings too, in silence. On a head of its
    own it is merged like any other."""
    base = tied(tiny, tmp_path / "tied")
    model = load_llama(tiny / "sft")
    add_lora(model, "policy", r=4, alpha=16, targets=("wq", "output"))
    torch.nn.init.normal_(model.output.lora_B["policy"], std=0.1)
    save_lora(model, "policy", tmp_path / "policy")
    err = refused("merge", base, tmp_path / "merged", "--adapter", tmp_path / "policy")
    assert "(tied)" in err
    run("merge", tiny / "sft", tmp_path / "merged", "--adapter", tmp_path / "policy")
    tokens = torch.randint(3, 900, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), adapter(model, "policy"):
        assert largest(logits(tmp_path / "merged", tokens) - model(tokens)) <= 1e-5


# ---------------------------------------------------------------------- what holds of all commands

def test_a_folder_that_exists_is_refused_and_stays_as_it_is(tmp_path, capsys):
    """Weights of two models in one folder would be read as one."""
    source = as_bin(tmp_path / "bin")
    (new(tmp_path / "hf") / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        run("bin", source, tmp_path / "hf")
    assert "hf exists: give the name of a new folder" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "hf").iterdir()] == ["notes.txt"]


def test_what_a_killed_command_has_left_does_not_get_into_the_result(tmp_path):
    (new(tmp_path / "hf.tmp") / "model-00001-of-00002.safetensors").write_text("half")
    run("bin", as_bin(tmp_path / "bin"), tmp_path / "hf")
    assert {f.name for f in (tmp_path / "hf").iterdir()} == {"config.json", "model.safetensors"}
    assert not (tmp_path / "hf.tmp").exists()


def test_a_disk_that_is_full_is_one_line_and_leaves_room(tmp_path, refused, monkeypatch):
    """After the first shard: path and reason, and the shard that was written is gone."""
    def full(tensors, path, **kwargs):
        if "1.safetensors" in str(path):
            raise OSError(28, "No space left on device")
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr(convert, "SHARD_BYTES", 50_000)
    monkeypatch.setattr("model.save_file", full)
    err = refused("bin", as_bin(tmp_path / "bin"), tmp_path / "hf")
    assert "1.safetensors" in err and "No space left on device" in err


def test_mistakes_on_the_command_line_are_one_line(tmp_path, refused):
    out = tmp_path / "out"
    assert "COMMAND" in refused(out=out)
    assert "required: OUT" in refused("meta", "x", out=out)
    assert "invalid choice: 'int8'" in refused("diff", "x", "y", out, "--dtype=int8", out=out)
    for command in ("meta", "bin", "reward", "paper", "merge"):
        assert "nowhere" in refused(command, tmp_path / "nowhere", out)


def unconverted(folder, kind):
    """What other people publish -> the call of a module that must refuse it."""
    if kind == "meta":
        return load_llama, write_meta("mha", new(folder / kind))
    if kind == "bin":
        return load_llama, as_bin(folder / kind)
    if kind == "reward":
        return load_reward_model, alpacafarm(folder)[1]
    source = new(folder / kind)
    if kind == "peft":
        shutil.copy(GOLDEN / "mha" / "adapter" / "adapter_config.json", source)
        torch.save({}, source / "adapter_model.bin")
    else:
        shutil.copy(GOLDEN / "loralib.bin", source / "pytorch_model.bin")
    model = Llama(LlamaConfig(128, 64, 2, 4, ffn_dim=176))
    return partial(load_lora, model, "policy"), source


@pytest.mark.parametrize("kind", ["meta", "bin", "reward", "peft", "paper"])
def test_the_modules_refuse_what_is_not_converted_and_name_the_tool(kind, tmp_path):
    """They read safetensors folders alone; whoever has something else learns what to do."""
    load, source = unconverted(tmp_path, kind)
    with pytest.raises(InputError, match=r"tools/convert\.py"):
        load(source)
