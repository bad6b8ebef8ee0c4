#!/usr/bin/env python3
"""
Which lines of the trainer no test runs (make coverage): the counts that programs built with --coverage have left, put
together line by line, beside dev/coverage.txt, which names the lines that may stay so and says why.

    dev/coverage.py FOLDER      with the .gcno and .gcda files

Prints a table by file, with the lines that nothing ran. A line that is not compiled, for other processors, is not counted.
Such a line that dev/coverage.txt does not name, a piece there that stands in no line of its file, and a share below LEAST
percent are failures. Needs gcov. Ends with "N passed, N failed", a check being a line.
"""
import collections
import json
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIST = ROOT / "dev" / "coverage.txt"
MEASURED = re.compile(r"train_detr\.c|(data|program)/(?!test_)\w+\.h")
LEAST = 95  # percent of all lines, those in the list among them


def counts(folder):
    """{file: {number of a line: how often it ran}}"""
    lines = collections.defaultdict(collections.Counter)
    for path in sorted(folder.resolve().glob("*.gcda")):
        said = subprocess.run(["gcov", "--json-format", "--stdout", path], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        for file in json.loads(said)["files"]:
            name = os.path.relpath(ROOT / file["file"], ROOT)
            if MEASURED.fullmatch(name):
                for line in file["lines"]:
                    lines[name][line["line_number"]] += line["count"]
    return lines


def reasons():
    """
    {(file, piece of a line)} from lines `@ file`, or `@ *` for all of them, and `- piece`; what begins with # is the reason
    for what follows it.
    """
    found, file, reason = set(), None, False
    for number, line in enumerate(LIST.read_text().splitlines(), 1):
        if line.startswith("@ "):
            file, reason = line[2:].strip(), False
        elif line.startswith("# "):
            reason = True
        elif line.startswith("- ") and file and reason:
            found.add((file, line[2:].strip()))
        elif line.strip():
            sys.exit(f"{LIST}:{number}: neither '@ file', a '# reason' nor, behind both, a '- piece': {line}")
    return found


def ranges(numbers):
    """[1, 2, 3, 7] as "1-3 7"."""
    runs = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def main():
    lines, listed = counts(pathlib.Path(sys.argv[1])), reasons()
    unexplained, total, ran = [], 0, 0
    print(f"{'file':24} {'lines':>6} {'run':>6} {'%':>6}  not run")
    for name in sorted(lines):
        source = (ROOT / name).read_text().splitlines()
        missing = sorted(number for number, count in lines[name].items() if count == 0)
        for number in missing:
            line = source[number - 1 - (source[number - 1].strip() == "}")]
            if not any(file in (name, "*") and piece in line for file, piece in listed):
                unexplained.append(f"{name}:{number}: {source[number - 1].strip()}")
        total, ran = total + len(lines[name]), ran + len(lines[name]) - len(missing)
        print(f"{name:24} {len(lines[name]):6} {len(lines[name]) - len(missing):6} "
              f"{100 - 100 * len(missing) / len(lines[name]):6.1f}  {ranges(missing)}")
    print(f"{'all':24} {total:6} {ran:6} {100 * ran / max(1, total):6.1f}")
    texts = {name: (ROOT / name).read_text() for name in lines}
    stale = sorted((file, piece) for file, piece in listed
                   if not any(piece in text for name, text in texts.items() if file in (name, "*")))
    for what, found in ("run by no test, and without a reason in dev/coverage.txt", unexplained), \
                       ("in dev/coverage.txt, but in no such file", [f"{file}: {piece}" for file, piece in stale]):
        if found:
            print(f"\n{what}:", *found, sep="\n")
    low = 100 * ran < LEAST * total
    if low:
        print(f"\nless than {LEAST} %")
    failed = len(unexplained) + len(stale) + low
    print(f"\n{total - len(unexplained)} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
