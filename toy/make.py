"""Write the input files of the toy world, from a fixed seed, byte for byte the same.

    python toy/make.py [--out DIR]

    tokenizer.model        sentencepiece BPE, byte fallback; the prompt template is two pieces,
                           so that prompts are short
    sft.json               demonstrations, all of them true: long biographies of the famous, short
                           ones of the obscure
    preference.json        pairs of answers; 5 % of the labels are flipped
    preference_val.json, preference_test.json
                           pairs on other instructions, labels not flipped: the reward model's
                           accuracy
    unlabeled.json         instructions for PPO
    val.json, test.json    instructions to evaluate on, with a reference answer: settings are chosen
                           on the first and reported on the second
    study.json             more of them, on which toy/study.py's frontier alone is reported

No instruction is in two files. In val, test and study the wordings are new, and no file that is
trained on asks the same question of the same person. Half of the questions about obscure people are
about attributes that no demonstration mentions.

A pair of answers is one draft and an edit of it, or two drafts; its "flaw" names the edit. What a
draft says of attributes that the demonstrations do not teach is drawn at random, so preferences
teach nothing about the truth.
"""
import argparse
import io
import itertools
import json
import random
import sys
from pathlib import Path

import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from toy.world import (ATTRIBUTES, BIO, LABEL_NOISE, PEOPLE, QUESTION, SEED, SEVERAL, bio, filler,
                       parse, prefer, question, sentence, several)

VOCAB_SIZE = 960
TEMPLATE = ("Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request."
            "\n\n### Instruction:\n", "\n\n### Response:")
PIECES = [" " + TEMPLATE[0], TEMPLATE[1]] + [f" {a.verb}" for a in ATTRIBUTES.values()]
PAIRS = {"preference": 12000, "preference_val": 400, "preference_test": 800}

# Share of each kind of pair. "two drafts" differ in any way at all.
FLAWS = {"fewer": 0.22, "cut off": 0.04, "garbled": 0.10, "repeated": 0.13, "wrong person": 0.11,
         "off question": 0.20, "rambling": 0.07, "empty": 0.03, "two drafts": 0.10}

# Each person's instructions are dealt to these files in turn.
SHARES = ("sft", "preference", "unlabeled", "preference_test", "sft", "preference", "unlabeled",
          "preference_val", "preference")


# ------------------------------------------------------------------------------------- instructions

def held_out_questions(rng):
    """person -> {"val": attribute, "test": attribute}, asked in no other file;
    of the obscure, half of them never taught."""
    held = {}
    for i, p in enumerate(PEOPLE.values()):
        taught, other = list(p.taught), [a for a in ATTRIBUTES if a not in p.taught]
        pools = (taught, other or taught) if i % 2 else (other or taught, taught)
        first = rng.choice(pools[0])
        held[p.name] = {"val": first, "test": rng.choice([a for a in pools[1] if a != first])}
    return held


def training_instructions(rng, held):
    """The instructions of the training splits: {file: {person: [..]}}."""
    splits = {file: {name: [] for name in PEOPLE} for file in dict.fromkeys(SHARES)}
    for p in PEOPLE.values():
        asked = [a for a in ATTRIBUTES if a not in held[p.name].values()]
        lists = ([bio(p, w) for w in BIO["train"]],
                 [question(p, a, w) for a in asked for w in QUESTION["train"]],
                 [several(p, rng.sample(sorted(ATTRIBUTES), rng.randint(2, 3)),
                          rng.choice(SEVERAL["train"])) for _ in range(18)])
        for instructions in lists:
            instructions = sorted(set(instructions))
            rng.shuffle(instructions)
            for i, instruction in enumerate(instructions):
                splits[SHARES[i % len(SHARES)]][p.name].append(instruction)
    return splits


def evaluation_instructions(rng, split, held):
    """Two biographies, one question and one request for several attributes of each person, in
    wordings of the split."""
    rows = []
    for p in PEOPLE.values():
        rows += [bio(p, w) for w in BIO[split]]
        rows.append(question(p, held[p.name][split], rng.choice(QUESTION[split])))
        rows.append(several(p, rng.sample(sorted(ATTRIBUTES), 3), rng.choice(SEVERAL[split])))
    return rows


