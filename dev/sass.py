#!/usr/bin/env python3
"""What nvcc made of each kernel: registers, spills, shared memory, how many of its warps a multiprocessor can hold, and
which instructions are there; beside it what the kernel has to do at least. Nothing is run. `make sass SM=90` calls it.

    dev/sass.py SM PTXAS OBJECT CUOBJDUMP

SM: the architecture that OBJECT was compiled for, PTXAS: what `nvcc -Xptxas -v` said about it, CUOBJDUMP: the program.
Prints a table in Markdown. The exit status is 1 if a kernel uses local memory (registers that were spilled, or an array
that has an index) or lacks an instruction that it was written for.
"""

import re
import subprocess
import sys

# Registers of 4 bytes, threads, blocks, bytes of shared memory of a multiprocessor (CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability").
MULTIPROCESSORS = {80: (65536, 2048, 32, 164 << 10), 86: (65536, 1536, 16, 100 << 10), 89: (65536, 1536, 24, 100 << 10),
                   90: (65536, 2048, 32, 228 << 10), 100: (65536, 2048, 32, 228 << 10), 120: (65536, 1536, 24, 100 << 10)}

# An instruction and what it is here: a product of tensor cores, a load of its operands from shared memory, an
# asynchronous copy, 16 bytes from and to global memory. (On newer architectures mma.sync is still HMMA.)
INSTRUCTIONS = {"HMMA": r"HMMA\b", "LDSM": r"LDSM\b", "LDGSTS": r"LDGSTS\b", "LDG.128": r"LDG\.[.\w]*128",
                "STG.128": r"STG\.[.\w]*128"}

SIZES = {"float": 4, "__half": 2, "__nv_bfloat16": 2}


def attention_shared(T, D, ROWS):
    """attention_shared() of train_detr.cu: two tiles, and for floats the scratch of 64 rows."""
    size, D, ROWS = SIZES[T], int(D), int(ROWS)
    return 2 * 2 * ROWS * (D * size + 16) + (64 * ROWS * size if size == 4 else 0)


def conv_shared(T, PASS, TILE_N, MMA):
    """conv_shared() of train_detr.cu: three steps of 128 bytes of both operands, origins of 128 rows, 49 taps."""
    return 3 * (128 + int(TILE_N)) * 128 + 128 * 16 + 49 * 4


# Kernels of which it is known what they must have, by the beginning of their names; `half` only in 16 bits, `mma` where
# the fourth argument says so.
MUST_HAVE = {"conv_kernel": {"all": ["LDGSTS"], "half": ["LDSM"], "mma": ["HMMA"]},
             "attention_forward": {"all": ["LDGSTS"], "half": ["HMMA", "LDSM"]},
             "attention_backward": {"all": ["LDGSTS"], "half": ["HMMA", "LDSM"]},
             "norm_": {"all": ["LDG.128", "STG.128"]}, "finish_": {"all": ["LDG.128", "STG.128"]},
             "maxpool_": {"all": ["LDG.128", "STG.128"]}, "dropout_": {"all": ["LDG.128", "STG.128"]},
             "add_positions": {"all": ["LDG.128", "STG.128"]}, "add_queries": {"all": ["LDG.128", "STG.128"]},
             "adamw_kernel": {"all": ["LDG.128", "STG.128"]}}

# Dynamic shared memory of a block, which only the launch knows. For matching: 100 queries and at most as many targets,
# 91 classes.
DYNAMIC = {"conv_kernel": conv_shared, "attention_forward": attention_shared, "attention_backward": attention_shared,
           "match_costs": lambda: 8 * 91 * 8, "set_loss": lambda: 8 * 91 * 8,
           "match_kernel": lambda: 8 * 3 * 100 + 4 * 4 * 100}


