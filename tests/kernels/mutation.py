"""Kernels with one operator changed, to see whether the tests of kernels would notice."""

from __future__ import annotations

import ast
import inspect
import linecache
from collections import Counter
from contextlib import contextmanager
from functools import cache

from gpugrad.kernels.template import Template

#: What an operator becomes.
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
COMPARISON = {
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
}  # fmt: skip


class _Operators(ast.NodeVisitor):
    """The operators of a body."""

    def __init__(self):
        self.found = []

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if type(node.op) in ARITHMETIC:
            self.found.append(node)

    def visit_AugAssign(self, node):
        self.generic_visit(node)
        if type(node.op) in ARITHMETIC:
            self.found.append(node)

    def visit_Compare(self, node):
        self.generic_visit(node)
        if type(node.ops[0]) in COMPARISON:
            self.found.append(node)


class _Bounded(ast.NodeTransformer):
    """A loop of which a change makes an endless one ends with an error."""

    def visit_While(self, node):
        self.generic_visit(node)
        loop = ast.parse("for _ in range(10_000): pass\nelse: raise RuntimeError('endless')").body[
            0
        ]
        stop = ast.If(ast.UnaryOp(ast.Not(), node.test), [ast.Break()], [])
        loop.body = [stop, *node.body]
        return loop


@cache
def _functions(module):
    """The functions of a module, by name, as text."""
    text = inspect.getsource(module)
    tree = ast.walk(ast.parse(text))
    return {n.name: ast.get_source_segment(text, n) for n in tree if isinstance(n, ast.FunctionDef)}


def _parse(template):
    """A body's function, and its operators that can be changed."""
    texts = _functions(inspect.getmodule(template.function))
    function = ast.parse(texts[template.function.__code__.co_name]).body[0]
    visitor = _Operators()
    for statement in function.body:
        visitor.visit(statement)
    return function, visitor.found


def operators(template):
    """How many operators of a body can be changed."""
    return len(_parse(template)[1])


def changed(template, number):
    """The code of a body with one operator changed, and what was changed."""
    function, found = _parse(template)
    node = found[number]
    before = ast.unparse(node)
    if isinstance(node, ast.Compare):
        node.ops[0] = COMPARISON[type(node.ops[0])]()
    else:
        node.op = ARITHMETIC[type(node.op)]()
    function.decorator_list = []
    function = _Bounded().visit(function)
    text = ast.unparse(ast.fix_missing_locations(function))
    what = f"{before} -> {ast.unparse(node)}"
    # The text stays readable, in tracebacks and for those who read it.
    filename = f"<{function.name}: {what}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    scope = dict(template.function.__globals__)
    exec(compile(text, filename, "exec"), scope)
    return scope[function.name].__code__, what


@contextmanager
def mutated(template, number):
    """Inside the block a body has a changed operator.

    Instances made before are as they were: who looks at the mutant asks for those of a new target.
    """
    right = template.function.__code__
    wrong, what = changed(template, number)
    template.function.__code__ = wrong
    try:
        yield what
    finally:
        template.function.__code__ = right


def bodies(module):
    """The templates that a module defines itself, by name."""
    return {
        name: thing
        for name, thing in vars(module).items()
        if isinstance(thing, Template)
        and hasattr(thing, "function")
        and not thing.bound
        and inspect.getmodule(thing.function) is module
    }


def unnoticed(template, equal, check):
    """What can be changed in a body without failing the check.

    Parameters
    ----------
    equal:
        Changes that change no result: what they are, and why. They are not tried. Where the same
        change can be made in several places, the third alone is called "a + b -> a - b (3)". A
        change that the body has not is an error.
    check:
        Called without arguments; it raises an exception where results are wrong.
    """
    missed: list[str] = []
    places: Counter[str] = Counter()
    for number in range(operators(template)):
        with mutated(template, number) as what:
            places[what] += 1
            place = f"{what} ({places[what]})"
            places[place] += 1
            if what in equal or place in equal:
                continue
            try:
                check()
            except Exception:
                continue
        missed.append(place)
    assert set(equal) <= set(places), f"{template.name} has no {set(equal) - set(places)}"
    return missed
