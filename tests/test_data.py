"""Text in, ids out: AlpacaFarm's template to the letter, prompt and response joined as ids, files
read as documented, and nothing cut, dropped or left out in silence.

The small tokenizer is a sentencepiece model trained here on a few sentences, with LLaMA's settings
(BPE, bytes for what it has not seen, a space in front of every text). With ../shared/real, LLaMA's
own tokenizer is tried as well.
"""
import json
import shutil

import pytest
import sentencepiece
import torch

from conftest import real, train_tokenizer
from data import (Tokenizer, batch_indices, even_batch_indices, format_prompt, length_mask,
                  load_eval_rows, load_preferences, load_prompts, load_sft, micro_batches, pack,
                  response_places, split_by_instruction)
from model import InputError

SENTENCES = [
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context.", "Write a response that appropriately completes the request.", "### Instruction:",
    "### Input:", "### Response:", "Paris is the capital of France.",
    "Name three colours: red, green and blue.", ":) " * 40]


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
    return real("llama_tokenizer") / "tokenizer.model"


# ----------------------------------------------------------------------------------------- template

def test_the_template_without_input_is_alpacas():
    """prompt_noinputs of AlpacaFarm's v0_inputs_noinputs.json; a model trained on it answers
    nothing else as well."""
    assert format_prompt("Name three colours.") == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Name three colours.\n"
        "\n"
        "### Response:")
    assert format_prompt("Name three colours.", "") == format_prompt("Name three colours.")


def test_the_template_with_input_is_alpacas():
    """prompt_inputs of the same file: another first sentence, and the input below the
    instruction."""
    assert format_prompt("Translate to French.", "Good morning!") == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. "
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
    assert ("### Instruction:\nExplain {input} and {0}.\n\n"
            "### Input:\n {instruction} %s\n\n\n### Response:") in prompt


# ---------------------------------------------------------------------------------------- tokenizer

def test_llama_ids_are_those_of_transformers():
    """The ids that transformers' LlamaTokenizer gives the template; 2277, 29937, 13291, 29901 is
    "### Response:"."""
    tokenizer = Tokenizer(real("llama_tokenizer") / "tokenizer.model")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, -1)
    assert tokenizer.vocab_size == 32000
    assert tokenizer.encode(format_prompt("Name three colours."), bos=True) == [
        1, 13866, 338, 385, 15278, 393, 16612, 263, 3414, 29889, 14350, 263, 2933, 393, 7128, 2486,
        1614, 2167, 278, 2009, 29889, 13, 13, 2277, 29937, 2799, 4080, 29901, 13, 1170, 2211, 28061,
        29889, 13, 13, 2277, 29937, 13291, 29901]
    prompt = format_prompt("Translate to French.", "Good morning, café!")
    assert tokenizer.encode(prompt, eos=True) == [
        13866, 338, 385, 15278, 393, 16612, 263, 3414, 29892, 3300, 2859, 411, 385, 1881, 393, 8128,
        4340, 3030, 29889, 14350, 263, 2933, 393, 7128, 2486, 1614, 2167, 278, 2009, 29889, 13, 13,
        2277, 29937, 2799, 4080, 29901, 13, 4300, 9632, 304, 5176, 29889, 13, 13, 2277, 29937,
        10567, 29901, 13, 18420, 7250, 29892, 274, 28059, 29991, 13, 13, 2277, 29937, 13291, 29901,
        2]


RESPONSES = ["Paris", "Paris is the capital of France.", " Paris", "  two spaces", "\nred\ngreen\n",
             ":) yes", ") yes", "1. Red", "(a)", "café 🙂 日本", "red", "trailing ", "\ttab", "#",
             ": Red", "", " "]


@pytest.mark.parametrize("prompt", [format_prompt("Name a city."),
                                    format_prompt("Translate.", "Good morning 🙂")])
def test_prompt_ids_and_response_ids_decode_to_exactly_the_text(path, prompt):
    """What the model reads is what was written: no space after "### Response:", none lost, nothing
    merged over the seam."""
    tokenizer = Tokenizer(path)
    for response in RESPONSES:
        answer = tokenizer.encode_response(response)
        ids = tokenizer.encode(prompt, bos=True) + answer
        assert tokenizer.decode(ids) == prompt + response
        assert tokenizer.decode_response(answer) == response


