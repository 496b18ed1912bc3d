# SPDX-License-Identifier: GPL-2.0-only
"""Lists, or runs one of, the unittest cases of a directory. Called by run.py, each case in a
process of its own, so that a hang or a crash costs one case.

    case.py list DIR             prints a JSON list of case names (module.Class.method)
    case.py run DIR NAME RESULT  runs one; writes {"status": ok|fail|skip, "reason": ...} to RESULT
"""

import json
import sys
import unittest


def flatten(suite):
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from flatten(item)
        else:
            yield item


def case_name(case):
    # A module that fails to import becomes a case of unittest.loader._FailedTest, one that raises
    # SkipTest one of ModuleSkipped; both are named after the module.
    if type(case).__module__ == "unittest.loader":
        return case._testMethodName
    return case.id()


def load(directory, pattern):
    return flatten(unittest.defaultTestLoader.discover(directory, pattern, directory))


def list_cases(directory):
    json.dump([case_name(case) for case in load(directory, "test_*.py")], sys.stdout)


def run_case(directory, name, result_path):
    result = unittest.TestResult()
    cases = [case for case in load(directory, name.split(".")[0] + ".py")
             if case_name(case) == name]
    unittest.TestSuite(cases).run(result)
    problems = result.errors + result.failures
    if problems or result.unexpectedSuccesses:
        text = "".join(trace for _, trace in problems) or "passes although marked as a failure"
        sys.stdout.write(text)
        outcome = {"status": "fail", "reason": text.strip().splitlines()[-1]}
    elif result.skipped:
        outcome = {"status": "skip", "reason": result.skipped[0][1]}
    elif result.testsRun == 0:
        outcome = {"status": "fail", "reason": "no such test case"}
    else:
        outcome = {"status": "ok", "reason": ""}
    with open(result_path, "w", encoding="utf-8") as f:
        json.dump(outcome, f)


def main():
    if sys.argv[1] == "list":
        list_cases(sys.argv[2])
    else:
        run_case(sys.argv[2], sys.argv[3], sys.argv[4])


if __name__ == "__main__":
    main()
