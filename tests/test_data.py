"""Text in, ids out: AlpacaFarm's template to the letter, prompt and response joined as ids, files read as documented.

The small tokenizer is a sentencepiece model trained here on a few sentences, with LLaMA's settings (BPE, bytes for what
it has not seen, a space in front of every text). With ../shared/real, LLaMA's own tokenizer is tried as well.
"""
import json
from pathlib import Path

import pytest
import sentencepiece
import torch

from conftest import train_tokenizer
from data import (Tokenizer, batch_indices, format_prompt, length_mask, load_preferences, load_prompts, load_sft, pack,
                  response_places)

REAL = Path(__file__).resolve().parents[1].parent / "shared" / "real"
SENTENCES = ["Below is an instruction that describes a task, paired with an input that provides further context.",
             "Write a response that appropriately completes the request.", "### Instruction:", "### Input:", "### Response:",
             "Paris is the capital of France.", "Name three colours: red, green and blue.", ":) " * 40]


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A tokenizer of 400 pieces that knows the template's words, and that ":)" is one piece."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("\n".join(SENTENCES * 20))
    return train_tokenizer(folder)


@pytest.fixture(params=["small", "llama"])
def path(request, small):
    """Each tokenizer in turn."""
    if request.param == "small":
        return small
    if not (REAL / "llama_tokenizer").is_dir():
        pytest.skip("../shared/real/llama_tokenizer is not here")
    return REAL / "llama_tokenizer" / "tokenizer.model"


# ----------------------------------------------------------------------------------------------------------- template

def test_the_template_without_input_is_alpacas():
    """prompt_noinputs of AlpacaFarm's v0_inputs_noinputs.json; a model trained on it answers nothing else as well."""
    assert format_prompt("Name three colours.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Name three colours.\n"
        "\n"
        "### Response:")
    assert format_prompt("Name three colours.", "") == format_prompt("Name three colours.")


def test_the_template_with_input_is_alpacas():
    """prompt_inputs of the same file: another first sentence, and the input below the instruction."""
    assert format_prompt("Translate to French.", "Good morning!") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Translate to French.\n"
        "\n"
        "### Input:\n"
        "Good morning!\n"
        "\n"
        "### Response:")


def test_braces_and_blanks_in_an_instruction_stay_as_they_are():
    """An instruction about JSON or C is text, not a format string; nothing is stripped."""
    prompt = format_prompt("Explain {input} and {0}.", " {instruction} %s\n")
    assert "### Instruction:\nExplain {input} and {0}.\n\n### Input:\n {instruction} %s\n\n\n### Response:" in prompt


# ---------------------------------------------------------------------------------------------------------- tokenizer

def test_llama_ids_are_those_of_transformers():
    """The ids that transformers' LlamaTokenizer gives the template; 2277, 29937, 13291, 29901 is "### Response:"."""
    if not (REAL / "llama_tokenizer").is_dir():
        pytest.skip("../shared/real/llama_tokenizer is not here")
    tokenizer = Tokenizer(REAL / "llama_tokenizer" / "tokenizer.model")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (32000, 1, 2, -1)
    assert tokenizer.encode(format_prompt("Name three colours."), bos=True) == [
        1, 13866, 338, 385, 15278, 393, 16612, 263, 3414, 29889, 14350, 263, 2933, 393, 7128, 2486, 1614, 2167, 278, 2009,
        29889, 13, 13, 2277, 29937, 2799, 4080, 29901, 13, 1170, 2211, 28061, 29889, 13, 13, 2277, 29937, 13291, 29901]
    assert tokenizer.encode(format_prompt("Translate to French.", "Good morning, café!"), eos=True) == [
        13866, 338, 385, 15278, 393, 16612, 263, 3414, 29892, 3300, 2859, 411, 385, 1881, 393, 8128, 4340, 3030, 29889,
        14350, 263, 2933, 393, 7128, 2486, 1614, 2167, 278, 2009, 29889, 13, 13, 2277, 29937, 2799, 4080, 29901, 13, 4300,
        9632, 304, 5176, 29889, 13, 13, 2277, 29937, 10567, 29901, 13, 18420, 7250, 29892, 274, 28059, 29991, 13, 13, 2277,
        29937, 13291, 29901, 2]


RESPONSES = ["Paris", "Paris is the capital of France.", " Paris", "  two spaces", "\nred\ngreen\n", ":) yes", ") yes", "1. Red",
             "(a)", "café 🙂 日本", "red", "trailing ", "\ttab", "#", ": Red", "", " "]


