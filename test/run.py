#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Runs phos's test tiers and says for each test: ok, FAIL or SKIP.

Tiers: unit, tools (mostly GoogleTest programs), sim (the driver contract and the agent on the simulated
GPU), criu (real dumps and restores by CRIU on the simulated GPU; root), uvm (managed memory, where
nvidia-uvm is loaded; no GPU needed; root), vm (tests of these three in QEMU guests with other
kernels, and with nvidia-uvm), gpu (all of these and test/gpu on a real one). A tier that cannot
run here is one SKIP with its reason; REQUIRE_GPU=1 makes a missing GPU a failure. test/oracle.py
checks that no tier left anything behind. Tests that do not measure time, and mostly wait, run beside
each other (--jobs); what they print is in the order of the tiers and tests all the same.

Tests find in their environment: PHOS_BUILD (the build directory), PHOS_CRIU (stock criu), PHOS_GPU
(sim or real), PHOS_TEST_ID (to be passed on to every process they start).
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid

TEST_DIR = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, TEST_DIR)

import oracle  # noqa: E402  (lies beside this file)

TIERS = ["unit", "tools", "sim", "criu", "uvm", "vm", "gpu"]


class Outcome:
    def __init__(self, status, name, seconds=0.0, reason="", output=""):
        self.status = status  # ok, FAIL, SKIP
        self.name = name
        self.seconds = seconds
        self.reason = reason
        self.output = output


def gpu_missing():
    """Why there is no real GPU here, or None."""
    for path, what in (("/proc/driver/nvidia/version", "the NVIDIA driver is not loaded"),
                       ("/dev/nvidia0", "there is no NVIDIA GPU"),
                       ("/dev/nvidiactl", "the NVIDIA driver's control device is missing")):
        if not os.path.exists(path):
            return f"{what} ({path} does not exist)"
    return None


class Commands:
    """The commands that run now. Threads start them; the main thread may end them all."""

    def __init__(self):
        self.lock = threading.Lock()
        self.running = set()
        self.ended = False

    def run(self, command, env, timeout):
        """Runs a command in a session of its own. Returns (exit status or None if it was killed,
        output).

        Output goes through a file: a pipe would stay open as long as any grandchild lives.
        """
        with tempfile.TemporaryFile() as out:
            with self.lock:
                if self.ended:
                    return None, ""
                process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=out,
                                           stderr=subprocess.STDOUT, start_new_session=True)
                self.running.add(process)
            try:
                status = self._wait(process, timeout)
            finally:
                with self.lock:
                    self.running.remove(process)
            out.seek(0)
            return status, out.read().decode(errors="replace")

    def _wait(self, process, timeout):
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None

    def end(self):
        """Kills those that run; no other starts."""
        with self.lock:
            self.ended = True
            for process in self.running:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # it has just ended


COMMANDS = Commands()
run_command = COMMANDS.run


def describe_exit(status, timeout):
    if status is None:
        return f"killed: still running after {timeout} s"
    if status < 0:
        return f"died of {signal.Signals(-status).name}"
    return f"exit status {status}"


def uvm_missing():
    """Why tests of managed memory cannot run here, or None."""
    if not os.access("/dev/nvidia-uvm", os.R_OK | os.W_OK):
        return "nvidia-uvm is not loaded (no /dev/nvidia-uvm); the tier vm runs this in a guest"
    return None


def beside_each_other(jobs, function, items):
    """function(item) of each, `jobs` at a time; the results in the items' order, each when it and
    those before it are there."""
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(function, items)


