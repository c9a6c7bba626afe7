"""The model against transformers and against itself; the sampler against the softmax; files.

The models are tiny (2 layers, width 64, 4 heads, vocabulary 128, float32). golden/make_golden.py
says where the expected logits come from and how the weights are made.
"""
import itertools
import json
import math
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import model as module
from conftest import ROOT, real
from golden.make_golden import (CASES, GREEDY_PROMPTS, GREEDY_STEPS, SIZES, weight_shapes,
                                write_model)
from lora import add_lora
from model import (Decoder, InputError, KVCache, Llama, LlamaConfig, RMSNorm, ban_mask, fingerprint,
                   generate, load_llama, read_json, read_model_config, response_logprobs,
                   rope_angles, rotate, sample, sample_responses, save_llama, whole_file)
from running import ended, fork

GOLDEN = Path(__file__).resolve().parent / "golden"


def golden_model(case, folder, **kwargs):
    return load_llama(write_model(case, folder), **kwargs)


def golden(case):
    return load_file(GOLDEN / case / "expected.safetensors")


def largest(difference):
    return difference.abs().max().item()


def logits_of(folder, case):
    """The logits of a model folder for the case's tokens."""
    with torch.no_grad():
        return load_llama(folder)(golden(case)["tokens"])


# -------------------------------------------------------------------- against other implementations

@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    """Same weights, same ids, same logits: attention, grouped heads, tied output, rotary base and
    norms are all LLaMA's."""
    expected = golden(case)
    logits = logits_of(write_model(case, tmp_path), case)
    assert logits.shape == (2, 32, 128) and logits.dtype == torch.float32
    assert largest(logits - expected["logits"]) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_greedy_decoding_equals_transformers(case, tmp_path):
    """Five prompts of 1 to 11 ids decoded in one ragged batch give what transformers gives each of
    them alone."""
    out = generate(golden_model(case, tmp_path), GREEDY_PROMPTS, GREEDY_STEPS, temperature=0,
                   eos_id=2, banned_ids=())
    for row, expected in zip(out, golden(case)["greedy"].tolist(), strict=True):
        assert row == (expected[:expected.index(2) + 1] if 2 in expected else expected)


def test_a_trained_model_tells_the_story_that_llama2_c_tells():
    """Greedy from BOS, 200 ids, letter by letter the text in llama2.c's own test of stories260K."""
    import sentencepiece
    folder = real("stories260K")
    story = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park. One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
        "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. "
        "She said, \"I want to play with your ball, but I can't find it.\"\n"
        "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what "
        "to do.\"\nLily didn't want to help her mom, so she")
    model = load_llama(folder)
    assert sum(p.numel() for p in model.parameters()) == 260_032
    tokenizer = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    assert tokenizer.decode(generate(model, [[1]], 200, temperature=0)[0]) == story


def test_llama_7b_has_6738415616_parameters():
    """The number in the paper's title row; untied, so the output matrix counts apart from the
    embeddings."""
    with torch.device("meta"):
        model = Llama(LlamaConfig(vocab_size=32000, dim=4096, n_layers=32, n_heads=32,
                                  n_kv_heads=32, ffn_dim=11008, norm_eps=1e-6, rope_theta=10000.0,
                                  max_seq_len=2048, tie_embeddings=False))
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616


@pytest.mark.parametrize("dtype, tolerance",
                         [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])   # (8 and 2.5 roundings)
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_the_norm_is_its_formula_in_float64(dtype, tolerance, eps):
    """Rows of very different size, so that eps counts for some and not for others. The mean of
    squares is taken in float32 whatever the dtype: in bfloat16 the normalised number is that of
    float64, rounded once."""
    torch.manual_seed(0)
    norm = RMSNorm(64, eps).to(dtype)
    size = torch.tensor([0.3, 1.0, 30.0])[:, None, None]
    x = (torch.randn(3, 5, 64) * size).to(dtype)
    with torch.no_grad():
        norm.weight.normal_()
        out = norm(x)
    x64, w64 = x.double(), norm.weight.detach().double()
    normalised = x64 / torch.sqrt((x64 ** 2).sum(-1, keepdim=True) / 64 + eps)
    plain = normalised * w64
    assert out.dtype == dtype and largest(out - plain) <= tolerance * largest(plain)
    if dtype == torch.bfloat16:                                                # (ties may differ)
        once = norm.weight.detach() * normalised.to(dtype)
        assert (out == once).float().mean() > 0.99


def test_rotation_is_multiplication_by_a_complex_number():
    """Numbers i and i + d/2 of a head are one complex number; position p turns it by
    p theta^(-2i/d). Positions 0, 5, .. 30 of heads of 16."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 16, dtype=torch.float64)
    positions, i = torch.arange(7) * 5, torch.arange(8, dtype=torch.float64)
    cos, sin = rope_angles(positions[None, None], 16, 10000.0)
    turn = torch.exp(1j * positions[:, None] * 10000.0 ** (-i / 8))
    turned = torch.complex(x[..., :8], x[..., 8:]) * turn
    plain = torch.cat((turned.real, turned.imag), dim=-1)
    assert largest(rotate(x, cos, sin) - plain) <= 1e-5                      # (angles are float32)


# --------------------------------------------------------------------------------- files: what fits

@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_are_bit_equal(case, dtype, tmp_path):
    """A checkpoint is the model: every weight, and with them every logit, comes back bit for bit,
    under Hugging Face's names."""
    model = golden_model(case, tmp_path, dtype=dtype)
    save_llama(model, tmp_path / "copy")
    again = load_llama(tmp_path / "copy", dtype=dtype)
    assert again.config == model.config and not again.training
    ours, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert list(ours) == list(theirs)
    for name, p in ours.items():
        assert theirs[name].dtype == dtype and torch.equal(p, theirs[name])
    tokens = golden(case)["tokens"]
    with torch.no_grad():
        assert torch.equal(model(tokens), again(tokens))
    saved = load_file(tmp_path / "copy" / "model.safetensors")
    assert {k: tuple(t.shape) for k, t in saved.items()} == weight_shapes(SIZES | CASES[case])


def test_what_is_said_about_a_model_stands_in_its_config(tmp_path):
    """A stage's settings lie beside the sizes that load_llama reads; neither loses the other."""
    model = golden_model("mha", tmp_path)
    save_llama(model, tmp_path / "copy", eos_token_id=7, run={"seed": 3})
    about = read_json(tmp_path / "copy" / "config.json")
    assert about["run"] == {"seed": 3} and about["eos_token_id"] == 7
    assert read_model_config(tmp_path / "copy") == model.config


