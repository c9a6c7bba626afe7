"""The model against transformers, against Meta's own formulation and against itself; the sampler against the softmax.

The models are tiny (2 layers, width 64, 4 heads, vocabulary 128, float32). golden/make_golden.py says where the
expected logits come from and how the weights are made.
"""
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from golden.make_golden import CASES, GREEDY_PROMPTS, GREEDY_STEPS, SIZES, formula_weights, weight_shapes, write_model
from lora import adapter, add_lora, lora_parameters
from model import (Gate, KVCache, Linear, Llama, LlamaConfig, RMSNorm, generate, load_llama, packed_weights, response_logprobs,
                   rope_angles, rotate, sample, save_llama)

GOLDEN = Path(__file__).resolve().parent / "golden"
REAL = Path(__file__).resolve().parents[1].parent / "shared" / "real"


def golden_model(case, folder, **kwargs):
    return load_llama(write_model(case, folder), **kwargs)


def golden(case):
    return load_file(GOLDEN / case / "expected.safetensors")


@pytest.fixture(params=["CPU", "GPU"])
def layout(request, monkeypatch):
    """Decode with the cache of a CPU, whose keys are columns, and on the CPU with the one of a GPU, too."""
    real = KVCache.__init__

    def init(cache, *args):
        real(cache, *args)
        cache.columns = request.param == "CPU"

    monkeypatch.setattr(KVCache, "__init__", init)


def largest(difference):
    return difference.abs().max().item()


# ------------------------------------------------------------------------------------- against other implementations

@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    """Same weights, same ids, same logits: attention, grouped heads, tied output, rotary base, norms are all LLaMA's."""
    expected = golden(case)
    with torch.no_grad():
        logits = golden_model(case, tmp_path)(expected["tokens"])
    assert logits.shape == (2, 32, 128) and logits.dtype == torch.float32
    assert largest(logits - expected["logits"]) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_greedy_decoding_equals_transformers(case, tmp_path):
    """Five prompts of 1 to 11 ids decoded in one ragged batch give what transformers gives each of them alone."""
    out = generate(golden_model(case, tmp_path), GREEDY_PROMPTS, GREEDY_STEPS, temperature=0, eos_id=2, banned_ids=())
    for row, expected in zip(out, golden(case)["greedy"].tolist(), strict=True):
        assert row == (expected[:expected.index(2) + 1] if 2 in expected else expected)


