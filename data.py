"""Text in, ids out: prompt template, tokenizer, the three kinds of data files, batches.

Legend   B batch, T tokens (prompt + response, right-padded), R response tokens

How a row is laid out, and which state predicts which token (prompt of 3 ids, response of 3 ids):

    index           0     1     2     3     4     5     6
    tokens         BOS    p     p     a     b    EOS   (pad)
    predicted by          0     1     2     3     4        the state at index i predicts i + 1
    response_mask               (B, R):    [T     T     T     F]    True up to and with EOS

Decisions:
1. Prompt and response are encoded apart and joined. Encoded together, ":" merges with the first
   character of some answers, and the model would be trained on prompts that it never sees when
   asked.
2. The response is encoded *without* sentencepiece's dummy prefix: no space after "### Response:",
   as released models expect. So decode(prompt ids + response ids) is exactly the text.
3. Nothing is re-tokenised later: what was sampled as ids is scored as ids.
"""
import os
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import sentencepiece
import torch

from model import (InputError, keyed_seed, pad_right, parse_json, read_json, read_text,
                   refuse_lfs_pointer)

PROMPT_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")
PROMPT_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:")


def format_prompt(instruction, input=""):
    """AlpacaFarm's prompt (its prompts/v0_inputs_noinputs.json): two templates."""
    template = PROMPT_INPUT if input else PROMPT_NO_INPUT
    return template.format(instruction=instruction, input=input)


class Tokenizer:
    """A sentencepiece model. pad_id is -1 where there is none (LLaMA): only masks decide."""

    # Protobuf for "normalizer_spec (field 3), two bytes long: add_dummy_prefix (its field 3) =
    # false". Where a field comes twice the later value wins: appended to the file, these bytes make
    # it a tokenizer without the prefix.
    NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

    def __init__(self, path):
        self.path = Path(path)
        refuse_lfs_pointer(path)
        proto = self.path.read_bytes()
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=proto)
            self.sp_response = sentencepiece.SentencePieceProcessor(
                model_proto=proto + self.NO_DUMMY_PREFIX)
        except RuntimeError:
            raise InputError(f"{path} is not a sentencepiece model") from None
        self.vocab_size, self.pad_id, self.unk_id = len(self.sp), self.sp.pad_id(), self.sp.unk_id()
        self.bos_id, self.eos_id = self.sp.bos_id(), self.sp.eos_id()

    def encode(self, text, bos=False, eos=False):
        """Ids of a text as the tokenizer's file has it (LLaMA's puts a space in front)."""
        ids = self.sp.encode(text)
        if bos:
            ids = [self.bos_id] + ids
        if eos:
            ids = ids + [self.eos_id]
        return ids

    def encode_response(self, text):
        """Ids of a text that continues another: no space in front, EOS at the end."""
        return self.sp_response.encode(text) + [self.eos_id]

    def decode(self, ids):
        """The text of whole sequences; control ids (BOS, EOS) are silent."""
        return self.sp.decode(ids)

    def decode_response(self, ids):
        """The text of a response alone: a space that it begins with is kept."""
        return self.sp_response.decode(ids)

    def banned_ids(self, model_vocab_size):
        """Ids that a model must never sample: PAD, BOS, UNK, and its rows beyond this tokenizer."""
        special = {self.pad_id, self.bos_id, self.unk_id} - {-1, self.eos_id}
        return sorted(special) + list(range(self.vocab_size, model_vocab_size))

    def check_model(self, folder, vocab_size):
        """InputError if the model in a folder, of so many embeddings, has another tokenizer."""
        folder = Path(folder)
        if self.vocab_size > vocab_size:
            raise InputError(f"{self.path} has {self.vocab_size} pieces but {folder} only "
                             f"{vocab_size} embeddings: this tokenizer belongs to another model")
        beyond = [i for i in model_eos_ids(folder) if i >= self.vocab_size]
        if beyond:
            raise InputError(f"{folder} ends its answers with id {beyond[0]}, which {self.path} "
                             f"({self.vocab_size} pieces) does not have: give the tokenizer.model "
                             f"that has it, or write {self.eos_id} as its configs' eos_token_id")
        if (folder / "tokenizer.model").is_file():
            other = Tokenizer(folder / "tokenizer.model")
            for i in range(min(self.vocab_size, other.vocab_size)):
                mine, theirs = self.sp.id_to_piece(i), other.sp.id_to_piece(i)
                if mine != theirs:
                    raise InputError(f"id {i} is {mine!r} in {self.path} but {theirs!r} in "
                                     f"{other.path}: these are different tokenizers")


