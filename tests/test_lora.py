"""LoRA against peft, against plain algebra, and what must never happen: one adapter touching
another, or the trunk.

The models are tiny (2 layers, width 64, 4 heads, vocabulary 128, float32). golden/make_golden.py
says where the adapter folders and the expected logits come from.
"""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from golden.make_golden import write_model
from lora import (adapter, add_lora, load_lora, lora_layers, lora_parameters, merge_lora,
                  save_lora)
from model import InputError, Llama, LlamaConfig, generate, load_llama, save_llama
from reward import RewardModel, load_reward_model, save_reward_model, score_responses

GOLDEN = Path(__file__).resolve().parent / "golden"
TOKENS = torch.tensor([[1, 17, 40, 99, 3, 64, 64, 8], [1, 5, 4, 3, 120, 77, 2, 30]])


def trunk(folder, case="mha", **kwargs):
    return load_llama(write_model(case, folder), **kwargs)


def randomise(model, name, seed=0):
    """Give an adapter random A and B on +-0.125, half as large as the weights: logits change by
    about 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora_parameters(model, name):
            p.copy_(torch.rand(p.shape, generator=generator) * 0.25 - 0.125)


def logits(model, name=None, tokens=TOKENS):
    with torch.no_grad(), adapter(model, name):
        return model(tokens)


def largest(difference):
    return difference.abs().max().item()


def snapshot(model):
    """Copies of the trunk's weights."""
    return {name: p.clone() for name, p in model.named_parameters() if ".lora_" not in name}


def train(model, name, steps=3, lr=1e-2):
    """A few AdamW steps of one adapter towards saying 7."""
    optimiser = torch.optim.AdamW(lora_parameters(model, name), lr=lr, eps=1e-5, weight_decay=0.0)
    for _ in range(steps):
        optimiser.zero_grad()
        with adapter(model, name):
            loss = -model(TOKENS).float().log_softmax(-1)[..., 7].mean()
        loss.backward()
        optimiser.step()


# --------------------------------------------------------------------------------------- on and off

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_nothing(dtype, tmp_path):
    """B = 0, so the policy starts as the reference and the first KL is exactly 0: bit-equal, on or
    off. It is off until a `with adapter(..)` switches it on."""
    model = trunk(tmp_path, dtype=dtype)
    with torch.no_grad():
        before = model(TOKENS)
    add_lora(model, "policy", r=4, alpha=16)
    assert all(layer.active is None for layer in lora_layers(model).values())
    assert torch.equal(logits(model, "policy"), before)
    assert torch.equal(logits(model, None), before)


def test_training_an_adapter_leaves_the_base_bit_identical(tmp_path):
    """The reference model is the trunk with the adapter off: if a weight moved, KL would be
    measured from elsewhere."""
    model = trunk(tmp_path)
    with torch.no_grad():
        before = model(TOKENS)
    add_lora(model, "policy", r=4, alpha=16)
    weights = snapshot(model)
    train(model, "policy")
    assert largest(logits(model, "policy") - before) > 0.1
    assert torch.equal(logits(model, None), before)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), before)                    # outside of every adapter()
    for name, w in snapshot(model).items():
        assert torch.equal(w, weights[name]), name


def test_adapter_contexts_nest_and_restore_even_after_an_error(tmp_path):
    """Inside a policy's rollout the reference is asked with the adapter off; afterwards the policy
    must be back."""
    model = trunk(tmp_path)
    for seed, name in enumerate(("a", "b")):
        add_lora(model, name, r=4, alpha=16)
        randomise(model, name, seed)
    a, b, base = (logits(model, name) for name in ("a", "b", None))
    assert largest(a - base) > 0.1 and largest(b - base) > 0.1 and largest(a - b) > 0.1
    with torch.no_grad(), adapter(model, "a"):
        assert torch.equal(model(TOKENS), a)
        with adapter(model, None):
            assert torch.equal(model(TOKENS), base)
        with adapter(model, "b"):
            assert torch.equal(model(TOKENS), b)
        with pytest.raises(KeyboardInterrupt), adapter(model, "b"):
            raise KeyboardInterrupt
        assert torch.equal(model(TOKENS), a)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), base)


