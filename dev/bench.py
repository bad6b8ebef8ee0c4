#!/usr/bin/env python3
"""Speed beside PyTorch, OpenVINO and ONNX Runtime, the programs taking turns: writes the table of README.md.

    python dev/bench.py [--cases r50-fp32,small-bf16] [--rounds 5] [--steps 3] [--threads N] [--program ./train_detr]
                        [--gpu_program ./train_detr_cu] [--markdown FILE] [--json FILE]

Prints a Markdown table of medians, their ratios, the share of the machine's measured multiply-add peak, and peak
memory; --json writes every single time as well.

PyTorch's side is bench_torch.py. Inference is timed with torch.compile as well, and the faster shown; a training step
gains nothing from it, and channels_last is faster than contiguous pictures in every case. OpenVINO and ONNX Runtime run
the same network, exported to ONNX, after their outputs were compared with PyTorch's. A training step goes from decoded pixels to updated weights, as in `train_detr bench`:
normalise, forward with dropout, a matching for each decoder layer, loss, backward, clipping, AdamW, on random pictures
with 7 boxes each. An inference goes from decoded pixels of one picture to boxes and class probabilities. Shares of the
peak count the operations of direct convolutions for every program.

Where there is a GPU and train_detr_cu is built, a second table has both on it: PyTorch as the official DETR runs (fp32),
in channels_last with autocast in bf16, and compiled besides; in images a second, with the peak of the GPU's memory as
PyTorch and our plan count it. Floats are multiplied as floats. The case gpu-check is for machines without a GPU: it
runs all of that on the processor, our side by the emulator (--gpu_program build/emu/train_detr), and its figures mean
nothing.

A machine's speed drifts, so each round gives every program a turn. A peer lives in a process of its own, one for
training and one for inference, so that peak memory is its own; it sleeps while others are timed, which is checked.
"""
import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import namedtuple

# backbone; layers of encoder and of decoder; pixels; pictures in a training step; rows: what the table shows of it
Case = namedtuple("Case", "title backbone layers height width batch precision rows")
CASES = {}
for precision in "fp32", "bf16":
    CASES["r50-" + precision] = Case("ResNet-50, 800x1066", "resnet50", 6, 800, 1066, 1, precision, ("train", "infer"))
    CASES["vga-" + precision] = Case("ResNet-50, 480x640", "resnet50", 6, 480, 640, 2, precision, ("train",))
    CASES["small-" + precision] = Case("ResNet-18, 3+3 layers, 240x320", "resnet18", 3, 240, 320, 4, precision,
                                       ("train",))
    CASES["gpu-r50-" + precision] = Case("ResNet-50, 800x1066", "resnet50", 6, 800, 1066, 8, precision,
                                         ("train", "infer"))
    CASES["gpu-vga-" + precision] = Case("ResNet-50, 480x640", "resnet50", 6, 480, 640, 16, precision, ("train",))
CASES["gpu-check"] = Case("ResNet-18, one layer each, 32x32", "resnet18", 1, 32, 32, 1, "bf16", ("train", "infer"))


# ----------------------------------------------------------------------------------------------------------------------
# The peers, each inside a process of its own: a function that prepares all and returns what is to be timed


def pytorch(case, work, threads, folder):
    import torch
    from bench_torch import Network

    torch.set_num_threads(threads)
    return getattr(Network(case), work)


def pytorch_compiled(case, work, threads, folder):
    import torch
    from bench_torch import Network

    torch.set_num_threads(threads)
    torch._inductor.config.freezing = True  # weights become constants: norms are folded in, layouts chosen once
    network = Network(case)
    network.model.compile()
    return network.infer


def on_gpu(precision=None, channels_last=True, compiled=False):
    """PyTorch on the GPU, or on the processor where there is none. precision: None, the case's."""
    def prepare(case, work, threads, folder):
        import torch
        from bench_torch import Network

        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and case != CASES["gpu-check"]:
            sys.exit("PyTorch finds no GPU: only gpu-check runs without one")
        network = Network(case._replace(precision=precision or case.precision), device,
                          torch.channels_last if channels_last else torch.contiguous_format)
        if compiled:
            network.model.compile()
        return getattr(network, work)

    return prepare


def device_memory():
    """Peak bytes of the GPU's memory in this process, or None."""
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_allocated() if torch and torch.cuda.is_initialized() else None


