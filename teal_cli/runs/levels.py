"""The sparsity levels of a dump: `0.5`, `0.25,0.5,0.9`, or `start:stop:step` with both ends in it."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

from teal_cli.errors import UsageError

_HINT = "levels look like 0.5, or 0.25,0.5,0.9, or 0.50:0.95:0.05 (start:stop:step, both ends in it)"


def parse_levels(text: str) -> tuple[float, ...]:
    """Read levels, in rising order and each once.

    Decimal arithmetic, so that 0.50:0.95:0.05 has ten levels and the last one is 0.95.

    Raises:
        UsageError: text that is no level, a level outside [0, 1), a step that leads nowhere.
    """
    levels: set[Decimal] = set()
    for part in text.split(","):
        levels.update(_expand(part.strip(), text))
    if outside := sorted(level for level in levels if not 0 <= level < 1):
        raise UsageError(f"sparsity must be at least 0 and below 1, not {outside[0]}", hint=_HINT)
    return tuple(float(level) for level in sorted(levels))


def _expand(part: str, text: str) -> list[Decimal]:
    try:
        numbers = [Decimal(number.strip()) for number in part.split(":")]
        if not all(number.is_finite() for number in numbers):
            raise InvalidOperation
    except InvalidOperation:
        raise UsageError(f"cannot read the sparsity levels {text!r}", hint=_HINT) from None
    if len(numbers) == 1:
        return numbers
    if len(numbers) != 3:
        raise UsageError(f"a range of levels needs start:stop:step, not {part!r}", hint=_HINT)
    start, stop, step = numbers
    if step <= 0 or stop < start:
        raise UsageError(f"the range {part!r} holds no levels", hint=_HINT)
    return [start + i * step for i in range(int((stop - start) / step) + 1)]