def test_a_tied_head_stays_tied_after_loading(tmp_path):
    """One matrix, not two equal ones: a training step on the embeddings must move the output
    too."""
    model = golden_model("tied", tmp_path)
    assert model.output.weight is model.tok_embeddings.weight
    untied = golden_model("mha", tmp_path)
    assert untied.output.weight is not untied.tok_embeddings.weight


def write_shards(folder, case="gqa"):
    """A case as two files and the index that names them -> the names of the files."""
    weights = load_file(write_model(case, folder) / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for file, part in zip(files, (names[::2], names[1::2])):
        save_file({name: weights[name] for name in part}, folder / file)
    weight_map = {name: files[i % 2] for i, name in enumerate(names)}
    write_index(folder, weight_map)
    return files


def write_index(folder, weight_map):
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_sharded_checkpoint_loads(tmp_path):
    """7B weights come in several files with an index; together they are the one-file model."""
    write_shards(tmp_path)
    assert largest(logits_of(tmp_path, "gqa") - golden("gqa")["logits"]) <= 1e-5


def test_each_tensor_is_read_from_the_file_that_the_index_names(tmp_path):
    """A stale copy of a tensor in another shard must not win, and one that is not where it should
    be is missed."""
    files = write_shards(tmp_path)
    where = read_json(tmp_path / "model.safetensors.index.json")["weight_map"]
    name = "model.norm.weight"
    stale = next(file for file in files if file != where[name])
    save_file(load_file(tmp_path / stale) | {name: torch.zeros(64)}, tmp_path / stale)
    assert largest(logits_of(tmp_path, "gqa") - golden("gqa")["logits"]) <= 1e-5
    right = load_file(tmp_path / where[name])
    right.pop(name)
    save_file(right, tmp_path / where[name])
    with pytest.raises(InputError, match=r"tensor model\.norm\.weight is missing"):
        load_llama(tmp_path)


def test_a_tied_model_whose_index_names_an_absent_head_loads(tmp_path):
    """Some indices list lm_head.weight although the tied file leaves it out; transformers loads
    such a model, and so do we. Untied, an absent head is half a model."""
    for case in ("tied", "mha"):
        folder = tmp_path / case
        folder.mkdir()
        files = write_shards(folder, case)
        where = read_json(folder / "model.safetensors.index.json")["weight_map"]
        write_index(folder, where | {"lm_head.weight": files[0]})
        first = load_file(folder / files[0])
        first.pop("lm_head.weight", None)
        save_file(first, folder / files[0])
    assert largest(logits_of(tmp_path / "tied", "tied") - golden("tied")["logits"]) <= 1e-5
    with pytest.raises(InputError, match=r"tensor lm_head\.weight is missing"):
        load_llama(tmp_path / "mha")


def test_a_tied_pair_may_be_there_twice_but_not_differ(tmp_path):
    """Some tied checkpoints carry a copy under the other name, or the one matrix under the other
    name alone. Two different ones contradict the config: which is meant?"""
    file = write_model("tied", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    embeddings, expected = tensors["model.embed_tokens.weight"], golden("tied")["logits"]
    save_file(tensors | {"lm_head.weight": embeddings.clone()}, file)
    assert largest(logits_of(tmp_path, "tied") - expected) <= 1e-5
    save_file(tensors | {"lm_head.weight": torch.zeros(128, 64)}, file)
    with pytest.raises(InputError, match="two different matrices"):
        load_llama(tmp_path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file)
    assert largest(logits_of(tmp_path, "tied") - expected) <= 1e-5


def change_config(folder, case="mha", drop=(), **change):
    """The case's folder with some keys of its config.json changed."""
    config = read_json(write_model(case, folder) / "config.json")
    for key in drop:
        del config[key]
    (folder / "config.json").write_text(json.dumps(config | change))
    return folder


def test_a_config_as_older_releases_wrote_it_is_read_the_same(tmp_path):
    """LLaMA-7B's config.json has no num_key_value_heads, no head_dim, and rope_theta, if at all, at
    the top."""
    change_config(tmp_path, "theta", drop=("rope_parameters", "head_dim"), rope_theta=500000.0,
                  rope_scaling=None)
    assert largest(logits_of(tmp_path, "theta") - golden("theta")["logits"]) <= 1e-5
    change_config(tmp_path, "mha", drop=("rope_parameters", "head_dim", "num_key_value_heads",
                                         "tie_word_embeddings"))
    assert largest(logits_of(tmp_path, "mha") - golden("mha")["logits"]) <= 1e-5


@pytest.mark.parametrize("n", [1, 3, 64, 65, 4096 * 11008, 32000 * 4096 + 1])
def test_a_fingerprint_reads_the_first_and_the_last_number_of_a_weight(n):
    """Of LLaMA-7B's sizes, too: 4096 x 11008 has no float32 for its last place, and a rounded one
    lies behind the end."""
    weight = torch.zeros(n, dtype=torch.bfloat16)
    model = SimpleNamespace(config="c", named_parameters=lambda: [("w", weight)])
    seen = {fingerprint(model)}
    for place in {0, n - 1}:
        weight[place] = 1.0
        seen.add(fingerprint(model))
    assert len(seen) == (3 if n > 1 else 2)


def test_a_fingerprint_is_the_weights_whatever_the_dtype_and_the_adapters(tmp_path):
    """A reward adapter must find its trunk again when that is read in bfloat16, and when other
    adapters are on it already; another model, or other weights, are another trunk."""
    model = golden_model("mha", tmp_path)
    mark = fingerprint(model)
    assert fingerprint(load_llama(tmp_path, dtype=torch.bfloat16)) == mark
    (tmp_path / "gqa").mkdir()
    assert fingerprint(golden_model("gqa", tmp_path / "gqa")) != mark
    add_lora(model, "policy", r=4, alpha=16)
    assert fingerprint(model) == mark
    with torch.no_grad():
        model.layers[1].attention.wo.base.weight[-1, -1] += 1
    assert fingerprint(model) != mark


PEAK = """
import sys, threading
sys.path.insert(0, sys.argv[2])
import torch
from model import load_llama

def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

torch.nn.init.normal_(torch.empty(1, device="meta"))   # torch imports 70 MB at first
before, peak, done = resident(), [0], threading.Event()

def watch():
    while not done.wait(0.0005):
        peak[0] = max(peak[0], resident())

thread = threading.Thread(target=watch)
thread.start()
model = load_llama(sys.argv[1], dtype=torch.bfloat16)
peak[0] = max(peak[0], resident())
done.set()
thread.join()
print(peak[0] - before, sum(p.numel() * 2 for p in model.parameters()))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_loading_needs_the_model_and_one_tensor(tmp_path):
    """A float32 file is read tensor by tensor into bfloat16. Anonymous memory only: pages mapped
    from the file are the system's cache, which processes share. 30 M parameters: 60 MB kept, 120 MB
    in the file, 16 MB the largest tensor."""
    config = LlamaConfig(vocab_size=4000, dim=1024, n_layers=2, n_heads=8, ffn_dim=2048,
                         max_seq_len=64)
    save_llama(Llama(config), tmp_path)
    out = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path), str(ROOT)], check=True,
                         capture_output=True, text=True)
    grown, kept = map(int, out.stdout.split())
    assert kept <= grown <= kept + 2 * 4000 * 1024 * 4 + 10e6


# ------------------------------------------------------------------------- files: what does not fit

def rewrite(folder, change):
    """Apply `change` to the tensors of the mha case."""
    file = write_model("mha", folder) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


Q1 = "model.layers.1.self_attn.q_proj.weight"
Q2, BIAS = Q1.replace("1", "2"), Q1.replace("weight", "bias")


@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop(Q1), f"{Q1} is missing"),
    (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
    (lambda t: t.update({Q2: t[Q1].clone()}), f"{Q2} has no place"),
    (lambda t: t.update({BIAS: torch.zeros(64)}), f"{BIAS} has no place"),
    (lambda t: t.update({Q1: torch.zeros(64, 32)}), rf"{Q1}.*\(64, 32\).*\(64, 64\)"),
    (lambda t: t.update({Q1: torch.zeros(1, 64)}), rf"{Q1}.*\(1, 64\).*\(64, 64\)"),
    # codes of the right shape would be copied as if they were weights
    (lambda t: t.update({Q1: t[Q1].mul(100).to(torch.int8)}), f"{Q1}.*int8"),
    # one NaN in 7 billion weights makes every answer garbage, without a word
    (lambda t: t[Q1][3].fill_(float("nan")), f"{Q1}.*not finite"),
    (lambda t: t[Q1][3].fill_(-float("inf")), f"{Q1}.*not finite"),
], ids=["missing", "no-head", "extra", "bias", "shape", "broadcastable", "int8", "NaN", "inf"])
def test_a_tensor_that_does_not_fit_is_refused_by_name(change, says, tmp_path):
    """Half a model must not load quietly: the message names the tensor, and both shapes where they
    differ."""
    rewrite(tmp_path, change)
    with pytest.raises(InputError, match=says):
        load_llama(tmp_path)


@pytest.mark.parametrize("key, value", [
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
    ("rope_scaling", {"type": "linear", "factor": 2.0}), ("attention_bias", True),
    ("model_type", "mistral"), ("hidden_act", "gelu"), ("partial_rotary_factor", 0.5),
    ("quantization_config", {"bits": 4})])
def test_a_config_that_is_not_plain_llama_is_refused_by_name(key, value, tmp_path):
    """Such a model would load and compute something else; better not at all."""
    change_config(tmp_path, drop=["rope_parameters"], **{key: value})
    with pytest.raises(InputError, match=key.replace("_", "[_ ]")):
        load_llama(tmp_path)


def test_folders_that_hold_no_model_are_refused_by_name(tmp_path):
    """One line that says what was expected where, for each of the ways in which a folder can be the
    wrong one; other people's formats are refused with the tool that converts them."""
    for folder, file, says in [
            ("empty", None, r"expected config\.json and model\.safetensors"),
            ("meta", "params.json", r"From Meta's params\.json and \*\.pth tools/convert\.py"),
            ("sizes", "config.json", r"vocab_size is None, expected a whole number"),
            ("adapter", "adapter_config.json", r"is an adapter.* tools/convert\.py merge")]:
        (tmp_path / folder).mkdir()
        if file:
            (tmp_path / folder / file).write_text("{}")
        with pytest.raises(InputError, match=f"{folder}.*{says}"):
            load_llama(tmp_path / folder)
    with pytest.raises(InputError, match="nowhere"):
        load_llama(tmp_path / "nowhere")
    (write_model("mha", tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no model\.safetensors: tools/convert\.py"):
        load_llama(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_weight_file_is_refused_by_name(share, tmp_path):
    """What an interrupted download leaves, or a shard that was never there: the file is named."""
    file = write_model("mha", tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:int(file.stat().st_size * share)])
    with pytest.raises(InputError, match=r"model\.safetensors is no safetensors file"):
        load_llama(tmp_path)
    file.unlink()
    second = write_shards(tmp_path)[1]
    (tmp_path / second).unlink()
    with pytest.raises(FileNotFoundError, match=second):
        load_llama(tmp_path)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13476835328\n"


def test_a_git_lfs_pointer_in_place_of_weights_is_called_what_it_is(tmp_path):
    """`git clone` without git-lfs leaves three lines of text where the weights should be: no
    truncated download, and loading them again would not help."""
    (write_model("mha", tmp_path) / "model.safetensors").write_text(LFS)
    with pytest.raises(InputError, match=r"model\.safetensors is a Git LFS pointer.*git lfs pull"):
        load_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / write_shards(tmp_path)[0]).write_text(LFS)
    with pytest.raises(InputError, match=r"00001-of-00002\.safetensors is a Git LFS pointer"):
        load_llama(tmp_path)


# ------------------------------------------------------------------------- files: one atomic writer

def test_a_file_is_whole_or_not_there(tmp_path):
    """Whatever happens while it is written, under its name stands the old content or the new one,
    and no temporary file stays behind."""
    file = tmp_path / "a.json"
    with whole_file(file) as temporary:
        assert temporary != file and not file.exists()
        temporary.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(file) as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]
    with whole_file(file) as temporary:
        temporary.write_text("new")
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_a_folder_that_is_not_there_is_named_when_writing(tmp_path):
    with pytest.raises(InputError, match=f"cannot write {tmp_path}/no/a.json: .*No such file"):
        module.write_json(tmp_path / "no" / "a.json", {})


def on_a_full_disk(save):
    """Save where there is no room, say what was wrong, and save again where there is."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
    try:
        save()
    except InputError as e:
        print(e, flush=True)
    print(os.listdir(), flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    save()


def save_checkpoint(content, path):
    with module.whole_file(path) as temporary:
        torch.save(content, temporary)


@pytest.mark.parametrize("write", [
    lambda x, path: module.write_json(path, x.tolist()),
    lambda x, path: module.save_weights({"numbers": x}, path),
    lambda x, path: save_checkpoint(x, path)], ids=["write_json", "save_weights", "torch.save"])
def test_a_full_disk_is_one_line_with_the_path_and_the_earlier_file_stands(write, tmp_path,
                                                                           monkeypatch):
    """400 KB where 64 KB have room (the system's limit of a file's size stands in for the disk's).
    Three libraries fail in three ways, none of them an OSError of Python's in each case: what the
    user sees is one line with the path. The checkpoint before it is the run, so it stands, nothing
    half-written takes up room, and with room again the same call succeeds."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoint").write_bytes(b"the earlier one")
    monkeypatch.chdir(folder)

    def save():
        assert (folder / "checkpoint").read_bytes() == b"the earlier one"
        write(torch.zeros(100_000), folder / "checkpoint")

    assert ended(fork(on_a_full_disk, save, log=tmp_path / "log")) == 0
    said, listed = (tmp_path / "log").read_text().splitlines()
    assert said.startswith(f"cannot write {folder / 'checkpoint'}: ")
    assert listed == "['checkpoint']" and os.listdir(folder) == ["checkpoint"]
    assert (folder / "checkpoint").stat().st_size > 400_000


@pytest.mark.parametrize("content, kind, says", [
    ("[1]", dict, "holds a list, expected a dict"), ('{"a": 1}', list, "a dict, expected a list"),
    ('{"a":\n1,}', dict, "broken JSON.* at line 2"), ("", dict, "broken JSON.* at line 1"),
    ('{"a": 1}\n{"a": 2}\n', list, "broken JSON, Extra data at line 2")])
def test_json_that_is_broken_or_something_else_is_named(content, kind, says, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=rf"a\.json.*{says}"):
        read_json(tmp_path / "a.json", kind)


def test_text_may_begin_with_a_byte_order_mark_and_must_be_utf_8(tmp_path):
    """Windows writes the mark; another encoding would be other letters, in silence."""
    (tmp_path / "a.json").write_bytes('\ufeff{"ä": 1}'.encode())
    assert read_json(tmp_path / "a.json") == {"ä": 1}
    (tmp_path / "a.json").write_bytes('{"ä": 1}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.json is not UTF-8 text \(byte 2\)"):
        read_json(tmp_path / "a.json")


# ----------------------------------------------------------------- causality, padding, the KV cache

@pytest.mark.parametrize("case", ["mha", "gqa"])
def test_a_token_never_changes_logits_before_it(case, tmp_path):
    """Log-probs of a response must not depend on what comes later: bit-equal before position t,
    different from t on."""
    model, tokens = golden_model(case, tmp_path), golden(case)["tokens"]
    with torch.no_grad():
        before = model(tokens)
        for t in (1, 13, 31):
            changed = tokens.clone()
            changed[:, t] = (changed[:, t] + 1) % 128
            after = model(changed)
            assert torch.equal(after[:, :t], before[:, :t])
            assert (after[:, t:] != before[:, t:]).any(-1).all()


@pytest.mark.parametrize("case", ["mha", "gqa"])
def test_right_padding_and_batch_mates_change_nothing(case, tmp_path):
    """Rows of 1, 5, 18 and 32 ids in one batch: neither the ids in the padding nor the other rows
    change a bit of a row's logits, and they are those that the row has alone, 1e-5 (matrices of
    another size are summed in another order)."""
    def padded(rows, fill):
        return torch.stack([F.pad(row, (0, 32 - len(row)), value=fill) for row in rows])

    model, ids = golden_model(case, tmp_path), golden(case)["tokens"][0]
    rows = [ids[32 - n:] for n in (1, 5, 18, 32)]
    others = [(rows[0] + 50) % 128, rows[1], (rows[2] + 9) % 128, rows[3]]
    with torch.no_grad():
        logits = model(padded(rows, 0))
        other_padding = model(padded(rows, 127))
        other_mates = model(padded(others, 2))
        for i, row in enumerate(rows):
            n = len(row)
            assert torch.equal(other_padding[i, :n], logits[i, :n])
            assert i % 2 == 0 or torch.equal(other_mates[i, :n], logits[i, :n])
            assert largest(logits[i, :n] - model(row[None])[0]) <= 1e-5


@pytest.fixture(params=["CPU", "GPU"])
def slots(request, monkeypatch):
    """Read as many slots of the cache as a CPU does, and, on the CPU too, as many as a GPU: a
    multiple of 64 of them, most of which no row has filled yet."""
    def as_on_a_gpu(cache, slots):
        cache.seen = min(math.ceil(slots / 64) * 64, cache.slots)

    if request.param == "GPU":
        monkeypatch.setattr(KVCache, "make_visible", as_on_a_gpu)


@pytest.mark.parametrize("case", CASES)
def test_cached_decoding_equals_the_full_forward_at_every_position(case, slots, tmp_path):
    """24 rows of 1 to 17 prompt ids and up to 90 sampled ones, some of which end early and leave
    the batch.

    Every step's log-probability of the drawn id (a function of all logits of that step) equals the
    one of a full forward of that row alone, 1e-5; so a key written at the wrong place, a slot too
    few or too many, or a mate's key would show.
    """
    model = golden_model(case, tmp_path)
    prompts = [[1] + [(7 * i + 3 * j) % 120 + 4 for j in range(i % 17)] for i in range(24)]
    drawn = sample_responses(model, prompts, 90, eos_id=2, banned_ids=(), seed=5)
    assert len({len(r) for r in drawn.responses}) >= 8
    for prompt, response, logprobs in zip(prompts, *drawn, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response]))[0, len(prompt) - 1:-1]     # (R, V)
        full = F.log_softmax(logits, -1)[range(len(response)), response]
        assert largest(full - torch.tensor(logprobs)) <= 1e-5


def test_a_decoding_step_sees_each_rows_own_slots():
    """Rows of 3 and 18 tokens, and the new one of each, which attends to itself: 4 and 19 slots,
    at positions 3 and 18. The mask has the dtype of keys and values."""
    cache = KVCache(2, 40, "cpu")
    cache.k.append(torch.zeros(2, 1, 40, 4, dtype=torch.bfloat16))
    cache.v.append(torch.zeros(2, 1, 40, 4, dtype=torch.bfloat16))
    cache.lengths = torch.tensor([3, 18])
    cache.make_visible(19)
    cache.expect_next()
    assert cache.positions.tolist() == [[3], [18]]
    assert cache.mask.shape == (2, 1, 1, 19) and cache.mask.min() == -torch.inf
    visible = (cache.mask[:, 0, 0] == 0).tolist()
    assert visible == [[True] * 4 + [False] * 15, [True] * 19]
    assert cache.mask.dtype == torch.bfloat16


def test_the_first_prompts_make_room_for_every_row():
    """Prompts that come for one of three rows are stored in its slots, at their positions; all
    other places are 0."""
    cache, x = KVCache(3, 40, "cpu"), torch.randn(1, 2, 5, 4)
    cache.expect_prompts(torch.tensor([2]), 5)
    cache.attend(0, x, x, 2 * x)
    for kept, new in ((cache.k[0], x), (cache.v[0], 2 * x)):
        assert kept.shape == (3, 2, 40, 4) and torch.equal(kept[2:, :, :5], new)
        assert kept.count_nonzero() == new.numel()


@pytest.mark.parametrize("case", ["mha", "gqa"])
def test_greedy_ids_are_those_of_full_forwards(case, slots, tmp_path):
    """The oracle has no cache at all: append the argmax, run everything again."""
    model = golden_model(case, tmp_path)
    prompts = [[1], [1, 9, 8, 7, 6, 5, 4, 3], [1, 50, 60], [1, 2, 3, 2, 1]]
    responses = generate(model, prompts, 40, temperature=0, eos_id=2, banned_ids=())
    for prompt, response in zip(prompts, responses):
        ids = list(prompt)
        for _ in range(40):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
            if ids[-1] == 2:
                break
        assert ids[len(prompt):] == response


def test_activation_checkpointing_changes_no_gradient(tmp_path):
    """It only computes twice what it does not keep: full fine-tuning's gradients agree to 1e-6, and
    all are there."""
    model, tokens = golden_model("gqa", tmp_path), golden("gqa")["tokens"]
    grads = []
    for on in (False, True):
        model.checkpoint_activations = on
        model.zero_grad()
        model(tokens).log_softmax(-1)[..., 5].mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in grads[1].items():
        assert grad.abs().max() > 0 and largest(grads[0][name] - grad) <= 1e-6, name


# -------------------------------------------------------------------------------- chunked log-probs

def kl(logits, ref_logits):
    logp, logq = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)