def test_a_response_has_no_space_in_front_and_an_eos_behind(path):
    """Released models expect no space after "### Response:"; and a response without EOS would never
    teach to stop.

    Oracle: the same text encoded in the middle of a line. In "\\nParis" sentencepiece's own space
    comes before the line break, so what follows the break is "Paris" without one.
    """
    tokenizer, sp = Tokenizer(path), sentencepiece.SentencePieceProcessor(str(path))
    newline = sp.encode("\n")
    for response in RESPONSES:
        middle = sp.encode("\n" + response)
        assert middle[:len(newline)] == newline
        assert tokenizer.encode_response(response) == middle[len(newline):] + [sp.eos_id()]


def test_the_prompt_is_tokenised_the_same_whatever_the_answer(path):
    """Encoded together, ":" and the ")" of an answer merge, and the model trains on a prompt that
    it is never asked with."""
    tokenizer, sp = Tokenizer(path), sentencepiece.SentencePieceProcessor(str(path))
    prompt = format_prompt("Smile.")
    ids = tokenizer.encode(prompt, bos=True)
    assert ids == [sp.bos_id()] + sp.encode(prompt)
    together = [sp.bos_id()] + sp.encode(prompt + ") yes")
    assert together[:len(ids)] != ids                     # the danger is real for this tokenizer
    assert sp.decode(ids + tokenizer.encode_response(") yes")) == sp.decode(together)


def test_text_that_looks_like_a_control_token_is_text(path):
    """An instruction that says </s> must not end the prompt, nor <s> begin another."""
    tokenizer = Tokenizer(path)
    text = "Write <s> and </s> and <unk>."
    for ids in (tokenizer.encode(text), tokenizer.encode_response(text)[:-1]):
        assert not {0, tokenizer.bos_id, tokenizer.eos_id} & set(ids)
        assert tokenizer.decode(ids) == text


def test_unknown_characters_are_bytes_and_come_back(small):
    """The small model never saw Greek: byte pieces carry it, also cut in the middle of a character
    without a crash."""
    tokenizer = Tokenizer(small)
    ids = tokenizer.encode_response("αβγ")[:-1]
    assert len(ids) == 6 and tokenizer.decode(ids) == "αβγ"
    assert tokenizer.decode(ids[:3]).startswith("α")


def test_banned_ids_are_what_a_model_must_never_say(path):
    """UNK, BOS, PAD where there is one, and rows beyond the tokenizer; never EOS, never an ordinary
    piece."""
    tokenizer = Tokenizer(path)
    n = tokenizer.vocab_size
    assert tokenizer.banned_ids(n) == [0, 1]
    assert tokenizer.banned_ids(n + 2) == [0, 1, n, n + 1]


def test_a_pad_is_banned_too_but_not_where_it_is_the_eos(tmp_path):
    """Some tokenizers have a PAD of their own, id 3 here."""
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES * 20))
    tokenizer = Tokenizer(train_tokenizer(tmp_path, pad_id=3))
    assert tokenizer.pad_id == 3 and tokenizer.banned_ids(tokenizer.vocab_size) == [0, 1, 3]


def test_what_is_no_tokenizer_is_refused_by_name(tmp_path):
    """One line, no traceback from C++: a missing file, one that is something else, and what Git LFS
    leaves in its place."""
    file = tmp_path / "tokenizer.model"
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model"):
        Tokenizer(file)
    file.write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.model is not a sentencepiece model"):
        Tokenizer(file)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:9e55\nsize 499723\n")
    with pytest.raises(InputError, match=r"tokenizer\.model is a Git LFS pointer.*git lfs pull"):
        Tokenizer(file)


# ------------------------------------------------------------------------------ tokenizer and model

