"""The library's docstrings as reStructuredText: they are plain text with formulas, to be read in a terminal.

Napoleon makes fields of the sections ("Args:", "Returns:", ...). The rest is text in which `name` is code,
an indented paragraph is a formula, and *, | and _ mean themselves.
"""

import functools
import re
import textwrap

from _site import generate

CODE = re.compile(r"(`[^`\n]+(?:\n[^`\n]+)?`)")
FIELD = re.compile(r"\s*(?::\w+(?: \S+)?:|\.\. [\w-]+::)\s?")
NAME = re.compile(r"[A-Za-z][\w.]*\Z")
ITEM = re.compile(r"\s*- ")


@functools.cache
def addresses() -> dict[str, str]:
    """Where public names are in the reference, by their full names and by their last parts."""
    names = [name for page in generate.reference().values() for name, _ in page]
    return {name.rpartition(".")[2]: name for name in reversed(names)} | {n: n for n in names}


def address(words: list[str]) -> str | None:
    """The reference's name of a public object or of its member, however it is written."""
    for i in range(len(words), 0, -1):
        if (full := ".".join(["stochsolvers", *words[:i]])) in addresses():
            return ".".join([full, *words[i:]])
    home = addresses().get(words[0])
    return home and ".".join([home, *words[1:]])


def code(span: str) -> str:
    """A public name, or a member of a public class, becomes a link; all else is code."""
    inner = " ".join(span[1:-1].split())
    name = inner.removeprefix("ss.").removeprefix("stochsolvers.").removesuffix("()")
    target = address(name.split(".")) if NAME.match(name) else None
    return f":py:obj:`{inner} <{target}>`" if target else f"``{inner}``"


def plain(text: str) -> str:
    """Text whose punctuation means itself."""
    text = re.sub(r"([\\*|])", r"\\\1", text)
    return re.sub(r"(?<=\w)_(?!\w)", r"\\_", text)


def inline(text: str) -> str:
    """A paragraph, with code between single backticks."""
    text = text.replace("``", "`")
    parts = CODE.split(text)
    for i in range(1, len(parts), 2):  # markup ends before a letter at an escaped space
        parts[i] = code(parts[i]) + "\\ " * bool(re.match(r"\w", parts[i + 1]))
    return "".join([plain(part) if i % 2 == 0 else part for i, part in enumerate(parts)])


def indentation(line: str) -> int:
    """Leading spaces."""
    return len(line) - len(line.lstrip())


def paragraphs(lines: list[str]) -> list[list[str]]:
    """Runs of lines without an empty one between them."""
    runs, run = [], []
    for line in [*lines, ""]:
        if line.strip():
            run.append(line)
        elif run:
            runs.append(run)
            run = []
    return runs


def convert(lines: list[str]) -> list[str]:
    """The lines of a docstring, Napoleon's work done, as reStructuredText."""
    out: list[str] = []
    text_indent = 0  # deeper is a formula: that of the text, of an item; any depth within a field
    for run in paragraphs(lines):
        first = run[0]
        if indentation(first) == 0:
            text_indent = 0
        if first.lstrip().startswith(">>> "):
            out += [*run, ""]
        elif indentation(first) >= text_indent + 3 or first.lstrip().startswith("| "):
            formula = textwrap.indent(textwrap.dedent("\n".join(run)), " " * (text_indent + 3))
            out += [" " * text_indent + "::", "", *formula.split("\n"), ""]
        else:
            out += paragraph(run)
            if any(FIELD.match(line) for line in run):
                text_indent = 1000
            elif ITEM.match(first):
                text_indent = indentation(first) + 2
    return out


def paragraph(run: list[str]) -> list[str]:
    """Text, fields and items; a formula may follow without an empty line."""
    out, block = [], []

    def flush():
        if block:
            text = inline("\n".join(block))
            out.extend(text.split("\n"))
            block.clear()

    for line in run:
        field = FIELD.match(line)
        if field:
            flush()
            out.append(field.group() + inline(line[field.end() :]))
            continue
        if ITEM.match(line) and block and not ITEM.match(block[0]):
            flush()
            out.append("")
        block.append(line)
    flush()
    return [*out, ""]


def process(app, what, name, obj, options, lines):
    """Sphinx's event, after Napoleon's."""
    lines[:] = convert(list(lines))


def setup(app):
    """Sphinx's entry point."""
    app.connect("autodoc-process-docstring", process, priority=900)
    return {"parallel_read_safe": True}
