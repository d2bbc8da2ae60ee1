"""Greedy ternary search: the optimum of unimodal scores, few of them, and the published landscape."""

import itertools

import pytest

from cm_core.search import Search

PUBLISHED = {5: 3.649, 9: 3.319, 10: 3.051, 11: 2.928, 12: 3.049, 13: 3.277, 14: 3.460}  # CM, CD on CIFAR-10, LPIPS


def test_the_published_landscape_has_its_minimum_at_11():
    search = Search(lambda indices: PUBLISHED[indices[1]])
    assert search.run(num_scales=18, nfe=2) == (0, 11)
    assert sorted(indices[1] for indices in search.scores) == sorted(PUBLISHED), "exactly the published candidates"


@pytest.mark.parametrize("num_scales", [3, 4, 5, 6, 7, 18, 40])
def test_the_minimum_is_found_wherever_it_lies(num_scales):
    for best in range(1, num_scales - 1):
        search = Search(lambda indices, best=best: abs(indices[1] - best) ** 1.5)
        assert search.run(num_scales=num_scales, nfe=2) == (0, best)
        assert all(0 < indices[1] < num_scales - 1 for indices in search.scores)


def test_scores_are_few_and_none_is_computed_twice():
    asked = []

    def score(indices):
        asked.append(indices)
        return (indices[1] - 600) ** 2

    assert Search(score).run(num_scales=1001, nfe=2) == (0, 600)
    assert len(asked) == len(set(asked)) <= 36  # 2 log(1000) / log(3/2) + 1


def test_points_are_added_one_at_a_time_in_any_gap():
    target = (0, 6, 11, 15)
    tried = []

    def score(indices):
        """The distance of the target's points to the nearest chosen one: greedy finds the best first."""
        tried.append(indices)
        return sum(min(abs(t - i) for i in indices) ** 2 for t in target)

    found = Search(score).run(num_scales=18, nfe=4)
    assert found[0] == 0 and len(set(found)) == 4 and list(found) == sorted(found)
    best: tuple[int, ...] = (0,)
    for _ in range(3):
        best = min((tuple(sorted({*best, i})) for i in range(1, 17) if i not in best), key=score)
    assert found == best
    assert {len(indices) for indices in tried} == {2, 3, 4}


def test_every_gap_down_to_single_points_is_used():
    assert Search(lambda indices: 1 / len(indices)).run(num_scales=5, nfe=4) == (0, 1, 2, 3)


def test_the_best_of_all_seen_is_returned_where_there_are_two_minima():
    scores = dict(zip(range(1, 17), itertools.chain([5, 4, 3, 2, 0.5, 2, 3, 4, 5, 4, 3, 2, 1, 2, 3, 4]), strict=True))
    search = Search(lambda indices: scores[indices[1]])
    found = search.run(num_scales=18, nfe=2)
    assert search.scores[found] == min(search.scores.values())


@pytest.mark.parametrize("nfe", [0, 1, 18, 40])
def test_impossible_numbers_of_points_are_refused(nfe):
    with pytest.raises(ValueError, match=f"nfe={nfe} must lie between 2 and num_scales - 1 = 17"):
        Search(lambda indices: 0.0).run(num_scales=18, nfe=nfe)


def test_a_score_that_is_no_number_ends_the_search():
    with pytest.raises(ValueError, match=r"the score of \[0, 5\] is nan"):
        Search(lambda indices: float("nan")).run(num_scales=18, nfe=2)
