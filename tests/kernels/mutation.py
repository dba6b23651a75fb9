"""Kernels with one operator changed, to see whether the tests of kernels would notice."""

from __future__ import annotations

import ast
import gc
import inspect
from contextlib import contextmanager

from gpugrad.kernels.template import Template

#: What an operator becomes.
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult}
COMPARISON = {
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
}  # fmt: skip


class _Operators(ast.NodeVisitor):
    """The operators that compute values: not those in subscripts and bounds of loops.

    A changed index leaves the array, and compiled code does not look.
    """

    def __init__(self):
        self.found = []

    def visit_Subscript(self, node):
        pass

    def visit_For(self, node):
        for statement in node.body:
            self.visit(statement)

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if type(node.op) in ARITHMETIC:
            self.found.append(node)

    def visit_AugAssign(self, node):
        self.visit(node.value)
        if type(node.op) in ARITHMETIC:
            self.found.append(node)

    def visit_Compare(self, node):
        self.generic_visit(node)
        if type(node.ops[0]) in COMPARISON:
            self.found.append(node)


def _parse(template):
    module = ast.parse(inspect.getsource(inspect.getmodule(template.function)))
    name = template.function.__code__.co_name
    return next(n for n in ast.walk(module) if isinstance(n, ast.FunctionDef) and n.name == name)


def operators(template):
    """How many operators of a body can be changed."""
    visitor = _Operators()
    for statement in _parse(template).body:
        visitor.visit(statement)
    return len(visitor.found)


def changed(template, number):
    """The code of a body with one operator changed, and what was changed."""
    function = _parse(template)
    visitor = _Operators()
    for statement in function.body:
        visitor.visit(statement)
    node = visitor.found[number]
    before = ast.unparse(node)
    if isinstance(node, ast.Compare):
        node.ops[0] = COMPARISON[type(node.ops[0])]()
    else:
        node.op = ARITHMETIC[type(node.op)]()
    function.decorator_list = []
    module = ast.fix_missing_locations(ast.Module([function], []))
    scope = dict(template.function.__globals__)
    exec(compile(module, f"<mutant of {function.name}>", "exec"), scope)
    return scope[function.name].__code__, f"{function.name}: {before} -> {ast.unparse(node)}"


def _forget_instances(module):
    """Let everything be compiled again."""
    for thing in gc.get_objects():
        if issubclass(type(thing), Template):  # a weak proxy would answer for its object
            for memory in ("_instances", "_bindings"):
                getattr(thing, memory, {}).clear()
    for thing in vars(module).values():
        if hasattr(thing, "cache_clear"):
            thing.cache_clear()


@contextmanager
def mutated(template, number):
    """Inside the block the kernels of the template's module compute with a changed operator."""
    module = inspect.getmodule(template.function)
    right = template.function.__code__
    wrong, what = changed(template, number)
    template.function.__code__ = wrong
    _forget_instances(module)
    try:
        yield what
    finally:
        template.function.__code__ = right
        _forget_instances(module)


def bodies(module):
    """The templates that a module defines itself, by name."""
    return {
        name: thing
        for name, thing in vars(module).items()
        if isinstance(thing, Template) and inspect.getmodule(thing.function) is module
    }
