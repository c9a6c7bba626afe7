"""Writes the golden files of this folder: what transformers and peft say of tiny LLaMAs.

    pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2 loralib==0.1.2      (numpy 2.4.6, safetensors 0.8.0)
    OMP_NUM_THREADS=1 PYTHONHASHSEED=0 python tests/golden/make_golden.py

The project needs neither transformers nor peft: the tests read the files. The weights are not stored; both sides make
them with `formula_weights`, from additions and multiplications alone, so the same bits come out everywhere.

    <case>/config.json              as transformers writes it
    <case>/expected.safetensors     tokens (2, 32), logits (2, 32, 128), greedy (5, 24)
    <case>/adapter/                 as peft writes it (cases mha and gqa), and in expected.safetensors
                                    adapter_logits (2, 32, 128): the same tokens with the adapter on, unmerged
    alpacafarm.safetensors          rows (5, 20) padded on the left with 0, lengths (5,), scores (5,): what AlpacaFarm's
                                    reward model (backbone: case mha) computes; head_weight (1, 64), head_bias (1,)
    loralib.bin                     policy and value adapters and value head as the paper's code saves them (bfloat16), on
                                    case mha; loralib.safetensors: tokens (2, 32), logits (2, 32, 128), values (2, 32)
"""
import json
import shutil
from pathlib import Path

import numpy as np

SIZES = dict(vocab_size=128, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=128, hidden_act="silu", attention_bias=False, mlp_bias=False)
CASES = {
    "mha": dict(num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=False),
    "gqa": dict(num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False),
    "tied": dict(num_key_value_heads=4, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True),
    "theta": dict(num_key_value_heads=2, rms_norm_eps=1e-4, rope_theta=500000.0, tie_word_embeddings=False),
}
SEED = 20230917
GREEDY_PROMPTS = [[1, 5, 9], [1], [1, 77, 30, 31, 32, 33, 34, 35, 36, 37, 38], [1, 100, 101, 102, 103, 104, 105],
                  [1, 64, 64]]
GREEDY_STEPS = 24
SCALE = 0.25      # uniform on +-0.25: attention is far from uniform, logits have a deviation of about 1


def weight_shapes(config):
    """Hugging Face's names and shapes of a LLaMA. config: SIZES with one of CASES."""
    width, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    for i in range(config["num_hidden_layers"]):
        layer = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
                 "self_attn.o_proj": (width, width), "mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width),
                 "mlp.down_proj": (width, ffn), "input_layernorm": (width,), "post_attention_layernorm": (width,)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def formula_weights(config, seed=SEED):
    """name -> float32 array: one stream of uniforms over the names in sorted order; norm weights lie around 1."""
    stream = np.random.RandomState(seed)
    weights = {}
    for name, shape in sorted(weight_shapes(config).items()):
        uniform = (2 * stream.random_sample(shape) - 1) * SCALE
        weights[name] = (uniform + (len(shape) == 1)).astype(np.float32)
    return weights


def write_model(case, folder):
    """The case as a Hugging Face folder: transformers' config.json and model.safetensors by the formula."""
    from safetensors.numpy import save_file
    shutil.copy(Path(__file__).parent / case / "config.json", folder)
    save_file(formula_weights(SIZES | CASES[case]), Path(folder) / "model.safetensors")
    return folder


def formula_adapter(shapes, seed=SEED + 1):
    """name -> float32 array for the A and B of an adapter, half as large as the weights; B is not zero."""
    stream = np.random.RandomState(seed)
    return {name: ((stream.random_sample(shape) - 0.5) * SCALE).astype(np.float32) for name, shape in sorted(shapes.items())}


def reference_model(config):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    theta = config.pop("rope_theta")
    reference = LlamaForCausalLM(LlamaConfig(**config, rope_parameters={"rope_type": "default", "rope_theta": theta},
                                             bos_token_id=1, eos_token_id=2, dtype="float32")).eval()
    weights = {name: torch.from_numpy(w) for name, w in formula_weights(config).items()}
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"} and bool(missing) == config["tie_word_embeddings"]
    return reference


def greedy(reference):
    """transformers' own greedy decoding of each prompt alone; EOS is an id like any other here."""
    import torch
    rows = []
    for prompt in GREEDY_PROMPTS:
        out = reference.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                 do_sample=False, max_new_tokens=GREEDY_STEPS, eos_token_id=None, pad_token_id=0)
        logits = reference(out).logits[0, len(prompt) - 1:-1]
        best = logits.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-4, "a near tie: rounding could flip it, choose other prompts"
        assert logits.argmax(-1).tolist() == out[0, len(prompt):].tolist()
        rows.append(out[0, len(prompt):])
    return torch.stack(rows)