def openvino(case, work, threads, folder):
    import numpy
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[case.precision],
                "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(os.path.join(folder, "detr.onnx"), "CPU", settings).create_infer_request()
    example = numpy.load(os.path.join(folder, "example.npz"))
    return lambda: list(request.infer([example["arr_0"]]).values())


def onnxruntime(case, work, threads, folder):
    import numpy
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(os.path.join(folder, "detr.onnx"), settings, ["CPUExecutionProvider"])
    pixels = numpy.load(os.path.join(folder, "example.npz"))["arr_0"]
    return lambda: session.run(None, {"pixels": pixels})


PEERS = {"PyTorch": pytorch, "PyTorch compiled": pytorch_compiled, "OpenVINO": openvino, "ONNX Runtime": onnxruntime}
GPU_PEERS = {"eager, fp32": on_gpu("fp32", channels_last=False), "channels_last": on_gpu(), "compiled": on_gpu(compiled=True)}
COLUMNS = "PyTorch", "OpenVINO", "ONNX Runtime"  # the faster of the two PyTorchs is shown


# How far outputs may be from PyTorch's fp32. The last digits of fp32; in bf16 each layer rounds to 8 bits.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}


def worker(options):
    """Reads a line when it is its turn, runs `steps` times, and answers with the seconds and its own peak memory."""
    import numpy

    case = CASES[options.cases]
    run = {**PEERS, **GPU_PEERS}[options.peer](case, options.work, options.threads, options.folder)
    if options.work == "infer":
        wanted = numpy.load(os.path.join(options.folder, "example.npz"))
        for name, output in zip(("arr_1", "arr_2"), run()):
            error = numpy.abs(numpy.asarray(output, dtype=numpy.float32) - wanted[name]).max()
            if not error <= TOLERANCE[case.precision]:
                sys.exit(f"{options.peer}: outputs differ from PyTorch's fp32 by {error}")
    for _ in range(2):  # compiles kernels, touches memory
        run()
    print(json.dumps([[], 0]), flush=True)
    for _ in sys.stdin:
        times = []
        for _ in range(options.steps):
            start = time.perf_counter()
            run()
            if device_memory() is not None:
                sys.modules["torch"].cuda.synchronize()
            times.append(time.perf_counter() - start)
        print(json.dumps([times, device_memory() or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]), flush=True)