class GoogleTest:
    """One GoogleTest program. With jobs, so many of its suites run at a time, each on its own."""

    def __init__(self, program, timeout, jobs=1):
        self.program = program
        self.timeout = timeout
        self.jobs = jobs

    def list(self, env):
        if not os.access(self.program, os.X_OK):
            raise RuntimeError(f"{self.program} is not built; run make")
        status, output = run_command([self.program, "--gtest_list_tests"], env, self.timeout)
        if status != 0:
            raise RuntimeError(f"{self.program} --gtest_list_tests: "
                               f"{describe_exit(status, self.timeout)}\n{output}")
        names, suite = [], ""
        for line in output.splitlines():
            line = line.split("#")[0].rstrip()
            if re.fullmatch(r"\S+\.", line):
                suite = line
            elif line.startswith("  ") and suite and "DISABLED_" not in suite + line:
                names.append(suite + line.strip())
        return names

    def run(self, names, env):
        if self.jobs == 1:
            yield from self._run_part(names, env)
            return
        suites = [list(part) for _, part in itertools.groupby(names, lambda n: n.split(".")[0])]
        for outcomes in beside_each_other(
                self.jobs, lambda part: list(self._run_part(part, env)), suites):
            yield from outcomes

    def _run_part(self, names, env):
        with tempfile.TemporaryDirectory(prefix="phos-run-") as tmp:
            report = os.path.join(tmp, "report.json")
            # A file of flags has no length limit, unlike one argument of the command line.
            flags = os.path.join(tmp, "flags")
            with open(flags, "w", encoding="ascii") as f:
                f.write(f"--gtest_filter={':'.join(names)}\n")
            status, output = run_command(
                [self.program, f"--gtest_flagfile={flags}", f"--gtest_output=json:{report}",
                 "--gtest_color=no"], env, self.timeout)
            results = self._read_report(report)
        sections = self._sections(output)
        for name in names:
            text, end = sections.get(name, ("", None))
            if name in results:
                yield self._outcome(name, results[name], text)
            elif end:  # it ended before the program died
                failed = {"failures": [{"failure": text}]}
                case = {"OK": {}, "SKIPPED": {"result": "SKIPPED"}, "FAILED": failed}[end]
                yield self._outcome(name, case, text)
            else:
                when = "during" if name in sections else "before"
                yield Outcome("FAIL", name, output=text,
                              reason=f"{describe_exit(status, self.timeout)} {when} this test")
        if status != 0 and not any(r.get("failures") for r in results.values()) and results:
            yield Outcome("FAIL", os.path.basename(self.program), output=output[-4000:],
                          reason=f"the program ended with {describe_exit(status, self.timeout)} "
                          "although no test failed")

    @staticmethod
    def _read_report(path):
        try:
            with open(path, encoding="utf-8") as f:
                report = json.load(f)
        except (FileNotFoundError, ValueError):
            return {}
        return {f"{suite['name']}.{case['name']}": case
                for suite in report.get("testsuites", []) for case in suite.get("testsuite", [])
                if case.get("status") == "RUN"}

    @staticmethod
    def _sections(output):
        """For each test that was started, its output and how it ended (None: it did not)."""
        sections = {}
        for match in re.finditer(r"\[ RUN      \] (\S+)\n(.*?)(?:\[ +(OK|FAILED|SKIPPED) +\]|"
                                 r"(?=\[ RUN      \])|\Z)", output, re.S):
            sections[match.group(1)] = (match.group(2), match.group(3))
        return sections

    @staticmethod
    def _outcome(name, case, text):
        seconds = float(case.get("time", "0s").rstrip("s"))
        if case.get("failures"):
            first = case["failures"][0]["failure"].strip().splitlines()
            return Outcome("FAIL", name, seconds, " ".join(first[:3]), text)
        if case.get("result") == "SKIPPED":
            reason = re.sub(r"^\S+:\d+: Skipped\s*", "", text.strip())
            return Outcome("SKIP", name, seconds, " ".join(reason.split()) or "no reason given")
        return Outcome("ok", name, seconds)


class PythonTests:
    """The unittest cases test_*.py of one directory, `jobs` of them at a time: those that `which`
    matches."""

    def __init__(self, directory, timeout, jobs=1, which=""):
        self.directory = directory
        self.timeout = timeout
        self.jobs = jobs
        self.which = re.compile(which)
        self.case = [sys.executable, os.path.join(TEST_DIR, "case.py")]

    def list(self, env):
        if not os.path.isdir(self.directory):
            return []
        process = subprocess.run(self.case + ["list", self.directory], env=env, text=True,
                                 stdin=subprocess.DEVNULL, capture_output=True, check=False,
                                 timeout=self.timeout)
        if process.returncode != 0:
            raise RuntimeError(f"the tests of {self.directory} cannot be listed\n{process.stderr}")
        return [name for name in json.loads(process.stdout) if self.which.match(name)]

    def run(self, names, env):
        yield from beside_each_other(self.jobs, lambda name: self._run_case(name, env), names)

    def _run_case(self, name, env):
        with tempfile.TemporaryDirectory(prefix="phos-run-") as tmp:
            result = os.path.join(tmp, "result.json")
            start = time.monotonic()
            status, output = run_command(self.case + ["run", self.directory, name, result], env,
                                         self.timeout)
            seconds = time.monotonic() - start
            try:
                with open(result, encoding="utf-8") as f:
                    outcome = json.load(f)
            except (FileNotFoundError, ValueError):
                outcome = {"status": "fail", "reason": describe_exit(status, self.timeout)}
        word = {"ok": "ok", "fail": "FAIL", "skip": "SKIP"}[outcome["status"]]
        return Outcome(word, name, seconds, " ".join(outcome["reason"].split()), output)


