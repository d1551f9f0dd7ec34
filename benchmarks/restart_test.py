"""What the benchmark of restarts makes of its moments."""

from benchmarks.restart import Robot, longest_gap, missing_spans, overlap


def test_the_longest_gap_lies_between_answers_or_at_an_end_of_the_window():
    assert longest_gap([1, 2, 5, 6], (0, 7)) == (2, 5)
    assert longest_gap([1, 2, 5, 6], (0, 20)) == (6, 20)
    assert longest_gap([-9, 1, 30], (0, 3)) == (1, 3)
    assert longest_gap([], (2, 3)) == (2, 3)


def test_how_much_of_a_gap_lies_in_other_spans():
    assert overlap((2, 5), []) == 0
    assert overlap((2, 5), [(0, 1), (6, 7)]) == 0
    assert overlap((2, 5), [(0, 3), (4, 4.5), (4.75, 9)]) == 1 + 0.5 + 0.25
    assert overlap((2, 5), [(0, 9)]) == 3


def test_spans_in_which_nothing_was_found():
    samples = [(0, True), (1, False), (2, False), (3, True), (4, True), (5, False), (6, False)]
    assert missing_spans(samples) == [(1, 3), (5, 6)]
    assert missing_spans(samples[:1]) == missing_spans([]) == []


def test_the_figures_of_a_robot_are_of_its_window_alone():
    robot = Robot(8000)
    robot.answers, robot.failures, robot.new_clients = [0, 10, 11, 14, 15, 40], [1, 12, 13], [1]
    figures = robot.figures((10, 15), not_listening=[(9, 13)], not_ready=[(11.5, 13.5)])
    assert figures == {
        "without_answer_s": 3,
        "not_listening_s": 2,
        "not_ready_s": 2,
        "failed_calls": 2,
        "needs_new_client": False,
    }
    assert robot.figures((0, 15), [], [])["needs_new_client"]
