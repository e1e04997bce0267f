"""Metal's own rules, which a C++ compiler does not know, for one generated text.

Plain text rules need nothing. The type check needs libclang (the PyPI package of that
name): Metal is C++14 with address spaces, and so is what clang reads here.
"""

import re
from pathlib import Path

from tests.metal_host.records import Record
from tests.metal_host.translate import threadgroup_variables

_DECLARATIONS = Path(__file__).parent / "lint"
_SPACES = {"device", "constant", "thread", "threadgroup"}
_DIALECT = "-std=c++14 -nostdinc -nostdinc++ -fno-exceptions -fno-rtti"
_WARNINGS = "-Wall -Wextra -Wdouble-promotion -Wvla -Wshadow"
_NO_WARNINGS = """
    unused-parameter unused-function unused-const-variable unknown-pragmas
    c++17-extensions ignored-attributes unknown-attributes undefined-inline
    undefined-internal
"""
_FLAGS = [
    *_DIALECT.split(),
    *("-target", "x86_64-linux-gnu"),
    *_WARNINGS.split(),
    *(f"-Wno-{name}" for name in _NO_WARNINGS.split()),
]

# What to look for in the text without comments, and why it is refused.
_FORBIDDEN = {
    r"\bdouble\b": "Metal has no double",
    r"\bstd::": "Metal has no std",
    r"(?<![\w.])(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?(?![\w.])": (
        "a literal without f is a double"
    ),
    r"\b(?:goto|new|delete|throw|try|catch|virtual|dynamic_cast|typeid|asm)\b": (
        "not in the Metal Shading Language"
    ),
    r"\[[&=]?\]\s*\(": "Metal has no lambdas",
    r"^\s*#\s*include": "MLX compiles from a string: nothing to include",
    r"\b(?:printf|malloc|free|memcpy|memset|assert)\s*\(": "no C library",
    r"\bstatic\s+(?!_cast)(?!const)\w+ \w+\s*(?:=|;)": "no mutable static variables",
}


def text_errors(text: str) -> list[str]:
    """Breaches of the rules that reading the text shows."""
    errors = [] if text.isascii() else ["the text is not ASCII"]
    bare = re.sub(
        r"//[^\n]*|/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S
    )
    for pattern, reason in _FORBIDDEN.items():
        for found in re.finditer(pattern, bare, re.M):
            line = bare.count("\n", 0, found.start()) + 1
            errors.append(f"line {line}: {found[0].strip()!r}: {reason}")
    return errors


def type_errors(record: Record) -> list[str]:
    """What clang says with Metal's address spaces, and pointers that name none."""
    from clang import cindex

    body = threadgroup_variables(record.text, r"static threadgroup \1 \2\3;")
    source = f"#include <metal_stdlib>\nusing namespace metal;\n#line 1\n{body}"
    unit = cindex.Index.create().parse(
        "kernel.cpp",
        args=[*_FLAGS, "-I", str(_DECLARATIONS)],
        unsaved_files=[("kernel.cpp", source)],
    )
    # Commas of template arguments do not part declarations.
    plain = re.sub(r"<[^<>;(){}]*>", lambda m: m[0].replace(",", " "), source)
    errors = [
        f"line {d.location.line}: {d.spelling}"
        for d in unit.diagnostics
        if d.severity >= cindex.Diagnostic.Warning
    ]
    for cursor in unit.cursor.walk_preorder():
        place = cursor.location.file
        if place is None or place.name != "kernel.cpp" or cursor.type is None:
            continue
        is_variable = cursor.kind.name in ("PARM_DECL", "VAR_DECL")
        is_pointer = cursor.type.kind.name in ("POINTER", "LVALUEREFERENCE")
        if not (is_variable and is_pointer):
            continue
        start = max(plain.rfind(c, 0, cursor.location.offset) for c in "(,;{}")
        declaration = source[start : cursor.location.offset]
        if not _SPACES & set(re.findall(r"\w+", declaration)):
            errors.append(
                f"line {cursor.location.line}: pointer {cursor.spelling} names no "
                "address space"
            )
    return errors
