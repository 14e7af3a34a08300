"""Rates, counts and paces on a clock of the test's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.errors import TooFast
from streaming.server import limits
from streaming.server.limits import Attempts, AudioPace, Places, network_of


def test_an_address_has_a_burst_and_then_its_rate() -> None:
    """And what it does not use does not add up beyond the burst."""
    attempts = Attempts(per_s=2, burst=3)
    assert [attempts.take("a", 100.0) for _ in range(5)] == [True, True, True, False, False]
    assert [attempts.take("a", 100.5) for _ in range(2)] == [True, False]
    assert [attempts.take("a", 1000.0) for _ in range(4)] == [True, True, True, False]
    assert attempts.take("b", 100.0)


@given(st.lists(st.floats(0, 3), max_size=60))
def test_no_address_gets_more_than_its_rate(pauses: list[float]) -> None:
    """Over any time, at most the burst and the rate times the time."""
    attempts = Attempts(per_s=2, burst=3)
    now, n_taken = 0.0, 0
    for pause in pauses:
        now += pause
        n_taken += attempts.take("a", now)
        assert n_taken <= 3 + 2 * now + 1e-6


def test_addresses_are_forgotten_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one seen longest ago, so that a flood of addresses takes no memory."""
    monkeypatch.setattr(limits, "MAX_ADDRESSES", 2)
    attempts = Attempts(per_s=0.001, burst=1)
    assert [attempts.take(name, 0.0) for name in "abab"] == [True, True, False, False]
    assert attempts.take("c", 0.0)  # forgets a
    assert [attempts.take(name, 0.0) for name in "bca"] == [False, False, True]


def test_places_are_counted_per_holder() -> None:
    """And given back."""
    places = Places()
    places.take("a")
    assert not places.has_room("a", 1)
    assert places.has_room("a", 2)
    assert places.has_room("b", 1)
    places.give_back("a")
    assert places.has_room("a", 1)
    with pytest.raises(AssertionError):
        places.give_back("a")


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("no address", "no address"),
    ],
)
def test_what_is_limited_as_one_address(address: str, network: str) -> None:
    """A host has a whole /64 of IPv6 addresses to come from."""
    assert network_of(address) == network


def test_audio_in_real_time_never_waits() -> None:
    """However long it goes on."""
    pace = AudioPace(speed=2, burst_s=1, ahead_s=10, now_s=0)
    assert [pace.take(0.5, 0.5 * i) for i in range(100)] == [0.0] * 100


def test_audio_that_is_ahead_waits_and_far_ahead_is_refused() -> None:
    """At once the burst; then twice real time; one frame of minutes is too much."""
    pace = AudioPace(speed=2, burst_s=1, ahead_s=10, now_s=0)
    assert pace.take(1.0, 0) == 0
    assert pace.take(4.0, 0) == 2.0
    assert pace.take(0.0, 2.0) == 0
    assert pace.take(9.0, 2.0) == 4.5
    with pytest.raises(
        TooFast, match="more than 10 s ahead; expected at most 1 s at once, then 2 s a second"
    ):
        pace.take(0.1, 2.0)


@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=50))
def test_whoever_waits_as_told_is_never_refused(frames_s: list[float]) -> None:
    """Frames shorter than the distance between the limits, as fast as they may come."""
    pace = AudioPace(speed=3, burst_s=2, ahead_s=7.5, now_s=0)
    now = 0.0
    for audio_s in frames_s:
        now += pace.take(audio_s, now)
    assert now >= (sum(frames_s) - 2) / 3 - 1e-6
