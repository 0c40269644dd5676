"""`scripts/bench`: what Drover costs, measured side by side with what it is compared with.

Nothing here asserts a speed: machines differ, and a shared one differs from minute to minute. Every figure is printed with the
conditions under which it came about, and with its minimum, which is the least disturbed.
"""
