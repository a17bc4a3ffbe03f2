"""What crosses between a program and its tests: data, objects, exceptions, printed text."""

import pytest

from distillkit.types import Prompt, Prompts, Response
from distillkit.verifiers.code import PythonTests

PROGRAM = """
import collections
import dataclasses
import datetime
import enum
import fractions
import math

LIMIT = 3
calls = 0

def same(value):
    return value

def count():
    global calls
    calls += 1

def sort(values):
    values.sort()

def fill(table, *, key="k"):
    table[key] = [1]

def apply(function, value):
    return function(value)

def squares(n):
    for i in range(n):
        yield i * i

def root(x):
    if x < 0:
        raise ValueError(f"{x} is negative")
    return math.sqrt(x)

class Empty(Exception):
    pass

class Stack(list):
    def pop(self):
        if not self:
            raise Empty("nothing left")
        return super().pop()

@dataclasses.dataclass
class Point:
    x: int
    y: int = 0
    def __add__(self, other):
        return Point(self.x + other.x, self.y + other.y)
    def __rmul__(self, factor):
        return Point(factor * self.x, factor * self.y)
    def __lt__(self, other):
        return self.x < other.x

class Colour(enum.Enum):
    RED = 1

Pair = collections.namedtuple("Pair", "a b")

def greet():
    print("Who?", end=" ")
    name = input()
    print(f"Hello {name}")
    return name

class Context:
    def __enter__(self):
        return 5
    def __exit__(self, *error):
        self.closed = error

def word_counts():
    return collections.Counter("aab"), collections.defaultdict(int, a=1), collections.OrderedDict(b=2)

def times():
    return datetime.date(2024, 2, 29), datetime.timedelta(microseconds=1), fractions.Fraction(1, 3)

class Tree:
    def __init__(self, *children):
        self.children = children
    def __len__(self):
        return 1 + sum(map(len, self.children))
    def __contains__(self, item):
        return item == 7
    def __getitem__(self, index):
        return self.children[index]
"""