def test_generation_uses_the_active_adapter(tmp_path):
    """Greedy ids inside adapter("policy") are those of the merged model, and differ from the
    base's."""
    model = trunk(tmp_path, "gqa")
    add_lora(model, "policy", r=4, alpha=16)
    randomise(model, "policy")
    prompts = [[1, 5], [1], [1, 9, 9, 9]]
    base = generate(model, prompts, 12, temperature=0)
    with adapter(model, "policy"):
        adapted = generate(model, prompts, 12, temperature=0)
    merge_lora(model, "policy")
    assert adapted == generate(model, prompts, 12, temperature=0) and adapted != base


def test_the_next_rollout_samples_with_what_training_changed(tmp_path):
    """A rollout after an update has to see the new A and B, and one adapter never gets another's:
    PPO samples from the policy of now, not from that of the first step."""
    model = trunk(tmp_path)
    for name, seed in (("policy", 0), ("value", 1)):
        add_lora(model, name, r=4, alpha=8)
        randomise(model, name, seed)

    def says(name):
        with adapter(model, name):
            return generate(model, [[1, 17, 40], [1, 99]], 12, temperature=0, eos_id=-1)

    policy, value = says("policy"), says("value")
    assert policy != value
    save_lora(model, "value", tmp_path / "value")
    load_lora(model, "policy", tmp_path / "value")
    assert says("policy") == value
    randomise(model, "policy", seed=0)
    assert says("policy") == policy and says("value") == value


def test_dropout_zero_means_zero_and_dropout_spares_the_base(tmp_path):
    """In training mode, 0 gives the same bits twice; 0.5 does not, yet the trunk and evaluation
    mode know nothing of it: what enters the base is never dropped, and with B = 0 nothing
    changes."""
    model = trunk(tmp_path)
    add_lora(model, "new", r=4, alpha=16, dropout=0.5)
    add_lora(model, "steady", r=4, alpha=16, dropout=0.0)
    add_lora(model, "noisy", r=4, alpha=16, dropout=0.5)
    randomise(model, "steady")
    randomise(model, "noisy")
    model.eval()
    expected, base = logits(model, "steady"), logits(model, None)
    assert torch.equal(logits(model, "noisy"), expected)
    model.train()
    assert torch.equal(logits(model, "steady"), expected)
    assert torch.equal(logits(model, None), base) and torch.equal(logits(model, "new"), base)
    assert not torch.equal(logits(model, "noisy"), logits(model, "noisy"))


# ------------------------------------------------------------------------------------------ algebra

def test_an_adapter_adds_alpha_over_r_times_B_A_x(tmp_path):
    """LoRA eq. 3, one layer by hand: W x + 16/4 B A x, with A (4, 64) and B (64, 4)."""
    model = trunk(tmp_path)
    add_lora(model, "policy", r=4, alpha=16, targets=("wk",))
    randomise(model, "policy")
    A, B = lora_parameters(model, "policy")[:2]
    assert A.shape == (4, 64) and B.shape == (64, 4)
    layer = model.layers[0].attention.wk
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base = layer(x)
    with torch.no_grad(), adapter(model, "policy"):
        by_hand = base + 4 * x @ A.T @ B.T
        assert largest(layer(x) - by_hand) <= 1e-5


@pytest.mark.parametrize("r, alpha, times", [(4, 32, 2), (4, 4, 0.25), (8, 16, 0.5), (8, 64, 2)])
def test_the_output_delta_is_linear_in_alpha_over_r(r, alpha, times, tmp_path):
    """Against r 4, alpha 16, with the same product B A (more rank is filled with zeros): times
    (alpha / r) / (16 / 4)."""
    model = trunk(tmp_path)
    add_lora(model, "one", r=4, alpha=16)
    add_lora(model, "other", r=r, alpha=alpha)
    randomise(model, "one")
    pairs = zip(lora_parameters(model, "other"), lora_parameters(model, "one"), strict=True)
    with torch.no_grad():
        for p, q in pairs:
            p.zero_()[:q.shape[0], :q.shape[1]] = q
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    layers = lora_layers(model)
    assert len(layers) == 8
    for layer in layers.values():
        with torch.no_grad():
            base = layer(x)
            with adapter(model, "one"):
                one = layer(x) - base
            with adapter(model, "other"):
                other = layer(x) - base
        assert largest(one) > 0.1 and largest(other - times * one) <= 1e-5


