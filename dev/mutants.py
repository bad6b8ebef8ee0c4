#!/usr/bin/env python3
"""Do the tests notice an error? Plants one-line errors, one at a time, and runs the quick tests on each.

    dev/mutants.py [--cuda] [--jobs N] [--minutes M] [--only TEXT] [--list]

The table is dev/mutants.txt: for each error the file, the exact piece of a line as it stands (found exactly once in
that file) and what replaces it. Every error is built in double, or in float where the table says so, with quick compile
flags in a folder of its own under build/mutants/. With --cuda it is those that the table marks so: errors in kernels,
tried on the emulator (needs CUDA's headers), first with the tests that the table names, then with all. Most of them are
in one program, which chooses by the environment's PLANTED when it runs; the others are built each on its own.
An error is caught when a test fails for the first time, crashes or does not come to an end; one that survives shows
that something is not tested. Exit status 0 when every error of the table was planted and
caught. With --minutes, errors that have not begun when the time is up are only compiled, and counted; which come first
depends on the sources, so that each change has another part of the table tried.

Needs Python's standard library and a C compiler only.
"""
import argparse
import concurrent.futures
import os
import pathlib
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "mutants"
SOURCES = ["train_detr.c", "test_detr.c", "train_detr.cu", "test_detr.cu"] + sorted(f"{folder}/{path.name}" for folder in ("data", "program")
                                                   for path in (ROOT / folder).glob("*.h")) + ["data/report.html", "data/make_shapes.c"]
FLAGS = "-std=gnu11 -Og -march=native -ffp-contract=fast -fno-math-errno -fopenmp -pthread -w".split()
LIBRARIES = "-ljpeg -lpng -lyajl -lexpat -lm".split()
# The tests that are run on an error in a file, one after another until one fails: names as ./test_detr takes them.
HEART = ("tasks matmul winograd attention dropout layernorm maxpool positions normalise matching boxes dumps options queries random "
         "gradients company frozen nonfinite step one_picture calibrate track inference same_bytes").split()
TESTS = {"train_detr.c": HEART, "program/checkpoint.h": ["dumps", "detections", "fileset"],
         "program/commands.h": ["options", "plan", "detections", "fileset"], "data/fileset.h": ["fileset"], "data/sha256.h": ["fileset"],
         "program/watch.h": ["watch"], "data/make_shapes.c": ["shapes"],
         "data/common.h": ["random", "dataset", "fileset"] + HEART,
         "data/image.h": ["image"], "data/loader.h": ["image"], "data/coco_eval.h": ["eval", "fileset"],
         "data/safetensors.h": ["dataset", "fileset"],
         "data/report.h": ["eval"], "data/flags.h": ["report", "watch"],
         None: HEART + ["image", "dataset", "eval", "report"]}
OTHER = ["dataset", "image"]  # on the files that are not named here
EMULATOR = ["rewrite", "emu.o", "cublaslt.o", "truth.o"]  # what the folder of an error in a kernel need not build again
BF16 = ["bf16", "attention", "normalise", "maxpool", "dumps", "same_bytes", "company"]  # in float, which has bf16


def read_table(path):
    """
    [(number of the line, file, original, replacement, real, tests)] from lines `@ file`, `@ file float` or `@ file cuda
    tests`, `- original`, `+ replacement`.
    """
    table, file, original, real, tests = [], None, None, "double", ""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.startswith("@ "):
            words = line[2:].split()
            file, real, tests = words[0], "".join(words[1:2]) or "double", " ".join(words[2:])
        elif line.startswith("- "):
            original = line[2:].strip()
        elif line.startswith("+ ") or line == "+":
            if file is None or original is None:
                sys.exit(f"{path}:{number}: a replacement without file or original before it")
            table.append((number, file, original, line[2:].strip(), real, tests))
            original = None
        elif line.strip() and not line.startswith("#"):
            sys.exit(f"{path}:{number}: neither '@ file', '- original', '+ replacement' nor a comment: {line}")
    return table


def check_table(table):
    """Complaints about entries whose original is not found exactly once; an empty list when all is well."""
    texts = {}
    complaints = []
    for number, file, original, replacement, *_ in table:
        if file not in SOURCES:
            complaints.append(f"dev/mutants.txt:{number}: {file} is not one of the sources")
            continue
        text = texts.setdefault(file, (ROOT / file).read_text())
        count = text.count(original)
        if count != 1:
            complaints.append(f"dev/mutants.txt:{number}: {file}: found {count} times, not once: {original}")
        elif original == replacement:
            complaints.append(f"dev/mutants.txt:{number}: {file}: changes nothing: {original}")
    return complaints


