#!/usr/bin/env python3
"""
State survives (make survive): a small training is killed, stopped, robbed of its disk, its memory and its checkpoint in
many ways. Each time it must say what is wrong, go on with the very command that it names, and end with the same bytes
as a run that nothing happened to.

    kills         SIGKILL at random moments, every other one while a checkpoint is being written
    calls         SIGKILL before each single system call of a checkpoint's writing; then each of them fails once, with a
                  full disk or a disk error (needs strace)
    signals       SIGTERM, SIGINT and SIGHUP: the step is finished, the state saved, status 0
    disk          a disk that is full: a small tmpfs (in a namespace of its own; where that is not allowed, it is left out
                  and said so), files that may not grow (RLIMIT_FSIZE), /dev/full as every kind of output
    read-only     an output folder that cannot be written to
    lock          a second run on the same folder; a lock whose process was killed
    damage        each file of a checkpoint cut short and with flipped bits, at any place
    readers       eval and predict beside a training that saves after each step
    memory        resident memory after 20 steps and after 1000 of pictures of mixed sizes; a network that does not fit

    dev/survive.py [--quick] [--kills 100] [--only NAME,...] [--program ./train_detr] [--seed N]

--quick takes a sample of each. Needs Python's standard library, some pictures of data/bccd, and
on one core about ten minutes. Prints what was done and what came of it, and ends with "N passed, N failed".
"""
import argparse
import hashlib
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BCCD, OUT = ROOT / "data" / "bccd", ROOT / "build" / "survive"
# What keeps something from step to step, from epoch to epoch or from picture to picture is on.
FLAGS = """--backbone tiny --enc_layers 1 --dec_layers 2 --dim_feedforward 64 --hidden_dim 32 --nheads 4 --num_queries 20
           --short_side 64 --max_size 96 --batch_size 4 --num_workers 1 --lr_schedule cosine --warmup_steps 3 --ema 0.9
           --patience 9 --scales 0.3 --vflip --transpose --norm_init track --save_steps 1""".split()
STEPS, STEPS_PER_EPOCH = 12, 3
SET = ["config.json", "preprocessor_config.json", "model.safetensors", "optimizer.safetensors", "ema.safetensors",
       "trainer_state.json", "log.txt"]
GO_ON = re.compile(r"go on with  (.*)")
passed = failed = 0


def check(good, what):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    if not good:
        print(f"FAILED   {what}", flush=True)
    return good