def model_folder(folder, tokenizer=None, **files):
    """A folder with these JSON files and perhaps a tokenizer; weights are not looked at."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    if tokenizer:
        shutil.copy(tokenizer, folder / "tokenizer.model")
    return folder


@pytest.mark.parametrize("files", [
    {"config": {"eos_token_id": "beyond"}}, {"config": {"eos_token_id": [2, "beyond"]}},
    {"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": "beyond"}},
    {"config": {}, "generation_config": {"eos_token_id": [2, "beyond"]}}])
def test_a_model_that_ends_with_an_id_beyond_the_tokenizer_is_refused(small, tmp_path, files):
    """A chat model's <|im_end|> is an added token that tokenizer.model does not have. Rows beyond
    the tokenizer are banned: such a model would never end, every answer would pay the missing-EOS
    penalty, and nobody would be told."""
    tokenizer = Tokenizer(small)
    text = json.dumps(files).replace('"beyond"', str(tokenizer.vocab_size))
    folder = model_folder(tmp_path / "chat", **json.loads(text))
    says = rf"chat ends its answers with id {tokenizer.vocab_size}, which .* does not have: give " \
           r"the tokenizer\.model that has it, or write 2 as .*eos_token_id"
    with pytest.raises(InputError, match=says):
        tokenizer.check_model(folder, tokenizer.vocab_size + 8)


@pytest.mark.parametrize("files", [
    {"config": {"eos_token_id": 1, "bos_token_id": 0}}, {"config": {"eos_token_id": [2, 7]}},
    {"config": {"eos_token_id": None}, "generation_config": {"eos_token_id": 2}}, {"config": {}},
    {}])
def test_another_eos_within_the_vocabulary_means_nothing_and_loads(small, tmp_path, files):
    """The configs of the first LLaMA conversions say bos 0, eos 1, and their models end with 2."""
    tokenizer = Tokenizer(small)
    tokenizer.check_model(model_folder(tmp_path / "old", small, **files), tokenizer.vocab_size + 8)


def test_a_tokenizer_of_another_model_is_refused(small, other_tokenizer, tmp_path):
    """The same ids would be other words: by number where there are more pieces than embeddings, by
    name where the model's folder has a tokenizer of its own. A tokenizer that was cut short is the
    same where both have pieces."""
    tokenizer = Tokenizer(small)
    n = tokenizer.vocab_size
    with pytest.raises(InputError, match=f"has {n} pieces but .* only {n - 1} embeddings"):
        tokenizer.check_model(tmp_path, n - 1)
    with pytest.raises(InputError, match=r"id \d+ is '.*' in .* but '.*' in .*different tok"):
        tokenizer.check_model(model_folder(tmp_path / "other", other_tokenizer), n)
    tokenizer.check_model(model_folder(tmp_path / "same", small), n)


# -------------------------------------------------------------------------------------------- files

def write(path, rows):
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def test_sft_rows_become_prompt_and_answer_with_eos(small, tmp_path, capsys):
    """Two rows, with and without input: the template with BOS, the answer with EOS; too long ones
    keep their head, and are counted aloud."""
    tokenizer = Tokenizer(small)
    rows = [{"instruction": "Name a city.", "input": "", "output": "Paris"},
            {"instruction": "Translate.", "input": "red", "output": "rouge"}]
    file = write(tmp_path / "sft.json", rows)
    examples = load_sft(file, tokenizer, 512)
    texts = [tokenizer.decode(e.prompt + e.response) for e in examples]
    assert texts == [format_prompt("Name a city.") + "Paris",
                     format_prompt("Translate.", "red") + "rouge"]
    for e in examples:
        assert e.prompt[0] == 1 and e.prompt.count(1) == 1
        assert e.response[-1] == 2 and e.response.count(2) == 1
    assert capsys.readouterr().out == ""
    room = len(examples[0].prompt) + 1                        # the other prompt alone is too long
    shorter = load_sft(file, tokenizer, room)
    assert [e.response for e in shorter] == [examples[0].response[:1]]
    said = capsys.readouterr().out
    assert f"note: 1 rows of {file} are longer than --max_len {room} and lose their tail\n" in said
    assert f"note: 1 rows of {file} are left out: their prompts fill --max_len\n" in said
    with pytest.raises(InputError, match="no row is left within --max_len 3"):
        load_sft(file, tokenizer, 3)


def test_only_the_first_process_speaks(small, tmp_path, capsys, monkeypatch):
    """torchrun's other workers read the same file and would say the same again."""
    monkeypatch.setenv("RANK", "1")
    file = write(tmp_path / "sft.json", [{"instruction": "Name a city.", "output": "Paris"}])
    tokenizer = Tokenizer(small)
    room = len(tokenizer.encode(format_prompt("Name a city."), bos=True)) + 1
    assert len(load_sft(file, tokenizer, room)[0].response) == 1
    assert capsys.readouterr().out == ""


