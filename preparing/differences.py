"""Where the settings of a store differ from those of a run: a line for each."""


def differences(found: dict, expected: dict) -> str:
    """Lines like "\\n  mert revision: 'a' there, 'b' now" for what is not the same, settings inside settings too."""
    return "".join(f"\n  {line}" for line in _lines(found, expected, ""))


def _lines(found: dict, expected: dict, inside: str) -> list[str]:
    lines = []
    for name in dict.fromkeys([*found, *expected]):
        one, other, title = found.get(name), expected.get(name), inside + name
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            lines += _lines(one, other, "" if title == "encoders" else f"{title} ")
        elif isinstance(one, dict) or isinstance(other, dict):
            lines.append(f"{title}: {'only in the store' if other is None else 'not in the store'}")
        elif name == "recordings":  # a digest, which says nothing to anybody
            lines.append("the recordings, their captions or their split")
        else:
            lines.append(f"{title}: {one!r} there, {other!r} now")
    return lines