class Tier:
    """A name, the groups of tests in it, extra environment, and why it cannot run (or None)."""

    def __init__(self, name, groups, env=None, obstacle=None, obstacle_fails=False):
        self.name = name
        self.groups = groups
        self.env = env or {}
        self.obstacle = obstacle
        self.obstacle_fails = obstacle_fails


def make_stages(options):
    """Lists of tiers that run beside each other."""
    build = options.build
    sim_path = os.path.join(build, "sim")
    if os.environ.get("LD_LIBRARY_PATH"):
        sim_path += ":" + os.environ["LD_LIBRARY_PATH"]
    sim = {"PHOS_GPU": "sim", "PHOS_SIMULATED_GPU": "1", "LD_LIBRARY_PATH": sim_path}

    def program(name, jobs=1):
        return GoogleTest(os.path.join(build, "test", name), options.binary_timeout, jobs)

    def scripts(name, timeout=options.timeout, jobs=1, which=""):
        return PythonTests(os.path.join(TEST_DIR, name), timeout, jobs, which)

    no_root = None if os.geteuid() == 0 else "CRIU needs root"
    # Tests of the driver contract and of the gate measure time, these want processors to give to
    # programs that never rest: nothing else runs then.
    busy = r"test_released\.UnderLoad\."
    # These fill the GPU, which only simulated processes have to themselves.
    alone = rf"({busy}|test_room\.)"
    return [
        [Tier("unit", [program("unit"), scripts("image")])],
        [Tier("tools", [program("tools"), scripts("tools")])],
        [Tier("sim", [program("contract"), program("agent"), program("track"), program("gate")],
              sim)],
        [Tier("sim", [program("live", min(2, options.jobs))], sim),
         Tier("criu", [scripts("criu", jobs=options.jobs, which=f"(?!{busy})")], sim, no_root)],
        [Tier("criu", [scripts("criu", which=busy)], sim, no_root)],
        [Tier("uvm", [program("uvm")], {}, no_root or uvm_missing())],
        # One case is a guest's whole life, on a processor that QEMU emulates: slow enough. Each
        # keeps one processor here busy.
        [Tier("vm", [scripts("vm", 3 * options.timeout, min(2, options.jobs, os.cpu_count() or 1))],
              {}, no_root)],
        [Tier("gpu", [program("contract"), program("agent"), program("track"), program("live"),
                      program("gate"), scripts("criu", jobs=min(4, options.jobs),
                                               which=f"(?!{alone})"),
                      scripts("criu", which=alone), scripts("gpu")],
              {"PHOS_GPU": "real"}, gpu_missing() or no_root,
              os.environ.get("REQUIRE_GPU") == "1")],
    ]


class TierRun:
    """A tier that runs on a thread of its own."""

    def __init__(self, tier, runner):
        self.tier = tier
        self.runner = runner
        self.queue = queue.SimpleQueue()
        self.test_id = uuid.uuid4().hex
        self.watch = None if tier.obstacle else oracle.Oracle(self.test_id)
        self.thread = threading.Thread(target=self._run)

    def start(self):
        self.thread.start()

    def join(self):
        if self.thread.ident:
            self.thread.join()

    def outcomes(self):
        """As they come; an error of the thread's is raised here."""
        while True:
            outcome = self.queue.get()
            if outcome is None:
                return
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome

    def left_behind(self):
        if not self.watch:
            return []
        try:
            return self.watch.findings()
        finally:
            self.watch.close()

    def _run(self):
        try:
            for outcome in self._outcomes():
                self.queue.put(outcome)
        except Exception as error:  # pylint: disable=broad-except  # for the main thread
            self.queue.put(error)
        self.queue.put(None)

    def _outcomes(self):
        tier = self.tier
        if tier.obstacle:
            yield Outcome("FAIL" if tier.obstacle_fails else "SKIP", "", reason=tier.obstacle)
            return
        env = self.runner.environment(tier, self.test_id)
        ran = 0
        for group in tier.groups:
            try:
                names = self.runner.selected(tier, group, env)
                for outcome in group.run(names, env) if names else ():
                    ran += 1
                    yield outcome
            except RuntimeError as error:
                ran += 1
                first, _, rest = str(error).partition("\n")
                yield Outcome("FAIL", "", reason=first, output=rest)
        if not ran and not self.runner.options.filter:
            yield Outcome("FAIL", "", reason="there are no tests in this tier")