# What a kernel in bf16 has to do at least: megabytes that are read and written once, and GFLOP of products, for ResNet-50
# with 100 queries and eight pictures of 800 x 1066 (doc/8 says what of it each line is).
PIXELS, TOKENS, CHANNELS, FEEDFORWARD, QUERIES, LAYERS, LOGITS = 8 * 800 * 1066, 8 * 25 * 34, 256, 2048, 8 * 100, 6, 92
NUMBERS, TRAINED, CONV_WEIGHTS = TOKENS * CHANNELS, 41.28e6, 23.45e6
PAIRS = 8 * 850 * 850 * CHANNELS  # of queries, keys and channels
CONV = {"0": 29, "1": 42, "2": 32}  # 3 x 3, 256 channels, by pass; with the mask on the way back
NARROW = {"0": 109, "1": 164, "2": 111}  # 64 channels
LEAST = {"resize_kernel<unsigned": 8 * 480 * (3 * 640 + 4 * 1066),
         "resize": 8 * 1066 * (4 * 480 + 6 * 800), "finish": 8 * NUMBERS, "add_parts": 40 * 256 * 2304,
         "maxpool": 8 * 64 * (2 * 400 * 533 + 3 * 200 * 267), "add_positions": 6 * NUMBERS,
         "add_queries": 6 * QUERIES * CHANNELS, "add_queries_backward": 4 * (QUERIES + 200) * CHANNELS,
         "box_features": 4 * 4 * QUERIES * 129, "sigmoid": 8 * 4 * LAYERS * QUERIES, "dropout": 4 * TOKENS * FEEDFORWARD,
         "attention_forward": (8 * NUMBERS, 4 * PAIRS), "attention_dots": 4 * NUMBERS,
         "attention_backward_queries": (10 * NUMBERS, 6 * PAIRS), "attention_backward_keys": (12 * NUMBERS, 8 * PAIRS),
         "norm_forward": 18 * NUMBERS, "norm_backward": 14 * NUMBERS, "column_sums": 2 * TOKENS * FEEDFORWARD,
         "match_costs": 4 * LAYERS * QUERIES * LOGITS, "set_loss": 8 * LAYERS * QUERIES * LOGITS,
         "loss_sums": 25 * LAYERS * QUERIES, "unfold": 8 * CONV_WEIGHTS, "fold": 6 * CONV_WEIGHTS,
         "clear_gradients": 4 * TRAINED, "gradient_norm": 4 * TRAINED, "gradient_norm_finish": 8 * TRAINED / 8192,
         "adamw": 28 * TRAINED + 2 * (TRAINED - CONV_WEIGHTS), "adamw_step": 0, "add_kernel": 24 * NUMBERS,
         "scale": 4 * NUMBERS, "round": 6 * NUMBERS, "standardise": 8 * CONV_WEIGHTS,
         "attention_prior": 16 * QUERIES * (8 + 1)}
MEMORY, TENSOR = 3.35e12, 989e12  # bytes and operations in bf16 a second of an H100, by its data sheet


def least(name, arguments):
    """Bytes and operations of a kernel in bf16 or without a type, or None."""
    if "float" in arguments or "__half" in arguments:
        return None
    if name.startswith(("attention", "norm")) and arguments[1:2] in (["64"], ["4"]):
        return None  # heads of 64 channels, rows of more than 256
    if name.startswith("conv_kernel"):
        return 1e6 * (CONV if arguments[2] == "128" else NARROW)[arguments[1]], 31.6e9
    found = entry(LEAST, name)
    return found if isinstance(found, tuple) or found is None else (found, 0)


def entry(table, name):
    """The value of the longest key that the name begins with, or None."""
    return table.get(max((key for key in table if name.startswith(key)), key=len, default=None))


def floor(work):
    """The table's last three cells."""
    if not work or work[0] == 0:
        return " | | "
    size, operations = work
    return (f"{size / 1e6:{'.0f' if size > 1e8 else '.3g'}} | {f'{operations / 1e9:.3g}' if operations else ''} | "
            f"{1e6 * max(size / MEMORY, operations / TENSOR):{'.0f' if size > 1e8 else '.2g'}}")