def interleaved(weight, head_dim):
    """Hugging Face's row order of wq or wk -> Meta's: 0, d/2, 1, d/2 + 1, .. within each head."""
    rows = [head + i + j * (head_dim // 2) for head in range(0, len(weight), head_dim)
            for i in range(head_dim // 2) for j in (0, 1)]
    return weight[rows]


def meta_weights(case):
    """The formula's weights under Meta's names and in Meta's order."""
    names = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers",
             "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
             "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
             "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    weights = {}
    for name, values in formula_weights(SIZES | CASES[case]).items():
        for theirs, metas in names.items():
            name = name.replace(theirs, metas)
        values = torch.from_numpy(values)
        weights[name] = interleaved(values, 16) if ".wq." in name or ".wk." in name else values
    return weights


def write_meta(case, folder, shards=1):
    """params.json and consolidated.*.pth, split over `shards` files as Meta's model parallelism splits them."""
    params = {"dim": 64, "multiple_of": 16, "n_heads": 4, "n_kv_heads": CASES[case]["num_key_value_heads"], "n_layers": 2,
              "norm_eps": CASES[case]["rms_norm_eps"], "rope_theta": CASES[case]["rope_theta"], "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params))
    for rank in range(shards):
        shard = {"rope.freqs": 10000.0 ** (-torch.arange(0, 16, 2) / 16)}
        for name, w in meta_weights(case).items():
            by_column = name.split(".")[-2] in ("wo", "w2", "tok_embeddings")
            shard[name] = w if w.dim() == 1 else w.chunk(shards, dim=1 if by_column else 0)[rank].clone()
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    return folder


def meta_forward(w, tokens, kv_heads, eps, theta):
    """LLaMA as Meta publishes it, rotary pairs as complex numbers; one sequence. tokens (T,) -> logits (T, V)."""
    norm = lambda x, name: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w[f"{name}.weight"]
    T = len(tokens)
    angles = torch.outer(torch.arange(T), theta ** (-torch.arange(0, 16, 2) / 16))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]                       # (T, 1, 8)
    rope = lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(T, -1, 8, 2)) * turn).reshape(T, -1, 16)
    x = w["tok_embeddings.weight"][tokens]
    for i in range(2):
        linear = lambda x, name: x @ w[f"layers.{i}.{name}.weight"].T
        h = norm(x, f"layers.{i}.attention_norm")
        q, k, v = (linear(h, f"attention.{n}").view(T, -1, 16) for n in ("wq", "wk", "wv"))
        k, v = (y.repeat_interleave(4 // kv_heads, dim=1) for y in (rope(k), v))
        scores = torch.einsum("thd,shd->hts", rope(q), k) / 4
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        x = x + linear(torch.einsum("hts,shd->thd", scores, v).reshape(T, 64), "attention.wo")
        h = norm(x, f"layers.{i}.ffn_norm")
        x = x + linear(F.silu(linear(h, "feed_forward.w1")) * linear(h, "feed_forward.w3"), "feed_forward.w2")
    return norm(x, "norm") @ w["output.weight"].T


@pytest.mark.parametrize("case", ["mha", "gqa", "theta"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_meta_folder_gives_the_logits_of_metas_formula_and_of_the_hugging_face_folder(case, shards, tmp_path):
    """Meta interleaves rotary pairs, Hugging Face splits them in halves: read wrongly, a model still talks, but worse.

    max abs 1e-5 against Meta's complex arithmetic and against transformers' logits of the same model.
    """
    expected = golden(case)
    with torch.no_grad():
        logits = load_llama(write_meta(case, tmp_path, shards))(expected["tokens"])
        sizes = CASES[case]["num_key_value_heads"], CASES[case]["rms_norm_eps"], CASES[case]["rope_theta"]
        by_meta = torch.stack([meta_forward(meta_weights(case), row, *sizes) for row in expected["tokens"]])
    assert largest(logits - by_meta) <= 1e-5
    assert largest(logits - expected["logits"]) <= 1e-5


def test_a_trained_model_tells_the_story_that_llama2_c_tells():
    """Greedy from BOS, 200 ids, letter by letter the text in llama2.c's own test of stories260K."""
    if not (REAL / "stories260K").is_dir():
        pytest.skip("../shared/real/stories260K is not here")
    import sentencepiece
    story = ('Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw '
             'a big, red ball. She wanted to play with it, but it was too high.\nLily\'s mom said, "Lily, let\'s go to the '
             'park." Lily was sad and didn\'t know what to do. She said, "I want to play with your ball, but I can\'t find '
             'it."\nLily was sad and didn\'t know what to do. She said, "I\'m sorry, Lily. I didn\'t know what to do."\n'
             'Lily didn\'t want to help her mom, so she')
    model = load_llama(REAL / "stories260K")
    assert sum(p.numel() for p in model.parameters()) == 260_032
    ids = generate(model, [[1]], 200, temperature=0)[0]
    assert sentencepiece.SentencePieceProcessor(str(REAL / "stories260K" / "tokenizer.model")).decode(ids) == story


def test_llama_7b_has_6738415616_parameters():
    """The number in the paper's title row; untied, so the output matrix counts apart from the embeddings."""
    with torch.device("meta"):
        model = Llama(LlamaConfig(vocab_size=32000, dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, ffn_dim=11008,
                                  norm_eps=1e-6, rope_theta=10000.0, max_seq_len=2048, tie_embeddings=False))
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616


# --------------------------------------------------------------------------------------------------- checkpoint files

@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_are_bit_equal(case, dtype, tmp_path):
    """A checkpoint is the model: every weight, and with them every logit, comes back bit for bit, under HF's names."""
    model = golden_model(case, tmp_path, dtype=dtype)
    save_llama(model, tmp_path / "copy")
    again = load_llama(tmp_path / "copy", dtype=dtype)
    assert again.config == model.config
    for (name, p), (other, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and q.dtype == dtype and torch.equal(p, q)
    tokens = golden(case)["tokens"]
    with torch.no_grad():
        assert torch.equal(model(tokens), again(tokens))
    saved = load_file(tmp_path / "copy" / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in saved.items()} == weight_shapes(SIZES | CASES[case])


def test_a_tied_head_stays_tied_after_loading(tmp_path):
    """One matrix, not two equal ones: a training step on the embeddings must move the output too."""
    model = golden_model("tied", tmp_path)
    assert model.output.weight is model.tok_embeddings.weight
    untied = golden_model("mha", tmp_path)
    assert untied.output.weight is not untied.tok_embeddings.weight


def write_shards(folder):
    """The gqa case as two files and the index that names them."""
    tensors = {name: torch.from_numpy(w) for name, w in formula_weights(SIZES | CASES["gqa"]).items()}
    names = sorted(tensors)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for file, part in zip(files, (names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: files[i % 2] for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text((GOLDEN / "gqa" / "config.json").read_text())
    return files


def test_a_sharded_checkpoint_loads(tmp_path):
    """7B weights come in several files with an index; together they are the one-file model."""
    write_shards(tmp_path)
    with torch.no_grad():
        logits = load_llama(tmp_path)(golden("gqa")["tokens"])
    assert largest(logits - golden("gqa")["logits"]) <= 1e-5


def test_a_config_as_older_releases_wrote_it_is_read_the_same(tmp_path):
    """LLaMA-7B's config.json has no num_key_value_heads, no head_dim, and rope_theta, if at all, at the top."""
    config = json.loads((write_model("theta", tmp_path) / "config.json").read_text())
    del config["rope_parameters"], config["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 500000.0, "rope_scaling": None}))
    with torch.no_grad():
        assert largest(load_llama(tmp_path)(golden("theta")["tokens"]) - golden("theta")["logits"]) <= 1e-5
    config = json.loads((write_model("mha", tmp_path) / "config.json").read_text())
    del config["rope_parameters"], config["head_dim"], config["num_key_value_heads"], config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        assert largest(load_llama(tmp_path)(golden("mha")["tokens"]) - golden("mha")["logits"]) <= 1e-5


def rewrite(folder, change):
    """Apply `change` to the tensors of the mha case."""
    tensors = load_file(write_model("mha", folder) / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


Q1 = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop(Q1), r"missing.*layers\.1\.(self_attn\.q_proj|attention\.wq)"),
    (lambda t: t.pop("lm_head.weight"), r"missing.*(lm_head|output)"),
    (lambda t: t.update({"model.layers.2.self_attn.q_proj.weight": t[Q1].clone()}), r"layers\.2\..*(q_proj|wq)"),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}), r"layers\.0\..*(q_proj|wq)\.bias"),
    (lambda t: t.update({Q1: torch.zeros(64, 32)}), r"layers\.1\..*(q_proj|wq).*\(64, 32\).*\(64, 64\)"),
    (lambda t: t.update({Q1: torch.zeros(1, 64)}), r"layers\.1\..*(q_proj|wq).*\(1, 64\).*\(64, 64\)"),
], ids=["missing", "no-head", "extra", "bias", "shape", "broadcastable-shape"])
def test_a_tensor_that_does_not_fit_is_refused_by_name(change, says, tmp_path):
    """Half a model must not load quietly: the message names the tensor, and both shapes where they differ."""
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=says):
        load_llama(tmp_path)


def test_folders_that_hold_no_model_are_refused_by_name(tmp_path):
    """One line that says what was expected where, for each of the ways in which a folder can be the wrong one."""
    with pytest.raises(FileNotFoundError, match=r"config\.json.*params\.json"):
        load_llama(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_llama(tmp_path / "nowhere")
    second = write_shards(tmp_path)[1]
    (tmp_path / second).unlink()
    with pytest.raises(FileNotFoundError, match=second):
        load_llama(tmp_path)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "params.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"consolidated"):
        load_llama(tmp_path / "meta")


def test_a_truncated_weight_file_is_refused_by_name(tmp_path):
    """What an interrupted download leaves: a ValueError that names the file, not a traceback from a library."""
    file = write_model("mha", tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_llama(tmp_path)


@pytest.mark.parametrize("key, value", [("rope_scaling", {"rope_type": "llama3", "factor": 8.0}), ("attention_bias", True),
                                        ("model_type", "mistral"), ("hidden_act", "gelu")])
def test_a_config_that_is_not_plain_llama_is_refused_by_name(key, value, tmp_path):
    """Such a model would load and compute something else; better not at all."""
    config = json.loads((write_model("mha", tmp_path) / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=key):
        load_llama(tmp_path)


# ---------------------------------------------------------------------------------------- causality, padding, caching

@pytest.mark.parametrize("case", ["mha", "gqa"])
def test_a_token_never_changes_logits_before_it(case, tmp_path):
    """Log-probs of a response must not depend on what comes later: bit-equal before position t, different from t on."""
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
    """Rows of 1, 5, 18 and 32 ids in one batch: neither the ids in the padding nor the other rows change a bit of a row's
    logits, and they are those that the row has alone, 1e-5 (matrices of another size are summed in another order)."""
    model, ids = golden_model(case, tmp_path), golden(case)["tokens"][0]
    rows = [ids[32 - n:] for n in (1, 5, 18, 32)]
    padded = lambda rows, fill: torch.stack([torch.cat([row, torch.full((32 - len(row),), fill)]) for row in rows])
    with torch.no_grad():
        logits = model(padded(rows, 0))
        other_padding = model(padded(rows, 127))
        other_mates = model(padded([(rows[0] + 50) % 128, rows[1], (rows[2] + 9) % 128, rows[3]], 2))
        for i, row in enumerate(rows):
            n = len(row)
            assert torch.equal(other_padding[i, :n], logits[i, :n])
            assert i % 2 == 0 or torch.equal(other_mates[i, :n], logits[i, :n])
            assert largest(logits[i, :n] - model(row[None])[0]) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_cached_decoding_equals_the_full_forward_at_every_position(case, layout, tmp_path):
    """24 rows of 1 to 17 prompt ids and up to 90 sampled ones, some of which end early and leave the batch.

    Every step's log-probability of the drawn id (a function of all logits of that step) equals the one of a full forward
    of that row alone, 1e-5; so a key written at the wrong place, or a mate's key, would show.
    """
    model = golden_model(case, tmp_path)
    prompts = [[1] + [(7 * i + 3 * j) % 120 + 4 for j in range(i % 17)] for i in range(24)]
    responses, logprobs = generate(model, prompts, 90, eos_id=2, banned_ids=(), seed=5, return_logprobs=True)
    assert len({len(r) for r in responses}) >= 8
    for prompt, response, logps in zip(prompts, responses, logprobs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response]))[0, len(prompt) - 1:-1]          # (R, V)
        full = F.log_softmax(logits, -1)[range(len(response)), response]
        assert largest(full - torch.tensor(logps)) <= 1e-5


def test_attention_by_rows_is_attention():
    """3 rows, 6 query heads over 2 heads of keys, 20 slots of which rows hold 1, 7 and 12, against the formula in float64
    written out; what lies in slots that a row does not hold (1e4) and in its mates' has no part in it."""
    from model import attend_by_rows
    B, H, K, slots, d, seen, lengths = 3, 6, 2, 20, 8, 12, (1, 7, 12)
    q, k, v = (torch.randn(B, n, t, d, generator=torch.Generator().manual_seed(n + t)) for n, t in ((H, 1), (K, slots), (K, slots + 1)))
    v, mask = v[:, :, :slots].contiguous(), torch.zeros(B, 1, 1, seen)
    expected = torch.zeros(B, H, d, dtype=torch.float64)
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:], mask[b, ..., n:] = 1e4, 1e4, -torch.inf
        for h in range(H):
            scores = k[b, h // 3, :n].double() @ q[b, h, 0].double() / 8 ** 0.5
            expected[b, h] = (scores.exp() / scores.exp().sum()) @ v[b, h // 3, :n].double()
    heads = torch.tensor([[b * K + h // 3] for b in range(B) for h in range(H)])
    out = attend_by_rows(q, k.mT.contiguous(), v, mask, heads * d + torch.arange(d), heads * slots + torch.arange(seen))
    assert out.shape == (B, H, 1, d) and largest(out[:, :, 0] - expected) <= 1e-6


def test_keys_in_columns_are_read_no_wider_than_needed(tmp_path, monkeypatch):
    """All columns that there are get read at each step; so a row of 3 tokens that may once have 127 has 64 at first."""
    import model as module
    widths, by_rows = [], module.attend_by_rows
    monkeypatch.setattr(module, "attend_by_rows", lambda q, k, *more: widths.append(k.shape[3]) or by_rows(q, k, *more))
    model = golden_model("gqa", tmp_path)
    generate(model, [[1, 5, 6]], 124, eos_id=-1, banned_ids=())
    assert widths[::model.config.n_layers] == [64] * 61 + [127] * 62


def test_a_decoding_step_sees_each_rows_own_slots():
    """Rows of 3 and 18 tokens, and the new one of each. The mask's rows begin at multiples of 16 numbers: torch copies any
    other for a GPU's kernel, once in each layer."""
    cache = KVCache(2, 40)
    cache.k.append(torch.zeros(2, 1, 40, 4))
    cache.lengths = torch.tensor([3, 18])
    cache.reads(18)
    assert cache.begin(torch.zeros(1, 1), 2).tolist() == [[3], [18]]
    assert cache.mask.shape == (2, 1, 1, 19) and all(step % 16 == 0 for step in cache.mask.stride()[:-1])
    assert (cache.mask[:, 0, 0] == 0).tolist() == [[True] * 4 + [False] * 15, [True] * 19] and cache.mask.min() == -torch.inf


@pytest.mark.parametrize("case", ["mha", "gqa"])
def test_greedy_ids_are_those_of_full_forwards(case, layout, tmp_path):
    """The oracle has no cache at all: append the argmax, run everything again."""
    model = golden_model(case, tmp_path)
    prompts = [[1], [1, 9, 8, 7, 6, 5, 4, 3], [1, 50, 60], [1, 2, 3, 2, 1]]
    for prompt, response in zip(prompts, generate(model, prompts, 40, temperature=0, eos_id=2, banned_ids=())):
        ids = list(prompt)
        for _ in range(40):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
            if ids[-1] == 2:
                break
        assert ids[len(prompt):] == response


def gradients(out, grad, *inputs):
    return torch.autograd.grad(out, inputs, grad)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])   # (8 and 2.5 roundings)
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_the_norms_gradient_is_that_of_its_formula_in_float64(dtype, tolerance, eps):
    """Rows of very different size, so that eps counts for some and not for others."""
    torch.manual_seed(0)
    norm = RMSNorm(64, eps).to(dtype)
    x = (torch.randn(3, 5, 64) * torch.tensor([0.3, 1.0, 30.0])[:, None, None]).to(dtype).requires_grad_()
    with torch.no_grad():
        norm.weight.normal_()
    out = norm(x)
    grad = torch.randn(out.shape).to(dtype)
    x64, w64 = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    plain = x64 / torch.sqrt((x64 ** 2).sum(-1, keepdim=True) / 64 + eps) * w64
    assert out.dtype == dtype and largest(out - plain) <= tolerance * largest(plain)
    for ours, expected in zip(gradients(out, grad, x, norm.weight), gradients(plain, grad.double(), x64, w64)):
        assert ours.dtype == dtype
        assert ((ours - expected).norm(dim=-1) <= tolerance * expected.norm(dim=-1)).all()


def test_the_rotations_gradient_is_that_of_complex_multiplication():
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, 16, dtype=torch.float64).requires_grad_()
    cos, sin = (a.double()[:, :, None] for a in rope_angles(torch.arange(7)[None] * 5, 16, 10000.0))
    out, grad = rotate(x, cos, sin), torch.randn(2, 7, 3, 16, dtype=torch.float64)
    i = torch.arange(8, dtype=torch.float64)
    turn = torch.exp(1j * 5 * torch.arange(7)[:, None, None] * 10000.0 ** (-i / 8))
    turned = torch.complex(x[..., :8], x[..., 8:]) * turn
    plain = torch.cat((turned.real, turned.imag), dim=-1)
    assert largest(out - plain) <= 1e-5                                    # (angles are float32)
    assert largest(gradients(out, grad, x)[0] - gradients(plain, grad, x)[0]) <= 1e-5


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_the_gates_value_and_gradients_are_those_of_its_formula_and_it_keeps_two_tensors(dtype, tolerance):
    """a / (1 + exp(-a)) b written out in float64, from -30 to 30: where exp saturates, too."""
    torch.manual_seed(0)
    a = torch.cat([torch.linspace(-30, 30, 301), torch.randn(99)]).to(dtype).requires_grad_()
    b, grad, kept = torch.randn(400).to(dtype).requires_grad_(), torch.randn(400).to(dtype), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        out = Gate.apply(a, b)
    assert sorted(kept) == sorted([a.data_ptr(), b.data_ptr()])
    a64, b64 = (x.detach().double().requires_grad_() for x in (a, b))
    plain = a64 / (1 + torch.exp(-a64)) * b64
    for ours, expected in zip((out, *gradients(out, grad, a, b)), (plain, *gradients(plain, grad.double(), a64, b64))):
        assert ours.dtype == dtype and largest(ours - expected) <= tolerance * largest(expected)


def test_activation_checkpointing_changes_no_gradient(tmp_path):
    """It only computes twice what it does not keep: full fine-tuning's gradients agree to 1e-6, and all are there."""
    model, tokens = golden_model("gqa", tmp_path), golden("gqa")["tokens"]
    grads = []
    for on in (False, True):
        model.checkpoint_activations = on
        model.zero_grad()
        model(tokens).log_softmax(-1)[..., 5].mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(largest(grads[0][name] - g) <= 1e-6 and g.abs().max() > 0 for name, g in grads[1].items())


@pytest.mark.parametrize("checkpoints", (False, True))
def test_states_that_are_read_are_those_of_the_whole_forward_and_so_are_their_gradients(checkpoints, tmp_path):
    """Places in any order, one of them twice: transformers' logits there, and the gradients of a loss on all states that
    weighs the others with 0. The last layer is never larger than what is read."""
    model, expected = golden_model("gqa", tmp_path), golden("gqa")
    model.checkpoint_activations = checkpoints
    tokens, read, weight = expected["tokens"], torch.tensor([33, 0, 63, 5, 33]), torch.randn(5, 64)
    widths = []
    model.layers[-1].feed_forward.register_forward_hook(lambda module, inputs, output: widths.append(len(inputs[0])))
    states = model.hidden(tokens, read=read)
    assert states.shape == (5, 64) and largest(model.output(states) - expected["logits"].flatten(0, 1)[read]) <= 1e-5
    names, params = zip(*[(name, p) for name, p in model.named_parameters() if not name.startswith("output.")])
    got = torch.autograd.grad((states * weight).sum(), params)
    assert set(widths) == {5}
    whole = torch.autograd.grad((model.hidden(tokens).flatten(0, 1)[read] * weight).sum(), params)
    for name, grad, all_states in zip(names, got, whole):
        assert largest(all_states) > 0 and largest(grad - all_states) <= 1e-5 * largest(all_states), name


# ---------------------------------------------------------------------------------------------------- packed weights

can_pack = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN, so nothing is packed")


def copies_of(model):
    return [m.copies for m in model.modules() if isinstance(m, Linear)]


@can_pack
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows", [1, 3, 64, 700])
def test_packed_products_and_their_gradient_are_the_plain_ones(rows, dtype, tolerance):
    """Against float64, with and without a graph, on a view that is not contiguous."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16 for oneDNN")
    torch.manual_seed(0)
    layer = Linear(48, 80).requires_grad_(False).to(dtype)
    x, grad = torch.randn(48, rows, 2).to(dtype).permute(1, 2, 0).requires_grad_(), torch.randn(rows, 2, 80).to(dtype)
    w64 = layer.weight.double()
    with packed_weights(layer):
        out = layer(x)
        dx, = torch.autograd.grad(out, x, grad)
        with torch.no_grad():
            same = layer(x)
        assert set(layer.copies) == {False, True}
    assert out.shape == (rows, 2, 80) and out.dtype == dx.dtype == dtype and torch.equal(out, same)
    assert largest(out.double() - x.double() @ w64.T) <= tolerance * largest(x.double() @ w64.T)
    assert largest(dx.double() - grad.double() @ w64) <= tolerance * largest(grad.double() @ w64)


@can_pack
def test_a_whole_model_with_adapters_is_the_same_packed(tmp_path):
    """Log-probabilities of the frozen head, gradients of every adapter, with activation checkpoints and without: 1e-5."""
    model, tokens = golden_model("gqa", tmp_path), golden("gqa")["tokens"]
    add_lora(model, "policy", r=4, alpha=8)
    for p in lora_parameters(model, "policy"):
        torch.nn.init.normal_(p, std=0.1)
    results = []
    for packed, checkpoints in ((False, False), (True, False), (True, True)):
        model.checkpoint_activations = checkpoints
        model.zero_grad()
        with packed_weights(*[model] * packed), adapter(model, "policy"):
            logprobs = response_logprobs(model.output, model.hidden(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())[0]
            logprobs.mean().backward()
            assert all(c is None for c in copies_of(model)) is not packed
        results.append([logprobs.detach(), *[p.grad.clone() for p in lora_parameters(model, "policy")]])
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert largest(expected) > 0 and largest(got - expected) <= 1e-5


@can_pack
def test_packed_copies_are_of_frozen_weights_and_gone_afterwards():
    """A copy of weights that train would be stale after the first step, and one that outlives its use holds memory."""
    torch.manual_seed(0)
    frozen, training = Linear(8, 8).requires_grad_(False), Linear(8, 8)
    x, two = torch.randn(4, 8), torch.nn.ModuleList((frozen, training))
    with packed_weights(two):
        with packed_weights(two):                              # the inner one finds all done, and undoes nothing
            pass
        assert frozen.copies == {} and training.copies is None
        out = frozen(training(x))
        out.sum().backward()
        with torch.no_grad():
            training.weight.mul_(2)
        assert torch.allclose(frozen(training(x)), 2 * out, atol=1e-6) and training.weight.grad.abs().sum() > 0
    with pytest.raises(KeyboardInterrupt), packed_weights(two, frozen_only=False):
        assert copies_of(two) == [{}, {}]
        training.weight.grad = None
        training(x).sum().backward()                           # .. and no gradient is lost, whatever was asked for
        assert training.weight.grad.abs().sum() > 0
        raise KeyboardInterrupt
    assert copies_of(two) == [None, None]


@can_pack
def test_generation_packs_for_itself_and_sees_weights_that_changed(tmp_path):
    model = golden_model("gqa", tmp_path)
    calls = []
    model.output.register_forward_hook(lambda layer, *_: calls.append(layer.copies))
    before = generate(model, [[1, 5, 9]], 8, temperature=0)
    with torch.no_grad():
        model.output.weight.neg_()
    after = generate(model, [[1, 5, 9]], 8, temperature=0)
    assert all(c is not None and set(c) == {False} for c in calls)
    assert before != after and copies_of(model)[-1] is None


@can_pack
def test_autocast_goes_before_packing():
    """Autocast lowers the precision of torch's own products; a packed float32 product would not notice it."""
    layer, x = Linear(16, 16).requires_grad_(False), torch.randn(4, 16, requires_grad=True)
    with packed_weights(layer), torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        out.sum().backward()
        assert out.dtype == torch.bfloat16 and layer.copies == {} and x.grad is not None


@can_pack
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_processor_without_oneDNNs_bf16_computes_without_packing_it(dtype):
    """oneDNN told to be as it is on AVX2: float32 is packed there, bfloat16 is not; both work, and the estimate knows."""
    code = ("import torch, train; from model import Linear, LlamaConfig, packed_weights; "
            f"layer = Linear(16, 16).to({dtype}); x = torch.ones(2, 16, dtype={dtype})\n"
            "with packed_weights(layer, frozen_only=False): layer(x); print(layer.copies is None)\n"
            "cfg = train.parse(['--model=x', '--stage=ppo'])\n"
            f"memory = next(train.layouts(cfg, 'ppo', LlamaConfig(), {dtype}, 8, 'cpu'))[2]\n"
            "print(memory['packed copies of them'])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1],
                         env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert out.returncode == 0, out.stderr
    unpacked, copies = out.stdout.split()
    # by hand, of one trunk's matrices: 32 layers of 4 D^2 + 3 D F, and the head's D V; 4 bytes each, W and W'
    matrices = 32 * (4 * 4096 ** 2 + 3 * 4096 * 11008) + 4096 * 32000
    assert (unpacked, int(copies)) == (("True", 0) if dtype == torch.bfloat16 else ("False", matrices * 4 * 2))


# ------------------------------------------------------------------------------------------------- chunked log-probs

def kl(logits, ref_logits):
    logp, logq = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)


@pytest.mark.parametrize("per_chunk", [1, 7, 50, 1000])
def test_chunked_logprobs_equal_unchunked_ones(per_chunk):
    """50 states, 7 logit rows at a time: log-probs, entropy, reference, divergence and gradients as from one piece, 1e-6.

    The oracle has the banned ids (0, 1, 77) cut out of its vocabulary, which is what a ban means.
    """
    torch.manual_seed(0)
    head, ref_head = torch.nn.Linear(64, 128, bias=False), torch.nn.Linear(64, 128, bias=False)
    hidden, ref_hidden = torch.randn(50, 64, requires_grad=True), torch.randn(50, 64)
    banned = torch.zeros(128, dtype=torch.bool)
    banned[[0, 1, 77]] = True
    allowed = (~banned).nonzero()[:, 0]
    index = torch.randint(0, 125, (50,))
    weights = torch.randn(50)

    logits, ref_logits = (hidden @ head.weight.T)[:, allowed], (ref_hidden @ ref_head.weight.T)[:, allowed].detach()
    expected = (logits.log_softmax(-1)[range(50), index], torch.distributions.Categorical(logits=logits).entropy(),
                ref_logits.log_softmax(-1)[range(50), index], kl(logits, ref_logits))
    expected_grads = torch.autograd.grad((weights * (expected[0] + 0.3 * expected[3])).mean(), (hidden, head.weight))

    got = response_logprobs(head, hidden, allowed[index], banned, (ref_head, ref_hidden), kl, max_logits=128 * per_chunk)
    grads = torch.autograd.grad((weights * (got[0] + 0.3 * got[3])).mean(), (hidden, head.weight))
    for g, e in zip(got, expected, strict=True):
        assert largest(g - e) <= 2e-6      # log-probs are around -5: the spacing of float32 there is 4.8e-7
    for g, e in zip(grads, expected_grads, strict=True):
        assert largest(g - e) <= 1e-6
    assert not got[1].requires_grad and not got[2].requires_grad


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("per_chunk", [1, 7, 1000])
def test_a_frozen_heads_gradient_found_on_the_way_is_autograds(per_chunk, dtype, tolerance):
    """(onehot - p) W, made with the logits and kept instead of them: values and gradients as by autograd in float32, also for
    a target of probability exp(-60), whose logit no float32 probability could hold, and for one of probability 1."""
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 128, bias=False).requires_grad_(False).to(dtype)
    hidden, targets, weights = torch.randn(50, 64).to(dtype), torch.randint(2, 128, (50,)), torch.randn(50)
    for i, sure, target in ((0, 5, 9), (1, 7, 7)):
        hidden[i], targets[i] = 180 * head.weight[sure], target
    banned = torch.zeros(128, dtype=torch.bool)
    banned[:2] = True
    grads = []
    for on_the_way in (True, False):
        states = hidden.clone().requires_grad_()
        if on_the_way:
            logprobs, entropy, _, _ = response_logprobs(head, states, targets, banned, max_logits=128 * per_chunk)
            assert entropy is None
        else:
            expected = head(states).float().masked_fill(banned, -1e30).log_softmax(-1)[range(50), targets]
        grads.append(torch.autograd.grad((weights * (logprobs if on_the_way else expected)).sum(), states)[0].float())
    assert expected[0] < -40 and expected[1] > -1e-3
    assert torch.allclose(logprobs, expected, rtol=1e-6, atol=2e-6)
    assert largest(grads[0] - grads[1]) <= tolerance


@pytest.mark.parametrize("trains", [True, False])
def test_chunked_logprobs_keep_no_logits_for_the_backward_pass(trains):
    """The reason to chunk: 300 states x 32,000 logits x 4 bytes would be kept per sequence. 256 states of width 8 and 512
    logits each, 16 at a time: all that is kept together is smaller than a quarter of the logits."""
    head, hidden = torch.nn.Linear(8, 512, bias=False).requires_grad_(trains), torch.randn(256, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        logprobs, _, _, _ = response_logprobs(head, hidden, torch.zeros(256, dtype=torch.long), max_logits=512 * 16)
    assert logprobs.requires_grad and sum(kept) < 256 * 512 / 4


def test_an_adapter_on_the_output_layer_is_refused_where_logprobs_are_taken():
    """Recomputed chunks would run without it. The targets are the user's, so the line says what is and what may be."""
    model = Llama(LlamaConfig(vocab_size=30, dim=16, n_layers=1, n_heads=2, ffn_dim=24))
    add_lora(model, "policy", 2, 4, targets=("output",))
    with pytest.raises(ValueError, match="the output layer is a LoRALinear, expected a plain linear layer"):
        response_logprobs(model.output, torch.randn(3, 16), torch.tensor([1, 2, 3]))


# ------------------------------------------------------------------------------------------------------------ sampler

def model_that_says(probs):
    """A Llama whose next-token distribution is `probs`, whatever it reads: its layers add nothing, its state is (1, 1)."""
    V = len(probs)
    model = Llama(LlamaConfig(vocab_size=V, dim=2, n_layers=1, n_heads=1, n_kv_heads=1, ffn_dim=2, norm_eps=1e-12,
                              rope_theta=10000.0, max_seq_len=512, tie_embeddings=False))
    with torch.no_grad():
        model.tok_embeddings.weight.fill_(1.0)
        model.layers[0].attention.wo.weight.zero_()
        model.layers[0].feed_forward.w2.weight.zero_()
        model.output.weight.copy_(torch.stack([torch.tensor(probs).log(), torch.zeros(V)], dim=1))
    return model


def chi_square_p(counts, probs):
    """p-value of observed counts under probs: the upper tail of chi-square with len - 1 degrees of freedom."""
    expected = torch.tensor(probs, dtype=torch.float64) * sum(counts)
    assert expected.min() >= 5
    statistic = ((torch.tensor(counts, dtype=torch.float64) - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), statistic / 2).item()


def normalised(weights):
    return [w / sum(weights) for w in weights]


PROBS = normalised([0.9, 0.7, 8, 5, 13, 1, 3, 0.4, 21, 2, 0.3, 34, 1.5, 0.8, 0.4, 6])     # 16 ids


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_frequencies_fit_the_softmax(temperature):
    """20,000 first tokens over 14 allowed ids: softmax(logits / temperature) with the banned ids left out, p > .001."""
    out = generate(model_that_says(PROBS), [[3]] * 20_000, 1, temperature=temperature, seed=1)
    counts = torch.bincount(torch.tensor(out)[:, 0], minlength=16).tolist()
    assert counts[:2] == [0, 0]                                                                # the default ban: 0 and 1
    assert chi_square_p(counts[2:], normalised([p ** (1 / temperature) for p in PROBS[2:]])) > 0.001


def test_later_tokens_fit_the_softmax_too_and_do_not_repeat_the_first():
    """Each token has a uniform of its own: positions 1 and 2 of 20,000 rows are independent, p > .001 over 25 pairs."""
    probs = normalised([4, 3, 2, 1, 2])
    out = torch.tensor(generate(model_that_says(probs), [[3]] * 20_000, 2, eos_id=-1, banned_ids=()))
    pairs = torch.bincount(out[:, 0] * 5 + out[:, 1], minlength=25).tolist()
    assert chi_square_p(pairs, [p * q for p in probs for q in probs]) > 0.001


def smallest_set(probs, top_p):
    """By enumeration of all subsets: the fewest ids whose mass reaches top_p, the heaviest such set."""
    for size in range(1, len(probs) + 1):
        best = max(itertools.combinations(range(len(probs)), size), key=lambda ids: sum(probs[i] for i in ids))
        if sum(probs[i] for i in best) >= top_p:
            return sorted(best)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.62, 0.9, 0.999])
def test_top_p_draws_from_exactly_the_nucleus(top_p):
    """Nothing outside the smallest set whose mass reaches top_p; inside, the softmax renormalised, p > .001."""
    probs = normalised([3, 20, 1, 14, 7, 11, 2, 42])
    nucleus = smallest_set(probs, top_p)
    out = generate(model_that_says(probs), [[3]] * 10_000, 1, top_p=top_p, eos_id=-1, banned_ids=())
    counts = torch.bincount(torch.tensor(out)[:, 0], minlength=8).tolist()
    assert [i for i, n in enumerate(counts) if n] == nucleus
    assert len(nucleus) == 1 or chi_square_p([counts[i] for i in nucleus], normalised([probs[i] for i in nucleus])) > 0.001


def test_a_token_is_the_first_whose_cumulative_probability_exceeds_the_uniform():
    """By hand, probabilities (0, .25, 0, .25, .5): the ends 0 and 1 - 2^-24 draw no id of probability 0 and none beyond."""
    logits = torch.tensor([-1e30, 0.0, -1e30, 0.0, 0.0]) + torch.tensor([0, .25, 1, .25, .5]).log().nan_to_num(neginf=0)
    uniforms = torch.tensor([0.0, 0.2, 0.26, 0.49, 0.51, 0.99, 1 - 2 ** -24])
    assert sample(logits.expand(7, 5), uniforms).tolist() == [1, 1, 3, 3, 4, 4, 4]


def test_banned_ids_are_never_drawn():
    """UNK 0, BOS 1 and PAD 3 hold 99 % of the probability and still do not occur in 100,000 draws, top-p or not."""
    probs = normalised([33, 33, 0.001, 33] + [0.05] * 20)
    for top_p in (1.0, 0.95):
        out = generate(model_that_says(probs), [[1]] * 400, 300, top_p=top_p, banned_ids=(0, 1, 3), seed=3)
        drawn = [token for row in out for token in row]
        assert len(drawn) >= 100_000 and not {0, 1, 3} & set(drawn)


def test_a_banned_id_is_not_drawn_greedily_either():
    """Temperature 0 takes the best of what is allowed."""
    assert generate(model_that_says(normalised([9, 8, 1, 2, 5])), [[3]], 3, temperature=0) == [[4, 4, 4]]


def test_a_response_ends_with_its_first_eos():
    """EOS (20 %) is the last id where it occurs and occurs once; without it, a row has exactly max_new_tokens ids.

    Lengths are then geometric: 20 of them, 4,000 rows, p > .001.
    """
    out = generate(model_that_says(normalised([1, 1, 2, 6])), [[3]] * 4_000, 20, eos_id=2, banned_ids=())
    for row in out:
        assert row.count(2) == (1 if row[-1] == 2 else 0) and (row[-1] == 2 or len(row) == 20)
    counts = [sum(len(row) == n and row[-1] == 2 for row in out) for n in range(1, 21)] + [sum(row[-1] != 2 for row in out)]
    assert chi_square_p(counts, [0.8 ** (n - 1) * 0.2 for n in range(1, 21)] + [0.8 ** 20]) > 0.001


def test_the_same_seed_draws_the_same_and_another_seed_does_not(tmp_path):
    """A run can be repeated, and two seeds are two samples."""
    model, prompts = golden_model("gqa", tmp_path), [[1, 5], [1], [1, 6, 7, 8]]
    first = generate(model, prompts, 30, seed=11)
    torch.manual_seed(99)                                   # the global generator has no say
    assert generate(model, prompts, 30, seed=11) == first
    assert generate(model, prompts, 30, seed=12) != first
    assert len(set(map(tuple, generate(model, [[1, 5]] * 8, 30, seed=11)))) == 8      # rows differ among themselves


def test_prompts_may_be_tensors(tmp_path):
    """Rows of one length are often at hand as a tensor, or as numpy's."""
    model, rows = golden_model("mha", tmp_path), [[1, 5, 9], [1, 7, 3]]
    for prompts in (torch.tensor(rows), [torch.tensor(row) for row in rows], torch.tensor(rows).numpy()):
        assert generate(model, prompts, 8, seed=2) == generate(model, rows, 8, seed=2)


def test_what_a_row_samples_does_not_depend_on_its_batch_mates(tmp_path):
    """Rollouts must not depend on how a batch is cut: row i alone, among others, in threes or on another process.

    32 rows of up to 100 ids, half of which end early and leave the batch.
    """
    model = golden_model("mha", tmp_path)
    prompts = [[1] + [(5 * i + j) % 120 + 4 for j in range(i * 7 % 23)] for i in range(32)]
    whole = generate(model, prompts, 100, seed=4)
    assert 5 < sum(row[-1] == 2 for row in whole) < 30
    others = [p if i % 4 == 1 else [1, 90 - i] for i, p in enumerate(prompts)]
    assert generate(model, others, 100, seed=4)[1::4] == whole[1::4]
    assert generate(model, prompts[:5], 100, seed=4) == whole[:5]
    assert generate(model, prompts, 100, seed=4, batch_size=3) == whole
    halves = [generate(model, prompts[r::2], 100, seed=4, row_ids=range(r, 32, 2)) for r in (0, 1)]
    assert [row for pair in zip(*halves) for row in pair] == whole
    assert generate(model, prompts, 100, seed=torch.tensor(4), row_ids=torch.arange(32)) == whole      # 4 is 4, of any type


def test_what_cannot_be_generated_is_refused_in_one_line(tmp_path):
    """Too long for the model's positions, an empty prompt, ids of another tokenizer, a top_p or temperature out of range."""
    model = golden_model("mha", tmp_path)
    for prompts, options, says in [([[1] * 100], {}, "128"), ([[1], []], {}, "empty"), ([[1, 128]], {}, "0..127, got 128"),
                                   ([[1], [3, -1]], {}, "0..127, got -1"), ([[1, 7.5]], {}, "got 7.5"), ([1, 5], {}, "a prompt is 1: expected lists"),
                                   (["Hello"], {}, "a prompt is 'Hello': expected lists"),
                                   ([[1]], {"top_p": 0}, "top_p"), ([[1]], {"temperature": -1}, "temperature"),
                                   ([[1]], {"banned_ids": range(128)}, "all 128 ids are banned"),
                                   ([[1], [1]], {"limits": [3]}, "2 prompts, 1 limits"), ([[1]], {"row_ids": [0, 1]}, "2 row_ids")]:
        with pytest.raises(ValueError, match=says):
            generate(model, prompts, 29, **options)
    assert len(generate(model, [[1] * 100], 28, eos_id=-1)[0]) == 28
    assert generate(model, [], 28) == [] and generate(model, [], 28, return_logprobs=True) == ([], [])


# ------------------------------------------------------------------------------------------------- a batch that refills

def test_rows_that_end_make_room_for_the_next_prompts(tmp_path):
    """24 prompts of 1 to 9 ids decoded 5 at a time, each with a limit of its own from 1 to 40: ids and log-probabilities are
    those of all prompts at once, although hardly two rows ever had the same batch mates."""
    model, generator = golden_model("gqa", tmp_path), torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 128, (1 + i % 9,), generator=generator).tolist() for i in range(24)]
    limits = [1 + (17 * i) % 40 for i in range(24)]
    settings = dict(eos_id=2, seed=5, banned_ids=(), limits=limits, return_logprobs=True)
    whole, few = generate(model, prompts, 40, **settings), generate(model, prompts, 40, batch_size=5, **settings)
    assert whole[0] == few[0] and {len(r) for r in whole[0]} > {1, 18, 35}
    assert all(a == pytest.approx(b, abs=1e-5) for a, b in zip(whole[1], few[1], strict=True))


def test_a_batch_that_refills_keeps_its_one_cache_and_reads_no_more_than_it_holds(tmp_path, monkeypatch):
    """All 8 places are free at once, three times: the next prompts are written where the last ones were. A cache of their
    own beside it would double the most that sampling takes; and their answers begin again with 4 tokens to attend to."""
    import model as module
    caches, read, attend, by_rows = [], [], module.attend, module.attend_by_rows
    monkeypatch.setattr(module, "KVCache", lambda *args, real=module.KVCache: caches.append(real(*args)) or caches[-1])
    monkeypatch.setattr(module, "attend", lambda q, k, *more: read.append((q.shape[2], k.shape[2])) or attend(q, k, *more))
    monkeypatch.setattr(module, "attend_by_rows", lambda q, k, v, mask, k_rows, v_rows:
                        read.append((q.shape[2], v_rows.shape[1])) or by_rows(q, k, v, mask, k_rows, v_rows))
    model = golden_model("gqa", tmp_path)
    generate(model, [[1, 5, 6]] * 24, 8, eos_id=-1, banned_ids=(), batch_size=8)
    layers = model.config.n_layers
    assert [tuple(k.shape) for cache in caches for k in cache.k] == [(8, 2, 11, 16)] * layers
    assert read[::layers] == [(3, 3), *((1, n) for n in range(4, 11))] * 3


def test_what_a_recording_works_on_stays_where_it_is(tmp_path, monkeypatch):
    """A replayed recording reads and writes the very memory that it was made on: as long as a decoding step has the same
    shapes - through refilled places, too - every tensor that it finds must lie where it lay."""
    import model as module
    found, refilled = {}, []

    def tensors(x):
        """Where all lies that a function reaches."""
        if torch.is_tensor(x):
            return [x.data_ptr()]
        if isinstance(x, KVCache):
            return [t.data_ptr() for t in (*x.k, *x.v, x.lengths)]
        return sum((tensors(cell.cell_contents) for cell in getattr(x, "__closure__", None) or ()), [])

    class Watched:
        def __init__(self, step, device):
            self.step = step

        def __call__(self, *shapes):
            places = tensors(self.step)
            assert len(places) > 6 and found.setdefault(shapes, places) == places
            self.step()

    monkeypatch.setattr(module, "Recorded", Watched)
    monkeypatch.setattr(module, "prefill", lambda *args, real=module.prefill: refilled.append(len(args[1])) or real(*args))
    limits = [1 + (17 * i) % 40 for i in range(24)]
    generate(golden_model("gqa", tmp_path), [[1, 5, 6]] * 24, 40, limits=limits, batch_size=8, return_logprobs=True)
    assert len(refilled) > 4 and {rows for rows, _ in found} > {8, 2}


def test_ended_rows_cost_nothing_for_long(tmp_path, monkeypatch):
    """64 answers of 4 to 64 tokens (a quarter of the sum of 64 times the longest) with 8 places: at most 8 tokens of a row's
    place are wasted, when it ends just after the look around, and the last rows, which end alone."""
    model, rows = golden_model("mha", tmp_path), []
    real = Llama.hidden
    monkeypatch.setattr(Llama, "hidden", lambda self, tokens, *more: rows.append(len(tokens)) or real(self, tokens, *more))
    limits = [4] * 32 + [8] * 16 + [32] * 8 + [64] * 8
    generate(model, [[1]] * 64, 64, eos_id=-1, banned_ids=(), batch_size=8, limits=limits)
    assert sum(rows) < 1.5 * sum(limits) < 0.4 * 64 * 64