@pytest.mark.parametrize("case", ["mha", "gqa"])
def test_merged_equals_unmerged(case, tmp_path):
    """An exported model is the policy: W + (alpha/r) B A computes what W and the adapter compute,
    1e-5."""
    model = trunk(tmp_path, case)
    every = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
    add_lora(model, "policy", r=4, alpha=16, targets=every)
    randomise(model, "policy")
    unmerged = logits(model, "policy")
    assert largest(unmerged - logits(model, None)) > 0.1
    merge_lora(model, "policy")
    with torch.no_grad():
        assert largest(model(TOKENS) - unmerged) <= 1e-5
    save_llama(model, tmp_path / "merged")       # a plain LLaMA again: it saves, and loads the same
    with torch.no_grad():
        assert torch.equal(load_llama(tmp_path / "merged")(TOKENS), model(TOKENS))


def test_a_merge_into_bfloat16_is_summed_in_float32_and_rounded_once(tmp_path):
    """W + 4 B A of 8 layers in float64, rounded to bfloat16: a product or a sum in bfloat16 would
    be off by a unit in the last place here and there. One entry in a thousand may be, where
    float32's own rounding crosses a tie."""
    model = trunk(tmp_path, dtype=torch.bfloat16)
    add_lora(model, "policy", r=4, alpha=16)
    randomise(model, "policy")
    expected = {}
    for path, layer in lora_layers(model).items():
        A, B = layer.lora_A["policy"].double(), layer.lora_B["policy"].double()
        expected[path] = (layer.base.weight.double() + 4 * B @ A).bfloat16()
    merge_lora(model, "policy")
    off = [model.get_submodule(path).weight != w for path, w in expected.items()]
    assert len(off) == 8 and torch.cat(off).float().mean() <= 1e-3


