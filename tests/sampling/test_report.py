"""Numbers of steps, in one form in every table."""

from skipdit import SkipCache
from skipdit.sampling.report import step_counts, steps_column, steps_in_words


def test_columns_have_forecasts_where_there_are_some():
    timesteps = range(900, 0, -100)
    uncached = step_counts(SkipCache("none", timesteps))
    cached = step_counts(SkipCache("N3-1000-0", timesteps))
    forecast = step_counts(SkipCache("N3-1000-0-b0-o1", timesteps))
    assert steps_column([{}, uncached, cached]) == ("full + cached steps", ["–", "9 + 0", "3 + 6"])
    title, (first, second) = steps_column([uncached, forecast])
    assert (title, first, second) == ("full + cached + forecast steps", "9 + 0 + 0", "3 + 0 + 6")
    older = {"full_steps": 5, "cached_steps": 4}  # of files from before there were forecasts
    assert steps_column([older]) == ("full + cached steps", ["5 + 4"])


def test_steps_are_told_by_the_kinds_that_there_are():
    told = {"full": 14, "cached": 36, "forecast": 0}
    assert steps_in_words(told) == "14 full and 36 cached steps"
    assert steps_in_words(told | {"cached": 0}) == "14 full steps"
    assert steps_in_words(told | {"cached": 0, "forecast": 36}) == "14 full steps and 36 forecasts"