def test_a_preference_names_the_better_output(small, tmp_path, capsys):
    """AlpacaFarm's convention, 1 or 2, as numbered in output_1 and output_2: read the other way,
    PPO learns the worse."""
    tokenizer = Tokenizer(small)
    asked = {"instruction": "Name a city.", "input": ""}
    outputs = {"output_1": "Paris", "output_2": "red"}
    rows = [asked | outputs | {"preference": 1, "flaw": "colour"},
            asked | outputs | {"preference": 2}, asked | {"chosen": "blue", "rejected": "green"}]
    pairs = load_preferences(write(tmp_path / "preference.json", rows), tokenizer, 512)
    texts = [(tokenizer.decode_response(p.chosen), tokenizer.decode_response(p.rejected), p.flaw)
             for p in pairs]
    assert texts == [("Paris", "red", "colour"), ("red", "Paris", ""), ("blue", "green", "")]
    for p in pairs:
        assert tokenizer.decode(p.prompt) == format_prompt("Name a city.")
        assert p.chosen[-1] == p.rejected[-1] == 2
    assert capsys.readouterr().out == ""


def test_pairs_that_lose_their_tail_or_their_difference_are_counted_aloud(small, tmp_path, capsys):
    """Cut to the same head, two answers teach nothing: the pair is left out."""
    tokenizer = Tokenizer(small)
    asked = {"instruction": "Name a city.", "preference": 1}
    rows = [asked | {"output_1": "Paris is the capital", "output_2": "Paris is red"},
            asked | {"output_1": "red", "output_2": "red"},
            asked | {"output_1": "Paris is the capital of France.", "output_2": "red"}]
    file = write(tmp_path / "preference.json", rows)
    room = len(tokenizer.encode(format_prompt("Name a city."), bos=True)) + 2
    pairs = load_preferences(file, tokenizer, room)
    assert len(pairs) == 1 and len(pairs[0].chosen) == 2
    said = capsys.readouterr().out
    assert f"note: 1 pairs of {file} have an answer beyond --max_len {room}" in said
    assert f"note: 2 pairs of {file} are left out: alike within --max_len {room}" in said
    with pytest.raises(InputError, match="no row is left within --max_len 3"):
        load_preferences(file, tokenizer, 3)


@pytest.mark.parametrize("preference", [0, 3, None, True, "1", 1.5])
def test_any_other_preference_is_refused_with_its_row(preference, small, tmp_path):
    """0-based or missing labels would silently swap or drop answers; the message names file and
    row."""
    good = {"instruction": "Name a city.", "output_1": "Paris", "output_2": "red", "preference": 1}
    file = write(tmp_path / "preference.json", [good, good | {"preference": preference}])
    with pytest.raises(InputError, match=r"preference\.json, row 1: 'preference' must be 1 or 2"):
        load_preferences(file, Tokenizer(small), 512)


def test_a_list_of_messages_in_chosen_is_named_without_its_content(small, tmp_path):
    """Chat-style files hold lists of messages: the line says which type stands where, and does not
    print a conversation of many pages."""
    talk = [{"role": "user", "content": "a secret of many pages"}]
    row = {"instruction": "Name a city.", "chosen": talk, "rejected": talk}
    file = write(tmp_path / "preference.json", [row])
    with pytest.raises(InputError) as error:
        load_preferences(file, Tokenizer(small), 512)
    assert str(error.value) == f"{file}, row 0: expected a text in 'chosen', got list"