@pytest.mark.parametrize("per_chunk", [1, 7, 50, 1000])
def test_chunked_logprobs_equal_unchunked_ones(per_chunk):
    """50 states, 7 logit rows at a time: log-probs, entropy, reference, divergence and gradients as
    from one piece, 1e-6.

    The oracle has the banned ids (0, 1, 77) cut out of its vocabulary, which is what a ban means:
    the sampler never draws them, so the policy that is scored and trained must not know them
    either.
    """
    torch.manual_seed(0)
    head, ref_head = torch.nn.Linear(64, 128, bias=False), torch.nn.Linear(64, 128, bias=False)
    states, ref_states = torch.randn(50, 64, requires_grad=True), torch.randn(50, 64)
    banned = ban_mask(128, (0, 1, 77))
    allowed = (~banned).nonzero()[:, 0]
    index, weights = torch.randint(0, 125, (50,)), torch.randn(50)

    logits = (states @ head.weight.T)[:, allowed]
    ref_logits = (ref_states @ ref_head.weight.T)[:, allowed].detach()
    logprobs, divergence = logits.log_softmax(-1)[range(50), index], kl(logits, ref_logits)
    ref_logprobs = ref_logits.log_softmax(-1)[range(50), index]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    loss = (weights * (logprobs + 0.3 * divergence)).mean()
    expected_grads = torch.autograd.grad(loss, (states, head.weight))

    def chunked():
        return response_logprobs(head, states, allowed[index], banned, (ref_head, ref_states), kl,
                                 max_logits=128 * per_chunk)

    got = chunked()
    loss = (weights * (got.logprobs + 0.3 * got.divergence)).mean()
    grads = torch.autograd.grad(loss, (states, head.weight))
    with torch.no_grad():
        assert largest(chunked().entropy - entropy) <= 2e-6
        assert torch.equal(chunked().logprobs, got.logprobs)
    # log-probs are around -5: the spacing of float32 there is 4.8e-7
    assert largest(got.logprobs - logprobs) <= 2e-6
    assert largest(got.ref_logprobs - ref_logprobs) <= 2e-6
    assert largest(got.divergence - divergence) <= 2e-6
    for g, e in zip(grads, expected_grads, strict=True):
        assert largest(g - e) <= 1e-6
    assert got.entropy is None and not got.ref_logprobs.requires_grad