@pytest.mark.parametrize("prompt", [format_prompt("Name a city."), format_prompt("Translate.", "Good morning 🙂")])
def test_prompt_ids_and_response_ids_decode_to_exactly_the_text(path, prompt):
    """What the model reads is what was written: no space after "### Response:", none lost, nothing merged over the seam."""
    tokenizer = Tokenizer(path)
    for response in RESPONSES:
        ids = tokenizer.encode(prompt, bos=True) + tokenizer.encode_response(response)
        assert tokenizer.decode(ids) == tokenizer.decode(torch.tensor(ids)) == prompt + response
        assert tokenizer.decode_response(tokenizer.encode_response(response)) == response


def test_a_response_has_no_space_in_front_and_an_eos_behind(path):
    """Released models expect no space after "### Response:"; and a response without EOS would never teach to stop.

    Oracle: the same text encoded in the middle of a line. In "\\nParis" sentencepiece's own space comes before the line
    break, so what follows the break is "Paris" without one.
    """
    tokenizer, sp = Tokenizer(path), sentencepiece.SentencePieceProcessor(str(path))
    newline = sp.encode("\n")
    for response in RESPONSES:
        middle = sp.encode("\n" + response)
        assert middle[:len(newline)] == newline
        assert tokenizer.encode_response(response) == middle[len(newline):] + [sp.eos_id()]
        assert tokenizer.encode_response(response, eos=False) == middle[len(newline):]


def test_the_prompt_is_tokenised_the_same_whatever_the_answer(path):
    """Encoded together, ":" and the ")" of an answer merge, and the model trains on a prompt that it is never asked with."""
    tokenizer, sp = Tokenizer(path), sentencepiece.SentencePieceProcessor(str(path))
    prompt = format_prompt("Smile.")
    ids = tokenizer.encode(prompt, bos=True)
    assert ids == [sp.bos_id()] + sp.encode(prompt)
    together = [sp.bos_id()] + sp.encode(prompt + ") yes")
    assert together[:len(ids)] != ids                                # the danger is real for this tokenizer
    assert sp.decode(ids + tokenizer.encode_response(") yes")) == sp.decode(together)


def test_text_that_looks_like_a_control_token_is_text(path):
    """An instruction that says </s> must not end the prompt, nor <s> begin another."""
    tokenizer = Tokenizer(path)
    text = "Write <s> and </s> and <unk>."
    for ids in (tokenizer.encode(text), tokenizer.encode_response(text, eos=False)):
        assert not {0, tokenizer.bos_id, tokenizer.eos_id} & set(ids) and tokenizer.decode(ids) == text


def test_unknown_characters_are_bytes_and_come_back(small):
    """The small model never saw Greek: byte pieces carry it, also cut in the middle of a character without a crash."""
    tokenizer = Tokenizer(small)
    ids = tokenizer.encode_response("αβγ", eos=False)
    assert len(ids) == 6 and tokenizer.decode(ids) == "αβγ"
    assert tokenizer.decode(ids[:3]).startswith("α")


def test_banned_ids_are_what_a_model_must_never_say(path):
    """UNK, BOS, PAD where there is one, and rows beyond the tokenizer; never EOS, never an ordinary piece."""
    tokenizer = Tokenizer(path)
    assert list(tokenizer.banned_ids(tokenizer.vocab_size)) == [0, 1]
    assert list(tokenizer.banned_ids(tokenizer.vocab_size + 2)) == [0, 1, tokenizer.vocab_size, tokenizer.vocab_size + 1]
    with pytest.raises(ValueError, match=str(tokenizer.vocab_size)):
        tokenizer.check_fits(tokenizer.vocab_size - 1, "some_model")


def test_what_is_no_tokenizer_is_refused_by_name(tmp_path):
    """One line, no traceback from C++: a missing file, and a file that is something else."""
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model"):
        Tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("piece, name", [("bos_id", "the beginning"), ("eos_id", "the end")])
def test_a_tokenizer_without_the_pieces_that_the_method_needs_is_refused(tmp_path, piece, name):
    """Without an EOS no answer ends: id -1 would be the last embedding's."""
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES * 20))
    with pytest.raises(ValueError, match=f"tokenizer.model has no piece for {name}"):
        Tokenizer(train_tokenizer(tmp_path, **{piece: -1}))