def test_prompts_over_the_limit_are_dropped_and_counted(small, tmp_path, capsys):
    """PPO trains on what fits, in order, and says how many do not."""
    tokenizer = Tokenizer(small)
    texts = ["Name a city.", "Name a city. " * 30, "Name a city, please."]
    file = write(tmp_path / "prompts.json", [{"instruction": text} for text in texts])
    limit = len(tokenizer.encode(format_prompt(texts[2]), bos=True))
    prompts = load_prompts(file, tokenizer, limit)
    assert [tokenizer.decode(p) for p in prompts] == [format_prompt(t) for t in texts[::2]]
    assert len(prompts[1]) == limit
    said = f"note: 1 prompts of {file} are longer than --prompt_len {limit} and are dropped\n"
    assert capsys.readouterr().out == said
    assert len(load_prompts(file, tokenizer, 1000)) == 3 and capsys.readouterr().out == ""
    with pytest.raises(InputError, match="no row is left within --prompt_len 3"):
        load_prompts(file, tokenizer, 3)


def test_evaluation_rows_keep_their_order_their_index_and_their_references(small, tmp_path, capsys):
    """A row's answer is keyed by its index in the file, its reference is encoded as an answer
    is."""
    tokenizer = Tokenizer(small)
    rows = [{"instruction": "Name a city.", "output": "Paris", "dataset": "x"},
            {"instruction": "Translate.", "input": "red", "output": "rouge"}]
    loaded = load_eval_rows(write(tmp_path / "eval.json", rows), tokenizer, 512, 20)
    for i, (row, got) in enumerate(zip(rows, loaded, strict=True)):
        assert {key: got[key] for key in row} == row and got["index"] == i
        prompt = format_prompt(row["instruction"], row.get("input", ""))
        assert tokenizer.decode(got["prompt"]) == prompt
        assert got["reference"] == tokenizer.encode_response(row["output"])
    assert capsys.readouterr().out == ""


def test_evaluation_rows_that_do_not_fit_are_refused_or_left_out_aloud(small, tmp_path, capsys):
    """Never cut: a reference that lost its tail would be judged as an answer that does not end.
    Row 1 has a long reference, row 2 a long prompt; row 3 fits to the token."""
    tokenizer = Tokenizer(small)
    rows = [{"instruction": "Name a city.", "output": "Paris"},
            {"instruction": "Name a city.", "output": "Paris " * 30},
            {"instruction": "Name a city. " * 9, "output": "Paris"},
            {"instruction": "Name a city.", "output": "red " * 9}]
    file = write(tmp_path / "eval.json", rows)
    prompt = len(tokenizer.encode(format_prompt("Name a city."), bos=True))
    room = prompt + len(tokenizer.encode_response("red " * 9))
    says = rf"2 rows of .*eval\.json exceed {room} positions.*reference.*--eval_drop_long"
    with pytest.raises(InputError, match=says):
        load_eval_rows(file, tokenizer, room, 8)
    kept = load_eval_rows(file, tokenizer, room, 8, drop_long=True)
    assert [row["index"] for row in kept] == [0, 3]                  # the keys of their randomness
    assert kept[1]["reference"][-1] == 2
    assert f"note: 2 rows of {file} exceed {room} positions" in capsys.readouterr().out
    with pytest.raises(InputError, match="4 rows"):                  # nothing would be evaluated
        load_eval_rows(file, tokenizer, prompt, 8, drop_long=True)


@pytest.mark.parametrize("text, says", [
    ("[{]", r"broken JSON.* line 1"), ("[]", "expected rows"),
    ('{"instruction": "x"}', "holds a dict, expected a list"),
    ('["x"]', r"expected rows .*\['x'\]"),
    ('[{"instruction": "x", "output": "y"}, {"output": "y"}]', "row 1.*'instruction', got None"),
    ('[{"instruction": "x", "output": 5}]', "row 0.*'output', got int"),
    ('[{"instruction": "x", "input": 5, "output": "y"}]', "row 0.*'input', got int"),
], ids=["broken", "empty", "object", "strings", "no-instruction", "number", "input"])
def test_a_broken_data_file_is_refused_with_file_and_row(text, says, small, tmp_path):
    """Sooner and clearer than a KeyError in the middle of a run."""
    (tmp_path / "sft.json").write_text(text)
    with pytest.raises(InputError, match=rf"sft\.json.*{says}"):
        load_sft(tmp_path / "sft.json", Tokenizer(small), 512)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_sft("nowhere.json", Tokenizer(small), 512)