def run_test(command, folder, limit, planted=0):
    """
    The output of a test's program up to its first failure, and what is found (see build_and_test). planted: see
    plant_together.
    """
    environment = dict(os.environ, OMP_NUM_THREADS="1", PLANTED=str(planted))
    output, started = "", time.monotonic()
    with subprocess.Popen(["stdbuf", "-oL", *command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=environment, text=True, errors="replace") as run:
        clock = threading.Timer(limit, run.kill)
        clock.start()
        for line in run.stdout:
            output += line
            if line.lstrip().startswith("FAILED: "):
                run.kill()
                break
        status = run.wait()
        clock.cancel()
    if first_failure(output):
        return "caught", output
    if status < 0:
        late = time.monotonic() - started >= limit
        return "caught", f"FAILED: {command[1]} " + ("does not come to an end" if late else f"ends with signal {-status}")
    if status != 0:
        return "caught", output
    if not re.search(r"^[1-9][0-9]* passed, 0 failed", output, re.MULTILINE):
        return "no such test", f"./test_detr {command[1]} checks nothing:\n{output}"
    return "survives", output


TOKEN = re.compile(r"\s+|\w+|<<=|>>=|[-+*/%&|^!=<>]=|&&|\|\||->|\+\+|--|::|.", re.DOTALL)
ENDS = {"=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "<<=", ">>=", ",", ";", "return"}  # of an expression
DECLARATION = re.compile(r"\s*(?!else)[A-Za-z_][\w:<>, ]*[ *&]+\w+(\[.*?\])? *(=|;|,|\()", re.DOTALL)


def extent(tokens, ends, opens="([{", closes=")]}"):
    """The number of characters before one of `ends`, or before a bracket of `closes` that these tokens do not open."""
    depth = length = 0
    for token in tokens:
        depth += (token in opens) - (token in closes)
        if depth < 0 or depth == 0 and token in ends:
            return length
        length += len(token)
    return length


def is_whole(text, ends):
    tokens = TOKEN.findall(text)
    balance = sum(text.count(bracket) for bracket in "([{") - sum(text.count(bracket) for bracket in ")]}")
    return extent(tokens, ends) == len(text) and balance == 0


def choice(text, start, end, error):
    """
    (start, end, error, form) of the expression, or else the statement, that an error in text[start:end] is in: what form
    makes of the error and the original is C++ that chooses when it runs. None if it is in neither. A text without
    comments.
    """
    old, new = TOKEN.findall(text[start:end]), TOKEN.findall(error)
    same = [0, 0]  # tokens at the beginning and at the end
    for side, step in ((0, 1), (1, -1)):
        while same[side] + same[1 - side] < min(len(old), len(new)) and old[::step][same[side]] == new[::step][same[side]]:
            same[side] += 1
    for ends, form in ((ENDS, "({} ? ({}) : ({}))"), ({";"}, "if ({}) {{ {}; }} else {{ {}; }}")):
        for left, right in ((i, j) for i in range(same[0], -1, -1) for j in range(same[1], -1, -1)):
            first, last = start + len("".join(old[:left])), end - len("".join(old[len(old) - right:]))
            wrong = "".join(new[left:len(new) - right])
            if not is_whole(text[first:last], ends) or not is_whole(wrong, ends):
                continue
            before, after = TOKEN.findall(text[max(0, first - 4000):first])[::-1], TOKEN.findall(text[last:last + 4000])
            begin, stop = first - extent(before, ends | {"}"}, ")]", "([{"), last + extent(after, ends)
            begin += len(re.match(r"\s*(else\b\s*)?", text[begin:])[0])
            whole, wrong = text[begin:stop], text[begin:first] + wrong + text[last:stop]
            if DECLARATION.match(whole):
                continue
            if ends is ENDS and wrong.strip() and not re.match(r"(if|for|while)\b", whole):
                return begin, stop, wrong, form
            if ends is not ENDS and "{" not in whole and re.match(r";(?!\s*else\b)", text[stop:]):
                return begin, stop + 1, wrong, form
    return None


def plain(text):
    """A text of the same length, comments, strings and the preprocessor's lines blanked; such a line ends a statement."""
    pieces = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^#[^\n]*'
    blank = lambda found: re.sub(r"[^\n]", " ", found[0][:-1]) + (";" if found[0][0] == "#" else " ")
    return re.sub(pieces, blank, text, flags=re.MULTILINE | re.DOTALL)


def plant_together(text, table):
    """
    Plants as many of these errors in a source as can be without one lying in another, each to be chosen by its number in
    the environment's PLANTED. Returns the source, its entries, and the lines that each changes: {number: (first, last)}.
    """
    masked, pieces, planted = plain(text), [], []
    for entry in table:
        start = text.index(entry[2])
        piece = choice(masked, start, start + len(entry[2]), plain(entry[3]))
        if piece and all(piece[1] <= other[0] or other[1] <= piece[0] for other in pieces):
            pieces.append((*piece, entry[0]))
            planted.append(entry)
    lines = {}
    for first, last, error, form, number in sorted(pieces, reverse=True):
        lines[number] = text.count("\n", 0, first) + 1, text.count("\n", 0, last) + 1
        original = text[first:last].rstrip(";") if form.startswith("if") else text[first:last]
        text = text[:first] + form.format(f"planted == {number}", re.sub(r"\s+", " ", error), original) + text[last:]
    include = '#include "train_detr.c"'  # in front of which nothing is planted
    variable = 'static const int planted = getenv("PLANTED") ? atoi(getenv("PLANTED")) : 0;'
    line = text.count("\n", 0, text.index(include)) + 2
    return text.replace(f"{include}\n", f"{include}\n{variable}\n#line {line}\n"), planted, lines


def make_folder(name, changed):
    """A folder under build/mutants with the sources, of which those in changed, {file: text}, are others."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    (folder / "program").mkdir()
    for source in SOURCES:
        shutil.copy2(ROOT / source, folder / source)
    for file, text in changed.items():
        (folder / file).write_text(text)
    (folder / "dev").symlink_to(ROOT / "dev")
    (folder / "data" / "bccd").symlink_to(ROOT / "data" / "bccd")
    (folder / "Makefile").symlink_to(ROOT / "Makefile")
    if (ROOT / "build" / "emu" / "rewrite").exists():  # for errors in kernels
        shutil.copytree(ROOT / "build" / "emu", folder / "build" / "emu",
                        ignore=lambda _, names: set(names) - set(EMULATOR))
        (folder / "build" / "cuda-headers").symlink_to(ROOT / "build" / "cuda-headers")
    return folder


def build_together(table):
    """
    Builds one program with as many of these errors as go into one: its folder, and the entries that are in it. A minute.
    """
    name, failed = "train_detr.cu", []
    command = ["make", "build/emu/test_detr-kernels.o", "EMU_OPTIMIZE=-fsyntax-only -fmax-errors=0"]
    while True:
        table = [entry for entry in table if entry[1] == name and entry not in failed]
        text, planted, lines = plant_together((ROOT / name).read_text(), table)
        folder = make_folder("together", {name: text})
        built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        wrong = {int(line) for line in re.findall(name + r":(\d+):\d+: error:", built.stderr)}
        bad = [entry for entry in planted if any(lines[entry[0]][0] <= line <= lines[entry[0]][1] for line in wrong)]
        if built.returncode != 0 and not bad:
            sys.exit(f"errors planted together do not compile:\n{built.stderr[-3000:]}")
        failed += bad
        if built.returncode == 0:
            subprocess.run(["make", "-s", "EMU_OPTIMIZE=-O1", "build/emu/test_detr"], cwd=folder, check=True)
            return folder, planted


def run_tests(program, tests, folder, limit, planted=0):
    """What run_test says of the first of these tests that fails, or of the last."""
    for test in tests:
        verdict, output = run_test([program, test], folder, limit, planted)
        if verdict != "survives":
            break
    return verdict, output


def build_and_test(name, file, original, replacement, real, first_tests, limit):
    """
    Plants one error and returns (verdict, seconds, last lines of output). File None: the program as it is; limit 0: only
    asks the compiler whether it is C.
    """
    start = time.monotonic()
    folder = make_folder(name, {file: (ROOT / file).read_text().replace(original, replacement)} if file else {})
    command = shlex.split(os.environ.get("CC", "cc")) + shlex.split(os.environ.get("CPPFLAGS", "")) + FLAGS
    command += [f"-DREAL={real}", "test_detr.c"] + (["-o", "test_detr"] if limit else ["-fsyntax-only"])
    command += shlex.split(os.environ.get("LDFLAGS", "")) + LIBRARIES
    program, tests = "./test_detr", BF16 if real == "float" else TESTS.get(file, OTHER)
    if real == "cuda":
        command = ["make", "EMU_OPTIMIZE=-O0", "build/emu/test_detr"]
        program, tests = "build/emu/test_detr", first_tests.split() + [""]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if built.returncode != 0:
        return "does not compile", time.monotonic() - start, built.stderr[-2000:]
    if not limit:
        return "not planted", time.monotonic() - start, ""
    verdict, output = run_tests(program, tests, folder, limit)
    shutil.rmtree(folder, ignore_errors=True)
    return verdict, time.monotonic() - start, output


def first_failure(output):
    found = re.search(r"FAILED: (.{1,90})", output)
    return found.group(1) if found else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="errors tried at the same time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="only compile what has not begun by then")
    parser.add_argument("--only", default="", help="only entries that contain this text")
    parser.add_argument("--cuda", action="store_true", help="errors in CUDA kernels instead of the others")
    parser.add_argument("--list", action="store_true", help="check the table against the sources and print it")
    arguments = parser.parse_args()

    table = read_table(ROOT / "dev" / "mutants.txt")
    complaints = check_table(table)
    for complaint in complaints:
        print(complaint)
    table = [entry for entry in table if arguments.only in " ".join(entry[1:])]
    if arguments.list or complaints:
        for number, file, original, replacement, *_ in table if arguments.list else []:
            print(f"{number}: {file}: {original.strip()}  ->  {replacement.strip()}")
        print(f"{len(table)} errors in the table, {len(complaints)} of them not as the sources are")
        return 1 if complaints else 0

    table = [entry for entry in table if (entry[4] == "cuda") == arguments.cuda]
    if arguments.cuda:
        subprocess.run(["make", "-s", "-C", str(ROOT), "EMU_OPTIMIZE=-O0"] + [f"build/emu/{name}" for name in EMULATOR], check=True)
    end = time.monotonic() + 60 * arguments.minutes
    longest = 0
    together, in_it = build_together(table) if arguments.cuda else (None, [])
    for real in sorted({entry[4] for entry in table}):
        start = time.monotonic()
        if real == "cuda":
            verdict, output = run_test(["build/emu/test_detr", ""], together, 3600)
            seconds = time.monotonic() - start
        else:
            verdict, seconds, output = build_and_test("original", None, "", "", real, "", 3600)
        longest = max(longest, seconds)
        if verdict != "survives":
            print(output[-2000:])
            print(f"the tests in {real} do not pass on the program as it is ({verdict}): no error can be judged")
            return 1
    limit = max(60.0, 10 * longest)
    print(f"the program as it is: passes in {longest:.0f} s; {len(table)} errors, {arguments.jobs} at a time", flush=True)

    if arguments.minutes < float("inf"):
        random.Random("".join((ROOT / source).read_text() for source in SOURCES)).shuffle(table)

    def try_error(entry):
        if entry in in_it and time.monotonic() < end:
            start = time.monotonic()
            verdict, output = run_tests("build/emu/test_detr", entry[5].split() + [""], together, limit, entry[0])
            return verdict, time.monotonic() - start, output
        return build_and_test(f"line{entry[0]}", *entry[1:], limit if time.monotonic() < end else 0)

    caught = left = 0
    missed = []  # said again at the end, where a log is looked at first
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = {}
        for entry in table:
            jobs[pool.submit(try_error, entry)] = entry
        for job in concurrent.futures.as_completed(jobs):
            number, file, original, replacement, *_ = jobs[job]
            verdict, seconds, output = job.result()
            what = f"{number}: {file}: {original.strip()}  ->  {replacement.strip()}"
            if verdict == "not planted":
                left += 1
            elif verdict.startswith("caught"):
                caught += 1
                print(f"{verdict:8s} {seconds:4.0f} s  {what}   [{first_failure(output)}]", flush=True)
            else:
                missed.append(f"{verdict.upper()} {seconds:4.0f} s  {what}")
                print(missed[-1] if verdict == "survives" else f"{missed[-1]}\n{output[-1500:]}", flush=True)
    if missed:
        print("not caught, once more:", *missed, sep="\n")
    print(f"mutants: {caught} caught, {len(missed)} not, {left} not planted: time was up")
    print(f"{caught} passed, {len(missed)} failed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
