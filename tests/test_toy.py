"""The toy world: its files come from its script, its splits do not overlap, its annotators and its
fact checker do what they say."""
import json
import subprocess
import sys

import pytest

from conftest import ROOT
from toy import world

FILES = ("sft", "preference", "preference_val", "preference_test", "unlabeled", "val", "test",
         "study")


def rows(name):
    return json.loads((ROOT / "toy" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_committed_files_are_what_the_script_makes(tmp_path):
    """Byte for byte, in a fresh process: anyone can check where every input file comes from."""
    command = [sys.executable, str(ROOT / "toy" / "make.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    made = sorted(p.name for p in tmp_path.iterdir())
    assert made == sorted([f"{f}.json" for f in FILES] + ["tokenizer.model"])
    for name in made:
        assert (tmp_path / name).read_bytes() == (ROOT / "toy" / name).read_bytes(), name


def test_no_instruction_is_in_two_files_and_evaluation_asks_something_new():
    """Else the evaluation would measure memory. Wordings of val, test and study occur nowhere else,
    and no other file asks the single questions that val and test ask of the same person; study asks
    these once more."""
    instructions = {name: {r["instruction"] for r in rows(name)} for name in FILES}
    for i, a in enumerate(FILES):
        for b in FILES[i + 1:]:
            assert not instructions[a] & instructions[b], (a, b)
    asked = {}
    for name in FILES:
        requests = map(world.parse, instructions[name])
        asked[name] = {(q.person.name, q.asked[0]) for q in requests if q.kind == "question"}
    for split in ("val", "test"):
        for other in set(FILES) - {split, "study"}:
            assert not asked[split] & asked[other], (split, other)
    assert asked["study"] == asked["val"] | asked["test"]
    assert len(instructions["study"]) == 480


def test_demonstrations_are_true_and_teach_what_they_say_they_teach():
    """`taught` of a person is exactly what the demonstrations state of that person; the rest nobody
    was ever told."""
    stated = {name: set() for name in world.PEOPLE}
    for r in rows("sft"):
        count = world.check_facts(r["instruction"], r["output"])
        assert count.stated == count.supported == count.taught_stated
        person = world.parse(r["instruction"]).person
        said = world.read(person, r["output"])
        stated[person.name] |= {s.attribute for s in said if s and s.attribute}
    assert all(stated[p.name] == set(p.taught) for p in world.PEOPLE.values())


def test_the_stated_share_of_the_labels_is_flipped():
    """Only the preference file is noisy, by exactly as much as it says."""
    noisy = [r["preference"] != r["noise_free"] for r in rows("preference")]
    assert sum(noisy) == round(world.LABEL_NOISE * len(noisy))
    for r in rows("preference_val") + rows("preference_test"):
        preferred = world.prefer(r["instruction"], r["output_1"], r["output_2"])
        assert r["preference"] == r["noise_free"] == preferred


@pytest.fixture(scope="module")
def somebody():
    """An obscure person, an attribute that was taught and one that never was."""
    person = next(p for p in world.PEOPLE.values() if not p.famous)
    return person, person.taught[0], next(a for a in world.ATTRIBUTES if a not in person.taught)


def test_facts_are_counted_exactly(somebody):
    """One true statement about a taught attribute, one false about an attribute never taught, one
    sentence of nonsense."""
    person, known, unknown = somebody
    wrong = next(v for v in world.ATTRIBUTES[unknown].values if v != person.facts[unknown])
    answer = " ".join([world.sentence(person.name, known, person.facts[known]),
                       world.sentence(person.pronoun, unknown, wrong), "She He plays."])
    counts = world.check_facts(f"Tell me a bio of {person.name}.", answer)
    assert counts == world.FactCount(2, 1, 1, 1)


def test_annotators_like_more_and_do_not_check_facts(somebody):
    """Two statements beat one, whether they are true or not; saying the same twice, another person,
    nonsense and a missing end all cost."""
    person, known, unknown = somebody
    ask = f"Tell me a bio of {person.name}."
    true = world.sentence(person.name, known, person.facts[known])
    lie = next(v for v in world.ATTRIBUTES[unknown].values if v != person.facts[unknown])
    both = f"{true} {world.sentence(person.pronoun, unknown, lie)}"
    other = next(p for p in world.PEOPLE if p != person.name)
    assert world.prefer(ask, both, true) == 1 and world.prefer(ask, true, both) == 2
    assert world.prefer(ask, true, true) == 0
    for worse in (f"{both} {world.sentence(person.pronoun, known, person.facts[known])}",
                  both.replace(person.name, other), both[:-1], f"{both} He plays plays.", ""):
        assert world.annotator_score(ask, worse) < world.annotator_score(ask, both), worse
    assert world.annotator_score(ask, both, finished=False) < world.annotator_score(ask, both)
