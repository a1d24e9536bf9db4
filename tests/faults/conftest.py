"""The table of faults, printed when the tests have run: what was done, how often, what was lost, how long recovery took."""

import time

import pytest


class Fault:
    """What one test saw. `steps_lost`: steps that had to be done again; `recovering()` times coming back."""

    def __init__(self, name):
        self.name, self.done, self.tries, self.steps_lost, self.seconds = name, "", 0, 0, 0.0

    def tried(self, done: str, steps_lost: int = 0, seconds: float = 0.0):
        self.done, self.tries = done, self.tries + 1
        self.steps_lost, self.seconds = max(self.steps_lost, steps_lost), max(self.seconds, seconds)

    def timed(self, function, *args, **kwargs):
        """What `function` returns, and its seconds as those of recovery."""
        began = time.perf_counter()
        value = function(*args, **kwargs)
        self.seconds = max(self.seconds, time.perf_counter() - began)
        return value


@pytest.fixture
def fault(request):
    """The row of this test; its name is the first line of the test's docstring."""
    row = Fault(request.function.__doc__.splitlines()[0].rstrip("."))
    case = request.node.name.partition("[")[2].rstrip("]")
    row.name += f" ({case})" if case else ""
    failed = request.session.testsfailed
    yield row
    if request.session.testsfailed > failed:
        return
    assert row.tries, "a test of a fault says what it did: fault.tried(...)"
    # properties go with a report from a worker of pytest-xdist to the process that prints the table
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
    rows += [(r["name"], str(r["tries"]), str(r["steps_lost"]), f"{r['seconds']:.1f}", r["done"]) for r in found]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        terminalreporter.line("  ".join(value.ljust(w) for value, w in zip(row, widths, strict=True)).rstrip())
