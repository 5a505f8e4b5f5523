"""What a compiled program sends between devices, read from its text."""

import collections
import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Bytes that a device sends for each byte of the result, when many take part.
SENT = {"all-gather": 1, "all-reduce": 2, "reduce-scatter": 1, "all-to-all": 1, "collective-permute": 1}
BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16, "f32": 32, "s32": 32, "u32": 32,
        "f64": 64, "s64": 64, "u64": 64}  # fmt: skip
HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
OPERATION = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
CALL = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
COUNT = re.compile(r"known_trip_count[^}]*?\"n\":\"(\d+)\"")
CHANNEL = re.compile(r"channel_id=(\d+)")
SOURCE = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation of the text, in a step."""

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # (dtype, shape) of each array that it gives
    times: int  # how often it runs
    source: str  # operation of the model that it comes from

    @property
    def bytes(self) -> float:
        """Of what it gives, all runs together."""
        return self.times * sum(BITS.get(dtype, 32) / 8 * math.prod(shape) for dtype, shape in self.shapes)

    @property
    def sent_bytes(self) -> float:
        return SENT[self.kind] * self.bytes


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of a program, those in loops with the number of turns.

    One that runs beside other work is written in several pieces, which have one channel.
    """
    bodies = _computations(text)
    times, found = _times(bodies), {}
    for name, lines in bodies.items():
        for line in lines:
            match = OPERATION.search(line)
            if match and times[name]:
                source, channel = SOURCE.search(line), CHANNEL.search(line)
                shapes = _shapes(match[1], match[2], "-start(" in line)
                one = Collective(match[2], shapes, times[name], source[1] if source else "")
                key = channel[1] if channel else len(found)
                found[key] = max(one, found.get(key, one), key=lambda one: one.bytes)
    return list(found.values())


def by_kind(found: list[Collective]) -> dict[str, dict[str, float]]:
    """Returns {kind: {"count": runs, "bytes": of what they give}}, kinds in their order."""
    return {
        kind: {"count": sum(one.times for one in of_kind), "bytes": sum(one.bytes for one in of_kind)}
        for kind in KINDS
        if (of_kind := [one for one in found if one.kind == kind])
    }


def arrays(text: str) -> set[tuple[int, ...]]:
    """Returns the shapes of all arrays in a program, with axes of length one left out."""
    return {
        tuple(int(size) for size in shape.split(",") if size != "1")
        for shape in re.findall(r"\b(?:f32|bf16|f16)\[([\d,]+)\]", text)
    }


def _shapes(result: str, kind: str, starts: bool) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The result of an asynchronous start holds its operands first, but for all-reduce."""
    each = [
        (dtype, tuple(int(size) for size in shape.split(",") if size))
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result)
        if dtype in BITS
    ]
    if starts and kind != "all-reduce" and len(each) > 1:
        each = each[len(each) // 2 : len(each) // 2 * 2] if kind != "collective-permute" else each[1:2]
    return tuple(each)


def _computations(text: str) -> dict[str, list[str]]:
    bodies, name = collections.defaultdict(list), None
    for line in text.splitlines():
        head = HEAD.match(line)
        if head:
            name = "ENTRY" if line.startswith("ENTRY") else head[1]
        elif name is not None:
            bodies[name].append(line)
    return bodies


def _times(bodies: dict[str, list[str]]) -> collections.Counter:
    """Returns how often each computation runs."""
    times = collections.Counter({"ENTRY": 1})
    callers: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    for name, lines in bodies.items():
        for line in lines:
            loop = LOOP.search(line)
            turns = _turns(bodies, line, loop[1]) if loop else 1
            for callee in [loop[2]] if loop else CALL.findall(line):
                callers[callee].append((name, turns))

    def of(name: str) -> int:
        if name not in times:
            times[name] = sum(of(caller) * turns for caller, turns in callers[name])
        return times[name]

    for name in bodies:
        of(name)
    return times


def _turns(bodies: dict[str, list[str]], line: str, condition: str) -> int:
    """Returns the turns of a loop that counts to a constant; 1 where that cannot be told."""
    known = COUNT.search(line)
    if known:
        return int(known[1])
    limits = [
        int(n) for line in bodies[condition] for n in re.findall(r"[su]32\[\](?:\{[^}]*\})? constant\((\d+)\)", line)
    ]
    return max(limits, default=1)
