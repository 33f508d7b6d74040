"""Which device sends which layers to which, where a pipeline goes round its devices more than once."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Move:
    """A permutation of devices by which each sends one of its blocks of layers, and gets one."""

    block: tuple[int, ...]  # which of its own a device sends
    to: tuple[int, ...]
    round: tuple[int, ...]  # which stage of its a device gets


def moves(devices: int, rounds: int) -> list[Move]:
    """The moves that take block k of the layers, which device k // rounds holds, to device k % devices, as round k // devices."""
    common = math.gcd(devices, rounds)
    found = []
    for i in range(rounds):
        # Devices whose blocks would go to the same place begin with another block.
        block = tuple((i + device * common // devices) % rounds for device in range(devices))
        sent = [device * rounds + block[device] for device in range(devices)]
        by_receiver = sorted(sent, key=lambda k: k % devices)
        found.append(Move(block, tuple(k % devices for k in sent), tuple(k // devices for k in by_receiver)))
    return found