def adapter_logits(reference, tokens, folder):
    """Write a peft adapter with random A and B; return the logits with it on."""
    import torch
    from peft import LoraConfig, get_peft_model
    config = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
                        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    peft_model = get_peft_model(reference, config).eval()
    with torch.no_grad():
        lora = {name: p for name, p in peft_model.named_parameters() if "lora_" in name}
        for name, values in formula_adapter({name: tuple(p.shape) for name, p in lora.items()}).items():
            lora[name].copy_(torch.from_numpy(values))
        logits = peft_model(tokens).logits
    peft_model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return logits


def make_case(name, folder):
    import torch
    from safetensors.torch import save_file
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    reference = reference_model(SIZES | CASES[name])
    reference.config.save_pretrained(folder)
    tokens = torch.from_numpy(np.random.RandomState(SEED + 2).randint(0, SIZES["vocab_size"], (2, 32)))
    with torch.no_grad():
        expected = {"tokens": tokens, "logits": reference(tokens).logits, "greedy": greedy(reference)}
        if name in ("mha", "gqa"):
            expected["adapter_logits"] = adapter_logits(reference, tokens, folder / "adapter")
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")
    print(name, {k: f"std {v.float().std():.3f}" for k, v in expected.items()}, json.dumps(expected["greedy"].tolist()))


def make_alpacafarm(folder):
    """AlpacaFarm's RewardModel.forward: last hidden state at the last column of rows padded on the left."""
    import torch
    from safetensors.torch import save_file
    reference = reference_model(SIZES | CASES["mha"])
    stream = np.random.RandomState(SEED + 3)
    lengths = torch.tensor([20, 7, 12, 1, 15])
    rows = torch.zeros(5, 20, dtype=torch.int64)
    for i, n in enumerate(lengths):
        rows[i, 20 - n:] = torch.from_numpy(stream.randint(3, SIZES["vocab_size"], int(n)))
    mask = torch.arange(20) >= 20 - lengths[:, None]
    weight, bias = (torch.from_numpy(stream.random_sample(shape).astype(np.float32) - 0.5) for shape in ((1, 64), (1,)))
    with torch.no_grad():
        hidden = reference.model(input_ids=rows, attention_mask=mask.long()).last_hidden_state
        scores = torch.nn.functional.linear(hidden[:, -1], weight, bias)[:, 0]
    save_file({"rows": rows, "lengths": lengths, "scores": scores, "head_weight": weight, "head_bias": bias},
              folder / "alpacafarm.safetensors")
    print("alpacafarm", scores.tolist())


def make_loralib(folder, r=4, alpha=16):
    """Two copies of the reference with loralib's layers; their adapters saved under the names of the paper's code, in
    bfloat16, which do not say alpha."""
    import loralib
    import torch
    from safetensors.torch import save_file
    tokens, state, expected = torch.from_numpy(np.random.RandomState(SEED + 4).randint(3, SIZES["vocab_size"], (2, 32))), {}, {}
    for k, (prefix, part) in enumerate((("", "policy"), ("base_model.", "value"))):
        reference = reference_model(SIZES | CASES["mha"])
        for layer in reference.model.layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                old = getattr(layer.self_attn, name)
                new = loralib.Linear(64, 64, r=r, lora_alpha=alpha, bias=False)
                new.weight = old.weight
                setattr(layer.self_attn, name, new)
        lora = {name: p for name, p in reference.named_parameters() if "lora_" in name}
        with torch.no_grad():
            for name, values in formula_adapter({n: tuple(p.shape) for n, p in lora.items()}, SEED + 5 + k).items():
                lora[name].copy_(torch.from_numpy(values).bfloat16())
            state |= {prefix + name: p.detach().bfloat16().clone() for name, p in lora.items()}
            reference.train()      # loralib's eval() would merge; there is no dropout
            expected["logits" if part == "policy" else "hidden"] = (
                reference(tokens).logits if part == "policy" else reference.model(tokens).last_hidden_state)
    stream = np.random.RandomState(SEED + 7)
    head = [torch.from_numpy((stream.random_sample(n) - 0.5).astype(np.float32)).bfloat16() for n in ((1, 64), (1,))]
    state |= {"value_head": head[0], "value_head_bias": head[1]}
    values = torch.einsum("btd,d->bt", expected.pop("hidden"), head[0].float().squeeze()) + head[1].float()
    torch.save(state, folder / "loralib.bin")
    save_file({"tokens": tokens, "values": values, "logits": expected["logits"].contiguous()}, folder / "loralib.safetensors")
    print("loralib", sorted(state)[:2], len(state), values.std(), expected["logits"].std())


if __name__ == "__main__":
    make_alpacafarm(Path(__file__).parent)
    make_loralib(Path(__file__).parent)
    for case in CASES:
        make_case(case, Path(__file__).parent / case)