@pytest.mark.parametrize("per_chunk", [1, 7, 50, 1000])
def test_the_gradient_of_a_frozen_head_is_found_on_the_way(per_chunk):
    """Under LoRA the head does not train: d log p[target] / dh = W[target] - sum p_v W_v, found in
    the forward pass, 1e-6. The oracle is autograd's gradient with the banned ids cut out."""
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 128, bias=False).requires_grad_(False)
    states = torch.randn(50, 64, requires_grad=True)
    banned = ban_mask(128, (0, 1, 77))
    allowed = (~banned).nonzero()[:, 0]
    index, weights = torch.randint(0, 125, (50,)), torch.randn(50)
    expected = (states @ head.weight.T)[:, allowed].log_softmax(-1)[range(50), index]
    got = response_logprobs(head, states, allowed[index], banned,
                            max_logits=128 * per_chunk).logprobs
    assert largest(got - expected) <= 2e-6
    gradients = [torch.autograd.grad((weights * x).mean(), states)[0] for x in (got, expected)]
    assert largest(gradients[0] - gradients[1]) <= 1e-6
    assert largest(gradients[1]) > 1e-3


@pytest.mark.parametrize("trains", [True, False])
def test_chunked_logprobs_keep_no_logits_for_the_backward_pass(trains):
    """The reason to chunk: 300 states x 32,000 logits x 4 bytes would be kept per sequence. 256
    states of width 8 and 512 logits each, 16 at a time: all that is kept together is smaller than a
    quarter of the logits."""
    head = torch.nn.Linear(8, 512, bias=False).requires_grad_(trains)
    states, targets, kept = torch.randn(256, 8, requires_grad=True), torch.zeros(256).long(), []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs = response_logprobs(head, states, targets, max_logits=512 * 16).logprobs
    assert logprobs.requires_grad and sum(kept) < 256 * 512 / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logprob_of_what_is_almost_impossible_is_a_number(dtype):
    """A target of probability exp(-60), whose float32 softmax is far below its neighbour's
    rounding, and one of probability 1: finite values, gradients of (onehot - p) W."""
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 128, bias=False).requires_grad_(False).to(dtype)
    states = (180 * head.weight[[5, 7]]).detach().requires_grad_()
    logprobs = response_logprobs(head, states, torch.tensor([9, 7])).logprobs
    assert logprobs[0] < -40 and logprobs[1] > -1e-3
    grads = torch.autograd.grad(logprobs.sum(), states)[0].float()
    probs = (states.detach() @ head.weight.T).float().softmax(-1)
    onehot = F.one_hot(torch.tensor([9, 7]), 128)
    # bfloat16: the gradient itself is rounded to 8 bits
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert largest(grads - (onehot - probs) @ head.weight.float()) <= tolerance


