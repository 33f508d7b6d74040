"""What Apple publishes of its chips.

Bandwidths of the M series are those of Apple's announcements and technical specifications; those of the A series are of
their memory: 64 bits of LPDDR5 at 6400 MT/s (A16 Bionic, A17 Pro) and of LPDDR5X at 7500 MT/s (A18, A18 Pro). Operations
a second are those of the Neural Engine, as announced; since the A17 Pro and the M4 they are of int8, and those of float16
are taken as half.

Sources: Apple newsroom, announcements of M1 (November 2020), M1 Pro and Max (October 2021), M2 (June 2022), A16 Bionic
(September 2022), A17 Pro (September 2023), M3 (October 2023), M4 (May 2024), A18 (September 2024), M4 Pro and Max
(October 2024); technical specifications of MacBook Air and MacBook Pro.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One of Apple's chips."""

    name: str
    gigabytes_per_s: float  # from memory
    float16_tops: (
        float  # of the Neural Engine, 10^12 operations a second; a multiplication and an addition are two
    )


CHIPS = (
    Chip("A16 Bionic", 51.2, 17.0),
    Chip("A17 Pro", 51.2, 17.5),
    Chip("A18", 60.0, 17.5),
    Chip("A18 Pro", 60.0, 17.5),
    Chip("M1", 68.25, 11.0),
    Chip("M1 Max", 400.0, 11.0),
    Chip("M2", 100.0, 15.8),
    Chip("M3", 100.0, 18.0),
    Chip("M4", 120.0, 19.0),
    Chip("M4 Pro", 273.0, 19.0),
    Chip("M4 Max", 546.0, 19.0),
)

# Of what is published, what a model gets. Apple gives 30 tokens/s and 0.6 ms for a token of a prompt on an A17 Pro for
# its model of 2.7 billion weights at 3.7 bits, which is 25 ms and 0.31 ms by the figures above. Source: "Introducing
# Apple's On-Device and Server Foundation Models", June 2024.
BANDWIDTH_SHARE, COMPUTE_SHARE = 0.75, 0.52
