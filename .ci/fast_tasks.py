"""Task types that end at once, for whoever tries the API."""

from typing import Any, Dict, List, Literal, Optional

import longtasks
from longtasks import Context, handler

longtasks.REGISTRY.pop("long_computation")  # it would keep the workers for a week


@handler("add", limits={"a": {"minimum": -5, "maximum": 9}})
def add(a: int, b: float = 0.5, *, ctx: Context):
    """Add two numbers."""
    ctx.log("adding")
    ctx.progress(0.5, "half way")
    return a + b


@handler("echo", max_running=2)
def echo(params: dict):
    """Give back what was given."""
    return params


@handler("fail")
def fail(way: Literal["a", "b"], names: Optional[List[str]] = None, **rest: Any):
    """Fail, whatever comes."""
    raise ValueError(way)


@handler("many")
def many(sizes: Dict[str, int], deep: Optional[List[Dict[str, float]]] = None):
    """Count."""
    return len(sizes)
