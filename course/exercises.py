"""Twenty exercises: one function is taken out of the code, and the project's tests grade it.

    python course/exercises.py list          all of them
    python course/exercises.py show 14       what one asks for
    python course/exercises.py start 14      blank the function(s), docstring and signature left
    python course/exercises.py check 14      run its tests
    python course/exercises.py solve 14      keep your version as a patch, put the original back

The texts are course/exercises.md, the original is the repository's, by git. `start` refuses a file
that has changes which are not committed, but for those of other exercises.
"""
import argparse
import ast
import difflib
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Refused(Exception):
    """What cannot be done, in a line."""


@dataclass(frozen=True)
class Exercise:
    number: int
    title: str
    functions: tuple      # model.RMSNorm.forward, ..; all in one file
    level: int
    text: str             # what is asked, with a hint
    tests: list           # as pytest takes them

    @property
    def file(self):
        return self.functions[0].split(".")[0] + ".py"

    @property
    def blank_line(self):
        """What stands in place of a body."""
        return f'raise NotImplementedError("exercise {self.number}")'

    def __str__(self):
        return f"exercise {self.number}, {self.title}"


def read_exercises():
    """course/exercises.md -> {number: Exercise}."""
    found, parts = {}, re.split(r"^## ", (ROOT / "course/exercises.md").read_text("utf-8"),
                                flags=re.M)
    for part in parts[1:]:
        heading, about, rest = part.split("\n\n", 2)
        number, title = heading.split(". ", 1)
        text, file, tests = re.fullmatch(r"(.*)\n\nTests: `(.*?)` (.*?)\s*", rest, re.S).groups()
        found[int(number)] = Exercise(
            int(number), title, tuple(re.findall("`(.*?)`", about)), int(about[-1]), text,
            [f"{file}::{test}" for test in tests.split(", ")])
    return found


# ------------------------------------------------------------------------------- functions in text

def cut(source, name):
    """The source in four: what stands before a function, its head (decorators, signature and
    docstring), its body, what comes after. name: gae, or KVCache.attend."""
    nodes = ast.parse(source).body
    for part in name.split("."):
        node = next(n for n in nodes if getattr(n, "name", None) == part)
        nodes = node.body
    begin = min(n.lineno for n in (node, *node.decorator_list)) - 1
    first, end = node.body[0], node.end_lineno
    body = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
    lines = source.splitlines(keepends=True)
    return ["".join(part) for part in (lines[:begin], lines[begin:body], lines[body:end],
                                       lines[end:])]


def blank(source, exercise):
    """The source as `start` leaves it."""
    for function in exercise.functions:
        name = function.split(".", 1)[1]
        before, head, _, after = cut(source, name)
        indent = " " * 4 * (name.count(".") + 1)
        source = f"{before}{head}{indent}{exercise.blank_line}\n{after}"
    return source


def restored(source, original, exercise):
    """The source with the original's functions."""
    for function in exercise.functions:
        name = function.split(".", 1)[1]
        before, _, _, after = cut(source, name)
        _, head, body, _ = cut(original, name)
        source = before + head + body + after
    ast.parse(source)
    return source


# --------------------------------------------------------------------------------------------- git

def git(*words):
    """What git prints, or Refused."""
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True,
                              check=True).stdout
    except (OSError, subprocess.CalledProcessError) as e:
        raise Refused("this needs git, and the project as a git repository (git clone ..): "
                      f"{getattr(e, 'stderr', '') or e}".strip()) from None


def begun_file():
    """Where it is kept at which commit each exercise was begun."""
    return ROOT / git("rev-parse", "--git-path", "exercises.json").strip()


def begun():
    return json.loads(begun_file().read_text()) if begun_file().is_file() else {}


def in_git(exercise, commit="HEAD"):
    """An exercise's file as it was in a commit."""
    return git("show", f"{commit}:./{exercise.file}")


def changed_elsewhere(exercise):
    """Whether its file has changes that are not committed, but for other exercises begun in it."""
    source, committed = (ROOT / exercise.file).read_text("utf-8"), in_git(exercise)
    others = [e for n, e in read_exercises().items() if str(n) in begun() and n != exercise.number
              and e.file == exercise.file]
    try:
        for other in others:
            source = restored(source, committed, other)
    except (SyntaxError, StopIteration):
        return True
    return source != committed


def start(exercise):
    """Blank the functions in the working tree."""
    path, commits = ROOT / exercise.file, begun()
    if exercise.blank_line in path.read_text("utf-8"):
        raise Refused(f"{exercise} is begun: write {', '.join(exercise.functions)}")
    if changed_elsewhere(exercise):
        raise Refused(f"{exercise.file} has changes that are not committed: commit them first "
                      f"(git commit -m \"..\" {exercise.file}), or drop them")
    commits.setdefault(str(exercise.number), git("rev-parse", "HEAD").strip())
    begun_file().write_text(json.dumps(commits))
    path.write_text(blank(path.read_text("utf-8"), exercise), "utf-8")
    return (f"{exercise}: write {', '.join(exercise.functions)}; "
            f"python course/exercises.py check {exercise.number}")