@pytest.mark.parametrize("banned_ids", [(0, 1), (), (0, 1, *range(100, 128))])
def test_logprobs_at_sampling_equal_the_recomputed_ones(banned_ids, tmp_path):
    """PPO's first ratio is 1 only if the update knows the same ban as the sampler: 12 rows of up to
    40 ids, 1e-4 (two orders of summation), although the banned ids hold much of the probability."""
    model = golden_model("gqa", tmp_path)
    prompts = [[1, 5 + i, 60 - i][:1 + i % 3] for i in range(12)]
    drawn = sample_responses(model, prompts, 40, seed=3, banned_ids=banned_ids)
    for prompt, response, logprobs in zip(prompts, *drawn, strict=True):
        tokens = torch.tensor([prompt + response])
        with torch.no_grad():
            states = model.hidden(tokens)[0, len(prompt) - 1:-1]                         # (R, D)
            again = response_logprobs(model.output, states, tokens[0, len(prompt):],
                                      ban_mask(128, banned_ids)).logprobs
        assert largest(again - torch.tensor(logprobs)) <= 1e-4


# ------------------------------------------------------------------------------------------ sampler

def model_that_says(probs):
    """A Llama whose next-token distribution is `probs`, whatever it reads: its layers add nothing,
    its state is (1, 1)."""
    V = len(probs)
    model = Llama(LlamaConfig(vocab_size=V, dim=2, n_layers=1, n_heads=1, n_kv_heads=1, ffn_dim=2,
                              norm_eps=1e-12, rope_theta=10000.0, max_seq_len=512,
                              tie_embeddings=False))
    with torch.no_grad():
        model.tok_embeddings.weight.fill_(1.0)
        model.layers[0].attention.wo.weight.zero_()
        model.layers[0].feed_forward.w2.weight.zero_()
        model.output.weight.copy_(torch.stack([torch.tensor(probs).log(), torch.zeros(V)], dim=1))
    return model


