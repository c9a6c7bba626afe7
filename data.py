"""Text in, ids out: tokenizer, AlpacaFarm's prompt template, the three kinds of data files, batching.

Legend   B batch, T tokens (prompt + response, right-padded), R response tokens

How a row is laid out, and which state predicts which token (prompt of 3 ids, response of 3 ids):

    index           0     1     2     3     4     5     6
    tokens         BOS    p     p     a     b    EOS   (pad)
    predicted by          0     1     2     3     4              the state at index i predicts the token at index i + 1
    response_mask               (B, R):    [T     T     T     F]   columns count response tokens;
                                                                   True up to and with EOS

Decisions:
1. Prompt and response are encoded apart and joined. Encoded together, ":" merges with the first character of some
   answers, and the model would be trained on prompts that it never sees when it is asked.
2. The response is encoded *without* sentencepiece's dummy prefix: no space after "### Response:", as released models
   expect. So decode(prompt ids + response ids) is exactly the text.
3. Nothing is re-tokenised later: what was sampled as ids is scored as ids.
"""
import math
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import sentencepiece
import torch

from model import pad_right, parse_json, read_json, read_text

PROMPT_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n"
                "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")
PROMPT_NO_INPUT = ("Below is an instruction that describes a task. "
                   "Write a response that appropriately completes the request.\n\n"
                   "### Instruction:\n{instruction}\n\n### Response:")


def format_prompt(instruction, input=""):
    """AlpacaFarm's prompt (its prompts/v0_inputs_noinputs.json): two templates, with and without an input."""
    template = PROMPT_INPUT if input else PROMPT_NO_INPUT
    return template.format(instruction=instruction, input=input)


class Tokenizer:
    """A sentencepiece model. pad_id is -1 where there is none (LLaMA): nothing relies on a pad id, masks decide."""

    # Two more bytes of the file's normalizer_spec (field 3): add_dummy_prefix (its field 3) = false. In protobuf the
    # later value of a field wins, so appending this to the file's bytes is a second tokenizer without the prefix.
    NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}: expected a sentencepiece file such as tokenizer.model")
        proto = self.path.read_bytes()
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=proto)
            self.sp_response = sentencepiece.SentencePieceProcessor(model_proto=proto + self.NO_DUMMY_PREFIX)
        except RuntimeError:
            raise ValueError(f"{path} is not a sentencepiece model") from None
        self.vocab_size, self.bos_id, self.eos_id = self.sp.vocab_size(), self.sp.bos_id(), self.sp.eos_id()
        self.pad_id, self.unk_id = self.sp.pad_id(), self.sp.unk_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{path} has no piece for {'the end (EOS)' if self.eos_id < 0 else 'the beginning (BOS)'} "
                             "of a text: expected a tokenizer with both, such as LLaMA's")

    def encode(self, text, bos=False, eos=False):
        """Ids of a text as the tokenizer's file has it (LLaMA's puts a space in front)."""
        return [self.bos_id] * bos + self.sp.encode(text) + [self.eos_id] * eos

    def encode_response(self, text, eos=True):
        """Ids of a text that continues another: no space in front; with EOS at the end."""
        return self.sp_response.encode(text) + [self.eos_id] * eos

    def decode(self, ids):
        """The text of whole sequences; control ids (BOS, EOS) are silent."""
        return self.sp.decode([int(i) for i in ids])

    def decode_response(self, ids):
        """The text of a response alone: a space that it begins with is kept."""
        return self.sp_response.decode([int(i) for i in ids])

    def banned_ids(self, model_vocab_size):
        """Ids that a model must never sample: PAD, BOS, UNK,
        and rows beyond this tokenizer (embeddings may have more)."""
        return (sorted({self.pad_id, self.bos_id, self.unk_id} - {-1, self.eos_id})
                + list(range(self.vocab_size, model_vocab_size)))

    @property
    def has_user_defined_pieces(self):
        """Whether some pieces were given rather than learned:
        they alone have the score +0 (a learned one has -0 or less)."""
        sp = self.sp
        return any(math.copysign(1, sp.get_score(i)) > 0 and not (sp.is_control(i) or sp.is_byte(i) or sp.is_unknown(i))
                   for i in range(self.vocab_size))

    def check_same(self, path):
        """ValueError if another tokenizer's file gives ids of this one another meaning."""
        other = Tokenizer(path)
        differ = next((i for i in range(min(self.vocab_size, other.vocab_size))
                       if self.sp.id_to_piece(i) != other.sp.id_to_piece(i)), None)
        if differ is not None:
            raise ValueError(f"id {differ} is {self.sp.id_to_piece(differ)!r} in {self.path} but "
                             f"{other.sp.id_to_piece(differ)!r} in {path}: the models have different tokenizers")

    def check_against(self, folder):
        """check_same with the tokenizer that lies in a model's folder, if one does."""
        if (Path(folder) / "tokenizer.model").is_file():
            self.check_same(Path(folder) / "tokenizer.model")

    def check_fits(self, model_vocab_size, model_path):
        """ValueError if this tokenizer has ids that the model has no embedding for."""
        if self.vocab_size > model_vocab_size:
            raise ValueError(f"{self.path} has {self.vocab_size} pieces but {model_path} only {model_vocab_size} "
                             "embeddings: this tokenizer belongs to another model")