def solve(exercise):
    """Put the original's functions back; the student's version becomes a patch."""
    commit = begun().get(str(exercise.number))
    if not commit:
        raise Refused(f"{exercise} was not begun in this folder: git log {exercise.file} has what "
                      "was there before")
    original = in_git(exercise, commit)
    file, what = ROOT / exercise.file, "the original is back"
    mine = file.read_text("utf-8")
    try:
        solved = restored(mine, original, exercise)
    except (SyntaxError, StopIteration):
        solved = original
        what = (f"{exercise.file} could not be taken apart (a syntax error?): all of it is as it "
                f"was when the exercise was begun")
    if solved == mine:
        return f"{exercise.file} has the original already"
    patch = next(p for n in itertools.count(1) if not
                 (p := ROOT / f"exercise_{exercise.number}.{n}.patch").exists())
    patch.write_text("".join(difflib.unified_diff(
        solved.splitlines(keepends=True), mine.splitlines(keepends=True),
        f"a/{exercise.file}", f"b/{exercise.file}")), "utf-8")
    file.write_text(solved, "utf-8")
    return f"{what}; your version: git apply {patch.name}"


def is_original(exercise):
    """Whether there is nothing of the student's to be graded (without git nobody knows)."""
    try:
        original = in_git(exercise, begun().get(str(exercise.number), "HEAD"))
    except Refused:
        return False
    source = (ROOT / exercise.file).read_text("utf-8")
    return restored(source, original, exercise) == source


# ------------------------------------------------------------------------------------------- tests

PYTEST = ["-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
WIDE = {"COLUMNS": "250"}        # or pytest cuts the error off


def meaning(report, root):
    """What pytest's report comes to -> (whether all passed, one line: the first failing test, what
    its docstring says that it means, and the error)."""
    failed = re.search(r"^(?:FAILED|ERROR) ([^\s:]+)(?:::(\w+))?.*?(?: - (.*))?$", report, re.M)
    if not failed:
        passed = re.search(r"\d+ passed.*", report)
        return bool(passed), passed[0] if passed else report.strip()[-200:]
    file, test, error = failed.groups()
    if not test:
        return False, f"{file} cannot be loaded: {error}"
    functions = {n.name: n for n in ast.parse((Path(root) / file).read_text("utf-8")).body
                 if isinstance(n, ast.FunctionDef)}
    says = " ".join(inspect.cleandoc(ast.get_docstring(functions[test]) or "").split())
    return False, f"{test}: {says} [{error or 'no message'}]"


def check(exercise):
    """Run the tests -> (whether all passed, a line)."""
    source = (ROOT / exercise.file).read_text("utf-8")
    try:
        compile(source, exercise.file, "exec")
    except SyntaxError as e:
        return False, f"{exercise}: {exercise.file}, line {e.lineno}: {e.msg}"
    if exercise.blank_line in source:
        return False, f"{exercise}: still blank"
    done = subprocess.run([sys.executable, "-m", "pytest", *PYTEST, *exercise.tests], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | WIDE)
    passed, line = meaning(done.stdout + done.stderr, ROOT)
    others = re.findall(r'NotImplementedError\("(exercise \d+)"\)', source)
    if others and not passed:
        line += f" (blank in the same file: {', '.join(others)})"
    return passed, f"{exercise}: {line}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("command", choices=("list", "show", "start", "check", "solve"))
    parser.add_argument("number", type=int, nargs="?", help="of the exercise")
    args = parser.parse_args(argv)
    exercises = read_exercises()
    if args.command == "list":
        for e in exercises.values():
            print(f"{e.number:2}  level {e.level}  {e.title:32} {', '.join(e.functions)}")
        return 0
    if args.number not in exercises:
        parser.error(f"give the number of an exercise, 1 to {max(exercises)}")
    exercise, passed = exercises[args.number], True
    try:
        if args.command == "show":
            line = (f"{exercise}: {', '.join(exercise.functions)}, level {exercise.level}\n\n"
                    f"{exercise.text}\n\nTests: {' '.join(exercise.tests)}")
        elif args.command == "check":
            passed, line = check(exercise)
            if passed and is_original(exercise):
                line += f" (the original: start {exercise.number} blanks it)"
        else:
            line = {"start": start, "solve": solve}[args.command](exercise)
    except Refused as e:
        print(f"exercises.py: {e}", file=sys.stderr)
        return 2
    print(line)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