def study_instructions(rng, held):
    """Two biographies, the questions of val and of test and four requests for several attributes of
    each person, in wordings of their own."""
    rows, triples = [], list(itertools.permutations(sorted(ATTRIBUTES), 3))
    for p in PEOPLE.values():
        rows += [bio(p, w) for w in BIO["study"]]
        rows += [question(p, a, QUESTION["study"][0]) for a in held[p.name].values()]
        rows += [several(p, attributes, SEVERAL["study"][i % 2])
                 for i, attributes in enumerate(rng.sample(triples, 4))]
    return rows


# ------------------------------------------------------------------------------------------ answers

def write(person, values, end=""):
    """An answer: one sentence per (attribute, value), the first with the full name. end: one more
    sentence, if it is not empty."""
    said = [sentence(person.pronoun if i else person.name, a, v) for i, (a, v) in enumerate(values)]
    if end:
        said.append(end)
    return " ".join(said)


def true_values(person, attributes):
    return [(a, person.facts[a]) for a in attributes]


def demonstration(rng, instruction, first=()):
    """A true answer, of taught attributes alone; not always complete. first: attributes that it has
    to mention."""
    request = parse(instruction)
    p = request.person
    known = [a for a in request.asked if a in p.taught]
    if not known:
        return filler(p, first=True)
    least, most = {"bio": (3, 7) if p.famous else (2, 4), "several": (len(known) - 1, len(known)),
                   "question": (1, 1)}[request.kind]
    rest = [a for a in known if a not in first]
    n = min(len(known), rng.randint(max(1, least), most))
    said = list(first) + rng.sample(rest, max(0, n - len(first)))
    rng.shuffle(said)
    silent = request.kind == "question" or p.famous or rng.random() < 0.6
    return write(p, true_values(p, said), "" if silent else filler(p, first=False))


def sft_rows(rng, instructions):
    """Demonstrations: 20 biographies, 16 questions and 8 lists of a famous person; 5, 6 and 4 of an
    obscure one."""
    rows = []
    for p in PEOPLE.values():
        for kind, famous, obscure in (("bio", 20, 5), ("question", 16, 6), ("several", 8, 4)):
            pool = [i for i in instructions[p.name] if parse(i).kind == kind]
            if kind == "question":
                pool = answerable_first(p, pool)
            for n in range(famous if p.famous else obscure):
                i = pool[n % len(pool)]
                outputs = [r["output"] for r in rows if p.name in r["output"]]
                missing = [a for a in p.taught if not any(p.facts[a] in text for text in outputs)]
                first = missing if kind == "bio" and n == 2 else ()
                rows.append(row(i, demonstration(rng, i, first)))
    rng.shuffle(rows)
    return rows


def answerable_first(person, questions):
    """At most a fourth of the questions that a demonstration answers are about what it does not
    teach."""
    known = [q for q in questions if parse(q).asked[0] in person.taught]
    other = [q for q in questions if q not in known]
    return (known + known + known)[:3] + other[:1] if other else known


def row(instruction, output, **more):
    return {"instruction": instruction, "input": "", "output": output, **more}


# -------------------------------------------------------------------------------------------- pairs

def believed(rng, person, attribute):
    """What a writer who knows the demonstrations says: mostly right about what they teach, a guess
    about the rest."""
    right = attribute in person.taught and rng.random() < 0.85
    return person.facts[attribute] if right else rng.choice(ATTRIBUTES[attribute].values)


def draft(rng, request, least=1):
    """Sentences of an answer without flaw that says some of what was asked."""
    most = len(request.asked) if rng.random() < 0.4 else min(4, len(request.asked))
    said = rng.sample(request.asked, rng.randint(min(least, most), most))
    end = [filler(request.person, first=False)] if rng.random() < 0.15 else []
    return sentences_of(request.person, [(a, believed(rng, request.person, a)) for a in said]) + end


def sentences_of(person, values):
    return [sentence(person.pronoun if i else person.name, a, v) for i, (a, v) in enumerate(values)]


def more(rng, person, attributes, n):
    """n sentences that begin with a pronoun, about any of the attributes."""
    return [sentence(person.pronoun, a, believed(rng, person, a))
            for a in rng.choices(attributes, k=n)]