# --------------------------------------------------------------------------------------------------------------- files

def write(path, rows):
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def test_sft_rows_become_prompt_and_answer_with_eos(small, tmp_path):
    """Two rows, with and without input: the template with BOS, the answer with EOS; too long ones keep their head."""
    tokenizer = Tokenizer(small)
    file = write(tmp_path / "sft.json", [{"instruction": "Name a city.", "input": "", "output": "Paris"},
                                         {"instruction": "Translate.", "input": "red", "output": "rouge"}])
    examples, cut, left_out = load_sft(file, tokenizer, 512)
    assert cut == left_out == 0 and len(examples) == 2
    assert tokenizer.decode(examples[0].prompt + examples[0].response) == format_prompt("Name a city.") + "Paris"
    assert tokenizer.decode(examples[1].prompt + examples[1].response) == format_prompt("Translate.", "red") + "rouge"
    for e in examples:
        assert e.prompt[0] == 1 and e.prompt.count(1) == 1 and e.response[-1] == 2 and e.response.count(2) == 1
    room = len(examples[0].prompt) + 1
    shorter, cut, left_out = load_sft(file, tokenizer, room)
    assert cut == left_out == 1 and [e.response for e in shorter] == [examples[0].response[:1]]      # the other prompt alone is too long


def test_a_preference_names_the_better_output(small, tmp_path):
    """AlpacaFarm's convention, 1 or 2, as numbered in output_1 and output_2: read the other way, PPO learns the worse."""
    tokenizer = Tokenizer(small)
    rows = [{"instruction": "Name a city.", "input": "", "output_1": "Paris", "output_2": "red", "preference": 1},
            {"instruction": "Name a city.", "input": "", "output_1": "Paris", "output_2": "red", "preference": 2},
            {"instruction": "Name a city.", "chosen": "blue", "rejected": "green"}]
    pairs, cut, left_out = load_preferences(write(tmp_path / "preference.json", rows), tokenizer, 512)
    texts = [(tokenizer.decode_response(p.chosen), tokenizer.decode_response(p.rejected)) for p in pairs]
    assert texts == [("Paris", "red"), ("red", "Paris"), ("blue", "green")] and cut == left_out == 0
    assert all(tokenizer.decode(p.prompt) == format_prompt("Name a city.") for p in pairs)
    assert all(p.chosen[-1] == p.rejected[-1] == 2 for p in pairs)


@pytest.mark.parametrize("preference", [0, 3, None, True, "1", 1.5])
def test_any_other_preference_is_refused_with_its_row(preference, small, tmp_path):
    """0-based or missing labels would silently swap or drop answers; the message names file, row and value."""
    good = {"instruction": "Name a city.", "output_1": "Paris", "output_2": "red", "preference": 1}
    file = write(tmp_path / "preference.json", [good, good | {"preference": preference}])
    with pytest.raises(ValueError, match=r"preference\.json.*row 1.*preference"):
        load_preferences(file, Tokenizer(small), 512)


def test_prompts_over_the_limit_are_dropped_and_counted(small, tmp_path):
    """Training drops and says how many; without a limit every row stays, in order."""
    tokenizer = Tokenizer(small)
    rows = [{"instruction": "Name a city."}, {"instruction": "Name a city. " * 30}, {"instruction": "Name a city, please."}]
    file = write(tmp_path / "prompts.json", rows)
    limit = len(tokenizer.encode(format_prompt("Name a city, please."), bos=True))
    prompts, kept, dropped = load_prompts(file, tokenizer, limit)
    assert dropped == 1 and kept == [rows[0], rows[2]]
    assert [tokenizer.decode(p) for p in prompts] == [format_prompt(r["instruction"]) for r in kept]
    assert len(prompts[1]) == limit
    everything, rows_again, dropped = load_prompts(file, tokenizer)
    assert len(everything) == 3 and rows_again == rows and dropped == 0
    with pytest.raises(ValueError, match="prompt_len"):
        load_prompts(file, tokenizer, 3)