def chi_square_p(counts, probs):
    """p-value of observed counts under probs: the upper tail of chi-square with len - 1 degrees of
    freedom."""
    expected = torch.tensor(probs, dtype=torch.float64) * sum(counts)
    assert expected.min() >= 5
    statistic = ((torch.tensor(counts, dtype=torch.float64) - expected) ** 2 / expected).sum()
    half = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(half, statistic / 2).item()


def normalised(weights):
    return [w / sum(weights) for w in weights]


def first_tokens(responses, n):
    """How often each of n ids is the first of a response."""
    return torch.bincount(torch.tensor(responses)[:, 0], minlength=n).tolist()


PROBS = normalised([0.9, 0.7, 8, 5, 13, 1, 3, 0.4, 21, 2, 0.3, 34, 1.5, 0.8, 0.4, 6])     # 16 ids


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_frequencies_fit_the_softmax(temperature):
    """20,000 first tokens over 14 allowed ids: softmax(logits / temperature) with the banned ids
    left out, p > .001."""
    out = generate(model_that_says(PROBS), [[3]] * 20_000, 1, temperature=temperature, seed=1)
    counts = first_tokens(out, 16)
    assert counts[:2] == [0, 0]                                       # the default ban: 0 and 1
    expected = normalised([p ** (1 / temperature) for p in PROBS[2:]])
    assert chi_square_p(counts[2:], expected) > 0.001


def test_later_tokens_fit_the_softmax_too_and_do_not_repeat_the_first():
    """Each token has a uniform of its own: positions 1 and 2 of 20,000 rows are independent, p >
    .001 over 25 pairs."""
    probs = normalised([4, 3, 2, 1, 2])
    out = generate(model_that_says(probs), [[3]] * 20_000, 2, eos_id=-1, banned_ids=())
    first, second = torch.tensor(out).T
    pairs = torch.bincount(first * 5 + second, minlength=25).tolist()
    assert chi_square_p(pairs, [p * q for p, q in itertools.product(probs, probs)]) > 0.001


def smallest_set(probs, top_p):
    """By enumeration of all subsets: the fewest ids whose mass reaches top_p, the heaviest such
    set."""
    def mass(ids):
        return sum(probs[i] for i in ids)

    for size in range(1, len(probs) + 1):
        best = max(itertools.combinations(range(len(probs)), size), key=mass)
        if mass(best) >= top_p:
            return sorted(best)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.62, 0.9, 0.999])
def test_top_p_draws_from_exactly_the_nucleus(top_p):
    """Nothing outside the smallest set whose mass reaches top_p; inside, the softmax renormalised
    (u is scaled by the mass that is left), p > .001."""
    probs = normalised([3, 20, 1, 14, 7, 11, 2, 42])
    nucleus = smallest_set(probs, top_p)
    out = generate(model_that_says(probs), [[3]] * 10_000, 1, top_p=top_p, eos_id=-1, banned_ids=())
    counts = first_tokens(out, 8)
    assert [i for i, n in enumerate(counts) if n] == nucleus
    expected = normalised([probs[i] for i in nucleus])
    assert len(nucleus) == 1 or chi_square_p([counts[i] for i in nucleus], expected) > 0.001


def test_a_token_is_the_first_whose_cumulative_probability_exceeds_the_uniform():
    """By hand, probabilities (0, .25, 0, .25, .5): the ends 0 and 1 - 2^-24 draw no id of
    probability 0 and none beyond. The log-probabilities are those of what was drawn."""
    logits = torch.tensor([-1e30, math.log(0.25), -1e30, math.log(0.25), math.log(0.5)])
    u = torch.tensor([0.0, 0.2, 0.26, 0.49, 0.51, 0.99, 1 - 2 ** -24])
    ids, logprobs = sample(logits.expand(7, 5), u)
    assert ids.tolist() == [1, 1, 3, 3, 4, 4, 4]
    assert logprobs.exp().tolist() == pytest.approx([0.25] * 4 + [0.5] * 3, abs=1e-6)