class Row:
    """A line of the table: checks are counted while it is open."""

    def __init__(self, what):
        self.what, self.notes = what, ""

    def __enter__(self):
        self.begin, self.failed = time.monotonic(), failed
        return self

    def __exit__(self, *error):
        state = "ok     " if failed == self.failed else "FAILED "
        print(f"{state}  {self.what}: {self.notes} ({time.monotonic() - self.begin:.1f} s)", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Runs

def make_data():
    """12 pictures to train on, 6 to evaluate on, as a Pascal VOC folder."""
    names = sorted(path.stem for path in (BCCD / "JPEGImages").iterdir())
    (OUT / "data" / "ImageSets" / "Main").mkdir(parents=True)
    for folder in ("JPEGImages", "Annotations"):
        (OUT / "data" / folder).symlink_to(BCCD / folder)
    for split, part in (("train", names[0:240:20]), ("val", names[10:130:20])):
        (OUT / "data" / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(part) + "\n")


def place(name, start=None):
    """An empty folder in which a run has its `out`; start: a folder whose out it gets."""
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if start:
        shutil.copytree(start / "out", folder / "out")
    return folder


def train(*flags):
    return [PROGRAM, "train", *map(str, flags)]


BEGIN = ["--data", "../data", "--output_dir", "out", *FLAGS, "--epochs", STEPS // STEPS_PER_EPOCH]


def next_command(folder):
    """How somebody would go on with what is there: by --resume, or from the start if there is no checkpoint yet."""
    there = any((folder / "out" / sub / "trainer_state.json").exists() for sub in (".", ".commit"))
    return train("--resume", "out") if there else train(*BEGIN)


def run(folder, command, **more):
    more = {"shell": isinstance(command, str), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **more}
    return subprocess.run(command if more["shell"] else list(map(str, command)), cwd=folder, text=True, errors="replace",
                          env=ENVIRONMENT, timeout=300, **more)


def start(folder, command):
    return subprocess.Popen(list(map(str, command)), cwd=folder, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, preexec_fn=hear_signals)


def hear_signals():
    """Under nohup, or as a shell's background job, this script ignores some signals, and a program would inherit that."""
    for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL)


def errors(output):
    return [line for line in output.splitlines() if line.startswith("error: ")]


def content(folder):
    """What must be the same bytes: every file of the checkpoint and of the best one, log.txt without its times."""
    files = {}
    for sub in ("out", "out/best"):
        for name in SET:
            path = folder / sub / name
            text = path.read_bytes() if path.exists() else None
            files[f"{sub}/{name}"] = re.sub(rb', "seconds": [0-9.]*}', b"}", text) if name == "log.txt" and text else text
    return files


def sums_hold(folder):
    """Are the checksums those of the files? Reckoned by Python, in files as a reader finds them."""
    at = lambda name: folder / ".commit" / name if (folder / ".commit" / name).exists() else folder / name
    try:
        lines = at("SHA256SUMS").read_text().splitlines()
        named = [line.split("  ") for line in lines]
        return {name for _, name in named} >= set(SET) - {"ema.safetensors"} and all(
            hashlib.sha256(at(name).read_bytes()).hexdigest() == value for value, name in named)
    except OSError:
        return False


def same_end(folder, what):
    """Is this finished run's every byte that of the undisturbed one, and nothing half-written left?"""
    now = content(folder)
    different = [name for name in REFERENCE if now[name] != REFERENCE[name]]
    left = [name for sub in ("out", "out/best") for name in (".next", ".commit", ".old") if (folder / sub / name).exists()]
    good = check(not different, f"{what}: {', '.join(different)} differ from the undisturbed run's ({folder})")
    good &= check(not left, f"{what}: {', '.join(left)} left behind ({folder})")
    good &= check(sums_hold(folder / "out") and sums_hold(folder / "out" / "best"), f"{what}: checksums ({folder})")
    if good:
        shutil.rmtree(folder)


def finish(folder, what, command=None):
    """Goes on to the end, with `command` if given, and compares."""
    done = run(folder, command or next_command(folder))
    if check(done.returncode == 0, f"{what}: going on ended with status {done.returncode}: {done.stdout[-300:]} ({folder})"):
        same_end(folder, what)


def go_on(folder, output, what):
    """As finish, with the command that the program has named."""
    named = GO_ON.search(output)
    if check(named, f"{what}: no command to go on with in: {output[-300:]} ({folder})"):
        finish(folder, what, named[1])


# ----------------------------------------------------------------------------------------------------------------------
# Killed and stopped

WRITING = (".next", ".old", ".commit", "best/.next", "best/.commit")


def kills():
    with Row("SIGKILL at random moments") as row:
        fell = dict.fromkeys(("before the first checkpoint", "between checkpoints", *WRITING), 0)
        total = starts = runs = 0
        while total < options.kills:
            folder, here = place("kill"), 0
            runs += 1
            while here < 5 and total < options.kills:
                process = start(folder, next_command(folder))
                starts += 1
                time.sleep(random.uniform(0, SECONDS))
                if starts % 2:  # then wait until a checkpoint is being written, and a little
                    while process.poll() is None and not any((folder / "out" / name).exists() for name in WRITING):
                        time.sleep(0.0001)
                    time.sleep(random.uniform(0, 0.1))
                process.kill()
                output = process.communicate()[0]
                if process.returncode != -signal.SIGKILL:  # it was at its end before
                    check(process.returncode == 0, f"kill {total}: {output[-300:]}")
                    break
                total, here = total + 1, here + 1
                there = [name for name in WRITING if (folder / "out" / name).exists()]
                saved = any((folder / "out" / sub / "trainer_state.json").exists() for sub in (".", ".commit"))
                fell[there[-1] if there else "between checkpoints" if saved else "before the first checkpoint"] += 1
                if saved:
                    check(sums_hold(folder / "out"), f"kill {total}: what is left is not whole ({folder})")
            finish(folder, f"kill {total}")
        row.notes = f"{total} in {runs} runs; fell " + ", ".join(
            f"{count} {'while there was ' * (name in WRITING)}{name}" for name, count in fell.items() if count)


def signals():
    with Row("SIGTERM, SIGINT, SIGHUP") as row:
        count = 6 if options.quick else 45
        stopped = starts = 0
        while stopped < count and starts < 4 * count:
            folder = place("signal")
            process = start(folder, next_command(folder))
            starts += 1
            first = process.stdout.readline()  # from here on signals are heard
            time.sleep(random.uniform(0, SECONDS))
            process.send_signal((signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[stopped % 3])
            output = first + process.communicate()[0]
            what = f"signal {starts}"
            if not check(process.returncode == 0, f"{what}: status {process.returncode}: {output[-300:]}"):
                continue
            if "stopped at step" not in output:
                same_end(folder, what)
                continue
            stopped += 1
            step = int(re.search(r"stopped at step (\d+)", output)[1])
            state = json.loads((folder / "out" / "trainer_state.json").read_text())["step"]
            check(step == state, f"{what}: stopped at step {step}, but {state} is saved")
            go_on(folder, output, what)
        check(stopped == count, f"only {stopped} of {starts} signals came before the end")
        row.notes = f"{count}: status 0, and the command to go on with"


def calls():
    """Every call that a checkpoint's writing consists of, in its order: (name, which of that name)."""
    with Row("system calls of a checkpoint") as row:
        if not shutil.which("strace"):
            row.notes = "left out: strace is missing (apt-get install strace)"
            return
        names = "mkdir,openat,write,fsync,link,rename,unlink,rmdir"
        folder = place("calls", MIDDLE)
        strace = ["strace", "-f", "-qq"]
        traced = run(folder, [*strace, "-o", "trace", "-e", f"trace={names}", *train("--resume", "out")])
        if traced.returncode != 0:
            row.notes = f"left out: strace cannot trace here: {traced.stdout[-200:]}"
            return
        lines = (folder / "trace").read_text().splitlines()
        main = lines[0].split()[0]
        counts, found, writing = {}, [], False
        for line in lines:
            call = re.match(rf"{main} +(\w+)\((.*)", line)
            if not call:
                continue
            name, arguments = call.groups()
            counts[name] = counts.get(name, 0) + 1
            writing |= name == "mkdir" and "out/.next" in arguments
            if writing and not (name == "write" and arguments[0] in "12"):
                found.append((name, counts[name], arguments))
            if name == "rmdir" and "out/.commit" in arguments and writing:
                break
        every = 12 if options.quick else 1
        for name, which, arguments in found[random.randrange(every)::every]:
            what = f"SIGKILL before {name}({arguments[:60]}"
            folder = place("calls", MIDDLE)
            run(folder, [*strace, "-o", "/dev/null", "-e", "trace=none", "-e", f"inject={name}:signal=KILL:when={which}",
                         *train("--resume", "out")])
            check(sums_hold(folder / "out"), f"{what}: what is left is not whole")
            finish(folder, what)
            error = "ENOSPC" if name in ("mkdir", "openat", "write", "link") else "EIO"
            what = f"{error} from {name}({arguments[:60]}"
            folder = place("calls", MIDDLE)
            done = run(folder, [*strace, "-o", "/dev/null", "-e", "trace=none", "-e", f"inject={name}:error={error}:when={which}",
                                *train("--resume", "out")])
            check(sums_hold(folder / "out"), f"{what}: what is left is not whole")
            if done.returncode == 0:
                same_end(folder, what)
            elif check(done.returncode == 1 and len(errors(done.stdout)) == 1, f"{what}: {done.stdout[-300:]}"):
                go_on(folder, done.stdout, what)
        row.notes = f"{len(found)} calls, {len(found[::every])} of them killed before, and failed once"


# ----------------------------------------------------------------------------------------------------------------------
# The disk

NAMESPACE = ["unshare", "-rm", "bash", "-c"]


def can_mount():
    try:
        return subprocess.run([*NAMESPACE, "mount -t tmpfs none /mnt"], capture_output=True).returncode == 0
    except OSError:
        return False


def disk():
    size = sum((MIDDLE / "out" / name).stat().st_size for name in SET) // 1024 + 1
    with Row("a tmpfs that gets full") as row:
        if not can_mount():
            row.notes = "left out: mounting in a namespace of its own is not allowed here"
        else:
            fulls, befores = 0, 0
            rooms = [0.5, 1.2, 2.3, 3.3] if options.quick else [0.5, 0.9, *(1.05 + 0.15 * i for i in range(22))]
            for number, room in enumerate(rooms):
                folder = place(f"full{number}")
                (folder / "out").mkdir()
                script = (f"mount -t tmpfs -o size={int(size * room)}k none out; {shlex.join(map(str, train(*BEGIN)))} >first 2>&1; "
                          "echo $? >status; ls -A out >listing; mount -o remount,size=1g out; "
                          "command=$(sed -n 's/.*go on with  //p' first); "
                          f"if [ -z \"$command\" ]; then command={shlex.quote(shlex.join(map(str, train(*BEGIN))))}; fi; "
                          "[ \"$(cat status)\" = 0 ] || bash -c \"$command\" >second 2>&1; cp -a out kept; umount out; mv kept/* kept/.[!.]* out")
                run(folder, [*NAMESPACE, script])
                status, output = int((folder / "status").read_text()), (folder / "first").read_text()
                what = f"a disk of {room:.2f} checkpoints"
                if status != 0:
                    fulls += 1
                    befores += "has room for" in output
                    check(status == 1 and len(errors(output)) == 1 and re.search("out.*(No space left|has room for)", errors(output)[0]),
                          f"{what}: {output[-300:]}")
                    check(".next" not in (folder / "listing").read_text().split(), f"{what}: half a checkpoint still takes room")
                same_end(folder, what)
            row.notes = (f"{len(rooms)} sizes from half a checkpoint on: {fulls} ended with status 1, {befores} of them before the "
                         "first step; they went on when there was room")
    with Row("files that may not grow (RLIMIT_FSIZE)") as row:
        stopped = warned = 0
        largest = max((MIDDLE / "out" / name).stat().st_size for name in SET)
        limits = [1000, largest - 1] if options.quick else [1, 700, 1000, 3000, 20000, largest // 2, largest - 1, largest, largest + 1000]
        for limit in limits:
            folder = place("fsize")
            done = run(folder, train(*BEGIN), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
            what = f"files of at most {limit} bytes"
            if done.returncode == 0:  # the report may not fit: that costs a warning
                warned += "warning: out/report.html" in done.stdout
                same_end(folder, what)
            else:
                stopped += 1
                check(done.returncode == 1 and len(errors(done.stdout)) == 1 and "out/" in errors(done.stdout)[0] and
                      "File too large" in errors(done.stdout)[0], f"{what}: {done.stdout[-300:]}")
                finish(folder, what)
        row.notes = f"{len(limits)} limits: {stopped} ended with status 1, {warned} only went without report.html"
    with Row("outputs that cannot be written") as row:
        outputs = 0
        folder = place("outputs", MIDDLE)
        resume, picture = ["--resume", "out"], sorted((BCCD / "JPEGImages").iterdir())[0]
        evaluate, predict = [PROGRAM, "eval", "--data", "../data", *resume], [PROGRAM, "predict", *resume]
        (folder / "results.json").write_text("[]")
        for command, flag in ((evaluate, "json"), (evaluate, "results"), (predict, "json"), (predict, "dump"),
                              ([PROGRAM, "check", "--data", "../data", *FLAGS[:-2]], "json"),
                              ([PROGRAM, "bench", *FLAGS[:14], "--size", "64x96"], "json")):
            for path, why in (("/dev/full", "No space left"), ("file", "File too large"), ("absent/file", "No such file")):
                limit = 100 if path == "file" else resource.RLIM_INFINITY
                done = run(folder, [*command, f"--{flag}", path, *([picture] if command is predict else [])],
                           preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
                outputs += 1
                what = f"{command[1]} --{flag} {path}"
                check(done.returncode == 1 and len(errors(done.stdout)) == 1 and path in errors(done.stdout)[0] and
                      why in errors(done.stdout)[0], f"{what}: status {done.returncode}, {done.stdout[-300:]}")
                check(not (folder / "file").exists(), f"{what}: half a file is left")
        check(Path("/dev/full").exists(), "/dev/full is gone")
        with open("/dev/full", "w") as full:
            done = run(folder, train(*resume), stdout=full, stderr=subprocess.PIPE)
        check(done.returncode == 1 and "standard output" in done.stderr, f"train >/dev/full: {done.stderr[-300:]}")
        same_end(folder, "train >/dev/full")
        row.notes = f"{outputs} named, nothing half-written left; a training whose own output cannot be written goes on to its end"


def read_only():
    with Row("an output folder that is read-only") as row:
        folder = place("read-only", MIDDLE)
        (folder / "empty").mkdir()
        commands = [train(*BEGIN[:2], "--output_dir", "empty", *BEGIN[4:]), train("--resume", "out")]
        reading = [PROGRAM, "predict", "--resume", "out", sorted((BCCD / "JPEGImages").iterdir())[0]]
        if can_mount():
            lock = lambda command: [*NAMESPACE, "for f in out empty; do mount --bind $f $f; mount -o remount,bind,ro $f; done; "
                                    + shlex.join(map(str, command))]
        elif os.geteuid() != 0:
            lock = lambda command: command
            for sub in ("out", "empty"):
                (folder / sub).chmod(0o555)
        else:
            row.notes = "left out: root writes everywhere, and mounting in a namespace of its own is not allowed here"
            return
        for command in commands:
            done = run(folder, lock(command))
            check(done.returncode == 1 and len(errors(done.stdout)) == 1 and
                  re.search("(out|empty): cannot be written to: (Read-only file system|Permission denied)", done.stdout) and
                  "epoch" not in done.stdout, f"read-only: {done.stdout[-300:]}")
        done = run(folder, lock(reading))
        check(done.returncode == 0, f"read-only, predict: {done.stdout[-300:]}")
        for sub in ("out", "empty"):
            (folder / sub).chmod(0o755)
        finish(folder, "read-only")
        row.notes = "refused before the first step; predict reads there"


def lock():
    with Row("a second run on the same folder") as row:
        folder = place("lock", MIDDLE)
        first = start(folder, train("--resume", "out"))
        first.stdout.readline()
        os.kill(first.pid, signal.SIGSTOP)  # so that it is there for as long as it takes
        holder = f"process {first.pid} on {socket.gethostname()}"
        for command in (train("--resume", "out"), train(*BEGIN)):
            done = run(folder, command)
            check(done.returncode == 1 and len(errors(done.stdout)) == 1 and holder in errors(done.stdout)[0],
                  f"a second run: {done.stdout[-300:]}, not {holder}")
        first.kill()
        first.communicate()
        finish(folder, "a lock whose process was killed")
        row.notes = f"refused ({holder}); after SIGKILL the folder is free"


# ----------------------------------------------------------------------------------------------------------------------
# Damage

def damages(size, count):
    """(what, change of the bytes) of a file: cut short, and with one bit flipped."""
    cuts = sorted({0, 1, size // 2, size - 1, *(random.randrange(size) for _ in range(count))})
    bits = sorted({0, 8 * size - 1, *(random.randrange(8 * size) for _ in range(2 * count))})
    for cut in cuts:
        yield f"cut to {cut} of {size} bytes", lambda bytes, cut=cut: bytes[:cut]
    for bit in bits:
        yield (f"bit {bit} flipped", lambda bytes, bit=bit:
               bytes[:bit // 8] + (bytes[bit // 8] ^ 1 << bit % 8).to_bytes(1, "little") + bytes[bit // 8 + 1:])


def damage():
    with Row("a damaged checkpoint") as row:
        total = resumed = 0
        picture = sorted((BCCD / "JPEGImages").iterdir())[0]
        read_by_predict = {"config.json", "preprocessor_config.json", "ema.safetensors", "trainer_state.json"}
        folder = place("damage", MIDDLE)
        for name in [*SET, "SHA256SUMS"]:
            path = folder / "out" / name
            whole = path.read_bytes()
            for number, (what, change) in enumerate(damages(len(whole), 0 if options.quick else 12)):
                what = f"{name} {what}"
                path.write_bytes(change(whole))
                total += 1
                done = run(folder, train("--resume", "out"))
                # A flipped bit of a checksum's own line is seen as a difference of that file.
                named = f"out/{name}" in (errors(done.stdout) or [""])[0]
                if check(done.returncode == 1 and len(errors(done.stdout)) == 1 and named, f"{what}: {done.stdout[-300:]}"):
                    offered = GO_ON.search(done.stdout)
                    check(offered and "out/previous" in offered[1], f"{what}: no older checkpoint is offered: {done.stdout[-300:]}")
                if name in read_by_predict:
                    done = run(folder, [PROGRAM, "predict", "--resume", "out", picture])
                    if check(done.returncode == 1 and f"out/{name}" in done.stdout and "--resume out/previous" in done.stdout,
                             f"{what}, predict: {done.stdout[-300:]}"):
                        if number == 0:
                            check(run(folder, [PROGRAM, "predict", "--resume", "out/previous", picture]).returncode == 0, f"{what}: previous")
                if number == 0 or not options.quick and number % 8 == 0:
                    again = place("damage-resumed", folder)
                    go_on(again, run(again, train("--resume", "out")).stdout, what)
                    resumed += 1
            path.write_bytes(whole)
        row.notes = f"{total} cuts and flipped bits in {len(SET) + 1} files, refused by name; {resumed} went on from the one before"
    with Row("more than one damaged, none, or no checksums") as row:
        folder = place("damage", MIDDLE)
        flip = lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 4]) + path.read_bytes()[1:])
        flip(folder / "out" / "model.safetensors")
        flip(folder / "out" / "previous" / "optimizer.safetensors")
        done = run(folder, train("--resume", "out"))
        check("out/model.safetensors" in done.stdout and "out/best" in done.stdout, f"previous damaged too: {done.stdout[-300:]}")
        best = place("damage-best", folder)
        go_on(best, run(best, train("--resume", "out")).stdout, "the best checkpoint")
        flip(folder / "out" / "best" / "log.txt")
        done = run(folder, train("--resume", "out"))
        check(done.returncode == 1 and "out/model.safetensors" in done.stdout and not GO_ON.search(done.stdout),
              f"all damaged: {done.stdout[-300:]}")
        folder = place("previous", MIDDLE)
        done = run(folder, train("--resume", "out/previous"))
        check(done.returncode == 1 and len(errors(done.stdout)) == 1, f"--resume out/previous: {done.stdout[-300:]}")
        go_on(folder, done.stdout, "--resume out/previous")
        folder = place("no-sums", MIDDLE)
        (folder / "out" / "SHA256SUMS").unlink()
        finish(folder, "a checkpoint without SHA256SUMS")
        folder = place("sums", MIDDLE)
        flip(folder / "out" / "log.txt")
        if shutil.which("sha256sum"):
            done = run(folder / "out", "sha256sum -c SHA256SUMS")
            check(done.returncode == 1 and "log.txt: FAILED" in done.stdout and "model.safetensors: OK" in done.stdout,
                  f"sha256sum -c: {done.stdout[-300:]}")
        row.notes = "the best one is offered, or none; a folder without SHA256SUMS goes on; sha256sum -c says the same"


def readers():
    with Row("readers beside a training that saves after each step") as row:
        folder = place("readers", MIDDLE)
        picture = sorted((BCCD / "JPEGImages").iterdir())[0]
        count = 0
        process = start(folder, train("--resume", "out", "--epochs", 40 if options.quick else 300))
        while process.poll() is None:
            done = run(folder, [PROGRAM, "predict", "--resume", "out", picture])
            count += 1
            check(done.returncode == 0, f"predict beside a training: {done.stdout[-300:]}")
        process.communicate()
        row.notes = f"predict was right {count} times"


# ----------------------------------------------------------------------------------------------------------------------
# Memory

def resident_kib(pid):
    return int(re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


def memory():
    steps = 100 if options.quick else 1000
    with Row(f"resident memory over {steps} steps") as row:
        folder = place("memory")
        # Every 20 steps a checkpoint, whose trainer_state.json says how far the run is.
        begin = [*BEGIN[:-3], 20, "--epochs", 100000, "--steps", steps + 20]
        process = start(folder, train(*begin, "--short_side", 128, "--max_size", 192, "--patience", 0))
        lowest, highest = {}, 0  # MiB; lowest: by the step of the last checkpoint
        while process.poll() is None:
            try:
                step = json.loads((folder / "out" / "trainer_state.json").read_text())["step"]
                resident = resident_kib(process.pid) / 1024
                lowest[step], highest = min(resident, lowest.get(step, resident)), max(resident, highest)
            except (OSError, ValueError, TypeError):
                pass
            time.sleep(0.002)
        output = process.communicate()[0]
        # What is held, of 20 steps the least: pictures that are being read come and go on top of it.
        held = lambda begin: min((least for step, least in lowest.items() if begin <= step < begin + 20), default=0)
        first, last = held(20), held(steps)
        if check(process.returncode == 0 and first and last, f"memory: {sorted(lowest)} {output[-300:]}"):
            check(abs(last / first - 1) <= 0.01, f"memory: {first:.2f} MiB after 20 steps, {last:.2f} MiB after {steps}")
            row.notes = f"{first:.2f} MiB after 20, {last:.2f} MiB after {steps}, at most {highest:.2f}"
    with Row("a network that does not fit") as row:
        folder = place("too-large")
        large = [*BEGIN, "--short_side", 16384, "--max_size", 32768, "--backbone", "resnet101"]
        done = run(folder, train(*large))
        fits = re.search(r"(--short_side \d+ --max_size \d+) would fit", done.stdout)
        if check(done.returncode == 1 and fits and "\nepoch " not in done.stdout, f"too large: {done.stdout[-300:]}"):
            done = run(folder, [PROGRAM, "check", "--data", "../data", *FLAGS[:-2], "--backbone", "resnet101", *fits[1].split()])
            check(done.returncode == 0, f"{fits[1]}: {done.stdout[-300:]}")
            row.notes = f"stopped before the first step; {fits[1]} would fit, and does"


PARTS = {"kills": kills, "calls": calls, "signals": signals, "disk": disk, "read-only": read_only, "lock": lock, "damage": damage,
         "readers": readers, "memory": memory}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--kills", type=int)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--program", default=ROOT / "train_detr")
    parser.add_argument("--seed", type=int, default=os.getpid())
    options = parser.parse_args()
    options.kills = options.kills or (10 if options.quick else 100)
    random.seed(options.seed)
    PROGRAM = str(Path(options.program).resolve())
    ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # so that the program does not start itself once more
    shutil.rmtree(OUT, ignore_errors=True)
    make_data()
    print(f"moments are those of --seed {options.seed}")
    folder = place("undisturbed")
    done = run(folder, train(*BEGIN))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    SECONDS = used.ru_utime + used.ru_stime  # of processor time: on a busy machine a kill comes earlier, not too late
    if done.returncode != 0:
        sys.exit(f"the undisturbed run failed: {done.stdout}\n0 passed, 1 failed")
    REFERENCE = content(folder)
    epochs = [json.loads(line)["epoch"] for line in REFERENCE["out/log.txt"].splitlines()]
    check(epochs == [*range(STEPS // STEPS_PER_EPOCH)], f"the undisturbed run's log.txt has epochs {epochs}")
    MIDDLE = place("middle")  # stopped in the third epoch, with a best checkpoint and a previous one
    process = start(MIDDLE, train(*BEGIN))
    while process.poll() is None and not re.search("epoch 2 done", process.stdout.readline()):
        pass
    process.send_signal(signal.SIGTERM)
    process.communicate()
    for name in options.only.split(","):
        PARTS[name]()
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)