def test_json_lines_may_hold_unicode_line_separators(small, tmp_path):
    """U+2028 is a character of a text, not the end of a line of the file; a broken line is named by
    its number."""
    rows = [{"instruction": "Name a city.", "output": "a\u2028b"},
            {"instruction": "Name a city.", "output": "c"}]
    file, tokenizer = tmp_path / "sft.jsonl", Tokenizer(small)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text(lines, encoding="utf-8")
    texts = [tokenizer.decode_response(e.response) for e in load_sft(file, tokenizer, 512)]
    assert texts == ["a\u2028b", "c"]
    file.write_text(lines + '\n{"instruction"\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"sft\.jsonl, line 4: broken JSON"):
        load_sft(file, tokenizer, 512)


def test_alpacafarms_own_rows_are_read(capsys):
    """2,044 judged pairs and 1,100 demonstrations that nobody here made, through LLaMA's tokenizer,
    to the letter."""
    tokenizer = Tokenizer(real("llama_tokenizer") / "tokenizer.model")
    rows = json.loads(real("sft.json").read_text())
    examples = load_sft(real("sft.json"), tokenizer, 100_000)
    assert len(examples) == len(rows) == 1100 and capsys.readouterr().out == ""
    for row, e in zip(rows, examples, strict=True):
        prompt = format_prompt(row["instruction"], row["input"])
        assert tokenizer.decode(e.prompt + e.response) == prompt + row["output"]
    rows = json.loads(real("preferences.json").read_text())
    differ = [row for row in rows if row["output_1"] != row["output_2"]]
    pairs = load_preferences(real("preferences.json"), tokenizer, 100_000)
    for row, p in zip(differ, pairs, strict=True):
        prompt = format_prompt(row["instruction"], row["input"])
        better = row[f"output_{row['preference']}"]
        assert tokenizer.decode(p.prompt + p.chosen) == prompt + better
    assert len(rows) == 2044
    assert f"note: {2044 - len(pairs)} pairs" in capsys.readouterr().out or len(pairs) == 2044


def test_alpacafarms_long_references_are_not_cut_in_silence(capsys):
    """text-davinci-003's answers to 200 of AlpacaFarm's evaluation instructions, on a model of 512
    positions: what does not fit beside its prompt is refused, or left out and counted."""
    tokenizer = Tokenizer(real("stories260K") / "tokenizer.model")
    rows = json.loads(real("eval.json").read_text())

    def tokens(row):
        prompt = format_prompt(row["instruction"], row["input"])
        response = tokenizer.encode_response(row["output"])
        return len(tokenizer.encode(prompt, bos=True)) + max(60, len(response))

    too_long = sum(tokens(row) > 512 for row in rows)
    assert too_long > 50
    with pytest.raises(InputError, match=f"{too_long} rows of .*512 positions"):
        load_eval_rows(real("eval.json"), tokenizer, 512, 60)
    kept = load_eval_rows(real("eval.json"), tokenizer, 512, 60, drop_long=True)
    assert len(kept) == len(rows) - too_long
    assert f"note: {too_long} rows" in capsys.readouterr().out


def test_held_out_instructions_are_not_trained_on(small, tmp_path):
    """Two answers to one question are alike: held out by pairs, the accuracy would be that of what
    was seen. 40 instructions with 3 pairs each; a tenth of them are 4, whatever the order."""
    rows = [{"instruction": f"Name city {i}.", "chosen": f"red {j}", "rejected": f"blue {j}"}
            for i in range(40) for j in range(3)]
    pairs = load_preferences(write(tmp_path / "p.json", rows), Tokenizer(small), 512)
    train, held_out = split_by_instruction(pairs)
    assert len(held_out) == 12 and len(train) == 108
    assert not {tuple(p.prompt) for p in train} & {tuple(p.prompt) for p in held_out}
    assert split_by_instruction(pairs[::-1]) == (train[::-1], held_out[::-1])
    with pytest.raises(InputError, match="one instruction is too few.*--preference_test"):
        split_by_instruction(pairs[:3])


# ------------------------------------------------------------------------------------------ batches

def test_batches_walk_through_whole_shuffled_epochs():
    """Every item once per epoch, in another order each epoch and seed, also where a batch spans two
    epochs; and a function of its arguments alone, so that a resumed run sees the batches that it
    would have seen."""
    stream = []
    for step in range(7):                                                  # 28 of 2.8 epochs
        stream += batch_indices(range(10), 4, seed=3, step=step)
    assert sorted(stream[:10]) == sorted(stream[10:20]) == list(range(10))
    assert len(set(stream[20:])) == 8
    assert stream[:10] != stream[10:20] and stream[:10] != list(range(10))
    assert stream[12:16] == batch_indices(range(10), 4, seed=3, step=3)
    assert stream[:4] != batch_indices(range(10), 4, seed=4, step=0)
    # more than an epoch at once
    assert sorted(batch_indices(range(3), 7, seed=0, step=0)[:6]) == [0, 0, 1, 1, 2, 2]


def test_batches_of_even_length_hold_the_same_rows_and_little_padding():
    """Eight batches of 4 from 64 rows of length 0 to 63: the same 32 rows as eight plain batches,
    each once; lengths within a batch are neighbours, and batches do not come in order of length."""
    lengths = [(37 * i) % 64 for i in range(64)]
    plain, even = [], []
    for step in range(8):
        plain += batch_indices(lengths, 4, seed=3, step=step)
        even.append(even_batch_indices(lengths, 4, seed=3, step=step))
    rows = [i for batch in even for i in batch]
    assert sorted(rows) == sorted(plain)
    by_length, drawn = sorted(lengths[i] for i in rows), [[lengths[i] for i in b] for b in even]
    assert sorted(drawn) == [by_length[i:i + 4] for i in range(0, 32, 4)] and drawn != sorted(drawn)


def test_micro_batches_share_out_a_batch_by_length():
    """Seven rows over two processes, three at a time: each row once, each process's rows sorted, so
    that no process gets all the long ones."""
    items = [5, 1, 9, 3, 7, 2, 8]
    shares = [micro_batches(items, lambda n: n, 3, rank, 2) for rank in (0, 1)]
    assert shares == [[[1, 3, 7], [9]], [[2, 5, 8]]]
    assert micro_batches(items, lambda n: n, 3) == [[1, 2, 3], [5, 7, 8], [9]]


def test_rows_are_packed_from_the_left_and_each_state_predicts_the_next_token():
    """The picture at the head of data.py: prompts of 3 and 1 ids, responses of 2 and 4. The state
    at index i predicts the token at i + 1, so the first response token is predicted by the prompt's
    last state."""
    tokens, before, after = pack([[1, 11, 12], [1]], [[21, 2], [31, 32, 33, 2]])
    assert tokens.tolist() == [[1, 11, 12, 21, 2], [1, 31, 32, 33, 2]]
    assert before.tolist() == [3, 1] and after.tolist() == [2, 4]
    mask = length_mask(after, 4)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True, True, False, False], [True, True, True, True]]
    places = response_places(before, after, 5)                                # of 10, row after row
    assert places.tolist() == [3, 4, 6, 7, 8, 9]
    assert tokens.flatten()[places].tolist() == [21, 2, 31, 32, 33, 2]
    assert tokens.flatten()[places - 1].tolist() == [12, 21, 1, 31, 32, 33]


def test_what_stands_in_the_padding_is_no_response():
    """Three rows padded to 9 columns: the mask is True up to and with the EOS, and no place lies in
    a prompt or in the padding."""
    prompts = [[1, 5], [1, 5, 6, 7], [1]]
    responses = [[8, 9, 10, 2], [8, 9, 10, 11, 2], [2]]
    tokens, before, after = pack(prompts, responses)
    assert tokens.shape == (3, 9)
    expected = [2, 3, 4, 5, 9 + 4, 9 + 5, 9 + 6, 9 + 7, 9 + 8, 18 + 1]
    assert response_places(before, after, 9).tolist() == expected
    assert length_mask(after, 5).sum(1).tolist() == [4, 5, 1]