def test_a_logprob_is_at_the_temperature_of_the_draw_before_the_nucleus():
    """By hand, probabilities (.2, .3, .5): at temperature 1/2 they are squares over their sum, .04,
    .09 and .25 over .38. A nucleus of .6 leaves the last id alone, whose log-probability is still
    log(.25 / .38), not 0. A greedy draw has no probability: 0."""
    logits, u = torch.tensor([[0.2, 0.3, 0.5]]).log(), torch.tensor([0.2])
    ids, logprobs = sample(logits, u, temperature=0.5)
    assert ids.tolist() == [1] and logprobs.item() == pytest.approx(math.log(0.09 / 0.38), abs=1e-6)
    ids, logprobs = sample(logits, u, temperature=0.5, top_p=0.6)
    assert ids.tolist() == [2] and logprobs.item() == pytest.approx(math.log(0.25 / 0.38), abs=1e-6)
    ids, logprobs = sample(logits, u, temperature=0)
    assert ids.tolist() == [2] and logprobs.item() == 0


class Parallel(torch.Tensor):
    """A tensor that says it lies on a GPU and adds up as one does, in blocks, here of four: in each
    block the running sums have been rounded in another order, here one unit further up."""
    is_cuda = property(lambda self: True)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        if func == torch.Tensor.cumsum:
            second_block = torch.arange(out.shape[-1]) >= 4
            out = torch.where(second_block, out.nextafter(2 * out), out)
        return out


def test_a_gpus_sums_do_not_draw_ids_of_probability_zero():
    """Between two likely ids lie banned ones, of probability 0. Summed in float32, block by block,
    their cumulative probabilities differ by a sliver, which is as wide as the spacing of the
    uniforms: one draw in some million would be a banned id. Sums in float64 leave no sliver that a
    uniform could hit. 2,001 neighbouring uniforms around the place, 1/3."""
    logits = torch.tensor([math.log(1 / 3)] + [module.BANNED] * 6 + [math.log(2 / 3)])
    u = 1 / 3 + torch.arange(-1000, 1001) * 2.0 ** -25
    on_a_cpu, _ = sample(logits.expand(2001, 8), u)
    on_a_gpu, _ = sample(logits.expand(2001, 8).as_subclass(Parallel), u)
    for ids in (on_a_cpu, on_a_gpu):
        assert set(ids.tolist()) == {0, 7}


def test_banned_ids_are_never_drawn():
    """UNK 0, BOS 1 and PAD 3 hold 99 % of the probability and still do not occur in 100,000 draws,
    top-p or not."""
    probs = normalised([33, 33, 0.001, 33] + [0.05] * 20)
    for top_p in (1.0, 0.95):
        out = generate(model_that_says(probs), [[1]] * 400, 300, top_p=top_p, seed=3,
                       banned_ids=(0, 1, 3))
        drawn = list(itertools.chain(*out))
        assert len(drawn) >= 100_000 and not {0, 1, 3} & set(drawn)


def test_a_banned_id_is_not_drawn_greedily_either():
    """Temperature 0 takes the best of what is allowed."""
    model = model_that_says(normalised([9, 8, 1, 2, 5]))
    assert generate(model, [[3]], 3, temperature=0) == [[4, 4, 4]]


def test_a_response_ends_with_its_first_eos():
    """EOS (20 %) is the last id where it occurs and occurs once; without it, a row has exactly
    max_new_tokens ids.

    Lengths are then geometric: 20 of them, 4,000 rows, p > .001.
    """
    out = generate(model_that_says(normalised([1, 1, 2, 6])), [[3]] * 4_000, 20, eos_id=2,
                   banned_ids=())
    ended = [row for row in out if row[-1] == 2]
    for row in out:
        assert row.count(2) == (row[-1] == 2) and (row[-1] == 2 or len(row) == 20)
    counts = [sum(len(row) == n for row in ended) for n in range(1, 21)] + [4_000 - len(ended)]
    expected = [0.8 ** (n - 1) * 0.2 for n in range(1, 21)] + [0.8 ** 20]
    assert chi_square_p(counts, expected) > 0.001


def test_the_same_seed_draws_the_same_and_another_seed_does_not(tmp_path):
    """A run can be repeated, and two seeds are two samples."""
    model, prompts = golden_model("gqa", tmp_path), [[1, 5], [1], [1, 6, 7, 8]]
    first = generate(model, prompts, 30, seed=11)
    torch.manual_seed(99)                                   # the global generator has no say
    assert generate(model, prompts, 30, seed=11) == first
    assert generate(model, prompts, 30, seed=12) != first
    rows = generate(model, [[1, 5]] * 8, 30, seed=11)
    assert len(set(map(tuple, rows))) == 8                  # rows differ among themselves


def test_prompts_may_be_tensors(tmp_path):
    """Rows of one length are often at hand as a tensor, or as numpy's."""
    model, rows = golden_model("mha", tmp_path), [[1, 5, 9], [1, 7, 3]]
    expected = generate(model, rows, 8, seed=2)
    for prompts in (torch.tensor(rows), list(torch.tensor(rows)), torch.tensor(rows).numpy()):
        assert generate(model, prompts, 8, seed=2) == expected


def test_what_a_row_samples_does_not_depend_on_its_batch_mates(tmp_path):
    """Rollouts must not depend on how a batch is cut: row i alone, among others, in threes or on
    another process.

    32 rows of up to 100 ids, half of which end early and leave the batch.
    """
    model = golden_model("mha", tmp_path)
    prompts = [[1] + [(5 * i + j) % 120 + 4 for j in range(i * 7 % 23)] for i in range(32)]
    whole = generate(model, prompts, 100, seed=4)
    assert 5 < sum(row[-1] == 2 for row in whole) < 30
    others = [p if i % 4 == 1 else [1, 90 - i] for i, p in enumerate(prompts)]
    assert generate(model, others, 100, seed=4)[1::4] == whole[1::4]
    assert generate(model, prompts[:5], 100, seed=4) == whole[:5]
    assert generate(model, prompts[7:8], 100, seed=4, row_ids=[7]) == whole[7:8]
    assert generate(model, prompts, 100, seed=4, batch_size=3) == whole
    for rank in (0, 1):
        share = generate(model, prompts[rank::2], 100, seed=4, row_ids=range(rank, 32, 2))
        assert share == whole[rank::2]
    assert generate(model, prompts, 100, seed=4, row_ids=torch.arange(32)) == whole


