"""The course keeps its word: the original passes each exercise's tests, the blank fails them, every
mistake of the bank fails one whose words name the idea; and a student's commands do what they say.

    python -m pytest -q course

Some hundred short runs of pytest, each on a copy of the project in which one function is another.
Torch is imported once, by a server process from which they are forked."""
import contextlib
import io
import multiprocessing
import os
import queue
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from course.exercises import PYTEST, WIDE, blank, meaning, read_exercises  # noqa: E402
from course.mistakes import MISTAKES  # noqa: E402

EXERCISES = read_exercises()
LEFT_OUT = shutil.ignore_patterns(".*", "runs", "course", "tools", "__pycache__", "*.jsonl")


def run_tests(folder, tests, answer):
    """In a process of its own: the tests of a copy -> its report."""
    os.chdir(folder)
    os.environ.update(WIDE)
    sys.path.insert(0, folder)
    report = io.StringIO()
    with contextlib.redirect_stdout(report), contextlib.redirect_stderr(report):
        pytest.main([*PYTEST, *tests])
    answer.send(report.getvalue())


class Grader:
    """Copies of the project, one per core; in the one that is free, the tests of an exercise run
    on another source of its file."""

    def __init__(self, folders):
        self.context, self.free = multiprocessing.get_context("forkserver"), queue.Queue()
        self.context.set_forkserver_preload(["torch", "pytest", "safetensors.torch",
                                             "sentencepiece"])
        for folder in folders:
            shutil.copytree(ROOT, folder, ignore=LEFT_OUT, dirs_exist_ok=True)
            self.free.put(folder)

    def grade(self, exercise, source):
        """What `check` would say."""
        folder = self.free.get()
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)      # (of the source before)
        (folder / exercise.file).write_text(source, "utf-8")
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(target=run_tests,
                                       args=(str(folder), exercise.tests, sender))
        process.start()
        sender.close()
        said = meaning(receiver.recv(), folder)
        process.join()
        shutil.copy(ROOT / exercise.file, folder)
        self.free.put(folder)
        return said


@pytest.fixture(scope="session")
def graded(tmp_path_factory):
    """All at once, as many at a time as there are cores: a key -> what `check` would say."""
    jobs, cores = {}, os.cpu_count()
    for n, exercise in EXERCISES.items():
        original = (ROOT / exercise.file).read_text("utf-8")
        jobs[n, "original"] = exercise, original
        jobs[n, "blank"] = exercise, blank(original, exercise)
    for mistake in MISTAKES:
        jobs[mistake.exercise, mistake.name] = EXERCISES[mistake.exercise], planted(mistake)
    grader = Grader([tmp_path_factory.mktemp("copy") for _ in range(cores)])
    with ThreadPoolExecutor(cores) as pool:
        return dict(zip(jobs, pool.map(lambda job: grader.grade(*job), jobs.values())))


def planted(mistake):
    """The source with the mistake in it."""
    source = (ROOT / EXERCISES[mistake.exercise].file).read_text("utf-8")
    assert source.count(mistake.original) == 1, mistake
    return source.replace(mistake.original, mistake.wrong)


@pytest.mark.parametrize("n", EXERCISES)
def test_the_original_passes_and_the_blank_does_not(n, graded):
    passed, line = graded[n, "original"]
    assert passed, line
    assert not graded[n, "blank"][0]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m.exercise}: {m.name}")
def test_each_mistake_is_caught_by_a_test_that_names_the_idea(mistake, graded):
    passed, line = graded[mistake.exercise, mistake.name]
    assert not passed and mistake.says in line, line


# ------------------------------------------------------------------------- a student's commands