# ---------------------------------------------------------------------------------------------------------- files

def read_rows(path):
    """Rows (dictionaries) of a JSON list or of JSON lines, UTF-8. ValueError names the file and the line or row."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no data file at {path}")
    if path.suffix == ".jsonl":
        lines = enumerate(read_text(path).split("\n"), 1)
        rows = [parse_json(line, path, number) for number, line in lines if line.strip()]
    else:
        rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: expected a non-empty list of rows, "
                         f"got {'an empty list' if rows == [] else type(rows).__name__}")
    return rows


def text_field(row, key, where, default=None):
    """row[key], which must be a string (absent: the default, if there is one)."""
    value = row.get(key, default) if isinstance(row, dict) else None
    value = default if value is None else value
    if not isinstance(value, str):
        got = "no such field" if not isinstance(row, dict) or key not in row else f"{type(value).__name__} {value!r}"
        raise ValueError(f"{where}: expected a text in '{key}', got {got}")
    lone = next((c for c in value if 0xD800 <= ord(c) <= 0xDFFF), None) if not value.isascii() else None
    if lone:
        raise ValueError(f"{where}: '{key}' holds half a character ({lone!r}, a lone surrogate at "
                         f"{value.index(lone)}): no tokenizer can read it; mend or remove the row")
    return value


def prompt_of(row, where):
    """The formatted prompt of a row with `instruction` and perhaps `input`."""
    instruction = text_field(row, "instruction", where)
    if not instruction.strip():
        raise ValueError(f"{where}: 'instruction' is empty")
    return format_prompt(instruction, text_field(row, "input", where, default=""))


@dataclass(frozen=True)
class Example:
    """A prompt and its answer, as ids; the answer ends with EOS unless it was too long and lost its tail."""
    prompt: list
    response: list


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the better one named by people or by an annotator."""
    prompt: list
    chosen: list
    rejected: list
    row: dict


def load_sft(path, tokenizer, max_len):
    """instruction / input / output rows -> Examples of at most max_len tokens (the head is kept), how many of them were
    cut, and how many rows were left out, since their prompt alone fills max_len: nothing is to be learnt from them."""
    examples, cut, rows = [], 0, read_rows(path)
    for i, row in enumerate(rows):
        where = f"{path}, row {i}"
        prompt = tokenizer.encode(prompt_of(row, where), bos=True)
        response = tokenizer.encode_response(text_field(row, "output", where))
        room = max_len - len(prompt)
        if room > 0:
            examples.append(Example(prompt, response[:room]))
            cut += len(response) > room
    if not examples:
        raise ValueError(f"{path}: every prompt is longer than {max_len} tokens")
    return examples, cut, len(rows) - len(examples)


def load_preferences(path, tokenizer, max_len):
    """output_1 / output_2 / preference rows (AlpacaFarm), or chosen / rejected rows -> Pairs of at most max_len tokens,
    how many of them were cut, and how many rows were left out, since within max_len their answers do not differ."""
    pairs, cut, rows = [], 0, read_rows(path)
    for i, row in enumerate(rows):
        where = f"{path}, row {i}"
        prompt = tokenizer.encode(prompt_of(row, where), bos=True)
        if isinstance(row, dict) and "chosen" in row:
            texts = text_field(row, "chosen", where), text_field(row, "rejected", where)
        else:
            texts = text_field(row, "output_1", where), text_field(row, "output_2", where)
            preference = row.get("preference")
            if isinstance(preference, bool) or preference not in (1, 2):
                raise ValueError(f"{where}: 'preference' must be 1 or 2 (the better output), got {preference!r}")
            texts = texts if preference == 1 else texts[::-1]
        answers = [tokenizer.encode_response(t) for t in texts]
        room = max_len - len(prompt)
        if room > 0 and answers[0][:room] != answers[1][:room]:
            pairs.append(Pair(prompt, answers[0][:room], answers[1][:room], row))
            cut += max(map(len, answers)) > room
    if not pairs:
        raise ValueError(f"{path}: no pair differs within {max_len} tokens")
    return pairs, cut, len(rows) - len(pairs)