def model_eos_ids(folder):
    """The ids that end a text, as a Hugging Face folder says (old LLaMA configs say 1, which means
    nothing: only ids beyond the tokenizer are of interest)."""
    ids = []
    for file in (folder / "config.json", folder / "generation_config.json"):
        if file.is_file():
            said = read_json(file).get("eos_token_id")
            ids += said if isinstance(said, list) else [said]
    return [i for i in ids if isinstance(i, int)]


# ----------------------------------------------------------------------------------------- files

def say(text):
    """One process prints."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def note(n, what):
    """Say what has been done to n of the user's rows."""
    if n:
        say(f"note: {n} {what}")


def read_rows(path):
    """Rows of a JSON list, or of JSON lines (*.jsonl): a non-empty list of dictionaries."""
    path = Path(path)
    if path.suffix == ".jsonl":
        lines = enumerate(read_text(path).split("\n"), 1)
        rows = [parse_json(line, f"{path}, line {n}") for n, line in lines if line.strip()]
    else:
        rows = read_json(path, list)
    odd = [row for row in rows if not isinstance(row, dict)]
    if odd or not rows:
        raise InputError(f"{path}: expected rows {{\"instruction\": ..}}, got {str(odd)[:60]}")
    return rows


def text_field(row, key, where, default=None):
    """row[key], which must be a text (absent or null: the default, if there is one)."""
    value = row.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise InputError(f"{where}: expected a text in '{key}', got {type(value).__name__}")
    return value


def prompt_ids(tokenizer, row, where):
    """The formatted prompt of a row with `instruction` and perhaps `input`, as ids."""
    instruction = text_field(row, "instruction", where)
    prompt = format_prompt(instruction, text_field(row, "input", where, default=""))
    return tokenizer.encode(prompt, bos=True)


@dataclass(frozen=True)
class Example:
    """A prompt and its answer, as ids; the answer ends with EOS unless it lost its tail."""
    prompt: list
    response: list

    def __len__(self):
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, as ids, the better one named by people or by an annotator."""
    prompt: list
    chosen: list
    rejected: list
    flaw: str            # what is wrong with the worse one ("": the row does not say)

    def __len__(self):
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def require_rows(rows, path, limit):
    if not rows:
        raise InputError(f"{path}: no row is left within {limit} tokens: raise it")


def load_sft(path, tokenizer, max_len):
    """instruction / input / output rows -> Examples of at most max_len tokens (the head is
    kept)."""
    examples, cut, rows = [], 0, read_rows(path)
    for i, row in enumerate(rows):
        prompt = prompt_ids(tokenizer, row, f"{path}, row {i}")
        response = tokenizer.encode_response(text_field(row, "output", f"{path}, row {i}"))
        room = max_len - len(prompt)
        if room > 0:
            examples.append(Example(prompt, response[:room]))
            cut += len(response) > room
    require_rows(examples, path, f"--max_len {max_len}")
    note(cut, f"rows of {path} are longer than --max_len {max_len} and lose their tail")
    note(len(rows) - len(examples), f"rows of {path} are left out: their prompts fill --max_len")
    return examples


def better_and_worse(row, where):
    """Two texts, of AlpacaFarm's output_1, output_2, preference, or of chosen and rejected."""
    if "chosen" in row:
        return text_field(row, "chosen", where), text_field(row, "rejected", where)
    outputs = text_field(row, "output_1", where), text_field(row, "output_2", where)
    preference = row.get("preference")
    if preference not in (1, 2) or isinstance(preference, bool):
        raise InputError(f"{where}: 'preference' must be 1 or 2, the better output")
    return outputs if preference == 1 else outputs[::-1]


def load_preferences(path, tokenizer, max_len):
    """Comparisons -> Pairs of at most max_len tokens (the heads are kept); those that do not differ
    within max_len are left out."""
    pairs, cut, rows = [], 0, read_rows(path)
    for i, row in enumerate(rows):
        prompt = prompt_ids(tokenizer, row, f"{path}, row {i}")
        better, worse = better_and_worse(row, f"{path}, row {i}")
        chosen, rejected = tokenizer.encode_response(better), tokenizer.encode_response(worse)
        room = max_len - len(prompt)
        if room > 0 and chosen[:room] != rejected[:room]:
            pairs.append(Pair(prompt, chosen[:room], rejected[:room], str(row.get("flaw", ""))))
            cut += max(len(chosen), len(rejected)) > room
    require_rows(pairs, path, f"--max_len {max_len}")
    note(cut, f"pairs of {path} have an answer beyond --max_len {max_len} that loses its tail")
    note(len(rows) - len(pairs), f"pairs of {path} are left out: alike within --max_len {max_len}")
    return pairs


