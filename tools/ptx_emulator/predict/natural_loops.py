"""Which instructions of machine code lie in a loop, by dominators.

ptxas moves what is seldom executed to a kernel's end, such as the second try of a wait, and jumps back from there. A
jump back makes a loop only where its goal dominates it: every way to the jump leads through the goal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ptx_emulator.predict.resources import Instruction, following


def in_natural_loops(code: Sequence[Instruction], labels: Mapping[str, int]) -> list[bool]:
    """Whether each instruction lies in a natural loop: between a goal and a jump back to it, on some way that does not
    leave through the goal.

    Code to which no branch leads, such as a function that is called, counts as inside: who calls it is not followed.

    Args:
        code: of one kernel.
        labels: for each label the index of the instruction behind it.

    Raises:
        RuntimeError: a jump whose goal is not in the instruction.
    """
    after = [[to for to in following(at, one, labels) if to < len(code)] for at, one in enumerate(code)]
    before: list[list[int]] = [[] for _ in code]
    order = _reverse_postorder(after)
    for at in order:
        for to in after[at]:
            before[to].append(at)
    number = {at: n for n, at in enumerate(order)}
    dominators = _immediate_dominators(order, before, number)
    inside = [at not in number for at in range(len(code))]
    for jump in order:
        for goal in after[jump]:
            if _dominates(goal, jump, dominators, number):
                for at in _body(goal, jump, before):
                    inside[at] = True
    return inside


def _reverse_postorder(after: Sequence[Sequence[int]]) -> list[int]:
    """What the first instruction leads to, each before what follows it, but for jumps back."""
    if not after:
        return []
    done: list[int] = []
    seen = {0}
    stack = [(0, iter(after[0]))]
    while stack:
        at, rest = stack[-1]
        to = next((to for to in rest if to not in seen), None)
        if to is None:
            done.append(at)
            stack.pop()
        else:
            seen.add(to)
            stack.append((to, iter(after[to])))
    return done[::-1]


def _immediate_dominators(
    order: Sequence[int], before: Sequence[Sequence[int]], number: Mapping[int, int]
) -> dict[int, int]:
    """By K. Cooper, T. Harvey and K. Kennedy, "A Simple, Fast Dominance Algorithm"."""
    found = {order[0]: order[0]} if order else {}
    changed = True
    while changed:
        changed = False
        for at in order[1:]:
            known = [one for one in before[at] if one in found]
            nearest = known[0]
            for one in known[1:]:
                nearest = _common(nearest, one, found, number)
            if found.get(at) != nearest:
                found[at] = nearest
                changed = True
    return found


def _common(a: int, b: int, dominators: Mapping[int, int], number: Mapping[int, int]) -> int:
    while a != b:
        if number[a] > number[b]:
            a = dominators[a]
        else:
            b = dominators[b]
    return a


def _dominates(goal: int, at: int, dominators: Mapping[int, int], number: Mapping[int, int]) -> bool:
    while number[at] > number[goal]:
        at = dominators[at]
    return at == goal


def _body(goal: int, jump: int, before: Sequence[Sequence[int]]) -> set[int]:
    """The loop of one jump back."""
    found, rest = {goal, jump}, [jump] if jump != goal else []
    while rest:
        for one in before[rest.pop()]:
            if one not in found:
                found.add(one)
                rest.append(one)
    return found
