"""Windows stay inside the video, continue at frame 0 in a short video, and depend on their arguments only."""

import itertools
from collections import Counter

import numpy as np
import pytest

from dclr.data import clips


def test_a_window_keeps_every_second_frame_and_loops_past_the_end():
    assert clips.window(3, 100, 4, 2).tolist() == [3, 5, 7, 9]
    assert clips.window(0, 5, 6, 2).tolist() == [0, 2, 4, 1, 3, 0]


@pytest.mark.parametrize("frames", [1, 7, 31, 32, 33, 400], ids=lambda n: f"{n} frames")
def test_random_windows_end_inside_the_video_where_it_is_long_enough(frames):
    starts = {clips.random_start(np.random.default_rng(i), frames, 16, 2) for i in range(300)}
    assert min(starts) == 0
    assert max(starts) <= max(frames - 32, 0)
    assert len(starts) == min(max(frames - 32, 0) + 1, len(starts))
    if frames == 33:
        assert starts == {0, 1}  # both ends are reached


def test_the_still_lies_at_the_same_offset_in_both_windows_and_may_be_a_skipped_frame():
    offsets = set()
    for i in range(300):
        pair = clips.draw_pair(clips.sample_rng(0, 0, i), 1000, 16, 2)
        assert pair.query_still - pair.query[0] == pair.key_still - pair.key[0]
        offsets.add(int(pair.query_still - pair.query[0]))
    assert offsets == set(range(32))


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_the_two_starts_are_uniform_over_all_pairs_of_different_starts(windows):
    frames, count = 32 + windows - 1, 600
    pairs = [clips.draw_pair(clips.sample_rng(0, 0, i), frames, 16, 2) for i in range(count)]
    found = Counter((int(pair.query[0]), int(pair.key[0])) for pair in pairs)
    possible = list(itertools.permutations(range(windows), 2)) or [(0, 0)]  # a short video has one window
    assert sorted(found) == possible
    assert min(found.values()) > 0.7 * count / len(possible)


def test_independent_starts_are_those_of_earlier_versions():
    equal = 0
    for index in range(200):
        rng, again = clips.sample_rng(0, 0, index), clips.sample_rng(0, 0, index)
        pair = clips.draw_pair(rng, 36, 16, 2, distinct_starts=False)
        query, key, offset = again.integers(5), again.integers(5), again.integers(32)
        assert (pair.query[0], pair.key[0], pair.query_still) == (query, key, (query + offset) % 36)
        assert rng.random() == again.random()
        equal += query == key
    assert equal > 20


def test_draws_depend_on_seed_epoch_and_index_alone():
    def draw(*key):
        return clips.sample_rng(*key).integers(1 << 30, size=4).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({tuple(draw(*key)) for key in [(1, 2, 3), (1, 3, 2), (2, 1, 3), (3, 2, 1), (1, 2, 4)]}) == 5


def test_an_epoch_visits_each_video_once_in_an_order_of_its_own():
    first, again, second = (clips.epoch_order(0, epoch, 50) for epoch in (0, 0, 1))
    assert first.tolist() == again.tolist() != second.tolist()
    assert sorted(first.tolist()) == list(range(50))


def test_uniform_clips_run_from_the_first_window_to_the_last():
    found = clips.uniform_clips(132, 10, 16, 2)
    assert found.shape == (10, 16)
    assert found[0, 0] == 0
    assert found[-1, 0] == 100
    assert np.ptp(np.diff(found[:, 0])) <= 1  # evenly, to a frame
    assert (clips.uniform_clips(5, 10, 16, 2) < 5).all()


def test_the_same_frames_change_no_other_random_number():
    for index in range(20):
        first, second = clips.sample_rng(0, 0, index), clips.sample_rng(0, 0, index)
        pair = clips.draw_pair(first, 1000, 16, 2)
        same = clips.draw_pair(second, 1000, 16, 2, same_frames=True)
        assert (same.query == pair.query).all()
        assert (same.key == pair.query).all()
        assert same.key_still == same.query_still == pair.query_still
        assert first.random() == second.random()
