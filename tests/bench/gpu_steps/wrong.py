"""A wrong answer, an exception, and a part after them."""


def fail():
    raise ValueError("this part fails")
    yield


def parts(visit):
    yield "wrong", lambda: [{"right": False}]
    yield "raises", fail
    yield "after", lambda: [{"right": True}]
