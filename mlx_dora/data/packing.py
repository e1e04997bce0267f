"""Fits documents into rows of one length."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into boxes, each into the fullest box that still has room for it.

    Args:
        lengths: Lengths of the items, in the order of packing, at most `capacity`.
        capacity: Capacity of each box.

    Returns:
        For each box, the indices of its items in `lengths`.
    """
    boxes: list[list[int]] = []
    by_room: defaultdict[int, list[int]] = defaultdict(list)  # room -> boxes
    rooms: list[int] = []  # keys of by_room that have boxes, sorted
    for place, length in enumerate(lengths):
        nearest = bisect_left(rooms, length)
        if nearest == len(rooms):
            box, room = len(boxes), capacity
            boxes.append([])
        else:
            room = rooms[nearest]
            box = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(nearest)
        boxes[box].append(place)
        left = room - length
        if not by_room[left]:
            insort(rooms, left)
        by_room[left].append(box)
    return boxes