def test_what_cannot_be_generated_is_refused_in_one_line(tmp_path):
    """Too long for the model's positions, an empty prompt, no new token, a top_p or temperature out
    of range."""
    model = golden_model("mha", tmp_path)
    for prompts, limits, options, says in [
            ([[1] * 100], 29, {}, "100 tokens and 29 new ones.*at most 128"),
            ([[1], []], 29, {}, "prompt 1: got 0 tokens"), ([[1]], 0, {}, "1 tokens and 0 new"),
            ([[1], [1, 2]], [126, 127], {}, "2 tokens and 127 new"),
            ([[1]], 29, {"top_p": 0}, "top_p 0"),
            ([[1]], 29, {"temperature": -1}, "temperature -1"),
            ([[1]], 29, {"temperature": math.nan}, "temperature nan")]:
        with pytest.raises(InputError, match=says):
            generate(model, prompts, limits, **options)
    assert len(generate(model, [[1] * 100], 28, eos_id=-1)[0]) == 28
    assert sample_responses(model, [], 28) == ([], [])


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_model_that_computes_no_numbers_is_reported(temperature, tmp_path):
    """NaN has no cumulative sum to search: without a look, every row would say the last id."""
    model = golden_model("mha", tmp_path)
    with torch.no_grad():
        model.layers[1].attention.wo.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="hidden states of the sampling model"):
        generate(model, [[1, 5]], 4, temperature=temperature)


# ----------------------------------------------------------------------------- a batch that refills

def test_a_row_ends_at_its_own_limit_whatever_its_batch_mates_do(tmp_path):
    """A prompt near the end of the positions gets a short answer; the others the full one, the same
    as alone."""
    model, prompts = golden_model("mha", tmp_path), [[1, 5, 9], [1, 7], [1, 30, 31, 32]]
    ask = partial(generate, model, prompts, eos_id=-1, seed=3, banned_ids=())
    whole = ask(20)
    limited = ask([20, 3, 99])
    assert [len(r) for r in limited] == [20, 3, 99]
    assert limited[:2] == [whole[0], whole[1][:3]] and limited[2][:20] == whole[2]
    assert [len(r) for r in ask([5, 126, 5])] == [5, 126, 5]


def test_rows_that_end_make_room_for_the_next_prompts(tmp_path):
    """24 prompts of 1 to 9 ids decoded 5 at a time, each with a limit of its own from 1 to 40: ids
    and log-probabilities are those of all prompts at once, although hardly two rows ever had the
    same batch mates."""
    model, generator = golden_model("gqa", tmp_path), torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 128, (1 + i % 9,), generator=generator).tolist() for i in range(24)]
    limits = [1 + (17 * i) % 40 for i in range(24)]
    ask = partial(sample_responses, model, prompts, limits, eos_id=2, seed=5, banned_ids=())
    whole, few = ask(), ask(batch_size=5)
    assert whole.responses == few.responses and {len(r) for r in few.responses} > {1, 18, 35}
    for ours, theirs in zip(whole.logprobs, few.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_batch_that_refills_keeps_its_one_cache_and_reads_no_more_than_it_holds(
        tmp_path, monkeypatch):
    """All 8 places are free at once, three times: the next prompts are written where the last ones
    were. A cache of their own beside it would double the most that sampling takes; and their
    answers begin again with 4 tokens to attend to."""
    caches, read, attend = [], [], module.attend

    class Kept(KVCache):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(self)

    def watched(q, k, *more):
        read.append((q.shape[2], k.shape[2]))
        return attend(q, k, *more)

    monkeypatch.setattr(module, "KVCache", Kept)
    monkeypatch.setattr(module, "attend", watched)
    model = golden_model("gqa", tmp_path)
    generate(model, [[1, 5, 6]] * 24, 8, eos_id=-1, banned_ids=(), batch_size=8)
    layers = model.config.n_layers
    assert len(caches) == 1 and [tuple(k.shape) for k in caches[0].k] == [(8, 2, 11, 16)] * layers
    assert read[::layers] == [(3, 3), *((1, n) for n in range(4, 12))] * 3


def test_what_a_recording_works_on_stays_where_it_is(tmp_path, monkeypatch):
    """A replayed recording reads and writes the very memory that it was made on: as long as a
    decoding step has the same shapes - through refilled places, too - every tensor that it finds
    must lie where it lay."""
    found, refilled, begin = {}, [], Decoder.begin

    def tensors(decoder):
        """Where all lies that a decoding step reaches."""
        cache = decoder.cache
        return [t.data_ptr() for t in (decoder.state, decoder.last, decoder.done, cache.lengths,
                                       *cache.k, *cache.v)]

    class Watched:
        def __init__(self, step, device):
            self.step = step

        def __call__(self, *shapes):
            places = tensors(self.step.__self__)
            assert found.setdefault(shapes, places) == places
            self.step()

    def counted(decoder, rows):
        refilled.append(len(rows))
        begin(decoder, rows)

    monkeypatch.setattr(module, "Recorded", Watched)
    monkeypatch.setattr(Decoder, "begin", counted)
    limits = [1 + (17 * i) % 40 for i in range(24)]
    generate(golden_model("gqa", tmp_path), [[1, 5, 6]] * 24, limits, batch_size=8)
    assert len(refilled) > 4 and {rows for rows, _ in found} > {8, 2}


def test_ended_rows_cost_nothing_for_long(tmp_path, monkeypatch):
    """64 answers of 4 to 64 tokens in turn (a quarter of the sum of 64 times the longest) with 8
    places: at most 8 tokens of a row's place are wasted, when it ends just after the look around,
    and the last rows, which end alone."""
    model, rows, hidden = golden_model("mha", tmp_path), [], Llama.hidden

    def counted(self, tokens, *more):
        rows.append(len(tokens))
        return hidden(self, tokens, *more)

    monkeypatch.setattr(Llama, "hidden", counted)
    limits = [4, 8, 4, 32, 4, 8, 4, 64] * 8
    generate(model, [[1]] * 64, limits, eos_id=-1, banned_ids=(), batch_size=8)
    assert sum(rows) < 1.5 * sum(limits) < 0.4 * 64 * 64


def test_numbers_that_go_wrong_in_the_last_tokens_are_reported_too(tmp_path, monkeypatch):
    """The decoder looks every 8 steps; a NaN that comes after its last look but one must not leave
    as text: an id drawn from NaN is the last of the vocabulary, whatever that means. 6 new tokens,
    NaN from the third on."""
    model, plain, calls = golden_model("mha", tmp_path), Llama.hidden, []

    def hidden(self, tokens, cache=None):
        calls.append(tokens)
        return plain(self, tokens, cache) * (math.nan if len(calls) > 2 else 1.0)

    monkeypatch.setattr(Llama, "hidden", hidden)
    with pytest.raises(FloatingPointError, match="hidden states of the sampling model"):
        generate(model, [[1, 5]], 6, eos_id=-1)