def blocks_per_multiprocessor(sm, threads, registers, shared):
    """Registers are given to a warp in units of 256, to four parts of a multiprocessor that each have a quarter; shared
    memory in units of 128 bytes, 1 KB of each block the system's own."""
    all_registers, all_threads, all_blocks, all_shared = MULTIPROCESSORS[sm]
    warps = threads // 32
    of_warp = -(-registers * 32 // 256) * 256
    of_block = -(-(shared + 1024) // 128) * 128
    return min(all_threads // threads, all_blocks, all_registers // 4 // of_warp * 4 // warps, all_shared // of_block)


def main():
    sm, ptxas, object_file, cuobjdump = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
    kernels = {}
    for name, stack, spills, registers, rest in re.findall(
            r"Function properties for (\S+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores.*\n.*?Used (\d+) registers(.*)",
            open(ptxas).read()):
        smem = re.search(r"(\d+) bytes smem", rest)
        kernels[name] = {"stack": int(stack), "spills": int(spills), "registers": int(registers),
                         "shared": int(smem[1]) if smem else 0}
    dump = lambda what: subprocess.run([cuobjdump, what, object_file], check=True, capture_output=True, text=True).stdout
    for part in re.split(r"\tFunction : ", dump("-sass"))[1:]:
        name, code = part.split("\n", 1)
        kernels[name]["has"] = [word for word, pattern in INSTRUCTIONS.items() if re.search(r"\b" + pattern, code)]
        kernels[name]["local"] = len(re.findall(r"\b(?:LDL|STL)\b", code))
        kernels[name]["length"] = len(re.findall(r"/\*[0-9a-f]{4,5}\*/", code))
    for name, attributes in re.findall(r"\n\.nv\.info\.(\S+)\n(.*?)(?=\n\.\w)", dump("-elf"), re.S):
        threads = re.search(r"EIATTR_MAX_THREADS\n.*\n\s+Value:\s+0x([0-9a-f]+)", attributes)
        if name in kernels:
            kernels[name]["threads"] = int(threads[1], 16) if threads else 0
    plain = subprocess.run(["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True).stdout.split("\n")
    print("| kernel | threads | registers | shared memory, bytes | spilled bytes | warps, of "
          f"{MULTIPROCESSORS[sm][1] // 32} | instructions | among them | MB | GFLOP | floor, us |\n| --- |{6 * ' ---: |'} --- |{3 * ' ---: |'}")
    wrong = []
    for name, kernel in sorted(zip(plain, kernels.values())):
        name = re.sub(r"\(.*", "", name.replace("(int)", "")).removeprefix("void ")
        arguments = re.findall(r"[\w]+", name[name.index("<"):]) if "<" in name else []
        dynamic = entry(DYNAMIC, name)
        shared = kernel["shared"] + (dynamic(*arguments) if dynamic else 0)
        if not kernel["threads"]:
            wrong.append(f"{name}: no __launch_bounds__")
            continue
        blocks = blocks_per_multiprocessor(sm, kernel["threads"], kernel["registers"], shared)
        print(f"| `{name.replace('__nv_bfloat16', 'bf16').replace('__half', 'fp16')}` | {kernel['threads']} | "
              f"{kernel['registers']} | {shared} | {kernel['spills']} | {blocks * kernel['threads'] // 32} | "
              f"{kernel['length']} | {' '.join(kernel['has'])} | {floor(least(name, arguments))} |")
        if kernel["local"] or kernel["stack"]:
            wrong.append(f"{name}: local memory: {kernel['stack']} bytes, {kernel['local']} instructions")
        if not dynamic and "LDSM" in kernel["has"] and not kernel["shared"]:
            wrong.append(f"{name}: its dynamic shared memory is not in DYNAMIC")
        must = entry(MUST_HAVE, name) or {}
        half = bool(arguments) and SIZES.get(arguments[0]) == 2
        mma = arguments[3:] == ["true"]
        for word in must.get("all", []) + (must.get("half", []) if half else []) + (must.get("mma", []) if mma else []):
            if word not in kernel["has"]:
                wrong.append(f"{name}: no {word}")
    for line in wrong:
        print("wrong: " + line, file=sys.stderr)
    if not kernels:
        print("wrong: no kernels", file=sys.stderr)
    return bool(wrong) or not kernels


sys.exit(main())
