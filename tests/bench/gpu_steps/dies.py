"""A process that dies without a word, between two parts that do not."""

import os


def parts(visit):
    yield "before", lambda: [{"right": True}]
    yield "dies", lambda: [os._exit(7)]
    yield "after", lambda: [{"right": True}]
