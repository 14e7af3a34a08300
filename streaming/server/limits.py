"""How much one connection, token or address may take: rates, counts, and audio against real time.

Pure: no socket, and no clock but the seconds that are handed in.
"""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

from streaming.config import LimitsConfig, ServerConfig
from streaming.errors import TooFast

MAX_ADDRESSES = 10_000  # remembered at once; beyond it the one that was seen longest ago is forgotten


def network_of(address: str) -> str:
    """What is limited as one: an IPv4 address, the /64 of an IPv6 address, which one host may have whole."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))


class Attempts:
    """Requests of each address: a burst, then so many a second.

    At `MAX_ADDRESSES` the one seen longest ago is forgotten, and its next request has the whole
    burst again: a flood from that many addresses looks like that many visitors.
    """

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s = per_s
        self._burst = burst
        # Requests left, and when; the address seen longest ago first.
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, address: str, now_s: float) -> bool:
        """Count a request; False where the address has none left."""
        left, at = self._left.pop(address, (float(self._burst), now_s))
        left = min(self._burst, left + (now_s - at) * self._per_s)
        is_free = left >= 1
        self._left[address] = (left - 1 if is_free else left, now_s)
        if len(self._left) > MAX_ADDRESSES:
            self._left.popitem(last=False)
        return is_free


class Places:
    """How many of something each holder has now. Holds only those who have some."""

    def __init__(self) -> None:
        self._taken: Counter[Hashable] = Counter()

    def has_room(self, holder: Hashable, limit: int) -> bool:
        """Whether the holder may have one more."""
        return self._taken[holder] < limit

    def take(self, holder: Hashable) -> None:
        """The holder has one more."""
        self._taken[holder] += 1

    def give_back(self, holder: Hashable) -> None:
        """The holder has one less."""
        assert self._taken[holder] > 0, holder
        self._taken[holder] -= 1
        if not self._taken[holder]:
            del self._taken[holder]


class AudioPace:
    """How far one stream's audio is ahead of the speed it may have.

    The audio may come `speed` times as fast as it was spoken, and `burst_s` seconds of it at once.
    Audio of whoever is further ahead waits until it is not; whoever is further ahead than `ahead_s`,
    which takes single frames of minutes, is refused.
    """

    def __init__(self, speed: float, burst_s: float, ahead_s: float, now_s: float) -> None:
        self._speed = speed
        self._burst_s = burst_s
        self._ahead_s = ahead_s
        self._ahead = 0.0  # seconds of audio, at `_at`
        self._at = now_s

    def take(self, audio_s: float, now_s: float) -> float:
        """Count audio that came; gives the seconds to wait before reading on.

        Raises:
            TooFast: it is further ahead than the server allows.
        """
        self._ahead = max(0.0, self._ahead - (now_s - self._at) * self._speed) + audio_s
        self._at = now_s
        if self._ahead > self._ahead_s:
            raise TooFast(
                f"the audio is more than {self._ahead_s:g} s ahead; expected at most "
                f"{self._burst_s:g} s at once, then {self._speed:g} s a second"
            )
        return max(0.0, self._ahead - self._burst_s) / self._speed


@dataclass(frozen=True, slots=True)
class ProducerLimits:
    """The settings a producer's connection goes by."""

    server: ServerConfig
    limits: LimitsConfig
    ack_interval_s: float
    languages: tuple[str, ...]  # codes the model can be set to
    language: str | None  # the server's setting, where a client asks for none; None: detect
    tasks: tuple[str, ...]  # what the model does
    spool_folder: Path  # where frames wait that a stream has not taken yet
    spool_bytes: int  # of them, of one connection

    def new_pace(self, now_s: float) -> AudioPace:
        """What holds back a client whose audio comes too fast, from now on."""
        limits = self.limits
        return AudioPace(limits.audio_speed, limits.audio_burst_s, limits.audio_ahead_s, now_s)
