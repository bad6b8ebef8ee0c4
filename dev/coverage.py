#!/usr/bin/env python3
"""
Which lines of the trainer no test runs (make coverage): gcov's counts over all programs that were built with --coverage,
put together line by line, beside dev/coverage.txt, which names the lines that may stay so and says why.

    dev/coverage.py FOLDER...    folders that hold .gcda files

Prints a table by file, then what is not covered and not in that list. Exit status 1: such a line, a piece in the list that
fits no line any more, or less than LEAST percent in all.
"""
import collections
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIST = ROOT / "dev" / "coverage.txt"
LEAST = 95  # percent of all lines, those in the list not taken off


def measured(name):
    return name in ("train_detr.c",) or (name.startswith(("data/", "program/")) and name.endswith(".h") and "/test_" not in name)


def counts(folders):
    """{file: {line number: (times it ran, function)}}"""
    lines = collections.defaultdict(dict)
    for folder in folders:
        for gcda in sorted(pathlib.Path(folder).resolve().glob("*.gcda")):
            said = subprocess.run(["gcov", "--json-format", "--stdout", str(gcda)], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
            for document in said.splitlines():
                for file in json.loads(document)["files"]:
                    path = (ROOT / file["file"]).resolve()
                    name = str(path.relative_to(ROOT)) if ROOT in path.parents else ""
                    if not measured(name):
                        continue
                    for line in file["lines"]:
                        before = lines[name].get(line["line_number"], (0, ""))
                        lines[name][line["line_number"]] = (before[0] + line["count"], line.get("function_name", ""))
    return lines


def excuses():
    """[(file, piece of a line), ...] in the list's order"""
    found, file = [], None
    for line in LIST.read_text().splitlines():
        if line.startswith("@ "):
            file = line[2:].strip()
        elif line.startswith("- "):
            found.append((file, line[2:]))
    return found


def main():
    lines = counts(sys.argv[1:])
    listed = excuses()
    used, bad, totals = set(), [], [0, 0, 0]
    print(f"{'file':28} lines   run      %  listed")
    for name in sorted(lines):
        source = (ROOT / name).read_text().splitlines()
        missing = [number for number in sorted(lines[name]) if lines[name][number][0] == 0]
        unlisted = []
        for number in missing:
            fits = [i for i, (file, piece) in enumerate(listed) if file == name and piece in source[number - 1]]
            used.update(fits)
            if not fits:
                unlisted.append(number)
        all_lines, ran = len(lines[name]), len(lines[name]) - len(missing)
        print(f"{name:28} {all_lines:5} {ran:5} {100 * ran / all_lines:6.1f} {len(missing) - len(unlisted):7}")
        totals = [totals[0] + all_lines, totals[1] + ran, totals[2] + len(missing) - len(unlisted)]
        bad += [f"{name}:{number}: {source[number - 1].strip()}" for number in unlisted]
    share = 100 * totals[1] / max(1, totals[0])
    print(f"{'all':28} {totals[0]:5} {totals[1]:5} {share:6.1f} {totals[2]:7}")
    if bad:
        print(f"\nnot run by any test, and not in {LIST.relative_to(ROOT)}:", *bad, sep="\n")
    stale = [f"{file}: {piece}" for i, (file, piece) in enumerate(listed) if i not in used]
    if stale:
        print(f"\nin {LIST.relative_to(ROOT)}, but run, or not there:", *stale, sep="\n")
    failed = len(bad) + len(stale) + (share < LEAST)
    print(f"\n{totals[1]} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
