"""The table of faults, printed after the tests: what was done, how often, what was lost, and how long recovery took."""

import os
import re
import time

import pytest

from jaxpeft.runtime.text import aligned


def pytest_generate_tests(metafunc):
    """FAULT_TIMES=10 runs every fault ten times; the table adds them up."""
    if (n := int(os.environ.get("FAULT_TIMES", "1"))) > 1:
        metafunc.fixturenames.append("again")
        metafunc.parametrize("again", range(n), ids=lambda i: f"again{i}")


class Fault:
    """What one test saw. `steps_lost`: steps that had to be repeated; `timed()` measures the recovery."""

    def __init__(self, name):
        self.name, self.done, self.tries, self.steps_lost, self.seconds = name, "", 0, 0, 0.0

    def tried(self, done: str, steps_lost: int = 0, seconds: float = 0.0):
        self.done, self.tries = done, self.tries + 1
        self.steps_lost, self.seconds = max(self.steps_lost, steps_lost), max(self.seconds, seconds)

    def timed(self, function, *args, **kwargs):
        """Call `function` and count its seconds as those of recovery -> its result."""
        began = time.perf_counter()
        value = function(*args, **kwargs)
        self.seconds = max(self.seconds, time.perf_counter() - began)
        return value


@pytest.fixture
def fault(request):
    """The row of this test; its name is the first line of the test's docstring."""
    row = Fault(request.function.__doc__.splitlines()[0].rstrip("."))
    case = re.sub(r"-?again\d+-?", "", request.node.name.partition("[")[2].rstrip("]"))
    row.name += f" ({case})" if case else ""
    failed = request.session.testsfailed
    yield row
    if request.session.testsfailed > failed:
        return
    assert row.tries, "a test with `fault` must call fault.tried(...)"
    # user properties are sent from workers of pytest-xdist to the process that prints the table
    request.node.user_properties.append(("fault", vars(row)))


def pytest_terminal_summary(terminalreporter):
    properties = [
        one for report in terminalreporter.getreports("") if report.when == "teardown" for one in report.user_properties
    ]  # fmt: skip
    found = [value for name, value in properties if name == "fault"]
    if not found:
        return
    terminalreporter.section("faults")
    rows = [("fault", "tries", "steps repeated", "s to recover", "what was seen")]
    for name in dict.fromkeys(r["name"] for r in found):
        same = [r for r in found if r["name"] == name]
        tries, lost, seconds = (
            f([r[key] for r in same]) for f, key in ((sum, "tries"), (max, "steps_lost"), (max, "seconds"))
        )
        rows.append((name, str(tries), str(lost), f"{seconds:.1f}", same[-1]["done"]))
    for line in aligned(rows, left=len(rows[0])):
        terminalreporter.line(line)