PASSING = {
    "plain data keeps its types": """
for value in (None, True, 1, 10**5000, 1.5, float("inf"), "é\\ud83d", b"\\0", [1, [2, (3,)]], (1, [2]), {1, 2},
              frozenset({1}), {"a": {1: (2,)}, (1, 2): None}, 1j, range(3), [], {}, (), bytearray(b"x")):
    result = same(value)
    assert result == value and type(result) is type(value), value
assert same(float("nan")) != same(float("nan"))
assert same([True, 1])[0] is True
""",
    "collections, dates and fractions": """
counter, default, ordered = word_counts()
assert counter == {"a": 2, "b": 1} and counter.most_common(1) == [("a", 2)]
assert default == {"a": 1} and list(ordered) == ["b"]
import datetime, fractions
assert times() == (datetime.date(2024, 2, 29), datetime.timedelta(microseconds=1), fractions.Fraction(1, 3))
pair = Pair(1, b=2)
assert pair.a == 1 and pair.b == 2
assert same(Pair(1, 2)) == Pair(1, 2)
""",
    "arguments are changed in place": """
values = [3, 1, 2]
sort(values)
assert values == [1, 2, 3]
table = {}
fill(table, key="q")
assert table == {"q": [1]}
""",
    "globals are those of now": "assert LIMIT == 3\ncount(); count()\nassert calls == 2",
    "functions of the tests are called": """
assert apply(lambda x: x + 1, 2) == 3
assert apply(len, [1, 2]) == 2
assert apply(sorted, (2, 1)) == [1, 2]
class Seen:
    def __init__(self): self.values = []
    def add(self, value): self.values.append(value); return self
seen = Seen()
assert apply(seen.add, 4) is seen and seen.values == [4]
""",
    "objects are used by reference": """
p = Point(1, 2)
assert p.x == 1 and p == Point(1, 2) and p != Point(1) and same(p) is p
assert p + Point(2) == Point(3, 2) and 2 * p == Point(2, 4) and p < Point(2)
assert (p + p).y == 4 and repr(p) == "Point(x=1, y=2)" and str(p) == repr(p)
p.x = 5
assert p.x == 5 and isinstance(p, Point) and not isinstance(3, Point) and not isinstance(Tree(), Point)
assert max([Point(1), Point(3)]) == Point(3)
assert Colour.RED == same(Colour.RED) and Colour.RED.value == 1 and Colour(1) is Colour.RED
tree = Tree(Tree(), Tree(Tree()))
assert len(tree) == 4 and len(tree[1]) == 2 and 7 in tree and 8 not in tree and bool(tree)
assert [len(child) for child in tree.children] == [1, 2]
with Context() as value:
    assert value == 5
""",
    "exceptions are caught by their names": """
try:
    root(-4)
except ValueError as error:
    assert "-4 is negative" in str(error)
else:
    assert False
s = Stack()
s.append(1)
assert len(s) == 1 and s.pop() == 1
try:
    s.pop()
except Empty as error:
    assert error.args == ("nothing left",) and isinstance(error, Exception)
else:
    assert False
""",
    "generators and iterators": """
assert list(squares(4)) == [0, 1, 4, 9]
numbers = squares(3)
assert next(numbers) == 0 and sum(numbers) == 5
try:
    next(numbers)
except StopIteration:
    pass
""",
    "what is printed and read": """
import contextlib, io, sys
from unittest import mock
output = io.StringIO()
with contextlib.redirect_stdout(output), mock.patch("builtins.input", return_value="Ada"):
    assert greet() == "Ada"
assert output.getvalue() == "Who? Hello Ada\\n"
sys.stdin = io.StringIO("Eve\\nBob\\n")
assert greet() == "Eve" and greet() == "Bob"
try:
    greet()
    assert False, "there is no third line"
except EOFError:
    pass
""",
    "modules that the program imports": "assert math.sqrt(4) == 2 and collections.Counter('a')['a'] == 1",
    "the form of HumanEval": """
METADATA = {"author": "x"}

def check(candidate):
    import copy
    rng = __import__("random").Random(42)
    for _ in range(50):
        values = [rng.randint(-9, 9) for _ in range(5)]
        expected = sorted(values)
        assert candidate(copy.deepcopy(values)) == values
        sort(values)
        assert values == expected

check(same)
""",
}


@pytest.fixture(autouse=True)
def _consent(monkeypatch):
    monkeypatch.setenv("DISTILLKIT_ALLOW", "code")


def passed(tests, program=PROGRAM, **settings):
    prompts = Prompts((Prompt("a", ({"role": "user", "content": "?"},), (1,), reference=tests),))
    responses = [Response("a", (1,), program, "stop")]
    return PythonTests(allow_execution=True, **{"timeout": 20} | settings).verify(prompts, responses) == [1.0]


@pytest.mark.parametrize("kind", PASSING)
def test_right_results_are_recognised(kind):
    assert passed(PASSING[kind])


def test_the_same_tests_hold_in_one_process(capsys):
    """The oracle: Python itself, where program and tests share their globals."""
    assert PASSING
    for kind, tests in PASSING.items():
        if kind == "what is printed and read":
            continue  # it replaces the standard input of this process
        module = type(pytest)("solution")
        __import__("sys").modules["solution"] = module
        exec(compile(PROGRAM, "solution", "exec"), vars(module))
        exec(compile(tests, kind, "exec"), vars(module))


FAILING = [
    "assert same(1) == 2",
    "assert same((1, 2)) == [1, 2]",
    "assert Point(1) == 1",
    "assert root(-1)",
    "assert undefined_name",
    "assert Point(1).z",
    "sort(5)",
    "raise ValueError",
    "import sys; sys.exit(0)",
    "assert same(1) == 1\nassert False",
    "def check():\n    assert missing(1)\ncheck()",
]


@pytest.mark.parametrize("tests", FAILING)
def test_wrong_results_are_recognised(tests):
    assert not passed(tests)


def test_many_calls_and_large_values_are_quick_enough():
    assert passed("for i in range(1000):\n    assert same(i) == i\nassert same(list(range(10**5)))[-1] == 10**5 - 1")