@pytest.mark.parametrize("text, says", [
    ("[{]", r"line 1"), ("[]", "empty"), ('{"instruction": "x"}', "list"), ('["x"]', "row 0"),
    ('[{"instruction": "x", "output": "y"}, {"output": "y"}]', "row 1.*instruction"),
    ('[{"instruction": "x", "output": 5}]', "row 0.*output.*5"),
    ('[{"instruction": " ", "output": "y"}]', "row 0.*instruction"),
    ('[{"instruction": "x", "input": 5, "output": "y"}]', "row 0.*input.*5"),
], ids=["broken", "empty", "object", "strings", "no-instruction", "number", "blank", "input"])
def test_a_broken_data_file_is_refused_with_file_and_row(text, says, small, tmp_path):
    """Sooner and clearer than a KeyError in the middle of a run."""
    (tmp_path / "sft.json").write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)sft\.json.*{says}"):
        load_sft(tmp_path / "sft.json", Tokenizer(small), 512)


def test_json_lines_may_hold_unicode_line_separators(small, tmp_path):
    """U+2028 is a character of a text, not the end of a line of the file."""
    rows = [{"instruction": "Name a city.", "output": "a\u2028b"}, {"instruction": "Name a city.", "output": "c"}]
    (tmp_path / "sft.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n", encoding="utf-8")
    examples, _, _ = load_sft(tmp_path / "sft.jsonl", Tokenizer(small), 512)
    assert [Tokenizer(small).decode_response(e.response) for e in examples] == ["a\u2028b", "c"]


def test_alpacafarms_own_rows_are_read():
    """2,044 judged pairs and 1,100 demonstrations that nobody here made, through LLaMA's tokenizer, to the letter."""
    if not REAL.is_dir():
        pytest.skip("../shared/real is not here")
    tokenizer = Tokenizer(REAL / "llama_tokenizer" / "tokenizer.model")
    rows = json.loads((REAL / "sft.json").read_text())
    examples, cut, left_out = load_sft(REAL / "sft.json", tokenizer, 100_000)
    assert cut == left_out == 0 and len(examples) == len(rows) == 1100
    for row, e in zip(rows, examples):
        assert tokenizer.decode(e.prompt + e.response) == format_prompt(row["instruction"], row["input"]) + row["output"]
    rows = json.loads((REAL / "preferences.json").read_text())
    pairs, cut, left_out = load_preferences(REAL / "preferences.json", tokenizer, 100_000)
    assert cut == 0
    for p in pairs:
        better = p.row[f"output_{p.row['preference']}"]
        assert tokenizer.decode(p.prompt + p.chosen) == format_prompt(p.row["instruction"], p.row["input"]) + better
    assert len(pairs) == len(rows) - left_out == sum(row["output_1"] != row["output_2"] for row in rows)


# ------------------------------------------------------------------------------------------------------------ batching

def test_batches_walk_through_whole_shuffled_epochs():
    """Every item once per epoch, in another order each epoch and seed, also where a batch spans two epochs; and a function
    of its arguments alone, so that a resumed run sees the batches that it would have seen."""
    stream = [i for step in range(7) for i in batch_indices(10, 4, seed=3, step=step)]           # 28 of 2.8 epochs
    assert sorted(stream[:10]) == sorted(stream[10:20]) == list(range(10)) and len(set(stream[20:])) == 8
    assert stream[:10] != stream[10:20] and stream[:10] != list(range(10))
    assert stream[12:16] == batch_indices(10, 4, seed=3, step=3)
    assert stream[:4] != batch_indices(10, 4, seed=4, step=0)
    assert sorted(batch_indices(3, 7, seed=0, step=0)[:6]) == [0, 0, 1, 1, 2, 2]                 # more than an epoch at once


def test_rows_are_packed_from_the_left_and_each_state_predicts_the_next_token():
    """The picture at the head of data.py: prompts of 3 and 1 ids, responses of 2 and 4. The state at index i predicts the
    token at i + 1, so the first response token is predicted by the prompt's last state."""
    tokens, prompt_lengths, response_lengths = pack([[1, 11, 12], [1]], [[21, 2], [31, 32, 33, 2]])
    assert tokens.tolist() == [[1, 11, 12, 21, 2], [1, 31, 32, 33, 2]]
    assert prompt_lengths.tolist() == [3, 1] and response_lengths.tolist() == [2, 4]
    mask = length_mask(response_lengths, 4)
    assert mask.dtype == torch.bool and mask.tolist() == [[True, True, False, False], [True, True, True, True]]
    places = response_places(prompt_lengths, response_lengths, 5)                                # of 10, row after row
    assert places.tolist() == [3, 4, 6, 7, 8, 9]
    assert tokens.flatten()[places].tolist() == [21, 2, 31, 32, 33, 2]
    assert tokens.flatten()[places - 1].tolist() == [12, 21, 1, 31, 32, 33]
