"""The size of images, inside and as settings and configs spell it.

size         (height, width) in pixels
resolution   a size as the setting and as `sample_size` of a network: one number for squares, else [height, width]
"""

from __future__ import annotations

from typing import Any, TypeAlias

from hf_ddpm.runtime.errors import UsageError

Size: TypeAlias = tuple[int, int]


def to_size(resolution: Any, name: str = "resolution") -> Size:
    """Return the size that a resolution spells.

    Args:
        resolution: The side of a square, or height and width: an int, or a list of ints.
        name: What error messages call it.

    Raises:
        UsageError: When it spells none.
    """
    sides = resolution if isinstance(resolution, list | tuple) else [resolution]
    if len(sides) not in (1, 2) or not all(type(side) is int and side > 0 for side in sides):
        raise UsageError(f"{name} must be a whole number above 0, or a height and a width, got {resolution!r:.200}")
    return sides[0], sides[-1]


def to_resolution(size: Size) -> int | list[int]:
    """Return the spelling of a size."""
    return size[0] if size[0] == size[1] else [*size]


def format_size(size: Size) -> str:
    """Return a size for people, as `64 x 64`; of an oblong one they read which side is which."""
    return f"{size[0]} x {size[1]}{' (height x width)' * (size[0] != size[1])}"


def require_factor(factor: int, size: Size) -> None:
    """Check that images can be made smaller by a factor.

    Raises:
        UsageError: When it does not divide the resolution, or leaves nothing to enlarge.
    """
    if any(side % factor or factor >= side for side in size):
        divisors = [str(k) for k in range(2, min(size)) if not any(side % k for side in size)]
        remedy = f"give one of {', '.join(divisors)}" if divisors else "give another --resolution"
        raise UsageError(f"super_resolution must divide the resolution, {format_size(size)}, got {factor}: {remedy}")