class Runner:
    def __init__(self, options):
        self.options = options
        self.counts = {"ok": 0, "FAIL": 0, "SKIP": 0}
        self.failed = []
        self.pattern = re.compile(options.filter)

    def report(self, tier, outcome):
        self.counts[outcome.status] += 1
        name = f"{tier.name}/{outcome.name}" if outcome.name else tier.name
        print(f"{outcome.status:<4} {name} ({outcome.seconds:.2f} s) {outcome.reason}".rstrip())
        if outcome.status == "FAIL":
            self.failed.append(name)
            for line in outcome.output.rstrip().splitlines()[-self.options.lines:]:
                print(f"     | {line}")
        sys.stdout.flush()

    def environment(self, tier, test_id):
        env = dict(os.environ, PHOS_BUILD=self.options.build, PHOS_TEST_ID=test_id,
                   PYTHONUNBUFFERED="1", PYTHONDONTWRITEBYTECODE="1")
        env.setdefault("PHOS_CRIU", os.path.join(self.options.build, "criu", "criu"))
        env.update(tier.env)
        return env

    def selected(self, tier, group, env):
        return [n for n in group.list(env) if self.pattern.search(f"{tier.name}/{n}")]

    def list_tier(self, tier):
        for group in tier.groups:
            try:
                for name in self.selected(tier, group, self.environment(tier, "list")):
                    print(f"{tier.name}/{name}")
            except RuntimeError as error:
                print(f"{tier.name}: {error}", file=sys.stderr)

    def run_stage(self, tiers):
        """All of them at once; reports one after the other."""
        runs = [TierRun(tier, self) for tier in tiers]
        try:
            for run in runs:
                run.start()
            for run in runs:
                for outcome in run.outcomes():
                    self.report(run.tier, outcome)
        except KeyboardInterrupt:
            COMMANDS.end()
            raise
        finally:
            for run in runs:
                run.join()
            # When nothing runs any more: the tiers see each other's files.
            for run in runs:
                for line in run.left_behind():
                    self.report(run.tier, Outcome("FAIL", "left-behind", reason=line))

    def summary(self):
        if self.failed:
            print("failed: " + " ".join(self.failed))
        print("{ok} passed, {FAIL} failed, {SKIP} skipped".format(**self.counts))
        return 1 if self.counts["FAIL"] or not self.counts["ok"] else 0


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0],
                                     epilog=__doc__.partition("\n\n")[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", action="append", choices=TIERS,
                        help="run only this tier (may be repeated)")
    parser.add_argument("--filter", default="", metavar="REGEX",
                        help="run only tests whose tier/name matches")
    parser.add_argument("--build", default=os.environ.get("B") or os.path.join(TEST_DIR, "..",
                                                                               "build"),
                        metavar="DIR", help="the build directory (default: build)")
    parser.add_argument("--list", action="store_true", help="print the names of the tests only")
    parser.add_argument("--timeout", type=int, default=120, metavar="SECONDS",
                        help="limit for one Python test (default 120)")
    parser.add_argument("--binary-timeout", type=int, default=300, metavar="SECONDS",
                        help="limit for one GoogleTest program (default 300)")
    parser.add_argument("--jobs", type=int, default=min(8, 2 * (os.cpu_count() or 1)), metavar="N",
                        help="how many tests of the tier criu run at a time (default: two a "
                        "processor, up to 8); 1: no two tests of any tier")
    parser.add_argument("--lines", type=int, default=60, metavar="N",
                        help="how much of a failing test's output to show (default 60 lines)")
    options = parser.parse_args()
    options.build = os.path.realpath(options.build)
    return options


def stop(signum, frame):
    raise KeyboardInterrupt


def main():
    options = parse_options()
    signal.signal(signal.SIGTERM, stop)
    os.chdir(os.path.dirname(TEST_DIR))  # tests name files of the tree from its top
    os.umask(0o022)  # images in directories that others can write are refused
    runner = Runner(options)
    try:
        for stage in make_stages(options):
            tiers = [t for t in stage if not options.tier or t.name in options.tier]
            if options.list:
                for tier in tiers:
                    runner.list_tier(tier)
            elif options.jobs == 1:
                for tier in tiers:
                    runner.run_stage([tier])
            else:
                runner.run_stage(tiers)
    except KeyboardInterrupt:
        print("interrupted")
        return 130
    return 0 if options.list else runner.summary()


if __name__ == "__main__":
    sys.exit(main())