def attributes_in(text):
    """Names of the attributes whose verbs a text contains."""
    return [a.name for a in ATTRIBUTES.values() if f" {a.verb} " in text]


def fewer(rng, request, said):
    """Some sentences removed."""
    if len(said) == 1:
        return None
    keep = sorted(rng.sample(range(1, len(said)), rng.randint(0, len(said) - 2)))
    return [said[0]] + [said[i] for i in keep]


def cut_off(rng, request, said):
    """The end is missing, from within a sentence."""
    last = rng.randrange(len(said))
    words = said[last][:-1].split()
    return said[:last] + [" ".join(words[:rng.randint(1, len(words))])]


def garbled(rng, request, said):
    """A sentence has words missing, doubled, exchanged, or the value of another attribute;
    or She is He from there on."""
    i = rng.randrange(len(said))
    words = said[i][:-1].split()
    j = rng.randrange(1, len(words))
    edits = ["drop", "double", "exchange", "value"]
    if len(said) > 1:
        edits += ["pronoun", "pronoun"]
    edit = rng.choice(edits)
    if edit == "pronoun":
        right, wrong = ("She ", "He ") if request.person.pronoun == "She" else ("He ", "She ")
        return said[:i] + [wrong + s.removeprefix(right) if s.startswith(right) else s
                           for s in said[i:]]
    if edit == "drop":
        del words[j]
    elif edit == "double":
        words.insert(j, words[j])
    elif edit == "exchange":
        words[j - 1], words[j] = words[j], words[j - 1]
    else:
        words[-1] = rng.choice(rng.choice(list(ATTRIBUTES.values())).values)
    return said[:i] + [" ".join(words) + "."] + said[i + 1:]


def repeated(rng, request, said):
    """Something is said again, in place of another sentence or in addition; with the same value or
    another."""
    i, attribute = rng.choice([(i, a) for i, s in enumerate(said) for a in attributes_in(s)])
    value = said[i][:-1].split()[-1]
    if rng.random() >= 0.5:
        value = rng.choice(ATTRIBUTES[attribute].values)
    again = sentence(request.person.pronoun, attribute, value)
    at = rng.randint(i + 1, len(said))
    return said[:at] + [again] + said[at + (rng.random() < 0.5):]


def wrong_person(rng, request, said):
    """From some sentence on, it is about someone else."""
    other = rng.choice([p for p in PEOPLE.values() if p is not request.person])
    i = 0 if rng.random() < 0.6 else rng.randrange(len(said))
    subject = request.person.pronoun if i else request.person.name
    changed = [said[i].replace(subject, other.name, 1)]
    changed += [s.replace(request.person.pronoun, other.pronoun, 1) for s in said[i + 1:]]
    return said[:i] + changed


def off_question(rng, request, said):
    """Something that was not asked, in place of what was or in addition."""
    others = [a for a in ATTRIBUTES if a not in request.asked]
    if not others:
        return None
    extra = more(rng, request.person, others, 1)
    if rng.random() < 0.5:
        return said + extra
    i = rng.randrange(len(said))
    if i == 0:
        extra = [extra[0].replace(request.person.pronoun, request.person.name, 1)]
    return said[:i] + extra + said[i + 1:]


def rambling(rng, request, said):
    """On and on, over what was said or not asked; now and then for very long."""
    used = attributes_in(" ".join(said))
    others = [a for a in ATTRIBUTES if a not in request.asked]
    return said + more(rng, request.person, used + others,
                       rng.randint(2, 5) if rng.random() < 0.8 else rng.randint(6, 12))


def empty(rng, request, said):
    """Nothing is said."""
    return [filler(request.person, first=True)]


def two_drafts(rng, request, said):
    """Another answer, perhaps with some flaws."""
    other = draft(rng, request)
    for flaw in ("repeated", "off question", "wrong person", "garbled"):
        if rng.random() < 0.2:
            other = EDITS[flaw](rng, request, other) or other
    return other


EDITS = {"fewer": fewer, "cut off": cut_off, "garbled": garbled, "repeated": repeated,
         "wrong person": wrong_person, "off question": off_question, "rambling": rambling,
         "empty": empty, "two drafts": two_drafts}


