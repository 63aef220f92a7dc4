"""Task types for .ci/mcp, and those that @modelcontextprotocol/conformance calls."""

import os

from longtasks import Context, handler


@handler("greet")
def greet(name: str):
    """Greet somebody."""
    return "Hello, %s!" % name


@handler("slow_compute")
def slow_compute(seconds: float, label: str = "slow", *, ctx: Context):
    """Sleep for some seconds, and as long as there is a file `hold`."""
    for step in range(10):
        ctx.progress(step / 10, "step %d" % step)
        ctx.log("step %d" % step)
        ctx.sleep(seconds / 10)
    while os.path.exists("hold"):
        ctx.sleep(0.05)
    return {"label": label}


@handler("failing_job")
def failing_job(seconds: float = 1.5, *, ctx: Context):
    """Fail after some seconds."""
    ctx.sleep(seconds)
    raise ValueError("it fails")


@handler("test_simple_text")
def simple_text():
    """Return a text."""
    return "This is a simple text response for testing."


@handler("test_tool_with_progress")
def with_progress(*, ctx: Context):
    """Report progress three times."""
    for fraction in (0, 0.5, 1):
        ctx.progress(fraction, "on its way")
        ctx.sleep(0.15)
    return "done"


@handler("test_error_handling")
def with_error():
    """Fail."""
    raise ValueError("This tool intentionally returns an error for testing")
