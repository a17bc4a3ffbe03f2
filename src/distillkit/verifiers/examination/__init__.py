"""Two processes that examine a program: one runs the program, the other its tests.

The tests reach the program through a socket alone. Plain data crosses as JSON; any other object stays in its process
and is used by reference. So the program shares no memory with the tests: it can't read their frames, replace what they
compare with, or report their success. Only the standard library is imported, since a sandbox may have no more.
"""