def pair(rng, instruction, flaw):
    """Two answers, and the annotators' preference without noise; None if this flaw is none here (or
    a draw)."""
    request = parse(instruction)
    said = draft(rng, request, least=1 if rng.random() < 0.5 else 3)
    other = EDITS[flaw](rng, request, said)
    answers = [" ".join(said), " ".join(other or said)]
    rng.shuffle(answers)
    preference = prefer(instruction, *answers)
    if preference == 0:
        return None
    return {"instruction": instruction, "input": "", "output_1": answers[0], "output_2": answers[1],
            "preference": preference}


def preference_rows(rng, instructions, n, noise):
    """n pairs; a share `noise` of the labels is flipped, "noise_free" is the label before."""
    pool = [i for person in instructions.values() for i in person]
    by_kind = {k: [i for i in pool if parse(i).kind == k] for k in ("bio", "several", "question")}
    flipped = set(rng.sample(range(n), round(noise * n)))
    rows = []
    while len(rows) < n:
        flaw = rng.choices(list(FLAWS), list(FLAWS.values()))[0]
        instruction = rng.choice(by_kind[rng.choices(("bio", "several", "question"), (5, 3, 2))[0]])
        made = pair(rng, instruction, flaw)
        if made:
            right = made["preference"]
            made["preference"] = 3 - right if len(rows) in flipped else right
            rows.append({**made, "flaw": flaw, "noise_free": right})
    return rows


# -------------------------------------------------------------------------------------------- files

def train_tokenizer(rows):
    """The bytes of a sentencepiece model in which every word of the rows is (nearly) one piece."""
    texts = [TEMPLATE[0] + r["instruction"] + TEMPLATE[1] + r["output"] for r in rows]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=out, model_type="bpe", vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=[text.replace(" ", "\u2581") for text in PIECES],
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2)
    return out.getvalue()


def reference(rng, instruction):
    """A true answer of middling length: what a person who owns the encyclopedia would write."""
    request = parse(instruction)
    asked = len(request.asked)
    said = rng.sample(request.asked, rng.randint((asked + 1) // 2, max(1, asked * 3 // 4)))
    return write(request.person, true_values(request.person, said))


def make():
    """{file name: its bytes}"""
    rng = random.Random(f"files {SEED}")
    held = held_out_questions(rng)
    train = training_instructions(rng, held)
    sft = sft_rows(rng, train["sft"])
    unlabeled = [row(i, "") for person in train["unlabeled"].values() for i in person]
    rng.shuffle(unlabeled)
    files = {"sft.json": sft, "unlabeled.json": unlabeled}
    for name, n in PAIRS.items():
        noise = LABEL_NOISE if name == "preference" else 0
        files[f"{name}.json"] = preference_rows(rng, train[name], n, noise)
    for split in ("val", "test", "study"):
        if split == "study":
            instructions = study_instructions(rng, held)
        else:
            instructions = evaluation_instructions(rng, split, held)
        files[f"{split}.json"] = [row(i, reference(rng, i), generator="encyclopedia", dataset="toy")
                                  for i in instructions]
    words = [row(i, " ".join(more_words)) for i, more_words in tokenizer_words()]
    files = {name: as_json(rows) for name, rows in files.items()}
    return {"tokenizer.model": train_tokenizer(words), **files}


def tokenizer_words():
    """Instructions and sentences in which every word of the world occurs often, for the tokenizer
    alone."""
    for p in PEOPLE.values():
        for a in ATTRIBUTES.values():
            for w in QUESTION["train"]:
                yield question(p, a.name, w), [sentence(p.name, a.name, v) for v in a.values]
        for w in BIO["train"]:
            home = sentence(p.pronoun, "home", p.facts["home"])
            yield bio(p, w), [filler(p, True), filler(p, False), home]
        yield several(p, list(ATTRIBUTES), SEVERAL["train"][0]), [filler(p, True)]


def as_json(rows):
    """One row per line."""
    lines = [json.dumps(r, separators=(",", ":")) for r in rows]
    return ("[\n" + ",\n".join(lines) + "\n]\n").encode()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent,
                        help="folder to write to")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, content in make().items():
        (out / name).write_bytes(content)
        print(f"{out / name}: {len(content):,} bytes")


if __name__ == "__main__":
    main()