def test_a_model_with_adapters_is_not_saved_as_if_it_had_none(tmp_path):
    """save_llama would drop the policy in silence; it asks for a merge instead."""
    model = trunk(tmp_path)
    add_lora(model, "policy", r=4, alpha=16)
    with pytest.raises(InputError, match="merge"):
        save_llama(model, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_the_output_is_not_merged_into_tied_embeddings(tied):
    """The one matrix would change the embeddings, too. Untied, merging is what it always is."""
    torch.manual_seed(0)
    config = LlamaConfig(128, 32, 1, 4, ffn_dim=48, max_seq_len=64, tie_embeddings=tied)
    model = Llama(config).eval()
    add_lora(model, "policy", r=4, alpha=16, targets=("wq", "output"))
    randomise(model, "policy")
    expected, weights = logits(model, "policy"), snapshot(model)
    if tied:
        with pytest.raises(InputError, match="weights of output are those of another layer"):
            merge_lora(model, "policy")
        assert torch.equal(logits(model, "policy"), expected)      # .. and nothing was changed
        assert all(torch.equal(p, weights[name]) for name, p in snapshot(model).items())
    else:
        merge_lora(model, "policy")
        assert largest(logits(model) - expected) < 1e-5
        embeddings = weights["tok_embeddings.weight"]
        assert torch.equal(model.tok_embeddings.weight, embeddings)


# ---------------------------------------------------------------------------------------- gradients

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trainable_set_is_exactly_the_adapters_in_float32(dtype, tmp_path):
    """2 layers x 4 matrices x (A and B) x 2 adapters = 32 tensors, float32 also on a bf16 trunk;
    the trunk is frozen."""
    model = trunk(tmp_path, dtype=dtype)
    add_lora(model, "policy", r=4, alpha=16)
    add_lora(model, "value", r=8, alpha=16)
    adapters = lora_parameters(model, "policy") + lora_parameters(model, "value")
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(adapters) == 32 and {id(p) for p in adapters} == {id(p) for p in trainable}
    assert all(p.dtype == torch.float32 for p in adapters)
    n = sum(p.numel() for p in lora_parameters(model, "policy"))
    assert n == 2 * 4 * (4 * 64 + 64 * 4)
    assert all(p.dtype == dtype for p in snapshot(model).values())


def test_llama_7b_trains_8388608_parameters_per_adapter():
    """The paper's 0.25 %: r 8 on four 4096 x 4096 matrices of 32 layers; two adapters and a value
    head make 16,781,313."""
    with torch.device("meta"):
        model = Llama(LlamaConfig(32000, 4096, 32, 32, 32, 11008, 1e-6, 10000.0, 2048, False))
        add_lora(model, "policy", r=8, alpha=64)
        add_lora(model, "value", r=8, alpha=64)
        head = torch.nn.Linear(4096, 1)
    assert sum(p.numel() for p in lora_parameters(model, "policy")) == 8_388_608
    everything = [*model.parameters(), *head.parameters()]
    assert sum(p.numel() for p in everything if p.requires_grad) == 16_781_313


def dense_gradients(case, folder, model, name, scaling, loss):
    """Gradients of A and B by the chain rule, from a plain trunk whose weights are W + scaling
    B A."""
    dense, layers, grads = trunk(folder, case), lora_layers(model, name), []
    with torch.no_grad():
        for path, layer in layers.items():
            delta = scaling * layer.lora_B[name] @ layer.lora_A[name]
            dense.get_submodule(path).weight += delta
    loss(dense).backward()
    for path, layer in layers.items():
        A, B = layer.lora_A[name].detach(), layer.lora_B[name].detach()
        G = dense.get_submodule(path).weight.grad                                  # (out, in)
        grads += [scaling * B.T @ G, scaling * G @ A.T]
    return grads


def policy_loss(model):
    """0.1: gradients of about 0.1, float32 resolves 1e-8."""
    return -0.1 * model(TOKENS).log_softmax(-1)[0, :, 5].mean()


def value_loss(model):
    return 0.1 * model.hidden(TOKENS)[1, :, :10].pow(2).mean()


@pytest.mark.parametrize("case", ["mha", "gqa"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backward_inside", [None, "value", "no context"])
def test_two_adapters_on_one_trunk_get_the_gradients_of_their_own_forward(
        case, checkpointing, backward_inside, tmp_path):
    """PPO's one backward() serves policy and critic, after both contexts have closed; with
    activation checkpointing it runs each block again, and must do so with the adapter of that
    forward, whichever is active by then.

    Oracle: the chain rule on dense weights W + 4 B A, 1e-6; no gradient is missing or zero.
    """
    model = trunk(tmp_path, case)
    for seed, name in enumerate(("policy", "value")):
        add_lora(model, name, r=4, alpha=16)
        randomise(model, name, seed)
    model.checkpoint_activations = checkpointing
    with adapter(model, "policy"):
        loss = policy_loss(model)
    with adapter(model, "value"):
        loss = loss + value_loss(model)
    if backward_inside == "no context":
        loss.backward()
    else:
        with adapter(model, backward_inside):
            loss.backward()
    for name, f in (("policy", policy_loss), ("value", value_loss)):
        expected = dense_gradients(case, tmp_path, model, name, 4.0, f)
        for p, g in zip(lora_parameters(model, name), expected, strict=True):
            assert p.grad is not None and p.grad.abs().max() > 0
            assert largest(p.grad - g) <= 1e-6
    for path, p in model.named_parameters():
        assert ".lora_" in path or p.grad is None, path


def policy_on(folder, **kwargs):
    """A trunk with one random adapter."""
    model = trunk(folder)
    add_lora(model, "policy", r=4, alpha=16, **kwargs)
    randomise(model, "policy")
    return model


def test_after_a_checkpointed_backward_no_adapter_stays_active(tmp_path):
    """The recomputation enters an adapter; if it forgot to leave, the next reference pass would be
    the policy's."""
    model = policy_on(tmp_path)
    base = logits(model, None)
    model.checkpoint_activations = True
    with adapter(model, "policy"):
        loss = policy_loss(model)
    loss.backward()
    with torch.no_grad():
        assert torch.equal(model(TOKENS), base)


def test_gradient_accumulation_with_checkpointing_sums(tmp_path):
    """Several forwards in flight, then their backwards: two micro-batches' gradients add up to
    those of the whole, 1e-6."""
    def row_loss(rows):
        return -model(rows).log_softmax(-1)[..., 5].sum() / TOKENS.numel()

    model = policy_on(tmp_path)
    with adapter(model, "policy"):
        row_loss(TOKENS).backward()
    whole = [p.grad.clone() for p in lora_parameters(model, "policy")]
    model.checkpoint_activations = True
    model.zero_grad()
    with adapter(model, "policy"):
        losses = [row_loss(TOKENS[:1]), row_loss(TOKENS[1:])]
    for loss in losses:
        loss.backward()
    for p, g in zip(lora_parameters(model, "policy"), whole, strict=True):
        assert largest(p.grad - g) <= 1e-6


def test_a_checkpointed_graph_can_be_run_backward_twice(tmp_path):
    """To measure the gradients of policy and value loss apart, one keeps the graph: the second run
    equals the first."""
    model = policy_on(tmp_path)
    model.checkpoint_activations = True
    with adapter(model, "policy"):
        loss = policy_loss(model)
    parameters = lora_parameters(model, "policy")
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(g, h) for g, h in zip(first, second, strict=True))


def test_dropout_masks_are_the_same_in_the_recomputation(tmp_path):
    """With dropout, a recomputed block that drew other masks would give the gradient of another
    function."""
    model, grads = policy_on(tmp_path, dropout=0.3).train(), []
    for on in (False, True):
        model.checkpoint_activations = on
        model.zero_grad()
        torch.manual_seed(3)
        with adapter(model, "policy"):
            loss = policy_loss(model)
        loss.backward()
        grads.append([p.grad.clone() for p in lora_parameters(model, "policy")])
    assert all(largest(g - h) <= 1e-6 for g, h in zip(*grads, strict=True))


def test_adapters_on_a_bf16_trunk_move_at_the_papers_learning_rate(tmp_path):
    """100 AdamW steps at lr 1e-5 move at least 99 % of A's entries. Were A bf16, three quarters
    would stay where they are: half the spacing of bf16 numbers near 0.1 is 2.4e-4, far above a
    step."""
    model = trunk(tmp_path, dtype=torch.bfloat16)
    add_lora(model, "policy", r=8, alpha=64)
    before = [p.detach().clone() for p in lora_parameters(model, "policy")]
    train(model, "policy", steps=100, lr=1e-5)
    now = lora_parameters(model, "policy")
    moved = [p != q for p, q in zip(now, before, strict=True) if p.shape[0] == 8]
    assert len(moved) == 8 and torch.cat([m.flatten() for m in moved]).float().mean() >= 0.99


# ---------------------------------------------------------------------------- adapters among others

def test_one_adapter_never_alters_what_another_computes(tmp_path):
    """Policy, value and reward share a trunk: adding, training or merging away one leaves the
    others' outputs bit-equal."""
    model = trunk(tmp_path)
    add_lora(model, "reward", r=4, alpha=16)
    randomise(model, "reward")
    reward, base = logits(model, "reward"), logits(model, None)
    add_lora(model, "policy", r=8, alpha=64, targets=("wq", "wv", "w1"))
    assert torch.equal(logits(model, "reward"), reward)
    train(model, "policy")
    policy = logits(model, "policy")
    assert largest(policy - base) > 0.01
    assert torch.equal(logits(model, "reward"), reward) and torch.equal(logits(model, None), base)
    train(model, "reward")
    assert largest(logits(model, "reward") - reward) > 0.01
    assert torch.equal(logits(model, "policy"), policy) and torch.equal(logits(model, None), base)


def test_a_copied_adapter_is_the_other_and_then_its_own(tmp_path):
    """On one trunk the value adapter starts as the reward adapter. It trains on; the reward model
    must not follow."""
    model = trunk(tmp_path)
    for name in ("reward", "value"):
        add_lora(model, name, r=4, alpha=16)
    randomise(model, "reward")
    reward = logits(model, "reward")
    save_lora(model, "reward", tmp_path / "reward")
    load_lora(model, "value", tmp_path / "reward")
    assert torch.equal(logits(model, "value"), reward)
    train(model, "value")
    assert largest(logits(model, "value") - reward) > 0.01
    assert torch.equal(logits(model, "reward"), reward)


def test_an_unknown_adapter_or_target_is_refused_by_name(tmp_path):
    """A misspelt name must not quietly mean "no adapter", nor a misspelt target fewer adapters."""
    model = trunk(tmp_path)
    with pytest.raises(InputError, match="no linear layer called q_proj"):
        add_lora(model, "policy", r=4, alpha=16, targets=("wq", "q_proj"))
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
    add_lora(model, "policy", r=4, alpha=16)
    with pytest.raises(InputError, match="no adapter called polcy"), \
            adapter(model, "polcy"):
        pass
    with pytest.raises(InputError, match="there is an adapter called policy already"):
        add_lora(model, "policy", r=4, alpha=16)
    with pytest.raises(InputError, match="polcy"):
        merge_lora(model, "polcy")
    with pytest.raises(InputError, match="polcy"):
        save_lora(model, "polcy", tmp_path / "adapter")


# ------------------------------------------------------------------------------------- peft's files

@pytest.mark.parametrize("case", ["mha", "gqa"])
def test_an_adapter_that_peft_wrote_gives_pefts_logits(case, tmp_path):
    """r 4, alpha 16: same logits as transformers with peft, 1e-5, unmerged and merged."""
    expected = load_file(GOLDEN / case / "expected.safetensors")
    tokens, model = expected["tokens"], trunk(tmp_path, case)
    load_lora(model, "policy", GOLDEN / case / "adapter")
    assert largest(logits(model, "policy", tokens) - expected["adapter_logits"]) <= 1e-5
    assert largest(logits(model, None, tokens) - expected["logits"]) <= 1e-5
    assert largest(expected["adapter_logits"] - expected["logits"]) > 0.5
    merge_lora(model, "policy")
    assert largest(logits(model, None, tokens) - expected["adapter_logits"]) <= 1e-5


def altered_adapter(folder, config=None, tensors=None):
    """The golden mha adapter with changes to its config, or to its tensors -> its folder."""
    source, folder = GOLDEN / "mha" / "adapter", folder / "adapter"
    shutil.copytree(source, folder, dirs_exist_ok=True)
    about = json.loads((source / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(about | (config or {})))
    loaded = load_file(source / "adapter_model.safetensors")
    if tensors:
        tensors(loaded)
    save_file(loaded, folder / "adapter_model.safetensors")
    return folder


def test_pefts_all_linear_names_each_layer_by_its_path(tmp_path):
    """With target_modules="all-linear" peft writes model.layers.0.self_attn.q_proj, .. instead of
    q_proj: the same adapter."""
    names, model = ("q_proj", "k_proj", "v_proj", "o_proj"), trunk(tmp_path)
    paths = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in names]
    load_lora(model, "policy", altered_adapter(tmp_path, {"target_modules": paths}))
    expected = load_file(GOLDEN / "mha" / "expected.safetensors")
    adapted = logits(model, "policy", expected["tokens"])
    assert largest(adapted - expected["adapter_logits"]) <= 1e-5


@pytest.mark.parametrize("case", ["mha", "gqa"])
def test_a_saved_adapter_is_the_file_that_peft_writes(case, tmp_path):
    """So that peft, and with it vLLM and the like, read ours: peft's keys, the same bits, and its
    settings."""
    model = trunk(tmp_path, case)
    load_lora(model, "policy", GOLDEN / case / "adapter")
    save_lora(model, "policy", tmp_path / "adapter", "runs/sft")
    folders = tmp_path / "adapter", GOLDEN / case / "adapter"
    ours, pefts = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert ours.keys() == pefts.keys()
    assert all(torch.equal(ours[key], pefts[key]) for key in pefts)
    ours, pefts = (json.loads((f / "adapter_config.json").read_text()) for f in folders)
    assert ours["base_model_name_or_path"] == "runs/sft"
    for key in ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias",
                "fan_in_fan_out"):
        assert ours[key] == pefts[key], key
    assert sorted(ours["target_modules"]) == sorted(pefts["target_modules"])


def test_a_trained_adapter_comes_back_bit_for_bit(tmp_path):
    """Into a new model, under another name; alpha, r, dropout and targets travel in the folder."""
    model = trunk(tmp_path)
    add_lora(model, "policy", r=3, alpha=7, dropout=0.25, targets=("wv", "w2"))
    randomise(model, "policy")
    save_lora(model, "policy", tmp_path / "adapter")
    again = trunk(tmp_path)
    load_lora(again, "mine", tmp_path / "adapter")
    assert torch.equal(logits(again.eval(), "mine"), logits(model.eval(), "policy"))
    mine, policy = lora_parameters(again, "mine"), lora_parameters(model, "policy")
    for p, q in zip(mine, policy, strict=True):
        assert torch.equal(p, q) and p.requires_grad and p.dtype == torch.float32
    again.train()
    assert not torch.equal(logits(again, "mine"), logits(again, "mine"))


def test_the_dropout_of_a_file_waits_for_training(tmp_path):
    """PEFT's files name the dropout of their training, 0.1 in the paper. Who reads model and
    adapter to answer or to score gets the trained function, as from_pretrained gives it, and not
    one with holes."""
    model = policy_on(tmp_path, dropout=0.5)
    save_lora(model, "policy", tmp_path / "policy")
    save_reward_model(RewardModel(model, "policy"), tmp_path / "reward")
    again = trunk(tmp_path)
    load_lora(again, "policy", tmp_path / "policy")
    assert torch.equal(logits(again, "policy"), logits(again, "policy"))
    reward = load_reward_model(tmp_path / "reward", trunk=again)
    generate(again, [[1]], 2)
    tokens, lengths = torch.randint(3, 64, (2, 9)), torch.tensor([9, 4])
    torch.nn.init.ones_(reward.head.weight)
    for _ in range(2):
        assert torch.equal(reward.scores(tokens, lengths), reward.scores(tokens, lengths))
        score_responses(reward, [[1, 5]], [[7, 2]], 2, 1)
    again.train()
    assert not torch.equal(logits(again, "policy"), logits(again, "policy"))


@pytest.mark.parametrize("have, says", [
    (dict(r=8, alpha=16), "has r 4, expected 8"),
    (dict(r=4, alpha=64), "has alpha 16, expected 64"),
    (dict(r=4, alpha=16, targets=("wq", "wv")), r"has targets .*'wk'.* expected \('wq', 'wv'\)"),
], ids=["r", "alpha", "targets"])
def test_an_adapter_file_that_differs_from_the_adapter_is_refused_by_name(have, says, tmp_path):
    """With another alpha the same A and B are another policy; the message names what differs and
    both values."""
    model = trunk(tmp_path)
    add_lora(model, "policy", **have)
    before = [p.detach().clone() for p in lora_parameters(model, "policy")]
    with pytest.raises(InputError, match=says):
        load_lora(model, "policy", GOLDEN / "mha" / "adapter")
    for p, q in zip(lora_parameters(model, "policy"), before, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("change, says", [
    (dict(dim=32), r"(q|k|v|o)_proj\.lora_A.*\(4, 64\).*expected \(4, 32\)"),
    (dict(n_kv_heads=2), "(k|v)_proj"), (dict(n_layers=3), r"layers\.2\..*is missing"),
    (dict(n_layers=1), r"layers\.1\..*has no place in this model")])
def test_an_adapter_of_another_model_is_refused_and_leaves_no_trace(change, says):
    """Another width, fewer key heads, another depth: the tensor is named, and the model stays a
    plain LLaMA."""
    sizes = dict(vocab_size=128, dim=64, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=176)
    model = Llama(LlamaConfig(**sizes | change))
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(InputError, match=says):
        load_lora(model, "policy", GOLDEN / "mha" / "adapter")
    assert [name for name, _ in model.named_parameters()] == names


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B0 = A0.replace("lora_A", "lora_B")


@pytest.mark.parametrize("config, tensors, says", [
    ({"r": 8}, None, r"lora_A.*\(4, 64\).*expected \(8, 64\)"),
    ({"use_rslora": True}, None, "use_rslora"), ({"use_dora": True}, None, "use_dora"),
    ({"rank_pattern": {"q_proj": 2}}, None, "rank_pattern"), ({"bias": "all"}, None, "bias"),
    ({"alora_invocation_tokens": [5]}, None, "alora_invocation_tokens"),
    ({"init_lora_weights": "pissa"}, None, "init_lora_weights = pissa"),
    ({"target_modules": ["q_proj", "lm_head"]}, None, "has no place in this model|is missing"),
    ({"target_modules": ["q_proj"]}, None, r"(k|o|v)_proj.* has no place in this model"),
    ({"target_modules": r".*\.q_proj"}, None, r"target_modules = \.\*"),
    ({}, lambda t: t.pop(A0), r"layers\.0\.self_attn\.q_proj\.lora_A.* is missing"),
    ({}, lambda t: t.update({A0.replace("layers.0", "layers.7"): t[A0].clone()}), r"layers\.7"),
    ({}, lambda t: t[B0].fill_(float("nan")), r"layers\.0\.self_attn\.q_proj\.lora_B.*not finite"),
], ids=["r", "rslora", "dora", "rank-pattern", "bias", "alora", "pissa", "lm-head",
        "fewer-targets", "pattern", "missing", "extra", "NaN"])
def test_an_adapter_that_would_compute_something_else_is_refused_by_name(config, tensors, says,
                                                                         tmp_path):
    """Variants of LoRA and torn files have the same keys in part; read as plain LoRA they would be
    wrong in silence."""
    model = trunk(tmp_path)
    with pytest.raises(InputError, match=says):
        load_lora(model, "policy", altered_adapter(tmp_path, config, tensors))
    assert not lora_layers(model)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_an_adapter_that_brings_whole_weights_says_so(name, tmp_path):
    """With a resized vocabulary peft saves the whole embeddings and the head beside A and B, even
    where modules_to_save is null: no torn adapter, but more than one, and without them the new
    tokens would be noise."""
    key = f"base_model.model.{'model.' if name == 'embed_tokens' else ''}{name}.weight"

    def add_whole(tensors):
        tensors[key] = torch.zeros(130, 64)

    model = trunk(tmp_path)
    with pytest.raises(InputError, match=rf"brings whole weights \({key}\).*resized vocabulary"):
        load_lora(model, "policy", altered_adapter(tmp_path, tensors=add_whole))
    with pytest.raises(InputError, match=r"modules_to_save = \['lm_head'\] is not implemented"):
        load_lora(model, "policy", altered_adapter(tmp_path, {"modules_to_save": ["lm_head"]}))


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    """An empty folder, settings without weights, weights cut short by a full disk, and what Git LFS
    leaves in their place: one line that names the file."""
    model = trunk(tmp_path)
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors.*tools/convert\.py"):
        load_lora(model, "policy", tmp_path)
    file = altered_adapter(tmp_path) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is no safetensors file"):
        load_lora(model, "policy", file.parent)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16352\n")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is a Git LFS pointer"):
        load_lora(model, "policy", file.parent)
    file.unlink()
    with pytest.raises((InputError, OSError), match=r"adapter_model\.safetensors"):
        load_lora(model, "policy", file.parent)