def load_prompts(path, tokenizer, prompt_len):
    """instruction / input rows -> prompts of at most prompt_len ids; longer ones are dropped."""
    rows = read_rows(path)
    prompts = [prompt_ids(tokenizer, row, f"{path}, row {i}") for i, row in enumerate(rows)]
    kept = [p for p in prompts if len(p) <= prompt_len]
    require_rows(kept, path, f"--prompt_len {prompt_len}")
    note(len(prompts) - len(kept), f"prompts of {path} are longer than --prompt_len {prompt_len} "
         "and are dropped")
    return kept


def load_eval_rows(path, tokenizer, room, response_len, drop_long=False):
    """Rows with instruction, input and a reference output -> the same rows, in order, with their
    `prompt` and `reference` as ids and their `index` in the file.

    A prompt that with response_len more tokens, or with its reference, takes more than `room`
    positions does not fit the model: InputError, or with drop_long it is left out, counted
    aloud."""
    rows = []
    for i, row in enumerate(read_rows(path)):
        reference = tokenizer.encode_response(text_field(row, "output", f"{path}, row {i}"))
        prompt = prompt_ids(tokenizer, row, f"{path}, row {i}")
        rows.append(row | {"prompt": prompt, "reference": reference, "index": i})
    fitting = [row for row in rows
               if len(row["prompt"]) + max(response_len, len(row["reference"])) <= room]
    left_out = len(rows) - len(fitting)
    why = f"rows of {path} exceed {room} positions, with --response_len tokens or their reference"
    if not fitting or left_out and not drop_long:
        raise InputError(f"{left_out} {why}: lower it, or leave them out with --eval_drop_long")
    note(left_out, f"{why}, and are left out of the evaluation")
    return fitting


def split_by_instruction(pairs):
    """Pairs -> (those to train on, those held out: a tenth of the instructions, none in both)."""
    prompts = sorted({tuple(p.prompt) for p in pairs}, key=keyed_seed)
    held = set(prompts[:max(1, len(prompts) // 10)])
    train = [p for p in pairs if tuple(p.prompt) not in held]
    if not train:
        raise InputError("one instruction is too few to hold some out: give --preference_test")
    return train, [p for p in pairs if tuple(p.prompt) in held]


# --------------------------------------------------------------------------------------- batches

@lru_cache(maxsize=4)
def permutation(n, seed, epoch):
    """A shuffle of range(n) that belongs to (seed, epoch) alone."""
    order = list(range(n))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return tuple(order)


def batch_indices(items, batch_size, seed, step):
    """Indices of batch number `step` (from 0) of an endless stream of shuffled epochs over items.

    A function of its arguments: to resume at a step, ask for that step."""
    first, n, picked = step * batch_size, len(items), []
    while len(picked) < batch_size:
        epoch, offset = divmod(first + len(picked), n)
        picked += permutation(n, seed, epoch)[offset:offset + batch_size - len(picked)]
    return picked


def even_batch_indices(lengths, batch_size, seed, step, blocks=8):
    """batch_indices with rows of similar length in a batch, so that little is padded: blocks of 8
    batches are sorted by length, cut into batches, and the batches shuffled."""
    blocks = min(blocks, max(1, len(lengths) // batch_size))   # (or most batches would repeat rows)
    block = batch_indices(lengths, batch_size * blocks, seed, step // blocks)
    block = sorted(block, key=lengths.__getitem__)
    which = permutation(blocks, f"{seed} batches", step // blocks)[step % blocks]
    return block[which * batch_size:(which + 1) * batch_size]


def micro_batches(items, length, size, rank=0, world_size=1):
    """One process's share of a batch, cut into lists of `size` items of similar length, so that
    little is padded and all processes have as much to do. length: of an item, in tokens."""
    mine = sorted(items, key=length)[rank::world_size]
    return [mine[i:i + size] for i in range(0, len(mine), size)]


def pack(prompts, responses, device="cpu"):
    """Lists of ids -> tokens (B, T) packed from the left and padded on the right, prompt_lengths
    (B,), response_lengths (B,)."""
    tokens = pad_right([p + r for p, r in zip(prompts, responses)]).to(device)
    lengths = torch.tensor([[len(p), len(r)] for p, r in zip(prompts, responses)], device=device)
    return tokens, *lengths.T


def length_mask(lengths, width):
    """(B, width) bool, True in the first lengths[i] columns of row i."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def response_places(prompt_lengths, response_lengths, width):
    """Where the responses' tokens are, row after row, among B * width tokens laid end to end
    -> (N,) int64. The states that predict them are one place before."""
    in_row = length_mask(prompt_lengths + response_lengths, width)
    return (in_row & ~length_mask(prompt_lengths, width)).flatten().nonzero()[:, 0]