@pytest.fixture
def project(tmp_path):
    """A repository of its own, as a student clones it, without what the commands do not need."""
    for name in ("course", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for module in ROOT.glob("*.py"):
        shutil.copy(module, tmp_path)
    (tmp_path / "toy").mkdir()
    for name in ("__init__.py", "tokenizer.model", "world.py"):
        if (ROOT / "toy" / name).exists():
            shutil.copy(ROOT / "toy" / name, tmp_path / "toy")
    run(tmp_path, "git", "init", "-q")
    commit(tmp_path)
    return tmp_path


def run(folder, *words):
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def commit(folder):
    run(folder, "git", "add", "-A")
    run(folder, "git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x")


def course(folder, *words):
    return run(folder, sys.executable, "course/exercises.py", *words)


def test_a_student_starts_solves_is_graded_and_gets_the_original_back(project):
    """Exercise 11, first blank, then wrong, then right, committed on the way: the docstring stays,
    what was written is kept as a patch, and the file is the original again, to the byte."""
    file = project / "reward.py"
    original = file.read_text("utf-8")
    assert course(project, "start", "11")[0] == 0
    started = file.read_text("utf-8")
    assert '-log sigmoid(chosen - rejected), the mean' in started
    assert "F.logsigmoid(chosen" not in started
    status, said = course(project, "check", "11")
    assert status == 1 and said == "exercise 11, Bradley-Terry: still blank\n"
    blank_line = '    raise NotImplementedError("exercise 11")\n'
    assert started.count(blank_line) == 1
    file.write_text(started.replace(blank_line, "    return (rejected - chosen).exp().mean()\n"))
    commit(project)
    status, said = course(project, "check", "11")
    assert status == 1 and "Bradley-Terry: test_bradley_terry_by_hand: -log of the" in said
    mine = "    return F.softplus(rejected - chosen).mean()\n"
    file.write_text(started.replace(blank_line, mine))
    status, said = course(project, "check", "11")
    assert status == 0 and "passed" in said and "original" not in said, said
    status, said = course(project, "solve", "11")
    assert status == 0 and file.read_text("utf-8") == original
    assert "softplus(rejected" in (project / "exercise_11.1.patch").read_text("utf-8")
    assert run(project, "git", "apply", "exercise_11.1.patch")[0] == 0
    assert "softplus(rejected" in file.read_text("utf-8")
    assert course(project, "solve", "11")[0] == 0 and (project / "exercise_11.2.patch").is_file()
    assert "already" in course(project, "solve", "11")[1]
    assert "was not begun" in course(project, "solve", "12")[1]
    for n in ("11", "12"):
        assert f"(the original: start {n} blanks it)" in course(project, "check", n)[1]


def test_two_exercises_of_one_file_are_done_side_by_side(project):
    """Two in a session stand in one file. The second is begun while the first is not committed;
    each is solved for itself, and what was written for the other one stays. What is wrong with one
    may be that the other is blank: so it is said."""
    file = project / "ppo.py"
    original = file.read_text("utf-8")
    assert course(project, "start", "16")[0] == course(project, "start", "17")[0] == 0
    blanks = [f'    raise NotImplementedError("exercise {n}")\n' for n in (16, 17)]
    assert all(line in file.read_text("utf-8") for line in blanks)
    file.write_text(file.read_text("utf-8").replace(blanks[1], "    return values.sum(), {}\n"))
    status, said = course(project, "check", "17")
    assert status == 1 and "(blank in the same file: exercise 16)" in said
    assert course(project, "solve", "16")[0] == 0
    assert "return values.sum(), {}" in file.read_text("utf-8")
    assert course(project, "solve", "17")[0] == 0 and file.read_text("utf-8") == original


def test_a_function_that_was_written_on_one_line_is_put_back_whole(project):
    """No docstring, another signature, the body behind the colon: the original's lines return."""
    file = project / "regularizers.py"
    original = file.read_text("utf-8")
    assert course(project, "start", "18")[0] == 0
    before, after = file.read_text("utf-8").split("def k3(d):")
    after = after[after.index("\n\n\n"):]
    file.write_text(f"{before}def k3(x): return torch.expm1(-x) + x{after}")
    assert course(project, "solve", "18")[0] == 0 and file.read_text("utf-8") == original


def test_a_project_inside_of_another_repository_is_put_back_too(project):
    """A course's own repository may hold it in a folder."""
    folder = project / "rlhf"
    folder.mkdir()
    for path in [p for p in project.iterdir() if p.name not in (".git", "rlhf")]:
        path.rename(folder / path.name)
    commit(project)
    original = (folder / "ppo.py").read_text("utf-8")
    assert course(folder, "start", "13")[0] == 0
    assert course(folder, "solve", "13")[0] == 0
    assert (folder / "ppo.py").read_text("utf-8") == original


def test_what_a_student_has_typed_is_answered_in_a_line_and_never_lost(project):
    """A name that does not exist is named; so is a syntax error, with its line; what cannot be
    taken apart becomes a patch as a whole. What is begun is not begun again."""
    file = project / "reward.py"
    course(project, "start", "11")
    status, said = course(project, "start", "11")
    assert status == 2 and "exercise 11, Bradley-Terry is begun: write" in said
    started = file.read_text("utf-8")
    file.write_text(started.replace("raise NotImplementedError", "retrun_NotImplementedError"))
    status, said = course(project, "check", "11")
    assert status == 1 and "NameError: name 'retrun_NotImplementedError'" in said
    file.write_text(started.replace("raise NotImplementedError", "retrun NotImplementedError"))
    status, said = course(project, "check", "11")
    assert status == 1 and said.count("\n") == 1 and "reward.py, line 4" in said, said
    status, said = course(project, "solve", "11")
    assert status == 0 and "could not be taken apart" in said
    assert "retrun" in (project / "exercise_11.1.patch").read_text("utf-8")
    assert run(project, "git", "diff", "--stat") == (0, "")


def test_what_is_not_committed_is_not_touched(project):
    """A file with changes is refused, and stays as it is; so is a number that there is not."""
    file = project / "ppo.py"
    file.write_text(file.read_text("utf-8") + "# mine\n")
    before = file.read_text("utf-8")
    status, said = course(project, "start", "14")
    assert status == 2 and "ppo.py has changes that are not committed" in said, said
    assert file.read_text("utf-8") == before
    assert course(project, "start", "21")[0] == 2


def test_without_git_it_says_what_it_needs(project):
    """A downloaded archive has no history to take the original from."""
    shutil.rmtree(project / ".git")
    for command in ("start", "solve"):
        status, said = course(project, command, "14")
        assert status == 2 and "this needs git" in said and said.count("\n") == 1
    assert course(project, "check", "18")[0] == 0


def test_every_exercise_is_of_the_size_and_in_the_words_that_a_student_is_promised():
    """Twenty, of levels 1 to 3, each with a hint, a text of three to eight lines beside equations,
    and two to four mistakes."""
    assert list(EXERCISES) == list(range(1, 21))
    assert {e.level for e in EXERCISES.values()} == {1, 2, 3}
    for n, exercise in EXERCISES.items():
        assert "> Hint: " in exercise.text
        assert len({f.split(".")[0] for f in exercise.functions}) == 1
        assert 2 <= sum(m.exercise == n for m in MISTAKES) <= 4


def test_the_diffs_of_the_experiments_apply():
    """They are typed by nobody: what `git apply` refuses has been left behind by the code."""
    text = (ROOT / "course" / "experiments.md").read_text("utf-8")
    diffs = re.findall(r"```diff\n(.*?)```", text, re.S)
    assert len(diffs) == 4
    for diff in diffs:
        done = subprocess.run(["git", "apply", "--check", "-"], cwd=ROOT, input=diff, text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stderr
