"""Kernel text -> one C++ translation unit.

The text itself stays as MLX wrote it, except that the threadgroup variables of a
kernel's body get their storage from the executor.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tests.metal_host.records import Record

_KERNEL = re.compile(r"\[\[kernel\]\] void (\w+)\(\n")
_PARAMETER = re.compile(r"\s*(.*?)(\w+) \[\[(\w+)(?:\((\d+)\))?\]\]")
_VARIABLE = re.compile(
    r"\bthreadgroup\s+((?:\w|::)+(?:<[^;>]*>)?)\s+(\w+)\s*((?:\[[^\]]*\]\s*)*);"
)
# g++ takes no attributes on an explicit instantiation.
_INSTANTIATION = re.compile(
    r'template \[\[host_name\("\w+"\)\]\] \[\[kernel\]\] decltype'
)
_DEFINITION = re.compile(r"^\s*#\s*define\s+(\w+)", re.M)


@dataclass(frozen=True)
class Signature:
    """A kernel's instantiated name, its parameters, and where its body starts."""

    instance: str
    parameters: tuple[tuple[str, str, str, str | None], ...]  # type, name, attribute
    body: int


def signature(text: str) -> Signature:
    """Read the signature that MLX wrote."""
    found = _KERNEL.search(text)
    assert found, "no kernel in the text"
    end = text.index(") {\n", found.end())
    parameters = []
    for line in text[found.end() : end].split(",\n"):
        parameter = _PARAMETER.fullmatch(line)
        assert parameter, line
        kind, name, attribute, index = parameter.groups()
        parameters.append((kind.strip(), name, attribute, index))
    instance = re.search(rf"decltype\(({found[1]}<.*>)\)", text)
    return Signature(
        instance[1] if instance else found[1], tuple(parameters), end + len(") {\n")
    )


def threadgroup_variables(text: str, replace: str | None = None) -> str:
    """The text with each threadgroup declaration of the body rewritten.

    Args:
        text: A record's text.
        replace: What to put for a declaration, a template for `re.sub` with the groups
            type, name and dimensions; None gives the executor's storage.
    """
    body = signature(text).body
    count = 0

    def storage(found: re.Match[str]) -> str:
        nonlocal count
        kind, name, dimensions = found.groups()
        alias = f"host_type_{count}"
        slot, count = count, count + 1
        return (
            f"typedef {kind} {alias}{dimensions}; auto& {name} = *({alias}*)"
            f"host::threadgroup_memory({slot}, sizeof({alias}), alignof({alias}), "
            f'"{name}");'
        )

    tail = _INSTANTIATION.sub("template decltype", text[body:])
    return text[:body] + _VARIABLE.sub(replace or storage, tail)


def unit(records: Iterable[Record], *, is_wide: bool = False) -> str:
    """A translation unit with every kernel, each in a namespace of its own.

    Args:
        records: The kernels.
        is_wide: With accesses of 16 bytes, as for CUDA. Each kernel is given the macro,
            since it is undefined after each.
    """
    lines = ['#include "mlx/backend/metal/kernels/utils.h"']
    entries = {}
    for record in records:
        key = record.key
        if key in entries:
            continue
        shape = signature(record.text)
        arguments = []
        for kind, _, attribute, index in shape.parameters:
            if attribute == "buffer":
                pointee = re.sub(r"\b(device|constant)\b", "", kind)
                value = f"({pointee.replace('&', '*')})b[{index}]"
                arguments.append(f"*{value}" if "&" in pointee else value)
            elif kind == "uint3":
                axes = ", ".join(f"a.{attribute}.{axis}" for axis in "xyz")
                arguments.append(f"uint3({axes})")
            else:
                arguments.append(f"a.{attribute}")
        lines += [
            f"namespace {key} {{",
            *(["#define DORA_WIDE 1"] if is_wide else []),
            f'#line 1 "{key}"',
            threadgroup_variables(record.text),
            "static void run(void** b, const host::Attributes& a) {",
            f"  {shape.instance}({', '.join(arguments)});",
            f"}}\n}}  // namespace {key}",
            *(f"#undef {name}" for name in _DEFINITION.findall(record.text)),
        ]
        entries[key] = f'{{"{key}", {key}::run}}'
    lines.append(
        "namespace host {\n"
        f"const Kernel kernels[] = {{{', '.join(entries.values())}}};\n"
        f"const int kernel_count = {len(entries)};\n}}"
    )
    return "\n".join(lines)
