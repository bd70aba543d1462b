"""Settings of pytest that hold for the tests and for the chapters."""

import os

os.environ["BDUTILS_QUIET"] = "1"  # a progress bar is an output that the stored page has not

def pytest_collectstart(collector) -> None:
    """Leave out of nbval's comparison what differs from machine to machine.

    A table's HTML has a plain-text twin in the same output, and a slider's HTML holds images
    and a `repr`: both are still compared as text.
    """
    if hasattr(collector, "skip_compare"):  # nbval's collector of notebooks
        collector.skip_compare += ("text/html",)
