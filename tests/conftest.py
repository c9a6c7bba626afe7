"""What the tests share: the project on the path, a tiny model with its tokenizer, and one process to run in."""
import os
import signal
import sys
from pathlib import Path

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")      # for test_devices.py
os.environ["CUDA_VISIBLE_DEVICES"] = ""            # equality to rounding or to the bit is a claim about float32 on the CPU

import pytest  # noqa: E402
import sentencepiece  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import Tokenizer  # noqa: E402
from lora import add_lora, lora_parameters  # noqa: E402
from model import Llama, LlamaConfig, save_llama  # noqa: E402
from reward import RewardModel, save_reward_model  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """These models are so small that a second thread only waits."""
    torch.set_num_threads(1)


def train_tokenizer(folder, **changes):
    """A sentencepiece model with LLaMA's settings, of the lines in folder/text.txt."""
    sentencepiece.SentencePieceTrainer.train(**{
        "input": str(folder / "text.txt"), "model_prefix": str(folder / "tokenizer"), "vocab_size": 400, "model_type": "bpe",
        "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "hard_vocab_limit": False, "split_by_unicode_script": False, "allow_whitespace_only_pieces": True,
        "minloglevel": 2} | changes)
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with an untrained 2-layer policy, and two reward models for it: a full one and an adapter."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = ROOT / "toy" / "tokenizer.model"
    config = LlamaConfig(vocab_size=Tokenizer(tokenizer).vocab_size, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=128,
                         max_seq_len=128)
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
    (folder / "text.txt").write_text("Pack my box with five dozen liquor jugs. How vexingly quick daft zebras jump!\n" * 20)
    return train_tokenizer(folder)


@pytest.fixture
def one_process():
    """A process group of one, as `python train.py` makes it; signal handlers are put back afterwards."""
    import train
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    device = train.start_processes()
    yield device
    dist.destroy_process_group()
    for s, handler in handlers.items():
        signal.signal(s, handler)