def load_prompts(path, tokenizer, prompt_len=None, rows=None):
    """instruction / input rows (of a file, or given) -> (prompts as ids, their rows, how many were dropped for being
    over prompt_len tokens)."""
    rows = read_rows(path) if rows is None else rows
    prompts = [tokenizer.encode(prompt_of(row, f"{path}, row {i}"), bos=True) for i, row in enumerate(rows)]
    kept = [i for i, p in enumerate(prompts) if prompt_len is None or len(p) <= prompt_len]
    if not kept:
        shortest = min(map(len, prompts))
        raise ValueError(f"{path}: all {len(prompts)} prompts are longer than --prompt_len {prompt_len} "
                         f"(the shortest has {shortest} tokens): raise it")
    return [prompts[i] for i in kept], [rows[i] for i in kept], len(prompts) - len(kept)


def load_eval_rows(path, tokenizer, prompt_len, drop_long=False):
    """Rows with instruction, input and a reference output -> the same rows, in order, with `prompt` (ids) added.

    A prompt of more than prompt_len tokens does not fit the model: ValueError, unless drop_long.
    """
    rows = [dict(row, prompt=tokenizer.encode(prompt_of(row, f"{path}, row {i}"), bos=True), index=i,
                 output=text_field(row, "output", f"{path}, row {i}")) for i, row in enumerate(read_rows(path))]
    fitting = [row for row in rows if len(row["prompt"]) <= prompt_len]
    if not fitting or len(fitting) < len(rows) and not drop_long:
        raise ValueError(f"{path}: {len(rows) - len(fitting)} of {len(rows)} prompts are "
                         f"longer than the {prompt_len} tokens that --response_len leaves "
                         "of this model's positions: lower it" + ", or give --eval_drop_long" * (not drop_long))
    return fitting


def split_by_instruction(pairs, share, seed):
    """Pairs -> (those to train on, those held out): no instruction is in both, about `share` of them is held out."""
    prompts = sorted({tuple(p.prompt) for p in pairs})
    random.Random(f"{seed} held out").shuffle(prompts)
    held = set(prompts[:max(1, round(share * len(prompts)))])
    train, test = [p for p in pairs if tuple(p.prompt) not in held], [p for p in pairs if tuple(p.prompt) in held]
    if not train:
        raise ValueError(f"{len(prompts)} instructions are too few to hold out a share of {share} of them")
    return train, test


# --------------------------------------------------------------------------------------------------------- batches

@lru_cache(maxsize=4)
def permutation(n, seed, epoch):
    """A shuffle of range(n) that belongs to (seed, epoch) alone."""
    order = list(range(n))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return tuple(order)


def batch_indices(n, batch_size, seed, step):
    """Indices of batch number `step` (from 0) of an endless stream of shuffled epochs over n items.

    A function of its arguments: to resume at a step, ask for that step.
    """
    first, picked = step * batch_size, []
    while len(picked) < batch_size:
        epoch, offset = divmod(first + len(picked), n)
        picked += permutation(n, seed, epoch)[offset:offset + batch_size - len(picked)]
    return picked


def even_batch_indices(lengths, batch_size, seed, step, blocks=8):
    """batch_indices for supervised training, with rows of similar length in a batch, so that little is padded.

    Blocks of 8 batches are sorted by length, cut into batches, and the batches shuffled.
    """
    block = sorted(batch_indices(len(lengths), batch_size * blocks, seed, step // blocks), key=lengths.__getitem__)
    which = permutation(blocks, f"{seed} batches", step // blocks)[step % blocks]
    return block[which * batch_size:(which + 1) * batch_size]


def pack(prompts, responses):
    """Lists of ids -> tokens (B, T) packed from the left and padded on the right, prompt_lengths (B,),
    response_lengths (B,)."""
    tokens = pad_right([p + r for p, r in zip(prompts, responses)])
    return tokens, torch.tensor([len(p) for p in prompts]), torch.tensor([len(r) for r in responses])


def length_mask(lengths, width):
    """(B, width) bool, True in the first lengths[i] columns of row i."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def response_places(prompt_lengths, response_lengths, width):
    """Where the responses' tokens are, row after row, among B * width tokens laid end to end -> (N,) int64.

    The states that predict them are one place before.
    """
    after_prompt = ~length_mask(prompt_lengths, width)
    return (after_prompt & length_mask(prompt_lengths + response_lengths, width)).flatten().nonzero()[:, 0]
