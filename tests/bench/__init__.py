"""`scripts/bench`: the cost of Drover, measured side by side with its alternatives.

Nothing here asserts a speed: machines differ, and a shared one differs from minute to minute. Every figure is printed with the
conditions of its measurement, and with its minimum, which is the least disturbed.
"""