class Peer:
    """A worker in a process of its own."""

    def __init__(self, name, case_name, work, options, folder):
        self.name, self.work, self.times, self.memory = name, work, [], 0
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--peer", name, "--cases", case_name, "--work", work, "--folder", folder,
             "--threads", str(options.threads), "--steps", str(options.steps)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended early: see its message above")
        return json.loads(line)

    def turn(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        times, self.memory = self.answer()
        self.times += times

    def cpu_seconds(self):  # that its threads have used
        with open(f"/proc/{self.process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Ours:
    """train_detr bench, or train_detr_cu bench, started anew for each turn; it does a training step and an inference several times."""

    def __init__(self, case, program):
        self.name, self.program, self.runs, self.skipped = "train_detr", program, [], ""
        self.command = [
            program, "bench", "--backbone", case.backbone, "--enc_layers", str(case.layers), "--dec_layers",
            str(case.layers), "--size", f"{case.height}x{case.width}", "--batch_size", str(case.batch), "--precision",
            case.precision, "--json"]

    def turn(self):
        if self.skipped:
            return
        with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
            command = self.command + [file.name]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode == 2:  # a flag that this program does not know
                self.skipped = done.stdout.strip()
            elif done.returncode:
                sys.exit(f"{' '.join(command)}: status {done.returncode}: {done.stdout.strip()[-500:]}")
            else:
                self.runs.append(json.load(file))

    def inference_memory(self, case, folder):
        """Peak bytes of `predict` on a picture that becomes 800x1066, with a checkpoint of random weights."""
        checkpoint = os.path.join(folder, "checkpoint")
        command = [self.program, "train", "--data", "data/bccd", "--output_dir", checkpoint, "--backbone", case.backbone,
                   "--steps", "1", "--batch_size", "1", "--norm_init", "identity", "--eval_every", "1000"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        command = [self.program, "predict", "--resume", checkpoint, "data/bccd/JPEGImages/BloodImage_00000.jpg"]
        if case.precision != "fp32":
            command += ["--precision", case.precision]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        return 1024 * usage.ru_maxrss if status == 0 else None

    def median(self, key):
        return statistics.median(run[key] for run in self.runs) if self.runs else None


def take_turns(ours, peers, rounds):
    """One turn each, `rounds` times. Says so when one that should sleep uses the processor."""
    for turn in range(rounds):
        for active in [ours, *peers]:
            time.sleep(0.5)  # the threads of the one before stop spinning
            before = {peer: peer.cpu_seconds() for peer in peers if peer is not active}
            start = time.perf_counter()
            active.turn()
            wall = time.perf_counter() - start
            for peer, seconds in before.items():
                used = peer.cpu_seconds() - seconds
                if used > max(0.02, 0.02 * wall):
                    log(f"warning: {peer.name} used {used:.2f} s of processor time in {active.name}'s {wall:.2f} s")


def log(text):
    print(text, file=sys.stderr, flush=True)


def measure(name, case, options):
    """Rows of the table: times in seconds by program, peak memory by program, operations and the machine's peak."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if "infer" in case.rows:
            subprocess.run([sys.executable, __file__, "--cases", name, "--export", folder], check=True)
        peers, gpu = [], name.startswith("gpu-")
        for work in case.rows:
            for peer in GPU_PEERS if gpu else PEERS if work == "infer" else ("PyTorch",):
                if (peer, case.precision) != ("ONNX Runtime", "bf16"):  # it has no bf16 on a CPU
                    peers.append(Peer(peer, name, work, options, folder))
                    stack.callback(peers[-1].close)
        ours = Ours(case, options.gpu_program if gpu else options.program)
        take_turns(ours, peers, options.rounds)
        if ours.skipped:
            log(f"{name}: train_detr left out: {ours.skipped}")
        rows = []
        for work in case.rows:
            key = {"train": "train_step_s", "infer": "infer_s"}[work]
            row = {"case": name, "work": work, "title": case.title, "precision": case.precision,
                   "pictures": case.batch if work == "train" else 1, "times": {}, "peak_rss_bytes": {}}
            if ours.runs:
                row["times"]["train_detr"] = [run[key] for run in ours.runs]
                row["gflop"] = ours.median("gflops_" + work) * ours.median(key)
                if gpu:
                    row["device"] = ours.runs[0]["device"]
                    row["peak_rss_bytes"]["train_detr"] = ours.median("device_bytes_" + work)
                else:
                    row["peak_gflops"] = ours.median("peak_gflops_measured")
                    row["peak_rss_bytes"]["train_detr"] = (ours.median("peak_rss_bytes") if work == "train" else
                                                           ours.inference_memory(case, folder))
            for peer in peers:
                if peer.work == work:
                    row["times"][peer.name], row["peak_rss_bytes"][peer.name] = peer.times, peer.memory
            rows.append(row)
            log(f"{name} {work}: " + ", ".join(f"{who} {statistics.median(t):.3f} s" for who, t in row["times"].items()))
        return rows


def machine():
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        info = file.read()
        model = re.search(r"model name\s*: (.*)", info)
        flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16") if f" {flag} " in info]
        return f"{model[1] if model else platform.machine()} with {', '.join(flags)}"
    return platform.machine()


def markdown(rows, options):
    peaks = {row["precision"]: row["peak_gflops"] for row in rows if "peak_gflops" in row}
    facts = [f"{machine()}; threads: {options.threads}"]
    facts += [f"measured peak in {precision}: {peak:.0f} GFLOP/s" for precision, peak in peaks.items()]
    facts += [f"{name} {importlib.metadata.version(package)}" for name, package in
              (("PyTorch", "torch"), ("OpenVINO", "openvino"), ("ONNX Runtime", "onnxruntime"))]
    lines = ["; ".join(facts) + f"; medians of {options.rounds} rounds.", "",
             "| | ours | PyTorch | ratio | OpenVINO | ratio | ONNX Runtime | ratio | of peak: ours | PyTorch "
             "| peak memory: ours | PyTorch |", "| --- |" + " ---: |" * 11]
    for row in rows:
        medians = {who: statistics.median(times) for who, times in row["times"].items()}
        pictures, peak, ours = row["pictures"], row.get("peak_gflops"), medians.get("train_detr")
        speed, ratio, share, memory = ({who: "" for who in ("train_detr", *PEERS)} for _ in range(4))
        torch = min((who for who in medians if who.startswith("PyTorch")), key=medians.get)
        for who, seconds in medians.items():
            speed[who] = f"{seconds:.3f} s" if pictures == 1 else f"{pictures / seconds:.2f} images/s"
            ratio[who] = f"{seconds / ours:.2f}" if ours else ""
            share[who] = f"{100 * row['gflop'] / seconds / peak:.0f} %" if peak else ""
        for who, size in row["peak_rss_bytes"].items():
            memory[who] = f"{size / 2**20:.0f} MiB" if size else ""
        cells = [f"{row['title']}, {'training' if row['work'] == 'train' else 'inference'}"
                 + (f" with {pictures} a step" if pictures > 1 else "") + f", {row['precision']}", speed["train_detr"]]
        for who in COLUMNS:
            cells += [speed[torch] + torch[len(who):], ratio[torch]] if who == "PyTorch" else [speed[who], ratio[who]]
        for column in share, memory:
            cells += [column["train_detr"], column[torch]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def gpu_markdown(rows, options):
    facts = {f"{row['device']}; PyTorch {importlib.metadata.version('torch')}" for row in rows if "device" in row}
    lines = [f"{'; '.join(facts)}; medians of {options.rounds} rounds, images a second and MiB of the GPU's memory.", "",
             "| | ours | " + " | ".join(f"{who} | ratio" for who in GPU_PEERS) + " | memory: ours | "
             + " | ".join(GPU_PEERS) + " |", "| --- |" + " ---: |" * (2 + 3 * len(GPU_PEERS))]
    for row in rows:
        speed = {who: row["pictures"] / statistics.median(times) for who, times in row["times"].items()}
        ours, memory = speed.get("train_detr"), row["peak_rss_bytes"]
        work = f"training with {row['pictures']} a step" if row["work"] == "train" else "inference"
        cells = [f"{row['title']}, {work}, {row['precision']}", f"{ours:.1f}" if ours else ""]
        for who in GPU_PEERS:
            cells += [f"{speed[who]:.1f}", f"{ours / speed[who]:.2f}" if ours else ""]
        cells += [f"{memory[who] / 2**20:.0f}" if who in memory else "" for who in ("train_detr", *GPU_PEERS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def default_cases(gpu_program):
    """All of the processor's; the GPU's where it can be used."""
    gpu = False
    if os.path.exists(gpu_program):
        import torch

        gpu = torch.cuda.is_available()
    return [name for name in CASES if not name.startswith("gpu-") or gpu and name != "gpu-check"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", help="some of " + ", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each program")
    parser.add_argument("--steps", type=int, default=3, help="a peer's runs in a turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--program", default="./train_detr")
    parser.add_argument("--gpu_program", default="./train_detr_cu")
    parser.add_argument("--markdown", help="write the table here as well")
    parser.add_argument("--json", help="write every time here")
    for inner in "peer", "work", "folder", "export":  # what this program calls itself with
        parser.add_argument("--" + inner, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.cases.split(",") if options.cases else default_cases(options.gpu_program)
    for name in names:
        if name not in CASES:
            parser.error(f"--cases {name}: must be of {', '.join(CASES)}")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.export:
        from bench_torch import Network

        network = Network(CASES[options.cases]._replace(precision="fp32"))
        network.example(options.export)
        return None if options.cases.startswith("gpu-") else network.export(options.export)
    if options.peer:
        return worker(options)

    load = os.getloadavg()[0]
    if load > 0.5:
        log(f"warning: the machine is busy (load average {load:.1f}): wait until it is idle for figures to trust")
    rows = []
    for name in names:
        rows += measure(name, CASES[name], options)
    on = {gpu: [row for row in rows if row["case"].startswith("gpu-") == gpu] for gpu in (False, True)}
    table = "\n".join(table(on[gpu], options) for gpu, table in ((False, markdown), (True, gpu_markdown)) if on[gpu])
    print(table, end="")
    for path, text in (options.markdown, table), (options.json, json.dumps(rows, indent=1)):
        if path:
            with open(path, "w") as file:
                file.write(text)


if __name__ == "__main__":
    main()
