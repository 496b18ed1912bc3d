#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Checks the layering of the source tree: which folder may include what (docs/architecture.md),
that every source file names its license, and that no file outgrows what a person can read.

    lint_rooms.py [ROOT]   prints `file:line: what is wrong`, exits 1 if anything is
"""

import os
import re
import subprocess
import sys

MAX_LINES = 600
SOURCE = (".c", ".cc", ".cpp", ".h", ".hpp", ".cu", ".cuh", ".proto", ".py", ".sh", ".mk")
C_FAMILY = (".c", ".cc", ".cpp", ".h", ".hpp", ".cu", ".cuh")

CUDA = re.compile(r"(.*/)?(cu(da|blas|fft|rand|sparse|solver|pti)\w*|nvml|nvrtc|driver_types)"
                  r"\.h(pp)?$")
CRIU = re.compile(r"(criu[-_]plugin\.h|(criu|compel|libcriu)/.*)$")

ABI, BASE, CLIENT = "gpu-tracker/abi/", "gpu-tracker/base/", "gpu-tracker/client/"
DRIVER, IMAGE = "gpu-tracker/driver/", "gpu-tracker/image/"
TRACKER = "gpu-tracker/"

# folder: the folders of this tree it may include from (itself always). The longest match counts.
ROOMS = {
    "criu-plugin/": [ABI, CLIENT],
    ABI: [],
    CLIENT: [ABI],
    BASE: [ABI],
    "gpu-tracker/agent/": [ABI],
    "gpu-tracker/inject/": [ABI, BASE],
    DRIVER: [ABI, BASE],
    "gpu-tracker/copy/": [ABI, BASE, DRIVER],
    "gpu-tracker/track/": [ABI, BASE, DRIVER],
    "gpu-tracker/gate/": [ABI, BASE, "gpu-tracker/inject/", "gpu-tracker/track/"],
    IMAGE: [ABI, BASE, DRIVER],
    "gpu-tracker/daemon/": [TRACKER],
    "tools/criu/": [ABI, BASE],
    "tools/": [TRACKER],
    "bpf/": [ABI],
    "kmod/": [ABI],
    "test/": [TRACKER, "tools/", "criu-plugin/", "bpf/"],
}
# Drivers of GPUs, and programs that use them as applications do.
MAY_INCLUDE_CUDA = (DRIVER, "test/sim/", "test/contract/", "test/track/", "test/gate/", "tools/bench/")
MAY_INCLUDE_CRIU = ("criu-plugin/", "test/criu/")  # the tests have plugins of their own
# Rooms whose code runs in a foreign process or in the kernel: no C++ library there.
C_LIBRARY_ONLY = ("criu-plugin/", CLIENT, "gpu-tracker/agent/", "bpf/", "kmod/")

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')


def room_of(path):
    rooms = [room for room in ROOMS if path.startswith(room)]
    return max(rooms, key=len) if rooms else None


def include_problem(path, kind, name):
    """Why `path` may not include `name`, or None."""
    room = room_of(path)
    is_cuda = CUDA.match(name) and not name.startswith(("gpu-tracker/", "test/", "tools/"))
    if is_cuda and not path.endswith((".cu", ".cuh")) and not path.startswith(MAY_INCLUDE_CUDA):
        return f"{name}: CUDA headers belong in gpu-tracker/driver, tests, benchmarks and *.cu only"
    if CRIU.match(name) and not path.startswith(MAY_INCLUDE_CRIU):
        return f"{name}: CRIU's headers belong in criu-plugin (and its tests) only"
    if room is None or is_cuda or CRIU.match(name):
        return None
    if kind == "<":
        if room in C_LIBRARY_ONLY and "." not in name:
            return f"<{name}>: {room} uses the C library only"
        return None
    if "/" not in name:
        if room == "kmod/":  # dkms builds it from elsewhere
            return None
        return f'"{name}": include by the path from the top of the tree'
    if name.startswith(room) or any(name.startswith(r) for r in ROOMS[room]):
        return None
    return f"{name}: {room} may include only from {', '.join([room] + ROOMS[room])}"


def check_file(root, path):
    with open(os.path.join(root, path), encoding="utf-8") as f:
        lines = f.read().splitlines()
    if len(lines) > MAX_LINES:
        yield 1, f"{len(lines)} lines; split it (the limit is {MAX_LINES})"
    head = lines[:2] if lines and lines[0].startswith("#!") else lines[:1]
    if lines and not any("SPDX-License-Identifier: GPL-2.0-only" in line for line in head):
        yield 1, "the first line must be SPDX-License-Identifier: GPL-2.0-only"
    if path.startswith(ABI) and path.endswith((".c", ".cc", ".cpp")):
        yield 1, "gpu-tracker/abi holds declarations only, no behaviour"
    if not path.endswith(C_FAMILY):
        return
    for number, line in enumerate(lines, 1):
        match = INCLUDE.match(line)
        problem = match and include_problem(path, *match.groups())
        if problem:
            yield number, problem


def source_files(root):
    """Files that are, or could be, in git; without git all but hidden ones and build/."""
    try:
        listed = subprocess.run(["git", "-C", root, "ls-files", "-co", "--exclude-standard"],
                                capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        listed = []
        for folder, folders, names in os.walk(root):
            folders[:] = [d for d in folders if not d.startswith(".") and d != "build"]
            listed += [os.path.relpath(os.path.join(folder, n), root) for n in names]
    scripts = ("ci/deps", "ci/criu", "ci/lint", "ci/bundle")
    return sorted(f for f in listed if (f.endswith(SOURCE) or f in scripts) and
                  os.path.isfile(os.path.join(root, f)))


def main():
    root = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(__file__), "..")
    bad = 0
    for path in source_files(root):
        for number, problem in check_file(root, path):
            print(f"{path}:{number}: {problem}")
            bad += 1
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
