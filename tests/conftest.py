"""What the tests share: the project on the path, a tiny model with its tokenizer, and one process
to run in."""
import os
import sys
from pathlib import Path

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")      # for test_devices.py
# equality to rounding or to the bit is a claim about float32 on the CPU
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest  # noqa: E402
import sentencepiece  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "real"           # models and data that nobody here made, if at hand
sys.path.insert(0, str(ROOT))

from data import Tokenizer  # noqa: E402
from lora import add_lora, lora_parameters  # noqa: E402
from model import Llama, LlamaConfig, save_llama  # noqa: E402
from reward import RewardModel, save_reward_model  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """These models are so small that a second thread only waits."""
    torch.set_num_threads(1)


def real(name):
    """A file or folder of ../shared/real; the test is skipped where it is not at hand."""
    if not (REAL / name).exists():
        pytest.skip(f"../shared/real/{name} is not here")
    return REAL / name


def train_tokenizer(folder, **changes):
    """A sentencepiece model with LLaMA's settings, of the lines in folder/text.txt."""
    settings = {"input": str(folder / "text.txt"), "model_prefix": str(folder / "tokenizer"),
                "vocab_size": 400, "model_type": "bpe", "byte_fallback": True,
                "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
                "hard_vocab_limit": False, "split_by_unicode_script": False,
                "allow_whitespace_only_pieces": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(**settings | changes)
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with an untrained 2-layer policy, and two reward models for it: a full one and an
    adapter."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = ROOT / "toy" / "tokenizer.model"
    config = LlamaConfig(vocab_size=Tokenizer(tokenizer).vocab_size, dim=64, n_layers=2, n_heads=4,
                         n_kv_heads=2, ffn_dim=128, max_seq_len=128)
    torch.manual_seed(0)
    policy = Llama(config)
    save_llama(policy, folder / "sft")
    (folder / "sft" / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    full = RewardModel(Llama(config, lm_head=False))
    torch.nn.init.normal_(full.head.weight, std=0.3)
    save_reward_model(full, folder / "reward")
    add_lora(policy, "reward", r=4, alpha=8)
    for p in lora_parameters(policy, "reward"):
        torch.nn.init.normal_(p, std=0.1)
    adapter = RewardModel(policy, "reward")
    torch.nn.init.normal_(adapter.head.weight, std=0.3)
    save_reward_model(adapter, folder / "reward_adapter")
    return folder


@pytest.fixture(scope="session")
def other_tokenizer(tmp_path_factory):
    """A tokenizer with other pieces than the toy world's."""
    folder = tmp_path_factory.mktemp("other")
    sentences = "Pack my box with five dozen liquor jugs. How vexingly quick daft zebras jump!\n"
    (folder / "text.txt").write_text(sentences * 20)
    return train_tokenizer(folder)


@pytest.fixture
def one_process():
    """A process group of one, as `python train.py` makes it -> its device."""
    import train
    yield train.start_processes()
    if dist.is_initialized():
        dist.destroy_process_group()
