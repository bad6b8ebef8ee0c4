#!/usr/bin/env python3
"""
A training of hours, watched from outside: does it take more memory, open more files or get slower as it goes on?

Trains on data/bccd as a user would, with pictures of mixed sizes, an evaluation after each epoch and a checkpoint every
50 steps, and notes every ten seconds what /proc says of the process. When the time is over it asks the program to stop
(SIGTERM), which must save its state and end with status 0.

    dev/soak.py OUT [--hours 2] [--program ./train_detr] [--data data/bccd] [flags of train]
    dev/soak.py --draw OUT [--picture FILE]         once more the picture, and the verdict, of a run that is over or still going

    OUT/run        the training's --output_dir
    OUT/train.txt  what it printed
    OUT/soak.csv   seconds, resident_kib, descriptors, threads, processor_s, pictures, pictures_processor_s
    OUT/soak.png   the same as a picture (needs matplotlib: dev/requirements-bench.txt; without it there is only the table)

Speed is in pictures of the training per second of processor time, since on a machine that others use the clock says
little; evaluation and checkpoints are in it. `pictures` were trained on when the process had used
`pictures_processor_s`: the program says how far it is every ten seconds.

Ends with "N passed, N failed": the program stopped as it should; memory in the last quarter of the time is within 1 % of
that in the first, both as means, since a single sample swings by 3 % with the sizes of the pictures that are read ahead,
and without the first two minutes, before which there was no evaluation; no more descriptors or threads than in the first;
and at least 90 % of its speed, which programs beside it on the machine change by some per cent.
"""
import argparse
import csv
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["seconds", "resident_kib", "descriptors", "threads", "processor_s", "pictures", "pictures_processor_s"]
TRAIN = "--train_split trainval --split test --preset small --vflip --transpose --save_steps 50 --epochs 100000".split()
TICKS = os.sysconf("SC_CLK_TCK")
WARM_SECONDS = 120
EVERY = 10  # seconds between two samples


def processor_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def sample(pid):
    """resident_kib, descriptors, threads and processor_s of a process; None if it is over."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return [int(status["VmRSS"].split()[0]), len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]),
                processor_seconds(pid)]
    except (OSError, KeyError):
        return None


def follow(process, kept, progress):
    """Keeps what the program prints; notes in `progress` the steps it has taken and the processor time it took them."""
    for line in process.stdout:
        kept.write(line)
        kept.flush()
        if found := re.search(r"  step (\d+)/", line):
            try:
                progress.update(step=int(found[1]), processor=processor_seconds(process.pid))
            except (OSError, IndexError):
                pass


def watch(arguments, flags):
    """Runs the training for as long as asked for. Returns its status."""
    out = arguments.out
    out.mkdir(parents=True)
    command = [arguments.program, "train", "--data", arguments.data, "--output_dir", out / "run", *TRAIN, *flags]
    with open(out / "train.txt", "w") as kept, open(out / "soak.csv", "w", newline="") as table:
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        progress = {"step": 0, "processor": 0}
        reader = threading.Thread(target=follow, args=(process, kept, progress))
        reader.start()
        writer = csv.writer(table)
        writer.writerow(COLUMNS)
        begin, batch = time.monotonic(), int(dict(zip(flags, flags[1:])).get("--batch_size", 4))
        while process.poll() is None and time.monotonic() - begin < 3600 * arguments.hours:
            if row := sample(process.pid):
                now = progress.copy()
                writer.writerow([f"{time.monotonic() - begin:.1f}", *row, batch * now["step"], now["processor"]])
                table.flush()
            time.sleep(EVERY)
        process.send_signal(signal.SIGTERM)  # if it is over already, nobody hears it
        status = process.wait()
        reader.join()
    return status


def read(out):
    with open(out / "soak.csv", newline="") as table:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(table)]


def speeds(rows, least=120):
    """(seconds, pictures per second of processor time) of pieces of at least so many processor seconds."""
    found, last = [], None
    for row in rows:
        if row["pictures"] == 0:
            continue
        last = last or row
        spent = row["pictures_processor_s"] - last["pictures_processor_s"]
        if spent >= least:
            found.append(((row["seconds"] + last["seconds"]) / 2, (row["pictures"] - last["pictures"]) / spent))
            last = row
    return found


def draw(rows, path):
    try:
        import matplotlib
    except ImportError:
        print(f"no picture: matplotlib is missing ({sys.executable} -m pip install -r dev/requirements-bench.txt)")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot
    minutes = [row["seconds"] / 60 for row in rows]
    figure, (memory, files, speed) = pyplot.subplots(3, 1, sharex=True, figsize=(8, 7), layout="constrained")
    memory.plot(minutes, [row["resident_kib"] / 1024 for row in rows])
    memory.set_ylabel("resident memory, MiB")
    files.plot(minutes, [row["descriptors"] for row in rows], label="open descriptors")
    files.plot(minutes, [row["threads"] for row in rows], label="threads")
    files.legend()
    pieces = speeds(rows)
    speed.plot([seconds / 60 for seconds, _ in pieces], [value for _, value in pieces])
    speed.set_ylabel("pictures / processor second")
    speed.set_xlabel(f"minutes; {rows[-1]['pictures']:.0f} pictures in {rows[-1]['processor_s'] / 60:.0f} processor minutes")
    for axes in (memory, files, speed):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    print(f"picture    {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hours", type=float, default=2)
    parser.add_argument("--program", default=ROOT / "train_detr")
    parser.add_argument("--data", default=ROOT / "data" / "bccd")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--picture", type=Path)
    arguments, flags = parser.parse_known_args()
    picture = arguments.picture or arguments.out / "soak.png"
    status = None if arguments.draw else watch(arguments, flags)
    rows = read(arguments.out)
    settled, pieces = [row for row in rows if row["seconds"] >= WARM_SECONDS], speeds(rows)
    if len(pieces) < 4 or len(settled) < 4:
        sys.exit(f"too short a run to say something: {arguments.out / 'train.txt'}")
    draw(rows, picture)
    first, last = settled[:len(settled) // 4], settled[-(len(settled) // 4):]
    mean = lambda part: sum(row["resident_kib"] for row in part) / len(part) / 1024
    usual = lambda part, what: statistics.median(row[what] for row in part)  # more for moments: a checkpoint, an evaluation
    quarter = len(pieces) // 4
    first_speed, last_speed = (sum(value for _, value in part) / quarter for part in (pieces[:quarter], pieces[-quarter:]))
    checks = [
        (f"{mean(first):.1f} MiB in the first quarter, {mean(last):.1f} MiB in the last, after {rows[-1]['pictures']:.0f} pictures",
         abs(mean(last) / mean(first) - 1) <= 0.01),
        (f"{usual(first, 'descriptors'):.0f} descriptors and {usual(first, 'threads'):.0f} threads, then "
         f"{usual(last, 'descriptors'):.0f} and {usual(last, 'threads'):.0f}",
         all(usual(last, what) <= usual(first, what) for what in ("descriptors", "threads"))),
        (f"{first_speed:.2f} pictures a processor second in the first quarter, {last_speed:.2f} in the last",
         last_speed >= 0.9 * first_speed)]
    if status is not None:
        checks.append((f"status {status} after SIGTERM", status == 0))
    for what, good in checks:
        print("ok     " if good else "FAILED ", what)
    failed = sum(not good for _, good in checks)
    print(f"{len(checks) - failed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
